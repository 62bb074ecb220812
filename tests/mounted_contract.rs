//! Cases in Python against a real mount: the contract's in `../shared/contract` (`COWFS_SHARED` names another
//! place for `../shared`) and our own in `tests/py`.
//!
//! Each case gets a fresh mount, `COWFS_BIN` and `COWFS_BACKING`.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use support::user::{Who, again};
use support::{Mount, own_script, python};

const OWN_LIMIT: Duration = Duration::from_secs(1200);
/// What a case and its mount may take together.
const OWN_MOUNT_LIMIT: Duration = Duration::from_secs(1230);

/// One of our own cases.
fn own(name: &str) {
    own_on(name, &Mount::new(name, OWN_MOUNT_LIMIT));
}

/// One of our own cases on a filesystem of that kind.
fn own_on_disk(name: &str, kind: &str) {
    let mount = Mount::on_disk_of(&format!("{name}-{kind}"), OWN_MOUNT_LIMIT, kind, 2048);
    own_on(name, &mount);
}

/// One case looks what the kernel has in its page cache, and another has it drop all of that.
fn page_cache() -> MutexGuard<'static, ()> {
    static PAGE_CACHE: Mutex<()> = Mutex::new(());
    PAGE_CACHE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn own_on(name: &str, mount: &Mount) {
    let script = own_script(name);
    python(&script, mount, OWN_LIMIT);
}

/// One of our own cases where the kernel holds writes back.
fn own_with_writeback(name: &str) {
    let mount = Mount::with(&format!("{name}-wb"), OWN_MOUNT_LIMIT, "cache=writeback");
    assert_eq!(mount.cache(), "writeback");
    own_on(name, &mount);
}

fn contract_dir() -> Option<PathBuf> {
    let shared = std::env::var_os("COWFS_SHARED").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared"),
        PathBuf::from,
    );
    let dir = shared.join("contract");
    if dir.is_dir() {
        return Some(dir);
    }
    println!(
        "{} is absent: only the cases of tests/py run",
        dir.display()
    );
    None
}

/// One case of the contract.
fn contract(name: &str) {
    let Some(dir) = contract_dir() else { return };
    let script = dir.join(format!("{name}.py"));
    if !script.is_file() {
        println!("{} is absent", script.display());
        return;
    }
    let limit = Duration::from_secs(900);
    // on a disk of its own, as the cases measure space
    let mount = Mount::on_own_disk(name, limit + Duration::from_secs(30), 3072);
    python(&script, &mount, limit);
}

#[test]
fn contract_deep() {
    contract("deep");
}

#[test]
fn contract_namespace() {
    contract("namespace");
}

#[test]
fn contract_repeat() {
    contract("repeat");
}

#[test]
fn contract_space() {
    contract("space");
}

/// Cases that the contract may have got since the list above was written.
#[test]
fn contract_all_others() {
    let Some(dir) = contract_dir() else { return };
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .filter_map(|entry| {
            entry
                .unwrap()
                .file_name()
                .to_str()?
                .strip_suffix(".py")
                .map(str::to_owned)
        })
        .filter(|name| !["lib", "deep", "namespace", "repeat", "space"].contains(&name.as_str()))
        .collect();
    names.sort();
    for name in names {
        contract(&name);
    }
}

#[test]
fn fidelity() {
    own("fidelity");
}

#[test]
fn rich_tree_ext4() {
    if rustix::process::geteuid().is_root() {
        own_on_disk("rich_tree", "ext4");
    } else {
        // Who cannot mount a disk has what the test directory is on.
        own("rich_tree");
    }
}

#[test]
fn rich_tree_xfs() {
    own_on_disk("rich_tree", "xfs");
}

#[test]
fn rich_tree_btrfs() {
    own_on_disk("rich_tree", "btrfs");
}

#[test]
fn live_edges() {
    own("live_edges");
}

#[test]
fn live_many() {
    own_on_disk("live_many", "ext4");
}

#[test]
fn live_edges_xfs() {
    own_on_disk("live_edges", "xfs");
}

#[test]
fn mmap_store() {
    own("mmap_store");
}

#[test]
fn names() {
    own("names");
}

#[test]
fn deletion() {
    own("deletion");
}

#[test]
fn permissions() {
    own("permissions");
}

#[test]
fn inodes() {
    own("inodes");
}

#[test]
fn handles() {
    own("handles");
}

#[test]
fn two_ways() {
    own("two_ways");
}

#[test]
fn dropbehind() {
    let _alone = page_cache();
    own("dropbehind");
}

#[test]
fn locks() {
    own("locks");
}

#[test]
fn allocation() {
    own("allocation");
}

#[test]
fn written_only() {
    own("written_only");
}

#[test]
fn alone() {
    let _alone = page_cache();
    own("alone");
}

/// Every kind of change under cuts where the kernel holds writes back, and what the mode may not change.
#[test]
fn writeback() {
    own_with_writeback("writeback");
}

#[test]
fn cases_with_writeback() {
    for name in [
        "allocation",
        "permissions",
        "mmap_store",
        "locks",
        "live_edges",
    ] {
        own_with_writeback(name);
    }
}

/// The cases that need nothing that only root has, once more without it.
fn without_root(who: Who, cases: &[&str]) {
    for case in cases {
        again(case, who, &[], Duration::from_secs(1200));
    }
}

#[test]
fn cases_on_a_users_mount() {
    // The tree not in a user namespace: it has access lists with other users in them, who have no number there.
    without_root(
        Who::User,
        &["names", "deletion", "inodes", "rich_tree_ext4"],
    );
}

#[test]
fn cases_on_a_users_mount_of_open_files() {
    without_root(Who::User, &["mmap_store", "locks", "unprivileged"]);
}

#[test]
fn cases_in_a_user_namespace() {
    without_root(Who::Namespace, &["names", "deletion", "inodes"]);
}

#[test]
fn cases_in_a_user_namespace_of_open_files() {
    without_root(Who::Namespace, &["mmap_store", "locks", "unprivileged"]);
}

/// What a mount without root's powers can do, and what it refuses; run as root it is the control.
#[test]
fn unprivileged() {
    own("unprivileged");
}
