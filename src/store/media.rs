//! Bytes on a disk: the only place of the store that touches the files of the journal, so that tests can
//! put a failing or forgetful disk in its place.

use crate::error::{Error, Result};
use crate::sync::Arc;
use rustix::fs::{Dir, FallocateFlags, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// A place for the numbered files of a journal.
pub trait Media: Send + Sync {
    /// The numbers of the files there are, in any order.
    fn list(&self) -> Result<Vec<u32>>;
    /// Makes an empty file; it is an error if there is one of that number.
    fn create(&self, number: u32) -> Result<Arc<dyn MediaFile>>;
    /// Opens a file for reading and writing; `None` if there is none of that number.
    fn open(&self, number: u32) -> Result<Option<Arc<dyn MediaFile>>>;
    /// Removes the name of a file; those who have it open can go on reading. A missing one is no error.
    fn remove(&self, number: u32) -> Result<()>;
    /// Makes creations and removals durable.
    fn sync_names(&self) -> Result<()>;
    /// Bytes that the file has allocated; 0 if there is none of that number.
    fn allocated(&self, number: u32) -> Result<u64>;
    /// Whether a block that was written is written to where it is. Then a sync of such blocks is cheaper than one of
    /// blocks that are new.
    fn writes_in_place(&self) -> bool {
        false
    }
    /// The small file beside the numbered ones that says how the session stands (session.rs); made, empty, if
    /// there is none.
    fn session(&self) -> Result<Arc<dyn MediaFile>>;
}

/// One file of a journal. All offsets and lengths are in bytes.
pub trait MediaFile: Send + Sync {
    /// Fills `buf` from `offset`; returns how much was there before the end of the file.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize>;
    /// Writes all of `buf` at `offset`.
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()>;
    /// Makes everything written so far durable, the size of the file too.
    fn sync(&self) -> Result<()>;
    /// Sets the space of a range aside, without changing what can be read, so that later writes into it find
    /// room. Nothing where the medium cannot do that.
    fn allocate(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }
    /// Gives the space of a range back; it reads as zeros, or as before where the disk cannot do that.
    fn punch(&self, offset: u64, len: u64) -> Result<()>;
    /// The length of the file.
    fn size(&self) -> Result<u64>;
}

/// A directory of files named by 16 hexadecimal digits and `.seg`.
#[derive(Debug)]
pub struct FileMedia {
    dir: OwnedFd,
    path: PathBuf,
    writes_in_place: bool,
}

/// Filesystems that write a block to where it is (`EXT4_SUPER_MAGIC`, which is that of ext2 and ext3 as well, and
/// `XFS_SUPER_MAGIC`; statfs(2)). Btrfs and others look for a new place each time.
const IN_PLACE: [u64; 2] = [0xef53, 0x5846_5342];

impl FileMedia {
    /// Opens the directory `path`, making it (mode 0700) if there is none.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_known(path, path)
    }

    /// The same, of a directory that is `known` by another path to those who read messages.
    pub fn open_known(path: &Path, known: &Path) -> Result<Self> {
        match rustix::fs::mkdir(path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(Error::path("cannot create", path, errno)),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|errno| Error::path("cannot open", path, errno))?;
        let kind = rustix::fs::fstatfs(&dir).map(|fs| fs.f_type as u64);
        Ok(Self {
            dir,
            path: known.to_path_buf(),
            writes_in_place: kind.is_ok_and(|kind| IN_PLACE.contains(&kind)),
        })
    }

    fn path_of(&self, number: u32) -> PathBuf {
        self.path.join(name_of(number))
    }

    fn open_as(&self, number: u32, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.dir, name_of(number), flags, Mode::RUSR | Mode::WUSR)
    }
}

/// The name of the session file.
const SESSION: &str = "session";

/// What is reported of a segment that is gone though the index refers to it, or the journal goes on after it.
pub(super) fn missing(number: u32) -> String {
    format!("{}: missing, though it is needed", name_of(number))
}

/// The file name of a segment.
pub(super) fn name_of(number: u32) -> String {
    format!("{number:016x}.seg")
}

/// No journal comes to have so many segments: what has such a number is not of cowfs, and none could follow it.
const MOST: u32 = 0xfff0_0000;

pub(super) fn number_of(name: &[u8]) -> Option<u32> {
    let digits = std::str::from_utf8(name).ok()?.strip_suffix(".seg")?;
    let number = u32::from_str_radix(digits, 16).ok()?;
    (number < MOST && name_of(number).as_bytes() == name).then_some(number)
}

impl Media for FileMedia {
    fn list(&self) -> Result<Vec<u32>> {
        let failed = |errno| Error::path("cannot list", &self.path, errno);
        let mut numbers = Vec::new();
        for entry in Dir::read_from(&self.dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            numbers.extend(number_of(entry.file_name().to_bytes()));
        }
        Ok(numbers)
    }

    fn create(&self, number: u32) -> Result<Arc<dyn MediaFile>> {
        let path = self.path_of(number);
        let fd = self
            .open_as(number, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)
            .map_err(|errno| Error::path("cannot create", &path, errno))?;
        Ok(Arc::new(DiskFile { fd, path }))
    }

    fn open(&self, number: u32) -> Result<Option<Arc<dyn MediaFile>>> {
        let path = self.path_of(number);
        let opened = match self.open_as(number, OFlags::RDWR) {
            // The filesystem has failed, and is to be read for as long as it can be (I7).
            Err(Errno::ROFS) => self.open_as(number, OFlags::RDONLY),
            opened => opened,
        };
        match opened {
            Ok(fd) => Ok(Some(Arc::new(DiskFile { fd, path }))),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(Error::path("cannot open", &path, errno)),
        }
    }

    fn remove(&self, number: u32) -> Result<()> {
        match rustix::fs::unlinkat(&self.dir, name_of(number), rustix::fs::AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(Error::path("cannot remove", self.path_of(number), errno)),
        }
    }

    fn sync_names(&self) -> Result<()> {
        rustix::fs::fsync(&self.dir).map_err(|errno| Error::path("cannot sync", &self.path, errno))
    }

    fn allocated(&self, number: u32) -> Result<u64> {
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        match rustix::fs::statat(&self.dir, name_of(number), flags) {
            Ok(stat) => Ok(u64::try_from(stat.st_blocks).unwrap_or(0) * 512),
            Err(Errno::NOENT) => Ok(0),
            Err(errno) => Err(Error::path("cannot stat", self.path_of(number), errno)),
        }
    }

    fn writes_in_place(&self) -> bool {
        self.writes_in_place
    }

    fn session(&self) -> Result<Arc<dyn MediaFile>> {
        let path = self.path.join(SESSION);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.dir, SESSION, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| Error::path("cannot open", &path, errno))?;
        Ok(Arc::new(DiskFile { fd, path }))
    }
}

#[derive(Debug)]
struct DiskFile {
    fd: OwnedFd,
    path: PathBuf,
}

impl MediaFile for DiskFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match rustix::io::pread(&self.fd, &mut buf[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::path("cannot read", &self.path, errno)),
            }
        }
        Ok(done)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match rustix::io::pwrite(&self.fd, &buf[done..], offset + done as u64) {
                Ok(0) => return Err(Error::path("cannot write", &self.path, Errno::IO)),
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::path("cannot write", &self.path, errno)),
            }
        }
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        // Never tried again after a failure: the kernel may have dropped the pages it could not write.
        rustix::fs::fdatasync(&self.fd)
            .map_err(|errno| Error::path("cannot sync", &self.path, errno))
    }

    fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        let flags = FallocateFlags::KEEP_SIZE;
        match retry_on_intr(|| rustix::fs::fallocate(&self.fd, flags, offset, len)) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(errno) => Err(Error::path("cannot set space aside in", &self.path, errno)),
        }
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match retry_on_intr(|| rustix::fs::fallocate(&self.fd, flags, offset, len)) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(errno) => Err(Error::path("cannot free space in", &self.path, errno)),
        }
    }

    fn size(&self) -> Result<u64> {
        let stat = rustix::fs::fstat(&self.fd)
            .map_err(|errno| Error::path("cannot stat", &self.path, errno))?;
        Ok(u64::try_from(stat.st_size).unwrap_or(0))
    }
}

/// Stands for a file that is lost: it has no bytes.
pub(super) struct MissingFile;

impl MediaFile for MissingFile {
    fn read_at(&self, _: &mut [u8], _: u64) -> Result<usize> {
        Ok(0)
    }

    fn write_at(&self, _: &[u8], _: u64) -> Result<()> {
        Err(Error::Os(Errno::ROFS))
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn punch(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn size(&self) -> Result<u64> {
        Ok(0)
    }
}
