//! `cowfs check` and `cowfs verify` on real directories: mounted and not, whole and damaged.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use rustix::process::{Pid, Signal};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use support::{Mount, Outcome, cowfs_bin, run};

const LIMIT: Duration = Duration::from_secs(120);

fn cowfs(args: &[&str], paths: &[&Path]) -> Outcome {
    run(Command::new(cowfs_bin()).args(args).args(paths), LIMIT)
}

/// The exit code, and what was printed.
#[track_caller]
fn expect(outcome: &Outcome, code: i32, text: &str) {
    let all = format!("{}{}", outcome.stdout, outcome.stderr);
    assert_eq!(outcome.status.code(), Some(code), "{all}");
    assert!(all.contains(text), "{text:?} not in: {all}");
}

fn tree(dir: &Path) {
    fs::create_dir_all(dir.join("d/e")).unwrap();
    for i in 0..40 {
        fs::write(dir.join(format!("d/f{i}")), vec![i as u8 + 1; 9000]).unwrap();
    }
    fs::hard_link(dir.join("d/f1"), dir.join("d/e/same")).unwrap();
    std::os::unix::fs::symlink("f1", dir.join("d/link")).unwrap();
    run(Command::new("mkfifo").arg(dir.join("d/fifo")), LIMIT).success("mkfifo");
    run(
        Command::new("mknod")
            .arg(dir.join("d/null"))
            .args(["c", "1", "3"]),
        LIMIT,
    )
    .success("mknod");
    run(
        Command::new("setfattr")
            .args(["-n", "user.a", "-v", "b"])
            .arg(dir.join("d/f2")),
        LIMIT,
    )
    .success("setfattr");
}

/// Overwrites everything, so that the snapshots before it have pre-images of all of it.
fn change(dir: &Path, byte: u8) {
    for i in 0..40 {
        let file = File::options()
            .write(true)
            .open(dir.join(format!("d/f{i}")))
            .unwrap();
        file.write_all_at(&vec![byte; 9000], 0).unwrap();
    }
}

fn segments(mount: &Mount) -> Vec<PathBuf> {
    let journal = mount.backing.join(".cowfs/store/journal");
    let paths = fs::read_dir(journal).unwrap().map(|e| e.unwrap().path());
    let mut paths: Vec<_> = paths
        .filter(|path| path.extension().is_some_and(|e| e == "seg"))
        .collect();
    paths.sort();
    paths
}

#[test]
fn a_check_of_a_busy_mount_and_of_what_it_leaves_finds_nothing() {
    let mount = Mount::new("check-busy", LIMIT);
    tree(&mount.mnt);
    mount.snapshot("first");
    let writing = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let (mount, writing) = (&mount, &writing);
        scope.spawn(move || {
            for i in 0_u32.. {
                if !writing.load(Ordering::SeqCst) {
                    break;
                }
                change(&mount.mnt, i as u8);
                let name = format!("s{}", i % 3);
                if i >= 3 {
                    fs::remove_dir(mount.snapshot_path(&name)).unwrap();
                }
                mount.snapshot(&name);
                let gone = mount.mnt.join(format!("gone{i}"));
                fs::write(&gone, "x").unwrap();
                fs::rename(&gone, mount.mnt.join("there")).unwrap();
                let _ = fs::remove_file(mount.mnt.join(format!("d/f{}", 30 + i % 10)));
                fs::write(mount.mnt.join(format!("d/f{}", 30 + i % 10)), vec![1; 9000]).unwrap();
            }
        });
        for _ in 0..5 {
            let outcome = cowfs(&["check"], &[&mount.mnt]);
            expect(&outcome, 0, "0 lost, 0 wrong, 0 leaks, 0 notes");
        }
        writing.store(false, Ordering::SeqCst);
    });
    expect(
        &cowfs(&["check", "--repair"], &[&mount.backing]),
        3,
        "unmount it first",
    );
    mount.kill9();
    support::detach(&mount.mnt);
    expect(&cowfs(&["check"], &[&mount.backing]), 0, "0 lost, 0 wrong");
    mount.mount();
    mount.umount();
    expect(
        &cowfs(&["check", "--json"], &[&mount.backing]),
        0,
        "\"damaged\": false",
    );
    mount.mount();
}

#[test]
fn damage_is_named_with_its_snapshots_and_repaired() {
    let mount = Mount::new("check-damage", LIMIT);
    tree(&mount.mnt);
    mount.snapshot("old");
    change(&mount.mnt, 100);
    fs::remove_file(mount.mnt.join("d/f9")).unwrap();
    mount.snapshot("new");
    mount.umount();
    // The second block of f5, as the first snapshot has it.
    let bytes = fs::read(&segments(&mount)[0]).unwrap();
    let at = (1 << 20..bytes.len())
        .step_by(4096)
        .find(|at| bytes[*at..*at + 4096] == [6; 4096])
        .unwrap();
    let file = File::options()
        .write(true)
        .open(&segments(&mount)[0])
        .unwrap();
    file.write_all_at(b"rot", at as u64 + 100).unwrap();
    let retained = mount.backing.join(".cowfs/retained");
    fs::write(retained.join("00000000000000ff"), "stray").unwrap();
    fs::write(mount.backing.join(".cowfs/notes.txt"), "mine").unwrap();

    let outcome = cowfs(&["check"], &[&mount.backing]);
    expect(&outcome, 6, "snapshots concerned: old");
    expect(&outcome, 6, "are not what was kept");
    expect(&outcome, 6, "leak: retained/00000000000000ff");
    expect(&outcome, 6, "notes.txt: not a file of cowfs");
    assert!(
        !outcome.stdout.contains("concerned: new"),
        "{}",
        outcome.stdout
    );
    // The daemon says the same, and serves all else.
    mount.mount();
    expect(
        &cowfs(&["check"], &[&mount.mnt]),
        6,
        "snapshots concerned: old",
    );
    let old = mount.snapshot_path("old");
    assert_eq!(
        fs::read(old.join("d/f5")).unwrap_err().raw_os_error(),
        Some(5)
    );
    assert_eq!(fs::read(old.join("d/f6")).unwrap(), vec![7; 9000]);
    assert_eq!(fs::read(old.join("d/f9")).unwrap(), vec![10; 9000]);
    mount.umount();

    let outcome = cowfs(&["check", "--repair"], &[&mount.backing]);
    expect(&outcome, 0, "marked as suspect: old");
    assert!(!retained.join("00000000000000ff").exists());
    assert!(mount.backing.join(".cowfs/notes.txt").exists());
    let outcome = cowfs(&["check", "--repair"], &[&mount.backing]);
    expect(&outcome, 0, "0 lost, 0 wrong, 0 leaks");
    assert!(!outcome.stdout.contains("repaired"), "{}", outcome.stdout);
    mount.mount();
    let list = cowfs(&["snapshot", "list"], &[&mount.mnt])
        .success("list")
        .stdout;
    assert!(
        list.lines()
            .any(|l| l.starts_with("old") && l.contains("suspect")),
        "{list}"
    );
    assert!(
        list.lines()
            .any(|l| l.starts_with("new") && l.contains("ok")),
        "{list}"
    );
    assert_eq!(
        fs::read(old.join("d/f5")).unwrap_err().raw_os_error(),
        Some(5)
    );
    assert_eq!(fs::read(old.join("d/f6")).unwrap(), vec![7; 9000]);
}

/// The index has names and attributes in it, which are not for all, and a check may be ended.
#[test]
fn what_a_check_copies_is_for_nobody_and_goes() {
    let mount = Mount::new("check-scratch", LIMIT);
    tree(&mount.mnt);
    mount.snapshot("old");
    change(&mount.mnt, 100);
    mount.umount();
    let place = mount.root.join("tmp");
    fs::create_dir(&place).unwrap();
    let there = || fs::read_dir(&place).unwrap().next();
    let met = (0..100).any(|_| {
        let mut check = Command::new(cowfs_bin());
        check.arg("check").arg(&mount.backing).env("TMPDIR", &place);
        let mut check = check.stdout(Stdio::null()).spawn().unwrap();
        let mut met = false;
        while check.try_wait().unwrap().is_none() {
            let Some(copy) = there() else { continue };
            // It may go at this moment, at the end.
            let Ok(what) = fs::metadata(copy.unwrap().path()) else {
                continue;
            };
            assert_eq!(what.permissions().mode() & 0o777, 0o700);
            let pid = Pid::from_raw(check.id() as i32).unwrap();
            // Not SIGINT, which a shell has its background jobs ignore, and what they start.
            rustix::process::kill_process(pid, Signal::TERM).unwrap();
            met = check.wait().unwrap().signal() == Some(libc::SIGTERM);
            break;
        }
        assert!(there().is_none());
        met
    });
    assert!(met, "no check was seen at work");
    // nohup(1): what was ignored stays so.
    for _ in 0..20 {
        let mut check = Command::new("sh");
        check.args(["-c", "trap '' HUP; exec \"$@\" >/dev/null", "sh"]);
        check.arg(cowfs_bin()).arg("check").arg(&mount.backing);
        let mut check = check.env("TMPDIR", &place).spawn().unwrap();
        while there().is_none() && check.try_wait().unwrap().is_none() {}
        let pid = Pid::from_raw(check.id() as i32).unwrap();
        // It may have ended by itself.
        let _ = rustix::process::kill_process(pid, Signal::HUP);
        assert_eq!(check.wait().unwrap().code(), Some(0));
    }
    mount.mount();
}

/// Mounting does not make it be forgotten that a snapshot has lost a file.
#[test]
fn a_lost_file_of_a_snapshot_marks_it() {
    // xfs gives the number of a removed file to the next one.
    let mount = Mount::on_disk_of("check-retained", LIMIT, "xfs", 400);
    fs::write(mount.mnt.join("f"), "precious").unwrap();
    mount.snapshot("with it");
    fs::remove_file(mount.mnt.join("f")).unwrap();
    mount.snapshot("without it");
    mount.umount();
    let retained = mount.backing.join(".cowfs/retained");
    for entry in fs::read_dir(&retained).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    expect(
        &cowfs(&["check"], &[&mount.backing]),
        6,
        "missing, though snapshots show it",
    );
    for _ in 0..2 {
        mount.mount();
        let log = mount.log();
        assert!(log.contains("suspect from now on: with it"), "{log}");
        let list = cowfs(&["snapshot", "list"], &[&mount.mnt]);
        let list = list.success("list").stdout;
        let is = |name: &str, state: &str| {
            let mut lines = list.lines();
            lines.any(|line| line.starts_with(name) && line.contains(state))
        };
        assert!(is("with it", "suspect") && is("without it", "ok"), "{list}");
        let seen = fs::read(mount.snapshot_path("with it").join("f"));
        assert!(seen.is_err());
        mount.umount();
    }
    expect(&cowfs(&["check"], &[&mount.backing]), 0, "note: retained/");
    mount.mount();
    // The record that is left is of no file that gets the number of the lost one.
    let files: Vec<_> = (0..50)
        .map(|n| File::create(mount.mnt.join(format!("g{n}"))).unwrap())
        .collect();
    mount.kill_server();
    let snapshot = mount.snapshot("later");
    for n in 0..files.len() {
        let name = format!("g{n}");
        assert_eq!(fs::metadata(snapshot.join(&name)).unwrap().nlink(), 1);
        fs::hard_link(mount.mnt.join(&name), mount.mnt.join(format!("h{n}"))).unwrap();
    }
}

/// What others put among the retained objects keeps no directory from being mounted.
#[test]
fn foreign_files_among_the_retained_are_left_alone() {
    let mount = Mount::new("check-foreign", LIMIT);
    fs::create_dir(mount.mnt.join("d")).unwrap();
    let snapshot = mount.snapshot("s");
    fs::remove_dir(mount.mnt.join("d")).unwrap();
    let retained = mount.backing.join(".cowfs/retained");
    let dir = fs::read_dir(&retained).unwrap().next().unwrap().unwrap();
    let foreign = retained.join("0000000000001234");
    fs::create_dir(&foreign).unwrap();
    for dir in [&dir.path(), &foreign] {
        fs::write(dir.join("x"), "theirs").unwrap();
    }
    fs::remove_dir(snapshot).unwrap();
    for command in [&["check"][..], &["check", "--repair"]] {
        mount.umount();
        let outcome = cowfs(command, &[&mount.backing]);
        expect(&outcome, 0, "holds files that cowfs has not put there");
        mount.mount();
    }
    for dir in [&dir.path(), &foreign] {
        assert_eq!(fs::read(dir.join("x")).unwrap(), b"theirs");
    }
}

#[test]
fn a_record_that_is_lost_makes_its_snapshots_invalid_and_no_more() {
    let mount = Mount::new("check-lost", LIMIT);
    tree(&mount.mnt);
    mount.snapshot("old");
    change(&mount.mnt, 100);
    mount.umount();
    let file = File::options()
        .write(true)
        .open(&segments(&mount)[0])
        .unwrap();
    // Somewhere among the records, of which the index had a copy.
    file.write_all_at(&[0xff; 4], 2000).unwrap();
    expect(
        &cowfs(&["check"], &[&mount.backing]),
        6,
        "the index still has its value",
    );
    fs::remove_dir_all(mount.backing.join(".cowfs/store/index")).unwrap();
    expect(
        &cowfs(&["check"], &[&mount.backing]),
        6,
        "which they were cannot be told",
    );
    mount.mount();
    let old = mount.snapshot_path("old");
    assert_eq!(
        fs::read_dir(&old).map(drop).unwrap_err().raw_os_error(),
        Some(5)
    );
    let list = cowfs(&["snapshot", "list"], &[&mount.mnt])
        .success("list")
        .stdout;
    assert!(list.contains("invalid"), "{list}");
    // Everything else goes on.
    assert_eq!(fs::read(mount.mnt.join("d/f5")).unwrap(), vec![100; 9000]);
    let new = mount.snapshot("new");
    change(&mount.mnt, 101);
    assert_eq!(fs::read(new.join("d/f5")).unwrap(), vec![100; 9000]);
    mount.umount();
    // What an invalid snapshot held is given back, the damaged segment with it.
    expect(
        &cowfs(&["check", "--repair"], &[&mount.backing]),
        0,
        "0 lost, 0 wrong",
    );
    mount.mount();
    assert_eq!(fs::read(new.join("d/f5")).unwrap(), vec![100; 9000]);
    fs::remove_dir(&old).unwrap();
}

#[test]
fn a_store_elsewhere_is_named_by_its_option() {
    let mount = Mount::new("check-elsewhere", LIMIT);
    mount.umount();
    let (source, store) = (mount.root.join("source"), mount.root.join("elsewhere"));
    fs::create_dir(&source).unwrap();
    let option = format!("store={}", store.display());
    expect(&cowfs(&["check"], &[&source]), 3, "no store");
    assert!(!source.join(".cowfs").exists());
    cowfs(&["mount", "-o", &option], &[&source, &mount.mnt]).success("mount");
    cowfs(&["umount"], &[&mount.mnt]).success("umount");
    expect(&cowfs(&["check"], &[&source]), 3, "-o store=DIR");
    expect(&cowfs(&["check", "-o", &option], &[&source]), 0, "0 lost");
    // Another directory's store is not touched.
    let other = format!("store={}", mount.backing.join(".cowfs/store").display());
    expect(
        &cowfs(&["check", "--repair", "-o", &other], &[&source]),
        6,
        "not the store of this directory",
    );
    mount.mount();
}

#[test]
fn a_copy_is_compared_in_everything() {
    let mount = Mount::new("verify", LIMIT);
    tree(&mount.mnt);
    let snapshot = mount.snapshot("k");
    change(&mount.mnt, 200);
    let copy = mount.root.join("copy");
    let again = || {
        let _ = fs::remove_dir_all(&copy);
        run(
            Command::new("cp").arg("-a").arg(&snapshot).arg(&copy),
            LIMIT,
        )
        .success("cp");
    };
    again();
    expect(&cowfs(&["verify"], &[&snapshot, &copy]), 0, "0 differences");
    expect(
        &cowfs(&["verify"], &[&snapshot.join("d"), &copy.join("d")]),
        0,
        "0 differences",
    );
    for (other, code, says) in [("d/f7", 0, "1 objects"), ("d/f8", 8, "f8: not what")] {
        let pair = [&snapshot.join("d/f7"), &copy.join(other)];
        expect(&cowfs(&["verify"], &pair.map(PathBuf::as_path)), code, says);
    }
    expect(
        &cowfs(&["verify"], &[&mount.mnt, &copy]),
        2,
        "not in a snapshot",
    );
    expect(
        &cowfs(&["verify"], &[&copy, &copy]),
        4,
        "not in a cowfs mount",
    );
    let at = |name: &str| copy.join("d").join(name);
    let keep_times = |path: &Path, change: &dyn Fn()| {
        let before = fs::metadata(path).unwrap().modified().unwrap();
        change();
        File::open(path).unwrap().set_modified(before).unwrap();
    };
    type Damage<'a> = Box<dyn Fn() + 'a>;
    let cases: [(&str, &str, Damage<'_>); 14] = [
        (
            "d/f3",
            "content",
            Box::new(|| {
                keep_times(&at("f3"), &|| {
                    File::options()
                        .write(true)
                        .open(at("f3"))
                        .unwrap()
                        .write_all_at(b"!", 8999)
                        .unwrap();
                })
            }),
        ),
        (
            "d/f3",
            "size",
            Box::new(|| {
                keep_times(&at("f3"), &|| {
                    File::options()
                        .write(true)
                        .open(at("f3"))
                        .unwrap()
                        .set_len(8999)
                        .unwrap();
                })
            }),
        ),
        (
            "d/f3",
            "mode",
            Box::new(|| fs::set_permissions(at("f3"), fs::Permissions::from_mode(0o600)).unwrap()),
        ),
        (
            "d/f3",
            "owner",
            Box::new(|| std::os::unix::fs::chown(at("f3"), Some(1), None).unwrap()),
        ),
        (
            "d/f3",
            "mtime",
            Box::new(|| {
                File::open(at("f3"))
                    .unwrap()
                    .set_modified(std::time::UNIX_EPOCH)
                    .unwrap()
            }),
        ),
        (
            "d/f2",
            "xattr",
            Box::new(|| {
                run(
                    Command::new("setfattr")
                        .args(["-x", "user.a"])
                        .arg(at("f2")),
                    LIMIT,
                )
                .success("setfattr");
            }),
        ),
        (
            "d/f3",
            "xattr",
            Box::new(|| {
                run(
                    Command::new("setfattr")
                        .args(["-n", "user.more"])
                        .arg(at("f3")),
                    LIMIT,
                )
                .success("setfattr");
            }),
        ),
        (
            "d/f4",
            "missing from the copy",
            Box::new(|| fs::remove_file(at("f4")).unwrap()),
        ),
        (
            "d/more",
            "only in the copy",
            Box::new(|| fs::write(at("more"), "").unwrap()),
        ),
        (
            "d/link",
            "target",
            Box::new(|| {
                fs::remove_file(at("link")).unwrap();
                std::os::unix::fs::symlink("f2", at("link")).unwrap();
            }),
        ),
        (
            "d/fifo",
            "kind",
            Box::new(|| {
                fs::remove_file(at("fifo")).unwrap();
                fs::write(at("fifo"), "").unwrap();
            }),
        ),
        (
            "d/null",
            "device",
            Box::new(|| {
                fs::remove_file(at("null")).unwrap();
                run(
                    Command::new("mknod").arg(at("null")).args(["c", "1", "5"]),
                    LIMIT,
                )
                .success("mknod");
            }),
        ),
        (
            "d/f1",
            "other hard links",
            Box::new(|| {
                let copied = copy.join("aside");
                run(
                    Command::new("cp").arg("-p").arg(at("f1")).arg(&copied),
                    LIMIT,
                )
                .success("cp");
                fs::rename(&copied, at("f1")).unwrap();
            }),
        ),
        (
            "d/f8",
            "other hard links",
            Box::new(|| {
                fs::write(at("f8"), fs::read(at("f7")).unwrap()).unwrap();
                fs::remove_file(at("f7")).unwrap();
                fs::hard_link(at("f8"), at("f7")).unwrap();
            }),
        ),
    ];
    for (path, what, damage) in cases {
        again();
        damage();
        let outcome = cowfs(&["verify"], &[&snapshot, &copy]);
        expect(&outcome, 8, what);
        expect(&outcome, 8, path);
    }
    again();
    std::os::unix::fs::chown(at("f3"), Some(1), Some(1)).unwrap();
    expect(
        &cowfs(&["verify", "--no-owner"], &[&snapshot, &copy]),
        0,
        "0 differences",
    );
    change(&copy, 77);
    expect(
        &cowfs(
            &["verify", "--no-owner", "--no-times", "--limit", "3"],
            &[&snapshot, &copy],
        ),
        8,
        "and 38 more",
    );
    let json = cowfs(&["verify", "--json", "--no-owner"], &[&snapshot, &copy]);
    expect(&json, 8, "\"equal\": false");
    assert_eq!(fs::metadata(snapshot.join("d/f1")).unwrap().nlink(), 2);
    // Of a snapshot mounted by itself.
    again();
    let alone = mount.root.join("alone");
    fs::create_dir(&alone).unwrap();
    cowfs(&["mount", "-o", "snapshot=k"], &[&mount.backing, &alone]).success("mount");
    expect(&cowfs(&["verify"], &[&alone, &copy]), 0, "0 differences");
    cowfs(&["umount"], &[&alone]).success("umount");
}

/// What is a hole in both is not read: a file of a tebibyte would take minutes.
#[test]
fn a_copy_with_holes_is_compared_at_once() {
    const SIZE: u64 = 1 << 40;
    let mount = Mount::new("verify-holes", LIMIT);
    let fill = |path: &Path| {
        let file = File::create(path).unwrap();
        file.set_len(SIZE).unwrap();
        for (at, byte) in [(0, b'a'), (SIZE / 2 + 7, b'b'), (SIZE - 1, b'c')] {
            file.write_all_at(&[byte], at).unwrap();
        }
        file
    };
    let live = fill(&mount.mnt.join("f"));
    let snapshot = mount.snapshot("k").join("f");
    live.write_all_at(b"later", SIZE / 4).unwrap();
    live.write_all_at(b"later", SIZE / 2).unwrap();
    let copy = mount.root.join("copy");
    let file = fill(&copy);
    let verify = || cowfs(&["verify", "--no-times"], &[&snapshot, &copy]);
    expect(&verify(), 0, "1.0 TiB of content: 0 differences");
    // Zeros where the snapshot has a hole are the same, in the middle of blocks and at the end of the file.
    for at in [5 << 30, SIZE - 70_000] {
        file.write_all_at(&[0; 10_000], at).unwrap();
    }
    expect(&verify(), 0, "0 differences");
    let differing = SIZE / 3 * 2 + 1;
    file.write_all_at(b"x", differing).unwrap();
    expect(
        &verify(),
        8,
        &format!("content: differs from byte {differing}"),
    );
    file.write_all_at(&[0], differing).unwrap();
    file.write_all_at(&[0], SIZE / 2 + 7).unwrap();
    expect(
        &verify(),
        8,
        &format!("content: differs from byte {}", SIZE / 2 + 7),
    );
}
