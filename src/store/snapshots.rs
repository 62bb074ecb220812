//! The snapshot table: small, in memory, written whole to the journal at every change.

use super::Store;
use super::journal::{Batch, Journal};
use super::key::segment_of;
use super::record::{Record, Table};
use super::types::{SnapshotInfo, SnapshotState};
use crate::error::{Error, Result};
use crate::ids::{Epoch, Lsn};
use crate::sync::{Arc, AtomicU64, Mutex, Ordering, RwLock};

/// The table as it was at one moment.
#[derive(Debug, Clone)]
pub(super) struct Published {
    /// The number of cuts that the store knows of.
    pub(super) epoch: Epoch,
    /// Ascending.
    pub(super) all: Arc<Vec<SnapshotInfo>>,
}

impl Published {
    /// Whether a record labelled `label` that serves the snapshots in `(lower, label]` can never be needed
    /// again. A label beyond the last known cut belongs to one that is under way.
    pub(super) fn is_dead(&self, lower: Epoch, label: Epoch) -> bool {
        let from = self.all.partition_point(|s| s.epoch <= lower);
        let within = self.all[from..].iter().take_while(|s| s.epoch <= label);
        label <= self.epoch
            && within
                .into_iter()
                .all(|s| s.state == SnapshotState::Deleting)
    }

    pub(super) fn existing(&self) -> impl DoubleEndedIterator<Item = Epoch> {
        self.all
            .iter()
            .filter(|s| s.state != SnapshotState::Deleting)
            .map(|s| s.epoch)
    }

    pub(super) fn deleting(&self) -> impl Iterator<Item = Epoch> {
        self.all
            .iter()
            .filter(|s| s.state == SnapshotState::Deleting)
            .map(|s| s.epoch)
    }
}

/// What a change works on.
#[derive(Debug)]
pub(super) struct Current {
    pub(super) table: Table,
    /// The segment with the newest copy of the table; `None` if no segment has it.
    pub(super) home: Option<u32>,
}

/// The table, and what is read from it all the time.
pub(super) struct Snapshots {
    /// Guards changes; held while one is appended. Readers take `published`, which is held for no I/O.
    current: Mutex<Current>,
    published: RwLock<Published>,
    /// 0: none.
    newest: AtomicU64,
    /// The highest epoch that any record speaks of: no later cut may get a number up to that.
    highest: AtomicU64,
}

impl Snapshots {
    pub(super) fn new(table: Table, home: Option<u32>) -> Self {
        let published = Published {
            epoch: table.epoch,
            all: Arc::new(table.snapshots.clone()),
        };
        let snapshots = Self {
            newest: AtomicU64::new(0),
            highest: AtomicU64::new(table.epoch.0),
            published: RwLock::new(published.clone()),
            current: Mutex::new(Current { table, home }),
        };
        snapshots.publish(published);
        snapshots
    }

    pub(super) fn saw(&self, epoch: Epoch) {
        if self.highest.load(Ordering::Relaxed) < epoch.0 {
            self.highest.fetch_max(epoch.0, Ordering::Relaxed);
        }
    }

    pub(super) fn highest(&self) -> Epoch {
        Epoch(self.highest.load(Ordering::Relaxed))
    }

    pub(super) fn published(&self) -> Published {
        self.published.read().clone()
    }

    fn publish(&self, published: Published) {
        let keeps =
            |s: &&SnapshotInfo| matches!(s.state, SnapshotState::Ready | SnapshotState::Suspect);
        let newest = published
            .all
            .iter()
            .rev()
            .find(keeps)
            .map_or(0, |s| s.epoch.0);
        self.newest.store(newest, Ordering::SeqCst);
        *self.published.write() = published;
    }

    /// The table and where its newest copy is, for the index.
    pub(super) fn for_index(&self) -> (Table, Option<u32>) {
        let current = self.current.lock();
        (current.table.clone(), current.home)
    }

    /// Changes the table: first in the journal, then in memory.
    fn change(
        &self,
        journal: &Journal,
        change: impl FnOnce(&mut Vec<SnapshotInfo>),
    ) -> Result<Lsn> {
        let mut current = self.current.lock();
        let mut table = current.table.clone();
        change(&mut table.snapshots);
        table.version += 1;
        let last = table.snapshots.last().map_or(Epoch(0), |s| s.epoch);
        let epoch = self.published.read().epoch.max(last);
        self.saw(epoch);
        table.epoch = self.highest();
        let record = Record::Table(table.clone());
        let lsn = journal.append(
            Batch {
                records: vec![record.clone()],
                payload: &[],
            },
            |_| {},
        )?;
        journal.set_preface(record);
        self.publish(Published {
            epoch,
            all: Arc::new(table.snapshots.clone()),
        });
        *current = Current {
            table,
            home: Some(segment_of(lsn)),
        };
        Ok(lsn)
    }

    /// Sees to it that a segment other than `leaving` has the table, durably.
    pub(super) fn rehome(&self, journal: &Journal, leaving: u32) -> Result<()> {
        let stays = |home: Option<u32>| home.is_some_and(|home| home != leaving);
        if stays(self.current.lock().home) {
            return Ok(());
        }
        let lsn = self.change(journal, |_| {})?;
        journal.wait_durable(lsn)
    }

    /// Takes snapshots whose space has been freed out of the table.
    pub(super) fn drop_deleted(&self, journal: &Journal, done: &[Epoch]) -> Result<()> {
        let gone = |s: &SnapshotInfo| s.state == SnapshotState::Deleting && done.contains(&s.epoch);
        self.change(journal, |all| all.retain(|s| !gone(s)))
            .map(drop)
    }
}

impl Store {
    /// The number of cuts so far, as far as the store knows: at open at least every label in use.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.snapshots.published.read().epoch
    }

    /// All snapshots, those being deleted among them, in order of their cuts.
    #[must_use]
    pub fn snapshots(&self) -> Arc<Vec<SnapshotInfo>> {
        self.snapshots.published.read().all.clone()
    }

    /// The newest snapshot that pre-images must be kept for: the newest that is ready or suspect.
    #[must_use]
    pub fn newest(&self) -> Option<Epoch> {
        match self.snapshots.newest.load(Ordering::SeqCst) {
            0 => None,
            epoch => Some(Epoch(epoch)),
        }
    }

    /// Adds a snapshot to the table, or replaces the one of the same epoch.
    ///
    /// # Errors
    /// [`Error::SnapshotName`] for a name longer than 255 bytes; else as [`Store::keep_attr`], and the
    /// table is as it was.
    pub fn record_snapshot(&self, info: &SnapshotInfo) -> Result<Lsn> {
        if info.name.len() > 255 {
            return Err(Error::SnapshotName(
                String::from_utf8_lossy(&info.name).into_owned(),
            ));
        }
        self.snapshots.change(&self.journal, |all| {
            match all.binary_search_by_key(&info.epoch, |s| s.epoch) {
                Ok(at) => all[at] = info.clone(),
                Err(at) => all.insert(at, info.clone()),
            }
        })
    }

    /// Marks snapshot `k` as being deleted, durably: it is no longer to be shown, and [`Store::reclaim`]
    /// frees its space. The caller has made sure that nobody reads it.
    ///
    /// # Errors
    /// [`Error::SnapshotMissing`] if there is none; else as [`Store::keep_attr`].
    pub fn delete_snapshot(&self, k: Epoch) -> Result<Lsn> {
        if !self.snapshots().iter().any(|s| s.epoch == k) {
            return Err(Error::SnapshotMissing(format!("number {k}")));
        }
        let lsn = self.snapshots.change(&self.journal, |all| {
            all.iter_mut()
                .filter(|s| s.epoch == k)
                .for_each(|s| s.state = SnapshotState::Deleting);
        })?;
        self.journal.wait_durable(lsn)?;
        Ok(lsn)
    }
}
