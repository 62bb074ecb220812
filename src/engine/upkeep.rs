//! The background thread: syncs the journal, carries the index to disk, frees what deleted snapshots held.

use super::Engine;
use super::object::Node;
use crate::error::{Error, Result};
use crate::store::Retained;
use crate::sync::{Arc, AtomicU64, Condvar, Mutex, Ordering};
use rustix::fs::OFlags;
use std::thread::JoinHandle;
use std::time::Duration;

/// The records in memory are carried into the index on disk when they exceed this, which bounds memory and
/// the journal that a recovery has to replay.
const CHECKPOINT_BYTES: usize = 8 << 20;

/// The state of the background thread.
#[derive(Default)]
pub struct Upkeep {
    signal: (Mutex<Signal>, Condvar),
    thread: Mutex<Option<JoinHandle<()>>>,
    longest_wait: AtomicU64,
}

#[derive(Default)]
struct Signal {
    stop: bool,
    kicked: bool,
}

impl Upkeep {
    /// Wakes the thread: there is something to free.
    pub(super) fn kick(&self) {
        self.signal.0.lock().kicked = true;
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

    /// Ends the thread and waits for it.
    pub(super) fn stop(&self) {
        self.signal.0.lock().stop = true;
        self.signal.1.notify_all();
        let thread = self.thread.lock().take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            log::error!("the upkeep thread panicked");
        }
    }

    /// Waits for a kick or the interval; false when it is time to stop.
    fn wait(&self, interval: Duration) -> bool {
        let mut signal = self.signal.0.lock();
        if !signal.stop && !signal.kicked {
            self.signal.1.wait_for(&mut signal, interval);
        }
        signal.kicked = false;
        !signal.stop
    }

    fn stopping(&self) -> bool {
        self.signal.0.lock().stop
    }
}

/// Starts the thread of `engine`, which holds the engine until [`Engine::close`].
pub(super) fn start(engine: &Arc<Engine>, interval: Duration) -> Result<()> {
    engine.backing.keep_reserve();
    let own = engine.clone();
    let thread = std::thread::Builder::new()
        .name("cowfs-upkeep".into())
        .spawn(move || {
            while own.upkeep.wait(interval) {
                if let Err(error) = own.upkeep() {
                    log::error!("upkeep: {error}");
                }
            }
        })
        .map_err(|e| Error::io("cannot start a thread", "upkeep", &e))?;
    *engine.upkeep.thread.lock() = Some(thread);
    Ok(())
}

impl Engine {
    /// One round of upkeep. Stops early when the engine is closing.
    pub fn upkeep(&self) -> Result<()> {
        self.store.sync()?;
        if self.store.memtable_bytes() > CHECKPOINT_BYTES {
            self.store.checkpoint()?;
        }
        self.backing.keep_reserve();
        while self.snapshots.dead_are_unread() && self.store.reclaim(&|dead| self.release(dead))? {
            if self.upkeep.stopping() {
                break;
            }
            self.store.sync()?;
        }
        Ok(())
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
        let mut pin = object.pin.lock();
        if pin.is_none() {
            *pin = Some(Arc::new(
                self.backing.open_object(&object.entry, OFlags::PATH)?,
            ));
        }
        drop(pin);
        self.release_if_same(dead)
    }

    fn release_if_same(&self, dead: &Retained) -> Result<()> {
        // After the loss of an index the record may be of an earlier object of that number.
        match self.backing.find_retained(dead.ino)? {
            Some(found) if found.entry.handle == dead.handle => self
                .backing
                .release_retained(dead.ino, dead.kind == libc::DT_DIR),
            _ => Ok(()),
        }
    }
}
