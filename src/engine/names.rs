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
use super::nodes::{Node, NodeId, Nodes, ObjectRef};
use super::object::{Member, Object};
use super::unsettled::can_be_synced;
use crate::error::{Error, Result};
use crate::ids::{BLOCK, Epoch, Ino};
use crate::store::{AttrImage, EntryImage};
use crate::sync::{Arc, Ordering};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
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
        self.lookup_in(&self.nodes, parent, name)
    }

    /// As [`Self::lookup`], for the mount that `nodes` counts what the kernel knows for. Live objects are known
    /// by the engine's own table alone.
    pub fn lookup_in(&self, nodes: &Nodes, parent: &Node, name: &[u8]) -> Result<Attr> {
        match parent {
            Node::Live(dir) => self.lookup_live(dir, name),
            Node::At(member) => self.lookup_member(nodes, member, name),
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
        let object = self.object(&found.entry, None)?;
        Ok(self.tell(&object, found.attr))
    }

    /// The live object that the kernel knew by `node` not long ago, for one who holds a handle of it
    /// (open_by_handle_at(2)); the kernel is told of it.
    ///
    /// # Errors
    /// `ESTALE` if it is gone, or was forgotten too long ago.
    pub fn recall(&self, node: NodeId) -> Result<Attr> {
        match self.node(node) {
            Ok(Node::Live(object)) => {
                check_there(&object).map_err(|_| Error::Stale)?;
                let image = self.backing.stat(self.object_fd(&object)?.as_fd())?;
                // The kernel does not ask for what it knows: it has forgotten the object, and has yet to say so.
                if image.nlink == 0 {
                    return Err(Error::Stale);
                }
                Ok(self.tell(&object, image))
            }
            Ok(Node::At(_) | Node::Folder(_)) => Err(Error::Stale),
            Err(_) => {
                let entry = self.nodes.forgotten(node).ok_or(Error::Stale)?;
                let (object, image) = self.take_up(&entry)?;
                // Removed since: no longer one of the live tree.
                self.nodes.forgotten(node).ok_or(Error::Stale)?;
                check_there(&object).map_err(|_| Error::Stale)?;
                Ok(self.tell(&object, image))
            }
        }
    }

    /// The object of an entry that may be gone, and whose number may be that of another one by now.
    ///
    /// # Errors
    /// `ESTALE` then.
    fn take_up(&self, entry: &EntryImage) -> Result<(ObjectRef, AttrImage)> {
        // While it is held its number stays its own: in the table it would take the place of its successor.
        let held = self.backing.hold(entry)?;
        let object = self.nodes.object(entry, None);
        match self.backing.stat(held.as_fd()) {
            Ok(image) if image.nlink > 0 => Ok((object, image)),
            // Removed before it was in the table again, so that its removal did not see to its number.
            gone => {
                *object.pin.lock() = Some(Arc::new(held));
                self.backing.drop_path(entry.ino);
                Err(gone.err().unwrap_or(Error::Stale))
            }
        }
    }

    /// The directory that holds the live directory `dir`, for the same; the kernel is told of it.
    ///
    /// # Errors
    /// `ESTALE` for the root, and for one that was removed.
    pub fn directory_above(&self, dir: &Node) -> Result<Attr> {
        let dir = match dir {
            Node::Live(dir) if dir.is_dir() && dir.ino() != self.backing.root_entry().ino => dir,
            _ => return Err(Error::Stale),
        };
        check_there(dir).map_err(|_| Error::Stale)?;
        let fd = self.object_fd(dir)?;
        let find = || self.backing.find(fd.as_fd(), b"..")?.ok_or(Error::Stale);
        loop {
            let entry = find()?.entry;
            let taken = self.take_up(&entry);
            check_there(dir).map_err(|_| Error::Stale)?;
            // The kernel holds no lock that keeps it there: it may be elsewhere, and the one above removed since.
            if find()?.entry == entry {
                let (object, image) = taken?;
                return Ok(self.tell(&object, image));
            }
        }
    }

    /// The object that `name` means in a live directory, without telling the kernel of it.
    pub fn peek(&self, parent: &Node, name: &[u8]) -> Result<Option<Ino>> {
        match parent {
            Node::Live(dir) => Ok(self.find_live(dir, name)?.map(|found| found.entry.ino)),
            Node::At(_) | Node::Folder(_) => Ok(None),
        }
    }

    /// The live entry, hiding the store.
    pub(super) fn find_live(&self, dir: &Object, name: &[u8]) -> Result<Option<Found>> {
        if self.is_hidden(dir.ino(), name) {
            return Ok(None);
        }
        let found = self.backing.find(self.object_fd(dir)?.as_fd(), name)?;
        if let Some(found) = &found {
            self.backing.note_place(dir.ino(), name, found.entry.ino);
        }
        Ok(found)
    }

    /// What `name` in `dir` means before its locks are taken, to be removed.
    fn find_to_remove(&self, dir: &Object, name: &[u8]) -> Result<Removed> {
        let links = self.backing.links();
        let found = self
            .backing
            .find_and_hold(self.object_fd(dir)?.as_fd(), name)?;
        let (found, held) = found.ok_or_else(|| self.absent(name))?;
        self.backing.note_place(dir.ino(), name, found.entry.ino);
        Ok(Removed { found, held, links })
    }

    fn lookup_member(&self, nodes: &Nodes, dir: &Member, name: &[u8]) -> Result<Attr> {
        let found = self.in_snapshot(dir.snapshot, |k| self.member_entry(k, &dir.entry, name))?;
        let entry = found.ok_or(Error::Os(Errno::NOENT))?;
        let member = Member::new(dir.snapshot, entry, dir.numbers, dir.shown());
        let attr = self.attr_of_member(&member)?;
        nodes.told_member(member)?;
        Ok(attr)
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
            None => Ok(live?.map(|found| {
                self.backing.note_place(dir.ino, name, found.entry.ino);
                found.entry
            })),
        }
    }

    // ---- new names

    /// Makes a directory, special file or symlink; the kernel is told of it.
    pub fn make(&self, parent: &Node, name: &[u8], make: Make<'_>, caller: Caller) -> Result<Attr> {
        let dir = self.writable_dir(parent, name)?;
        let fd = self.object_fd(&dir)?;
        let mut op = self.with_room(BLOCK as u64, || {
            let op = self.begin_new(&dir, name)?;
            let _acting = ActingAs::new(caller);
            match make {
                Make::Directory(mode) => self.backing.mkdir(fd.as_fd(), name, mode)?,
                Make::Node(mode, rdev) => self.backing.mknod(fd.as_fd(), name, mode, rdev)?,
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
            let _acting = ActingAs::new(caller);
            let file = self.backing.create(fd.as_fd(), name, mode, access(flags))?;
            Ok((op, file))
        });
        match made {
            Ok((mut op, file)) => {
                let (object, found) = self.adopt(&mut op, &dir, fd.as_fd(), name, caller)?;
                object.without_capabilities.store(true, Ordering::SeqCst);
                let attr = self.tell(&object, found.attr);
                let file = self.backing.for_writer(file);
                Ok((attr, LiveFile::new(object, file, flags)))
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
    fn adopt(
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

    // ---- names that go

    /// unlink(2), or rmdir(2) when `directory`.
    pub fn remove(&self, parent: &Node, name: &[u8], directory: bool) -> Result<()> {
        let dir = self.writable_dir(parent, name)?;
        self.with_room_to_remove(|| self.remove_from(&dir, name, directory))
    }

    fn remove_from(&self, dir: &ObjectRef, name: &[u8], directory: bool) -> Result<()> {
        let dir_fd = self.object_fd(dir)?;
        loop {
            let before = dir.changes();
            let removed = self.find_to_remove(dir, name)?;
            let child = self.object(&removed.found.entry, None)?;
            if child.is_dir() != directory {
                return Err(if directory {
                    Errno::NOTDIR
                } else {
                    Errno::ISDIR
                }
                .into());
            }
            let mut op = self.begin(&[dir, &child]);
            op.removes();
            // Under the locks the name must still mean what was locked.
            if !op.unchanged(dir, before)? && !self.means(dir, name, &child)? {
                continue;
            }
            self.check_empty(&child)?;
            op.keep_entry(dir, name)?;
            op.keep_attr(dir)?;
            op.keep_attr(&child)?;
            let last = directory || self.links_of(&removed)? <= 1;
            if last && op.retain(&child, None)? {
                let done = op
                    .settle()
                    .and_then(|()| self.backing.retain(dir_fd.as_fd(), name, child.ino()));
                done.map_err(|error| self.unretain(&child, error))?;
                self.note_retained(&child);
            } else {
                op.settle()?;
                if last {
                    *child.pin.lock() = Some(Arc::new(removed.held));
                }
                self.backing.drop_path(child.ino());
                if last && self.must_outlive(&child) {
                    self.backing.orphan(dir_fd.as_fd(), name, child.ino())?;
                    self.orphaned(&child);
                } else {
                    self.backing.remove(dir_fd.as_fd(), name, directory)?;
                }
                if last {
                    self.unsettled.forget(child.ino());
                }
            }
            self.backing
                .forget_place(dir.ino(), name, child.ino(), !last);
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

    /// The number of links of what was found, whose lock is held by now.
    fn links_of(&self, removed: &Removed) -> Result<u32> {
        if self.backing.links() == removed.links {
            return Ok(removed.found.attr.nlink);
        }
        Ok(self.backing.stat(removed.held.as_fd())?.nlink)
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

    /// Keeps the inode of an object, so that its number is not reused while the kernel or an open file still refers to
    /// it.
    pub(super) fn pin_number(&self, object: &Object) -> Result<()> {
        let fd = self.object_fd(object)?;
        *object.pin.lock() = Some(fd);
        Ok(())
    }

    /// Keeps the inode of an object of which a name goes, if that is the last, so that its number is not reused while
    /// the kernel or an open file still refers to it.
    fn pin(&self, object: &Object, last: bool) -> Result<()> {
        if last {
            self.pin_number(object)?;
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
        self.with_room_to_remove(|| self.rename_from((&from_dir, from.1), (&to_dir, to.1), flags))
    }

    fn rename_from(
        &self,
        (from_dir, from): (&ObjectRef, &[u8]),
        (to_dir, to): (&ObjectRef, &[u8]),
        flags: RenameFlags,
    ) -> Result<()> {
        loop {
            let before = [from_dir.changes(), to_dir.changes()];
            let moved = self
                .find_live(from_dir, from)?
                .ok_or_else(|| self.absent(from))?;
            let moved = self.object(&moved.entry, None)?;
            let target = self
                .find_live(to_dir, to)?
                .map(|found| self.object(&found.entry, None))
                .transpose()?;
            let places = Places {
                from_dir,
                from,
                to_dir,
                to,
                moved: &moved,
                target: target.as_ref(),
                before,
            };
            if self.rename_objects(&places, flags)? {
                return Ok(());
            }
        }
    }

    /// One try; false if a name meant something else once the locks were held.
    fn rename_objects(&self, at: &Places<'_>, flags: RenameFlags) -> Result<bool> {
        let (moved, target) = (at.moved, at.target);
        let mut objects: Vec<&Object> = vec![at.from_dir, at.to_dir, moved];
        objects.extend(target.map(|target| &**target));
        let mut op = self.begin(&objects);
        op.removes();
        check_there(at.to_dir)?;
        let unchanged =
            op.unchanged(at.from_dir, at.before[0])? && op.unchanged(at.to_dir, at.before[1])?;
        if !unchanged && !self.still_hold(at)? {
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

    /// Whether both names still mean what was locked.
    fn still_hold(&self, at: &Places<'_>) -> Result<bool> {
        let target_holds = match at.target {
            Some(target) => self.means(at.to_dir, at.to, target)?,
            None => self.find_live(at.to_dir, at.to)?.is_none(),
        };
        Ok(target_holds && self.means(at.from_dir, at.from, at.moved)?)
    }

    fn move_name(&self, at: &Places<'_>, flags: RenameFlags) -> Result<()> {
        let from = self.object_fd(at.from_dir)?;
        let to = self.object_fd(at.to_dir)?;
        self.backing
            .rename((from.as_fd(), at.from), (to.as_fd(), at.to), flags)?;
        self.backing
            .note_place(at.to_dir.ino(), at.to, at.moved.ino());
        match at.target {
            Some(target) if flags.contains(RenameFlags::EXCHANGE) => {
                let (dir, name) = (at.from_dir.ino(), at.from);
                self.backing.note_place(dir, name, target.ino());
            }
            Some(target) => {
                self.backing
                    .forget_place(at.to_dir.ino(), at.to, target.ino(), !target.is_dir())
            }
            None => {}
        }
        Ok(())
    }

    /// Renames over `target`. One that has to be retained gets a second link there first, so that the
    /// replacement itself stays one atomic step; a directory, which can have no second link, changes places
    /// with its successor and is moved away from there, and recovery finishes that if a crash comes between.
    fn replace(&self, op: &mut Op<'_>, at: &Places<'_>, target: &ObjectRef) -> Result<()> {
        let directory = target.is_dir();
        let origin = directory.then_some((at.from_dir, at.from));
        let last = self.last_name(target, directory)?;
        let retain = last && op.retain(target, origin)?;
        if !retain {
            op.settle()?;
            self.pin(target, last)?;
            if last && self.must_outlive(target) {
                self.replace_open(at, target)?;
            } else {
                self.move_name(at, RenameFlags::empty())?;
            }
            if last {
                self.unsettled.forget(target.ino());
            }
            return Ok(());
        }
        let done = op.settle().and_then(|()| match directory {
            true => self.replace_directory(at, target),
            false => self.replace_file(at, target),
        });
        done.map_err(|error| self.unretain(target, error))?;
        self.note_retained(target);
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

    /// Renames over a file that is open and that no snapshot shows.
    fn replace_open(&self, at: &Places<'_>, target: &ObjectRef) -> Result<()> {
        let fd = self.object_fd(target)?;
        self.backing.orphan_link(fd.as_fd(), target.ino())?;
        let moved = self.move_name(at, RenameFlags::empty());
        match moved {
            Ok(()) => self.orphaned(target),
            Err(_) => self.backing.release_orphan(target.ino())?,
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

    /// Notes that the last name of `object` has been moved to the retained ones, and what space it takes there.
    fn note_retained(&self, object: &Object) {
        object.retained.store(true, Ordering::SeqCst);
        self.nodes.never_recall(object.ino());
        let stat = self
            .object_fd(object)
            .and_then(|fd| self.backing.stat(fd.as_fd()));
        match stat {
            Ok(image) => self.room.note_retained(image.blocks * 512, true),
            Err(error) => log::warn!("the space of a retained object is not counted: {error}"),
        }
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

/// What a name that goes means.
struct Removed {
    found: Found,
    /// Of the object.
    held: OwnedFd,
    /// [`Backing::links`] before it was found.
    links: u64,
}

/// The two names of a rename, and what they mean.
struct Places<'a> {
    from_dir: &'a Object,
    from: &'a [u8],
    to_dir: &'a Object,
    to: &'a [u8],
    moved: &'a ObjectRef,
    target: Option<&'a ObjectRef>,
    /// How often names in the two directories had changed before these were looked up.
    before: [u64; 2],
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
