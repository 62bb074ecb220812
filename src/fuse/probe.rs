//! Whether this kernel and this process can make exact cuts of what the kernel holds back, tried before there is a mount.
//!
//! A mount of one file, in a temporary directory, for some milliseconds: a helper process writes to it, the attributes
//! are invalidated, and it writes again. If the second write asks for the attributes first, then later ones will; if the
//! helper can open the file by its handle, then the flush helper will. The rest is the order of the requests.

use super::attach::{attach, detach, device_of};
use super::flush::{FILEID_INO64_GEN, HELPER_COMMAND, pages_tell_of_requests};
use super::read::Reader;
use super::{FOREVER, session};
use crate::config::MountConfig;
use crate::error::{Error, Result};
use crate::sync::{Arc, Mutex};
use crate::sys;
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite,
    ReplyXattr, Request, Session, TimeOrNow, WriteFlags,
};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, UNIX_EPOCH};

/// The one file.
const FILE: INodeNo = INodeNo(2);
const NAME: &str = "probe";
/// How long it may take, on a machine under load.
const PATIENCE: Duration = Duration::from_secs(10);

/// Tries it, with a mount as `config` describes.
///
/// # Errors
/// What stands in the way, for the log.
pub(super) fn writeback(config: &MountConfig) -> Result<(), String> {
    if !pages_tell_of_requests() {
        return Err("it needs Linux 6.16".into());
    }
    let dir = tempfile::tempdir().map_err(|error| format!("no temporary directory: {error}"))?;
    let mountpoint = dir.path().canonicalize().map_err(|e| e.to_string())?;
    let config = MountConfig {
        mountpoint: mountpoint.clone(),
        ..config.clone()
    };
    let device = attach(&config).map_err(|error| error.to_string())?;
    let tried = with_mount(&config, device);
    detach(&mountpoint, device_of(&mountpoint).as_deref());
    tried
}

fn with_mount(config: &MountConfig, device: OwnedFd) -> Result<(), String> {
    let events = Arc::new(Mutex::new(Vec::new()));
    let options = session::options(config);
    let one_file = OneFile(events.clone());
    let session = Session::from_fd(one_file, device, options.acl, options)
        .map_err(|error| format!("the kernel does not hold writes back: {error}"))?;
    let notifier = session.notifier();
    // It ends when the mount does, soon after this.
    std::thread::Builder::new()
        .name("cowfs-probe".into())
        .spawn(move || session.run())
        .map_err(|error| error.to_string())?;
    let mut writer = start_writer(&config.mountpoint).map_err(|error| error.to_string())?;
    let done = in_step(&mut writer, || {
        events.lock().clear();
        notifier.inval_inode(FILE, -1, 0)
    });
    let ended = wait(&mut writer);
    done.and(ended)?;
    let events = events.lock();
    let at = |event| events.iter().position(|e| *e == event);
    match (at(Event::Asked), at(Event::Written), at(Event::Synced)) {
        (Some(asked), Some(written), Some(synced)) if asked < written && written < synced => Ok(()),
        _ => Err(format!(
            "this kernel does not ask for attributes before a write ({events:?})"
        )),
    }
}

fn start_writer(mountpoint: &Path) -> std::io::Result<Child> {
    Command::new("/proc/self/exe")
        .arg0("cowfs")
        .args([OsStr::new(HELPER_COMMAND), OsStr::new("--probe")])
        .arg(mountpoint)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null()) // the mount is made all the same
        .spawn()
}

/// Waits for the writer's word that it has written once, does `between`, and lets it go on.
fn in_step(
    writer: &mut Child,
    between: impl FnOnce() -> std::io::Result<()>,
) -> Result<(), String> {
    let said = writer.stdout.as_mut().map(|out| out.read_exact(&mut [0]));
    let Some(Ok(())) = said else {
        return Ok(()); // its exit says why
    };
    between()
        .map_err(|error| format!("the kernel cannot be told to forget attributes: {error}"))?;
    match writer.stdin.take().map(|mut input| input.write_all(b"g")) {
        Some(Ok(())) => Ok(()),
        _ => Err("the helper is gone".into()),
    }
}

fn wait(writer: &mut Child) -> Result<(), String> {
    let start = Instant::now();
    loop {
        match writer.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(_)) => {
                return Err("files of other users cannot be opened by handle (it takes CAP_DAC_READ_SEARCH)".into());
            }
            Ok(None) if start.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(None) => {
                if let Err(error) = writer.kill() {
                    log::debug!("probe: {error}");
                }
                return Err("a write hangs".into());
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// The helper's part: writes, says so, waits for a byte, writes again, and syncs by a descriptor that it got by handle.
///
/// # Errors
/// The first that a call meets.
pub fn run_writer(mountpoint: &Path) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(mountpoint, flags, Mode::empty())?;
    let file = rustix::fs::openat(&dir, NAME, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::pwrite(&file, b"1", 0)?;
    let words = [0, FILE.0 as u32, 0].map(u32::to_ne_bytes).concat();
    let again = sys::open_by_handle(dir.as_fd(), FILEID_INO64_GEN, &words, OFlags::RDONLY)?;
    let stdio = |e: std::io::Error| Error::io("cannot speak to", "the daemon", &e);
    let mut output = std::io::stdout();
    output
        .write_all(b"w")
        .and_then(|()| output.flush())
        .map_err(stdio)?;
    std::io::stdin().read_exact(&mut [0]).map_err(stdio)?;
    rustix::io::pwrite(&file, b"2", 0)?;
    rustix::fs::fsync(&again)?;
    Ok(())
}

/// What came after the invalidation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    /// The attributes were asked for with a handle, as a write does.
    Asked,
    Written,
    Synced,
}

/// A filesystem of one file.
struct OneFile(Arc<Mutex<Vec<Event>>>);

impl OneFile {
    fn note(&self, event: Event) {
        self.0.lock().push(event);
    }

    fn attr(ino: INodeNo) -> FileAttr {
        let is_file = ino == FILE;
        FileAttr {
            ino,
            size: 0,
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_file {
                FileType::RegularFile
            } else {
                FileType::Directory
            },
            perm: if is_file { 0o600 } else { 0o700 },
            nlink: 1,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for OneFile {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        Reader::init(config, true)
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == NAME {
            reply.entry(&FOREVER, &Self::attr(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        if ino == FILE && fh.is_some() {
            self.note(Event::Asked);
        }
        reply.attr(&FOREVER, &Self::attr(ino));
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<std::time::SystemTime>,
        _: Option<FileHandle>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<std::time::SystemTime>,
        _: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.attr(&FOREVER, &Self::attr(ino));
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENODATA);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.note(Event::Written);
        reply.written(data.len() as u32);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.note(Event::Synced);
        reply.ok();
    }
}
