//! The same tests once more for those who are not root: an ordinary user, who mounts through fusermount3, and the
//! root of a user namespace of one's own (`unshare -Urm`).
//!
//! A test runs itself again, as another process of that user; `COWFS_TEST_DIR` and copies of the binaries lie
//! where the user can reach them.

use super::{cowfs_bin, run, unmount_below};
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

const NOBODY: u32 = 65534;
const DEVICE: &str = "/dev/fuse";

/// Who runs a test.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Who {
    /// `nobody`, through fusermount3.
    User,
    /// `nobody`, as the root of a new user and mount namespace.
    Namespace,
}

/// Lets everybody open `/dev/fuse` for as long as one of these lives.
struct OpenDevice(());

/// How many want the device open, and its mode before.
static OPENED: Mutex<(usize, u32)> = Mutex::new((0, 0));

fn set_mode(mode: u32) {
    fs::set_permissions(DEVICE, Permissions::from_mode(mode)).unwrap();
}

impl OpenDevice {
    fn new() -> Self {
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        if opened.0 == 0 {
            opened.1 = fs::metadata(DEVICE).unwrap().permissions().mode();
            set_mode(opened.1 | 0o666);
        }
        opened.0 += 1;
        Self(())
    }
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
        opened.0 -= 1;
        if opened.0 == 0 {
            set_mode(opened.1);
        }
    }
}

/// How many mounts there are that a new mount namespace would get copies of, and whether one is being used: a copy
/// keeps a filesystem alive after it was unmounted, so the two exclude each other.
static MOUNTS: (Mutex<(usize, bool)>, Condvar) = (Mutex::new((0, false)), Condvar::new());

/// A mount in the namespace of the tests.
pub(crate) struct Here(());

/// A namespace beside that of the tests.
pub(crate) struct Beside(());

fn wait_for(ready: impl Fn(&(usize, bool)) -> bool, enter: impl Fn(&mut (usize, bool))) {
    let state = MOUNTS.0.lock().unwrap_or_else(PoisonError::into_inner);
    let mut state = MOUNTS
        .1
        .wait_while(state, |state| !ready(state))
        .unwrap_or_else(PoisonError::into_inner);
    enter(&mut state);
}

fn leave(leave: impl Fn(&mut (usize, bool))) {
    leave(&mut MOUNTS.0.lock().unwrap_or_else(PoisonError::into_inner));
    MOUNTS.1.notify_all();
}

impl Here {
    pub(crate) fn new() -> Self {
        wait_for(|state| !state.1, |state| state.0 += 1);
        Self(())
    }
}

impl Drop for Here {
    fn drop(&mut self) {
        leave(|state| state.0 -= 1);
    }
}

impl Beside {
    pub(crate) fn new() -> Self {
        wait_for(|state| *state == (0, false), |state| state.1 = true);
        Self(())
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        leave(|state| state.1 = false);
    }
}

/// Removes the directory in the end, with whatever is still mounted in it.
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        unmount_below(&self.0.join("cowfs"), &self.0);
        if std::thread::panicking() {
            eprintln!("kept for a look: {}", self.0.display());
        } else if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("{}: cannot remove: {error}", self.0.display());
        }
    }
}

fn copy_for_user(from: &Path, to: &Path) {
    // Not by this process: another test may start a program just then, which has the copy open for writing (ETXTBSY).
    let mut cp = Command::new("cp");
    run(cp.arg(from).arg(to), Duration::from_secs(60)).success("cp");
    fs::set_permissions(to, Permissions::from_mode(0o755)).unwrap();
}

/// Runs the test `name` of this very program again as `who`, with more environment. Fails unless it ran and passed.
#[track_caller]
pub(crate) fn again(name: &str, who: Who, environment: &[(&str, &str)], limit: Duration) {
    let _beside = matches!(who, Who::Namespace).then(Beside::new);
    let _here = matches!(who, Who::User).then(Here::new);
    let _device = OpenDevice::new();
    let dir = tempfile::Builder::new()
        .prefix("cowfs-user.")
        .tempdir_in("/var/tmp")
        .unwrap();
    let place = Place(dir.keep());
    fs::set_permissions(&place.0, Permissions::from_mode(0o755)).unwrap();
    let (program, cowfs, work) = (
        place.0.join("test"),
        place.0.join("cowfs"),
        place.0.join("work"),
    );
    copy_for_user(&std::env::current_exe().unwrap(), &program);
    copy_for_user(&cowfs_bin(), &cowfs);
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/py");
    let copied = place.0.join("py");
    fs::create_dir(&copied).unwrap();
    for entry in fs::read_dir(scripts).unwrap() {
        let entry = entry.unwrap();
        if entry.path().extension().is_some_and(|e| e == "py") {
            copy_for_user(&entry.path(), &copied.join(entry.file_name()));
        }
    }
    fs::create_dir(&work).unwrap();
    chown(&work, Some(NOBODY), Some(NOBODY)).unwrap();
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    if matches!(who, Who::Namespace) {
        command.args(["unshare", "-Urm", "--kill-child"]);
    }
    command
        .arg(&program)
        .args(["--exact", name, "--nocapture"])
        .current_dir(&work)
        .env("COWFS_BIN", &cowfs)
        .env("COWFS_TEST_DIR", &work)
        .env("COWFS_PY", &copied)
        .env("HOME", &work)
        .envs(environment.iter().copied());
    let outcome = run(&mut command, limit);
    println!("as {who:?}:\n{}", outcome.stdout);
    let outcome = outcome.success(&format!("{name} as {who:?}"));
    assert!(
        outcome.stdout.contains("test result: ok. 1 passed"),
        "{name} did not run as {who:?}"
    );
}
