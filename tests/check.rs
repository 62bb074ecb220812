//! Damage of every kind: it is found, nothing wrong is ever served, what is right goes on being served, and
//! after a repair nothing more is found.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "support/plain.rs"]
mod plain;

use cowfs::error::{Error, Result};
use cowfs::ids::{BLOCK, Epoch, Ino};
use cowfs::store::media::{FileMedia, Media, MediaFile};
use cowfs::store::{
    AttrImage, CheckReport, EntryImage, ExtentData, Finding, ObjectHandle, Retained, Severity,
    SnapshotInfo, SnapshotState, Store, StoreOptions, Timestamp,
};
use cowfs::sync::{Arc, AtomicI64, Ordering};
use plain::{copy_tree, rng};
use rand::Rng;
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Objects of the store that is damaged, each with attributes, a name and data under each label.
const OBJECTS: u64 = 12;
const SNAPSHOTS: u64 = 3;

fn tiny() -> StoreOptions {
    StoreOptions {
        in_memory_index: false,
        log_area: 16 << 10,
        segment_size: 96 << 10,
        boot: None,
        ..StoreOptions::default()
    }
}

fn attr(ino: u64, label: u64) -> AttrImage {
    // The last object's body is too long for the log.
    let len = if ino == OBJECTS { 9000 } else { 50 };
    AttrImage {
        mode: 0o100_000 + label as u32,
        size: ino,
        xattrs: vec![(b"user.a".to_vec(), vec![label as u8; len])],
        ..AttrImage::default()
    }
}

fn entry(ino: u64, label: u64) -> EntryImage {
    EntryImage {
        ino: Ino(1000 * label + ino),
        kind: 8,
        handle: ObjectHandle {
            kind: 1,
            bytes: vec![ino as u8; 12].into(),
        },
    }
}

fn data(ino: u64, label: u64) -> Vec<u8> {
    (0..2 * BLOCK)
        .map(|i| (ino * 31 + label * 7 + i as u64 / 100) as u8 | 1)
        .collect()
}

fn retained(ino: u64) -> Retained {
    Retained {
        ino: Ino(ino),
        kind: 8,
        handle: entry(ino, 0).handle,
        birth: Epoch(0),
        removed: Epoch(SNAPSHOTS),
        origin: None,
        whiteout: false,
    }
}

fn info(epoch: u64) -> SnapshotInfo {
    SnapshotInfo {
        epoch: Epoch(epoch),
        name: format!("s{epoch}").into_bytes(),
        created: Timestamp {
            sec: 7,
            nsec: epoch as u32,
        },
        held: false,
        state: SnapshotState::Ready,
    }
}

fn fill(store: &Store) {
    for label in 1..=SNAPSHOTS {
        store.record_snapshot(&info(label)).unwrap();
        for ino in 1..=OBJECTS {
            store
                .keep_attr(Ino(ino), Epoch(label), &attr(ino, label))
                .unwrap();
            let was = entry(ino, label);
            store
                .keep_entry(
                    Ino(1),
                    format!("n{ino}").as_bytes(),
                    Epoch(label),
                    Some(&was),
                )
                .unwrap();
            store
                .keep_extent(
                    Ino(ino),
                    Epoch(label),
                    3,
                    ExtentData::Bytes(&data(ino, label)),
                )
                .unwrap();
            store
                .keep_extent(Ino(ino), Epoch(label), 9, ExtentData::Hole { blocks: 2 })
                .unwrap();
        }
        store.record_birth(Ino(500 + label), Epoch(label)).unwrap();
    }
    store.record_retained(&retained(70)).unwrap();
}

/// What of one snapshot is right and what fails; panics if anything wrong is served.
fn judge(store: &Store, k: u64, context: &str) -> (usize, usize) {
    let snapshots = store.snapshots();
    let Some(info) = snapshots.iter().find(|s| s.epoch == Epoch(k)) else {
        return (0, 0);
    };
    let state = info.state;
    if state == SnapshotState::Invalid {
        return (0, 0);
    }
    // A suspect one may lack a value, but has no wrong one.
    let suspect = state == SnapshotState::Suspect;
    let (mut right, mut failed) = (0, 0);
    let mut count = |result: Result<bool>, what: String| match result {
        Ok(true) => right += 1,
        Ok(false) if suspect => failed += 1,
        Ok(false) => panic!("{context}: {what} of snapshot {k} is wrong"),
        Err(error) => {
            assert_eq!(error.errno(), Errno::IO, "{context}: {error}");
            failed += 1;
        }
    };
    for ino in 1..=OBJECTS {
        let found = store.attr_at(Ino(ino), Epoch(k));
        count(
            found.map(|found| found == Some((Epoch(k), attr(ino, k)))),
            format!("attributes {ino}"),
        );
        let name = format!("n{ino}");
        let found = store.entry_at(Ino(1), name.as_bytes(), Epoch(k));
        let want = Some((Epoch(k), Some(entry(ino, k))));
        count(found.map(|found| found == want), format!("name {ino}"));
        let bytes = data(ino, k);
        for (block, want) in (3..).zip(bytes.chunks(BLOCK)) {
            count(
                read_block(store, ino, k, block).map(|found| found.as_deref() == Some(want)),
                format!("block {block} of {ino}"),
            );
        }
        count(
            read_block(store, ino, k, 9).map(|found| found == Some(vec![0; BLOCK])),
            format!("hole of {ino}"),
        );
    }
    (right, failed)
}

/// Checks per snapshot in [`judge`].
const CHECKS: usize = OBJECTS as usize * 5;

fn read_block(store: &Store, ino: u64, k: u64, block: u64) -> Result<Option<Vec<u8>>> {
    for extent in store.extents_at(Ino(ino), Epoch(k), 0)? {
        let range = extent.first_block..extent.first_block + u64::from(extent.blocks);
        if range.contains(&block) {
            let mut bytes = vec![1; BLOCK];
            store.read_extent(&extent, (block - extent.first_block) as u16, &mut bytes)?;
            return Ok(Some(bytes));
        }
    }
    Ok(None)
}

/// The sum over all snapshots.
fn judge_all(store: &Store, context: &str) -> (usize, usize) {
    (1..=SNAPSHOTS)
        .map(|k| judge(store, k, context))
        .fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1))
}

/// Segments that a kill leaves open: the tail of the journal, and its spare.
const OPEN: usize = 2;

/// The findings that are more than a note.
fn bad(report: &CheckReport) -> Vec<&Finding> {
    let bad = report.findings.iter();
    bad.filter(|f| f.severity != Severity::Note).collect()
}

struct World {
    dir: tempfile::TempDir,
}

impl World {
    /// A store of several segments; `closed`: in order, or as a kill leaves it.
    fn new(closed: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("s"), tiny()).unwrap();
        fill(&store);
        if closed {
            store.close().unwrap();
        } else {
            store.sync().unwrap();
        }
        drop(store);
        Self { dir }
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    fn copy(&self) -> Self {
        let dir = tempfile::tempdir().unwrap();
        copy_tree(&self.store(), &dir.path().join("s"));
        Self { dir }
    }

    fn segments(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.store().join("journal")).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        let mut paths: Vec<_> = paths
            .filter(|path| path.extension().is_some_and(|e| e == "seg"))
            .collect();
        paths.sort();
        paths
    }

    /// What a check finds; it must leave every file as it was.
    fn check(&self, context: &str) -> CheckReport {
        let before = contents(&self.store());
        let examined = Store::examine(&self.store(), tiny()).unwrap();
        let report = examined.store.check(false).unwrap();
        judge_all(&examined.store, context);
        drop(examined);
        assert!(
            contents(&self.store()) == before,
            "{context}: a check changed the store"
        );
        report
    }

    /// Holds the whole promise against a store that was damaged.
    fn hold(&self, context: &str) -> (usize, usize) {
        let report = self.check(context);
        // A mount finds the same, and serves nothing wrong, at once and again.
        let mounted = self.copy();
        for _ in 0..2 {
            let store = Store::open(&mounted.store(), tiny()).unwrap();
            judge_all(&store, context);
        }
        let (store, done) = Store::repair(&self.store(), tiny())
            .unwrap_or_else(|error| panic!("{context}: repair: {error}"));
        let result = judge_all(&store, context);
        let again = store.check(false).unwrap();
        let left = bad(&again);
        assert!(
            left.is_empty(),
            "{context}: left after the repair: {left:#?}\ndone: {done:#?}\nbefore: {report:#?}"
        );
        store.close().unwrap();
        drop(store);
        let report = self.check(context);
        let left = bad(&report);
        assert!(
            left.is_empty(),
            "{context}: found after the repair: {left:#?}"
        );
        let (store, done) = Store::repair(&self.store(), tiny()).unwrap();
        assert_eq!(
            done,
            Vec::<String>::new(),
            "{context}: a second repair had work"
        );
        drop(store);
        // What is repaired does not hang on the index.
        std::fs::remove_dir_all(self.store().join("index")).unwrap();
        let store = Store::open(&self.store(), tiny()).unwrap();
        assert_eq!(
            judge_all(&store, context),
            result,
            "{context}: after the loss of the index"
        );
        result
    }
}

/// Every file below a directory, with its bytes.
fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(contents(&path));
        } else {
            all.insert(path.clone(), std::fs::read(&path).unwrap());
        }
    }
    all
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
}

#[test]
fn a_good_store_has_no_findings() {
    for closed in [true, false] {
        let world = World::new(closed);
        let report = world.check("good");
        assert_eq!(report.findings, [], "closed: {closed}");
        assert!(
            report.segments > 3 && report.records > 100 && report.blocks == 72,
            "{report:?}"
        );
        // After deletions, half done and done, and compaction.
        let store = Store::open(&world.store(), tiny()).unwrap();
        store.delete_snapshot(Epoch(2)).unwrap();
        assert_eq!(store.check(true).unwrap().findings, []);
        while store.reclaim(&|_| Ok(())).unwrap() {
            assert_eq!(store.check(true).unwrap().findings, []);
        }
        store.delete_snapshot(Epoch(1)).unwrap();
        while store.reclaim(&|_| Ok(())).unwrap() {}
        drop(store);
        assert_eq!(world.check("deleted").findings, []);
        let store = Store::open(&world.store(), tiny()).unwrap();
        store.close().unwrap();
        drop(store);
        assert_eq!(world.check("closed").findings, []);
    }
}

#[test]
fn a_check_sees_no_damage_while_others_write_and_delete() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("s"), tiny()).unwrap();
    store.record_snapshot(&info(1)).unwrap();
    let writing = cowfs::sync::AtomicBool::new(true);
    std::thread::scope(|scope| {
        for thread in 0..2_u64 {
            let (store, writing) = (&store, &writing);
            scope.spawn(move || {
                for i in 0.. {
                    if !writing.load(Ordering::SeqCst) {
                        break;
                    }
                    let (ino, label) = (Ino(thread * 1_000_000 + i), store.epoch());
                    store.keep_attr(ino, label, &attr(1, 1)).unwrap();
                    store
                        .keep_extent(ino, label, 3, ExtentData::Bytes(&data(1, 1)))
                        .unwrap();
                    std::thread::yield_now();
                }
            });
        }
        scope.spawn(|| {
            for epoch in 2.. {
                if !writing.load(Ordering::SeqCst) {
                    break;
                }
                store.record_snapshot(&info(epoch)).unwrap();
                store.delete_snapshot(Epoch(epoch - 1)).unwrap();
                while store.reclaim(&|_| Ok(())).unwrap() {}
                store.checkpoint().unwrap();
            }
        });
        for round in 0..8 {
            let report = store.check(true).unwrap();
            assert_eq!(report.findings, [], "round {round}");
        }
        writing.store(false, Ordering::SeqCst);
    });
}

/// Bytes anywhere in the journal, one at a time.
#[test]
fn flipped_bytes_of_the_journal_are_found_and_never_served() {
    let mut rng = rng("flipped");
    for closed in [true, false] {
        let world = World::new(closed);
        for round in 0..25 {
            let world = world.copy();
            let segments = world.segments();
            // What a kill left open may be torn at its end.
            let sealed = segments.len() - if closed { 0 } else { OPEN };
            let path = &segments[rng.random_range(0..sealed)];
            let bytes = std::fs::read(path).unwrap();
            let at = loop {
                let at = rng.random_range(0..bytes.len());
                if bytes[at] != 0 {
                    break at;
                }
            };
            flip(path, at as u64);
            let context = format!("closed {closed}, round {round}, {} at {at}", path.display());
            let (right, failed) = world.hold(&context);
            if closed {
                // The index has every value but the blocks.
                let all = CHECKS * SNAPSHOTS as usize;
                assert!(
                    right + failed == all && failed <= 2,
                    "{context}: {right} right, {failed} failed"
                );
            }
        }
    }
}

/// The same with no index to fall back on: what cannot be told is not served.
#[test]
fn flipped_bytes_without_an_index_make_snapshots_invalid() {
    let mut rng = rng("no index");
    let world = World::new(true);
    let mut invalid = 0;
    for round in 0..25 {
        let world = world.copy();
        std::fs::remove_dir_all(world.store().join("index")).unwrap();
        let segments = world.segments();
        let path = &segments[rng.random_range(0..segments.len())];
        // In the log, where the records are.
        let log = &std::fs::read(path).unwrap()[..4000];
        let used: Vec<usize> = (0..log.len()).filter(|at| log[*at] != 0).collect();
        let at = used[rng.random_range(0..used.len())];
        flip(path, at as u64);
        let context = format!("round {round}, {} at {at}", path.display());
        let (right, failed) = world.hold(&context);
        let store = Store::open(&world.store(), tiny()).unwrap();
        if store
            .snapshots()
            .iter()
            .all(|s| s.state == SnapshotState::Invalid)
        {
            invalid += 1;
        } else {
            // A seal was hit, or a segment that holds no value yet.
            assert_eq!(
                (right, failed),
                (CHECKS * SNAPSHOTS as usize, 0),
                "{context}"
            );
        }
    }
    assert!(invalid >= 15, "{invalid} of 25");
}

#[test]
fn flipped_bytes_of_the_index_harm_nothing() {
    let mut rng = rng("index");
    let world = World::new(true);
    for round in 0..15 {
        let world = world.copy();
        let files = contents(&world.store().join("index"));
        let files: Vec<_> = files
            .iter()
            .filter(|(_, bytes)| !bytes.is_empty())
            .collect();
        let (path, bytes) = files[rng.random_range(0..files.len())];
        let at = rng.random_range(0..bytes.len());
        flip(path, at as u64);
        let context = format!("round {round}, {} at {at}", path.display());
        let (right, failed) = world.hold(&context);
        assert_eq!(
            (right, failed),
            (CHECKS * SNAPSHOTS as usize, 0),
            "{context}"
        );
    }
}

#[test]
fn segments_cut_lengthened_removed_doubled_and_swapped() {
    for closed in [true, false] {
        let world = World::new(closed);
        let count = world.segments().len();
        for at in 0..count {
            for kind in [
                "cut in the log",
                "cut in the payload",
                "emptied",
                "lengthened",
                "removed",
                "doubled",
                "swapped",
                "a zero page in the log",
                "a zero page in the payload",
            ] {
                // Since the last checkpoint of a store that was killed, a cut end is like a torn one.
                let like_torn = match kind {
                    "cut in the log" | "emptied" | "a zero page in the log" => true,
                    // The spare ends in its log.
                    "lengthened" => at + 1 == count,
                    _ => at + OPEN >= count && kind != "doubled",
                };
                if !closed && like_torn {
                    continue;
                }
                let world = world.copy();
                let segments = world.segments();
                let path = &segments[at];
                let file = || File::options().write(true).open(path).unwrap();
                let len = std::fs::metadata(path).unwrap().len();
                match kind {
                    "cut in the log" => file().set_len(3000).unwrap(),
                    "cut in the payload" => {
                        file().set_len(len.saturating_sub(5000).max(4096)).unwrap()
                    }
                    "emptied" => file().set_len(0).unwrap(),
                    "lengthened" => file().write_all_at(&[7; 5000], len).unwrap(),
                    "removed" => std::fs::remove_file(path).unwrap(),
                    "doubled" => {
                        let copy = path.with_file_name(format!("{:016x}.seg", 99));
                        std::fs::copy(path, copy).map(drop).unwrap();
                    }
                    "swapped" => {
                        let other = &segments[(at + 1) % count];
                        let aside = path.with_extension("aside");
                        std::fs::rename(path, &aside).unwrap();
                        std::fs::rename(other, path).unwrap();
                        std::fs::rename(aside, other).unwrap();
                    }
                    "a zero page in the log" => file().write_all_at(&[0; 4096], 0).unwrap(),
                    _ => file().write_all_at(&[0; 4096], 16 << 10).unwrap(),
                }
                let context = format!("closed {closed}, segment {at} {kind}");
                let report = world.check(&context);
                let no_payload = kind.contains("payload") && len <= 16 << 10;
                assert!(
                    !report.findings.is_empty() || no_payload,
                    "{context}: nothing was found"
                );
                let (right, failed) = world.hold(&context);
                if closed {
                    // Small values are all there, and so is the data of every other segment.
                    assert_eq!(right + failed, CHECKS * SNAPSHOTS as usize, "{context}");
                    assert!(failed <= 2 * 40, "{context}: {failed} failed");
                }
            }
        }
    }
}

#[test]
fn a_damaged_format_file_is_refused_and_nothing_changes() {
    let world = World::new(true);
    let path = world.store().join("format");
    let good = std::fs::read(&path).unwrap();
    let uuid_end = good.len() - 1;
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x80;
        std::fs::write(&path, &bad).unwrap();
        let before = contents(&world.store());
        // The last byte ends the line; without it the line is as good.
        for result in [
            Store::open(&world.store(), tiny()).map(drop),
            Store::examine(&world.store(), tiny()).map(drop),
            Store::repair(&world.store(), tiny()).map(drop),
        ] {
            let error = result
                .err()
                .unwrap_or_else(|| panic!("byte {at} of {uuid_end}"));
            assert!(
                matches!(error, Error::Store { .. } | Error::Path { .. }),
                "{error}"
            );
        }
        assert!(contents(&world.store()) == before);
    }
    std::fs::write(&path, good).unwrap();
    assert_eq!(world.check("format").findings, []);
}

/// A disk that stops taking changes after a number of them.
struct Dying {
    beneath: FileMedia,
    left: Arc<AtomicI64>,
}

struct DyingFile {
    beneath: Arc<dyn MediaFile>,
    left: Arc<AtomicI64>,
}

fn use_up(left: &AtomicI64) -> Result<()> {
    if left.fetch_sub(1, Ordering::SeqCst) <= 0 {
        return Err(Error::Os(Errno::IO));
    }
    Ok(())
}

impl Media for Dying {
    fn session(&self) -> Result<Arc<dyn MediaFile>> {
        self.beneath.session()
    }
    fn list(&self) -> Result<Vec<u32>> {
        self.beneath.list()
    }
    fn create(&self, number: u32) -> Result<Arc<dyn MediaFile>> {
        use_up(&self.left)?;
        let (beneath, left) = (self.beneath.create(number)?, self.left.clone());
        Ok(Arc::new(DyingFile { beneath, left }))
    }
    fn open(&self, number: u32) -> Result<Option<Arc<dyn MediaFile>>> {
        let left = self.left.clone();
        Ok(self
            .beneath
            .open(number)?
            .map(|beneath| -> Arc<dyn MediaFile> { Arc::new(DyingFile { beneath, left }) }))
    }
    fn remove(&self, number: u32) -> Result<()> {
        use_up(&self.left)?;
        self.beneath.remove(number)
    }
    fn sync_names(&self) -> Result<()> {
        use_up(&self.left)?;
        self.beneath.sync_names()
    }
    fn allocated(&self, number: u32) -> Result<u64> {
        self.beneath.allocated(number)
    }
}

impl MediaFile for DyingFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        self.beneath.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        if let Err(error) = use_up(&self.left) {
            // Half of it arrives.
            self.beneath.write_at(&buf[..buf.len() / 2], offset)?;
            return Err(error);
        }
        self.beneath.write_at(buf, offset)
    }
    fn sync(&self) -> Result<()> {
        use_up(&self.left)?;
        self.beneath.sync()
    }
    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        use_up(&self.left)?;
        self.beneath.punch(offset, len)
    }
    fn size(&self) -> Result<u64> {
        self.beneath.size()
    }
}

/// Opening that dies at any of its changes to the journal, again and again, comes to the same.
#[test]
fn opening_may_die_anywhere_and_be_done_again() {
    for (index, torn) in [(true, false), (false, false), (true, true), (false, true)] {
        let world = World::new(false);
        if !index {
            std::fs::remove_dir_all(world.store().join("index")).unwrap();
        }
        if torn {
            // Behind the last record, half of another one.
            let segments = world.segments();
            let tail = &segments[segments.len() - OPEN];
            let bytes = std::fs::read(tail).unwrap();
            let log = &bytes[..bytes.len().min(16 << 10)];
            let end = log
                .iter()
                .rposition(|byte| *byte != 0)
                .unwrap()
                .next_multiple_of(8) as u64;
            let file = File::options().write(true).open(tail).unwrap();
            file.write_all_at(&bytes[64..100], end + 8).unwrap();
        }
        let straight = world.copy();
        let expected = judge_all(&Store::open(&straight.store(), tiny()).unwrap(), "straight");
        assert_eq!(expected, (CHECKS * SNAPSHOTS as usize, 0));
        let mut died = 0;
        for changes in 0..40 {
            let media = Dying {
                beneath: FileMedia::open(&world.store().join("journal")).unwrap(),
                left: Arc::new(AtomicI64::new(changes)),
            };
            match Store::open_with(&world.store(), tiny(), Arc::new(media)) {
                Ok(store) => assert_eq!(judge_all(&store, "opened"), expected),
                Err(_) => died += 1,
            }
        }
        assert!(died > 0, "no opening died");
        let store = Store::open(&world.store(), tiny()).unwrap();
        assert_eq!(judge_all(&store, "at last"), expected);
        assert_eq!(store.damage(), Vec::<String>::new());
        assert_eq!(store.snapshots().len(), SNAPSHOTS as usize);
        drop(store);
        assert_eq!(world.check("at last").findings, []);
    }
}

/// Payload that no record needs, and accounts that are off, are found and put right.
#[test]
fn leaks_are_found_and_given_back() {
    let world = World::new(true);
    let segments = world.segments();
    let len = std::fs::metadata(&segments[0]).unwrap().len();
    let file = File::options().write(true).open(&segments[0]).unwrap();
    file.write_all_at(&[5; 64 << 10], len.next_multiple_of(4096))
        .unwrap();
    file.sync_all().unwrap();
    let before = file.metadata().unwrap().blocks();
    let report = world.check("leak");
    assert_eq!(report.findings.len(), 1, "{report:?}");
    assert_eq!(report.findings[0].severity, Severity::Leak);
    assert!(!report.is_damaged());
    let (store, done) = Store::repair(&world.store(), tiny()).unwrap();
    assert!(done[0].contains("65536"), "{done:?}");
    drop(store);
    assert!(file.metadata().unwrap().blocks() + 120 <= before);
    assert_eq!(world.check("given back").findings, []);
}
