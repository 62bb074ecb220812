//! A history: random operations on an engine whose disk and directory are recorded.

use crate::disk::{Disk, Drive, Event, Files, Timeline};
use crate::live::{Place, State, States};
use crate::plain::copy_tree;
use crate::view::{self, View};
use cowfs::config::{Durability, SpacePolicy};
use cowfs::engine::attr::{SetAttr, SetTime};
use cowfs::engine::creds::Caller;
use cowfs::engine::handle::OpenFile;
use cowfs::engine::names::Make;
use cowfs::engine::nodes::{Node, NodeId, ROOT_NODE};
use cowfs::engine::{Engine, EngineOptions, Reach, Witness};
use cowfs::error::Result;
use cowfs::store::{SnapshotState, StoreOptions, Timestamp};
use cowfs::sync::{Arc, Mutex};
use rand::Rng;
use rand::rngs::SmallRng;
use rustix::fs::RenameFlags;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The largest file, in bytes.
const LARGEST: u64 = 40_000;

/// What the user knows of a snapshot after an operation.
#[derive(Clone)]
pub struct Promise {
    /// What it showed when it was made; `None` while it is being made or deleted: it may be there or not.
    pub view: Arc<View>,
    /// Creation has returned, and no deletion has begun.
    pub acknowledged: bool,
}

/// What holds from an event on.
#[derive(Clone)]
pub struct Mark {
    /// The number of events before it.
    pub at: usize,
    pub promises: BTreeMap<Vec<u8>, Promise>,
    /// Nothing was in doubt: the session was clean, and all snapshots settled.
    pub quiet: bool,
    /// The index as it was last made durable, and whether it may be said to be that one still.
    pub index: Option<(usize, bool)>,
}

pub struct History {
    pub place: Arc<Place>,
    pub base: PathBuf,
    pub durability: Durability,
    pub sled: bool,
    pub timeline: Timeline,
    pub states: States,
    pub begun: Files,
    pub marks: Vec<Mark>,
    /// The number of events when there was a first snapshot.
    pub prepared: usize,
    disk: Arc<Disk>,
    engine: Option<Arc<Engine>>,
    promises: BTreeMap<Vec<u8>, Promise>,
    names: u32,
    indexes: usize,
    index: Option<(usize, bool)>,
}

pub const FIRST_BOOT: u128 = 1;

pub struct Opening<'a> {
    pub base: &'a Path,
    pub place: &'a Place,
    pub durability: Durability,
    pub sled: bool,
    pub disk: &'a Arc<Disk>,
    pub boot: u128,
    pub witness: Witness,
}

impl Opening<'_> {
    pub fn open(self) -> Result<Arc<Engine>> {
        Engine::open(
            &self.place.source,
            EngineOptions {
                store: Some(self.base.join("store")),
                durability: self.durability,
                upkeep: None,
                snapshot_dir: b".snapshots".to_vec(),
                reach: Reach::AsPermitted,
                space: SpacePolicy::default(),
                user_snapshots: false,
                tuning: StoreOptions {
                    in_memory_index: !self.sled,
                    // Small, so that segments are left and removed in a short history.
                    log_area: 16 << 10,
                    segment_size: 64 << 10,
                    fill_ahead: 16 << 10,
                    fill_after: 2,
                    boot: Some(self.boot),
                    ..StoreOptions::default()
                },
                media: Some(Arc::new(Drive(self.disk.clone()))),
                witness: Some(self.witness),
                faults: None,
            },
        )
    }
}

impl History {
    /// An empty tree; what it takes to make one is not part of the history.
    pub fn new(base: &Path, durability: Durability, sled: bool) -> Self {
        let place = Arc::new(Place::new(base));
        let timeline = Timeline::default();
        let disk = Disk::new(Files::new(), timeline.clone());
        let mut history = Self {
            place,
            base: base.to_path_buf(),
            durability,
            sled,
            timeline,
            states: States::default(),
            begun: Files::new(),
            marks: Vec::new(),
            prepared: 0,
            disk,
            engine: None,
            promises: BTreeMap::new(),
            names: 0,
            indexes: 0,
            index: None,
        };
        history.states.lock().push(Arc::new(State::default()));
        history.open();
        let state = history.place.scan(&State::default());
        *history.states.lock() = vec![Arc::new(state)];
        history.timeline.lock().clear();
        history.begun = history.disk.contents();
        history.mark(false);
        history
    }

    fn open(&mut self) {
        let witness = self
            .place
            .witness(self.states.clone(), self.timeline.clone());
        let opening = Opening {
            base: &self.base,
            place: &self.place,
            durability: self.durability,
            sled: self.sled,
            disk: &self.disk,
            boot: FIRST_BOOT,
            witness,
        };
        self.engine = Some(opening.open().unwrap());
    }

    pub fn end(&mut self) {
        self.engine = None;
    }

    fn engine(&self) -> Arc<Engine> {
        self.engine.clone().unwrap()
    }

    fn mark(&mut self, quiet: bool) {
        self.marks.push(Mark {
            at: self.timeline.lock().len(),
            promises: self.promises.clone(),
            quiet,
            index: self.index,
        });
    }

    /// Runs one operation of the given kind, whatever comes of it.
    pub fn step(&mut self, rng: &mut SmallRng) {
        let quiet = match rng.random_range(0..100) {
            0..30 => self.write(rng),
            30..37 => self.truncate(rng),
            37..46 => self.create(rng),
            46..50 => self.mkdir(rng),
            50..58 => self.remove(rng),
            58..68 => self.rename(rng),
            68..71 => self.link(rng),
            71..76 => self.attributes(rng),
            76..81 => self.fsync(rng),
            81..89 => self.snapshot(),
            89..92 => self.delete_snapshot(rng),
            92..94 => self.upkeep(),
            94..97 => self.tend(),
            97..98 => self.checkpoint(),
            98..99 => self.reopen(true),
            _ => self.reopen(false),
        };
        self.mark(quiet);
    }

    /// A snapshot to begin with, and a file in it.
    pub fn prepare(&mut self, rng: &mut SmallRng) {
        for _ in 0..3 {
            self.create(rng);
            self.write(rng);
        }
        self.mkdir(rng);
        self.snapshot();
        self.mark(false);
        if rng.random_bool(0.7) {
            self.tend();
            self.mark(true);
        }
        self.prepared = self.timeline.lock().len();
    }

    /// A write that is tried first where it must not wait, to a file that a snapshot shows.
    pub fn write_in_two_steps(&mut self) {
        let engine = self.engine();
        let root = engine.node(ROOT_NODE).unwrap();
        let made = engine.create(&root, b"old", 0o644, libc::O_RDWR, Caller::ROOT);
        engine.nodes.forget(made.unwrap().0.node, 1);
        engine.snapshot(b"shows it").unwrap();
        self.timeline.lock().clear();
        let file = self.at(&[b"old".to_vec()], |node| {
            engine.open_file(node, libc::O_RDWR)
        });
        let Ok(OpenFile::Live(file)) = file else {
            unreachable!()
        };
        let tried = engine.try_write(&file, 0, &[7; 5000], None, false).unwrap();
        assert_eq!(tried, None, "there is something to wait for");
        assert_eq!(
            engine.write(&file, 0, &[7; 5000], None, false).unwrap(),
            5000
        );
        // Now nothing has to be kept.
        assert_eq!(
            engine.try_write(&file, 9, &[8; 50], None, false).unwrap(),
            Some(50)
        );
    }

    // ---- operands

    fn paths(&self) -> Vec<Vec<Vec<u8>>> {
        let states = self.states.lock();
        let root = std::os::unix::fs::MetadataExt::ino(&self.place.source.metadata().unwrap());
        let shown = states.last().unwrap().shown(root);
        let split = |path: &Vec<u8>| {
            path[1..]
                .split(|b| *b == b'/')
                .map(<[u8]>::to_vec)
                .collect()
        };
        shown.keys().map(split).collect()
    }

    /// Runs `f` on the node of a path. What was looked up is forgotten.
    fn at<T>(&self, path: &[Vec<u8>], f: impl FnOnce(&Node) -> Result<T>) -> Result<T> {
        let engine = self.engine();
        let mut told: Vec<NodeId> = Vec::new();
        let mut node = engine.node(ROOT_NODE)?;
        let mut done = Ok(());
        for name in path {
            let step = engine
                .lookup(&node, name)
                .and_then(|attr| Ok((attr.node, engine.node(attr.node)?)));
            match step {
                Ok((id, next)) => {
                    told.push(id);
                    node = next;
                }
                Err(error) => {
                    done = Err(error);
                    break;
                }
            }
        }
        let value = done.and_then(|()| f(&node));
        drop(node);
        told.into_iter().for_each(|id| engine.nodes.forget(id, 1));
        value
    }

    fn any(&self, rng: &mut SmallRng, wanted: impl Fn(&Node) -> bool) -> Option<Vec<Vec<u8>>> {
        let mut all = self.paths();
        all.retain(|path| self.at(path, |node| Ok(wanted(node))).unwrap_or(false));
        (!all.is_empty()).then(|| all[rng.random_range(0..all.len())].clone())
    }

    fn any_file(&self, rng: &mut SmallRng) -> Option<Vec<Vec<u8>>> {
        self.any(
            rng,
            |node| matches!(node, Node::Live(o) if o.entry.kind == libc::DT_REG),
        )
    }

    fn any_dir(&self, rng: &mut SmallRng) -> Vec<Vec<u8>> {
        if rng.random_bool(0.5) {
            return Vec::new();
        }
        self.any(rng, |node| matches!(node, Node::Live(o) if o.is_dir()))
            .unwrap_or_default()
    }

    fn any_name(rng: &mut SmallRng) -> Vec<u8> {
        vec![b'a' + rng.random_range(0..5)]
    }

    // ---- operations; each says whether nothing can be in doubt after it

    fn write(&mut self, rng: &mut SmallRng) -> bool {
        let Some(path) = self.any_file(rng) else {
            return false;
        };
        let offset = rng.random_range(0..LARGEST / 2);
        let len = match rng.random_range(0..3) {
            0 => rng.random_range(1..600),
            1 => rng.random_range(1..9000),
            _ => 4096,
        };
        let mut data = vec![0; len];
        rng.fill(&mut data[..]);
        let flags = match rng.random_bool(0.1) {
            true => libc::O_RDWR | libc::O_DSYNC,
            false => libc::O_RDWR,
        };
        let engine = self.engine();
        let done = self.at(&path, |node| {
            let OpenFile::Live(file) = engine.open_file(node, flags)? else {
                unreachable!()
            };
            engine.write(&file, offset, &data, None, false)?;
            engine.sync_write(&file)
        });
        done.unwrap();
        false
    }

    fn truncate(&mut self, rng: &mut SmallRng) -> bool {
        let size = Some(rng.random_range(0..LARGEST));
        let set = SetAttr {
            size,
            ..SetAttr::default()
        };
        if let Some(path) = self.any_file(rng) {
            let engine = self.engine();
            self.at(&path, |node| engine.setattr(node, &set, None, None))
                .unwrap();
        }
        false
    }

    fn create(&mut self, rng: &mut SmallRng) -> bool {
        let (dir, name) = (self.any_dir(rng), Self::any_name(rng));
        let engine = self.engine();
        let flags = libc::O_RDWR | libc::O_EXCL;
        let made = self.at(&dir, |parent| {
            engine.create(parent, &name, 0o644, flags, Caller::ROOT)
        });
        if let Ok((attr, file)) = made {
            drop(file);
            engine.nodes.forget(attr.node, 1);
        }
        false
    }

    fn mkdir(&mut self, rng: &mut SmallRng) -> bool {
        let (dir, name) = (self.any_dir(rng), Self::any_name(rng));
        let engine = self.engine();
        let make = match rng.random_bool(0.8) {
            true => Make::Directory(0o755),
            false => Make::Symlink(b"where"),
        };
        if let Ok(attr) = self.at(&dir, |parent| {
            engine.make(parent, &name, make, Caller::ROOT)
        }) {
            engine.nodes.forget(attr.node, 1);
        }
        false
    }

    fn remove(&mut self, rng: &mut SmallRng) -> bool {
        if let Some(mut path) = self.any(rng, |_| true) {
            let is_dir = self.at(&path, |n| Ok(matches!(n, Node::Live(o) if o.is_dir())));
            let name = path.pop().unwrap();
            let (engine, is_dir) = (self.engine(), is_dir.unwrap());
            // A directory that is not empty stays.
            let _ = self.at(&path, |parent| engine.remove(parent, &name, is_dir));
        }
        false
    }

    fn rename(&mut self, rng: &mut SmallRng) -> bool {
        let Some(mut path) = self.any(rng, |_| true) else {
            return false;
        };
        let (to_dir, to) = (self.any_dir(rng), Self::any_name(rng));
        // A directory into itself.
        if to_dir.starts_with(&path) {
            return false;
        }
        let flags = match rng.random_range(0..20) {
            0..3 => RenameFlags::EXCHANGE,
            3..6 => RenameFlags::WHITEOUT,
            _ => RenameFlags::empty(),
        };
        let mut target = to_dir.clone();
        target.push(to.clone());
        if path.starts_with(&target) {
            return false;
        }
        let from = path.pop().unwrap();
        let engine = self.engine();
        let _ = self.at(&path, |old| {
            self.at(&to_dir, |new| {
                engine.rename((old, &from), (new, &to), flags, Caller::ROOT)
            })
        });
        false
    }

    fn link(&mut self, rng: &mut SmallRng) -> bool {
        if let Some(path) = self.any_file(rng) {
            let (dir, name) = (self.any_dir(rng), Self::any_name(rng));
            let engine = self.engine();
            let made = self.at(&path, |node| {
                self.at(&dir, |parent| engine.link(node, parent, &name))
            });
            if let Ok(attr) = made {
                engine.nodes.forget(attr.node, 1);
            }
        }
        false
    }

    fn attributes(&mut self, rng: &mut SmallRng) -> bool {
        let settable = |node: &Node| matches!(node, Node::Live(o) if !matches!(o.entry.kind, libc::DT_LNK | libc::DT_CHR));
        let Some(path) = self.any(rng, settable) else {
            return false;
        };
        let engine = self.engine();
        let sec = rng.random_range(0..1_000_000);
        let done = self.at(&path, |node| {
            if sec % 3 == 0 {
                // Some are too long for the log.
                let len = if sec % 2 == 0 { 9 } else { 6000 };
                return engine.setxattr(node, b"user.x", &vec![sec as u8; len], 0, None);
            }
            let set = SetAttr {
                mode: (sec % 3 == 1).then_some(0o600 + (sec % 64) as u32),
                mtime: Some(SetTime::At(Timestamp { sec, nsec: 0 })),
                ..SetAttr::default()
            };
            engine.setattr(node, &set, None, None).map(drop)
        });
        done.unwrap();
        false
    }

    fn fsync(&mut self, rng: &mut SmallRng) -> bool {
        if let Some(path) = self.any_file(rng) {
            let engine = self.engine();
            self.at(&path, |node| {
                let OpenFile::Live(file) = engine.open_file(node, libc::O_RDWR)? else {
                    unreachable!()
                };
                engine.fsync(&file, false)
            })
            .unwrap();
        }
        false
    }

    fn snapshot(&mut self) -> bool {
        if self.promises.len() >= 4 {
            return false;
        }
        self.names += 1;
        let name = format!("s{}", self.names).into_bytes();
        let engine = self.engine();
        let begun = self.timeline.lock().len();
        engine.snapshot(&name).unwrap();
        let view = Arc::new(view::snapshot(&engine, &name).unwrap());
        // While it was being made it may be there or not, but if it is it shows this.
        let mut promises = self.promises.clone();
        let promise = |acknowledged| Promise {
            view: view.clone(),
            acknowledged,
        };
        promises.insert(name.clone(), promise(false));
        self.marks.push(Mark {
            at: begun,
            promises,
            quiet: false,
            index: self.index,
        });
        self.promises.insert(name, promise(true));
        false
    }

    fn delete_snapshot(&mut self, rng: &mut SmallRng) -> bool {
        if self.promises.is_empty() {
            return false;
        }
        let at = rng.random_range(0..self.promises.len());
        let name = self.promises.keys().nth(at).unwrap().clone();
        self.promises.get_mut(&name).unwrap().acknowledged = false;
        self.mark(false);
        self.engine()
            .delete_snapshot(&name, Duration::ZERO)
            .unwrap();
        self.promises.remove(&name);
        false
    }

    fn upkeep(&mut self) -> bool {
        self.index_moves();
        self.engine().upkeep().unwrap();
        self.index_rests();
        false
    }

    fn checkpoint(&mut self) -> bool {
        self.index_moves();
        self.engine().store().checkpoint().unwrap();
        self.index_rests();
        false
    }

    /// What the background thread does when nobody writes.
    fn tend(&mut self) -> bool {
        let engine = self.engine();
        engine.settle_snapshots().unwrap();
        engine.store().mark_clean().unwrap();
        true
    }

    fn reopen(&mut self, cleanly: bool) -> bool {
        self.index_moves();
        let engine = self.engine.take().unwrap();
        if cleanly {
            engine.close().unwrap();
        }
        drop(engine);
        self.open();
        self.index_rests();
        let engine = self.engine();
        for info in engine.store().snapshots().iter() {
            assert_ne!(
                info.state,
                SnapshotState::Suspect,
                "VIOLATION: nothing was lost"
            );
        }
        cleanly
    }

    // ---- the index

    fn index_moves(&mut self) {
        if let Some((_, rests)) = &mut self.index {
            *rests = false;
            self.mark(false);
        }
    }

    fn index_rests(&mut self) {
        if self.sled {
            self.indexes += 1;
            let copy = self.base.join(format!("index.{}", self.indexes));
            copy_tree(&self.base.join("store/index"), &copy);
            self.index = Some((self.indexes, true));
        }
    }

    pub fn events(&self) -> Vec<Event> {
        self.timeline.lock().clone()
    }

    pub fn all_states(&self) -> Vec<Arc<State>> {
        self.states.lock().clone()
    }
}

/// A timeline and states for a recovery that is recorded in its turn.
pub fn fresh(state: State) -> (Timeline, States) {
    let states = Arc::new(Mutex::new(vec![Arc::new(state)]));
    (Timeline::default(), states)
}
