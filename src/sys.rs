//! System calls that the safe wrappers of `rustix` do not have. The only module with `unsafe`.

use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::path::PathBuf;

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

/// Whether pages of an open file are dirty or being written back (cachestat(2)); true where the kernel cannot
/// tell.
pub fn has_unwritten_pages(fd: BorrowedFd<'_>) -> bool {
    /// Number of the call on every architecture.
    const SYS_CACHESTAT: libc::c_long = 451;
    // Offset and length: all of the file. Answer: pages cached, dirty, in writeback, evicted, lately evicted.
    let (range, mut stat) = ([0_u64; 2], [0_u64; 5]);
    // SAFETY: `range` and `stat` have the layouts of struct cachestat_range and struct cachestat.
    let done = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            fd.as_raw_fd(),
            std::ptr::from_ref(&range),
            std::ptr::from_mut(&mut stat),
            0,
        )
    };
    done < 0 || stat[1] > 0 || stat[2] > 0
}

/// Writes back all dirty pages of an open file and waits for them, without the inode's lock
/// (sync_file_range(2)).
///
/// # Errors
/// Those of the call; `EIO` if a page could not be written.
pub fn start_write_back(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: takes integers only.
    if unsafe { libc::sync_file_range(fd.as_raw_fd(), 0, 0, flags) } < 0 {
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

/// setfsuid(2) and setfsgid(2) of the calling thread; ids not permitted are silently kept, as there.
pub fn set_fs_ids(uid: u32, gid: u32) {
    // SAFETY: both calls take an integer and touch only the calling thread's credentials.
    unsafe {
        libc::syscall(libc::SYS_setfsgid, gid);
        libc::syscall(libc::SYS_setfsuid, uid);
    }
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
