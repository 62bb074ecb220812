//! The store as a whole: crashes, damage, rotation, compaction, faults.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "support/plain.rs"]
mod plain;

use cowfs::error::{Error, Result};
use cowfs::ids::{BLOCK, Epoch, Ino, Lsn};
use cowfs::store::media::{FileMedia, Media, MediaFile};
use cowfs::store::{
    AttrImage, EntryImage, ExtentData, ObjectHandle, Retained, SnapshotInfo, SnapshotState, Store,
    StoreOptions, Timestamp,
};
use cowfs::sync::{Arc, AtomicBool, AtomicU32, Condvar, Mutex, Ordering};
use plain::copy_tree;
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

const FILE: Ino = Ino(42);
const DIR: Ino = Ino(1);

fn options() -> StoreOptions {
    StoreOptions::default()
}

fn tiny() -> StoreOptions {
    StoreOptions {
        in_memory_index: false,
        log_area: 16 << 10,
        segment_size: 64 << 10,
        boot: None,
        ..StoreOptions::default()
    }
}

fn open(dir: &tempfile::TempDir, options: StoreOptions) -> Store {
    Store::open(&dir.path().join("s"), options).unwrap()
}

fn attr(mode: u32) -> AttrImage {
    AttrImage {
        mode,
        xattrs: vec![(b"user.a".to_vec(), vec![mode as u8; 40])],
        ..AttrImage::default()
    }
}

fn snapshot(epoch: u64) -> SnapshotInfo {
    SnapshotInfo {
        epoch: Epoch(epoch),
        name: format!("snap{epoch}").into_bytes(),
        created: Timestamp {
            sec: epoch as i64,
            nsec: 5,
        },
        held: false,
        state: SnapshotState::Ready,
    }
}

fn blocks(byte: u8, count: usize) -> Vec<u8> {
    vec![byte; count * BLOCK]
}

/// First byte of each kept block of the first chunk, as snapshot `k` has it.
fn read(store: &Store, ino: Ino, k: u64) -> Result<Vec<(u64, u8)>> {
    let mut found = Vec::new();
    for extent in store.extents_at(ino, Epoch(k), 0)? {
        for i in 0..extent.blocks {
            let mut block = blocks(1, 1);
            store.read_extent(&extent, i, &mut block)?;
            found.push((extent.first_block + u64::from(i), block[0]));
        }
    }
    Ok(found)
}

/// One of everything, so that a look at it after a crash tells whether anything is missing.
fn fill(store: &Store) {
    store.record_snapshot(&snapshot(1)).unwrap();
    store.keep_attr(FILE, Epoch(1), &attr(0o644)).unwrap();
    let big = AttrImage {
        xattrs: vec![(b"user.big".to_vec(), vec![3; 60_000]); 3],
        ..attr(0o600)
    };
    store.keep_attr(Ino(43), Epoch(1), &big).unwrap();
    let was = EntryImage {
        ino: FILE,
        kind: 8,
        handle: ObjectHandle {
            kind: 1,
            bytes: vec![1; 20].into(),
        },
    };
    store
        .keep_entry(DIR, b"name", Epoch(1), Some(&was))
        .unwrap();
    store
        .keep_entry(DIR, "näme\n".as_bytes(), Epoch(1), None)
        .unwrap();
    store
        .keep_extent(FILE, Epoch(1), 2, ExtentData::Bytes(&blocks(7, 3)))
        .unwrap();
    store
        .keep_extent(FILE, Epoch(1), 9, ExtentData::Hole { blocks: 600 })
        .unwrap();
    store.record_birth(Ino(50), Epoch(1)).unwrap();
    store.record_retained(&retained(60, 0, 1)).unwrap();
    store.record_retained(&retained(61, 0, 1)).unwrap();
    store.forget_retained(Ino(61)).unwrap();
}

fn retained(ino: u64, birth: u64, removed: u64) -> Retained {
    let handle = ObjectHandle {
        kind: 1,
        bytes: vec![2; 12].into(),
    };
    let origin = Some((DIR, handle.clone(), b"old".to_vec()));
    Retained {
        ino: Ino(ino),
        kind: 8,
        handle,
        birth: Epoch(birth),
        removed: Epoch(removed),
        origin,
        whiteout: false,
    }
}

fn assert_filled(store: &Store) {
    assert_eq!(store.damage(), Vec::<String>::new());
    assert_eq!((store.epoch(), store.newest()), (Epoch(1), Some(Epoch(1))));
    assert!(store.snapshots().iter().eq([&snapshot(1)]));
    assert_eq!(
        store.attr_at(FILE, Epoch(1)).unwrap(),
        Some((Epoch(1), attr(0o644)))
    );
    assert_eq!(store.attr_at(FILE, Epoch(2)).unwrap(), None);
    assert_eq!(
        store.attr_at(Ino(43), Epoch(0)).unwrap().unwrap().1.xattrs[2].1,
        vec![3; 60_000]
    );
    assert_eq!(
        store
            .entry_at(DIR, b"name", Epoch(1))
            .unwrap()
            .unwrap()
            .1
            .unwrap()
            .ino,
        FILE
    );
    assert_eq!(store.entries_at(DIR, Epoch(1)).unwrap().len(), 2);
    assert_eq!(store.entries_at(DIR, Epoch(2)).unwrap().len(), 0);
    let first: Vec<_> = read(store, FILE, 1).unwrap().into_iter().take(4).collect();
    assert_eq!(first, [(2, 7), (3, 7), (4, 7), (9, 0)]);
    assert_eq!(
        store.kept_blocks(FILE, Epoch(1), 2).unwrap(),
        [u64::MAX, (1 << 33) - 1, 0, 0]
    );
    assert_eq!(store.birth(Ino(50)).unwrap(), Some(Epoch(1)));
    assert_eq!(store.retained_all().unwrap(), [retained(60, 0, 1)]);
}

#[test]
fn everything_survives_a_kill_and_an_orderly_end_and_the_loss_of_the_index() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, options());
    let uuid = store.uuid();
    fill(&store);
    assert_filled(&store);
    drop(store);
    let store = open(&dir, options());
    assert_eq!(store.uuid(), uuid);
    assert_filled(&store);
    store.checkpoint().unwrap();
    assert_eq!(store.memtable_bytes(), 0);
    assert_filled(&store);
    store.close().unwrap();
    drop(store);
    let store = open(&dir, options());
    assert_filled(&store);
    drop(store);
    std::fs::remove_dir_all(dir.path().join("s/index")).unwrap();
    let store = open(&dir, options());
    assert_filled(&store);
    drop(store);
    let store = open(
        &dir,
        StoreOptions {
            in_memory_index: true,
            ..options()
        },
    );
    assert_filled(&store);
}

#[test]
fn a_store_that_is_not_ours_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, options());
    let path = dir.path().join("s");
    let refused = |why: &str| {
        let error = Store::open(&path, options()).err().unwrap();
        assert!(matches!(error, Error::Store { .. }), "{error}");
        assert!(error.to_string().contains(why), "{error}");
    };
    refused("in use");
    drop(store);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o750)).unwrap();
    refused("chmod");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
    let format = std::fs::read_to_string(path.join("format")).unwrap();
    std::fs::write(path.join("format"), "cowfs-store 2\n").unwrap();
    refused("cowfs-store 1");
    std::fs::write(path.join("format"), "cowfs-store 1\nuuid x\n").unwrap();
    refused("uuid");
    std::fs::remove_file(path.join("format")).unwrap();
    drop(Store::open(&path, options()));
    std::fs::write(path.join("format"), format).unwrap();
    open(&dir, options());
}

fn segments(dir: &tempfile::TempDir) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir.path().join("s/journal")).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    // The session file is no segment.
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "seg"));
    paths.sort();
    paths
}

fn offset(lsn: Lsn) -> u64 {
    lsn.0 & 0xffff_ffff
}

fn overwrite(path: &Path, at: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

#[test]
fn a_torn_tail_is_cut_at_the_first_bad_record() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, options());
    store.record_snapshot(&snapshot(1)).unwrap();
    let lsns: Vec<Lsn> = (0..5)
        .map(|i| store.keep_attr(Ino(i), Epoch(1), &attr(i as u32)).unwrap())
        .collect();
    drop(store);
    overwrite(
        segments(&dir).last().unwrap(),
        offset(lsns[3]) + 30,
        &[0xee; 4],
    );
    for _ in 0..2 {
        let store = open(&dir, options());
        assert_eq!(store.damage(), Vec::<String>::new());
        let there = |i| store.attr_at(Ino(i), Epoch(1)).unwrap().is_some();
        // The last was written after the torn one, so it was not acknowledged as durable either.
        assert_eq!(
            (0..5).map(there).collect::<Vec<_>>(),
            [true, true, true, false, false]
        );
        assert_eq!(store.snapshots().len(), 1);
        store.keep_attr(Ino(9), Epoch(1), &attr(9)).unwrap();
    }
}

#[test]
fn damage_before_the_seal_is_reported_and_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, options());
    store.record_snapshot(&snapshot(1)).unwrap();
    let lsns: Vec<Lsn> = (0..5)
        .map(|i| store.keep_attr(Ino(i), Epoch(1), &attr(i as u32)).unwrap())
        .collect();
    store.close().unwrap();
    drop(store);
    open(&dir, options()).close().unwrap();
    overwrite(&segments(&dir)[0], offset(lsns[1]) + 4, &[0xee; 4]);
    // The index still has the record.
    let store = open(&dir, options());
    assert!(store.attr_at(Ino(1), Epoch(1)).unwrap().is_some());
    drop(store);
    std::fs::remove_dir_all(dir.path().join("s/index")).unwrap();
    let store = open(&dir, options());
    assert_eq!(store.damage().len(), 1, "{:?}", store.damage());
    let there = |i| store.attr_at(Ino(i), Epoch(1)).unwrap().is_some();
    assert_eq!(
        (0..5).map(there).collect::<Vec<_>>(),
        [true, false, true, true, true]
    );
}

/// A journal whose end is damaged over its seal looks like one that a crash has torn. The session file knows where it ended.
#[test]
fn a_journal_that_is_cut_short_is_noticed() {
    for to_nothing in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let options = StoreOptions {
            boot: Some(7),
            ..options()
        };
        let (mut first, mut end) = (0, 0);
        for session in 0..2 {
            let store = open(&dir, options.clone());
            store.begin_session().unwrap();
            if session == 0 {
                store.record_snapshot(&snapshot(1)).unwrap();
                let kept = (0..5).map(|i| store.keep_attr(Ino(i), Epoch(1), &attr(i as u32)));
                let kept: Vec<Lsn> = kept.map(Result::unwrap).collect();
                (first, end) = (offset(kept[2]), offset(kept[4]) + 200);
            }
            // The second appends nothing, and knows it still.
            store.close().unwrap();
        }
        let segment = segments(&dir).remove(0);
        match to_nothing {
            true => File::create(&segment).map(drop).unwrap(),
            false => overwrite(&segment, first, &vec![0; (end - first) as usize]),
        }
        if !to_nothing {
            // The index has everything.
            let store = open(&dir, options.clone());
            let ready = |info: &SnapshotInfo| info.state == SnapshotState::Ready;
            assert!(store.snapshots().iter().any(ready));
            assert!(store.attr_at(Ino(4), Epoch(1)).unwrap().is_some());
        }
        std::fs::remove_dir_all(dir.path().join("s/index")).unwrap();
        for round in 0..2 {
            let store = open(&dir, options.clone());
            let states: Vec<_> = store.snapshots().iter().map(|info| info.state).collect();
            assert!(states.iter().all(|state| *state == SnapshotState::Invalid));
            assert_eq!(states.is_empty(), to_nothing);
            assert_eq!(store.damage().is_empty(), round > 0, "{:?}", store.damage());
            store.begin_session().unwrap();
            store.close().unwrap();
        }
    }
}

/// That something was durable does not mean that the index has it.
#[test]
fn damage_before_the_end_of_a_journal_that_was_closed_is_damage() {
    for with_session in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let options = StoreOptions {
            boot: with_session.then_some(7),
            ..options()
        };
        let store = open(&dir, options.clone());
        store.begin_session().unwrap();
        store.record_snapshot(&snapshot(1)).unwrap();
        let kept = (0..5).map(|i| store.keep_attr(Ino(i), Epoch(1), &attr(i as u32)));
        let kept: Vec<Lsn> = kept.map(Result::unwrap).collect();
        store.close().unwrap();
        drop(store);
        overwrite(&segments(&dir)[0], offset(kept[2]) + 30, &[0xee; 4]);
        std::fs::remove_dir_all(dir.path().join("s/index")).unwrap();
        let store = open(&dir, options);
        let states: Vec<_> = store.snapshots().iter().map(|info| info.state).collect();
        assert_eq!(states, [SnapshotState::Invalid], "{with_session}");
        assert_eq!(store.damage().len(), 1);
    }
}

/// An index that has lost a part of itself may bear numbers of cuts that nothing else tells of: they are spent (S2).
#[test]
fn no_cut_gets_a_number_that_the_index_bears() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, options());
    store.record_snapshot(&snapshot(1)).unwrap();
    store.keep_attr(FILE, Epoch(1), &attr(1)).unwrap();
    store.close().unwrap();
    drop(store);
    // It gives its lock back a moment after it was dropped.
    let open_index = || sled::open(dir.path().join("s/index"));
    let index = (0..500).find_map(|_| {
        let opened = open_index().ok();
        opened
            .is_none()
            .then(|| std::thread::sleep(Duration::from_millis(10)));
        opened
    });
    let index = index.unwrap_or_else(|| open_index().unwrap());
    // docs/FORMAT.md, "Index": the attributes of an object are kept under a label.
    let key = [&b"t"[..], &9_u64.to_be_bytes(), &42_u64.to_be_bytes(), b"a"].concat();
    index.insert(key, b"").unwrap();
    index.flush().unwrap();
    drop(index);
    assert_eq!(open(&dir, options()).epoch(), Epoch(9));
}

#[test]
fn a_damaged_payload_is_never_served() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, options());
    fill(&store);
    let path = &segments(&dir)[0];
    let bytes = std::fs::read(path).unwrap();
    let payload = (0..bytes.len())
        .step_by(BLOCK)
        .find(|at| bytes[*at..].starts_with(&blocks(7, 3)))
        .unwrap();
    overwrite(path, (payload + BLOCK + 17) as u64, &[8]);
    let extent = store.extents_at(FILE, Epoch(1), 0).unwrap().remove(0);
    let mut buf = blocks(1, 3);
    assert!(matches!(
        store.read_extent(&extent, 0, &mut buf),
        Err(Error::Corrupt(_))
    ));
    assert_eq!(buf, blocks(0, 3));
    store.read_extent(&extent, 2, &mut buf[..BLOCK]).unwrap();
    assert_eq!(buf[..BLOCK], blocks(7, 1));
    assert!(matches!(
        store.read_extent(&extent, 2, &mut buf),
        Err(Error::Os(Errno::INVAL))
    ));
}

#[test]
fn an_index_that_is_stale_ahead_foreign_or_garbage_is_made_right() {
    let dir = tempfile::tempdir().unwrap();
    let (index, old) = (dir.path().join("s/index"), dir.path().join("old"));
    open(&dir, options()).close().unwrap();
    copy_tree(&index, &old);
    let replace = |with: &Path| {
        std::fs::remove_dir_all(&index).unwrap();
        copy_tree(with, &index);
    };
    let store = open(&dir, options());
    fill(&store);
    store.close().unwrap();
    drop(store);
    // Stale: an earlier state of the same index.
    replace(&old);
    assert_filled(&open(&dir, options()));
    // Ahead: of a journal whose last segments are gone, which is damage.
    let store = open(&dir, options());
    store.keep_attr(Ino(99), Epoch(1), &attr(1)).unwrap();
    store.close().unwrap();
    drop(store);
    std::fs::remove_file(segments(&dir).last().unwrap()).unwrap();
    let store = open(&dir, options());
    assert_eq!(store.damage().len(), 1, "{:?}", store.damage());
    // The index has what the journal has lost.
    assert!(store.attr_at(Ino(99), Epoch(1)).unwrap().is_some());
    assert_eq!(
        store.attr_at(FILE, Epoch(1)).unwrap(),
        Some((Epoch(1), attr(0o644)))
    );
    store.close().unwrap();
    drop(store);
    // What held nothing that the index needs is no damage, which would be told of at every mount.
    let dir2 = tempfile::tempdir().unwrap();
    let store = open(&dir2, options());
    fill(&store);
    store.make_ready().unwrap();
    store.close().unwrap();
    drop(store);
    std::fs::remove_dir_all(dir2.path().join("s/index")).unwrap();
    // The index is made anew, and ends in a segment with the table alone.
    open(&dir2, options()).close().unwrap();
    let last = segments(&dir2).pop().unwrap();
    assert!(segments(&dir2).len() > 1);
    std::fs::remove_file(last).unwrap();
    for _ in 0..2 {
        let store = open(&dir2, options());
        assert_eq!(store.damage(), [""; 0]);
        assert_filled(&store);
        store.close().unwrap();
    }
    // Foreign.
    let other = tempfile::tempdir().unwrap();
    open(&other, options()).close().unwrap();
    replace(&other.path().join("s/index"));
    assert_filled(&open(&dir, options()));
    // Garbage, in several places.
    for round in 0..6_u64 {
        open(&dir, options()).close().unwrap();
        let db = index.join("db");
        let len = std::fs::metadata(&db).unwrap().len();
        overwrite(&db, len * round / 6 + 100, &vec![0xa5; (len / 8) as usize]);
        assert_filled(&open(&dir, options()));
    }
    std::fs::write(index.join("conf"), "nonsense").unwrap();
    assert_filled(&open(&dir, options()));
}

fn reclaim_all(store: &Store) -> Vec<Retained> {
    let released = std::cell::RefCell::new(Vec::new());
    let release = |retained: &Retained| {
        released.borrow_mut().push(retained.clone());
        Ok(())
    };
    while store.reclaim(&release).unwrap() {}
    released.into_inner()
}

fn disk_bytes(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| entry.metadata().unwrap().blocks() * 512)
        .sum()
}

#[test]
fn segments_rotate_and_their_space_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let journal = dir.path().join("s/journal");
    let store = open(&dir, tiny());
    for epoch in 1..=3 {
        store.record_snapshot(&snapshot(epoch)).unwrap();
        for i in 0..60 {
            let data = blocks((epoch * 60 + i) as u8, 2);
            store
                .keep_extent(Ino(i), Epoch(epoch), 5, ExtentData::Bytes(&data))
                .unwrap();
            store
                .keep_attr(Ino(i), Epoch(epoch), &attr(i as u32))
                .unwrap();
        }
    }
    store.record_retained(&retained(60, 1, 2)).unwrap();
    // Larger than a segment.
    store
        .keep_extent(Ino(900), Epoch(3), 0, ExtentData::Bytes(&blocks(9, 100)))
        .unwrap();
    assert!(segments(&dir).len() > 10);
    assert!(disk_bytes(&journal) > 460 * BLOCK as u64);
    store.delete_snapshot(Epoch(2)).unwrap();
    assert_eq!(reclaim_all(&store), [retained(60, 1, 2)]);
    assert_eq!(
        store.stats().live_payload_bytes,
        (2 * 120 + 100) * BLOCK as u64
    );
    for (epoch, i) in [(1, 0), (1, 59), (3, 0), (3, 59)] {
        let byte = (epoch * 60 + i) as u8;
        assert_eq!(read(&store, Ino(i), epoch).unwrap(), [(5, byte), (6, byte)]);
    }
    store.delete_snapshot(Epoch(1)).unwrap();
    store.delete_snapshot(Epoch(3)).unwrap();
    assert_eq!(store.newest(), None);
    reclaim_all(&store);
    let stats = store.stats();
    assert_eq!((stats.records, stats.snapshots), (0, 0), "{stats:?}");
    assert!(
        disk_bytes(&journal) < 100 << 10,
        "{} {stats:?}",
        disk_bytes(&journal)
    );
    drop(store);
    assert_eq!(open(&dir, tiny()).epoch(), Epoch(3));
}

#[test]
fn a_long_walk_goes_in_steps_and_takes_everything() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, options());
    store.record_snapshot(&snapshot(1)).unwrap();
    store.record_snapshot(&snapshot(2)).unwrap();
    let name = |i: u64| format!("name{i}").into_bytes();
    let names: Vec<_> = (0..3000).map(name).collect();
    let entries: Vec<_> = names
        .iter()
        .map(|name| (DIR, name.as_slice(), None))
        .collect();
    store.keep_entries(Epoch(1), &entries[..1000]).unwrap();
    store.keep_entries(Epoch(2), &entries).unwrap();
    for i in 1000..2200 {
        store.record_birth(Ino(i), Epoch(1)).unwrap();
        store.record_retained(&retained(i, 1, 2)).unwrap();
    }
    // Every aspect that the walk looks at is to be found on its second page too.
    store
        .keep_extent(Ino(5000), Epoch(2), 0, ExtentData::Bytes(&blocks(1, 4000)))
        .unwrap();
    store.record_birth(Ino(5000), Epoch(1)).unwrap();
    store.delete_snapshot(Epoch(2)).unwrap();
    let mut released = reclaim_all(&store);
    released.sort_by_key(|retained| retained.ino);
    assert_eq!(
        released,
        (1000..2200).map(|i| retained(i, 1, 2)).collect::<Vec<_>>()
    );
    // 1000 names of label 1, 2000 that have label 2 alone and so serve snapshot 1, and the births.
    assert_eq!(store.stats().records, 3000 + 1201);
    assert_eq!(store.stats().live_payload_bytes, 0);
    assert_eq!(store.entries_at(DIR, Epoch(1)).unwrap().len(), 3000);
    assert_eq!(store.retained_all().unwrap(), []);
    store.delete_snapshot(Epoch(1)).unwrap();
    reclaim_all(&store);
    assert_eq!(store.stats().records, 0);
}

#[test]
fn a_sparse_segment_is_compacted_while_readers_hold_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, tiny());
    store.record_snapshot(&snapshot(1)).unwrap();
    store
        .keep_extent(FILE, Epoch(1), 0, ExtentData::Bytes(&blocks(1, 1)))
        .unwrap();
    store
        .keep_extent(FILE, Epoch(1), 5, ExtentData::Hole { blocks: 1 })
        .unwrap();
    store.keep_attr(FILE, Epoch(1), &attr(1)).unwrap();
    store.record_birth(Ino(5), Epoch(1)).unwrap();
    store.record_snapshot(&snapshot(2)).unwrap();
    for i in 0..40 {
        // Born in epoch 1: what is labelled 2 serves snapshot 2 only, but for the last.
        if i < 39 {
            store.record_birth(Ino(i), Epoch(1)).unwrap();
        } else {
            store
                .keep_extent(Ino(i), Epoch(1), 0, ExtentData::Bytes(&blocks(3, 1)))
                .unwrap();
        }
        store
            .keep_extent(Ino(i), Epoch(2), 0, ExtentData::Bytes(&blocks(2, 2)))
            .unwrap();
    }
    let held = store.extents_at(FILE, Epoch(1), 0).unwrap();
    let first = segments(&dir).remove(0);
    store.delete_snapshot(Epoch(2)).unwrap();
    reclaim_all(&store);
    assert!(!first.exists());
    let mut buf = blocks(0, 1);
    store.read_extent(&held[0], 0, &mut buf).unwrap();
    assert_eq!(buf, blocks(1, 1));
    let check = |store: &Store| {
        assert_eq!(read(store, FILE, 1).unwrap(), [(0, 1), (5, 0)]);
        assert_eq!(read(store, Ino(39), 1).unwrap(), [(0, 3), (1, 2)]);
        assert_eq!(
            store.attr_at(FILE, Epoch(1)).unwrap(),
            Some((Epoch(1), attr(1)))
        );
        assert_eq!(store.birth(Ino(5)).unwrap(), Some(Epoch(1)));
        assert_eq!(store.damage(), Vec::<String>::new());
    };
    check(&store);
    drop(store);
    check(&open(&dir, tiny()));
    std::fs::remove_dir_all(dir.path().join("s/index")).unwrap();
    check(&open(&dir, tiny()));
}

/// A medium whose writes or syncs fail when told to.
struct Faulty {
    inner: FileMedia,
    fault: Arc<Fault>,
}

#[derive(Default)]
struct Fault {
    write: AtomicU32,
    /// How often zeros were to be written.
    zeros: AtomicU32,
    sync: AtomicBool,
    /// Whoever reads this segment next tells so, and waits for a word.
    reading: Mutex<Option<Awaited>>,
}

/// A segment, who is told that it is read, and whose word the reader waits for.
type Awaited = (u32, mpsc::Sender<()>, mpsc::Receiver<()>);

struct FaultyFile(Arc<dyn MediaFile>, Arc<Fault>, u32);

impl Faulty {
    fn wrap(&self, file: Arc<dyn MediaFile>, number: u32) -> Arc<dyn MediaFile> {
        Arc::new(FaultyFile(file, self.fault.clone(), number))
    }
}

impl Media for Faulty {
    fn session(&self) -> Result<Arc<dyn MediaFile>> {
        self.inner.session()
    }

    fn list(&self) -> Result<Vec<u32>> {
        self.inner.list()
    }
    fn create(&self, number: u32) -> Result<Arc<dyn MediaFile>> {
        Ok(self.wrap(self.inner.create(number)?, number))
    }
    fn open(&self, number: u32) -> Result<Option<Arc<dyn MediaFile>>> {
        let file = self.inner.open(number)?;
        Ok(file.map(|file| self.wrap(file, number)))
    }
    fn remove(&self, number: u32) -> Result<()> {
        self.inner.remove(number)
    }
    fn sync_names(&self) -> Result<()> {
        self.inner.sync_names()
    }
    fn allocated(&self, number: u32) -> Result<u64> {
        self.inner.allocated(number)
    }
    fn writes_in_place(&self) -> bool {
        true
    }
}

impl MediaFile for FaultyFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let waits = self
            .1
            .reading
            .lock()
            .take_if(|(number, ..)| *number == self.2);
        if let Some((_, reads, goes_on)) = waits {
            reads.send(()).unwrap();
            goes_on.recv().unwrap();
        }
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        let zeros = buf.iter().all(|byte| *byte == 0);
        self.1.zeros.fetch_add(zeros.into(), Ordering::SeqCst);
        match self.1.write.load(Ordering::SeqCst) {
            0 => self.0.write_at(buf, offset),
            errno => {
                self.0.write_at(&buf[..buf.len() / 2], offset)?;
                Err(Error::Os(Errno::from_raw_os_error(errno as i32)))
            }
        }
    }
    fn sync(&self) -> Result<()> {
        if self.1.sync.load(Ordering::SeqCst) {
            Err(Error::Os(Errno::IO))
        } else {
            self.0.sync()
        }
    }
    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.0.punch(offset, len)
    }
    fn size(&self) -> Result<u64> {
        self.0.size()
    }
}

fn faulty(dir: &tempfile::TempDir) -> (Store, Arc<Fault>) {
    faulty_with(dir, options())
}

fn faulty_with(dir: &tempfile::TempDir, options: StoreOptions) -> (Store, Arc<Fault>) {
    let path = dir.path().join("s");
    std::fs::create_dir(&path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
    let fault = Arc::new(Fault::default());
    let media = Faulty {
        inner: FileMedia::open(&path.join("journal")).unwrap(),
        fault: fault.clone(),
    };
    (
        Store::open_with(&path, options, Arc::new(media)).unwrap(),
        fault,
    )
}

/// A number is used again while what it meant before is moved out of a segment.
#[test]
fn a_birth_is_replaced_while_its_segment_is_freed() {
    let dir = tempfile::tempdir().unwrap();
    let (store, fault) = faulty_with(&dir, tiny());
    store.record_snapshot(&snapshot(1)).unwrap();
    store.record_birth(Ino(5), Epoch(1)).unwrap();
    store.record_snapshot(&snapshot(2)).unwrap();
    for i in 0..40 {
        store
            .keep_extent(FILE, Epoch(2), 2 * i, ExtentData::Bytes(&blocks(2, 2)))
            .unwrap();
    }
    // So what is labelled 2 serves snapshot 2 only, and nothing else in the first segment stays.
    store.record_birth(FILE, Epoch(1)).unwrap();
    store.delete_snapshot(Epoch(2)).unwrap();
    let first = segments(&dir).remove(0);
    let number = first.file_stem().unwrap().to_str().unwrap();
    let number = u32::from_str_radix(number, 16).unwrap();
    let (reads, reached) = mpsc::channel();
    let (go_on, goes_on) = mpsc::channel();
    *fault.reading.lock() = Some((number, reads, goes_on));
    std::thread::scope(|scope| {
        scope.spawn(|| reclaim_all(&store));
        reached.recv_timeout(Duration::from_secs(60)).unwrap();
        store.record_birth(Ino(5), Epoch(1)).unwrap();
        go_on.send(()).unwrap();
    });
    assert!(!first.exists());
    assert_eq!(store.birth(Ino(5)).unwrap(), Some(Epoch(1)));
}

#[test]
fn a_failed_append_poisons_changes_but_not_reads() {
    let dir = tempfile::tempdir().unwrap();
    let (store, fault) = faulty(&dir);
    fill(&store);
    fault
        .write
        .store(Errno::IO.raw_os_error() as u32, Ordering::SeqCst);
    let failed = store.keep_attr(Ino(70), Epoch(1), &attr(1));
    assert!(matches!(failed, Err(Error::Os(Errno::IO))), "{failed:?}");
    fault.write.store(0, Ordering::SeqCst);
    assert!(matches!(
        store.keep_attr(Ino(71), Epoch(1), &attr(1)),
        Err(Error::Poisoned(_))
    ));
    assert!(matches!(
        store.record_snapshot(&snapshot(2)),
        Err(Error::Poisoned(_))
    ));
    assert!(matches!(store.sync(), Err(Error::Poisoned(_))));
    assert!(matches!(store.checkpoint(), Err(Error::Poisoned(_))));
    assert_filled(&store);
    drop(store);
    assert_filled(&open(&dir, options()));
}

#[test]
fn a_failed_sync_poisons_and_a_full_disk_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let (store, fault) = faulty(&dir);
    fault
        .write
        .store(Errno::NOSPC.raw_os_error() as u32, Ordering::SeqCst);
    for _ in 0..3 {
        let full = store.keep_extent(FILE, Epoch(1), 2, ExtentData::Bytes(&blocks(4, 3)));
        assert!(matches!(full, Err(Error::Os(Errno::NOSPC))), "{full:?}");
    }
    fault.write.store(0, Ordering::SeqCst);
    fill(&store);
    fault
        .write
        .store(Errno::NOSPC.raw_os_error() as u32, Ordering::SeqCst);
    assert!(store.keep_attr(Ino(70), Epoch(1), &attr(1)).is_err());
    fault.write.store(0, Ordering::SeqCst);
    let lsn = store.keep_attr(Ino(71), Epoch(1), &attr(1)).unwrap();
    store.wait_durable(lsn).unwrap();
    let lsn = store.record_birth(Ino(50), Epoch(1)).unwrap();
    fault.sync.store(true, Ordering::SeqCst);
    assert!(matches!(store.wait_durable(lsn), Err(Error::Os(Errno::IO))));
    fault.sync.store(false, Ordering::SeqCst);
    assert!(matches!(store.wait_durable(lsn), Err(Error::Poisoned(_))));
    drop(store);
    let store = open(&dir, options());
    assert_filled(&store);
    assert_eq!(store.attr_at(Ino(70), Epoch(1)).unwrap(), None);
    assert!(store.attr_at(Ino(71), Epoch(1)).unwrap().is_some());
}

#[test]
fn threads_append_sync_and_look_while_the_background_job_runs() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, tiny());
    store.record_snapshot(&snapshot(1)).unwrap();
    store.record_snapshot(&snapshot(2)).unwrap();
    let done = AtomicBool::new(false);
    let write = |thread: u64| {
        for i in 0..150 {
            let (ino, byte) = (Ino(thread * 1000 + i), (thread * 50 + i) as u8);
            for label in 1..=2 {
                let lsn = store
                    .keep_extent(ino, Epoch(label), 3, ExtentData::Bytes(&blocks(byte, 2)))
                    .unwrap();
                assert_eq!(store.kept_blocks(ino, Epoch(label), 0).unwrap()[0], 0b11000);
                if i % 10 == 0 {
                    store.wait_durable(lsn).unwrap();
                }
            }
            store
                .keep_entry(DIR, format!("{thread}.{i}").as_bytes(), Epoch(1), None)
                .unwrap();
            store.record_birth(ino, Epoch(1)).unwrap();
        }
    };
    let upkeep = || {
        store.delete_snapshot(Epoch(2)).unwrap();
        while !done.load(Ordering::SeqCst) {
            store.checkpoint().unwrap();
            store.reclaim(&|_| Ok(())).unwrap();
        }
    };
    let reads = || {
        while !done.load(Ordering::SeqCst) {
            for extent in store.extents_at(Ino(1000), Epoch(1), 0).unwrap() {
                store.read_extent(&extent, 0, &mut blocks(0, 2)).unwrap();
            }
            store.entries_at(DIR, Epoch(1)).unwrap();
        }
    };
    std::thread::scope(|scope| {
        let writers: Vec<_> = (1..=3)
            .map(|thread| {
                scope.spawn({
                    let write = &write;
                    move || write(thread)
                })
            })
            .collect();
        scope.spawn(upkeep);
        scope.spawn(reads);
        let results: Vec<_> = writers.into_iter().map(|writer| writer.join()).collect();
        done.store(true, Ordering::SeqCst);
        assert!(results.iter().all(|result| result.is_ok()));
    });
    let check = |store: &Store| {
        assert_eq!(store.damage(), Vec::<String>::new());
        for (thread, i) in (1..=3).flat_map(|thread| (0..150).map(move |i| (thread, i))) {
            let (ino, byte) = (Ino(thread * 1000 + i), (thread * 50 + i) as u8);
            // Born in epoch 1, so no snapshot up to 1 needs it; nor was any of it looked for by the walk.
            let found = read(store, ino, 1).unwrap();
            assert!(
                found.is_empty() || found == [(3, byte), (4, byte)],
                "{ino} {found:?}"
            );
        }
        assert_eq!(store.entries_at(DIR, Epoch(1)).unwrap().len(), 450);
    };
    check(&store);
    drop(store);
    check(&open(&dir, tiny()));
}

/// The lengths of the files of the journal.
fn lengths(dir: &tempfile::TempDir) -> Vec<u64> {
    let files = std::fs::read_dir(dir.path().join("s/journal")).unwrap();
    let files = files.map(|file| file.unwrap().metadata().unwrap().len());
    files.collect()
}

/// Keeps a block, and waits for it.
fn keep_durably(store: &Store, number: u64) -> Result<()> {
    let data = ExtentData::Bytes(&blocks(1 + number as u8, 1));
    let lsn = store.keep_extent(Ino(100 + number), Epoch(1), 0, data)?;
    store.wait_durable(lsn)
}

fn assert_kept(store: &Store, numbers: std::ops::Range<u64>) {
    assert_eq!(store.damage(), Vec::<String>::new());
    for number in numbers {
        let found = read(store, Ino(100 + number), 1).unwrap();
        assert_eq!(found, [(0, 1 + number as u8)], "{number}");
    }
}

/// Where somebody waits for a sync after each small pre-image, the file grows once for many of them, so that the
/// filesystem need not note that with each; what was not needed is given back.
#[test]
fn small_appends_that_are_waited_for_grow_the_journal_once_for_many() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = faulty(&dir);
    store.record_snapshot(&snapshot(1)).unwrap();
    let mut seen = BTreeSet::new();
    for number in 0..200 {
        keep_durably(&store, number).unwrap();
        seen.insert(lengths(&dir));
    }
    assert!(seen.len() < 12, "{seen:?}");
    // One that finds no room in what is filled, in the middle of it.
    let large = blocks(9, 300);
    store
        .keep_extent(FILE, Epoch(1), 0, ExtentData::Bytes(&large))
        .unwrap();
    assert_kept(&store, 0..200);
    let before = store.stats().journal_bytes;
    store.close().unwrap();
    drop(store);
    let store = open(&dir, options());
    let left = store.stats().journal_bytes;
    assert!(left < before.min(550 * BLOCK as u64), "{left} of {before}");
    assert_kept(&store, 0..200);
    assert_eq!(read(&store, FILE, 1).unwrap().len(), 256);
}

/// Neither records without a payload, nor payloads that nobody waits for.
#[test]
fn other_appends_take_no_space_ahead() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = faulty(&dir);
    store.record_snapshot(&snapshot(1)).unwrap();
    let lsn = |number: u8| store.keep_entry(DIR, &[b'n', number], Epoch(1), None);
    (1..100).for_each(|number| store.wait_durable(lsn(number).unwrap()).unwrap());
    for number in 0..100 {
        let data = ExtentData::Bytes(&blocks(number, 1));
        let ino = Ino(100 + u64::from(number));
        store.keep_extent(ino, Epoch(1), 0, data).unwrap();
        store.sync().unwrap();
    }
    let most = options().log_area + 100 * BLOCK as u64;
    assert!(lengths(&dir).iter().all(|len| *len <= most));
}

/// Nobody's payload is written over by zeros, whatever comes between.
#[test]
fn threads_that_wait_for_syncs_get_places_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let small = StoreOptions {
        segment_size: 1 << 20,
        fill_ahead: 64 << 10,
        fill_after: 2,
        ..tiny()
    };
    let (store, fault) = faulty_with(&dir, small.clone());
    store.record_snapshot(&snapshot(1)).unwrap();
    // Some find room in what is filled, some do not.
    let count = |thread: u64, i: u64| 1 + (thread + i) % 7;
    let keep = |thread: u64| {
        for i in 0..200 {
            let data = blocks((thread * 50 + i) as u8, count(thread, i) as usize);
            let data = ExtentData::Bytes(&data);
            let lsn = store.keep_extent(Ino(1000 * thread + i), Epoch(1), 0, data);
            store.wait_durable(lsn.unwrap()).unwrap();
        }
    };
    std::thread::scope(|scope| {
        let keep = &keep;
        let threads: Vec<_> = (1..=4).map(|n| scope.spawn(move || keep(n))).collect();
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
    });
    let filled = fault.zeros.load(Ordering::SeqCst);
    assert!(filled > 10, "filled {filled} times");
    let check = |store: &Store| {
        assert_eq!(store.damage(), Vec::<String>::new());
        for (thread, i) in (1..=4).flat_map(|thread| (0..200).map(move |i| (thread, i))) {
            let byte = (thread * 50 + i) as u8;
            let kept: Vec<_> = (0..count(thread, i)).map(|at| (at, byte)).collect();
            assert_eq!(read(store, Ino(1000 * thread + i), 1).unwrap(), kept);
        }
    };
    check(&store);
    drop(store);
    check(&open(&dir, small));
}

/// That there is no room for blocks that nobody needs yet is nobody's failure; that they cannot be written is.
#[test]
fn what_stands_in_the_way_of_filling_ahead_is_told_only_if_it_does_not_pass() {
    let ready = || {
        let dir = tempfile::tempdir().unwrap();
        let (store, fault) = faulty(&dir);
        store.record_snapshot(&snapshot(1)).unwrap();
        (dir, store, fault)
    };
    let (_dir, store, fault) = ready();
    let due = (0..20).find(|number| {
        keep_durably(&store, *number).unwrap();
        fault.zeros.load(Ordering::SeqCst) > 0
    });
    let due = due.unwrap();
    for errno in [Errno::NOSPC, Errno::NOMEM, Errno::IO] {
        let (dir, store, fault) = ready();
        (0..due).for_each(|number| keep_durably(&store, number).unwrap());
        let data = blocks(1 + due as u8, 1);
        let lsn = store.keep_extent(Ino(100 + due), Epoch(1), 0, ExtentData::Bytes(&data));
        let taken = store.stats().journal_bytes;
        let code = errno.raw_os_error() as u32;
        fault.write.store(code, Ordering::SeqCst);
        let waited = store.wait_durable(lsn.unwrap());
        fault.write.store(0, Ordering::SeqCst);
        assert_eq!(fault.zeros.load(Ordering::SeqCst), 1);
        let now = store.stats().journal_bytes;
        assert!(now <= taken, "{now} bytes in place of {taken}");
        if errno == Errno::IO {
            waited.unwrap_err();
            assert!(store.is_poisoned());
            continue;
        }
        waited.unwrap();
        (due + 1..40).for_each(|number| keep_durably(&store, number).unwrap());
        assert_eq!(fault.zeros.load(Ordering::SeqCst), 1, "tried again");
        store.set_fills_ahead(true);
        (40..60).for_each(|number| keep_durably(&store, number).unwrap());
        assert_eq!(fault.zeros.load(Ordering::SeqCst), 2);
        assert_kept(&store, 0..60);
        drop(store);
        assert_kept(&open(&dir, options()), 0..60);
    }
}

/// A medium on which one file's payload write, or its sync, waits to be let go.
struct Gated {
    inner: FileMedia,
    gates: Arc<Gates>,
}

#[derive(Default)]
struct Gates {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    /// What is to stop: `w` and `s` of a segment.
    closed: Vec<(char, u32)>,
    /// What has come to a closed gate.
    waiting: Vec<(char, u32)>,
    /// Bytes written to each segment's log and payload, in order, and where syncs came.
    happened: Vec<(char, u32)>,
}

impl Gates {
    fn pass(&self, what: char, segment: u32) {
        let mut state = self.state.lock();
        while state.closed.contains(&(what, segment)) {
            if !state.waiting.contains(&(what, segment)) {
                state.waiting.push((what, segment));
                self.changed.notify_all();
            }
            self.changed.wait(&mut state);
        }
    }

    fn close(&self, what: char, segment: u32) {
        self.state.lock().closed.push((what, segment));
    }

    fn open(&self, what: char, segment: u32) {
        self.state
            .lock()
            .closed
            .retain(|gate| *gate != (what, segment));
        self.changed.notify_all();
    }

    fn await_arrival(&self, what: char, segment: u32) {
        let mut state = self.state.lock();
        while !state.waiting.contains(&(what, segment)) {
            self.changed.wait(&mut state);
        }
    }
}

struct GatedFile(Arc<dyn MediaFile>, u32, Arc<Gates>);

impl Gated {
    fn wrap(&self, file: Arc<dyn MediaFile>, number: u32) -> Arc<dyn MediaFile> {
        Arc::new(GatedFile(file, number, self.gates.clone()))
    }
}

impl Media for Gated {
    fn session(&self) -> Result<Arc<dyn MediaFile>> {
        self.inner.session()
    }
    fn list(&self) -> Result<Vec<u32>> {
        self.inner.list()
    }
    fn create(&self, number: u32) -> Result<Arc<dyn MediaFile>> {
        Ok(self.wrap(self.inner.create(number)?, number))
    }
    fn open(&self, number: u32) -> Result<Option<Arc<dyn MediaFile>>> {
        let file = self.inner.open(number)?;
        Ok(file.map(|file| self.wrap(file, number)))
    }
    fn remove(&self, number: u32) -> Result<()> {
        self.inner.remove(number)
    }
    fn sync_names(&self) -> Result<()> {
        self.inner.sync_names()
    }
    fn allocated(&self, number: u32) -> Result<u64> {
        self.inner.allocated(number)
    }
}

impl MediaFile for GatedFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        if offset >= 16 << 10 {
            self.2.pass('w', self.1);
        }
        self.0.write_at(buf, offset)?;
        self.2.state.lock().happened.push(('w', self.1));
        Ok(())
    }
    fn sync(&self) -> Result<()> {
        let after = self.2.state.lock().happened.len();
        self.2.pass('s', self.1);
        // What was written while it waited may have missed it.
        self.0.sync()?;
        self.2.state.lock().happened.insert(after, ('s', self.1));
        Ok(())
    }
    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.0.punch(offset, len)
    }
    fn size(&self) -> Result<u64> {
        self.0.size()
    }
}

/// A record is durable only if those of earlier segments are that were appended before it. One thread keeps two
/// things, in two segments, while the sync of the first segment is under way that a second sync does not repeat.
#[test]
fn durable_means_all_before_it_in_earlier_segments_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    std::fs::create_dir(&path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
    let gates = Arc::new(Gates::default());
    let media = Gated {
        inner: FileMedia::open(&path.join("journal")).unwrap(),
        gates: gates.clone(),
    };
    let store = Store::open_with(&path, tiny(), Arc::new(media)).unwrap();
    let keep = |ino: u64, count: usize| {
        let blocks = blocks(1, count);
        let data = ExtentData::Bytes(&blocks);
        store.keep_extent(Ino(ino), Epoch(1), 0, data).unwrap()
    };
    store.record_snapshot(&snapshot(1)).unwrap();
    store.sync().unwrap();
    let (first, second) = (1, 2);
    store.record_birth(Ino(3), Epoch(1)).unwrap();
    gates.close('w', first);
    std::thread::scope(|scope| {
        // Its place is in the first segment; the next append has to leave that.
        let one = scope.spawn(|| {
            keep(10, 4);
            keep(11, 1)
        });
        gates.await_arrival('w', first);
        keep(12, 10);
        gates.close('s', first);
        let other = scope.spawn(|| store.sync().unwrap());
        gates.await_arrival('s', first);
        gates.open('w', first);
        let last = one.join().unwrap();
        assert_eq!(
            last.0 >> 32,
            second,
            "the second record is in the next segment"
        );
        // No seal is among these while the other thread's sync stands at its gate. Later ones may be: it goes on
        // until the segment is sealed, with or without us.
        let is_write = |e: &&(char, u32)| **e == ('w', first);
        let records = gates.state.lock().happened.iter().filter(is_write).count();
        gates.open('s', first);
        store.wait_durable(last).unwrap();
        let happened = gates.state.lock().happened.clone();
        other.join().unwrap();
        let synced = happened.iter().rposition(|e| *e == ('s', first)).unwrap();
        let before = happened[..synced].iter().filter(is_write).count();
        assert!(before >= records, "{records} of {happened:?}");
    });
}

/// A medium on which the space that is not set aside yet has run out.
struct Full {
    inner: FileMedia,
    full: Arc<AtomicBool>,
}

struct FullFile(Arc<dyn MediaFile>, Arc<AtomicBool>);

impl Media for Full {
    fn list(&self) -> Result<Vec<u32>> {
        self.inner.list()
    }
    fn create(&self, number: u32) -> Result<Arc<dyn MediaFile>> {
        if self.full.load(Ordering::SeqCst) {
            return Err(Error::Os(Errno::NOSPC));
        }
        let file = self.inner.create(number)?;
        Ok(Arc::new(FullFile(file, self.full.clone())))
    }
    fn open(&self, number: u32) -> Result<Option<Arc<dyn MediaFile>>> {
        let wrap = |file| Arc::new(FullFile(file, self.full.clone())) as Arc<dyn MediaFile>;
        Ok(self.inner.open(number)?.map(wrap))
    }
    fn remove(&self, number: u32) -> Result<()> {
        self.inner.remove(number)
    }
    fn sync_names(&self) -> Result<()> {
        self.inner.sync_names()
    }
    fn allocated(&self, number: u32) -> Result<u64> {
        self.inner.allocated(number)
    }
    fn session(&self) -> Result<Arc<dyn MediaFile>> {
        self.inner.session()
    }
}

impl MediaFile for FullFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        if self.1.load(Ordering::SeqCst) && offset + buf.len() as u64 > tiny().log_area {
            return Err(Error::Os(Errno::NOSPC));
        }
        self.0.write_at(buf, offset)
    }
    fn sync(&self) -> Result<()> {
        self.0.sync()
    }
    fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        self.0.allocate(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.0.punch(offset, len)
    }
    fn size(&self) -> Result<u64> {
        self.0.size()
    }
}

/// On a full disk, with a log that is as full as ordinary records can make it, snapshots can still be given up,
/// and that outlives a crash.
#[test]
fn snapshots_are_given_up_on_a_full_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(open(&dir, tiny()));
    let full = Arc::new(AtomicBool::new(false));
    let inner = FileMedia::open(&path.join("journal")).unwrap();
    let media = Full {
        inner,
        full: full.clone(),
    };
    let store = Store::open_with(&path, tiny(), Arc::new(media)).unwrap();
    for epoch in 1..=40 {
        store.record_snapshot(&snapshot(epoch)).unwrap();
    }
    full.store(true, Ordering::SeqCst);
    let payload = blocks(1, 1);
    let error = store.keep_extent(FILE, Epoch(40), 0, ExtentData::Bytes(&payload));
    assert_eq!(error.unwrap_err().errno(), Errno::NOSPC);
    // Small records find room until the log is full.
    let mut small = 0;
    let error = loop {
        match store.keep_entry(DIR, format!("n{small}").as_bytes(), Epoch(40), None) {
            Ok(_) => small += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error.errno(), Errno::NOSPC);
    assert!(small > 50, "{small}");
    let marks: Vec<_> = (2..=40)
        .map(|epoch| (Epoch(epoch), SnapshotState::Invalid))
        .collect();
    store.give_up(&marks).unwrap();
    store.delete_snapshot(Epoch(1)).unwrap();
    assert!(!store.is_poisoned());
    drop(store);
    std::fs::remove_dir_all(path.join("index")).unwrap();
    let store = open(&dir, tiny());
    assert_eq!(store.newest(), None);
    let states: Vec<_> = store.snapshots().iter().map(|s| s.state).collect();
    assert_eq!(states[0], SnapshotState::Deleting);
    assert!(states[1..].iter().all(|s| *s == SnapshotState::Invalid));
}

/// What is dead in the only segment is given back on a disk that has no room for another one: the spare is there.
#[test]
fn the_last_segment_gives_its_dead_up_on_a_full_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let options = StoreOptions {
        segment_size: 1 << 20,
        ..tiny()
    };
    drop(open(&dir, options.clone()));
    let full = Arc::new(AtomicBool::new(false));
    let inner = FileMedia::open(&path.join("journal")).unwrap();
    let media = Full {
        inner,
        full: full.clone(),
    };
    let store = Store::open_with(&path, options.clone(), Arc::new(media)).unwrap();
    for epoch in 1..=2 {
        store.record_snapshot(&snapshot(epoch)).unwrap();
        let data = ExtentData::Bytes(&blocks(epoch as u8, 60));
        store.keep_extent(FILE, Epoch(epoch), 0, data).unwrap();
    }
    store.sync().unwrap();
    let taken = store.stats().journal_bytes;
    assert!(taken > 120 * BLOCK as u64, "{taken}");
    full.store(true, Ordering::SeqCst);
    store.delete_snapshot(Epoch(1)).unwrap();
    let release = |_: &Retained| Ok(());
    while store.reclaim(&release).unwrap() {}
    let left = store.stats().journal_bytes;
    assert!(left < taken - 50 * BLOCK as u64, "{left} of {taken} left");
    assert_eq!(store.snapshots().len(), 1);
    let kept: Vec<_> = (0..60).map(|block| (block, 2)).collect();
    assert_eq!(read(&store, FILE, 2).unwrap(), kept);
    drop(store);
    let store = open(&dir, options);
    assert_eq!(store.damage(), Vec::<String>::new());
    assert_eq!(read(&store, FILE, 2).unwrap(), kept);
}

/// One more snapshot costs one small record, however many there are; all of them survive the loss of the index,
/// and the loss of every segment that nothing else needs.
#[test]
fn many_snapshots_cost_a_small_record_each() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, options());
    let log = |store: &Store| store.stats().journal_bytes;
    // The next segment is made early, and is none of it.
    store.record_snapshot(&snapshot(1)).unwrap();
    store.make_ready().unwrap();
    let before = log(&store);
    for epoch in 1..=2000 {
        store.record_snapshot(&snapshot(epoch)).unwrap();
    }
    store.sync().unwrap();
    assert!(log(&store) - before <= 2 << 20, "{}", log(&store));
    for epoch in 1..=1000 {
        store.delete_snapshot(Epoch(epoch * 2)).unwrap();
    }
    while store.reclaim(&|_| Ok(())).unwrap() {}
    store
        .update_snapshot(Epoch(7), |info| info.held = true)
        .unwrap();
    drop(store);
    std::fs::remove_dir_all(dir.path().join("s/index")).unwrap();
    let store = open(&dir, options());
    let left = store.snapshots();
    assert_eq!(left.len(), 1000);
    assert!(left.iter().all(|s| s.epoch.0 % 2 == 1));
    assert_eq!(left.iter().filter(|s| s.held).count(), 1);
}

/// A segment that is made before it is needed does not make the one before it dispensable, in which the journal ends.
#[test]
fn the_segment_in_which_the_journal_ends_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, tiny());
    store.record_snapshot(&snapshot(1)).unwrap();
    store.keep_attr(FILE, Epoch(1), &attr(1)).unwrap();
    store.delete_snapshot(Epoch(1)).unwrap();
    drop(store);
    let store = open(&dir, tiny());
    store.make_ready().unwrap();
    // All but the last step, as a process that dies then: what died is gone, and the table not changed yet.
    while store.reclaim(&|_| Ok(())).unwrap() {}
    drop(store);
    for _ in 0..3 {
        let store = open(&dir, tiny());
        assert_eq!(store.damage(), Vec::<String>::new());
        store.make_ready().unwrap();
        while store.reclaim(&|_| Ok(())).unwrap() {}
        drop(store);
    }
}

/// A snapshot that became invalid, and was emptied then, leaves nothing behind when it is deleted; and one that is deleted
/// already does not come back as an invalid one.
#[test]
fn an_invalid_snapshot_can_be_deleted_and_a_deleted_one_stays_so() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, tiny());
    let free = || while store.reclaim(&|_| Ok(())).unwrap() {};
    store.record_snapshot(&snapshot(1)).unwrap();
    store.keep_attr(FILE, Epoch(1), &attr(1)).unwrap();
    store
        .give_up(&[(Epoch(1), SnapshotState::Invalid)])
        .unwrap();
    free();
    assert_eq!(store.snapshots().len(), 1);
    store.delete_snapshot(Epoch(1)).unwrap();
    free();
    assert!(store.snapshots().is_empty());
    store.record_snapshot(&snapshot(2)).unwrap();
    store.delete_snapshot(Epoch(2)).unwrap();
    let marks = [
        (Epoch(2), SnapshotState::Invalid),
        (Epoch(3), SnapshotState::Invalid),
    ];
    store.give_up(&marks).unwrap();
    free();
    assert!(store.snapshots().is_empty());
}
