//! The helper's end: opens files of the mount, and has the kernel write back or forget their pages.

use super::{FILEID_INO64_GEN, NODE_NAME, Order};
use super::{pages_tell_of_requests, put_words, read_word, read_words};
use crate::engine::backing::FUSE_MAGIC;
use crate::engine::nodes::NodeId;
use crate::error::Result;
use crate::fuse::hands::Hands;
use crate::fuse::limits;
use crate::mounts;
use crate::sync::{Arc, Mutex, channel};
use crate::sys;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Advice, AtFlags, CWD, FileType, Mode, OFlags, StatxFlags};
use rustix::fs::{fadvise, major, minor};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The helper's loop: tells the numbers of its threads, carries out each order read, and answers an errno, 0 for success, and
/// nodes, as the order says. Ends when the daemon does.
pub fn run_helper(mountpoint: &Path) -> Result<()> {
    let (mut input, mut output) = (std::io::stdin(), std::io::stdout());
    limits::raise();
    let hands = Hands::start()?;
    let mut hello = Vec::new();
    put_words(&mut hello, hands.numbers());
    let mut said = output.write_all(&hello).and_then(|()| output.flush());
    let (mut taken, mut device) = (Taken::default(), None);
    while said.is_ok()
        && let Some((order, nodes)) = read_order(&mut input)
    {
        let mut told = Vec::new();
        let mount = (mountpoint, &mut device);
        let errno = match carry_out(mount, order, &nodes, &hands, &mut taken, &mut told) {
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

fn read_order(input: &mut impl Read) -> Option<(Order, Vec<NodeId>)> {
    let order = *Order::ALL.get(usize::try_from(read_word(input)?).ok()?)?;
    Some((order, read_words(input)?))
}

/// Does what `order` says; `told` gets the nodes of the [`Answer`].
fn carry_out(
    (mountpoint, device): (&Path, &mut Option<u64>),
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
        .map_or_else(|| open_root(mountpoint, device).map(Arc::new), Ok)?;
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
                // that of a symbolic link by now. (By name the daemon says so with ESTALE, and never ENOENT.)
                Err(Errno::STALE | Errno::LOOP) if order == Order::CleanTaken => {}
                Err(Errno::STALE | Errno::LOOP) => told.push(node),
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
    let number = number_of(device);
    let mut mounts = mounts::read().map_err(|_| Errno::IO)?;
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

/// As the mount table writes it.
fn number_of(device: u64) -> String {
    format!("{}:{}", major(device), minor(device))
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

/// Opens the root of the mount, which was made at `mountpoint`. `device` is its number, once it was opened: a directory above
/// it may be renamed, or the mount be moved.
fn open_root(mountpoint: &Path, device: &mut Option<u64>) -> Result<OwnedFd, Errno> {
    let opened = open_mounted(mountpoint);
    let there = opened.as_ref().map(|root| sys::device(root.as_fd()));
    match (&there, *device) {
        (Ok(Ok(there)), known) if known.is_none_or(|known| known == *there) => {
            *device = Some(*there);
            opened
        }
        (_, Some(known)) => match mounts::place_of(&number_of(known)) {
            Some(place) => open_mounted(&place),
            None => opened,
        },
        _ => opened,
    }
}

fn open_mounted(mountpoint: &Path) -> Result<OwnedFd, Errno> {
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
/// answers to the helper. Not by name if the kernel has nothing for the handle: it takes the lock of the directory for a
/// name, which somebody may hold whose request waits for the cut.
fn open_node(dir: &OwnedFd, node: NodeId) -> Result<OwnedFd, Errno> {
    match open_file_by_handle(dir.as_fd(), &handle_of(node)) {
        // The last is what the kernel has for a number that is that of a directory by now and changes its place.
        Err(Errno::PERM | Errno::NOMEM) => {}
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
