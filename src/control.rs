//! The running mount's interface for the command line: hidden extended attributes that the daemon answers
//! and never lists. There is no socket, so whoever can read the mount's root can ask, and nothing is left
//! behind by a daemon that was killed.

use crate::error::{Error, Result};
use crate::mounts::{self, MountEntry};
use crate::sync::channel;
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// On the root directory of a mount: a [`Status`] as JSON.
pub const STATUS_XATTR: &str = "user.cowfs.status";
/// On `<mount>/<snapshot-dir>/<name>`: a [`SnapshotStatus`] as JSON.
pub const SNAPSHOT_XATTR: &str = "user.cowfs.snapshot";
/// Set on `<mount>/<snapshot-dir>/<name>`: `1` holds the snapshot, `0` lets it go.
pub const HELD_XATTR: &str = "user.cowfs.held";
/// Begins the name of a [`MountOrder`], asked of `<live mount>/<snapshot-dir>/<name>`.
const MOUNT_XATTR: &str = "user.cowfs.mount.";
/// On the root directory of a live mount, for root and the user whose daemon it is: looks the store over, and gives
/// what was found as JSON, cut short to what fits.
pub const CHECK_XATTR: &str = "user.cowfs.check";
/// How long the daemon of another mount may take to say who it is.
pub const ANSWER: Duration = Duration::from_secs(5);

/// The largest value that an extended attribute can have.
pub const XATTR_MAX: usize = 65536;

/// What a running mount says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Process id of the daemon that serves the mount.
    pub pid: u32,
    /// Process id of its keeper, which starts another if the daemon dies.
    pub keeper: u32,
    /// The backing directory (bytes that are not UTF-8 replaced).
    pub source: String,
    /// The directory of the store.
    pub store: String,
    /// The name under which snapshots are reached.
    pub snapshot_dir: String,
    /// "ok", "read-only", "poisoned" or "damaged".
    pub state: String,
    /// "ordered" or "strict".
    pub durability: String,
    /// "write-through" or "writeback".
    pub cache: String,
    /// "poll" if the daemon has idle processors poll while requests come one after another, "halt" if that is left to
    /// the kernel.
    pub idle: String,
    /// Number of cuts so far.
    pub epoch: u64,
    /// Number of snapshots there are.
    pub snapshots: u64,
    /// All that the store holds on disk, in bytes.
    pub store_bytes: u64,
    /// Of these, kept data.
    pub preimage_bytes: u64,
    /// Of these, the index.
    pub index_bytes: u64,
    /// The index is in memory until the next mount, as the disk was full.
    #[serde(default)]
    pub index_in_memory: bool,
    /// Files without a visible name that a snapshot still shows.
    pub retained_files: u64,
    /// Open files and directories.
    pub open_files: u64,
    /// How often the mount was taken over from a server that had died.
    #[serde(default)]
    pub takeovers: u32,
    /// Objects that the kernel knows.
    pub known_objects: u64,
    /// The newest cut of this daemon.
    pub last_cut: Option<CutStatus>,
    /// What was found damaged, one line each.
    pub damage: Vec<String>,
    /// How full the store is.
    #[serde(default)]
    pub space: SpaceStatus,
    /// The snapshots that may not be exact.
    #[serde(default)]
    pub suspect: Vec<String>,
    /// The snapshot that the mount asked shows by itself; `None`: it shows the live tree.
    #[serde(default)]
    pub snapshot: Option<String>,
    /// The snapshots that the daemon serves to mounts of their own.
    #[serde(default)]
    pub snapshot_mounts: Vec<SnapshotMount>,
}

/// How full the store is. Sizes are in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpaceStatus {
    /// "ok", "filling", "nearly-full" or "full".
    pub state: String,
    /// "drop", "invalidate" or "enospc": what gives way when it is full.
    pub on_full: String,
    /// What the store and the retained files may take; `None`: no limit but the disk.
    pub limit: Option<u64>,
    /// What must stay free on the filesystem of the store.
    pub reserve: u64,
    /// What store and retained files take.
    pub used: u64,
    /// Of these, the retained files.
    pub retained: u64,
    /// What is free on the filesystem of the store; 2^63 - 1 if it has no size.
    pub free: u64,
    /// What may still be kept; 2^63 - 1 if nothing bounds it.
    pub left: u64,
}

/// A snapshot that is mounted by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotMount {
    /// What the snapshot is called.
    pub snapshot: String,
    /// Number of the mounted filesystem, "major:minor" as in the mount table.
    pub device: String,
    /// Where it is mounted, as the daemon sees it; empty if it is in another mount namespace, or detached and
    /// still in use.
    pub mountpoints: Vec<String>,
}

/// The order to serve a snapshot to a mount of its own: the name of an extended attribute of the snapshot, whose
/// value is the [`MountAnswer`]. The daemon takes the descriptor out of the process that asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountOrder {
    /// The number of the descriptor of `/dev/fuse`, which is mounted already.
    pub fd: i32,
    /// The number of the mounted filesystem, "major:minor" as in the mount table.
    pub device: String,
}

impl MountOrder {
    /// The name of the attribute.
    fn name(&self) -> String {
        format!("{MOUNT_XATTR}{}.{}", self.fd, self.device)
    }

    /// The order that the name of an attribute is, if it is one.
    #[must_use]
    pub fn parse(name: &OsStr) -> Option<Self> {
        let (fd, device) = name.to_str()?.strip_prefix(MOUNT_XATTR)?.split_once('.')?;
        let (major, minor) = device.split_once(':')?;
        let number = |text: &str| text.parse::<u32>().is_ok();
        (number(major) && number(minor)).then_some(())?;
        Some(Self {
            fd: fd.parse().ok().filter(|fd| *fd >= 0)?,
            device: device.into(),
        })
    }
}

/// What became of a [`MountOrder`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountAnswer {
    /// The exit code for the command; 0: the mount is being served.
    pub code: u8,
    /// Why not, if it is not.
    pub message: String,
}

impl MountAnswer {
    /// The answer for one that failed.
    #[must_use]
    pub fn refused(error: &Error) -> Self {
        Self {
            code: error.exit_code(),
            message: error.to_string(),
        }
    }
}

/// How long a cut took, in microseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutStatus {
    /// Name of the snapshot.
    pub name: String,
    /// From the request to the reply.
    pub total_us: u64,
    /// Flushing the pages that were dirtied through shared mappings.
    pub flush_us: u64,
    /// Waiting for operations that were already running.
    pub quiesce_us: u64,
    /// The longest that any writer waited for the cut.
    pub longest_write_wait_us: u64,
}

/// What a running mount says of one snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotStatus {
    /// Name (bytes that are not UTF-8 replaced).
    pub name: String,
    /// The number of its cut.
    pub epoch: u64,
    /// When it was cut: RFC 3339, UTC, with nanoseconds.
    pub created: String,
    /// Whether it is kept when the store is full.
    pub held: bool,
    /// "ok", or what is wrong with it.
    pub state: String,
    /// Why, if it is not "ok".
    #[serde(default)]
    pub why: Option<String>,
}

/// The root of the cowfs mount that contains `path`: any file or directory in it, or in one of its snapshots.
pub fn find_mount(path: &Path) -> Result<PathBuf> {
    let real = canonical(path)?;
    let mounts = mounts::read()?;
    let found = mounts::of(&real, &mounts).filter(|mount| mount.is_cowfs());
    let Some(mount) = found else {
        return Err(Error::MountPoint {
            path: path.to_path_buf(),
            why: "not in a cowfs mount; `cowfs mount SOURCE MOUNTPOINT` makes one, \
                  `findmnt -t fuse.cowfs` lists those there are"
                .into(),
        });
    };
    if mount.root == Path::new("/") {
        return Ok(mount.mountpoint.clone());
    }
    // A bind mount of a part: the same filesystem may be visible as a whole elsewhere.
    mounts
        .iter()
        .find(|whole| whole.device == mount.device && whole.root == Path::new("/"))
        .map(|whole| whole.mountpoint.clone())
        .ok_or_else(|| Error::MountPoint {
            path: path.to_path_buf(),
            why: format!(
                "{} shows only a part of a cowfs mount, and its root is not visible from here; \
                 name a path under the mount point itself",
                mount.mountpoint.display()
            ),
        })
}

/// Asks the mount whose root directory is `root` for its status.
pub fn status(root: &Path) -> Result<Status> {
    let mut status: Status = query(root, STATUS_XATTR)?;
    // The daemon knows how it was mounted, the kernel what a remount has made of it.
    let read_only = rustix::fs::statvfs(root)
        .map_err(|errno| Error::io("cannot ask", root, &errno.into()))?
        .f_flag
        .contains(rustix::fs::StatVfsMountFlags::RDONLY);
    match (status.state.as_str(), read_only) {
        ("ok", true) => status.state = "read-only".into(),
        ("read-only", false) => status.state = "ok".into(),
        _ => {}
    }
    Ok(status)
}

/// As [`status`], but a daemon that hangs does not make the caller hang: `None` if it has not answered in that time.
///
/// It is asked by a process of its own: who waits for an answer to what a daemon has read already cannot be killed
/// (`request_wait_answer` of fs/fuse/dev.c), and a process does not end before its threads.
#[must_use]
pub fn status_in_time(root: &Path, time: Duration) -> Option<Result<Status>> {
    let failed = |error: std::io::Error| Error::io("cannot ask", root, &error);
    let asking = Command::new("/proc/self/exe")
        .arg0("cowfs")
        .args(["status", "--json", "--"])
        .arg(root)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null()) // the caller says what it makes of it
        .spawn();
    let mut asking = match asking {
        Ok(asking) => asking,
        Err(error) => return Some(Err(failed(error))),
    };
    let (answer, said) = channel::bounded(1);
    let output = asking.stdout.take();
    std::thread::spawn(move || {
        let mut text = Vec::new();
        let read = output.map(|mut output| output.read_to_end(&mut text));
        // Nobody listens any more if it took too long.
        let _ = answer.send(read.transpose().map(|_| text));
    });
    let Ok(said) = said.recv_timeout(time) else {
        // If it cannot be killed yet, it ends when it is answered.
        let _ = asking.kill();
        std::thread::spawn(move || asking.wait());
        return None;
    };
    let ended = asking.wait().and_then(|status| Ok((status, said?)));
    Some(match ended {
        Ok((status, text)) if status.success() => understood(root, STATUS_XATTR, &text),
        Ok(_) => Err(Error::MountPoint {
            path: root.to_path_buf(),
            why: "its daemon gives no status".into(),
        }),
        Err(error) => Err(failed(error)),
    })
}

/// Asks for the status of the snapshot whose root is `path` (`<mount>/<snapshot-dir>/<name>`).
pub fn snapshot_status(path: &Path) -> Result<SnapshotStatus> {
    query(path, SNAPSHOT_XATTR)
}

/// Holds the snapshot whose root is `path`, or lets it go.
///
/// # Errors
/// The errno of setxattr(2).
pub fn hold(path: &Path, held: bool) -> std::result::Result<(), Errno> {
    let value = if held { b"1" } else { b"0" };
    rustix::fs::setxattr(path, HELD_XATTR, value, rustix::fs::XattrFlags::empty())
}

/// Has the daemon of the live mount whose root directory is `root` look its store over; returns its report.
pub fn check<T: DeserializeOwned>(root: &Path) -> Result<T> {
    query(root, CHECK_XATTR)
}

/// Gives the daemon the order to serve the snapshot whose root is `path` (`<mount>/<snapshot-dir>/<name>`).
pub fn order_mount(path: &Path, order: &MountOrder) -> Result<MountAnswer> {
    query(path, &order.name())
}

/// The root and status of the live mount of a store: `path` is anything in that mount or in the mount of one of its
/// snapshots, or the backing directory. `None` if there is no such mount to be seen.
pub fn find_live(path: &Path) -> Result<Option<(PathBuf, Status)>> {
    let real = canonical(path)?;
    let mounts = mounts::read()?;
    let mut source = real.clone();
    if mounts::of(&real, &mounts).is_some_and(MountEntry::is_cowfs) {
        let root = find_mount(&real)?;
        let status = status(&root)?;
        if status.snapshot.is_none() {
            return Ok(Some((root, status)));
        }
        source = status.source.into();
    }
    let whole = |mount: &&MountEntry| mount.is_cowfs() && mount.root == Path::new("/");
    let mut whole: Vec<_> = mounts.iter().filter(whole).collect();
    // Unless it was given another name, the mount table says which it is: no need to ask the others.
    whole.sort_by_key(|mount| mount.source != source);
    for mount in whole {
        let answer = match mount.source == source {
            true => Some(status(&mount.mountpoint)),
            false => status_in_time(&mount.mountpoint, ANSWER),
        };
        // One that does not answer is dead, or another's that hangs.
        if let Some(Ok(status)) = answer
            && status.snapshot.is_none()
            && status.source == source.to_string_lossy()
        {
            return Ok(Some((mount.mountpoint.clone(), status)));
        }
    }
    Ok(None)
}

/// The message for a mount whose daemon is gone.
#[must_use]
pub fn dead_mount(path: &Path) -> Error {
    Error::MountPoint {
        path: path.to_path_buf(),
        why: format!(
            "the mount is dead, its daemon is gone; detach it with `umount -l '{}'` and mount anew \
             (nothing acknowledged is lost)",
            path.display()
        ),
    }
}

fn canonical(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path).map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::NOTCONN) => dead_mount(path),
        _ => Error::MountPoint {
            path: path.to_path_buf(),
            why: error.to_string(),
        },
    })
}

fn query<T: DeserializeOwned>(path: &Path, name: &str) -> Result<T> {
    let mut value = vec![0; XATTR_MAX];
    let length = rustix::fs::getxattr(path, name, &mut value).map_err(|errno| match errno {
        Errno::NOTCONN => dead_mount(path),
        Errno::NODATA | Errno::OPNOTSUPP => Error::MountPoint {
            path: path.to_path_buf(),
            why: format!("it does not answer {name}; is the daemon of another release?"),
        },
        errno => Error::path("cannot ask the daemon", path, errno),
    })?;
    understood(path, name, &value[..length])
}

fn understood<T: DeserializeOwned>(path: &Path, name: &str, text: &[u8]) -> Result<T> {
    serde_json::from_slice(text).map_err(|error| Error::MountPoint {
        path: path.to_path_buf(),
        why: format!("its {name} is not understood ({error}); is the daemon of another release?"),
    })
}

/// A name of one path component as text for people and JSON.
#[must_use]
pub fn lossy(name: impl AsRef<OsStr>) -> String {
    String::from_utf8_lossy(name.as_ref().as_bytes()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_read_as_it_was_written() {
        let order = MountOrder {
            fd: 7,
            device: "0:57".into(),
        };
        assert_eq!(MountOrder::parse(order.name().as_ref()), Some(order));
        for wrong in ["", "7", "7.", "-1.0:5", "7.0", "7.0:x", "x.0:5", "7.0:5.1"] {
            let name = format!("{MOUNT_XATTR}{wrong}");
            assert_eq!(MountOrder::parse(name.as_ref()), None, "{name}");
        }
        assert_eq!(MountOrder::parse(STATUS_XATTR.as_ref()), None);
    }

    #[test]
    fn a_plain_directory_is_no_mount() {
        let error = find_mount(Path::new("/proc")).unwrap_err();
        assert_eq!(error.exit_code(), 4);
        assert!(error.to_string().contains("not in a cowfs mount"));
    }
}
