//! The floor of FUSE: a filesystem that keeps names and sizes in memory and answers every request at once. Bytes
//! written are dropped, bytes read are zeros. What `scripts/bench` measures on it no FUSE filesystem on this kernel,
//! with this library, can do faster. Idle processors poll while requests come, where they do so for cowfs.
//!
//! With `--files DIR` it keeps bytes there (`disk.rs`). A directory made in `.snapshots` is a snapshot then.

#![allow(clippy::unwrap_used, reason = "a measurement may panic")]

mod disk;

use cowfs::config::Idle;
use cowfs::fuse::idle::Polling;
use fuser::{
    BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, ReplyXattr, Request, SessionACL, TimeOrNow, WriteFlags,
};
use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::ops::Bound::{Excluded, Unbounded};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);
const LARGEST: usize = 1 << 20;
const USAGE: &str = "usage: floor MOUNTPOINT [--writeback] [--no-open] [--threads N] [--files DIR]";
/// A handle: the floor keeps nothing for an open file.
const HANDLE: FileHandle = FileHandle(0);
/// The directory of snapshots, if bytes are kept.
const SNAPSHOTS: u64 = 2;

#[derive(Default)]
struct Node {
    directory: bool,
    mode: u16,
    owner: (u32, u32),
    size: u64,
    /// Where its bytes are, if they are kept.
    file: Option<Arc<File>>,
    /// Of a directory: where each name is in `entries`.
    places: HashMap<OsString, u64>,
    /// Of a directory: names and nodes in the order in which they came.
    entries: BTreeMap<u64, (OsString, u64)>,
    next: u64,
}

impl Node {
    fn find(&self, name: &OsStr) -> Option<u64> {
        Some(self.entries[self.places.get(name)?].1)
    }

    fn add(&mut self, name: &OsStr, node: u64) {
        self.next += 1;
        self.places.insert(name.to_owned(), self.next);
        self.entries.insert(self.next, (name.to_owned(), node));
    }

    fn take(&mut self, name: &OsStr) -> Option<u64> {
        let place = self.places.remove(name)?;
        Some(self.entries.remove(&place)?.1)
    }

    fn attr(&self, number: u64) -> FileAttr {
        let time = SystemTime::UNIX_EPOCH;
        FileAttr {
            ino: INodeNo(number),
            size: self.size,
            blocks: self.size.div_ceil(512),
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: kind(self.directory),
            perm: self.mode & 0o7777,
            nlink: 1,
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

fn kind(directory: bool) -> FileType {
    if directory {
        FileType::Directory
    } else {
        FileType::RegularFile
    }
}

struct Floor {
    polling: Option<Polling>,
    nodes: Mutex<HashMap<u64, Node>>,
    zeros: Vec<u8>,
    disk: Option<disk::Disk>,
    writeback: bool,
    no_open: bool,
}

impl Floor {
    fn nodes(&self) -> MutexGuard<'_, HashMap<u64, Node>> {
        self.count();
        self.nodes.lock().unwrap()
    }

    /// Counts a request.
    fn count(&self) {
        if let Some(polling) = &self.polling {
            polling.answered();
        }
    }

    fn make(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        directory: bool,
        mode: u32,
    ) -> FileAttr {
        let mut nodes = self.nodes();
        let number = nodes.len() as u64 + 1;
        let disk = self.disk.as_ref().filter(|_| !directory);
        let node = Node {
            directory,
            mode: (mode & 0o7777) as u16,
            owner: (req.uid(), req.gid()),
            file: disk.map(|disk| disk.create(number).unwrap()),
            ..Node::default()
        };
        let attr = node.attr(number);
        nodes.insert(number, node);
        if let Some(parent) = nodes.get_mut(&parent.0) {
            parent.add(name, number);
        }
        attr
    }

    /// There is a snapshot from now on, or none, if that directory is one.
    fn snapshot(&self, parent: INodeNo, is_there: bool) {
        if let Some(disk) = self.disk.as_ref().filter(|_| parent.0 == SNAPSHOTS) {
            disk.snapshot(is_there);
        }
    }

    /// A node and its file, if its bytes are kept.
    fn kept(&self, ino: INodeNo) -> Option<(&disk::Disk, Arc<File>)> {
        let disk = self.disk.as_ref()?;
        Some((disk, self.nodes().get(&ino.0)?.file.clone()?))
    }

    fn remove(&self, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let gone = self
            .nodes()
            .get_mut(&parent.0)
            .and_then(|node| node.take(name));
        // The node stays: numbers are counted by what there ever was.
        match gone {
            Some(_) => reply.ok(),
            None => reply.error(Errno::ENOENT),
        }
    }
}

impl Filesystem for Floor {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let mut wanted = InitFlags::FUSE_ASYNC_READ
            | InitFlags::FUSE_BIG_WRITES
            | InitFlags::FUSE_MAX_PAGES
            | InitFlags::FUSE_HANDLE_KILLPRIV_V2
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO;
        if self.writeback {
            wanted |= InitFlags::FUSE_WRITEBACK_CACHE;
        }
        if self.no_open {
            wanted |= InitFlags::FUSE_NO_OPEN_SUPPORT | InitFlags::FUSE_NO_OPENDIR_SUPPORT;
        }
        config
            .add_capabilities(wanted)
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::Unsupported))?;
        let limit = u32::try_from(LARGEST).unwrap();
        // A smaller limit is the kernel's to choose.
        let _ = config.set_max_write(limit);
        let _ = config.set_max_readahead(limit);
        Ok(())
    }

    fn getxattr(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _name: &OsStr,
        _size: u32,
        reply: ReplyXattr,
    ) {
        self.count();
        // A filesystem that has extended attributes is asked for those of each file, also if it has none.
        reply.error(Errno::ENODATA);
    }

    fn listxattr(&self, _req: &Request, _ino: INodeNo, size: u32, reply: ReplyXattr) {
        match size {
            0 => reply.size(0),
            _ => reply.data(&[]),
        }
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let nodes = self.nodes();
        match nodes.get(&parent.0).and_then(|node| node.find(name)) {
            Some(number) => reply.entry(&FOREVER, &nodes[&number].attr(number), Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.nodes().get(&ino.0) {
            Some(node) => reply.attr(&FOREVER, &node.attr(ino.0)),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        match self.nodes().get_mut(&ino.0) {
            Some(node) => {
                node.size = size.unwrap_or(node.size);
                node.owner = (uid.unwrap_or(node.owner.0), gid.unwrap_or(node.owner.1));
                if let (Some(size), Some(file)) = (size, &node.file) {
                    file.set_len(size).unwrap();
                }
                node.mode = mode.map_or(node.mode, |mode| (mode & 0o7777) as u16);
                reply.attr(&FOREVER, &node.attr(ino.0));
            }
            None => reply.error(Errno::ESTALE),
        }
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let attr = self.make(req, parent, name, true, mode);
        self.snapshot(parent, true);
        reply.entry(&FOREVER, &attr, Generation(0));
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let attr = self.make(req, parent, name, false, mode);
        reply.created(
            &FOREVER,
            &attr,
            Generation(0),
            HANDLE,
            FopenFlags::FOPEN_KEEP_CACHE,
        );
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.remove(parent, name, reply);
    }

    fn link(
        &self,
        _req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let mut nodes = self.nodes();
        if let Some(parent) = nodes.get_mut(&newparent.0) {
            parent.add(newname, ino.0);
        }
        reply.entry(&FOREVER, &nodes[&ino.0].attr(ino.0), Generation(0));
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.snapshot(parent, false);
        self.remove(parent, name, reply);
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let mut nodes = self.nodes();
        let taken = nodes.get_mut(&parent.0).and_then(|node| node.take(name));
        match (taken, nodes.get_mut(&newparent.0)) {
            (Some(number), Some(to)) => {
                to.take(newname);
                to.add(newname, number);
                reply.ok();
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.count();
        if self.no_open {
            reply.error(Errno::ENOSYS);
        } else {
            reply.opened(HANDLE, FopenFlags::FOPEN_KEEP_CACHE);
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some((_, file)) = self.kept(ino) else {
            self.count();
            return reply.data(&self.zeros[..size as usize]);
        };
        let mut bytes = vec![0; size as usize];
        match file.read_at(&mut bytes, offset) {
            Ok(n) => reply.data(&bytes[..n]),
            Err(error) => reply.error(Errno::from(error)),
        }
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let (mut before, mut file) = (0, None);
        if let Some(node) = self.nodes().get_mut(&ino.0) {
            before = node.size;
            node.size = before.max(offset + data.len() as u64);
            file.clone_from(&node.file);
        }
        if let (Some(disk), Some(file)) = (&self.disk, file)
            && let Err(error) = disk.write(ino.0, &file, before, offset, data)
        {
            return reply.error(Errno::from(error));
        }
        reply.written(u32::try_from(data.len()).unwrap());
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn fsync(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        match self.kept(ino) {
            Some((disk, file)) => disk.sync(file, reply),
            None => {
                self.count();
                reply.ok();
            }
        }
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.count();
        if self.no_open {
            reply.error(Errno::ENOSYS);
        } else {
            reply.opened(HANDLE, FopenFlags::empty());
        }
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let nodes = self.nodes();
        for (place, (name, number)) in nodes[&ino.0].entries.range((Excluded(offset), Unbounded)) {
            let kind = kind(nodes[number].directory);
            if reply.add(INodeNo(*number), *place, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let nodes = self.nodes();
        for (place, (name, number)) in nodes[&ino.0].entries.range((Excluded(offset), Unbounded)) {
            let attr = nodes[number].attr(*number);
            if reply.add(
                INodeNo(*number),
                *place,
                name,
                &FOREVER,
                &attr,
                Generation(0),
            ) {
                break;
            }
        }
        reply.ok();
    }
}

fn main() {
    let (mut mountpoint, mut threads, mut files) = (None, 1, None);
    let (mut writeback, mut no_open) = (false, false);
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--bench" => {} // from cargo
            "--writeback" => writeback = true,
            "--no-open" => no_open = true,
            "--files" => files = Some(words.next().expect(USAGE)),
            "--threads" => threads = words.next().and_then(|n| n.parse().ok()).expect(USAGE),
            _ => mountpoint = Some(word),
        }
    }
    let Some(mountpoint) = mountpoint else {
        println!("{USAGE}");
        return;
    };
    let directory = || Node {
        directory: true,
        mode: 0o755,
        ..Node::default()
    };
    let mut nodes = HashMap::from([(1, directory())]);
    let disk = files.map(|dir| disk::Disk::new(dir.into()).unwrap());
    if disk.is_some() {
        let root = nodes.get_mut(&1).unwrap();
        root.add(OsStr::new(".snapshots"), SNAPSHOTS);
        nodes.insert(SNAPSHOTS, directory());
    }
    let floor = Floor {
        polling: Polling::find(Idle::default()),
        nodes: Mutex::new(nodes),
        zeros: vec![0; LARGEST],
        disk,
        writeback,
        no_open,
    };
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("floor".into()),
        MountOption::Subtype("floor".into()),
        MountOption::DefaultPermissions,
    ];
    config.acl = SessionACL::All;
    config.n_threads = Some(threads);
    fuser::mount(floor, mountpoint, &config).unwrap();
}
