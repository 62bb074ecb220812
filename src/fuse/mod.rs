//! The adapter: each request of the kernel becomes one call of the engine. A few lines an operation.
//!
//! A reply is the last thing done (the kernel may send RELEASE the moment it is out), and what may block for
//! long replies from a thread of its own.

mod attach;
mod attributes;
mod change;
mod convert;
mod crew;
mod dropbehind;
pub mod flush;
mod handover;
mod hands;
pub mod idle;
mod intent;
mod kept;
mod limits;
mod pool;
pub mod probe;
mod read;
mod reply;
mod requests;
mod session;
mod snapshot;
mod status;
mod writeback;

pub use attach::{attach, check_may_mount, detach, device_of, is_connected, remount};
pub use kept::{Ended, HOLD, HOLD_WRITEBACK, Kept, hear};
pub use limits::raise as raise_limits;
pub use session::serve;

use crate::config::Durability;
use crate::engine::Engine;
use crate::engine::handle::OpenFile;
use crate::engine::inventory::Found;
use crate::error::Result;
use crate::store::Timestamp;
use crate::sync::Arc;
use convert::{errno, file_attr};
use flush::FlushHelper;
use fuser::{FileHandle, INodeNo, ReplyAttr, ReplyEmpty, Request};
use handover::SnapshotMounts;
use hands::Numbers;
use intent::Resent;
use pool::Pool;
use read::Reader;
use reply::answer;
use std::time::Duration;
use writeback::Gate;

/// How long the kernel may believe what it was told: cowfs is the only way in, so for ever.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);
/// Threads that can take requests from the kernel, for each mount. More than one, so that a read from a cold disk
/// does not hold up everybody else; how many do is for the [`crew`].
const REQUEST_THREADS: usize = 4;
/// Threads for requests that may block, of each kind, where the request threads are needed at the device: reads that
/// wait for a disk do not queue behind syncs.
const BLOCKING_THREADS: usize = 8;

/// Threads for changes under strict durability, most of which wait for the journal: those that wait at the same time
/// share one sync, so the more the better.
const CHANGE_THREADS: usize = 32;

/// How long the deletion of a snapshot waits for its files to be closed: the kernel tells of a close(2) only
/// after it has returned. rmdir(2) holds the folder's lock meanwhile, which a new snapshot and a listing want.
const DELETE_PATIENCE: Duration = Duration::from_millis(500);

/// What fuser drives.
struct Adapter {
    engine: Arc<Engine>,
    reader: Arc<Reader>,
    /// The snapshots that are mounted by themselves.
    snapshots: Arc<SnapshotMounts>,
    blocking: Arc<Pool>,
    /// Changes that wait for the journal, and on a full disk others.
    changes: Arc<Pool>,
    /// Writes that wait for space: what makes room does not queue behind them.
    full: Arc<Pool>,
    durability: Durability,
    /// Deletions of snapshots, which may wait for a file to be closed.
    deletions: Pool,
    /// Cuts, one after the other, so that those that wait for one hold up nothing else.
    cuts: Pool,
    /// Where large files begin to go to the disk while they are written: nobody waits for this thread.
    behind: Arc<Pool>,
    /// Requests that an earlier server may have carried out.
    resent: Resent,
    /// The processes that flush what the kernel holds back: their opens and syncs concern its pages alone.
    helpers: Vec<Arc<Numbers>>,
    /// Writes back what a question about holes concerns, or times or capabilities that somebody sets, in the middle of a cut too.
    cleaner: Arc<FlushHelper>,
    /// What waits for it, and nothing else: a cut's own writing back may wait for what `blocking` has to do.
    cleaning: Pool,
    /// Where the kernel holds writes back: what a cut makes wait.
    gate: Option<Arc<Gate>>,
}

/// The handle that the flush helper gets: it stands for no open file.
const HELPER_HANDLE: FileHandle = FileHandle(0);

impl Adapter {
    fn new(
        snapshots: Arc<SnapshotMounts>,
        cleaner: Arc<FlushHelper>,
        helpers: Vec<Arc<Numbers>>,
        gate: Option<Arc<Gate>>,
        found: &Found,
    ) -> Result<Self> {
        Ok(Self {
            engine: snapshots.engine.clone(),
            reader: Arc::new(Reader::live(&snapshots)),
            changes: Arc::new(match snapshots.config.durability {
                Durability::Strict => Pool::new("change", CHANGE_THREADS)?,
                Durability::Ordered => Pool::new("change", BLOCKING_THREADS)?,
            }),
            full: Arc::new(Pool::new("full", BLOCKING_THREADS)?),
            durability: snapshots.config.durability,
            snapshots,
            blocking: Arc::new(Pool::new("blocking", BLOCKING_THREADS)?),
            deletions: Pool::new("deletion", 2)?,
            cuts: Pool::new("cut", 1)?,
            behind: Arc::new(Pool::new("behind", 1)?),
            resent: Resent::new(found),
            helpers,
            cleaner,
            cleaning: Pool::new("cleaning", 2)?,
            gate,
        })
    }

    fn is_helper(&self, req: &Request) -> bool {
        self.helpers.iter().any(|helper| helper.has(req.pid()))
    }

    fn fsync_file(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        if fh == HELPER_HANDLE {
            // One that an earlier server's helper was in the middle of is no seal.
            let sealed = match &self.gate {
                Some(gate) if self.is_helper(req) => gate.seal(ino.0),
                _ => Ok(()),
            };
            return answer!(reply, sealed, () => reply.ok());
        }
        let engine = self.engine.clone();
        let file = self.reader.file(fh);
        let syncing = self.gate.as_ref().map(Gate::syncing);
        let sync = move || {
            let _syncing = syncing;
            let done = file.and_then(|file| match &*file {
                OpenFile::Live(live) => engine.fsync(live, datasync),
                OpenFile::At(_) => Ok(()),
            });
            answer!(reply, done, () => reply.ok());
        };
        self.reader.crew.wait(&self.blocking, sync);
    }

    /// SETATTR by which the kernel tells what earlier writes made of the times of a file that it holds writes of back
    /// (mtime, ctime): part of these writes, so that no cut holds it.
    fn kernel_time(
        &self,
        gate: &Arc<Gate>,
        file: Arc<OpenFile>,
        (mtime, ctime): (Timestamp, Timestamp),
        reply: ReplyAttr,
    ) {
        gate.advance();
        let (engine, gate, ttl) = (self.engine.clone(), gate.clone(), self.unasked());
        self.dispatch_for_cut(move || {
            let taken = requests::writable(&file).and_then(|live| {
                let attr = engine.take_kernel_time(live, mtime, ctime)?;
                gate.note_change(attr.node);
                Ok(attr)
            });
            drop(file);
            answer!(reply, taken, attr => reply.attr(&ttl, &file_attr(&attr, attr.shown)));
        });
    }

    /// RELEASE: what an open file still owes is done first.
    fn release_file(&self, fh: FileHandle, reply: ReplyEmpty) {
        let reader = self.reader.clone();
        match self.gate.as_ref().and_then(|_| reader.file(fh).ok()) {
            Some(file) if self.engine.keeps_time(&file) => self.dispatch_for_cut(move || {
                reader.engine.settle_time(&file);
                drop(file);
                reader.release(fh, reply);
            }),
            _ => reader.release(fh, reply),
        }
    }
}

impl Adapter {
    /// How long the kernel may believe attributes in a reply that no later invalidation takes back: those that it does
    /// not ask for, but gets with what was made or changed.
    fn unasked(&self) -> Duration {
        match self.gate {
            Some(_) => Duration::ZERO,
            None => FOREVER,
        }
    }
}

/// A write was made: if it was part of a long run, the disk may begin with what lies behind it.
fn note_written(engine: &Arc<Engine>, behind: &Pool, file: &OpenFile, offset: u64, n: usize) {
    let part = requests::writable(file).map(|live| live.note_written(offset, n as u64));
    if let Ok(Some(part)) = part {
        let engine = engine.clone();
        behind.run(move || {
            if let Err(error) = engine.write_behind(&part) {
                log::debug!("nothing is written behind: {error}");
            }
        });
    }
}

/// Whether a caller may delete, rename and hold snapshots: root, and who runs cowfs.
fn manages(req: &Request) -> bool {
    req.uid() == 0 || req.uid() == rustix::process::geteuid().as_raw()
}
