//! Snapshots by name and number, and the guards that keep one from vanishing while it is read.
//!
//! A request on a snapshot holds a [`Reading`]: what it reads is not reclaimed before it is done. An open file
//! or directory holds an [`OpenSnapshot`]: the snapshot cannot be deleted at all (`EBUSY`).
//!
//! A snapshot of which a pre-image is missing is invalid. It is listed, and every read of it fails: each asks
//! before it looks at anything, and again when it has its answer (`Engine::in_snapshot`).

use super::Engine;
use crate::error::{Error, Result};
use crate::ids::Epoch;
use crate::store::{SnapshotInfo, SnapshotState, Store, Timestamp};
use crate::sync::{Arc, AtomicBool, AtomicI64, Mutex, Ordering, RwLock};
use std::collections::{BTreeMap, HashMap};

/// A snapshot that exists, with its users.
#[derive(Debug)]
pub struct Snapshot {
    /// Its record.
    pub info: SnapshotInfo,
    users: Arc<Users>,
}

#[derive(Debug, Default)]
struct Users {
    readers: AtomicI64,
    /// Open files and directories; [`DELETED`] once the snapshot is deleted.
    opens: AtomicI64,
    /// Something that the snapshot shows was not kept. Set before the change that this would have preceded.
    invalid: AtomicBool,
}

impl Users {
    fn sound(&self) -> Result<()> {
        if self.invalid.load(Ordering::SeqCst) {
            Err(Error::Invalid)
        } else {
            Ok(())
        }
    }
}

const DELETED: i64 = i64::MIN;

/// The snapshots that exist.
pub struct Snapshots {
    table: RwLock<Table>,
    /// When one was last made, renamed or deleted.
    changed: Mutex<Timestamp>,
    /// Deleted ones that a request may still be reading; their space is not reclaimed before it is done.
    dying: Mutex<Vec<Arc<Users>>>,
}

#[derive(Default)]
struct Table {
    by_epoch: BTreeMap<Epoch, Arc<Snapshot>>,
    by_name: HashMap<Vec<u8>, Epoch>,
}

/// A request in progress on a snapshot.
pub struct Reading {
    /// The snapshot.
    pub epoch: Epoch,
    users: Arc<Users>,
}

/// An open file or directory of a snapshot.
pub struct OpenSnapshot {
    /// The snapshot.
    pub epoch: Epoch,
    users: Arc<Users>,
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.users.readers.fetch_sub(1, Ordering::SeqCst);
    }
}

impl OpenSnapshot {
    /// # Errors
    /// [`Error::Invalid`] if what was read of the snapshot until now must not be used.
    pub(super) fn sound(&self) -> Result<()> {
        self.users.sound()
    }
}

impl Drop for OpenSnapshot {
    fn drop(&mut self) {
        self.users.opens.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Snapshots {
    pub(super) fn load(store: &Store) -> Self {
        let snapshots = Self {
            table: RwLock::default(),
            changed: Mutex::new(super::snapshot::now()),
            dying: Mutex::default(),
        };
        for info in store.snapshots().iter() {
            if info.state != SnapshotState::Deleting {
                snapshots.insert(SnapshotInfo::clone(info));
            }
        }
        snapshots
    }

    /// Adds a snapshot, or replaces its record.
    pub(super) fn insert(&self, info: SnapshotInfo) {
        let mut table = self.table.write();
        let users = match table.by_epoch.get(&info.epoch) {
            Some(old) => {
                let (name, users) = (old.info.name.clone(), old.users.clone());
                table.by_name.remove(&name);
                users
            }
            None => Arc::<Users>::default(),
        };
        if info.state == SnapshotState::Invalid {
            users.invalid.store(true, Ordering::SeqCst);
        }
        table.by_name.insert(info.name.clone(), info.epoch);
        table
            .by_epoch
            .insert(info.epoch, Arc::new(Snapshot { info, users }));
    }

    pub(super) fn remove(&self, epoch: Epoch) {
        let mut table = self.table.write();
        table.by_epoch.remove(&epoch);
    }

    /// A sealed snapshot is about to be deleted: it has no name from now on, and its readers are to be waited
    /// for. Pre-images are kept for it until [`Self::remove`].
    pub(super) fn dies(&self, snapshot: &Snapshot) {
        self.table.write().by_name.remove(&snapshot.info.name);
        self.dying.lock().push(snapshot.users.clone());
    }

    /// Takes [`Self::dies`] back.
    pub(super) fn lives(&self, snapshot: &Snapshot) {
        snapshot.unseal();
        let mut table = self.table.write();
        let (name, epoch) = (snapshot.info.name.clone(), snapshot.info.epoch);
        table.by_name.entry(name).or_insert(epoch);
    }

    /// Those that pre-images are kept for, oldest first; ones that are about to be deleted are among them.
    pub(super) fn kept_ones(&self) -> Vec<Arc<Snapshot>> {
        let table = self.table.read();
        let kept = table.by_epoch.values().filter(|s| !s.is_invalid());
        kept.cloned().collect()
    }

    /// Changes the record of a snapshot; nothing if there is none of that number.
    pub(super) fn update(&self, epoch: Epoch, change: impl FnOnce(&mut SnapshotInfo)) {
        let mut table = self.table.write();
        let Some(old) = table.by_epoch.get(&epoch).cloned() else {
            return;
        };
        let mut info = old.info.clone();
        change(&mut info);
        if table.by_name.get(&old.info.name) == Some(&epoch) {
            table.by_name.remove(&old.info.name);
            table.by_name.insert(info.name.clone(), epoch);
        }
        let users = old.users.clone();
        table
            .by_epoch
            .insert(epoch, Arc::new(Snapshot { info, users }));
    }

    /// Makes a snapshot invalid: from here on nothing that was read of it is handed out.
    pub(super) fn spoil(&self, snapshot: &Snapshot) {
        snapshot.users.invalid.store(true, Ordering::SeqCst);
        self.update(snapshot.info.epoch, |info| {
            info.state = SnapshotState::Invalid
        });
        self.dying.lock().push(snapshot.users.clone());
    }

    /// The numbers of those that pre-images are kept for, oldest first.
    pub(super) fn kept(&self) -> Vec<Epoch> {
        let keeps = |(epoch, snapshot): (&Epoch, &Arc<Snapshot>)| {
            (!snapshot.is_invalid()).then_some(*epoch)
        };
        self.table
            .read()
            .by_epoch
            .iter()
            .filter_map(keeps)
            .collect()
    }

    /// The snapshot called `name`.
    pub fn named(&self, name: &[u8]) -> Option<Arc<Snapshot>> {
        let table = self.table.read();
        table.by_epoch.get(table.by_name.get(name)?).cloned()
    }

    /// Snapshot number `epoch`.
    pub fn get(&self, epoch: Epoch) -> Option<Arc<Snapshot>> {
        self.table.read().by_epoch.get(&epoch).cloned()
    }

    /// The snapshots that have a name, oldest first, from number `from` on.
    pub fn from(&self, from: Epoch) -> Vec<Arc<Snapshot>> {
        self.table
            .read()
            .by_epoch
            .range(from..)
            .filter(|(_, snapshot)| !snapshot.is_sealed())
            .map(|(_, snapshot)| snapshot.clone())
            .collect()
    }

    /// The newest snapshot.
    pub fn newest(&self) -> Option<Epoch> {
        self.table.read().by_epoch.keys().next_back().copied()
    }

    /// Notes that the set of names has changed.
    pub(super) fn touch(&self) {
        *self.changed.lock() = super::snapshot::now();
    }

    /// When the set of names last changed.
    pub(super) fn changed(&self) -> Timestamp {
        *self.changed.lock()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.table.read().by_name.len()
    }

    /// Whether no request reads a deleted snapshot any more.
    pub(super) fn dead_are_unread(&self) -> bool {
        let mut dying = self.dying.lock();
        dying.retain(|users| users.readers.load(Ordering::SeqCst) > 0);
        dying.is_empty()
    }
}

impl Snapshot {
    /// Forbids new users for good; fails, changing nothing, if a file or directory of the snapshot is open.
    pub(super) fn seal(&self) -> Result<()> {
        match self
            .users
            .opens
            .compare_exchange(0, DELETED, Ordering::SeqCst, Ordering::SeqCst)
        {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::SnapshotBusy(
                String::from_utf8_lossy(&self.info.name).into(),
            )),
        }
    }

    /// Whether no read of it succeeds any more.
    #[must_use]
    pub fn is_invalid(&self) -> bool {
        self.users.sound().is_err()
    }

    /// Whether it is being deleted.
    pub(super) fn is_sealed(&self) -> bool {
        self.users.opens.load(Ordering::SeqCst) < 0
    }

    /// Takes [`Self::seal`] back.
    pub(super) fn unseal(&self) {
        self.users.opens.store(0, Ordering::SeqCst);
    }
}

impl Engine {
    /// The snapshots that exist.
    pub fn snapshots(&self) -> &Snapshots {
        &self.snapshots
    }

    /// Reads something of snapshot `epoch`: `read` gets its number.
    ///
    /// # Errors
    /// `ESTALE` once it is deleted; [`Error::Invalid`] if it is invalid when `read` is done: what `read` then
    /// came back with may belong to no instant.
    pub(super) fn in_snapshot<T>(
        &self,
        epoch: Epoch,
        read: impl FnOnce(Epoch) -> Result<T>,
    ) -> Result<T> {
        let reading = self.reading(epoch)?;
        reading.users.sound()?;
        let read = read(reading.epoch);
        reading.users.sound()?; // I3: asked after everything else
        read
    }

    /// Begins a request on snapshot `epoch`; `ESTALE` once it is deleted.
    pub fn reading(&self, epoch: Epoch) -> Result<Reading> {
        let snapshot = self.snapshots.get(epoch).ok_or(Error::Stale)?;
        snapshot.users.readers.fetch_add(1, Ordering::SeqCst);
        let reading = Reading {
            epoch,
            users: snapshot.users.clone(),
        };
        // Counted first, asked second: a deletion that missed the count is seen here.
        if reading.users.opens.load(Ordering::SeqCst) < 0 {
            Err(Error::Stale)
        } else {
            Ok(reading)
        }
    }

    /// Begins the use of an open file or directory of snapshot `epoch`.
    pub(super) fn open_snapshot(&self, epoch: Epoch) -> Result<OpenSnapshot> {
        let users = self.snapshots.get(epoch).ok_or(Error::Stale)?.users.clone();
        users.sound()?;
        let more = |opens: i64| (opens >= 0).then_some(opens + 1);
        match users
            .opens
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, more)
        {
            Ok(_) => Ok(OpenSnapshot { epoch, users }),
            Err(_) => Err(Error::Stale),
        }
    }
}
