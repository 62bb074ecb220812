//! Snapshot semantics over a backing directory. Knows no FUSE: an adapter or a test calls it directly.

pub mod attr;
pub mod backing;
pub mod creds;
pub mod dir;
pub mod epoch;
pub mod handle;
pub mod keep;
pub mod names;
pub mod object;
pub mod read;
pub mod recover;
pub mod snapshot;
pub mod upkeep;
pub mod view;
pub mod write;

use crate::config::Durability;
use crate::error::{Error, Result};
use crate::ids::{Epoch, Lsn};
use crate::store::{Store, StoreOptions};
use crate::sync::{Arc, AtomicBool, Mutex, RwLock};
use backing::Backing;
use epoch::Epochs;
use handle::Handles;
use object::{Node, NodeId, Nodes, Object, ObjectRef};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use snapshot::CutReport;
use std::path::{Path, PathBuf};
use std::time::Duration;
use upkeep::Upkeep;
use view::Snapshots;

/// What an engine is opened with.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// The directory of the journal and index; `None`: inside the backing directory's `.cowfs`.
    pub store: Option<PathBuf>,
    /// When pre-images reach stable storage (C8).
    pub durability: Durability,
    /// How often the journal is synced in the background; `None`: no upkeep thread at all, the caller runs
    /// [`Engine::upkeep`] itself (tests).
    pub upkeep: Option<Duration>,
    /// The name under which snapshots are reached.
    pub snapshot_dir: Vec<u8>,
    /// Segment sizes and kind of index.
    pub tuning: StoreOptions,
}

/// Gets what processes have written through shared mappings of the given nodes from the kernel to the engine,
/// before a cut.
pub type Flusher = Box<dyn Fn(&[NodeId]) -> Result<()> + Send + Sync>;

/// A mounted tree: live operations, snapshots, and the store behind them.
///
/// The fields stand in lock order (I6): a thread that holds a lock takes only those further down. Between
/// `cut` and the tables come the locks of objects, taken in order of inode number by [`keep::Op`].
pub struct Engine {
    /// Serialises cuts, deletions and renames of snapshots.
    cut: Mutex<()>,
    /// Nodes by number, in shards; no other lock is taken under a shard's.
    pub nodes: Arc<Nodes>,
    epochs: Arc<Epochs>,
    /// The snapshots that pre-images are kept for, ascending; the one being cut is among them.
    guards: RwLock<Arc<[Epoch]>>,
    snapshots: Snapshots,
    handles: Handles,
    backing: Backing,
    store: Store,
    durability: Durability,
    snapshot_dir: Vec<u8>,
    flusher: RwLock<Option<Flusher>>,
    upkeep: Upkeep,
    /// What the last cut cost.
    last_cut: Mutex<Option<CutReport>>,
    /// A cut is under way: operations measure how long they waited to begin.
    cutting: AtomicBool,
}

impl Engine {
    /// Opens the backing directory `source` and its store, and recovers what a crash left half done.
    ///
    /// # Errors
    /// [`Error::Source`] and [`Error::Store`] name what cannot be used and the remedy (C12).
    pub fn open(source: &Path, options: EngineOptions) -> Result<Arc<Self>> {
        let backing = Backing::open(source)?;
        let store_path = match &options.store {
            Some(path) => path.clone(),
            None => backing.hidden_path().join("store"),
        };
        // The index may want room that only the reserve has; upkeep sets it aside again.
        backing.drop_reserve();
        let store = Store::open(&store_path, options.tuning)?;
        recover::pair(&backing, &store, options.store.as_deref())?;
        let root = backing.root_entry().ino;
        if root.0 >= object::INO_MAX {
            return Err(Error::Source {
                path: source.into(),
                why: "has an inode number above 2⁶¹".into(),
            });
        }
        let epochs = Arc::new(Epochs::new(store.epoch()));
        let engine = Arc::new(Self {
            cut: Mutex::new(()),
            last_cut: Mutex::new(None),
            nodes: Nodes::new(root, epochs.clone()),
            epochs,
            guards: RwLock::new(Arc::from([])),
            snapshots: Snapshots::load(&store),
            handles: Handles::default(),
            backing,
            store,
            durability: options.durability,
            snapshot_dir: options.snapshot_dir,
            flusher: RwLock::new(None),
            upkeep: Upkeep::default(),
            cutting: AtomicBool::new(false),
        });
        engine.refresh_guards(None);
        // The root stays known as long as there is a mount.
        engine.nodes.told(&engine.root());
        recover::retained(&engine)?;
        if let Some(interval) = options.upkeep {
            upkeep::start(&engine, interval)?;
        }
        Ok(engine)
    }

    /// Installs what flushes shared mappings before a cut; `None` drops it.
    pub fn set_flusher(&self, flusher: Option<Flusher>) {
        *self.flusher.write() = flusher;
    }

    /// A descriptor of a live object for calls that need no more than `O_PATH`.
    fn object_fd(&self, object: &Object) -> Result<Arc<OwnedFd>> {
        if let Some(pin) = object.pin.lock().clone() {
            return Ok(pin);
        }
        let fd = self.backing.path_fd(&object.entry)?;
        // Removed meanwhile: what is cached now would keep its space from being freed.
        if object.pin.lock().is_some() {
            self.backing.drop_path(object.ino());
        }
        Ok(fd)
    }

    /// The backing directory.
    pub fn backing(&self) -> &Backing {
        &self.backing
    }

    /// The store of pre-images.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The name under which snapshots are reached.
    pub fn snapshot_dir(&self) -> &[u8] {
        &self.snapshot_dir
    }

    /// The root of the live tree.
    pub fn root(&self) -> ObjectRef {
        self.nodes.object(self.backing.root_entry(), None)
    }

    /// The node behind a number. `ESTALE` for one that is not known.
    pub fn node(&self, node: NodeId) -> Result<Node> {
        if node == object::ROOT_NODE {
            return Ok(Node::Live(self.root()));
        }
        self.nodes.get(node).ok_or(Error::Os(Errno::STALE))
    }

    /// Makes everything that has been kept durable, as an fsync of a file demands of the journal first (C8).
    pub fn sync_journal(&self) -> Result<()> {
        self.store.sync()
    }

    /// Waits, under strict durability, until the pre-images up to `lsn` are on stable storage (I1).
    fn settle(&self, lsn: Option<Lsn>) -> Result<()> {
        match (self.durability, lsn) {
            (Durability::Strict, Some(lsn)) => self.store.wait_durable(lsn),
            _ => Ok(()),
        }
    }

    /// Stops the upkeep thread, carries the index to disk and marks the store as closed in order.
    pub fn close(&self) -> Result<()> {
        self.upkeep.stop();
        self.store.close()
    }
}
