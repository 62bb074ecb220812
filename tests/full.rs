//! What becomes of snapshots when something that they show cannot be kept, on the engine without a mount.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "support/drive.rs"]
mod drive;
#[path = "support/faults.rs"]
mod faults;
#[path = "support/plain.rs"]
mod plain;

use cowfs::config::OnFull;
use cowfs::engine::Engine;
use cowfs::engine::nodes::Node;
use cowfs::error::Error;
use cowfs::ids::Epoch;
use cowfs::store::SnapshotState;
use cowfs::store::media::FileMedia;
use cowfs::sync::{Arc, Ordering};
use drive::{Tree, change, find, options, read, root, seen, snapshot, state, tree, write};
use faults::{Fault, FaultyMedia};
use plain::seeds;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

fn open(dir: &Path) -> Arc<Engine> {
    Engine::open(dir, options()).unwrap()
}

fn names_in_folder(engine: &Engine) -> Vec<String> {
    let dir_node = engine.lookup(&root(engine), b".snapshots").unwrap();
    let folder = engine.node(dir_node.node).unwrap();
    let dir = engine.open_dir(&folder).unwrap();
    let mut names = Vec::new();
    engine
        .read_dir(&dir, 0, |line| {
            names.push(String::from_utf8_lossy(&line.name).into_owned());
            Ok(true)
        })
        .unwrap();
    names.retain(|name| name != "." && name != "..");
    names
}

/// Sets the state of a snapshot in the store of a directory that is not in use.
fn mark(dir: &Path, name: &str, state: SnapshotState) {
    let store = cowfs::store::Store::open(&dir.join(".cowfs/store"), options().tuning).unwrap();
    let row = store
        .snapshots()
        .iter()
        .find(|info| info.name == name.as_bytes())
        .unwrap()
        .clone();
    let mut info = cowfs::store::SnapshotInfo::clone(&row);
    info.state = state;
    store.record_snapshot(&info).unwrap();
    store.close().unwrap();
}

/// An invalid snapshot is listed and can be deleted; nothing else of it can be had, and nothing is kept for it.
#[test]
fn an_invalid_snapshot_is_listed_and_never_read() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("d")).unwrap();
    std::fs::write(dir.path().join("d/f"), "deep").unwrap();
    std::fs::write(dir.path().join("f"), vec![1; 9000]).unwrap();
    let engine = open(dir.path());
    engine.snapshot(b"lost").unwrap();
    engine.snapshot(b"good").unwrap();
    write(&engine, "f", 0, b"new").unwrap();
    let before = snapshot(&engine, &["lost"]).unwrap();
    engine.close().unwrap();
    drop((before, engine));
    mark(dir.path(), "lost", SnapshotState::Invalid);
    let engine = open(dir.path());
    assert_eq!(names_in_folder(&engine), ["lost", "good"]);
    let lost = snapshot(&engine, &["lost"]).unwrap();
    let attr = engine.getattr(&lost, None).unwrap();
    assert_eq!(attr.image.mode & libc::S_IFMT, libc::S_IFDIR);
    let failed = |error: Option<Error>| assert_eq!(error.unwrap().errno(), Errno::IO);
    failed(engine.lookup(&lost, b"f").err());
    failed(engine.lookup(&lost, b"absent").err());
    failed(engine.open_dir(&lost).err());
    failed(engine.listxattr(&lost).err());
    failed(engine.getxattr(&lost, b"user.x").err());
    failed(snapshot(&engine, &["lost", "d"]).err());
    let Node::At(member) = &lost else {
        panic!("the node of a snapshot");
    };
    failed(engine.view_alone(member.snapshot).err());
    // What it shared with another is still there, and what it had alone is not kept.
    let f = snapshot(&engine, &["good", "f"]).unwrap();
    assert_eq!(read(&engine, &f).unwrap(), vec![1; 9000]);
    engine.upkeep().unwrap();
    assert_eq!(read(&engine, &f).unwrap(), vec![1; 9000]);
    engine.delete_snapshot(b"good", Duration::ZERO).unwrap();
    drop(f);
    engine.upkeep().unwrap();
    let records = engine.store().stats().appended;
    write(&engine, "f", 0, b"newer").unwrap();
    assert_eq!(engine.store().stats().appended, records);
    assert_eq!(engine.store().stats().live_payload_bytes, 0);
    engine.delete_snapshot(b"lost", Duration::ZERO).unwrap();
    assert!(names_in_folder(&engine).is_empty());
    engine.close().unwrap();
}

/// An engine whose journal is on a disk that fails when told to.
fn open_faulty(dir: &Path, on_full: OnFull, fault: &Arc<Fault>) -> Arc<Engine> {
    let mut options = options();
    options.space.on_full = on_full;
    // Makes the store, so that its directory is there.
    let engine = Engine::open(dir, options.clone()).unwrap();
    drop(engine);
    options.media = Some(Arc::new(FaultyMedia {
        inner: FileMedia::open(&dir.join(".cowfs/store/journal")).unwrap(),
        fault: fault.clone(),
        log_area: options.tuning.log_area,
    }));
    Engine::open(dir, options).unwrap()
}

/// What is left in a segment is moved to give the rest back: where there is no room for that it stays, and is not in the way of
/// those who wait for what has been given back.
#[test]
fn what_is_left_in_a_segment_stays_on_a_full_disk() {
    const BLOCK: usize = 4096;
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("f"), vec![1; 600 * BLOCK]).unwrap();
    let fault = Fault::new();
    let engine = open_faulty(dir.path(), OnFull::Drop, &fault);
    let change = |blocks: std::ops::Range<usize>| {
        // Not in order, so that nothing is kept ahead.
        for n in blocks.rev() {
            let at = (n * BLOCK) as u64;
            assert_eq!(write(&engine, "f", at, &[2; BLOCK]).unwrap(), BLOCK);
        }
    };
    // Of the first segment the newer snapshot needs a little.
    engine.snapshot(b"s1").unwrap();
    change(0..200);
    engine.snapshot(b"s2").unwrap();
    change(200..600);
    engine.store().sync().unwrap();
    let segments = || {
        let journal = dir.path().join(".cowfs/store/journal");
        let names = std::fs::read_dir(journal).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.filter(|name| name != "session").collect();
        names.sort();
        names
    };
    // What has been empty from the beginning goes first.
    engine.upkeep().unwrap();
    let before = segments();
    let is_right = || {
        let seen = seen(&engine, &["s2", "f"]).unwrap();
        seen.iter()
            .enumerate()
            .all(|(at, byte)| *byte == if at < 200 * BLOCK { 2 } else { 1 })
    };
    engine.delete_snapshot(b"s1", Duration::ZERO).unwrap();
    fault.full.store(true, Ordering::SeqCst);
    engine.upkeep().unwrap();
    assert!(segments().contains(&before[0]), "nothing was to be moved");
    assert!(is_right());
    fault.full.store(false, Ordering::SeqCst);
    engine.upkeep().unwrap();
    assert!(!segments().contains(&before[0]), "it was not moved");
    assert!(is_right());
    engine.close().unwrap();
}

/// In the mode `drop` a change goes through on a full disk: the old snapshots go, the newest becomes invalid, and all
/// of that outlives a crash.
#[test]
fn a_full_store_gives_way_to_a_change() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("f"), vec![1; 9000]).unwrap();
    let fault = Fault::new();
    let engine = open_faulty(dir.path(), OnFull::Drop, &fault);
    for name in ["a", "b", "c"] {
        engine.snapshot(name.as_bytes()).unwrap();
    }
    engine.hold_snapshot(b"b", true).unwrap();
    let of_c = snapshot(&engine, &["c", "f"]).unwrap();
    let open_c = engine.open_file(&of_c, libc::O_RDONLY).unwrap();
    fault.full.store(true, Ordering::SeqCst);
    write(&engine, "f", 0, &[2; 5000]).unwrap();
    assert_eq!(state(&engine, "a"), Some(SnapshotState::Deleting));
    assert_eq!(state(&engine, "b"), Some(SnapshotState::Invalid));
    assert_eq!(state(&engine, "c"), Some(SnapshotState::Invalid));
    assert_eq!(names_in_folder(&engine), ["b", "c"]);
    for name in ["b", "c"] {
        assert_eq!(seen(&engine, &[name, "f"]).unwrap_err().errno(), Errno::IO);
    }
    let mut buf = [0; 10];
    let error = engine.read(&open_c, 0, &mut buf).unwrap_err();
    assert_eq!(error.errno(), Errno::IO);
    assert_eq!(
        std::fs::read(dir.path().join("f")).unwrap()[..5000],
        [2; 5000]
    );
    drop((of_c, open_c));
    drop(engine);
    let engine = open(dir.path());
    assert_eq!(names_in_folder(&engine), ["b", "c"]);
    assert_eq!(seen(&engine, &["b", "f"]).unwrap_err().errno(), Errno::IO);
    engine.snapshot(b"d").unwrap();
    write(&engine, "f", 0, &[3; 9000]).unwrap();
    assert_eq!(seen(&engine, &["d", "f"]).unwrap()[..5000], [2; 5000]);
}

/// Only those snapshots are lost that would have missed what was not kept.
#[test]
fn a_snapshot_that_has_all_it_needs_stays() {
    for on_full in [OnFull::Drop, OnFull::Invalidate] {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("f"), vec![1; 9000]).unwrap();
        let fault = Fault::new();
        let engine = open_faulty(dir.path(), on_full, &fault);
        engine.snapshot(b"first").unwrap();
        engine.snapshot(b"old").unwrap();
        write(&engine, "f", 0, &[2; 9000]).unwrap();
        engine.snapshot(b"new").unwrap();
        fault.full.store(true, Ordering::SeqCst);
        write(&engine, "f", 0, &[3; 9000]).unwrap();
        assert_eq!(state(&engine, "new"), Some(SnapshotState::Invalid));
        assert_eq!(state(&engine, "old"), Some(SnapshotState::Ready));
        assert_eq!(seen(&engine, &["old", "f"]).unwrap(), vec![1; 9000]);
        let first = match on_full {
            OnFull::Drop => SnapshotState::Deleting,
            _ => SnapshotState::Ready,
        };
        assert_eq!(state(&engine, "first"), Some(first));
        // It is kept for no longer, and the older ones still are.
        fault.full.store(false, Ordering::SeqCst);
        engine.upkeep().unwrap();
        write(&engine, "f", 0, &[4; 9000]).unwrap();
        assert_eq!(seen(&engine, &["old", "f"]).unwrap(), vec![1; 9000]);
    }
}

/// In the mode `enospc` the change fails and nothing is lost; a name can still be removed.
#[test]
fn a_full_store_refuses_a_change() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("f"), vec![1; 9000]).unwrap();
    std::fs::write(dir.path().join("g"), "g").unwrap();
    let fault = Fault::new();
    let engine = open_faulty(dir.path(), OnFull::Enospc, &fault);
    engine.snapshot(b"a").unwrap();
    fault.full.store(true, Ordering::SeqCst);
    let error = write(&engine, "f", 0, &[2; 5000]).unwrap_err();
    assert_eq!(error.errno(), Errno::NOSPC);
    assert_eq!(std::fs::read(dir.path().join("f")).unwrap(), vec![1; 9000]);
    engine.remove(&root(&engine), b"g", false).unwrap();
    assert_eq!(seen(&engine, &["a", "g"]).unwrap(), b"g");
    assert_eq!(seen(&engine, &["a", "f"]).unwrap(), vec![1; 9000]);
    engine.delete_snapshot(b"a", Duration::ZERO).unwrap();
    write(&engine, "f", 0, &[2; 5000]).unwrap();
}

/// A held snapshot is deleted by nobody.
#[test]
fn a_held_snapshot_is_not_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path());
    engine.snapshot(b"a").unwrap();
    engine.hold_snapshot(b"a", true).unwrap();
    engine.rename_snapshot(b"a", b"b").unwrap();
    let error = engine.delete_snapshot(b"b", Duration::ZERO).unwrap_err();
    assert_eq!(error.errno(), Errno::BUSY);
    assert!(matches!(error, Error::SnapshotHeld(_)));
    drop(engine);
    let engine = open(dir.path());
    assert!(engine.delete_snapshot(b"b", Duration::ZERO).is_err());
    engine.hold_snapshot(b"b", false).unwrap();
    engine.delete_snapshot(b"b", Duration::ZERO).unwrap();
    assert!(engine.hold_snapshot(b"b", true).is_err());
}

/// Under a limit the oldest snapshots go before the store is full, held ones and the newest stay, and all that is
/// there is right.
#[test]
fn old_snapshots_make_room_under_a_limit() {
    let dir = tempfile::tempdir().unwrap();
    let size = 4 << 20;
    std::fs::write(dir.path().join("f"), vec![0; size]).unwrap();
    let mut options = options();
    options.space.limit = Some(32 << 20);
    let engine = Engine::open(dir.path(), options).unwrap();
    for cut in 0..24_u8 {
        engine.snapshot(format!("s{cut}").as_bytes()).unwrap();
        if cut == 3 {
            engine.hold_snapshot(b"s3", true).unwrap();
        }
        for at in 0..4 {
            write(&engine, "f", at << 20, &vec![cut + 1; 1 << 20]).unwrap();
            engine.upkeep().unwrap();
        }
        let names = names_in_folder(&engine);
        assert!(names.contains(&format!("s{cut}")), "{names:?}");
        for name in &names {
            let old: u8 = name[1..].parse().unwrap();
            let f = seen(&engine, &[name, "f"]).unwrap();
            assert_eq!(f, vec![old; 1 << 20], "{name} after {cut}");
        }
        let usage = engine.space().unwrap();
        assert!(usage.used < 32 << 20, "{usage:?}");
    }
    let names = names_in_folder(&engine);
    assert!(names.contains(&"s3".into()) && names.len() < 8, "{names:?}");
    // What is removed counts: the file moves aside at once, and old snapshots make room for it.
    engine.snapshot(b"last").unwrap();
    engine.remove(&root(&engine), b"f", false).unwrap();
    engine.upkeep().unwrap();
    let usage = engine.space().unwrap();
    assert!(usage.retained >= size as u64, "{usage:?}");
    assert!(seen(&engine, &["last", "f"]).is_ok());
}

fn fault_case(seed: u64) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let dir = tempfile::tempdir().unwrap();
    let fault = Fault::new();
    let modes = [OnFull::Drop, OnFull::Invalidate, OnFull::Enospc];
    let on_full = modes[rng.random_range(0..3)];
    let mut engine = open_faulty(dir.path(), on_full, &fault);
    let mut live = Tree::new();
    let mut cuts: BTreeMap<String, Tree> = BTreeMap::new();
    let (mut failed, mut made) = (0, 0);
    for step in 0..120 {
        let context = format!("COWFS_SEED={seed} step {step} {on_full:?}");
        if rng.random_range(0..4) == 0 {
            let errno =
                [Errno::IO, Errno::NOSPC, Errno::DQUOT, Errno::MFILE][rng.random_range(0..4)];
            fault.arm(rng.random_range(0..5), errno, rng.random());
        }
        match rng.random_range(0..12) {
            0 => {
                made += 1;
                let name = format!("s{made}");
                match engine.snapshot(name.as_bytes()) {
                    Ok(_) => drop(cuts.insert(name, live.clone())),
                    Err(_) => failed += 1,
                }
            }
            1 => {
                if let Some(name) = cuts.keys().next().cloned()
                    && engine
                        .delete_snapshot(name.as_bytes(), Duration::ZERO)
                        .is_ok()
                {
                    cuts.remove(&name);
                }
            }
            2 => drop(engine.upkeep()),
            _ => {
                let (done, after) = change(&engine, &mut rng, &live);
                fault.disarm();
                let now = tree(&engine, &root(&engine)).unwrap();
                match done {
                    Ok(()) => assert_eq!(now, after, "{context}"),
                    Err(error) => {
                        failed += 1;
                        assert_eq!(now, live, "{context}: {error}");
                    }
                }
                live = now;
            }
        }
        fault.disarm();
        let crash = engine.store().is_poisoned() || rng.random_range(0..20) == 0;
        if crash {
            drop(engine);
            engine = open_faulty(dir.path(), on_full, &fault);
        }
        check_cuts(&engine, &mut cuts, on_full, &context);
    }
    println!("seed {seed}: {failed} failures");
}

/// Every snapshot shows what it showed, or is gone or invalid as the mode allows.
fn check_cuts(engine: &Engine, cuts: &mut BTreeMap<String, Tree>, on_full: OnFull, context: &str) {
    let names = cuts.keys().cloned().collect::<Vec<_>>();
    for name in names {
        match state(engine, &name) {
            Some(SnapshotState::Ready) => {
                let root = snapshot(engine, &[&name]).unwrap();
                assert_eq!(
                    tree(engine, &root).unwrap(),
                    cuts[&name],
                    "{name}, {context}"
                );
            }
            Some(SnapshotState::Invalid) if on_full != OnFull::Enospc => {
                let root = snapshot(engine, &[&name]).unwrap();
                assert_eq!(tree(engine, &root).unwrap_err().errno(), Errno::IO);
            }
            None | Some(SnapshotState::Deleting) => {
                // A deletion that was refused may have been recorded all the same.
                cuts.remove(&name);
            }
            other => panic!("{name} is {other:?}, {context}"),
        }
    }
}

/// Whatever call of the journal fails, and however: the live tree is as before the operation or as after it, every
/// snapshot is right or says that it is not, and what was acknowledged is there after opening anew.
#[test]
fn no_fault_of_the_journal_mixes_anything() {
    for seed in seeds(40) {
        println!("COWFS_SEED={seed} repeats this case");
        fault_case(seed);
    }
}

/// What a user syncs is synced on a full disk too: no segment that is made early stands in the way.
#[test]
fn a_full_disk_does_not_fail_a_sync() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("f"), vec![1; 1 << 20]).unwrap();
    let fault = Fault::new();
    let engine = open_faulty(dir.path(), OnFull::Drop, &fault);
    engine.snapshot(b"a").unwrap();
    // More than half a segment, so that the next one is due.
    write(&engine, "f", 0, &[2; 700_000]).unwrap();
    fault.full.store(true, Ordering::SeqCst);
    engine.store().sync().unwrap();
    engine.upkeep().unwrap();
    assert_eq!(seen(&engine, &["a", "f"]).unwrap(), vec![1; 1 << 20]);
    engine.delete_snapshot(b"a", Duration::ZERO).unwrap();
    // What is to be freed lies in the last segment, which can be left only for another.
    assert!(engine.upkeep().unwrap_err().is_full());
    assert_eq!(engine.store().stats().live_payload_bytes, 0);
    fault.full.store(false, Ordering::SeqCst);
    engine.upkeep().unwrap();
    assert!(engine.store().stats().journal_bytes < 300_000);
}

/// More attributes than an inode has room for give ENOSPC (ext4), on a disk that is not full: no snapshot is given up.
#[test]
fn what_never_fits_costs_no_snapshot() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    std::fs::write(dir.path().join("f"), "f").unwrap();
    let engine = open(dir.path());
    engine.snapshot(b"a").unwrap();
    let f = find(&engine, root(&engine), &["f"]).unwrap();
    let set = |n: u32| {
        let name = format!("user.{n}");
        engine.setxattr(&f, name.as_bytes(), &[7; 4000], 0, None)
    };
    let refused = (0..100).find_map(|n| set(n).err());
    if let Some(error) = refused {
        assert_eq!(error.errno(), Errno::NOSPC);
    }
    assert_eq!(state(&engine, "a"), Some(SnapshotState::Ready));
    assert_eq!(seen(&engine, &["a", "f"]).unwrap(), b"f");
}

/// One round of upkeep deletes as many snapshots as it takes to have room again, also beside the thread that does so.
#[test]
fn a_round_of_upkeep_makes_enough_room() {
    const SIZE: usize = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("f"), vec![0; SIZE]).unwrap();
    let engine = open(dir.path());
    for n in 1..=12 {
        engine.snapshot(format!("s{n}").as_bytes()).unwrap();
        assert_eq!(write(&engine, "f", 0, &[n; SIZE]).unwrap(), SIZE);
    }
    engine.close().unwrap();
    drop(engine);
    let mut limited = options();
    limited.space.limit = Some(6 * SIZE as u64);
    limited.upkeep = Some(Duration::from_secs(3600));
    let engine = Engine::open(dir.path(), limited).unwrap();
    engine.upkeep().unwrap();
    let left = engine.store().snapshots();
    assert!(left.len() <= 6, "{} are left", left.len());
    assert_eq!(left.last().map(|s| s.epoch), Some(Epoch(12)));
    assert!(seen(&engine, &["s12", "f"]).unwrap() == [11; SIZE]);
    engine.close().unwrap();
}
