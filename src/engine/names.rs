//! Names: what they mean, and by operation group what changes them.
//!
//! Each change keeps the entries it is about to change and the attributes of every object involved. The last
//! name of an object that a snapshot shows is not removed but moved to `retained/`: O(1) whatever its size.

mod make;
mod remove;
mod rename;

pub use make::Make;

use super::Engine;
use super::attr::Attr;
use super::backing::{Found, HIDDEN};
use super::nodes::{Node, NodeId, Nodes, ObjectRef};
use super::object::{Member, Object};
use crate::error::{Error, Result};
use crate::ids::{Epoch, Ino};
use crate::store::{AttrImage, EntryImage};
use crate::sync::{Arc, Ordering};
use rustix::fd::AsFd;
use rustix::io::Errno;

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

/// Refuses new names for, and in, an object whose last name is gone. Asked under its lock.
fn check_there(object: &Object) -> Result<()> {
    if object.retained.load(Ordering::SeqCst) {
        Err(Errno::NOENT.into())
    } else {
        Ok(())
    }
}
