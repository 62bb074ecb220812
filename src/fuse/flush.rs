//! Getting what processes wrote through shared mappings from the kernel, before a cut.
//!
//! Dirty pages of the mount reach cowfs as WRITE requests when the kernel writes them back. The process that
//! asks for that waits for these requests in an uninterruptible sleep, so it must not be the daemon: killed
//! in that state, the daemon would never close `/dev/fuse`, and the mount would hang for ever. So a small
//! process of its own asks, over a pair of pipes.

use crate::engine::object::NodeId;
use crate::error::{Error, Result};
use crate::sync::Mutex;
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
    pipes: Mutex<(Child, ChildStdin, ChildStdout)>,
    mountpoint: PathBuf,
    pid: u32,
}

impl FlushHelper {
    /// Starts the helper for a mount.
    pub(super) fn start(mountpoint: &Path) -> Result<Self> {
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
            (Some(stdin), Some(stdout)) => {
                let pid = child.id();
                let pipes = Mutex::new((child, stdin, stdout));
                Ok(Self {
                    pipes,
                    mountpoint: mountpoint.to_path_buf(),
                    pid,
                })
            }
            _ => Err(failed(std::io::ErrorKind::BrokenPipe.into())),
        }
    }

    /// The helper's process: its requests are not a user's.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns when every page of `nodes` that was dirty when it was called has reached cowfs.
    ///
    /// # Errors
    /// `EIO` when a page could not be written, or the helper is gone: the cut fails rather than miss a store.
    pub(super) fn flush(&self, nodes: &[NodeId]) -> Result<()> {
        if nodes.is_empty() {
            return Ok(());
        }
        let mut order = (nodes.len() as u64).to_le_bytes().to_vec();
        order.extend(nodes.iter().flat_map(|node| node.to_le_bytes()));
        let mut pipes = self.pipes.lock();
        let mut answer = [0; 4];
        let asked = pipes
            .1
            .write_all(&order)
            .and_then(|()| pipes.2.read_exact(&mut answer));
        if let Err(error) = asked {
            log::error!(
                "{}: the flush helper is gone: {error}",
                self.mountpoint.display()
            );
            return Err(Errno::IO.into());
        }
        match i32::from_le_bytes(answer) {
            0 => Ok(()),
            errno => Err(Errno::from_raw_os_error(errno).into()),
        }
    }
}

impl Drop for FlushHelper {
    fn drop(&mut self) {
        let (child, ..) = self.pipes.get_mut();
        // Between two orders it ends at once. One that hangs with a dead mount must not make the daemon hang
        // too: it gets a moment, and ends when the mount does.
        if let Err(error) = child.kill() {
            log::debug!("flush helper: {error}");
        }
        let deadline = Instant::now() + Duration::from_secs(1);
        while matches!(child.try_wait(), Ok(None)) && Instant::now() < deadline {
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
        if sys::has_unwritten_pages(file.as_fd()) {
            // The bulk without the inode's lock, so that its writers do not wait for it; then fsync, which
            // waits for the requests themselves, as sync_file_range does not on kernels before 6.16.
            sys::start_write_back(file.as_fd())?;
            rustix::fs::fsync(&file)?;
        }
    }
    Ok(())
}
