//! Getting what processes wrote through shared mappings from the kernel, before a cut.
//!
//! Dirty pages of the mount reach cowfs as WRITE requests when the kernel writes them back. The process that
//! asks for that waits for these requests in an uninterruptible sleep, so it must not be the daemon: killed
//! in that state, the daemon would never close `/dev/fuse`, and the mount would hang for ever. So a small
//! process of its own asks, over a pair of pipes.

use crate::error::{Error, Result};
use crate::sync::Mutex;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// The hidden command that runs the helper.
pub const HELPER_COMMAND: &str = "flush-helper";
/// `FUSE_SUPER_MAGIC` of statfs(2).
const FUSE_MAGIC: u64 = 0x6573_5546;

/// The daemon's end.
pub(super) struct FlushHelper {
    pipes: Mutex<(Child, ChildStdin, ChildStdout)>,
    mountpoint: PathBuf,
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
                let pipes = Mutex::new((child, stdin, stdout));
                Ok(Self {
                    pipes,
                    mountpoint: mountpoint.to_path_buf(),
                })
            }
            _ => Err(failed(std::io::ErrorKind::BrokenPipe.into())),
        }
    }

    /// Returns when every page that was dirty when it was called has reached cowfs.
    ///
    /// # Errors
    /// `EIO` when a page could not be written, or the helper is gone: the cut fails rather than miss a store.
    pub(super) fn flush(&self) -> Result<()> {
        let mut pipes = self.pipes.lock();
        let mut answer = [0; 4];
        let asked = pipes
            .1
            .write_all(b"f")
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
        // It ends by itself when the pipe closes; a mount that hangs must not make the daemon hang too.
        if let Err(error) = child.kill() {
            log::debug!("flush helper: {error}");
        }
    }
}

/// The helper's loop: for each byte read, writes back the mount's dirty pages and answers an errno, 0 for
/// success. Ends when the daemon does.
pub fn run_helper(mountpoint: &Path) -> Result<()> {
    let (mut asked, mut byte) = (std::io::stdin(), [0; 1]);
    while asked.read_exact(&mut byte).is_ok() {
        let answer = match write_back(mountpoint) {
            Ok(()) => 0,
            Err(errno) => errno.raw_os_error(),
        };
        let mut out = std::io::stdout();
        if out
            .write_all(&answer.to_le_bytes())
            .and_then(|()| out.flush())
            .is_err()
        {
            break;
        }
    }
    Ok(())
}

fn write_back(mountpoint: &Path) -> std::result::Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(mountpoint, flags, Mode::empty())?;
    if rustix::fs::fstatfs(&dir)?.f_type as u64 != FUSE_MAGIC {
        // Hidden beneath another mount: its pages cannot be asked for.
        return Err(Errno::BUSY);
    }
    rustix::fs::syncfs(&dir)
}
