//! The options of a mount: parsed and validated once, here; everything further in trusts them.

mod space;

pub use space::{OnFull, Reserve, SpacePolicy};

use crate::error::{Error, Result};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The name under which snapshots are reached unless `snapshot-dir=` says otherwise.
pub const DEFAULT_SNAPSHOT_DIR: &str = ".snapshots";
/// The folder of the store inside the backing directory.
pub const STORE_DIR: &str = ".cowfs";
/// How often the journal is synced in the background unless `sync-interval=` says otherwise.
pub const DEFAULT_SYNC_INTERVAL: Duration = Duration::from_millis(100);

const LONGEST_SYNC_INTERVAL_MS: u64 = 60_000;

/// When pre-images reach stable storage (C8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// In the background, and always before the fsync of the file that they guard.
    #[default]
    Ordered,
    /// Before the change that they guard.
    Strict,
}

/// How the kernel caches writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// Each `write(2)` reaches cowfs before it returns.
    #[default]
    WriteThrough,
    /// The kernel holds writes back, and a cut has it give them up.
    Writeback,
}

/// What a virtual machine's idle processors do while requests come one after another, where its kernel does not see to
/// that by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Idle {
    /// They poll for the next one.
    #[default]
    Poll,
    /// As the kernel has it.
    Halt,
}

impl Durability {
    /// The word that the option and `cowfs status` use.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ordered => "ordered",
            Self::Strict => "strict",
        }
    }
}

impl CacheMode {
    /// The word that the option and `cowfs status` use.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::WriteThrough => "write-through",
            Self::Writeback => "writeback",
        }
    }
}

impl Idle {
    /// The word that the option uses.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Poll => "poll",
            Self::Halt => "halt",
        }
    }
}

/// The `-o` options of a mount, before the directories are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountOptions {
    /// Nothing of the live tree can be changed.
    pub read_only: bool,
    /// Other users may use the mount; `None`: only if root mounts.
    pub allow_other: Option<bool>,
    /// Set-user-id and set-group-id bits and capabilities of files have no effect.
    pub nosuid: bool,
    /// Device files cannot be opened.
    pub nodev: bool,
    /// Files cannot be executed.
    pub noexec: bool,
    /// Access times are not kept.
    pub noatime: bool,
    /// The directory of the store, if not `.cowfs` in the source.
    pub store: Option<PathBuf>,
    /// The name under which snapshots are reached.
    pub snapshot_dir: Vec<u8>,
    /// When pre-images reach stable storage.
    pub durability: Durability,
    /// How the kernel caches writes.
    pub cache: CacheMode,
    /// How often the journal is synced in the background.
    pub sync_interval: Duration,
    /// What idle processors do between two requests.
    pub idle: Idle,
    /// What the mount table shows as the source, if not the path of the source.
    pub fsname: Option<OsString>,
    /// How much space snapshots may take.
    pub space: SpacePolicy,
    /// Whoever may write to the root directory may create snapshots.
    pub user_snapshots: bool,
    /// The snapshot to mount by itself, in place of the live tree.
    pub snapshot: Option<OsString>,
    /// Change the flags of a mount that is there.
    pub remount: bool,
}

impl MountOptions {
    /// What a remount cannot change and these options name, if anything.
    #[must_use]
    pub fn fixed(&self) -> Option<&'static str> {
        let standard = Self::default();
        [
            ("store", self.store.is_some()),
            ("snapshot-dir", self.snapshot_dir != standard.snapshot_dir),
            ("durability", self.durability != standard.durability),
            ("cache", self.cache != standard.cache),
            ("store-limit", self.space.limit.is_some()),
            (
                "store-reserve",
                self.space.reserve != standard.space.reserve,
            ),
            ("on-full", self.space.on_full != standard.space.on_full),
            ("user-snapshots", self.user_snapshots),
            (
                "sync-interval",
                self.sync_interval != standard.sync_interval,
            ),
            ("idle", self.idle != standard.idle),
        ]
        .into_iter()
        .find_map(|(name, given)| given.then_some(name))
    }
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            allow_other: None,
            nosuid: false,
            nodev: false,
            noexec: false,
            noatime: false,
            store: None,
            snapshot_dir: DEFAULT_SNAPSHOT_DIR.into(),
            durability: Durability::default(),
            cache: CacheMode::default(),
            sync_interval: DEFAULT_SYNC_INTERVAL,
            idle: Idle::default(),
            fsname: None,
            space: SpacePolicy::default(),
            user_snapshots: false,
            snapshot: None,
            remount: false,
        }
    }
}

impl MountOptions {
    /// Refuses what has no meaning for the mount of a snapshot: that is up to the live mount.
    ///
    /// # Errors
    /// [`Error::Usage`] with the name of the first such option that is set to other than its default.
    pub fn check_for_snapshot(&self) -> Result<()> {
        let default = Self::default();
        let of_live = [
            (self.store != default.store, "store"),
            (self.snapshot_dir != default.snapshot_dir, "snapshot-dir"),
            (self.durability != default.durability, "durability"),
            (self.sync_interval != default.sync_interval, "sync-interval"),
            (self.idle != default.idle, "idle"),
            (self.space.limit.is_some(), "store-limit"),
            (self.space.reserve != default.space.reserve, "store-reserve"),
            (self.space.on_full != default.space.on_full, "on-full"),
            (self.user_snapshots, "user-snapshots"),
        ];
        match of_live.iter().find(|(set, _)| *set) {
            Some((_, name)) => Err(Error::Usage(format!(
                "mount option \"{name}\" belongs to the mount of the live tree, not to that of a snapshot"
            ))),
            None => Ok(()),
        }
    }
}

/// Everything that a mount needs to know. Paths are absolute and canonical.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountConfig {
    /// The backing directory.
    pub source: PathBuf,
    /// Where the live tree appears; may be the source itself.
    pub mountpoint: PathBuf,
    /// Nothing of the live tree can be changed.
    pub read_only: bool,
    /// Other users may use the mount.
    pub allow_other: bool,
    /// Set-user-id and set-group-id bits and capabilities of files have no effect.
    pub nosuid: bool,
    /// Device files cannot be opened.
    pub nodev: bool,
    /// Files cannot be executed.
    pub noexec: bool,
    /// Access times are not kept.
    pub noatime: bool,
    /// The directory of the store, if not `.cowfs` in the source.
    pub store: Option<PathBuf>,
    /// The name under which snapshots are reached: 1 to 255 bytes, one path component.
    pub snapshot_dir: Vec<u8>,
    /// When pre-images reach stable storage.
    pub durability: Durability,
    /// How the kernel caches writes.
    pub cache: CacheMode,
    /// How often the journal is synced in the background.
    pub sync_interval: Duration,
    /// What idle processors do between two requests.
    pub idle: Idle,
    /// How much space snapshots may take.
    pub space: SpacePolicy,
    /// Whoever may write to the root directory may create snapshots.
    pub user_snapshots: bool,
    /// What the mount table shows as the source.
    pub fsname: OsString,
}

impl MountConfig {
    /// Joins the options with the directories; `root` says whether the superuser mounts, who lets other
    /// users in unless told otherwise.
    #[must_use]
    pub fn new(source: PathBuf, mountpoint: PathBuf, options: MountOptions, root: bool) -> Self {
        Self {
            fsname: options
                .fsname
                .unwrap_or_else(|| source.clone().into_os_string()),
            source,
            mountpoint,
            read_only: options.read_only,
            allow_other: options.allow_other.unwrap_or(root),
            nosuid: options.nosuid,
            nodev: options.nodev,
            noexec: options.noexec,
            noatime: options.noatime,
            store: options.store,
            snapshot_dir: options.snapshot_dir,
            durability: options.durability,
            cache: options.cache,
            sync_interval: options.sync_interval,
            idle: options.idle,
            space: options.space,
            user_snapshots: options.user_snapshots,
        }
    }

    /// The `-o` argument that gives these very options again, for the daemon that is started in the background.
    #[must_use]
    pub fn to_options(&self) -> OsString {
        let mut out = Vec::new();
        let mut put = |name: &str, value: Option<&OsStr>| {
            if !out.is_empty() {
                out.push(b',');
            }
            out.extend_from_slice(name.as_bytes());
            if let Some(value) = value {
                out.push(b'=');
                for &byte in value.as_bytes() {
                    if matches!(byte, b',' | b'\\') {
                        out.push(b'\\');
                    }
                    out.push(byte);
                }
            }
        };
        put(if self.read_only { "ro" } else { "rw" }, None);
        put(
            if self.allow_other {
                "allow_other"
            } else {
                "no_allow_other"
            },
            None,
        );
        for (on, name) in [
            (self.nosuid, "nosuid"),
            (self.nodev, "nodev"),
            (self.noexec, "noexec"),
            (self.noatime, "noatime"),
        ] {
            if on {
                put(name, None);
            }
        }
        if let Some(store) = &self.store {
            put("store", Some(store.as_os_str()));
        }
        put("snapshot-dir", Some(OsStr::from_bytes(&self.snapshot_dir)));
        put("durability", Some(self.durability.as_str().as_ref()));
        put("cache", Some(self.cache.as_str().as_ref()));
        let interval = self.sync_interval.as_millis().to_string();
        put("sync-interval", Some(interval.as_ref()));
        put("idle", Some(self.idle.as_str().as_ref()));
        if let Some(limit) = self.space.limit {
            put("store-limit", Some(limit.to_string().as_ref()));
        }
        let reserve = self.space.reserve.to_string();
        put("store-reserve", Some(reserve.as_ref()));
        put("on-full", Some(self.space.on_full.as_str().as_ref()));
        let users = match self.user_snapshots {
            true => "user-snapshots",
            false => "no-user-snapshots",
        };
        put(users, None);
        put("fsname", Some(&self.fsname));
        OsString::from_vec(out)
    }
}

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

fn lossy(bytes: &[u8]) -> String {
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
    let good = (1..=255).contains(&value.len())
        && !value.contains(&b'/')
        && !matches!(value, b"." | b"..");
    if good {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn message(list: &str) -> String {
        let error = parse_options(&[list]).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    #[test]
    fn no_options_are_the_defaults() {
        let none: [&str; 0] = [];
        let options = parse_options(&none).unwrap();
        assert_eq!(options, MountOptions::default());
        assert_eq!(options.snapshot_dir, b".snapshots");
        assert_eq!(options.sync_interval, Duration::from_millis(100));
        let config = |root| MountConfig::new("/s".into(), "/m".into(), options.clone(), root);
        assert!(config(true).allow_other);
        assert!(!config(false).allow_other);
        assert_eq!(config(true).fsname, "/s");
    }

    #[test]
    fn every_option_is_understood() {
        let options = parse_options(&[
            "ro,nosuid,nodev,noexec,noatime,no_allow_other,store=/var/x\\,y",
            "snapshot-dir=.snap,durability=strict,cache=write-through,sync-interval=20,idle=halt,fsname=data",
            "store-limit=20G,store-reserve=5%,on-full=invalidate,user-snapshots",
        ])
        .unwrap();
        assert_eq!(
            options,
            MountOptions {
                read_only: true,
                allow_other: Some(false),
                nosuid: true,
                nodev: true,
                noexec: true,
                noatime: true,
                store: Some("/var/x,y".into()),
                snapshot_dir: b".snap".to_vec(),
                durability: Durability::Strict,
                cache: CacheMode::WriteThrough,
                sync_interval: Duration::from_millis(20),
                idle: Idle::Halt,
                fsname: Some("data".into()),
                space: SpacePolicy {
                    limit: Some(20 << 30),
                    reserve: Reserve::Percent(5),
                    on_full: OnFull::Invalidate,
                },
                user_snapshots: true,
                snapshot: None,
                remount: false,
            }
        );
    }

    #[test]
    fn a_snapshot_has_a_name_and_few_options() {
        let options = parse_options(&["snapshot=a\\,b,noatime,rw"]).unwrap();
        assert_eq!(options.snapshot.as_deref(), Some(OsStr::new("a,b")));
        options.check_for_snapshot().unwrap();
        for name in ["", ".", "..", "a/b", &"x".repeat(256)] {
            let error = parse_options(&[format!("snapshot={name}")]).unwrap_err();
            assert_eq!(error.exit_code(), 7, "{name}");
        }
        for other in [
            "store=/x",
            "snapshot-dir=.s",
            "durability=strict",
            "sync-interval=5",
            "idle=halt",
        ] {
            let options = parse_options(&[format!("snapshot=a,{other}")]).unwrap();
            let error = options.check_for_snapshot().unwrap_err().to_string();
            assert!(error.contains(other.split_once('=').unwrap().0), "{error}");
        }
    }

    #[test]
    fn fstab_words_are_ignored_and_the_later_word_wins() {
        let options = parse_options(&[
            "defaults,noauto,auto,nofail,user,users,nouser,owner,group,_netdev,async,relatime,\
             diratime,nodiratime,strictatime,lazytime,default_permissions,x-systemd.automount,\
             x-gvfs-name=a b,comment=systemd.mount,,",
        ])
        .unwrap();
        assert_eq!(options, MountOptions::default());
        let options = parse_options(&["ro,noexec,nosuid,nodev,noatime", "rw,exec,suid,dev,atime"]);
        assert_eq!(options.unwrap(), MountOptions::default());
    }

    #[test]
    fn a_remount_knows_what_it_cannot_change() {
        let fixed = |list: &str| parse_options(&[list]).unwrap().fixed();
        assert_eq!(
            fixed("rw,relatime,user_id=0,group_id=0,default_permissions,allow_other,remount,ro"),
            None
        );
        assert_eq!(fixed("remount,store=/elsewhere"), Some("store"));
        assert_eq!(fixed("remount,durability=strict"), Some("durability"));
        assert_eq!(fixed("remount,idle=halt"), Some("idle"));
    }

    #[test]
    fn wrong_options_are_named() {
        assert!(message("ro,bogus=1").contains("unknown mount option \"bogus=1\"; known: ro, rw,"));
        assert!(message("ro=1").contains("\"ro=1\""));
        assert!(message("store").contains("needs a value"));
        assert!(message("cache=none").contains("write-through or writeback"));
        assert!(message("durability=none").contains("ordered or strict"));
        assert!(message("idle=off").contains("poll or halt"));
        assert!(message("remount=1").contains("\"remount=1\""));
        for interval in ["0", "-1", "1.5", "60001", "", "99999999999999999999"] {
            assert!(message(&format!("sync-interval={interval}")).contains("milliseconds"));
        }
    }

    #[test]
    fn snapshot_dir_is_one_name() {
        for name in ["", ".", "..", ".cowfs", "a/b", "/"] {
            assert!(message(&format!("snapshot-dir={name}")).contains("invalid snapshot-dir"));
        }
        assert!(message(&format!("snapshot-dir={}", "x".repeat(256))).contains("255"));
        assert!(parse_options(&[format!("snapshot-dir={}", "x".repeat(255))]).is_ok());
        assert!(parse_options(&[OsStr::from_bytes(b"snapshot-dir=\xff")]).is_err());
    }

    #[test]
    fn rendered_options_parse_to_the_same_config() {
        let odd = OsStr::from_bytes(b"/a,b\\c=d\xff\n e");
        let mut options = parse_options(&["ro,noexec,sync-interval=7,idle=halt,durability=strict,store-limit=1G,store-reserve=7%,on-full=enospc,user-snapshots"]).unwrap();
        options.store = Some(odd.into());
        options.fsname = Some(odd.into());
        options.snapshot_dir = b"sn,ap\\s=".to_vec();
        let config = MountConfig::new("/s".into(), "/m".into(), options, true);
        let again = parse_options(&[config.to_options()]).unwrap();
        // Root or not no longer matters: the rendered options say it.
        let again = MountConfig::new("/s".into(), "/m".into(), again, false);
        assert_eq!(config, again);
    }
}
