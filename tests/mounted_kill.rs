//! kill -9 of the daemon at random instants (C7): nothing acknowledged is lost, nothing is half done, and
//! every snapshot is as it was recorded. One store lives through all rounds.
//!
//! `COWFS_KILL_ROUNDS` (100), `COWFS_SEED`.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use rustix::fs::{CWD, RenameFlags, XattrFlags};
use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use support::model::{Links, Op, Random, State, compare};
use support::user::{Who, again};
use support::{Mount, detach, env_number, seed};

/// Works until an operation fails because of the kill; returns it, and how many succeeded. `may_drop`: snapshots may be
/// given up for room at any time.
fn work(
    mount: &Mount,
    state: &mut State,
    random: &mut Random,
    killed: &AtomicBool,
    may_drop: bool,
) -> (Op, usize) {
    let mut count = 0;
    loop {
        let op = state.operation(random);
        match op.execute(&mount.mnt) {
            Ok(()) => state.apply(&op),
            // The snapshot is gone, or the one to be made would have missed something.
            Err(error) if may_drop && given_up(&op, &error) => {
                if let Op::DeleteSnapshot { name } | Op::RenameSnapshot { from: name, .. } = &op {
                    state.snapshots.remove(name);
                }
            }
            Err(error) => {
                assert!(
                    killed.load(Ordering::SeqCst),
                    "VIOLATION: {op:?} failed with the daemon alive: {error}"
                );
                return (op, count);
            }
        }
        count += 1;
    }
}

/// Whether an operation on a snapshot may fail so where snapshots are given up.
fn given_up(op: &Op, error: &std::io::Error) -> bool {
    match op {
        Op::Snapshot { .. } => error.kind() == std::io::ErrorKind::StorageFull,
        Op::DeleteSnapshot { .. } | Op::RenameSnapshot { .. } => {
            error.kind() == std::io::ErrorKind::NotFound
        }
        _ => false,
    }
}

/// The snapshots that exist are those of `state`, each as it was.
fn check_snapshots(mount: &Mount, state: &State) -> Result<(), String> {
    let mut names: Vec<String> = fs::read_dir(mount.mnt.join(".snapshots"))
        .map_err(|e| format!(".snapshots: {e}"))?
        .map(|e| e.map(|e| e.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_, _>>()
        .map_err(|e| format!(".snapshots: {e}"))?;
    names.sort();
    if !names.iter().eq(state.snapshots.keys()) {
        return Err(format!(
            "snapshots {names:?}, not {:?}",
            state.snapshots.keys().collect::<Vec<_>>()
        ));
    }
    for (name, tree) in &state.snapshots {
        compare(&mount.snapshot_path(name), tree, Links::Exact)
            .map_err(|why| format!("snapshot {name}: {why}"))?;
    }
    Ok(())
}

fn check(mount: &Mount, state: &State) -> Result<(), String> {
    compare(&mount.mnt, &state.live, Links::Exact).map_err(|why| format!("live tree: {why}"))?;
    check_snapshots(mount, state)
}

/// Who uses a mount sees nothing of the death of its server: no operation fails, each is carried out once, and what is
/// open stays open.
#[test]
fn a_killed_server_is_replaced_and_nobody_sees_an_error() {
    replaced("");
}

#[test]
fn a_killed_server_with_writeback_is_replaced_and_nobody_sees_an_error() {
    replaced("cache=writeback");
}

/// What is open in a snapshot, by either way into it, stays so.
#[test]
fn a_killed_server_is_replaced_under_readers_of_snapshots() {
    let mount = Mount::new("takeover-read", Duration::from_secs(120));
    fs::create_dir_all(mount.mnt.join("d/e")).unwrap();
    fs::write(mount.mnt.join("d/e/f"), b"kept").unwrap();
    fs::write(mount.mnt.join("d/other"), b"other").unwrap();
    let root = mount.snapshot("s");
    fs::write(mount.mnt.join("d/e/f"), b"now").unwrap();
    fs::remove_file(mount.mnt.join("d/other")).unwrap();
    let ways = [root.join("d"), mount.mnt.join("d/.snapshots/s")];
    let open = ways.each_ref().map(|way| {
        let file = fs::File::open(way.join("e/f")).unwrap();
        let number = file.metadata().unwrap().ino();
        (fs::File::open(way).unwrap(), file, number)
    });
    for _ in 0..3 {
        mount.kill_server();
        for (way, (dir, file, number)) in ways.iter().zip(&open) {
            let mut bytes = [0; 4];
            file.read_exact_at(&mut bytes, 0).unwrap();
            assert_eq!(&bytes, b"kept", "{}", way.display());
            assert_eq!(file.metadata().unwrap().ino(), *number);
            // Names that the kernel has, and one that it asks for.
            let through = |name: &str| format!("/proc/self/fd/{}/{name}", dir.as_raw_fd());
            assert_eq!(fs::read(through("e/f")).unwrap(), b"kept");
            assert_eq!(fs::read(through("other")).unwrap(), b"other");
            assert_eq!(fs::metadata(through("e/f")).unwrap().ino(), *number);
            assert_eq!(fs::read_dir(through("")).unwrap().count(), 2);
            assert_eq!(fs::read(way.join("e/f")).unwrap(), b"kept");
        }
    }
    assert_ne!(open[0].2, open[1].2);
    assert_eq!(mount.takeovers(), 3);
}

/// The helper that has the kernel forget what readers have passed, and the reads that are under way, outlive the server.
#[test]
fn a_killed_server_is_replaced_under_copies_of_large_files() {
    const PAGES: u64 = 96 << 8;
    let seed = seed("takeover-copies");
    let mut random = Random::new(seed);
    let mount = Mount::new("takeover-copies", Duration::from_secs(240));
    let page = |n: u64| n.to_le_bytes().repeat(512);
    let live = mount.mnt.join("large");
    let mut file = fs::File::create(&live).unwrap();
    (0..PAGES).for_each(|n| file.write_all(&page(n)).unwrap());
    let path = mount.snapshot("s").join("large");
    for _ in 0..100 {
        let at = random.below(PAGES as usize) as u64 * 4096;
        file.write_all_at(&page(PAGES), at).unwrap();
    }
    let done = AtomicBool::new(false);
    let read_from = |begin: u64| {
        let (mut read, mut buffer) = (0, vec![0; 1 << 20]);
        while !done.load(Ordering::SeqCst) {
            let file = fs::File::open(&path).unwrap();
            for at in (begin..PAGES).step_by(256) {
                file.read_exact_at(&mut buffer, at * 4096).unwrap();
                for (n, found) in (at..).zip(buffer.chunks(4096)) {
                    assert!(found == page(n), "VIOLATION (seed {seed}): page {n}");
                }
                read += 1;
            }
        }
        read
    };
    std::thread::scope(|scope| {
        // They follow each other closely, and read what those before them had dropped.
        let readers = [0, 1, 2, 4, 6].map(|mib| scope.spawn(move || read_from(mib << 8)));
        for _ in 0..10 {
            // So that reads wait for the disk.
            fs::write("/proc/sys/vm/drop_caches", "1").unwrap();
            std::thread::sleep(Duration::from_micros(random.below(200_000) as u64));
            mount.kill_server();
        }
        done.store(true, Ordering::SeqCst);
        for reader in readers {
            assert!(reader.join().unwrap() > 0);
        }
    });
    assert_eq!(mount.takeovers(), 10);
}

fn replaced(options: &str) {
    let rounds = env_number("COWFS_TAKEOVER_ROUNDS", 40);
    let seed = seed("takeover");
    let mut random = Random::new(seed);
    let mount = Mount::with("takeover", Duration::from_secs(240 + rounds * 12), options);
    let mut state = State::default();
    let path = mount.mnt.join("open");
    let mut open = fs::File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let gone = mount.mnt.join("gone");
    let mut nameless = fs::File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(&gone)
        .unwrap();
    nameless.write_all(b"no name").unwrap();
    fs::remove_file(&gone).unwrap();
    let replaced = mount.mnt.join("replaced");
    let old = fs::File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(&replaced)
        .unwrap();
    old.write_all_at(b"old", 0).unwrap();
    fs::write(path.with_extension("new"), b"new").unwrap();
    fs::rename(path.with_extension("new"), &replaced).unwrap();
    fs::remove_file(&replaced).unwrap();
    fs::remove_file(&path).unwrap();
    let done = AtomicBool::new(false);
    let total = std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let mut count = 0_u64;
            while !done.load(Ordering::SeqCst) {
                let op = state.operation(&mut random);
                op.execute(&mount.mnt)
                    .unwrap_or_else(|error| panic!("VIOLATION (seed {seed}): {op:?}: {error}"));
                state.apply(&op);
                open.write_all(&count.to_le_bytes()).unwrap();
                count += 1;
            }
            count
        });
        for round in 0..rounds {
            std::thread::sleep(Duration::from_millis(50 + round * 37 % 200));
            prove_itself(round);
            if worker.is_finished() {
                break;
            }
            mount.kill_server();
        }
        done.store(true, Ordering::SeqCst);
        worker
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    check(&mount, &state).unwrap_or_else(|why| panic!("VIOLATION (seed {seed}): {why}"));
    let mut text = String::new();
    nameless.seek(SeekFrom::Start(0)).unwrap();
    nameless.read_to_string(&mut text).unwrap();
    assert_eq!(text, "no name");
    assert_eq!(nameless.metadata().unwrap().nlink(), 0);
    let mut bytes = [0; 3];
    old.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"old");
    assert_eq!(open.metadata().unwrap().len(), total * 8);
    let mut last = [0; 8];
    open.read_exact_at(&mut last, (total - 1) * 8).unwrap();
    assert_eq!(u64::from_le_bytes(last), total - 1);
    let served = mount.takeovers();
    println!("{rounds} servers killed under {total} operations, {served} takeovers");
    assert_eq!(served, rounds);
    drop((open, nameless, old));
    mount.remount();
    let orphans = mount.backing.join(".cowfs/orphans");
    assert_eq!(
        fs::read_dir(orphans).unwrap().count(),
        0,
        "orphans are left"
    );
    check(&mount, &state).unwrap_or_else(|why| panic!("VIOLATION after a remount: {why}"));
}

/// What is under way when a server dies is carried out once, whatever kind of request it is: each worker here makes
/// requests of one kind that would fail, or come out short, if they were carried out twice or not at all.
#[test]
fn requests_under_way_are_carried_out_once() {
    under_way("");
}

#[test]
fn requests_under_way_with_writeback_are_carried_out_once() {
    under_way("cache=writeback");
}

fn under_way(options: &str) {
    let rounds = env_number("COWFS_TAKEOVER_ROUNDS", 40);
    let seed = seed("under way");
    let mut random = Random::new(seed);
    let mount = Mount::with("underway", Duration::from_secs(240 + rounds * 12), options);
    let (done, root) = (AtomicBool::new(false), &mount.mnt);
    let failed = |what: &str, error: &dyn std::fmt::Display| -> ! {
        panic!("VIOLATION (seed {seed}): {what}: {error}")
    };
    let ok = |what: &str, result: std::io::Result<()>| {
        result.unwrap_or_else(|error| failed(what, &error));
    };
    let file = |name: &str| {
        fs::File::options()
            .create_new(true)
            .read(true)
            .write(true)
            .open(root.join(name))
            .unwrap()
    };
    let large = || {
        let (file, data) = (file("large"), vec![7; 1 << 20]);
        while !done.load(Ordering::SeqCst) {
            for at in 0..8 {
                match file.write_at(&data, at << 20) {
                    Ok(written) if written == data.len() => {}
                    Ok(written) => failed("write", &format!("{written} bytes written")),
                    Err(error) => failed("write", &error),
                }
            }
        }
    };
    let attributes = || {
        let file = file("attributes");
        while !done.load(Ordering::SeqCst) {
            let made = rustix::fs::fsetxattr(&file, "user.a", b"1", XattrFlags::CREATE);
            ok("setxattr", made.map_err(Into::into));
            let gone = rustix::fs::fremovexattr(&file, "user.a");
            ok("removexattr", gone.map_err(Into::into));
        }
    };
    let directories = || {
        let path = root.join("directory");
        while !done.load(Ordering::SeqCst) {
            ok("mkdir", fs::create_dir(&path));
            ok("rmdir", fs::remove_dir(&path));
        }
    };
    let files = || {
        let path = root.join("file");
        while !done.load(Ordering::SeqCst) {
            let made = fs::File::options().write(true).create_new(true).open(&path);
            ok("create", made.and_then(|mut file| file.write_all(b"new")));
            ok("unlink", fs::remove_file(&path));
        }
    };
    let names = || {
        let at = |name: &str| root.join(name);
        fs::write(at("a"), b"a").unwrap();
        while !done.load(Ordering::SeqCst) {
            ok("rename", fs::rename(at("a"), at("b")));
            ok("link", fs::hard_link(at("b"), at("c")));
            ok("rename over a name", fs::rename(at("c"), at("d")));
            ok("unlink", fs::remove_file(at("d")));
            ok("symlink", std::os::unix::fs::symlink("b", at("e")));
            ok("exchange", exchange(&at("b"), &at("e")));
            ok("unlink", fs::remove_file(at("b")));
            ok("rename", fs::rename(at("e"), at("a")));
        }
    };
    let snapshots = || {
        let at = |name: &str| mount.snapshot_path(name);
        while !done.load(Ordering::SeqCst) {
            ok("snapshot", fs::create_dir(at("one")));
            ok("rename of a snapshot", fs::rename(at("one"), at("two")));
            ok("deletion of a snapshot", fs::remove_dir(at("two")));
        }
    };
    let kinds: [&(dyn Fn() + Sync); 6] = [
        &large,
        &attributes,
        &directories,
        &files,
        &names,
        &snapshots,
    ];
    std::thread::scope(|scope| {
        let workers: Vec<_> = kinds.iter().map(|work| scope.spawn(work)).collect();
        for round in 0..rounds {
            std::thread::sleep(Duration::from_millis(random.below(120) as u64));
            prove_itself(round);
            if workers.iter().any(|worker| worker.is_finished()) {
                break;
            }
            mount.kill_server();
        }
        done.store(true, Ordering::SeqCst);
        for worker in workers {
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
    assert_eq!(mount.takeovers(), rounds);
}

/// Lets a server live for a while now and then: the keeper gives up when too many in a row do not.
fn prove_itself(round: u64) {
    if round % 45 == 44 {
        std::thread::sleep(Duration::from_millis(2500));
    }
}

fn exchange(a: &Path, b: &Path) -> std::io::Result<()> {
    Ok(rustix::fs::renameat_with(
        CWD,
        a,
        CWD,
        b,
        RenameFlags::EXCHANGE,
    )?)
}

#[test]
fn nothing_is_lost_by_kill_9_of_a_users_daemon() {
    for who in [Who::User, Who::Namespace] {
        let rounds = [("COWFS_KILL_ROUNDS", "15")];
        again(
            "nothing_is_lost_by_kill_9",
            who,
            &rounds,
            Duration::from_secs(900),
        );
    }
}

#[test]
fn nothing_is_lost_by_kill_9() {
    let rounds = env_number("COWFS_KILL_ROUNDS", 100);
    kill_again_and_again("kill", "", rounds, Random::new(seed("mounted_kill")));
}

#[test]
fn nothing_is_lost_by_kill_9_with_strict_durability() {
    let random = Random::new(seed("mounted_kill, strict"));
    let rounds = env_number("COWFS_KILL_ROUNDS", 100) / 3;
    kill_again_and_again("killstrict", "durability=strict", rounds, random);
}

/// The same where the store has little room: snapshots are given up all the time, and space is freed. Those that are
/// there are as they were, the newest of them at the end too.
#[test]
fn nothing_is_lost_by_kill_9_with_little_room() {
    let random = Random::new(seed("mounted_kill, little room"));
    let rounds = env_number("COWFS_KILL_ROUNDS", 100);
    kill_again_and_again("killfull", "store-limit=32M,on-full=drop", rounds, random);
}

/// What a round of kills has come to.
#[derive(Default)]
struct Tally {
    /// Operations that were done.
    operations: usize,
    /// Rounds in which the operation under way had been carried out.
    after: usize,
    /// Of these, those in which a beginning of it was.
    halves: usize,
    /// Kills in the middle of mounting, and of unmounting.
    mounting: usize,
    unmounting: usize,
    /// Snapshots that were given up for room.
    given_up: usize,
}

fn kill_again_and_again(name: &str, options: &str, rounds: u64, mut random: Random) {
    let limit = Duration::from_secs(240 + rounds * 12);
    let mount = Mount::new(name, limit);
    mount.remount_with(options);
    let mut state = State::default();
    let mut tally = Tally::default();
    let may_drop = options.contains("on-full=drop");
    for round in 0..rounds {
        let delay = Duration::from_micros(random.below(150_000) as u64);
        let killed = AtomicBool::new(false);
        let (op, count) = std::thread::scope(|scope| {
            let worker = scope.spawn(|| work(&mount, &mut state, &mut random, &killed, may_drop));
            std::thread::sleep(delay);
            killed.store(true, Ordering::SeqCst);
            mount.kill9();
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        tally.operations += count;
        detach(&mount.mnt);
        die_again(&mount, &mut random, &mut tally);
        mount.recover();
        let mut found = check(&mount, &state);
        // Some may be given up while it is looked at.
        while may_drop && found.is_err() {
            let gone = settle_given_up(&mount, &mut state, Some(&op));
            tally.given_up += gone;
            if gone == 0 {
                break;
            }
            found = check(&mount, &state);
        }
        let Err(without) = found else {
            continue;
        };
        let mut next = state.clone();
        next.apply(&op);
        if let Err(with) = check(&mount, &next) {
            let part = state.beginnings(&op).into_iter().find_map(|part| {
                let mut next = state.clone();
                next.apply(&part);
                check(&mount, &next).is_ok().then_some(next)
            });
            let Some(part) = part else {
                panic!(
                    "VIOLATION in round {round}, after {count} operations, {op:?} under way:\n\
                     without it: {without}\nwith it: {with}\nnor with a beginning of it"
                );
            };
            next = part;
            tally.halves += 1;
        }
        state = next;
        tally.after += 1;
    }
    println!(
        "{rounds} rounds, {} operations, {} snapshots at the end, {} given up for room; {} kills of the next mount, \
         {} of the unmounting; the operation under way was found carried out in {} rounds, in part in {} of them",
        tally.operations,
        state.snapshots.len(),
        tally.given_up,
        tally.mounting,
        tally.unmounting,
        tally.after,
        tally.halves
    );
    if may_drop && rounds >= 50 {
        assert!(tally.given_up > 0, "the store never filled");
    }
    let finish = |state: &mut State, what: &str| {
        while let Err(why) = check(&mount, state) {
            let gone = may_drop && settle_given_up(&mount, state, None) > 0;
            assert!(gone, "VIOLATION after {what}: {why}");
        }
    };
    mount.remount();
    finish(&mut state, "a clean remount");
    let mut names: Vec<String> = state.snapshots.keys().cloned().collect();
    while !names.is_empty() {
        let name = names.swap_remove(random.below(names.len()));
        let op = Op::DeleteSnapshot { name };
        match op.execute(&mount.mnt) {
            Ok(()) => state.apply(&op),
            Err(error) if may_drop && error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => panic!("{op:?}: {error}"),
        }
        finish(&mut state, &format!("{op:?}"));
    }
    mount.umount();
    compare(&mount.backing, &state.live, Links::AtLeast).unwrap_or_else(|why| {
        panic!("VIOLATION: the backing directory is not the live tree: {why}")
    });
    mount.mount();
}

/// Lets, in a third of the rounds, the next mount die before it serves or just after, sometimes several times, or while
/// it is unmounted in the clean way. The mount is detached before and afterwards.
fn die_again(mount: &Mount, random: &mut Random, tally: &mut Tally) {
    while random.below(3) == 0 {
        // Mounting takes some 30 milliseconds.
        mount.mount_and_kill(Duration::from_micros(random.below(60_000) as u64));
        tally.mounting += 1;
    }
    if random.below(10) == 0 {
        mount.recover();
        mount.umount_and_kill(Duration::from_micros(random.below(60_000) as u64));
        tally.unmounting += 1;
    }
}

/// Takes out of `state` the snapshots that have been given up for room, and deletes those of them that are left as
/// invalid. `under_way` may have made, renamed or deleted one. Returns how many.
fn settle_given_up(mount: &Mount, state: &mut State, under_way: Option<&Op>) -> usize {
    let all = mount.snapshots();
    let renamed = |name: &str| match under_way {
        Some(Op::RenameSnapshot { from, to }) => {
            from == name && all.iter().any(|(n, sound)| n == to && *sound)
        }
        _ => false,
    };
    let mut gone: Vec<String> = Vec::new();
    for name in state.snapshots.keys().filter(|name| !renamed(name)) {
        if !all.iter().any(|(there, sound)| there == name && *sound) {
            gone.push(name.clone());
        }
    }
    for (name, sound) in &all {
        assert!(
            *sound || fs::read_dir(mount.snapshot_path(name)).is_err(),
            "VIOLATION: {name} is invalid and can be read"
        );
        if !sound {
            fs::remove_dir(mount.snapshot_path(name)).unwrap();
        }
    }
    gone.retain(|name| state.snapshots.remove(name).is_some());
    gone.len()
}
