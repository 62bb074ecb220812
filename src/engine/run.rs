//! Runs of reads or writes that follow each other in an open file.

use std::ops::Range;

/// One run, as far as it has come. Its parts need not come in order: the kernel sends many requests at once, and they
/// are carried out by several threads.
#[derive(Debug, Default)]
pub(super) struct Run {
    pub(super) start: u64,
    pub(super) end: u64,
    /// What was read or written in it.
    bytes: u64,
}

impl Run {
    /// Notes a read or write. False if it is not `near` the end of the run, and begins another.
    pub(super) fn goes_on(&mut self, part: &Range<u64>, near: u64) -> bool {
        let bytes = part.end - part.start;
        if part.start.abs_diff(self.end) > near {
            let Range { start, end } = *part;
            *self = Self { start, end, bytes };
            return false;
        }
        self.end = self.end.max(part.end);
        self.bytes += bytes;
        true
    }

    /// Whether its parts do follow each other, and do not just lie close by chance: then much less of it was read or
    /// written than its length.
    pub(super) fn follows(&self) -> bool {
        self.bytes >= (self.end - self.start) / 2
    }
}
