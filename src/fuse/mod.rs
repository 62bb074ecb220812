//! The adapter: each request of the kernel becomes one call of the engine. A few lines an operation.
//!
//! A reply is the last thing done (the kernel may send RELEASE the moment it is out), and what may block for
//! long replies from a thread of its own.

mod convert;
pub mod flush;
mod pool;
mod reply;
mod session;
mod status;

pub use session::serve;

use crate::config::MountConfig;
use crate::engine::Engine;
use crate::engine::attr::SetAttr;
use crate::engine::handle::{LiveFile, OpenFile};
use crate::engine::names::Make;
use crate::engine::object::Node;
use crate::error::{Error, Result};
use crate::sync::{Arc, AtomicU32, Ordering};
use convert::{caller, decode_dev, errno, file_attr, file_type, set_time};
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use pool::Pool;
use reply::{answer, reply_xattr};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// How long the kernel may believe what it was told: cowfs is the only way in, so for ever.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);
/// The largest write request, also the kernel's default limit (`fs.fuse.max_pages_limit`).
const MAX_WRITE: u32 = 1 << 20;
/// Threads for requests that may block, of each kind: reads that wait for a disk do not queue behind syncs.
const BLOCKING_THREADS: usize = 8;

/// How long the deletion of a snapshot waits for its files to be closed: the kernel tells of a close(2) only
/// after it has returned.
const DELETE_PATIENCE: Duration = Duration::from_secs(2);

/// The extended attribute in which the kernel keeps a file's ACL (acl(5)).
const ACL_XATTR: &str = "system.posix_acl_access";

/// What fuser drives.
struct Adapter {
    engine: Arc<Engine>,
    config: MountConfig,
    blocking: Pool,
    reading: Pool,
    /// Deletions of snapshots, which may wait for a file to be closed.
    deletions: Pool,
    /// Cuts, one after the other, so that those that wait for one hold up nothing else.
    cuts: Pool,
    /// The process that flushes shared mappings: its opens and syncs concern the kernel's pages alone.
    helper_pid: Arc<AtomicU32>,
}

/// The handle that the flush helper gets: it stands for no open file.
const HELPER_HANDLE: FileHandle = FileHandle(0);

impl Adapter {
    fn new(engine: Arc<Engine>, config: MountConfig, helper_pid: Arc<AtomicU32>) -> Result<Self> {
        Ok(Self {
            engine,
            config,
            blocking: Pool::new("blocking", BLOCKING_THREADS)?,
            reading: Pool::new("reading", BLOCKING_THREADS)?,
            deletions: Pool::new("deletion", 2)?,
            cuts: Pool::new("cut", 1)?,
            helper_pid,
        })
    }

    fn node(&self, ino: INodeNo) -> Result<Node> {
        self.engine.node(ino.0)
    }

    fn live_file(&self, fh: FileHandle) -> Result<Arc<OpenFile>> {
        self.engine.file(fh.0)
    }

    fn make(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        make: Make<'_>,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let made = self.node(parent).and_then(|parent| {
            let attr = self
                .engine
                .make(&parent, name.as_bytes(), make, caller(req, umask))?;
            Ok((parent, attr))
        });
        answer!(reply, made, (parent, attr) => self.reply_entry(reply, &parent, Ok(attr)));
    }

    fn remove(&self, parent: INodeNo, name: &OsStr, directory: bool, reply: ReplyEmpty) {
        let parent = match self.node(parent) {
            Ok(parent) => parent,
            Err(error) => return reply.error(errno(&error)),
        };
        let (engine, name) = (self.engine.clone(), name.as_bytes().to_vec());
        match parent {
            Node::Folder(_) if directory => self.deletions.run(move || {
                answer!(reply, engine.delete_snapshot(&name, DELETE_PATIENCE), () => reply.ok());
            }),
            Node::Folder(_) => reply.error(Errno::EISDIR),
            parent => answer!(reply, engine.remove(&parent, &name, directory), () => reply.ok()),
        }
    }

    fn fsync_file(&self, fh: FileHandle, datasync: bool, reply: ReplyEmpty) {
        if fh == HELPER_HANDLE {
            return reply.ok();
        }
        let engine = self.engine.clone();
        let file = self.live_file(fh);
        self.blocking.run(move || {
            let done = file.and_then(|file| match &*file {
                OpenFile::Live(live) => engine.fsync(live, datasync),
                OpenFile::At(_) => Ok(()),
            });
            answer!(reply, done, () => reply.ok());
        });
    }
}

/// The open file for a change, or `EROFS` if it belongs to a snapshot.
fn writable(file: &OpenFile) -> Result<&LiveFile> {
    match file {
        OpenFile::Live(live) => Ok(live),
        OpenFile::At(_) => Err(Error::ReadOnly),
    }
}

/// Whether a caller lacks `CAP_FSETID`, as far as its user tells: fuser 0.18 drops the kernel's own flag for
/// SETATTR, FALLOCATE and COPY_FILE_RANGE.
fn kills_priv(req: &Request) -> bool {
    req.uid() != 0
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let wanted = InitFlags::FUSE_ASYNC_READ
            | InitFlags::FUSE_BIG_WRITES
            | InitFlags::FUSE_MAX_PAGES
            | InitFlags::FUSE_DONT_MASK
            | InitFlags::FUSE_POSIX_ACL
            | InitFlags::FUSE_HANDLE_KILLPRIV_V2
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_EXPLICIT_INVAL_DATA;
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

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.node(parent).and_then(|parent| {
            let attr = self.engine.lookup(&parent, name.as_bytes())?;
            Ok((parent, attr))
        });
        answer!(reply, found, (parent, attr) => self.reply_entry(reply, &parent, Ok(attr)));
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.engine.nodes.forget(ino.0, nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        let found = self.node(ino).and_then(|node| {
            let file = fh.and_then(|fh| self.engine.file(fh.0).ok());
            Ok((
                self.engine.getattr(&node, file.as_deref())?,
                Self::attr_lifetime(&node),
            ))
        });
        answer!(reply, found, (attr, ttl) => reply.attr(&ttl, &file_attr(&attr, attr.shown)));
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = SetAttr {
            mode,
            uid,
            gid,
            size,
            atime: atime.map(set_time),
            mtime: mtime.map(set_time),
        };
        let (engine, node, kill) = (self.engine.clone(), self.node(ino), kills_priv(req));
        let file = fh.and_then(|fh| self.engine.file(fh.0).ok());
        let change = move || {
            let done = node.and_then(|node| engine.setattr(&node, &set, file.as_deref(), kill));
            drop(file);
            answer!(reply, done, attr => reply.attr(&FOREVER, &file_attr(&attr, attr.shown)));
        };
        // Cutting a file short may have to keep much of it.
        if size.is_some() {
            self.blocking.run(change)
        } else {
            change()
        }
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        let target = self.node(ino).and_then(|node| self.engine.read_link(&node));
        answer!(reply, target, target => reply.data(&target));
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        self.make(
            req,
            parent,
            name,
            Make::Node(mode, decode_dev(rdev)),
            umask,
            reply,
        );
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        if let Ok(folder @ Node::Folder(_)) = self.node(parent) {
            let (engine, name) = (self.engine.clone(), name.as_bytes().to_vec());
            return self.cuts.run(move || {
                let made = engine
                    .snapshot(&name)
                    .and_then(|_| engine.lookup(&folder, &name));
                answer!(reply, made, attr => {
                    let attr = (file_attr(&attr, attr.node), Generation(0));
                    reply.entry_with_ttls(&FOREVER, &Duration::ZERO, &attr.0, attr.1);
                });
            });
        }
        self.make(req, parent, name, Make::Directory(mode), umask, reply);
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        self.make(
            req,
            parent,
            name,
            Make::Symlink(target.as_os_str().as_bytes()),
            0,
            reply,
        );
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.remove(parent, name, false, reply);
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.remove(parent, name, true, reply);
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (from, to) = match (self.node(parent), self.node(newparent)) {
            (Ok(from), Ok(to)) => (from, to),
            (Err(error), _) | (_, Err(error)) => return reply.error(errno(&error)),
        };
        let (name, newname) = (name.as_bytes(), newname.as_bytes());
        match (&from, &to) {
            (Node::Folder(_), Node::Folder(_))
                if (flags - RenameFlags::RENAME_NOREPLACE).is_empty() =>
            {
                let (engine, name, newname) =
                    (self.engine.clone(), name.to_vec(), newname.to_vec());
                self.cuts.run(move || {
                    answer!(reply, engine.rename_snapshot(&name, &newname), () => reply.ok());
                });
            }
            (Node::Live(_), Node::Live(_)) => {
                let flags = rustix::fs::RenameFlags::from_bits_retain(flags.bits());
                let done = self.engine.rename((&from, name), (&to, newname), flags);
                answer!(reply, done, () => reply.ok());
            }
            (Node::At(_), _) | (_, Node::At(_)) => reply.error(Errno::EROFS),
            _ => reply.error(Errno::EXDEV),
        }
    }

    fn link(
        &self,
        _req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let made = self.node(ino).and_then(|node| {
            let parent = self.node(newparent)?;
            let attr = self.engine.link(&node, &parent, newname.as_bytes())?;
            Ok((parent, attr))
        });
        answer!(reply, made, (parent, attr) => self.reply_entry(reply, &parent, Ok(attr)));
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let made = self.node(parent).and_then(|parent| {
            self.engine
                .create(&parent, name.as_bytes(), mode, flags, caller(req, umask))
        });
        answer!(reply, made, (attr, file) => {
            let fh = FileHandle(self.engine.add_file(OpenFile::Live(file)));
            let ino = attr.node;
            reply.created(&FOREVER, &file_attr(&attr, ino), Generation(0), fh, FopenFlags::FOPEN_KEEP_CACHE);
        });
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if req.pid() == self.helper_pid.load(Ordering::Relaxed) {
            return reply.opened(HELPER_HANDLE, FopenFlags::FOPEN_KEEP_CACHE);
        }
        let opened = self
            .node(ino)
            .and_then(|node| self.engine.open_file(&node, flags.0));
        answer!(reply, opened, file => {
            reply.opened(FileHandle(self.engine.add_file(file)), FopenFlags::FOPEN_KEEP_CACHE);
        });
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut buf = vec![0; size as usize];
        let file = match self.engine.file(fh.0) {
            Ok(file) => file,
            Err(error) => return reply.error(errno(&error)),
        };
        match self.engine.read_cached(&file, offset, &mut buf) {
            Ok(Some(n)) => reply.data(&buf[..n]),
            Err(error) => reply.error(errno(&error)),
            // Waiting for a disk is not for a request thread.
            Ok(None) => {
                let engine = self.engine.clone();
                self.reading.run(move || {
                    let read = engine.read(&file, offset, &mut buf);
                    drop(file);
                    answer!(reply, read, n => reply.data(&buf[..n]));
                });
            }
        }
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let kill = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        let written = self.engine.file(fh.0).and_then(|file| {
            let n = self.engine.write(writable(&file)?, offset, data, kill)?;
            Ok((file, n))
        });
        match written {
            Ok((file, n)) if writable(&file).is_ok_and(|live| live.sync_each_write.is_some()) => {
                let engine = self.engine.clone();
                self.blocking.run(move || {
                    let done = writable(&file).and_then(|live| engine.sync_write(live));
                    drop(file);
                    answer!(reply, done, () => reply.written(n as u32));
                });
            }
            Ok((_, n)) => reply.written(n as u32),
            Err(error) => reply.error(errno(&error)),
        }
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // Nothing is held back here, so there is nothing to do at close(2); the kernel need not ask again.
        reply.error(Errno::ENOSYS);
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.engine.close_file(fh.0);
        reply.ok();
    }

    fn fsync(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.fsync_file(fh, datasync, reply);
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let opened = self.node(ino).and_then(|node| self.engine.open_dir(&node));
        answer!(reply, opened, dir => {
            reply.opened(FileHandle(self.engine.add_dir(dir)), FopenFlags::empty());
        });
    }

    fn readdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let done = self.engine.dir(fh.0).and_then(|dir| {
            self.engine.read_dir(&dir, offset, |line| {
                let name = OsStr::from_bytes(&line.name);
                Ok(!reply.add(INodeNo(line.ino), line.next, file_type(line.kind), name))
            })
        });
        answer!(reply, done, () => reply.ok());
    }

    fn readdirplus(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let done = self.engine.dir(fh.0).and_then(|dir| {
            self.engine
                .read_dir(&dir, offset, |line| self.add_plus(&dir, line, &mut reply))
        });
        answer!(reply, done, () => reply.ok());
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.engine.close_dir(fh.0);
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let (engine, dir) = (self.engine.clone(), self.engine.dir(fh.0));
        self.blocking.run(move || {
            answer!(reply, dir.and_then(|dir| engine.fsync_dir(&dir)), () => reply.ok());
        });
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        answer!(reply, self.engine.backing().statvfs(), st => {
            reply.statfs(
                st.f_blocks, st.f_bfree, st.f_bavail, st.f_files, st.f_ffree,
                st.f_bsize as u32, st.f_namemax as u32, st.f_frsize as u32,
            );
        });
    }

    fn setxattr(
        &self,
        req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let done = self.node(ino).and_then(|node| {
            let kill = name == ACL_XATTR && kills_priv(req) && {
                let group = self.engine.getattr(&node, None)?.image.gid;
                !convert::is_member(req, group)
            };
            self.engine
                .setxattr(&node, name.as_bytes(), value, flags, kill)
        });
        answer!(reply, done, () => reply.ok());
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let node = match self.node(ino) {
            Ok(node) => node,
            Err(error) => return reply.error(errno(&error)),
        };
        if let Some(hidden) = self.hidden_xattr(&node, name) {
            // It may have to look through much of the store.
            return self.reading.run(move || reply_xattr(reply, hidden(), size));
        }
        reply_xattr(reply, self.engine.getxattr(&node, name.as_bytes()), size);
    }

    fn listxattr(&self, req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
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

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let done = self
            .node(ino)
            .and_then(|node| self.engine.removexattr(&node, name.as_bytes()));
        answer!(reply, done, () => reply.ok());
    }

    fn fallocate(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let (engine, file, kill) = (self.engine.clone(), self.live_file(fh), kills_priv(req));
        self.blocking.run(move || {
            let done = file
                .and_then(|file| engine.fallocate(writable(&file)?, mode, offset, length, kill));
            answer!(reply, done, () => reply.ok());
        });
    }

    fn lseek(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let hole = whence == libc::SEEK_HOLE;
        if (!hole && whence != libc::SEEK_DATA) || offset < 0 {
            return reply.error(Errno::EINVAL);
        }
        let found = self
            .live_file(fh)
            .and_then(|file| self.engine.seek(&file, offset as u64, hole));
        answer!(reply, found, at => reply.offset(at as i64));
    }

    fn copy_file_range(
        &self,
        req: &Request,
        _ino_in: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        _ino_out: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let (engine, kill) = (self.engine.clone(), kills_priv(req));
        let files = self
            .live_file(fh_in)
            .and_then(|from| Ok((from, self.live_file(fh_out)?)));
        self.blocking.run(move || {
            let done = files.and_then(|(from, to)| {
                engine.copy_range(&from, offset_in, writable(&to)?, offset_out, len, kill)
            });
            answer!(reply, done, n => reply.written(n as u32));
        });
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: fuser::IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        // What a filesystem without the command answers (ioctl(2)).
        reply.error(Errno::ENOTTY);
    }
}
