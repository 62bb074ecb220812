//! The engine and the store by themselves, without a mount: what a request costs before FUSE comes into it.
//!
//! `cargo bench` runs them; `cargo bench -- --save-baseline NAME` and `-- --baseline NAME` compare with an earlier run. The
//! directories are made in `$TMPDIR`.

#![allow(clippy::unwrap_used, reason = "a measurement may panic")]

use cowfs::config::{Durability, SpacePolicy};
use cowfs::engine::creds::Caller;
use cowfs::engine::handle::{LiveFile, OpenFile};
use cowfs::engine::nodes::{Node, ROOT_NODE};
use cowfs::engine::{Engine, EngineOptions, Reach};
use cowfs::ids::{CHUNK_BLOCKS, Epoch, Ino};
use cowfs::store::{ExtentData, SnapshotInfo, SnapshotState, Store, StoreOptions, Timestamp};
use cowfs::sync::Arc;
use criterion::{BatchSize, BenchmarkId, Criterion};
use std::hint::black_box;
use std::time::Duration;
use tempfile::TempDir;

const BLOCK: u64 = 4096;
/// Blocks of the file that is written to: 64 MiB.
const BLOCKS: u64 = 16_384;

/// An engine on a directory of its own, with one open file in it.
struct World {
    engine: Arc<Engine>,
    file: LiveFile,
    at: u64,
    cuts: u64,
    dir: TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = EngineOptions {
            store: None,
            durability: Durability::Ordered,
            upkeep: Some(Duration::from_millis(100)),
            snapshot_dir: b".snapshots".to_vec(),
            reach: Reach::AsPermitted,
            space: SpacePolicy::default(),
            user_snapshots: false,
            tuning: StoreOptions::default(),
            media: None,
            witness: None,
            faults: None,
        };
        let engine = Engine::open(dir.path(), options).unwrap();
        let caller = Caller {
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            umask: 0o022,
        };
        let root = engine.node(ROOT_NODE).unwrap();
        let made = engine.create(&root, b"file", 0o644, libc::O_RDWR, caller);
        let (_, file) = made.unwrap();
        let piece = vec![7; 1 << 20];
        for at in (0..BLOCKS * BLOCK).step_by(piece.len()) {
            engine.write(&file, at, &piece, None, false).unwrap();
        }
        Self {
            engine,
            file,
            at: 0,
            cuts: 0,
            dir,
        }
    }

    fn cut(&mut self) {
        let name = format!("s{}", self.cuts);
        self.engine.snapshot(name.as_bytes()).unwrap();
        self.cuts += 1;
    }

    /// The newest snapshot goes away, with what was kept for it.
    fn uncut(&mut self) {
        self.cuts -= 1;
        let name = format!("s{}", self.cuts);
        let delete = self
            .engine
            .delete_snapshot(name.as_bytes(), Duration::from_secs(1));
        delete.unwrap();
    }

    /// Overwrites the next block; true when the file has been gone through.
    fn write(&mut self) -> bool {
        let data = [9; BLOCK as usize];
        let n = self
            .engine
            .write(&self.file, self.at * BLOCK, black_box(&data), None, false);
        assert_eq!(n.unwrap(), data.len());
        self.at = (self.at + 1) % BLOCKS;
        self.at == 0
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.engine.close().unwrap();
        assert!(self.dir.path().exists());
    }
}

fn writes(c: &mut Criterion) {
    let mut group = c.benchmark_group("write 4k");
    let mut world = World::new();
    group.bench_function("no snapshot", |b| b.iter(|| world.write()));
    world.cut();
    while !world.write() {}
    group.bench_function("after the first touch", |b| b.iter(|| world.write()));
    world.at = 0;
    group.bench_function("first touch", |b| {
        // A new cut, which is not counted, as soon as the file has been gone through.
        b.iter_custom(|times| {
            let mut spent = Duration::ZERO;
            for _ in 0..times {
                if world.at == 0 {
                    world.cut();
                }
                let began = std::time::Instant::now();
                world.write();
                spent += began.elapsed();
                if world.at == 0 {
                    world.uncut();
                }
            }
            spent
        });
    });
    group.finish();
}

fn reads(c: &mut Criterion) {
    let mut group = c.benchmark_group("read 4k");
    let mut world = World::new();
    world.cut();
    // The first half is kept, the second is as it was.
    for _ in 0..BLOCKS / 2 {
        world.write();
    }
    let engine = world.engine.clone();
    let node_in = |parent: &Node, name: &[u8]| {
        let attr = engine.lookup(parent, name).unwrap();
        engine.node(attr.node).unwrap()
    };
    let root = engine.node(ROOT_NODE).unwrap();
    let folder = node_in(&root, b".snapshots");
    let file = node_in(&node_in(&folder, b"s0"), b"file");
    let file = engine.open_file(&file, libc::O_RDONLY).unwrap();
    let live = engine
        .open_file(&node_in(&root, b"file"), libc::O_RDONLY)
        .unwrap();
    let mut read = |name: &str, file: &OpenFile, first: u64| {
        let (mut at, mut buffer) = (0, [0; BLOCK as usize]);
        group.bench_function(name, |b| {
            b.iter(|| {
                at = (at + 1) % (BLOCKS / 2);
                let n = engine.read(file, (first + at) * BLOCK, &mut buffer);
                assert_eq!(n.unwrap(), buffer.len());
            });
        });
    };
    read("live", &live, 0);
    read("snapshot, changed since", &file, 0);
    read("snapshot, not changed since", &file, BLOCKS / 2);
    group.finish();
}

fn lookups(c: &mut Criterion) {
    let mut world = World::new();
    let engine = world.engine.clone();
    let root = engine.node(ROOT_NODE).unwrap();
    let mut group = c.benchmark_group("lookup");
    let live = |group: &mut criterion::BenchmarkGroup<'_, _>, name: &str| {
        group.bench_function(name, |b| {
            b.iter(|| {
                let attr = engine.lookup(&root, b"file").unwrap();
                engine.nodes.forget(attr.node, 1);
            });
        });
    };
    live(&mut group, "live");
    world.cut();
    live(&mut group, "live, with a snapshot");
    let node_in = |parent: &Node, name: &[u8]| {
        let attr = engine.lookup(parent, name).unwrap();
        engine.node(attr.node).unwrap()
    };
    let snapshot = node_in(&node_in(&root, b".snapshots"), b"s0");
    group.bench_function("snapshot", |b| {
        b.iter(|| {
            let attr = engine.lookup(&snapshot, b"file").unwrap();
            engine.nodes.forget(attr.node, 1);
        });
    });
    group.finish();
}

fn cuts(c: &mut Criterion) {
    let mut group = c.benchmark_group("creation of a snapshot");
    group.sample_size(20);
    let mut world = World::new();
    for there_are in [0, 1000, 10_000] {
        while world.cuts < there_are {
            world.cut();
        }
        group.bench_function(BenchmarkId::from_parameter(there_are), |b| {
            b.iter_custom(|times| {
                let mut spent = Duration::ZERO;
                for _ in 0..times {
                    let began = std::time::Instant::now();
                    world.cut();
                    spent += began.elapsed();
                    world.uncut();
                }
                spent
            });
        });
    }
    group.finish();
}

fn new_store(dir: &TempDir) -> Store {
    let store = Store::open(&dir.path().join("store"), StoreOptions::default()).unwrap();
    let snapshot = SnapshotInfo {
        epoch: Epoch(1),
        name: b"all".to_vec(),
        created: Timestamp::default(),
        held: false,
        state: SnapshotState::Ready,
    };
    store.record_snapshot(&snapshot).unwrap();
    store
}

fn journal(c: &mut Criterion) {
    let mut group = c.benchmark_group("journal append");
    let dir = tempfile::tempdir().unwrap();
    let store = new_store(&dir);
    let mut next = 0;
    let mut append = |name: &str, data: ExtentData<'_>| {
        group.bench_function(name, |b| {
            b.iter_batched(
                || {
                    if store.memtable_bytes() > 8 << 20 {
                        store.checkpoint().unwrap();
                    }
                    next += CHUNK_BLOCKS;
                    next
                },
                |at| store.keep_extent(Ino(2), Epoch(1), at, data).unwrap(),
                BatchSize::SmallInput,
            );
        });
    };
    append("a hole", ExtentData::Hole { blocks: 1 });
    append("4 KiB", ExtentData::Bytes(&[5; BLOCK as usize]));
    append("128 KiB", ExtentData::Bytes(&[5; 32 * BLOCK as usize]));
    group.finish();
}

fn index(c: &mut Criterion) {
    let mut group = c.benchmark_group("index look-up");
    for count in [10_000_u64, 100_000] {
        let dir = tempfile::tempdir().unwrap();
        let store = new_store(&dir);
        for number in 0..count {
            let hole = ExtentData::Hole { blocks: 1 };
            let block = number * CHUNK_BLOCKS;
            store.keep_extent(Ino(2), Epoch(1), block, hole).unwrap();
        }
        store.checkpoint().unwrap();
        let mut at = 0;
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| {
                at = (at + 7919) % count;
                let found = store.extents_at(Ino(2), Epoch(1), at).unwrap();
                assert_eq!(found.len(), 1);
            });
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for measure in [writes, reads, lookups, cuts, journal, index] {
        measure(&mut criterion);
    }
    criterion.final_summary();
}
