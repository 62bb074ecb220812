//! Getting what the kernel holds back, of shared mappings and in its writeback cache, before a cut.
//!
//! Dirty pages of the mount reach cowfs as WRITE requests when the kernel writes them back. The process that
//! asks for that waits for these requests in an uninterruptible sleep, so it must not be the daemon: killed
//! in that state, the daemon would never close `/dev/fuse`, and the mount would hang for ever. So a small
//! process of its own asks, over a pair of pipes.

use super::hands::{Hands, Numbers};
use crate::control;
use crate::engine::backing::FUSE_MAGIC;
use crate::engine::nodes::NodeId;
use crate::error::{Error, Result};
use crate::sync::{Arc, Mutex, MutexGuard, channel};
use crate::sys;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Advice, AtFlags, CWD, FileType, Mode, OFlags, StatxFlags};
use rustix::fs::{fadvise, major, minor};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::num::NonZeroU64;
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

/// The helper's loop: tells the numbers of its threads, carries out each order read, and answers an errno, 0 for success, and
/// nodes, as the order says. Ends when the daemon does.
pub fn run_helper(mountpoint: &Path) -> Result<()> {
    let (mut input, mut output) = (std::io::stdin(), std::io::stdout());
    super::limits::raise();
    let hands = Hands::start()?;
    let mut hello = Vec::new();
    put_words(&mut hello, hands.numbers());
    let mut said = output.write_all(&hello).and_then(|()| output.flush());
    let mut taken = Taken::default();
    while said.is_ok()
        && let Some((order, nodes)) = read_order(&mut input)
    {
        let mut told = Vec::new();
        let errno = match carry_out(mountpoint, order, &nodes, &hands, &mut taken, &mut told) {
            Ok(()) => 0,
            Err(errno) => errno.raw_os_error(),
        };
        let mut answer = errno.to_le_bytes().to_vec();
        put_words(&mut answer, &told);
        said = output.write_all(&answer).and_then(|()| output.flush());
    }
    Ok(())
}

/// How long what was stored after a seal may take to come, before its file counts as changed without it. The kernel sends
/// no page of a file that is being cut short (`fuse_set_nowrite` of fs/fuse/dir.c), and that may wait for the end of the hold.
const COMING: Duration = Duration::from_millis(5);

/// Files that are written back together, for which that many descriptors are open.
const AT_ONCE: usize = 256;

/// The descriptors that the helper keeps.
#[derive(Default)]
struct Taken {
    root: Option<Arc<OwnedFd>>,
    /// Where the mount was that something was last forgotten on.
    place: Option<PathBuf>,
    files: HashMap<NodeId, Arc<OwnedFd>>,
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

fn read_order(input: &mut impl Read) -> Option<(Order, Vec<NodeId>)> {
    let order = *Order::ALL.get(usize::try_from(read_word(input)?).ok()?)?;
    Some((order, read_words(input)?))
}

/// Does what `order` says; `told` gets the nodes of the [`Answer`].
fn carry_out(
    mountpoint: &Path,
    order: Order,
    nodes: &[NodeId],
    hands: &Hands,
    taken: &mut Taken,
    told: &mut Vec<NodeId>,
) -> Result<(), Errno> {
    if order == Order::Drop {
        *taken = Taken::default();
        return Ok(());
    }
    if order == Order::Forget {
        let mut ranges = nodes.chunks_exact(4);
        return ranges.try_for_each(|range| forget(range, &mut taken.place));
    }
    let dir = taken
        .root
        .take()
        .map_or_else(|| open_root(mountpoint).map(Arc::new), Ok)?;
    let keeps = matches!(order, Order::Take | Order::Seal | Order::CleanTaken);
    for nodes in nodes.chunks(AT_ONCE) {
        let (mut files, mut others) = (Vec::with_capacity(nodes.len()), Vec::new());
        for node in nodes {
            match taken.files.remove(node) {
                Some(file) => files.push((*node, file)),
                None => others.push(*node),
            }
        }
        for (node, opened) in open_nodes(hands, &dir, others)? {
            match opened {
                Ok(file) => files.push((node, Arc::new(file))),
                // Out of the kernel's memory, so without pages; or removed, so in no snapshot, even if its number is
                // that of a symbolic link by now.
                Err(Errno::STALE | Errno::NOENT | Errno::LOOP) if order == Order::CleanTaken => {}
                Err(Errno::STALE | Errno::NOENT | Errno::LOOP) => told.push(node),
                Err(errno) => return Err(errno),
            }
        }
        match order {
            Order::CleanTaken if !clean_in_time(&files)? => {
                told.extend(files.iter().map(|(node, _)| *node));
            }
            Order::CleanTaken => {}
            Order::Take => {
                for (_, file) in &files {
                    sys::begin_write_back(file.as_fd(), 0, 0)?;
                }
                // What gets dirty after this is for the seal.
                hands.each(files.clone(), |(_, file)| flush_by_closing(file))?;
            }
            Order::Seal => hands.each(files.clone(), |(_, file)| rustix::fs::fsync(file))?,
            _ => carry_out_at_once(order, files.iter().map(|(_, file)| file.as_fd()))?,
        }
        if keeps {
            taken.files.extend(files);
        }
    }
    taken.root = keeps.then_some(dir);
    Ok(())
}

/// Has the kernel write back what is dirty of a file and tell its times, without the inode's lock, as it does when a descriptor
/// is closed (`fuse_flush` of fs/fuse/file.c). What fails is for the seal to tell.
fn flush_by_closing(file: &OwnedFd) -> Result<(), Errno> {
    rustix::io::fcntl_dupfd_cloexec(file, 0).map(drop)
}

/// An inode of the mount, and what came of opening it.
type Opened = (NodeId, Result<OwnedFd, Errno>);

/// Opens inodes of the mount, in no order.
fn open_nodes(hands: &Hands, dir: &Arc<OwnedFd>, nodes: Vec<NodeId>) -> Result<Vec<Opened>, Errno> {
    let opened = Arc::new(Mutex::new(Vec::with_capacity(nodes.len())));
    let (dir, results) = (dir.clone(), opened.clone());
    hands.each(nodes, move |node| {
        let file = open_node(&dir, *node);
        results.lock().push((*node, file));
        Ok(())
    })?;
    Ok(std::mem::take(&mut *opened.lock()))
}

/// [`Order::Forget`] of one range. What cannot be reached is gone meanwhile or out of sight, and stays as it is.
///
/// # Errors
/// Of what this process may not do, or the kernel cannot.
fn forget(range: &[u64], place: &mut Option<PathBuf>) -> Result<(), Errno> {
    let handle = handle_of(range[1]);
    let reached = open_apart(range[0], place).and_then(|dir| {
        let held = hold_file(dir.as_fd(), &handle)?;
        Ok((dir, held))
    });
    match reached {
        Ok((dir, _held)) => {
            // It may be refused by who watches what is opened (fanotify(7)); pages that are locked, mapped or in use stay.
            let opened = open_handle(dir.as_fd(), &handle, OFlags::RDONLY);
            let length = NonZeroU64::new(range[3]);
            let _ = opened.and_then(|file| fadvise(&file, range[2], length, Advice::DontNeed));
            Ok(())
        }
        Err(errno @ (Errno::PERM | Errno::NOSYS)) => Err(errno),
        Err(_) => Ok(()),
    }
}

/// Opens the root of a mounted filesystem, apart from where it is mounted (open_tree(2)): who unmounts it there does not find it
/// busy. `place` is where the last one was, which is tried first: with thousands of mounts their table takes long to read.
///
/// # Errors
/// `ENOENT` if it is mounted nowhere that can be seen.
fn open_apart(device: u64, place: &mut Option<PathBuf>) -> Result<OwnedFd, Errno> {
    if let Some(at) = place
        && let Ok(root) = open_apart_at(at, device)
    {
        return Ok(root);
    }
    let number = format!("{}:{}", major(device), minor(device));
    let mut mounts = control::mounts().map_err(|_| Errno::IO)?;
    // A number is given to another filesystem when this one is gone.
    mounts.retain(|mount| mount.device == number && mount.is_cowfs());
    let mut opened = Err(Errno::NOENT);
    // Of several one may be beneath another mount.
    for mount in mounts {
        opened = open_apart_at(&mount.mountpoint, device);
        if opened.is_ok() {
            *place = Some(mount.mountpoint);
            break;
        }
    }
    opened
}

fn open_apart_at(place: &Path, device: u64) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, place, flags)?;
    if sys::device(tree.as_fd())? != device {
        return Err(Errno::XDEV);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(&tree, c".", flags, Mode::empty())
}

/// [`Order::Clean`] of open files; false if it takes longer than [`COMING`]. It goes on then, in a thread of its own.
fn clean_in_time(files: &[(NodeId, Arc<OwnedFd>)]) -> Result<bool, Errno> {
    let files: Vec<_> = files.iter().map(|(_, file)| file.clone()).collect();
    let (done, cleaned) = channel::bounded(1);
    let clean = move || {
        let files = files.iter().map(AsFd::as_fd);
        // Nobody listens any more if it took too long.
        let _ = done.send(carry_out_at_once(Order::Clean, files));
    };
    let thread = std::thread::Builder::new().spawn(clean);
    thread.map_err(|_| Errno::AGAIN)?;
    match cleaned.recv_timeout(COMING) {
        Ok(done) => done.map(|()| true),
        Err(_) => Ok(false),
    }
}

/// Does what `order` says with open files.
fn carry_out_at_once<'f>(
    order: Order,
    mut files: impl Iterator<Item = BorrowedFd<'f>> + Clone,
) -> Result<(), Errno> {
    // Of all of them before the first is waited for: cowfs answers one request while the next is being made. The kernel
    // finds what is dirty without a look at every page that it has (cachestat(2) does look: 5 µs for each MiB).
    files
        .clone()
        .try_for_each(|file| sys::begin_write_back(file, 0, 0))?;
    match order {
        // The bulk without the inode's lock, so that its writers do not wait for it; then fsync, which waits for the
        // requests themselves.
        Order::WriteBack if !pages_tell_of_requests() => files.try_for_each(|file| {
            sys::write_back(file, 0, 0)?;
            rustix::fs::fsync(file)
        }),
        _ => files.try_for_each(|file| sys::write_back(file, 0, 0)),
    }
}

fn open_root(mountpoint: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(mountpoint, flags, Mode::empty())?;
    if rustix::fs::fstatfs(&dir)?.f_type as u64 != FUSE_MAGIC {
        // Hidden beneath another mount: its pages cannot be asked for.
        return Err(Errno::BUSY);
    }
    Ok(dir)
}

/// The kernel's own handle of a node (fuse_encode_fh of fs/fuse/inode.c: number, generation).
fn handle_of(node: NodeId) -> Vec<u8> {
    let (high, low) = ((node >> 32) as u32, node as u32);
    [high, low, 0].map(u32::to_ne_bytes).concat()
}

/// Opens an inode of the mount: by the kernel's own handle, or, without the privilege for that, by a name that the daemon
/// answers to the helper.
fn open_node(dir: &OwnedFd, node: NodeId) -> Result<OwnedFd, Errno> {
    match open_file_by_handle(dir.as_fd(), &handle_of(node)) {
        // The last is what the kernel has for a number that is that of a directory by now and changes its place.
        Err(Errno::PERM | Errno::STALE | Errno::NOMEM) => {}
        other => return other,
    }
    let name = format!("{NODE_NAME}{node:x}");
    let open = |access| {
        let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        rustix::fs::openat(dir, &name, flags, Mode::empty())
    };
    let file = match open(OFlags::RDONLY) {
        Err(Errno::ACCESS) => open(OFlags::WRONLY)?,
        other => other?,
    };
    // An entry that really has this name hides the node: the cut fails rather than miss a store.
    if rustix::fs::fstat(&file)?.st_ino == node {
        Ok(file)
    } else {
        Err(Errno::BUSY)
    }
}

fn open_handle(dir: BorrowedFd<'_>, handle: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    sys::open_by_handle(dir, FILEID_INO64_GEN, handle, flags)
}

/// Opens a regular file by the kernel's handle.
///
/// # Errors
/// `ESTALE` if it is anything else.
fn open_file_by_handle(dir: BorrowedFd<'_>, handle: &[u8]) -> Result<OwnedFd, Errno> {
    let _held = hold_file(dir, handle)?;
    open_handle(dir, handle, OFlags::RDONLY)
}

/// Holds a regular file by the kernel's handle, so that its number stays its own. What has that by now may be a FIFO or a
/// device, which are not for opening: it is looked at first.
///
/// # Errors
/// `ESTALE` if it is anything else.
fn hold_file(dir: BorrowedFd<'_>, handle: &[u8]) -> Result<OwnedFd, Errno> {
    let held = open_handle(dir, handle, OFlags::PATH)?;
    // The type never changes: cowfs is not asked.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let what = rustix::fs::statx(&held, c"", flags, StatxFlags::TYPE)?;
    match FileType::from_raw_mode(what.stx_mode.into()) {
        FileType::RegularFile => Ok(held),
        _ => Err(Errno::STALE),
    }
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
