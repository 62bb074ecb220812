//! The daemon in the background: this program started again, in a session of its own.
//!
//! The child's stdout is a pipe to the parent. It says `ready`, or an exit code and a message, and nothing else;
//! then it ends. So the parent knows exactly when the mount is usable, and why it is not.

use super::Failure;
use crate::config::MountConfig;
use crate::error::{Error, Result};
use crate::sync::{AtomicBool, Ordering};
use rustix::process::Signal;
use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{ChildStderr, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const READY: &str = "ready";
const LAST_WORDS: Duration = Duration::from_millis(300);

/// What the daemon is to do.
pub(super) struct Launch<'a> {
    pub(super) config: &'a MountConfig,
    pub(super) verbose: u8,
    pub(super) log: Option<&'a Path>,
    /// Whether the process that keeps the mount is one in the background.
    pub(super) daemon: bool,
}

impl Launch<'_> {
    /// The arguments that say what to mount, and how.
    pub(super) fn arguments(&self) -> Result<Vec<OsString>> {
        let mut arguments = vec!["-o".into(), self.config.to_options()];
        for _ in 0..self.verbose {
            arguments.push("-v".into());
        }
        if let Some(log) = self.log {
            let log = std::path::absolute(log)
                .map_err(|error| Error::io("cannot open the log", log, &error))?;
            arguments.extend(["--log".into(), log.into()]);
        }
        // The canonical mount point is an argument of its own, so that `pgrep -f` and the like find the daemon.
        arguments.extend([
            "--".into(),
            self.config.source.clone().into(),
            self.config.mountpoint.clone().into(),
        ]);
        Ok(arguments)
    }
}

/// Starts the daemon and waits until it is ready, or has said why it cannot be.
pub(super) fn spawn(launch: &Launch<'_>) -> std::result::Result<(), Failure> {
    let (said, status) = start(launch)?;
    match said.split_once('\n') {
        _ if said == READY => Ok(()),
        Some((code, message)) => Err(Failure {
            code: code.parse().unwrap_or(1),
            message: message.into(),
        }),
        None => Err(Failure::from(Error::MountPoint {
            path: launch.config.mountpoint.clone(),
            why: format!(
                "the daemon ended without a word ({}); try `cowfs mount -f -v` to see more",
                status.map_or("cause unknown".into(), describe)
            ),
        })),
    }
}

/// Starts the daemon; returns what it said, and how it ended if it did.
fn start(launch: &Launch<'_>) -> Result<(String, Option<ExitStatus>)> {
    let program = own_program();
    let mut command = Command::new(&program);
    command
        .arg0(program.file_name().unwrap_or(OsStr::new("cowfs")))
        .args(["mount", "--foreground", "--daemon"])
        .args(launch.arguments()?)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .map_err(|error| Error::io("cannot start the daemon", &program, &error))?;
    // Handed on, not handed down: a process that the daemon starts must not keep the user's stderr open.
    let warnings = child.stderr.take().map(hand_on);
    let mut said = String::new();
    if let Some(mut pipe) = child.stdout.take() {
        pipe.read_to_string(&mut said)
            .map_err(|error| Error::io("cannot hear from", "the daemon", &error))?;
    }
    if said == READY {
        return Ok((said, None));
    }
    let status = child
        .wait()
        .map_err(|error| Error::io("cannot wait for", "the daemon", &error))?;
    // What it said last is on its way; a process that it left behind may keep the pipe open for longer.
    let deadline = Instant::now() + LAST_WORDS;
    while warnings
        .as_ref()
        .is_some_and(|thread| !thread.is_finished())
        && Instant::now() < deadline
    {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok((said, Some(status)))
}

/// Copies what the daemon writes to stderr before it is ready.
fn hand_on(mut pipe: ChildStderr) -> JoinHandle<()> {
    std::thread::spawn(move || {
        // If the user's stderr is closed, there is nobody to tell.
        let _ = std::io::copy(&mut pipe, &mut std::io::stderr());
    })
}

fn own_program() -> PathBuf {
    match std::env::current_exe() {
        Ok(program) if program.exists() => program,
        // The file was replaced or removed; the running program is still there.
        _ => "/proc/self/exe".into(),
    }
}

/// Whether the program could not be started again by who serves `mountpoint`: what the dynamic linker needs for that
/// (ld.so(8)) lies there, so that it would have to be served first.
pub(super) fn starts_from(mountpoint: &Path) -> bool {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    // The sixth column; the program itself is started by its open file.
    let mapped = maps
        .lines()
        .filter_map(|line| line.find('/').map(|at| &line[at..]));
    let own = std::fs::read_link("/proc/self/exe").unwrap_or_default();
    let mut needed = mapped.map(Path::new).filter(|path| *path != own);
    Path::new("/etc/ld.so.cache").starts_with(mountpoint)
        || needed.any(|path| path.starts_with(mountpoint))
}

pub(super) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "cause unknown".into(),
    }
}

/// In the daemon: runs `serve`, handing it what to call when the mount is usable, and reports to the parent.
pub(super) fn report(
    serve: impl FnOnce(&(dyn Fn() -> Result<()> + Sync)) -> std::result::Result<(), Failure>,
) -> std::result::Result<(), Failure> {
    let told = AtomicBool::new(false);
    let ready = || {
        told.store(true, Ordering::Relaxed);
        tell_ready()
    };
    let result = detach().map_err(Failure::from).and_then(|()| serve(&ready));
    if let Err(failure) = &result {
        if told.load(Ordering::Relaxed) {
            log::error!("{}", failure.message);
        } else {
            tell(&format!("{}\n{}", failure.code, failure.message));
        }
        std::process::exit(failure.code.into());
    }
    result
}

fn detach() -> Result<()> {
    // Until the mount is ready, whoever interrupts the parent means the daemon.
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
    rustix::process::setsid()?;
    std::env::set_current_dir("/").map_err(|error| Error::io("cannot enter", "/", &error))
}

fn tell(text: &str) {
    let mut out = std::io::stdout();
    // Nobody listens any more if the parent was killed; the mount is good all the same.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn tell_ready() -> Result<()> {
    rustix::process::set_parent_process_death_signal(None)?;
    tell(READY);
    // This closes the pipe, which is what the parent waits for.
    rustix::stdio::dup2_stdout(null()?)?;
    Ok(())
}

/// Ends writing to the parent, who is about to leave.
pub(super) fn leave_stderr(log: Option<&File>) -> Result<()> {
    match log {
        Some(log) => rustix::stdio::dup2_stderr(log)?,
        None => rustix::stdio::dup2_stderr(null()?)?,
    }
    Ok(())
}

fn null() -> Result<File> {
    OpenOptions::new()
        .write(true)
        .open("/dev/null")
        .map_err(|error| Error::io("cannot open", "/dev/null", &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_program_starts_from() {
        for place in ["/", "/etc", "/usr"] {
            assert!(starts_from(Path::new(place)), "{place}");
        }
        for place in ["/srv", "/usr/local/share", "/etc/ssh", "/proc"] {
            assert!(!starts_from(Path::new(place)), "{place}");
        }
    }
}
