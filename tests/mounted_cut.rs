//! The exact cut (C1) on a real mount, and the proof that the checker would notice a wrong one.
//!
//! `COWFS_CUT_SECONDS` (20), `COWFS_SEED`.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::time::Duration;
use support::cut::{Method, Report, damages_accepted, exact_cut, stands_still};
use support::user::{Who, again};
use support::{Mount, env_number, scratch, seed};

fn show(what: &str, report: &Report) {
    println!("{what}: {}", report.summary());
    for violation in report.violations.iter().take(5) {
        println!("  {violation}");
    }
}

/// Makes snapshots of a mount with these options under load.
fn exact(options: &str) {
    let time = Duration::from_secs(env_number("COWFS_CUT_SECONDS", 20));
    let mount = Mount::with("cut", time + Duration::from_secs(400), options);
    // It falls back where it cannot be.
    assert_eq!(
        mount.cache() == "writeback",
        options.contains("cache=writeback"),
        "{}",
        mount.cache()
    );
    let method = Method::Snapshot {
        mnt: mount.mnt.clone(),
    };
    let report = exact_cut(&mount.mnt.join("work"), &method, time, seed("mounted_cut"));
    show("snapshots", &report);
    assert!(
        report.violations.is_empty(),
        "{}",
        report.violations.join("\n")
    );
    println!("the cuts of the mount: {}", mount.cut_report());
    assert!(
        report.checked >= 5,
        "only {} snapshots were read completely",
        report.checked
    );
}

#[test]
fn every_snapshot_is_an_exact_cut() {
    exact("");
}

/// Where the kernel holds writes back, which takes root.
#[test]
fn every_snapshot_with_writeback_is_an_exact_cut() {
    exact("cache=writeback");
}

#[test]
fn every_snapshot_with_strict_durability_is_an_exact_cut() {
    exact("durability=strict");
}

#[test]
fn every_snapshot_with_strict_durability_and_writeback_is_an_exact_cut() {
    exact("durability=strict,cache=writeback");
}

#[test]
fn every_snapshot_of_a_users_mount_is_an_exact_cut() {
    for who in [Who::User, Who::Namespace] {
        let seconds = [("COWFS_CUT_SECONDS", "6")];
        again(
            "every_snapshot_is_an_exact_cut",
            who,
            &seconds,
            Duration::from_secs(600),
        );
    }
}

fn still(options: &str) {
    let time = Duration::from_secs(env_number("COWFS_CUT_SECONDS", 20)) / 2;
    let mount = Mount::with("still", time + Duration::from_secs(300), options);
    let (cuts, changed) = stands_still(&mount.mnt, time);
    println!("{cuts} snapshots stood still from the moment of their creation");
    assert!(changed.is_empty(), "{}", changed.join("\n"));
    assert!(cuts >= 10, "only {cuts} snapshots");
}

#[test]
fn a_snapshot_stands_still_once_its_creation_returned() {
    still("");
}

#[test]
fn a_snapshot_with_writeback_stands_still_once_its_creation_returned() {
    still("cache=writeback");
}

/// A control: the checker must refuse what a plain copy under load gives.
#[test]
fn the_checker_refuses_a_plain_copy() {
    let dir = scratch("cut-copy");
    let method = Method::Copy { to: dir.clone() };
    let report = exact_cut(
        &dir.join("work"),
        &method,
        Duration::from_secs(10),
        seed("plain copy"),
    );
    show("plain copy", &report);
    assert!(
        report.violations.iter().any(|v| v.contains("VIOLATION")),
        "{} plain copies under load passed for exact",
        report.checked
    );
    std::fs::remove_dir_all(dir).unwrap();
}

/// The other control: it must accept copies made while the writers are held.
#[test]
fn the_checker_accepts_a_frozen_copy() {
    let dir = scratch("cut-freeze");
    let method = Method::Freeze { to: dir.clone() };
    let report = exact_cut(
        &dir.join("work"),
        &method,
        Duration::from_secs(4),
        seed("frozen copy"),
    );
    show("frozen copy", &report);
    assert!(
        report.violations.is_empty(),
        "{}",
        report.violations.join("\n")
    );
    assert!(report.checked >= 2, "only {} copies", report.checked);
    std::fs::remove_dir_all(dir).unwrap();
}

/// Each thing that the checker looks for is damaged by itself in a copy that is right otherwise.
#[test]
fn the_checker_refuses_every_kind_of_damage() {
    let dir = scratch("cut-damage");
    assert_eq!(damages_accepted(&dir), ["none"]);
    std::fs::remove_dir_all(dir).unwrap();
}
