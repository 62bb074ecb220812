//! What idle processors do between two requests.
//!
//! Who asks something of a FUSE filesystem sleeps until the answer is there, and in a virtual machine it takes longer to
//! wake a processor that was halted than to answer (docs/PERFORMANCE.md, "What waking costs"). Kernels that know that
//! they are guests poll for 200 µs before they halt (governor haltpoll: Documentation/virt/guest-halt-polling.rst),
//! but there are hypervisors whose guests have this off. In such a guest a latency of nothing is asked for while
//! requests come one after another (Documentation/power/pm_qos_interface.rst): with that the governor has processors
//! poll. The wish is for a moment each time, and ends with the process in any case.

use crate::config::Idle;
use crate::sync::channel::{Receiver, Sender, bounded};
use crate::sync::{AtomicU64, Ordering};
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags, open};
use std::path::Path;
use std::time::Duration;

const GOVERNOR: &str = "/sys/devices/system/cpu/cpuidle/current_governor";
const HALT_POLL: &str = "/sys/module/haltpoll/parameters/guest_halt_poll_ns";
const LATENCY: &str = "/dev/cpu_dma_latency";

/// So many requests in such a time come one after another: they lie about as close as what haltpoll by itself would
/// have processors poll for.
const STREAM: (u64, Duration) = (4, Duration::from_millis(1));
/// How often processors are made to poll while that goes on.
const AGAIN: Duration = Duration::from_millis(100);
/// All poll who are idle, so with many it is for a part of the time: that of so many processors, all together.
const COST: u32 = 2;
/// Latencies in µs, as the device takes them (`cpu_latency_qos_write` of kernel/power/qos.c).
const NONE: i32 = 0;
const ANY: i32 = i32::MAX;

/// Has idle processors poll while requests come one after another.
#[derive(Debug)]
pub struct Polling {
    done: AtomicU64,
    /// When the last of so many requests as [`STREAM`] says was done, in ns.
    counted: AtomicU64,
    /// When processors were last made to poll, in ns.
    roused: AtomicU64,
    /// To the thread that does it, which ends with this.
    rouse: Sender<()>,
}

impl Polling {
    /// `None` if `choice` forbids it, if the kernel sees to it by itself or does not let this process.
    #[must_use]
    pub fn find(choice: Idle) -> Option<Self> {
        let is = |path: &str, value: &str| {
            std::fs::read_to_string(path).is_ok_and(|text| text.trim() == value)
        };
        if choice == Idle::Halt || !is(GOVERNOR, "haltpoll") || !is(HALT_POLL, "0") {
            return None;
        }
        let processors = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        let polling = Self::through(Path::new(LATENCY), moment(processors))?;
        log::debug!("idle processors poll while requests come one after another");
        Some(polling)
    }

    /// By the file that takes the latency wanted, for such a time at once.
    fn through(path: &Path, moment: Duration) -> Option<Self> {
        let latency = open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        // More than one wish need not wait.
        let (rouse, asked) = bounded(1);
        std::thread::Builder::new()
            .name("cowfs-polling".into())
            .spawn(move || make_poll(&latency, &asked, moment))
            .ok()?;
        Some(Self {
            done: AtomicU64::new(0),
            counted: AtomicU64::new(0),
            roused: AtomicU64::new(0),
            rouse,
        })
    }

    /// A request was answered, at a time that counts from any beginning.
    pub fn answered(&self, now: Duration) {
        let relaxed = Ordering::Relaxed;
        if !(self.done.fetch_add(1, relaxed) + 1).is_multiple_of(STREAM.0) {
            return;
        }
        let now = now.as_nanos() as u64;
        let since = now.saturating_sub(self.counted.swap(now, relaxed));
        let roused = self.roused.load(relaxed);
        if since <= STREAM.1.as_nanos() as u64
            && now.saturating_sub(roused) > AGAIN.as_nanos() as u64
            && self
                .roused
                .compare_exchange(roused, now, relaxed, relaxed)
                .is_ok()
        {
            // If it still has one before it, that does as well.
            let _ = self.rouse.try_send(());
        }
    }
}

/// How long processors poll each time.
fn moment(processors: u32) -> Duration {
    AGAIN.min(AGAIN * COST / processors)
}

/// Makes all idle processors poll for a moment each time that it is asked to.
fn make_poll(latency: &OwnedFd, asked: &Receiver<()>, moment: Duration) {
    let ask = |latency_us: i32| match rustix::io::write(latency, &latency_us.to_ne_bytes()) {
        Ok(_) => true,
        Err(errno) => {
            log::warn!("{LATENCY}: {errno}; idle processors are left to the kernel");
            false
        }
    };
    // What has just been opened may ask for something already.
    let mut taken = ask(ANY);
    while taken && asked.recv().is_ok() {
        taken = ask(NONE);
        std::thread::sleep(moment);
        taken = ask(ANY) && taken;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;
    use crate::sync::channel::TrySendError;
    use std::time::Instant;

    /// Polling that writes its wishes to a file, and how many wishes there were, each of which was taken back.
    fn polling() -> (Polling, impl Fn() -> usize) {
        let asked = tempfile::NamedTempFile::new().unwrap();
        let polling = Polling::through(asked.path(), MOMENT).unwrap();
        let wishes = move || {
            let end = Instant::now() + Duration::from_secs(60);
            loop {
                assert!(Instant::now() < end, "a wish stays");
                let bytes = std::fs::read(asked.path()).unwrap();
                let latencies = bytes.chunks_exact(4);
                let latencies: Vec<_> = latencies
                    .map(|word| i32::from_ne_bytes(word.try_into().unwrap()))
                    .collect();
                if latencies.len() % 2 == 1 {
                    assert_eq!(latencies[0], ANY);
                    let mut wishes = latencies[1..].chunks_exact(2);
                    assert!(wishes.all(|wish| wish == [NONE, ANY]), "{latencies:?}");
                    break latencies.len() / 2;
                }
                std::thread::yield_now();
            }
        };
        (polling, wishes)
    }

    /// Waits for so many wishes, and sees that there are no more.
    fn expect(wishes: &impl Fn() -> usize, count: usize) {
        let end = Instant::now() + Duration::from_secs(60);
        while wishes() < count {
            assert!(Instant::now() < end, "{count} wishes were expected");
            std::thread::sleep(MOMENT);
        }
        std::thread::sleep(10 * MOMENT);
        assert_eq!(wishes(), count);
    }

    const MOMENT: Duration = Duration::from_micros(100);
    const FIRST: Duration = Duration::from_secs(1);

    #[test]
    fn requests_that_come_one_after_another_make_processors_poll_now_and_then() {
        let (polling, wishes) = polling();
        // The first stream begins when four are known to be close.
        (0..8).for_each(|n| polling.answered(FIRST + n * Duration::from_micros(250)));
        expect(&wishes, 1);
        let (mut now, end) = (FIRST, FIRST + AGAIN);
        while now < end {
            polling.answered(now);
            now += Duration::from_micros(20);
        }
        expect(&wishes, 1);
        (0..100).for_each(|n| polling.answered(end + n * Duration::from_micros(100)));
        expect(&wishes, 2);
    }

    #[test]
    fn requests_that_are_far_apart_do_not() {
        let (polling, wishes) = polling();
        (0..10_000).for_each(|n| polling.answered(FIRST + n * Duration::from_micros(300)));
        expect(&wishes, 0);
    }

    #[test]
    fn nothing_is_asked_for_that_the_kernel_does_not_take() {
        assert!(Polling::through(Path::new("/dev/null/no"), MOMENT).is_none());
        // Each write to it fails.
        let polling = Polling::through(Path::new("/dev/full"), MOMENT).unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        while polling.rouse.try_send(()) != Err(TrySendError::Disconnected(())) {
            assert!(Instant::now() < end, "it goes on");
        }
        (0..1_000_000).for_each(|n| polling.answered(FIRST + n * Duration::from_micros(1)));
    }

    #[test]
    fn no_number_of_processors_polls_for_more_than_two() {
        assert_eq!(moment(1), AGAIN);
        assert_eq!(moment(2), AGAIN);
        assert_eq!(moment(8), AGAIN / 4);
        assert_eq!(moment(100), AGAIN / 50);
    }

    #[test]
    fn who_wants_the_kernels_choice_has_it() {
        assert!(Polling::find(Idle::Halt).is_none());
    }
}
