//! Bytes of open files.

use super::{Backing, Call, Change};
use crate::error::Result;
use crate::ids::Ino;
use crate::sys;
use rustix::fd::BorrowedFd;
use rustix::fs::SeekFrom;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use std::io::IoSliceMut;

impl Backing {
    /// Reads until `buf` is full or the file ends; returns the bytes read.
    pub fn read(&self, fd: BorrowedFd<'_>, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            let read = self.before(Call::Read).and_then(|most| {
                let end = buf.len().min(done.saturating_add(most));
                rustix::io::pread(fd, &mut buf[done..end], offset + done as u64)
            });
            match read {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(done)
    }

    /// As [`Self::read`], but `None` where that might have to wait for a disk (`RWF_NOWAIT` of preadv2(2)).
    pub fn read_cached(
        &self,
        fd: BorrowedFd<'_>,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<Option<usize>> {
        let mut done = 0;
        while done < buf.len() {
            let read = self.before(Call::Read).and_then(|most| {
                let end = buf.len().min(done.saturating_add(most));
                let mut rest = [IoSliceMut::new(&mut buf[done..end])];
                preadv2(fd, &mut rest, offset + done as u64, ReadWriteFlags::NOWAIT)
            });
            match read {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Errno::AGAIN) => return Ok(None),
                // Not every filesystem can tell; one that cannot is read as it is.
                Err(Errno::OPNOTSUPP | Errno::INTR) => {
                    return self.read(fd, offset, buf).map(Some);
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(Some(done))
    }

    /// The next data (`hole` false) or hole (true) at or after `offset`; `None` at the end of the file.
    pub fn seek(&self, fd: BorrowedFd<'_>, offset: u64, hole: bool) -> Result<Option<u64>> {
        self.before(Call::Seek)?;
        let whence = if hole {
            SeekFrom::Hole(offset)
        } else {
            SeekFrom::Data(offset)
        };
        match rustix::fs::seek(fd, whence) {
            Ok(at) => Ok(Some(at)),
            Err(Errno::NXIO) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    // ---- changes; the pre-images are the caller's part (I1)

    /// Writes all of `data`, or as much as there is room for.
    pub fn write(&self, fd: BorrowedFd<'_>, offset: u64, data: &[u8]) -> Result<usize> {
        let mut done = 0;
        while done < data.len() {
            let written = self.before(Call::Write).and_then(|most| {
                let end = data.len().min(done.saturating_add(most));
                rustix::io::pwrite(fd, &data[done..end], offset + done as u64)
            });
            match written {
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(errno) if done == 0 => return Err(errno.into()),
                Err(_) => break,
            }
        }
        self.made(Ok(done))
    }

    /// ftruncate(2), through a descriptor opened for writing.
    pub fn truncate(&self, fd: BorrowedFd<'_>, size: u64) -> Result<()> {
        self.before(Call::Change)?;
        Ok(self.made(rustix::fs::ftruncate(fd, size))?)
    }

    /// fallocate(2).
    pub fn fallocate(&self, fd: BorrowedFd<'_>, mode: i32, offset: u64, len: u64) -> Result<()> {
        self.before(Call::Change)?;
        let mode = rustix::fs::FallocateFlags::from_bits_retain(mode as u32);
        Ok(self.made(rustix::fs::fallocate(fd, mode, offset, len))?)
    }

    /// Begins to write a part of an open file to the disk (`SYNC_FILE_RANGE_WRITE` of sync_file_range(2)).
    pub fn begin_write_back(&self, fd: BorrowedFd<'_>, from: u64, len: u64) -> Result<()> {
        self.before(Call::Sync)?;
        Ok(sys::begin_write_back(fd, from, len)?)
    }

    /// fsync(2), or fdatasync(2).
    pub fn sync(&self, fd: BorrowedFd<'_>, data_only: bool) -> Result<()> {
        self.note_lost(|| {
            self.before(Call::Sync)?;
            let done = match data_only {
                true => rustix::fs::fdatasync(fd),
                false => rustix::fs::fsync(fd),
            };
            Ok(done?)
        })?;
        self.tell(|| Change::Synced(Ino(rustix::fs::fstat(fd).map_or(0, |st| st.st_ino))));
        Ok(())
    }
}

/// The pieces of a byte range of an open file: `(start, end, is_data)`, in order, to the end of the range.
/// Ranges past the end of the file count as holes.
pub fn data_map(
    backing: &Backing,
    fd: BorrowedFd<'_>,
    start: u64,
    end: u64,
) -> Result<Vec<(u64, u64, bool)>> {
    let mut pieces = Vec::new();
    let mut at = start;
    while at < end {
        let data = backing.seek(fd, at, false)?.unwrap_or(end).min(end);
        if data > at {
            pieces.push((at, data, false));
        }
        if data < end {
            let hole = backing.seek(fd, data, true)?.unwrap_or(end).min(end);
            pieces.push((data, hole.max(data + 1), true));
        }
        at = pieces.last().map_or(end, |piece| piece.1);
    }
    Ok(pieces)
}
