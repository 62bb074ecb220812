//! The keeper of a mount: a small process that holds what must outlive the one that serves it.
//!
//! It holds the descriptor of `/dev/fuse`, the backing directory as it was before anything was mounted over it, and the
//! inventory of what the kernel knows. The server is a child. If that dies, the keeper starts another on the same
//! descriptors, and those who use the mount see a pause. If the keeper dies, the kernel ends the server with it, and
//! the mount is dead.

use super::Failure;
use super::daemon::{self, Launch};
use crate::config::MountConfig;
use crate::error::{Error, Result};
use crate::fuse::{Ended, HOLD, HOLD_WRITEBACK, Kept};
use crate::sync::{Arc, AtomicBool, Mutex, Ordering};
use crate::sys;
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};
use std::ffi::OsString;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Servers that may die one after the other before they are ready; then the keeper gives up.
const MOST_FAILURES: u32 = 5;
/// A server that lives longer than this has proved itself. Of those that do not, a few are replaced at once, more of
/// them only after a pause, and the keeper gives up in the end: what kills them is likely to be sent again.
const SHORT_LIFE: Duration = Duration::from_secs(2);
const AT_ONCE: u32 = 50;
const MOST_SHORT_LIVES: u32 = 100;
const PAUSE: Duration = Duration::from_secs(1);

/// The descriptors that a server inherits, as arguments of the hidden part of the command line.
#[derive(clap::Args, Clone, Copy, Debug)]
pub(super) struct Inherited {
    /// The socket on which the keeper is told what to hold, and whether the mount is usable.
    #[arg(long, hide = true)]
    keeper: Option<i32>,
    /// The keeper's process.
    #[arg(long, hide = true)]
    keeper_pid: Option<i32>,
    /// The backing directory.
    #[arg(long, hide = true)]
    directory: Option<i32>,
    /// `/dev/fuse`, of a mount that there is already.
    #[arg(long, hide = true)]
    device: Option<i32>,
    /// The inventory that goes with it.
    #[arg(long, hide = true)]
    inventory: Option<i32>,
    /// The kernel holds writes back in that mount.
    #[arg(long, hide = true)]
    writeback: bool,
    /// How many servers there were before.
    #[arg(long, hide = true, default_value_t = 0)]
    served: u32,
}

impl Inherited {
    /// Nothing: this process is the keeper.
    pub(super) const NONE: Self = Self {
        keeper: None,
        keeper_pid: None,
        directory: None,
        device: None,
        inventory: None,
        writeback: false,
        served: 0,
    };

    /// Takes the descriptors up; `None` if this process is no server.
    pub(super) fn take(self) -> Result<Option<Kept>> {
        let (Some(keeper), Some(directory)) = (self.keeper, self.directory) else {
            return Ok(None);
        };
        // Whoever keeps the mount goes, and the mount with them: nobody is left to serve it for.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // It may have gone before that call.
        if rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get()) != self.keeper_pid {
            return Err(Error::Os(Errno::SRCH));
        }
        let take = |fd: i32| Ok::<_, Error>(sys::inherited(fd)?);
        let mount = match (self.device, self.inventory) {
            (Some(device), Some(inventory)) => Some((take(device)?, take(inventory)?)),
            _ => None,
        };
        Ok(Some(Kept {
            socket: take(keeper)?,
            directory: take(directory)?,
            mount,
            writeback: self.writeback,
            served: self.served,
        }))
    }
}

/// What the keeper holds of a mount.
struct Held {
    device: OwnedFd,
    inventory: OwnedFd,
    /// The number of the mounted filesystem, as the mount table writes it.
    number: Option<String>,
    /// The kernel holds writes back in it.
    writeback: bool,
}

/// Keeps the mount that `config` describes until it is unmounted. `ready` is told when it is usable.
pub(super) fn keep(
    launch: &Launch<'_>,
    ready: impl Fn() -> Result<()>,
) -> std::result::Result<(), Failure> {
    let config = launch.config;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(&config.source, flags, Mode::empty())
        .map_err(|errno| Error::path("cannot open", &config.source, errno))?;
    // It writes to the log too.
    crate::fuse::raise_limits();
    let ward = Ward::start()?;
    let mut keeper = Keeper {
        config,
        launch,
        directory,
        held: None,
        served: 0,
        ready: false,
        starts_from_mount: daemon::starts_from(&config.mountpoint),
    };
    let kept = keeper.run(&ward, ready);
    ward.end();
    kept
}

struct Keeper<'a> {
    config: &'a MountConfig,
    launch: &'a Launch<'a>,
    directory: OwnedFd,
    held: Option<Held>,
    served: u32,
    /// The last server has said that the mount is usable.
    ready: bool,
    /// No server could be started while the mount waits for one.
    starts_from_mount: bool,
}

impl Keeper<'_> {
    fn run(
        &mut self,
        ward: &Ward,
        ready: impl Fn() -> Result<()>,
    ) -> std::result::Result<(), Failure> {
        let (mut failures, mut short_lives) = (0, 0);
        loop {
            let started = Instant::now();
            let (mut child, socket) = self.start_server()?;
            ward.watch(&child)?;
            let news = self.listen(&socket, &ready);
            let status = child
                .wait()
                .map_err(|e| Error::io("cannot wait for", "the server", &e))?;
            news?;
            if ward.stopping() && !status.success() {
                // Told to stop before it could listen: what it had mounted goes all the same.
                self.begin_anew();
                return match status.signal() {
                    Some(SIGTERM | SIGINT | SIGHUP) => Ok(()),
                    _ => ended(status),
                };
            }
            if !is_crash(status) {
                return ended(status);
            }
            if self.is_unmounted() {
                // It failed, or was killed, after that: there is nothing left to serve.
                return ended(status);
            }
            self.served += 1;
            failures = if self.ready { 0 } else { failures + 1 };
            let short = started.elapsed() < SHORT_LIFE;
            short_lives = if short { short_lives + 1 } else { 0 };
            let place = self.config.mountpoint.display();
            if failures == MOST_FAILURES || short_lives == MOST_SHORT_LIVES {
                log::error!("{place}: one server after the other dies; the mount is given up");
                self.begin_anew();
                return ended(status);
            }
            if short_lives > AT_ONCE {
                std::thread::sleep(PAUSE);
            }
            log::error!(
                "{place}: the server died ({}); starting another",
                daemon::describe(status)
            );
            if status.code() == Some(CANNOT_TAKE_OVER)
                || self.held.is_none()
                || self.starts_from_mount
            {
                self.begin_anew();
            }
        }
    }

    /// Whether the mount that is held has been unmounted. One that was detached and is still in use has not.
    fn is_unmounted(&self) -> bool {
        self.held.as_ref().is_some_and(|held| {
            !crate::fuse::is_connected(held.device.as_fd())
                && crate::fuse::device_of(&self.config.mountpoint) != held.number
        })
    }

    /// Gives the mount up, so that the next server makes a new one in its place.
    fn begin_anew(&mut self) {
        if let Some(held) = self.held.take() {
            crate::fuse::detach(&self.config.mountpoint, held.number.as_deref());
        }
    }

    fn start_server(&self) -> Result<(Child, OwnedFd)> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let mut arguments: Vec<OsString> = Vec::new();
        let mut hand_down = |name: &str, fd: &OwnedFd| -> Result<()> {
            fcntl_setfd(fd, FdFlags::empty())?;
            arguments.push(name.into());
            arguments.push(fd.as_raw_fd().to_string().into());
            Ok(())
        };
        hand_down("--keeper", &theirs)?;
        hand_down("--directory", &self.directory)?;
        if let Some(held) = &self.held {
            hand_down("--device", &held.device)?;
            hand_down("--inventory", &held.inventory)?;
        }
        if self.held.as_ref().is_some_and(|held| held.writeback) {
            arguments.push("--writeback".into());
        }
        let own = rustix::process::getpid().as_raw_nonzero();
        arguments.extend(["--keeper-pid".into(), own.to_string().into()]);
        arguments.extend(["--served".into(), self.served.to_string().into()]);
        // Not by path: the program may lie in the directory that is mounted over.
        let child = Command::new("/proc/self/exe")
            .arg0("cowfs")
            .args(["mount", "--foreground"])
            .args(self.launch.daemon.then_some("--daemon"))
            .args(arguments)
            .args(self.launch.arguments()?)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|e| Error::io("cannot start", "the server", &e))?;
        Ok((child, ours))
    }

    /// Hears what the server says until it ends: what to hold, and that the mount is usable, or why it is not.
    fn listen(
        &mut self,
        socket: &OwnedFd,
        ready: &impl Fn() -> Result<()>,
    ) -> std::result::Result<(), Failure> {
        self.ready = false;
        while let Some((message, descriptors)) = crate::fuse::hear(socket)? {
            match (message.as_slice(), <[OwnedFd; 2]>::try_from(descriptors)) {
                (HOLD | HOLD_WRITEBACK, Ok([device, inventory])) => {
                    self.held = Some(Held {
                        device,
                        inventory,
                        number: crate::fuse::device_of(&self.config.mountpoint),
                        writeback: message == HOLD_WRITEBACK,
                    });
                }
                (b"ready", _) => {
                    self.ready = true;
                    if self.served == 0 {
                        ready()?;
                    } else {
                        log::warn!("{}: served again", self.config.mountpoint.display());
                    }
                }
                (other, _) => {
                    let said = String::from_utf8_lossy(other);
                    let (code, message) = said.split_once('\n').unwrap_or(("1", &said));
                    return Err(Failure {
                        code: code.parse().unwrap_or(1),
                        message: message.into(),
                    });
                }
            }
        }
        Ok(())
    }
}

/// Exit code by which a server says that it cannot serve the mount that there is, and a new one has to be made.
const CANNOT_TAKE_OVER: i32 = 75;
/// Exit code of a server that failed after the mount was usable.
const FAILED: i32 = 70;

/// The exit code of a server; what the keeper has not been told is logged.
pub(super) fn exit_code(ended: &Ended) -> i32 {
    match ended {
        Ended::Refused => 1,
        Ended::CannotTakeOver(error) => {
            log::error!("the mount cannot be taken over: {error}");
            CANNOT_TAKE_OVER
        }
        Ended::Failed(error) => {
            log::error!("{error}");
            FAILED
        }
    }
}

/// Whether another server should try: this one was killed, or failed in a way that it did not foresee.
fn is_crash(status: ExitStatus) -> bool {
    const PANICKED: i32 = 101;
    status.signal().is_some() || matches!(status.code(), Some(PANICKED | FAILED | CANNOT_TAKE_OVER))
}

fn ended(status: ExitStatus) -> std::result::Result<(), Failure> {
    if status.success() {
        return Ok(());
    }
    Err(Failure {
        code: 1,
        message: format!("the server ended: {}", daemon::describe(status)),
    })
}

/// Hands the signals that end a mount on to the server.
struct Ward {
    /// The server, as a descriptor: its number may be somebody else's once it has ended.
    child: Arc<Mutex<Option<OwnedFd>>>,
    stop: Arc<AtomicBool>,
    signals: Handle,
    thread: JoinHandle<()>,
}

impl Ward {
    fn start() -> Result<Self> {
        let failed = |e: std::io::Error| Error::io("cannot listen for signals", "the keeper", &e);
        let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(failed)?;
        let child = Arc::new(Mutex::new(None));
        let stop = Arc::new(AtomicBool::new(false));
        let (whom, flag, handle) = (child.clone(), stop.clone(), signals.handle());
        let thread = std::thread::Builder::new()
            .name("cowfs-ward".into())
            .spawn(move || {
                for _ in signals.forever() {
                    flag.store(true, Ordering::SeqCst);
                    terminate(&whom);
                }
            })
            .map_err(failed)?;
        Ok(Self {
            child,
            stop,
            signals: handle,
            thread,
        })
    }

    /// From now on signals are for `child`; one that came before is handed on now.
    fn watch(&self, child: &Child) -> Result<()> {
        let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
        *self.child.lock() = Some(process);
        if self.stopping() {
            terminate(&self.child);
        }
        Ok(())
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn end(self) {
        self.signals.close();
        if self.thread.join().is_err() {
            log::error!("the thread for signals panicked");
        }
    }
}

fn terminate(child: &Mutex<Option<OwnedFd>>) {
    if let Some(process) = &*child.lock()
        && let Err(errno) = pidfd_send_signal(process, Signal::TERM)
        && errno != Errno::SRCH
    {
        log::warn!("cannot signal the server: {errno}");
    }
}
