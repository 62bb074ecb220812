//! Objects in memory: what is known of a file of the live tree, and of one in a snapshot.

use super::inventory::{self, Aspect};
use super::nodes::{NodeId, ROOT_NODE, live_node, lost_node, node_through, snapshot_node};
use crate::ids::{CHUNK_BLOCKS, Epoch, Ino, Lsn};
use crate::store::EntryImage;
use crate::sync::{
    Arc, AtomicBool, AtomicU32, AtomicU64, MappedMutexGuard, Mutex, MutexGuard, Ordering,
};
use rustix::fd::OwnedFd;
use std::collections::HashMap;

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
    /// The snapshots before `base` in which the file is longer than in every later one, newest first, with
    /// its size there; `None` until looked up.
    pub longer: Option<Arc<[(Epoch, u64)]>>,
    /// What of it has to be durable before the object may change, under strict durability.
    pub owed: Owed,
    /// Where the data that was kept last ends.
    pub run: Run,
    /// How often a name in this directory may have changed since it came into memory.
    pub changes: u64,
    /// The epoch of its latest change.
    pub changed: Option<Epoch>,
    /// The epoch in which its last name went, of which an open file may be left; no later snapshot shows it.
    pub removed: Option<Epoch>,
}

/// A run of writes that each need the blocks kept that follow those of the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first block that is not kept.
    pub next: u64,
    /// Blocks that were kept ahead last.
    pub ahead: u64,
}

impl Run {
    /// No write yet.
    pub const NONE: Self = Self {
        next: u64::MAX,
        ahead: 0,
    };
}

/// What of the journal is still to be made durable for an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owed {
    /// Nothing.
    Nothing,
    /// All up to this record, the last that was kept of the object.
    UpTo(Lsn),
    /// Perhaps something that was kept before the object was loaded into memory.
    Unknown,
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
            longer: None,
            // Of an object that was made just now nothing has been kept.
            owed: match birth {
                Some(_) => Owed::Nothing,
                None => Owed::Unknown,
            },
            run: Run::NONE,
            changes: 0,
            changed: None,
            removed: None,
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
        self.longer = None;
        self.run = Run::NONE;
    }

    /// Whether the blocks `first..=last` are known to be kept.
    pub fn has(&self, first: u64, last: u64) -> bool {
        (first..=last).all(|block| {
            let at = (block % CHUNK_BLOCKS) as usize;
            let map = self.chunks.get(&(block / CHUNK_BLOCKS));
            map.is_some_and(|map| map[at / 64] >> (at % 64) & 1 == 1)
        })
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
    /// The object's lock (I4, I6: taken in order of inode number) with what it guards. Most objects are only
    /// looked at: they have none of it.
    kept: Mutex<Option<Box<Kept>>>,
    /// The epoch in which it came into memory.
    since: Epoch,
    /// When it was born, if that was while it was in memory.
    birth: Option<Epoch>,
    /// The epoch that the object has reached ahead of the others, if any: an operation on it belongs to the
    /// later of this and the current epoch. Lets one inode cross into the new epoch before another.
    crossed: AtomicU64,
    /// How often the kernel was told of it and has not forgotten it.
    pub(super) lookups: AtomicU64,
    /// How many [`ObjectRef`]s there are.
    pub(super) uses: AtomicU64,
    /// Where the inventory has it.
    pub(super) noted: Noted,
    /// How many files are open on it.
    pub opens: AtomicU32,
    /// Its last name was moved to `retained/` or `orphans/`: that link is not a name of the live tree.
    pub retained: AtomicBool,
    /// Holds the inode of a removed object, so that its number is not reused while the kernel knows it.
    pub pin: Mutex<Option<Arc<OwnedFd>>>,
    /// It is a new file to which no capabilities were given (capabilities(7)): the kernel asks for them at the first
    /// write to each.
    pub without_capabilities: AtomicBool,
    /// It is known to have neither setuid nor setgid set. Changed under the object's lock.
    pub(super) without_set_id: AtomicBool,
}

/// The bits of a mode that a change of the content by an ordinary user clears.
pub(super) const SET_ID: u32 = libc::S_ISUID | libc::S_ISGID;

impl Object {
    pub(super) fn new(entry: EntryImage, now: Epoch, birth: Option<Epoch>) -> Self {
        Self {
            entry,
            kept: Mutex::new(None),
            since: now,
            birth,
            crossed: AtomicU64::new(0),
            lookups: AtomicU64::new(0),
            uses: AtomicU64::new(0),
            noted: Noted::default(),
            opens: AtomicU32::new(0),
            retained: AtomicBool::new(false),
            pin: Mutex::new(None),
            without_capabilities: AtomicBool::new(false),
            without_set_id: AtomicBool::new(false),
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
    pub fn lock(&self) -> ObjectGuard<'_> {
        MutexGuard::map(self.kept.lock(), |kept| {
            &mut **kept.get_or_insert_with(|| Box::new(Kept::new(self.since, self.birth)))
        })
    }

    /// How often a name in this directory may have changed: what its names mean holds while this number does.
    pub fn changes(&self) -> u64 {
        self.lock().changes
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

/// Which numbers the objects of a snapshot have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numbers {
    /// Their own, apart from those of the live tree and of every other snapshot: reached through the snapshot folder of
    /// the live mount's root.
    Apart,
    /// Apart from those as well: reached through the snapshot folder of this directory.
    Through(Ino),
    /// Those of the live tree, whose root directory is this object: the snapshot is mounted by itself.
    OfLive(Ino),
    /// That of an invalid snapshot's directory in a snapshot folder, which is all that is left of it. It differs
    /// from the one before, so that the kernel lets go of everything that it knew beneath that.
    Lost,
}

impl Numbers {
    /// The node of object `ino` of snapshot `k`.
    pub fn node(self, k: Epoch, ino: Ino) -> NodeId {
        match self {
            Self::Apart => snapshot_node(k, ino),
            Self::Through(dir) => node_through(dir, k, ino),
            Self::OfLive(root) => live_node(ino, root),
            Self::Lost => lost_node(k, ino),
        }
    }
}

/// A locked object.
pub type ObjectGuard<'a> = MappedMutexGuard<'a, Kept>;

/// An object of a snapshot.
#[derive(Debug)]
pub struct Member {
    /// The snapshot.
    pub snapshot: Epoch,
    /// Identity, kind and handle of the object.
    pub entry: EntryImage,
    /// How it and what it contains are numbered.
    pub numbers: Numbers,
    /// What `..` of a listing shows: the number of the directory in which it was last found.
    pub up: AtomicU64,
    /// How often the kernel was told of it and has not forgotten it.
    pub(super) lookups: AtomicU64,
    /// Where the inventory has it.
    pub(super) noted: Noted,
}

impl Member {
    /// An object that the kernel has not been told of, found in the directory that shows the number `up`.
    pub fn new(snapshot: Epoch, entry: EntryImage, numbers: Numbers, up: u64) -> Self {
        Self {
            snapshot,
            entry,
            numbers,
            up: AtomicU64::new(up),
            lookups: AtomicU64::new(0),
            noted: Noted::default(),
        }
    }

    /// The node of object `ino` of the same snapshot, numbered in the same way.
    pub fn node_of(&self, ino: Ino) -> NodeId {
        self.numbers.node(self.snapshot, ino)
    }

    /// What the inventory says of it.
    pub(super) fn aspect(&self) -> Aspect {
        Aspect::At {
            epoch: self.snapshot,
            through: match self.numbers {
                Numbers::Through(dir) => Some(dir),
                Numbers::Apart | Numbers::OfLive(_) | Numbers::Lost => None,
            },
        }
    }

    /// Its node.
    pub fn node(&self) -> NodeId {
        self.node_of(self.entry.ino)
    }

    /// What `st_ino` and `d_ino` show: the node, but for the root of a mount, whose node FUSE prescribes.
    pub fn shown(&self) -> u64 {
        match self.node() {
            ROOT_NODE => self.entry.ino.0,
            node => node,
        }
    }
}

/// Where the inventory has a node, if it has it. Written under the lock of the node's shard.
#[derive(Debug, Default)]
pub(super) struct Noted(AtomicU32);

impl Noted {
    pub(super) fn slot(&self) -> Option<inventory::Slot> {
        inventory::Slot::from_number(self.0.load(Ordering::Relaxed))
    }

    pub(super) fn set(&self, slot: Option<inventory::Slot>) {
        let number = slot.map_or(0, inventory::Slot::number);
        self.0.store(number, Ordering::Relaxed);
    }
}
