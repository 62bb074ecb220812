//! The running mount's interface for the command line: hidden extended attributes that the daemon answers
//! and never lists. There is no socket, so whoever can read the mount's root can ask, and nothing is left
//! behind by a daemon that was killed.

use crate::error::{Error, Result};
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// On the root directory of a mount: a [`Status`] as JSON.
pub const STATUS_XATTR: &str = "user.cowfs.status";
/// On `<mount>/<snapshot-dir>/<name>`: a [`SnapshotStatus`] as JSON.
pub const SNAPSHOT_XATTR: &str = "user.cowfs.snapshot";
/// The type that the mount table shows.
pub const FS_TYPE: &str = "fuse.cowfs";

/// The largest value that an extended attribute can have.
const XATTR_MAX: usize = 65536;

/// What a running mount says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// Process id of the daemon.
    pub pid: u32,
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
    /// "write-through".
    pub cache: String,
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
    /// Files without a visible name that a snapshot still shows.
    pub retained_files: u64,
    /// Open files and directories.
    pub open_files: u64,
    /// Objects that the kernel knows.
    pub known_objects: u64,
    /// The newest cut of this daemon.
    pub last_cut: Option<CutStatus>,
    /// What was found damaged, one line each.
    pub damage: Vec<String>,
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
}

/// One line of the mount table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Device number as the table writes it, "major:minor".
    pub device: String,
    /// Which part of the filesystem is mounted; "/" unless it is a bind mount.
    pub root: PathBuf,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// Filesystem type.
    pub fstype: String,
    /// What the table shows as source.
    pub source: OsString,
}

impl MountEntry {
    /// Whether it is a cowfs mount.
    #[must_use]
    pub fn is_cowfs(&self) -> bool {
        self.fstype == FS_TYPE
    }

    /// Whether it is a FUSE mount of any kind.
    #[must_use]
    pub fn is_fuse(&self) -> bool {
        self.fstype == "fuse" || self.fstype.starts_with("fuse.") || self.fstype == "fuseblk"
    }
}

/// The mounts that this process sees, in the order of the table (of two at one place, the later covers the
/// earlier).
pub fn mounts() -> Result<Vec<MountEntry>> {
    let table = "/proc/self/mountinfo";
    let text = std::fs::read(table).map_err(|error| Error::io("cannot read", table, &error))?;
    Ok(parse_mountinfo(&text))
}

/// The mount that holds `path` (which must be absolute and without symbolic links), whatever its type.
#[must_use]
pub fn mount_of<'a>(path: &Path, mounts: &'a [MountEntry]) -> Option<&'a MountEntry> {
    mounts
        .iter()
        .filter(|mount| path.starts_with(&mount.mountpoint))
        // max_by_key gives the last of equals, which is the mount on top.
        .max_by_key(|mount| mount.mountpoint.as_os_str().len())
}

/// The root of the cowfs mount that contains `path`: any file or directory in it, or in one of its snapshots.
pub fn find_mount(path: &Path) -> Result<PathBuf> {
    let real = canonical(path)?;
    let mounts = mounts()?;
    let found = mount_of(&real, &mounts).filter(|mount| mount.is_cowfs());
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
    query(root, STATUS_XATTR)
}

/// Asks for the status of the snapshot whose root is `path` (`<mount>/<snapshot-dir>/<name>`).
pub fn snapshot_status(path: &Path) -> Result<SnapshotStatus> {
    query(path, SNAPSHOT_XATTR)
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
    serde_json::from_slice(&value[..length]).map_err(|error| Error::MountPoint {
        path: path.to_path_buf(),
        why: format!("its {name} is not understood ({error}); is the daemon of another release?"),
    })
}

/// Parses `/proc/self/mountinfo`; a line that is not understood is left out.
fn parse_mountinfo(text: &[u8]) -> Vec<MountEntry> {
    text.split(|&byte| byte == b'\n')
        .filter_map(parse_mount)
        .collect()
}

fn parse_mount(line: &[u8]) -> Option<MountEntry> {
    let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
    // A number of optional fields, ended by "-", stands between the two fixed parts.
    let dash = fields.iter().skip(6).position(|field| *field == b"-")? + 6;
    Some(MountEntry {
        device: String::from_utf8_lossy(fields[2]).into_owned(),
        root: unescape(fields[3]).into(),
        mountpoint: unescape(fields[4]).into(),
        fstype: String::from_utf8_lossy(fields.get(dash + 1)?).into_owned(),
        source: unescape(fields.get(dash + 2)?),
    })
}

/// Takes back the octal escapes of the mount table (`\040` is a space).
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        match tail {
            [
                a @ b'0'..=b'3',
                b @ b'0'..=b'7',
                c @ b'0'..=b'7',
                after @ ..,
            ] if first == b'\\' => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => {
                out.push(first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(out)
}

/// A name of one path component as text for people and JSON.
#[must_use]
pub fn lossy(name: impl AsRef<OsStr>) -> String {
    String::from_utf8_lossy(name.as_ref().as_bytes()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 22 0:50 / /mnt/a\\040b rw,nosuid - fuse.cowfs /data\\011x rw,user_id=0
41 40 0:51 / /mnt/a\\040b/sub rw master:3 propagate_from:1 - tmpfs tmpfs rw
42 22 0:50 /part /bind rw - fuse.cowfs /data\\011x rw
43 22 0:52 / /over rw - ext4 /dev/vdb rw
44 43 0:53 / /over rw - fuse.cowfs /over rw
45 22 0:54 / /slash\\134back\\012line rw - fuse /dev/fuse rw
nonsense
";

    #[test]
    fn the_table_is_parsed_with_its_escapes() {
        let mounts = parse_mountinfo(TABLE);
        assert_eq!(mounts.len(), 7);
        assert_eq!(
            mounts[1],
            MountEntry {
                device: "0:50".into(),
                root: "/".into(),
                mountpoint: "/mnt/a b".into(),
                fstype: "fuse.cowfs".into(),
                source: "/data\tx".into(),
            }
        );
        assert_eq!(mounts[3].root, Path::new("/part"));
        assert_eq!(mounts[6].mountpoint, Path::new("/slash\\back\nline"));
        assert!(mounts[6].is_fuse() && !mounts[6].is_cowfs());
    }

    #[test]
    fn the_longest_and_topmost_mount_holds_a_path() {
        let mounts = parse_mountinfo(TABLE);
        let source = |path: &str| mount_of(Path::new(path), &mounts).unwrap().source.clone();
        assert_eq!(source("/etc"), "/dev/vda");
        assert_eq!(source("/mnt/a b"), "/data\tx");
        assert_eq!(source("/mnt/a b/.snapshots/x/f"), "/data\tx");
        assert_eq!(source("/mnt/a bc"), "/dev/vda");
        assert_eq!(source("/mnt/a b/sub/f"), "tmpfs");
        assert_eq!(source("/over/f"), "/over");
    }

    #[test]
    fn a_plain_directory_is_no_mount() {
        let error = find_mount(Path::new("/proc")).unwrap_err();
        assert_eq!(error.exit_code(), 4);
        assert!(error.to_string().contains("not in a cowfs mount"));
    }
}
