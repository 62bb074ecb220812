//! Attributes and extended attributes of objects.

use super::{Backing, Call, image, statx};
use crate::error::{Error, Result};
use crate::store::{AttrImage, Timestamp};
use crate::sys;
use rustix::fd::BorrowedFd;
use rustix::fs::{AtFlags, CWD, Mode, StatxFlags, Timespec, Timestamps, UTIME_OMIT, XattrFlags};
use rustix::io::Errno;

impl Backing {
    /// The stat fields of an open object.
    pub fn stat(&self, fd: BorrowedFd<'_>) -> Result<AttrImage> {
        self.before(Call::Attributes)?;
        Ok(image(&statx(fd, c"")?))
    }

    /// The stat fields of an open file without its times, which are those of 1970. One who asks for the times gets the
    /// next change of the file a time of its own (multigrain timestamps, Linux 6.13), for which fsync(2) waits for the
    /// journal.
    pub fn stat_but_times(&self, fd: BorrowedFd<'_>) -> Result<AttrImage> {
        self.before(Call::Attributes)?;
        let flags = AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT;
        let times = StatxFlags::ATIME | StatxFlags::MTIME | StatxFlags::CTIME;
        let wanted = StatxFlags::BASIC_STATS.difference(times);
        let found = image(&rustix::fs::statx(fd, c"", flags, wanted)?);
        Ok(AttrImage {
            atime: Timestamp::default(),
            mtime: Timestamp::default(),
            ctime: Timestamp::default(),
            ..found
        })
    }

    /// The stat fields and all extended attributes of an object, as a pre-image holds them.
    pub fn full_attr(&self, fd: BorrowedFd<'_>) -> Result<AttrImage> {
        let mut attr = self.stat(fd)?;
        for name in self.list_xattr(fd)? {
            match self.get_xattr(fd, &name) {
                Ok(value) => attr.xattrs.push((name, value)),
                Err(Error::Os(Errno::NODATA)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(attr)
    }

    /// The names of an object's extended attributes; none where the filesystem has none.
    pub fn list_xattr(&self, fd: BorrowedFd<'_>) -> Result<Vec<Vec<u8>>> {
        self.before(Call::Attributes)?;
        let path = sys::fd_path(fd);
        let mut buf = Vec::with_capacity(1024);
        loop {
            match rustix::fs::listxattr(&path, rustix::buffer::spare_capacity(&mut buf)) {
                Ok(_) => break,
                Err(Errno::RANGE) => buf.reserve(64 * 1024),
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(Vec::new()),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(buf
            .split(|&b| b == 0)
            .filter(|n| !n.is_empty())
            .map(<[u8]>::to_vec)
            .collect())
    }

    /// The value of one extended attribute.
    pub fn get_xattr(&self, fd: BorrowedFd<'_>, name: &[u8]) -> Result<Vec<u8>> {
        self.before(Call::Attributes)?;
        let (path, name) = (sys::fd_path(fd), sys::c_string(name)?);
        let mut buf = Vec::with_capacity(256);
        loop {
            match rustix::fs::getxattr(&path, &*name, rustix::buffer::spare_capacity(&mut buf)) {
                Ok(_) => return Ok(buf),
                Err(Errno::RANGE) if buf.capacity() < 64 * 1024 => buf.reserve(64 * 1024),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// The target of a symlink.
    pub fn read_link(&self, fd: BorrowedFd<'_>) -> Result<Vec<u8>> {
        self.before(Call::Attributes)?;
        Ok(rustix::fs::readlinkat(fd, c"", Vec::new())?.into_bytes())
    }

    // ---- changes; the pre-images are the caller's part (I1)

    /// chmod(2) of an object.
    pub fn chmod(&self, fd: BorrowedFd<'_>, mode: u32) -> Result<()> {
        self.before(Call::Change)?;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        Ok(self.made(rustix::fs::chmod(sys::fd_path(fd), mode))?)
    }

    /// chown(2) of an object.
    pub fn chown(&self, fd: BorrowedFd<'_>, uid: Option<u32>, gid: Option<u32>) -> Result<()> {
        self.before(Call::Change)?;
        let uid = uid.map(rustix::fs::Uid::from_raw);
        let gid = gid.map(rustix::fs::Gid::from_raw);
        let done = rustix::fs::chownat(fd, c"", uid, gid, AtFlags::EMPTY_PATH);
        Ok(self.made(done)?)
    }

    /// utimensat(2) of an object.
    pub fn utimens(&self, fd: BorrowedFd<'_>, times: &Timestamps) -> Result<()> {
        self.before(Call::Change)?;
        match self.made(rustix::fs::utimensat(fd, c"", times, AtFlags::EMPTY_PATH)) {
            Err(Errno::INVAL) => {
                let (path, none) = (sys::fd_path(fd), AtFlags::empty());
                Ok(self.made(rustix::fs::utimensat(CWD, path, times, none))?)
            }
            other => Ok(other?),
        }
    }

    /// Sets the time of last modification alone.
    pub fn set_mtime(&self, fd: BorrowedFd<'_>, time: Timestamp) -> Result<()> {
        let spec = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
        self.utimens(
            fd,
            &Timestamps {
                last_access: spec(0, UTIME_OMIT),
                last_modification: spec(time.sec, i64::from(time.nsec)),
            },
        )
    }

    /// setxattr(2) of an object.
    pub fn set_xattr(
        &self,
        fd: BorrowedFd<'_>,
        name: &[u8],
        value: &[u8],
        flags: i32,
    ) -> Result<()> {
        self.before(Call::Change)?;
        let flags = XattrFlags::from_bits_retain(flags as u32);
        let (path, name) = (sys::fd_path(fd), sys::c_string(name)?);
        Ok(self.made(rustix::fs::setxattr(path, &*name, value, flags))?)
    }

    /// removexattr(2) of an object.
    pub fn remove_xattr(&self, fd: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        self.before(Call::Change)?;
        let (path, name) = (sys::fd_path(fd), sys::c_string(name)?);
        Ok(self.made(rustix::fs::removexattr(path, &*name))?)
    }
}
