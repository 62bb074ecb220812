//! Driving the engine without a mount: a flat tree of files, random changes of it, and its snapshots.
#![allow(dead_code, reason = "each test file uses a part of it")]

use cowfs::config::{Durability, SpacePolicy};
use cowfs::engine::handle::OpenFile;
use cowfs::engine::nodes::{Node, ROOT_NODE, folder_node};
use cowfs::engine::{Engine, EngineOptions, Reach};
use cowfs::error::Result;
use cowfs::store::{SnapshotState, StoreOptions};
use rand::Rng;
use rand::rngs::SmallRng;
use std::collections::BTreeMap;

pub(crate) fn options() -> EngineOptions {
    EngineOptions {
        store: None,
        durability: Durability::Ordered,
        upkeep: None,
        snapshot_dir: b".snapshots".to_vec(),
        reach: Reach::AsPermitted,
        space: SpacePolicy::default(),
        user_snapshots: false,
        tuning: StoreOptions {
            in_memory_index: true,
            segment_size: 1 << 20,
            fill_ahead: 64 << 10,
            fill_after: 2,
            log_area: 64 << 10,
            boot: None,
            ..StoreOptions::default()
        },
        media: None,
        witness: None,
        faults: None,
    }
}

pub(crate) fn root(engine: &Engine) -> Node {
    engine.node(ROOT_NODE).unwrap()
}

/// The node of a path, from `from` on.
pub(crate) fn find(engine: &Engine, from: Node, path: &[&str]) -> Result<Node> {
    let mut node = from;
    for name in path {
        let attr = engine.lookup(&node, name.as_bytes())?;
        node = engine.node(attr.node)?;
    }
    Ok(node)
}

pub(crate) fn snapshot(engine: &Engine, path: &[&str]) -> Result<Node> {
    let folder = engine.lookup(&root(engine), b".snapshots").unwrap();
    assert_eq!(folder.node, folder_node(ROOT_NODE));
    find(engine, engine.node(folder.node).unwrap(), path)
}

pub(crate) fn write(engine: &Engine, name: &str, at: u64, bytes: &[u8]) -> Result<usize> {
    let node = find(engine, root(engine), &[name])?;
    match engine.open_file(&node, libc::O_RDWR)? {
        OpenFile::Live(file) => engine.write(&file, at, bytes, None, false),
        OpenFile::At(_) => unreachable!("a live file"),
    }
}

pub(crate) fn read(engine: &Engine, node: &Node) -> Result<Vec<u8>> {
    let file = engine.open_file(node, libc::O_RDONLY)?;
    let mut bytes = vec![0; 1 << 20];
    let n = engine.read(&file, 0, &mut bytes)?;
    bytes.truncate(n);
    Ok(bytes)
}

pub(crate) fn state(engine: &Engine, name: &str) -> Option<SnapshotState> {
    let all = engine.store().snapshots();
    let found = all.iter().find(|info| info.name == name.as_bytes());
    found.map(|info| info.state)
}

pub(crate) fn seen(engine: &Engine, path: &[&str]) -> Result<Vec<u8>> {
    snapshot(engine, path).and_then(|node| read(engine, &node))
}

/// The bytes of a file, told by their runs.
#[derive(Clone, Default, PartialEq)]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let runs = self.0.chunk_by(|a, b| a == b);
        f.debug_list()
            .entries(runs.map(|run| (run[0], run.len())))
            .finish()
    }
}

/// What a user sees of a tree: the bytes of each file.
pub(crate) type Tree = BTreeMap<String, Bytes>;

pub(crate) fn tree(engine: &Engine, dir: &Node) -> Result<Tree> {
    let listing = engine.open_dir(dir)?;
    let mut names = Vec::new();
    engine.read_dir(&listing, 0, |line| {
        names.push(String::from_utf8_lossy(&line.name).into_owned());
        Ok(true)
    })?;
    let mut tree = Tree::new();
    for name in names {
        if name != "." && name != ".." {
            let node = find(engine, dir.clone(), &[&name])?;
            tree.insert(name, Bytes(read(engine, &node)?));
        }
    }
    Ok(tree)
}

/// One random change, on the engine and, as far as it says that it has been done, on `live`; `other`: the tree that
/// there would be otherwise.
pub(crate) fn change(engine: &Engine, rng: &mut SmallRng, live: &Tree) -> (Result<()>, Tree) {
    let name = format!("n{}", rng.random_range(0..4));
    let mut after = live.clone();
    let dir = root(engine);
    let done = match rng.random_range(0..10) {
        0 => {
            after.remove(&name);
            engine.remove(&dir, name.as_bytes(), false)
        }
        1 => {
            let to = format!("n{}", rng.random_range(0..4));
            if let Some(bytes) = after.remove(&name) {
                after.insert(to.clone(), bytes);
            }
            let flags = rustix::fs::RenameFlags::empty();
            engine.rename(
                (&dir, name.as_bytes()),
                (&dir, to.as_bytes()),
                flags,
                cowfs::engine::creds::Caller::ROOT,
            )
        }
        2 | 3 => {
            after.entry(name.clone()).or_default();
            let caller = cowfs::engine::creds::Caller {
                uid: 0,
                gid: 0,
                umask: 0o022,
            };
            let flags = libc::O_RDWR;
            engine
                .create(&dir, name.as_bytes(), 0o600, flags, caller)
                .map(drop)
        }
        _ => {
            let (at, len) = (rng.random_range(0..20_000), rng.random_range(1..20_000));
            let byte: u8 = rng.random();
            let written = write(engine, &name, at as u64, &vec![byte; len]);
            // Where it succeeds for a part, that part is what it did.
            let reached = written.as_ref().map_or(len, |bytes| *bytes);
            if let Some(Bytes(bytes)) = after.get_mut(&name)
                && reached > 0
            {
                bytes.resize(bytes.len().max(at + reached), 0);
                bytes[at..at + reached].fill(byte);
            }
            written.map(drop)
        }
    };
    (done, after)
}
