//! Making the journal durable: many callers share one sync.

use super::journal::{Journal, Segment, split};
use crate::error::{Error, Result};
use crate::ids::Lsn;
use crate::sync::{Arc, AtomicBool, Condvar, Mutex, Ordering};
use rustix::io::Errno;

/// Remembers the first failure of the journal (I7).
#[derive(Debug, Default)]
pub(super) struct Poison {
    set: AtomicBool,
    why: Mutex<String>,
}

impl Poison {
    /// # Errors
    /// [`Error::Poisoned`] once an append or a sync has failed.
    pub(super) fn check(&self) -> Result<()> {
        if self.set.load(Ordering::SeqCst) {
            return Err(Error::Poisoned(self.why.lock().clone()));
        }
        Ok(())
    }

    /// Poisons the journal, unless the failure is one that passes and leaves nothing half done.
    pub(super) fn fail(&self, error: &Error) {
        let passes = [
            Errno::NOSPC,
            Errno::DQUOT,
            Errno::MFILE,
            Errno::NFILE,
            Errno::NOMEM,
        ];
        if !passes.contains(&error.errno()) {
            self.fail_for_good(error);
        }
    }

    /// Poisons the journal.
    pub(super) fn fail_for_good(&self, error: &Error) {
        let mut why = self.why.lock();
        if !self.set.load(Ordering::SeqCst) {
            log::error!("{error}; changes are refused from now on");
            *why = error.to_string();
            self.set.store(true, Ordering::SeqCst);
        }
    }
}

/// Who syncs, and who waits for it.
#[derive(Debug, Default)]
pub(super) struct Durability {
    /// Guards whether a sync is under way; never held during one.
    running: Mutex<bool>,
    done: Condvar,
    /// A segment was created since the directory was synced.
    names: AtomicBool,
}

impl Durability {
    pub(super) fn names_changed(&self) {
        self.names.store(true, Ordering::SeqCst);
    }
}

impl Journal {
    /// Makes everything durable whose append has returned.
    ///
    /// # Errors
    /// Any failure poisons the journal: what the kernel could not write it may have dropped.
    pub(super) fn sync(&self) -> Result<()> {
        self.poison.check()?;
        let ends: Vec<_> = self
            .open
            .lock()
            .iter()
            .map(|s| (s.clone(), s.end.load(Ordering::SeqCst)))
            .collect();
        self.sync_while(|| {
            ends.iter()
                .any(|(s, end)| s.synced.load(Ordering::SeqCst) < *end)
        })
    }

    /// Waits until the record `lsn` is durable; of several callers one syncs for all.
    ///
    /// # Errors
    /// As [`Journal::sync`].
    pub(super) fn wait_durable(&self, lsn: Lsn) -> Result<()> {
        let (number, offset) = split(lsn);
        let segment = self
            .open
            .lock()
            .iter()
            .find(|s| s.number == number)
            .cloned();
        // One that is not open any more was synced as a whole.
        let Some(segment) = segment else {
            return self.poison.check();
        };
        self.sync_while(|| segment.synced.load(Ordering::SeqCst) <= offset)
    }

    /// Syncs, or waits for others who do, as long as `needed` says so.
    fn sync_while(&self, needed: impl Fn() -> bool) -> Result<()> {
        while needed() {
            self.poison.check()?;
            let mut running = self.durability.running.lock();
            if *running {
                self.durability.done.wait(&mut running);
                continue;
            }
            if !needed() {
                break;
            }
            *running = true;
            drop(running);
            let result = self
                .sync_open()
                .inspect_err(|error| self.poison.fail_for_good(error));
            *self.durability.running.lock() = false;
            self.durability.done.notify_all();
            result?;
        }
        self.poison.check()
    }

    /// Syncs the open segments, oldest first.
    fn sync_open(&self) -> Result<()> {
        let segments: Vec<Arc<Segment>> = self.open.lock().clone();
        // A new file is found after a power cut only if its directory is synced.
        if self.durability.names.swap(false, Ordering::SeqCst) {
            self.media.sync_names()?;
        }
        let mut finished = Vec::new();
        for segment in segments {
            let sealed = segment.sealed.load(Ordering::SeqCst);
            let end = segment.end.load(Ordering::SeqCst);
            if segment.synced.load(Ordering::SeqCst) < end {
                segment.file.sync()?;
                segment.synced.fetch_max(end, Ordering::SeqCst);
            }
            if sealed {
                finished.push(segment.number);
            }
        }
        self.open.lock().retain(|s| !finished.contains(&s.number));
        Ok(())
    }
}
