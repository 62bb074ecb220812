//! Which of a mount's request threads take requests: one, as long as it keeps up.
//!
//! A large part of the price of a request is waking who is to answer it. So one thread goes back to the device again and again,
//! with all that it needs in its processor's cache, and looks for the next request for a moment before it sleeps: a
//! caller that asks one thing after the other never has to wake it. The other threads are parked. One of them keeps
//! watch, and goes to the device as soon as a request takes so long that others might wait behind it.
//!
//! fuser owns the loop that reads requests, so all this is done at the end of each one, by its [`Turn`]: the reply is
//! out, and the thread has not yet gone back to the loop.

use super::REQUEST_THREADS;
use super::idle::Polling;
use super::pool::Pool;
use crate::sync::{Arc, AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, MutexGuard, OnceLock, Weak};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use std::cell::OnceCell;
use std::time::{Duration, Instant};

/// How long a thread looks for the next request before it sleeps. A caller needs 10 to 20 µs to wake up, and then a few
/// for what it does (docs/PERFORMANCE.md).
const LOOK: Duration = Duration::from_micros(50);
/// Giving way to others takes no longer than this if there are none. So often in a row there must have been some for
/// nobody to look any more, and for so long.
const YIELDED: Duration = Duration::from_micros(5);
const DISTURBED: u32 = 4;
const CROWDED: Duration = Duration::from_millis(5);
/// Requests that follow one another within this time come from somebody who asks one after the other. More than
/// [`LOOK`], because it contains the time in which a thread at the device wakes up.
const PROMPT: Duration = Duration::from_micros(80);
/// A request that takes longer has waited for something, if not for its turn on a processor.
const SLOW: Duration = Duration::from_micros(100);
/// How often the watch looks whether the threads at the device still get on.
const TICK: Duration = Duration::from_millis(1);
/// So many such requests within this time are more than what the scheduler does to anybody.
const OFTEN: (u32, Duration) = (8, Duration::from_millis(100));
/// After so many ticks without a request the watch sleeps until there is one.
const IDLE_TICKS: u32 = 20;
/// So many requests in a row that have waited for the one before are more than one thread can do.
const BEHIND: u32 = 16;
/// How long more than one thread stays at the device after there last was a reason.
const CALM: Duration = Duration::from_millis(200);

/// What is added to [`Crew::progress`] for a request that is done.
const DONE: u64 = 1 << 16;

/// The request threads of one mount.
pub(super) struct Crew {
    /// Where requests come from, once they can.
    device: OnceLock<OwnedFd>,
    processors: usize,
    polling: Option<Arc<Polling>>,
    /// The times below count from here.
    start: Instant,
    /// Requests done (upper 48 bits), and threads that are in one.
    progress: AtomicU64,
    /// Threads that are not parked.
    active: AtomicUsize,
    /// Threads that should be at the device when nothing is going on.
    wanted: AtomicUsize,
    /// When there last was a reason for as many, in ns, as the next three.
    raised: AtomicU64,
    /// When a request last had to wait for a disk: a reason for two.
    waited: AtomicU64,
    /// When the last request was done.
    last: AtomicU64,
    /// Until when others are taken to need the processors.
    crowded: AtomicU64,
    /// Looks in a row that somebody else's work interrupted.
    disturbed: AtomicU32,
    /// Requests in a row that waited for the one before.
    behind: AtomicU32,
    /// The watch sleeps until a request comes.
    drowsy: AtomicBool,
    parked: Mutex<Parked>,
    wake: Condvar,
}

#[derive(Default)]
struct Parked {
    /// Parked threads that are to go back to the device.
    called: usize,
    /// Requests that took long, as [`OFTEN`] counts them, and since when.
    slow: (u32, Duration),
    /// One of them keeps watch.
    watched: bool,
    /// The mount is ending: nobody is parked any more.
    over: bool,
}

/// A thread's membership. Its end is how the others learn that the device is gone: fuser's loop returns then.
struct Member(Weak<Crew>);

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(crew) = self.0.upgrade() {
            // It is not parked, or it would not end.
            crew.active.fetch_sub(1, Ordering::SeqCst);
            crew.parked.lock().over = true;
            crew.wake.notify_all();
        }
    }
}

thread_local! {
    static MEMBER: OnceCell<Member> = const { OnceCell::new() };
}

impl Crew {
    pub(super) fn new(polling: Option<Arc<Polling>>) -> Arc<Self> {
        Arc::new(Self {
            device: OnceLock::new(),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            polling,
            start: Instant::now(),
            progress: AtomicU64::new(0),
            active: AtomicUsize::new(0),
            wanted: AtomicUsize::new(1),
            raised: AtomicU64::new(0),
            waited: AtomicU64::new(0),
            last: AtomicU64::new(0),
            crowded: AtomicU64::new(0),
            disturbed: AtomicU32::new(0),
            behind: AtomicU32::new(0),
            drowsy: AtomicBool::new(false),
            parked: Mutex::default(),
            wake: Condvar::new(),
        })
    }

    /// Tells where requests come from. Before that every thread takes requests.
    pub(super) fn serve(&self, device: OwnedFd) {
        if self.device.set(device).is_err() {
            log::error!("request threads were given two devices");
        }
    }

    /// A request begins; it ends, with its reply, before the value is dropped.
    pub(super) fn turn(self: &Arc<Self>) -> Turn<'_> {
        MEMBER.with(|member| {
            member.get_or_init(|| {
                self.active.fetch_add(1, Ordering::SeqCst);
                Member(Arc::downgrade(self))
            });
        });
        let began = self.start.elapsed();
        let since = began.saturating_sub(nanoseconds(&self.last));
        self.progress.fetch_add(1, Ordering::SeqCst);
        if self.drowsy.load(Ordering::SeqCst) {
            let _parked = self.parked.lock();
            self.drowsy.store(false, Ordering::SeqCst);
            self.wake.notify_all();
        }
        Turn {
            crew: self,
            began,
            prompt: since < PROMPT,
            part: false,
        }
    }

    /// A part of a request begins, which has many. The request counts as the same until the last is done, so that the
    /// watch sees how long it takes, and its thread is not parked in between.
    pub(super) fn part_of_turn(self: &Arc<Self>) -> Turn<'_> {
        let mut turn = self.turn();
        turn.part = true;
        turn
    }

    /// Threads that are not parked and not in a request: at the device, or about to be.
    fn at_device(&self) -> usize {
        let working = self.working();
        self.active.load(Ordering::SeqCst).saturating_sub(working)
    }

    /// Threads that are in a request.
    fn working(&self) -> usize {
        (self.progress.load(Ordering::SeqCst) % DONE) as usize
    }

    /// Runs a job that waits for a disk, for the request that this thread is in: on this thread if it may wait, as
    /// giving the job to one of the pool costs another waking.
    pub(super) fn wait(&self, pool: &Pool, job: impl FnOnce() + Send + 'static) {
        match self.may_wait() {
            true => job(),
            false => pool.run(job),
        }
    }

    /// Whether the request that this thread is in may wait for a disk: another one is at the device. If none is yet, one
    /// comes, and stays as long as there are such requests. Of all threads that are in a request the one that came
    /// into it last sees all others, so not all of them wait. Two at most do, so that those that are left can relieve
    /// each other when a request has to wait that was not made for it.
    pub(super) fn may_wait(&self) -> bool {
        let now = self.start.elapsed();
        store(&self.waited, now);
        if self.wanted.load(Ordering::Relaxed) < 2 {
            let mut parked = self.parked.lock();
            if self.wanted.load(Ordering::Relaxed) < 2 {
                self.raise(&mut parked, now);
            }
        }
        self.at_device() > 0 && self.working() + 2 <= REQUEST_THREADS
    }

    /// What a thread does when it is through with a request that took from `began` to `now`.
    fn rest(&self, began: Duration, now: Duration, prompt: bool) {
        let Some(device) = self.device.get() else {
            return;
        };
        let mut wanted = self.wanted.load(Ordering::Relaxed);
        if wanted > 1 && now.saturating_sub(nanoseconds(&self.raised)) > CALM {
            let waits = now.saturating_sub(nanoseconds(&self.waited)) <= CALM;
            let calm = if waits { 2 } else { 1 };
            // Unless there is a new reason by now.
            let (then, relaxed) = (wanted, Ordering::Relaxed);
            wanted = match self.wanted.compare_exchange(then, calm, relaxed, relaxed) {
                Ok(_) => calm,
                Err(more) => more,
            };
        }
        if self.at_device() > wanted {
            return self.park();
        }
        let slow = now.saturating_sub(began) > SLOW;
        if !prompt && !slow {
            return;
        }
        let others = waits(device);
        // Where there are several, others need not wait for a slow one.
        if slow && (others || wanted > 1) {
            self.note_slow(&mut self.parked.lock(), now, others);
        }
        if others {
            let behind = self.behind.fetch_add(1, Ordering::Relaxed) + 1;
            if !slow && behind >= BEHIND && wanted < self.processors / 2 {
                self.raise(&mut self.parked.lock(), now);
            }
            return;
        }
        self.behind.store(0, Ordering::Relaxed);
        // With more threads at the device the request would be somebody else's.
        if wanted == 1 && prompt && self.processors > 1 && now > nanoseconds(&self.crowded) {
            self.look(device, now);
        }
    }

    /// Looks for the next request for a moment.
    fn look(&self, device: &OwnedFd, began: Duration) {
        let mut now = began;
        while now < began + LOOK && !waits(device) {
            let before = self.start.elapsed();
            std::thread::yield_now();
            now = self.start.elapsed();
            if now - before > YIELDED {
                // Somebody else has used this processor: the caller perhaps. It is better to sleep if that goes on.
                if self.disturbed.fetch_add(1, Ordering::Relaxed) + 1 >= DISTURBED {
                    store(&self.crowded, now + CROWDED);
                }
                return;
            }
        }
        self.disturbed.store(0, Ordering::Relaxed);
    }

    /// Counts a request that took long: if that goes on, those who waited for it, if there are such, do better with one
    /// thread more, and the threads that there are stay.
    fn note_slow(&self, parked: &mut Parked, now: Duration, others: bool) {
        if now.saturating_sub(parked.slow.1) > OFTEN.1 {
            parked.slow = (0, now);
        }
        parked.slow.0 += 1;
        if parked.slow.0 >= OFTEN.0 {
            parked.slow = (0, now);
            match others {
                true => self.raise(parked, now),
                false => store(&self.raised, now),
            }
        }
    }

    /// Has one more thread stay at the device.
    fn raise(&self, parked: &mut Parked, now: Duration) {
        store(&self.raised, now);
        self.behind.store(0, Ordering::Relaxed);
        let wanted = self.wanted.load(Ordering::Relaxed);
        self.wanted
            .store((wanted + 1).min(REQUEST_THREADS), Ordering::Relaxed);
        self.call(parked);
    }

    /// Has one more thread go to the device, if there is one.
    fn call(&self, parked: &mut Parked) {
        let resting = REQUEST_THREADS.saturating_sub(self.active.load(Ordering::SeqCst));
        if parked.called < resting {
            parked.called += 1;
            self.wake.notify_all();
        }
    }

    /// Waits until there is need of this thread, unless there is already.
    fn park(&self) {
        let mut parked = self.parked.lock();
        if parked.over || self.at_device() <= self.wanted.load(Ordering::Relaxed) {
            return;
        }
        self.active.fetch_sub(1, Ordering::SeqCst);
        // One that has come into a request meanwhile may wait because this one was there.
        if self.at_device() < self.wanted.load(Ordering::Relaxed) {
            self.active.fetch_add(1, Ordering::SeqCst);
            return;
        }
        while !parked.over && parked.called == 0 {
            if parked.watched {
                self.wake.wait(&mut parked);
            } else {
                parked.watched = true;
                self.watch(&mut parked);
                parked.watched = false;
            }
        }
        parked.called = parked.called.saturating_sub(1);
        self.active.fetch_add(1, Ordering::SeqCst);
        // The next one keeps watch.
        self.wake.notify_all();
    }

    /// Keeps watch until a parked thread is called: by itself, when every thread that is not parked has been in a
    /// request and none was done for a tick; no longer than two ticks pass from the beginning of such a request.
    fn watch(&self, parked: &mut MutexGuard<'_, Parked>) {
        let mut idle = 0;
        while !parked.over && parked.called == 0 {
            let before = self.progress.load(Ordering::SeqCst);
            if idle < IDLE_TICKS {
                self.wake.wait_for(parked, TICK);
            } else {
                self.drowsy.store(true, Ordering::SeqCst);
                // Who began before this was stored is seen here; who begins later sees it.
                if self.progress.load(Ordering::SeqCst) == before && self.at_device() > 0 {
                    self.wake.wait(parked);
                }
                self.drowsy.store(false, Ordering::SeqCst);
                idle = 0;
                continue;
            }
            let stands = self.progress.load(Ordering::SeqCst) / DONE == before / DONE;
            if stands && self.at_device() == 0 {
                self.call(parked);
                self.note_slow(parked, self.start.elapsed(), true);
            }
            idle = if stands { idle + 1 } else { 0 };
        }
    }
}

fn nanoseconds(time: &AtomicU64) -> Duration {
    Duration::from_nanos(time.load(Ordering::Relaxed))
}

fn store(time: &AtomicU64, value: Duration) {
    time.store(value.as_nanos() as u64, Ordering::Relaxed);
}

/// Whether a request waits to be read, or the device is gone.
fn waits(device: &OwnedFd) -> bool {
    const AT_ONCE: Timespec = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut there = [PollFd::new(device, PollFlags::IN)];
    poll(&mut there, Some(&AT_ONCE)) != Ok(0)
}

/// A request that a thread is in. To be made first, so that of the handler's own it is dropped last.
pub(super) struct Turn<'a> {
    crew: &'a Crew,
    /// Since the crew's beginning.
    began: Duration,
    /// It followed the request before it closely.
    prompt: bool,
    part: bool,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if self.part {
            self.crew.progress.fetch_sub(1, Ordering::SeqCst);
            return;
        }
        let now = self.crew.start.elapsed();
        store(&self.crew.last, now);
        self.crew.progress.fetch_add(DONE - 1, Ordering::SeqCst);
        if let Some(polling) = &self.crew.polling {
            polling.answered();
        }
        // A thread that panics ends, and must not wait before that.
        if !std::thread::panicking() {
            self.crew.rest(self.began, now, self.prompt);
        }
    }
}

#[cfg(test)]
mod tests;
