//! Every error of cowfs, with the only table of errnos ([`Error::errno`]) and the only table of exit
//! codes ([`Error::exit_code`]).

use crate::ids::Epoch;
use rustix::io::Errno;
use std::path::{Path, PathBuf};

/// What went wrong. The message of each names the thing and, where there is one, the remedy (C12).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call on the backing directory failed; the caller of cowfs gets the same errno.
    #[error("{0}")]
    Os(#[from] Errno),
    /// A system call on a named path failed.
    #[error("{path}: {action}: {errno}", path = path.display())]
    Path {
        /// What was being done, as in "cannot open".
        action: &'static str,
        /// The path as the user knows it.
        path: PathBuf,
        /// The kernel's answer.
        errno: Errno,
    },
    /// The command line or a mount option is not valid.
    #[error("{0}")]
    Usage(String),
    /// The backing directory cannot be used as it is.
    #[error("{path}: {why}", path = path.display())]
    Source {
        /// The backing directory.
        path: PathBuf,
        /// Reason and remedy.
        why: String,
    },
    /// The mount point cannot be used, or is not a cowfs mount.
    #[error("{path}: {why}", path = path.display())]
    MountPoint {
        /// The mount point.
        path: PathBuf,
        /// Reason and remedy.
        why: String,
    },
    /// The kernel or a permission stands in the way.
    #[error("{0}")]
    Permission(String),
    /// The store is damaged, foreign, or of a format this release does not know.
    #[error("{path}: {why}", path = path.display())]
    Store {
        /// The file or directory of the store.
        path: PathBuf,
        /// Reason and remedy.
        why: String,
    },
    /// A block or record of the store does not match its checksum; it is never served.
    #[error("store damaged: {0}")]
    Corrupt(String),
    /// An earlier append or sync of the journal failed: mutation is refused, reads go on (I7).
    #[error(
        "the journal could not be written ({0}); changes are refused until cowfs is mounted anew, reads go on"
    )]
    Poisoned(String),
    /// The snapshot name is not one a directory entry can have.
    #[error("invalid snapshot name {0:?}: 1 to 255 bytes, no slash, not \".\" or \"..\"")]
    SnapshotName(String),
    /// A snapshot of that name exists.
    #[error("snapshot {0:?} exists already; choose another name or delete it first")]
    SnapshotExists(String),
    /// No snapshot of that name.
    #[error("no snapshot {0:?}; `cowfs snapshot list` shows those there are")]
    SnapshotMissing(String),
    /// The snapshot is being read.
    #[error(
        "snapshot {0:?} is in use (a file or directory in it is open, or it is mounted by itself); close or unmount it and try again"
    )]
    SnapshotBusy(String),
    /// A pre-image finds no room: snapshots after `after`, up to `label`, would miss it.
    #[error(
        "the store of snapshots is full; delete snapshots, give it more room (store-limit, store-reserve), or mount with on-full=drop"
    )]
    StoreFull {
        /// The latest cut that does not need it.
        after: Epoch,
        /// The latest that does.
        label: Epoch,
    },
    /// The snapshot is held.
    #[error("snapshot {0:?} is held; `cowfs snapshot release` it first")]
    SnapshotHeld(String),
    /// The view belongs to a snapshot that was deleted.
    #[error("the snapshot has been deleted")]
    Stale,
    /// The view belongs to a snapshot of which something is missing.
    #[error(
        "the snapshot is invalid: something that it shows could not be kept; delete it and create another"
    )]
    Invalid,
    /// A change was asked of something read-only.
    #[error("read-only")]
    ReadOnly,
    /// A check of a demo or a comparison found the data wrong.
    #[error("{0}")]
    Check(String),
}

/// The result of nearly everything here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Wraps a failed system call on `path`.
    pub fn path(action: &'static str, path: impl AsRef<Path>, errno: impl Into<Errno>) -> Self {
        Self::Path {
            action,
            path: path.as_ref().to_path_buf(),
            errno: errno.into(),
        }
    }

    /// Wraps a [`std::io::Error`] on `path`; one without an errno counts as `EIO`.
    pub fn io(action: &'static str, path: impl AsRef<Path>, error: &std::io::Error) -> Self {
        use std::io::ErrorKind;
        // A library may have wrapped the number.
        let errno = Errno::from_io_error(error).unwrap_or(match error.kind() {
            ErrorKind::NotFound => Errno::NOENT,
            ErrorKind::PermissionDenied => Errno::ACCESS,
            ErrorKind::StorageFull => Errno::NOSPC,
            ErrorKind::ReadOnlyFilesystem => Errno::ROFS,
            _ => Errno::IO,
        });
        Self::path(action, path, errno)
    }

    /// The same error, with what is below `used` named as the user knows it, below `known`.
    #[must_use]
    pub fn named(mut self, used: &Path, known: &Path) -> Self {
        if let Self::Path { path, .. } | Self::Store { path, .. } = &mut self
            && let Ok(rest) = path.strip_prefix(used)
        {
            *path = known.join(rest);
        }
        self
    }

    /// Whether there was no room for something: a full disk, or a quota.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self.errno(), Errno::NOSPC | Errno::DQUOT)
    }

    /// Whether descriptors or memory were lacking: that passes, and says nothing of what was to be used.
    #[must_use]
    pub fn is_lack(&self) -> bool {
        matches!(self.errno(), Errno::MFILE | Errno::NFILE | Errno::NOMEM)
    }

    /// The errno that a system call on the mount gets.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Os(errno) | Self::Path { errno, .. } => *errno,
            Self::Usage(_) => Errno::INVAL,
            Self::SnapshotName(name) if name.len() > 255 => Errno::NAMETOOLONG,
            Self::SnapshotName(_) => Errno::INVAL,
            Self::Source { .. } | Self::MountPoint { .. } => Errno::INVAL,
            Self::Permission(_) => Errno::PERM,
            Self::Store { .. } | Self::Corrupt(_) | Self::Poisoned(_) | Self::Check(_) => Errno::IO,
            Self::Invalid => Errno::IO,
            Self::SnapshotExists(_) => Errno::EXIST,
            Self::SnapshotMissing(_) => Errno::NOENT,
            Self::SnapshotBusy(_) | Self::SnapshotHeld(_) => Errno::BUSY,
            Self::StoreFull { .. } => Errno::NOSPC,
            Self::Stale => Errno::STALE,
            Self::ReadOnly => Errno::ROFS,
        }
    }

    /// The exit code of the command (docs/CLI.md has the table for users).
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Os(Errno::ACCESS | Errno::PERM)
            | Self::Path {
                errno: Errno::ACCESS | Errno::PERM,
                ..
            } => 5,
            Self::Os(_)
            | Self::Path { .. }
            | Self::StoreFull { .. }
            | Self::Stale
            | Self::ReadOnly => 1,
            Self::Usage(_) => 2,
            Self::Source { .. } => 3,
            Self::MountPoint { .. } => 4,
            Self::Permission(_) => 5,
            Self::Store { .. } | Self::Corrupt(_) | Self::Poisoned(_) => 6,
            Self::Invalid
            | Self::SnapshotName(_)
            | Self::SnapshotExists(_)
            | Self::SnapshotMissing(_)
            | Self::SnapshotHeld(_)
            | Self::SnapshotBusy(_) => 7,
            Self::Check(_) => 8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_of_permission_has_its_exit_code() {
        for (errno, code) in [(Errno::ACCESS, 5), (Errno::PERM, 5), (Errno::IO, 1)] {
            assert_eq!(Error::Os(errno).exit_code(), code);
            assert_eq!(Error::path("cannot open", "/x", errno).exit_code(), code);
        }
    }
}
