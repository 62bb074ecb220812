//! Names: lookup, create, unlink, rename, link.
//!
//! Each change keeps the entries it is about to change and the attributes of every object involved. The last
//! name of an object that a snapshot shows is not removed but moved to `retained/`: O(1) whatever its size.

use super::Engine;
use super::attr::Attr;
use super::backing::{Found, HIDDEN};
use super::creds::{ActingAs, Caller};
use super::handle::{LiveFile, access};
use super::keep::Op;
use super::object::{Member, Node, Object, ObjectRef};
use crate::error::{Error, Result};
use crate::ids::Epoch;
use crate::store::EntryImage;
use crate::sync::{Arc, Ordering};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::{OFlags, RenameFlags};
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
    /// What `name` in `parent` means; the kernel is told of it.
    ///
    /// # Errors
    /// `ENOENT` if it means nothing.
    pub fn lookup(&self, parent: &Node, name: &[u8]) -> Result<Attr> {
        match parent {
            Node::Live(dir) => self.lookup_live(dir, name),
            Node::At(member) => self.lookup_member(member, name),
            Node::Folder(dir) => self.lookup_folder(dir, name),
        }
    }

    fn lookup_live(&self, dir: &ObjectRef, name: &[u8]) -> Result<Attr> {
        if name == self.snapshot_dir
            && let Some(attr) = self.lookup_own_folder(dir)?
        {
            return Ok(attr);
        }
        let found = self.find_live(dir, name)?.ok_or(Error::Os(Errno::NOENT))?;
        let object = self.nodes.object(&found.entry, None);
        Ok(self.tell(&object, found.attr))
    }

    /// The live entry, hiding the store.
    pub(super) fn find_live(&self, dir: &Object, name: &[u8]) -> Result<Option<Found>> {
        if self.is_hidden(dir.ino(), name) {
            return Ok(None);
        }
        self.backing.find(self.object_fd(dir)?.as_fd(), name)
    }

    fn lookup_member(&self, dir: &Member, name: &[u8]) -> Result<Attr> {
        let reading = self.reading(dir.snapshot)?;
        let entry = self
            .member_entry(reading.epoch, &dir.entry, name)?
            .ok_or(Error::Os(Errno::NOENT))?;
        let (_, member) = self.nodes.told_member(reading.epoch, &entry);
        self.attr_of_member(&member)
    }

    /// What `name` in the directory `dir` meant in snapshot `k`.
    fn member_entry(&self, k: Epoch, dir: &EntryImage, name: &[u8]) -> Result<Option<EntryImage>> {
        if self.is_hidden(dir.ino, name) {
            return Ok(None);
        }
        if let Some((_, was)) = self.store.entry_at(dir.ino, name, k)? {
            return Ok(was);
        }
        let live = self
            .backing
            .path_fd(dir)
            .and_then(|fd| self.backing.find(fd.as_fd(), name));
        // I3
        match self.store.entry_at(dir.ino, name, k)? {
            Some((_, was)) => Ok(was),
            None => Ok(live?.map(|found| found.entry)),
        }
    }

    // ---- new names

    /// Makes a directory, special file or symlink; the kernel is told of it.
    pub fn make(&self, parent: &Node, name: &[u8], make: Make<'_>, caller: Caller) -> Result<Attr> {
        let dir = self.writable_dir(parent, name)?;
        let fd = self.object_fd(&dir)?;
        let mut op = self.begin_new(&dir, name)?;
        {
            let _acting = ActingAs::new(caller);
            match make {
                Make::Directory(mode) => self.backing.mkdir(fd.as_fd(), name, mode)?,
                Make::Node(mode, rdev) => self.backing.mknod(fd.as_fd(), name, mode, rdev)?,
                Make::Symlink(target) => self.backing.symlink(fd.as_fd(), name, target)?,
            }
        }
        let (object, found) = self.adopt(&mut op, &dir, fd.as_fd(), name)?;
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
        let mut op = self.begin_new(&dir, name)?;
        let made = {
            let _acting = ActingAs::new(caller);
            self.backing.create(fd.as_fd(), name, mode, access(flags))
        };
        match made {
            Ok(file) => {
                let (object, found) = self.adopt(&mut op, &dir, fd.as_fd(), name)?;
                let attr = self.tell(&object, found.attr);
                Ok((attr, LiveFile::new(object, file, flags)))
            }
            Err(Error::Os(Errno::EXIST)) if flags & libc::O_EXCL == 0 => {
                drop(op);
                let found = self.find_live(&dir, name)?.ok_or(Error::Os(Errno::NOENT))?;
                let object = self.nodes.object(&found.entry, None);
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
    fn adopt(
        &self,
        op: &mut Op<'_>,
        dir: &Object,
        fd: BorrowedFd<'_>,
        name: &[u8],
    ) -> Result<(ObjectRef, Found)> {
        let found = self
            .backing
            .find(fd, name)?
            .ok_or(Error::Os(Errno::NOENT))?;
        let birth = op.born(dir, found.entry.ino)?;
        let object = self.nodes.object(&found.entry, Some(birth));
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
        let mut op = self.begin(&[&dir, object]);
        check_there(&dir)?;
        check_there(object)?;
        op.keep_entry(&dir, name)?;
        op.keep_attr(&dir)?;
        op.keep_attr(object)?;
        op.settle()?;
        self.backing.link(fd.as_fd(), dir_fd.as_fd(), name)?; // I1
        let image = self.backing.stat(fd.as_fd())?;
        Ok(self.tell(object, image))
    }

    // ---- names that go

    /// unlink(2), or rmdir(2) when `directory`.
    pub fn remove(&self, parent: &Node, name: &[u8], directory: bool) -> Result<()> {
        let dir = self.writable_dir(parent, name)?;
        let dir_fd = self.object_fd(&dir)?;
        loop {
            let found = self
                .find_live(&dir, name)?
                .ok_or_else(|| self.absent(name))?;
            let child = self.nodes.object(&found.entry, None);
            if child.is_dir() != directory {
                return Err(if directory {
                    Errno::NOTDIR
                } else {
                    Errno::ISDIR
                }
                .into());
            }
            let mut op = self.begin(&[&dir, &child]);
            // Under the locks the name must still mean what was locked.
            if !self.means(&dir, name, &child)? {
                continue;
            }
            self.check_empty(&child)?;
            op.keep_entry(&dir, name)?;
            op.keep_attr(&dir)?;
            op.keep_attr(&child)?;
            let retain = self.last_name(&child, directory)? && op.retain(&child, None)?;
            if retain {
                let done = op
                    .settle()
                    .and_then(|()| self.backing.retain(dir_fd.as_fd(), name, child.ino()));
                done.map_err(|error| self.unretain(&child, error))?;
                child.retained.store(true, Ordering::SeqCst);
            } else {
                op.settle()?;
                self.pin_if_last(&child, directory)?;
                self.backing.remove(dir_fd.as_fd(), name, directory)?;
            }
            return Ok(());
        }
    }

    /// Why a name that is not there cannot be removed: the snapshot folder of a directory is not an entry.
    fn absent(&self, name: &[u8]) -> Error {
        Error::Os(if name == self.snapshot_dir {
            Errno::BUSY
        } else {
            Errno::NOENT
        })
    }

    fn means(&self, dir: &Object, name: &[u8], object: &Object) -> Result<bool> {
        Ok(self
            .find_live(dir, name)?
            .is_some_and(|found| found.entry.handle == object.entry.handle))
    }

    fn check_empty(&self, object: &Object) -> Result<()> {
        if !object.is_dir() {
            return Ok(());
        }
        let fd = self
            .backing
            .open_object(&object.entry, OFlags::RDONLY | OFlags::DIRECTORY)?;
        if self.backing.is_empty(&fd)? {
            Ok(())
        } else {
            Err(Errno::NOTEMPTY.into())
        }
    }

    /// Whether the name about to go is the only one.
    fn last_name(&self, object: &Object, directory: bool) -> Result<bool> {
        Ok(directory || self.backing.stat(self.object_fd(object)?.as_fd())?.nlink <= 1)
    }

    /// Keeps the inode of an object whose last name goes, so that its number is not reused while the kernel
    /// or an open file still refers to it.
    fn pin_if_last(&self, object: &Object, directory: bool) -> Result<()> {
        if self.last_name(object, directory)? {
            let pin = self.backing.open_object(&object.entry, OFlags::PATH)?;
            *object.pin.lock() = Some(Arc::new(pin));
        }
        self.backing.drop_path(object.ino());
        Ok(())
    }

    // ---- rename

    /// renameat2(2) with no flag, `RENAME_NOREPLACE` or `RENAME_EXCHANGE`.
    pub fn rename(
        &self,
        from: (&Node, &[u8]),
        to: (&Node, &[u8]),
        flags: RenameFlags,
    ) -> Result<()> {
        if !(flags - (RenameFlags::NOREPLACE | RenameFlags::EXCHANGE)).is_empty() {
            return Err(Errno::INVAL.into());
        }
        let (from_dir, to_dir) = (
            self.writable_dir(from.0, from.1)?,
            self.writable_dir(to.0, to.1)?,
        );
        loop {
            let moved = self
                .find_live(&from_dir, from.1)?
                .ok_or_else(|| self.absent(from.1))?;
            let moved = self.nodes.object(&moved.entry, None);
            let target = self
                .find_live(&to_dir, to.1)?
                .map(|found| self.nodes.object(&found.entry, None));
            let places = Places {
                from_dir: &from_dir,
                from: from.1,
                to_dir: &to_dir,
                to: to.1,
            };
            if self.rename_objects(&places, &moved, target.as_ref(), flags)? {
                return Ok(());
            }
        }
    }

    /// One try; false if a name meant something else once the locks were held.
    fn rename_objects(
        &self,
        at: &Places<'_>,
        moved: &ObjectRef,
        target: Option<&ObjectRef>,
        flags: RenameFlags,
    ) -> Result<bool> {
        let mut objects: Vec<&Object> = vec![at.from_dir, at.to_dir, moved];
        objects.extend(target.map(|target| &**target));
        let mut op = self.begin(&objects);
        check_there(at.to_dir)?;
        let target_holds = match target {
            Some(target) => self.means(at.to_dir, at.to, target)?,
            None => self.find_live(at.to_dir, at.to)?.is_none(),
        };
        if !target_holds || !self.means(at.from_dir, at.from, moved)? {
            return Ok(false);
        }
        if let Some(target) = target {
            if flags.contains(RenameFlags::NOREPLACE) {
                return Err(Errno::EXIST.into());
            }
            if target.ino() == moved.ino() {
                return Ok(true); // two names of one object: rename(2) does nothing
            }
            if !flags.contains(RenameFlags::EXCHANGE) {
                check_replaces(moved, target)?;
                self.check_empty(target)?;
            }
        } else if flags.contains(RenameFlags::EXCHANGE) {
            return Err(Errno::NOENT.into());
        }
        op.keep_entry(at.from_dir, at.from)?;
        op.keep_entry(at.to_dir, at.to)?;
        for object in objects {
            op.keep_attr(object)?;
        }
        match target {
            Some(target) if !flags.contains(RenameFlags::EXCHANGE) => {
                self.replace(&mut op, at, target)?;
            }
            _ => {
                op.settle()?;
                self.move_name(at, flags)?; // I1
            }
        }
        Ok(true)
    }

    fn move_name(&self, at: &Places<'_>, flags: RenameFlags) -> Result<()> {
        let from = self.object_fd(at.from_dir)?;
        let to = self.object_fd(at.to_dir)?;
        self.backing
            .rename((from.as_fd(), at.from), (to.as_fd(), at.to), flags)
    }

    /// Renames over `target`. One that has to be retained gets a second link there first, so that the
    /// replacement itself stays one atomic step; a directory, which can have no second link, changes places
    /// with its successor and is moved away from there, and recovery finishes that if a crash comes between.
    fn replace(&self, op: &mut Op<'_>, at: &Places<'_>, target: &ObjectRef) -> Result<()> {
        let directory = target.is_dir();
        let origin = directory.then_some((at.from_dir, at.from));
        let retain = self.last_name(target, directory)? && op.retain(target, origin)?;
        if !retain {
            op.settle()?;
            self.pin_if_last(target, directory)?;
            return self.move_name(at, RenameFlags::empty());
        }
        let done = op.settle().and_then(|()| match directory {
            true => self.replace_directory(at, target),
            false => self.replace_file(at, target),
        });
        done.map_err(|error| self.unretain(target, error))?;
        target.retained.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn replace_directory(&self, at: &Places<'_>, target: &Object) -> Result<()> {
        self.move_name(at, RenameFlags::EXCHANGE)?;
        let from = self.object_fd(at.from_dir)?;
        let moved = self.backing.retain(from.as_fd(), at.from, target.ino());
        if moved.is_err() {
            self.move_name(at, RenameFlags::EXCHANGE)?;
        }
        moved
    }

    fn replace_file(&self, at: &Places<'_>, target: &Object) -> Result<()> {
        let fd = self.object_fd(target)?;
        self.backing.retain_link(fd.as_fd(), target.ino())?;
        let moved = self.move_name(at, RenameFlags::empty());
        if moved.is_err() {
            self.backing.release_retained(target.ino(), false)?;
        }
        moved
    }

    /// Takes the record of a retained object back, which is none because of `error`: left behind, recovery
    /// would one day act on it.
    fn unretain(&self, object: &Object, error: Error) -> Error {
        if let Err(second) = self.store.forget_retained(object.ino()) {
            log::error!("a retained object cannot be forgotten: {second}");
        }
        error
    }

    /// The live directory `parent`, if `name` in it is one that may be changed.
    fn writable_dir(&self, parent: &Node, name: &[u8]) -> Result<ObjectRef> {
        let Node::Live(dir) = parent else {
            return Err(Error::ReadOnly);
        };
        match name {
            b"" | b"." | b".." => Err(Errno::INVAL.into()),
            _ if name.contains(&b'/') => Err(Errno::INVAL.into()),
            _ if !self.is_hidden(dir.ino(), name) => Ok(dir.clone()),
            HIDDEN => Err(Errno::PERM.into()),
            _ => Err(Errno::BUSY.into()),
        }
    }
}

/// The two names of a rename.
struct Places<'a> {
    from_dir: &'a Object,
    from: &'a [u8],
    to_dir: &'a Object,
    to: &'a [u8],
}

/// Refuses new names for, and in, an object whose last name is gone. Asked under its lock.
fn check_there(object: &Object) -> Result<()> {
    if object.retained.load(Ordering::SeqCst) {
        Err(Errno::NOENT.into())
    } else {
        Ok(())
    }
}

/// rename(2): a directory replaces only a directory, and nothing else replaces one.
fn check_replaces(moved: &Object, target: &Object) -> Result<()> {
    match (moved.is_dir(), target.is_dir()) {
        (true, false) => Err(Errno::NOTDIR.into()),
        (false, true) => Err(Errno::ISDIR.into()),
        _ => Ok(()),
    }
}
