//! Making the journal durable: many callers share one sync.

use super::journal::{Journal, Segment, split};
use crate::error::{Error, Result};
use crate::ids::Lsn;
use crate::sync::{Arc, AtomicBool, Condvar, Mutex, Ordering};

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
        if !error.is_full() && !error.is_lack() {
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

/// Segments, and how far each has to be durable.
struct Behind(Vec<(Arc<Segment>, u32)>);

impl Behind {
    fn one(segment: &Arc<Segment>) -> (Arc<Segment>, u32) {
        (segment.clone(), segment.end.load(Ordering::SeqCst))
    }

    fn is_so(&self) -> bool {
        let synced = |s: &Segment| s.synced.load(Ordering::SeqCst);
        self.0.iter().any(|(segment, to)| synced(segment) < *to)
    }
}

impl Segment {
    /// Makes durable what has been appended.
    fn sync(&self) -> Result<()> {
        let end = self.end.load(Ordering::SeqCst);
        if self.synced.load(Ordering::SeqCst) < end {
            self.file.sync()?;
            self.synced.fetch_max(end, Ordering::SeqCst);
        }
        Ok(())
    }
}

impl Journal {
    /// Makes everything durable whose append has returned.
    ///
    /// # Errors
    /// Any failure poisons the journal: what the kernel could not write it may have dropped.
    pub(super) fn sync(&self) -> Result<()> {
        self.poison.check()?;
        let behind = Behind(self.open.lock().iter().map(Behind::one).collect());
        self.sync_while(|| behind.is_so() || self.unsealed(), || Ok(()))
    }

    /// Waits until the record `lsn`, and all that was appended before it, is durable; of several callers one
    /// syncs for all.
    ///
    /// # Errors
    /// As [`Journal::sync`].
    pub(super) fn wait_durable(&self, lsn: Lsn) -> Result<()> {
        let behind = self.behind(lsn);
        self.sync_while(|| behind.is_so(), || self.fill_ahead())
    }

    /// Whether the record `lsn`, and all that was appended before it, is durable.
    pub(super) fn is_durable(&self, lsn: Lsn) -> bool {
        !self.behind(lsn).is_so()
    }

    /// Whether everything is durable whose append has returned.
    pub(super) fn is_all_durable(&self) -> bool {
        !Behind(self.open.lock().iter().map(Behind::one).collect()).is_so()
    }

    /// What has to be synced for the record `lsn`. The segments before its own are among it: one may have been
    /// synced for the last time before an append to it that preceded the record.
    fn behind(&self, lsn: Lsn) -> Behind {
        let (number, offset) = split(lsn);
        let open = self.open.lock();
        let before = open.iter().filter(|s| s.number < number).map(Behind::one);
        // One that is not open any more was synced as a whole.
        let own = open.iter().find(|s| s.number == number);
        let own = own.map(|s| (s.clone(), offset + 1));
        Behind(before.chain(own).collect())
    }

    /// Whether a segment waits for its seal. One that found no room for it is tried again when something else
    /// is synced.
    fn unsealed(&self) -> bool {
        let open = self.open.lock();
        let waits = |s: &Arc<Segment>| s.is_done() && !s.no_room.load(Ordering::SeqCst);
        open.iter().any(waits)
    }

    /// Syncs, after `first`, or waits for others who do, as long as `needed` says so.
    fn sync_while(&self, needed: impl Fn() -> bool, first: impl Fn() -> Result<()>) -> Result<()> {
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
            let result = first()
                .and_then(|()| self.sync_open())
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
            // Asked first: if nothing can be appended any more, the end is final.
            let done = segment.is_done();
            segment.sync()?;
            self.note_durable(&segment);
            // A seal vouches for all before it, so it is written only now. Without room for it the segment
            // stays open.
            if done && self.seal(&segment)? {
                segment.sync()?;
                self.note_durable(&segment);
                finished.push(segment.number);
            }
        }
        self.open.lock().retain(|s| !finished.contains(&s.number));
        Ok(())
    }
}
