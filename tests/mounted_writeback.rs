//! `cache=writeback`: who gets it, and what becomes of it when a process of it dies. The exact cut itself is tested in
//! `mounted_cut` and by `tests/py/writeback.py`.
//!
//! `COWFS_TAKEOVER_ROUNDS` (20), `COWFS_KILL_ROUNDS` (15), `COWFS_SEED`.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use rustix::fs::{CWD, FallocateFlags, FileType, Mode, makedev, mknodat};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Signal, kill_process};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use support::model::Random;
use support::user::{Who, again};
use support::{Mount, env_number, own_script, python_with, seed};

const OPTION: &str = "cache=writeback";
const LIMIT: Duration = Duration::from_secs(600);

fn writeback(name: &str) -> Mount {
    let mount = Mount::with(name, LIMIT, OPTION);
    assert_eq!(mount.cache(), "writeback", "{}", mount.log());
    mount
}

#[test]
fn root_gets_it_and_keeps_it_over_a_takeover() {
    let mount = writeback("wb-root");
    let file = fs::File::create(mount.mnt.join("file")).unwrap();
    file.write_all_at(b"before", 0).unwrap();
    mount.kill_server();
    // The kernel goes on holding writes back, so the next server must make its cuts.
    file.write_all_at(b"after ", 0).unwrap();
    let snapshot = mount.snapshot("s");
    assert_eq!(fs::read(snapshot.join("file")).unwrap(), b"after ");
    assert_eq!(mount.takeovers(), 1);
    assert_eq!(mount.cache(), "writeback");
}

#[test]
fn a_mount_that_cannot_be_changed_has_no_use_for_it() {
    let mount = Mount::with("wb-ro", LIMIT, "ro,cache=writeback");
    assert_eq!(mount.cache(), "write-through");
}

/// Run again by [`others_get_write_through_and_are_told`].
#[test]
fn what_a_user_gets() {
    let mount = Mount::with("wb-user", LIMIT, OPTION);
    let root = std::env::var_os("COWFS_PY").is_none();
    assert_eq!(mount.cache() == "writeback", root);
    assert_eq!(mount.log().contains("takes the place of"), !root);
    let file = fs::File::create(mount.mnt.join("file")).unwrap();
    file.write_all_at(b"bytes", 0).unwrap();
    let snapshot = mount.snapshot("s");
    assert_eq!(fs::read(snapshot.join("file")).unwrap(), b"bytes");
}

#[test]
fn others_get_write_through_and_are_told() {
    for who in [Who::User, Who::Namespace] {
        again("what_a_user_gets", who, &[], LIMIT);
    }
}

/// What the helper had open for a cut must not keep the mount busy when its users are gone.
#[test]
fn a_cut_leaves_nothing_open() {
    let mount = writeback("wb-busy");
    for round in 0..10 {
        let files: Vec<fs::File> = (0..20)
            .map(|k| fs::File::create(mount.mnt.join(format!("f{k}"))).unwrap())
            .collect();
        for file in &files {
            file.write_all_at(b"bytes", round).unwrap();
        }
        mount.snapshot(&format!("s{round}"));
        drop(files);
        let start = Instant::now();
        // Under load some milliseconds may pass (docs/SEMANTICS.md).
        while let Err(errno) = unmount(&mount.mnt, UnmountFlags::empty()) {
            let waits = errno == Errno::BUSY && start.elapsed() < Duration::from_secs(10);
            assert!(waits, "round {round}: umount: {errno}");
            std::thread::sleep(Duration::from_millis(1));
        }
        mount.mount();
    }
}

/// Holes are those that the program made, also while what it wrote is still in the kernel.
#[test]
fn holes_are_told_as_they_are() {
    const MIB: u64 = 1 << 20;
    let mount = writeback("wb-holes");
    let path = mount.mnt.join("sparse");
    let file = fs::File::create(&path).unwrap();
    file.set_len(4 * MIB).unwrap();
    file.write_all_at(&[1; 4096], 2 * MIB).unwrap();
    let seek = |file: &fs::File, from: rustix::fs::SeekFrom| rustix::fs::seek(file, from).unwrap();
    let data = |file: &fs::File| {
        let start = seek(file, rustix::fs::SeekFrom::Data(0));
        (start, seek(file, rustix::fs::SeekFrom::Hole(start)))
    };
    assert_eq!(data(&file), (2 * MIB, 2 * MIB + 4096));
    file.write_all_at(&[1; 4096], MIB).unwrap();
    let snapshot = mount.snapshot("s");
    assert_eq!(data(&file), (MIB, MIB + 4096));
    let kept = fs::File::open(snapshot.join("sparse")).unwrap();
    assert_eq!(data(&kept), (MIB, MIB + 4096));
}

fn modified(path: &Path) -> SystemTime {
    fs::metadata(path).unwrap().modified().unwrap()
}

/// Times that the backing file does not have yet are shown in snapshots, and it has them when its file is closed.
#[test]
fn a_file_that_is_synced_all_the_time_has_the_times_that_the_kernel_shows() {
    let mount = writeback("wb-times");
    let (path, beneath) = (mount.mnt.join("file"), mount.backing.join("file"));
    let file = fs::File::create(&path).unwrap();
    let mut kept = Vec::new();
    for round in 0..5 {
        // One that is asked for its times gives the next change a time of its own.
        let behind = (0..1000).any(|_| {
            file.write_all_at(&[round; 8192], 0).unwrap();
            file.sync_all().unwrap();
            modified(&beneath) != modified(&path)
        });
        assert!(behind, "the backing file always had the time already");
        let shown = modified(&path);
        let snapshot = mount.snapshot(&format!("s{round}")).join("file");
        assert_eq!(modified(&snapshot), shown, "VIOLATION: not changed since");
        kept.push((snapshot, shown));
    }
    let check = |shown: SystemTime| {
        for (snapshot, shown) in &kept {
            assert_eq!(modified(snapshot), *shown, "VIOLATION: changed since");
        }
        assert_eq!(modified(&path), shown);
        assert_eq!(modified(&beneath), shown);
    };

    let shown = modified(&path);
    drop(file);
    mount.remount();
    check(shown);

    // A time that somebody sets is that time, also in the middle of it.
    let file = fs::File::options().write(true).open(&path).unwrap();
    let long_ago = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    for _ in 0..20 {
        file.write_all_at(&[9; 8192], 0).unwrap();
        file.sync_all().unwrap();
        file.set_modified(long_ago).unwrap();
        assert_eq!(modified(&beneath), long_ago);
    }
    drop(file);
    mount.remount();
    check(long_ago);
}

/// What a daemon that dies leaves is the time at which it wrote; snapshots show what they showed.
#[test]
fn a_time_that_dies_with_the_server_was_nearly_what_is_there() {
    let mount = writeback("wb-times-kill");
    let path = mount.mnt.join("file");
    let file = fs::File::create(&path).unwrap();
    for _ in 0..20 {
        file.write_all_at(&[1; 8192], 0).unwrap();
        file.sync_all().unwrap();
    }
    let shown = modified(&path);
    let snapshot = mount.snapshot("s").join("file");
    mount.kill9();
    drop(file);
    mount.recover();
    assert_eq!(modified(&snapshot), shown, "VIOLATION");
    let off = modified(&path).duration_since(shown).unwrap();
    assert!(off < Duration::from_secs(10), "{off:?} later than shown");
}

/// The kernel tells a time once, and the server that it told may be another one than that which has to show it.
#[test]
fn the_times_of_open_files_outlive_their_server() {
    let mount = writeback("wb-times-takeover");
    let paths: Vec<_> = (0..12)
        .map(|n| mount.mnt.join(format!("file-{n}")))
        .collect();
    let create = |path| {
        let file = fs::File::create(path).unwrap();
        file.write_all_at(&[1; 20_000], 0).unwrap();
        file
    };
    let files: Vec<_> = paths.iter().map(create).collect();
    for round in 0..6 {
        mount.snapshot(&format!("before-{round}"));
        for file in &files {
            file.write_all_at(&[2; 100], 10_000).unwrap();
        }
        std::thread::sleep(Duration::from_millis(40));
        match round % 3 {
            // The kernel tells of all, and has pages to write back later.
            0 => files.iter().for_each(|file| {
                file.sync_all().unwrap();
                file.write_all_at(&[3; 100], 10_000).unwrap();
            }),
            1 => files.iter().for_each(|file| file.sync_all().unwrap()),
            _ => {}
        }
        mount.kill_server();
        let shown: Vec<_> = paths.iter().map(|path| modified(path)).collect();
        let snapshot = mount.snapshot(&format!("after-{round}"));
        for (path, shown) in paths.iter().zip(&shown) {
            let seen = modified(&snapshot.join(path.file_name().unwrap()));
            assert_eq!(seen, *shown, "VIOLATION: round {round}, {}", path.display());
        }
    }
    assert_eq!(mount.takeovers(), 6);
    let shown: Vec<_> = paths.iter().map(|path| modified(path)).collect();
    drop(files);
    mount.remount();
    let left: Vec<_> = paths.iter().map(|path| modified(path)).collect();
    assert_eq!(left, shown);
}

/// Ends the other threads of a test, also when it fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Waits until every writer has synced.
fn wait_for_all(synced: &[AtomicU64]) {
    while synced.iter().any(|value| value.load(Ordering::SeqCst) == 0) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Writers of counters, and what they have written.
fn count(mount: &Mount, number: usize, done: &AtomicBool, synced: &AtomicU64) {
    let file = fs::File::create(mount.mnt.join(format!("count-{number}"))).unwrap();
    let mut value = 0_u64;
    while !done.load(Ordering::SeqCst) {
        value += 1;
        let written = file.write_all_at(&value.to_le_bytes().repeat(700), 0);
        let kept = written.and_then(|()| match value.is_multiple_of(5) {
            true => file.sync_all(),
            false => Ok(()),
        });
        match kept {
            Ok(()) if value.is_multiple_of(5) => synced.store(value, Ordering::SeqCst),
            Ok(()) => {}
            Err(_) if done.load(Ordering::SeqCst) => return,
            Err(error) => panic!("VIOLATION: writer {number}: {error}"),
        }
    }
}

fn counter(path: &Path) -> u64 {
    let bytes = fs::read(path).unwrap();
    let first = bytes
        .first_chunk::<8>()
        .map_or(0, |b| u64::from_le_bytes(*b));
    let whole = bytes.chunks_exact(8).all(|b| b == first.to_le_bytes());
    assert!(whole, "VIOLATION: {} is torn", path.display());
    first
}

/// A cut whose helper dies fails or succeeds, and nobody else sees anything of it.
#[test]
fn a_dead_helper_fails_a_cut_and_holds_up_nobody() {
    let mount = writeback("wb-helper");
    let done = AtomicBool::new(false);
    let synced: Vec<AtomicU64> = (0..4).map(|_| AtomicU64::new(0)).collect();
    let (mut made, mut failed) = (0, 0);
    std::thread::scope(|scope| {
        let _stop = Stop(&done);
        for (number, synced) in synced.iter().enumerate() {
            let (mount, done) = (&mount, &done);
            scope.spawn(move || count(mount, number, done, synced));
        }
        wait_for_all(&synced);
        let killer = scope.spawn(|| {
            let mut random = Random::new(seed("helper"));
            while !done.load(Ordering::SeqCst) {
                for pid in mount.helpers() {
                    let _ = kill_process(pid, Signal::KILL);
                }
                std::thread::sleep(Duration::from_millis(random.below(100) as u64));
            }
        });
        for number in 0..60 {
            let low: Vec<u64> = synced.iter().map(|s| s.load(Ordering::SeqCst)).collect();
            let path = mount.snapshot_path(format!("s{number}"));
            match fs::create_dir(&path) {
                Ok(()) => {
                    made += 1;
                    for (n, low) in low.iter().enumerate() {
                        let shown = counter(&path.join(format!("count-{n}")));
                        assert!(shown >= *low, "VIOLATION: s{number} lacks what was synced");
                    }
                }
                Err(error) => {
                    failed += 1;
                    assert_eq!(error.raw_os_error(), Some(5), "{error}");
                    assert!(!path.exists());
                }
            }
        }
        done.store(true, Ordering::SeqCst);
        killer.join().unwrap();
        for _ in 0..3 {
            // a helper that is gone is replaced
            let _ = fs::create_dir(mount.snapshot_path("last"));
        }
        assert!(mount.snapshot_path("last").exists());
    });
    println!("{made} cuts were made, {failed} failed with their helper");
    assert!(made > 0);
}

/// Every kind of change in one order, by processes that see no error, while one server after the other dies, in the
/// middle of cuts too.
#[test]
fn cuts_are_exact_over_takeovers() {
    let rounds = env_number("COWFS_TAKEOVER_ROUNDS", 20);
    let mut random = Random::new(seed("writeback takeover"));
    let mount = writeback("wb-takeover");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let killer = scope.spawn(|| {
            let mut killed = 0;
            while killed < rounds && !done.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1000 + random.below(1500) as u64));
                mount.kill_server();
                killed += 1;
            }
        });
        let _stop = Stop(&done);
        let slowly = [("COWFS_CHAIN_SECONDS", "30"), ("COWFS_CHAIN_ROUNDS", "2")];
        python_with(&own_script("writeback"), &mount, LIMIT, &slowly);
        done.store(true, Ordering::SeqCst);
        killer.join().unwrap();
    });
    println!("{} takeovers", mount.takeovers());
    assert!(mount.takeovers() > 3);
}

/// What the kernel still holds back when daemon and keeper are killed is lost, as with any filesystem that crashes. What
/// was synced is there, and so are the snapshots, as they were.
#[test]
fn what_was_synced_and_the_snapshots_outlive_kill_9() {
    let rounds = env_number("COWFS_KILL_ROUNDS", 15);
    let mut random = Random::new(seed("writeback kill"));
    let mount = writeback("wb-kill");
    let mut snapshots: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    let read = |path: &Path| -> Vec<u64> {
        (0..3)
            .map(|n| counter(&path.join(format!("count-{n}"))))
            .collect()
    };
    for round in 0..rounds {
        let done = AtomicBool::new(false);
        let synced: Vec<AtomicU64> = (0..3).map(|_| AtomicU64::new(0)).collect();
        std::thread::scope(|scope| {
            for number in 0..3 {
                let (mount, done, synced) = (&mount, &done, &synced[number]);
                scope.spawn(move || count(mount, number, done, synced));
            }
            let _stop = Stop(&done);
            wait_for_all(&synced);
            for number in 0..2 {
                let name = format!("r{round}-{number}");
                let path = mount.snapshot(&name);
                snapshots.insert(name, read(&path));
            }
            std::thread::sleep(Duration::from_millis(random.below(40) as u64));
            done.store(true, Ordering::SeqCst);
            mount.kill9();
        });
        mount.recover();
        for (number, synced) in synced.iter().enumerate() {
            // A later write may be there in part.
            let bytes = fs::read(mount.mnt.join(format!("count-{number}"))).unwrap();
            let words = bytes
                .chunks_exact(8)
                .map(|b| u64::from_le_bytes(b.try_into().unwrap()));
            let (there, synced) = (words.min().unwrap(), synced.load(Ordering::SeqCst));
            assert!(
                there >= synced,
                "VIOLATION in round {round}: {there} is there, {synced} was synced"
            );
        }
        for (name, shown) in &snapshots {
            let now = read(&mount.snapshot_path(name));
            assert_eq!(&now, shown, "VIOLATION in round {round}: snapshot {name}");
        }
    }
}

/// As the flush helper does that is just writing a large file back.
#[test]
fn unmounting_waits_for_who_is_just_closing_a_file() {
    let mount = writeback("wb-umount");
    let file = fs::File::create(mount.mnt.join("f")).unwrap();
    let closed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Longer than a mount may be busy that holds nothing back.
            std::thread::sleep(Duration::from_secs(3));
            closed.store(true, Ordering::SeqCst);
            drop(file);
        });
        mount.umount();
        assert!(closed.load(Ordering::SeqCst), "the mount was not busy");
    });
}

/// Makes something that is not a regular file.
type MakeOther = fn(&Path) -> std::io::Result<()>;

const OTHERS: [MakeOther; 5] = [
    |path| fs::create_dir(path),
    |path| std::os::unix::fs::symlink("target", path),
    |path| node(path, FileType::Fifo),
    |path| node(path, FileType::Socket),
    |path| node(path, FileType::CharacterDevice),
];

/// A device number is one for local use, which no driver has (Documentation/admin-guide/devices.txt).
fn node(path: &Path, what: FileType) -> std::io::Result<()> {
    let number = match what {
        FileType::CharacterDevice => makedev(240, 7),
        _ => 0,
    };
    Ok(mknodat(CWD, path, what, Mode::RUSR, number)?)
}

/// A file is written and removed, and what gets its number is moved to another directory: until told to stop. How often it
/// did get it.
fn give_number_on(dir: &Path, make: MakeOther, done: &AtomicBool) -> std::io::Result<u64> {
    let (from, to, file) = (dir.join("from"), dir.join("to"), dir.join("from/file"));
    fs::create_dir_all(&from)?;
    fs::create_dir(&to)?;
    let (made, moved) = (from.join("other"), to.join("other"));
    let mut again = 0;
    while !done.load(Ordering::SeqCst) {
        fs::write(&file, [1; 3000])?;
        let number = file.metadata()?.ino();
        fs::remove_file(&file)?;
        make(&made)?;
        fs::rename(&made, &moved)?;
        let other = moved.symlink_metadata()?;
        again += u64::from(other.ino() == number);
        match other.is_dir() {
            true => fs::remove_dir(&moved)?,
            false => fs::remove_file(&moved)?,
        }
    }
    Ok(again)
}

/// A cut asks for the pages of a file whose number is that of something else by now. Neither the cut nor who uses that
/// notices.
#[test]
fn the_number_of_a_written_file_goes_to_something_else() {
    let mount = writeback("wb-number");
    let (done, mut cuts) = (AtomicBool::new(false), 0);
    let start = std::time::Instant::now();
    let again: Vec<u64> = std::thread::scope(|scope| {
        let movers: [_; OTHERS.len()] = std::array::from_fn(|k| {
            let (dir, done) = (mount.mnt.join(k.to_string()), &done);
            scope.spawn(move || give_number_on(&dir, OTHERS[k], done))
        });
        let cut = |number: u32| {
            let path = mount.snapshot_path(number.to_string());
            fs::create_dir(&path).and_then(|()| fs::remove_dir(&path))
        };
        let mut failed = None;
        // A slow machine gets there later.
        let enough = |cuts: u32| start.elapsed() >= Duration::from_secs(8) && cuts > 20;
        while failed.is_none() && !enough(cuts) && !movers.iter().any(|mover| mover.is_finished()) {
            failed = cut(cuts).err();
            cuts += 1;
        }
        done.store(true, Ordering::SeqCst);
        let again = movers.map(|mover| mover.join().unwrap());
        assert!(failed.is_none(), "cut {cuts}: {failed:?}");
        again.into_iter().map(|again| again.unwrap()).collect()
    });
    assert!(cuts > 20, "only {cuts} cuts");
    assert!(again.iter().all(|again| *again > 5), "{again:?}");
}

/// The kernel takes no answer for a part of what it held back: the rest would be lost without an error.
#[test]
fn what_is_written_back_in_part_has_failed() {
    let mount = Mount::on_own_disk("part", LIMIT, 600);
    mount.remount_with(OPTION);
    assert_eq!(mount.cache(), "writeback", "{}", mount.log());
    let beneath = fs::File::create(mount.backing.join("f")).unwrap();
    let (mut fits, mut too_large) = (0, i64::MAX as u64);
    while fits + 1 < too_large {
        let middle = fits + (too_large - fits) / 2;
        match beneath.set_len(middle) {
            Ok(()) => fits = middle,
            Err(_) => too_large = middle,
        }
    }
    beneath.set_len(0).unwrap();
    drop(beneath);
    let file = fs::File::options()
        .write(true)
        .open(mount.mnt.join("f"))
        .unwrap();
    let wrote = file.write_all_at(&vec![7; 1 << 20], fits - (512 << 10));
    let synced = file.sync_all();
    assert!(wrote.is_err() || synced.is_err(), "{wrote:?} {synced:?}");
}

/// The kernel goes by the size that it knows when an allocation fails half-way, and so does what is beneath and a snapshot.
#[test]
fn an_allocation_that_fails_half_way_leaves_the_size() {
    let mount = Mount::on_own_disk("half", LIMIT, 60);
    mount.remount_with(OPTION);
    assert_eq!(mount.cache(), "writeback", "{}", mount.log());
    let file = fs::File::create(mount.mnt.join("f")).unwrap();
    file.write_all_at(&[7; 5000], 0).unwrap();
    file.sync_all().unwrap();
    let allocated = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 200 << 20);
    assert_eq!(allocated, Err(Errno::NOSPC));
    let snapshot = mount.snapshot("s").join("f");
    for path in [mount.mnt.join("f"), mount.backing.join("f"), snapshot] {
        let bytes = fs::read(&path).unwrap();
        let (place, size) = (path.display(), bytes.len());
        assert!(bytes == [7; 5000], "{place}: {size} bytes");
    }
}
