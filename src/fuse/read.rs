//! The requests that read: the same for the live mount and for a snapshot that is mounted by itself.

use super::FOREVER;
use super::convert::{errno, file_attr, file_type};
use super::crew::Crew;
use super::dropbehind::DropBehind;
use super::handover::SnapshotMounts;
use super::pool::Pool;
use super::reply::{answer, reply_absent, reply_xattr};
use super::status::hidden_xattr;
use crate::engine::Engine;
use crate::engine::attr::Attr;
use crate::engine::backing::kind_of_mode;
use crate::engine::dir::Line;
use crate::engine::handle::{HandleId, Handles, OpenDir, OpenFile};
use crate::engine::nodes::{Node, Nodes, ROOT_NODE};
use crate::error::{Error, Result};
use crate::sync::Arc;
use crate::sys::MAX_WRITE;
use fuser::{
    Errno, FileHandle, FopenFlags, INodeNo, InitFlags, KernelConfig, OpenFlags, ReplyAttr,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyXattr, Request,
};
use std::cell::RefCell;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

/// What is asked of the kernel.
const WANTED: InitFlags = InitFlags::from_bits_retain(
    InitFlags::FUSE_ASYNC_READ.bits()
        | InitFlags::FUSE_BIG_WRITES.bits()
        | InitFlags::FUSE_MAX_PAGES.bits()
        | InitFlags::FUSE_DONT_MASK.bits()
        | InitFlags::FUSE_POSIX_ACL.bits()
        | InitFlags::FUSE_HANDLE_KILLPRIV_V2.bits()
        | InitFlags::FUSE_PARALLEL_DIROPS.bits()
        | InitFlags::FUSE_DO_READDIRPLUS.bits()
        | InitFlags::FUSE_READDIRPLUS_AUTO.bits()
        | InitFlags::FUSE_CACHE_SYMLINKS.bits()
        | InitFlags::FUSE_EXPORT_SUPPORT.bits()
        | InitFlags::FUSE_EXPLICIT_INVAL_DATA.bits(),
);

/// What is asked of the kernel where it is to hold writes back.
const WRITEBACK: InitFlags = InitFlags::FUSE_WRITEBACK_CACHE;

/// What one mount sees: an engine, and what the kernel knows and has open through this mount.
pub(super) struct Reader {
    pub(super) engine: Arc<Engine>,
    pub(super) nodes: Arc<Nodes>,
    pub(super) handles: Arc<Handles>,
    /// What the mount's root directory is.
    pub(super) root: Node,
    /// How the kernel may keep listings.
    pub(super) listings: FopenFlags,
    /// The threads that take its requests.
    pub(super) crew: Arc<Crew>,
    /// Threads for what may have to wait for a disk.
    pub(super) waiting: Arc<Pool>,
    /// Has the kernel forget what readers of snapshots have passed.
    pub(super) dropbehind: DropBehind,
}

impl Reader {
    /// The live tree, with its snapshot folders.
    pub(super) fn live(mounts: &SnapshotMounts) -> Self {
        let engine = mounts.engine.clone();
        Self {
            nodes: engine.nodes.clone(),
            handles: engine.handles().clone(),
            root: Node::Live(engine.root()),
            listings: FopenFlags::empty(),
            crew: Crew::new(mounts.polling.clone()),
            waiting: mounts.waiting.clone(),
            dropbehind: DropBehind::new(mounts.dropper.clone()),
            engine,
        }
    }

    /// The first request of a connection, as the kernel sent it when the mount was made: struct fuse_in_header and
    /// struct fuse_init_in of include/uapi/linux/fuse.h, for a server that comes later.
    pub(super) fn first_request() -> Vec<u8> {
        const FUSE_INIT: u32 = 26;
        const VERSION: [u32; 2] = [7, 40];
        const LENGTH: usize = 40 + 64;
        let mut request = (LENGTH as u32).to_ne_bytes().to_vec();
        request.extend(FUSE_INIT.to_ne_bytes());
        // Number of the request, node.
        request.extend([1_u64, 0].map(u64::to_ne_bytes).concat());
        // User, group, process, nothing; version, read-ahead, what was agreed on.
        let agreed = (WANTED | WRITEBACK).bits() as u32;
        let words = [0, 0, 0, 0, VERSION[0], VERSION[1], MAX_WRITE, agreed];
        request.extend(words.map(u32::to_ne_bytes).concat());
        request.resize(LENGTH, 0);
        request
    }

    /// Agrees with the kernel on what the mount can do.
    ///
    /// # Errors
    /// `Unsupported` if the kernel lacks what `cache=writeback` needs.
    pub(super) fn init(config: &mut KernelConfig, writeback: bool) -> std::io::Result<()> {
        let wanted = WANTED;
        if writeback && config.add_capabilities(WRITEBACK).is_err() {
            return Err(std::io::Error::from(std::io::ErrorKind::Unsupported));
        }
        if let Err(missing) = config.add_capabilities(wanted) {
            log::warn!("the kernel lacks {missing:?}");
            if config.add_capabilities(wanted - missing).is_err() {
                return Err(std::io::Error::from(std::io::ErrorKind::Unsupported));
            }
        }
        // Bounded by what the kernel offers; a smaller limit is the kernel's to choose.
        if config.set_max_write(MAX_WRITE).is_err() || config.set_max_readahead(MAX_WRITE).is_err()
        {
            log::debug!("the kernel limits requests to less than {MAX_WRITE} bytes");
        }
        Ok(())
    }

    /// The node behind a number. `ESTALE` for one that is not known.
    pub(super) fn node(&self, ino: INodeNo) -> Result<Node> {
        if ino.0 == ROOT_NODE {
            return Ok(self.root.clone());
        }
        self.nodes
            .get(ino.0)
            .ok_or(Error::Os(rustix::io::Errno::STALE))
    }

    pub(super) fn file(&self, fh: FileHandle) -> Result<Arc<OpenFile>> {
        self.handles.file(fh.0)
    }

    pub(super) fn lookup(&self, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.look_up(parent, name) {
            Ok((parent, Some(attr))) => self.reply_entry_for(reply, &parent, &attr, FOREVER),
            Ok((_, None)) => reply_absent(reply),
            Err(error) => reply.error(errno(&error)),
        }
    }

    /// What `name` means in `parent`; the kernel is to be told of it. `None` if it means nothing and the kernel may
    /// believe so for ever.
    pub(super) fn look_up(&self, parent: INodeNo, name: &OsStr) -> Result<(Node, Option<Attr>)> {
        // Asked of a node by itself: for one who holds a handle of it, when the kernel has forgotten it (fuse_get_dentry
        // and fuse_get_parent of the kernel's fs/fuse/inode.c).
        if let dots @ (b"." | b"..") = name.as_bytes() {
            let attr = match self.root {
                Node::Live(_) if dots == b"." => self.engine.recall(parent.0)?,
                Node::Live(_) => self.engine.directory_above(&self.node(parent)?)?,
                Node::At(_) | Node::Folder(_) => return Err(Error::Stale),
            };
            return Ok((self.root.clone(), Some(attr)));
        }
        let parent = self.node(parent)?;
        let found = self.engine.lookup_in(&self.nodes, &parent, name.as_bytes());
        match found {
            Ok(attr) => Ok((parent, Some(attr))),
            // Every new name comes through the kernel, but for those of snapshots.
            Err(Error::Os(rustix::io::Errno::NOENT))
                if !matches!(parent, Node::Folder(_))
                    && name.as_bytes() != self.engine.snapshot_dir() =>
            {
                Ok((parent, None))
            }
            Err(error) => Err(error),
        }
    }

    /// As [`Self::look_up`] of a node by itself, for the helper, which asks for a file that had pages and whose number may
    /// be that of anything by now. Of a directory the kernel would go on to look for the place, with locks that are held by
    /// writers whose requests wait for the cut, and move it to where it is found: their renames meet `ESTALE` then
    /// (`__d_unalias` of the kernel's fs/dcache.c).
    pub(super) fn recall_file(&self, node: INodeNo) -> Result<(Node, Option<Attr>)> {
        let attr = self.engine.recall(node.0)?;
        if kind_of_mode(attr.image.mode) == libc::DT_REG {
            return Ok((self.root.clone(), Some(attr)));
        }
        self.nodes.forget(attr.node, 1);
        Err(Error::Stale)
    }

    pub(super) fn forget(&self, ino: INodeNo, nlookup: u64) {
        self.nodes.forget(ino.0, nlookup);
    }

    /// Answers with attributes that may be believed for `ttl`, or less if they change by themselves.
    pub(super) fn getattr(
        &self,
        ino: INodeNo,
        fh: Option<FileHandle>,
        ttl: Duration,
        reply: ReplyAttr,
    ) {
        let found = self.node(ino).and_then(|node| {
            let file = fh.and_then(|fh| self.file(fh).ok());
            let ttl = match &node {
                Node::Folder(dir) => ttl.min(self.folder_lifetime(dir)),
                _ => ttl,
            };
            Ok((self.engine.getattr(&node, file.as_deref())?, ttl))
        });
        answer!(reply, found, (attr, ttl) => reply.attr(&ttl, &file_attr(&attr, attr.shown)));
    }

    pub(super) fn readlink(&self, ino: INodeNo, reply: ReplyData) {
        let target = self.node(ino).and_then(|node| self.engine.read_link(&node));
        answer!(reply, target, target => reply.data(&target));
    }

    /// Opens a file for the request `unique`; returns the number of the handle. `held`: the kernel holds writes back and
    /// keeps the times of what they change.
    pub(super) fn open(
        &self,
        ino: INodeNo,
        flags: OpenFlags,
        unique: u64,
        held: bool,
    ) -> Result<HandleId> {
        let file = self.engine.open_file(&self.node(ino)?, flags.0)?;
        if let (OpenFile::Live(live), true) = (&file, held) {
            self.engine.leave_time(live, None)?;
        }
        Ok(self.handles.add_file(file, unique))
    }

    pub(super) fn read(
        &self,
        fh: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        reply: ReplyData,
    ) {
        let file = match self.file(fh) {
            Ok(file) => file,
            Err(error) => return reply.error(errno(&error)),
        };
        // Direct reads fill no cache: what others have there is theirs.
        if flags.0 & libc::O_DIRECT == 0 {
            let read = offset..offset + u64::from(size);
            self.dropbehind.read(&file, &read);
        }
        with_buffer(size, |buf| {
            match self.engine.read_cached(&file, offset, buf) {
                Ok(Some(n)) => reply.data(&buf[..n]),
                Err(error) => reply.error(errno(&error)),
                Ok(None) if self.crew.may_wait() => {
                    answer!(reply, self.engine.read(&file, offset, buf), n => reply.data(&buf[..n]));
                }
                // Waiting for a disk is not for the last thread at the device.
                Ok(None) => {
                    let (engine, file) = (self.engine.clone(), file.clone());
                    self.waiting.run(move || {
                        with_buffer(size, |buf| {
                            let read = engine.read(&file, offset, buf);
                            drop(file);
                            answer!(reply, read, n => reply.data(&buf[..n]));
                        });
                    });
                }
            }
        });
    }

    pub(super) fn lseek(&self, fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let hole = whence == libc::SEEK_HOLE;
        if !hole && whence != libc::SEEK_DATA {
            return reply.error(Errno::EINVAL);
        }
        if offset < 0 {
            return reply.error(Errno::ENXIO);
        }
        let found = self
            .file(fh)
            .and_then(|file| self.engine.seek(&file, offset as u64, hole));
        answer!(reply, found, at => reply.offset(at as i64));
    }

    pub(super) fn release(&self, fh: FileHandle, reply: ReplyEmpty) {
        if let Some(file) = self.handles.close_file(fh.0) {
            self.dropbehind.closed(&file);
        }
        reply.ok();
    }

    pub(super) fn opendir(&self, req: &Request, ino: INodeNo, reply: ReplyOpen) {
        let opened = self.node(ino).and_then(|node| self.engine.open_dir(&node));
        answer!(reply, opened, dir => {
            let id = self.handles.add_dir(dir, req.unique().0);
            reply.opened(FileHandle(id), self.listings);
        });
    }

    pub(super) fn readdir(&self, fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let done = self.list(fh, offset, |_, line| {
            let name = OsStr::from_bytes(&line.name);
            Ok(!reply.add(INodeNo(line.ino), line.next, file_type(line.kind), name))
        });
        answer!(reply, done, () => reply.ok());
    }

    pub(super) fn readdirplus(&self, fh: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        let done = self.list(fh, offset, |dir, line| self.add_plus(dir, line, &mut reply));
        answer!(reply, done, () => reply.ok());
    }

    fn list(
        &self,
        fh: FileHandle,
        offset: u64,
        mut take: impl FnMut(&OpenDir, &Line) -> Result<bool>,
    ) -> Result<()> {
        let dir = self.handles.dir(fh.0)?;
        self.engine.read_dir(&dir, offset, |line| take(&dir, line))
    }

    pub(super) fn releasedir(&self, fh: FileHandle, reply: ReplyEmpty) {
        self.handles.close_dir(fh.0);
        reply.ok();
    }

    pub(super) fn statfs(&self, reply: ReplyStatfs) {
        answer!(reply, self.engine.backing().statvfs(), st => {
            reply.statfs(
                st.f_blocks, st.f_bfree, st.f_bavail, st.f_files, st.f_ffree,
                st.f_bsize as u32, st.f_namemax as u32, st.f_frsize as u32,
            );
        });
    }

    pub(super) fn getxattr(
        &self,
        mounts: &Arc<SnapshotMounts>,
        node: &Node,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        if let Some(hidden) = hidden_xattr(mounts, node, name) {
            // It may have to look through much of the store.
            return self.waiting.run(move || reply_xattr(reply, hidden(), size));
        }
        reply_xattr(reply, self.engine.getxattr(node, name.as_bytes()), size);
    }

    pub(super) fn listxattr(&self, req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let names = self
            .node(ino)
            .and_then(|node| self.engine.listxattr(&node))
            .map(|names| {
                // Only root sees these (xattr(7)).
                let shown = |name: &Vec<u8>| req.uid() == 0 || !name.starts_with(b"trusted.");
                names
                    .into_iter()
                    .filter(shown)
                    .flat_map(|name| name.into_iter().chain([0]))
                    .collect::<Vec<u8>>()
            });
        reply_xattr(reply, names, size);
    }
}

/// Runs `work` with a buffer that is the thread's own: memory that is new for each read costs as much as reading.
fn with_buffer(size: u32, work: impl FnOnce(&mut [u8])) {
    thread_local! {
        static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    BUFFER.with_borrow_mut(|buffer| {
        if buffer.len() < size as usize {
            buffer.resize(size as usize, 0);
        }
        work(&mut buffer[..size as usize]);
    });
}
