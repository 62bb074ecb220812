//! Which mounting of a filesystem something is on.
//!
//! What was not synced can be lost while the machine goes on: a filesystem fails, is unmounted and mounted anew, or an
//! image of it that was taken meanwhile is. ext4, xfs, f2fs and btrfs have a directory beneath `/sys/fs` for as long as
//! they are mounted (sysfs(5)), and each that is made there has a number that no earlier one had.

use crate::sys;
use rustix::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The magic numbers of statfs(2), and what the filesystem is called beneath `/sys/fs`.
const NAMES: [(u64, &str); 3] = [
    (0xef53, "ext4"),
    (0x5846_5342, "xfs"),
    (0xf2f5_2010, "f2fs"),
];
const BTRFS: u64 = 0x9123_683e;

/// A number of the present mounting of the filesystem that `fd` is on: the same for all bind mounts of it, and another
/// when it was unmounted and mounted again. Nothing where it cannot be told.
#[must_use]
pub fn mounting(fd: BorrowedFd<'_>) -> Option<u64> {
    let directory = directory(fd)?;
    Some(std::fs::metadata(directory).ok()?.ino())
}

fn directory(fd: BorrowedFd<'_>) -> Option<PathBuf> {
    let magic = rustix::fs::fstatfs(fd).ok()?.f_type as u64;
    if magic == BTRFS {
        let id = format!("{:032x}", sys::btrfs_id(fd).ok()?);
        let uuid = [&id[..8], &id[8..12], &id[12..16], &id[16..20], &id[20..]].join("-");
        return Some(Path::new("/sys/fs/btrfs").join(uuid));
    }
    let (_, name) = NAMES.iter().find(|(of, _)| *of == magic)?;
    let device = sys::device(fd).ok()?;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let disk = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    Some(Path::new("/sys/fs").join(name).join(disk.file_name()?))
}

/// The same for a directory by its path, or the one in which it is to be made.
#[must_use]
pub fn mounting_at(path: &Path) -> Option<u64> {
    let there = |path: &Path| std::fs::File::open(path).ok();
    mounting(there(path).or_else(|| there(path.parent()?))?.as_fd())
}
