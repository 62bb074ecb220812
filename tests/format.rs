//! docs/FORMAT.md, byte by byte: what this release writes is what the page says, read by a second reader that is
//! written from the page alone; and the golden store of version 1 opens and shows what it was made with.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "support/plain.rs"]
mod plain;

use cowfs::ids::{BLOCK, Epoch, Ino};
use cowfs::store::{
    AttrImage, EntryImage, ExtentData, ObjectHandle, Retained, SnapshotInfo, SnapshotState, Store,
    StoreOptions, Timestamp,
};
use plain::copy_tree;
use std::path::{Path, PathBuf};

fn options() -> StoreOptions {
    StoreOptions {
        in_memory_index: false,
        log_area: 16 << 10,
        segment_size: 64 << 10,
        boot: None,
        ..StoreOptions::default()
    }
}

fn time(sec: i64) -> Timestamp {
    Timestamp { sec, nsec: 5 }
}

fn handle() -> ObjectHandle {
    ObjectHandle {
        kind: 1,
        bytes: vec![0xab; 8].into(),
    }
}

fn attr() -> AttrImage {
    AttrImage {
        mode: 0o100_644,
        uid: 1,
        gid: 2,
        nlink: 3,
        size: 4,
        blocks: 5,
        blksize: 6,
        rdev: 7,
        atime: time(8),
        mtime: time(-9),
        ctime: time(10),
        btime: Some(time(11)),
        xattrs: vec![(b"user.a".to_vec(), b"value".to_vec())],
    }
}

fn long_attr() -> AttrImage {
    AttrImage {
        btime: None,
        xattrs: vec![(b"user.long".to_vec(), vec![6; 5000])],
        ..attr()
    }
}

fn entry() -> EntryImage {
    EntryImage {
        ino: Ino(77),
        kind: 8,
        handle: handle(),
    }
}

fn retained(ino: u64, origin: bool) -> Retained {
    Retained {
        ino: Ino(ino),
        kind: 8,
        handle: handle(),
        birth: Epoch(0),
        removed: Epoch(1),
        origin: origin.then(|| (Ino(1), handle(), b"old".to_vec())),
        whiteout: false,
    }
}

fn snapshot(epoch: u64, state: SnapshotState) -> SnapshotInfo {
    SnapshotInfo {
        epoch: Epoch(epoch),
        name: format!("s{epoch}").into_bytes(),
        created: time(epoch as i64),
        held: epoch == 2,
        state,
    }
}

/// One record of every type, in this order after the two that a segment begins with.
fn fill(store: &Store) {
    store
        .record_snapshot(&snapshot(1, SnapshotState::Ready))
        .unwrap();
    store.keep_attr(Ino(42), Epoch(1), &attr()).unwrap();
    store
        .keep_entry(Ino(1), b"there", Epoch(1), Some(&entry()))
        .unwrap();
    store.keep_entry(Ino(1), b"not", Epoch(1), None).unwrap();
    store
        .keep_extent(Ino(42), Epoch(1), 300, ExtentData::Bytes(&[9; 2 * BLOCK]))
        .unwrap();
    store
        .keep_extent(Ino(42), Epoch(1), 7, ExtentData::Hole { blocks: 2 })
        .unwrap();
    store.record_birth(Ino(50), Epoch(1)).unwrap();
    store.record_retained(&retained(60, true)).unwrap();
    store.record_retained(&retained(61, false)).unwrap();
    store.forget_retained(Ino(61)).unwrap();
    store.keep_attr(Ino(43), Epoch(1), &long_attr()).unwrap();
    store
        .record_snapshot(&snapshot(2, SnapshotState::Suspect))
        .unwrap();
}

fn assert_filled(store: &Store) {
    assert_eq!(store.damage(), Vec::<String>::new());
    let expected = [
        snapshot(1, SnapshotState::Ready),
        snapshot(2, SnapshotState::Suspect),
    ];
    assert!(store.snapshots().iter().eq(&expected));
    assert_eq!(store.epoch(), Epoch(2));
    assert_eq!(
        store.attr_at(Ino(42), Epoch(1)).unwrap(),
        Some((Epoch(1), attr()))
    );
    assert_eq!(
        store.attr_at(Ino(43), Epoch(1)).unwrap(),
        Some((Epoch(1), long_attr()))
    );
    assert_eq!(store.attr_at(Ino(42), Epoch(2)).unwrap(), None);
    assert_eq!(
        store.entry_at(Ino(1), b"there", Epoch(1)).unwrap(),
        Some((Epoch(1), Some(entry())))
    );
    assert_eq!(
        store.entry_at(Ino(1), b"not", Epoch(1)).unwrap(),
        Some((Epoch(1), None))
    );
    let extents = store.extents_at(Ino(42), Epoch(1), 1).unwrap();
    let mut bytes = vec![0; 2 * BLOCK];
    store.read_extent(&extents[0], 0, &mut bytes).unwrap();
    assert_eq!((extents[0].first_block, bytes), (300, vec![9; 2 * BLOCK]));
    let holes = store.extents_at(Ino(42), Epoch(1), 0).unwrap();
    assert!(holes[0].is_hole() && (holes[0].first_block, holes[0].blocks) == (7, 2));
    assert_eq!(store.birth(Ino(50)).unwrap(), Some(Epoch(1)));
    assert_eq!(store.retained_all().unwrap(), [retained(60, true)]);
}

/// Bytes as the page writes them.
#[derive(Default)]
struct Page(Vec<u8>);

impl Page {
    fn u8(mut self, v: u8) -> Self {
        self.0.push(v);
        self
    }
    fn u16(mut self, v: u16) -> Self {
        self.0.extend(v.to_le_bytes());
        self
    }
    fn u32(mut self, v: u32) -> Self {
        self.0.extend(v.to_le_bytes());
        self
    }
    fn u64(mut self, v: u64) -> Self {
        self.0.extend(v.to_le_bytes());
        self
    }
    fn raw(mut self, v: &[u8]) -> Self {
        self.0.extend(v);
        self
    }
    fn bytes(self, v: &[u8]) -> Self {
        self.u32(v.len() as u32).raw(v)
    }
    fn time(self, sec: i64) -> Self {
        self.u64(sec as u64).u32(5)
    }
    fn handle(self) -> Self {
        self.u32(1).bytes(&[0xab; 8])
    }
    fn table(self, version: u64, epoch: u64, states: &[u8]) -> Self {
        let mut page = self.u64(version).u64(epoch).u32(states.len() as u32);
        for (k, state) in (1..).zip(states) {
            page = page.u64(k).row(k, *state);
        }
        page
    }
    fn row(self, k: u64, state: u8) -> Self {
        self.bytes(format!("s{k}").as_bytes())
            .time(k as i64)
            .u8(u8::from(k == 2))
            .u8(state)
    }
    /// The row of snapshot `k`, which is the newest, becomes this one.
    fn change(self, version: u64, k: u64, state: u8) -> Self {
        self.u64(version).u64(k).u32(1).u64(k).u8(1).row(k, state)
    }
    fn stats(self, ino: u64) -> Self {
        let page = self.u64(ino).u64(1);
        let page = [0o100_644, 1, 2, 3, 6].into_iter().fold(page, Page::u32);
        let page = [4, 5, 7].into_iter().fold(page, Page::u64);
        [8, -9, 10].into_iter().fold(page, Page::time)
    }
    fn retained(self, gone: u8, ino: u64) -> Self {
        self.u8(gone).u64(ino).u8(8).handle().u64(0).u64(1)
    }
}

/// A record as the page says: frame, body, padding, checksum.
fn framed(uuid: u128, lsn: u64, kind: u8, spilled: bool, body: &[u8]) -> Vec<u8> {
    let len = (24 + body.len()).next_multiple_of(8);
    let page = Page::default()
        .u32(0)
        .u32(len as u32)
        .u8(kind)
        .u8(u8::from(spilled))
        .u16(0);
    let mut bytes = page.u32(body.len() as u32).u64(lsn).raw(body).0;
    bytes.resize(len, 0);
    let crc = crc32c::crc32c(&[&uuid.to_le_bytes()[..], &bytes[4..]].concat());
    bytes[..4].copy_from_slice(&crc.to_le_bytes());
    bytes
}

#[test]
fn every_record_is_written_as_the_page_says() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("s"), options()).unwrap();
    let uuid = store.uuid();
    fill(&store);
    store.close().unwrap();
    drop(store);
    let format = std::fs::read_to_string(dir.path().join("s/format")).unwrap();
    assert_eq!(format, format!("cowfs-store 1\nuuid {uuid:032x}\n"));
    let segment = std::fs::read(dir.path().join("s/journal/0000000000000001.seg")).unwrap();

    // Payload: two blocks, and after them the body that is too long for the log.
    let area = 16 << 10;
    assert_eq!(segment[area..area + 2 * BLOCK], [9; 2 * BLOCK]);
    let long = Page::default()
        .stats(43)
        .u8(0)
        .u32(1)
        .bytes(b"user.long")
        .bytes(&[6; 5000])
        .0;
    let spill = area + 2 * BLOCK;
    assert_eq!(segment[spill..spill + long.len()], long);
    let block_crc = crc32c::crc32c(&[9; BLOCK]);
    let header = Page::default()
        .raw(b"cowfsseg")
        .u32(1)
        .u32(1)
        .u64(area as u64)
        .raw(&uuid.to_le_bytes());
    let page = Page::default;
    let bodies = [
        (1, header),
        (2, page().table(0, 0, &[])),
        (9, page().change(1, 1, 0)),
        (
            3,
            page()
                .stats(42)
                .u8(1)
                .time(11)
                .u32(1)
                .bytes(b"user.a")
                .bytes(b"value"),
        ),
        (
            4,
            page()
                .u64(1)
                .u64(1)
                .bytes(b"there")
                .u8(1)
                .u64(77)
                .u8(8)
                .handle(),
        ),
        (4, page().u64(1).u64(1).bytes(b"not").u8(0)),
        (
            5,
            page()
                .u64(42)
                .u64(1)
                .u64(300)
                .u16(2)
                .u8(1)
                .u32((area / BLOCK) as u32)
                .u32(block_crc)
                .u32(block_crc),
        ),
        (5, page().u64(42).u64(1).u64(7).u16(2).u8(0)),
        (6, page().u64(50).u64(1)),
        (
            7,
            page().retained(0, 60).u8(1).u64(1).handle().bytes(b"old"),
        ),
        (7, page().retained(0, 61).u8(0)),
        (7, page().retained(1, 61).u8(0)),
        (
            3,
            page()
                .u64(spill as u64)
                .u32(long.len() as u32)
                .u32(crc32c::crc32c(&long)),
        ),
        (9, page().change(2, 2, 2)),
    ];
    let mut expected = Vec::new();
    for (i, (kind, body)) in bodies.into_iter().enumerate() {
        let lsn = 1 << 32 | expected.len() as u64;
        expected.extend(framed(uuid, lsn, kind, i == 12, &body.0));
        assert_eq!(
            segment[..expected.len()],
            expected,
            "record {i} of type {kind}"
        );
    }
    let used = expected.len() + 32 + 2 * BLOCK + long.len().next_multiple_of(BLOCK);
    let lsn = 1 << 32 | expected.len() as u64;
    expected.extend(framed(uuid, lsn, 8, false, &page().u64(used as u64).0));
    assert_eq!(segment[..expected.len()], expected, "the seal");
    assert!(segment[expected.len()..area].iter().all(|byte| *byte == 0));
}

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1")
}

/// The store that the first release wrote. `COWFS_MAKE_GOLDEN=DIR` writes such a store to DIR, for a new format.
#[test]
fn the_golden_store_of_version_1_opens() {
    if let Some(dir) = std::env::var_os("COWFS_MAKE_GOLDEN") {
        let store = Store::open(Path::new(&dir), options()).unwrap();
        fill(&store);
        store.close().unwrap();
    }
    for index in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        copy_tree(&golden(), &path);
        if !index {
            std::fs::remove_dir_all(path.join("index")).unwrap();
        }
        let examined = Store::examine(&path, options()).unwrap();
        assert_eq!(examined.store.check(false).unwrap().findings, []);
        drop(examined);
        let store = Store::open(&path, options()).unwrap();
        assert_filled(&store);
        // It can be gone on with.
        store
            .record_snapshot(&snapshot(3, SnapshotState::Ready))
            .unwrap();
        store.keep_attr(Ino(42), Epoch(3), &long_attr()).unwrap();
        store.close().unwrap();
        drop(store);
        let store = Store::open(&path, options()).unwrap();
        assert_eq!(
            store.attr_at(Ino(42), Epoch(2)).unwrap(),
            Some((Epoch(3), long_attr()))
        );
        assert_eq!(store.check(false).unwrap().findings, []);
    }
}
