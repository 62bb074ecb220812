//! What the reader of a file has passed and will hardly come back to: who copies a snapshot reads each file once, from one
//! end to the other.

use super::run::Run;
use std::ops::Range;

/// So much before the last read may still be wanted: the kernel reads ahead twice what the mount says, twice that for who
/// says that he reads in order (posix_fadvise(2), which cp(1) does).
const AHEAD: u64 = 8 << 20;
/// As much is passed at once.
const PIECE: u64 = 8 << 20;
/// A read this close to the end of the run belongs to it.
const NEAR: u64 = 8 << 20;

/// The run of reads in an open file.
#[derive(Debug, Default)]
pub struct Passed {
    run: Run,
    /// Up to where it was passed.
    passed: u64,
}

impl Passed {
    /// Notes a read of `read`. Returns what has been passed since that was last said, if it is worth saying.
    pub fn note(&mut self, read: &Range<u64>) -> Option<Range<u64>> {
        if !self.run.goes_on(read, NEAR) {
            self.passed = read.start;
            return None;
        }
        let passed = self.passed..self.run.end.saturating_sub(AHEAD);
        if !self.run.follows() || passed.end < passed.start + PIECE {
            return None;
        }
        self.passed = passed.end;
        Some(passed)
    }

    /// What is left of it when the file is closed, if anything was worth saying before. It is passed as well: left alone it
    /// would be there for the next reader, who then asks for less and leaves more.
    pub fn rest(&self) -> Option<Range<u64>> {
        (self.passed > self.run.start && self.run.follows()).then_some(self.passed..self.run.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn who_reads_on_passes_what_lies_far_enough_behind() {
        let mut run = Passed::default();
        let passed: Vec<_> = (0..25)
            .filter_map(|n| run.note(&(n * MIB..(n + 1) * MIB)))
            .collect();
        assert_eq!(passed, [0..8 * MIB, 8 * MIB..16 * MIB]);
        assert_eq!(run.rest(), Some(16 * MIB..25 * MIB));
    }

    #[test]
    fn requests_need_not_come_in_order_nor_at_the_beginning() {
        let mut run = Passed::default();
        let order = (0..10).flat_map(|pair| [101 + 2 * pair, 100 + 2 * pair]);
        let passed: Vec<_> = order
            .filter_map(|n| run.note(&(n * MIB..(n + 1) * MIB)))
            .collect();
        assert_eq!(passed, vec![(101 * MIB)..(110 * MIB)]);
    }

    #[test]
    fn a_short_file_is_left_alone() {
        let mut run = Passed::default();
        assert!((0..15).all(|n| run.note(&(n * MIB..(n + 1) * MIB)).is_none()));
        assert_eq!(run.rest(), None);
    }

    #[test]
    fn who_reads_here_and_there_passes_nothing() {
        let mut run = Passed::default();
        // Far apart; then close by chance, further and further on.
        assert!((0..1_000).all(|n| {
            let at = n * 7_919 % 1_000 * 10 * MIB;
            run.note(&(at..at + 8_192)).is_none()
        }));
        assert!((0..1_000).all(|n| run.note(&(n * 100_000..n * 100_000 + 8_192)).is_none()));
        assert_eq!(run.rest(), None);
    }

    #[test]
    fn who_begins_again_passes_it_again() {
        let mut run = Passed::default();
        for _ in 0..2 {
            let passed = (0..40).filter_map(|n| run.note(&(n * MIB..(n + 1) * MIB)));
            assert_eq!(
                passed.map(|range| range.end - range.start).sum::<u64>(),
                32 * MIB
            );
        }
    }
}
