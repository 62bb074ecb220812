//! What a power cut may take, and how it is known afterwards (C8). src/store/session.rs keeps the record of it.
//!
//! What no one has changed since a cut a snapshot shows from the backing directory. So it needs two things to
//! survive: that its pre-images were durable before the changes that they guard, and that what the directory
//! held at the cut was durable once (*settled*). Under `strict` both are so before anybody is told that the
//! snapshot exists. Under `ordered` both come later, in the background, and until then the session file says so.

use super::backing::Backing;
use super::{Engine, superblock};
use crate::config::Durability;
use crate::error::{Error, Result};
use crate::ids::Epoch;
use crate::store::{self, SnapshotInfo, SnapshotState, Store};
use crate::sync::Arc;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long nothing must have been appended before the session is made clean: while writers go on, the next
/// of them would only have to make it dirty again.
const QUIET: Duration = Duration::from_secs(2);
/// How long after a cut, at most, the backing directory is made durable. Not at once, so that cuts in quick
/// succession have it done once, and the disk is left to the backup that reads the snapshot.
const SETTLING: Duration = Duration::from_secs(5);

/// What the background thread remembers between its rounds.
#[derive(Debug)]
pub(super) struct Watch {
    /// When what earlier sessions left is made durable.
    earlier: Instant,
    /// The number of records appended, and when it was first seen.
    appended: Option<(u64, Instant)>,
    /// When snapshots were first seen that are not settled.
    unsettled: Option<Instant>,
}

/// The number by which a session knows that nothing which it did not sync was lost since: that of the machine's boot, with
/// those of the present mountings of the two filesystems.
///
/// # Errors
/// As [`store::boot_id`].
pub(super) fn boot(backing: &Backing, store: &Path) -> Result<u128> {
    let own = superblock::mounting(backing.root()).unwrap_or(0);
    let of_store = superblock::mounting_at(store).unwrap_or(0);
    Ok(store::boot_id()? ^ u128::from(own) ^ u128::from(of_store) << 64)
}

/// Begins the session; says in the log what has become suspect.
pub(super) fn begin(store: &Store) -> Result<()> {
    let suspect = store.with_reserve(|| store.begin_session())?;
    if !suspect.is_empty() {
        let names: Vec<_> = suspect
            .iter()
            .map(|info| String::from_utf8_lossy(&info.name))
            .collect();
        let why = match (store.damage().is_empty(), store.went_down()) {
            (false, _) => "the journal is damaged",
            (true, true) => {
                "the machine went down, or the filesystem was mounted anew, while the mount was in use"
            }
            (true, false) => "the record of the last session is missing",
        };
        log::warn!(
            "{why}: these snapshots may not be exact and are suspect from now on: {}",
            names.join(", ")
        );
    }
    Ok(())
}

impl Engine {
    /// Under strict durability, makes durable what the snapshot `cut` shows, which is not recorded yet.
    pub(super) fn settle_cut(&self, cut: Epoch) -> Result<()> {
        match self.durability {
            Durability::Strict => self.make_durable(cut),
            Durability::Ordered => Ok(()),
        }
    }

    /// Under strict durability, notes that the snapshot `cut`, which is recorded, is settled.
    pub(super) fn note_cut(&self, cut: Epoch) -> Result<()> {
        match self.durability {
            Durability::Strict => self.store.mark_settled(cut),
            Durability::Ordered => Ok(()),
        }
    }

    /// Makes durable what the snapshots show that are not settled yet. If the disk has lost some of it they are
    /// suspect from now on.
    pub fn settle_snapshots(&self) -> Result<()> {
        let last = self.store.snapshots().last().map(|info| info.epoch);
        let Some(last) = last.filter(|last| *last > self.store.settled()) else {
            return Ok(());
        };
        if let Err(error) = self.make_durable(last) {
            let _cut = self.cut.lock();
            let settled = self.store.settled();
            for info in self.mark_suspect(|epoch| epoch > settled && epoch <= last)? {
                log::error!(
                    "snapshot {:?} is suspect from now on: the backing filesystem cannot be synced: {error}",
                    String::from_utf8_lossy(&info.name)
                );
            }
        }
        self.store.mark_settled(last)
    }

    /// [`Store::mark_suspect`], for all to see.
    pub(super) fn mark_suspect(
        &self,
        doubtful: impl Fn(Epoch) -> bool,
    ) -> Result<Vec<SnapshotInfo>> {
        let marked = self.store.mark_suspect(doubtful)?;
        for info in &marked {
            self.snapshots.update(info.epoch, |known| {
                if known.state == SnapshotState::Ready {
                    known.state = info.state;
                }
            });
        }
        Ok(marked)
    }

    /// Settles snapshots that have waited for long enough, and makes the session clean when nothing was appended for a
    /// while.
    fn tend_session(&self, watch: &mut Watch) -> Result<()> {
        let now = Instant::now();
        if now >= watch.earlier {
            watch.earlier = now + SETTLING;
            self.settle_earlier()?;
        }
        let newest = self.snapshots.newest();
        if newest.is_some_and(|newest| newest > self.store.settled()) {
            if now - *watch.unsettled.get_or_insert(now) >= SETTLING {
                watch.unsettled = None;
                self.settle_snapshots()?;
            }
        } else {
            watch.unsettled = None;
            self.merge_unsettled();
        }
        let appended = self.store.appended();
        let since = match watch.appended {
            Some((seen, since)) if seen == appended => since,
            _ => watch.appended.insert((appended, now)).1,
        };
        if self.store.is_dirty() && now - since >= QUIET {
            self.store.mark_clean()?;
        }
        Ok(())
    }
}

impl Engine {
    /// Snapshots that are deleted before they are settled leave nothing behind.
    fn merge_unsettled(&self) {
        if let Some(_no_cut) = self.cut.try_lock()
            && self.snapshots.newest() <= Some(self.store.settled())
        {
            self.unsettled.merge(self.epochs.current());
        }
    }
}

/// Starts the thread that tends the session of `engine`.
pub(super) fn start(engine: &Arc<Engine>) -> Result<()> {
    let own = engine.clone();
    let mut watch = Watch {
        earlier: Instant::now() + SETTLING,
        appended: None,
        unsettled: None,
    };
    let thread = std::thread::Builder::new()
        .name("cowfs-session".into())
        .spawn(move || {
            while own.upkeep.pause(QUIET / 4) {
                if let Err(error) = own.tend_session(&mut watch) {
                    log::error!("the session: {error}");
                }
            }
        })
        .map_err(|e| Error::io("cannot start a thread", "session", &e))?;
    engine.upkeep.also(thread);
    Ok(())
}
