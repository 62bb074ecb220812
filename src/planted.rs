//! Bugs that are planted on purpose, so that the tests can prove that they would notice them (scripts/prove-cut-test).

use crate::sync::LazyLock;

/// A classic bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// An operation reads the epoch long before it locks its objects.
    EpochBeforeLock,
    /// A change is applied before its pre-image is in the journal.
    ApplyBeforeJournal,
    /// With the writeback cache: writes go on while the seals are made.
    NoHold,
    /// With the writeback cache: what the kernel still holds back is not asked for.
    NoSeal,
}

static PLANTED: LazyLock<Option<Bug>> = LazyLock::new(|| {
    let named = std::env::var("COWFS_PLANTED").ok()?;
    match named.as_str() {
        "epoch-before-lock" => Some(Bug::EpochBeforeLock),
        "apply-before-journal" => Some(Bug::ApplyBeforeJournal),
        "no-hold" => Some(Bug::NoHold),
        "no-seal" => Some(Bug::NoSeal),
        // A proof with no bug in it would prove nothing.
        other => panic!("COWFS_PLANTED={other}: there is no such bug"),
    }
});

/// Whether this program has `bug`: if it was built with the feature `planted`, and `COWFS_PLANTED` names it.
pub fn has(bug: Bug) -> bool {
    cfg!(feature = "planted") && *PLANTED == Some(bug)
}
