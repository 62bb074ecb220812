//! Segments that hold little or nothing any more: what is live is appended anew, then the file goes.

use super::Store;
use super::journal::{Batch, Known};
use super::key::{self, Piece, segment_of};
use super::lookup::piece_range;
use super::reclaim::Upkeep;
use super::record::{Extent, Record};
use super::replay::{SegmentLog, read_segment};
use crate::error::{Error, Result};
use crate::ids::{BLOCK, CHUNK_BLOCKS, Lsn};

/// A segment is compacted when less than one part in this many of it is live.
const SPARSE: u64 = 4;
/// A tail with nothing live in it is left once its segment takes more than this many bytes of the disk besides its
/// log.
const IDLE_TAIL: u64 = 64 << 10;

impl Store {
    /// Frees one segment; true if there may be more.
    pub(super) fn segment_step(&self, upkeep: &mut Upkeep) -> Result<bool> {
        if !upkeep.segments_due {
            return Ok(false);
        }
        self.leave_idle_tail()?;
        let Some(segment) = self.sparse_segment() else {
            upkeep.segments_due = false;
            return Ok(false);
        };
        match self.free_segment(upkeep, segment) {
            // The caller had its chance to make room. To move what is left is not worth that others wait for it who wait
            // for space; it is tried again.
            Err(error) if error.is_full() && std::mem::take(&mut upkeep.no_room) => {
                log::debug!("segment {segment:x} is left as it is: {error}");
                Ok(false)
            }
            freed => {
                upkeep.no_room = freed.as_ref().is_err_and(Error::is_full);
                freed.map(|()| true)
            }
        }
    }

    fn leave_idle_tail(&self) -> Result<()> {
        let Some((tail, false)) = self.journal.tail() else {
            return Ok(());
        };
        let records = self
            .journal
            .known
            .lock()
            .get(&tail)
            .map_or(0, |known| known.usage.records);
        let allocated = self.journal.media.allocated(tail)?;
        if records == 0 && allocated > self.journal.log_area() + IDLE_TAIL {
            match self.journal.rotate() {
                // Other segments may be there to be freed.
                Err(error) if error.is_full() => log::debug!("the tail is not left: {error}"),
                other => other?,
            }
            // It counts as closed once it is sealed, and it is sealed when it is durable.
            self.journal.sync()?;
        }
        Ok(())
    }

    /// A closed segment of which little is live. Never the last one: its number tells how far the journal
    /// goes.
    fn sparse_segment(&self) -> Option<u32> {
        // Before the first append the journal ends where it ended at opening, and a segment that was made since has
        // nothing in it: the checkpoint is in the one before.
        let tail = self.journal.tail().map(|(number, _)| number);
        let tail = Some(tail.unwrap_or_else(|| segment_of(self.journal.ended())));
        // Nor one after the checkpoint: opening takes a gap there for a loss.
        let tail = tail.map(|tail| {
            self.journal
                .oldest_unsealed()
                .map_or(tail, |old| old.min(tail))
        });
        let sparse = |known: &Known| {
            known.closed
                && !known.damaged
                && (known.usage.live * SPARSE < known.usage.used || known.usage.records == 0)
        };
        let known = self.journal.known.lock();
        let sparse = known
            .iter()
            .filter(|(number, known)| sparse(known) && Some(**number) < tail);
        // Those that are empty first: to move what is left in others takes room.
        let found = sparse.min_by_key(|(_, known)| known.usage.records > 0);
        found.map(|(number, _)| *number)
    }

    /// Moves what is live in `segment`, and removes it.
    fn free_segment(&self, upkeep: &mut Upkeep, segment: u32) -> Result<()> {
        // What its log speaks of is to be found in the index, not in memory.
        self.checkpoint_in(upkeep, false)?;
        let Some(log) = self.log_of(segment)? else {
            self.journal
                .known
                .lock()
                .entry(segment)
                .or_default()
                .damaged = true;
            return Ok(());
        };
        let mut replaced = false;
        for (lsn, record) in &log.records {
            replaced |= self.move_record(*lsn, record)?;
        }
        if replaced {
            self.checkpoint_in(upkeep, false)?;
        }
        for (lsn, record) in &log.records {
            for key in self.leftovers(*lsn, record)? {
                self.layers.index.remove(&key)?;
            }
        }
        self.layers.index.remove(&key::usage(segment))?;
        // Neither the index nor the table may need the file when it goes.
        self.layers.index.sync()?;
        self.snapshots.rehome(&self.journal, segment)?;
        self.journal.remove(segment)?;
        log::debug!("segment {segment:x} freed");
        Ok(())
    }

    /// The log of a closed segment; `None` if it is damaged and the index may refer to what is not in it.
    fn log_of(&self, segment: u32) -> Result<Option<SegmentLog>> {
        let Some(file) = self.journal.file(segment)? else {
            return Ok(Some(SegmentLog::default()));
        };
        let log = read_segment(file.as_ref(), segment, self.uuid, 0, 0)?;
        if log.sealed.is_some() && log.damage.is_empty() {
            return Ok(Some(log));
        }
        let mut needed = false;
        self.layers.index.scan(&[], &[u8::MAX], &mut |key, value| {
            needed =
                key::footprint(key, value).is_some_and(|footprint| footprint.segment == segment);
            Ok(!needed)
        })?;
        Ok(if needed { None } else { Some(log) })
    }

    /// Appends what is live of a record anew. Whether the index has the record, and memory a newer one in its place.
    fn move_record(&self, lsn: Lsn, record: &Record) -> Result<bool> {
        if let Record::Extent(extent) = record {
            return self.move_extent(lsn, extent);
        }
        let Some((key, _)) = key::pairs_of(record, lsn).into_iter().next() else {
            return Ok(false);
        };
        let is_it = |value: Option<Vec<u8>>| match value {
            Some(value) => Ok::<_, Error>(key::stamp(&value)?.0 == lsn),
            None => Ok(false),
        };
        // No other append of the same key may come between the look and the append.
        let _moving = self.moving.write();
        if is_it(self.layers.get(&key)?)? {
            self.append(Batch::small(vec![record.clone()]))?;
        }
        // Somebody else may have appended one since the checkpoint.
        is_it(self.layers.index.get(&key)?)
    }

    /// Reclaim may have left several parts of an extent: each becomes a record of its own. Their keys come
    /// after the old one's, so that a scan under way meets one or the other.
    fn move_extent(&self, lsn: Lsn, extent: &Extent) -> Result<bool> {
        let parts = self.parts_of(lsn, extent)?;
        for part in &parts {
            self.move_piece(part)?;
        }
        Ok(!parts.is_empty())
    }

    /// Appends a piece of an extent anew, with the bytes that there are of it: what fails its checksum is moved
    /// with it, and goes on failing it.
    pub(super) fn move_piece(&self, piece: &Piece) -> Result<()> {
        let mut payload = Vec::new();
        let mut place = piece.place.clone();
        if let Some(place) = &mut place {
            payload.resize(usize::from(piece.blocks) * BLOCK, 0);
            if let Some(file) = self.journal.file(segment_of(piece.lsn))? {
                file.read_at(&mut payload, u64::from(place.block) * BLOCK as u64)?;
            }
            place.block = 0;
        }
        let record = Record::Extent(Extent {
            ino: piece.ino,
            label: piece.label,
            first_block: piece.chunk * CHUNK_BLOCKS + u64::from(piece.start),
            blocks: piece.blocks,
            place,
        });
        self.append(Batch {
            records: vec![record],
            payload: &payload,
            urgent: false,
        })
        .map(drop)
    }

    /// What the index has of an extent's record.
    fn parts_of(&self, lsn: Lsn, extent: &Extent) -> Result<Vec<Piece>> {
        let (chunk, _) = extent.position();
        let (from, to) = piece_range(extent.ino, chunk, extent.label, Some(extent.label));
        let mut parts = Vec::new();
        self.layers.index.scan(&from, &to, &mut |key, value| {
            let piece = Piece::parse(key, value)?;
            if piece.lsn == lsn {
                parts.push(piece);
            }
            Ok(true)
        })?;
        Ok(parts)
    }

    /// The keys in the index that are left of a moved record.
    fn leftovers(&self, lsn: Lsn, record: &Record) -> Result<Vec<Vec<u8>>> {
        if let Record::Extent(extent) = record {
            let parts = self.parts_of(lsn, extent)?;
            return Ok(parts.iter().map(Piece::key).collect());
        }
        if let Some((key, _)) = key::pairs_of(record, lsn).first()
            && let Some(value) = self.layers.index.get(key)?
            && key::stamp(&value)?.0 == lsn
        {
            return Err(Error::Corrupt(format!("record {:x} was not moved", lsn.0)));
        }
        Ok(Vec::new())
    }
}
