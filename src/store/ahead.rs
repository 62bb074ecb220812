//! Blocks of a payload that are filled with zeros before they are needed.
//!
//! fdatasync(2) of a file that grows, or whose blocks were only set aside, waits for the filesystem's own journal as
//! well as for the data; of blocks that were written before, for the data alone. Databases sync after each small write,
//! so each pre-image that they make would pay for that (docs/PERFORMANCE.md). Whoever has fsync(2) wait for the
//! journal again and again therefore fills the next blocks once for many: as PostgreSQL does with its own log
//! (`wal_init_zero`). A block of zeros is to every reader what a hole is.

use super::journal::{Journal, Segment, Tail};
use crate::error::Result;
use crate::ids::BLOCK;
use crate::sync::{Arc, Ordering};
use std::ops::Range;

/// What is filled at once, as a part of the size of a segment: 1 MiB of 64.
const PART: u64 = 64;
/// Fewer syncs than this that somebody waited for are not worth it, and no longer if less than this part of what was
/// filled is left.
const WAITS: u32 = 8;
const LOW_PART: u64 = 16;

/// The blocks of the tail that are filled, and what tells whether more are to be.
#[derive(Default)]
pub(super) struct Ahead {
    /// Filled, and nobody's yet.
    filled: Range<u64>,
    /// Syncs that somebody waited for since this was decided last, and where the payload ended then.
    waits: u32,
    since: u64,
}

impl Ahead {
    fn left(&self) -> u64 {
        self.filled.end - self.filled.start
    }

    /// A place for a payload.
    pub(super) fn take(&mut self, len: u64) -> Option<u64> {
        let at = self.filled.start;
        self.has(len).then(|| {
            self.filled.start += len;
            at
        })
    }

    /// Whether there is a place for a payload.
    pub(super) fn has(&self, len: u64) -> bool {
        (1..=self.left()).contains(&len)
    }

    /// Where the payload ends that ends at `end` with what is filled and not used.
    pub(super) fn end_without(&self, end: u64) -> u64 {
        match self.filled.end == end {
            true => self.filled.start,
            false => end,
        }
    }

    /// Notes a sync that somebody waits for; whether `size` bytes are to be filled beyond `end` before it.
    fn is_due(&mut self, end: u64, size: u64) -> bool {
        self.waits += 1;
        if self.waits < WAITS || self.left() >= size / LOW_PART {
            return false;
        }
        // What is large by itself gains little.
        let small =
            end.saturating_sub(self.since) <= size / u64::from(WAITS) * u64::from(self.waits);
        (self.waits, self.since) = (0, end);
        small
    }
}

impl Tail {
    /// Takes the next part of the payload to be filled, if it is time for that.
    fn take_to_fill(&mut self, segment_size: u64) -> Option<(Arc<Segment>, Range<u64>)> {
        let size = (segment_size / PART).next_multiple_of(BLOCK as u64);
        let range = self.payload..self.payload + size;
        if !self.ahead.is_due(self.payload, size) || range.end > segment_size {
            return None;
        }
        self.payload = range.end;
        self.ahead.since = range.end;
        Some((self.segment.clone(), range))
    }

    /// Gives the range to who comes next, if it was filled.
    fn note_filled(&mut self, range: Range<u64>, done: bool) {
        if !done {
            if self.payload == range.end {
                self.payload = range.start;
            }
        } else if self.ahead.filled.end == range.start {
            self.ahead.filled.end = range.end;
        } else {
            // Of what was filled before, little is left.
            self.ahead.filled = range;
        }
    }
}

impl Journal {
    /// Whether blocks are filled ahead, where that is of use: not when the disk is nearly full.
    pub(super) fn set_fills_ahead(&self, fills: bool) {
        self.fills_ahead.store(fills, Ordering::Relaxed);
    }

    /// Fills the next blocks of the tail if those who wait for syncs will need them. Called before the sync of one who
    /// waits, by who syncs.
    ///
    /// # Errors
    /// I/O errors. That there is no room is none: it is only early.
    pub(super) fn fill_ahead(&self) -> Result<()> {
        if !self.fills_ahead.load(Ordering::Relaxed) || !self.media.writes_in_place() {
            return Ok(());
        }
        let due = |tail: &mut Tail| tail.take_to_fill(self.segment_size());
        let Some((segment, range)) = self.tail.lock().as_mut().and_then(due) else {
            return Ok(());
        };
        let zeros = vec![0; (range.end - range.start) as usize];
        let filled = segment.file.write_at(&zeros, range.start);
        let mut tail = self.tail.lock();
        // One that was left meanwhile is not needed any more.
        let same = |tail: &&mut Tail| tail.segment.number == segment.number;
        if let Some(tail) = tail.as_mut().filter(same) {
            tail.note_filled(range, filled.is_ok());
        }
        match filled {
            Err(error) if error.is_full() || error.is_lack() => {
                log::debug!("nothing is filled ahead: {error}");
                Ok(())
            }
            filled => filled,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    /// After how many syncs, each after `len` more bytes, something is filled for the first time.
    fn first_due(len: u64) -> Option<u64> {
        let mut ahead = Ahead::default();
        (1..100).find(|wait| ahead.is_due(wait * len, SIZE))
    }

    #[test]
    fn small_writes_that_are_synced_have_blocks_filled_and_large_ones_have_not() {
        assert_eq!(first_due(4096), Some(8));
        assert_eq!(first_due(128 << 10), Some(8));
        assert_eq!(first_due(129 << 10), None);
    }

    #[test]
    fn what_is_filled_is_used_up_before_more_is() {
        let mut ahead = Ahead {
            filled: SIZE..2 * SIZE,
            ..Ahead::default()
        };
        assert_eq!(ahead.take(0), None);
        assert_eq!(ahead.take(2 * SIZE), None);
        assert_eq!(ahead.take(4096), Some(SIZE));
        assert!((0..100).all(|_| !ahead.is_due(2 * SIZE, SIZE)));
        assert_eq!(ahead.take(SIZE - 8192), Some(SIZE + 4096));
        assert!(ahead.is_due(2 * SIZE, SIZE));
        assert_eq!(ahead.end_without(2 * SIZE), 2 * SIZE - 4096);
        assert_eq!(ahead.end_without(3 * SIZE), 3 * SIZE);
    }
}
