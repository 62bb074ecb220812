//! The epoch and who is in it: how a cut happens without a stall (C1, C3).
//!
//! An operation locks its objects, and then enters the epoch. A cut advances the epoch in one atomic step and
//! waits for those that entered the old one. The in-flight counts alternate between two slots; cuts are
//! serialised and each waits for its own slot to drain, so a slot is empty before it is used again.

use crate::ids::Epoch;
use crate::sync::{AtomicU64, Condvar, Mutex, Ordering};
use std::time::Duration;

/// The current epoch with the counts of operations in flight.
pub struct Epochs {
    current: AtomicU64,
    inflight: [AtomicU64; 2],
    /// Number of cuts waiting; tells a leaving operation whether anybody listens.
    waiting: AtomicU64,
    drained: (Mutex<()>, Condvar),
}

/// An operation's place in an epoch; left on drop. Whoever holds one has locked its objects first (I4).
pub struct InFlight<'a> {
    epochs: &'a Epochs,
    epoch: Epoch,
}

impl Epochs {
    /// Starts at `epoch`.
    pub fn new(epoch: Epoch) -> Self {
        Self {
            current: AtomicU64::new(epoch.0),
            inflight: [AtomicU64::new(0), AtomicU64::new(0)],
            waiting: AtomicU64::new(0),
            drained: (Mutex::new(()), Condvar::new()),
        }
    }

    /// The number of cuts so far.
    pub fn current(&self) -> Epoch {
        Epoch(self.current.load(Ordering::SeqCst))
    }

    fn slot(&self, epoch: u64) -> &AtomicU64 {
        &self.inflight[(epoch & 1) as usize]
    }

    /// Enters the current epoch. The caller has locked its objects (I4).
    pub fn enter(&self) -> InFlight<'_> {
        loop {
            let epoch = self.current.load(Ordering::SeqCst);
            self.slot(epoch).fetch_add(1, Ordering::SeqCst);
            // A cut between the load and the count has not seen this operation: enter anew.
            if self.current.load(Ordering::SeqCst) == epoch {
                return InFlight {
                    epochs: self,
                    epoch: Epoch(epoch),
                };
            }
            self.leave(epoch);
        }
    }

    fn leave(&self, epoch: u64) {
        if self.slot(epoch).fetch_sub(1, Ordering::SeqCst) == 1
            && self.waiting.load(Ordering::SeqCst) > 0
        {
            let _guard = self.drained.0.lock();
            self.drained.1.notify_all();
        }
    }

    /// The cut: advances the epoch and returns the old one. Cuts are serialised by the caller.
    pub fn advance(&self) -> Epoch {
        Epoch(self.current.fetch_add(1, Ordering::SeqCst))
    }

    /// Waits until nothing is in flight in `old`, an epoch that has been left by [`Self::advance`].
    pub fn wait_drained(&self, old: Epoch) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut guard = self.drained.0.lock();
        while self.slot(old.0).load(Ordering::SeqCst) != 0 {
            // The time limit only bounds the cost of a wake-up missed between the count and the flag.
            self.drained
                .1
                .wait_for(&mut guard, Duration::from_millis(1));
        }
        drop(guard);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

impl InFlight<'_> {
    /// The epoch that was entered.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.epochs.leave(self.epoch.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::{Arc, AtomicBool};

    /// Every operation that entered an epoch is waited for, and none of a later one is.
    #[test]
    fn a_cut_waits_for_the_old_epoch_only() {
        let epochs = Arc::new(Epochs::new(Epoch(7)));
        let old = epochs.enter();
        let left = epochs.advance();
        assert_eq!(left, Epoch(7));
        let new = epochs.enter();
        assert_eq!(new.epoch(), Epoch(8));
        let done = Arc::new(AtomicBool::new(false));
        let waiter = {
            let (epochs, done) = (epochs.clone(), done.clone());
            std::thread::spawn(move || {
                epochs.wait_drained(left);
                done.store(true, Ordering::SeqCst);
            })
        };
        std::thread::sleep(Duration::from_millis(20));
        assert!(
            !done.load(Ordering::SeqCst),
            "the old epoch still has an operation"
        );
        drop(old);
        waiter.join().unwrap();
        drop(new);
    }

    /// Under threads that come and go, no operation is ever seen in an epoch that counts as drained.
    #[test]
    fn nothing_runs_in_a_drained_epoch() {
        let epochs = Arc::new(Epochs::new(Epoch(0)));
        let sealed = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let workers: Vec<_> = (0..3)
            .map(|_| {
                let (epochs, sealed, stop) = (epochs.clone(), sealed.clone(), stop.clone());
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let inside = epochs.enter();
                        assert!(inside.epoch().0 >= sealed.load(Ordering::SeqCst));
                        std::hint::spin_loop();
                        assert!(inside.epoch().0 >= sealed.load(Ordering::SeqCst));
                    }
                })
            })
            .collect();
        for _ in 0..2000 {
            let old = epochs.advance();
            epochs.wait_drained(old);
            sealed.store(old.0 + 1, Ordering::SeqCst);
        }
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            worker.join().unwrap();
        }
    }
}
