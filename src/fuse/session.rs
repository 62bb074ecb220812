//! A mount from beginning to end.

use super::Adapter;
use super::flush::FlushHelper;
use crate::config::MountConfig;
use crate::engine::{Engine, EngineOptions};
use crate::error::{Error, Result};
use crate::sync::Arc;
use fuser::{Config, Session, SessionACL};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Resource, Rlimit, getgid, getrlimit, getuid, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::path::Path;

/// Threads that take requests from the kernel. More than one, so that a read from a cold disk does not hold
/// up everybody else.
const REQUEST_THREADS: usize = 4;
const DEVICE: &str = "/dev/fuse";

/// Mounts as `config` says, calls `ready` once the mount answers requests, and returns when it has been
/// unmounted (umount(8), SIGTERM or SIGINT) and the store is closed.
///
/// # Errors
/// What stands in the way of the mount (C12); a failure of the last writes of the store.
pub fn serve(config: MountConfig, ready: impl FnOnce() + Send) -> Result<()> {
    raise_file_limit();
    let device = open_device()?;
    let engine = Engine::open(
        &config.source,
        EngineOptions {
            store: config.store.clone(),
            durability: config.durability,
            upkeep: Some(config.sync_interval),
            snapshot_dir: config.snapshot_dir.clone(),
            tuning: crate::store::StoreOptions::default(),
        },
    )?;
    // Before the signals can come, so that one during the mount still unmounts.
    let signals = Signals::new([SIGTERM, SIGINT, SIGHUP])
        .map_err(|e| Error::io("cannot listen for signals", &config.mountpoint, &e))?;
    mount_device(&config, &device)?;
    let served = run(&config, device, engine.clone(), signals, ready);
    if served.is_err() {
        detach(&config.mountpoint);
    }
    engine.set_flusher(None);
    let closed = engine.close();
    served.and(closed)
}

fn run(
    config: &MountConfig,
    device: OwnedFd,
    engine: Arc<Engine>,
    mut signals: Signals,
    ready: impl FnOnce() + Send,
) -> Result<()> {
    let failed = |e: std::io::Error| Error::io("the FUSE session failed", &config.mountpoint, &e);
    let helper = FlushHelper::start(&config.mountpoint)?;
    let helper_pid = helper.pid();
    engine.set_flusher(Some(Box::new(move |nodes| helper.flush(nodes))));
    let mut options = Config::default();
    options.n_threads = Some(REQUEST_THREADS);
    options.acl = if config.allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    let adapter = Adapter::new(engine, config.clone(), helper_pid)?;
    let session = Session::from_fd(adapter, device, options.acl, options).map_err(failed)?;
    let stop = signals.handle();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for signal in signals.forever() {
                log::info!(
                    "signal {signal}: unmounting {}",
                    config.mountpoint.display()
                );
                detach(&config.mountpoint);
            }
        });
        let running = scope.spawn(|| session.run().map_err(failed));
        ready();
        let done = running
            .join()
            .unwrap_or_else(|_| Err(failed(std::io::Error::other("panicked"))));
        stop.close();
        done
    })
}

/// Each file that a user has open costs the daemon a descriptor, so it takes as many as it is allowed.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(errno) = setrlimit(Resource::Nofile, most) {
        log::warn!("cannot raise the limit of open files: {errno}");
    }
}

fn open_device() -> Result<OwnedFd> {
    rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
        Error::Permission(match errno {
            Errno::NOENT | Errno::NODEV | Errno::NXIO => {
                format!("{DEVICE} is missing: load the fuse module (modprobe fuse), or give the container the device")
            }
            Errno::ACCESS | Errno::PERM => {
                format!("{DEVICE}: permission denied: run cowfs as root, or let the user open the device")
            }
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
    let mut flags = MountFlags::empty();
    for (wanted, flag) in [
        (config.read_only, MountFlags::RDONLY),
        (config.nosuid, MountFlags::NOSUID),
        (config.nodev, MountFlags::NODEV),
        (config.noexec, MountFlags::NOEXEC),
        (config.noatime, MountFlags::NOATIME),
    ] {
        flags.set(flag, wanted);
    }
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
        other => Error::MountPoint {
            path: config.mountpoint.clone(),
            why: format!("cannot mount here: {other}"),
        },
    })
}

/// Unmounts; a mount in use disappears from the tree at once and ends with its last user.
fn detach(mountpoint: &Path) {
    let done = match unmount(mountpoint, UnmountFlags::empty()) {
        Err(Errno::BUSY) => unmount(mountpoint, UnmountFlags::DETACH),
        other => other,
    };
    if let Err(errno) = done {
        log::warn!("{}: cannot unmount: {errno}", mountpoint.display());
    }
}
