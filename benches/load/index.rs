//! The store by itself, as what is kept in it grows.

use crate::{Options, Random};
use cowfs::ids::{CHUNK_BLOCKS, Epoch, Ino};
use cowfs::store::{ExtentData, SnapshotInfo, SnapshotState, Store, StoreOptions, Timestamp};
use serde_json::{Value, json};
use std::time::Instant;

const FILES: u64 = 1000;
const LOOKUPS: u64 = 20_000;

/// Where pre-image `number` lies: one in each chunk, the files in turn.
fn place(number: u64) -> (Ino, u64) {
    (Ino(2 + number % FILES), number / FILES)
}

/// Keeps `--count` pre-images of one block each (holes, so that the disk need not hold their bytes) in a new store
/// `--dir`, and looks some up. Then opens the store anew as after kill -9, with the index behind the journal, and as
/// after its loss.
pub fn index(options: &Options) -> Value {
    let (dir, count) = (options.path("dir"), options.number("count"));
    let store = Store::open(&dir, StoreOptions::default()).unwrap();
    let snapshot = SnapshotInfo {
        epoch: Epoch(1),
        name: b"all".to_vec(),
        created: Timestamp::default(),
        held: false,
        state: SnapshotState::Ready,
    };
    store.record_snapshot(&snapshot).unwrap();
    let began = Instant::now();
    for number in 0..count {
        let (ino, chunk) = place(number);
        let block = chunk * CHUNK_BLOCKS + number % CHUNK_BLOCKS;
        let hole = ExtentData::Hole { blocks: 1 };
        store.keep_extent(ino, Epoch(1), block, hole).unwrap();
        if store.memtable_bytes() > 8 << 20 {
            store.checkpoint().unwrap();
        }
    }
    let keep = began.elapsed().as_secs_f64();
    store.checkpoint().unwrap();
    let stats = store.stats();
    let mut random = Random::new(2);
    let began = Instant::now();
    for _ in 0..LOOKUPS {
        let (ino, chunk) = place(random.below(count));
        assert_eq!(store.extents_at(ino, Epoch(1), chunk).unwrap().len(), 1);
    }
    let found = began.elapsed().as_secs_f64();
    let began = Instant::now();
    for _ in 0..LOOKUPS {
        let (ino, chunk) = place(count + random.below(count));
        assert_eq!(store.extents_at(ino, Epoch(1), chunk).unwrap().len(), 0);
    }
    let absent = began.elapsed().as_secs_f64();
    drop(store);
    let began = Instant::now();
    drop(Store::open(&dir, StoreOptions::default()).unwrap());
    let open = began.elapsed().as_secs_f64();
    std::fs::remove_dir_all(dir.join("index")).unwrap();
    let began = Instant::now();
    drop(Store::open(&dir, StoreOptions::default()).unwrap());
    let rebuild = began.elapsed().as_secs_f64();
    json!({
        "keep_us": keep * 1e6 / count as f64,
        "found_us": found * 1e6 / LOOKUPS as f64,
        "absent_us": absent * 1e6 / LOOKUPS as f64,
        "index_bytes": stats.index_bytes,
        "journal_bytes": stats.journal_bytes,
        "open_s": open,
        "rebuild_s": rebuild,
    })
}
