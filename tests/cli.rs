//! The command by itself: wrong use is refused with a message that names the thing, and with the exit code of
//! docs/CLI.md. Nothing here needs a mount.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

fn cowfs<S: AsRef<OsStr>>(arguments: &[S]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cowfs"))
        .args(arguments)
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs the command, which must fail with this code and say all of this on stderr, and nothing on stdout.
#[track_caller]
fn refused<S: AsRef<OsStr>>(arguments: &[S], code: i32, says: &[&str]) {
    let output = cowfs(arguments);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert_eq!(text(&output.stdout), "");
    for part in says {
        assert!(stderr.contains(part), "{part:?} is not in {stderr:?}");
    }
}

fn is_mounted(path: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.contains(&format!(" {} ", path.display()))
}

#[test]
fn help_and_version_are_no_errors() {
    for command in [
        vec!["--help"],
        vec!["mount", "--help"],
        vec!["umount", "--help"],
        vec!["snapshot", "--help"],
        vec!["snapshot", "create", "--help"],
        vec!["snapshot", "list", "--help"],
        vec!["snapshot", "delete", "--help"],
        vec!["snapshot", "rename", "--help"],
        vec!["status", "--help"],
        vec!["demo", "--help"],
    ] {
        let output = cowfs(&command);
        assert!(output.status.success(), "{command:?}");
        let help = text(&output.stdout);
        assert!(help.contains("EXAMPLE"), "{help}");
        assert!(help.contains("cowfs "), "{help}");
    }
    let version = text(&cowfs(&["--version"]).stdout);
    assert_eq!(version, concat!("cowfs ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn wrong_words_are_usage_errors() {
    refused::<&str>(&[], 2, &["Usage"]);
    refused(&["frobnicate"], 2, &["frobnicate"]);
    refused(&["mount"], 2, &["SOURCE"]);
    refused(&["umount"], 2, &["MOUNTPOINT"]);
    refused(&["mount", "/tmp", "--bogus"], 2, &["--bogus"]);
    refused(&["snapshot", "rename", "one"], 2, &[]);
    refused(&["snapshot", "delete"], 2, &[]);
}

#[test]
fn wrong_mount_options_are_named() {
    let mount = |options| ["mount", "-o", options, "/no/such", "/no/such"];
    refused(
        &mount("ro,bogus=7"),
        2,
        &["\"bogus=7\"", "known:", "store=DIR"],
    );
    refused(&mount("cache=none"), 2, &["writeback", "write-through"]);
    refused(&mount("durability=none"), 2, &["ordered or strict"]);
    refused(&mount("snapshot-dir=.cowfs"), 2, &["snapshot-dir"]);
    refused(&mount("snapshot-dir=a/b"), 2, &["slash"]);
    refused(&mount("sync-interval=x"), 2, &["milliseconds"]);
    refused(
        &mount("remount,store=/tmp/x"),
        2,
        &["\"store\"", "cannot be changed", "umount"],
    );
    refused(&mount("remount"), 4, &["/no/such"]);
    // Those of fstab pass; the next thing that is wrong is the source.
    refused(
        &mount("rw,noauto,nofail,user,_netdev,x-a=b"),
        3,
        &["/no/such"],
    );
}

#[test]
fn sources_and_mount_points_that_cannot_be_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    let base = std::fs::canonicalize(temp.path()).unwrap();
    let make = |name: &str| {
        let path = base.join(name);
        std::fs::create_dir_all(&path).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (source, inside, target) = (make("source"), make("source/inside"), make("target"));
    let file = format!("{source}/file");
    std::fs::write(&file, "x").unwrap();
    let missing = format!("{source}/missing");

    refused(
        &["mount", &missing, &target],
        3,
        &[&missing, "no such directory"],
    );
    refused(&["mount", &missing], 3, &[&missing, "no such directory"]);
    refused(&["mount", &file, &target], 3, &[&file, "not a directory"]);
    refused(&["mount", &source, &missing], 4, &[&missing, "mkdir"]);
    refused(&["mount", &source, &file], 4, &[&file, "not a directory"]);
    refused(
        &["mount", &source, &inside],
        4,
        &[&inside, "inside the source"],
    );
    refused(&["mount", &source, "/proc"], 4, &["/proc", "already"]);
    refused(&["mount", "", &target], 2, &["SOURCE"]);
    let store = format!("store={inside}");
    refused(
        &["mount", "-o", &store, &source, &target],
        6,
        &["outside the source"],
    );
    // A refusal leaves nothing behind.
    assert!(!is_mounted(Path::new(&source)) && !is_mounted(Path::new(&target)));
    assert!(!base.join("source/.cowfs").exists());
}

#[test]
fn names_that_are_not_utf8_are_shown_not_tripped_over() {
    let path = OsStr::from_bytes(b"/no/such/\xff\xfe");
    refused(
        &[OsStr::new("mount"), path],
        3,
        &["/no/such/", "no such directory"],
    );
    refused(&[OsStr::new("umount"), path], 4, &["/no/such/"]);
    refused(&[OsStr::new("status"), path], 4, &["/no/such/"]);
}

#[test]
fn what_is_no_cowfs_mount_is_said_to_be_none() {
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().to_str().unwrap();
    let none = "not in a cowfs mount";
    refused(&["status", path], 4, &[path, none, "cowfs mount"]);
    refused(&["status", path, "--json"], 4, &[none]);
    refused(&["snapshot", "list", path], 4, &[path, none]);
    refused(&["snapshot", "create", path, "x"], 4, &[path, none]);
    refused(&["snapshot", "create", path], 4, &[path, none]);
    refused(&["snapshot", "delete", path, "x"], 4, &[path, none]);
    refused(&["snapshot", "rename", path, "x", "y"], 4, &[path, none]);
    refused(&["umount", path], 4, &[path, "not mounted"]);
    refused(&["umount", "/proc"], 4, &["type proc"]);
    refused(&["umount", "/no/such"], 4, &["/no/such"]);
}

#[test]
fn snapshot_names_are_checked_before_anything_else() {
    let long = "x".repeat(256);
    for name in ["", ".", "..", "a/b", &long] {
        refused(&["snapshot", "create", "/tmp", name], 7, &["snapshot name"]);
        refused(
            &["snapshot", "rename", "/tmp", "a", name],
            7,
            &["snapshot name"],
        );
        refused(&["snapshot", "delete", "/tmp", name], 7, &["snapshot name"]);
    }
    let wrong = ["snapshot", "create", "/tmp", "--pattern", "%Q"];
    refused(&wrong, 2, &["strftime", "%Q"]);
    refused(&["snapshot", "delete", "/tmp/"], 2, &["name the snapshots"]);
}

#[test]
fn the_demo_refuses_what_it_cannot_copy() {
    refused(&["demo", "/no/such"], 3, &["/no/such"]);
    refused(&["demo", "/proc/self/exe"], 3, &["not a directory"]);
}

#[test]
fn mount_helpers_are_known_by_their_names() {
    let helper = |name: &str, arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_cowfs"))
            .arg0(name)
            .args(arguments)
            .output()
            .unwrap();
        (output.status.code(), text(&output.stderr))
    };
    // As mount(8) calls it: the options come last.
    let arguments = ["/no/such", "/mnt", "-o", "rw,noauto", "-n", "-s", "-v"];
    for name in ["/sbin/mount.fuse.cowfs", "mount.cowfs"] {
        let (code, stderr) = helper(name, &arguments);
        assert_eq!(code, Some(3), "{stderr}");
        assert!(stderr.contains("/no/such: no such directory"), "{stderr}");
    }
    let (code, stderr) = helper("/sbin/umount.fuse.cowfs", &["/no/such", "-f"]);
    assert_eq!(code, Some(4), "{stderr}");
}

#[test]
fn a_fake_mount_checks_and_mounts_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let path = std::fs::canonicalize(temp.path()).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_cowfs"))
        .arg0("mount.fuse.cowfs")
        .args([path.as_os_str(), path.as_os_str(), "-f".as_ref()])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(!is_mounted(&path));
    assert!(!path.join(".cowfs").exists());
}

/// Root may do everything, so the refusals are asked for as somebody else; that takes root to become.
#[test]
fn users_without_permission_are_told() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("NOT RUN: it takes root");
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let binary = temp.path().join("cowfs");
    // By cp: had this process the copy open for writing while another test forks, it could not be run (ETXTBSY).
    let copied = Command::new("cp")
        .arg(env!("CARGO_BIN_EXE_cowfs"))
        .arg(&binary)
        .status();
    assert!(copied.unwrap().success());
    let path = |name: &str, mode| {
        let path = temp.path().join(name);
        std::fs::create_dir(&path).unwrap();
        set_mode(&path, mode);
        path
    };
    set_mode(temp.path(), 0o755);
    let (closed, open) = (path("closed", 0o700), path("open", 0o755));
    let as_nobody = |source: &Path| {
        let output = Command::new(&binary)
            .arg("mount")
            .arg(source)
            .uid(65534)
            .gid(65534)
            .env("PATH", "/nonexistent")
            .output()
            .unwrap();
        (output.status.code(), text(&output.stderr))
    };
    let (code, stderr) = as_nobody(&closed);
    assert_eq!(code, Some(5), "{stderr}");
    assert!(stderr.contains("closed: not permitted"), "{stderr}");
    // Either /dev/fuse is closed to others, or mounting is.
    let (code, stderr) = as_nobody(&open);
    assert_eq!(code, Some(5), "{stderr}");
    assert!(stderr.contains("be root"), "{stderr}");
}

fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}
