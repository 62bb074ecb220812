//! The requests of the live tree, as fuser hands them over: a few lines each.

use super::convert::{decode_dev, errno, set_time, timestamp, unprivileged};
use super::read::Reader;
use super::reply::{answer, reply_absent, reply_xattr};
use super::writeback::Kind;
use super::{Adapter, FOREVER, HELPER_HANDLE, flush, manages, note_written, status};
use crate::config::Durability;
use crate::engine::attr::SetAttr;
use crate::engine::creds::Unprivileged;
use crate::engine::handle::{LiveFile, OpenFile};
use crate::engine::names::Make;
use crate::engine::nodes::{Node, ROOT_NODE};
use crate::error::{Error, Result};
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, INodeNo,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::SystemTime;

/// The open file for a change, or `EROFS` if it belongs to a snapshot.
pub(super) fn writable(file: &OpenFile) -> Result<&LiveFile> {
    match file {
        OpenFile::Live(live) => Ok(live),
        OpenFile::At(_) => Err(Error::ReadOnly),
    }
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        Reader::init(config, self.gate.is_some())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _turn = self.reader.crew.turn();
        let named = flush::node_of_name(name).filter(|_| parent.0 == ROOT_NODE);
        if let Some(node) = named
            && self.is_helper(req)
        {
            return self.reader.reply_node(reply, node);
        }
        let found = match name.as_bytes() {
            b"." if self.is_helper(req) => self.reader.recall_file(parent),
            _ => self.reader.look_up(parent, name),
        };
        let (parent, attr) = match found {
            Ok((parent, Some(attr))) => (parent, attr),
            // What the kernel believes to be absent it does not ask about again, for the helper neither.
            Ok((_, None)) if named.is_some() => return reply.error(Errno::ENOENT),
            Ok((_, None)) => return reply_absent(reply),
            Err(error) => return reply.error(errno(&error)),
        };
        match &self.gate {
            None => self.reader.reply_entry_for(reply, &parent, &attr, FOREVER),
            Some(gate) if self.is_helper(req) => {
                // It asks on behalf of a seal.
                let ttl = gate.helpers_ttl();
                self.reader.reply_entry_for(reply, &parent, &attr, ttl);
            }
            Some(gate) => {
                let (reader, node) = (self.reader.clone(), attr.node);
                let kind = move || Kind::Attributes {
                    node,
                    of_write: false,
                };
                gate.pass(kind, move |ttl| {
                    reader.reply_entry_for(reply, &parent, &attr, ttl)
                });
            }
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        let _turn = self.reader.crew.part_of_turn();
        self.reader.forget(ino, nlookup);
    }

    fn getattr(&self, req: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        let _turn = self.reader.crew.turn();
        match &self.gate {
            None => self.reader.getattr(ino, fh, FOREVER, reply),
            Some(gate) if self.is_helper(req) => {
                self.reader.getattr(ino, fh, gate.helpers_ttl(), reply);
            }
            Some(gate) => {
                let reader = self.reader.clone();
                let kind = move || Kind::Attributes {
                    node: ino.0,
                    of_write: fh.is_some(),
                };
                gate.pass(kind, move |ttl| reader.getattr(ino, fh, ttl, reply));
            }
        }
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
        ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let _turn = self.reader.crew.turn();
        let set = SetAttr {
            mode,
            uid,
            gid,
            size,
            atime: atime.map(set_time),
            mtime: mtime.map(set_time),
        };
        self.set_attributes(req, ino, set, ctime.map(timestamp), fh, reply);
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        let _turn = self.reader.crew.turn();
        self.reader.readlink(ino, reply);
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
        let _turn = self.reader.crew.turn();
        self.make(
            req,
            (parent, name),
            Vec::new(),
            move |_| Make::Node(mode, decode_dev(rdev)),
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
        let _turn = self.reader.crew.turn();
        if let Ok(folder @ Node::Folder(_)) = self.reader.node(parent) {
            return self.create_snapshot(req, folder, name, reply);
        }
        self.make(
            req,
            (parent, name),
            Vec::new(),
            move |_| Make::Directory(mode),
            umask,
            reply,
        );
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let _turn = self.reader.crew.turn();
        self.make(
            req,
            (parent, name),
            target.as_os_str().as_bytes().to_vec(),
            |target| Make::Symlink(target),
            0,
            reply,
        );
    }

    fn unlink(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.reader.crew.turn();
        self.remove(req, parent, name, false, reply);
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.reader.crew.turn();
        self.remove(req, parent, name, true, reply);
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let _turn = self.reader.crew.turn();
        self.move_name(req, (parent, name), (newparent, newname), flags, reply);
    }

    fn link(
        &self,
        req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let _turn = self.reader.crew.turn();
        self.add_name(req, ino, (newparent, newname), reply);
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
        let _turn = self.reader.crew.turn();
        self.create_file(req, (parent, name), (mode, umask), flags, reply);
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let _turn = self.reader.crew.turn();
        if self.is_helper(req) {
            return reply.opened(HELPER_HANDLE, FopenFlags::FOPEN_KEEP_CACHE);
        }
        let earlier = self.resent.opened(req);
        let gate = self.gate.clone();
        let writes = flags.0 & libc::O_ACCMODE != libc::O_RDONLY;
        let (reader, unique) = (self.reader.clone(), req.unique().0);
        let open = move || {
            let opened = match earlier {
                Some(id) => Ok(id),
                None => reader.open(ino, flags, unique, gate.is_some()),
            };
            let answer = move |_| {
                answer!(reply, opened, id => {
                    reply.opened(FileHandle(id), FopenFlags::FOPEN_KEEP_CACHE);
                });
            };
            match gate {
                Some(gate) if writes => gate.opened(answer),
                _ => answer(FOREVER),
            }
        };
        match &self.gate {
            Some(gate) if writes => gate.pass(|| Kind::Makes, move |_| open()),
            _ => open(),
        }
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let _turn = self.reader.crew.turn();
        self.reader.read(fh, offset, size, flags, reply);
    }

    fn write(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let _turn = self.reader.crew.turn();
        let caller = write_flags
            .contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID)
            .then(|| Unprivileged {
                pid: req.pid(),
                gid: req.gid(),
            });
        if let Some(gate) = &self.gate {
            gate.note_change(ino.0);
        }
        // The kernel syncs itself what it has held back.
        let cached = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let written = self.reader.file(fh).and_then(|file| {
            let live = writable(&file)?;
            let n = self.engine.try_write(live, offset, data, caller, cached)?;
            let syncs = live.sync_each_write.is_some() && !cached;
            Ok((file, n, syncs))
        });
        // Again: the kernel writes pages of mappings back while it makes a seal.
        if let Some(gate) = &self.gate {
            gate.note_change(ino.0);
        }
        let (engine, gate) = (self.engine.clone(), self.gate.clone());
        match written {
            Ok((file, Some(n), true)) => self.reader.crew.wait(&self.blocking, move || {
                let done = writable(&file).and_then(|live| engine.sync_write(live));
                drop(file);
                answer!(reply, done, () => reply.written(n as u32));
            }),
            Ok((file, Some(n), false)) => {
                reply.written(n as u32);
                note_written(&engine, &self.behind, &file, offset, n);
            }
            Ok((file, None, _)) => {
                // The payload is the request thread's, which goes on to the next request.
                let (data, behind) = (data.to_vec(), self.behind.clone());
                let pool = match self.durability {
                    Durability::Strict => &self.changes,
                    Durability::Ordered => &self.full,
                };
                pool.run(move || {
                    let done = writable(&file).and_then(|live| {
                        let n = engine.write(live, offset, &data, caller, cached)?;
                        if !cached {
                            engine.sync_write(live)?;
                        }
                        Ok(n)
                    });
                    if let Some(gate) = gate {
                        gate.note_change(ino.0);
                    }
                    if let Ok(n) = done {
                        note_written(&engine, &behind, &file, offset, n);
                    }
                    drop(file);
                    answer!(reply, done, n => reply.written(n as u32));
                });
            }
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
        let _turn = self.reader.crew.turn();
        self.release_file(fh, reply);
    }

    fn fsync(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        let _turn = self.reader.crew.turn();
        self.fsync_file(req, ino, fh, datasync, reply);
    }

    fn opendir(&self, req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let _turn = self.reader.crew.turn();
        if let Some(id) = self.resent.opened(req) {
            return reply.opened(FileHandle(id), self.reader.listings);
        }
        self.reader.opendir(req, ino, reply);
    }

    fn readdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        let _turn = self.reader.crew.turn();
        self.reader.readdir(fh, offset, reply);
    }

    fn readdirplus(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        let _turn = self.reader.crew.turn();
        let reader = self.reader.clone();
        let list = move |_| reader.readdirplus(fh, offset, reply);
        match &self.gate {
            // It gives out the attributes of many files.
            Some(gate) => gate.pass(|| Kind::Makes, list),
            None => list(FOREVER),
        }
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        let _turn = self.reader.crew.turn();
        self.reader.releasedir(fh, reply);
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let _turn = self.reader.crew.turn();
        let (engine, dir) = (self.engine.clone(), self.reader.handles.dir(fh.0));
        self.reader.crew.wait(&self.blocking, move || {
            answer!(reply, dir.and_then(|dir| engine.fsync_dir(&dir)), () => reply.ok());
        });
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let _turn = self.reader.crew.turn();
        self.reader.statfs(reply);
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
        let _turn = self.reader.crew.turn();
        if let Ok(node) = self.reader.node(ino)
            && let Some(order) = status::hold_order(&self.engine, &node, name, value)
        {
            if !manages(req) {
                return reply.error(Errno::EPERM);
            }
            let engine = self.engine.clone();
            return self.cuts.run(move || {
                let done = order.and_then(|(name, held)| engine.hold_snapshot(&name, held));
                answer!(reply, done, () => reply.ok());
            });
        }
        self.set_attribute(req, ino, (name, value), flags, reply);
    }

    fn getxattr(&self, req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let _turn = self.reader.crew.turn();
        let node = match self.reader.node(ino) {
            Ok(node) => node,
            Err(error) => return reply.error(errno(&error)),
        };
        if let Some((epoch, order)) = status::mount_order(&self.snapshots, &node, name) {
            return self.snapshots.serve(req, epoch, order, move |answer| {
                reply_xattr(reply, status::json(&answer), size);
            });
        }
        if status::is_check(&self.snapshots, &node, name) {
            let (engine, uid) = (self.engine.clone(), req.uid());
            let look = move || reply_xattr(reply, status::check(&engine, uid), size);
            return self.snapshots.waiting.run(look);
        }
        self.reader
            .getxattr(&self.snapshots, &node, name, size, reply);
    }

    fn listxattr(&self, req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let _turn = self.reader.crew.turn();
        self.reader.listxattr(req, ino, size, reply);
    }

    fn removexattr(&self, req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let _turn = self.reader.crew.turn();
        self.remove_attribute(req, ino, name, reply);
    }

    fn fallocate(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let _turn = self.reader.crew.turn();
        let (engine, file, caller) = (self.engine.clone(), self.reader.file(fh), unprivileged(req));
        let reader = self.reader.clone();
        let change = move || {
            let done = file
                .and_then(|file| engine.fallocate(writable(&file)?, mode, offset, length, caller));
            // It may have failed half-way: xfs punches what it zeroes before it allocates anew.
            if done.as_ref().is_err_and(Error::is_full) {
                reader.dropbehind.drop_file(ino.0);
            }
            answer!(reply, done, () => reply.ok());
        };
        match &self.gate {
            None => self.blocking.run(change),
            Some(gate) => {
                let blocking = self.blocking.clone();
                let kind = move || Kind::Locks(vec![ino.0]);
                gate.pass(kind, move |_| blocking.run(change));
            }
        }
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let _turn = self.reader.crew.turn();
        let file = self.reader.file(fh);
        let held = self.gate.is_some();
        if !file.is_ok_and(|file| self.engine.may_be_dirty(&file, held)) {
            return self.reader.lseek(fh, offset, whence, reply);
        }
        // What the kernel has and cowfs has not may lie in what is a hole so far.
        let (cleaner, reader) = (self.cleaner.clone(), self.reader.clone());
        self.cleaning.run(move || match cleaner.clean(ino.0) {
            Ok(()) => reader.lseek(fh, offset, whence, reply),
            Err(error) => reply.error(errno(&error)),
        });
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
        let _turn = self.reader.crew.turn();
        if self.gate.is_some() {
            // The kernel copies by itself then, in its cache, where each write can be cut.
            return reply.error(Errno::ENOSYS);
        }
        let (engine, caller) = (self.engine.clone(), unprivileged(req));
        let files = self
            .reader
            .file(fh_in)
            .and_then(|from| Ok((from, self.reader.file(fh_out)?)));
        self.blocking.run(move || {
            let done = files.and_then(|(from, to)| {
                engine.copy_range(&from, offset_in, writable(&to)?, offset_out, len, caller)
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

    fn poll(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: fuser::PollNotifier,
        _: fuser::PollEvents,
        _: fuser::PollFlags,
        reply: fuser::ReplyPoll,
    ) {
        // The kernel does not ask again: files are always ready (poll(2)). It does not belong in the log.
        reply.error(Errno::ENOSYS);
    }
}
