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
use crate::engine::handle::OpenFile;
use crate::error::Result;
use crate::sync::channel::{Receiver, Sender, bounded};
use crate::sync::{Arc, OnceLock, Weak};
use std::ops::Range;
use std::path::PathBuf;

/// So many ranges may wait to be dropped; further ones stay in the cache, which is no harm.
const WAITING: usize = 64;

/// What is dropped of a file, as long as it is open: later the mount might be found busy by who unmounts it.
type Dropped = (Weak<OpenFile>, Range<u64>);

/// Drops from the cache of one mount.
#[derive(Debug, Default)]
pub(super) struct DropBehind(OnceLock<Sender<Dropped>>);

impl DropBehind {
    /// Begins; `place` says where the mount is, once that is of interest. Before that nothing is dropped.
    pub(super) fn serve(&self, place: impl FnOnce() -> Option<PathBuf> + Send + 'static) {
        let (sender, dropped) = bounded(WAITING);
        let work = move || {
            if let Err(error) = drop_each(place, &dropped) {
                log::debug!("what was read of snapshots stays in the cache: {error}");
            }
        };
        let started = std::thread::Builder::new()
            .name("cowfs-passed".into())
            .spawn(work);
        if let Err(error) = started {
            return log::warn!("cannot start a thread: {error}");
        }
        if self.0.set(sender).is_err() {
            log::error!("a mount was given two devices");
        }
    }

    /// Notes a read of an open file.
    pub(super) fn read(&self, file: &Arc<OpenFile>, read: Range<u64>) {
        if let (OpenFile::At(at), Some(sender)) = (&**file, self.0.get())
            && let Some(passed) = at.passed.lock().note(&read)
        {
            let _ = sender.try_send((Arc::downgrade(file), passed));
        }
    }
}

/// Until the mount ends, and with it the last sender. The helper is started when there is something to do.
fn drop_each(place: impl FnOnce() -> Option<PathBuf>, dropped: &Receiver<Dropped>) -> Result<()> {
    let Ok(first) = dropped.recv() else {
        return Ok(());
    };
    let Some(place) = place() else {
        return Ok(());
    };
    let helper = FlushHelper::start(&place)?;
    for (file, range) in std::iter::once(first).chain(dropped) {
        if let Some(OpenFile::At(at)) = file.upgrade().as_deref() {
            let words = [at.member.node(), range.start, range.end - range.start];
            helper.ask(Order::Forget, &words)?;
        }
    }
    Ok(())
}
