//! `cowfs mount`: check what can be checked with a clear word, then serve, in the foreground or as a daemon.

use super::keeper::{self, Inherited};
use super::{Failure, daemon, mount_snapshot};
use crate::config::{MountConfig, MountOptions, STORE_DIR, parse_options};
use crate::control;
use crate::error::{Error, Result};
use crate::fuse;
use crate::mounts::{self, MountEntry};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Mount a directory so that snapshots of it can be cut.
///
/// The live tree appears at MOUNTPOINT, or at SOURCE itself when no MOUNTPOINT is given. Returns when the mount
/// is usable. Work in the mount, not in SOURCE: what changes behind the back of cowfs is in no snapshot.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Args {
    /// Stay in the foreground; SIGINT and SIGTERM unmount.
    #[arg(short, long)]
    pub(super) foreground: bool,
    /// Mount options, a list with commas; may be given again. See below.
    #[arg(short = 'o', value_name = "OPTS")]
    options: Vec<OsString>,
    /// Log more; twice for debugging, three times for every request.
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Append log messages to FILE [default: stderr in the foreground, nowhere in the background].
    #[arg(long, value_name = "FILE")]
    pub(super) log: Option<PathBuf>,
    /// This process is the daemon: report on stdout, then detach.
    #[arg(long, hide = true, requires = "foreground")]
    daemon: bool,
    #[command(flatten)]
    inherited: Inherited,
    /// The directory that holds the data.
    pub(super) source: PathBuf,
    /// Where to mount it [default: SOURCE itself].
    pub(super) mountpoint: Option<PathBuf>,
}

impl Args {
    /// A mount in the background, without options.
    pub(super) fn plain(source: PathBuf, mountpoint: PathBuf) -> Self {
        Self {
            foreground: false,
            options: Vec::new(),
            verbose: 0,
            log: None,
            daemon: false,
            inherited: Inherited::NONE,
            source,
            mountpoint: Some(mountpoint),
        }
    }
}

const EXAMPLE: &str = "\
OPTIONS OF -o
  ro                       nothing can be changed
  allow_other              other users may use the mount (default for root)
  no_allow_other           only the user who mounts (default for others)
  nosuid,nodev,noexec      as for every filesystem
  noatime                  keep no access times
  snapshot=NAME            mount one snapshot by itself, read-only, with the inode numbers of the live tree;
                           SOURCE is mounted already, or a path in its mount
  store=DIR                keep the store in DIR, not in SOURCE/.cowfs
  store-limit=SIZE         what snapshots may take, as in 20G (default: what the disk has)
  store-reserve=SIZE, N%   what must stay free on the disk (default 0)
  on-full=drop             without room the oldest snapshots that are not held go (default)
  on-full=invalidate       those that would miss something become invalid
  on-full=enospc           changes fail with ENOSPC
  user-snapshots           whoever may write to the root directory may create snapshots
  snapshot-dir=NAME        reach snapshots as NAME, not as .snapshots
  durability=ordered       sync what snapshots need in the background (default)
  durability=strict        sync it before each change that it guards
  cache=write-through      each write reaches cowfs before it returns (default)
  cache=writeback          the kernel holds writes back; cuts hold writers for a moment (root, Linux 6.16)
  sync-interval=MS         how often to sync in the background (default 100)
  idle=poll                idle processors of a virtual machine poll while requests come one after another (default)
  idle=halt                they are left to the kernel
  fsname=NAME              what the mount table shows as source
  remount                  give a mount that is there these flags: ro, nosuid, nodev, noexec, noatime
  Permissions are always checked by the kernel (default_permissions). Options of fstab such as defaults, noauto,
  nofail, user, _netdev and x-* are accepted and mean nothing here. Inside a value write \\, for a comma.

EXAMPLE
  cowfs mount /srv/data                            over itself
  cowfs mount -o ro,noatime /srv/data /mnt/data    somewhere else
  cowfs mount -f -v /srv/data                      in the foreground, with messages
  cowfs mount -o snapshot=monday /srv/data /backup-source

  In /etc/fstab, with `ln -s \"$(command -v cowfs)\" /sbin/mount.fuse.cowfs`:
  /srv/data  /srv/data  fuse.cowfs  defaults,nofail  0  0";

/// The arguments that mount(8) gives to its helpers.
#[derive(clap::Parser)]
#[command(name = "mount.fuse.cowfs", version, after_help = HELPER_EXAMPLE)]
pub(super) struct HelperArgs {
    /// The directory that holds the data.
    source: PathBuf,
    /// Where to mount it.
    mountpoint: PathBuf,
    /// Mount options, a list with commas.
    #[arg(short = 'o', value_name = "OPTS")]
    options: Vec<OsString>,
    /// Fake: check everything, but mount nothing.
    #[arg(short)]
    fake: bool,
    /// Log more.
    #[arg(short, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Ignored, as are -n, -t and -N.
    #[arg(short)]
    sloppy: bool,
    #[arg(short, hide = true)]
    no_mtab: bool,
    #[arg(short, hide = true)]
    t: Option<String>,
    #[arg(short = 'N', hide = true)]
    namespace: Option<PathBuf>,
}

const HELPER_EXAMPLE: &str = "\
EXAMPLE
  mount -t fuse.cowfs /srv/data /srv/data      calls this helper";

pub(super) fn run_as_helper(args: &HelperArgs) -> std::result::Result<(), Failure> {
    let fake = args.fake;
    let args = Args {
        options: args.options.clone(),
        verbose: args.verbose,
        ..Args::plain(args.source.clone(), args.mountpoint.clone())
    };
    if fake {
        let options = parse_options(&args.options)?;
        if options.remount {
            return Ok(());
        }
        match options.snapshot.clone() {
            Some(name) => mount_snapshot::prepare(&args, options, &name).map(drop)?,
            None => prepare(&args, options).map(drop)?,
        }
        return Ok(());
    }
    run(&args)
}

pub(super) fn run(args: &Args) -> std::result::Result<(), Failure> {
    let options = parse_options(&args.options)?;
    if let Some(kept) = args.inherited.take()? {
        return serve(args, options, kept);
    }
    if options.remount {
        return Ok(remount(args, &options)?);
    }
    if let Some(name) = options.snapshot.clone() {
        return mount_snapshot::run(&mount_snapshot::prepare(args, options, &name)?);
    }
    let config = prepare(args, options);
    match (args.daemon, args.foreground) {
        (true, _) => daemon::report(|ready| keep(&config?, args, ready)),
        (false, true) => keep(&config?, args, || Ok(())),
        (false, false) => {
            let config = config?;
            daemon::spawn(&launch(&config, args))?;
            look_at(&config.mountpoint);
            Ok(())
        }
    }
}

/// Until it has asked for the attributes of the root, the kernel takes it for root's own (`fuse_get_root_inode` of
/// fs/fuse/inode.c), and refuses its owner a chmod(2). Not by the daemon: a process that waits for itself cannot be killed.
fn look_at(mountpoint: &Path) {
    if let Err(errno) = rustix::fs::stat(mountpoint) {
        log::debug!("{}: {errno}", mountpoint.display());
    }
}

/// `-o remount`: new flags for a mount that is there. The source is not looked at, as with any filesystem.
fn remount(args: &Args, options: &MountOptions) -> Result<()> {
    if let Some(fixed) = options.of_live_mount() {
        return Err(Error::Usage(format!(
            "mount option {fixed:?} cannot be changed by a remount; `cowfs umount` and mount anew"
        )));
    }
    let path = args.mountpoint.as_ref().unwrap_or(&args.source);
    let refuse = |why: String| Error::MountPoint {
        path: path.clone(),
        why,
    };
    let place = std::fs::canonicalize(path).map_err(|error| refuse(error.to_string()))?;
    let mounts = mounts::read()?;
    if !mounts::of(&place, &mounts)
        .is_some_and(|mount| mount.mountpoint == place && mount.is_cowfs())
    {
        return Err(refuse(
            "no cowfs is mounted here that could be remounted; leave out \"remount\" to mount"
                .into(),
        ));
    }
    fuse::remount(&place, options)
}

fn launch<'a>(config: &'a MountConfig, args: &'a Args) -> daemon::Launch<'a> {
    daemon::Launch {
        config,
        verbose: args.verbose,
        log: args.log.as_deref(),
        daemon: args.daemon,
    }
}

/// Keeps the mount until it is unmounted. `ready` is told when it is usable.
fn keep(
    config: &MountConfig,
    args: &Args,
    ready: impl Fn() -> Result<()>,
) -> std::result::Result<(), Failure> {
    let log = args.log.as_deref().map(open_log).transpose()?;
    start_logging(args.verbose, log.as_ref())?;
    keeper::keep(&launch(config, args), || {
        if args.daemon {
            daemon::leave_stderr(log.as_ref())?;
        }
        ready()
    })
}

/// Serves the mount that a keeper keeps. What was to be checked has been checked.
fn serve(args: &Args, options: MountOptions, kept: fuse::Kept) -> std::result::Result<(), Failure> {
    let log = args.log.as_deref().map(open_log).transpose()?;
    start_logging(args.verbose, log.as_ref())?;
    // What cowfs makes for itself is nobody else's; what it makes for others has their umask.
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let mountpoint = args
        .mountpoint
        .clone()
        .unwrap_or_else(|| args.source.clone());
    let root = rustix::process::geteuid().is_root();
    let config = MountConfig::new(args.source.clone(), mountpoint, options, root);
    let (daemon, log) = (args.daemon, log.as_ref());
    let served = fuse::serve(config, kept, || {
        if daemon && let Err(error) = daemon::leave_stderr(log) {
            log::warn!("{error}");
        }
    });
    match served {
        Ok(()) => Ok(()),
        Err(ended) => std::process::exit(keeper::exit_code(&ended)),
    }
}

fn open_log(path: &Path) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o640)
        .open(path)
        .map_err(|error| Error::io("cannot open the log", path, &error))
}

fn start_logging(verbose: u8, log: Option<&File>) -> Result<()> {
    let filter = match verbose {
        0 => "warn",
        1 => "warn,cowfs=info",
        2 => "warn,cowfs=debug",
        _ => "warn,cowfs=trace,fuser=debug",
    };
    let env = env_logger::Env::new().filter_or("COWFS_LOG", filter);
    let mut builder = env_logger::Builder::from_env(env);
    if let Some(log) = log {
        let log = log
            .try_clone()
            .map_err(|error| Error::io("cannot open", "the log", &error))?;
        builder.target(env_logger::Target::Pipe(Box::new(log)));
    }
    builder.init();
    Ok(())
}

/// Checks everything that can be told without opening the store.
fn prepare(args: &Args, mut options: MountOptions) -> Result<MountConfig> {
    let source = check_source(&args.source)?;
    let mountpoint = match &args.mountpoint {
        Some(path) => check_mountpoint(path, &source)?,
        None => check_mountpoint(&source, &source)?,
    };
    if let Some(store) = options.store.take() {
        options.store = Some(check_store(&store, &source, &mountpoint)?);
    }
    if let Some(log) = &args.log {
        check_log(log, &source, &mountpoint)?;
    }
    fuse::check_may_mount()?;
    let root = rustix::process::geteuid().is_root();
    Ok(MountConfig::new(source, mountpoint, options, root))
}

/// The log of a mount is not in the mount: it would change behind its back, and whoever takes the mount over would have to
/// be there to open it.
fn check_log(path: &Path, source: &Path, mountpoint: &Path) -> Result<()> {
    let place =
        with_parent(path).map_err(|error| Error::io("cannot open the log", path, &error))?;
    if [source, mountpoint]
        .iter()
        .any(|dir| place.starts_with(dir))
    {
        return Err(Error::Usage(format!(
            "--log {}: lies in the directory that is mounted; choose a file outside",
            path.display()
        )));
    }
    Ok(())
}

/// The canonical path of something that need not be there, in a directory that is.
fn with_parent(path: &Path) -> std::io::Result<PathBuf> {
    let absolute = std::path::absolute(path)?;
    if let Ok(real) = std::fs::canonicalize(&absolute) {
        return Ok(real);
    }
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => Ok(std::fs::canonicalize(parent)?.join(name)),
        _ => Err(std::io::ErrorKind::InvalidInput.into()),
    }
}

/// A mount of a directory that contains `source` or lies in it, with no other filesystem in between: one would change what the
/// other keeps, behind its back. Told by where they are in their filesystems: by path, a bind mount or a second mount of the
/// same disk would hide it.
fn overlapping<'m>(source: &Path, mounts: &'m [MountEntry]) -> Option<&'m MountEntry> {
    let place_of = |path: &Path| {
        let plain = mounts.iter().filter(|mount| !mount.is_cowfs());
        let inside =
            plain.filter_map(|mount| Some((mount, path.strip_prefix(&mount.mountpoint).ok()?)));
        let last = inside.max_by_key(|(mount, _)| mount.mountpoint.as_os_str().len());
        match last {
            Some((mount, inner)) => (Some(&mount.device), mount.root.join(inner)),
            None => (None, path.to_path_buf()),
        }
    };
    let own = place_of(source);
    let meets = |other: &Path| {
        let other = place_of(other);
        own.0 == other.0
            && own.1 != other.1
            && (own.1.starts_with(&other.1) || other.1.starts_with(&own.1))
    };
    // Others are not asked: to ask makes a mount busy for a moment, for those who unmount it.
    let may_meet = |mount: &&MountEntry| {
        let named = Path::new(&mount.source);
        mount.is_cowfs() && (named.is_relative() || meets(named))
    };
    let mut mounts = mounts.iter().filter(may_meet);
    mounts.find(|mount| mounted_at(mount).is_some_and(|other| meets(&other)))
}

/// What a cowfs mount is of, which the mount table need not say (`fsname=`); nothing for one of a snapshot, or one that is dead
/// and holds nothing.
fn mounted_at(mount: &MountEntry) -> Option<PathBuf> {
    match control::status_in_time(&mount.mountpoint, control::ANSWER) {
        Some(Ok(status)) if status.snapshot.is_some() => None,
        Some(Ok(status)) => Some(status.source.into()),
        Some(Err(_)) if rustix::fs::stat(&mount.mountpoint).err() == Some(Errno::NOTCONN) => None,
        // Somebody else's, who lets nobody in, or one that hangs.
        Some(Err(_)) | None => Some(PathBuf::from(&mount.source)),
    }
}

fn check_source(path: &Path) -> Result<PathBuf> {
    let refuse = |why: &str| Error::Source {
        path: path.to_path_buf(),
        why: why.into(),
    };
    let source = std::fs::canonicalize(path)
        .map_err(Into::into)
        .and_then(|real| open_directory(&real).map(|()| real))
        .map_err(|error: Refusal| match error.0 {
            Errno::NOENT => refuse("no such directory; create it first, or mount another"),
            Errno::NOTDIR => refuse("not a directory; cowfs mounts directories"),
            Errno::NOTCONN => control::dead_mount(path),
            Errno::ACCESS | Errno::PERM => Error::Permission(format!(
                "{}: not permitted to read the source",
                path.display()
            )),
            errno => refuse(&format!("cannot be opened: {errno}")),
        })?;
    let mounts = mounts::read()?;
    if let Some(mount) = mounts::of(&source, &mounts).filter(|mount| mount.is_cowfs()) {
        return Err(refuse(&format!(
            "it is mounted by cowfs already, at {}; `cowfs umount` that first, or use it as it is",
            mount.mountpoint.display()
        )));
    }
    for mount in mounts
        .iter()
        .filter(|mount| mount.is_cowfs() && mount.source == source)
    {
        // A mount that is dead holds nothing; one that hangs may.
        let dead = || rustix::fs::stat(&mount.mountpoint).err() == Some(Errno::NOTCONN);
        let answer = control::status_in_time(&mount.mountpoint, control::ANSWER);
        if !matches!(answer, Some(Err(_)) if dead()) {
            return Err(refuse(&format!(
                "it is mounted by cowfs already, at {}; two mounts of one directory would spoil its snapshots; unmount it there first (cowfs umount)",
                mount.mountpoint.display()
            )));
        }
    }
    if let Some(mount) = overlapping(&source, &mounts) {
        return Err(refuse(&format!(
            "{}, which is mounted by cowfs at {}, contains it or lies in it: each mount would change what the other keeps; mount one of them",
            Path::new(&mount.source).display(),
            mount.mountpoint.display()
        )));
    }
    Ok(source)
}

pub(super) fn check_mountpoint(path: &Path, source: &Path) -> Result<PathBuf> {
    let refuse = |why: String| Error::MountPoint {
        path: path.to_path_buf(),
        why,
    };
    let place = std::fs::canonicalize(path)
        .map_err(Into::into)
        .and_then(|real| stat_directory(&real).map(|()| real))
        .map_err(|error: Refusal| match error.0 {
            Errno::NOENT => {
                refuse("no such directory; create the mount point first (mkdir)".into())
            }
            Errno::NOTDIR => refuse("not a directory; a mount point must be one".into()),
            Errno::NOTCONN => control::dead_mount(path),
            Errno::ACCESS | Errno::PERM => Error::Permission(format!(
                "{}: not permitted to reach the mount point",
                path.display()
            )),
            errno => refuse(format!("cannot be used: {errno}")),
        })?;
    if place != source && place.starts_with(source) {
        return Err(refuse(format!(
            "it is inside the source {}, and the mount would contain itself; choose a mount point outside, \
             or mount the source over itself (no MOUNTPOINT)",
            source.display()
        )));
    }
    let mounts = mounts::read()?;
    let there = mounts::of(&place, &mounts).filter(|mount| mount.mountpoint == place);
    match there {
        Some(mount) if mount.is_cowfs() => Err(refuse(format!(
            "a cowfs mount (of {}) is there already; `cowfs umount` it first, or choose another place",
            Path::new(&mount.source).display()
        ))),
        Some(mount) if place != source => Err(refuse(format!(
            "in use: {} (type {}) is mounted there already; unmount it first, or choose another place",
            Path::new(&mount.source).display(),
            mount.fstype
        ))),
        _ => Ok(place),
    }
}

fn check_store(path: &Path, source: &Path, mountpoint: &Path) -> Result<PathBuf> {
    let refuse = |why: String| Error::Store {
        path: path.to_path_buf(),
        why,
    };
    let store = match std::fs::canonicalize(path) {
        Ok(real) => {
            stat_directory(&real).map_err(|error| match error.0 {
                Errno::NOTDIR => refuse("the store must be a directory".into()),
                errno => refuse(errno.to_string()),
            })?;
            real
        }
        Err(_) => {
            // It may be created; its parent must be there.
            with_parent(path).map_err(|error| refuse(format!("its parent directory: {error}")))?
        }
    };
    let own_place = store == source.join(STORE_DIR);
    if !own_place && (store.starts_with(source) || store.starts_with(mountpoint)) {
        return Err(refuse(
            "the store must be outside the source and the mount point (or SOURCE/.cowfs, the default)".into(),
        ));
    }
    Ok(store)
}

/// An errno on its way to a message.
struct Refusal(Errno);

impl From<std::io::Error> for Refusal {
    fn from(error: std::io::Error) -> Self {
        Self(Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}

fn open_directory(path: &Path) -> std::result::Result<(), Refusal> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
        .map(drop)
        .map_err(Refusal)
}

fn stat_directory(path: &Path) -> std::result::Result<(), Refusal> {
    if std::fs::metadata(path)?.is_dir() {
        Ok(())
    } else {
        Err(Refusal(Errno::NOTDIR))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(result: Result<PathBuf>) -> (u8, String) {
        let error = result.unwrap_err();
        (error.exit_code(), error.to_string())
    }

    #[test]
    fn sources_that_cannot_be_are_refused() {
        let (code, text) = refusal(check_source(Path::new("/no/such")));
        assert_eq!(code, 3);
        assert!(text.starts_with("/no/such: no such directory"), "{text}");
        let (code, text) = refusal(check_source(Path::new("/proc/self/exe")));
        assert_eq!(code, 3);
        assert!(text.contains("not a directory"), "{text}");
    }

    #[test]
    fn mount_points_that_cannot_be_are_refused() {
        let temp = tempfile::tempdir().unwrap();
        let source = std::fs::canonicalize(temp.path()).unwrap();
        let inside = source.join("inside");
        std::fs::create_dir(&inside).unwrap();
        assert!(check_mountpoint(&source, &source).is_ok());
        assert!(check_mountpoint(&source, &inside).is_ok());
        let (code, text) = refusal(check_mountpoint(&inside, &source));
        assert_eq!(code, 4);
        assert!(text.contains("inside the source"), "{text}");
        let (code, text) = refusal(check_mountpoint(Path::new("/proc"), &source));
        assert_eq!(code, 4);
        assert!(
            text.contains("(type proc) is mounted there already"),
            "{text}"
        );
        let (code, text) = refusal(check_mountpoint(&source.join("none"), &source));
        assert_eq!(code, 4);
        assert!(text.contains("mkdir"), "{text}");
    }

    #[test]
    fn the_store_is_outside() {
        let temp = tempfile::tempdir().unwrap();
        let base = std::fs::canonicalize(temp.path()).unwrap();
        let (source, mountpoint) = (base.join("s"), base.join("m"));
        std::fs::create_dir(&source).unwrap();
        std::fs::create_dir(&mountpoint).unwrap();
        std::fs::write(base.join("file"), "").unwrap();
        let check = |path: &Path| check_store(path, &source, &mountpoint);
        assert_eq!(check(&base.join("store")).unwrap(), base.join("store"));
        assert!(check(&source.join(".cowfs")).is_ok());
        for wrong in [
            source.clone(),
            source.join("x"),
            mountpoint.join("x"),
            base.join("file"),
            base.join("no/such"),
        ] {
            assert_eq!(refusal(check(&wrong)).0, 6, "{}", wrong.display());
        }
    }
}
