//! The background thread: syncs the journal, carries the index to disk, frees what deleted snapshots held.

use super::Engine;
use super::nodes::Node;
use crate::error::{Error, Result};
use crate::store::Retained;
use crate::sync::{Arc, AtomicU64, Condvar, Mutex, Ordering};
use crate::sys;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The records in memory are carried into the index on disk when they exceed this, which bounds memory and
/// the journal that a recovery has to replay.
const CHECKPOINT_BYTES: usize = 8 << 20;

/// When nothing has happened for so long that the engine knows of, a round is made no more often than that: others may take
/// the space of the disk.
const IDLE: Duration = Duration::from_secs(1);

/// When so many nodes have been forgotten, their memory is given back.
const MANY_FORGOTTEN: u64 = 50_000;

/// The state of the background thread.
#[derive(Default)]
pub struct Upkeep {
    signal: (Mutex<Signal>, Condvar),
    threads: Mutex<Vec<JoinHandle<()>>>,
    longest_wait: AtomicU64,
    /// The most nodes that were known since memory was last given back.
    most_known: AtomicU64,
}

#[derive(Default)]
struct Signal {
    stop: bool,
    kicked: bool,
    /// Rounds begun, and rounds ended.
    begun: u64,
    ended: u64,
}

impl Upkeep {
    /// Wakes the thread: there is something to free.
    pub(super) fn kick(&self) {
        self.signal.0.lock().kicked = true;
        self.signal.1.notify_all();
    }

    /// Waits until a round has ended that began after this call; false if none does in time, or no thread runs.
    pub(super) fn finish_round(&self, patience: Duration) -> bool {
        if self.threads.lock().is_empty() {
            return false;
        }
        let deadline = std::time::Instant::now() + patience;
        let mut signal = self.signal.0.lock();
        signal.kicked = true;
        self.signal.1.notify_all();
        let next = signal.begun + 1;
        while signal.ended < next && !signal.stop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return false;
            }
            self.signal.1.wait_for(&mut signal, left);
        }
        !signal.stop
    }

    fn end_round(&self) {
        let mut signal = self.signal.0.lock();
        signal.ended = signal.begun;
        drop(signal);
        self.signal.1.notify_all();
    }

    /// Notes how long an operation waited to begin.
    pub(super) fn note_wait(&self, wait: Duration) {
        self.longest_wait
            .fetch_max(wait.as_nanos() as u64, Ordering::Relaxed);
    }

    pub(super) fn take_longest_wait(&self) -> Duration {
        Duration::from_nanos(self.longest_wait.swap(0, Ordering::Relaxed))
    }

    /// Another thread to be ended with this one; it sleeps in [`Self::pause`].
    pub(super) fn also(&self, thread: JoinHandle<()>) {
        self.threads.lock().push(thread);
    }

    /// Ends the threads and waits for them.
    pub(super) fn stop(&self) {
        self.signal.0.lock().stop = true;
        self.signal.1.notify_all();
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            let name = thread.thread().name().unwrap_or_default().to_owned();
            if thread.join().is_err() {
                log::error!("the thread {name} panicked");
            }
        }
    }

    /// Waits for `interval`; false when it is time to stop.
    pub(super) fn pause(&self, interval: Duration) -> bool {
        let until = Instant::now() + interval;
        let mut signal = self.signal.0.lock();
        while !signal.stop && Instant::now() < until {
            self.signal.1.wait_until(&mut signal, until);
        }
        !signal.stop
    }

    /// Waits for a kick or the interval: whether it was a kick, or `None` when it is time to stop.
    fn wait(&self, interval: Duration) -> Option<bool> {
        let mut signal = self.signal.0.lock();
        if !signal.stop && !signal.kicked {
            self.signal.1.wait_for(&mut signal, interval);
        }
        let kicked = std::mem::take(&mut signal.kicked);
        (!signal.stop).then_some(kicked)
    }

    fn begin_round(&self) {
        self.signal.0.lock().begun += 1;
    }

    fn stopping(&self) -> bool {
        self.signal.0.lock().stop
    }
}

/// Starts the thread of `engine`, which holds the engine until [`Engine::close`].
pub(super) fn start(engine: &Arc<Engine>, interval: Duration) -> Result<()> {
    engine.store.keep_reserve();
    let own = engine.clone();
    let thread = std::thread::Builder::new()
        .name("cowfs-upkeep".into())
        .spawn(move || {
            let mut failed = String::new();
            let start = Instant::now();
            let (mut round, mut active, mut appended) = (start, start, 0);
            while let Some(kicked) = own.upkeep.wait(interval) {
                let before = std::mem::replace(&mut appended, own.store.appended());
                if kicked || before != appended || own.has_upkeep() {
                    active = Instant::now();
                }
                if active.elapsed() >= IDLE && round.elapsed() < IDLE {
                    continue;
                }
                round = Instant::now();
                own.upkeep.begin_round();
                // The same failure at every round is told once.
                let now = own
                    .upkeep()
                    .map_or_else(|error| error.to_string(), |()| String::new());
                if now != failed && !now.is_empty() {
                    log::error!("upkeep: {now}");
                }
                failed = now;
                own.upkeep.end_round();
            }
        })
        .map_err(|e| Error::io("cannot start a thread", "upkeep", &e))?;
    engine.upkeep.also(thread);
    super::session::start(engine)
}

impl Engine {
    /// Whether a round has something to do that no append tells of.
    fn has_upkeep(&self) -> bool {
        self.reclaims() || self.has_closed_orphans()
    }

    /// One round of upkeep. Stops early when the engine is closing.
    pub fn upkeep(&self) -> Result<()> {
        self.store.keep_reserve();
        // Freeing space takes some.
        self.store.with_reserve(|| self.round())
    }

    fn round(&self) -> Result<()> {
        self.store.sync()?;
        if self.store.memtable_bytes() > CHECKPOINT_BYTES {
            self.store.checkpoint()?;
        }
        self.drop_orphans();
        self.give_memory_back();
        self.free_space()?;
        while self.drop_for_room()? && !self.upkeep.stopping() {
            self.free_space()?;
        }
        Ok(())
    }

    /// Frees what deleted and invalid snapshots held.
    fn free_space(&self) -> Result<()> {
        let given = self.room.given();
        while self.snapshots.dead_are_unread() {
            if !self.store.reclaim(&|dead| self.release(dead))? {
                self.room.note_freed(given);
                break;
            }
            if self.upkeep.stopping() {
                break;
            }
            self.store.sync()?;
        }
        Ok(())
    }

    /// Objects are allocated singly as the kernel comes to know them: the C library would keep the space of
    /// a million for good.
    fn give_memory_back(&self) {
        let known = self.nodes.count();
        let most = &self.upkeep.most_known;
        if most.fetch_max(known, Ordering::Relaxed) > known + MANY_FORGOTTEN {
            most.store(known, Ordering::Relaxed);
            sys::trim_heap();
        }
    }

    /// Frees a retained object that no snapshot shows any more.
    fn release(&self, dead: &Retained) -> Result<()> {
        let known = self.nodes.get(self.nodes.live_id(dead.ino));
        let Some(Node::Live(object)) = known else {
            return self.release_if_same(dead);
        };
        // The operation that made the record may still be about to move the object: its lock is waited for,
        // or what it moves would stay without a record.
        let _held = object.lock();
        // Still open, or known to the kernel: its number must not be reused yet.
        self.pin_number(&object)?;
        if self.must_outlive(&object) && self.backing.orphan_retained(dead.ino)? {
            self.room.note_released(dead.ino);
            self.orphaned(&object);
            return Ok(());
        }
        self.release_if_same(dead)
    }

    fn release_if_same(&self, dead: &Retained) -> Result<()> {
        // After the loss of an index the record may be of an earlier object of that number.
        match self.backing.find_retained(dead.ino)? {
            Some(found) if found.entry.handle == dead.handle => {
                let directory = dead.kind == libc::DT_DIR;
                self.backing.release_retained(dead.ino, directory)?;
                self.room.note_released(dead.ino);
            }
            // That of another record.
            Some(_) => {}
            None => self.room.note_released(dead.ino),
        }
        Ok(())
    }
}
