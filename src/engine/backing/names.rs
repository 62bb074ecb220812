//! Names in directories, and the retained objects.

use super::{Backing, Found};
use crate::error::{Error, Result};
use crate::ids::Ino;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, RenameFlags, ResolveFlags};
use rustix::io::Errno;
use std::mem::MaybeUninit;

/// Name of the reserve in the hidden directory.
const RESERVE: &str = "reserve";
/// Enough for the records of some hundred deletions and for an index of its smallest size.
const RESERVE_BYTES: u64 = 8 << 20;

impl Backing {
    /// Creates a regular file that must not exist, and opens it.
    pub fn create(
        &self,
        dir: BorrowedFd<'_>,
        name: &[u8],
        mode: u32,
        flags: OFlags,
    ) -> Result<OwnedFd> {
        let how = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        Ok(rustix::fs::openat2(dir, name, how, mode, resolve)?)
    }

    /// mkdir(2).
    pub fn mkdir(&self, dir: BorrowedFd<'_>, name: &[u8], mode: u32) -> Result<()> {
        Ok(rustix::fs::mkdirat(
            dir,
            name,
            Mode::from_raw_mode(mode & 0o7777),
        )?)
    }

    /// mknod(2).
    pub fn mknod(&self, dir: BorrowedFd<'_>, name: &[u8], mode: u32, rdev: u64) -> Result<()> {
        let perm = Mode::from_raw_mode(mode & 0o7777);
        Ok(rustix::fs::mknodat(
            dir,
            name,
            FileType::from_raw_mode(mode),
            perm,
            rdev,
        )?)
    }

    /// symlink(2).
    pub fn symlink(&self, dir: BorrowedFd<'_>, name: &[u8], target: &[u8]) -> Result<()> {
        Ok(rustix::fs::symlinkat(target, dir, name)?)
    }

    /// link(2) of an open object.
    pub fn link(&self, fd: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        Ok(rustix::fs::linkat(fd, c"", dir, name, AtFlags::EMPTY_PATH)?)
    }

    /// unlink(2), or rmdir(2).
    pub fn remove(&self, dir: BorrowedFd<'_>, name: &[u8], directory: bool) -> Result<()> {
        let flags = if directory {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        Ok(rustix::fs::unlinkat(dir, name, flags)?)
    }

    /// renameat2(2).
    pub fn rename(
        &self,
        from: (BorrowedFd<'_>, &[u8]),
        to: (BorrowedFd<'_>, &[u8]),
        flags: RenameFlags,
    ) -> Result<()> {
        Ok(rustix::fs::renameat_with(
            from.0, from.1, to.0, to.1, flags,
        )?)
    }

    // ---- retained objects: `.cowfs/retained/<inode number in hex>`

    fn retained_name(ino: Ino) -> Vec<u8> {
        format!("{:016x}", ino.0).into_bytes()
    }

    /// Moves the last name of an object out of the live tree, in one step.
    pub fn retain(&self, dir: BorrowedFd<'_>, name: &[u8], ino: Ino) -> Result<()> {
        let to = Self::retained_name(ino);
        Ok(rustix::fs::renameat(dir, name, &self.retained, to)?)
    }

    /// Gives an object a second link among the retained, before its last name is replaced.
    pub fn retain_link(&self, fd: BorrowedFd<'_>, ino: Ino) -> Result<()> {
        self.link(fd, self.retained.as_fd(), &Self::retained_name(ino))
    }

    /// Removes an object from among the retained; one that is not there is no error.
    pub fn release_retained(&self, ino: Ino, directory: bool) -> Result<()> {
        self.drop_path(ino);
        match self.remove(self.retained.as_fd(), &Self::retained_name(ino), directory) {
            Err(Error::Os(Errno::NOENT)) => Ok(()),
            other => other,
        }
    }

    /// What is among the retained under `ino`.
    pub fn find_retained(&self, ino: Ino) -> Result<Option<Found>> {
        self.find(self.retained.as_fd(), &Self::retained_name(ino))
    }

    /// The numbers of all that is among the retained.
    pub fn all_retained(&self) -> Result<Vec<Ino>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(&self.retained, c".", flags, Mode::empty())?;
        let mut buf = [MaybeUninit::uninit(); 8192];
        let mut entries = RawDir::new(&dir, &mut buf);
        let mut all = Vec::new();
        while let Some(entry) = entries.next() {
            let name = entry?.file_name().to_string_lossy().into_owned();
            all.extend(u64::from_str_radix(&name, 16).map(Ino));
        }
        Ok(all)
    }

    // ---- the reserve: space to delete snapshots with, when there is none left

    /// Sets the reserve aside if it is not there and there is room for it.
    pub fn keep_reserve(&self) {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let Ok(file) = rustix::fs::openat(&self.hidden, RESERVE, flags, Mode::from_raw_mode(0o600))
        else {
            return;
        };
        let none = rustix::fs::FallocateFlags::empty();
        if let Err(errno) = rustix::fs::fallocate(&file, none, 0, RESERVE_BYTES) {
            log::debug!("no room for a reserve: {errno}");
            self.drop_reserve();
        }
    }

    /// Gives the reserve up. False if there is none.
    pub fn drop_reserve(&self) -> bool {
        rustix::fs::unlinkat(&self.hidden, RESERVE, AtFlags::empty()).is_ok()
    }

    /// Whether an open directory has no entries.
    pub fn is_empty(&self, dir: &OwnedFd) -> Result<bool> {
        let mut buf = [MaybeUninit::uninit(); 1024];
        let mut entries = RawDir::new(dir, &mut buf);
        while let Some(entry) = entries.next() {
            if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
