//! The backing directory: the only code that changes it, and the only code that reads it.
//!
//! Objects are reached by file handle and names by descriptor of their directory, never by absolute path, and
//! everything goes through a private, non-recursive clone of the mount that holds the directory
//! (open_tree(2)): what others mount beneath it later or earlier is not entered, and cowfs mounted over the
//! directory itself does not stand in its own way. So no name or symlink leads out of it (C11).

use crate::error::{Error, Result};
use crate::ids::{BLOCK, Ino};
use crate::store::{AttrImage, EntryImage, ObjectHandle, Timestamp};
use crate::sync::{Arc, Mutex};
use crate::sys;
use hashlink::LruCache;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, RawDir, RenameFlags, ResolveFlags,
    SeekFrom, StatVfsMountFlags, Statx, StatxFlags, XattrFlags,
};
use rustix::io::Errno;
use rustix::io::{ReadWriteFlags, preadv2};
use rustix::mount::{OpenTreeFlags, open_tree};
use std::ffi::CStr;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
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
            paths: Mutex::new(LruCache::new(CACHED_PATHS)),
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

    // ---- reading

    /// The stat fields of an open object.
    pub fn stat(&self, fd: BorrowedFd<'_>) -> Result<AttrImage> {
        Ok(image(&statx(fd, c"")?))
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
        Ok(rustix::fs::readlinkat(fd, c"", Vec::new())?.into_bytes())
    }

    /// Reads until `buf` is full or the file ends; returns the bytes read.
    pub fn read(&self, fd: BorrowedFd<'_>, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match rustix::io::pread(fd, &mut buf[done..], offset + done as u64) {
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
            let mut rest = [IoSliceMut::new(&mut buf[done..])];
            match preadv2(fd, &mut rest, offset + done as u64, ReadWriteFlags::NOWAIT) {
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

    // ---- changing data; the pre-images are the caller's part (I1)

    /// Writes all of `data`, or as much as there is room for.
    pub fn write(&self, fd: BorrowedFd<'_>, offset: u64, data: &[u8]) -> Result<usize> {
        let mut done = 0;
        while done < data.len() {
            match rustix::io::pwrite(fd, &data[done..], offset + done as u64) {
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(errno) if done == 0 => return Err(errno.into()),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// ftruncate(2), through a descriptor opened for writing.
    pub fn truncate(&self, fd: BorrowedFd<'_>, size: u64) -> Result<()> {
        Ok(rustix::fs::ftruncate(fd, size)?)
    }

    /// fallocate(2).
    pub fn fallocate(&self, fd: BorrowedFd<'_>, mode: i32, offset: u64, len: u64) -> Result<()> {
        let mode = rustix::fs::FallocateFlags::from_bits_retain(mode as u32);
        Ok(rustix::fs::fallocate(fd, mode, offset, len)?)
    }

    /// fsync(2), or fdatasync(2).
    pub fn sync(&self, fd: BorrowedFd<'_>, data_only: bool) -> Result<()> {
        if data_only {
            rustix::fs::fdatasync(fd)?
        } else {
            rustix::fs::fsync(fd)?
        }
        Ok(())
    }

    // ---- changing attributes

    /// chmod(2) of an object.
    pub fn chmod(&self, fd: BorrowedFd<'_>, mode: u32) -> Result<()> {
        Ok(rustix::fs::chmod(
            sys::fd_path(fd),
            Mode::from_raw_mode(mode & 0o7777),
        )?)
    }

    /// chown(2) of an object.
    pub fn chown(&self, fd: BorrowedFd<'_>, uid: Option<u32>, gid: Option<u32>) -> Result<()> {
        let uid = uid.map(rustix::fs::Uid::from_raw);
        let gid = gid.map(rustix::fs::Gid::from_raw);
        Ok(rustix::fs::chownat(fd, c"", uid, gid, AtFlags::EMPTY_PATH)?)
    }

    /// utimensat(2) of an object.
    pub fn utimens(&self, fd: BorrowedFd<'_>, times: &rustix::fs::Timestamps) -> Result<()> {
        match rustix::fs::utimensat(fd, c"", times, AtFlags::EMPTY_PATH) {
            Err(Errno::INVAL) => Ok(rustix::fs::utimensat(
                CWD,
                sys::fd_path(fd),
                times,
                AtFlags::empty(),
            )?),
            other => Ok(other?),
        }
    }

    /// setxattr(2) of an object.
    pub fn set_xattr(
        &self,
        fd: BorrowedFd<'_>,
        name: &[u8],
        value: &[u8],
        flags: i32,
    ) -> Result<()> {
        let flags = XattrFlags::from_bits_retain(flags as u32);
        Ok(rustix::fs::setxattr(
            sys::fd_path(fd),
            &*sys::c_string(name)?,
            value,
            flags,
        )?)
    }

    /// removexattr(2) of an object.
    pub fn remove_xattr(&self, fd: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
        Ok(rustix::fs::removexattr(
            sys::fd_path(fd),
            &*sys::c_string(name)?,
        )?)
    }

    // ---- changing names

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

/// Rounds down to a block boundary.
pub fn block_floor(offset: u64) -> u64 {
    offset / BLOCK as u64
}
