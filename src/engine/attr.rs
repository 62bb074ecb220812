//! Attributes and extended attributes, of the live tree and of snapshots.

use super::Engine;
use super::backing::Backing;
use super::creds::{KillPriv, Unprivileged};
use super::handle::{LiveFile, OpenFile};
use super::keep::Range;
use super::nodes::{Node, NodeId, ObjectRef};
use super::object::{Member, Object, SET_ID};
use super::times::with_owed;
use super::unsettled::can_be_synced;
use crate::error::{Error, Result};
use crate::ids::Ino;
use crate::store::{AttrImage, Timestamp};
use crate::sync::{Arc, Ordering};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use rustix::io::Errno;

/// The extended attribute in which the kernel keeps the capabilities of a program (capabilities(7)).
pub const CAPABILITIES: &[u8] = b"security.capability";

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

impl Attr {
    /// Attributes of which no more than the node and the kind (`DT_*`) is known.
    pub fn of_kind(node: NodeId, kind: u8) -> Self {
        let image = AttrImage {
            mode: u32::from(kind) << 12,
            ..AttrImage::default()
        };
        Self {
            node,
            shown: node,
            image,
        }
    }
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
                _ => self.live_attr(object, self.object_fd(object)?.as_fd()),
            },
            Node::At(member) => self.attr_of_member(member),
            Node::Folder(dir) => self.folder_attr(dir),
        }
    }

    /// The size of an open file.
    pub fn size(&self, file: &OpenFile) -> Result<u64> {
        match file {
            OpenFile::Live(live) => Ok(self.backing.stat(live.fd())?.size),
            OpenFile::At(at) => {
                let reading = self.reading(at.member.snapshot)?;
                Ok(self.member_stat(reading.epoch, &at.member, None)?.size)
            }
        }
    }

    fn live_attr(&self, object: &Object, fd: BorrowedFd<'_>) -> Result<Attr> {
        let owed = self.times.owed(object.ino());
        let image = self.backing.stat(fd)?;
        Ok(self.attr_of_live(object, with_owed(owed, image)))
    }

    /// The attributes of a live object whose stat fields are known.
    pub(super) fn attr_of_live(&self, object: &Object, mut image: AttrImage) -> Attr {
        // The link in `retained/`, and the `.` of a directory there, are not names of the live tree.
        if object.retained.load(Ordering::SeqCst) {
            image.nlink = 0;
        }
        image = with_owed(self.times.owed(object.ino()), image);
        self.leave_hidden_out(object.ino(), &mut image);
        Attr {
            node: self.nodes.live_id(object.ino()),
            shown: object.ino().0,
            image,
        }
    }

    /// `.cowfs` is no subdirectory of the root, where the filesystem counts them as links of it.
    fn leave_hidden_out(&self, ino: Ino, image: &mut AttrImage) {
        if ino == self.backing.root_entry().ino && image.nlink > 2 {
            image.nlink -= 1;
        }
    }

    /// The attributes of an object in a snapshot.
    pub(super) fn attr_of_member(&self, member: &Member) -> Result<Attr> {
        if let Some(attr) = self.attr_of_lost(member) {
            return Ok(attr);
        }
        let mut image = self.in_snapshot(member.snapshot, |k| self.member_stat(k, member, None))?;
        self.leave_hidden_out(member.entry.ino, &mut image);
        Ok(Attr {
            node: member.node(),
            shown: member.shown(),
            image: AttrImage {
                xattrs: Vec::new(),
                ..image
            },
        })
    }

    /// Changes attributes: one operation of C1. `file`: an open file of the object; `caller`: one who
    /// lacks `CAP_FSETID`.
    pub fn setattr(
        &self,
        node: &Node,
        set: &SetAttr,
        file: Option<&OpenFile>,
        caller: Option<Unprivileged>,
    ) -> Result<Attr> {
        let Node::Live(object) = node else {
            return Err(Error::ReadOnly);
        };
        let fd = self.object_fd(object)?;
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
                op.keep_data(object, fd, &Range::from_size(size))?;
            }
            if let Some(readable) = self.last_chance_to_read(object, set)? {
                op.keep_data(object, readable.as_fd(), &Range::new(0, u64::MAX))?;
            }
            op.settle()?; // I1
            if let (Some(size), Some(fd)) = (set.size, writable) {
                self.for_caller(object, fd, caller, || self.backing.truncate(fd, size))?;
            }
            if set.mode.is_some_and(|mode| mode & SET_ID != 0) {
                object.without_set_id.store(false, Ordering::SeqCst);
            }
            apply(&self.backing, fd.as_fd(), set, caller)?;
            if set.mtime.is_some() && self.times.knows(object.ino()) {
                let time = self.backing.stat(fd.as_fd())?.mtime;
                self.times.set(object.ino(), time);
            }
            Ok(())
        })?;
        self.live_attr(object, fd.as_fd())
    }

    fn open_to_truncate(&self, object: &Object) -> Result<OwnedFd> {
        if object.entry.kind != libc::DT_REG {
            return Err(Errno::INVAL.into());
        }
        self.backing.open_writable(&object.entry)
    }

    /// Whether much may have to be kept for a change of attributes.
    pub fn keeps_much(&self, set: &SetAttr) -> bool {
        set.size.is_some() || self.shuts(set)
    }

    /// Whether cowfs may lose the right to read with it.
    fn shuts(&self, set: &SetAttr) -> bool {
        set.mode.is_some_and(|mode| mode & 0o400 == 0) && !self.backing.overrides_modes()
    }

    /// A user without root's powers who takes the right to read from an own file takes it from cowfs too, which
    /// could not read for its snapshots any more: a descriptor to keep all of the file by, before that.
    fn last_chance_to_read(&self, object: &Object, set: &SetAttr) -> Result<Option<OwnedFd>> {
        if !self.shuts(set) || object.entry.kind != libc::DT_REG {
            return Ok(None);
        }
        match self.backing.open_object(&object.entry, OFlags::RDONLY) {
            Err(Error::Os(Errno::ACCESS)) => Ok(None), // shut already
            other => other.map(Some),
        }
    }

    /// The one way to change attributes: lock, enter the epoch, keep them, settle, `apply`.
    pub(super) fn change_attr(
        &self,
        object: &Object,
        mut apply: impl FnMut(&mut super::keep::Op<'_>) -> Result<()>,
    ) -> Result<()> {
        // No space that snapshots hold would help: ENOSPC means that an inode has no room for more attributes.
        self.with_room(u64::MAX, || {
            let mut op = self.begin(&[object]);
            if !can_be_synced(&object.entry) {
                self.unsettled.note(op.epoch_of(object), &object.entry);
            }
            op.keep_attr(object)?;
            apply(&mut op)
        })
    }

    /// The value of an extended attribute.
    pub fn getxattr(&self, node: &Node, name: &[u8]) -> Result<Vec<u8>> {
        match node {
            Node::Live(object)
                if name == CAPABILITIES && object.without_capabilities.load(Ordering::SeqCst) =>
            {
                Err(Errno::NODATA.into())
            }
            Node::Live(object) => self
                .backing
                .get_xattr(self.object_fd(object)?.as_fd(), name),
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
            Node::Live(object) => self.backing.list_xattr(self.object_fd(object)?.as_fd()),
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
        self.in_snapshot(member.snapshot, |k| self.member_attr(k, member))
    }

    /// Sets an extended attribute; `flags` are those of setxattr(2). `caller`: one who sets an ACL and lacks `CAP_FSETID`:
    /// unless of the file's group, that clears the set-group-ID bit, as chmod(2) by such a caller does.
    pub fn setxattr(
        &self,
        node: &Node,
        name: &[u8],
        value: &[u8],
        flags: i32,
        caller: Option<Unprivileged>,
    ) -> Result<()> {
        if let Node::Live(object) = node
            && name == CAPABILITIES
        {
            object.without_capabilities.store(false, Ordering::SeqCst);
        }
        self.change_xattr(node, |fd| {
            let group = caller.map(|_| self.backing.stat(fd)).transpose()?;
            // Whatever the mode: for an ACL the filesystem asks for the group in any case (`posix_acl_update_mode`).
            let _killing = caller
                .zip(group)
                .map(|(caller, stat)| KillPriv::of(caller, libc::S_ISGID, &[stat.gid]));
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
        change: impl Fn(BorrowedFd<'_>) -> Result<()>,
    ) -> Result<()> {
        let Node::Live(object) = node else {
            return Err(Error::ReadOnly);
        };
        let fd = self.object_fd(object)?;
        self.change_attr(object, |op| {
            op.settle()?;
            change(fd.as_fd()) // I1
        })
    }

    /// fsync(2) of an open file: the journal first, as far as it guards this file, and then the file (C8).
    pub fn fsync(&self, file: &LiveFile, data_only: bool) -> Result<()> {
        self.pay_for(&file.object)?;
        self.backing.sync(file.fd(), data_only)?;
        match self.unsettled.take_lost(file.object.ino()) {
            Some(errno) => Err(errno.into()),
            None => Ok(()),
        }
    }

    /// Attributes for an object that was just found or made, and that the kernel is now told of.
    pub(super) fn tell(&self, object: &ObjectRef, image: AttrImage) -> Attr {
        self.nodes.told(object);
        self.attr_of_live(object, image)
    }
}

/// Owner before mode, because a change of owner clears setuid and setgid; times last, because all else
/// changes them.
fn apply(
    backing: &Backing,
    fd: BorrowedFd<'_>,
    set: &SetAttr,
    caller: Option<Unprivileged>,
) -> Result<()> {
    if set.uid.is_some() || set.gid.is_some() {
        let before = caller.map(|_| backing.stat(fd)).transpose()?;
        let _killing = caller.zip(before).map(|(caller, before)| {
            let groups = [before.gid, set.gid.unwrap_or(before.gid)];
            KillPriv::of(caller, before.mode, &groups)
        });
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
