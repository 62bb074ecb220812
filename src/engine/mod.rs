//! Snapshot semantics over a backing directory. Knows no FUSE: an adapter or a test calls it directly.

pub mod alone;
pub mod attr;
pub mod backing;
pub mod behind;
pub mod check;
pub mod creds;
pub mod dir;
pub mod epoch;
pub mod handle;
pub mod inventory;
pub mod keep;
pub mod names;
pub mod nodes;
pub mod object;
mod orphans;
pub mod pairing;
pub mod passed;
pub mod read;
mod recalled;
pub mod recover;
pub mod room;
mod run;
pub mod session;
pub mod snapshot;
mod superblock;
mod times;
mod unsettled;
pub mod upkeep;
pub mod view;
pub mod write;

use crate::config::{Durability, SpacePolicy};
use crate::error::{Error, Result};
use crate::ids::{Epoch, Lsn};
use crate::store::media::Media;
use crate::store::{EntryImage, Store, StoreOptions};
use crate::sync::{Arc, AtomicBool, Mutex, Ordering, RwLock};
use backing::Backing;
pub use backing::{Call, Change, Failure, Faults, Reach, Witness};
use epoch::Epochs;
use handle::Handles;
use inventory::{Found, Inventory};
use nodes::{Node, NodeId, Nodes, ObjectRef};
use object::Object;
use room::{Room, UnderCut};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use snapshot::{Barrier, CutReport};
use std::path::{Path, PathBuf};
use std::time::Duration;
use times::KernelTimes;
use unsettled::Unsettled;
use upkeep::Upkeep;
use view::Snapshots;

/// What an engine is opened with.
#[derive(Clone)]
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
    /// How objects of the backing directory are opened.
    pub reach: Reach,
    /// How much space snapshots may take.
    pub space: SpacePolicy,
    /// Whoever may write to the root directory may create snapshots.
    pub user_snapshots: bool,
    /// Segment sizes and kind of index. Without a number of the machine's boot the kernel is asked for it.
    pub tuning: StoreOptions,
    /// Where the journal is, if not on files in the store's directory (tests).
    pub media: Option<Arc<dyn Media>>,
    /// Is told of every change of the backing directory (tests).
    pub witness: Option<Witness>,
    /// Decides which system calls on the backing directory fail (tests).
    pub faults: Option<Faults>,
}

/// Gets what processes have written through shared mappings of the given nodes from the kernel to the engine,
/// before a cut.
pub type Flusher = Box<dyn Fn(&[NodeId]) -> Result<()> + Send + Sync>;
/// Told of a node whose attributes have changed in an operation that is not expected to change them.
pub type Listener = Box<dyn Fn(NodeId) + Send + Sync>;

/// A mounted tree: live operations, snapshots, and the store behind them.
///
/// The order of its locks (I6) is in docs/ARCHITECTURE.md. Those of objects are taken in order of inode number by
/// [`keep::Op`].
pub struct Engine {
    /// Serialises cuts, deletions and renames of snapshots.
    cut: Mutex<()>,
    /// Nodes by number, in shards; no other lock is taken under a shard's.
    pub nodes: Arc<Nodes>,
    epochs: Arc<Epochs>,
    /// The cut whose snapshot is not in the table yet. Held by who gives snapshots up, by a cut from before its
    /// record is written until its snapshot is visible, and whenever the guards are changed; no object is locked
    /// under it.
    under_cut: Mutex<Option<UnderCut>>,
    /// The snapshots that pre-images are kept for, ascending; the one being cut is among them.
    guards: RwLock<Arc<Vec<Epoch>>>,
    snapshots: Snapshots,
    handles: Arc<Handles>,
    backing: Backing,
    store: Store,
    /// Where the store is, and what the user calls that place.
    place: (PathBuf, PathBuf),
    /// Something may have come in through a mount.
    used: AtomicBool,
    durability: Durability,
    snapshot_dir: Vec<u8>,
    user_snapshots: bool,
    flusher: RwLock<Option<Flusher>>,
    listener: RwLock<Option<Listener>>,
    /// What brings objects to a cut, where the kernel holds writes back.
    barrier: RwLock<Option<Arc<dyn Barrier>>>,
    upkeep: Upkeep,
    room: Room,
    /// Where what the kernel holds is written down, if another daemon may take the mount over.
    inventory: Option<Arc<Inventory>>,
    /// Files without a name that are open, and have their last link in `orphans/`.
    orphans: Mutex<Vec<ObjectRef>>,
    /// Times that the kernel has told of and the backing directory does not have yet. A leaf in lock order.
    times: KernelTimes,
    /// What has changed and may not be durable.
    unsettled: Unsettled,
    /// What the last cut cost.
    last_cut: Mutex<Option<CutReport>>,
    /// Held while the store is looked over.
    checking: Mutex<()>,
    /// A cut is under way: operations measure how long they waited to begin.
    cutting: AtomicBool,
}

impl Engine {
    /// Opens the backing directory `source` and its store, and recovers what a crash left half done.
    ///
    /// # Errors
    /// [`Error::Source`] and [`Error::Store`] name what cannot be used and the remedy (C12).
    pub fn open(source: &Path, options: EngineOptions) -> Result<Arc<Self>> {
        let backing = Backing::open(source, None, options.reach)?;
        Self::build(backing, options, None)
    }

    /// As [`Self::open`], for a mount that may outlive this process. `directory` is the open backing directory
    /// `source`, which the path may not lead to any more; `inventory` that of an earlier daemon of the same mount.
    ///
    /// # Errors
    /// As [`Self::open`]; what cannot be opened again is logged, and its users get errors.
    pub fn open_for_mount(
        source: &Path,
        directory: OwnedFd,
        options: EngineOptions,
        inventory: Option<OwnedFd>,
    ) -> Result<(Arc<Self>, Found)> {
        let backing = Backing::open(source, Some(directory), options.reach)?;
        let (inventory, mut found) = match inventory {
            Some(file) => Inventory::take_over(file)?,
            None => {
                let new = Inventory::create(&backing.root_entry().handle)?;
                (new, Found::default())
            }
        };
        let engine = Self::build(backing, options, Some((inventory, &mut found)))?;
        Ok((engine, found))
    }

    fn build(
        backing: Backing,
        options: EngineOptions,
        inherited: Option<(Inventory, &mut Found)>,
    ) -> Result<Arc<Self>> {
        let (inventory, found) = inherited.unzip();
        let inventory = inventory.map(Arc::new);
        let mut backing = backing;
        backing.witness = options.witness;
        backing.faults = options.faults;
        let store_path = match &options.store {
            Some(path) => path.clone(),
            None => backing.hidden_path().join("store"),
        };
        let shown = match &options.store {
            Some(path) => path.clone(),
            None => backing.path.join(".cowfs/store"),
        };
        let sequence = pairing::check(&backing, &store_path, &shown)?;
        pairing::forget_lost_session(&backing, &store_path)?;
        let boot = || session::boot(&backing, &store_path);
        let tuning = StoreOptions {
            known: Some(shown.clone()),
            boot: Some(options.tuning.boot.map_or_else(boot, Ok)?),
            sequence: sequence.unwrap_or(0),
            ..options.tuning
        };
        let opened = match options.media {
            Some(media) => Store::open_with(&store_path, tuning, media),
            None => Store::open(&store_path, tuning),
        };
        let checked = opened
            .and_then(|store| {
                pairing::check_store(&backing.hidden_path(), &store, &shown)?;
                Ok(store)
            })
            .map_err(|error| backing.named(error));
        let store = checked.inspect_err(|_| backing.take_back())?;
        let root = backing.root_entry().ino;
        session::begin(&store)?;
        pairing::pair(&backing, &store, (&store_path, &shown), false)?;
        let epochs = Arc::new(Epochs::new(store.epoch()));
        let engine = Arc::new(Self {
            cut: Mutex::new(()),
            last_cut: Mutex::new(None),
            nodes: Nodes::new(root, epochs.clone(), inventory.clone()),
            epochs,
            under_cut: Mutex::new(None),
            guards: RwLock::default(),
            snapshots: Snapshots::load(&store),
            handles: Arc::new(Handles::new(inventory.clone(), root)),
            times: KernelTimes::new(inventory.clone()),
            inventory,
            orphans: Mutex::default(),
            unsettled: Unsettled::default(),
            backing,
            store,
            place: (store_path, shown),
            used: AtomicBool::new(false),
            durability: options.durability,
            snapshot_dir: options.snapshot_dir,
            user_snapshots: options.user_snapshots,
            flusher: RwLock::new(None),
            listener: RwLock::new(None),
            barrier: RwLock::new(None),
            upkeep: Upkeep::default(),
            room: Room::new(options.space),
            checking: Mutex::default(),
            cutting: AtomicBool::new(false),
        });
        engine.refresh_guards(*engine.under_cut.lock());
        // The root stays known as long as there is a mount.
        engine.nodes.told(&engine.root());
        engine.store.with_reserve(|| recover::retained(&engine))?;
        engine.restore(found.unwrap_or(&mut Found::default()))?;
        if let Err(error) = engine.store.make_ready() {
            log::warn!("the store has no room: {error}");
        }
        engine.space()?;
        if let Some(interval) = options.upkeep {
            upkeep::start(&engine, interval)?;
        }
        Ok(engine)
    }

    /// To be called before the first request is served: an older state of the store is not accepted from now on. (Not after a
    /// mount that did not come up: the store may be a copy, and the user goes back to the other.) `again`: an earlier server of
    /// the mount has noted it.
    pub fn serve(&self, again: bool) {
        self.used.store(true, Ordering::SeqCst);
        if !again {
            self.note_use();
        }
    }

    /// What stands there stays if this fails, as for want of descriptors: then less is noticed, and nothing is refused wrongly.
    fn note_use(&self) {
        let (at, shown) = &self.place;
        if let Err(error) = pairing::pair(&self.backing, &self.store, (at, shown), true) {
            log::warn!("that the store is in use cannot be noted: {error}");
        }
    }

    /// Where what the kernel holds is written down.
    pub fn inventory(&self) -> Option<&Arc<Inventory>> {
        self.inventory.as_ref()
    }

    /// Installs what flushes shared mappings before a cut; `None` drops it.
    pub fn set_flusher(&self, flusher: Option<Flusher>) {
        *self.flusher.write() = flusher;
    }

    /// Installs what brings objects to a cut where the kernel holds writes back; `None` drops it.
    pub fn set_barrier(&self, barrier: Option<Arc<dyn Barrier>>) {
        *self.barrier.write() = barrier;
    }

    /// Installs what is told of a node whose attributes have changed in an operation that is not expected to change them;
    /// `None` drops it.
    pub fn set_listener(&self, listener: Option<Listener>) {
        *self.listener.write() = listener;
    }

    fn tell_listener(&self, node: NodeId) {
        if let Some(listener) = &*self.listener.read() {
            listener(node);
        }
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

    /// The object of an entry that was found just now; `born` as with [`Nodes::object`].
    ///
    /// # Errors
    /// `ESTALE` for an entry that has been overtaken: its object is gone, and its number is that of another one.
    fn object(&self, entry: &EntryImage, born: Option<Epoch>) -> Result<ObjectRef> {
        if let Some(object) = self.nodes.object_unless_other(entry, born) {
            return Ok(object);
        }
        let _held = self.backing.hold(entry)?;
        Ok(self.nodes.object(entry, born))
    }

    /// The node behind a number. `ESTALE` for one that is not known.
    pub fn node(&self, node: NodeId) -> Result<Node> {
        if node == nodes::ROOT_NODE {
            return Ok(Node::Live(self.root()));
        }
        self.nodes.get(node).ok_or(Error::Os(Errno::STALE))
    }

    /// Waits, under strict durability, until the record `lsn` is on stable storage (I1).
    fn settle(&self, lsn: Lsn) -> Result<()> {
        match self.durability {
            Durability::Strict => self.store.wait_durable(lsn),
            Durability::Ordered => Ok(()),
        }
    }

    /// Stops the background threads, makes durable what the snapshots need, carries the index to disk and marks
    /// the store as closed in order.
    pub fn close(&self) -> Result<()> {
        self.upkeep.stop();
        self.settle_times();
        self.drop_orphans();
        let settled = self
            .settle_snapshots()
            .and_then(|()| self.store.mark_clean());
        self.store.close().and(settled)?;
        // What was copied while it was in use is older than this.
        if self.used.load(Ordering::SeqCst) {
            self.note_use();
        }
        Ok(())
    }
}
