//! `cowfs snapshot`: the same as mkdir, rmdir, mv and ls in the snapshot directory, with better messages.

use super::output;
use crate::control::{self, SnapshotStatus};
use crate::error::{Error, Result};
use crate::ids::is_snapshot_name;
use chrono::format::{Item, StrftimeItems};
use chrono::{DateTime, Utc};
use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;
use serde::Serialize;
use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Names without a pattern: they sort in time order and have no colon.
const PATTERN: &str = "%Y%m%dT%H%M%SZ";
/// How many names of one second are tried.
const MOST_COLLISIONS: u32 = 9999;
/// How long a snapshot that is in use is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// Create, list, delete or rename snapshots.
///
/// The same is done by mkdir, ls, rmdir and mv in MOUNTPOINT/.snapshots, with no cowfs at hand.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLE: &str = "\
EXAMPLE
  cowfs snapshot create /srv/data monday     mkdir /srv/data/.snapshots/monday
  cowfs snapshot list /srv/data              ls /srv/data/.snapshots
  cowfs snapshot rename /srv/data monday w1  mv /srv/data/.snapshots/{monday,w1}
  cowfs snapshot delete /srv/data w1         rmdir /srv/data/.snapshots/w1";

#[derive(clap::Subcommand)]
enum Command {
    Create(CreateArgs),
    List(ListArgs),
    Delete(DeleteArgs),
    Rename(RenameArgs),
    Hold(HoldArgs),
    Release(HoldArgs),
}

/// Cut a snapshot and print its path.
///
/// The arguments are [PATH] [NAME]. PATH is the mount point or any path inside the mount; without it the current
/// directory. A single argument is a PATH if it has a slash or is a directory, otherwise a NAME. Without a NAME
/// the snapshot is called by the time in UTC, as 20261122T001401Z, with .1, .2 and so on if there is one already.
#[derive(clap::Args)]
#[command(after_help = CREATE_EXAMPLE, override_usage = "cowfs snapshot create [OPTIONS] [PATH] [NAME]")]
struct CreateArgs {
    /// PATH and NAME, either or none.
    #[arg(value_name = "ARGUMENT", num_args = 0..=2)]
    words: Vec<OsString>,
    /// Name it by the time in UTC, by this strftime(3) pattern [default: %Y%m%dT%H%M%SZ].
    #[arg(long, value_name = "STRFTIME")]
    pattern: Option<String>,
    /// Print JSON: name, path, epoch, created.
    #[arg(long)]
    json: bool,
}

const CREATE_EXAMPLE: &str = "\
EXAMPLE
  cowfs snapshot create /srv/data monday
  cd /srv/data && cowfs snapshot create
  cp -a \"$(cowfs snapshot create /srv/data)\" /backup/
  cowfs snapshot create /srv/data --pattern daily-%F";

/// List the snapshots, in the order of their names.
#[derive(clap::Args)]
#[command(after_help = LIST_EXAMPLE)]
struct ListArgs {
    /// The mount point, or any path inside the mount.
    #[arg(default_value = ".")]
    path: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

const LIST_EXAMPLE: &str = "\
EXAMPLE
  cowfs snapshot list /srv/data
  cowfs snapshot list /srv/data --json | jq -r '.[].name'";

/// Delete snapshots, in any order; their space is given back in the background.
///
/// The arguments are [PATH] NAME... PATH is the mount point or any path inside the mount; the first of several
/// arguments is the PATH if it has a slash or is a directory. A NAME may be the path that `create` printed.
#[derive(clap::Args)]
#[command(after_help = DELETE_EXAMPLE, override_usage = "cowfs snapshot delete [PATH] <NAME>...")]
struct DeleteArgs {
    /// PATH, if not the current directory, and at least one NAME.
    #[arg(value_name = "ARGUMENT", num_args = 1.., required = true)]
    words: Vec<OsString>,
}

const DELETE_EXAMPLE: &str = "\
EXAMPLE
  cowfs snapshot delete /srv/data monday tuesday
  cowfs snapshot delete /srv/data/.snapshots/monday";

/// Rename a snapshot. What it shows does not change.
///
/// The arguments are [PATH] OLD NEW. PATH is the mount point or any path inside the mount; without it the current
/// directory.
#[derive(clap::Args)]
#[command(after_help = RENAME_EXAMPLE, override_usage = "cowfs snapshot rename [PATH] <OLD> <NEW>")]
struct RenameArgs {
    /// PATH, if not the current directory, then OLD and NEW.
    #[arg(value_name = "ARGUMENT", num_args = 2..=3, required = true)]
    words: Vec<OsString>,
}

const RENAME_EXAMPLE: &str = "\
EXAMPLE
  cowfs snapshot rename /srv/data monday before-the-upgrade";

/// Hold snapshots, so that nobody deletes them and none is given up for room, or let them go.
///
/// The arguments are [PATH] NAME..., as for `delete`.
#[derive(clap::Args)]
#[command(after_help = HOLD_EXAMPLE)]
struct HoldArgs {
    /// PATH, if not the current directory, and at least one NAME.
    #[arg(value_name = "ARGUMENT", num_args = 1.., required = true)]
    words: Vec<OsString>,
}

const HOLD_EXAMPLE: &str = "\
EXAMPLE
  cowfs snapshot hold /srv/data monday
  cowfs snapshot release /srv/data monday";

pub(super) fn run(args: &Args) -> Result<()> {
    match &args.command {
        Command::Hold(args) => hold(args, true),
        Command::Release(args) => hold(args, false),
        Command::Create(args) => create(args),
        Command::List(args) => list(args),
        Command::Delete(args) => delete(args),
        Command::Rename(args) => rename(args),
    }
}

/// The directory of the snapshots of the mount that holds `path`.
fn directory(path: &Path) -> Result<PathBuf> {
    let root = control::find_mount(path)?;
    let status = control::status(&root)?;
    if status.snapshot.is_none() {
        return Ok(root.join(status.snapshot_dir));
    }
    match control::find_live(path)? {
        Some((live, status)) => Ok(live.join(status.snapshot_dir)),
        None => Err(Error::MountPoint {
            path: path.to_path_buf(),
            why: "it shows one snapshot by itself, and the live mount cannot be seen from here"
                .into(),
        }),
    }
}

/// Whether an argument that may be either is meant as a path.
fn is_path(word: &OsStr) -> bool {
    word.as_bytes().contains(&b'/') || Path::new(word).is_dir()
}

fn check_name(name: &OsStr) -> Result<&OsStr> {
    if !is_snapshot_name(name.as_bytes()) {
        Err(Error::SnapshotName(control::lossy(name)))
    } else {
        Ok(name)
    }
}

/// What a failed system call on a snapshot's name means.
fn explain(action: &'static str, path: &Path, errno: Errno) -> Error {
    let name = control::lossy(path.file_name().unwrap_or_default());
    match errno {
        Errno::EXIST | Errno::NOTEMPTY => Error::SnapshotExists(name),
        Errno::NOENT => Error::SnapshotMissing(name),
        Errno::BUSY => Error::SnapshotBusy(name),
        Errno::INVAL | Errno::NAMETOOLONG => Error::SnapshotName(name),
        Errno::ACCESS | Errno::PERM => Error::Permission(format!(
            "{}: {action}: not permitted; root may, and whoever runs cowfs, and with user-snapshots whoever may write to \
             the mount's root directory may create one",
            path.display()
        )),
        Errno::NOTCONN => control::dead_mount(path),
        errno => Error::path(action, path, errno),
    }
}

#[derive(Serialize)]
struct Created {
    name: String,
    path: String,
    epoch: u64,
    created: String,
}

fn create(args: &CreateArgs) -> Result<()> {
    let (path, name) = match args.words.as_slice() {
        [] => (OsStr::new("."), None),
        [word] if is_path(word) => (word.as_os_str(), None),
        [word] => (OsStr::new("."), Some(word.as_os_str())),
        [path, name, ..] => (path.as_os_str(), Some(name.as_os_str())),
    };
    if let Some(name) = name {
        check_name(name)?;
        if args.pattern.is_some() {
            return Err(Error::Usage(format!(
                "a NAME ({}) and a --pattern: only one of them can name the snapshot",
                control::lossy(name)
            )));
        }
    }
    let pattern = check_pattern(args.pattern.as_deref().unwrap_or(PATTERN))?;
    let directory = directory(Path::new(path))?;
    let path = match name {
        Some(name) => {
            let path = directory.join(name);
            cut(&path).map_err(|errno| explain("cannot create the snapshot", &path, errno))?;
            path
        }
        None => create_by_time(&directory, &time_name(&pattern, Utc::now()))?,
    };
    if !args.json {
        return output::line(&path);
    }
    let status = control::snapshot_status(&path)?;
    output::json(&Created {
        name: status.name,
        path: control::lossy(&path),
        epoch: status.epoch,
        created: status.created,
    })
}

fn cut(path: &Path) -> std::result::Result<(), Errno> {
    rustix::fs::mkdir(path, rustix::fs::Mode::from_raw_mode(0o777))
}

/// Cuts a snapshot with an automatic name that is still free.
fn create_by_time(directory: &Path, name: &str) -> Result<PathBuf> {
    check_name(name.as_ref())?;
    let mut path = directory.join(name);
    for number in 1..=MOST_COLLISIONS {
        match cut(&path) {
            Ok(()) => return Ok(path),
            Err(Errno::EXIST) => path = directory.join(format!("{name}.{number}")),
            Err(errno) => return Err(explain("cannot create the snapshot", &path, errno)),
        }
    }
    Err(Error::SnapshotExists(control::lossy(&path)))
}

fn check_pattern(pattern: &str) -> Result<Vec<Item<'_>>> {
    let items: Vec<Item<'_>> = StrftimeItems::new(pattern).collect();
    if items.iter().any(|item| matches!(item, Item::Error)) {
        return Err(Error::Usage(format!(
            "--pattern {pattern:?} is no strftime pattern; the default is {PATTERN:?}"
        )));
    }
    Ok(items)
}

fn time_name(pattern: &[Item<'_>], time: DateTime<Utc>) -> String {
    time.format_with_items(pattern.iter()).to_string()
}

#[derive(Serialize)]
struct Listed {
    name: String,
    path: String,
    #[serde(flatten)]
    rest: ListedRest,
}

#[derive(Serialize)]
struct ListedRest {
    epoch: u64,
    created: String,
    held: bool,
    state: String,
    why: Option<String>,
}

impl From<SnapshotStatus> for ListedRest {
    fn from(status: SnapshotStatus) -> Self {
        Self {
            epoch: status.epoch,
            created: status.created,
            held: status.held,
            state: status.state,
            why: status.why,
        }
    }
}

fn list(args: &ListArgs) -> Result<()> {
    let directory = directory(&args.path)?;
    let snapshots = read(&directory)?;
    if args.json {
        let listed: Vec<Listed> = snapshots
            .into_iter()
            .map(|(name, status)| Listed {
                path: control::lossy(directory.join(&name)),
                name: control::lossy(&name),
                rest: status.into(),
            })
            .collect();
        return output::json(&listed);
    }
    let mut rows = vec![["NAME", "CREATED", "STATE", "HELD"].map(String::from)];
    rows.extend(snapshots.into_iter().map(|(name, status)| {
        let held = if status.held { "yes" } else { "no" };
        [
            output::printable(&name),
            to_seconds(&status.created),
            status.state,
            held.into(),
        ]
    }));
    output::table(&rows)
}

/// A time stamp without its fraction, for the table.
fn to_seconds(created: &str) -> String {
    match created.split_once('.') {
        Some((seconds, _)) => format!("{seconds}Z"),
        None => created.into(),
    }
}

fn read(directory: &Path) -> Result<Vec<(OsString, SnapshotStatus)>> {
    let failed = |error: &std::io::Error| Error::io("cannot list the snapshots", directory, error);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(|error| failed(&error))? {
        names.push(entry.map_err(|error| failed(&error))?.file_name());
    }
    names.sort();
    let mut snapshots = Vec::with_capacity(names.len());
    for name in names {
        match control::snapshot_status(&directory.join(&name)) {
            Ok(status) => snapshots.push((name, status)),
            // Deleted since it was listed.
            Err(Error::Path {
                errno: Errno::NOENT | Errno::STALE,
                ..
            }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(snapshots)
}

fn delete(args: &DeleteArgs) -> Result<()> {
    for path in snapshots_named(&args.words)? {
        delete_one(&path)?;
    }
    Ok(())
}

/// Tries for a while, as whoever has just read the snapshot may be about to close it.
fn delete_one(path: &Path) -> Result<()> {
    let start = Instant::now();
    loop {
        match rustix::fs::rmdir(path) {
            Ok(()) => return Ok(()),
            Err(Errno::BUSY) if control::snapshot_status(path).is_ok_and(|status| status.held) => {
                let name = path.file_name().unwrap_or_default();
                return Err(Error::SnapshotHeld(control::lossy(name)));
            }
            // rmdir(2) has waited for a part of it. In between others have the folder's lock.
            Err(Errno::BUSY) if start.elapsed() < PATIENCE => std::thread::sleep(PATIENCE / 20),
            Err(errno) => return Err(explain("cannot delete the snapshot", path, errno)),
        }
    }
}

fn hold(args: &HoldArgs, held: bool) -> Result<()> {
    for path in snapshots_named(&args.words)? {
        control::hold(&path, held)
            .map_err(|errno| explain("cannot hold or release the snapshot", &path, errno))?;
    }
    Ok(())
}

/// The paths of the snapshots that `[PATH] NAME...` mean; all are checked before any is touched.
fn snapshots_named(words: &[OsString]) -> Result<Vec<PathBuf>> {
    let is_snapshot_path = |word: &OsStr| {
        let path = Path::new(word);
        let parent = path.parent().filter(|_| word.as_bytes().contains(&b'/'));
        parent.is_some_and(|parent| {
            directory(parent).is_ok_and(|directory| same_directory(parent, &directory))
        })
    };
    let mut names = words;
    let mut place = Path::new(".");
    if let [first, rest @ ..] = words
        && !is_snapshot_path(first)
        && is_path(first)
        && (!rest.is_empty() || first.as_bytes().contains(&b'/'))
    {
        place = Path::new(first);
        names = rest;
    }
    if names.is_empty() {
        return Err(Error::Usage(format!(
            "name the snapshots of {}; `cowfs snapshot list` shows those there are",
            place.display()
        )));
    }
    let mut here = None;
    let mut paths = Vec::new();
    for name in names {
        if is_snapshot_path(name) {
            paths.push(name.into());
            continue;
        }
        check_name(name)?;
        let here = match &here {
            Some(here) => here,
            None => here.insert(directory(place)?),
        };
        paths.push(here.join(name));
    }
    // Named twice it is meant once.
    let mut seen = HashSet::new();
    paths.retain(|path: &PathBuf| seen.insert(path.clone()));
    if let Some(missing) = paths.iter().find(|path| path.symlink_metadata().is_err()) {
        return Err(explain("cannot find the snapshot", missing, Errno::NOENT));
    }
    Ok(paths)
}

fn same_directory(path: &Path, directory: &Path) -> bool {
    std::fs::canonicalize(path).is_ok_and(|real| real == directory)
}

fn rename(args: &RenameArgs) -> Result<()> {
    let (path, old, new) = match args.words.as_slice() {
        [old, new] => (OsStr::new("."), old, new),
        [path, old, new] => (path.as_os_str(), old, new),
        _ => return Err(Error::Usage("rename takes [PATH] OLD NEW".into())),
    };
    let (old, new) = (check_name(old)?, check_name(new)?);
    let directory = directory(Path::new(path))?;
    let (old, new) = (directory.join(old), directory.join(new));
    if old.symlink_metadata().is_err() {
        return Err(explain("cannot rename the snapshot", &old, Errno::NOENT));
    }
    rustix::fs::renameat_with(CWD, &old, CWD, &new, RenameFlags::NOREPLACE).map_err(|errno| {
        match errno {
            Errno::BUSY | Errno::NOENT => explain("cannot rename the snapshot", &old, errno),
            errno => explain("cannot rename the snapshot", &new, errno),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    #[test]
    fn names_are_one_component() {
        for good in ["a", "a b", "...", "-x", "ü"] {
            assert!(check_name(good.as_ref()).is_ok());
        }
        assert!(check_name(&OsString::from_vec(vec![0xff; 255])).is_ok());
        for wrong in ["", ".", "..", "a/b", "/", "a\0"] {
            assert_eq!(check_name(wrong.as_ref()).unwrap_err().exit_code(), 7);
        }
        assert!(check_name(&OsString::from_vec(vec![b'x'; 256])).is_err());
    }

    #[test]
    fn automatic_names_sort_by_time_and_have_no_colon() {
        let time = |s| DateTime::from_timestamp(s, 0).unwrap();
        let name = |s| time_name(&check_pattern(PATTERN).unwrap(), time(s));
        assert_eq!(name(1_795_306_441), "20261122T001401Z");
        assert!(name(1_795_306_441) < name(1_795_306_442));
        let daily = check_pattern("daily-%F").unwrap();
        assert_eq!(time_name(&daily, time(0)), "daily-1970-01-01");
        assert_eq!(check_pattern("%").unwrap_err().exit_code(), 2);
        assert_eq!(check_pattern("%!").unwrap_err().exit_code(), 2);
    }

    #[test]
    fn collisions_get_a_number() {
        let temp = tempfile::tempdir().unwrap();
        let made: Vec<PathBuf> = (0..3)
            .map(|_| create_by_time(temp.path(), "t").unwrap())
            .collect();
        assert_eq!(made, ["t", "t.1", "t.2"].map(|name| temp.path().join(name)));
    }

    #[test]
    fn errnos_become_messages() {
        let code = |errno| explain("x", Path::new("/m/.snapshots/n"), errno).exit_code();
        assert_eq!(code(Errno::EXIST), 7);
        assert_eq!(code(Errno::NOENT), 7);
        assert_eq!(code(Errno::BUSY), 7);
        assert_eq!(code(Errno::NAMETOOLONG), 7);
        assert_eq!(code(Errno::ACCESS), 5);
        assert_eq!(code(Errno::NOTCONN), 4);
        assert_eq!(code(Errno::IO), 1);
    }

    #[test]
    fn fractions_of_seconds_are_for_json() {
        assert_eq!(
            to_seconds("2026-11-22T00:14:01.000000005Z"),
            "2026-11-22T00:14:01Z"
        );
        assert_eq!(to_seconds("2026-11-22T00:14:01Z"), "2026-11-22T00:14:01Z");
    }
}
