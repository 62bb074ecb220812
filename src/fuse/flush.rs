//! Getting what the kernel holds back, of shared mappings and in its writeback cache, before a cut.
//!
//! Dirty pages of the mount reach cowfs as WRITE requests when the kernel writes them back. The process that
//! asks for that waits for these requests in an uninterruptible sleep, so it must not be the daemon: killed
//! in that state, the daemon would never close `/dev/fuse`, and the mount would hang for ever. So a small
//! process of its own asks, over a pair of pipes.

mod helper;

pub use helper::run_helper;

use super::hands::Numbers;
use crate::engine::nodes::NodeId;
use crate::error::{Error, Result};
use crate::sync::{Arc, Mutex, MutexGuard};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// The hidden command that runs the helper.
pub const HELPER_COMMAND: &str = "flush-helper";
/// The type of the kernel's handles for FUSE inodes (`FILEID_INO64_GEN` of include/linux/exportfs.h).
pub(super) const FILEID_INO64_GEN: i32 = 0x81;
/// A name in the root that means the node with this hexadecimal number, to the helper alone.
const NODE_NAME: &str = ".cowfs-node-";

/// The node that the helper means by a name in the root of the mount.
pub(super) fn node_of_name(name: &OsStr) -> Option<NodeId> {
    let number = name.to_str()?.strip_prefix(NODE_NAME)?;
    NodeId::from_str_radix(number, 16).ok()
}

/// What the helper is asked to do with a list of nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(super) enum Order {
    /// Write back what is dirty and wait for it.
    WriteBack = 0,
    /// Write back most of what is dirty, and keep the descriptors.
    Take = 1,
    /// fsync(2) each, dirty or not, by the descriptors that were taken.
    Seal = 2,
    /// Write back what is dirty without the inode's lock, which whoever asks may hold.
    Clean = 3,
    /// Close the descriptors that were taken.
    Drop = 4,
    /// As `Clean`, by the descriptors that were taken, and tell whose pages do not come in [`COMING`].
    CleanTaken = 5,
    /// Forget clean pages that nobody uses, waiting for none. Not a list of nodes of the mount, but each with the number of
    /// its filesystem before it, and a place and a length after it.
    Forget = 6,
}

impl Order {
    const ALL: [Self; 7] = [
        Self::WriteBack,
        Self::Take,
        Self::Seal,
        Self::Clean,
        Self::Drop,
        Self::CleanTaken,
        Self::Forget,
    ];
}

/// The daemon's end.
pub(super) struct FlushHelper {
    mountpoint: PathBuf,
    pipes: Mutex<Pipes>,
    /// The helper's threads: their requests are not a user's.
    numbers: Arc<Numbers>,
}

struct Pipes {
    /// The helper was killed, and may not have ended yet.
    given_up: bool,
    /// It has an order whose answer nobody has waited for.
    owes: bool,
    child: Child,
    orders: ChildStdin,
    answers: ChildStdout,
}

impl FlushHelper {
    /// Starts the helper for a mount. To be called before the mount is made: the program itself may lie in
    /// the directory that is mounted over, and nobody answers for it there yet.
    pub(super) fn start(mountpoint: &Path) -> Result<Self> {
        let numbers = Arc::new(Numbers::default());
        let pipes = Pipes::start(mountpoint, &numbers)?;
        Ok(Self {
            mountpoint: mountpoint.to_path_buf(),
            numbers,
            pipes: Mutex::new(pipes),
        })
    }

    /// Where the numbers of the helper's threads stand.
    pub(super) fn numbers(&self) -> Arc<Numbers> {
        self.numbers.clone()
    }

    /// Returns when every page of `nodes` that was dirty when it was called has reached cowfs.
    ///
    /// # Errors
    /// `EIO` when a page could not be written, or there is no helper to be had: the cut fails rather than
    /// miss a store.
    pub(super) fn flush(&self, nodes: &[NodeId]) -> Result<()> {
        self.ask(Order::WriteBack, nodes).map(drop)
    }

    /// Returns when what the kernel has of a file and cowfs has not has come, whoever has the inode's lock. Before Linux 6.16
    /// there is no waiting for that without the lock: it does nothing there.
    ///
    /// # Errors
    /// `EIO` if a page could not be written.
    pub(super) fn clean(&self, node: NodeId) -> Result<()> {
        if !pages_tell_of_requests() {
            return Ok(());
        }
        self.ask(Order::Clean, &[node]).map(drop)
    }

    /// Has an order carried out, by another helper if this one is gone. Returns what [`Answer`] says.
    ///
    /// # Errors
    /// As [`Self::flush`].
    pub(super) fn ask(&self, order: Order, nodes: &[NodeId]) -> Result<Vec<NodeId>> {
        let mut pipes = self.ready_pipes()?;
        if nodes.is_empty() {
            return Ok(Vec::new());
        }
        pipes.order(order, nodes, None).or_else(|error| {
            log::warn!(
                "{}: the flush helper is gone ({error}); starting another",
                self.mountpoint.display()
            );
            self.replace(&mut pipes)?;
            pipes.order(order, nodes, None).map_err(|error| {
                log::error!(
                    "{}: the flush helper failed: {error}",
                    self.mountpoint.display()
                );
                Error::Os(Errno::IO)
            })
        })?
    }

    /// Has the helper close what it took, and waits for that no longer than [`CLOSING`]: with each, the kernel writes back
    /// what was written to the file meanwhile.
    pub(super) fn drop_taken(&self) -> Result<()> {
        let mut pipes = self.ready_pipes()?;
        pipes
            .drop_taken()
            .map_err(|e| Error::io("cannot give an order to", "the flush helper", &e))
    }

    /// The pipes of a helper that has no order to carry out.
    fn ready_pipes(&self) -> Result<MutexGuard<'_, Pipes>> {
        let mut pipes = self.pipes.lock();
        if pipes.given_up || pipes.settle().is_err() {
            self.replace(&mut pipes)?;
        }
        Ok(pipes)
    }

    /// Another helper in place of this one, which ends.
    fn replace(&self, pipes: &mut Pipes) -> Result<()> {
        *pipes = Pipes::start(&self.mountpoint, &self.numbers)?;
        Ok(())
    }

    /// As [`Self::ask`], by the descriptors that were taken. `tick` is called every [`TICK`] meanwhile, and ends the
    /// waiting, and the helper, when it fails.
    ///
    /// # Errors
    /// Those of `tick`, of fsync(2), and `EIO` when the helper is gone: its descriptors are gone with it, so there
    /// is nothing that another could go on with.
    pub(super) fn ask_watched(
        &self,
        order: Order,
        nodes: &[NodeId],
        tick: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Vec<NodeId>> {
        if nodes.is_empty() {
            return Ok(Vec::new());
        }
        let mut given_up = None;
        let mut pipes = self.ready_pipes()?;
        let mut tick = || {
            tick().map_err(|error| {
                given_up = Some(error);
                std::io::Error::from(std::io::ErrorKind::TimedOut)
            })
        };
        let answer = pipes.order(order, nodes, Some(&mut tick));
        match (answer, given_up) {
            (Ok(answer), _) => answer,
            (Err(_), Some(error)) => {
                // Its answer would be taken for another's. It may wait for a lock whose holder waits for the end of the
                // hold, so that there is no waiting for its end here.
                pipes.give_up();
                Err(error)
            }
            (Err(error), None) => {
                log::error!(
                    "{}: the flush helper failed: {error}",
                    self.mountpoint.display()
                );
                Err(Errno::IO.into())
            }
        }
    }
}

/// How often the one who waits for the helper looks after what it waits for.
pub(super) const TICK: Duration = Duration::from_millis(5);
/// How long a cut waits for the helper to close its files, so that nobody finds the mount busy who unmounts it next.
const CLOSING: Duration = Duration::from_millis(5);

/// What an order came to, or the helper's errno: the nodes that the kernel does not know; of [`Order::CleanTaken`] those
/// whose pages have not come.
type Answer = Result<Vec<NodeId>>;

impl Pipes {
    /// Starts a helper, which is known by `numbers` from then on.
    fn start(mountpoint: &Path, numbers: &Numbers) -> Result<Self> {
        let failed = |e: std::io::Error| Error::io("cannot start the flush helper", mountpoint, &e);
        // Not by path: the program may lie in the directory that is mounted over.
        let mut child = Command::new("/proc/self/exe")
            .arg0("cowfs")
            .args([OsStr::new(HELPER_COMMAND), mountpoint.as_os_str()])
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(orders), Some(mut answers)) => {
                let said = read_words(&mut answers);
                numbers.set(&said.ok_or_else(|| failed(std::io::ErrorKind::UnexpectedEof.into()))?);
                Ok(Self {
                    given_up: false,
                    owes: false,
                    child,
                    orders,
                    answers,
                })
            }
            _ => Err(failed(std::io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn give_up(&mut self) {
        self.given_up = true;
        if let Err(error) = self.child.kill() {
            log::debug!("flush helper: {error}");
        }
    }

    /// Waits for the answer that nobody has waited for.
    fn settle(&mut self) -> std::io::Result<()> {
        if std::mem::take(&mut self.owes)
            && let Err(errno) = self.answer()?
        {
            log::warn!("the flush helper keeps files open: {errno}");
        }
        Ok(())
    }

    fn drop_taken(&mut self) -> std::io::Result<()> {
        self.send(Order::Drop, &[])?;
        self.owes = true;
        match self.wait_for_answer(CLOSING)? {
            true => self.settle(),
            false => Ok(()),
        }
    }

    /// Whether an answer comes within `time`.
    fn wait_for_answer(&self, time: Duration) -> std::io::Result<bool> {
        let pause = Timespec {
            tv_sec: 0,
            tv_nsec: time.subsec_nanos().into(),
        };
        let mut there = [PollFd::new(&self.answers, PollFlags::IN)];
        loop {
            match poll(&mut there, Some(&pause)) {
                Err(Errno::INTR) => {}
                done => return Ok(done? > 0),
            }
        }
    }

    /// Sends an order.
    fn send(&mut self, order: Order, nodes: &[NodeId]) -> std::io::Result<()> {
        let words = [order as u64, nodes.len() as u64];
        let words = words
            .iter()
            .chain(nodes)
            .flat_map(|word| word.to_le_bytes());
        self.orders.write_all(&words.collect::<Vec<u8>>())
    }

    /// Sends an order and waits for the answer.
    fn order(
        &mut self,
        order: Order,
        nodes: &[NodeId],
        tick: Option<&mut dyn FnMut() -> std::io::Result<()>>,
    ) -> std::io::Result<Answer> {
        self.send(order, nodes)?;
        if let Some(tick) = tick {
            while !self.wait_for_answer(TICK)? {
                tick()?;
            }
        }
        self.answer()
    }

    fn answer(&mut self) -> std::io::Result<Answer> {
        let mut answer = [0; 4];
        self.answers.read_exact(&mut answer)?;
        let errno = i32::from_le_bytes(answer);
        let gone = read_words(&mut self.answers)
            .ok_or_else(|| std::io::Error::from(std::io::ErrorKind::UnexpectedEof))?;
        Ok(match errno {
            0 => Ok(gone),
            errno => Err(Errno::from_raw_os_error(errno).into()),
        })
    }
}

impl Drop for Pipes {
    fn drop(&mut self) {
        // Between two orders it ends at once, or with its last close(2). One that hangs with a dead mount must not make the daemon hang
        // too: it gets a moment, and ends when the mount does.
        self.give_up();
        let deadline = Instant::now() + Duration::from_secs(1);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn read_word(input: &mut impl Read) -> Option<u64> {
    let mut number = [0; 8];
    input.read_exact(&mut number).ok()?;
    Some(u64::from_le_bytes(number))
}

/// How many numbers, and these.
fn put_words(out: &mut Vec<u8>, words: &[u64]) {
    out.extend((words.len() as u64).to_le_bytes());
    out.extend(words.iter().flat_map(|word| word.to_le_bytes()));
}

/// A number, and as many numbers as it says.
fn read_words(input: &mut impl Read) -> Option<Vec<u64>> {
    let count = read_word(input)?;
    (0..count).map(|_| read_word(input)).collect()
}

/// Whether a page counts as being written back until cowfs has answered for it. Before Linux 6.16 FUSE wrote a
/// copy, and the page counted as clean while the request was still on its way.
pub(super) fn pages_tell_of_requests() -> bool {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    let version = (numbers.next(), numbers.next());
    matches!(version, (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= (6, 16))
}
