//! Which threads take requests, with a socket in place of the device.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use super::*;
use crate::sync::channel::{Receiver, Sender, unbounded};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::collections::HashSet;
use std::thread::{JoinHandle, ThreadId};

/// What the threads of fuser do, with a socket for the device and these for requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    Quick,
    /// It takes until the test allows it to end.
    Stuck,
    /// So does this one, in many parts.
    Parts,
    /// So does this one, if its thread may wait.
    Waits,
}

struct Rig {
    crew: Arc<Crew>,
    kernel: Option<OwnedFd>,
    done: Receiver<(Sent, ThreadId)>,
    allow: Sender<()>,
    threads: Vec<JoinHandle<()>>,
}

fn rig() -> Rig {
    let (kernel, device) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap();
    let crew = Crew::new(None);
    crew.serve(rustix::io::fcntl_dupfd_cloexec(&device, 0).unwrap());
    let device = Arc::new(device);
    let (tell, done) = unbounded();
    let (allow, allowed) = unbounded();
    let threads = (0..REQUEST_THREADS).map(|_| {
        let (crew, device) = (crew.clone(), device.clone());
        let (tell, allowed) = (tell.clone(), allowed.clone());
        std::thread::spawn(move || {
            let mut request = [0];
            // Nothing to read is the end, as ENODEV is that of a device.
            while rustix::io::read(&*device, &mut request).unwrap() == 1 {
                if request[0] == Sent::Parts as u8 {
                    while allowed.try_recv().is_err() {
                        let _part = crew.part_of_turn();
                        std::thread::yield_now();
                    }
                    tell.send((Sent::Parts, std::thread::current().id()))
                        .unwrap();
                    continue;
                }
                let _turn = crew.turn();
                let sent = match request[0] {
                    0 => Sent::Quick,
                    1 => Sent::Stuck,
                    _ => Sent::Waits,
                };
                if sent == Sent::Stuck || sent == Sent::Waits && crew.may_wait() {
                    allowed.recv().unwrap();
                }
                tell.send((sent, std::thread::current().id())).unwrap();
            }
        })
    });
    let threads = threads.collect();
    Rig {
        crew,
        kernel: Some(kernel),
        done,
        allow,
        threads,
    }
}

/// No wait of a test goes on for ever.
const LONG: Duration = Duration::from_secs(600);

impl Rig {
    fn send(&self, sent: Sent) {
        rustix::io::write(self.kernel.as_ref().unwrap(), &[sent as u8]).unwrap();
    }

    fn answer(&self) -> (Sent, ThreadId) {
        self.done.recv_timeout(LONG).expect("no answer")
    }

    fn ask(&self) -> ThreadId {
        self.send(Sent::Quick);
        let (sent, thread) = self.answer();
        assert_eq!(sent, Sent::Quick);
        thread
    }

    /// Lets one that waits for it go on, and gets its answer.
    fn allow_end_of(&self, sent: Sent) {
        self.allow.send(()).unwrap();
        assert_eq!(self.answer().0, sent);
    }

    /// Has every thread be in a request, because one that never was cannot be parked; then asks until one alone
    /// answers, as it has to be in the end.
    fn settle(&self) {
        let end = Instant::now() + LONG;
        (0..REQUEST_THREADS).for_each(|_| self.send(Sent::Stuck));
        while self.crew.progress.load(Ordering::SeqCst) % DONE < REQUEST_THREADS as u64 {
            assert!(Instant::now() < end, "a thread takes no request");
            std::thread::sleep(TICK);
        }
        (0..REQUEST_THREADS).for_each(|_| self.allow.send(()).unwrap());
        (0..REQUEST_THREADS).for_each(|_| assert_eq!(self.answer().0, Sent::Stuck));
        let alone = || self.crew.active.load(Ordering::SeqCst) == 1;
        while (0..100).map(|_| self.ask()).collect::<HashSet<_>>().len() > 1 || !alone() {
            assert!(Instant::now() < end, "several threads go on to answer");
        }
    }

    /// Has all threads come to the device, as if there had been reasons for each.
    fn call_all(&self) {
        let end = Instant::now() + LONG;
        for _ in 1..REQUEST_THREADS {
            let now = self.crew.start.elapsed();
            self.crew.raise(&mut self.crew.parked.lock(), now);
        }
        while self.crew.active.load(Ordering::SeqCst) < REQUEST_THREADS {
            assert!(Instant::now() < end, "not all come");
            std::thread::yield_now();
        }
    }

    /// The device goes away, and all threads end.
    fn end(mut self) {
        self.kernel = None;
        let end = Instant::now() + LONG;
        for thread in self.threads.drain(..) {
            while !thread.is_finished() {
                assert!(
                    Instant::now() < end,
                    "a thread is still there after the end"
                );
                std::thread::sleep(Duration::from_millis(1));
            }
            thread.join().unwrap();
        }
    }
}

#[test]
fn one_thread_answers_who_asks_one_after_the_other() {
    let rig = rig();
    rig.settle();
    rig.end();
}

#[test]
fn threads_that_never_had_a_request_end_too() {
    rig().end();
    // One has had one, and is not parked although the others are at the device.
    let one = rig();
    one.ask();
    one.end();
}

#[test]
fn a_request_that_takes_long_holds_up_no_other() {
    let rig = rig();
    rig.settle();
    // All threads but one are stuck.
    for stuck in 1..REQUEST_THREADS {
        rig.send(Sent::Stuck);
        for _ in 0..100 {
            rig.ask();
        }
        assert!(rig.done.is_empty(), "{stuck} are stuck, and nothing else");
    }
    for _ in 1..REQUEST_THREADS {
        rig.allow_end_of(Sent::Stuck);
    }
    rig.ask();
    rig.end();
}

#[test]
fn requests_that_wait_leave_a_thread_at_the_device() {
    const MANY: usize = 10 * REQUEST_THREADS;
    let rig = rig();
    rig.settle();
    (0..MANY).for_each(|_| rig.send(Sent::Waits));
    rig.send(Sent::Quick);
    let mut waiting = MANY;
    while rig.answer().0 == Sent::Waits {
        waiting -= 1;
    }
    // Those that did not wait, and had not told so yet.
    let end = Instant::now() + LONG;
    while rig.done.recv_timeout(100 * TICK).is_ok() || waiting > 2 && Instant::now() < end {
        waiting -= 1;
    }
    assert!(waiting <= 2, "{waiting} wait");
    (0..waiting).for_each(|_| rig.allow_end_of(Sent::Waits));
    rig.settle();
    rig.end();
}

#[test]
fn two_threads_stay_where_requests_wait_now_and_then() {
    let rig = rig();
    rig.settle();
    rig.call_all();
    let end = Instant::now() + LONG;
    while rig.crew.active.load(Ordering::SeqCst) != 2 {
        assert!(Instant::now() < end, "the others stay");
        rig.send(Sent::Waits);
        std::thread::sleep(OFTEN.1 / 4);
        match rig.done.try_recv() {
            Ok((sent, _)) => assert_eq!(sent, Sent::Waits),
            Err(_) => rig.allow_end_of(Sent::Waits),
        }
        for _ in 0..100 {
            rig.ask();
        }
    }
    rig.end();
}

#[test]
fn a_request_may_wait_when_another_thread_has_come() {
    let rig = rig();
    rig.settle();
    let end = Instant::now() + LONG;
    rig.send(Sent::Waits);
    while rig.done.recv_timeout(10 * TICK).is_ok() {
        assert!(Instant::now() < end, "no request may wait");
        rig.send(Sent::Waits);
    }
    rig.allow_end_of(Sent::Waits);
    rig.settle();
    rig.end();
}

#[test]
fn a_request_of_many_parts_holds_up_no_other_and_goes_on() {
    let rig = rig();
    rig.settle();
    rig.send(Sent::Parts);
    for _ in 0..100 {
        rig.ask();
    }
    let done = || rig.crew.progress.load(Ordering::SeqCst) / DONE;
    let end = Instant::now() + LONG;
    // The last answer may be there before its request counts.
    while {
        let before = done();
        std::thread::sleep(TICK);
        done() != before
    } {
        assert!(Instant::now() < end, "the parts count as requests");
    }
    // Others have gone back to the device meanwhile, and are more than are needed.
    rig.allow_end_of(Sent::Parts);
    rig.settle();
    rig.end();
}

#[test]
fn the_watch_wakes_up_from_a_long_pause() {
    let rig = rig();
    rig.settle();
    // Long enough for the watch to go to sleep.
    let end = Instant::now() + LONG;
    while !rig.crew.drowsy.load(Ordering::SeqCst) {
        assert!(Instant::now() < end, "the watch stays awake");
        std::thread::sleep(TICK);
    }
    rig.send(Sent::Stuck);
    rig.ask();
    rig.allow_end_of(Sent::Stuck);
    rig.end();
}

#[test]
fn one_thread_answers_again_although_some_requests_take_long() {
    let rig = rig();
    rig.settle();
    rig.call_all();
    let end = Instant::now() + LONG;
    let mut answered = HashSet::new();
    while answered.len() != 1 {
        assert!(Instant::now() < end, "several threads go on to answer");
        rig.send(Sent::Stuck);
        std::thread::sleep(OFTEN.1 / 4);
        rig.allow_end_of(Sent::Stuck);
        answered = (0..100).map(|_| rig.ask()).collect();
    }
    rig.end();
}

#[test]
fn one_thread_answers_again_when_nothing_takes_long_any_more() {
    let rig = rig();
    rig.settle();
    rig.send(Sent::Stuck);
    rig.ask();
    rig.allow_end_of(Sent::Stuck);
    rig.settle();
    rig.end();
}
