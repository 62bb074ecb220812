//! The options of a mount: parsed and validated once, here; everything further in trusts them.

mod parse;
mod space;

pub use parse::{KNOWN_OPTIONS, parse_options};
pub use space::{OnFull, Reserve, SpacePolicy};

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
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
    /// The first option that is set to other than its default and that the mount of the live tree fixes: neither a remount
    /// nor the mount of a snapshot has it.
    #[must_use]
    pub fn of_live_mount(&self) -> Option<&'static str> {
        let (default, space) = (Self::default(), SpacePolicy::default());
        [
            ("store", self.store != default.store),
            ("snapshot-dir", self.snapshot_dir != default.snapshot_dir),
            ("durability", self.durability != default.durability),
            ("cache", self.cache != default.cache),
            ("sync-interval", self.sync_interval != default.sync_interval),
            ("idle", self.idle != default.idle),
            ("store-limit", self.space.limit != space.limit),
            ("store-reserve", self.space.reserve != space.reserve),
            ("on-full", self.space.on_full != space.on_full),
            ("user-snapshots", self.user_snapshots),
        ]
        .into_iter()
        .find_map(|(name, set)| set.then_some(name))
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
        assert_eq!(options.of_live_mount(), None);
        for name in ["", ".", "..", "a/b", &"x".repeat(256)] {
            let error = parse_options(&[format!("snapshot={name}")]).unwrap_err();
            assert_eq!(error.exit_code(), 7, "{name}");
        }
        for other in [
            "store=/x",
            "snapshot-dir=.s",
            "durability=strict",
            "cache=writeback",
            "sync-interval=5",
            "idle=halt",
            "store-limit=1G",
            "store-reserve=5%",
            "on-full=enospc",
        ] {
            let options = parse_options(&[format!("snapshot=a,{other}")]).unwrap();
            let name = other.split_once('=').unwrap().0;
            assert_eq!(options.of_live_mount(), Some(name));
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
        let fixed = |list: &str| parse_options(&[list]).unwrap().of_live_mount();
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
