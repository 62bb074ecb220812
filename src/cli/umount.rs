//! `cowfs umount`: detach a mount and wait until its store is written.

use super::output;
use crate::config::CacheMode;
use crate::control::{self, SnapshotMount, Status};
use crate::error::{Error, Result};
use crate::mounts::{self, MountEntry};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long the daemon may take to answer, and to finish writing its store.
const FINISH: Duration = Duration::from_secs(30);
/// How long the end of a snapshot's mount may take to reach the daemon.
const SETTLE: Duration = Duration::from_secs(2);
/// How long a mount may be busy with what is just being closed, and how often that is tried.
const CLOSING: Duration = Duration::from_secs(1);
/// The same where the kernel holds writes back: the flush helper may just be writing a large file back.
const WRITING_BACK: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(50);

/// Unmount, and return when the daemon has written its store and ended.
///
/// The backing directory is then a plain directory with the live tree in it. A mount whose daemon is gone is
/// detached too.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Args {
    /// Detach now, with the mounts of its snapshots, and let those who still use it finish; do not wait.
    #[arg(short, long)]
    lazy: bool,
    /// The mount point.
    mountpoint: PathBuf,
}

const EXAMPLE: &str = "\
EXAMPLE
  cowfs umount /srv/data";

/// The arguments that umount(8) gives to its helpers.
#[derive(clap::Parser)]
#[command(name = "umount.fuse.cowfs", version, after_help = HELPER_EXAMPLE)]
pub(super) struct HelperArgs {
    /// The mount point.
    mountpoint: PathBuf,
    /// Detach now, clean up later.
    #[arg(short)]
    lazy: bool,
    /// Ignored, as are -n, -r, -v, -t and -N.
    #[arg(short)]
    force: bool,
    #[arg(short, hide = true)]
    no_mtab: bool,
    #[arg(short, hide = true)]
    read_only: bool,
    #[arg(short, hide = true)]
    verbose: bool,
    #[arg(short, hide = true)]
    t: Option<String>,
    #[arg(short = 'N', hide = true)]
    namespace: Option<PathBuf>,
}

const HELPER_EXAMPLE: &str = "\
EXAMPLE
  ln -s \"$(command -v cowfs)\" /sbin/umount.fuse.cowfs   for umount(8) as far as it asks helpers";

impl From<HelperArgs> for Args {
    fn from(args: HelperArgs) -> Self {
        Self {
            lazy: args.lazy,
            mountpoint: args.mountpoint,
        }
    }
}

pub(super) fn run(args: &Args) -> Result<()> {
    unmount(&args.mountpoint, args.lazy)
}

/// Unmounts the cowfs mount at `path`; unless `lazy`, waits for its daemon.
pub(super) fn unmount(path: &Path, lazy: bool) -> Result<()> {
    let place = locate(path)?;
    let mount = top_mount(path, &place)?;
    let mut status = None;
    let mut hangs = false;
    if !lazy {
        let answer = control::status_in_time(&place, FINISH);
        hangs = answer.is_none();
        status = answer.and_then(Result::ok);
    }
    let daemon = match &status {
        // The daemon goes on: it is that of the live mount.
        Some(status) if status.snapshot.is_some() => None,
        Some(status) => {
            check_snapshot_mounts(&place, status)?;
            // It ends after the daemon.
            Process::find(status.keeper)
        }
        None => None,
    };
    if hangs {
        return Err(busy(&mount.mountpoint, true));
    }
    let held = status.is_some_and(|status| status.cache == CacheMode::Writeback.as_str());
    let patience = if held { WRITING_BACK } else { CLOSING };
    let mut others = same_filesystem(&mount)?;
    if let Some(own) = others.iter().position(|at| *at == mount.mountpoint) {
        others.swap_remove(own);
    }
    match detach(&mount, lazy, patience) {
        Err(Busy::Yes) => return Err(busy(&mount.mountpoint, false)),
        Err(Busy::No(error)) => return Err(error),
        Ok(()) => {}
    }
    // The daemon lives on while the filesystem is mounted anywhere else. Where it was not before, its number has been given
    // to another one by now.
    let now = same_filesystem(&mount)?;
    let elsewhere = now.iter().any(|at| others.contains(at));
    match daemon {
        Some(daemon) if !elsewhere => wait_for(&daemon, &mount),
        _ => Ok(()),
    }
}

/// The canonical path, also of a mount point that does not answer.
fn locate(path: &Path) -> Result<PathBuf> {
    let error = match std::fs::canonicalize(path) {
        Ok(place) => return Ok(place),
        Err(error) => error,
    };
    let absolute = std::path::absolute(path).ok();
    if let Some((parent, name)) = absolute
        .as_deref()
        .and_then(|path| Some((path.parent()?, path.file_name()?)))
        && let Ok(parent) = std::fs::canonicalize(parent)
    {
        let place = parent.join(name);
        if mounts::read()?.iter().any(|m| m.mountpoint == place) {
            return Ok(place);
        }
    }
    Err(Error::MountPoint {
        path: path.to_path_buf(),
        why: error.to_string(),
    })
}

fn top_mount(path: &Path, place: &Path) -> Result<MountEntry> {
    let mounts = mounts::read()?;
    let refuse = |why: String| {
        Err(Error::MountPoint {
            path: path.to_path_buf(),
            why,
        })
    };
    match mounts::of(place, &mounts) {
        Some(mount) if mount.is_cowfs() && mount.mountpoint == place => Ok(mount.clone()),
        Some(mount) if mount.is_cowfs() => refuse(format!(
            "it is inside a cowfs mount, not its mount point; `cowfs umount '{}'`",
            mount.mountpoint.display()
        )),
        Some(mount) if mount.mountpoint == place => refuse(format!(
            "it is a mount of type {}, not of cowfs; use umount(8)",
            mount.fstype
        )),
        _ => refuse("not mounted; `findmnt -t fuse.cowfs` lists the cowfs mounts".into()),
    }
}

/// Where the filesystem of a mount is mounted.
fn same_filesystem(mount: &MountEntry) -> Result<Vec<PathBuf>> {
    let mounts = mounts::read()?.into_iter();
    let same = mounts.filter(|other| other.device == mount.device && other.is_cowfs());
    Ok(same.map(|other| other.mountpoint).collect())
}

/// A process, which its descriptor means also when it has ended (pidfd_open(2)).
struct Process {
    pid: u32,
    fd: OwnedFd,
}

impl Process {
    /// `None`: it has ended.
    fn find(pid: u32) -> Option<Self> {
        let id = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
        let fd = pidfd_open(id, PidfdFlags::empty()).ok()?;
        Some(Self { pid, fd })
    }

    /// Waits until it has ended, reaped or not. False if that is not before `deadline`.
    fn ends_before(&self, deadline: Instant) -> Result<bool> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap_or_default();
            let mut ended = [PollFd::new(&self.fd, PollFlags::IN)];
            match poll(&mut ended, Some(&left)) {
                Err(Errno::INTR) => {}
                events => return Ok(events? > 0),
            }
        }
    }
}

/// Refuses to unmount a live tree under the mounts of its snapshots, which end with it.
fn check_snapshot_mounts(place: &Path, status: &Status) -> Result<()> {
    let shown = |mount: &SnapshotMount| match mount.mountpoints.first() {
        Some(at) => format!(
            "{} at {}",
            output::printable(mount.snapshot.as_ref()),
            output::printable(at.as_ref())
        ),
        None => format!(
            "{} out of sight of the daemon",
            output::printable(mount.snapshot.as_ref())
        ),
    };
    let deadline = Instant::now() + SETTLE;
    let mut mounts = status.snapshot_mounts.clone();
    // The daemon hears of the end of a mount only after umount(2) has returned.
    while !mounts.is_empty()
        && mounts.iter().all(|mount| mount.mountpoints.is_empty())
        && Instant::now() < deadline
    {
        std::thread::sleep(Duration::from_millis(5));
        mounts = control::status(place)?.snapshot_mounts;
    }
    if mounts.is_empty() {
        return Ok(());
    }
    let mounts: Vec<String> = mounts.iter().map(shown).collect();
    Err(Error::MountPoint {
        path: place.to_path_buf(),
        why: format!(
            "in use: its daemon serves mounts of snapshots ({}); unmount them first, or `cowfs umount --lazy`, \
             which detaches them too",
            mounts.join(", ")
        ),
    })
}

/// Detaches, and gives those `patience` who are just closing their last file: the flush helper among them, after a cut or
/// the death of its daemon.
fn detach(mount: &MountEntry, lazy: bool, patience: Duration) -> Result<(), Busy> {
    let place = &mount.mountpoint;
    let deadline = Instant::now() + patience;
    loop {
        // Somebody else may have unmounted it, and what lies beneath is not ours.
        let mounts = mounts::read().map_err(Busy::No)?;
        let top = mounts::of(place, &mounts);
        if top.is_none_or(|top| top.mountpoint != *place || top.device != mount.device) {
            return Ok(());
        }
        match try_detach(place, lazy) {
            Err(Busy::Yes) if Instant::now() < deadline => std::thread::sleep(PAUSE),
            done => return done,
        }
    }
}

/// Whether detaching failed because the mount is in use.
enum Busy {
    Yes,
    No(Error),
}

fn try_detach(place: &Path, lazy: bool) -> Result<(), Busy> {
    let flags = if lazy {
        UnmountFlags::DETACH
    } else {
        UnmountFlags::empty()
    };
    match rustix::mount::unmount(place, flags) {
        Ok(()) => Ok(()),
        Err(Errno::PERM | Errno::ACCESS) => detach_by_helper(place, lazy),
        Err(Errno::BUSY) => Err(Busy::Yes),
        Err(errno) => Err(Busy::No(Error::path("cannot unmount", place, errno))),
    }
}

fn busy(place: &Path, hangs: bool) -> Error {
    let why = match hangs {
        false => {
            "in use: a file in it is open, or it is somebody's current directory (`fuser -vm` shows whose); \
             close it and try again, or `cowfs umount --lazy`"
        }
        true => {
            "its daemon does not answer; `cowfs umount --lazy` takes the mount away at once, and who waits for the \
             daemon goes on waiting until it answers or is killed"
        }
    };
    Error::MountPoint {
        path: place.to_path_buf(),
        why: why.into(),
    }
}

/// Users other than root unmount what they mounted by the set-user-id helper of FUSE.
fn detach_by_helper(place: &Path, lazy: bool) -> Result<(), Busy> {
    let flags = if lazy { "-uz" } else { "-u" };
    let run = Command::new("fusermount3")
        .arg(flags)
        .arg("--")
        .arg(place)
        .stdin(Stdio::null())
        .output();
    match run {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            if said.contains("busy") {
                return Err(Busy::Yes);
            }
            Err(Busy::No(Error::Permission(format!(
                "{}: cannot unmount: {said}",
                place.display()
            ))))
        }
        Err(_) => Err(Busy::No(Error::Permission(format!(
            "{}: not permitted to unmount; be root, or install fusermount3 (package fuse3)",
            place.display()
        )))),
    }
}

fn wait_for(daemon: &Process, mount: &MountEntry) -> Result<()> {
    match daemon.ends_before(Instant::now() + FINISH)? {
        true => Ok(()),
        false => Err(Error::MountPoint {
            path: mount.mountpoint.clone(),
            why: unfinished(daemon.pid, mount),
        }),
    }
}

/// Why a daemon goes on after its mount was taken away.
fn unfinished(pid: u32, mount: &MountEntry) -> String {
    let time = FINISH.as_secs();
    match mounts::who_sees(&mount.device) {
        Some(other) => format!(
            "unmounted here, but another mount namespace has it still, that of process {other}, so that its daemon \
             (pid {pid}) goes on; the directory cannot be mounted again before it has ended"
        ),
        None => format!(
            "unmounted, but its daemon (pid {pid}) is still writing its store after {time} s; \
             wait for it before the directory is mounted again"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_runs_and_an_ended_child_does_not() {
        let own = Process::find(std::process::id()).unwrap();
        assert!(!own.ends_before(Instant::now()).unwrap());
        let mut child = Command::new("true").spawn().unwrap();
        // Not reaped, it has a descriptor also when it has ended.
        let process = Process::find(child.id()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        assert!(process.ends_before(deadline).unwrap());
        child.wait().unwrap();
        assert!(process.ends_before(Instant::now()).unwrap());
        assert!(Process::find(0).is_none());
    }

    #[test]
    fn a_plain_directory_is_refused() {
        let error = unmount(Path::new("/usr"), false).unwrap_err();
        assert_eq!(error.exit_code(), 4);
        assert!(error.to_string().contains("not mounted"), "{error}");
        let error = unmount(Path::new("/proc"), false).unwrap_err();
        assert!(error.to_string().contains("type proc"), "{error}");
        let error = unmount(Path::new("/no/such"), false).unwrap_err();
        assert!(error.to_string().contains("/no/such"), "{error}");
    }
}
