//! Cases in Python against a real mount: the contract's in `../shared/contract` (`COWFS_SHARED` names another
//! place for `../shared`) and our own in `tests/py`.
//!
//! Each case gets a fresh mount, `COWFS_BIN` and `COWFS_BACKING`.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use support::{Mount, cowfs_bin, run};

fn python(script: &Path, mount: &Mount, limit: Duration) {
    let out = run(
        Command::new("python3")
            .arg("-B")
            .arg(script)
            .arg(&mount.mnt)
            .env("COWFS_BIN", cowfs_bin())
            .env("COWFS_PROC", cowfs_bin().file_name().unwrap())
            .env("COWFS_BACKING", &mount.backing)
            .env("SNAPFS", "COWFS"),
        limit,
    );
    println!("{}", out.stdout);
    out.success(&script.display().to_string());
}

/// One of our own cases.
fn own(name: &str) {
    let limit = Duration::from_secs(240);
    let mount = Mount::new(name, limit + Duration::from_secs(30));
    let script = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/py")
        .join(format!("{name}.py"));
    python(&script, &mount, limit);
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
    let limit = Duration::from_secs(300);
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
fn locks() {
    own("locks");
}

#[test]
fn allocation() {
    own("allocation");
}
