//! Blocks of a payload that are filled with zeros before they are needed.
//!
//! fdatasync(2) of a file that grows, or whose blocks were only set aside, waits for the filesystem's own journal as
//! well as for the data; of blocks that were written before, for the data alone. Databases sync after each small write,
//! so each pre-image that they make would pay for that (docs/PERFORMANCE.md). Where somebody waits for the journal's
//! sync again and again, the next blocks are therefore filled once for many: as PostgreSQL does with its own log
//! (`wal_init_zero`). A block of zeros is to every reader what a hole is.

use super::journal::{Journal, Segment, Tail};
use super::types::StoreOptions;
use crate::error::Result;
use crate::ids::BLOCK;
use crate::sync::{Arc, Ordering};
use std::ops::Range;

/// While more than one part in this many of what was filled is left, it need not be filled again.
const LOW_PART: u64 = 16;

/// What is filled of the tail, and what tells whether more is to be.
#[derive(Default)]
pub(super) struct Ahead {
    /// Filled, and nobody's yet.
    filled: Range<u64>,
    /// Syncs that somebody waited for, and bytes of payload that got a place, since this was decided last.
    waits: u32,
    placed: u64,
    /// One of these found too little that was filled.
    missed: bool,
}

impl Ahead {
    fn left(&self) -> u64 {
        self.filled.end - self.filled.start
    }

    /// Whether there is a place for a payload.
    pub(super) fn has(&self, len: u64) -> bool {
        (1..=self.left()).contains(&len)
    }

    /// A place for a payload, if there is one.
    pub(super) fn take(&mut self, len: u64) -> Option<u64> {
        let has = self.has(len);
        self.placed += len;
        self.missed |= len > 0 && !has;
        let at = self.filled.start;
        has.then(|| {
            self.filled.start += len;
            at
        })
    }

    /// Where the payload ends, if it ends at `end` with what is filled and nobody's.
    pub(super) fn end_without(&self, end: u64) -> u64 {
        match self.filled.end == end {
            true => self.filled.start,
            false => end,
        }
    }

    /// What is filled and will not be used.
    pub(super) fn rest(&mut self) -> Range<u64> {
        std::mem::take(&mut self.filled)
    }

    /// Notes a sync that somebody waits for. Whether something is to be filled before it.
    fn is_due(&mut self, options: &StoreOptions) -> bool {
        self.waits += 1;
        let low = self.missed || self.left() < options.fill_ahead / LOW_PART;
        if self.waits < options.fill_after || !low || self.placed == 0 {
            return false;
        }
        // What is large by itself gains little, and a longer look may see less of it.
        let most = options.fill_ahead / u64::from(options.fill_after.max(1));
        let small = self.placed <= most * u64::from(self.waits);
        (self.waits, self.placed, self.missed) = (0, 0, false);
        small
    }
}

impl Tail {
    /// Takes the next part of the payload to be filled, if it is time for that.
    fn take_to_fill(&mut self, options: &StoreOptions) -> Option<(Arc<Segment>, Range<u64>)> {
        let size = options.fill_ahead.next_multiple_of(BLOCK as u64);
        let range = self.payload..self.payload + size;
        if size == 0 || range.end > options.segment_size || !self.ahead.is_due(options) {
            return None;
        }
        self.payload = range.end;
        Some((self.segment.clone(), range))
    }

    /// Gives a part to who comes next, if it was filled. Returns what will not be used.
    fn note_filled(&mut self, range: Range<u64>, done: bool) -> Range<u64> {
        if !done {
            // It may be the next one's again, unless there are payloads beyond it.
            if self.payload != range.end {
                return range;
            }
            self.payload = range.start;
        } else if self.ahead.filled.end == range.start {
            self.ahead.filled.end = range.end;
        } else {
            return std::mem::replace(&mut self.ahead.filled, range);
        }
        0..0
    }
}

impl Journal {
    /// Whether blocks are filled ahead, where that is of use: not when the disk is nearly full.
    pub(super) fn set_fills_ahead(&self, fills: bool) {
        self.fills_ahead.store(fills, Ordering::Relaxed);
    }

    /// Fills the next blocks of the tail if those who wait for syncs will need them. Called before the sync of one who
    /// waits, by the one who syncs.
    ///
    /// # Errors
    /// I/O errors. That there is no room is none: it is only early.
    pub(super) fn fill_ahead(&self) -> Result<()> {
        if !self.fills_ahead.load(Ordering::Relaxed) || !self.media.writes_in_place() {
            return Ok(());
        }
        let due = |tail: &mut Tail| tail.take_to_fill(self.options());
        let Some((segment, range)) = self.tail.lock().as_mut().and_then(due) else {
            return Ok(());
        };
        let len = range.end - range.start;
        let filled = segment
            .file
            .write_at(&vec![0; len as usize], range.start)
            // Nobody has a place there yet, so what was filled of it can go before the part is taken back.
            .inspect_err(|_| drop(segment.file.punch(range.start, len)));
        let mut tail = self.tail.lock();
        let same = |tail: &&mut Tail| tail.segment.number == segment.number;
        let unused = match tail.as_mut().filter(same) {
            Some(tail) => tail.note_filled(range, filled.is_ok()),
            // One that was left meanwhile is not needed any more.
            None => range,
        };
        drop(tail);
        segment.note_unused(unused);
        match filled {
            Err(error) if error.is_full() || error.is_lack() => {
                log::debug!("nothing is filled ahead: {error}");
                // Until the space has been measured again.
                self.set_fills_ahead(false);
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

    /// After how many syncs, each after a payload of `len` bytes, something is filled for the first time.
    fn first_due(len: u64) -> Option<u64> {
        let mut ahead = Ahead::default();
        (1..100).find(|_| {
            ahead.take(len);
            ahead.is_due(&StoreOptions::default())
        })
    }

    #[test]
    fn small_payloads_that_are_waited_for_have_blocks_filled_and_large_ones_have_not() {
        assert_eq!(first_due(4096), Some(8));
        assert_eq!(first_due(128 << 10), Some(8));
        assert_eq!(first_due(132 << 10), None);
        assert_eq!(first_due(0), None);
    }

    #[test]
    fn what_is_filled_is_used_up_before_more_is() {
        let options = StoreOptions::default();
        let mut ahead = Ahead {
            filled: SIZE..2 * SIZE,
            ..Ahead::default()
        };
        assert_eq!(ahead.take(0), None);
        assert_eq!(ahead.take(4096), Some(SIZE));
        assert!((0..100).all(|_| !ahead.is_due(&options)));
        assert_eq!(ahead.take(SIZE - 8192), Some(SIZE + 4096));
        assert!(ahead.is_due(&options));
        assert_eq!(ahead.end_without(2 * SIZE), 2 * SIZE - 4096);
        assert_eq!(ahead.end_without(3 * SIZE), 3 * SIZE);
    }

    #[test]
    fn what_does_not_fit_has_more_filled_though_much_is_left() {
        for len in (17..32).map(|blocks| blocks * 4096) {
            let mut ahead = Ahead::default();
            let mut found = 0;
            for _ in 0..200 {
                found += u32::from(ahead.take(len).is_some());
                if ahead.is_due(&StoreOptions::default()) {
                    ahead.filled = SIZE..2 * SIZE;
                }
            }
            assert!(found > 90, "{found} of 200 payloads of {len}");
        }
    }
}
