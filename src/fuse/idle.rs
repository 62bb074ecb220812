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
use std::time::{Duration, Instant};

const GOVERNOR: &str = "/sys/devices/system/cpu/cpuidle/current_governor";
const HALTPOLL: &str = "/sys/module/haltpoll/parameters";
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

/// Has idle processors poll while requests come one after another, for all mounts of a server.
#[derive(Debug)]
pub struct Polling {
    start: Instant,
    answered: AtomicU64,
    /// When the last of so many requests as [`STREAM`] says was answered, in ns from the start.
    counted: AtomicU64,
    /// When processors were last made to poll, likewise.
    roused: AtomicU64,
    /// To the thread that does it, which ends with this.
    rouse: Sender<()>,
}

impl Polling {
    /// `None` if `choice` forbids it, if the kernel sees to it by itself or does not let this process.
    #[must_use]
    pub fn find(choice: Idle) -> Option<Self> {
        let governed =
            std::fs::read_to_string(GOVERNOR).is_ok_and(|name| name.trim() == "haltpoll");
        if choice == Idle::Halt || !governed || !leaves_it_to_us(Path::new(HALTPOLL)) {
            return None;
        }
        let latency = open_latency(Path::new(LATENCY))?;
        let moment = moment(processors()?);
        let (polling, asked) = Self::new();
        std::thread::Builder::new()
            .name("cowfs-polling".into())
            .spawn(move || make_poll(&latency, &asked, moment))
            .ok()?;
        log::debug!("idle processors poll while requests come one after another");
        Some(polling)
    }

    fn new() -> (Self, Receiver<()>) {
        // More than one wish need not wait.
        let (rouse, asked) = bounded(1);
        let polling = Self {
            start: Instant::now(),
            answered: AtomicU64::new(0),
            counted: AtomicU64::new(0),
            roused: AtomicU64::new(0),
            rouse,
        };
        (polling, asked)
    }

    /// A request was answered.
    pub fn answered(&self) {
        if (self.answered.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(STREAM.0) {
            self.counted(self.start.elapsed());
        }
    }

    /// So many requests as [`STREAM`] says were answered.
    fn counted(&self, now: Duration) {
        let relaxed = Ordering::Relaxed;
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

/// Whether haltpoll, with these parameters, does not poll by itself, and ends a poll that it was made to do.
/// Without the last each processor would go on with it for good (`adjust_poll_limit` of
/// drivers/cpuidle/governors/haltpoll.c).
fn leaves_it_to_us(parameters: &Path) -> bool {
    let value = |name: &str| std::fs::read_to_string(parameters.join(name)).unwrap_or_default();
    value("guest_halt_poll_ns").trim() == "0"
        && value("guest_halt_poll_allow_shrink").trim() == "Y"
        && !matches!(value("guest_halt_poll_shrink").trim(), "" | "1")
}

fn open_latency(path: &Path) -> Option<OwnedFd> {
    open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).ok()
}

/// The processors of the machine, also those that this process may not use (proc_stat(5)).
fn processors() -> Option<u32> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    // One line is for all of them together.
    let lines = stat.lines().filter(|line| line.starts_with("cpu")).count();
    u32::try_from(lines).ok()?.checked_sub(1).filter(|n| *n > 0)
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

    const MICROSECOND: Duration = Duration::from_micros(1);
    /// Since the start.
    const FIRST: Duration = Duration::from_secs(1);

    /// How often processors are made to poll by so many requests, one in each `apart`, from `begin` on.
    fn wishes(
        polling: &Polling,
        asked: &Receiver<()>,
        begin: Duration,
        count: u32,
        apart: Duration,
    ) -> usize {
        let counts = (0..count).step_by(STREAM.0 as usize);
        counts
            .map(|n| {
                polling.counted(begin + n * apart);
                asked.try_iter().count()
            })
            .sum()
    }

    #[test]
    fn requests_that_come_one_after_another_make_processors_poll_now_and_then() {
        let (polling, asked) = Polling::new();
        assert_eq!(wishes(&polling, &asked, FIRST, 4, 250 * MICROSECOND), 0);
        assert_eq!(
            wishes(&polling, &asked, FIRST + STREAM.1, 400, 250 * MICROSECOND),
            1
        );
        assert_eq!(
            wishes(&polling, &asked, 2 * FIRST, 50_000, 20 * MICROSECOND),
            10
        );
    }

    #[test]
    fn requests_that_are_far_apart_do_not() {
        let (polling, asked) = Polling::new();
        assert_eq!(
            wishes(&polling, &asked, FIRST, 10_000, 300 * MICROSECOND),
            0
        );
    }

    #[test]
    fn every_request_counts() {
        let (polling, asked) = Polling::new();
        let end = Instant::now() + 60 * FIRST;
        while asked.is_empty() {
            assert!(Instant::now() < end, "no processor is made to poll");
            polling.answered();
        }
        assert!(polling.start.elapsed() > AGAIN, "too early");
        assert!(polling.answered.load(Ordering::Relaxed) >= 2 * STREAM.0);
    }

    #[test]
    fn each_wish_is_taken_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (wish, asked) = bounded(2);
        wish.send(()).unwrap();
        wish.send(()).unwrap();
        drop(wish);
        make_poll(&open_latency(file.path()).unwrap(), &asked, MICROSECOND);
        let bytes = std::fs::read(file.path()).unwrap();
        let written: Vec<[u8; 4]> = bytes
            .chunks(4)
            .map(|word| word.try_into().unwrap())
            .collect();
        let want = [ANY, NONE, ANY, NONE, ANY];
        assert_eq!(written, want.map(i32::to_ne_bytes));
    }

    #[test]
    fn nothing_is_asked_for_that_the_kernel_does_not_take() {
        assert!(open_latency(Path::new("/dev/null/no")).is_none());
        // Each write to it fails; it would wait for wishes for ever.
        let (_wish, asked) = bounded(1);
        make_poll(
            &open_latency(Path::new("/dev/full")).unwrap(),
            &asked,
            MICROSECOND,
        );
    }

    #[test]
    fn no_poll_is_begun_that_would_not_end() {
        let dir = tempfile::tempdir().unwrap();
        let with = |ns: &str, allow_shrink: &str, shrink: &str| {
            for (name, value) in [
                ("ns", ns),
                ("allow_shrink", allow_shrink),
                ("shrink", shrink),
            ] {
                let path = dir.path().join(format!("guest_halt_poll_{name}"));
                std::fs::write(path, format!("{value}\n")).unwrap();
            }
            leaves_it_to_us(dir.path())
        };
        assert!(!leaves_it_to_us(dir.path()));
        assert!(with("0", "Y", "2"));
        assert!(with("0", "Y", "0"));
        assert!(!with("200000", "Y", "2"));
        assert!(!with("0", "N", "2"));
        assert!(!with("0", "Y", "1"));
    }

    #[test]
    fn no_number_of_processors_polls_for_more_than_two() {
        assert!(
            processors().unwrap() as usize >= std::thread::available_parallelism().unwrap().get()
        );
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
