//! The journal by itself, and what of it the index must have.

use super::{Check, Finding, Fix, Severity, concerned};
use crate::error::Result;
use crate::ids::{CHUNK_BLOCKS, Epoch, Ino, Lsn};
use crate::store::Store;
use crate::store::key::{self, Piece, pairs_of};
use crate::store::lookup::label_at_end;
use crate::store::media::{MediaFile, name_of};
use crate::store::record::{Extent, Record};
use crate::store::replay::{SegmentLog, read_segment};
use crate::store::table::Table;

/// What is wrong with a file that is no segment of this store.
const FOREIGN: &str = "not a segment of this store, or wholly damaged";

impl Check<'_> {
    /// Every record of every segment.
    pub(super) fn segments(&mut self) -> Result<()> {
        let mut numbers = self.store.journal.media.list()?;
        numbers.sort_unstable();
        for number in numbers {
            let Some(log) = log_of(self.store, number)? else {
                continue;
            };
            self.report.segments += 1;
            self.report.records += log.records.len() as u64;
            for at in 0..log.damage.len() {
                self.confirm(|store| {
                    let again = log_of(store, number)?;
                    let what = again.and_then(|log| log.damage.into_iter().nth(at));
                    Ok(what.map(|(_, what)| damaged(number, &what)))
                })?;
            }
            if log.records.is_empty() && !log.blank {
                self.confirm(|store| {
                    let again = log_of(store, number)?;
                    let still = again.is_some_and(|log| log.records.is_empty() && !log.blank);
                    let finding = Finding::new(Severity::Wrong, name_of(number), FOREIGN);
                    Ok(still.then(|| finding.fixed_by(Fix::Evacuate(number))))
                })?;
            }
            for (lsn, record) in &log.records {
                if let Some(what) = misplaced(record, number, self.store) {
                    let finding = Finding::new(Severity::Wrong, name_of(number), what);
                    self.report.add(finding.fixed_by(Fix::Evacuate(number)));
                }
                self.confirm(|store| unknown_to_index(store, *lsn, record))?;
            }
        }
        Ok(())
    }
}

/// A damaged place of a log. Whether a value is lost by it is told by the entries that came from there.
fn damaged(number: u32, what: &str) -> Finding {
    let name = name_of(number);
    let what = what.strip_prefix(&format!("{name}: ")).unwrap_or(what);
    Finding::new(Severity::Wrong, name, what).fixed_by(Fix::Evacuate(number))
}

/// The log of a segment as it is now; `None` if it is gone.
fn log_of(store: &Store, number: u32) -> Result<Option<SegmentLog>> {
    let durable = store.journal.ends().get(&number).copied().unwrap_or(0);
    let Some(file) = store.journal.media.open(number)? else {
        return Ok(None);
    };
    let area = store.journal.log_area();
    read_segment(file.as_ref(), number, store.uuid, durable, area).map(Some)
}

/// Whether segment `number` has this very table.
pub(super) fn has_table(
    store: &Store,
    file: &dyn MediaFile,
    number: u32,
    table: &Table,
) -> Result<bool> {
    let end = store.journal.ends().get(&number).copied().unwrap_or(0);
    let log = read_segment(file, number, store.uuid, end, store.journal.log_area())?;
    let same = |(_, record): &(Lsn, Record)| matches!(record, Record::Table(t) if t.version >= table.version);
    Ok(log.records.iter().any(same))
}

/// What is wrong with a record that stands where it does not belong.
fn misplaced(record: &Record, number: u32, store: &Store) -> Option<String> {
    match record {
        Record::Segment {
            uuid, number: own, ..
        } if *own != number || *uuid != store.uuid => {
            Some(format!("its header is that of segment {own:x}"))
        }
        _ => None,
    }
}

/// A record that some snapshot needs and that the index does not have.
fn unknown_to_index(store: &Store, lsn: Lsn, record: &Record) -> Result<Option<Finding>> {
    let table = store.snapshots.published();
    let Some((key, value)) = pairs_of(record, lsn).into_iter().next() else {
        return Ok(None);
    };
    let dead = match record {
        Record::Extent(extent) => return unknown_blocks(store, lsn, extent),
        Record::Birth { epoch, .. } => table.is_dead(Epoch(0), *epoch),
        Record::Retained { gone, retained } => {
            *gone || table.is_dead(retained.birth, retained.removed)
        }
        _ => {
            let birth = store.birth(object_of(record))?.unwrap_or_default();
            let first = &key[..key.len() - 8];
            let before = store.layers.last(first, &key)?;
            let before = before.map_or(Ok(Epoch(0)), |(key, _)| label_at_end(&key))?;
            table.is_dead(before.max(birth), label_at_end(&key)?)
        }
    };
    // Of births and retained files a later record replaces the earlier ones.
    let known = match store.layers.get(&key)? {
        Some(value) => {
            key::stamp(&value)?.0 >= lsn
                || matches!(record, Record::Attr { .. } | Record::Entry { .. })
        }
        None => false,
    };
    if dead || known {
        return Ok(None);
    }
    let finding = missing(lsn);
    Ok(Some(finding.concerning(concerned(store, &key, &value)?)))
}

fn missing(lsn: Lsn) -> Finding {
    let place = format!(
        "{} at {}",
        name_of(key::segment_of(lsn)),
        crate::store::journal::offset_of(lsn)
    );
    Finding::new(
        Severity::Wrong,
        place,
        "the index does not have this record",
    )
    .fixed_by(Fix::Rebuild)
}

/// The same for an extent, block by block.
fn unknown_blocks(store: &Store, lsn: Lsn, extent: &Extent) -> Result<Option<Finding>> {
    let table = store.snapshots.published();
    let piece = Piece::of(extent, lsn);
    let birth = store.birth(extent.ino)?.unwrap_or_default();
    let mut lower = [birth; CHUNK_BLOCKS as usize];
    let mut there = [false; CHUNK_BLOCKS as usize];
    for known in store.pieces(extent.ino, piece.chunk, Epoch(0), Some(piece.label))? {
        for block in known.range() {
            if known.label == piece.label {
                there[block] = true;
            } else {
                lower[block] = lower[block].max(known.label);
            }
        }
    }
    let lost = |block: &usize| !there[*block] && !table.is_dead(lower[*block], piece.label);
    let Some(first) = piece.range().find(lost) else {
        return Ok(None);
    };
    let names = store.names_between(lower[first], piece.label);
    Ok(Some(missing(lsn).concerning(names)))
}

fn object_of(record: &Record) -> Ino {
    match record {
        Record::Attr { ino, .. } | Record::Birth { ino, .. } => *ino,
        Record::Entry { dir, .. } => *dir,
        Record::Extent(extent) => extent.ino,
        Record::Retained { retained, .. } => retained.ino,
        Record::Segment { .. } | Record::Table(_) | Record::Change(_) | Record::Seal { .. } => {
            Ino(0)
        }
    }
}
