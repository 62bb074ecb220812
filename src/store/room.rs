//! Space: what the store takes, what its filesystem has left, and what is set aside for a full disk.

use super::Store;
use crate::error::{Error, Result};
use crate::sync::Ordering;
use rustix::fs::{CWD, FallocateFlags, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};
use std::path::Path;

/// Name of the reserve in the directory of the store.
const RESERVE: &str = "reserve";
/// Enough for some segments that hold small records alone, and for an index of its smallest size.
const RESERVE_BYTES: u64 = 8 << 20;
/// So much of it is given up at a time: what is free on a full disk is anybody's. Enough for a segment of small records.
const RESERVE_STEP: u64 = 2 << 20;

/// Space in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Space {
    /// Taken by journal and index.
    pub used: u64,
    /// Free on the filesystem of the store, for users other than root; [`crate::sys::BOUNDLESS`] if that is not told.
    pub free: u64,
    /// The size of that filesystem; 0 if that is not told.
    pub total: u64,
}

/// Whether there is a reserve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reserved {
    /// There is.
    Yes,
    /// There is no room for one.
    No,
    /// The filesystem sets nothing aside.
    Unknown,
}

impl Store {
    /// What the store takes, and what its filesystem has left. Asks the disk for the size of each segment.
    ///
    /// # Errors
    /// Those of statvfs(3).
    pub fn space(&self) -> Result<Space> {
        let disk = rustix::fs::statvfs(&self.dir)
            .map_err(|errno| Error::path("cannot ask for free space", &self.dir, errno))?;
        let numbers: Vec<u32> = self.journal.known.lock().keys().copied().collect();
        let segments = numbers
            .into_iter()
            .map(|number| self.journal.media.allocated(number).unwrap_or(0));
        Ok(Space {
            used: segments.sum::<u64>() + self.layers.index.allocated(),
            free: crate::sys::free_bytes(&disk),
            total: disk.f_blocks * disk.f_frsize,
        })
    }

    /// Makes the segment that the next append may need, so that it need not be made on a full disk.
    ///
    /// # Errors
    /// As [`Store::keep_attr`].
    pub fn make_ready(&self) -> Result<()> {
        match self.journal.tail() {
            Some(_) => self.journal.prepare_early(),
            None => self.journal.prepare(),
        }
    }

    /// Sets the reserve aside if it is not there and there is room for it, and then room for the index.
    pub fn keep_reserve(&self) -> Reserved {
        let reserved = self.reserve();
        self.keep_index_room();
        reserved
    }

    /// As much of it as there is room for.
    fn reserve(&self) -> Reserved {
        if self.reserved.load(Ordering::Relaxed) {
            return Reserved::Yes;
        }
        let steps = (1..=RESERVE_BYTES / RESERVE_STEP).rev();
        let mut made = Err(Errno::NOSPC);
        for size in steps.map(|step| step * RESERVE_STEP) {
            made = self.allocate_reserve(size);
            match made {
                Ok(()) => {
                    let whole = size == RESERVE_BYTES;
                    self.reserved.store(whole, Ordering::Relaxed);
                    return Reserved::Yes;
                }
                Err(Errno::NOSPC | Errno::DQUOT) => {}
                Err(_) => break,
            }
        }
        self.drop_reserve_to(0);
        match made {
            Err(Errno::NOSPC | Errno::DQUOT) => Reserved::No,
            _ => Reserved::Unknown,
        }
    }

    fn allocate_reserve(&self, size: u64) -> Result<(), Errno> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let path = self.dir.join(RESERVE);
        let file = rustix::fs::openat(CWD, &path, flags, Mode::from_raw_mode(0o600))?;
        retry_on_intr(|| rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size))?;
        // What a larger one that failed has left beyond.
        rustix::fs::ftruncate(&file, size)
    }

    /// Gives up a part of the reserve, enough for some small records. False if there is none.
    pub fn drop_reserve(&self) -> bool {
        let size = std::fs::metadata(self.dir.join(RESERVE)).map_or(0, |file| file.len());
        size > 0 && self.drop_reserve_to(size.saturating_sub(RESERVE_STEP))
    }

    fn drop_reserve_to(&self, size: u64) -> bool {
        self.reserved.store(false, Ordering::Relaxed);
        let path = self.dir.join(RESERVE);
        let done = match size {
            0 => std::fs::remove_file(path),
            _ => std::fs::File::options()
                .write(true)
                .open(path)
                .and_then(|file| file.set_len(size)),
        };
        done.is_ok()
    }

    /// Runs a change that makes room, or comes before that, and has the reserve for it on a full disk.
    ///
    /// # Errors
    /// Those of the change.
    pub fn with_reserve<T>(&self, mut change: impl FnMut() -> Result<T>) -> Result<T> {
        loop {
            match change() {
                Err(error) if error.is_full() && self.drop_reserve() => {}
                done => return done,
            }
        }
    }
}

/// Gives up the reserve of a store that is being opened.
pub(super) fn drop_reserve_in(dir: &Path) {
    if let Err(error) = std::fs::remove_file(dir.join(RESERVE))
        && error.kind() != std::io::ErrorKind::NotFound
    {
        log::debug!("the reserve is not given up: {error}");
    }
}
