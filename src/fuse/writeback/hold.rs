//! The rules of a hold, apart from threads and the kernel.

use crate::engine::nodes::NodeId;
use crate::ids::Epoch;
use crate::planted::{self, Bug};
use std::collections::HashSet;
use std::time::Instant;

/// Rounds that do not count if a sealed file was changed, even if nothing that is in the snapshot was let through. What is
/// written after its file's seal is out, and whoever reads it waits with what comes of it: except for one whose write(2) had
/// begun and takes its bytes from that file's pages (a mapping, or the pipe of a splice(2)). In the second round all who
/// were writing wait. Who stores to a mapping all the time waits for none, so it ends there.
const STRICT_ROUNDS: u32 = 2;

/// What a request means to a cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::fuse) enum Kind {
    /// Its reply gives out the attributes of this file. With a handle (`of_write`) it may be what a write(2) waits for.
    Attributes { node: NodeId, of_write: bool },
    /// It changes something, or opens something for writing, and the kernel holds the lock of no file for it.
    Makes,
    /// It changes something, and the kernel holds the locks of these files until it is answered.
    Locks(Vec<NodeId>),
    /// It sets no more than times, and the kernel may hold the lock of another file for it.
    Times,
}

/// What becomes of a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Run,
    Park,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// No cut.
    Open,
    /// A cut: the seals are being made.
    Held(Epoch),
    /// All seals are made, and the epoch is about to advance.
    Closed,
}

/// The rules of a hold, apart from threads and the kernel.
pub(super) struct Hold<J> {
    pub(super) phase: Phase,
    /// The files that were open for writing when the hold began.
    pub(super) active: HashSet<NodeId>,
    /// Those of them that have been cut in this round.
    pub(super) sealed: HashSet<NodeId>,
    /// Something that is in the snapshot was let through when a seal had been made: if a change that is out of the
    /// snapshot was made before it, the round does not count.
    late: bool,
    /// A sealed file was changed: that is out of the snapshot.
    pub(super) changed: bool,
    parked: Vec<Parked<J>>,
    /// When the hold began.
    pub(super) since: Instant,
    /// Which of its rounds this is, from 1.
    round: u32,
}

pub(super) struct Parked<J> {
    kind: Kind,
    pub(super) since: Instant,
    pub(super) job: J,
}

impl<J> Hold<J> {
    pub(super) fn new() -> Self {
        Self {
            phase: Phase::Open,
            active: HashSet::new(),
            sealed: HashSet::new(),
            late: false,
            changed: false,
            parked: Vec::new(),
            since: Instant::now(),
            round: 0,
        }
    }

    /// Begins a round. The files that are open for writing are those of the first.
    pub(super) fn begin(&mut self, next: Epoch, active: impl FnOnce() -> HashSet<NodeId>) {
        let first = self.phase == Phase::Open;
        self.phase = Phase::Held(next);
        if first {
            self.since = Instant::now();
            self.round = 0;
            // After the phase: a file that is opened from now on is not answered for before the hold ends.
            self.active = active();
        }
        self.round += 1;
        self.sealed.clear();
        self.late = false;
        self.changed = false;
    }

    fn is_open_to_writers(&self, node: NodeId) -> bool {
        self.active.contains(&node) && !self.sealed.contains(&node)
    }

    pub(super) fn judge(&mut self, kind: &Kind) -> Verdict {
        match (self.phase, kind) {
            (Phase::Open, _) => return Verdict::Run,
            // The planted bug: writes go on while the seals are made.
            (_, Kind::Attributes { of_write: true, .. }) if planted::has(Bug::NoHold) => {
                return Verdict::Run;
            }
            (_, Kind::Attributes { node, .. }) if !self.active.contains(node) => {
                return Verdict::Run;
            }
            (Phase::Closed, _) | (_, Kind::Attributes { .. } | Kind::Makes) => {
                return Verdict::Park;
            }
            // To wait for the lock of a file that is not sealed yet would keep it from being sealed.
            (_, Kind::Locks(nodes)) if !nodes.iter().any(|node| self.is_open_to_writers(*node)) => {
                return Verdict::Park;
            }
            // Nor can it be made in two epochs at once.
            (_, Kind::Locks(nodes)) => {
                self.changed |= nodes.iter().any(|node| self.sealed.contains(node));
            }
            (_, Kind::Times) => {}
        }
        self.late |= !self.sealed.is_empty();
        Verdict::Run
    }

    pub(super) fn park(&mut self, kind: Kind, job: J) {
        let since = Instant::now();
        self.parked.push(Parked { kind, since, job });
    }

    /// Notes the seal of a file; false if no round wants it.
    pub(super) fn seal(&mut self, node: NodeId) -> bool {
        matches!(self.phase, Phase::Held(_))
            && self.active.contains(&node)
            && self.sealed.insert(node)
    }

    /// Notes that a file is changed, by what no cut makes wait.
    pub(super) fn note_change(&mut self, node: NodeId) {
        self.changed |= self.sealed.contains(&node);
    }

    /// All seals are made: nothing more gets into the snapshot. Returns whether it takes a look at the files to know if
    /// the round counts.
    pub(super) fn close(&mut self) -> bool {
        self.phase = Phase::Closed;
        self.late || self.round <= STRICT_ROUNDS
    }

    /// Ends a round, which is to be repeated. Returns what has to be done for that, now that no seal counts: it may have
    /// locks that seals need.
    pub(super) fn reopen(&mut self, next: Epoch) -> Vec<Parked<J>> {
        self.phase = Phase::Held(next);
        self.sealed.clear();
        self.take(|kind| matches!(kind, Kind::Locks(_) | Kind::Times))
    }

    fn take(&mut self, which: impl Fn(&Kind) -> bool) -> Vec<Parked<J>> {
        self.parked
            .extract_if(.., |parked| which(&parked.kind))
            .collect()
    }

    /// Questions that may be asked under a lock that a seal waits for, other than those of writes. Their answers let no
    /// write go on if the kernel may not believe them.
    pub(super) fn take_questions(&mut self) -> Vec<Parked<J>> {
        self.take(|kind| {
            matches!(
                kind,
                Kind::Attributes {
                    of_write: false,
                    ..
                }
            )
        })
    }

    /// The questions of files that cannot be sealed, whoever asks: writes may go on, so that the round does not count.
    pub(super) fn take_writes(&mut self) -> Vec<Parked<J>> {
        let (active, sealed) = (&self.active, &self.sealed);
        let stuck = |kind: &Kind| match kind {
            Kind::Attributes { node, .. } => active.contains(node) && !sealed.contains(node),
            _ => false,
        };
        let taken: Vec<_> = self
            .parked
            .extract_if(.., |parked| stuck(&parked.kind))
            .collect();
        self.late |= !taken.is_empty();
        taken
    }

    /// What may have the lock of a file that cannot be sealed: somebody who has that may wait for the lock of a sealed
    /// file, whose holder waits here (rename(2) takes two). The round does not count.
    pub(super) fn take_locks(&mut self) -> Vec<Parked<J>> {
        let active = &self.active;
        let taken: Vec<_> = self
            .parked
            .extract_if(.., |parked| match &parked.kind {
                Kind::Attributes { node, .. } => active.contains(node),
                Kind::Locks(_) | Kind::Times => true,
                Kind::Makes => false,
            })
            .collect();
        self.late |= !taken.is_empty();
        self.changed |= !taken.is_empty();
        taken
    }

    pub(super) fn release(&mut self) -> Vec<Parked<J>> {
        self.phase = Phase::Open;
        self.active.clear();
        self.sealed.clear();
        std::mem::take(&mut self.parked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEXT: Epoch = Epoch(5);

    /// A hold of the files 10, 11 and 12.
    fn hold() -> Hold<&'static str> {
        let mut hold = Hold::new();
        hold.begin(NEXT, || HashSet::from([10, 11, 12]));
        hold
    }

    fn asks(node: NodeId, of_write: bool) -> Kind {
        Kind::Attributes { node, of_write }
    }

    fn jobs(parked: Vec<Parked<&'static str>>) -> Vec<&'static str> {
        parked.into_iter().map(|parked| parked.job).collect()
    }

    #[test]
    fn without_a_cut_everything_runs() {
        let mut hold = Hold::<()>::new();
        for kind in [
            asks(10, true),
            Kind::Makes,
            Kind::Locks(vec![10]),
            Kind::Times,
        ] {
            assert_eq!(hold.judge(&kind), Verdict::Run, "{kind:?}");
        }
        assert!(!hold.late);
        assert!(!hold.seal(10), "a flush before the hold is no seal");
    }

    #[test]
    fn writes_and_what_makes_something_wait() {
        let mut hold = hold();
        for kind in [
            asks(10, true),
            asks(10, false),
            Kind::Makes,
            Kind::Locks(vec![]),
            Kind::Locks(vec![77]),
        ] {
            assert_eq!(hold.judge(&kind), Verdict::Park, "{kind:?}");
        }
        assert_eq!(hold.judge(&asks(77, true)), Verdict::Run);
        assert!(!hold.late);
    }

    #[test]
    fn whoever_has_the_lock_of_a_file_that_is_not_sealed_goes_on() {
        let mut hold = hold();
        assert_eq!(hold.judge(&Kind::Locks(vec![10])), Verdict::Run);
        assert!(!hold.late, "nothing is out of the snapshot yet");
        assert!(hold.seal(11));
        assert_eq!(hold.judge(&Kind::Locks(vec![11])), Verdict::Park);
        assert!(!hold.late);
        // It may come after a write to 11 that is out of the snapshot.
        assert_eq!(hold.judge(&Kind::Locks(vec![10])), Verdict::Run);
        assert!(hold.late);
        assert!(!hold.changed, "but it has not been seen to");
    }

    #[test]
    fn a_change_of_what_is_in_and_what_is_out_makes_the_round_count_for_nothing() {
        let mut hold = hold();
        hold.seal(11);
        assert_eq!(hold.judge(&Kind::Locks(vec![11, 10])), Verdict::Run);
        assert!(hold.late && hold.changed);
    }

    #[test]
    fn a_change_after_the_seal_is_noted() {
        let mut hold = hold();
        hold.note_change(10);
        assert!(!hold.changed, "it is in the snapshot");
        hold.seal(10);
        hold.note_change(11);
        hold.note_change(77);
        assert!(!hold.changed);
        hold.note_change(10);
        assert!(hold.changed);
        hold.reopen(NEXT);
        hold.begin(Epoch(6), HashSet::new);
        assert!(!hold.changed);
    }

    #[test]
    fn the_first_rounds_do_not_count_if_a_sealed_file_was_changed_and_the_later_only_if_that_matters()
     {
        let mut hold = hold();
        for _ in 1..=STRICT_ROUNDS {
            assert!(hold.close(), "the files are looked at");
            hold.reopen(NEXT);
            hold.begin(NEXT, HashSet::new);
        }
        assert!(!hold.close(), "nothing came after it");
        hold.reopen(NEXT);
        hold.begin(NEXT, HashSet::new);
        hold.seal(10);
        hold.judge(&Kind::Times);
        assert!(
            hold.close(),
            "something is in the snapshot that came after a seal"
        );
        // The next cut begins anew.
        hold.release();
        hold.begin(NEXT, HashSet::new);
        assert!(hold.close());
    }

    #[test]
    fn a_change_of_times_never_waits_for_a_seal() {
        let mut hold = hold();
        assert_eq!(hold.judge(&Kind::Times), Verdict::Run);
        assert!(!hold.late);
        hold.seal(10);
        assert_eq!(hold.judge(&Kind::Times), Verdict::Run);
        assert!(hold.late);
    }

    #[test]
    fn a_round_that_does_not_count_lets_the_locks_go_and_is_repeated() {
        let mut hold = hold();
        hold.seal(10);
        hold.park(Kind::Locks(vec![10]), "lock");
        hold.park(asks(10, true), "write");
        hold.park(Kind::Makes, "make");
        hold.judge(&Kind::Locks(vec![11]));
        assert!(hold.close());
        // While the files are looked at nothing gets into the snapshot, but what came may have locks.
        assert_eq!(hold.judge(&Kind::Times), Verdict::Park);
        hold.park(Kind::Times, "times");
        assert_eq!(hold.judge(&Kind::Locks(vec![11])), Verdict::Park);
        assert_eq!(jobs(hold.reopen(NEXT)), ["lock", "times"]);
        assert_eq!(hold.judge(&Kind::Locks(vec![11])), Verdict::Run);
        hold.begin(Epoch(6), || {
            panic!("the files are those of the first round")
        });
        for node in [10, 11, 12] {
            assert!(hold.seal(node));
            assert!(!hold.seal(node), "a file is sealed once");
        }
        hold.close();
        // The epoch is about to advance: nothing may be in both.
        for kind in [
            asks(10, true),
            Kind::Makes,
            Kind::Locks(vec![10]),
            Kind::Times,
        ] {
            assert_eq!(hold.judge(&kind), Verdict::Park, "{kind:?}");
        }
        assert_eq!(jobs(hold.release()), ["write", "make"]);
        assert_eq!(hold.judge(&asks(10, true)), Verdict::Run);
    }

    #[test]
    fn a_question_under_a_lock_is_answered_in_the_end() {
        let mut hold = hold();
        hold.seal(10);
        hold.park(asks(10, true), "write to what is sealed");
        hold.park(asks(11, true), "seek");
        hold.park(asks(11, false), "permission");
        assert_eq!(jobs(hold.take_questions()), ["permission"]);
        assert!(!hold.late, "no write can go on by that");
        assert_eq!(jobs(hold.take_writes()), ["seek"]);
        assert!(hold.late);
    }

    #[test]
    fn whoever_has_a_lock_goes_on_in_the_end() {
        // fchmod(2) of the sealed file waits here and has its lock; rename(2) has that of 11 and waits for it.
        let mut hold = hold();
        hold.seal(10);
        assert_eq!(hold.judge(&Kind::Locks(vec![10])), Verdict::Park);
        hold.park(Kind::Locks(vec![10]), "lock");
        hold.park(asks(10, true), "seek");
        hold.park(Kind::Makes, "make");
        assert!(jobs(hold.take_writes()).is_empty());
        assert_eq!(jobs(hold.take_locks()), ["lock", "seek"]);
        assert!(hold.late && hold.changed, "the round counts for nothing");
    }
}
