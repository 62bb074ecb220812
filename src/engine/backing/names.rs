//! Names in directories, and the retained objects.

use super::{Backing, Call, Change, Found, HIDDEN};
use crate::error::{Error, Result};
use crate::ids::Ino;
use crate::sys;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RawDir, RenameFlags, ResolveFlags};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;

impl Backing {
    /// Creates a regular file that must not exist, and opens it.
    pub fn create(
        &self,
        dir: BorrowedFd<'_>,
        name: &[u8],
        mode: u32,
        flags: OFlags,
    ) -> Result<OwnedFd> {
        self.before(Call::Change)?;
        let how = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        Ok(self.made(rustix::fs::openat2(dir, name, how, mode, resolve))?)
    }

    /// mkdir(2).
    pub fn mkdir(&self, dir: BorrowedFd<'_>, name: &[u8], mode: u32) -> Result<()> {
        self.before(Call::Change)?;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        Ok(self.made(rustix::fs::mkdirat(dir, name, mode))?)
    }

    /// mknod(2).
    pub fn mknod(&self, dir: BorrowedFd<'_>, name: &[u8], mode: u32, rdev: u64) -> Result<()> {
        self.before(Call::Change)?;
        let perm = Mode::from_raw_mode(mode & 0o7777);
        let kind = FileType::from_raw_mode(mode);
        Ok(self.made(rustix::fs::mknodat(dir, name, kind, perm, rdev))?)
    }

    /// symlink(2).
    pub fn symlink(&self, dir: BorrowedFd<'_>, name: &[u8], target: &[u8]) -> Result<()> {
        self.before(Call::Change)?;
        Ok(self.made(rustix::fs::symlinkat(target, dir, name))?)
    }

    /// Gives a new object to a group, unless its directory hands down its own (setgid). False if it was left, also
    /// where it is not for cowfs to give.
    pub fn give_group(&self, dir: BorrowedFd<'_>, name: &[u8], group: u32) -> Result<bool> {
        if self.stat(dir)?.mode & libc::S_ISGID != 0 {
            return Ok(false);
        }
        self.before(Call::Change)?;
        let group = Some(rustix::fs::Gid::from_raw(group));
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        match self.made(rustix::fs::chownat(dir, name, None, group, flags)) {
            Ok(()) => Ok(true),
            Err(Errno::PERM) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// link(2) of an open object.
    pub fn link(&self, fd: BorrowedFd<'_>, dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        self.before(Call::Change)?;
        let linked = rustix::fs::linkat(fd, c"", dir, name, AtFlags::EMPTY_PATH);
        match self.relinked(self.made(linked)) {
            // An empty path takes CAP_DAC_READ_SEARCH (linkat(2)); the way through /proc does not.
            Err(Errno::NOENT | Errno::PERM) if !self.overrides_modes() => {
                let through = sys::fd_path(fd);
                let flags = AtFlags::SYMLINK_FOLLOW;
                let linked = rustix::fs::linkat(CWD, through, dir, name, flags);
                Ok(self.relinked(self.made(linked))?)
            }
            other => Ok(other?),
        }
    }

    /// unlink(2), or rmdir(2).
    pub fn remove(&self, dir: BorrowedFd<'_>, name: &[u8], directory: bool) -> Result<()> {
        self.before(Call::Change)?;
        let flags = if directory {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        self.tell(|| Change::Dooms(dir, name));
        let removed = rustix::fs::unlinkat(dir, name, flags);
        Ok(self.relinked(self.made(removed))?)
    }

    /// renameat2(2).
    pub fn rename(
        &self,
        from: (BorrowedFd<'_>, &[u8]),
        to: (BorrowedFd<'_>, &[u8]),
        flags: RenameFlags,
    ) -> Result<()> {
        self.before(Call::Change)?;
        if !flags.contains(RenameFlags::EXCHANGE) {
            self.tell(|| Change::Dooms(to.0, to.1));
        }
        let renamed = rustix::fs::renameat_with(from.0, from.1, to.0, to.1, flags);
        Ok(self.relinked(self.made(renamed))?)
    }

    // ---- retained objects: `.cowfs/retained/<inode number in hex>`

    pub(super) fn retained_name(ino: Ino) -> Vec<u8> {
        format!("{:016x}", ino.0).into_bytes()
    }

    /// Moves the last name of an object out of the live tree, in one step: to nothing, or to a whiteout in its place
    /// (`RENAME_WHITEOUT`).
    pub fn retain(
        &self,
        dir: BorrowedFd<'_>,
        name: &[u8],
        ino: Ino,
        flags: RenameFlags,
    ) -> Result<()> {
        self.before(Call::Change)?;
        let to = Self::retained_name(ino);
        let rename = || {
            self.made(rustix::fs::renameat_with(
                dir,
                name,
                &self.retained,
                &to,
                flags,
            ))
        };
        match rename() {
            Err(Errno::ACCESS) if !self.overrides_modes() => {
                // A directory gets a new parent only if its user may write to it, which rmdir(2) does not ask
                // for. Its mode is of no use to anybody any more: snapshots have it among the pre-images.
                let mode = Mode::RWXU;
                self.made(rustix::fs::chmodat(dir, name, mode, AtFlags::empty()))?;
                Ok(rename()?)
            }
            other => Ok(other?),
        }
    }

    /// Gives an object a second link among the retained, before its last name is replaced.
    pub fn retain_link(&self, fd: BorrowedFd<'_>, ino: Ino) -> Result<()> {
        self.link(fd, self.retained.as_fd(), &Self::retained_name(ino))
    }

    /// Removes an object from among the retained; one that is not there is no error. A directory in which somebody has put
    /// something behind the back of cowfs stays, which the log says.
    pub fn release_retained(&self, ino: Ino, directory: bool) -> Result<()> {
        self.drop_path(ino);
        let name = Self::retained_name(ino);
        match self.remove(self.retained.as_fd(), &name, directory) {
            Err(Error::Os(Errno::NOENT)) => Ok(()),
            Err(Error::Os(Errno::NOTEMPTY)) => {
                let path = self.path.join(OsStr::from_bytes(HIDDEN));
                let path = path.join("retained").join(OsStr::from_bytes(&name));
                log::warn!(
                    "{}: holds files that cowfs has not put there; it is left alone",
                    path.display()
                );
                Ok(())
            }
            other => other,
        }
    }

    /// What is among the retained under `ino`.
    pub fn find_retained(&self, ino: Ino) -> Result<Option<Found>> {
        self.find(self.retained.as_fd(), &Self::retained_name(ino))
    }

    /// The numbers of all that is among the retained.
    pub fn all_retained(&self) -> Result<Vec<Ino>> {
        numbers_in(&self.retained)
    }

    // ---- orphans: `.cowfs/orphans/<inode number in hex>`

    /// Moves the last name of an open file out of the live tree, in one step.
    pub fn orphan(&self, dir: BorrowedFd<'_>, name: &[u8], ino: Ino) -> Result<()> {
        self.before(Call::Change)?;
        let to = Self::retained_name(ino);
        Ok(self.made(rustix::fs::renameat(dir, name, &self.orphans, to))?)
    }

    /// Gives an open file a second link among the orphans, before its last name is replaced.
    pub fn orphan_link(&self, fd: BorrowedFd<'_>, ino: Ino) -> Result<()> {
        match self.link(fd, self.orphans.as_fd(), &Self::retained_name(ino)) {
            // Made by a daemon that was killed before the replacement.
            Err(Error::Os(Errno::EXIST)) => Ok(()),
            other => other,
        }
    }

    /// Moves an open file from the retained to the orphans. False if it is not there.
    pub fn orphan_retained(&self, ino: Ino) -> Result<bool> {
        self.before(Call::Change)?;
        let name = Self::retained_name(ino);
        match self.made(rustix::fs::renameat(
            &self.retained,
            &name,
            &self.orphans,
            &name,
        )) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Removes a file from among the orphans; one that is not there is no error.
    pub fn release_orphan(&self, ino: Ino) -> Result<()> {
        self.drop_path(ino);
        match self.remove(self.orphans.as_fd(), &Self::retained_name(ino), false) {
            Err(Error::Os(Errno::NOENT)) => Ok(()),
            other => other,
        }
    }

    /// The numbers of all orphans.
    pub fn all_orphans(&self) -> Result<Vec<Ino>> {
        numbers_in(&self.orphans)
    }

    /// Whether an open directory has no entries.
    pub fn is_empty(&self, dir: &OwnedFd) -> Result<bool> {
        self.before(Call::Read)?;
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

/// The inode numbers that the names in a directory of the store stand for.
fn numbers_in(dir: &OwnedFd) -> Result<Vec<Ino>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::openat(dir, c".", flags, Mode::empty())?;
    let mut buf = [MaybeUninit::uninit(); 8192];
    let mut entries = RawDir::new(&dir, &mut buf);
    let mut all = Vec::new();
    while let Some(entry) = entries.next() {
        let name = entry?.file_name().to_string_lossy().into_owned();
        all.extend(u64::from_str_radix(&name, 16).map(Ino));
    }
    Ok(all)
}
