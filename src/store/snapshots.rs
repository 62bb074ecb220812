//! The snapshot table: in memory, and in the journal as a whole at the start of each segment, and change by change.

use super::Store;
use super::journal::{Batch, Journal};
use super::key::segment_of;
use super::record::Record;
use super::table::{Change, Edit, Rows, Table};
use super::types::{SnapshotInfo, SnapshotState};
use crate::error::{Error, Result};
use crate::ids::{Epoch, Lsn};
use crate::sync::{AtomicU64, Mutex, Ordering, RwLock};
use std::collections::BTreeSet;

/// Snapshots given up in one record, so that it fits into the log.
const MARKS_AT_ONCE: usize = 256;

/// The table as it was at one moment.
#[derive(Debug, Clone)]
pub(super) struct Published {
    /// The number of cuts that the store knows of.
    pub(super) epoch: Epoch,
    pub(super) all: Rows,
}

impl Published {
    /// Whether a record labelled `label` that serves the snapshots in `(lower, label]` can never be needed
    /// again. A label beyond the last known cut belongs to one that is under way.
    pub(super) fn is_dead(&self, lower: Epoch, label: Epoch) -> bool {
        let mut within = self.all.within(lower, label);
        label <= self.epoch && !within.any(|s| s.state.keeps())
    }

    /// The snapshots that something is kept for.
    pub(super) fn kept(&self) -> impl DoubleEndedIterator<Item = Epoch> {
        self.all.iter().filter(|s| s.state.keeps()).map(|s| s.epoch)
    }

    /// The others: deleted or invalid.
    pub(super) fn given_up(&self) -> impl Iterator<Item = &SnapshotInfo> {
        self.all.iter().filter(|s| !s.state.keeps())
    }
}

/// What a change works on.
#[derive(Debug)]
pub(super) struct Current {
    pub(super) table: Table,
    /// The segment with the newest copy of the whole table; `None` if no segment has it.
    home: Option<u32>,
    /// The segments with the changes since that copy.
    changed_in: BTreeSet<u32>,
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
            all: table.snapshots.clone(),
        };
        let snapshots = Self {
            newest: AtomicU64::new(0),
            highest: AtomicU64::new(table.epoch.0),
            published: RwLock::new(published.clone()),
            current: Mutex::new(Current {
                table,
                home,
                changed_in: BTreeSet::new(),
            }),
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
        let newest = published.kept().next_back().map_or(0, |epoch| epoch.0);
        self.newest.store(newest, Ordering::SeqCst);
        *self.published.write() = published;
    }

    /// The table, and the segment that has the whole of it, for the index.
    pub(super) fn for_index(&self) -> (Table, Option<u32>) {
        let current = self.current.lock();
        let home = current.home.filter(|_| current.changed_in.is_empty());
        (current.table.clone(), home)
    }

    /// Changes the table: first in the journal, then in memory. `edit` says what changes; urgent changes find
    /// room on a full disk.
    fn change(
        &self,
        journal: &Journal,
        urgent: bool,
        edit: impl FnOnce(&Table) -> Vec<(Epoch, Edit)>,
    ) -> Result<Lsn> {
        let mut current = self.current.lock();
        let edits = edit(&current.table);
        let last = edits.iter().map(|(epoch, _)| *epoch).max();
        let epoch = self.published.read().epoch.max(last.unwrap_or(Epoch(0)));
        self.saw(epoch);
        let change = Change {
            version: current.table.version + 1,
            epoch: self.highest(),
            edits,
        };
        let batch = Batch {
            urgent,
            ..Batch::small(vec![Record::Change(change.clone())])
        };
        let lsn = journal.append(batch, |_| {})?;
        current.table.apply(&change);
        current.changed_in.insert(segment_of(lsn));
        journal.set_preface(Record::Table(current.table.clone()));
        self.publish(Published {
            epoch,
            all: current.table.snapshots.clone(),
        });
        Ok(lsn)
    }

    /// Sees to it that a segment other than `leaving` has the table, durably.
    pub(super) fn rehome(&self, journal: &Journal, leaving: u32) -> Result<()> {
        let mut current = self.current.lock();
        let stays = current.home.is_some_and(|home| home != leaving);
        if stays && !current.changed_in.contains(&leaving) {
            return Ok(());
        }
        let table = Table {
            version: current.table.version + 1,
            epoch: self.highest(),
            snapshots: current.table.snapshots.clone(),
        };
        // It is how space is made.
        let batch = Batch {
            urgent: true,
            ..Batch::small(vec![Record::Table(table.clone())])
        };
        let lsn = journal.append(batch, |_| {})?;
        journal.set_preface(Record::Table(table.clone()));
        *current = Current {
            table,
            home: Some(segment_of(lsn)),
            changed_in: BTreeSet::new(),
        };
        drop(current);
        journal.wait_durable(lsn)
    }

    /// Gives the snapshots that are `due` another state; returns them.
    pub(super) fn mark(
        &self,
        journal: &Journal,
        due: impl Fn(&SnapshotInfo) -> bool,
        state: SnapshotState,
    ) -> Result<Vec<SnapshotInfo>> {
        let mut marked = Vec::new();
        self.change(journal, false, |table| {
            let due = table.snapshots.iter().filter(|s| due(s));
            marked = due.cloned().collect();
            marked.iter_mut().for_each(|info| info.state = state);
            let edits = marked.iter().map(|info| (info.epoch, Edit::State(state)));
            edits.collect()
        })?;
        Ok(marked)
    }

    /// Takes snapshots whose space has been freed out of the table.
    pub(super) fn drop_deleted(&self, journal: &Journal, done: &[Epoch]) -> Result<()> {
        let gone = |s: &SnapshotInfo| s.state == SnapshotState::Deleting && done.contains(&s.epoch);
        // An invalid one stays.
        if !self.published().all.iter().any(gone) {
            return Ok(());
        }
        let drops = |table: &Table| {
            let gone = table.snapshots.iter().filter(|s| gone(s));
            gone.map(|s| (s.epoch, Edit::Drop)).collect()
        };
        self.change(journal, true, drops).map(drop)
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
    pub fn snapshots(&self) -> Rows {
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
        let set = |_: &Table| vec![(info.epoch, Edit::Set(info.clone()))];
        self.snapshots.change(&self.journal, false, set)
    }

    /// Changes the row of snapshot `k` by `change`, which keeps its number; everything else of the row that another
    /// thread changes meanwhile stays changed.
    ///
    /// # Errors
    /// As [`Store::record_snapshot`]. It is no error if there is no such snapshot.
    pub fn update_snapshot(&self, k: Epoch, change: impl Fn(&mut SnapshotInfo)) -> Result<Lsn> {
        self.snapshots.change(&self.journal, false, |table| {
            let edit = table.snapshots.get(k).map(|row| {
                let mut info = row.clone();
                change(&mut info);
                info.epoch = k;
                (k, Edit::Set(info))
            });
            edit.into_iter().collect()
        })
    }

    /// Gives snapshots up, durably: they become deleted or invalid, and nothing is to be kept for them any more.
    /// It finds room on a full disk, unless the log is full as well.
    ///
    /// # Errors
    /// As [`Store::keep_attr`]; then some leading part may be marked.
    pub fn give_up(&self, marks: &[(Epoch, SnapshotState)]) -> Result<()> {
        for some in marks.chunks(MARKS_AT_ONCE) {
            let lsn = self.snapshots.change(&self.journal, true, |table| {
                // One that somebody has deleted meanwhile stays so.
                let stands = |(epoch, state): &&(Epoch, SnapshotState)| {
                    let row = table.snapshots.get(*epoch);
                    row.is_some_and(|s| s.state != SnapshotState::Deleting || s.state == *state)
                };
                let marks = some.iter().filter(stands);
                marks
                    .map(|(epoch, state)| (*epoch, Edit::State(*state)))
                    .collect()
            })?;
            self.journal.wait_durable(lsn)?;
        }
        Ok(())
    }

    /// Marks snapshot `k` as being deleted, durably: it is no longer to be shown, and [`Store::reclaim`]
    /// frees its space. The caller has made sure that nobody reads it.
    ///
    /// # Errors
    /// [`Error::SnapshotMissing`] if there is none; else as [`Store::keep_attr`].
    pub fn delete_snapshot(&self, k: Epoch) -> Result<Lsn> {
        if self.snapshots().get(k).is_none() {
            return Err(Error::SnapshotMissing(format!("number {k}")));
        }
        let mark = |_: &Table| vec![(k, Edit::State(SnapshotState::Deleting))];
        let lsn = self.snapshots.change(&self.journal, true, mark)?;
        self.journal.wait_durable(lsn)?;
        Ok(lsn)
    }
}
