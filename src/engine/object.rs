//! Objects in memory and the nodes that the kernel knows them by.
//!
//! A node number says what it names: a live object by its backing inode number, an object in a snapshot, or
//! the snapshot folder of a directory. The number is a pure function of that (see [`live_node`],
//! [`snapshot_node`], [`folder_node`]), so it is the same after every remount (C2), and never shared.

use super::epoch::Epochs;
use crate::ids::{Epoch, Ino};
use crate::store::EntryImage;
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, MutexGuard, Ordering};
use rustix::fd::OwnedFd;
use std::collections::HashMap;
use std::ops::Deref;

/// A node number: what the kernel calls an inode of the mount, and what `st_ino` shows.
pub type NodeId = u64;

/// The root of the live tree (`FUSE_ROOT_ID`).
pub const ROOT_NODE: NodeId = 1;
const SNAPSHOT_BIT: u64 = 1 << 63;
const FOLDER_BIT: u64 = 1 << 62;
/// Inode numbers of the backing filesystem from here on cannot be told from the numbers of cowfs.
pub const INO_MAX: u64 = 1 << 61;
/// Inode numbers below this and snapshots below [`EPOCH_LIMIT`] are packed side by side.
const INO_LIMIT: u64 = 1 << 40;
const EPOCH_LIMIT: u64 = 1 << 21;
/// Marks a snapshot node whose parts do not fit and were mixed instead.
const MIXED_BIT: u64 = 1 << 61;

/// The node of a live object. The root has the number FUSE gives it; an object with that inode number of its
/// own (possible on no filesystem that cowfs knows) steps aside.
pub fn live_node(ino: Ino, root: Ino) -> NodeId {
    if ino == root {
        ROOT_NODE
    } else if ino.0 == ROOT_NODE {
        FOLDER_BIT - 1
    } else {
        ino.0
    }
}

/// The node of an object in snapshot `k`: both numbers side by side where they fit (inode numbers below
/// 2⁴⁰, two million snapshots), mixed to 61 bits beyond.
pub fn snapshot_node(k: Epoch, ino: Ino) -> NodeId {
    if ino.0 < INO_LIMIT && k.0 < EPOCH_LIMIT {
        return SNAPSHOT_BIT | k.0 << 40 | ino.0;
    }
    // The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits, cut to 61.
    let mut x = ino.0 ^ k.0.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    SNAPSHOT_BIT | MIXED_BIT | ((x ^ (x >> 31)) & (MIXED_BIT - 1))
}

/// The node of the snapshot folder of the live directory with node `dir`.
pub fn folder_node(dir: NodeId) -> NodeId {
    FOLDER_BIT | dir
}

/// A node that stands for what a listing names and nobody can reach: no request finds it.
pub fn unreachable_node(ino: u64) -> NodeId {
    SNAPSHOT_BIT | FOLDER_BIT | (ino & (FOLDER_BIT - 1))
}

/// What of an object has been kept in the current epoch; guarded by the object's lock.
///
/// It answers "is there a pre-image labelled `base` or later?" without a look into the index. It is only a
/// cache: [`Kept::rebase`] throws it away whenever it may be wrong.
#[derive(Debug)]
pub struct Kept {
    /// The newest snapshot that the answers below refer to.
    base: Option<Epoch>,
    /// The index holds nothing of this object that is labelled later than this.
    seen: Epoch,
    /// When the object was born; `None` until looked up.
    pub birth: Option<Epoch>,
    /// Size at the cut, once the attributes are kept.
    pub attr: Known<u64>,
    /// Whether the last block that the cut had was looked at for a hole. If it was data then, it cannot become
    /// a hole without being kept.
    pub tail_looked_at: bool,
    /// Bit maps of the blocks kept, by chunk; a chunk not listed is unknown, or empty if `fresh`.
    pub chunks: HashMap<u64, [u64; 4]>,
    /// The index holds nothing of this object that is labelled `base` or later but what is listed here.
    pub fresh: bool,
}

/// What is known of an aspect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known<T> {
    /// The index has to be asked.
    Unknown,
    /// Not kept yet.
    No,
    /// Kept, with what a later operation needs of it.
    Yes(T),
}

impl Kept {
    fn new(seen: Epoch, birth: Option<Epoch>) -> Self {
        Self {
            base: None,
            seen,
            birth,
            attr: Known::Unknown,
            tail_looked_at: false,
            chunks: HashMap::new(),
            fresh: false,
        }
    }

    /// Makes the answers refer to snapshot `base`, forgetting those that referred to another.
    pub fn rebase(&mut self, base: Epoch) {
        if self.base == Some(base) {
            return;
        }
        self.fresh = base > self.seen;
        self.base = Some(base);
        self.attr = if self.fresh {
            Known::No
        } else {
            Known::Unknown
        };
        self.tail_looked_at = false;
        self.chunks = HashMap::new();
    }

    /// Notes that something labelled `label` was kept.
    pub fn note(&mut self, label: Epoch) {
        self.seen = self.seen.max(label);
    }
}

/// A live object: a file, directory, symlink or special file, whatever its names.
#[derive(Debug)]
pub struct Object {
    /// Its identity, kind and handle.
    pub entry: EntryImage,
    /// The object's lock (I4, I6: taken in order of inode number) with what it guards.
    kept: Mutex<Kept>,
    /// The epoch that the object has reached ahead of the others, if any: an operation on it belongs to the
    /// later of this and the current epoch. Lets one inode cross into the new epoch before another.
    crossed: AtomicU64,
    /// How often the kernel was told of it and has not forgotten it.
    lookups: AtomicU64,
    /// How many [`ObjectRef`]s there are.
    uses: AtomicU64,
    /// Its last name was moved to `retained/`: that link is not a name of the live tree.
    pub retained: AtomicBool,
    /// Holds the inode of a removed object, so that its number is not reused while the kernel knows it.
    pub pin: Mutex<Option<Arc<OwnedFd>>>,
}

impl Object {
    fn new(entry: EntryImage, now: Epoch, birth: Option<Epoch>) -> Self {
        Self {
            entry,
            kept: Mutex::new(Kept::new(now, birth)),
            crossed: AtomicU64::new(0),
            lookups: AtomicU64::new(0),
            uses: AtomicU64::new(0),
            retained: AtomicBool::new(false),
            pin: Mutex::new(None),
        }
    }

    /// Its identity.
    pub fn ino(&self) -> Ino {
        self.entry.ino
    }

    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        self.entry.kind == libc::DT_DIR
    }

    /// Takes the object's lock.
    pub fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock()
    }

    /// The epoch of an operation on this object that entered epoch `entered`.
    pub fn epoch(&self, entered: Epoch) -> Epoch {
        entered.max(Epoch(self.crossed.load(Ordering::SeqCst)))
    }

    /// Lets the object cross into `epoch` ahead of the others. The caller holds the object's lock.
    pub(super) fn cross(&self, epoch: Epoch) {
        self.crossed.fetch_max(epoch.0, Ordering::SeqCst);
    }
}

/// An object of a snapshot.
#[derive(Debug)]
pub struct Member {
    /// The snapshot.
    pub snapshot: Epoch,
    /// Identity, kind and handle of the object.
    pub entry: EntryImage,
}

/// What a node names.
#[derive(Clone)]
pub enum Node {
    /// An object of the live tree.
    Live(ObjectRef),
    /// An object of a snapshot: nothing on it can mutate.
    At(Arc<Member>),
    /// The snapshot folder of a live directory.
    Folder(ObjectRef),
}

enum Slot {
    Live(Arc<Object>),
    At { member: Arc<Member>, lookups: u64 },
    Folder { dir: ObjectRef, lookups: u64 },
}

const SHARDS: usize = 64;
type Shard = Mutex<HashMap<NodeId, Slot>>;

/// All nodes that the kernel or an operation knows.
pub struct Nodes {
    shards: Vec<Shard>,
    root: Ino,
    epochs: Arc<Epochs>,
    known: AtomicU64,
}

/// A reference to a live object. The object stays in the table, with its lock, while one exists or the
/// kernel knows it, so there is never a second in-memory object of the same inode.
pub struct ObjectRef {
    object: Arc<Object>,
    nodes: Arc<Nodes>,
}

impl Deref for ObjectRef {
    type Target = Object;
    fn deref(&self) -> &Object {
        &self.object
    }
}

impl Clone for ObjectRef {
    fn clone(&self) -> Self {
        self.nodes.wrap(self.object.clone())
    }
}

impl Drop for ObjectRef {
    fn drop(&mut self) {
        // Counted down before the kernel's count is read, as `forget` sets that count before it reads this
        // one: whichever comes second sees both at zero.
        if self.object.uses.fetch_sub(1, Ordering::SeqCst) == 1
            && self.object.lookups.load(Ordering::SeqCst) == 0
        {
            self.nodes.drop_if_unknown(&self.object);
        }
    }
}

impl Nodes {
    /// An empty table for a tree whose root directory is `root`.
    pub fn new(root: Ino, epochs: Arc<Epochs>) -> Arc<Self> {
        let shards = (0..SHARDS).map(|_| Mutex::new(HashMap::new())).collect();
        Arc::new(Self {
            shards,
            root,
            epochs,
            known: AtomicU64::new(0),
        })
    }

    fn shard(&self, node: NodeId) -> &Shard {
        &self.shards[(node ^ (node >> 40)) as usize % SHARDS]
    }

    /// The number of nodes in memory.
    pub fn count(&self) -> u64 {
        self.known.load(Ordering::Relaxed)
    }

    /// The node number of a live object.
    pub fn live_id(&self, ino: Ino) -> NodeId {
        live_node(ino, self.root)
    }

    fn wrap(self: &Arc<Self>, object: Arc<Object>) -> ObjectRef {
        object.uses.fetch_add(1, Ordering::SeqCst);
        ObjectRef {
            object,
            nodes: self.clone(),
        }
    }

    /// The node behind a number, if it is known.
    pub fn get(self: &Arc<Self>, node: NodeId) -> Option<Node> {
        match self.shard(node).lock().get(&node)? {
            Slot::Live(object) => Some(Node::Live(self.wrap(object.clone()))),
            Slot::At { member, .. } => Some(Node::At(member.clone())),
            Slot::Folder { dir, .. } => Some(Node::Folder(dir.clone())),
        }
    }

    /// The object of `entry`, loaded if it was not known. `born` is its birth if it was created just now.
    pub fn object(self: &Arc<Self>, entry: &EntryImage, born: Option<Epoch>) -> ObjectRef {
        let node = self.live_id(entry.ino);
        let mut shard = self.shard(node).lock();
        if let Some(Slot::Live(object)) = shard.get(&node) {
            if object.entry.handle == entry.handle {
                return self.wrap(object.clone());
            }
            // Only a change of the backing directory behind the mount's back can bring this about.
            log::warn!(
                "inode {} changed behind the mount: another object has its number",
                entry.ino
            );
        }
        // The epoch is read under the shard's lock: an earlier value of the same object, gone from the table
        // by now, kept nothing labelled later.
        let now = self.epochs.current();
        let object = Arc::new(Object::new(entry.clone(), now, born));
        if shard.insert(node, Slot::Live(object.clone())).is_none() {
            self.known.fetch_add(1, Ordering::Relaxed);
        }
        self.wrap(object)
    }

    /// Notes that the kernel is told of a live object once more.
    pub fn told(&self, object: &ObjectRef) -> NodeId {
        object.lookups.fetch_add(1, Ordering::SeqCst);
        self.live_id(object.ino())
    }

    /// Notes that the kernel is told of an object of a snapshot.
    pub fn told_member(&self, snapshot: Epoch, entry: &EntryImage) -> (NodeId, Arc<Member>) {
        let node = snapshot_node(snapshot, entry.ino);
        let mut shard = self.shard(node).lock();
        let slot = shard.entry(node).or_insert_with(|| {
            self.known.fetch_add(1, Ordering::Relaxed);
            Slot::At {
                member: Arc::new(Member {
                    snapshot,
                    entry: entry.clone(),
                }),
                lookups: 0,
            }
        });
        match slot {
            Slot::At { member, lookups } => {
                *lookups += 1;
                (node, member.clone())
            }
            _ => unreachable!("the top bit of a node number tells its kind"),
        }
    }

    /// Notes that the kernel is told of the snapshot folder of `dir`.
    pub fn told_folder(&self, dir: &ObjectRef) -> NodeId {
        let node = folder_node(self.live_id(dir.ino()));
        let mut shard = self.shard(node).lock();
        let slot = shard.entry(node).or_insert_with(|| {
            self.known.fetch_add(1, Ordering::Relaxed);
            Slot::Folder {
                dir: dir.clone(),
                lookups: 0,
            }
        });
        if let Slot::Folder { lookups, .. } = slot {
            *lookups += 1;
        }
        node
    }

    /// The kernel forgets `count` tellings of a node.
    pub fn forget(&self, node: NodeId, count: u64) {
        let mut shard = self.shard(node).lock();
        let gone = match shard.get_mut(&node) {
            Some(Slot::Live(object)) => {
                // `told` counts up without the shard's lock: nothing of that may be lost.
                let less = |known: u64| Some(known.saturating_sub(count));
                let before = object
                    .lookups
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less)
                    .unwrap_or(0);
                before <= count && object.uses.load(Ordering::SeqCst) == 0
            }
            Some(Slot::At { lookups, .. } | Slot::Folder { lookups, .. }) => {
                *lookups = lookups.saturating_sub(count);
                *lookups == 0
            }
            None => false,
        };
        let slot = if gone { shard.remove(&node) } else { None };
        drop(shard);
        // Dropped outside the shard's lock: a folder holds a reference to an object of another shard.
        if slot.is_some() {
            self.known.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn drop_if_unknown(&self, object: &Arc<Object>) {
        let node = self.live_id(object.ino());
        let mut shard = self.shard(node).lock();
        let ours =
            matches!(shard.get(&node), Some(Slot::Live(known)) if Arc::ptr_eq(known, object));
        if ours
            && object.lookups.load(Ordering::SeqCst) == 0
            && object.uses.load(Ordering::SeqCst) == 0
        {
            let slot = shard.remove(&node);
            drop(shard);
            drop(slot);
            self.known.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
