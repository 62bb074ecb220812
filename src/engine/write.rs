//! The write path: write, truncate, fallocate, copy. Each keeps what it is about to change, settles, applies.

use super::Engine;
use super::creds::KillPriv;
use super::handle::{LiveFile, OpenFile};
use super::object::Object;
use crate::error::{Error, Result};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;

/// One copy_file_range request moves no more than this, so that a cut never waits long for one (C3); the
/// caller comes again for the rest.
const COPY_LIMIT: u64 = 4 << 20;

impl Engine {
    /// Writes `data` at `offset`: one operation of C1, wholly in a snapshot or wholly out.
    ///
    /// `kill_priv`: the caller lacks `CAP_FSETID`, so setuid, setgid and capabilities are cleared.
    pub fn write(
        &self,
        file: &LiveFile,
        offset: u64,
        data: &[u8],
        kill_priv: bool,
    ) -> Result<usize> {
        let end = offset
            .checked_add(data.len() as u64)
            .ok_or(Error::Os(Errno::FBIG))?;
        let fd = file.fd();
        self.change_data(&file.object, fd, offset, end, || {
            let _killing = KillPriv::when(kill_priv);
            self.backing.write(fd, offset, data)
        })
    }

    /// What `O_SYNC` and `O_DSYNC` ask for after a write: the journal first, then the file that it guards (C8).
    pub fn sync_write(&self, file: &LiveFile) -> Result<()> {
        match file.sync_each_write {
            None => Ok(()),
            Some(data_only) => self.fsync(file, data_only),
        }
    }

    /// Sets the size of a file through a descriptor opened for writing.
    pub fn truncate(
        &self,
        object: &Object,
        fd: BorrowedFd<'_>,
        size: u64,
        kill_priv: bool,
    ) -> Result<()> {
        self.change_data(object, fd, size, u64::MAX, || {
            let _killing = KillPriv::when(kill_priv);
            self.backing.truncate(fd, size)
        })
    }

    /// fallocate(2), in every mode that the backing filesystem has.
    pub fn fallocate(
        &self,
        file: &LiveFile,
        mode: i32,
        offset: u64,
        len: u64,
        kill_priv: bool,
    ) -> Result<()> {
        let end = offset.checked_add(len).ok_or(Error::Os(Errno::FBIG))?;
        let shifts = mode & (libc::FALLOC_FL_COLLAPSE_RANGE | libc::FALLOC_FL_INSERT_RANGE) != 0;
        let clears = mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0;
        // Mere allocation changes no byte and no hole, only attributes: an empty range keeps just those.
        let (start, end) = match (shifts, clears) {
            (true, _) => (offset, u64::MAX),
            (false, true) => (offset, end),
            (false, false) => (0, 0),
        };
        self.change_data(&file.object, file.fd(), start, end, || {
            let _killing = KillPriv::when(kill_priv);
            self.backing.fallocate(file.fd(), mode, offset, len)
        })
    }

    /// Copies between two open files of the mount; the source may be in a snapshot. Returns the bytes copied,
    /// which may be fewer than asked for (copy_file_range(2)).
    pub fn copy_range(
        &self,
        from: &OpenFile,
        from_offset: u64,
        to: &LiveFile,
        to_offset: u64,
        len: u64,
        kill_priv: bool,
    ) -> Result<usize> {
        let mut buf = vec![0; len.min(COPY_LIMIT) as usize];
        let n = self.read(from, from_offset, &mut buf)?;
        if n == 0 {
            Ok(0)
        } else {
            self.write(to, to_offset, &buf[..n], kill_priv)
        }
    }

    /// The one way to change bytes of a file: lock, enter the epoch, keep `start..end`, settle, `apply`.
    fn change_data<T>(
        &self,
        object: &Object,
        fd: BorrowedFd<'_>,
        start: u64,
        end: u64,
        apply: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let mut op = self.begin(&[object]);
        if cfg!(feature = "plant-apply-before-journal") {
            let done = apply()?;
            op.keep_data(object, fd, start, end)?;
            return Ok(done);
        }
        op.keep_data(object, fd, start, end)?;
        op.settle()?;
        apply() // I1
    }
}

impl LiveFile {
    /// Its descriptor on the backing filesystem.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
