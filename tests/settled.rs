//! What makes a snapshot durable: everything that has changed is synced, and nothing else where that is known. On the
//! engine without a mount.
//!
//! `COWFS_SEED` repeats a case.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "support/drive.rs"]
mod drive;
#[path = "support/plain.rs"]
mod plain;

use cowfs::config::Durability;
use cowfs::engine::attr::{SetAttr, SetTime};
use cowfs::engine::creds::Caller;
use cowfs::engine::handle::OpenFile;
use cowfs::engine::names::Make;
use cowfs::engine::nodes::Node;
use cowfs::engine::{Call, Change, Engine, EngineOptions, Failure, Witness};
use cowfs::error::{Error, Result};
use cowfs::store::{SnapshotState, Timestamp};
use cowfs::sync::{Arc, AtomicBool, AtomicU32, Mutex, Ordering};
use drive::{find, options, root, state, write};
use plain::seeds;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rustix::fs::RenameFlags;
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

fn sync(engine: &Engine, name: &str) -> Result<()> {
    let node = find(engine, root(engine), &[name])?;
    match engine.open_file(&node, libc::O_RDWR)? {
        OpenFile::Live(file) => engine.fsync(&file, false),
        OpenFile::At(_) => unreachable!("a live file"),
    }
}

/// In memory: on a slow disk everything is synced where one after the other would take seconds.
fn place() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    match memory.is_dir() {
        true => tempfile::tempdir_in(memory).unwrap(),
        false => tempfile::tempdir().unwrap(),
    }
}

/// Inode numbers of what was synced; `None`: everything was.
type Synced = Arc<Mutex<Vec<Option<u64>>>>;

fn noting(synced: &Synced) -> Witness {
    let synced = synced.clone();
    Arc::new(move |change| match change {
        Change::Synced(ino) => synced.lock().push(Some(ino.0)),
        Change::AllSynced => synced.lock().push(None),
        Change::Dooms(..) | Change::Made => {}
    })
}

/// What was there before the mount is synced before a snapshot needs it.
#[test]
fn what_earlier_sessions_left_is_synced_in_the_background() {
    let dir = place();
    std::fs::write(dir.path().join("f"), "old").unwrap();
    let synced = Synced::default();
    let options = EngineOptions {
        witness: Some(noting(&synced)),
        upkeep: Some(Duration::from_millis(100)),
        ..options()
    };
    let engine = Engine::open(dir.path(), options).unwrap();
    write(&engine, "f", 0, b"one").unwrap();
    let (start, limit) = (Instant::now(), Duration::from_secs(60));
    while !synced.lock().contains(&None) {
        assert!(start.elapsed() < limit, "not synced in {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
    synced.lock().clear();
    // It has changed in this epoch before and after that.
    write(&engine, "f", 0, b"two").unwrap();
    engine.snapshot(b"s").unwrap();
    engine.settle_snapshots().unwrap();
    let f = dir.path().join("f").metadata().unwrap().ino();
    assert!(synced.lock().contains(&Some(f)));
    engine.close().unwrap();
    assert!(!synced.lock().contains(&None));
}

/// A snapshot is made durable by syncing what has changed, and by syncing everything only where that is not known.
#[test]
fn what_has_changed_is_synced_alone() {
    for durability in [Durability::Strict, Durability::Ordered] {
        let dir = place();
        for name in ["f", "g"] {
            std::fs::write(dir.path().join(name), "old").unwrap();
        }
        std::os::unix::fs::symlink("f", dir.path().join("link")).unwrap();
        let (synced, failing) = (Synced::default(), Arc::new(AtomicBool::new(false)));
        let fails = failing.clone();
        let options = EngineOptions {
            durability,
            witness: Some(noting(&synced)),
            faults: Some(Arc::new(move |call| {
                let fails = call == Call::Sync && fails.load(Ordering::SeqCst);
                fails.then_some(Failure::Errno(Errno::IO))
            })),
            ..options()
        };
        let engine = Engine::open(dir.path(), options).unwrap();
        let ino = |name: &str| Some(dir.path().join(name).symlink_metadata().unwrap().ino());
        let (f, g, top) = (ino("f"), ino("g"), ino(""));
        let settle = |name: &str| {
            let made = engine.snapshot(name.as_bytes());
            engine.settle_snapshots().unwrap();
            (made, std::mem::take(&mut *synced.lock()))
        };
        let said = |name: &str| {
            let (made, synced) = settle(name);
            made.unwrap();
            println!("{durability:?} {name}: {synced:?}");
            synced
        };
        // Nobody knows what was changed before.
        assert_eq!(said("s0"), [None]);
        assert_eq!(said("s1"), []);
        write(&engine, "f", 0, b"new").unwrap();
        let alone = said("s2");
        assert!(alone.contains(&f));
        assert!(!alone.contains(&g) && !alone.contains(&None));
        // The names of the directory, and what is retained for the snapshots, whose name there comes first.
        engine.remove(&root(&engine), b"g", false).unwrap();
        let removed = said("s3");
        assert!(removed.contains(&g) && !removed.contains(&f) && !removed.contains(&None));
        assert_eq!(removed.first(), Some(&ino(".cowfs/retained")));
        assert_eq!(removed.last(), Some(&top));
        // No fsync(2) reaches it.
        let link = find(&engine, root(&engine), &["link"]).unwrap();
        let long_ago = SetAttr {
            mtime: Some(SetTime::At(Timestamp::default())),
            ..SetAttr::default()
        };
        engine.setattr(&link, &long_ago, None, None).unwrap();
        assert_eq!(said("s4"), [None]);
        // What could not be synced is not forgotten.
        write(&engine, "f", 0, b"one").unwrap();
        failing.store(true, Ordering::SeqCst);
        let (made, _) = settle("s5");
        assert_eq!(made.is_ok(), durability == Durability::Ordered);
        failing.store(false, Ordering::SeqCst);
        assert_eq!(said("s6"), [None]);
        assert_eq!(state(&engine, "s6"), Some(SnapshotState::Ready));
        // The kernel tells of a lost write once: here to one who calls fsync(2).
        failing.store(true, Ordering::SeqCst);
        assert!(sync(&engine, "f").is_err());
        failing.store(false, Ordering::SeqCst);
        let (made, _) = settle("s7");
        match durability {
            Durability::Strict => assert!(made.is_err()),
            Durability::Ordered => {
                assert_eq!(state(&engine, "s7"), Some(SnapshotState::Suspect));
            }
        }
        said("s8");
        assert_eq!(state(&engine, "s8"), Some(SnapshotState::Ready));
    }
}

/// The files and directories of a tree, by number, with the time of their last change.
/// What the kernel tells of a file that could not be written back it tells once. If it is cowfs that hears of it, whoever syncs
/// the file next must be told as well, whenever he opened it.
#[test]
fn what_could_not_be_synced_for_a_snapshot_is_told_to_the_next_who_syncs_it() {
    let dir = place();
    for name in ["f", "g"] {
        std::fs::write(dir.path().join(name), "old").unwrap();
    }
    // The second from now on: the first is of the directory of retained files.
    let fails = Arc::new(AtomicU32::new(0));
    let failing = fails.clone();
    let options = EngineOptions {
        faults: Some(Arc::new(move |call| {
            let counts = call == Call::Sync && failing.load(Ordering::SeqCst) > 0;
            let fails = counts && failing.fetch_sub(1, Ordering::SeqCst) == 1;
            fails.then_some(Failure::Errno(Errno::IO))
        })),
        ..options()
    };
    let engine = Engine::open(dir.path(), options).unwrap();
    engine.snapshot(b"before").unwrap();
    engine.settle_snapshots().unwrap();
    for round in 0..3 {
        write(&engine, "f", 0, b"new").unwrap();
        engine.snapshot(format!("s{round}").as_bytes()).unwrap();
        fails.store(2, Ordering::SeqCst);
        engine.settle_snapshots().unwrap();
        assert_eq!(fails.load(Ordering::SeqCst), 0);
        sync(&engine, "g").unwrap();
        let told = sync(&engine, "f").map_err(|error| error.errno());
        assert_eq!(told, Err(Errno::IO), "round {round}");
        sync(&engine, "f").unwrap();
        // What is known of changes begins anew.
        engine.snapshot(format!("t{round}").as_bytes()).unwrap();
        engine.settle_snapshots().unwrap();
    }
    engine.close().unwrap();
}

fn scan(dir: &Path, found: &mut BTreeMap<u64, (i64, i64)>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let stat = path.symlink_metadata().unwrap();
        if path.ends_with(".cowfs") {
            scan(&path.join("retained"), found);
        } else if stat.is_dir() || stat.is_file() {
            found.insert(stat.ino(), (stat.ctime(), stat.ctime_nsec()));
        }
        if stat.is_dir() && !path.ends_with(".cowfs") {
            scan(&path, found);
        }
    }
    let stat = dir.metadata().unwrap();
    if !dir.ends_with("retained") {
        found.insert(stat.ino(), (stat.ctime(), stat.ctime_nsec()));
    }
}

const CALLER: Caller = Caller {
    uid: 0,
    gid: 0,
    umask: 0,
};

/// A random change; most fail on some trees.
fn change(engine: &Engine, rng: &mut SmallRng) -> Result<()> {
    let dirs = ["", "d0", "d1"];
    let mut place = || -> Result<_> {
        let dir = match dirs[rng.random_range(0..3)] {
            "" => root(engine),
            name => find(engine, root(engine), &[name])?,
        };
        Ok((dir, format!("n{}", rng.random_range(0..5)).into_bytes()))
    };
    let (dir, name) = place()?;
    let (other, new) = place()?;
    let object = |dir, name: &[u8]| {
        let node = find(engine, dir, &[std::str::from_utf8(name).unwrap()])?;
        match &node {
            // No fsync(2) reaches what a symlink is.
            Node::Live(object) if object.entry.kind == libc::DT_LNK => Err(Error::Os(Errno::LOOP)),
            _ => Ok(node),
        }
    };
    let set = |set: SetAttr| {
        let node = object(dir.clone(), &name)?;
        engine.setattr(&node, &set, None, None).map(drop)
    };
    match rng.random_range(0..12) {
        0 | 1 => {
            let made = engine.create(&dir, &name, 0o600, libc::O_RDWR, CALLER)?;
            match rng.random() {
                true => engine.write(&made.1, 0, &[1; 5000], None, false).map(drop),
                false => Ok(()),
            }
        }
        2 => {
            let made = match rng.random() {
                true => Make::Directory(0o700),
                false => Make::Symlink(b"n0"),
            };
            engine.make(&dir, &name, made, CALLER).map(drop)
        }
        3 => engine.remove(&dir, &name, rng.random()),
        4 | 5 => {
            let flags = [RenameFlags::empty(), RenameFlags::EXCHANGE][rng.random_range(0..2)];
            engine.rename((&dir, &name), (&other, &new), flags, CALLER)
        }
        6 => engine.link(&object(dir, &name)?, &other, &new).map(drop),
        7 => set(SetAttr {
            mode: Some(rng.random_range(0o600..0o1000)),
            ..SetAttr::default()
        }),
        8 => set(SetAttr {
            size: Some(rng.random_range(0..20_000)),
            ..SetAttr::default()
        }),
        9 => engine.setxattr(&object(dir, &name)?, b"user.x", &[rng.random(); 9], 0, None),
        _ => match engine.open_file(&object(dir, &name)?, libc::O_RDWR)? {
            OpenFile::Live(file) if rng.random() => {
                engine.fallocate(&file, 0, rng.random_range(0..9000), 9000, None)
            }
            OpenFile::Live(file) => {
                let at = rng.random_range(0..20_000);
                engine
                    .write(&file, at, &[rng.random(); 3000], None, false)
                    .map(drop)
            }
            OpenFile::At(_) => unreachable!("a live file"),
        },
    }
}

/// Changes what it likes, and looks whether all that has a new time of change was synced with the next snapshot. Returns
/// how many objects that were.
fn history(seed: u64) -> usize {
    let mut rng = SmallRng::seed_from_u64(seed);
    let dir = place();
    for name in ["d0", "d1"] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
    }
    let synced = Synced::default();
    let durability = [Durability::Strict, Durability::Ordered][rng.random_range(0..2)];
    let options = EngineOptions {
        durability,
        witness: Some(noting(&synced)),
        ..options()
    };
    let engine = Engine::open(dir.path(), options).unwrap();
    let (mut before, mut seen) = (BTreeMap::new(), 0);
    for round in 0..12 {
        for _ in 0..rng.random_range(0..12) {
            let _ = change(&engine, &mut rng);
        }
        let mut after = BTreeMap::new();
        scan(dir.path(), &mut after);
        engine.snapshot(format!("s{round}").as_bytes()).unwrap();
        engine.settle_snapshots().unwrap();
        let synced = std::mem::take(&mut *synced.lock());
        if round > 0 {
            assert!(!synced.contains(&None), "everything was synced");
            for (ino, time) in &after {
                if before.get(ino) != Some(time) {
                    seen += 1;
                    assert!(
                        synced.contains(&Some(*ino)),
                        "VIOLATION in round {round}: object {ino} has changed"
                    );
                }
            }
        }
        before = after;
        if rng.random_range(0..3) == 0 {
            let name = format!("s{}", rng.random_range(0..=round));
            let _ = engine.delete_snapshot(name.as_bytes(), Duration::ZERO);
            engine.upkeep().unwrap();
        }
    }
    seen
}

#[test]
fn every_object_that_has_changed_is_synced() {
    let (seeds, mut seen) = (seeds(60), 0);
    for &seed in &seeds {
        println!("COWFS_SEED={seed} repeats this case");
        seen += history(seed);
    }
    assert!(seen > seeds.len(), "{seen} objects had changed");
}

/// What lies behind the end of a long run of writes begins to go to the disk, its pre-images first (C8); what fails there
/// is left to fsync(2).
#[test]
fn pre_images_are_durable_before_anything_is_written_behind() {
    const MIB: u64 = 1 << 20;
    let dir = place();
    let file = std::fs::File::create(dir.path().join("f")).unwrap();
    file.write_all_at(&vec![1; 48 << 20], 0).unwrap();
    let (asked, failing) = (
        Arc::new(AtomicU32::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let place: Arc<Mutex<Option<Arc<Engine>>>> = Arc::default();
    let (asks, fails, there) = (asked.clone(), failing.clone(), place.clone());
    let options = EngineOptions {
        faults: Some(Arc::new(move |call| {
            if call != Call::Sync {
                return None;
            }
            if let Some(engine) = &*there.lock() {
                assert!(engine.store().is_all_durable());
                asks.fetch_add(1, Ordering::SeqCst);
            }
            let fails = fails.load(Ordering::SeqCst);
            fails.then_some(Failure::Errno(Errno::IO))
        })),
        ..options()
    };
    let engine = Engine::open(dir.path(), options).unwrap();
    engine.snapshot(b"s").unwrap();
    let node = find(&engine, root(&engine), &["f"]).unwrap();
    let OpenFile::Live(file) = engine.open_file(&node, libc::O_RDWR).unwrap() else {
        unreachable!("a live file");
    };
    *place.lock() = Some(engine.clone());
    let mut begun = 0;
    for at in (0..48 * MIB).step_by(MIB as usize) {
        engine
            .write(&file, at, &[2; MIB as usize], None, false)
            .unwrap();
        let Some(part) = file.note_written(at, MIB) else {
            continue;
        };
        assert!(!engine.store().is_all_durable(), "pre-images were kept");
        failing.store(begun == 1, Ordering::SeqCst);
        let before = asked.load(Ordering::SeqCst);
        let done = engine.write_behind(&part);
        assert_eq!(done.is_err(), begun == 1);
        failing.store(false, Ordering::SeqCst);
        begun += 1;
        assert!(asked.load(Ordering::SeqCst) > before);
    }
    assert!(begun >= 2, "{begun}");
    engine.fsync(&file, false).unwrap();
    *place.lock() = None;
    let mut old = vec![0; 48 << 20];
    let member = drive::snapshot(&engine, &["s", "f"]).unwrap();
    let member = engine.open_file(&member, libc::O_RDONLY).unwrap();
    assert_eq!(engine.read(&member, 0, &mut old).unwrap(), old.len());
    assert!(old.iter().all(|byte| *byte == 1));
    engine.close().unwrap();
}

/// Nothing waits for the disk because of a file that was closed, or holds the space of one that was removed.
#[test]
fn nothing_of_a_file_that_is_gone_is_written_behind() {
    const MIB: u64 = 1 << 20;
    for removed in [false, true] {
        let dir = place();
        std::fs::write(dir.path().join("f"), "").unwrap();
        let asked = Arc::new(AtomicU32::new(0));
        let asks = asked.clone();
        let options = EngineOptions {
            faults: Some(Arc::new(move |call| {
                asks.fetch_add(u32::from(call == Call::Sync), Ordering::SeqCst);
                None
            })),
            ..options()
        };
        let engine = Engine::open(dir.path(), options).unwrap();
        let node = find(&engine, root(&engine), &["f"]).unwrap();
        let OpenFile::Live(file) = engine.open_file(&node, libc::O_RDWR).unwrap() else {
            unreachable!("a live file");
        };
        let parts: Vec<_> = (0..48 * MIB)
            .step_by(MIB as usize)
            .filter_map(|at| {
                engine
                    .write(&file, at, &[2; MIB as usize], None, false)
                    .unwrap();
                file.note_written(at, MIB)
            })
            .collect();
        assert_eq!(parts.len(), 1, "nobody is told twice");
        let before = asked.load(Ordering::SeqCst);
        match removed {
            true => engine.remove(&root(&engine), b"f", false).unwrap(),
            false => drop(file),
        }
        engine.write_behind(&parts[0]).unwrap();
        assert_eq!(asked.load(Ordering::SeqCst), before, "removed: {removed}");
        engine.close().unwrap();
    }
}
