//! Open files and directories.

use super::Engine;
use super::behind::Written;
use super::dir::{LiveDir, MemberDir};
use super::inventory::{Inventory, KnownHandle, Slot};
use super::nodes::{Node, NodeId, ObjectRef, folder_node, live_node};
use super::object::{Member, Object};
use super::passed::Passed;
use super::view::OpenSnapshot;
use crate::error::{Error, Result};
use crate::ids::Ino;
use crate::store::EntryImage;
use crate::sync::{Arc, AtomicU64, Mutex, Ordering, RwLock};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::collections::HashMap;

/// A file of the live tree, open.
pub struct LiveFile {
    /// The object.
    pub object: ObjectRef,
    pub(super) fd: OwnedFd,
    /// Whether `fd` can be written to.
    pub(super) writable: bool,
    /// Whether the caller can map it shared and writable.
    mappable: bool,
    /// The flags of open(2).
    flags: i32,
    /// Opened with `O_SYNC` (false) or `O_DSYNC` (true): each write is synced before it returns.
    pub sync_each_write: Option<bool>,
    /// What was written to it lately.
    pub(super) written: Arc<Mutex<Written>>,
}

impl Drop for LiveFile {
    fn drop(&mut self) {
        self.object.opens.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A file of a snapshot, open for reading. Keeps the snapshot from being deleted.
pub struct MemberFile {
    /// The object.
    pub member: Arc<Member>,
    /// The live object's bytes, for what has no pre-image.
    pub(super) fd: OwnedFd,
    pub(super) snapshot: OpenSnapshot,
    /// What its reader has passed.
    pub passed: Mutex<Passed>,
}

/// An open file.
pub enum OpenFile {
    /// Of the live tree.
    Live(LiveFile),
    /// Of a snapshot.
    At(MemberFile),
}

/// An open directory.
pub enum OpenDir {
    /// Of the live tree.
    Live(LiveDir),
    /// Of a snapshot.
    At(MemberDir),
    /// The snapshot folder of a directory.
    Folder(ObjectRef),
}

/// Number of an open file or directory, given to the kernel.
pub type HandleId = u64;

/// What is open, by number. A number is never used twice, so that a late request cannot reach another file: not by a later
/// server either, which does not know all that the kernel still has.
pub struct Handles {
    next: AtomicU64,
    files: [RwLock<HashMap<HandleId, Open<OpenFile>>>; 16],
    dirs: RwLock<HashMap<HandleId, Open<OpenDir>>>,
    /// Where what is open is written down for the next daemon, with the root by which nodes are numbered.
    inventory: Option<(Arc<Inventory>, Ino)>,
}

/// What is open, and where the inventory has it.
struct Open<T> {
    what: Arc<T>,
    slot: Option<Slot>,
}

impl OpenFile {
    fn node(&self, root: Ino) -> NodeId {
        match self {
            Self::Live(live) => live_node(live.object.ino(), root),
            Self::At(at) => at.member.node(),
        }
    }

    fn flags(&self) -> i32 {
        match self {
            Self::Live(live) => live.flags,
            Self::At(_) => libc::O_RDONLY,
        }
    }
}

impl OpenDir {
    fn node(&self, root: Ino) -> NodeId {
        match self {
            Self::Live(live) => live_node(live.object.ino(), root),
            Self::At(at) => at.member.node(),
            Self::Folder(dir) => folder_node(live_node(dir.ino(), root)),
        }
    }
}

impl Default for Handles {
    fn default() -> Self {
        // Later than any that an earlier server of the mount gave: none opens a file in a nanosecond.
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let nanoseconds = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        Self {
            next: AtomicU64::new(nanoseconds),
            files: Default::default(),
            dirs: RwLock::default(),
            inventory: None,
        }
    }
}

impl Handles {
    /// An empty table, written down in `inventory`; the tree's root directory is `root`.
    pub fn new(inventory: Option<Arc<Inventory>>, root: Ino) -> Self {
        Self {
            inventory: inventory.map(|inventory| (inventory, root)),
            ..Self::default()
        }
    }

    fn note(&self, known: impl FnOnce(Ino) -> KnownHandle) -> Option<Slot> {
        let (inventory, root) = self.inventory.as_ref()?;
        inventory.add_handle(&known(*root))
    }

    pub(super) fn erase(&self, slot: Option<Slot>) {
        if let (Some((inventory, _)), Some(slot)) = (&self.inventory, slot) {
            inventory.remove(slot);
        }
    }

    /// Takes up a file that an earlier daemon of this mount had opened.
    pub(super) fn restore_file(&self, slot: Slot, id: HandleId, file: OpenFile) {
        let open = Open {
            what: Arc::new(file),
            slot: Some(slot),
        };
        self.shard(id).write().insert(id, open);
    }

    /// Takes up a directory that an earlier daemon of this mount had opened.
    pub(super) fn restore_dir(&self, slot: Slot, id: HandleId, dir: OpenDir) {
        let open = Open {
            what: Arc::new(dir),
            slot: Some(slot),
        };
        self.dirs.write().insert(id, open);
    }

    fn id(&self) -> HandleId {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn shard(&self, id: HandleId) -> &RwLock<HashMap<HandleId, Open<OpenFile>>> {
        &self.files[(id % 16) as usize]
    }

    /// How many files and directories are open.
    pub fn count(&self) -> u64 {
        let files: usize = self.files.iter().map(|shard| shard.read().len()).sum();
        (files + self.dirs.read().len()) as u64
    }

    /// Registers a file that the request `unique` opened.
    pub fn add_file(&self, file: OpenFile, unique: u64) -> HandleId {
        let id = self.id();
        let slot = self.note(|root| KnownHandle {
            id,
            node: file.node(root),
            flags: file.flags(),
            unique,
            directory: false,
        });
        let what = Arc::new(file);
        self.shard(id).write().insert(id, Open { what, slot });
        id
    }

    /// All open files.
    pub(super) fn all_files(&self) -> Vec<Arc<OpenFile>> {
        let shards = self.files.iter().map(|shard| shard.read());
        shards
            .flat_map(|shard| {
                shard
                    .values()
                    .map(|open| open.what.clone())
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    /// The open file behind a number.
    pub fn file(&self, id: HandleId) -> Result<Arc<OpenFile>> {
        self.shard(id)
            .read()
            .get(&id)
            .map(|open| open.what.clone())
            .ok_or(Error::Os(Errno::BADF))
    }

    /// Forgets an open file, and gives it back; it closes when the last request on it is done.
    pub fn close_file(&self, id: HandleId) -> Option<Arc<OpenFile>> {
        // The value outlives the lock: closing may block.
        let file = self.shard(id).write().remove(&id);
        self.erase(file.as_ref().and_then(|open| open.slot));
        file.map(|open| open.what)
    }

    /// Registers a directory that the request `unique` opened.
    pub fn add_dir(&self, dir: OpenDir, unique: u64) -> HandleId {
        let id = self.id();
        let slot = self.note(|root| KnownHandle {
            id,
            node: dir.node(root),
            flags: 0,
            unique,
            directory: true,
        });
        let what = Arc::new(dir);
        self.dirs.write().insert(id, Open { what, slot });
        id
    }

    /// The open directory behind a number.
    pub fn dir(&self, id: HandleId) -> Result<Arc<OpenDir>> {
        self.dirs
            .read()
            .get(&id)
            .map(|open| open.what.clone())
            .ok_or(Error::Os(Errno::BADF))
    }

    /// Forgets an open directory.
    pub fn close_dir(&self, id: HandleId) {
        let dir = self.dirs.write().remove(&id);
        self.erase(dir.as_ref().and_then(|open| open.slot));
        drop(dir);
    }
}

impl Engine {
    /// What is open through the live mount.
    pub fn handles(&self) -> &Arc<Handles> {
        &self.handles
    }

    /// The nodes of files that may be mapped shared and writable: those open for reading and writing (mmap(2),
    /// `EACCES`). A mapping keeps its file open.
    pub(super) fn shared_writable(&self) -> Vec<NodeId> {
        self.open_live_files(|live| live.mappable)
    }

    /// The nodes of files of the live tree that are open for writing.
    pub fn writable_nodes(&self) -> Vec<NodeId> {
        self.open_live_files(|live| live.writable)
    }

    /// Whether the kernel may have bytes of an open file that cowfs has not: somebody has it open for writing, where the kernel
    /// `holds_back` writes, or so that it can be mapped.
    pub fn may_be_dirty(&self, file: &OpenFile, holds_back: bool) -> bool {
        let OpenFile::Live(file) = file else {
            return false;
        };
        let takes = |live: &LiveFile| live.mappable || holds_back && live.writable;
        if takes(file) || file.object.opens.load(Ordering::SeqCst) <= 1 {
            return takes(file);
        }
        self.is_open(&file.object, takes)
    }

    /// The same of a file that the caller may not have open.
    pub fn may_hold_changes(&self, node: &Node, holds_back: bool) -> bool {
        let takes = |live: &LiveFile| live.mappable || holds_back && live.writable;
        match node {
            Node::Live(object) => {
                object.opens.load(Ordering::SeqCst) > 0 && self.is_open(object, takes)
            }
            Node::At(_) | Node::Folder(_) => false,
        }
    }

    /// Whether an object is open through the live mount as it is `wanted`.
    fn is_open(&self, object: &Object, wanted: impl Fn(&LiveFile) -> bool) -> bool {
        let is_it = |what: &OpenFile| match what {
            OpenFile::Live(live) => live.object.ino() == object.ino() && wanted(live),
            OpenFile::At(_) => false,
        };
        self.handles
            .files
            .iter()
            .any(|shard| shard.read().values().any(|open| is_it(&open.what)))
    }

    fn open_live_files(&self, wanted: impl Fn(&LiveFile) -> bool) -> Vec<NodeId> {
        let mut nodes = Vec::new();
        for shard in &self.handles.files {
            for file in shard.read().values() {
                match &*file.what {
                    OpenFile::Live(live) if wanted(live) => {
                        nodes.push(self.nodes.live_id(live.object.ino()));
                    }
                    _ => {}
                }
            }
        }
        nodes.sort_unstable();
        nodes.dedup();
        nodes
    }

    /// Opens a regular file. `flags` are those of open(2); those that the kernel has dealt with already
    /// (creation, truncation, appending, direct I/O) do not reach the backing filesystem.
    pub fn open_file(&self, node: &Node, flags: i32) -> Result<OpenFile> {
        let writes = flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0;
        match node {
            Node::Live(object) => self.open_live(object, flags).map(OpenFile::Live),
            Node::At(_) | Node::Folder(_) if writes => Err(Error::ReadOnly),
            Node::At(member) => {
                let snapshot = self.open_snapshot(member.snapshot)?;
                let fd = self.open_member(&member.entry)?;
                Ok(OpenFile::At(MemberFile {
                    member: member.clone(),
                    fd,
                    snapshot,
                    passed: Mutex::default(),
                }))
            }
            Node::Folder(_) => Err(Error::Os(Errno::ISDIR)),
        }
    }

    /// The live object behind a file of a snapshot. One that its user has shut themself out of since was kept
    /// whole before that ([`Engine::setattr`]), and a descriptor that reads nothing will do.
    fn open_member(&self, entry: &EntryImage) -> Result<OwnedFd> {
        match self.backing.open_object(entry, OFlags::RDONLY) {
            Err(Error::Os(Errno::ACCESS)) if !self.backing.overrides_modes() => {
                self.backing.open_object(entry, OFlags::PATH)
            }
            other => other,
        }
    }

    pub(super) fn open_live(&self, object: &ObjectRef, flags: i32) -> Result<LiveFile> {
        let file = LiveFile::open(object.clone(), flags, || match access(flags) {
            OFlags::RDONLY => self.backing.open_object(&object.entry, OFlags::RDONLY),
            _ => {
                let file = self.backing.open_writable(&object.entry)?;
                Ok(self.backing.for_writer(file))
            }
        })?;
        if flags & libc::O_TRUNC != 0 {
            self.truncate(object, file.fd.as_fd(), 0, None)?;
        }
        Ok(file)
    }
}

/// How the backing file is opened: for writing also for reading, because pre-images are read from it.
pub(super) fn access(flags: i32) -> OFlags {
    if flags & libc::O_ACCMODE == libc::O_RDONLY && flags & libc::O_TRUNC == 0 {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    }
}

/// What `O_SYNC` and `O_DSYNC` ask of each write.
pub(super) fn sync_mode(flags: i32) -> Option<bool> {
    match flags & libc::O_SYNC {
        libc::O_SYNC => Some(false),
        libc::O_DSYNC => Some(true),
        _ => None,
    }
}

impl LiveFile {
    /// A file that `open` opens on the backing filesystem for a caller that asked for `flags`.
    pub(super) fn open(
        object: ObjectRef,
        flags: i32,
        open: impl FnOnce() -> Result<OwnedFd>,
    ) -> Result<Self> {
        // Before it is open: whoever removes its last name meanwhile leaves it to the next server (C7).
        object.opens.fetch_add(1, Ordering::SeqCst);
        let opened = open().inspect_err(|_| {
            object.opens.fetch_sub(1, Ordering::SeqCst);
        });
        Ok(Self {
            fd: opened?,
            object,
            writable: access(flags) == OFlags::RDWR,
            mappable: flags & libc::O_ACCMODE == libc::O_RDWR,
            flags: flags & !libc::O_TRUNC,
            sync_each_write: sync_mode(flags),
            written: Arc::default(),
        })
    }
}
