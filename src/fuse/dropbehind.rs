//! What a reader of a snapshot has passed is dropped from the kernel's cache of the mount.
//!
//! The backing filesystem has it in its own cache, so a copy of a snapshot would take twice its size of memory, push
//! out what programs use, and have each of its pages filled for the first time (docs/PERFORMANCE.md). Files of the live
//! tree are left alone: what is read there is likely to be read again.

use crate::engine::handle::OpenFile;
use crate::engine::nodes::NodeId;
use crate::sync::OnceLock;
use crate::sync::channel::{Receiver, Sender, bounded};
use fuser::{INodeNo, Notifier};
use std::ops::Range;

/// So many ranges may wait to be dropped; further ones stay in the cache, which is no harm.
const WAITING: usize = 64;

type Dropped = (NodeId, Range<u64>);

/// Drops from the cache of one mount, in a thread of its own: the kernel waits for pages that are being read, and a request
/// thread may have to read them.
#[derive(Debug, Default)]
pub(super) struct DropBehind(OnceLock<Sender<Dropped>>);

impl DropBehind {
    /// Tells how the kernel is reached. Before that nothing is dropped.
    pub(super) fn serve(&self, notifier: Notifier) {
        let (sender, dropped) = bounded(WAITING);
        let started = std::thread::Builder::new()
            .name("cowfs-passed".into())
            .spawn(move || drop_each(&notifier, &dropped));
        if let Err(error) = started {
            return log::warn!("cannot start a thread: {error}");
        }
        if self.0.set(sender).is_err() {
            log::error!("a mount was given two devices");
        }
    }

    /// Notes a read of an open file.
    pub(super) fn read(&self, file: &OpenFile, read: Range<u64>) {
        if let OpenFile::At(at) = file {
            let passed = at.passed.lock().note(&read);
            self.forget(at.member.node(), passed);
        }
    }

    /// Notes that an open file is closed.
    pub(super) fn closed(&self, file: &OpenFile) {
        if let OpenFile::At(at) = file {
            let rest = at.passed.lock().rest();
            self.forget(at.member.node(), rest);
        }
    }

    fn forget(&self, node: NodeId, range: Option<Range<u64>>) {
        if let (Some(sender), Some(range)) = (self.0.get(), range) {
            let _ = sender.try_send((node, range));
        }
    }
}

/// Until the mount ends, and with it the last sender.
fn drop_each(notifier: &Notifier, dropped: &Receiver<Dropped>) {
    for (node, range) in dropped {
        let length = range.end - range.start;
        match notifier.inval_inode(INodeNo(node), range.start as i64, length as i64) {
            Ok(()) => {}
            // The kernel has forgotten the file meanwhile, or the mount is gone.
            Err(error) => log::debug!("{node} is not dropped from the cache: {error}"),
        }
    }
}
