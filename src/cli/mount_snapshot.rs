//! `cowfs mount -o snapshot=NAME`: a snapshot by itself, served by the daemon of the live mount.

use super::mount::{self, Args};
use super::{Failure, umount};
use crate::config::{MountConfig, MountOptions};
use crate::control::{self, MountOrder};
use crate::error::{Error, Result};
use crate::fuse;
use crate::mounts;
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::process::{PTracer, Pid, set_ptracer};
use std::ffi::OsStr;
use std::path::PathBuf;

/// What is to be mounted where, and who is to serve it.
pub(super) struct Plan {
    config: MountConfig,
    /// The snapshot's directory in the live mount.
    snapshot: PathBuf,
    daemon: u32,
}

/// Checks everything that can be told before the mount.
pub(super) fn prepare(args: &Args, options: MountOptions, name: &OsStr) -> Result<Plan> {
    if let Some(name) = options.of_live_mount() {
        return Err(Error::Usage(format!(
            "mount option {name:?} belongs to the mount of the live tree, not to that of a snapshot"
        )));
    }
    let path = args.mountpoint.as_deref().ok_or_else(|| {
        Error::Usage("a snapshot is mounted at a place of its own; name it after SOURCE".into())
    })?;
    if args.foreground || args.log.is_some() {
        return Err(Error::Usage(
            "-f and --log belong to the mount of the live tree, whose daemon serves its snapshots too".into(),
        ));
    }
    let not_mounted = |why: String| Error::Source {
        path: args.source.clone(),
        why,
    };
    let (live, status) = match control::find_live(&args.source) {
        Ok(Some(found)) => found,
        Ok(None) => {
            return Err(not_mounted(format!(
                "not mounted by cowfs; the daemon of the live mount serves its snapshots: `cowfs mount '{}'` first",
                args.source.display()
            )));
        }
        Err(Error::MountPoint { why, .. }) => return Err(not_mounted(why)),
        Err(error) => return Err(error),
    };
    let snapshot = live.join(&status.snapshot_dir).join(name);
    snapshot
        .symlink_metadata()
        .map_err(|error| match Errno::from_io_error(&error) {
            Some(Errno::NOENT) => Error::SnapshotMissing(control::lossy(name)),
            _ => Error::io("cannot look the snapshot up", &snapshot, &error),
        })?;
    let source = PathBuf::from(&status.source);
    let place = mount::check_mountpoint(path, &source)?;
    if place.starts_with(&source) || place.starts_with(&live) {
        return Err(Error::MountPoint {
            path: path.to_path_buf(),
            why: format!(
                "it is inside the live tree (at {}); choose a mount point outside",
                live.display()
            ),
        });
    }
    crate::fuse::check_may_mount()?;
    let root = rustix::process::geteuid().is_root();
    let mut config = MountConfig::new(source, place, options, root);
    config.read_only = true;
    Ok(Plan {
        config,
        snapshot,
        daemon: status.pid,
    })
}

/// Mounts, and returns when the mount is served. What fails leaves nothing mounted.
pub(super) fn run(plan: &Plan) -> std::result::Result<(), Failure> {
    let place = &plan.config.mountpoint;
    let device = fuse::attach(&plan.config)?;
    let served = hand_over(plan, &device);
    if served.is_err() {
        // It has no daemon, so nobody can be using it.
        if let Err(error) = umount::unmount(place, true) {
            super::output::complain(&error.to_string());
        }
    }
    served
}

fn hand_over(plan: &Plan, device: &OwnedFd) -> std::result::Result<(), Failure> {
    let place = &plan.config.mountpoint;
    let mounts = mounts::read()?;
    let mount = mounts::of(place, &mounts).filter(|mount| mount.mountpoint == *place);
    let mount = mount.ok_or_else(|| Error::MountPoint {
        path: place.clone(),
        why: "the mount has gone already".into(),
    })?;
    let order = MountOrder {
        fd: device.as_raw_fd(),
        device: mount.device.clone(),
    };
    if let Err(errno) = allow(plan.daemon) {
        log::debug!("prctl(PR_SET_PTRACER): {errno}");
    }
    let answer = control::order_mount(&plan.snapshot, &order).map_err(|error| match error {
        // Deleted since it was looked up.
        Error::Path {
            errno: Errno::NOENT | Errno::STALE,
            ..
        } => Error::SnapshotMissing(control::lossy(
            plan.snapshot.file_name().unwrap_or_default(),
        )),
        other => other,
    })?;
    if answer.code == 0 {
        return Ok(());
    }
    Err(Failure {
        code: answer.code,
        message: format!("{}: {}", place.display(), answer.message),
    })
}

/// Lets the daemon take a descriptor out of this process where only ancestors may (Yama's `ptrace_scope`);
/// elsewhere there is no such call (`EINVAL`).
fn allow(daemon: u32) -> std::result::Result<(), Errno> {
    let daemon = i32::try_from(daemon).ok().and_then(Pid::from_raw);
    daemon.map_or(Err(Errno::SRCH), |pid| set_ptracer(PTracer::ProcessID(pid)))
}
