//! The threads of a flush helper. The server knows them by their numbers, so there are as many for as long as the helper lives.

use crate::error::{Error, Result};
use crate::sync::channel::{Sender, unbounded};
use crate::sync::{Arc, AtomicU32, AtomicUsize, Ordering};
use rustix::io::Errno;

/// How many there are. Most of what one of them does is waiting for the server: with more the server need not wait for the next.
const HANDS: usize = 4;
/// So few things are done sooner by one than the others are woken.
const FEW: usize = 4;

/// The numbers of the threads of the helper that there is (gettid(2)), in the server.
#[derive(Debug, Default)]
pub(super) struct Numbers([AtomicU32; HANDS]);

impl Numbers {
    /// Notes what a new helper has said: [`Hands::numbers`].
    pub(super) fn set(&self, numbers: &[u64]) {
        for (to, number) in self.0.iter().zip(numbers) {
            to.store(*number as u32, Ordering::SeqCst);
        }
    }

    /// Whether a thread is one of these.
    pub(super) fn has(&self, number: u32) -> bool {
        let is = |own: &AtomicU32| own.load(Ordering::Relaxed) == number;
        self.0.iter().any(is)
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// The threads, in the helper: the one that calls is one of them.
pub(super) struct Hands {
    others: Sender<Job>,
    numbers: Vec<u64>,
}

impl Hands {
    /// Starts them.
    pub(super) fn start() -> Result<Self> {
        let (others, jobs) = unbounded::<Job>();
        let (tell, told) = unbounded();
        for _ in 1..HANDS {
            let (jobs, tell) = (jobs.clone(), tell.clone());
            let work = move || {
                // Whoever starts it waits for this.
                let _ = tell.send(own_number());
                jobs.iter().for_each(|job| job());
            };
            std::thread::Builder::new()
                .name("cowfs-hand".into())
                .spawn(work)
                .map_err(|e| Error::io("cannot start a thread", "hand", &e))?;
        }
        let own = std::iter::once(own_number());
        let numbers = own.chain(told.iter().take(HANDS - 1)).collect();
        Ok(Self { others, numbers })
    }

    /// What the server is to know them by.
    pub(super) fn numbers(&self) -> &[u64] {
        &self.numbers
    }

    /// Does `work` with each of `things`, some at a time, in no order.
    ///
    /// # Errors
    /// The first of any; the rest is done all the same. `EIO` if a thread ended in it.
    pub(super) fn each<T: Send + Sync + 'static>(
        &self,
        things: Vec<T>,
        work: impl Fn(&T) -> Result<(), Errno> + Send + Sync + 'static,
    ) -> Result<(), Errno> {
        let few = things.len() <= FEW;
        let (shared, next) = (Arc::new((things, work)), Arc::new(AtomicUsize::new(0)));
        let (tell, done) = unbounded();
        let job = move || {
            let (things, work) = &*shared;
            let mine = std::iter::from_fn(|| things.get(next.fetch_add(1, Ordering::Relaxed)));
            let result = mine.map(work).fold(Ok(()), Result::and);
            // Things are to be nobody's when all is done: they may be files, which keep a mount in use.
            drop(shared);
            // Whoever began this waits for it.
            let _ = tell.send(result);
        };
        let others = if few { 0 } else { HANDS - 1 };
        for _ in 0..others {
            self.others
                .send(Box::new(job.clone()))
                .map_err(|_| Errno::AGAIN)?;
        }
        job();
        // One that has ended without a word has left a thing undone.
        let ends = (0..=others).map(|_| done.recv().unwrap_or(Err(Errno::IO)));
        ends.fold(Ok(()), Result::and)
    }
}

fn own_number() -> u64 {
    rustix::thread::gettid().as_raw_nonzero().get() as u64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;
    use crate::sync::Mutex;
    use std::collections::HashSet;

    #[test]
    fn they_have_different_numbers_which_the_server_knows() {
        let hands = Hands::start().unwrap();
        let different: HashSet<_> = hands.numbers().iter().collect();
        assert_eq!(different.len(), HANDS);
        let numbers = Numbers::default();
        numbers.set(hands.numbers());
        assert!(hands.numbers().iter().all(|own| numbers.has(*own as u32)));
        assert!(!numbers.has(1));
    }

    #[test]
    fn each_thing_is_done_once_by_one_of_them() {
        let hands = Hands::start().unwrap();
        for count in [0, 1, FEW, FEW + 1, 1000] {
            let done = Arc::new(Mutex::new(Vec::new()));
            let by = done.clone();
            let work = move |n: &usize| {
                by.lock().push((*n, own_number()));
                Ok(())
            };
            hands.each((0..count).collect(), work).unwrap();
            let mut done = std::mem::take(&mut *done.lock());
            done.sort_unstable();
            assert!(done.iter().map(|(n, _)| *n).eq(0..count));
            assert!(done.iter().all(|(_, by)| hands.numbers().contains(by)));
        }
    }

    #[test]
    fn nobody_has_a_thing_any_more_when_all_are_done() {
        let hands = Hands::start().unwrap();
        for _ in 0..1000 {
            let things: Vec<_> = (0..2 * FEW).map(Arc::new).collect();
            hands.each(things.clone(), |_| Ok(())).unwrap();
            assert!(things.iter().all(|thing| Arc::strong_count(thing) == 1));
        }
    }

    #[test]
    fn one_that_fails_is_told_and_the_rest_is_done() {
        let hands = Hands::start().unwrap();
        let done = Arc::new(AtomicUsize::new(0));
        let by = done.clone();
        let work = move |n: &usize| {
            by.fetch_add(1, Ordering::SeqCst);
            if *n == 57 { Err(Errno::IO) } else { Ok(()) }
        };
        assert_eq!(hands.each((0..100).collect(), work), Err(Errno::IO));
        assert_eq!(done.load(Ordering::SeqCst), 100);
    }

    #[test]
    fn a_thread_that_ends_in_the_middle_is_told() {
        let hands = Hands::start().unwrap();
        let own = own_number();
        let begun = AtomicUsize::new(0);
        let work = move |_: &usize| {
            // The caller goes on when another one has a thing too.
            begun.fetch_add(1, Ordering::SeqCst);
            while begun.load(Ordering::SeqCst) < 2 {
                std::thread::yield_now();
            }
            assert_eq!(own_number(), own, "an error that is part of the test");
            Ok(())
        };
        assert_eq!(hands.each((0..FEW + 1).collect(), work), Err(Errno::IO));
    }
}
