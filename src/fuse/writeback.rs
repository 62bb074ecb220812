//! The cut where the kernel holds writes back (`cache=writeback`).
//!
//! The kernel hides write(2) from the daemon, so a cut holds what it cannot see: it has the kernel forget the attributes
//! of every file that is open for writing, and a write asks for these before it takes its inode's lock. The question waits
//! here. Then the flush helper calls fsync(2) on each of these files. Its request comes while the kernel holds the lock of
//! the inode and nothing of it is dirty: that is the cut of this inode, its *seal*, and the object crosses into the new epoch.
//! docs/ARCHITECTURE.md says why all seals together are an exact cut, and what each kind of request has to do meanwhile.

mod hold;

pub(super) use hold::Kind;

use super::FOREVER;
use super::flush::{FlushHelper, Order};
use super::pool::Pool;
use crate::engine::Engine;
use crate::engine::nodes::NodeId;
use crate::engine::snapshot::{Barrier, Brought};
use crate::error::{Error, Result};
use crate::ids::Epoch;
use crate::planted::{self, Bug};
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, Ordering};
use fuser::{INodeNo, Notifier};
use hold::{Hold, Parked, Phase, Verdict};
use rustix::io::Errno;
use std::time::{Duration, Instant};

/// How long a hold may last; then the cut fails and everybody goes on.
const LONGEST_HOLD: Duration = Duration::from_secs(10);
/// Ticks without anything done after which questions of permission are answered, and of writes.
const STUCK: u32 = 2;
const DEADLOCKED: u32 = 6;
/// And all that may hold a lock is carried out, sealed or not.
const HOPELESS: u32 = 40;
/// Threads that carry out what was held.
const RELEASE_THREADS: usize = 4;

/// What is done when a request may go on, with the time for which the kernel may believe attributes then.
type Job = Box<dyn FnOnce(Duration) + Send>;

/// Holds requests while a cut is made.
pub(super) struct Gate {
    engine: Arc<Engine>,
    /// Makes the seals. Its requests are let through.
    helper: FlushHelper,
    notifier: Mutex<Option<Notifier>>,
    hold: Mutex<Hold<Job>>,
    /// Whether there is a hold, for those who need not look closer.
    held: AtomicBool,
    /// Requests that bring a seal nearer.
    progress: AtomicU64,
    /// Syncs that are under way: a seal may have to wait for the disk.
    syncing: AtomicU64,
    released: Pool,
}

impl Gate {
    /// A gate for a mount that is served from now on. The helper is started before it is made.
    pub(super) fn new(engine: Arc<Engine>, helper: FlushHelper) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            engine,
            helper,
            notifier: Mutex::new(None),
            hold: Mutex::new(Hold::new()),
            held: AtomicBool::new(false),
            progress: AtomicU64::new(0),
            syncing: AtomicU64::new(0),
            released: Pool::new("released", RELEASE_THREADS)?,
        }))
    }

    /// Gives the gate what invalidates attributes; no cut succeeds before that.
    pub(super) fn set_notifier(&self, notifier: Notifier) {
        *self.notifier.lock() = Some(notifier);
    }

    /// Carries a request out, now or when the hold allows it.
    pub(super) fn pass(
        &self,
        kind: impl FnOnce() -> Kind,
        job: impl FnOnce(Duration) + Send + 'static,
    ) {
        if self.held.load(Ordering::SeqCst) {
            // To say what a request means may take a look-up, so not under the lock.
            let kind = kind();
            let mut hold = self.hold.lock();
            if hold.judge(&kind) == Verdict::Park {
                return hold.park(kind, Box::new(job));
            }
            if matches!(kind, Kind::Locks(_) | Kind::Times) {
                self.advance();
            }
        }
        job(FOREVER);
    }

    /// Answers for a file that has been opened for writing. It is in the table of open files by now: so either the
    /// hold knows of it, or this sees the hold.
    pub(super) fn opened(&self, job: impl FnOnce(Duration) + Send + 'static) {
        self.pass(|| Kind::Makes, job);
    }

    /// How long the kernel may believe what a helper is told: in a cut not at all, or others could write.
    pub(super) fn helpers_ttl(&self) -> Duration {
        match self.held.load(Ordering::SeqCst) {
            true => Duration::ZERO,
            false => FOREVER,
        }
    }

    /// A request was carried out that a seal may have waited for.
    pub(super) fn advance(&self) {
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    /// A sync is under way as long as the returned value lives.
    pub(super) fn syncing(self: &Arc<Self>) -> Syncing {
        self.syncing.fetch_add(1, Ordering::Relaxed);
        Syncing(self.clone())
    }

    /// The helper's FSYNC of `node` has come: nothing of it is dirty, and the kernel holds its lock.
    ///
    /// # Errors
    /// Those of [`Engine::cross_early`]; the cut fails with the helper's fsync(2).
    pub(super) fn seal(&self, node: NodeId) -> Result<()> {
        let mut hold = self.hold.lock();
        let Phase::Held(next) = hold.phase else {
            return Ok(()); // the flush before the hold
        };
        self.engine.cross_early(node, next)?;
        hold.seal(node);
        self.advance();
        Ok(())
    }

    /// `node` is changed by what is carried out whether it is sealed or not. To be called when that is done and before it is
    /// answered.
    pub(super) fn note_change(&self, node: NodeId) {
        self.advance();
        if self.held.load(Ordering::SeqCst) {
            self.hold.lock().note_change(node);
        }
    }

    /// Whether a file was changed after its seal, of those of a round whose seals are all made: what was written and is in
    /// the kernel's memory as yet comes as a WRITE now, or does not come in time.
    fn changed_after_seal(&self, active: &[NodeId], watch: &Watch) -> Result<bool> {
        let tick = &mut || watch.in_time();
        let missing = self.helper.ask_watched(Order::CleanTaken, active, tick)?;
        Ok(!missing.is_empty() || self.hold.lock().changed)
    }

    fn run(&self, parked: Vec<Parked<Job>>, ttl: Duration) {
        for Parked { since, job, .. } in parked {
            self.engine.note_wait(since.elapsed());
            self.released.run(move || job(ttl));
        }
    }

    /// Has the kernel forget the attributes of the files of a hold, so that the next write to each asks for them.
    fn invalidate(&self, nodes: &[NodeId]) -> Result<()> {
        let notifier = self.notifier.lock();
        let notifier = notifier.as_ref().ok_or(Error::Os(Errno::BUSY))?;
        for node in nodes {
            // A negative offset: the attributes alone, no pages.
            match notifier.inval_inode(INodeNo(*node), -1, 0) {
                // Not in the kernel's memory, or not yet: it gets the attributes for no time then.
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io(
                        "cannot have the kernel forget",
                        "attributes",
                        &error,
                    ));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Called while the helper makes the seals: resolves what waits for what is held here, and knows when to give up.
    fn watch(&self, watch: &mut Watch) -> Result<()> {
        watch.in_time()?;
        let progress = self.progress.load(Ordering::Relaxed);
        if progress != watch.seen || self.syncing.load(Ordering::Relaxed) > 0 {
            (watch.seen, watch.silent) = (progress, 0);
            return Ok(());
        }
        watch.silent += 1;
        if watch.silent >= STUCK {
            let parked = self.hold.lock().take_questions();
            self.run(parked, Duration::ZERO);
        }
        if watch.silent >= DEADLOCKED {
            let parked = self.hold.lock().take_writes();
            self.run(parked, FOREVER);
        }
        if watch.silent >= HOPELESS {
            let parked = self.hold.lock().take_locks();
            self.run(parked, FOREVER);
        }
        Ok(())
    }
}

/// What is known of the progress of a round.
struct Watch {
    /// When the hold began.
    began: Instant,
    seen: u64,
    silent: u32,
}

impl Watch {
    fn in_time(&self) -> Result<()> {
        if self.began.elapsed() > LONGEST_HOLD {
            log::warn!("no exact cut in {LONGEST_HOLD:?}: a file cannot be brought to it");
            return Err(Errno::BUSY.into());
        }
        Ok(())
    }
}

impl Barrier for Gate {
    fn prepare(&self) -> Result<()> {
        self.helper
            .ask(Order::Take, &self.engine.writable_nodes())
            .map(drop)
    }

    fn bring(&self, next: Epoch) -> Result<Brought> {
        let (mut active, began): (Vec<NodeId>, _) = {
            let mut hold = self.hold.lock();
            self.held.store(true, Ordering::SeqCst);
            hold.begin(next, || self.engine.writable_nodes().into_iter().collect());
            (hold.active.iter().copied().collect(), hold.since)
        };
        active.sort_unstable();
        self.invalidate(&active)?;
        let mut watch = Watch {
            began,
            seen: 0,
            silent: 0,
        };
        let gone = match planted::has(Bug::NoSeal) {
            false => {
                let tick = &mut || self.watch(&mut watch);
                self.helper.ask_watched(Order::Seal, &active, tick)?
            }
            // The planted bug: what the kernel still holds back is not asked for.
            true => active.clone(),
        };
        for node in gone {
            // The kernel has not been told of it yet, so it holds nothing of it, and writes to it will ask first. Or it
            // has been removed and is known no more, and is in no snapshot.
            match self.seal(node) {
                Err(Error::Os(Errno::STALE)) => drop(self.hold.lock().seal(node)),
                other => other?,
            }
        }
        let look = {
            let mut hold = self.hold.lock();
            if hold.sealed.len() != active.len() {
                log::error!("the flush helper's fsync did not reach cowfs for some file");
                return Err(Errno::IO.into());
            }
            hold.close()
        };
        if !look || !self.changed_after_seal(&active, &watch)? {
            return Ok(Brought::All);
        }
        let parked = self.hold.lock().reopen(next);
        self.run(parked, FOREVER);
        Ok(Brought::Again)
    }

    fn release(&self) {
        let parked = {
            let mut hold = self.hold.lock();
            self.held.store(false, Ordering::SeqCst);
            hold.release()
        };
        self.run(parked, FOREVER);
    }

    fn finish(&self) {
        // What it keeps would keep the mount from being unmounted.
        if let Err(error) = self.helper.drop_taken() {
            log::warn!("the flush helper keeps files open: {error}");
        }
    }
}

/// A sync that is under way.
pub(super) struct Syncing(Arc<Gate>);

impl Drop for Syncing {
    fn drop(&mut self) {
        self.0.syncing.fetch_sub(1, Ordering::Relaxed);
        self.0.advance();
    }
}
