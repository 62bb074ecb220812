//! The backing directory: the only code that changes it, and the only code that reads it.
//!
//! Objects are reached by file handle and names by descriptor of their directory, never by absolute path, and
//! everything goes through a private, non-recursive clone of the mount that holds the directory
//! (open_tree(2)): what others mount beneath it later or earlier is not entered, and cowfs mounted over the
//! directory itself does not stand in its own way. So no name or symlink leads out of it (C11).

mod attr;
mod data;
mod names;

pub use data::data_map;

use crate::error::{Error, Result};
use crate::ids::Ino;
use crate::store::{AttrImage, EntryImage, ObjectHandle, Timestamp};
use crate::sync::{Arc, Mutex};
use crate::sys;
use hashlink::LruCache;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, StatVfsMountFlags, Statx, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::process::{Resource, getrlimit};
use std::ffi::CStr;
use std::path::{Path, PathBuf};

/// Name of the hidden directory in the root of the backing directory.
pub const HIDDEN: &[u8] = b".cowfs";
/// `O_PATH` descriptors kept open at most, so that known objects do not cost a descriptor each.
const CACHED_PATHS: usize = 2048;

/// Identity and kind of what a name means, with its attributes.
pub struct Found {
    /// What a directory entry keeps of it.
    pub entry: EntryImage,
    /// Its stat fields, without extended attributes.
    pub attr: AttrImage,
}

/// The backing directory.
pub struct Backing {
    /// As the user named it, for messages.
    pub path: PathBuf,
    root: OwnedFd,
    /// Keeps the filesystem busy, so that unmounting it beneath cowfs is refused.
    _pin: OwnedFd,
    hidden: OwnedFd,
    retained: OwnedFd,
    /// Held for as long as the directory is in use: a second mount is refused (C12).
    _lock: OwnedFd,
    device: (u32, u32),
    root_entry: EntryImage,
    paths: Mutex<LruCache<Ino, Arc<OwnedFd>>>,
}

/// Most of the descriptors that the process may have are for the files that users open.
fn cached_paths() -> usize {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    (limit / 8).min(CACHED_PATHS as u64) as usize
}

fn statx(dir: BorrowedFd<'_>, name: &CStr) -> Result<Statx, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(
        dir,
        name,
        flags,
        StatxFlags::BASIC_STATS | StatxFlags::BTIME,
    )
}

/// The `DT_*` value (readdir(3)) of a file mode.
pub fn kind_of_mode(mode: u32) -> u8 {
    ((mode >> 12) & 0o17) as u8
}

fn image(st: &Statx) -> AttrImage {
    let time = |t: rustix::fs::StatxTimestamp| Timestamp {
        sec: t.tv_sec,
        nsec: t.tv_nsec,
    };
    AttrImage {
        mode: u32::from(st.stx_mode),
        uid: st.stx_uid,
        gid: st.stx_gid,
        nlink: st.stx_nlink,
        size: st.stx_size,
        blocks: st.stx_blocks,
        blksize: st.stx_blksize,
        rdev: rustix::fs::makedev(st.stx_rdev_major, st.stx_rdev_minor),
        atime: time(st.stx_atime),
        mtime: time(st.stx_mtime),
        ctime: time(st.stx_ctime),
        btime: (st.stx_mask & StatxFlags::BTIME.bits() != 0).then(|| time(st.stx_btime)),
        xattrs: Vec::new(),
    }
}

impl Backing {
    /// Opens `path` as a backing directory and takes its lock, making the hidden directory if need be.
    ///
    /// # Errors
    /// [`Error::Source`] when it is missing, not a directory, read-only, in use, or on a filesystem that
    /// has no file handles.
    pub fn open(path: &Path) -> Result<Self> {
        let fail = |why: String| Error::Source {
            path: path.to_path_buf(),
            why,
        };
        let dir = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let pin = rustix::fs::open(path, dir | OFlags::RDONLY, Mode::empty())
            .map_err(|e| fail(format!("cannot open the directory: {e}")))?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = open_tree(&pin, c"", flags).map_err(|e| {
            Error::Permission(format!(
                "{}: cannot take a private view of the directory (open_tree: {e}); run cowfs as root",
                path.display()
            ))
        })?;
        // What a snapshot shows never changes, and access times are part of it (C2): reading on behalf of
        // cowfs or its users leaves them alone.
        sys::mount_without_atime(tree.as_fd()).map_err(|e| {
            Error::Permission(format!(
                "mount_setattr: {e}; cowfs needs Linux 5.12 or later"
            ))
        })?;
        let root = rustix::fs::openat(&tree, c".", dir | OFlags::RDONLY, Mode::empty())
            .map_err(|e| fail(format!("cannot open the directory: {e}")))?;
        let vfs = rustix::fs::fstatvfs(&root)?;
        if vfs.f_flag.contains(StatVfsMountFlags::RDONLY) {
            return Err(fail(
                "is on a read-only filesystem, and cowfs keeps its store there; remount it read-write"
                    .into(),
            ));
        }
        let st = statx(root.as_fd(), c"")?;
        let (kind, bytes) = sys::name_to_handle(root.as_fd(), c"").map_err(|e| {
            fail(format!("its filesystem has no file handles ({e}), which cowfs needs; use ext4, xfs, btrfs or tmpfs"))
        })?;
        sys::open_by_handle(root.as_fd(), kind, &bytes, OFlags::PATH).map_err(|e| {
            Error::Permission(format!(
                "{}: cannot open by file handle ({e}); run cowfs as root (CAP_DAC_READ_SEARCH)",
                path.display()
            ))
        })?;
        let hidden = Self::hidden_dir(root.as_fd(), HIDDEN, &fail)?;
        let lock = rustix::fs::openat(
            &hidden,
            c"lock",
            OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::from_raw_mode(0o600),
        )
        .map_err(|e| fail(format!("cannot open .cowfs/lock: {e}")))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            fail("is mounted by cowfs already; unmount it first (cowfs umount)".into())
        })?;
        let retained = Self::hidden_dir(hidden.as_fd(), b"retained", &fail)?;
        let root_entry = EntryImage {
            ino: Ino(st.stx_ino),
            kind: kind_of_mode(u32::from(st.stx_mode)),
            handle: ObjectHandle { kind, bytes },
        };
        Ok(Self {
            path: path.to_path_buf(),
            root,
            _pin: pin,
            hidden,
            retained,
            _lock: lock,
            device: (st.stx_dev_major, st.stx_dev_minor),
            root_entry,
            paths: Mutex::new(LruCache::new(cached_paths())),
        })
    }

    /// Opens, and makes if missing, a directory of the store: 0700, owned by who runs cowfs, no symlink.
    fn hidden_dir(
        parent: BorrowedFd<'_>,
        name: &[u8],
        fail: &impl Fn(String) -> Error,
    ) -> Result<OwnedFd> {
        let shown = String::from_utf8_lossy(name).into_owned();
        match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(fail(format!("cannot make {shown}: {e}"))),
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(parent, name, flags, Mode::empty())
            .map_err(|e| fail(format!("cannot open {shown}: {e}")))?;
        let st = rustix::fs::fstat(&fd)?;
        if st.st_uid != rustix::process::geteuid().as_raw() || st.st_mode & 0o077 != 0 {
            return Err(fail(format!(
                "{shown} belongs to another user or is open to others; it must be mode 0700 of the user that runs cowfs"
            )));
        }
        Ok(fd)
    }

    /// The hidden directory's path through its descriptor, for the store beneath it.
    pub fn hidden_path(&self) -> PathBuf {
        sys::fd_path(&self.hidden)
    }

    /// The root directory.
    pub fn root_entry(&self) -> &EntryImage {
        &self.root_entry
    }

    /// statvfs(3) of the backing filesystem.
    pub fn statvfs(&self) -> Result<rustix::fs::StatVfs> {
        Ok(rustix::fs::fstatvfs(&self.root)?)
    }
    // ---- reaching objects

    /// Opens an object by its handle. Never follows a symlink, never opens a device.
    pub fn open_object(&self, entry: &EntryImage, flags: OFlags) -> Result<OwnedFd> {
        let handle = &entry.handle;
        let nonblock = if flags.contains(OFlags::PATH) {
            OFlags::empty()
        } else {
            OFlags::NONBLOCK
        };
        let flags = flags | OFlags::NOFOLLOW | nonblock;
        Ok(sys::open_by_handle(
            self.root.as_fd(),
            handle.kind,
            &handle.bytes,
            flags,
        )?)
    }

    /// A descriptor of the object for calls that need no more than `O_PATH`; cached.
    pub fn path_fd(&self, entry: &EntryImage) -> Result<Arc<OwnedFd>> {
        if let Some(fd) = self.paths.lock().get(&entry.ino) {
            return Ok(fd.clone());
        }
        let fd = Arc::new(self.open_object(entry, OFlags::PATH)?);
        self.paths.lock().insert(entry.ino, fd.clone());
        Ok(fd)
    }

    /// Forgets the cached descriptor of an object whose inode may be freed.
    pub fn drop_path(&self, ino: Ino) {
        self.paths.lock().remove(&ino);
    }

    /// What `name` in `dir` means. Something on another device (a btrfs subvolume) is not entered: `EXDEV`.
    pub fn find(&self, dir: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Found>> {
        let name = sys::c_string(name)?;
        let st = match statx(dir, &name) {
            Ok(st) => st,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        if (st.stx_dev_major, st.stx_dev_minor) != self.device {
            return Err(Errno::XDEV.into());
        }
        let (kind, bytes) = sys::name_to_handle(dir, &name)?;
        let entry = EntryImage {
            ino: Ino(st.stx_ino),
            kind: kind_of_mode(u32::from(st.stx_mode)),
            handle: ObjectHandle { kind, bytes },
        };
        Ok(Some(Found {
            entry,
            attr: image(&st),
        }))
    }
}
