//! Reaching objects by place, for a cowfs that may not open by file handle.
//!
//! open_by_handle_at(2) takes CAP_DAC_READ_SEARCH, which an ordinary user and the root of a user namespace do not
//! have. There an object is opened where it was last seen: its directory and its name in it. The handle still
//! says whether what is found is the object, so a stale place is noticed and never believed. cowfs makes every
//! change itself and notes each new place; what it has not seen yet it finds by walking the tree once.

use super::{Backing, HIDDEN};
use crate::error::{Error, Result};
use crate::ids::Ino;
use crate::store::{EntryImage, ObjectHandle};
use crate::sync::Mutex;
use crate::sys;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{FileType, Mode, OFlags, RawDir, ResolveFlags};
use rustix::io::Errno;
use std::collections::HashMap;
use std::mem::MaybeUninit;

/// Longer chains of directories than a filesystem can have mean a loop among stale places.
const DEEPEST: usize = 1 << 16;

/// Where an object was last seen.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    parent: Ino,
    name: Box<[u8]>,
}

/// The places of all objects that were seen. Guarded by one lock, under which nothing is read or written.
#[derive(Debug, Default)]
pub(super) struct Places {
    table: Mutex<Table>,
    /// Held by who walks the tree; who misses something meanwhile waits for that. Taken before `table`.
    walking: Mutex<()>,
}

#[derive(Debug, Default)]
struct Table {
    known: HashMap<Ino, Place>,
    /// The tree was walked, and every change since then is noted: what is not known is not there.
    complete: bool,
}

impl Places {
    /// Notes that `name` in the directory `parent` means `ino`.
    fn note(&self, parent: Ino, name: &[u8], ino: Ino) {
        let place = Place {
            parent,
            name: name.into(),
        };
        self.table.lock().known.insert(ino, place);
    }

    fn note_if_unknown(&self, parent: Ino, name: &[u8], ino: Ino) {
        let mut table = self.table.lock();
        table.known.entry(ino).or_insert_with(|| Place {
            parent,
            name: name.into(),
        });
    }

    /// The steps from `ino` up to the root: each object with its name in the next.
    fn way(&self, root: Ino, ino: Ino) -> Result<Vec<(Ino, Box<[u8]>)>> {
        let table = self.table.lock();
        let mut steps = Vec::new();
        let mut at = ino;
        while at != root {
            let place = table.known.get(&at).ok_or(Error::Os(Errno::STALE))?;
            if steps.len() > DEEPEST {
                return Err(Errno::LOOP.into());
            }
            steps.push((at, place.name.clone()));
            at = place.parent;
        }
        Ok(steps)
    }

    /// Notes that `name` in `parent` does not mean `ino` any more. Another name that it may have is not known, so
    /// the next look for it walks the tree.
    fn forget(&self, parent: Ino, name: &[u8], ino: Ino, has_others: bool) {
        let mut table = self.table.lock();
        let there = |place: &Place| place.parent == parent && *place.name == *name;
        if table.known.get(&ino).is_some_and(there) {
            table.known.remove(&ino);
            table.complete &= !has_others;
        }
    }
}

impl Backing {
    /// Notes that `name` in the directory `parent` means `ino`.
    pub fn note_place(&self, parent: Ino, name: &[u8], ino: Ino) {
        if let Some(places) = &self.places {
            places.note(parent, name, ino);
        }
    }

    /// Notes that `name` in the directory `parent` does not mean `ino` any more, which `has_others`: other names.
    pub fn forget_place(&self, parent: Ino, name: &[u8], ino: Ino, has_others: bool) {
        if let Some(places) = &self.places {
            places.forget(parent, name, ino, has_others);
        }
    }

    /// A new `O_PATH` descriptor of an object: where it was last seen, else among the retained, else where a walk
    /// of the tree finds it.
    ///
    /// # Errors
    /// `ESTALE` when it is nowhere; `EACCES` when the way to it is barred.
    pub(super) fn open_place(&self, places: &Places, entry: &EntryImage) -> Result<OwnedFd> {
        let seen = || self.follow(places, entry.ino);
        let mut barred = None;
        for attempt in [
            &seen as &dyn Fn() -> Result<OwnedFd>,
            &|| {
                Ok(enter(
                    self.retained.as_fd(),
                    &Self::retained_name(entry.ino),
                )?)
            },
            &|| {
                Ok(enter(
                    self.orphans.as_fd(),
                    &Self::retained_name(entry.ino),
                )?)
            },
            &|| self.walk(places).and_then(|()| seen()),
        ] {
            match attempt() {
                Ok(fd) if self.is_of(fd.as_fd(), entry)? => return Ok(fd),
                Err(error) if error.errno() == Errno::ACCESS => barred = Some(error),
                // Elsewhere by now, or another object in its place.
                Ok(_) | Err(Error::Os(Errno::STALE | Errno::NOENT | Errno::NOTDIR)) => {}
                Err(error) => return Err(error),
            }
        }
        Err(barred.unwrap_or(Error::Os(Errno::STALE)))
    }

    fn is_of(&self, fd: BorrowedFd<'_>, entry: &EntryImage) -> Result<bool> {
        let (kind, bytes) = sys::name_to_handle(fd, c"")?;
        let bytes = bytes.into();
        Ok(ObjectHandle { kind, bytes } == entry.handle)
    }

    /// Goes to the last known place of `ino`, from the nearest directory above it that is open.
    fn follow(&self, places: &Places, ino: Ino) -> Result<OwnedFd> {
        let mut steps = places.way(self.root_entry.ino, ino)?;
        let mut from = None;
        if let Some(at) = steps.iter().skip(1).position(|(at, _)| {
            from = self.paths.lock().get(at).cloned();
            from.is_some()
        }) {
            steps.truncate(at + 1);
        }
        let mut here = None::<OwnedFd>;
        let from = from.as_deref().unwrap_or(&self.root);
        for (_, name) in steps.iter().rev() {
            let dir = here.as_ref().map_or(from.as_fd(), AsFd::as_fd);
            here = Some(enter(dir, name)?);
        }
        match here {
            Some(fd) => Ok(fd),
            None => Ok(enter(from.as_fd(), b".")?),
        }
    }

    /// Walks the whole tree and notes every place that is not known.
    fn walk(&self, places: &Places) -> Result<()> {
        let _alone = places.walking.lock();
        // Set first: a change that comes meanwhile is noted by itself, or takes this back.
        if std::mem::replace(&mut places.table.lock().complete, true) {
            return Ok(());
        }
        log::info!("{}: looking through the tree", self.path.display());
        let walked = self.walk_all(places);
        if walked.is_err() {
            places.table.lock().complete = false;
        }
        walked
    }

    fn walk_all(&self, places: &Places) -> Result<()> {
        let mut dirs = vec![self.root_entry.ino];
        while let Some(parent) = dirs.pop() {
            let dir = match self.follow(places, parent).and_then(|fd| self.list(&fd)) {
                Ok(dir) => dir,
                // Lacks that pass: what is missed for them would stay out of reach.
                Err(error)
                    if matches!(
                        error.errno(),
                        Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::IO
                    ) =>
                {
                    return Err(error);
                }
                // What cannot be listed is not found, and its objects stay out of reach.
                Err(_) => continue,
            };
            let mut buf = [MaybeUninit::uninit(); 32 * 1024];
            let mut entries = RawDir::new(&dir, &mut buf);
            while let Some(entry) = entries.next() {
                let entry = entry?;
                let name = entry.file_name().to_bytes();
                if matches!(name, b"." | b"..") || parent == self.root_entry.ino && name == HIDDEN {
                    continue;
                }
                let ino = Ino(entry.ino());
                places.note_if_unknown(parent, name, ino);
                if entry.file_type() == FileType::Directory {
                    dirs.push(ino);
                }
            }
        }
        Ok(())
    }

    fn list(&self, path: &OwnedFd) -> Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(self.open_quietly(|more| rustix::fs::openat(path, c".", flags | more, Mode::empty()))?)
    }

    /// Runs `open` so that reading through its descriptor leaves the access time alone: `O_NOATIME`, where
    /// there is no private mount that sees to it. Only the owner may ask for that (open(2)).
    pub(super) fn open_quietly(
        &self,
        open: impl Fn(OFlags) -> Result<OwnedFd, Errno>,
    ) -> Result<OwnedFd, Errno> {
        if self.keeps_atime {
            return open(OFlags::empty());
        }
        match open(OFlags::NOATIME) {
            Err(Errno::PERM) => open(OFlags::empty()),
            other => other,
        }
    }
}

/// One step down, to `name` in `dir`: through no symlink, into no other mount, and not upwards (C11).
pub(super) fn enter(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let how = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(dir, name, how, Mode::empty(), resolve)
}
