//! The backing directory: the only code that changes it, and the only code that reads it.
//!
//! Objects are reached by file handle and names by descriptor of their directory, never by absolute path, and
//! everything goes through a private, non-recursive clone of the mount that holds the directory
//! (open_tree(2)): what others mount beneath it later or earlier is not entered, and cowfs mounted over the
//! directory itself does not stand in its own way. So no name or symlink leads out of it (C11). Without the
//! privileges for handle and clone objects are reached by place (`places.rs`), step by step from the root.

mod attr;
mod data;
mod names;
mod places;

pub use data::data_map;

use super::nodes::INO_MAX;
use crate::error::{Error, Result};
use crate::ids::Ino;
use crate::store::{AttrImage, EntryImage, ObjectHandle, Timestamp};
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, Ordering};
use crate::sys;
use hashlink::LruCache;
use places::{Places, enter};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    Advice, AtFlags, IFlags, Mode, OFlags, StatVfsMountFlags, Statx, StatxFlags, fadvise,
};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::process::{Resource, getrlimit};
use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
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

/// How objects are opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reach {
    /// By their handles where that is permitted, else by place.
    #[default]
    AsPermitted,
    /// By place, as for an ordinary user.
    ByPlace,
}

/// What is done to the backing directory.
#[derive(Debug, Clone, Copy)]
pub enum Change<'a> {
    /// What this name in this directory means, if anything, may be about to lose its last name.
    Dooms(BorrowedFd<'a>, &'a [u8]),
    /// A name, bytes or attributes have changed.
    Made,
    /// A file was made durable (fsync(2), fdatasync(2)).
    Synced(Ino),
    /// All of it was made durable (syncfs(2)).
    AllSynced,
}

/// Is told of every change, in order, just after it was made.
pub type Witness = Arc<dyn Fn(Change<'_>) + Send + Sync>;

/// A kind of system call on the backing directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// Reads bytes of a file, or a directory.
    Read,
    /// Writes bytes.
    Write,
    /// Looks for data or holes.
    Seek,
    /// Reads attributes, extended ones too, or the target of a symlink.
    Attributes,
    /// Opens an object.
    Open,
    /// Looks a name up.
    Find,
    /// Changes names, attributes, sizes.
    Change,
    /// Makes something durable.
    Sync,
}

/// What becomes of a system call instead of what it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// It fails, and does nothing.
    Errno(Errno),
    /// It moves no more bytes than this.
    Short(usize),
}

/// Is asked before every system call on the backing directory.
pub type Faults = Arc<dyn Fn(Call) -> Option<Failure> + Send + Sync>;

/// `FUSE_SUPER_MAGIC` of statfs(2) (include/uapi/linux/magic.h); virtiofs has it too.
pub const FUSE_MAGIC: u64 = 0x6573_5546;

/// Filesystems that leave a hole one in which a file ends that grows past it: ext4, xfs, tmpfs (linux/magic.h). btrfs does not.
const LEAVE_ENDS: [u64; 3] = [0xef53, 0x5846_5342, 0x0102_1994];

/// The backing directory.
pub struct Backing {
    /// As the user named it, for messages.
    pub path: PathBuf,
    root: OwnedFd,
    /// Keeps the filesystem busy, so that unmounting it beneath cowfs is refused.
    _pin: OwnedFd,
    hidden: OwnedFd,
    retained: OwnedFd,
    orphans: OwnedFd,
    /// Held for as long as the directory is in use: a second mount is refused (C12).
    _lock: OwnedFd,
    device: (u32, u32),
    root_entry: EntryImage,
    paths: Mutex<LruCache<Ino, Arc<OwnedFd>>>,
    /// Where objects are, if they cannot be opened by their handles.
    places: Option<Places>,
    /// Reading leaves access times alone by itself: the private mount has noatime.
    keeps_atime: bool,
    /// [`Self::fills_ends`].
    fills_ends: bool,
    /// Whoever reads through cowfs reads ahead.
    read_ahead_above: AtomicBool,
    /// Something may be on no disk, though a later sync succeeds.
    lost: AtomicBool,
    /// Counts what may have given an object another number of links.
    links: AtomicU64,
    pub(super) witness: Option<Witness>,
    pub(super) faults: Option<Faults>,
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
    /// Opens `path` as a backing directory and takes its lock, making the hidden directory if need be. `opened`: the
    /// directory itself, where the path leads to what is mounted over it.
    ///
    /// # Errors
    /// [`Error::Source`] when it is missing, not a directory, read-only, in use, or on a filesystem that
    /// has no file handles.
    pub fn open(path: &Path, opened: Option<OwnedFd>, reach: Reach) -> Result<Self> {
        let fail = |why: String| Error::Source {
            path: path.to_path_buf(),
            why,
        };
        let dir = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let pin = match opened {
            Some(pin) => pin,
            None => rustix::fs::open(path, dir | OFlags::RDONLY, Mode::empty())
                .map_err(|e| fail(format!("cannot open the directory: {e}")))?,
        };
        let (root, keeps_atime) =
            private_view(&pin).map_err(|e| fail(format!("cannot open the directory: {e}")))?;
        let vfs = rustix::fs::fstatvfs(&root)?;
        if vfs.f_flag.contains(StatVfsMountFlags::RDONLY) {
            return Err(fail(
                "is on a read-only filesystem, and cowfs keeps its store there; remount it read-write"
                    .into(),
            ));
        }
        let magic = rustix::fs::fstatfs(&root)?.f_type as u64;
        if magic == FUSE_MAGIC {
            return Err(fail(
                "is on a FUSE filesystem, which gives its files other numbers when it has forgotten them, so that snapshots \
                 would show the wrong ones; use a directory of the filesystem beneath it"
                    .into(),
            ));
        }
        let st = statx(root.as_fd(), c"")?;
        if st.stx_ino >= INO_MAX {
            return Err(fail("has an inode number of 2⁵⁹ or more".into()));
        }
        let (kind, bytes) = sys::name_to_handle(root.as_fd(), c"").map_err(|e| {
            fail(format!("its filesystem has no file handles ({e}), which cowfs needs; use ext4, xfs, btrfs or tmpfs"))
        })?;
        let hidden = Self::hidden_dir(root.as_fd(), HIDDEN, path)?;
        let lock = rustix::fs::openat(
            &hidden,
            c"lock",
            OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::from_raw_mode(0o600),
        )
        .map_err(|e| fail(format!("cannot open .cowfs/lock: {e}")))?;
        sys::lock_patiently(lock.as_fd()).map_err(|_| {
            fail("is mounted by cowfs already; unmount it first (cowfs umount)".into())
        })?;
        if rustix::fs::fstat(&lock)?.st_nlink == 0 {
            // The lock of one who was refused and has taken it away ([`Self::take_back`]): it is nobody's.
            return Err(fail(
                "was being mounted by somebody who was refused; try again".into(),
            ));
        }
        let retained = Self::hidden_dir(hidden.as_fd(), b"retained", path)?;
        let orphans = Self::hidden_dir(hidden.as_fd(), b"orphans", path)?;
        let by_handle = reach == Reach::AsPermitted && opens_by_handle(root.as_fd(), lock.as_fd())?;
        let places = (!by_handle).then(Places::default);
        let root_entry = EntryImage {
            ino: Ino(st.stx_ino),
            kind: kind_of_mode(u32::from(st.stx_mode)),
            handle: ObjectHandle {
                kind,
                bytes: bytes.into(),
            },
        };
        Ok(Self {
            path: path.to_path_buf(),
            root,
            _pin: pin,
            hidden,
            retained,
            orphans,
            _lock: lock,
            device: (st.stx_dev_major, st.stx_dev_minor),
            root_entry,
            paths: Mutex::new(LruCache::new(cached_paths())),
            places,
            keeps_atime,
            fills_ends: !LEAVE_ENDS.contains(&magic),
            read_ahead_above: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            links: AtomicU64::new(0),
            witness: None,
            faults: None,
        })
    }

    /// Opens, and makes if missing, a directory of the store: 0700, owned by who runs cowfs, no symlink.
    fn hidden_dir(parent: BorrowedFd<'_>, name: &[u8], path: &Path) -> Result<OwnedFd> {
        let fail = |why: String| Error::Source {
            path: path.to_path_buf(),
            why,
        };
        let shown = String::from_utf8_lossy(name).into_owned();
        match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(fail(format!("cannot make {shown}: {e}"))),
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(parent, name, flags, Mode::empty()).map_err(|e| match e {
            Errno::ACCESS => Error::Permission(format!(
                "{}: its {shown} belongs to another user, who alone can use it",
                path.display()
            )),
            e => fail(format!("cannot open {shown}: {e}")),
        })?;
        let st = rustix::fs::fstat(&fd)?;
        if st.st_uid != rustix::process::geteuid().as_raw() || st.st_mode & 0o077 != 0 {
            return Err(fail(format!(
                "{shown} belongs to another user or is open to others; it must be mode 0700 of the user that runs cowfs"
            )));
        }
        leave_project(fd.as_fd());
        Ok(fd)
    }

    /// Removes the hidden directory if there is nothing in it but what [`Self::open`] makes: who is refused finds nothing
    /// changed. What does not go stays, and is used at the next mount.
    pub fn take_back(&self) {
        let there = |name| statx(self.hidden.as_fd(), name).is_ok();
        if there(c"store-id") || there(c"store") {
            return;
        }
        let remove = |dir: &OwnedFd, name, flags| rustix::fs::unlinkat(dir, name, flags);
        let done = remove(&self.hidden, c"retained", AtFlags::REMOVEDIR)
            .and_then(|()| remove(&self.hidden, c"orphans", AtFlags::REMOVEDIR))
            .and_then(|()| remove(&self.hidden, c"lock", AtFlags::empty()))
            .and_then(|()| rustix::fs::unlinkat(&self.root, HIDDEN, AtFlags::REMOVEDIR));
        if let Err(errno) = done {
            log::debug!("what a refused mount has made stays: {errno}");
        }
    }

    /// The hidden directory's path through its descriptor, for the store beneath it.
    pub fn hidden_path(&self) -> PathBuf {
        sys::fd_path(&self.hidden)
    }

    /// An error of something beneath [`Self::hidden_path`], named by the path of the directory: that of a descriptor
    /// means nothing to whoever reads the message (C12).
    pub fn named(&self, error: Error) -> Error {
        error.named(
            &self.hidden_path(),
            &self.path.join(OsStr::from_bytes(HIDDEN)),
        )
    }

    /// The handle of the hidden directory.
    ///
    /// # Errors
    /// Those of name_to_handle_at(2).
    pub fn hidden_handle(&self) -> Result<ObjectHandle> {
        handle_of(self.hidden.as_fd())
    }

    /// When the hidden directory was made, if the filesystem tells.
    ///
    /// # Errors
    /// Those of statx(2).
    pub fn hidden_birth(&self) -> Result<Option<Timestamp>> {
        Ok(image(&statx(self.hidden.as_fd(), c"")?).btime)
    }

    /// Whether a handle is that of the hidden directory.
    ///
    /// # Errors
    /// As [`is_object`].
    pub fn is_hidden_dir(&self, handle: &ObjectHandle) -> Result<bool> {
        is_object(self.root.as_fd(), handle, self.hidden.as_fd())
    }

    /// Whether a handle is that of the directory itself.
    ///
    /// # Errors
    /// As [`is_object`].
    pub fn is_root(&self, handle: &ObjectHandle) -> Result<bool> {
        is_object(self.root.as_fd(), handle, self.root.as_fd())
    }

    /// The directory itself.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// The root directory.
    pub fn root_entry(&self) -> &EntryImage {
        &self.root_entry
    }

    /// The most bytes that the next system call may move.
    pub(super) fn before(&self, call: Call) -> Result<usize, Errno> {
        match self.faults.as_ref().and_then(|faults| faults(call)) {
            None => Ok(usize::MAX),
            Some(Failure::Short(bytes)) => Ok(bytes.max(1)),
            Some(Failure::Errno(errno)) => Err(errno),
        }
    }

    /// Tells the witness of a change that was made, or tried.
    fn made<T>(&self, value: T) -> T {
        self.tell(|| Change::Made);
        value
    }

    fn tell<'c>(&self, change: impl FnOnce() -> Change<'c>) {
        if let Some(witness) = &self.witness {
            witness(change());
        }
    }

    /// Makes all of the backing filesystem durable (syncfs(2)).
    pub fn sync_all(&self) -> Result<()> {
        self.note_lost(|| {
            self.before(Call::Sync)?;
            Ok(rustix::fs::syncfs(&self.root)?)
        })?;
        self.tell(|| Change::AllSynced);
        Ok(())
    }

    /// Notes that a sync has failed: the kernel tells of what it could not write once, to whoever asks first (errseq_t of
    /// include/linux/errseq.h).
    fn note_lost(&self, sync: impl FnOnce() -> Result<()>) -> Result<()> {
        let done = sync();
        if matches!(&done, Err(error) if error.errno() != Errno::INTR) {
            self.lost.store(true, Ordering::SeqCst);
        }
        done
    }

    /// Whether a sync has failed since the last call.
    pub fn take_lost(&self) -> bool {
        self.lost.swap(false, Ordering::SeqCst)
    }

    /// Makes durable which objects are among the retained.
    pub fn sync_retained(&self) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let retained = rustix::fs::openat(&self.retained, c".", flags, Mode::empty())?;
        self.sync(retained.as_fd(), false)
    }

    /// statvfs(3) of the backing filesystem.
    pub fn statvfs(&self) -> Result<rustix::fs::StatVfs> {
        Ok(rustix::fs::fstatvfs(&self.root)?)
    }
    // ---- reaching objects

    /// Opens an object by its handle. Never follows a symlink, never opens a device.
    pub fn open_object(&self, entry: &EntryImage, flags: OFlags) -> Result<OwnedFd> {
        self.before(Call::Open)?;
        let handle = &entry.handle;
        let nonblock = if flags.contains(OFlags::PATH) {
            OFlags::empty()
        } else {
            OFlags::NONBLOCK
        };
        let flags = flags | OFlags::NOFOLLOW | nonblock;
        match &self.places {
            None => Ok(sys::open_by_handle(
                self.root.as_fd(),
                handle.kind,
                &handle.bytes,
                flags,
            )?),
            Some(places) => self.open_in_place(places, entry, flags),
        }
    }

    /// Opens an object where it was last seen, and only that very object.
    fn open_in_place(&self, places: &Places, entry: &EntryImage, flags: OFlags) -> Result<OwnedFd> {
        let path = self.open_place(places, entry)?;
        if flags.contains(OFlags::PATH) {
            return Ok(path);
        }
        // Through the descriptor, so that it is the object that was checked.
        let through = sys::fd_path(&path);
        let flags = (flags - OFlags::NOFOLLOW) | OFlags::CLOEXEC;
        Ok(self.open_quietly(|more| rustix::fs::open(&through, flags | more, Mode::empty()))?)
    }

    /// Opens a file for writing, and for reading too, because pre-images are read from it. Who may only write to it
    /// gets a descriptor for that: no pre-image can be read then.
    pub fn open_writable(&self, entry: &EntryImage) -> Result<OwnedFd> {
        match self.open_object(entry, OFlags::RDWR) {
            Err(Error::Os(Errno::ACCESS)) if !self.overrides_modes() => {
                self.open_object(entry, OFlags::WRONLY)
            }
            other => other,
        }
    }

    /// Has every file that is opened for writing from now on read as it is asked for: the caller's requests are those of
    /// somebody who reads ahead.
    pub fn expect_read_ahead(&self) {
        self.read_ahead_above.store(true, Ordering::Relaxed);
    }

    /// Prepares a descriptor for a file that is read and written. Once read ahead is enough, and what the kernel reads ahead
    /// for cowfs comes in pages so large that it takes ext4 ten times as long to overwrite 4 KiB of one
    /// (docs/PERFORMANCE.md).
    pub(super) fn for_writer(&self, file: OwnedFd) -> OwnedFd {
        if self.read_ahead_above.load(Ordering::Relaxed)
            && let Err(errno) = fadvise(&file, 0, None, Advice::Random)
        {
            log::debug!("posix_fadvise: {errno}");
        }
        file
    }

    /// Whether cowfs may open what its user may not: true for root, not for an ordinary user, whom a mode
    /// without the owner's bits shuts out of an own file.
    pub fn overrides_modes(&self) -> bool {
        self.places.is_none()
    }

    /// Whether the filesystem may fill the block in which a file ends with zeros when the file grows past it.
    pub fn fills_ends(&self) -> bool {
        self.fills_ends
    }

    /// Whether reading through an ordinary descriptor leaves access times alone.
    pub fn keeps_atime(&self) -> bool {
        self.keeps_atime
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

    /// Opens the very object of an entry. While that is open, the object is not gone and no other one gets its number.
    ///
    /// # Errors
    /// `ESTALE` if it is gone, or if its number is not that of the entry.
    pub fn hold(&self, entry: &EntryImage) -> Result<OwnedFd> {
        let fd = self.open_object(entry, OFlags::PATH)?;
        if statx(fd.as_fd(), c"")?.stx_ino == entry.ino.0 {
            Ok(fd)
        } else {
            Err(Error::Stale)
        }
    }

    /// Forgets the cached descriptor of an object whose inode may be freed.
    pub fn drop_path(&self, ino: Ino) {
        self.paths.lock().remove(&ino);
    }

    /// What `name` in `dir` means. Something on another device (a btrfs subvolume) is not entered: `EXDEV`. A number that
    /// cannot be told from those of cowfs is refused: `EOVERFLOW`.
    pub fn find(&self, dir: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Found>> {
        self.before(Call::Find)?;
        if !self.keeps_atime {
            return Ok(self.enter_found(dir, name)?.map(|(found, _)| found));
        }
        let name = sys::c_string(name)?;
        let st = match statx(dir, &name) {
            Ok(st) => st,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let handle = || sys::name_to_handle(dir, &name);
        self.found(&st, handle).map(Some)
    }

    /// As [`Self::find`], with an `O_PATH` descriptor of it.
    pub fn find_and_hold(
        &self,
        dir: BorrowedFd<'_>,
        name: &[u8],
    ) -> Result<Option<(Found, OwnedFd)>> {
        self.before(Call::Find)?;
        self.enter_found(dir, name)
    }

    /// What is mounted on `name` is not entered, also without a private view of the mount.
    fn enter_found(&self, dir: BorrowedFd<'_>, name: &[u8]) -> Result<Option<(Found, OwnedFd)>> {
        let fd = match enter(dir, name) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        let handle = || sys::name_to_handle(fd.as_fd(), c"");
        let found = self.found(&statx(fd.as_fd(), c"")?, handle)?;
        Ok(Some((found, fd)))
    }

    /// As long as this number is the same, no object has got another number of links, but for changes under way.
    pub fn links(&self) -> u64 {
        self.links.load(Ordering::SeqCst)
    }

    /// To be called after a change of names, made or tried, of which somebody holds the locks of its objects still.
    fn relinked<T>(&self, value: T) -> T {
        self.links.fetch_add(1, Ordering::SeqCst);
        value
    }

    fn found(
        &self,
        st: &Statx,
        handle: impl FnOnce() -> Result<(i32, Vec<u8>), Errno>,
    ) -> Result<Found> {
        if (st.stx_dev_major, st.stx_dev_minor) != self.device {
            return Err(Errno::XDEV.into());
        }
        if st.stx_ino >= INO_MAX {
            return Err(Errno::OVERFLOW.into());
        }
        let (kind, bytes) = handle()?;
        let entry = EntryImage {
            ino: Ino(st.stx_ino),
            kind: kind_of_mode(u32::from(st.stx_mode)),
            handle: ObjectHandle {
                kind,
                bytes: bytes.into(),
            },
        };
        Ok(Found {
            entry,
            attr: image(st),
        })
    }
}

/// Has a directory hand no project down (ext4(5), xfs_quota(8)): one that does takes no name of an object of another
/// project, and what is removed anywhere in the tree is moved here.
fn leave_project(dir: BorrowedFd<'_>) {
    // Where there are no such flags there are no projects.
    let Ok(flags) = rustix::fs::ioctl_getflags(dir) else {
        return;
    };
    if flags.contains(IFlags::PROJECT_INHERIT)
        && let Err(errno) =
            rustix::fs::ioctl_setflags(dir, flags.difference(IFlags::PROJECT_INHERIT))
    {
        log::warn!("what is of another project than the directory cannot be removed: {errno}");
    }
}

/// Opens the directory once more through a private, non-recursive clone of its mount that leaves access times
/// alone (open_tree(2), mount_setattr(2)): what a snapshot shows never changes, and access times are part of it
/// (C2). Where that is not permitted, as to ordinary users, the directory itself, and false.
fn private_view(pin: &OwnedFd) -> Result<(OwnedFd, bool), Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let clone = open_tree(pin, c"", flags).and_then(|tree| {
        sys::mount_without_atime(tree.as_fd())?;
        Ok(tree)
    });
    let dir = OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY;
    match clone {
        Ok(tree) => Ok((rustix::fs::openat(&tree, c".", dir, Mode::empty())?, true)),
        Err(errno) => {
            log::info!("no private view of the directory ({errno}): O_NOATIME takes its place");
            Ok((rustix::fs::openat(pin, c".", dir, Mode::empty())?, false))
        }
    }
}

/// The handle of an open object.
///
/// # Errors
/// Those of name_to_handle_at(2).
pub fn handle_of(fd: BorrowedFd<'_>) -> Result<ObjectHandle> {
    let (kind, bytes) = sys::name_to_handle(fd, c"")?;
    let bytes = bytes.into();
    Ok(ObjectHandle { kind, bytes })
}

/// Whether a handle is that of the object `fd`, in the filesystem that `mount` is on. Of one object there can be several: how
/// xfs makes them depends on how it is mounted (`inode32`).
///
/// # Errors
/// Those of name_to_handle_at(2) and statx(2), and a lack of descriptors or memory.
pub fn is_object(mount: BorrowedFd<'_>, handle: &ObjectHandle, fd: BorrowedFd<'_>) -> Result<bool> {
    if *handle == handle_of(fd)? {
        return Ok(true);
    }
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let opened = match sys::open_by_handle(mount, handle.kind, &handle.bytes, flags) {
        Ok(opened) => opened,
        Err(errno @ (Errno::MFILE | Errno::NFILE | Errno::NOMEM)) => return Err(errno.into()),
        Err(_) => return Ok(false),
    };
    let (there, own) = (statx(opened.as_fd(), c"")?, statx(fd, c"")?);
    let of = |st: &Statx| (st.stx_dev_major, st.stx_dev_minor, st.stx_ino);
    Ok(of(&there) == of(&own))
}

/// Whether objects can be opened by handle (open_by_handle_at(2)), tried on a file: the root of a user namespace
/// may open directories so, but nothing else.
fn opens_by_handle(root: BorrowedFd<'_>, file: BorrowedFd<'_>) -> Result<bool> {
    let (kind, bytes) = sys::name_to_handle(file, c"")?;
    match sys::open_by_handle(root, kind, &bytes, OFlags::PATH) {
        Ok(_) => Ok(true),
        Err(Errno::PERM | Errno::ACCESS | Errno::STALE) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}
