//! Wrong use of a mount is refused with a message that names the thing and with the exit code of docs/CLI.md,
//! and does no damage (C12); right use of the command on a mount does what it says.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Signal, kill_process};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use support::cut::remove_snapshot;
use support::user::Beside;
use support::{Mount, Outcome, cowfs_bin, daemons, mount_type, run, scratch, unmount_patiently};

const LIMIT: Duration = Duration::from_secs(300);

fn cowfs<S: AsRef<OsStr>>(arguments: &[S]) -> Outcome {
    run(Command::new(cowfs_bin()).args(arguments), LIMIT)
}

#[track_caller]
fn refused<S: AsRef<OsStr>>(arguments: &[S], code: i32, says: &[&str]) {
    let outcome = cowfs(arguments);
    assert_eq!(outcome.status.code(), Some(code), "{}", outcome.stderr);
    for part in says {
        let said = &outcome.stderr;
        assert!(said.contains(part), "{part:?} is not in {said:?}");
    }
}

fn words<'a>(line: &'a [&'a str], paths: &'a [&'a Path]) -> Vec<&'a OsStr> {
    let line = line.iter().map(OsStr::new);
    line.chain(paths.iter().map(|path| path.as_os_str()))
        .collect()
}

#[test]
fn a_directory_is_mounted_once() {
    let mount = Mount::new("twice", LIMIT);
    let other = mount.root.join("other");
    fs::create_dir(&other).unwrap();
    fs::write(mount.mnt.join("f"), "kept").unwrap();
    refused(
        &words(&["mount"], &[&mount.backing, &other]),
        3,
        &["mounted by cowfs already", "umount"],
    );
    assert_eq!(mount_type(&other), None);
    let another = mount.root.join("another");
    fs::create_dir(&another).unwrap();
    refused(&words(&["mount"], &[&another, &mount.mnt]), 4, &["mnt"]);
    assert_eq!(fs::read(mount.mnt.join("f")).unwrap(), b"kept");
}

#[test]
fn a_read_only_directory_is_refused() {
    let mount = Mount::new("readonly", LIMIT);
    mount.umount();
    let mnt = &mount.mnt;
    let bind = mount.root.join("bind");
    fs::create_dir(&bind).unwrap();
    let tool = |args: &[&OsStr]| run(Command::new("mount").args(args), LIMIT).success("mount");
    tool(&words(&["--bind"], &[&mount.backing, &bind]));
    tool(&words(&["-o", "remount,ro,bind"], &[&bind]));
    let outcome = cowfs(&words(&["mount"], &[&bind, mnt]));
    let undone = run(Command::new("umount").arg(&bind), LIMIT);
    assert_eq!(outcome.status.code(), Some(3), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("read-only"), "{}", outcome.stderr);
    undone.success("umount");
    mount.mount();
}

/// What mount(8) calls for `mount -o remount,…`: the kernel's part alone, so it holds at once and for snapshots too.
#[test]
fn a_remount_changes_the_flags_of_a_mount() {
    let mount = Mount::new("remount", LIMIT);
    let state = || {
        let outcome = cowfs(&words(&["status", "--json"], &[&mount.mnt])).success("status");
        let status: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
        status["state"].as_str().unwrap().to_owned()
    };
    let both: [&Path; 2] = [&mount.backing, &mount.mnt];
    fs::write(mount.mnt.join("f"), "kept").unwrap();
    let open = fs::File::create(mount.mnt.join("open")).unwrap();
    refused(
        &words(&["mount", "-o", "remount,ro"], &both),
        4,
        &["in use"],
    );
    drop(open);
    // The kernel tells of a close(2) after it has returned.
    let closed = Instant::now() + Duration::from_secs(10);
    let remount = || cowfs(&words(&["mount", "-o", "remount,ro"], &both));
    let mut outcome = remount();
    while !outcome.status.success() && Instant::now() < closed {
        outcome = remount();
    }
    outcome.success("remount,ro");
    assert_eq!(state(), "read-only");
    let error = fs::write(mount.mnt.join("f"), "changed").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    let error = fs::create_dir(mount.snapshot_path("s")).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    // With the options that the mount table shows, as mount(8) passes them on.
    let table = "rw,relatime,user_id=0,group_id=0,default_permissions,allow_other,remount";
    cowfs(&words(&["mount", "-o", table], &both)).success("remount,rw");
    assert_eq!(state(), "ok");
    mount.snapshot("s");
    assert_eq!(fs::read(mount.mnt.join("f")).unwrap(), b"kept");
    refused(
        &words(&["mount", "-o", "remount,durability=strict"], &both),
        2,
        &["durability", "umount"],
    );
    let elsewhere = mount.root.join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    refused(
        &words(
            &["mount", "-o", "remount,ro"],
            &[&mount.backing, &elsewhere],
        ),
        4,
        &["no cowfs is mounted here"],
    );
}

/// umount(2) returns while the daemon still writes its store; a mount that follows waits for it.
#[test]
fn a_mount_waits_for_the_end_of_the_one_before() {
    let mount = Mount::new("again", LIMIT);
    for round in 0..10 {
        for file in 0..200 {
            fs::write(mount.mnt.join(format!("{round}.{file}")), "content").unwrap();
        }
        mount.snapshot(&round.to_string());
        unmount_patiently(&mount.mnt);
        mount.mount();
    }
    assert_eq!(fs::read_dir(&mount.mnt).unwrap().count(), 2000);
}

#[test]
fn a_store_of_another_format_is_refused_and_left_alone() {
    let mount = Mount::new("format", LIMIT);
    mount.snapshot("before");
    mount.umount();
    let format = mount.backing.join(".cowfs/store/format");
    let right = fs::read_to_string(&format).unwrap();
    let wrong = right.replace("cowfs-store 1", "cowfs-store 99");
    assert_ne!(right, wrong);
    fs::write(&format, &wrong).unwrap();
    refused(
        &words(&["mount"], &[&mount.backing, &mount.mnt]),
        6,
        &["format", "99", "1"],
    );
    assert_eq!(fs::read_to_string(&format).unwrap(), wrong);
    fs::write(&format, right).unwrap();
    mount.mount();
    assert!(mount.snapshot_path("before").is_dir());
}

/// The store is opened through a descriptor, whose path says nothing to whoever reads the message.
#[test]
fn what_is_wrong_with_a_store_is_named_by_the_directory() {
    let mount = Mount::new("named", LIMIT);
    mount.snapshot("before");
    mount.umount();
    let hidden = mount.backing.join(".cowfs");
    for (file, code) in [("store-id", 6), ("store/format", 6), ("store/journal", 1)] {
        let (at, away) = (hidden.join(file), hidden.join("away"));
        fs::rename(&at, &away).unwrap();
        // Not text, as damage may be.
        fs::write(&at, b"\xff\xfe not this").unwrap();
        for command in ["mount", "check"] {
            let paths: [&Path; 2] = [&mount.backing, &mount.mnt];
            let paths = &paths[..if command == "mount" { 2 } else { 1 }];
            refused(&words(&[command], paths), code, &[at.to_str().unwrap()]);
        }
        fs::remove_file(&at).unwrap();
        fs::rename(&away, &at).unwrap();
    }
    mount.mount();
    assert!(mount.snapshot_path("before").is_dir());
}

#[test]
fn a_store_open_to_others_is_refused() {
    let mount = Mount::new("open", LIMIT);
    mount.umount();
    let hidden = mount.backing.join(".cowfs");
    fs::set_permissions(&hidden, fs::Permissions::from_mode(0o755)).unwrap();
    refused(
        &words(&["mount"], &[&mount.backing, &mount.mnt]),
        3,
        &[".cowfs", "0700"],
    );
    fs::set_permissions(&hidden, fs::Permissions::from_mode(0o700)).unwrap();
    mount.mount();
}

#[test]
fn a_store_elsewhere_belongs_to_one_directory() {
    let mount = Mount::new("elsewhere", LIMIT);
    let (a, b) = (mount.root.join("a"), mount.root.join("b"));
    let (store, mnt) = (mount.root.join("store"), mount.root.join("other-mnt"));
    for dir in [&a, &b, &mnt] {
        fs::create_dir(dir).unwrap();
    }
    let with = format!("store={}", store.display());
    cowfs(&words(&["mount", "-o", &with], &[&a, &mnt])).success("mount with a store elsewhere");
    assert_eq!(mount_type(&mnt).as_deref(), Some("fuse.cowfs"));
    fs::write(mnt.join("f"), "old").unwrap();
    fs::create_dir(mnt.join(".snapshots/s")).unwrap();
    fs::write(mnt.join("f"), "new").unwrap();
    fs::remove_file(mnt.join("f")).unwrap();
    cowfs(&words(&["umount"], &[&mnt])).success("umount");
    refused(&words(&["mount"], &[&a, &mnt]), 6, &["store="]);
    refused(
        &words(&["mount", "-o", &with], &[&b, &mnt]),
        6,
        &["another directory"],
    );
    cowfs(&words(&["mount", "-o", &with], &[&a, &mnt])).success("mount again");
    let kept = fs::read(mnt.join(".snapshots/s/f"));
    cowfs(&words(&["umount"], &[&mnt])).success("umount");
    assert_eq!(kept.unwrap(), b"old");
}

/// A place that cannot hold the store is refused before anything is made, there and in the directory.
#[test]
fn a_refused_store_leaves_nothing() {
    let mount = Mount::new("refused-store", LIMIT);
    let [a, open, mnt] = ["a", "open", "other-mnt"].map(|name| mount.root.join(name));
    for dir in [&a, &open, &mnt] {
        fs::create_dir(dir).unwrap();
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    }
    mount.snapshot("s");
    mount.umount();
    let others = mount.backing.join(".cowfs/store");
    for (store, says) in [
        (&open, "open to other users"),
        (&others, "another directory"),
    ] {
        let with = format!("store={}", store.display());
        refused(&words(&["mount", "-o", &with], &[&a, &mnt]), 6, &[says]);
    }
    for dir in [&a, &open] {
        let left: Vec<_> = fs::read_dir(dir).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }
    mount.mount();
}

/// A store on another filesystem may be moved to a larger one, and what is left of it where it was is not taken for it later.
#[test]
fn a_store_elsewhere_can_be_moved() {
    let mount = Mount::on_disk_of("moved-store", LIMIT, "ext4", 200);
    let [a, mnt] = ["a", "other-mnt"].map(|name| mount.root.join(name));
    for dir in [&a, &mnt] {
        fs::create_dir(dir).unwrap();
    }
    mount.umount();
    let disk = mount.backing.parent().unwrap();
    let (here, there) = (disk.join("here"), disk.join("there"));
    let with = |store: &Path| format!("store={}", store.display());
    cowfs(&words(&["mount", "-o", &with(&here)], &[&a, &mnt])).success("mount");
    fs::write(mnt.join("f"), "old").unwrap();
    fs::create_dir(mnt.join(".snapshots/s")).unwrap();
    fs::write(mnt.join("f"), "new").unwrap();
    cowfs(&words(&["umount"], &[&mnt])).success("umount");
    let copy = |from: &Path, to: &Path| {
        let mut cp = Command::new("cp");
        run(cp.arg("-a").args([from, to]), LIMIT).success("cp -a");
    };
    copy(&here, &there);
    // A mount that does not come up, when the store is open already, leaves the other one as good as it was.
    let mut late = Command::new("setpriv");
    late.args(["--bounding-set=-sys_admin", "--inh-caps=-sys_admin"])
        .arg(cowfs_bin())
        .args(words(&["mount", "-o", &with(&there)], &[&a, &mnt]));
    let outcome = run(&mut late, LIMIT);
    assert!(
        outcome.stderr.contains("cannot mount here"),
        "{}",
        outcome.stderr
    );
    cowfs(&words(&["mount", "-o", &with(&here)], &[&a, &mnt])).success("mount");
    cowfs(&words(&["umount"], &[&mnt])).success("umount");
    fs::remove_dir_all(&there).unwrap();
    copy(&here, &there);
    let live = disk.join("live");
    let old_ones_are_refused = |old: &[&Path]| {
        for store in old {
            for command in [
                words(&["mount", "-o", &with(store)], &[&a, &mnt]),
                words(&["check", "-o", &with(store)], &[&a]),
            ] {
                refused(&command, 6, &["an older state", "used last"]);
            }
        }
    };
    let is_used = |copied: bool| {
        cowfs(&words(&["mount", "-o", &with(&there)], &[&a, &mnt])).success("mount");
        let kept = fs::read(mnt.join(".snapshots/s/f"));
        if copied {
            copy(&there, &live);
            fs::write(mnt.join("new"), "what the copy does not know of").unwrap();
        }
        cowfs(&words(&["umount"], &[&mnt])).success("umount");
        assert_eq!(kept.unwrap(), b"old");
    };
    is_used(false);
    old_ones_are_refused(&[&here]);
    // One that was copied while it was in use.
    is_used(true);
    old_ones_are_refused(&[&here, &live]);
    // Nothing is forgotten over the store of another directory, nor over a session file that is lost or damaged.
    let others = mount.backing.join(".cowfs/store");
    let wrong = with(&others);
    refused(
        &words(&["mount", "-o", &wrong], &[&a, &mnt]),
        6,
        &["not the store of this directory"],
    );
    old_ones_are_refused(&[&here, &live]);
    let session = there.join("journal/session");
    for slot in [0, 4096] {
        let file = File::options().write(true).open(&session).unwrap();
        file.write_all_at(&[0; 100], slot).unwrap();
        is_used(false);
        old_ones_are_refused(&[&here, &live]);
    }
    fs::remove_file(&session).unwrap();
    is_used(false);
    old_ones_are_refused(&[&here, &live]);
    cowfs(&words(&["check", "-o", &with(&there)], &[&a])).success("check");
    mount.mount();
}

/// Who forgets store= is refused, with nothing made, and a command that destroys does not take what is elsewhere for nothing.
#[test]
fn a_store_elsewhere_is_not_forgotten() {
    let mount = Mount::new("forgotten", LIMIT);
    let (a, store, mnt) = ("a", "store", "other-mnt");
    let [a, store, mnt] = [a, store, mnt].map(|name| mount.root.join(name));
    for dir in [&a, &mnt] {
        fs::create_dir(dir).unwrap();
    }
    let with = format!("store={}", store.display());
    cowfs(&words(&["mount", "-o", &with], &[&a, &mnt])).success("mount with a store elsewhere");
    fs::write(mnt.join("f"), "old").unwrap();
    fs::create_dir(mnt.join(".snapshots/s")).unwrap();
    fs::remove_file(mnt.join("f")).unwrap();
    cowfs(&words(&["umount"], &[&mnt])).success("umount");
    refused(&words(&["mount"], &[&a, &mnt]), 6, &["store="]);
    assert!(!a.join(".cowfs/store").exists(), "a store was made");
    refused(&words(&["destroy"], &[&a]), 3, &["elsewhere", "--yes"]);
    let empty = mount.root.join("empty");
    let wrong = format!("store={}", empty.display());
    refused(
        &words(&["mount", "-o", &wrong], &[&a, &mnt]),
        6,
        &["store="],
    );
    assert!(!empty.exists(), "a store was made");
    cowfs(&words(&["mount", "-o", &with], &[&a, &mnt])).success("mount again");
    let kept = fs::read(mnt.join(".snapshots/s/f"));
    cowfs(&words(&["umount"], &[&mnt])).success("umount");
    assert_eq!(kept.unwrap(), b"old");
}

/// What a store names objects by means others in a copy of its directory: the copy is refused, and what was moved is not.
#[test]
fn a_copy_of_a_directory_with_its_store_is_refused() {
    for kind in ["ext4", "xfs", "btrfs"] {
        let mount = Mount::on_disk_of(&format!("copied-{kind}"), LIMIT, kind, 400);
        fs::write(mount.mnt.join("f"), "old").unwrap();
        fs::create_dir(mount.mnt.join(".snapshots/s")).unwrap();
        fs::write(mount.mnt.join("f"), "new").unwrap();
        mount.umount();
        let beside = mount.backing.with_file_name("beside");
        let elsewhere = mount.root.join("elsewhere");
        for copy in [&beside, &elsewhere] {
            let mut cp = Command::new("cp");
            run(cp.arg("-a").arg(&mount.backing).arg(copy), LIMIT).success("cp -a");
            refused(&words(&["mount"], &[copy, &mount.mnt]), 6, &["a copy"]);
            refused(&words(&["check"], &[copy]), 6, &["a copy"]);
            refused(&words(&["destroy"], &[copy]), 3, &["--yes"]);
            cowfs(&words(&["destroy", "--yes"], &[copy])).success("destroy");
            cowfs(&words(&["mount"], &[copy, &mount.mnt])).success("mount of a plain directory");
            cowfs(&words(&["umount"], &[&mount.mnt])).success("umount");
        }
        let moved = mount.backing.with_file_name("moved");
        fs::rename(&mount.backing, &moved).unwrap();
        cowfs(&words(&["mount"], &[&moved, &mount.mnt])).success("mount of what was moved");
        let kept = fs::read(mount.mnt.join(".snapshots/s/f"));
        cowfs(&words(&["umount"], &[&mount.mnt])).success("umount");
        assert_eq!(kept.unwrap(), b"old");
        fs::rename(&moved, &mount.backing).unwrap();
        // Nor does a store belong to the directory that its folder was moved to.
        let other = mount.backing.with_file_name("other");
        fs::create_dir(&other).unwrap();
        fs::rename(mount.backing.join(".cowfs"), other.join(".cowfs")).unwrap();
        refused(&words(&["mount"], &[&other, &mount.mnt]), 6, &["was moved"]);
        refused(&words(&["check"], &[&other]), 6, &["was moved"]);
        fs::rename(other.join(".cowfs"), mount.backing.join(".cowfs")).unwrap();
        mount.mount();
    }
}

/// Files that a backup tool puts back are others than those that snapshots are of, though the folder is the same.
#[test]
fn a_directory_put_back_in_its_place_with_its_store_is_refused() {
    let mount = Mount::new("put-back", LIMIT);
    let backup = mount.root.join("backup");
    let rsync = |from: &Path, to: &Path| {
        let mut rsync = Command::new("rsync");
        let from = from.join("");
        run(
            rsync
                .args(["-aHAX", "--modify-window=-1", "--delete"])
                .args([&from, to]),
            LIMIT,
        )
        .success("rsync");
    };
    fs::write(mount.mnt.join("f"), "version 1").unwrap();
    mount.snapshot("s");
    fs::write(mount.mnt.join("f"), "version two").unwrap();
    mount.umount();
    rsync(&mount.backing, &backup);
    // Put back over what it is of, it changes nothing.
    rsync(&backup, &mount.backing);
    mount.mount();
    let kept = fs::read(mount.snapshot_path("s").join("f")).unwrap();
    assert_eq!(kept, b"version 1");
    fs::write(mount.mnt.join("f"), "version number three").unwrap();
    mount.umount();
    rsync(&backup, &mount.backing);
    for command in [
        words(&["mount"], &[&mount.backing, &mount.mnt]),
        words(&["check"], &[&mount.backing]),
    ] {
        refused(&command, 6, &["put back from a backup", "destroy --yes"]);
    }
    cowfs(&words(&["destroy", "--yes"], &[&mount.backing])).success("destroy");
    mount.mount();
    let live = fs::read(mount.mnt.join("f")).unwrap();
    assert_eq!(live, b"version two");
}

/// A session file that is lost makes snapshots suspect, once, and the one that takes its place is no other store's.
#[test]
fn a_lost_session_file_is_no_older_store() {
    let mount = Mount::new("no-session", LIMIT);
    mount.snapshot("s");
    mount.umount();
    let check = || cowfs(&words(&["check"], &[&mount.backing])).success("check");
    assert!(check().stdout.contains("0 notes"), "{}", check().stdout);
    fs::remove_file(mount.backing.join(".cowfs/store/journal/session")).unwrap();
    let said = check().stdout;
    assert!(said.contains("makes the snapshots suspect"), "{said}");
    // Who opens the store without a session makes no session file that would be taken for another one.
    cowfs(&words(&["check", "--repair"], &[&mount.backing])).success("check --repair");
    refused(&words(&["destroy"], &[&mount.backing]), 3, &["1 snapshots"]);
    for _ in 0..2 {
        mount.mount();
        let list = cowfs(&words(&["snapshot", "list"], &[&mount.mnt])).success("list");
        assert!(list.stdout.contains("suspect"), "{}", list.stdout);
        mount.umount();
    }
    // Nor is one of which a write was torn, or that is damaged.
    let session = mount.backing.join(".cowfs/store/journal/session");
    for slots in [&[0][..], &[4096], &[0, 4096]] {
        for slot in slots {
            let file = File::options().write(true).open(&session).unwrap();
            file.write_all_at(b"x", slot + 30).unwrap();
        }
        mount.mount();
        mount.umount();
    }
    mount.mount();
}

/// btrfs numbers objects in the order in which they are made, so that two filesystems can have the same handles.
#[test]
fn a_directory_restored_to_another_btrfs_is_refused() {
    let mount = Mount::on_disk_of("twins", LIMIT, "btrfs", 400);
    mount.umount();
    let run_on = |program: &str, args: &[&str], paths: &[&Path]| {
        run(Command::new(program).args(args).args(paths), LIMIT).success(program);
    };
    let disks = ["one", "two"].map(|name| mount.root.join(name));
    for disk in &disks {
        let image = disk.with_extension("img");
        fs::create_dir(disk).unwrap();
        fs::File::create(&image)
            .unwrap()
            .set_len(400 << 20)
            .unwrap();
        run_on("mkfs.btrfs", &["-q"], &[&image]);
        run_on("mount", &["-o", "loop"], &[&image, disk]);
    }
    let outcome = std::panic::catch_unwind(|| {
        let [source, copy] = [disks[0].join("d"), disks[1].join("d")];
        fs::create_dir(&source).unwrap();
        cowfs(&words(&["mount"], &[&source, &mount.mnt])).success("mount");
        fs::write(mount.mnt.join("f"), "old").unwrap();
        fs::create_dir(mount.mnt.join(".snapshots/s")).unwrap();
        fs::write(mount.mnt.join("f"), "new").unwrap();
        cowfs(&words(&["umount"], &[&mount.mnt])).success("umount");
        run_on("cp", &["-a"], &[&source, &copy]);
        refused(&words(&["mount"], &[&copy, &mount.mnt]), 6, &["a copy"]);
    });
    for disk in &disks {
        // What is mounted there is told of by the outcome.
        let _ = unmount(disk, UnmountFlags::DETACH);
    }
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
    mount.mount();
}

/// The first stores do not say which directory they are of. It is noted at the next mount, or, on a full disk, later.
#[test]
fn a_store_that_does_not_say_whose_it_is() {
    let mount = Mount::new("one-line", LIMIT);
    fs::create_dir(mount.mnt.join(".snapshots/s")).unwrap();
    mount.umount();
    let hidden = mount.backing.join(".cowfs");
    let (mark, new) = (hidden.join("store-id"), hidden.join(".tmp-store-id"));
    let lines = || fs::read_to_string(&mark).unwrap().lines().count();
    assert_eq!(lines(), 6);
    let text = fs::read_to_string(&mark).unwrap();
    fs::write(&mark, &text[..33]).unwrap();
    // In the way of writing.
    fs::create_dir(&new).unwrap();
    for expected in [1, 6] {
        mount.mount();
        assert!(mount.mnt.join(".snapshots/s").is_dir());
        mount.umount();
        assert_eq!(lines(), expected);
        let _ = fs::remove_dir(&new);
    }
    // The last line says how often the store was in use.
    let now = fs::read_to_string(&mark).unwrap();
    let but_last = |text: &str| text[..text.find("sequence").unwrap()].to_owned();
    assert_eq!(but_last(&now), but_last(&text));
    mount.mount();
}

/// A snapshot of a subvolume has the same inode numbers as what it was made of, and not the same objects.
#[test]
fn a_btrfs_snapshot_of_a_directory_with_its_store_is_refused() {
    let mount = Mount::on_disk_of("subvolume", LIMIT, "btrfs", 400);
    let btrfs = |args: &[&OsStr]| run(Command::new("btrfs").args(args), LIMIT).success("btrfs");
    let source = mount.backing.with_file_name("source");
    btrfs(&words(&["subvolume", "create"], &[&source]));
    mount.umount();
    cowfs(&words(&["mount"], &[&source, &mount.mnt])).success("mount");
    fs::create_dir(mount.mnt.join(".snapshots/s")).unwrap();
    cowfs(&words(&["umount"], &[&mount.mnt])).success("umount");
    let twin = mount.backing.with_file_name("twin");
    btrfs(&words(&["subvolume", "snapshot"], &[&source, &twin]));
    refused(&words(&["mount"], &[&twin, &mount.mnt]), 6, &["a copy"]);
    cowfs(&words(&["mount"], &[&source, &mount.mnt])).success("mount");
    cowfs(&words(&["umount"], &[&mount.mnt])).success("umount");
    mount.mount();
}

/// FUSE gives its files other numbers when it has forgotten them.
#[test]
fn a_directory_on_fuse_is_refused() {
    let mount = Mount::new("on-fuse", LIMIT);
    let (inside, at) = (mount.mnt.join("inside"), mount.root.join("at"));
    let part = mount.root.join("part");
    for dir in [&inside, &at, &part] {
        fs::create_dir(dir).unwrap();
    }
    // Not known for a part of a cowfs mount by its place.
    let mut bind = Command::new("bindfs");
    run(bind.args([&inside, &part]), LIMIT).success("bindfs");
    assert_eq!(mount_type(&part).as_deref(), Some("fuse"));
    let outcome = cowfs(&words(&["mount"], &[&part, &at]));
    let left = fs::read_dir(&part).unwrap().count();
    unmount(&part, UnmountFlags::DETACH).unwrap();
    let start = Instant::now();
    while !daemons(Path::new("bindfs"), &part).is_empty() && start.elapsed() < LIMIT / 10 {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(outcome.status.code(), Some(3), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("FUSE"), "{}", outcome.stderr);
    assert_eq!((mount_type(&at), left), (None, 0));
}

/// A directory that hands its project down (xfs_quota(8)) takes no names of another project's objects: what is removed goes to
/// one of cowfs's.
#[test]
fn directories_of_projects() {
    let mount = Mount::on_disk_of("projects", LIMIT, "xfs", 400);
    mount.umount();
    let project = |number: &str, dir: &Path| {
        let mut chattr = Command::new("chattr");
        run(chattr.args(["-p", number, "+P"]).arg(dir), LIMIT).success("chattr");
    };
    let (backing, mnt) = (&mount.backing, &mount.mnt);
    fs::remove_dir_all(backing.join(".cowfs")).unwrap();
    project("10", backing);
    let other = backing.join("other");
    fs::create_dir_all(other.join("d")).unwrap();
    project("20", &other);
    mount.mount();
    for name in ["open", "file", "replaced", "by"] {
        fs::write(mnt.join("other").join(name), name).unwrap();
    }
    let open = fs::File::open(mnt.join("other/open")).unwrap();
    fs::remove_file(mnt.join("other/open")).unwrap();
    drop(open);
    let snapshot = mount.snapshot("s").join("other");
    fs::remove_file(mnt.join("other/file")).unwrap();
    fs::rename(mnt.join("other/by"), mnt.join("other/replaced")).unwrap();
    fs::remove_dir(mnt.join("other/d")).unwrap();
    for name in ["file", "replaced", "by"] {
        assert_eq!(fs::read_to_string(snapshot.join(name)).unwrap(), name);
    }
    assert!(snapshot.join("d").is_dir());
}

/// How large a file may get is a matter of who writes it, not of who has mounted.
#[test]
fn limits_of_who_mounts_are_not_those_of_the_mount() {
    let mount = Mount::new("limits", LIMIT);
    let large = |name: &str| fs::write(mount.mnt.join(name), vec![7; 4 << 20]);
    mount.umount();
    let (bin, log) = (cowfs_bin(), mount.root.join("cowfs.log"));
    let mut shell = Command::new("sh");
    shell
        .args(["-c", r#"ulimit -S -f 2048; exec "$@""#, "sh"])
        .arg(bin);
    shell.args(words(
        &["mount", "--log"],
        &[&log, &mount.backing, &mount.mnt],
    ));
    run(&mut shell, LIMIT).success("mount under a limit");
    large("a").unwrap();
    // The keeper writes to the log when it is needed most.
    fs::OpenOptions::new()
        .append(true)
        .open(&log)
        .unwrap()
        .set_len(4 << 20)
        .unwrap();
    mount.kill_server();
    large("a").unwrap();
    assert_eq!(mount.takeovers(), 1);
    // Where it cannot be raised.
    let server = mount.server().as_raw_nonzero().to_string();
    let mut prlimit = Command::new("prlimit");
    run(
        prlimit.args(["--pid", &server, "--fsize=1048576:1048576"]),
        LIMIT,
    )
    .success("prlimit");
    let refused = large("b").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EFBIG), "{refused}");
    assert_eq!(mount.takeovers(), 1);
}

/// Two mounts, of which one contains what the other has mounted, would change what the other keeps.
#[test]
fn overlapping_sources_are_refused() {
    let mount = Mount::new("overlap", LIMIT);
    let at = mount.root.join("at");
    let (inner, twin) = (mount.backing.join("inner"), mount.root.join("twin"));
    for dir in [&at, &inner, &twin] {
        fs::create_dir(dir).unwrap();
    }
    refused(&words(&["mount"], &[&inner, &at]), 3, &["lies in it"]);
    refused(
        &words(&["mount"], &[&mount.root, &twin]),
        3,
        &["lies in it"],
    );
    mount.umount();
    cowfs(&words(&["mount"], &[&inner])).success("mount of the inner one");
    refused(
        &words(&["mount"], &[&mount.backing, &at]),
        3,
        &["lies in it"],
    );
    cowfs(&words(&["umount"], &[&inner])).success("umount");
    // Whatever the mount table calls it, and though it is a mount point itself.
    let named = ["mount", "-o", "fsname=another"];
    cowfs(&words(&named, &[&mount.backing, &at])).success("mount");
    refused(&words(&["mount"], &[&inner, &twin]), 3, &["lies in it"]);
    cowfs(&words(&["umount"], &[&at])).success("umount");
    let mut bind = Command::new("mount");
    run(bind.arg("--bind").args([&inner, &inner]), LIMIT).success("mount --bind");
    let inside = cowfs(&words(&["mount"], &[&inner, &twin]));
    let around = cowfs(&words(&["mount"], &[&mount.backing, &at]));
    for place in [&twin, &inner] {
        // What is not mounted is told of below.
        let _ = unmount(place, UnmountFlags::DETACH);
    }
    inside.success("mount of what is mounted on itself");
    assert_eq!(around.status.code(), Some(3), "{}", around.stderr);
    // Seen from elsewhere.
    cowfs(&words(&["mount"], &[&mount.backing, &at])).success("mount");
    for place in [&inner, &mount.root] {
        let mut bind = Command::new("mount");
        run(bind.arg("--bind").args([place, &twin]), LIMIT).success("mount --bind");
        let source = if place == &inner {
            twin.clone()
        } else {
            twin.join("backing/inner")
        };
        let seen = cowfs(&words(&["mount"], &[&source, &mount.mnt]));
        let _ = unmount(&mount.mnt, UnmountFlags::DETACH);
        unmount(&twin, UnmountFlags::DETACH).unwrap();
        assert_eq!(seen.status.code(), Some(3), "{}", seen.stderr);
    }
    cowfs(&words(&["umount"], &[&at])).success("umount");
    // Another filesystem in it is not entered.
    let mut tmpfs = Command::new("mount");
    let other = mount.backing.join("other");
    fs::create_dir(&other).unwrap();
    run(tmpfs.args(["-t", "tmpfs", "tmpfs"]).arg(&other), LIMIT).success("mount of a tmpfs");
    let within = other.join("within");
    fs::create_dir(&within).unwrap();
    let inside = cowfs(&words(&["mount"], &[&within]));
    let around = cowfs(&words(&["mount"], &[&mount.backing, &at]));
    let types = [mount_type(&within), mount_type(&at)];
    for place in [&at, &within, &other] {
        // What is not mounted has been told of above.
        let _ = unmount(place, UnmountFlags::DETACH);
    }
    inside.success("mount in another filesystem");
    around.success("mount around another filesystem");
    let cowfs = Some("fuse.cowfs".to_owned());
    assert_eq!(types, [cowfs.clone(), cowfs]);
}

/// It would change behind the back of the mount, and who takes the mount over would wait for itself to open it.
#[test]
fn a_log_in_the_mount_is_refused() {
    let mount = Mount::new("log-inside", LIMIT);
    mount.umount();
    fs::create_dir(mount.backing.join("d")).unwrap();
    for log in [mount.backing.join("d/log"), mount.mnt.join("log")] {
        refused(
            &words(&["mount", "--log"], &[&log, &mount.backing, &mount.mnt]),
            2,
            &["--log", "choose a file outside"],
        );
        assert!(!log.exists());
    }
    mount.mount();
}

/// Where what starts the program lies in the mount, a server that is to take it over could not be started: a new mount is made.
#[test]
fn a_mount_over_what_starts_the_program() {
    let _beside = Beside::new();
    let root = scratch("over-etc");
    let script = r#"
        set -eu
        cp -a /etc "$1/etc"
        mount --bind "$1/etc" /etc
        "$2" mount /etc
        mkdir /etc/.snapshots/s
        echo new > /etc/cowfs-test
        server=$("$2" status --json /etc | sed 's/.*"pid": *\([0-9]*\).*/\1/;t;d' | head -n 1)
        kill -9 "$server"
        for _ in $(seq 200); do
            sleep 0.1
            test -e /etc/.snapshots/s && break
        done
        timeout 20 cat /etc/cowfs-test
        timeout 20 ls /etc/.snapshots
        timeout 20 stat --file-system --format=%t /etc
        "$2" umount /etc
        umount /etc
    "#;
    let mut command = Command::new("unshare");
    command.args(["-m", "--propagation", "private", "sh", "-c", script, "sh"]);
    let outcome = run(command.arg(&root).arg(cowfs_bin()), LIMIT).success("a mount over /etc");
    assert_eq!(outcome.stdout, "new\ns\n65735546\n");
    fs::remove_dir_all(&root).unwrap();
}

#[test]
fn snapshot_names_that_cannot_be_are_refused() {
    let mount = Mount::new("names", LIMIT);
    let mnt = mount.mnt.as_path();
    let at = mnt.to_str().unwrap();
    cowfs(&["snapshot", "create", at, "one"]).success("create");
    refused(&["snapshot", "create", at, "one"], 7, &["one", "exists"]);
    refused(&["snapshot", "create", at, "a/b"], 7, &["a/b"]);
    refused(
        &["snapshot", "create", at, ""],
        7,
        &["invalid snapshot name"],
    );
    refused(&["snapshot", "create", at, &"n".repeat(256)], 7, &["255"]);
    refused(
        &["snapshot", "create", at, ".."],
        7,
        &["invalid snapshot name"],
    );
    refused(&["snapshot", "delete", at, "none"], 7, &["none"]);
    refused(&["snapshot", "rename", at, "none", "other"], 7, &["none"]);
    cowfs(&["snapshot", "create", at, "two"]).success("create");
    refused(
        &["snapshot", "rename", at, "one", "two"],
        7,
        &["two", "exists"],
    );
    let long = "n".repeat(255);
    cowfs(&["snapshot", "rename", at, "one", &long]).success("rename");
    let mut left: Vec<_> = fs::read_dir(mnt.join(".snapshots"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, [OsStr::new(&long), OsStr::new("two")]);
    // One that is named twice is meant once; one that has two names is not meant.
    cowfs(&["snapshot", "delete", at, "two", "two"]).success("delete");
    refused(
        &["snapshot", "create", at, "three", "--pattern", "%F"],
        2,
        &["three", "--pattern"],
    );
    assert_eq!(fs::read_dir(mnt.join(".snapshots")).unwrap().count(), 1);
}

/// As that of the flush helper may be, after a cut.
#[test]
fn a_file_that_is_just_being_closed_does_not_keep_a_mount() {
    let mount = Mount::new("closing", LIMIT);
    let open = fs::File::create(mount.mnt.join("f")).unwrap();
    let closing = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(200));
        drop(open);
    });
    cowfs(&words(&["umount"], &[&mount.mnt])).success("umount");
    closing.join().unwrap();
}

#[test]
fn a_snapshot_that_is_read_is_not_deleted() {
    let mount = Mount::new("busy", LIMIT);
    fs::write(mount.mnt.join("f"), vec![1; 3 << 20]).unwrap();
    let snapshot = mount.snapshot("s");
    fs::write(mount.mnt.join("f"), vec![2; 3 << 20]).unwrap();
    let mut open = fs::File::open(snapshot.join("f")).unwrap();
    let busy = fs::remove_dir(&snapshot).unwrap_err();
    assert_eq!(
        busy.raw_os_error(),
        Some(rustix::io::Errno::BUSY.raw_os_error())
    );
    refused(
        &words(&["snapshot", "delete"], &[&mount.mnt, Path::new("s")]),
        7,
        &["in use"],
    );
    let mut data = Vec::new();
    std::io::Read::read_to_end(&mut open, &mut data).unwrap();
    assert!(data.len() == 3 << 20 && data.iter().all(|byte| *byte == 1));
    drop(open);
    // The kernel tells of a close after it has returned: the deletion waits for that.
    remove_snapshot(&snapshot).unwrap();
    assert!(!snapshot.exists());
}

#[test]
fn a_directory_is_mounted_over_itself() {
    let mount = Mount::new("itself", LIMIT);
    let dir = mount.root.join("itself");
    fs::create_dir_all(dir.join("sub")).unwrap();
    fs::write(dir.join("sub/f"), "before").unwrap();
    let options = "rw,noauto,nofail,user,_netdev,x-systemd.automount,nosuid,nodev,noexec,noatime,sync-interval=20";
    cowfs(&words(&["mount", "-o", options], &[&dir])).success("mount over itself");
    assert_eq!(mount_type(&dir).as_deref(), Some("fuse.cowfs"));
    assert!(
        !dir.join(".cowfs").exists(),
        "the store is not reachable through the mount"
    );
    cowfs(&words(
        &["snapshot", "create"],
        &[&dir.join("sub"), Path::new("s")],
    ))
    .success("create");
    fs::write(dir.join("sub/f"), "after").unwrap();
    let destroyed = cowfs(&words(&["destroy", "--yes"], &[&dir]));
    let seen = fs::read(dir.join(".snapshots/s/sub/f"));
    let beneath = fs::read(dir.join("sub/.snapshots/s/f"));
    cowfs(&words(&["umount"], &[&dir])).success("umount");
    assert_eq!(mount_type(&dir), None);
    assert_eq!(
        (seen.unwrap(), beneath.unwrap()),
        (b"before".to_vec(), b"before".to_vec())
    );
    assert_eq!(fs::read(dir.join("sub/f")).unwrap(), b"after");
    assert_eq!(destroyed.status.code(), Some(3), "{}", destroyed.stderr);
    assert!(destroyed.stderr.contains("unmount it first"));
}

#[test]
fn signals_unmount_cleanly() {
    let mount = Mount::new("signals", LIMIT);
    mount.umount();
    for signal in ["TERM", "INT"] {
        let mut daemon = Command::new(cowfs_bin())
            .args(words(&["mount", "-f"], &[&mount.backing, &mount.mnt]))
            .spawn()
            .unwrap();
        let start = Instant::now();
        while mount_type(&mount.mnt).is_none() && start.elapsed() < LIMIT {
            std::thread::sleep(Duration::from_millis(5));
        }
        fs::write(mount.mnt.join("f"), signal).unwrap();
        let kill = Command::new("kill")
            .arg(format!("-{signal}"))
            .arg(daemon.id().to_string())
            .status();
        assert!(kill.unwrap().success());
        let status = loop {
            if let Some(status) = daemon.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < LIMIT, "the daemon did not end");
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(status.success(), "{signal}: {status}");
        assert_eq!(mount_type(&mount.mnt), None);
        assert_eq!(
            fs::read(mount.backing.join("f")).unwrap(),
            signal.as_bytes()
        );
    }
    mount.mount();
}

/// `killall cowfs`, ^C of one in the foreground, and the end of a service signal all processes of a daemon: the server is told
/// twice. It took the filesystem away that it was mounted over.
#[test]
fn signals_take_nothing_away_but_the_mount() {
    let mount = Mount::new("signals-all", LIMIT * 2);
    let disk = mount.root.join("disk");
    fs::create_dir(&disk).unwrap();
    let tmpfs = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64m", "tmpfs"])
        .arg(&disk)
        .status();
    assert!(tmpfs.unwrap().success());
    for signal in [Signal::TERM, Signal::INT].repeat(4) {
        cowfs(&words(&["mount"], &[&disk])).success("mount");
        assert_eq!(mount_type(&disk).as_deref(), Some("fuse.cowfs"));
        fs::write(disk.join("f"), "data").unwrap();
        for pid in daemons(&cowfs_bin(), &disk) {
            // One may have ended with another.
            let _ = kill_process(pid, signal);
        }
        let start = Instant::now();
        while !daemons(&cowfs_bin(), &disk).is_empty() {
            assert!(start.elapsed() < LIMIT, "the daemon does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(mount_type(&disk).as_deref(), Some("tmpfs"));
        assert_eq!(fs::read(disk.join("f")).unwrap(), b"data");
    }
    // Two who unmount the same mount, which is busy for a moment.
    for _ in 0..4 {
        cowfs(&words(&["mount"], &[&disk])).success("mount");
        let open = fs::File::open(disk.join("f")).unwrap();
        std::thread::scope(|scope| {
            let unmount = || cowfs(&words(&["umount"], &[&disk]));
            let both = [scope.spawn(unmount), scope.spawn(unmount)];
            std::thread::sleep(Duration::from_millis(200));
            drop(open);
            for one in both {
                one.join().unwrap().success("umount");
            }
        });
        assert_eq!(mount_type(&disk).as_deref(), Some("tmpfs"));
    }
    unmount(&disk, UnmountFlags::empty()).unwrap();
}

#[test]
fn status_and_list_tell_what_there_is() {
    let mount = Mount::new("status", LIMIT);
    let sub = mount.mnt.join("sub");
    fs::create_dir(&sub).unwrap();
    fs::write(sub.join("f"), vec![7; 100_000]).unwrap();
    let made = cowfs(&words(
        &["snapshot", "create", "--json"],
        &[&sub, Path::new("s")],
    ))
    .success("create");
    let made: serde_json::Value = serde_json::from_str(&made.stdout).unwrap();
    assert_eq!(
        made["path"].as_str().unwrap(),
        mount.snapshot_path("s").to_str().unwrap()
    );
    fs::write(sub.join("f"), vec![8; 100_000]).unwrap();
    let status = cowfs(&words(&["status", "--json"], &[&sub])).success("status");
    let status: serde_json::Value = serde_json::from_str(&status.stdout).unwrap();
    assert_eq!(
        (status["state"].as_str(), status["snapshots"].as_u64()),
        (Some("ok"), Some(1))
    );
    assert!(status["preimage_bytes"].as_u64().unwrap() >= 100_000);
    assert_eq!(status["last_cut"]["name"].as_str(), Some("s"));
    let list = cowfs(&words(&["snapshot", "list", "--json"], &[&mount.mnt])).success("list");
    let list: serde_json::Value = serde_json::from_str(&list.stdout).unwrap();
    assert_eq!(list[0]["name"].as_str(), Some("s"));
    // An automatic name: UTC, without a colon, in the order of time.
    let path = cowfs(&words(&["snapshot", "create"], &[&mount.mnt]))
        .success("create")
        .stdout;
    let name = Path::new(path.trim())
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned();
    assert!(
        name.len() == 16 && name.ends_with('Z') && !name.contains(':'),
        "{name}"
    );
}

#[test]
fn every_process_has_the_name_of_the_command() {
    let mount = Mount::new("names", LIMIT);
    let processes = daemons(&cowfs_bin(), &mount.mnt);
    assert!(processes.len() > 2, "a server, a keeper and helpers");
    let bin = cowfs_bin();
    let own = bin.file_name().unwrap().to_str().unwrap();
    for pid in processes {
        let path = format!("/proc/{}/comm", pid.as_raw_nonzero());
        // One that has ended has no name.
        let name =
            || fs::read_to_string(&path).map_or("cowfs".into(), |name| name.trim().to_owned());
        // A helper may be just about to begin.
        let end = Instant::now() + LIMIT / 2;
        while !["cowfs", own].contains(&name().as_str()) {
            assert!(Instant::now() < end, "{} is called {}", path, name());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// What the option asks for is done where the kernel lets it, so the daemon's threads say what is right.
#[test]
fn status_tells_whether_processors_poll() {
    let polls = |mount: &Mount| {
        let tasks = format!("/proc/{}/task", mount.server().as_raw_nonzero());
        let polls = fs::read_dir(tasks).unwrap().any(|task| {
            let name = fs::read_to_string(task.unwrap().path().join("comm"));
            name.is_ok_and(|name| name.trim() == "cowfs-polling")
        });
        let word = if polls { "poll" } else { "halt" };
        assert_eq!(mount.full_status()["idle"].as_str(), Some(word));
        let text = cowfs(&words(&["status"], &[&mount.mnt])).success("status");
        assert!(
            text.stdout.contains(&format!("idle={word}")),
            "{}",
            text.stdout
        );
        polls
    };
    let mount = Mount::new("idle", LIMIT);
    polls(&mount);
    mount.remount_with("idle=halt");
    assert!(!polls(&mount));
}

/// What a thread of a process says in /proc: the last number of the line that begins with `what`, if there is one.
fn scheduled(task: &Path, what: &str) -> Option<i64> {
    let text = fs::read_to_string(task.join("sched")).unwrap();
    let line = text.lines().find(|line| line.starts_with(what))?;
    line.rsplit(' ').next()?.parse().ok()
}

/// Those who wait for an answer do not wait for the turns of the background; the nice value of whoever mounts stays.
#[test]
fn request_threads_take_short_turns() {
    let mount = Mount::new("turns", LIMIT);
    mount.umount();
    let mut nice = Command::new("nice");
    nice.args(["-n", "3"]).arg(cowfs_bin()).arg("mount");
    run(nice.args([&mount.backing, &mount.mnt]), LIMIT).success("nice cowfs mount");
    let tasks = format!("/proc/{}/task", mount.server().as_raw_nonzero());
    let tasks = fs::read_dir(tasks)
        .unwrap()
        .map(|task| task.unwrap().path());
    let named = |task: &PathBuf, name: &str| {
        fs::read_to_string(task.join("comm")).is_ok_and(|found| found.starts_with(name))
    };
    let (requests, others): (Vec<_>, Vec<_>) = tasks.partition(|task| named(task, "fuser"));
    let upkeep = others
        .iter()
        .find(|task| named(task, "cowfs-upkeep"))
        .unwrap();
    // Linux before 6.12 has turns of one length.
    if let Some(ordinary) = scheduled(upkeep, "se.slice") {
        assert!(ordinary > 100_000, "{ordinary}");
        assert!(!requests.is_empty());
        for task in &requests {
            assert_eq!(scheduled(task, "se.slice"), Some(100_000), "{task:?}");
        }
    }
    // 120 is nice 0.
    for task in requests.iter().chain([upkeep]) {
        assert_eq!(scheduled(task, "prio"), Some(123), "{task:?}");
    }
    mount.umount();
    mount.mount();
}

#[test]
fn destroy_leaves_a_plain_directory() {
    let mount = Mount::new("destroy", LIMIT);
    fs::write(mount.mnt.join("f"), "live").unwrap();
    let snapshot = mount.snapshot("s");
    fs::write(mount.mnt.join("gone"), "x").unwrap();
    assert!(snapshot.join("f").exists());
    refused(
        &words(&["destroy", "--yes"], &[&mount.backing]),
        3,
        &["unmount"],
    );
    mount.umount();
    refused(
        &words(&["destroy"], &[&mount.backing]),
        3,
        &["1 snapshots", "--yes"],
    );
    cowfs(&words(&["destroy", "--yes"], &[&mount.backing])).success("destroy");
    let mut left: Vec<_> = fs::read_dir(&mount.backing)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["f", "gone"]);
    refused(
        &words(&["destroy"], &[&mount.backing]),
        3,
        &["nothing to destroy"],
    );
    mount.mount();
}
