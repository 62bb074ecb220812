//! Mounting and unmounting: mount(2) for those who may, the set-user-id helper of FUSE for the others.

use crate::config::{MountConfig, MountOptions};
use crate::error::{Error, Result};
use crate::mounts;
use crate::sys::{self, MAX_WRITE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags, major, minor};
use rustix::io::{Errno, FdFlags, IoSliceMut, fcntl_setfd};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
    recvmsg, socketpair,
};
use rustix::process::{getgid, getuid};
use rustix::thread::CapabilitySet;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Stdio};

const DEVICE: &str = "/dev/fuse";
/// The set-user-id helper of FUSE, and the variable that tells it the socket to answer on (fusermount3(1)).
const FUSERMOUNT: &str = "fusermount3";
const FUSERMOUNT_SOCKET: &str = "_FUSE_COMMFD";

/// Checks, before anything is touched, that this process will be able to mount.
///
/// # Errors
/// [`Error::Permission`] with the remedy.
pub fn check_may_mount() -> Result<()> {
    drop(open_device()?);
    if may_mount() || helper_found() {
        return Ok(());
    }
    Err(Error::Permission(format!(
        "not permitted to mount; be root (in a container: --cap-add SYS_ADMIN), or install {FUSERMOUNT} (package fuse3)"
    )))
}

/// Whether mount(2) is for this process: root, also that of a user namespace with a mount namespace of its own.
fn may_mount() -> bool {
    rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_ADMIN))
}

fn helper_found() -> bool {
    Command::new(FUSERMOUNT)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .is_ok_and(|output| output.status.success())
}

/// Mounts as `config` says; returns the descriptor of `/dev/fuse` on which the requests come. Nobody answers them
/// yet.
///
/// # Errors
/// What stands in the way of the mount (C12).
pub fn attach(config: &MountConfig) -> Result<OwnedFd> {
    if may_mount() {
        let device = open_device()?;
        mount_device(config, &device)?;
        Ok(device)
    } else {
        mount_by_helper(config)
    }
}

/// How far the kernel reads ahead on a mount: two requests, so that the disk is not idle between one and the next.
const READ_AHEAD: u32 = 2 * MAX_WRITE;

/// The number of the cowfs filesystem that is mounted there, as the mount table writes it.
pub fn device_of(mountpoint: &Path) -> Option<String> {
    let mounts = mounts::read().unwrap_or_default();
    let ours = mounts.into_iter().rfind(|m| m.mountpoint == mountpoint);
    let device = ours.filter(|m| m.is_cowfs()).map(|m| m.device);
    if device.is_none() {
        log::debug!("{} is not in the mount table", mountpoint.display());
    }
    device
}

/// Whether the kernel still has requests for a device: not after its mount has been unmounted, by all who had it, or aborted
/// (`fuse_dev_poll` of fs/fuse/dev.c).
pub fn is_connected(device: BorrowedFd<'_>) -> bool {
    let mut asked = [PollFd::from_borrowed_fd(device, PollFlags::IN)];
    let now = Timespec::default();
    !matches!(poll(&mut asked, Some(&now)), Ok(1..) if asked[0].revents().contains(PollFlags::ERR))
}

/// Lets the kernel read far ahead on the mount with this number of a device, once it has agreed on the protocol. By default it
/// reads 128 KiB ahead on a FUSE mount, which makes eight requests of one (Documentation/ABI/testing/sysfs-class-bdi of the
/// kernel). False where that is not permitted: reading is slower, and nothing else.
pub(super) fn read_far_ahead(device: &str) -> bool {
    let limit = format!("/sys/class/bdi/{device}/read_ahead_kb");
    let set = std::fs::write(&limit, (READ_AHEAD >> 10).to_string());
    if let Err(error) = &set {
        log::debug!("{limit}: {error}");
    }
    set.is_ok()
}

/// Unmounts the filesystem that has the number `device`, if it is what is mounted there: it disappears from the tree at once and
/// ends with its last user. Somebody else may have unmounted it, and what lies beneath is not ours.
pub fn detach(mountpoint: &Path, device: Option<&str>) {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = match rustix::fs::open(mountpoint, flags, Mode::empty()) {
        // A directory above it was renamed.
        Err(Errno::NOENT) => device
            .and_then(mounts::place_of)
            .ok_or(Errno::NOENT)
            .and_then(|place| rustix::fs::open(place, flags, Mode::empty())),
        opened => opened,
    };
    let done = opened.and_then(|root| {
        let there = sys::device(root.as_fd())?;
        if device != Some(format!("{}:{}", major(there), minor(there)).as_str()) {
            return Err(Errno::INVAL);
        }
        // Not by the path, which may mean something else by now.
        unmount(sys::fd_path(&root), UnmountFlags::DETACH)
    });
    match done {
        Ok(()) => {}
        Err(Errno::INVAL) => log::info!("{}: not mounted any more", mountpoint.display()),
        Err(Errno::PERM) => detach_by_helper(mountpoint),
        Err(errno) => log::warn!("{}: cannot unmount: {errno}", mountpoint.display()),
    }
}

fn detach_by_helper(mountpoint: &Path) {
    let run = Command::new(FUSERMOUNT)
        .args(["-u", "-z", "--"])
        .arg(mountpoint)
        .stdin(Stdio::null())
        .output();
    let why = match run {
        Ok(output) if output.status.success() => return,
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => error.to_string(),
    };
    log::warn!("{}: cannot unmount: {why}", mountpoint.display());
}

fn open_device() -> Result<OwnedFd> {
    rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
        Error::Permission(match errno {
            Errno::NOENT | Errno::NODEV | Errno::NXIO => format!(
                "{DEVICE} is missing: load the fuse module (modprobe fuse), or give the container the device (--device {DEVICE})"
            ),
            Errno::ACCESS | Errno::PERM => format!(
                "{DEVICE}: not permitted to open it; be root, or let the user open the device (in a container: --device {DEVICE})"
            ),
            other => format!("{DEVICE}: {other}"),
        })
    })
}

/// mount(2) with the type `fuse.cowfs`, which the mount table then shows (mount(2), the kernel's
/// Documentation/filesystems/fuse.rst for the options).
fn mount_device(config: &MountConfig, device: &OwnedFd) -> Result<()> {
    let mut data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions",
        device.as_raw_fd(),
        getuid().as_raw(),
        getgid().as_raw()
    );
    if config.allow_other {
        data.push_str(",allow_other");
    }
    let flags = flags([
        config.read_only,
        config.nosuid,
        config.nodev,
        config.noexec,
        config.noatime,
    ]);
    let data = crate::sys::c_string(data.as_bytes())?;
    mount(
        config.fsname.as_os_str(),
        &config.mountpoint,
        "fuse.cowfs",
        flags,
        Some(data.as_c_str()),
    )
    .map_err(|errno| match errno {
        Errno::PERM | Errno::ACCESS => Error::Permission(format!(
            "{}: not permitted to mount here; run cowfs as root",
            config.mountpoint.display()
        )),
        other => refused(config, &other.to_string()),
    })
}

/// The flags of mount(2) for `ro`, `nosuid`, `nodev`, `noexec` and `noatime`.
fn flags(wanted: [bool; 5]) -> MountFlags {
    let known = [
        MountFlags::RDONLY,
        MountFlags::NOSUID,
        MountFlags::NODEV,
        MountFlags::NOEXEC,
        MountFlags::NOATIME,
    ];
    let mut flags = MountFlags::empty();
    for (flag, wanted) in known.into_iter().zip(wanted) {
        flags.set(flag, wanted);
    }
    flags
}

/// Gives the cowfs mount at `mountpoint` the flags of `options`. The kernel keeps them; the daemon has no part in it.
///
/// # Errors
/// [`Error::MountPoint`], as when files are open for writing that are to become read-only.
pub fn remount(mountpoint: &Path, options: &MountOptions) -> Result<()> {
    let flags = flags([
        options.read_only,
        options.nosuid,
        options.nodev,
        options.noexec,
        options.noatime,
    ]);
    mount_remount(mountpoint, flags, c"").map_err(|errno| match errno {
        Errno::PERM | Errno::ACCESS => Error::Permission(format!(
            "{}: not permitted to remount; run cowfs as root",
            mountpoint.display()
        )),
        Errno::BUSY => Error::MountPoint {
            path: mountpoint.to_path_buf(),
            why: "in use: files are open for writing; close them to remount it read-only".into(),
        },
        other => Error::MountPoint {
            path: mountpoint.to_path_buf(),
            why: format!("cannot remount: {other}"),
        },
    })
}

fn refused(config: &MountConfig, why: &str) -> Error {
    Error::MountPoint {
        path: config.mountpoint.clone(),
        why: format!("cannot mount here: {why}"),
    }
}

/// Has fusermount3(1) mount, which opens the device and sends the descriptor over a socket.
fn mount_by_helper(config: &MountConfig) -> Result<OwnedFd> {
    let failed = |e: std::io::Error| Error::io("cannot run", FUSERMOUNT, &e);
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    fcntl_setfd(&theirs, FdFlags::empty())?;
    let child = Command::new(FUSERMOUNT)
        .arg("-o")
        .arg(helper_options(config))
        .arg("--")
        .arg(&config.mountpoint)
        .env(FUSERMOUNT_SOCKET, theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    drop(theirs);
    let device = receive_descriptor(&ours);
    let output = child.wait_with_output().map_err(failed)?;
    match device? {
        Some(device) if output.status.success() => Ok(device),
        _ => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(refused(config, &said))
        }
    }
}

/// The `-o` argument of fusermount3(1). It takes commas and backslashes in a value with a backslash before.
fn helper_options(config: &MountConfig) -> std::ffi::OsString {
    let mut options = String::from("subtype=cowfs,default_permissions");
    for (wanted, name) in [
        (config.allow_other, "allow_other"),
        (config.read_only, "ro"),
        (config.nosuid, "nosuid"),
        (config.nodev, "nodev"),
        (config.noexec, "noexec"),
        (config.noatime, "noatime"),
    ] {
        if wanted {
            options.push(',');
            options.push_str(name);
        }
    }
    let mut options = options.into_bytes();
    options.extend_from_slice(b",fsname=");
    for &byte in config.fsname.as_bytes() {
        if matches!(byte, b',' | b'\\') {
            options.push(b'\\');
        }
        options.push(byte);
    }
    std::os::unix::ffi::OsStringExt::from_vec(options)
}

/// Receives a descriptor (unix(7), `SCM_RIGHTS`); `None` if the other end closed without sending one.
fn receive_descriptor(socket: &OwnedFd) -> Result<Option<OwnedFd>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut buffer = RecvAncillaryBuffer::new(&mut space);
    loop {
        let mut into = [IoSliceMut::new(&mut byte)];
        match recvmsg(socket, &mut into, &mut buffer, RecvFlags::CMSG_CLOEXEC) {
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    let received = buffer.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(received)
}
