//! Getting what processes wrote through shared mappings from the kernel, before a cut.
//!
//! Dirty pages of the mount reach cowfs as WRITE requests when the kernel writes them back. The process that
//! asks for that waits for these requests in an uninterruptible sleep, so it must not be the daemon: killed
//! in that state, the daemon would never close `/dev/fuse`, and the mount would hang for ever. So a small
//! process of its own asks, over a pair of pipes.

use crate::engine::object::NodeId;
use crate::error::{Error, Result};
use crate::sync::{Arc, AtomicU32, Mutex, Ordering};
use crate::sys;
use rustix::fd::AsFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// The hidden command that runs the helper.
pub const HELPER_COMMAND: &str = "flush-helper";
/// The type of the kernel's handles for FUSE inodes (`FILEID_INO64_GEN` of include/linux/exportfs.h).
const FILEID_INO64_GEN: i32 = 0x81;
/// `FUSE_SUPER_MAGIC` of statfs(2).
const FUSE_MAGIC: u64 = 0x6573_5546;

/// The daemon's end.
pub(super) struct FlushHelper {
    mountpoint: PathBuf,
    pipes: Mutex<Pipes>,
    /// The helper's process: its requests are not a user's.
    pid: Arc<AtomicU32>,
}

struct Pipes {
    child: Child,
    orders: ChildStdin,
    answers: ChildStdout,
}

impl FlushHelper {
    /// Starts the helper for a mount. To be called before the mount is made: the program itself may lie in
    /// the directory that is mounted over, and nobody answers for it there yet.
    pub(super) fn start(mountpoint: &Path) -> Result<Self> {
        let pipes = Pipes::start(mountpoint)?;
        Ok(Self {
            mountpoint: mountpoint.to_path_buf(),
            pid: Arc::new(AtomicU32::new(pipes.child.id())),
            pipes: Mutex::new(pipes),
        })
    }

    /// Where the number of the helper's process stands.
    pub(super) fn pid(&self) -> Arc<AtomicU32> {
        self.pid.clone()
    }

    /// Returns when every page of `nodes` that was dirty when it was called has reached cowfs.
    ///
    /// # Errors
    /// `EIO` when a page could not be written, or there is no helper to be had: the cut fails rather than
    /// miss a store.
    pub(super) fn flush(&self, nodes: &[NodeId]) -> Result<()> {
        if nodes.is_empty() {
            return Ok(());
        }
        let mut pipes = self.pipes.lock();
        let answer = pipes.order(nodes).or_else(|error| {
            log::warn!(
                "{}: the flush helper is gone ({error}); starting another",
                self.mountpoint.display()
            );
            *pipes = Pipes::start(&self.mountpoint)?;
            self.pid.store(pipes.child.id(), Ordering::SeqCst);
            pipes
                .order(nodes)
                .map_err(|e| Error::io("the flush helper failed", &self.mountpoint, &e))
        })?;
        match answer {
            0 => Ok(()),
            errno => Err(Errno::from_raw_os_error(errno).into()),
        }
    }
}

impl Pipes {
    fn start(mountpoint: &Path) -> Result<Self> {
        let failed = |e: std::io::Error| Error::io("cannot start the flush helper", mountpoint, &e);
        let program = std::env::current_exe().map_err(failed)?;
        let mut child = Command::new(program)
            .args([OsStr::new(HELPER_COMMAND), mountpoint.as_os_str()])
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(orders), Some(answers)) => Ok(Self {
                child,
                orders,
                answers,
            }),
            _ => Err(failed(std::io::ErrorKind::BrokenPipe.into())),
        }
    }

    /// Sends a list of nodes and waits for the errno that answers it.
    fn order(&mut self, nodes: &[NodeId]) -> std::io::Result<i32> {
        let mut order = (nodes.len() as u64).to_le_bytes().to_vec();
        order.extend(nodes.iter().flat_map(|node| node.to_le_bytes()));
        self.orders.write_all(&order)?;
        let mut answer = [0; 4];
        self.answers.read_exact(&mut answer)?;
        Ok(i32::from_le_bytes(answer))
    }
}

impl Drop for Pipes {
    fn drop(&mut self) {
        // Between two orders it ends at once. One that hangs with a dead mount must not make the daemon hang
        // too: it gets a moment, and ends when the mount does.
        if let Err(error) = self.child.kill() {
            log::debug!("flush helper: {error}");
        }
        let deadline = Instant::now() + Duration::from_secs(1);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The helper's loop: for each list of nodes read, writes back their dirty pages and answers an errno, 0 for
/// success. Ends when the daemon does.
pub fn run_helper(mountpoint: &Path) -> Result<()> {
    let (mut input, mut output) = (std::io::stdin(), std::io::stdout());
    while let Some(nodes) = read_order(&mut input) {
        let answer = match write_back(mountpoint, &nodes) {
            Ok(()) => 0,
            Err(errno) => errno.raw_os_error(),
        };
        if output
            .write_all(&answer.to_le_bytes())
            .and_then(|()| output.flush())
            .is_err()
        {
            break;
        }
    }
    Ok(())
}

fn read_order(input: &mut impl Read) -> Option<Vec<NodeId>> {
    let mut number = [0; 8];
    let mut next = || {
        input
            .read_exact(&mut number)
            .ok()
            .map(|()| u64::from_le_bytes(number))
    };
    let count = next()?;
    (0..count).map(|_| next()).collect()
}

fn write_back(mountpoint: &Path, nodes: &[NodeId]) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(mountpoint, flags, Mode::empty())?;
    if rustix::fs::fstatfs(&dir)?.f_type as u64 != FUSE_MAGIC {
        // Hidden beneath another mount: its pages cannot be asked for.
        return Err(Errno::BUSY);
    }
    let tells = pages_tell_of_requests();
    for node in nodes {
        // The kernel's own handle of an inode (fuse_encode_fh of fs/fuse/inode.c): number, generation.
        let (high, low) = ((node >> 32) as u32, *node as u32);
        let words = [high, low, 0].map(u32::to_ne_bytes);
        let file = match sys::open_by_handle(
            dir.as_fd(),
            FILEID_INO64_GEN,
            &words.concat(),
            OFlags::RDONLY,
        ) {
            Ok(file) => file,
            // Out of the kernel's memory, so without pages; or removed, so in no snapshot.
            Err(Errno::STALE | Errno::NOENT) => continue,
            Err(errno) => return Err(errno),
        };
        if !tells || sys::has_unwritten_pages(file.as_fd()) {
            // The bulk without the inode's lock, so that its writers do not wait for it; then fsync, which
            // waits for the requests themselves, as sync_file_range does not on kernels before 6.16.
            sys::start_write_back(file.as_fd())?;
            rustix::fs::fsync(&file)?;
        }
    }
    Ok(())
}

/// Whether a page counts as being written back until cowfs has answered for it. Before Linux 6.16 FUSE wrote a
/// copy, and the page counted as clean while the request was still on its way.
fn pages_tell_of_requests() -> bool {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    let version = (numbers.next(), numbers.next());
    matches!(version, (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= (6, 16))
}
