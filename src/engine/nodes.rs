//! The nodes that the kernel knows objects by.
//!
//! A node number says what it names: a live object by its backing inode number, an object in a snapshot, or
//! the snapshot folder of a directory. The number is a pure function of that (see [`live_node`],
//! [`snapshot_node`], [`node_through`], [`folder_node`]), so it is the same after every remount (C2). Two objects never share
//! one: where numbers are mixed and meet, the second is refused ([`Nodes::told_member`]).

use super::epoch::Epochs;
use super::inventory::{self, Aspect, Inventory, KnownNode};
use super::object::{Member, Noted, Numbers, Object};
use super::recalled::Recalled;
use crate::error::{Error, Result};
use crate::ids::{Epoch, Ino};
use crate::store::EntryImage;
use crate::sync::{Arc, AtomicU64, Mutex, Ordering};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ops::{Deref, Range};

/// A node number: what the kernel calls an inode of the mount, and what `st_ino` shows.
pub type NodeId = u64;

/// The root of the live tree (`FUSE_ROOT_ID`).
pub const ROOT_NODE: NodeId = 1;
/// No number has bit 63: databases and languages take numbers for signed.
const SNAPSHOT_BIT: u64 = 1 << 62;
const FOLDER_BIT: u64 = 1 << 61;
/// Marks a snapshot node whose parts do not fit and were mixed instead.
const MIXED_BIT: u64 = 1 << 60;
/// Marks a live object that would have the number of a snapshot node.
const ASIDE_BIT: u64 = 1 << 59;
/// Inode numbers of the backing filesystem from here on cannot be told from the numbers of cowfs.
pub const INO_MAX: u64 = ASIDE_BIT;
/// How the numbers of a snapshot and an inode stand side by side: the bit that marks it, and the bits of the inode number
/// and of the snapshot's below that. The first that has room for both is taken. The first two stay below 2⁵³, as long as a
/// double has every number: JavaScript knows no other, and would take files for links of each other that are not.
const PACKED: [(u64, u32, u32); 3] = [(1 << 52, 32, 20), (1 << 51, 40, 11), (SNAPSHOT_BIT, 40, 20)];
/// What the first two take.
const SMALL: Range<u64> = 1 << 51..1 << 53;

/// The node of a live object. The root has the number FUSE gives it; an object with that inode number of its
/// own, or that of a snapshot node (possible on no filesystem that cowfs knows), steps aside.
pub fn live_node(ino: Ino, root: Ino) -> NodeId {
    if ino == root {
        ROOT_NODE
    } else if ino.0 == ROOT_NODE {
        FOLDER_BIT - 1
    } else if SMALL.contains(&ino.0) {
        ASIDE_BIT | ino.0
    } else {
        ino.0
    }
}

/// The node of an object in snapshot `k`: both numbers side by side where they fit, below 2⁵³ if they can, and
/// mixed to 60 bits beyond.
pub fn snapshot_node(k: Epoch, ino: Ino) -> NodeId {
    let fits = |&&(_, inos, epochs): &&(u64, u32, u32)| ino.0 >> inos == 0 && k.0 >> epochs == 0;
    match PACKED.iter().find(fits) {
        Some((mark, inos, _)) => mark | k.0 << inos | ino.0,
        None => SNAPSHOT_BIT | MIXED_BIT | (mixed(k, ino) & (MIXED_BIT - 1)),
    }
}

/// The node of an object in snapshot `k` that is reached through the snapshot folder of the directory `through`, which is
/// not the root. One of its own: the kernel lets a directory have one place (`d_splice_alias` of its fs/dcache.c), and
/// would move it to and fro between that and the one below the root's folder.
pub fn node_through(through: Ino, k: Epoch, ino: Ino) -> NodeId {
    SNAPSHOT_BIT | MIXED_BIT | (mix(mixed(k, ino) ^ through.0) & (MIXED_BIT - 1))
}

/// Whether a number is that of an object in a snapshot: none of the live tree is.
#[must_use]
pub fn is_in_snapshot(node: NodeId) -> bool {
    node & SNAPSHOT_BIT != 0 || SMALL.contains(&node)
}

fn mixed(k: Epoch, ino: Ino) -> u64 {
    mix(ino.0 ^ k.0.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The node of the snapshot folder of the live directory with node `dir`.
pub fn folder_node(dir: NodeId) -> NodeId {
    FOLDER_BIT | dir
}

/// The node of an invalid snapshot in the snapshot folder of directory `ino`.
pub fn lost_node(k: Epoch, ino: Ino) -> NodeId {
    snapshot_node(k, ino) | FOLDER_BIT | MIXED_BIT
}

/// A node that stands for what a listing names and nobody can reach: no request finds it.
pub fn unreachable_node(ino: u64) -> NodeId {
    SNAPSHOT_BIT | FOLDER_BIT | (ino & (MIXED_BIT - 1))
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

/// What a node number stands for; small, as there is one for each inode that the kernel knows.
enum Slot {
    Live(Arc<Object>),
    At(Arc<Member>),
    Folder(Box<Folder>),
}

struct Folder {
    dir: ObjectRef,
    lookups: u64,
    noted: Noted,
}

/// Live objects that the kernel has forgotten and can still name by their nodes ([`Nodes::forgotten`]).
const RECALLED: usize = 16 * 1024;

const SHARDS: usize = 64;
type Shard = Mutex<HashMap<NodeId, Slot>>;
/// A shard with room for more than this gives room back when most of it is empty.
const SMALL_SHARD: usize = 1024;

/// All nodes that the kernel, by one mount, or an operation knows.
pub struct Nodes {
    shards: Vec<Shard>,
    root: Ino,
    epochs: Arc<Epochs>,
    known: AtomicU64,
    /// Where what the kernel knows is written down for the next daemon.
    inventory: Option<Arc<Inventory>>,
    /// The live objects that the kernel forgot last: who holds a file handle (name_to_handle_at(2)) may ask for them.
    recalled: Mutex<Recalled>,
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
    pub fn new(root: Ino, epochs: Arc<Epochs>, inventory: Option<Arc<Inventory>>) -> Arc<Self> {
        let shards = (0..SHARDS).map(|_| Mutex::new(HashMap::new())).collect();
        Arc::new(Self {
            shards,
            root,
            epochs,
            known: AtomicU64::new(0),
            inventory,
            recalled: Mutex::new(Recalled::new(RECALLED)),
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
            Slot::At(member) => Some(Node::At(member.clone())),
            Slot::Folder(folder) => Some(Node::Folder(folder.dir.clone())),
        }
    }

    /// The object of `entry`, loaded if it was not known. `born` is its birth if it was created just now. Another object
    /// that had its number is none any more.
    pub fn object(self: &Arc<Self>, entry: &EntryImage, born: Option<Epoch>) -> ObjectRef {
        loop {
            if let Some(object) = self.object_unless_other(entry, born) {
                return object;
            }
            self.discard_other(entry);
        }
    }

    /// As [`Self::object`]; `None` if another object is known by its number.
    pub fn object_unless_other(
        self: &Arc<Self>,
        entry: &EntryImage,
        born: Option<Epoch>,
    ) -> Option<ObjectRef> {
        let node = self.live_id(entry.ino);
        let mut shard = self.shard(node).lock();
        if let Some(Slot::Live(object)) = shard.get(&node) {
            let same = object.entry.handle == entry.handle;
            return same.then(|| self.wrap(object.clone()));
        }
        // The epoch is read under the shard's lock: an earlier value of the same object, gone from the table
        // by now, kept nothing labelled later.
        let now = self.epochs.current();
        let object = Arc::new(Object::new(entry.clone(), now, born));
        if shard.insert(node, Slot::Live(object.clone())).is_none() {
            self.known.fetch_add(1, Ordering::Relaxed);
        }
        Some(self.wrap(object))
    }

    /// Takes the object that is not that of `entry` and has its number out of the table.
    fn discard_other(&self, entry: &EntryImage) {
        let node = self.live_id(entry.ino);
        let mut shard = self.shard(node).lock();
        let Some(Slot::Live(object)) = shard.get(&node) else {
            return;
        };
        if object.entry.handle == entry.handle {
            return;
        }
        // Only a change of the backing directory behind the mount's back can bring this about.
        log::warn!(
            "inode {} changed behind the mount: another object has its number",
            entry.ino
        );
        // The next daemon is not to take the one for the other.
        self.note(&object.noted, Aspect::Live, &object.entry, 0);
        let other = take(&mut shard, node);
        drop(shard);
        drop(other);
        self.known.fetch_sub(1, Ordering::Relaxed);
    }

    /// Notes that the kernel is told of a live object once more.
    pub fn told(&self, object: &ObjectRef) -> NodeId {
        let node = self.live_id(object.ino());
        // Under the shard's lock the inventory sees the counts in their order.
        let _shard = self.inventory.as_ref().map(|_| self.shard(node).lock());
        let lookups = object.lookups.fetch_add(1, Ordering::SeqCst) + 1;
        self.note(&object.noted, Aspect::Live, &object.entry, lookups);
        node
    }

    /// Writes down how often the kernel was told of a node. To be called under the lock of its shard.
    fn note(&self, noted: &Noted, aspect: Aspect, entry: &EntryImage, lookups: u64) {
        let Some(inventory) = &self.inventory else {
            return;
        };
        match noted.slot() {
            Some(slot) if lookups > 0 => inventory.set_lookups(slot, lookups),
            Some(slot) => {
                inventory.remove(slot);
                noted.set(None);
            }
            None if lookups > 0 => noted.set(inventory.add_node(&KnownNode {
                aspect,
                entry: entry.clone(),
                lookups,
            })),
            None => {}
        }
    }

    /// Takes up what an earlier daemon of this mount had told the kernel.
    pub fn restore(self: &Arc<Self>, slot: inventory::Slot, known: &KnownNode) {
        match known.aspect {
            Aspect::Live => {
                let object = self.object(&known.entry, None);
                object.lookups.store(known.lookups, Ordering::SeqCst);
                object.noted.set(Some(slot));
            }
            Aspect::At { epoch, through } => {
                // Until it is looked up again: where it was found is not written down.
                let numbers = through.map_or(Numbers::Apart, Numbers::Through);
                let up = numbers.node(epoch, through.unwrap_or(self.root));
                let member = Member::new(epoch, known.entry.clone(), numbers, up);
                member.lookups.store(known.lookups, Ordering::Relaxed);
                member.noted.set(Some(slot));
                self.put(member.node(), Slot::At(Arc::new(member)));
            }
            Aspect::Folder => {
                let dir = self.object(&known.entry, None);
                let node = folder_node(self.live_id(dir.ino()));
                let noted = Noted::default();
                noted.set(Some(slot));
                let lookups = known.lookups;
                self.put(
                    node,
                    Slot::Folder(Box::new(Folder {
                        dir,
                        lookups,
                        noted,
                    })),
                );
            }
        }
    }

    fn put(&self, node: NodeId, slot: Slot) {
        if self.shard(node).lock().insert(node, slot).is_none() {
            self.known.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Notes that the kernel is told of an object of a snapshot.
    ///
    /// # Errors
    /// `EOVERFLOW` if another one has its number: numbers that are mixed are not quite never the same.
    pub fn told_member(&self, member: Member) -> Result<()> {
        let node = member.node();
        let (snapshot, ino) = (member.snapshot, member.entry.ino);
        let up = member.up.load(Ordering::Relaxed);
        let mut shard = self.shard(node).lock();
        let slot = shard.entry(node).or_insert_with(|| {
            self.known.fetch_add(1, Ordering::Relaxed);
            Slot::At(Arc::new(member))
        });
        match slot {
            Slot::At(known) if (known.snapshot, known.entry.ino) != (snapshot, ino) => {
                log::error!("{ino} of {snapshot} has the number of another object: {node:#x}");
                return Err(Error::Os(Errno::OVERFLOW));
            }
            Slot::At(member) => {
                let lookups = member.lookups.fetch_add(1, Ordering::Relaxed) + 1;
                member.up.store(up, Ordering::Relaxed);
                self.note(&member.noted, member.aspect(), &member.entry, lookups);
            }
            _ => unreachable!(
                "the top bit of a node number tells its kind, and a mounted snapshot has one kind alone"
            ),
        }
        Ok(())
    }

    /// Notes that the kernel is told of the snapshot folder of `dir`.
    pub fn told_folder(&self, dir: &ObjectRef) -> NodeId {
        let node = folder_node(self.live_id(dir.ino()));
        let mut shard = self.shard(node).lock();
        let slot = shard.entry(node).or_insert_with(|| {
            self.known.fetch_add(1, Ordering::Relaxed);
            Slot::Folder(Box::new(Folder {
                dir: dir.clone(),
                lookups: 0,
                noted: Noted::default(),
            }))
        });
        if let Slot::Folder(folder) = slot {
            folder.lookups += 1;
            self.note(&folder.noted, Aspect::Folder, &dir.entry, folder.lookups);
        }
        node
    }

    /// The live object that the kernel knew by this number and has forgotten, if that was not long ago. It may be gone by
    /// now, but it was reached by a name once.
    pub fn forgotten(&self, node: NodeId) -> Option<EntryImage> {
        self.recalled.lock().get(node).cloned()
    }

    /// Forgets for good a live object that has left the live tree.
    pub fn never_recall(&self, ino: Ino) {
        self.recalled.lock().remove(self.live_id(ino));
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
                let left = before.saturating_sub(count);
                self.note(&object.noted, Aspect::Live, &object.entry, left);
                if left == 0 {
                    let mut recalled = self.recalled.lock();
                    // Asked under the lock that `never_recall` takes after it was set.
                    if !object.retained.load(Ordering::SeqCst) {
                        recalled.insert(node, object.entry.clone());
                    }
                }
                is_unknown(object)
            }
            Some(Slot::At(member)) => {
                // Counted under the shard's lock alone.
                let left = member.lookups.load(Ordering::Relaxed).saturating_sub(count);
                member.lookups.store(left, Ordering::Relaxed);
                self.note(&member.noted, member.aspect(), &member.entry, left);
                left == 0
            }
            Some(Slot::Folder(folder)) => {
                folder.lookups = folder.lookups.saturating_sub(count);
                let (left, entry) = (folder.lookups, &folder.dir.entry);
                self.note(&folder.noted, Aspect::Folder, entry, left);
                left == 0
            }
            None => false,
        };
        let slot = if gone { take(&mut shard, node) } else { None };
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
        if ours && is_unknown(object) {
            let slot = take(&mut shard, node);
            drop(shard);
            drop(slot);
            self.known.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Whether neither the kernel nor an operation knows an object. To be asked under the lock of its shard, where no new use
/// of it begins. Uses are read first: the kernel is told of an object by one who uses it, and is not told any more then.
fn is_unknown(object: &Object) -> bool {
    object.uses.load(Ordering::SeqCst) == 0 && object.lookups.load(Ordering::SeqCst) == 0
}

/// Removes a node, and gives back the room of many that have gone before it.
fn take(shard: &mut HashMap<NodeId, Slot>, node: NodeId) -> Option<Slot> {
    let slot = shard.remove(&node);
    if shard.capacity() > SMALL_SHARD && shard.len() < shard.capacity() / 8 {
        shard.shrink_to(shard.len() * 2);
    }
    slot
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// Two things never have one number, no number is negative, and those of snapshots stay exact as doubles while they can.
    #[test]
    fn numbers_are_of_one_thing_each() {
        let edges = [1, 20, 31, 32, 33, 39, 40, 41, 50, 51, 52, 53, 58];
        let numbers = edges.iter().flat_map(|bit| {
            let bit = 1_u64 << bit;
            [bit - 1, bit, bit + 1]
        });
        let inos: Vec<Ino> = numbers.chain([2, 3, INO_MAX - 1]).map(Ino).collect();
        let inos: HashSet<Ino> = inos.into_iter().filter(|ino| ino.0 > 0).collect();
        let root = Ino(2);
        let epochs = [1, 2, 2047, 2048, (1 << 20) - 1, 1 << 20, 1 << 30].map(Epoch);
        let mut seen = HashSet::new();
        let mut one = |node: NodeId, what: &str| {
            assert!(node >> 63 == 0, "{what}: {node:#x}");
            assert!(seen.insert(node), "{what}: {node:#x}");
        };
        for ino in &inos {
            let live = live_node(*ino, root);
            one(live, "live");
            one(folder_node(live), "folder");
            assert!(!is_in_snapshot(live) && !is_in_snapshot(folder_node(live)));
            for k in epochs {
                one(snapshot_node(k, *ino), "in a snapshot");
                one(node_through(root, k, *ino), "through");
                one(lost_node(k, *ino), "lost");
                assert!(is_in_snapshot(snapshot_node(k, *ino)));
                assert!(is_in_snapshot(node_through(root, k, *ino)));
                let small = ino.0 < 1 << 32 && k.0 < 1 << 20 || ino.0 < 1 << 40 && k.0 < 1 << 11;
                assert_eq!(snapshot_node(k, *ino) < 1 << 53, small, "{k:?} {ino:?}");
            }
        }
    }
}
