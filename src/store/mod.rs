//! The store: pre-images, births, retained files and the snapshot table, kept in an append-only journal
//! and found through an index that can be rebuilt from it. It knows no engine and no FUSE.
//!
//! A pre-image labelled `e` holds the value as of cut `e`. The value of an aspect in snapshot `k` is the
//! pre-image with the smallest label ≥ `k`, else the live value. So a record labelled `e` whose predecessor
//! of the same aspect is labelled `e'`, of an object born in epoch `b`, serves just the snapshots in
//! `(max(e', b), e]`, and is dead when none of those exists. Cuts only count up: what is dead stays dead.
//! That is why the journal needs no tombstones: a rebuild may bring dead records back, and nothing looks
//! at them. docs/FORMAT.md has the bytes and the argument.

mod ahead;
pub mod check;
mod checkpoint;
mod codec;
mod commit;
mod compact;
mod count;
mod examine;
mod found;
mod frame;
#[doc(hidden)]
pub mod fuzz;
mod identity;
mod index;
#[cfg(test)]
mod index_tests;
mod journal;
mod key;
mod labels;
mod layers;
mod lookup;
pub mod media;
mod open;
mod reclaim;
mod record;
mod repair;
mod replay;
mod room;
mod session;
mod snapshots;
mod table;
#[cfg(test)]
mod tests;
mod types;

pub use check::{CheckReport, Finding, Severity};
pub use examine::Examined;
pub use room::Space;
pub use session::boot_id;
pub use table::Rows;
pub use types::{
    AttrImage, EntryImage, ExtentData, ExtentRef, ObjectHandle, Payload, Retained, SnapshotInfo,
    SnapshotState, StoreOptions, StoreStats, Timestamp,
};

use crate::error::{Error, Result};
use crate::ids::{BLOCK, CHUNK_BLOCKS, Epoch, Ino, Lsn};
use crate::sync::{AtomicBool, Mutex, RwLock};
use journal::{Batch, Journal};
use key::Usage;
use layers::Layers;
use reclaim::Upkeep;
use record::{Extent, Place, Record};
use rustix::io::Errno;
use session::Session;
use snapshots::Snapshots;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// Chunks of data in one append: 4 MiB.
const CHUNKS_AT_ONCE: usize = 4;
/// Small records in one append.
const SMALL_AT_ONCE: usize = 16;

/// An open store. All methods may be called from any thread.
///
/// Locks, in the order in which they may be taken: `upkeep`, `moving`, the table's, the journal's, the
/// memtable's (see there).
pub struct Store {
    dir: PathBuf,
    uuid: u128,
    /// [`StoreOptions::count_step`].
    count_step: usize,
    /// Guards the one background job; held during its I/O.
    upkeep: Mutex<Upkeep>,
    /// Orders appends of values that can change (births, retained files; shared) against their being
    /// moved by compaction (exclusive), so that the journal has them in the order of the index.
    moving: RwLock<()>,
    snapshots: Snapshots,
    journal: Journal,
    layers: Layers,
    damage: Mutex<Vec<String>>,
    /// The reserve is there.
    reserved: AtomicBool,
    opened: Opened,
    /// Its lock is held while the journal syncs, and taken with no other held than an object's.
    session: Session,
    /// Keeps a second process out.
    _lock: OwnedFd,
}

/// What opening found, for [`Store::check`] and [`Store::stats`].
#[derive(Debug, Default)]
struct Opened {
    /// The index is in memory.
    in_memory: bool,
    /// Why the index that there was could not be used.
    distrust: Option<String>,
    /// What an index that was closed in order had noted of the segments; gone once anything changes.
    noted: Mutex<Option<BTreeMap<u32, Usage>>>,
    /// Records of the journal are gone that the index may not have.
    lost: bool,
    /// The journal ends before it did when its session was closed.
    cut_short: bool,
}

impl Store {
    /// Whether a failed append or sync has ended mutation (I7).
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.journal.poison.check().is_err()
    }

    /// The number that this store was given when it was made.
    #[must_use]
    pub fn uuid(&self) -> u128 {
        self.uuid
    }

    /// Keeps the attributes of `ino` as of cut `label`.
    ///
    /// As for every `keep_` method: the record is in the journal, and look-ups see it, when the call
    /// returns; the caller holds the object's lock and knows that there is no such record yet.
    ///
    /// # Errors
    /// [`Error::Poisoned`] after a failed append or sync; the errno of the failed write; `EINVAL` for a
    /// value that the format has no place for.
    pub fn keep_attr(&self, ino: Ino, label: Epoch, image: &AttrImage) -> Result<Lsn> {
        let image = image.clone();
        self.append(Batch::small(vec![Record::Attr { ino, label, image }]))
    }

    /// Keeps what `name` meant in `dir` as of cut `label`; `None`: nothing.
    ///
    /// # Errors
    /// As [`Store::keep_attr`].
    pub fn keep_entry(
        &self,
        dir: Ino,
        name: &[u8],
        label: Epoch,
        was: Option<&EntryImage>,
    ) -> Result<Lsn> {
        self.keep_entries(label, &[(dir, name, was)])
    }

    /// Keeps what several names meant as of cut `label`, in one append.
    ///
    /// # Errors
    /// As [`Store::keep_attr`]; then some of them may have been kept.
    pub fn keep_entries(
        &self,
        label: Epoch,
        entries: &[(Ino, &[u8], Option<&EntryImage>)],
    ) -> Result<Lsn> {
        let record = |(dir, name, was): &(Ino, &[u8], Option<&EntryImage>)| {
            let (name, was) = (name.to_vec(), was.cloned());
            Record::Entry {
                dir: *dir,
                label,
                name,
                was,
            }
        };
        let mut last = Err(Error::Os(Errno::INVAL));
        for some in entries.chunks(SMALL_AT_ONCE) {
            last = Ok(self.append(Batch::small(some.iter().map(record).collect()))?);
        }
        last
    }

    /// Keeps the contents of blocks of `ino` from `first_block` on, as of cut `label`.
    ///
    /// # Errors
    /// As [`Store::keep_attr`]; then some leading part may have been kept. `EINVAL` for no blocks, or
    /// bytes that are not whole blocks.
    pub fn keep_extent(
        &self,
        ino: Ino,
        label: Epoch,
        first_block: u64,
        data: ExtentData<'_>,
    ) -> Result<Lsn> {
        let (blocks, bytes) = match data {
            ExtentData::Bytes(bytes) if bytes.len().is_multiple_of(BLOCK) => {
                (bytes.len() as u64 / BLOCK as u64, bytes)
            }
            ExtentData::Bytes(_) => return Err(Error::Os(Errno::INVAL)),
            ExtentData::Hole { blocks } => (blocks, &[][..]),
        };
        let Some(end) = first_block.checked_add(blocks).filter(|_| blocks > 0) else {
            return Err(Error::Os(Errno::INVAL));
        };
        let hole = bytes.is_empty();
        let at_once = if hole { SMALL_AT_ONCE } else { CHUNKS_AT_ONCE };
        let (mut at, mut last) = (first_block, Lsn(0));
        while at < end {
            let (begun, mut records) = (at, Vec::with_capacity(at_once));
            let offset = |block: u64| (block - first_block) as usize * BLOCK;
            while at < end && records.len() < at_once {
                let to = end.min((at / CHUNK_BLOCKS + 1).saturating_mul(CHUNK_BLOCKS));
                let place = (!hole).then(|| Place {
                    block: (at - begun) as u32,
                    crcs: frame::block_checksums(&bytes[offset(at)..offset(to)]),
                });
                let blocks = (to - at) as u16;
                records.push(Record::Extent(Extent {
                    ino,
                    label,
                    first_block: at,
                    blocks,
                    place,
                }));
                at = to;
            }
            let payload = if hole {
                &[][..]
            } else {
                &bytes[offset(begun)..offset(at)]
            };
            last = self.append(Batch {
                records,
                payload,
                urgent: false,
            })?;
        }
        Ok(last)
    }

    /// Notes that `ino` was created in `epoch`: it is in no snapshot up to that one.
    ///
    /// # Errors
    /// As [`Store::keep_attr`].
    pub fn record_birth(&self, ino: Ino, epoch: Epoch) -> Result<Lsn> {
        let _moving = self.moving.read();
        self.append(Batch::small(vec![Record::Birth { ino, epoch }]))
    }

    /// Notes that a file is retained. A later record of the same object replaces this one.
    ///
    /// # Errors
    /// As [`Store::keep_attr`].
    pub fn record_retained(&self, retained: &Retained) -> Result<Lsn> {
        let _moving = self.moving.read();
        let record = Record::Retained {
            gone: false,
            retained: retained.clone(),
        };
        self.append(Batch::small(vec![record]))
    }

    /// Drops the record of a retained file that is gone from disk, or never got there.
    ///
    /// # Errors
    /// As [`Store::keep_attr`]. It is no error if there is no such record.
    pub fn forget_retained(&self, ino: Ino) -> Result<()> {
        let _moving = self.moving.read();
        let Some(retained) = self.retained(ino)? else {
            return Ok(());
        };
        let record = Record::Retained {
            gone: true,
            retained,
        };
        // Left behind, the record would be acted on.
        self.append(Batch {
            urgent: true,
            ..Batch::small(vec![record])
        })
        .map(drop)
    }

    /// Appends records and shows them to look-ups.
    fn append(&self, batch: Batch<'_>) -> Result<Lsn> {
        self.journal.append(batch, |done| {
            for (record, lsn) in done {
                self.snapshots.saw(record.highest_epoch());
                let pairs = key::pairs_of(&record, lsn);
                pairs
                    .iter()
                    .for_each(|(key, value)| self.journal.count(key, value));
                let replaced = self.layers.put(pairs);
                replaced
                    .iter()
                    .for_each(|(key, value)| self.journal.uncount(key, value));
            }
        })
    }

    /// Makes every record durable whose append has returned.
    ///
    /// # Errors
    /// [`Error::Poisoned`], or the errno of the failed sync, which poisons the store (I7).
    pub fn sync(&self) -> Result<()> {
        self.journal.sync()?;
        self.journal.prepare_early()
    }

    /// Returns once the record `lsn` is durable; callers that come together share one sync.
    ///
    /// # Errors
    /// As [`Store::sync`].
    pub fn wait_durable(&self, lsn: Lsn) -> Result<()> {
        self.journal.wait_durable(lsn)
    }

    /// Whether the journal may take space before it needs it, which makes its syncs cheaper for those who wait for them.
    pub fn set_fills_ahead(&self, fills: bool) {
        self.journal.set_fills_ahead(fills);
    }

    /// Whether the record `lsn` is durable already.
    #[must_use]
    pub fn is_durable(&self, lsn: Lsn) -> bool {
        self.journal.is_durable(lsn)
    }

    /// Whether every record is durable already whose append has returned.
    #[must_use]
    pub fn is_all_durable(&self) -> bool {
        self.journal.is_all_durable()
    }

    /// Records appended since the store was opened.
    #[must_use]
    pub fn appended(&self) -> u64 {
        self.journal.appended()
    }

    /// Bytes of memory held by records that are not in the index yet: what [`Store::checkpoint`] frees.
    #[must_use]
    pub fn memtable_bytes(&self) -> usize {
        self.layers.bytes()
    }

    /// What of the journal could not be read when the store was opened. Never served; but a pre-image may
    /// be among it, so [`Store::begin_session`] marks the snapshots that exist suspect.
    #[must_use]
    pub fn damage(&self) -> Vec<String> {
        self.damage.lock().clone()
    }

    /// Sizes and counts; what a large index refers to only as far as the background job has counted it. Asks the disk
    /// for the size of each segment.
    #[must_use]
    pub fn stats(&self) -> StoreStats {
        let known = self.journal.known.lock().clone();
        let allocated = known
            .keys()
            .map(|number| self.journal.media.allocated(*number).unwrap_or(0));
        StoreStats {
            journal_bytes: allocated.sum(),
            index_bytes: self.layers.index.allocated(),
            index_in_memory: self.opened.in_memory,
            live_payload_bytes: known.values().map(|k| k.usage.payload).sum(),
            segments: known.len() as u64,
            records: known.values().map(|k| k.usage.records).sum(),
            appended: self.journal.appended(),
            memtable_bytes: self.layers.bytes() as u64,
            snapshots: self.snapshots().len() as u64,
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // Nothing to save: every record is in the journal since its append returned.
        log::debug!(
            "store {:032x} closed, {} records appended",
            self.uuid,
            self.journal.appended()
        );
    }
}
