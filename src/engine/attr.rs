//! Attributes and extended attributes, of the live tree and of snapshots.

use super::Engine;
use super::backing::Backing;
use super::creds::KillPriv;
use super::handle::{LiveFile, OpenFile};
use super::object::{Member, Node, NodeId, Object, ObjectRef, snapshot_node};
use crate::error::{Error, Result};
use crate::store::{AttrImage, Timestamp};
use crate::sync::{Arc, Ordering};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use rustix::io::Errno;

/// Attributes of a node, as stat(2) shows them. `image.xattrs` is empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attr {
    /// The node number.
    pub node: NodeId,
    /// What `st_ino` shows: the node number, but for the root, whose node number FUSE prescribes.
    pub shown: u64,
    /// The stat fields.
    pub image: AttrImage,
}

/// A time to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetTime {
    /// The time of the call.
    Now,
    /// A given time.
    At(Timestamp),
}

/// The attributes to set in one request; those that are `None` stay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SetAttr {
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Time of last access.
    pub atime: Option<SetTime>,
    /// Time of last modification.
    pub mtime: Option<SetTime>,
}

impl SetAttr {
    fn times(&self) -> Option<Timestamps> {
        let spec = |time: Option<SetTime>| match time {
            None => Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_OMIT,
            },
            Some(SetTime::Now) => Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_NOW,
            },
            Some(SetTime::At(t)) => Timespec {
                tv_sec: t.sec,
                tv_nsec: i64::from(t.nsec),
            },
        };
        (self.atime.is_some() || self.mtime.is_some()).then(|| Timestamps {
            last_access: spec(self.atime),
            last_modification: spec(self.mtime),
        })
    }
}

impl Engine {
    /// The attributes of a node; `file`: an open file of it, if there is one.
    pub fn getattr(&self, node: &Node, file: Option<&OpenFile>) -> Result<Attr> {
        match node {
            Node::Live(object) => match file {
                Some(OpenFile::Live(live)) => self.live_attr(object, live.fd()),
                _ => self.live_attr(object, self.backing.path_fd(&object.entry)?.as_fd()),
            },
            Node::At(member) => self.attr_of_member(member),
            Node::Folder(dir) => self.folder_attr(dir),
        }
    }

    fn live_attr(&self, object: &Object, fd: BorrowedFd<'_>) -> Result<Attr> {
        let image = self.backing.stat(fd)?;
        Ok(self.attr_of_live(object, image))
    }

    /// The attributes of a live object whose stat fields are known.
    pub(super) fn attr_of_live(&self, object: &Object, mut image: AttrImage) -> Attr {
        // The link in `retained/` is not a name of the live tree.
        if object.retained.load(Ordering::SeqCst) {
            image.nlink = image.nlink.saturating_sub(1);
        }
        Attr {
            node: self.nodes.live_id(object.ino()),
            shown: object.ino().0,
            image,
        }
    }

    /// The attributes of an object in a snapshot.
    pub(super) fn attr_of_member(&self, member: &Member) -> Result<Attr> {
        let reading = self.reading(member.snapshot)?;
        let image = self.member_stat(reading.epoch, member, None)?;
        let node = snapshot_node(member.snapshot, member.entry.ino);
        Ok(Attr {
            node,
            shown: node,
            image: AttrImage {
                xattrs: Vec::new(),
                ..image
            },
        })
    }

    /// Changes attributes: one operation of C1. `file`: an open file of the object; `kill_priv`: the caller
    /// lacks `CAP_FSETID`.
    pub fn setattr(
        &self,
        node: &Node,
        set: &SetAttr,
        file: Option<&OpenFile>,
        kill_priv: bool,
    ) -> Result<Attr> {
        let Node::Live(object) = node else {
            return Err(Error::ReadOnly);
        };
        let fd = self.backing.path_fd(&object.entry)?;
        let opened;
        let writable = match (set.size, file) {
            (None, _) => None,
            (Some(_), Some(OpenFile::Live(live))) if live.writable => Some(live.fd()),
            (Some(_), _) => {
                opened = self.open_to_truncate(object)?;
                Some(opened.as_fd())
            }
        };
        self.change_attr(object, |op| {
            if let (Some(size), Some(fd)) = (set.size, writable) {
                op.keep_data(object, fd, size, u64::MAX)?;
            }
            op.settle()?; // I1
            if let (Some(size), Some(fd)) = (set.size, writable) {
                let _killing = KillPriv::when(kill_priv);
                self.backing.truncate(fd, size)?;
            }
            apply(&self.backing, fd.as_fd(), set)
        })?;
        self.live_attr(object, fd.as_fd())
    }

    fn open_to_truncate(&self, object: &Object) -> Result<OwnedFd> {
        if object.entry.kind != libc::DT_REG {
            return Err(Errno::INVAL.into());
        }
        self.backing.open_object(&object.entry, OFlags::RDWR)
    }

    /// The one way to change attributes: lock, enter the epoch, keep them, settle, `apply`.
    fn change_attr(
        &self,
        object: &Object,
        apply: impl FnOnce(&mut super::keep::Op<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut op = self.begin(&[object]);
        op.keep_attr(object)?;
        apply(&mut op)
    }

    /// The value of an extended attribute.
    pub fn getxattr(&self, node: &Node, name: &[u8]) -> Result<Vec<u8>> {
        match node {
            Node::Live(object) => self
                .backing
                .get_xattr(self.backing.path_fd(&object.entry)?.as_fd(), name),
            Node::At(member) => {
                let image = self.full_member(member)?;
                let found = image.xattrs.into_iter().find(|(known, _)| known == name);
                found
                    .map(|(_, value)| value)
                    .ok_or(Error::Os(Errno::NODATA))
            }
            Node::Folder(_) => Err(Errno::NODATA.into()),
        }
    }

    /// The names of all extended attributes.
    pub fn listxattr(&self, node: &Node) -> Result<Vec<Vec<u8>>> {
        match node {
            Node::Live(object) => self
                .backing
                .list_xattr(self.backing.path_fd(&object.entry)?.as_fd()),
            Node::At(member) => Ok(self
                .full_member(member)?
                .xattrs
                .into_iter()
                .map(|(name, _)| name)
                .collect()),
            Node::Folder(_) => Ok(Vec::new()),
        }
    }

    fn full_member(&self, member: &Arc<Member>) -> Result<AttrImage> {
        let reading = self.reading(member.snapshot)?;
        self.member_attr(reading.epoch, member)
    }

    /// Sets an extended attribute; `flags` are those of setxattr(2). `kill_sgid`: an ACL set by one who is not
    /// of the file's group clears the set-group-ID bit, as chmod(2) by such a caller does.
    pub fn setxattr(
        &self,
        node: &Node,
        name: &[u8],
        value: &[u8],
        flags: i32,
        kill_sgid: bool,
    ) -> Result<()> {
        self.change_xattr(node, |fd| {
            let _killing = KillPriv::when(kill_sgid);
            self.backing.set_xattr(fd, name, value, flags)
        })
    }

    /// Removes an extended attribute.
    pub fn removexattr(&self, node: &Node, name: &[u8]) -> Result<()> {
        self.change_xattr(node, |fd| self.backing.remove_xattr(fd, name))
    }

    fn change_xattr(
        &self,
        node: &Node,
        change: impl FnOnce(BorrowedFd<'_>) -> Result<()>,
    ) -> Result<()> {
        let Node::Live(object) = node else {
            return Err(Error::ReadOnly);
        };
        let fd = self.backing.path_fd(&object.entry)?;
        self.change_attr(object, |op| {
            op.settle()?;
            change(fd.as_fd()) // I1
        })
    }

    /// fsync(2) of an open file: the journal first, then the file that it guards (C8).
    pub fn fsync(&self, file: &LiveFile, data_only: bool) -> Result<()> {
        self.store.sync()?;
        self.backing.sync(file.fd(), data_only)
    }

    /// Attributes for an object that was just found or made, and that the kernel is now told of.
    pub(super) fn tell(&self, object: &ObjectRef, image: AttrImage) -> Attr {
        self.nodes.told(object);
        self.attr_of_live(object, image)
    }
}

/// Owner before mode, because a change of owner clears setuid and setgid; times last, because all else
/// changes them.
fn apply(backing: &Backing, fd: BorrowedFd<'_>, set: &SetAttr) -> Result<()> {
    if set.uid.is_some() || set.gid.is_some() {
        backing.chown(fd, set.uid, set.gid)?;
    }
    if let Some(mode) = set.mode {
        backing.chmod(fd, mode)?;
    }
    if let Some(times) = set.times() {
        backing.utimens(fd, &times)?;
    }
    Ok(())
}
