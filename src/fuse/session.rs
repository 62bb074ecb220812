//! A mount from beginning to end.

use super::attach::{attach, detach, device_of, read_far_ahead};
use super::dropbehind::Dropper;
use super::flush::FlushHelper;
use super::handover::SnapshotMounts;
use super::kept::{Ended, Kept};
use super::limits;
use super::pool::Pool;
use super::read::Reader;
use super::writeback::Gate;
use super::{Adapter, BLOCKING_THREADS, REQUEST_THREADS};
use crate::config::{CacheMode, MountConfig};
use crate::engine::nodes::{ROOT_NODE, folder_node};
use crate::engine::{Engine, EngineOptions, Reach};
use crate::error::{Error, Result};
use crate::sync::Arc;
use fuser::{Config, INodeNo, Session, SessionACL};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::time::Duration;

/// The turns of request threads (ARCHITECTURE, "Short turns"): the least that there is.
const TURN: Duration = Duration::from_micros(100);

/// Mounts as `config` says, or takes over the mount that an earlier server left, and serves it until it is unmounted
/// (umount(8), SIGTERM or SIGINT) and the store is closed. `ready` is called once the mount answers requests.
///
/// # Errors
/// How serving ended, if not well; what stands in the way of the mount (C12) is told to the keeper.
pub fn serve(
    mut config: MountConfig,
    kept: Kept,
    ready: impl FnOnce() + Send,
) -> Result<(), Ended> {
    limits::raise();
    limits::leave_groups();
    let taken_over = kept.mount.is_some();
    config.cache = cache_mode(&config, &kept);
    let server = Server::start(config, kept).map_err(|(kept, error)| {
        if taken_over {
            Ended::CannotTakeOver(error)
        } else {
            kept.refuse(&error)
        }
    })?;
    server.run(ready).map_err(Ended::Failed)
}

/// How the kernel caches writes: as the mount that there is has it, or as asked for, where that is sound.
fn cache_mode(config: &MountConfig, kept: &Kept) -> CacheMode {
    let wanted = match (&kept.mount, kept.writeback) {
        (Some(_), true) => return CacheMode::Writeback,
        (Some(_), false) => return CacheMode::WriteThrough,
        (None, _) => config.cache,
    };
    if wanted == CacheMode::WriteThrough || config.read_only {
        return CacheMode::WriteThrough;
    }
    match super::probe::writeback(config) {
        Ok(()) => CacheMode::Writeback,
        Err(why) => {
            log::warn!(
                "{}: cache=write-through takes the place of cache=writeback: {why}",
                config.mountpoint.display()
            );
            CacheMode::WriteThrough
        }
    }
}

/// A mount and what serves it.
struct Server {
    config: MountConfig,
    kept: Kept,
    signals: Signals,
    snapshots: Arc<SnapshotMounts>,
    session: Session<Adapter>,
}

impl Server {
    fn start(config: MountConfig, mut kept: Kept) -> Result<Self, (Kept, Error)> {
        match Self::assemble(&config, &mut kept) {
            Ok((signals, snapshots, session)) => Ok(Self {
                config,
                kept,
                signals,
                snapshots,
                session,
            }),
            Err(error) => Err((kept, error)),
        }
    }

    fn assemble(
        config: &MountConfig,
        kept: &mut Kept,
    ) -> Result<(Signals, Arc<SnapshotMounts>, Session<Adapter>)> {
        let (device, inventory) = kept.mount.take().unzip();
        let options = EngineOptions {
            store: config.store.clone(),
            durability: config.durability,
            upkeep: Some(config.sync_interval),
            snapshot_dir: config.snapshot_dir.clone(),
            reach: Reach::AsPermitted,
            space: config.space,
            user_snapshots: config.user_snapshots,
            tuning: crate::store::StoreOptions::default(),
            media: None,
            witness: None,
            faults: None,
        };
        let directory = fcntl_dupfd_cloexec(&kept.directory, 0)?;
        let (engine, found) =
            Engine::open_for_mount(&config.source, directory, options, inventory)?;
        // Before the signals can come, so that one during the mount still unmounts.
        let signals = Signals::new([SIGTERM, SIGINT, SIGHUP])
            .map_err(|e| Error::io("cannot listen for signals", &config.mountpoint, &e))?;
        // Two: a question about holes does not wait for a cut, which may wait for who waits for the answer.
        let helper = FlushHelper::start(&config.mountpoint)?;
        let cleaner = Arc::new(FlushHelper::start(&config.mountpoint)?);
        let helpers = vec![helper.numbers(), cleaner.numbers()];
        let gate = if config.cache == CacheMode::Writeback {
            let gate = Gate::new(engine.clone(), helper)?;
            engine.leave_times_of_open(&found)?;
            engine.set_barrier(Some(gate.clone()));
            Some(gate)
        } else {
            let flusher = Box::new(move |nodes: &[_]| helper.flush(nodes));
            engine.set_flusher(Some(flusher));
            None
        };
        let waiting = Arc::new(Pool::new("reading", BLOCKING_THREADS)?);
        let dropper = Dropper::start(&config.mountpoint);
        let snapshots = SnapshotMounts::new(
            engine.clone(),
            config.clone(),
            dropper,
            waiting,
            kept.served,
        );
        let adapter = Adapter::new(snapshots.clone(), cleaner, helpers, gate.clone(), &found)?;
        let reader = adapter.reader.clone();
        let session = match device {
            Some(device) => resume(config, adapter, device)?,
            None => begin(config, adapter, kept, &engine)?,
        };
        reader.crew.serve(fcntl_dupfd_cloexec(&session, 0)?);
        if let Some(device) = device_of(&config.mountpoint) {
            reader.dropbehind.serve(&device);
            if read_far_ahead(&device) {
                engine.backing().expect_read_ahead();
            }
        }
        let notifier = session.notifier();
        if let Some(gate) = gate {
            gate.set_notifier(notifier.clone());
        }
        let forget = move |node| {
            // A negative offset: the attributes alone, no pages.
            if let Err(error) = notifier.inval_inode(INodeNo(node), -1, 0) {
                log::warn!("cannot have the kernel forget the attributes of {node}: {error}");
            }
        };
        // An earlier server may have died before it did.
        forget(folder_node(ROOT_NODE));
        engine.set_listener(Some(Box::new(forget)));
        Ok((signals, snapshots, session))
    }

    fn run(self, ready: impl FnOnce() + Send) -> Result<()> {
        let Self {
            config,
            kept,
            mut signals,
            snapshots,
            session,
        } = self;
        snapshots.engine.serve(kept.served > 0);
        // If this fails the next server takes the mount over as it is.
        run(&config, session, &mut signals, || {
            ready();
            if let Err(error) = kept.ready() {
                log::warn!("the keeper cannot be told: {error}");
            }
        })?;
        let engine = snapshots.engine.clone();
        snapshots.end();
        engine.set_flusher(None);
        engine.set_barrier(None);
        engine.set_listener(None);
        engine.close()
    }
}

/// Makes the mount, and has the keeper hold it.
fn begin(
    config: &MountConfig,
    adapter: Adapter,
    kept: &Kept,
    engine: &Engine,
) -> Result<Session<Adapter>> {
    let device = attach(config)?;
    let begun = engine
        .inventory()
        .map_or(Ok(()), |inventory| {
            let writeback = config.cache == CacheMode::Writeback;
            kept.hold(device.as_fd(), inventory.file(), writeback)
        })
        .and_then(|()| {
            let options = options(config);
            Session::from_fd(adapter, device, options.acl, options).map_err(failed(config))
        });
    if begun.is_err() {
        detach(&config.mountpoint, device_of(&config.mountpoint).as_deref());
    }
    begun
}

/// Serves a mount whose kernel side has long agreed on the protocol. fuser insists on the first request of a
/// connection, so it gets one from this side of a socket, which then becomes the device. What the kernel had sent to
/// the earlier server and got no answer to is sent again (`FUSE_NOTIFY_RESEND`, Linux 6.9).
fn resume(config: &MountConfig, adapter: Adapter, device: OwnedFd) -> Result<Session<Adapter>> {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::io::write(&ours, &Reader::first_request())?;
    let options = options(config);
    let session =
        Session::from_fd(adapter, theirs, options.acl, options).map_err(failed(config))?;
    crate::sys::replace_descriptor(session.as_fd(), device.as_fd())?;
    // struct fuse_out_header of include/uapi/linux/fuse.h: length, code of the notification, no request.
    const FUSE_NOTIFY_RESEND: i32 = 7;
    let mut resend = 16_u32.to_ne_bytes().to_vec();
    resend.extend(FUSE_NOTIFY_RESEND.to_ne_bytes());
    resend.extend(0_u64.to_ne_bytes());
    rustix::io::write(&device, &resend)?;
    Ok(session)
}

fn failed(config: &MountConfig) -> impl Fn(std::io::Error) -> Error + '_ {
    |e| Error::io("the FUSE session failed", &config.mountpoint, &e)
}

pub(super) fn options(config: &MountConfig) -> Config {
    let mut options = Config::default();
    options.n_threads = Some(REQUEST_THREADS);
    options.acl = if config.allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    options
}

fn run(
    config: &MountConfig,
    session: Session<Adapter>,
    signals: &mut Signals,
    ready: impl FnOnce(),
) -> Result<()> {
    let stop = signals.handle();
    let device = device_of(&config.mountpoint);
    let device = device.as_deref();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for signal in signals.forever() {
                log::info!(
                    "signal {signal}: unmounting {}",
                    config.mountpoint.display()
                );
                detach(&config.mountpoint, device);
            }
        });
        let running = scope.spawn(|| {
            // fuser's threads are started by this one.
            if let Err(errno) = crate::sys::set_slice(TURN) {
                log::debug!("request threads wait for a processor as others do: {errno}");
            }
            session.run().map_err(failed(config))
        });
        ready();
        let done = running
            .join()
            .unwrap_or_else(|_| Err(failed(config)(std::io::Error::other("panicked"))));
        stop.close();
        done
    })
}
