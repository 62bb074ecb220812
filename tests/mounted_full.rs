//! A store without room, on real mounts (C9): writers go on, every snapshot that is still there is right, and the
//! others say what became of them.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use rustix::fs::XattrFlags;
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use support::cut::remove_snapshot;
use support::model::Random;
use support::{Mount, Outcome, cowfs_bin, open_the_way, run, seed};

const LIMIT: Duration = Duration::from_secs(240);
const MIB: usize = 1 << 20;

fn cowfs(args: &[&str], path: &Path, rest: &[&str]) -> Outcome {
    let mut command = Command::new(cowfs_bin());
    run(command.args(args).arg(path).args(rest), LIMIT)
}

fn open_rw(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
}

/// The snapshots of a mount: name and state.
fn states(mount: &Mount) -> Vec<(String, String)> {
    let listed = cowfs(&["snapshot", "list"], &mount.mnt, &["--json"]).success("list");
    let listed: serde_json::Value = serde_json::from_str(&listed.stdout).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let rows = listed.as_array().unwrap().iter();
    rows.map(|row| (text(&row["name"]), text(&row["state"])))
        .collect()
}

fn status(mount: &Mount) -> serde_json::Value {
    let status = cowfs(&["status"], &mount.mnt, &["--json"]).success("status");
    serde_json::from_str(&status.stdout).unwrap()
}

/// Checks every snapshot `s<n>`, which has the byte n in all of `f`; returns how many are right.
fn check(mount: &Mount, size: usize) -> usize {
    let mut right = 0;
    for (name, state) in states(mount) {
        let f = mount.snapshot_path(&name).join("f");
        match state.as_str() {
            "ok" => {
                let byte: u8 = name[1..].parse().unwrap();
                // One that is given up just now says so.
                match fs::read(&f) {
                    Ok(bytes) => {
                        assert!(bytes == vec![byte; size], "{name} is not what it was");
                        right += 1;
                    }
                    Err(error) => {
                        let given_up = !states(mount).contains(&(name.clone(), "ok".into()));
                        assert!(given_up, "{name}: {error}");
                    }
                }
            }
            "invalid" => {
                let error = fs::read(&f).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EIO), "{name}: {error}");
                let error = fs::read_dir(mount.snapshot_path(&name)).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EIO), "{name}: {error}");
            }
            other => panic!("{name} is {other}"),
        }
    }
    right
}

/// The disk fills again and again. No writer ever fails, what snapshots are left is right, also after the daemon
/// was killed in the middle of it.
#[test]
fn writers_go_on_while_the_disk_fills() {
    let size = 8 * MIB;
    let mount = Mount::on_own_disk("fills", LIMIT, 160);
    let file = open_rw(&mount.mnt.join("f"));
    file.write_all_at(&vec![0; size], 0).unwrap();
    let mut file = file;
    let (mut kept, mut gone) = (0, false);
    for cut in 0..60_u8 {
        mount.snapshot_when_there_is_room(&format!("s{cut}"));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Beside it another writer makes, changes and removes files.
            let other = scope.spawn(|| {
                let mut n = 0_u32;
                while !stop.load(Ordering::Relaxed) {
                    let path = mount.mnt.join(format!("other{}", n % 7));
                    fs::write(&path, vec![n as u8; 100_000]).unwrap();
                    if n.is_multiple_of(3) {
                        fs::remove_file(&path).unwrap();
                    }
                    n += 1;
                }
            });
            for at in 0..size / MIB {
                file.write_all_at(&vec![cut + 1; MIB], (at * MIB) as u64)
                    .unwrap();
            }
            stop.store(true, Ordering::Relaxed);
            other.join().unwrap();
        });
        if cut % 6 == 5 {
            kept += check(&mount, size);
            gone |= states(&mount).len() < usize::from(cut);
        }
        if cut % 20 == 13 {
            mount.kill9();
            mount.recover();
            kept += check(&mount, size);
            let live = fs::read(mount.mnt.join("f")).unwrap();
            assert!(live == vec![cut + 1; size], "the live file after {cut}");
            file = open_rw(&mount.mnt.join("f"));
        }
    }
    assert!(gone, "the disk never filled");
    assert!(kept > 0, "no snapshot was ever right");
    drop(file);
    mount.remount();
    check(&mount, size);
}

/// Snapshots hold the inodes of removed files too, and a filesystem may have no other left.
#[test]
fn snapshots_give_way_for_inodes() {
    let mount = Mount::on_own_disk("inodes", LIMIT, 32);
    let at = |n: u32| mount.mnt.join(format!("f{n}"));
    let create = |n: u32| File::create_new(at(n)).map(drop);
    let full = (0..)
        .find_map(|n| create(n).err().map(|error| (n, error)))
        .unwrap();
    assert_eq!(full.1.kind(), ErrorKind::StorageFull, "after {}", full.0);
    // A store takes some as well.
    let count = full.0 - 100;
    for n in count..full.0 {
        fs::remove_file(at(n)).unwrap();
    }
    for name in ["s1", "s2"] {
        mount.snapshot(name);
        for n in 0..200 {
            fs::remove_file(at(n)).unwrap();
        }
        for n in 0..200 {
            create(n).unwrap_or_else(|error| panic!("{name}, f{n}: {error}"));
        }
    }
    let states = states(&mount);
    // The newest are never deleted for room.
    let invalid = |name: &str| (name.to_owned(), "invalid".to_owned());
    assert_eq!(states, [invalid("s1"), invalid("s2")]);
    // Without any there is nothing to be had.
    let refused = (full.0..full.0 + 200).find_map(|n| create(n).err());
    assert_eq!(refused.unwrap().kind(), ErrorKind::StorageFull);
}

/// A limit is kept to, what is held is not deleted, and the status tells of it before it happens.
#[test]
fn a_limit_holds_and_what_is_held_stays() {
    let size = 4 * MIB;
    let mount = Mount::new("limit", LIMIT);
    mount.remount_with("store-limit=48M");
    let file = open_rw(&mount.mnt.join("f"));
    file.write_all_at(&vec![0; size], 0).unwrap();
    assert_eq!(status(&mount)["space"]["state"], "ok");
    mount.snapshot("s0");
    cowfs(&["snapshot", "hold"], &mount.mnt, &["s0"]).success("hold");
    let mut warned = false;
    for cut in 1..30_u8 {
        file.write_all_at(&vec![cut; size], 0).unwrap();
        mount.snapshot(&format!("s{cut}"));
        let space = &status(&mount)["space"];
        warned |= space["state"] == "filling" || space["state"] == "nearly-full";
        assert_eq!(space["limit"], 48 << 20);
        // What the index takes by the way may come on top.
        assert!(space["used"].as_u64().unwrap() <= 60 << 20, "{space}");
        // At this pace the upkeep keeps up.
        std::thread::sleep(Duration::from_millis(150));
    }
    assert!(warned, "nothing was said before the store was full");
    check(&mount, size);
    let states = states(&mount);
    assert!(states.len() < 20, "{states:?}");
    assert!(states.iter().any(|(name, _)| name == "s0"), "{states:?}");
    let refused = cowfs(&["snapshot", "delete"], &mount.mnt, &["s0"]);
    assert_eq!(refused.status.code(), Some(7));
    assert!(refused.stderr.contains("held"), "{}", refused.stderr);
    let error = fs::remove_dir(mount.snapshot_path("s0")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ResourceBusy);
    cowfs(&["snapshot", "release"], &mount.mnt, &["s0"]).success("release");
    cowfs(&["snapshot", "delete"], &mount.mnt, &["s0"]).success("delete");
}

/// The other two modes, on a disk that is really full.
#[test]
fn the_other_modes_do_as_they_say() {
    let size = 8 * MIB;
    let mount = Mount::on_own_disk("modes", LIMIT, 120);
    let file = open_rw(&mount.mnt.join("f"));
    file.write_all_at(&vec![0; size], 0).unwrap();
    // Left alone until the end: no snapshot has a pre-image of it.
    fs::write(mount.mnt.join("g"), vec![7; 4 * MIB]).unwrap();
    drop(file);
    mount.remount_with("on-full=enospc");
    let file = open_rw(&mount.mnt.join("f"));
    let (mut cuts, mut failed) = (0_u8, None);
    'fill: while cuts < 40 {
        mount.snapshot(&format!("s{cuts}"));
        cuts += 1;
        for at in 0..size / MIB {
            let write = file.write_all_at(&vec![cuts; MIB], (at * MIB) as u64);
            if let Err(error) = write {
                failed = Some(error);
                break 'fill;
            }
        }
    }
    assert_eq!(failed.unwrap().kind(), ErrorKind::StorageFull);
    assert_eq!(check(&mount, size), usize::from(cuts));
    assert!(states(&mount).iter().all(|(_, state)| state == "ok"));
    // What is on the full disk can be removed, and is still in the snapshots.
    drop(file);
    fs::remove_file(mount.mnt.join("f")).unwrap();
    assert_eq!(check(&mount, size), usize::from(cuts));
    let before = states(&mount).len();
    mount.remount_with("on-full=invalidate");
    let filler = open_rw(&mount.mnt.join("filler"));
    let mut at = 0;
    while filler.write_all_at(&[7; 64 << 10], at).is_ok() {
        at += 64 << 10;
    }
    // The snapshots held nearly all of the disk, and live data goes before them.
    assert!(at > 40 * MIB as u64, "{at}");
    let newest = format!("s{cuts}");
    // It takes a record, for which there is room, or none.
    let made = fs::create_dir(mount.snapshot_path(&newest)).is_ok();
    // Nobody has the room for these pre-images, so all miss them and none is deleted.
    let other = open_rw(&mount.mnt.join("g"));
    for at in 0..4 {
        other.write_all_at(&vec![8; MIB], at * MIB as u64).unwrap();
    }
    let states = states(&mount);
    assert_eq!(states.len(), before + usize::from(made), "{states:?}");
    assert!(
        states.iter().all(|(_, state)| state == "invalid"),
        "{states:?}"
    );
    check(&mount, size);
}

/// A store on another filesystem may be full while the data has room, and the files that are retained stay with
/// the data.
#[test]
fn a_store_elsewhere_may_be_full_by_itself() {
    let mount = Mount::new("elsewhere", LIMIT);
    mount.umount();
    fs::remove_dir_all(mount.backing.join(".cowfs")).unwrap();
    let disk = Mount::on_own_disk("store", LIMIT, 64);
    disk.umount();
    let store = disk.backing.join("store");
    mount.mount_with(&format!("store={}", store.display()));
    let file = open_rw(&mount.mnt.join("f"));
    let size = 8 * MIB;
    file.write_all_at(&vec![0; size], 0).unwrap();
    fs::write(mount.mnt.join("gone"), vec![5; 3 * MIB]).unwrap();
    for cut in 0..20_u8 {
        mount.snapshot_when_there_is_room(&format!("s{cut}"));
        file.write_all_at(&vec![cut + 1; size], 0).unwrap();
    }
    check(&mount, size);
    assert!(states(&mount).len() < 20);
    mount.snapshot_when_there_is_room("s20");
    fs::remove_file(mount.mnt.join("gone")).unwrap();
    let seen = fs::read(mount.snapshot_path("s20").join("gone")).unwrap();
    assert!(seen == vec![5; 3 * MIB]);
    let retained = fs::read_dir(mount.backing.join(".cowfs/retained")).unwrap();
    assert_eq!(retained.count(), 1);
    drop(file);
    mount.umount();
}

/// A store of many small records on a disk that is quite full: the index wants more room at the next mount than there is. What
/// makes room goes on all the same (C4, C9).
#[test]
fn what_makes_room_goes_on_after_a_mount_on_a_full_disk() {
    let seed = seed("what_makes_room");
    for round in 0..3 {
        let mount = Mount::on_own_disk("small-records", LIMIT, 60);
        mount.remount_with("on-full=enospc");
        let mut random = Random::new(seed + round);
        let mut cuts = 0;
        for step in 0..1200 {
            if step % 12 == 0 {
                cuts += u32::from(fs::create_dir(mount.snapshot_path(format!("s{cuts}"))).is_ok());
            }
            let path = |n: usize| mount.mnt.join(n.to_string());
            let (one, other) = (path(random.below(8)), path(random.below(8)));
            // What finds no room fails, and what is not there, too.
            let _ = match random.below(8) {
                0 => fs::rename(&one, &other),
                1 => fs::remove_file(&one),
                2 => fs::hard_link(&one, &other),
                3 => fs::set_permissions(&one, fs::Permissions::from_mode(0o600)),
                4 => rustix::fs::setxattr(&one, "user.x", &[step as u8; 2000], XattrFlags::empty())
                    .map_err(Into::into),
                _ => {
                    let length = [8000, 160_000, 480_000, 1_040_000][random.below(4)];
                    let at = [0, 5000, 100_000, 1_000_000][random.below(4)];
                    open_rw(&one).write_all_at(&vec![step as u8; length], at)
                }
            };
        }
        assert!(cuts > 20, "only {cuts} snapshots");
        // Whatever is free is taken by somebody, also what comes back.
        let filler = open_rw(&mount.backing.with_file_name("filler"));
        let mut size = 0;
        let mut fill = || {
            for piece in [MIB, 4096] {
                while filler.write_all_at(&vec![3; piece], size).is_ok() {
                    size += piece as u64;
                }
            }
        };
        (0..3).for_each(|_| {
            mount.remount();
            fill();
        });
        mount.umount();
        // In the last round also what is set aside, unless the index has been taken into memory before: its space is all that
        // there is then.
        let store = mount.backing.join(".cowfs/store");
        let says_where_the_index_is = || {
            let on_disk = store.join("index").is_dir();
            assert_eq!(status(&mount)["index_in_memory"], !on_disk);
            let text = cowfs(&["status"], &mount.mnt, &[]).success("status").stdout;
            assert_eq!(text.contains("index in memory"), !on_disk, "{text}");
        };
        if round == 2 && store.join("index").is_dir() {
            let _ = fs::remove_file(store.join("reserve"));
            fill();
        }
        mount.mount();
        says_where_the_index_is();
        for (name, state) in states(&mount) {
            assert_eq!(state, "ok");
            remove_snapshot(&mount.snapshot_path(&name)).unwrap();
        }
        filler.set_len(0).unwrap();
        mount.remount();
        assert!(store.join("index").is_dir());
        says_where_the_index_is();
        mount.snapshot_when_there_is_room("after");
        fs::write(mount.mnt.join("after"), vec![1; MIB]).unwrap();
        let in_memory = mount.log().contains("the index is in memory");
        assert!(round < 2 || in_memory, "{}", mount.log());
    }
}

/// Who may create snapshots, and who may not.
#[test]
fn a_filesystem_that_tells_no_size_is_not_full() {
    let mount = Mount::on_disk_of("boundless", LIMIT, "tmpfs", 0);
    let f = open_rw(&mount.mnt.join("f"));
    for n in 1..=4 {
        f.write_all_at(&vec![n; 4 * MIB], 0).unwrap();
        mount.snapshot(&format!("s{n}"));
    }
    f.write_all_at(&vec![9; 4 * MIB], 0).unwrap();
    assert_eq!(check(&mount, 4 * MIB), 4);
    assert_eq!(status(&mount)["space"]["state"], "ok");
    let text = cowfs(&["status"], &mount.mnt, &[]).success("status").stdout;
    assert!(text.contains("room for any amount"), "{text}");
}

#[test]
fn users_create_snapshots_if_they_are_let() {
    let mount = Mount::new("users", LIMIT);
    open_the_way(&mount.mnt);
    fs::set_permissions(&mount.mnt, fs::Permissions::from_mode(0o777)).unwrap();
    let as_nobody = |program: &str, path: &Path| {
        let mut command = Command::new(program);
        run(command.arg(path).uid(65534).gid(65534), LIMIT)
            .status
            .success()
    };
    assert!(!as_nobody("mkdir", &mount.snapshot_path("s1")));
    mount.remount_with("user-snapshots");
    assert!(as_nobody("mkdir", &mount.snapshot_path("s1")));
    assert!(!as_nobody("rmdir", &mount.snapshot_path("s1")));
    let path = mount.snapshot_path("s1");
    let held = rustix::fs::setxattr(&path, "user.cowfs.held", b"2", XattrFlags::empty());
    assert_eq!(held, Err(rustix::io::Errno::INVAL));
    // With an ACL the mode does not say who may write, so nobody else may.
    fs::set_permissions(&mount.mnt, fs::Permissions::from_mode(0o755)).unwrap();
    assert!(!as_nobody("mkdir", &mount.snapshot_path("s2")));
    fs::remove_dir(&path).unwrap();
}

/// What a retained file takes is counted for as long as it is one, whatever becomes of it while it is open.
#[test]
fn a_removed_file_that_is_open_is_counted_to_the_end() {
    let mount = Mount::on_own_disk("open-removed", LIMIT, 400);
    let counted = || status(&mount)["space"]["retained"].as_u64().unwrap();
    let wait_for_none = |what: &str| {
        let start = Instant::now();
        while counted() > 0 {
            assert!(start.elapsed() < LIMIT / 4, "{what}: {} bytes", counted());
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    let removed = |name: &str| {
        let file = open_rw(&mount.mnt.join(name));
        file.write_all_at(&vec![1; 8 * MIB], 0).unwrap();
        file.sync_all().unwrap();
        mount.snapshot(name);
        fs::remove_file(mount.mnt.join(name)).unwrap();
        assert!(counted() >= 8 * MIB as u64, "{} bytes", counted());
        file
    };
    let file = removed("open");
    fs::remove_dir(mount.snapshot_path("open")).unwrap();
    wait_for_none("no snapshot shows it");
    drop(file);
    for (name, size) in [("shorter", 0), ("longer", 16 * MIB)] {
        let (file, other) = (removed(name), removed("other"));
        file.set_len(0).unwrap();
        file.write_all_at(&vec![2; size], 0).unwrap();
        file.sync_all().unwrap();
        drop((file, other));
        fs::remove_dir(mount.snapshot_path(name)).unwrap();
        fs::remove_dir(mount.snapshot_path("other")).unwrap();
        wait_for_none(name);
    }
}

/// What a server cannot open again stays closed: its number does not come to mean another file (C11).
#[test]
fn a_file_of_a_snapshot_that_became_invalid_is_no_other_after_a_takeover() {
    let mount = Mount::with("invalid-open", LIMIT, "store-limit=32M,on-full=invalidate");
    let file = open_rw(&mount.mnt.join("f"));
    file.write_all_at(&vec![1; 48 * MIB], 0).unwrap();
    fs::write(mount.mnt.join("other"), vec![9; 16 * MIB]).unwrap();
    let shown = mount.snapshot("s").join("f");
    let open = File::open(shown).unwrap();
    for at in 0..48 {
        file.write_all_at(&vec![2; MIB], at * MIB as u64).unwrap();
    }
    assert_eq!(states(&mount), [("s".into(), "invalid".into())]);
    drop(file);
    let takeovers = mount.takeovers();
    mount.kill_server();
    while mount.takeovers() == takeovers {
        std::thread::sleep(Duration::from_millis(20));
    }
    let others = [(); 20].map(|()| File::open(mount.mnt.join("other")).unwrap());
    let mut bytes = [0; 4096];
    let read = open.read_at(&mut bytes, 8 * MIB as u64);
    assert!(read.is_err(), "{read:?} {}", bytes[0]);
    // Its end is not the end of another one.
    drop(open);
    for (other, at) in others.iter().zip(1..) {
        other
            .read_exact_at(&mut bytes, at * MIB as u64 / 2)
            .unwrap();
        assert_eq!(bytes, [9; 4096]);
    }
}

/// A file without a name is in no snapshot that is cut later, and nothing more is kept of it for these.
#[test]
fn a_removed_file_that_is_open_costs_later_snapshots_nothing() {
    let mount = Mount::on_own_disk("open-removed-kept", LIMIT, 400);
    let kept = || status(&mount)["preimage_bytes"].as_u64().unwrap();
    let write = |file: &File, byte: u8| file.write_all_at(&vec![byte; 4 * MIB], 0).unwrap();
    let (removed, replaced) = (mount.mnt.join("removed"), mount.mnt.join("replaced"));
    let files = [&removed, &replaced].map(|path| open_rw(path));
    files.iter().for_each(|file| write(file, 1));
    let first = mount.snapshot("first");
    fs::remove_file(&removed).unwrap();
    fs::write(mount.mnt.join("new"), "new").unwrap();
    fs::rename(mount.mnt.join("new"), &replaced).unwrap();
    for round in 2..6 {
        files.iter().for_each(|file| write(file, round));
        if round == 3 {
            mount.kill_server();
        }
        mount.snapshot(&format!("later-{round}"));
    }
    assert!(kept() < 9 * MIB as u64, "{} bytes", kept());
    for name in ["removed", "replaced"] {
        assert!(fs::read(first.join(name)).unwrap() == vec![1; 4 * MIB]);
    }
    for file in &files {
        let mut now = vec![0; 4 * MIB];
        file.read_exact_at(&mut now, 0).unwrap();
        assert!(now == vec![5; 4 * MIB]);
    }
}
