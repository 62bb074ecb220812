//! System calls that the safe wrappers of `rustix` do not have. The only module with `unsafe`.

use crate::sync::{AtomicU64, Ordering};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::fs::makedev;
use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, OFlags, SealFlags, StatVfs, StatxFlags};
use rustix::io::Errno;
use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::{CStr, CString};
use std::path::PathBuf;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

/// `MAX_HANDLE_SZ` of name_to_handle_at(2): no filesystem makes a longer handle.
const MAX_HANDLE: usize = 128;

#[repr(C)]
struct FileHandle {
    bytes: libc::c_uint,
    kind: libc::c_int,
    data: [u8; MAX_HANDLE],
}

/// The last error of the C library as an [`Errno`].
fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// name_to_handle_at(2) of `name` in `dir`, not following a symbolic link; of `dir` itself when empty.
///
/// # Errors
/// Those of the call; `EOPNOTSUPP` where the filesystem has no handles.
pub fn name_to_handle(dir: BorrowedFd<'_>, name: &CStr) -> Result<(i32, Vec<u8>), Errno> {
    let mut handle = FileHandle {
        bytes: MAX_HANDLE as u32,
        kind: 0,
        data: [0; MAX_HANDLE],
    };
    let mut mount_id: libc::c_int = 0;
    // SAFETY: `name` ends in NUL; `handle` has the layout of struct file_handle with room for the
    // `bytes` that it declares; `mount_id` is a valid place for an int.
    let done = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            dir.as_raw_fd(),
            name.as_ptr(),
            std::ptr::from_mut(&mut handle),
            std::ptr::from_mut(&mut mount_id),
            libc::AT_EMPTY_PATH,
        )
    };
    if done < 0 {
        return Err(last_errno());
    }
    let len = (handle.bytes as usize).min(MAX_HANDLE);
    Ok((handle.kind, handle.data[..len].to_vec()))
}

/// open_by_handle_at(2): opens the object that `bytes` name on the filesystem of `mount`.
///
/// # Errors
/// `ESTALE` when the object is gone; `EINVAL` for a handle that no filesystem makes.
pub fn open_by_handle(
    mount: BorrowedFd<'_>,
    kind: i32,
    bytes: &[u8],
    flags: OFlags,
) -> Result<OwnedFd, Errno> {
    if bytes.len() > MAX_HANDLE {
        return Err(Errno::INVAL);
    }
    let mut handle = FileHandle {
        bytes: bytes.len() as u32,
        kind,
        data: [0; MAX_HANDLE],
    };
    handle.data[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: `handle` has the layout of struct file_handle and holds `bytes` valid bytes; the kernel
    // only reads it.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_raw_fd(),
            std::ptr::from_ref(&handle),
            (flags | OFlags::CLOEXEC).bits() as libc::c_int,
        )
    };
    if fd < 0 {
        return Err(last_errno());
    }
    // SAFETY: the call succeeded, so `fd` is a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

/// Bytes that a filesystem has free for users other than root, from statvfs(3). [`BOUNDLESS`] where it gives no size, as a
/// tmpfs without a limit and some FUSE filesystems do.
#[must_use]
pub fn free_bytes(disk: &StatVfs) -> u64 {
    match disk.f_blocks {
        0 => BOUNDLESS,
        _ => disk.f_bavail.saturating_mul(disk.f_frsize),
    }
}

/// More than any filesystem has.
pub const BOUNDLESS: u64 = i64::MAX as u64;

/// Has the dirty pages of `len` bytes of an open file (0: to its end) written back, without the inode's lock, and waits for
/// none (sync_file_range(2)).
///
/// # Errors
/// Those of the call.
pub fn begin_write_back(fd: BorrowedFd<'_>, from: u64, len: u64) -> Result<(), Errno> {
    sync_file_range(fd, from, len, libc::SYNC_FILE_RANGE_WRITE)
}

/// Writes back the dirty pages of `len` bytes of an open file (0: to its end) and waits for them, without the inode's lock
/// (sync_file_range(2)).
///
/// # Errors
/// Those of the call; `EIO` if a page could not be written.
pub fn write_back(fd: BorrowedFd<'_>, from: u64, len: u64) -> Result<(), Errno> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    sync_file_range(fd, from, len, flags)
}

fn sync_file_range(
    fd: BorrowedFd<'_>,
    from: u64,
    len: u64,
    flags: libc::c_uint,
) -> Result<(), Errno> {
    let (from, len) = (from as libc::off64_t, len as libc::off64_t);
    // SAFETY: takes integers only.
    if unsafe { libc::sync_file_range(fd.as_raw_fd(), from, len, flags) } < 0 {
        return Err(last_errno());
    }
    Ok(())
}

/// Makes a detached mount leave access times alone (mount_setattr(2), Linux 5.12).
///
/// # Errors
/// Those of the call; `ENOSYS` before Linux 5.12.
pub fn mount_without_atime(mount: BorrowedFd<'_>) -> Result<(), Errno> {
    let attr = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_NOATIME,
        // Times are one field of several bits: it is cleared whole before a bit is set.
        attr_clr: libc::MOUNT_ATTR__ATIME,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the path is an empty C string; `attr` is a struct mount_attr and its size goes with it.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            std::ptr::from_ref(&attr),
            size_of::<libc::mount_attr>(),
        )
    };
    if done < 0 { Err(last_errno()) } else { Ok(()) }
}

/// Gives the calling thread a umask and working directory of its own (unshare(2), `CLONE_FS`).
///
/// # Errors
/// Those of the call.
pub fn unshare_fs() -> Result<(), Errno> {
    // SAFETY: CLONE_FS touches only the calling thread's umask, root and working directory.
    if unsafe { libc::unshare(libc::CLONE_FS) } < 0 {
        Err(last_errno())
    } else {
        Ok(())
    }
}

/// How long to wait for the locks of a daemon whose mount is gone and that is writing its store.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// flock(2), exclusive, that waits a moment and no longer (`EWOULDBLOCK`): umount(2) returns before the daemon has
/// ended, so a mount right after it meets the locks of the last one.
pub fn lock_patiently(file: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let start = Instant::now();
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) if start.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(Duration::from_millis(5));
            }
            done => return done,
        }
    }
}

/// Sets for how long the calling thread, and those that it starts, run at a time while others want the processor
/// (sched_setattr(2), `sched_runtime` of SCHED_OTHER; 0.1 to 100 ms). Its share stays the same: who takes short turns gets
/// them sooner. Linux before 6.12 knows no such thing and changes nothing.
///
/// # Errors
/// Those of the call.
pub fn set_slice(slice: Duration) -> Result<(), Errno> {
    let attr = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: 0,
        sched_flags: libc::SCHED_FLAG_KEEP_POLICY as u64,
        sched_nice: rustix::process::getpriority_process(None)?,
        sched_priority: 0,
        sched_runtime: slice.as_nanos() as u64,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: `attr` is a whole sched_attr of the size that it names and outlives the call, which touches only how the
    // calling thread is scheduled.
    let done = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, std::ptr::from_ref(&attr), 0) };
    if done < 0 { Err(last_errno()) } else { Ok(()) }
}

/// setfsuid(2) and setfsgid(2) of the calling thread; ids not permitted are silently kept, as there.
pub fn set_fs_ids(uid: u32, gid: u32) {
    // SAFETY: both calls take an integer and touch only the calling thread's credentials.
    unsafe {
        libc::syscall(libc::SYS_setfsgid, gid);
        libc::syscall(libc::SYS_setfsuid, uid);
    }
}

/// The most that one request writes, in bytes, also the kernel's default limit (`fs.fuse.max_pages_limit`).
pub const MAX_WRITE: u32 = 1 << 20;
/// Bytes at the beginning of a buffer for requests that a request can fill: the longest write and its headers.
const REQUEST: usize = MAX_WRITE as usize + (8 << 10);
/// The only zeroed allocations of this size and more are fuser's buffers for requests.
const REQUEST_BUFFER: usize = 16 << 20;

/// The system's allocator, save that the memory of a buffer for requests is there from the beginning, and stays.
///
/// A request is lost if its reader is killed while the kernel waits for memory to copy it to: it is in no queue any
/// more from which it could be sent again (`fuse_dev_do_read` of the kernel's fs/fuse/dev.c), and ends with EIO. A
/// buffer whose pages are there needs no wait, so that the death of a server costs no request (C7).
pub struct RequestBuffersStay;

// SAFETY: every call is handed on to the system's allocator as it came; what is done besides concerns the pages of a
// block that it has just given, and does not touch their content.
unsafe impl GlobalAlloc for RequestBuffersStay {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller has promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as the caller has promised.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller has promised.
        let block = unsafe { System.alloc_zeroed(layout) };
        if layout.size() >= REQUEST_BUFFER && !block.is_null() {
            // SAFETY: the range lies in the block. mlock(2) takes it from the beginning of its first page; a user who
            // may not lock that much has the pages at least made.
            unsafe {
                if libc::mlock(block.cast(), REQUEST) < 0 {
                    let page = libc::sysconf(libc::_SC_PAGESIZE) as usize;
                    let start = block.map_addr(|address| address & !(page - 1));
                    libc::madvise(start.cast(), REQUEST, libc::MADV_POPULATE_WRITE);
                }
            }
        }
        block
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as the caller has promised.
        unsafe { System.realloc(block, layout, size) }
    }
}

/// A part of a memory file (memfd_create(2)) in the memory of this process: words that other holders of the file see,
/// each written in one piece.
pub struct SharedWords {
    first: NonNull<AtomicU64>,
    count: usize,
}

// SAFETY: the words are atomic, and the mapping is this value's alone and stays where it is until it is dropped.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Maps `count` words of `file` from the byte `offset` on, a multiple of the page size, and makes room for them
    /// in the file. The file can never be cut short after that: what is mapped stays.
    ///
    /// # Errors
    /// Those of fallocate(2), of mmap(2), and of sealing the file (memfd_create(2)); `EINVAL` for no words.
    pub fn map(file: BorrowedFd<'_>, offset: u64, count: usize) -> Result<Self, Errno> {
        let bytes = count * size_of::<u64>();
        rustix::fs::fcntl_add_seals(file, SealFlags::SHRINK)?;
        rustix::fs::fallocate(file, FallocateFlags::empty(), offset, bytes as u64)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                protection,
                flags,
                file.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(last_errno());
        }
        let first = NonNull::new(address.cast()).ok_or(Errno::FAULT)?;
        Ok(Self { first, count })
    }

    /// Writes word number `at`, after all that this thread wrote before.
    ///
    /// # Panics
    /// If there is no such word.
    pub fn store(&self, at: usize, word: u64) {
        assert!(at < self.count);
        // SAFETY: the word lies in the mapping, which is aligned to pages and backed by the file, as that has room
        // for it and does not shrink. All access from here is atomic; other processes are not bound by that, but
        // nobody writes what another process writes at the same time, and nothing is read through the mapping.
        let place = unsafe { self.first.add(at).as_ref() };
        place.store(word, Ordering::Release);
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and nothing borrows from it any more.
        unsafe {
            libc::munmap(self.first.as_ptr().cast(), self.count * size_of::<u64>());
        }
    }
}

/// Gives memory that was freed back to the system (malloc_trim(3)), where the C library holds it back.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes an integer and touches only what the allocator has free.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Takes up a descriptor that this process inherited, by its number; it is not handed on to other programs.
///
/// # Errors
/// `EBADF` if there is none; `EINVAL` for the standard streams, which belong to the standard library.
pub fn inherited(number: i32) -> Result<OwnedFd, Errno> {
    if number <= libc::STDERR_FILENO {
        return Err(Errno::INVAL);
    }
    // SAFETY: takes integers only.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(last_errno());
    }
    // SAFETY: the descriptor is open, as the call before shows, and came with the start of the program, of which
    // whoever calls this knows the numbers; nothing else in the process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Makes `place`, an open descriptor, refer to what `from` refers to, under the same number (dup3(2)). Its owner goes
/// on to own it.
///
/// # Errors
/// Those of the call.
pub fn replace_descriptor(place: BorrowedFd<'_>, from: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: both numbers are open descriptors; that of `place` stays open and its owner's to close.
    let done = unsafe { libc::dup3(from.as_raw_fd(), place.as_raw_fd(), libc::O_CLOEXEC) };
    if done < 0 { Err(last_errno()) } else { Ok(()) }
}

/// The number of the filesystem that an open descriptor is on. A FUSE filesystem is not asked (statx(2), `AT_STATX_DONT_SYNC`).
///
/// # Errors
/// Those of the call.
pub fn device(fd: BorrowedFd<'_>) -> Result<u64, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let what = rustix::fs::statx(fd, c"", flags, StatxFlags::TYPE)?;
    Ok(makedev(what.stx_dev_major, what.stx_dev_minor))
}

/// The number of a btrfs (`BTRFS_IOC_FS_INFO` of linux/btrfs.h).
///
/// # Errors
/// Those of the call; `ENOTTY` on another filesystem.
pub fn btrfs_id(fd: BorrowedFd<'_>) -> Result<u128, Errno> {
    const FS_INFO: libc::c_ulong = 0x8400_941f;
    /// `fsid` in `struct btrfs_ioctl_fs_info_args`, after two numbers of 8 bytes.
    const FSID: usize = 16;
    let mut info = [0_u64; 1024 / 8];
    // SAFETY: the request writes the 1024 bytes of its argument, which is as long and aligned to 8 bytes, as its
    // structure asks, and keeps nothing of it.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), FS_INFO as _, info.as_mut_ptr()) };
    if done < 0 {
        return Err(last_errno());
    }
    // Bytes, the first of which stands first.
    let [high, low] =
        [info[FSID / 8], info[FSID / 8 + 1]].map(|half| u64::from_be_bytes(half.to_ne_bytes()));
    Ok(u128::from(high) << 64 | u128::from(low))
}

/// The path under which the kernel offers an open descriptor, for calls that take no descriptor or refuse
/// one opened with `O_PATH` (proc(5), `/proc/self/fd`).
pub fn fd_path(fd: impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

/// `bytes` as a C string.
///
/// # Errors
/// `EINVAL` if they hold a NUL.
pub fn c_string(bytes: &[u8]) -> Result<CString, Errno> {
    CString::new(bytes).map_err(|_| Errno::INVAL)
}
