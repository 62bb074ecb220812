//! New names: mkdir, mknod, symlink, create, link.

use super::check_there;
use crate::engine::Engine;
use crate::engine::attr::Attr;
use crate::engine::backing::Found;
use crate::engine::creds::{ActingAs, Caller};
use crate::engine::handle::{LiveFile, access};
use crate::engine::keep::Op;
use crate::engine::nodes::{Node, ObjectRef};
use crate::engine::object::Object;
use crate::engine::unsettled::can_be_synced;
use crate::error::{Error, Result};
use crate::ids::BLOCK;
use crate::sync::Ordering;
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;

/// What a new name is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Make<'a> {
    /// A directory of this mode.
    Directory(u32),
    /// A file of this mode and type, with this device number.
    Node(u32, u64),
    /// A symlink to this target.
    Symlink(&'a [u8]),
}

impl Engine {
    /// Makes a directory, special file or symlink; the kernel is told of it.
    pub fn make(&self, parent: &Node, name: &[u8], make: Make<'_>, caller: Caller) -> Result<Attr> {
        let dir = self.writable_dir(parent, name)?;
        let fd = self.object_fd(&dir)?;
        let mut op = self.with_room(BLOCK as u64, || {
            let op = self.begin_new(&dir, name)?;
            let acting = ActingAs::new(caller);
            match make {
                Make::Directory(mode) => {
                    self.backing.mkdir(fd.as_fd(), name, acting.mode(mode))?;
                }
                Make::Node(mode, rdev) => {
                    let mode = acting.mode(mode);
                    self.backing.mknod(fd.as_fd(), name, mode, rdev)?;
                }
                Make::Symlink(target) => self.backing.symlink(fd.as_fd(), name, target)?,
            }
            Ok(op)
        })?;
        let (object, found) = self.adopt(&mut op, &dir, fd.as_fd(), name, caller)?;
        Ok(self.tell(&object, found.attr))
    }

    /// Creates a regular file and opens it; the kernel is told of it. A file that exists by now is opened,
    /// unless `O_EXCL` forbids it.
    pub fn create(
        &self,
        parent: &Node,
        name: &[u8],
        mode: u32,
        flags: i32,
        caller: Caller,
    ) -> Result<(Attr, LiveFile)> {
        let dir = self.writable_dir(parent, name)?;
        let fd = self.object_fd(&dir)?;
        let made = self.with_room(BLOCK as u64, || {
            let op = self.begin_new(&dir, name)?;
            let acting = ActingAs::new(caller);
            let mode = acting.mode(mode);
            let file = self.backing.create(fd.as_fd(), name, mode, access(flags))?;
            Ok((op, file))
        });
        match made {
            Ok((mut op, file)) => {
                let (object, found) = self.adopt(&mut op, &dir, fd.as_fd(), name, caller)?;
                object.without_capabilities.store(true, Ordering::SeqCst);
                let attr = self.tell(&object, found.attr);
                let file = LiveFile::open(object, flags, || Ok(self.backing.for_writer(file)))?;
                Ok((attr, file))
            }
            Err(Error::Os(Errno::EXIST)) if flags & libc::O_EXCL == 0 => {
                let found = self.find_live(&dir, name)?.ok_or(Error::Os(Errno::NOENT))?;
                let object = self.object(&found.entry, None)?;
                let file = self.open_live(&object, flags)?;
                Ok((self.tell(&object, found.attr), file))
            }
            Err(error) => Err(error),
        }
    }

    /// Begins an operation that gives `dir` a new name: its entry and attributes are kept and settled.
    fn begin_new<'a>(&'a self, dir: &'a Object, name: &[u8]) -> Result<Op<'a>> {
        let mut op = self.begin(&[dir]);
        check_there(dir)?;
        op.keep_entry(dir, name)?;
        op.keep_attr(dir)?;
        op.settle()?; // I1: the caller makes the name after this
        Ok(op)
    }

    /// Takes up an object that was just made under `name`, noting its birth.
    pub(super) fn adopt(
        &self,
        op: &mut Op<'_>,
        dir: &Object,
        fd: BorrowedFd<'_>,
        name: &[u8],
        caller: Caller,
    ) -> Result<(ObjectRef, Found)> {
        let find = || {
            let found = self.backing.find(fd, name)?;
            found.ok_or(Error::Os(Errno::NOENT))
        };
        let mut found = find()?;
        let changed =
            caller.wants_group(found.attr.gid) && self.backing.give_group(fd, name, caller.gid)?;
        if changed {
            found = find()?;
        }
        // Of what had that number before.
        self.unsettled.take_lost(found.entry.ino);
        // That it is there is synced with the directory; not all filesystems do so with what it is.
        if changed || can_be_synced(&found.entry) {
            self.unsettled.note(op.epoch_of(dir), &found.entry);
        }
        self.backing.note_place(dir.ino(), name, found.entry.ino);
        let birth = op.born(dir, found.entry.ino);
        let object = self.object(&found.entry, Some(birth))?;
        Ok((object, found))
    }

    /// Gives an object another name; the kernel is told of it.
    pub fn link(&self, node: &Node, parent: &Node, name: &[u8]) -> Result<Attr> {
        let object = match (node, parent) {
            (Node::Live(object), Node::Live(_)) => object,
            (Node::Live(_), _) | (_, Node::Live(_)) => return Err(Errno::XDEV.into()),
            _ => return Err(Error::ReadOnly),
        };
        let dir = self.writable_dir(parent, name)?;
        let dir_fd = self.object_fd(&dir)?;
        let fd = self.object_fd(object)?;
        self.with_room(BLOCK as u64, || {
            let mut op = self.begin(&[&dir, object]);
            check_there(&dir)?;
            check_there(object)?;
            op.keep_entry(&dir, name)?;
            op.keep_attr(&dir)?;
            op.keep_attr(object)?;
            op.settle()?;
            self.backing.link(fd.as_fd(), dir_fd.as_fd(), name)?; // I1
            self.backing.note_place(dir.ino(), name, object.ino());
            Ok(())
        })?;
        let image = self.backing.stat(fd.as_fd())?;
        Ok(self.tell(object, image))
    }
}
