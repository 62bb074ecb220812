//! Suites that others wrote, on a mount of their own, in the short form; scripts/conformance runs them, and by hand
//! in a long one. Every snapshot that is cut meanwhile is verified.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use support::{cowfs_bin, run, unmount_below};

/// Two at a time, one of which waits for its disk most of the time: each of the others uses the whole machine.
static DISK: Mutex<()> = Mutex::new(());
static PROCESSORS: Mutex<()> = Mutex::new(());

fn conformance(place: &Mutex<()>, arguments: &[&str]) {
    let _alone = place.lock().unwrap_or_else(PoisonError::into_inner);
    let work = tempfile::Builder::new()
        .prefix("cowfs-test.")
        .tempdir_in("/var/tmp")
        .unwrap();
    // Other users take part, and have to reach the mounts in it.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(work.path(), open).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/conformance");
    let outcome = std::panic::catch_unwind(|| {
        run(
            Command::new(script)
                .arg("--quick")
                .arg("--work")
                .arg(work.path())
                .args(arguments)
                .env("COWFS_BIN", cowfs_bin()),
            Duration::from_secs(600),
        )
    });
    unmount_below(&cowfs_bin(), work.path());
    match outcome {
        Ok(outcome) => println!("{}", outcome.success("scripts/conformance").stdout),
        Err(late) => std::panic::resume_unwind(late),
    }
}

#[test]
fn pjdfstest_on_ext4() {
    conformance(&PROCESSORS, &["pjdfstest"]);
}

#[test]
fn pjdfstest_on_xfs() {
    conformance(&PROCESSORS, &["--backing=xfs", "pjdfstest"]);
}

#[test]
fn fsx() {
    conformance(&PROCESSORS, &["fsx"]);
}

#[test]
fn stress_ng_and_fio() {
    conformance(&DISK, &["stress-ng", "fio"]);
}

#[test]
fn git_and_cargo() {
    conformance(&PROCESSORS, &["git", "cargo"]);
}

#[test]
fn databases() {
    conformance(&PROCESSORS, &["sqlite", "lmdb", "tokyocabinet"]);
}
