//! Real programs on a real mount: PostgreSQL under pgbench, copiers of a source tree under load, backup
//! tools night after night. The work is done by scripts that a user can run as well, on larger sizes.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use support::{cowfs_bin, run, unmount_below};

/// One server and one backup at a time: each waits for disks half of its time.
static SERVER: Mutex<()> = Mutex::new(());
static BACKUP: Mutex<()> = Mutex::new(());

fn script(place: &Mutex<()>, name: &str, arguments: &[&str]) {
    let _alone = place.lock().unwrap_or_else(PoisonError::into_inner);
    // In a place that the user of the servers can reach, wherever this source tree is.
    let work = tempfile::Builder::new()
        .prefix("cowfs-test.")
        .tempdir_in("/var/tmp")
        .unwrap();
    std::fs::set_permissions(work.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("scripts")
        .join(name);
    let outcome = std::panic::catch_unwind(|| {
        run(
            Command::new(path)
                .args(arguments)
                .arg("--work")
                .arg(work.path())
                .env("COWFS_BIN", cowfs_bin()),
            Duration::from_secs(1500),
        )
    });
    unmount_below(&cowfs_bin(), work.path());
    match outcome {
        Ok(outcome) => {
            println!("{}", outcome.stdout);
            if !outcome.status.success() {
                println!("kept for a look: {}", work.keep().display());
            }
            outcome.success(name);
        }
        Err(late) => std::panic::resume_unwind(late),
    }
}

#[test]
fn postgresql_recovers_from_every_snapshot() {
    script(
        &SERVER,
        "pg-snapshots",
        &[
            "--snapshots=10",
            "--seconds=20",
            "--scale=3",
            "--full-page-writes=on",
        ],
    );
}

#[test]
fn postgresql_does_not_notice_that_the_daemon_dies() {
    script(
        &SERVER,
        "pg-snapshots",
        &[
            "--snapshots=4",
            "--seconds=24",
            "--scale=3",
            "--kill-servers=20",
        ],
    );
}

#[test]
fn postgresql_recovers_from_every_snapshot_without_full_page_writes() {
    script(
        &SERVER,
        "pg-snapshots",
        &[
            "--snapshots=10",
            "--seconds=20",
            "--scale=3",
            "--full-page-writes=off",
        ],
    );
}

#[test]
fn copiers_agree_on_a_snapshot_of_20000_files() {
    script(&BACKUP, "tree-copies", &["--files=20000"]);
}

#[test]
fn restic_and_borg_read_no_file_that_is_unchanged() {
    script(&BACKUP, "backup-tools", &[]);
}
