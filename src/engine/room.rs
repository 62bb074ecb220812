//! Space, and what gives way when there is none (C9).
//!
//! A change whose pre-image finds no room fails with [`Error::StoreFull`] before anything is applied. Unless the
//! mode is `enospc`, the snapshots that would miss the pre-image are given up then (`Engine::give_way`) and the
//! change is tried again: no snapshot asks for the pre-image any more. It waits for the record of that and its sync,
//! and for nothing else. So that this remains the exception, the upkeep thread deletes old snapshots before the
//! space is used up (`Engine::drop_for_room`).

use super::Engine;
use super::view::Snapshot;
use crate::config::{OnFull, SpacePolicy};
use crate::error::{Error, Result};
use crate::ids::{Epoch, Ino};
use crate::store::{SnapshotState, Space};
use crate::sync::{Arc, AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Mutex, Ordering};
use rustix::fs::StatVfs;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// What a small record is taken to need.
pub(super) const SMALL: u64 = 512;
/// Free space on the disk under which old snapshots are deleted: a part of the disk, within these bounds.
const MARGIN_PART: u64 = 64;
const LEAST_MARGIN: u64 = 8 << 20;
const MOST_MARGIN: u64 = 512 << 20;
/// Of a limit: the part under which old snapshots are deleted.
const LIMIT_PART: u64 = 10;
/// How soon a change that waits for space tries again.
const RETRY: Duration = Duration::from_millis(5);
/// How long a change that met a full disk waits for snapshots to give their space back, for each of them.
const RECLAIM_PATIENCE: Duration = Duration::from_secs(10);

/// How full the store is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Level {
    /// There is room.
    #[default]
    Ok,
    /// Four fifths of the room are taken.
    Filling,
    /// Nineteen twentieths are taken, or old snapshots are being deleted for room.
    NearlyFull,
    /// A pre-image finds no room.
    Full,
}

impl Level {
    /// The word that `cowfs status` uses.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Filling => "filling",
            Self::NearlyFull => "nearly-full",
            Self::Full => "full",
        }
    }
}

/// The space of a store as last measured, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Taken by the store and the retained files.
    pub used: u64,
    /// Of these, by retained files.
    pub retained: u64,
    /// Free on the filesystem of the store.
    pub free: u64,
    /// What of that must stay free.
    pub reserve: u64,
    /// What may still be kept.
    pub left: u64,
    /// How full that is.
    pub level: Level,
}

/// How long a change is tried again that met a full disk.
#[derive(Debug, Default)]
struct Patience {
    until: Option<Instant>,
    /// It was tried again because there was room after all.
    tried_again: bool,
}

/// The cut that is under way, as far as its snapshot is not in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct UnderCut {
    pub(super) epoch: Epoch,
    /// A pre-image is missing already: the cut fails.
    pub(super) spoiled: bool,
}

/// The room that is left, counted down between two measurements.
pub struct Room {
    policy: SpacePolicy,
    left: AtomicI64,
    /// Changes have had to wait for space on the disk, and there has not been much since.
    short: AtomicBool,
    /// So many wait now.
    waiting: AtomicUsize,
    /// Bytes of each retained file, as they were counted: one that is still open may have others when it goes.
    retained: Mutex<HashMap<Ino, u64>>,
    /// Their sum.
    retained_bytes: AtomicU64,
    /// How full it was said to be in the log since there was room last.
    told: Mutex<Level>,
    /// How often snapshots were given up, and of these, after how many all that they held was freed.
    given: AtomicU64,
    freed: AtomicU64,
}

impl Room {
    pub(super) fn new(policy: SpacePolicy) -> Self {
        Self {
            policy,
            left: AtomicI64::new(i64::MAX),
            short: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
            retained: Mutex::default(),
            retained_bytes: AtomicU64::new(0),
            told: Mutex::default(),
            given: AtomicU64::new(0),
            freed: AtomicU64::new(0),
        }
    }

    /// Counts `bytes` that are about to be kept; false if there is no room for them.
    pub(super) fn take(&self, bytes: u64) -> bool {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        let takes = |left: i64| (left >= bytes).then(|| left - bytes);
        let taken = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, takes);
        taken.is_ok()
    }

    /// Notes a file that was moved to the retained ones.
    pub(super) fn note_retained(&self, ino: Ino, bytes: u64) {
        let mut retained = self.retained.lock();
        let before = retained.insert(ino, bytes).unwrap_or(0);
        self.retained_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.retained_bytes.fetch_sub(before, Ordering::Relaxed);
        self.left
            .fetch_sub(i64::try_from(bytes).unwrap_or(0), Ordering::Relaxed);
    }

    /// Notes that it is not among them any more.
    pub(super) fn note_released(&self, ino: Ino) {
        let mut retained = self.retained.lock();
        let bytes = retained.remove(&ino).unwrap_or(0);
        self.retained_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Whether `level` is news.
    fn tells(&self, level: Level) -> bool {
        let mut told = self.told.lock();
        let news = level > *told;
        if news || level == Level::Ok {
            *told = level;
        }
        news
    }

    /// How often snapshots were given up.
    pub(super) fn given(&self) -> u64 {
        self.given.load(Ordering::SeqCst)
    }

    /// All is free that was held by what had been given up when [`Self::given`] was `given`.
    pub(super) fn note_freed(&self, given: u64) {
        self.freed.fetch_max(given, Ordering::SeqCst);
    }

    /// Takes a measurement up.
    fn note(&self, space: Space) -> Usage {
        let retained = self.retained_bytes.load(Ordering::Relaxed);
        let used = space.used + retained;
        let reserve = self.policy.reserve.of(space.total);
        let by_disk = space.free.saturating_sub(reserve);
        let by_limit = self.policy.limit.map(|limit| limit.saturating_sub(used));
        let left = by_limit.unwrap_or(u64::MAX).min(by_disk);
        let margin = (space.total / MARGIN_PART).clamp(LEAST_MARGIN, MOST_MARGIN);
        let short = by_disk < margin
            || by_limit.is_some_and(|left| left < self.policy.limit.unwrap_or(0) / LIMIT_PART);
        if by_disk >= margin {
            self.short.store(false, Ordering::SeqCst);
        }
        let all = used + left;
        let level = match () {
            () if left < SMALL => Level::Full,
            () if short || left < all / 20 => Level::NearlyFull,
            () if left < all / 5 => Level::Filling,
            () => Level::Ok,
        };
        let usage = Usage {
            used,
            retained,
            free: space.free,
            reserve,
            left,
            level,
        };
        // Without limit and reserve it is the disk that says when it is full.
        let bounded = self.policy.limit.is_some() || reserve > 0;
        let count = match bounded {
            true => i64::try_from(left).unwrap_or(i64::MAX),
            false => i64::MAX,
        };
        self.left.store(count, Ordering::Relaxed);
        usage
    }
}

impl Engine {
    /// The space of the store, measured now.
    ///
    /// # Errors
    /// Those of statvfs(3).
    pub fn space(&self) -> Result<Usage> {
        let now = self.room.note(self.store.space()?);
        self.store
            .set_fills_ahead(now.level == Level::Ok && now.left > LEAST_MARGIN);
        if self.room.tells(now.level) {
            let mib = |bytes: u64| bytes >> 20;
            log::warn!(
                "the store is {}: {} MiB taken, room for {} MiB more ({})",
                now.level.as_str(),
                mib(now.used),
                mib(now.left),
                match self.room.policy.on_full {
                    OnFull::Drop => "old snapshots are deleted when it is needed",
                    OnFull::Invalidate => "snapshots become invalid when there is none",
                    OnFull::Enospc => "changes fail when there is none",
                }
            );
        }
        Ok(now)
    }

    /// What the mount was told of space.
    #[must_use]
    pub fn space_policy(&self) -> SpacePolicy {
        self.room.policy
    }

    /// Runs a change, and gives snapshots up rather than let it fail for want of room for them. `attempt` begins an
    /// operation of its own each time, and has applied nothing when it fails with [`Error::StoreFull`]. `wanted`:
    /// what the change itself needs of the disk; a change that all snapshots together cannot make room for costs
    /// none of them.
    pub(super) fn with_room<T>(
        &self,
        wanted: u64,
        mut attempt: impl FnMut() -> Result<T>,
    ) -> Result<T> {
        let mut patience = Patience::default();
        loop {
            match attempt() {
                Err(Error::StoreFull { after, label }) if self.gives_way() => {
                    self.give_way(after, label)?;
                }
                Err(error) if self.makes_room(&error, wanted, &mut patience) => {}
                other => return other,
            }
        }
    }

    /// As [`Self::with_room`], for the removal of a name: it may use what is set aside for a full disk.
    pub(super) fn with_room_to_remove<T>(
        &self,
        mut attempt: impl FnMut() -> Result<T>,
    ) -> Result<T> {
        self.with_room(SMALL, || self.store.with_reserve(&mut attempt))
    }

    /// Whether changes may have to wait for space, which what is given up for them frees.
    #[must_use]
    pub fn is_short_of_space(&self) -> bool {
        self.room.short.load(Ordering::SeqCst) || self.room.waiting.load(Ordering::SeqCst) > 0
    }

    pub(super) fn gives_way(&self) -> bool {
        self.room.policy.on_full != OnFull::Enospc
    }

    /// Gives up what would miss a pre-image: the snapshots after `after`, up to `label`. They are marked durably when
    /// this returns, and nothing is kept for them any more. In the mode `drop` the oldest snapshot goes, too, so that
    /// room comes.
    fn give_way(&self, after: Epoch, label: Epoch) -> Result<()> {
        let mut cut = self.under_cut.lock();
        let missing = |epoch: Epoch| epoch > after && epoch <= label;
        let kept = self.snapshots.kept_ones();
        let newest = kept.last().map(|snapshot| snapshot.info.epoch);
        let drops = self.room.policy.on_full == OnFull::Drop;
        let goes = |snapshot: &Snapshot| {
            drops && !snapshot.info.held && Some(snapshot.info.epoch) != newest
        };
        let oldest = kept.iter().find(|snapshot| goes(snapshot));
        let mut victims: Vec<(Arc<Snapshot>, bool)> = Vec::new();
        for snapshot in &kept {
            let epoch = snapshot.info.epoch;
            if missing(epoch) || oldest.is_some_and(|oldest| oldest.info.epoch == epoch) {
                victims.push((snapshot.clone(), goes(snapshot)));
            }
        }
        if let Some(cut) = cut.as_mut()
            && missing(cut.epoch)
        {
            log::warn!("the snapshot that is being created is given up: the store is full");
            cut.spoiled = true;
        }
        self.give_up(&victims, "the store is full, and a change could not wait")?;
        self.refresh_guards(*cut);
        self.upkeep.kick();
        Ok(())
    }

    /// Marks snapshots as deleted (true) or invalid, durably, and stops keeping anything for them; the caller
    /// refreshes the guards. One that is in use becomes invalid, so that those who use it learn of it.
    fn give_up(&self, victims: &[(Arc<Snapshot>, bool)], why: &str) -> Result<()> {
        let mut marks = Vec::new();
        let mut sealed = Vec::new();
        for (snapshot, delete) in victims {
            let deleted = *delete && snapshot.seal().is_ok();
            let dies = deleted || snapshot.is_sealed();
            if deleted {
                sealed.push(snapshot);
            }
            let state = match dies {
                true => SnapshotState::Deleting,
                false => SnapshotState::Invalid,
            };
            marks.push((snapshot.info.epoch, state));
        }
        let marked = self.store.with_reserve(|| self.store.give_up(&marks));
        if let Err(error) = marked {
            sealed.iter().for_each(|snapshot| snapshot.unseal());
            log::error!("no snapshot can be given up: {error}");
            return Err(error);
        }
        for ((snapshot, _), (_, state)) in victims.iter().zip(marks) {
            let name = String::from_utf8_lossy(&snapshot.info.name);
            match state {
                SnapshotState::Deleting => {
                    log::warn!("snapshot {name:?} is deleted: {why}");
                    self.snapshots.dies(snapshot);
                    self.snapshots.remove(snapshot.info.epoch);
                }
                _ => {
                    log::warn!("snapshot {name:?} is invalid from now on: {why}");
                    self.snapshots.spoil(snapshot);
                }
            }
        }
        if !victims.is_empty() {
            self.folder_changed();
            self.room.given.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Gives one snapshot up for room: the oldest that is not held, and the newest, which becomes invalid, only if
    /// `all`. In the mode `invalidate` every one becomes invalid. False if there is none.
    fn give_up_oldest(&self, all: bool, why: &str) -> Result<bool> {
        let cut = self.under_cut.lock();
        // Another change that met the same full disk may have been first.
        if self.reclaims() {
            return Ok(true);
        }
        let kept = self.snapshots.kept_ones();
        let newest = kept.last().map(|snapshot| snapshot.info.epoch);
        let is_newest = |snapshot: &Snapshot| Some(snapshot.info.epoch) == newest;
        let victim = kept.iter().find(|s| !s.info.held && (all || !is_newest(s)));
        let Some(victim) = victim else {
            return Ok(false);
        };
        let deleted = self.room.policy.on_full == OnFull::Drop && !is_newest(victim);
        self.give_up(&[(victim.clone(), deleted)], why)?;
        self.refresh_guards(*cut);
        Ok(true)
    }

    /// In the mode `drop`: deletes the oldest snapshot if there is little room left, and nothing on its way back.
    /// True if it did: there is something to reclaim.
    pub(super) fn drop_for_room(&self) -> Result<bool> {
        let usage = self.space()?;
        if self.room.policy.on_full != OnFull::Drop
            || usage.level < Level::NearlyFull
            || self.reclaims()
        {
            return Ok(false);
        }
        self.give_up_oldest(false, "little room is left in the store")
    }

    /// Whether the space of a snapshot that was given up is still on its way back.
    pub(super) fn reclaims(&self) -> bool {
        let deleting = |s: &crate::store::SnapshotInfo| s.state == SnapshotState::Deleting;
        !self.snapshots.dead_are_unread()
            || self.store.snapshots().iter().any(deleting)
            || self.room.freed.load(Ordering::SeqCst) < self.room.given()
    }

    /// Whether there may be room now for a change that met a full disk itself: what snapshots hold there would be
    /// free without them. Held ones stay.
    fn makes_room(&self, error: &Error, wanted: u64, patience: &mut Patience) -> bool {
        let full = matches!(error, Error::Os(_)) && error.is_full();
        if !full || !self.gives_way() || self.store.is_poisoned() {
            return false;
        }
        let (Ok(usage), Ok(disk)) = (self.space(), self.backing.statvfs()) else {
            return false;
        };
        let free = crate::sys::free_bytes(&disk);
        // ENOSPC is also the answer to what would never fit: more attributes than an inode can have, a file larger
        // than the disk. No snapshot is given up for that.
        if wanted > free.saturating_add(usage.used) {
            return false;
        }
        // Space came back since, or it is an inode that is missing: those of removed files come back.
        if free > wanted.saturating_add(LEAST_MARGIN) && !self.could_free_inodes(&disk) {
            return !std::mem::replace(&mut patience.tried_again, true);
        }
        let waiting = self.reclaims();
        // As long as something comes back: what does not, in that time, will not.
        if !waiting {
            patience.until = None;
        }
        let until = patience.until;
        let until = until.unwrap_or_else(|| Instant::now() + RECLAIM_PATIENCE);
        patience.until = Some(until);
        if Instant::now() > until {
            return false;
        }
        let why = "a change needs the space on the full disk";
        if !waiting && !self.give_up_oldest(true, why).unwrap_or(false) {
            return false;
        }
        patience.tried_again = false;
        self.room.waiting.fetch_add(1, Ordering::SeqCst);
        self.room.short.store(true, Ordering::SeqCst);
        if waiting {
            std::thread::sleep(RETRY);
        }
        let done = self.upkeep.finish_round(RECLAIM_PATIENCE) || self.upkeep().is_ok();
        self.room.waiting.fetch_sub(1, Ordering::SeqCst);
        done
    }

    /// Whether the filesystem of the directory has no inode left, and snapshots have some.
    fn could_free_inodes(&self, disk: &StatVfs) -> bool {
        let none_left = disk.f_files > 0 && disk.f_favail == 0;
        none_left && self.backing.all_retained().is_ok_and(|all| !all.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is kept ahead may ask for more than there is (C9).
    #[test]
    fn what_is_not_taken_is_left() {
        let room = Room::new(SpacePolicy::default());
        room.left.store(1000, Ordering::Relaxed);
        assert!(!room.take(1001));
        assert!(!room.take(u64::MAX));
        assert!(room.take(1000));
        assert!(!room.take(1));
        assert!(room.take(0));
    }
}
