//! Open files and directories.

use super::Engine;
use super::dir::{LiveDir, MemberDir};
use super::object::{Member, Node, NodeId, ObjectRef};
use super::view::OpenSnapshot;
use crate::error::{Error, Result};
use crate::sync::{Arc, AtomicU64, Ordering, RwLock};
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
    /// Opened with `O_SYNC` (false) or `O_DSYNC` (true): each write is synced before it returns.
    pub sync_each_write: Option<bool>,
}

/// A file of a snapshot, open for reading. Keeps the snapshot from being deleted.
pub struct MemberFile {
    /// The object.
    pub member: Arc<Member>,
    /// The live object's bytes, for what has no pre-image.
    pub(super) fd: OwnedFd,
    pub(super) snapshot: OpenSnapshot,
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

/// What is open, by number. A number is never used twice, so that a late request cannot reach another file.
pub struct Handles {
    next: AtomicU64,
    files: [RwLock<HashMap<HandleId, Arc<OpenFile>>>; 16],
    dirs: RwLock<HashMap<HandleId, Arc<OpenDir>>>,
}

impl Default for Handles {
    fn default() -> Self {
        Self {
            next: AtomicU64::new(1),
            files: Default::default(),
            dirs: RwLock::default(),
        }
    }
}

impl Handles {
    fn id(&self) -> HandleId {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    fn shard(&self, id: HandleId) -> &RwLock<HashMap<HandleId, Arc<OpenFile>>> {
        &self.files[(id % 16) as usize]
    }

    /// How many files and directories are open.
    pub fn count(&self) -> u64 {
        let files: usize = self.files.iter().map(|shard| shard.read().len()).sum();
        (files + self.dirs.read().len()) as u64
    }
}

impl Engine {
    /// Registers an open file.
    pub fn add_file(&self, file: OpenFile) -> HandleId {
        let id = self.handles.id();
        self.handles.shard(id).write().insert(id, Arc::new(file));
        id
    }

    /// The open file behind a number.
    pub fn file(&self, id: HandleId) -> Result<Arc<OpenFile>> {
        self.handles
            .shard(id)
            .read()
            .get(&id)
            .cloned()
            .ok_or(Error::Os(Errno::BADF))
    }

    /// Forgets an open file; it closes when the last request on it is done.
    pub fn close_file(&self, id: HandleId) {
        // The value outlives the lock: closing may block.
        let file = self.handles.shard(id).write().remove(&id);
        drop(file);
    }

    /// Registers an open directory.
    pub fn add_dir(&self, dir: OpenDir) -> HandleId {
        let id = self.handles.id();
        self.handles.dirs.write().insert(id, Arc::new(dir));
        id
    }

    /// The open directory behind a number.
    pub fn dir(&self, id: HandleId) -> Result<Arc<OpenDir>> {
        self.handles
            .dirs
            .read()
            .get(&id)
            .cloned()
            .ok_or(Error::Os(Errno::BADF))
    }

    /// Forgets an open directory.
    pub fn close_dir(&self, id: HandleId) {
        let dir = self.handles.dirs.write().remove(&id);
        drop(dir);
    }

    /// How many files and directories are open.
    pub fn open_handles(&self) -> u64 {
        self.handles.count()
    }

    /// The nodes of files that may be mapped shared and writable: those open for reading and writing (mmap(2),
    /// `EACCES`). A mapping keeps its file open.
    pub(super) fn shared_writable(&self) -> Vec<NodeId> {
        let mut nodes = Vec::new();
        for shard in &self.handles.files {
            for file in shard.read().values() {
                match &**file {
                    OpenFile::Live(live) if live.mappable => {
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
                let fd = self.backing.open_object(&member.entry, OFlags::RDONLY)?;
                Ok(OpenFile::At(MemberFile {
                    member: member.clone(),
                    fd,
                    snapshot,
                }))
            }
            Node::Folder(_) => Err(Error::Os(Errno::ISDIR)),
        }
    }

    fn open_live(&self, object: &ObjectRef, flags: i32) -> Result<LiveFile> {
        let fd = self.backing.open_object(&object.entry, access(flags))?;
        let file = LiveFile::new(object.clone(), fd, flags);
        if flags & libc::O_TRUNC != 0 {
            self.truncate(object, file.fd.as_fd(), 0, false)?;
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
    /// A file opened on the backing filesystem for a caller that asked for `flags`.
    pub(super) fn new(object: ObjectRef, fd: OwnedFd, flags: i32) -> Self {
        Self {
            object,
            fd,
            writable: access(flags) == OFlags::RDWR,
            mappable: flags & libc::O_ACCMODE == libc::O_RDWR,
            sync_each_write: sync_mode(flags),
        }
    }
}
