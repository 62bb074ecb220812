//! The snapshot table as records of the journal: whole, and change by change (docs/FORMAT.md has the tables). Pure: no
//! I/O.

use super::codec::{Reader, Writer};
use super::record::{MAX_NAME, get_time, put_time};
use super::types::{SnapshotInfo, SnapshotState};
use crate::error::{Error, Result};
use crate::ids::Epoch;
use rpds::RedBlackTreeMapSync;
use std::ops::Bound;

/// The snapshot table. Of several, the one with the highest version holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) version: u64,
    /// At least the number of cuts, and at least every label used so far.
    pub(super) epoch: Epoch,
    pub(super) snapshots: Rows,
}

/// The rows of the table, by number. To copy it, and to change a copy, takes the same time however many there are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rows(RedBlackTreeMapSync<Epoch, SnapshotInfo>);

impl Rows {
    /// All of them, the oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &SnapshotInfo> {
        self.0.values()
    }

    /// Those in `(after, to]`, the oldest first.
    pub fn within(&self, after: Epoch, to: Epoch) -> impl Iterator<Item = &SnapshotInfo> {
        let to = to.max(after);
        let range = (Bound::Excluded(after), Bound::Included(to));
        self.0.range(range).map(|(_, info)| info)
    }

    /// That of number `k`.
    #[must_use]
    pub fn get(&self, k: Epoch) -> Option<&SnapshotInfo> {
        self.0.get(&k)
    }

    /// The newest.
    #[must_use]
    pub fn last(&self) -> Option<&SnapshotInfo> {
        self.0.last().map(|(_, info)| info)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.size()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds one, or puts it in the place of the one with its number.
    pub(super) fn set(&mut self, info: SnapshotInfo) {
        self.0.insert_mut(info.epoch, info);
    }
}

impl Table {
    /// Makes the rows of `change` those of the table.
    pub(super) fn apply(&mut self, change: &Change) {
        (self.version, self.epoch) = (change.version, self.epoch.max(change.epoch));
        let rows = &mut self.snapshots;
        for (epoch, edit) in &change.edits {
            match edit {
                Edit::Set(info) => rows.set(info.clone()),
                Edit::State(state) => {
                    if let Some(info) = rows.0.get_mut(epoch) {
                        info.state = *state;
                    }
                }
                Edit::Drop => drop(rows.0.remove_mut(epoch)),
            }
        }
    }
}

/// One version of the table, as what has changed since the one before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) version: u64,
    /// As [`Table::epoch`].
    pub(super) epoch: Epoch,
    /// By number of the snapshot.
    pub(super) edits: Vec<(Epoch, Edit)>,
}

/// What becomes of a row of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Edit {
    /// There is none any more.
    Drop,
    /// It is this one.
    Set(SnapshotInfo),
    /// It has this state; all else stays.
    State(SnapshotState),
}

impl Default for Table {
    fn default() -> Self {
        Self {
            version: 0,
            epoch: Epoch(0),
            snapshots: Rows::default(),
        }
    }
}

pub(super) fn put_table(w: &mut Writer, table: &Table) {
    w.u64(table.version);
    w.u64(table.epoch.0);
    w.count(table.snapshots.len());
    for info in table.snapshots.iter() {
        w.u64(info.epoch.0);
        put_row(w, info);
    }
}

/// All of a row but its number.
fn put_row(w: &mut Writer, info: &SnapshotInfo) {
    w.bytes(&info.name);
    put_time(w, info.created);
    w.u8(u8::from(info.held));
    put_state(w, info.state);
}

fn get_row(r: &mut Reader<'_>, epoch: Epoch) -> Result<SnapshotInfo> {
    Ok(SnapshotInfo {
        epoch,
        name: r.bytes(MAX_NAME)?.to_vec(),
        created: get_time(r)?,
        held: r.u8()? != 0,
        state: get_state(r)?,
    })
}

fn put_state(w: &mut Writer, state: SnapshotState) {
    w.u8(match state {
        SnapshotState::Ready => 0,
        SnapshotState::Deleting => 1,
        SnapshotState::Suspect => 2,
        SnapshotState::Invalid => 3,
    });
}

fn get_state(r: &mut Reader<'_>) -> Result<SnapshotState> {
    match r.u8()? {
        0 => Ok(SnapshotState::Ready),
        1 => Ok(SnapshotState::Deleting),
        2 => Ok(SnapshotState::Suspect),
        3 => Ok(SnapshotState::Invalid),
        other => Err(Error::Corrupt(format!("snapshot state {other}"))),
    }
}

pub(super) fn put_change(w: &mut Writer, change: &Change) {
    w.u64(change.version);
    w.u64(change.epoch.0);
    w.count(change.edits.len());
    for (epoch, edit) in &change.edits {
        w.u64(epoch.0);
        match edit {
            Edit::Drop => w.u8(0),
            Edit::Set(info) => {
                w.u8(1);
                put_row(w, info);
            }
            Edit::State(state) => {
                w.u8(2);
                put_state(w, *state);
            }
        }
    }
}

pub(super) fn get_change(r: &mut Reader<'_>) -> Result<Change> {
    let (version, epoch) = (r.u64()?, Epoch(r.u64()?));
    let count = r.count(9)?;
    let mut edits = Vec::with_capacity(count.min(1024));
    for _ in 0..count {
        let of = Epoch(r.u64()?);
        let edit = match r.u8()? {
            0 => Edit::Drop,
            1 => Edit::Set(get_row(r, of)?),
            2 => Edit::State(get_state(r)?),
            other => return Err(Error::Corrupt(format!("change of a snapshot: {other}"))),
        };
        edits.push((of, edit));
    }
    Ok(Change {
        version,
        epoch,
        edits,
    })
}

pub(super) fn get_table(r: &mut Reader<'_>) -> Result<Table> {
    let (version, epoch) = (r.u64()?, Epoch(r.u64()?));
    let count = r.count(26)?;
    let mut snapshots = Rows::default();
    for _ in 0..count {
        let epoch = Epoch(r.u64()?);
        let info = get_row(r, epoch)?;
        if snapshots.last().is_some_and(|last| last.epoch >= epoch) {
            return Err(Error::Corrupt("snapshot table out of order".into()));
        }
        snapshots.set(info);
    }
    Ok(Table {
        version,
        epoch,
        snapshots,
    })
}
