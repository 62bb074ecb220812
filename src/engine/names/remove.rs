//! Names that go: unlink, rmdir.

use crate::engine::Engine;
use crate::engine::backing::Found;
use crate::engine::nodes::{Node, ObjectRef};
use crate::engine::object::Object;
use crate::error::{Error, Result};
use crate::sync::{Arc, Ordering};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{OFlags, RenameFlags};
use rustix::io::Errno;

impl Engine {
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
            if last && op.retain(&child, None, false)? {
                let done = op.settle().and_then(|()| {
                    self.backing
                        .retain(dir_fd.as_fd(), name, child.ino(), RenameFlags::empty())
                });
                done.map_err(|error| self.unretain(&child, error))?;
                self.note_retained(&child);
            } else {
                op.settle()?;
                if last {
                    *child.pin.lock() = Some(Arc::new(removed.held));
                }
                self.backing.drop_path(child.ino());
                let open = last && self.must_outlive(&child);
                let done = match open {
                    true => self.backing.orphan(dir_fd.as_fd(), name, child.ino()),
                    false => self.backing.remove(dir_fd.as_fd(), name, directory),
                };
                done.inspect_err(|_| unpin(&child, last))?;
                if open {
                    self.orphaned(&child);
                }
                if last {
                    self.unsettled.forget(child.ino());
                }
            }
            self.backing
                .forget_place(dir.ino(), name, child.ino(), !last);
            if last {
                op.note_removed(dir, &child)?;
            }
            return Ok(());
        }
    }

    /// Why a name that is not there cannot be removed: the snapshot folder of a directory is not an entry.
    pub(super) fn absent(&self, name: &[u8]) -> Error {
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

    pub(super) fn means(&self, dir: &Object, name: &[u8], object: &Object) -> Result<bool> {
        Ok(self
            .find_live(dir, name)?
            .is_some_and(|found| found.entry.handle == object.entry.handle))
    }

    pub(super) fn check_empty(&self, object: &Object) -> Result<()> {
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
    pub(super) fn last_name(&self, object: &Object, directory: bool) -> Result<bool> {
        Ok(directory || self.backing.stat(self.object_fd(object)?.as_fd())?.nlink <= 1)
    }

    /// Keeps the inode of an object, so that its number is not reused while the kernel or an open file still refers to
    /// it.
    pub(in crate::engine) fn pin_number(&self, object: &Object) -> Result<()> {
        let fd = self.object_fd(object)?;
        *object.pin.lock() = Some(fd);
        Ok(())
    }

    /// Keeps the inode of an object of which a name goes, if that is the last, so that its number is not reused while
    /// the kernel or an open file still refers to it.
    pub(super) fn pin(&self, object: &Object, last: bool) -> Result<()> {
        if last {
            self.pin_number(object)?;
        }
        self.backing.drop_path(object.ino());
        Ok(())
    }

    /// Notes that the last name of `object` has been moved to the retained ones, and what space it takes there.
    pub(super) fn note_retained(&self, object: &Object) {
        object.retained.store(true, Ordering::SeqCst);
        self.nodes.never_recall(object.ino());
        let stat = self
            .object_fd(object)
            .and_then(|fd| self.backing.stat(fd.as_fd()));
        match stat {
            Ok(image) => self.room.note_retained(object.ino(), image.blocks * 512),
            Err(error) => log::warn!("the space of a retained object is not counted: {error}"),
        }
    }

    /// Takes the record of a retained object back, which is none because of `error`: left behind, recovery
    /// would one day act on it.
    pub(super) fn unretain(&self, object: &Object, error: Error) -> Error {
        if let Err(second) = self.store.forget_retained(object.ino()) {
            log::error!("a retained object cannot be forgotten: {second}");
        }
        error
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
}

/// Undoes [`Engine::pin`] for a name that has not gone after all.
pub(super) fn unpin(object: &Object, last: bool) {
    if last {
        *object.pin.lock() = None;
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
