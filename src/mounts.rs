//! The mount table, as far as this process sees it (proc(5), mount_namespaces(7)).

use crate::error::{Error, Result};
use std::collections::HashSet;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The type that the mount table shows.
pub const FS_TYPE: &str = "fuse.cowfs";

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
pub fn read() -> Result<Vec<MountEntry>> {
    let table = "/proc/self/mountinfo";
    let text = std::fs::read(table).map_err(|error| Error::io("cannot read", table, &error))?;
    Ok(parse(&text))
}

/// Where the cowfs filesystem with this device number is mounted, as far as this process sees.
#[must_use]
pub fn place_of(device: &str) -> Option<PathBuf> {
    let mut mounts = read().ok()?.into_iter();
    let mount = mounts.find(|mount| mount.device == device && mount.is_cowfs())?;
    Some(mount.mountpoint)
}

/// A process that sees the cowfs filesystem with this device number mounted, whatever namespace it is in
/// (mount_namespaces(7)).
#[must_use]
pub fn who_sees(device: &str) -> Option<u32> {
    let mut looked_at = HashSet::new();
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.find(|pid: &u32| {
        let of = Path::new("/proc").join(pid.to_string());
        // One that has ended, or is somebody else's, has none.
        let Ok(namespace) = std::fs::read_link(of.join("ns/mnt")) else {
            return false;
        };
        if !looked_at.insert(namespace) {
            return false;
        }
        let text = std::fs::read(of.join("mountinfo")).unwrap_or_default();
        let mounts = parse(&text);
        mounts.iter().any(|at| at.device == device && at.is_cowfs())
    })
}

/// The mount that holds `path` (which must be absolute and without symbolic links), whatever its type.
#[must_use]
pub fn of<'a>(path: &Path, mounts: &'a [MountEntry]) -> Option<&'a MountEntry> {
    mounts
        .iter()
        .filter(|mount| path.starts_with(&mount.mountpoint))
        // max_by_key gives the last of equals, which is the mount on top.
        .max_by_key(|mount| mount.mountpoint.as_os_str().len())
}

/// Parses `/proc/self/mountinfo`; a line that is not understood is left out.
#[must_use]
pub fn parse(text: &[u8]) -> Vec<MountEntry> {
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
        let mounts = parse(TABLE);
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
        let mounts = parse(TABLE);
        let source = |path: &str| of(Path::new(path), &mounts).unwrap().source.clone();
        assert_eq!(source("/etc"), "/dev/vda");
        assert_eq!(source("/mnt/a b"), "/data\tx");
        assert_eq!(source("/mnt/a b/.snapshots/x/f"), "/data\tx");
        assert_eq!(source("/mnt/a bc"), "/dev/vda");
        assert_eq!(source("/mnt/a b/sub/f"), "tmpfs");
        assert_eq!(source("/over/f"), "/over");
    }
}
