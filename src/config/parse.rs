//! The `-o` arguments.

use super::{
    CacheMode, Durability, Idle, LONGEST_SYNC_INTERVAL_MS, MountOptions, STORE_DIR, space,
};
use crate::error::{Error, Result};
use crate::ids::is_snapshot_name;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The options that cowfs knows, as an error message lists them.
pub const KNOWN_OPTIONS: &str = "ro, rw, allow_other, no_allow_other, nosuid, nodev, noexec, noatime, \
    snapshot=NAME, store=DIR, store-limit=SIZE, store-reserve=SIZE|N%, on-full=drop|invalidate|enospc, \
    user-snapshots, no-user-snapshots, snapshot-dir=NAME, durability=ordered|strict, cache=write-through|writeback, \
    sync-interval=MS, idle=poll|halt, \
    fsname=NAME, remount; ignored as mount(8) and fstab use them: defaults, auto, noauto, nofail, user, users, \
    nouser, owner, group, _netdev, async, relatime, nodiratime, strictatime, lazytime, \
    default_permissions, user_id=UID, group_id=GID, comment=TEXT, x-*";

/// Options of mount(8) and fstab that change nothing here.
const IGNORED: &[&[u8]] = &[
    b"defaults",
    b"auto",
    b"noauto",
    b"nofail",
    b"user",
    b"users",
    b"nouser",
    b"owner",
    b"group",
    b"_netdev",
    b"async",
    b"relatime",
    b"norelatime",
    b"diratime",
    b"nodiratime",
    b"strictatime",
    b"nostrictatime",
    b"lazytime",
    b"nolazytime",
    b"default_permissions",
];

/// Parses the `-o` arguments, each a list with commas; the later of two that contradict each other wins.
/// A comma or backslash inside a value is written `\,` or `\\`.
pub fn parse_options<S: AsRef<OsStr>>(lists: &[S]) -> Result<MountOptions> {
    let mut options = MountOptions::default();
    for list in lists {
        for item in split(list.as_ref().as_bytes()) {
            if !item.is_empty() {
                apply(&mut options, &item)?;
            }
        }
    }
    Ok(options)
}

/// Cuts a list at its commas and takes the backslashes away.
fn split(list: &[u8]) -> Vec<Vec<u8>> {
    let mut items = vec![Vec::new()];
    let mut bytes = list.iter().copied();
    while let Some(byte) = bytes.next() {
        let last = items.len() - 1;
        match byte {
            b',' => items.push(Vec::new()),
            b'\\' => items[last].push(bytes.next().unwrap_or(b'\\')),
            _ => items[last].push(byte),
        }
    }
    items
}

fn apply(options: &mut MountOptions, item: &[u8]) -> Result<()> {
    let (name, value) = match item.iter().position(|&byte| byte == b'=') {
        Some(at) => (&item[..at], Some(&item[at + 1..])),
        None => (item, None),
    };
    match (name, value) {
        (b"ro", None) => options.read_only = true,
        (b"rw", None) => options.read_only = false,
        (b"allow_other", None) => options.allow_other = Some(true),
        (b"no_allow_other", None) => options.allow_other = Some(false),
        (b"nosuid", None) => options.nosuid = true,
        (b"suid", None) => options.nosuid = false,
        (b"nodev", None) => options.nodev = true,
        (b"dev", None) => options.nodev = false,
        (b"noexec", None) => options.noexec = true,
        (b"exec", None) => options.noexec = false,
        (b"noatime", None) => options.noatime = true,
        (b"atime", None) => options.noatime = false,
        (b"store", Some(value)) => options.store = Some(store(value)?),
        (b"snapshot-dir", Some(value)) => options.snapshot_dir = snapshot_dir(value)?,
        (b"durability", Some(value)) => options.durability = durability(value)?,
        (b"cache", Some(value)) => options.cache = cache(value)?,
        (b"sync-interval", Some(value)) => options.sync_interval = sync_interval(value)?,
        (b"idle", Some(value)) => options.idle = idle(value)?,
        (b"store-limit", Some(value)) => options.space.limit = Some(space::limit(value)?),
        (b"store-reserve", Some(value)) => options.space.reserve = space::reserve(value)?,
        (b"on-full", Some(value)) => options.space.on_full = space::on_full(value)?,
        (b"user-snapshots", None) => options.user_snapshots = true,
        (b"no-user-snapshots", None) => options.user_snapshots = false,
        (b"fsname", Some(value)) => options.fsname = Some(fsname(value)?),
        (b"snapshot", Some(value)) => options.snapshot = Some(snapshot(value)?),
        (
            b"store" | b"store-limit" | b"store-reserve" | b"on-full" | b"snapshot-dir"
            | b"durability" | b"cache" | b"sync-interval" | b"idle" | b"fsname" | b"snapshot",
            None,
        ) => {
            return Err(Error::Usage(format!(
                "mount option {:?} needs a value, as in \"{0}=...\"",
                lossy(name)
            )));
        }
        (b"remount", None) => options.remount = true,
        // What the mount table shows, and mount(8) gives back for a remount, is a word on the mounter.
        (b"comment", _) | (b"user_id" | b"group_id", Some(_)) => {}
        (_, None) if IGNORED.contains(&name) => {}
        _ if name.starts_with(b"x-") || name.starts_with(b"X-") => {}
        _ => {
            return Err(Error::Usage(format!(
                "unknown mount option {:?}; known: {KNOWN_OPTIONS}",
                lossy(item)
            )));
        }
    }
    Ok(())
}

pub(super) fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn store(value: &[u8]) -> Result<PathBuf> {
    if value.is_empty() {
        return Err(Error::Usage("store= needs a directory".into()));
    }
    Ok(Path::new(OsStr::from_bytes(value)).to_path_buf())
}

fn snapshot_dir(value: &[u8]) -> Result<Vec<u8>> {
    let why = if value.is_empty() || value.len() > 255 {
        "1 to 255 bytes"
    } else if value.contains(&b'/') {
        "one name, without a slash"
    } else if matches!(value, b"." | b"..") {
        "not \".\" or \"..\""
    } else if value == STORE_DIR.as_bytes() {
        "not \".cowfs\", which is the store"
    } else if std::str::from_utf8(value).is_err() {
        "valid UTF-8"
    } else {
        return Ok(value.to_vec());
    };
    Err(Error::Usage(format!(
        "invalid snapshot-dir {:?}: it must be {why}",
        lossy(value)
    )))
}

fn durability(value: &[u8]) -> Result<Durability> {
    match value {
        b"ordered" => Ok(Durability::Ordered),
        b"strict" => Ok(Durability::Strict),
        _ => Err(Error::Usage(format!(
            "invalid durability {:?}; choose ordered or strict",
            lossy(value)
        ))),
    }
}

fn cache(value: &[u8]) -> Result<CacheMode> {
    match value {
        b"write-through" => Ok(CacheMode::WriteThrough),
        b"writeback" => Ok(CacheMode::Writeback),
        _ => Err(Error::Usage(format!(
            "invalid cache mode {:?}; choose write-through or writeback",
            lossy(value)
        ))),
    }
}

fn idle(value: &[u8]) -> Result<Idle> {
    match value {
        b"poll" => Ok(Idle::Poll),
        b"halt" => Ok(Idle::Halt),
        _ => Err(Error::Usage(format!(
            "invalid idle {:?}; choose poll or halt",
            lossy(value)
        ))),
    }
}

fn sync_interval(value: &[u8]) -> Result<Duration> {
    std::str::from_utf8(value)
        .ok()
        .and_then(|text| text.parse().ok())
        .filter(|ms| (1..=LONGEST_SYNC_INTERVAL_MS).contains(ms))
        .map(Duration::from_millis)
        .ok_or_else(|| {
            Error::Usage(format!(
                "invalid sync-interval {:?}; give milliseconds from 1 to {LONGEST_SYNC_INTERVAL_MS}",
                lossy(value)
            ))
        })
}

fn snapshot(value: &[u8]) -> Result<OsString> {
    if is_snapshot_name(value) {
        Ok(OsStr::from_bytes(value).to_os_string())
    } else {
        Err(Error::SnapshotName(lossy(value)))
    }
}

fn fsname(value: &[u8]) -> Result<OsString> {
    if value.is_empty() {
        return Err(Error::Usage("fsname= needs a name".into()));
    }
    Ok(OsStr::from_bytes(value).to_os_string())
}
