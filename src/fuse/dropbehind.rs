//! What a reader of a snapshot has passed is dropped from the kernel's cache of the mount.
//!
//! The backing filesystem has it in its own cache, so a copy of a snapshot would take twice its size of memory, push
//! out what programs use, and have each of its pages filled for the first time (docs/PERFORMANCE.md). Files of the live
//! tree are left alone: what is read there is likely to be read again.
//!
//! A process of its own does it, by posix_fadvise(2). The kernel would do it for the server as well
//! (FUSE_NOTIFY_INVAL_INODE), but waits for pages that are being read, and cannot be killed meanwhile: a server that
//! died in that state, in which nobody else can answer, would never let go of the device.

use super::flush::{FlushHelper, Order};
use crate::engine::handle::{MemberFile, OpenFile};
use crate::engine::nodes::NodeId;
use crate::sync::channel::{Receiver, Sender, bounded};
use crate::sync::{Arc, OnceLock};
use rustix::fs::makedev;
use rustix::thread::{CapabilitySet, capabilities};
use std::ops::Range;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// So many ranges may wait to be dropped; further ones stay in the cache, which is no harm.
const WAITING: usize = 64;

/// Opening files by handle on a mount that is apart takes these (open_by_handle_at(2), open_tree(2)).
const NEEDED: CapabilitySet = CapabilitySet::DAC_READ_SEARCH.union(CapabilitySet::SYS_ADMIN);

/// A range of a file in the words of [`Order::Forget`], and whom to tell when it is dropped.
type Dropped = ([u64; 4], Option<Sender<()>>);

/// How long the helper has to end, or to drop what somebody waits for.
const ENDING: Duration = Duration::from_secs(1);

/// Drops from the caches of all mounts of a server.
#[derive(Debug)]
pub(super) struct Dropper {
    /// To the thread that does it; nothing more comes after `None`.
    ranges: Sender<Option<Dropped>>,
    thread: JoinHandle<()>,
}

impl Dropper {
    /// Starts the helper, before the mount is made, as [`FlushHelper::start`] asks for. `None` without the right to what it
    /// does, which is no harm.
    pub(super) fn start(mountpoint: &Path) -> Option<Self> {
        let may = capabilities(None).is_ok_and(|sets| sets.effective.contains(NEEDED));
        if !may {
            return None;
        }
        let helper = FlushHelper::start(mountpoint);
        let helper = helper.inspect_err(|error| log::warn!("{error}")).ok()?;
        let (ranges, dropped) = bounded(WAITING);
        let thread = std::thread::Builder::new()
            .name("cowfs-passed".into())
            .spawn(move || drop_each(&helper, &dropped))
            .inspect_err(|error| log::warn!("cannot start a thread: {error}"))
            .ok()?;
        Some(Self { ranges, thread })
    }

    /// Ends the helper, when no mount is left: whoever waits for the end of the daemon finds none of its processes. One
    /// that hangs ends by itself when this process is gone.
    pub(super) fn end(&self) {
        let end = Instant::now() + ENDING;
        // It fails if the thread has ended.
        let _ = self.ranges.send_deadline(None, end);
        while !self.thread.is_finished() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn drop_each(helper: &FlushHelper, ranges: &Receiver<Option<Dropped>>) {
    for (range, waits) in ranges.iter().map_while(|range| range) {
        if let Err(error) = helper.ask(Order::Forget, &range) {
            return log::info!("what was read of snapshots stays in the cache: {error}");
        }
        if let Some(waits) = waits {
            // It may have given up.
            let _ = waits.send(());
        }
    }
}

/// What readers of one mount pass.
#[derive(Debug)]
pub(super) struct DropBehind {
    dropper: Option<Arc<Dropper>>,
    device: OnceLock<u64>,
}

impl DropBehind {
    pub(super) fn new(dropper: Option<Arc<Dropper>>) -> Self {
        Self {
            dropper,
            device: OnceLock::new(),
        }
    }

    /// Tells the number of the mounted filesystem, as the mount table writes it. Before that nothing is dropped.
    pub(super) fn serve(&self, device: &str) {
        let number = device.split_once(':').and_then(|(major, minor)| {
            let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
            Some(makedev(major, minor))
        });
        match number.map(|number| self.device.set(number)) {
            Some(Ok(())) => {}
            Some(Err(_)) => log::error!("a mount was given two devices"),
            None => log::error!("{device:?} is no number of a device"),
        }
    }

    /// Notes a read of an open file.
    pub(super) fn read(&self, file: &OpenFile, read: &Range<u64>) {
        if let OpenFile::At(at) = file
            && let Some(passed) = at.passed.lock().note(read)
        {
            self.drop_range(at, passed);
        }
    }

    /// Notes that a file was closed.
    pub(super) fn closed(&self, file: &OpenFile) {
        if let OpenFile::At(at) = file
            && let Some(rest) = at.passed.lock().rest()
        {
            self.drop_range(at, rest);
        }
    }

    fn drop_range(&self, file: &MemberFile, Range { start, end }: Range<u64>) {
        if let (Some(dropper), Some(device)) = (&self.dropper, self.device.get()) {
            let range = [*device, file.member.node(), start, end - start];
            // Nobody waits for this.
            let _ = dropper.ranges.try_send(Some((range, None)));
        }
    }

    /// Drops all of a file that nobody has changed or mapped, and returns when that is done, or cannot be done in time.
    pub(super) fn drop_file(&self, node: NodeId) {
        if let (Some(dropper), Some(device)) = (&self.dropper, self.device.get()) {
            let (waits, done) = bounded(1);
            let end = Instant::now() + ENDING;
            let sent = Some(([*device, node, 0, 0], Some(waits)));
            if dropper.ranges.send_deadline(sent, end).is_ok() {
                let _ = done.recv_deadline(end);
            }
        }
    }
}
