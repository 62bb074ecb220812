//! Snapshots that are mounted by themselves: how a mount of one comes to the daemon, and how it ends.
//!
//! The process that asks for one (`cowfs mount -o snapshot=`) opens the device and mounts, so that the mount is in
//! its mount namespace. Then it asks the daemon through the live mount ([`MountOrder`]), and the daemon takes the
//! descriptor out of it (pidfd_getfd(2)) and serves it beside the live mount, on the same engine.

use super::REQUEST_THREADS;
use super::attach::{detach, read_far_ahead};
use super::dropbehind::Dropper;
use super::idle::Polling;
use super::pool::Pool;
use super::snapshot::SnapshotAdapter;
use crate::config::MountConfig;
use crate::control::{self, MountAnswer, MountOrder, SnapshotMount};
use crate::engine::Engine;
use crate::engine::alone::AloneView;
use crate::error::{Error, Result};
use crate::ids::Epoch;
use crate::mounts::{self, MountEntry};
use crate::sync::{Arc, Mutex, Weak};
use fuser::{Config, Request, Session, SessionACL};
use rustix::fd::OwnedFd;
use rustix::fs::{FileType, makedev};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, geteuid, pidfd_getfd, pidfd_open};
use std::path::PathBuf;
use std::thread::JoinHandle;

/// Major and minor number of `/dev/fuse` (Documentation/admin-guide/devices.txt of the kernel).
const FUSE_DEVICE: (u32, u32) = (10, 229);

/// The snapshots that one daemon serves to mounts of their own, and what those share with the live mount.
pub(super) struct SnapshotMounts {
    pub(super) engine: Arc<Engine>,
    /// Of the live mount.
    pub(super) config: MountConfig,
    /// What idle processors are made to do while requests come to any of the mounts.
    pub(super) polling: Option<Arc<Polling>>,
    /// Drops from the caches of all of them what readers have passed.
    pub(super) dropper: Option<Arc<Dropper>>,
    /// Threads for requests that may have to wait for a disk.
    pub(super) waiting: Arc<Pool>,
    /// How many servers the live mount had before this one.
    pub(super) served: u32,
    mounted: Mutex<Vec<Mounted>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Mounted {
    snapshot: Epoch,
    /// The number of the mounted filesystem, as the mount table writes it.
    device: String,
    view: Weak<AloneView>,
}

impl Mounted {
    /// Where it is mounted, as far as this process can see.
    fn places(&self) -> Vec<PathBuf> {
        places_of(&self.device)
    }
}

/// Where a device number is mounted, as far as this process can see.
fn places_of(device: &str) -> Vec<PathBuf> {
    let mounts = mounts::read().unwrap_or_else(|error| {
        log::warn!("{error}");
        Vec::new()
    });
    let ours = |mount: &MountEntry| mount.is_cowfs() && mount.device == device;
    let ours = mounts.into_iter().filter(ours);
    ours.map(|mount| mount.mountpoint).collect()
}

impl SnapshotMounts {
    pub(super) fn new(
        engine: Arc<Engine>,
        config: MountConfig,
        dropper: Option<Dropper>,
        waiting: Arc<Pool>,
        served: u32,
    ) -> Arc<Self> {
        Arc::new(Self {
            engine,
            polling: Polling::find(config.idle).map(Arc::new),
            config,
            dropper: dropper.map(Arc::new),
            waiting,
            served,
            mounted: Mutex::default(),
            threads: Mutex::default(),
        })
    }

    /// Takes the device of the process that asks, answers, and serves snapshot `epoch` until that is unmounted;
    /// all in a thread of its own.
    pub(super) fn serve(
        self: &Arc<Self>,
        req: &Request,
        epoch: Epoch,
        order: MountOrder,
        reply: impl FnOnce(MountAnswer) + Send + 'static,
    ) {
        let (uid, pid, mounts) = (req.uid(), req.pid(), self.clone());
        let work = move || match mounts.begin(uid, pid, epoch, &order) {
            Err(error) => reply(MountAnswer::refused(&error)),
            Ok(session) => {
                reply(MountAnswer::default());
                if let Err(error) = session.run() {
                    log::warn!("the mount of a snapshot ended: {error}");
                }
                mounts.forget_ended();
            }
        };
        let started = std::thread::Builder::new()
            .name("cowfs-snapshot".into())
            .spawn(work);
        match started {
            Ok(thread) => {
                let mut threads = self.threads.lock();
                threads.retain(|thread| !thread.is_finished());
                threads.push(thread);
            }
            // The request's reply is dropped with the closure, which answers it with an error.
            Err(error) => log::error!("cannot start a thread for a snapshot: {error}"),
        }
    }

    /// Takes the device and answers the kernel's first request on it; after that the mount is usable.
    fn begin(
        self: &Arc<Self>,
        uid: u32,
        pid: u32,
        epoch: Epoch,
        order: &MountOrder,
    ) -> Result<Session<SnapshotAdapter>> {
        if uid != 0 && uid != geteuid().as_raw() {
            return Err(Error::Permission(
                "only root and the user whose daemon it is mount a snapshot".into(),
            ));
        }
        let view = Arc::new(self.engine.view_alone(epoch)?);
        let device = take_device(pid, order.fd)?;
        let mounted = Mounted {
            snapshot: epoch,
            device: order.device.clone(),
            view: Arc::downgrade(&view),
        };
        let adapter = SnapshotAdapter::new(self.clone(), view);
        let reader = adapter.reader();
        let mut options = Config::default();
        options.n_threads = Some(REQUEST_THREADS);
        // The kernel keeps those out whom the mount is not for; the daemon may belong to another user than it.
        options.acl = SessionACL::All;
        let session = Session::from_fd(adapter, device, options.acl, options)
            .map_err(|e| Error::io("cannot serve", "the device", &e))?;
        reader.crew.serve(fcntl_dupfd_cloexec(&session, 0)?);
        reader.dropbehind.serve(&order.device);
        read_far_ahead(&order.device);
        self.mounted.lock().push(mounted);
        Ok(session)
    }

    fn forget_ended(&self) {
        self.mounted
            .lock()
            .retain(|mounted| mounted.view.strong_count() > 0);
    }

    /// What is mounted now.
    pub(super) fn list(&self) -> Vec<SnapshotMount> {
        let mounted = self.mounted.lock();
        let alive = mounted.iter().filter(|one| one.view.strong_count() > 0);
        alive
            .map(|one| SnapshotMount {
                snapshot: self.name(one.snapshot),
                device: one.device.clone(),
                mountpoints: one.places().iter().map(control::lossy).collect(),
            })
            .collect()
    }

    /// What a snapshot is called now.
    pub(super) fn name(&self, epoch: Epoch) -> String {
        let snapshot = self.engine.snapshots().get(epoch);
        snapshot.map_or_else(String::new, |snapshot| {
            String::from_utf8_lossy(&snapshot.info.name).into()
        })
    }

    /// Nodes that the kernel knows and files and directories that are open through the mounts of snapshots.
    pub(super) fn counts(&self) -> (u64, u64) {
        let mounted = self.mounted.lock();
        let views = mounted.iter().filter_map(|one| one.view.upgrade());
        views.fold((0, 0), |(nodes, open), view| {
            (nodes + view.nodes.count(), open + view.handles.count())
        })
    }

    /// To be called when the live mount has ended: detaches all mounts of snapshots and returns when their last user is gone.
    pub(super) fn end(&self) {
        let devices: Vec<String> = {
            let mounted = self.mounted.lock();
            mounted.iter().map(|one| one.device.clone()).collect()
        };
        // Of two at one place the later is on top.
        for device in devices.iter().rev() {
            for place in places_of(device) {
                detach(&place, Some(device));
            }
        }
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            if thread.join().is_err() {
                log::error!("a thread of the mount of a snapshot panicked");
            }
        }
        if let Some(dropper) = &self.dropper {
            dropper.end();
        }
    }
}

/// The descriptor `fd` of process `pid`, which must be a FUSE device.
fn take_device(pid: u32, fd: i32) -> Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| {
        Error::Permission(
            "the daemon cannot see the process that asks; mount in the daemon's pid namespace"
                .into(),
        )
    })?;
    let taken = pidfd_open(pid, PidfdFlags::empty())
        .and_then(|process| pidfd_getfd(process, fd, PidfdGetfdFlags::empty()));
    let device = taken.map_err(|errno| match errno {
        Errno::PERM | Errno::ACCESS => Error::Permission(
            "the daemon is not permitted to take the device from the process that asks (pidfd_getfd): the two must \
             be of one user, and ptrace allowed (in a container: --cap-add SYS_PTRACE)"
                .into(),
        ),
        Errno::NOSYS => Error::Permission("mounting a snapshot needs Linux 5.6 (pidfd_getfd)".into()),
        errno => Error::path("the daemon cannot take the device", "/dev/fuse", errno),
    })?;
    let stat = rustix::fs::fstat(&device)?;
    let is_fuse = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
        && stat.st_rdev == makedev(FUSE_DEVICE.0, FUSE_DEVICE.1);
    if is_fuse {
        Ok(device)
    } else {
        Err(Error::Permission(format!(
            "descriptor {fd} is no /dev/fuse"
        )))
    }
}
