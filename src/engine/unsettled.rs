//! What has changed since it was last made durable, and making that durable file by file.
//!
//! syncfs(2) writes back all of the filesystem, what others have written too, and whoever changes a name meanwhile waits
//! for the journal behind it: with a backup that copies onto the same disk that is a tenth of a second. Every change goes
//! through the engine, so it knows which objects a snapshot needs synced, and a few of them are a few requests of their
//! own. Where it does not know (before the first time, very many) it is syncfs(2).

use super::Engine;
use super::backing::Backing;
use crate::error::{Error, Result};
use crate::ids::{Epoch, Ino};
use crate::store::EntryImage;
use crate::sync::Mutex;
use crate::sys;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

/// Objects that are synced one by one.
const MOST: usize = 4096;
/// For how long: each may be a flush of the disk's cache.
const PATIENCE: Duration = Duration::from_secs(3);
/// Bytes of a file that the disk is given at a time, so that others do not wait behind all of it.
const PIECE: u64 = 4 << 20;

/// What has changed and may not be durable.
#[derive(Debug)]
pub(super) struct Unsettled {
    /// Held while what was taken is synced: who finds nothing to take must not believe that all is durable. Comes after the
    /// lock of cuts.
    syncing: Mutex<()>,
    /// A leaf in lock order.
    state: Mutex<State>,
    /// Files that could not be synced here, and why. The kernel tells of what it lost once, to those who had the file open and
    /// to the first who opens it afterwards (`errseq_sample` of lib/errseq.c): that was here, and whoever syncs the file next
    /// must hear of it. Programs rely on that: PostgreSQL's checkpointer opens what others have written. A leaf in lock order.
    lost: Mutex<HashMap<Ino, Errno>>,
}

#[derive(Debug)]
struct State {
    /// Something of which nothing is known: what earlier sessions left, or what could not be synced.
    unknown: bool,
    /// The objects that changed, by the epoch of the change: those of an epoch are all there once its operations are done.
    epochs: BTreeMap<Epoch, Changed>,
}

/// What changed in an epoch.
#[derive(Debug)]
enum Changed {
    /// These objects.
    Objects(HashMap<Ino, EntryImage>),
    /// Nobody knows what.
    Anything,
}

impl Default for Unsettled {
    fn default() -> Self {
        Self {
            syncing: Mutex::new(()),
            state: Mutex::new(State {
                unknown: true,
                epochs: BTreeMap::new(),
            }),
            lost: Mutex::default(),
        }
    }
}

impl Unsettled {
    /// Notes an object that is about to change in `epoch`. Once for each is enough.
    pub(super) fn note(&self, epoch: Epoch, object: &EntryImage) {
        let mut state = self.state.lock();
        let none = || Changed::Objects(HashMap::new());
        match state.epochs.entry(epoch).or_insert_with(none) {
            Changed::Objects(objects) if can_be_synced(object) && objects.len() < MOST => {
                objects.insert(object.ino, object.clone());
            }
            changed => *changed = Changed::Anything,
        }
    }

    /// Forgets an object that is gone and that no snapshot shows: files that come and go are not counted.
    pub(super) fn forget(&self, object: Ino) {
        for changed in self.state.lock().epochs.values_mut() {
            if let Changed::Objects(objects) = changed {
                objects.remove(&object);
            }
        }
    }

    /// Takes what changed before the cut `cut`, of which the operations are done; `None` if that is not known.
    fn take(&self, cut: Epoch) -> Option<Vec<EntryImage>> {
        let mut state = self.state.lock();
        let later = state.epochs.split_off(&cut);
        let before = std::mem::replace(&mut state.epochs, later);
        if std::mem::take(&mut state.unknown) {
            return None;
        }
        let mut taken = HashMap::new();
        for changed in before.into_values() {
            match changed {
                Changed::Objects(objects) => taken.extend(objects),
                Changed::Anything => return None,
            }
        }
        let mut taken: Vec<EntryImage> = taken.into_values().collect();
        taken.sort_unstable_by_key(|object| (object.kind == libc::DT_DIR, object.ino));
        (taken.len() <= MOST).then_some(taken)
    }

    /// Counts what has changed so far as of `epoch`, the current one. To be called when no cut is under way, and no
    /// snapshot is there that has not been settled.
    pub(super) fn merge(&self, epoch: Epoch) {
        let mut state = self.state.lock();
        if state.epochs.len() < 2 {
            return;
        }
        let mut merged = HashMap::new();
        let mut known = true;
        for changed in std::mem::take(&mut state.epochs).into_values() {
            match changed {
                Changed::Objects(objects) => merged.extend(objects),
                Changed::Anything => known = false,
            }
        }
        let merged = match known && merged.len() <= MOST {
            true => Changed::Objects(merged),
            false => Changed::Anything,
        };
        state.epochs.insert(epoch, merged);
    }

    /// Takes what earlier sessions left; false if that was done before.
    fn take_earlier(&self) -> bool {
        std::mem::take(&mut self.state.lock().unknown)
    }

    /// What the kernel has told here and must be told to whoever syncs `file` next: why bytes of it were lost.
    pub(super) fn take_lost(&self, file: Ino) -> Option<Errno> {
        self.lost.lock().remove(&file)
    }

    /// What was taken could not be made durable.
    fn give_back(&self) {
        self.state.lock().unknown = true;
    }
}

/// Whether there is an fsync(2) for objects of this kind. The names of others are synced with their directory.
pub(super) fn can_be_synced(object: &EntryImage) -> bool {
    object.kind == libc::DT_REG || object.kind == libc::DT_DIR
}

impl Engine {
    /// Makes durable all that the snapshot of `cut` shows: the journal first (C8).
    pub(super) fn make_durable(&self, cut: Epoch) -> Result<()> {
        let _alone = self.unsettled.syncing.lock();
        self.store.sync()?;
        let each = match self.unsettled.take(cut) {
            Some(objects) => self.sync_each(&objects),
            None => Ok(false),
        };
        let done = match each {
            Ok(false) => self.backing.sync_all(),
            other => other.map(drop),
        };
        // What a sync of somebody else has been told of is not told again.
        let lost = self.backing.take_lost();
        if done.is_err() {
            self.unsettled.give_back();
        }
        done.and(match lost {
            true => Err(Errno::IO.into()),
            false => Ok(()),
        })
    }

    /// Makes durable what earlier sessions left, before a snapshot needs it: it is not known what that is.
    pub(super) fn settle_earlier(&self) -> Result<()> {
        let _alone = self.unsettled.syncing.lock();
        if !self.unsettled.take_earlier() {
            return Ok(());
        }
        let done = self.store.sync().and_then(|()| self.backing.sync_all());
        if done.is_err() {
            self.unsettled.give_back();
        }
        done
    }

    /// Syncs these objects. False if one of them cannot be reached, or if that takes long, so that it takes syncfs(2).
    fn sync_each(&self, objects: &[EntryImage]) -> Result<bool> {
        if objects.is_empty() {
            return Ok(true);
        }
        // What was retained has its name there before it loses the other, and must not lose both.
        self.backing.sync_retained()?;
        let start = Instant::now();
        for object in objects {
            if start.elapsed() > PATIENCE {
                return Ok(false);
            }
            match open(&self.backing, object) {
                Ok(fd) => self.sync_open(object, &fd).inspect_err(|error| {
                    if object.kind == libc::DT_REG {
                        let lost = &self.unsettled.lost;
                        lost.lock().insert(object.ino, error.errno());
                    }
                })?,
                // Gone, and not retained: nothing shows it.
                Err(Error::Os(Errno::STALE)) if self.backing.overrides_modes() => {}
                Err(error) => {
                    log::debug!("object {} is not synced alone: {error}", object.ino);
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    fn sync_open(&self, object: &EntryImage, fd: &OwnedFd) -> Result<()> {
        if object.kind == libc::DT_REG {
            write_back(&self.backing, fd)?;
        }
        self.backing.sync(fd.as_fd(), false)
    }
}

fn open(backing: &Backing, object: &EntryImage) -> Result<OwnedFd> {
    let directory = match object.kind {
        libc::DT_DIR => OFlags::DIRECTORY,
        _ => OFlags::empty(),
    };
    backing.open_object(object, OFlags::RDONLY | directory)
}

/// Writes a file's pages back, a piece at a time and only where there is data.
fn write_back(backing: &Backing, fd: &OwnedFd) -> Result<()> {
    let mut at = 0;
    while let Some(data) = backing.seek(fd.as_fd(), at, false)? {
        at = data.saturating_add(PIECE);
        sys::write_back(fd.as_fd(), data, PIECE.min(sys::BOUNDLESS - data))?;
    }
    Ok(())
}
