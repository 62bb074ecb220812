//! The snapshot table as records of the journal: whole, and change by change (docs/FORMAT.md has the tables). Pure: no
//! I/O.

use super::codec::{Reader, Writer};
use super::record::{MAX_NAME, get_time, put_time};
use super::types::{SnapshotInfo, SnapshotState};
use crate::error::{Error, Result};
use crate::ids::Epoch;
use crate::sync::Arc;

/// The snapshot table. Of several, the one with the highest version holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) version: u64,
    /// At least the number of cuts, and at least every label used so far.
    pub(super) epoch: Epoch,
    /// Ascending by epoch; shared with whoever took the table up, as it may be long.
    pub(super) snapshots: Rows,
}

/// The rows of the table: a new version shares all but those that have changed.
pub(super) type Rows = Arc<Vec<Arc<SnapshotInfo>>>;

impl Table {
    /// Makes the rows of `change` those of the table.
    pub(super) fn apply(&mut self, change: &Change) {
        (self.version, self.epoch) = (change.version, self.epoch.max(change.epoch));
        let rows = Arc::make_mut(&mut self.snapshots);
        for (epoch, edit) in &change.edits {
            match (rows.binary_search_by_key(epoch, |s| s.epoch), edit) {
                (Ok(at), Edit::Set(info)) => rows[at] = Arc::new(info.clone()),
                (Err(at), Edit::Set(info)) => rows.insert(at, Arc::new(info.clone())),
                (Ok(at), Edit::State(state)) => Arc::make_mut(&mut rows[at]).state = *state,
                (Ok(at), Edit::Drop) => drop(rows.remove(at)),
                (Err(_), Edit::State(_) | Edit::Drop) => {}
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
    let mut snapshots: Vec<Arc<SnapshotInfo>> = Vec::with_capacity(count.min(1024));
    for _ in 0..count {
        let epoch = Epoch(r.u64()?);
        let info = get_row(r, epoch)?;
        if snapshots.last().is_some_and(|last| last.epoch >= epoch) {
            return Err(Error::Corrupt("snapshot table out of order".into()));
        }
        snapshots.push(Arc::new(info));
    }
    Ok(Table {
        version,
        epoch,
        snapshots: Arc::new(snapshots),
    })
}
