//! Write-behind: the backing filesystem is told to begin writing a large file to its disk while the rest still comes.
//!
//! Otherwise nothing of it is on its way when the caller has copied the last byte to the kernel, to cowfs, and to the
//! page cache, and its fsync(2) waits for the disk from the beginning (docs/PERFORMANCE.md).

use super::Engine;
use super::handle::LiveFile;
use super::nodes::ObjectRef;
use super::run::Run;
use crate::error::Result;
use crate::sync::{Arc, Mutex, Ordering};
use rustix::fd::{AsFd, OwnedFd};
use std::ops::Range;

/// Bytes of a run of writes before which nothing is begun: what is shorter is often removed before a disk has to see it.
const LONG: u64 = 32 << 20;
/// As much is begun at once.
const PIECE: u64 = 8 << 20;
/// A write this close to the end of the run belongs to it.
const NEAR: u64 = 16 << 20;
/// The end of the run that is not begun: most of what will still be written to lies there.
const FRESH: u64 = 4 << 20;

/// A part of a file that is to be begun. Does not count as an open file.
pub struct WriteBehind {
    object: ObjectRef,
    fd: OwnedFd,
    written: Arc<Mutex<Written>>,
}

impl WriteBehind {
    /// Nobody waits for the disk because of a file that was closed, and the space of one that was removed is not held.
    fn is_wanted(&self) -> bool {
        self.object.opens.load(Ordering::SeqCst) > 0 && self.object.pin.lock().is_none()
    }
}

/// The run of writes in an open file.
#[derive(Debug, Default)]
pub(super) struct Written {
    run: Run,
    /// Up to where the writing to the disk has begun.
    begun: u64,
    /// Somebody was told to begin more, and has not taken it yet.
    told: bool,
}

impl Written {
    /// Notes a write; true if there is something to begin of which nobody was told.
    fn note(&mut self, write: &Range<u64>) -> bool {
        if !self.run.goes_on(write, NEAR) {
            self.begun = write.start;
            return false;
        }
        let long = self.run.end - self.run.start >= LONG;
        let due = long && self.run.follows() && self.far() >= self.begun + PIECE;
        due && !std::mem::replace(&mut self.told, true)
    }

    /// Up to where hardly anybody writes any more.
    fn far(&self) -> u64 {
        self.run.end.saturating_sub(FRESH) / FRESH * FRESH
    }

    /// What is to be begun now.
    fn take(&mut self) -> Range<u64> {
        self.told = false;
        let from = self.begun;
        self.begun = from.max(self.far());
        from..self.begun
    }
}

impl LiveFile {
    /// Notes that `len` bytes were written at `offset`. Returns what [`Engine::write_behind`] has to begin, if it is time.
    pub fn note_written(&self, offset: u64, len: u64) -> Option<WriteBehind> {
        if !self.written.lock().note(&(offset..offset + len)) {
            return None;
        }
        match self.fd.try_clone() {
            Ok(fd) => Some(WriteBehind {
                object: self.object.clone(),
                fd,
                written: self.written.clone(),
            }),
            Err(error) => {
                log::debug!("nothing is written behind: {error}");
                self.written.lock().take();
                None
            }
        }
    }
}

impl Engine {
    /// Begins to write to the disk what lies behind the end of a long run of writes: the journal first, as far as it
    /// guards the file (C8). May wait for the disk.
    ///
    /// # Errors
    /// Those of the journal's sync and of sync_file_range(2). Nothing is lost by them: fsync(2) begins anew.
    pub fn write_behind(&self, part: &WriteBehind) -> Result<()> {
        let Range { start, end } = part.written.lock().take();
        for piece in (start..end).step_by(PIECE as usize) {
            if !part.is_wanted() {
                break;
            }
            self.pay_for(&part.object)?;
            if part.is_wanted() {
                let len = PIECE.min(end - piece);
                self.backing.begin_write_back(part.fd.as_fd(), piece, len)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    const MIB: u64 = 1 << 20;

    /// What is begun in the course of writes of 1 MiB at these places (MiB).
    fn begun(places: impl IntoIterator<Item = u64>) -> Vec<Range<u64>> {
        let mut run = Written::default();
        let mut begun = Vec::new();
        for at in places {
            if run.note(&(at * MIB..(at + 1) * MIB)) {
                let Range { start, end } = run.take();
                begun.push(start / MIB..end / MIB);
            }
        }
        begun
    }

    #[test]
    fn a_long_run_is_begun_in_pieces_up_to_its_end() {
        assert_eq!(begun(0..31), []);
        assert_eq!(begun(0..64), [0..28, 28..36, 36..44, 44..52, 52..60]);
        // Not from the beginning of the file.
        assert_eq!(begun(100..140), [100..128, 128..136]);
    }

    #[test]
    fn a_run_may_be_in_some_disorder() {
        let disorder = (0..32).flat_map(|pair| [2 * pair + 1, 2 * pair]);
        assert_eq!(begun(disorder), [0..28, 28..36, 36..44, 44..52, 52..60]);
    }

    #[test]
    fn what_is_no_long_run_is_left_alone() {
        assert_eq!(begun((0..1000).map(|i| i * 7919 % 1000)), []);
        assert_eq!(begun((0..1000).map(|i| i % 30)), []);
        assert_eq!(begun((0..1000).map(|_| 3)), []);
        // Small writes anywhere in 64 MiB, of which some follow each other closely.
        let mut run = Written::default();
        let mut rng = SmallRng::seed_from_u64(1);
        let places = (0..100_000).map(|_| rng.random_range(0..64 * MIB / 4096) * 4096);
        let told = places.filter(|at| run.note(&(*at..at + 4096))).count();
        assert_eq!(told, 0);
    }

    #[test]
    fn nobody_is_told_twice() {
        let mut run = Written::default();
        let mut note = |at: u64| run.note(&(at * MIB..(at + 1) * MIB));
        let told: Vec<_> = (0..64).filter(|at| note(*at)).collect();
        assert_eq!(told, [31]);
        assert_eq!(run.take(), 0..60 * MIB);
        assert_eq!(run.take(), 60 * MIB..60 * MIB);
    }
}
