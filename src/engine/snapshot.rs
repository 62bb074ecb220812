//! Snapshots: the cut, deletion, renaming, and the folder that shows them.

use super::Engine;
use super::attr::Attr;
use super::nodes::{Node, NodeId, ObjectRef, ROOT_NODE, folder_node};
use super::object::{Member, Numbers, Object};
use super::room::UnderCut;
use super::view::Snapshot;
use crate::error::{Error, Result};
use crate::ids::{Epoch, is_snapshot_name};
use crate::store::{AttrImage, SnapshotInfo, SnapshotState, Timestamp};
use crate::sync::Ordering;
use rustix::fd::AsFd;
use rustix::io::Errno;
use std::time::{Duration, Instant};

/// Rounds that a cut may take to bring every object across; then it lets everybody go on for a while.
pub const MOST_ROUNDS: u32 = 10;
/// How long a cut that fails so is tried again, and the pause before each try.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(10);

/// What brings objects to a cut one by one, where changes wait in the kernel that the engine has not seen yet.
///
/// `prepare`, then `bring` until all are across or it fails, then `release`; these once more if it can be tried again; then
/// `finish`. A round that does not
/// bring all across takes its epoch with it: no snapshot gets its number, and what was kept under it serves older ones.
pub trait Barrier: Send + Sync {
    /// Gets from the kernel what can be had without making anybody wait.
    ///
    /// # Errors
    /// What stands in the way; the cut fails.
    fn prepare(&self) -> Result<()>;

    /// Holds new changes from the first round on, and lets each object that the kernel may hold changes of cross into
    /// `next` ([`Engine::cross_early`]) once all that belong to the snapshot have reached the engine.
    ///
    /// # Errors
    /// What stands in the way; the cut fails.
    fn bring(&self, next: Epoch) -> Result<Brought>;

    /// Lets what was held go on. Called after the last round, whatever came of it; `bring` may be called again then.
    fn release(&self);

    /// Gives up what was only for this cut.
    fn finish(&self);
}

/// How a round of a [`Barrier`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Brought {
    /// Every object has crossed or cannot change before [`Barrier::release`]: the epoch may advance.
    All,
    /// A change of this round may come after one that is out of the snapshot: another round is needed.
    Again,
}

/// What the last cut cost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CutReport {
    /// The snapshot's name.
    pub name: Vec<u8>,
    /// From the request to the reply.
    pub total: Duration,
    /// Getting what was written through shared mappings from the kernel.
    pub flush: Duration,
    /// Waiting for operations that were running already; nobody but the caller waits.
    pub quiesce: Duration,
    /// The longest that any operation waited to begin while the cut was under way.
    pub longest_wait: Duration,
}

/// A barrier that may hold changes; they go on in any case.
struct Held<'a>(&'a dyn Barrier);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// A cut that was made and is not recorded yet.
struct Step {
    /// The epoch that has begun.
    next: Epoch,
    /// The one that has ended.
    old: Epoch,
    created: Timestamp,
}

/// The time of day.
pub fn now() -> Timestamp {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    Timestamp {
        sec: now.tv_sec,
        nsec: now.tv_nsec as u32,
    }
}

fn check_name(name: &[u8]) -> Result<()> {
    if !is_snapshot_name(name) {
        Err(Error::SnapshotName(String::from_utf8_lossy(name).into()))
    } else {
        Ok(())
    }
}

/// A directory of whoever runs cowfs, in which nobody else can make or remove anything.
fn bare_directory(time: Timestamp) -> AttrImage {
    AttrImage {
        mode: libc::S_IFDIR | 0o755,
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        // Not told, as on btrfs: 2 would mean that there are no directories in it, and fts(3) would not look.
        nlink: 1,
        blksize: 4096,
        atime: time,
        mtime: time,
        ctime: time,
        ..AttrImage::default()
    }
}

fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into()
}

impl Engine {
    /// Cuts a snapshot. It holds every operation that completed before the call, none that begins after it
    /// returns (C1); no writer waits (C3).
    ///
    /// # Errors
    /// [`Error::SnapshotName`], [`Error::SnapshotExists`]; a failure of the journal.
    pub fn snapshot(&self, name: &[u8]) -> Result<Epoch> {
        self.snapshot_crossing(name, &[], || ())
    }

    /// As [`Self::snapshot`], but the objects `early` cross into the new epoch before the others, and
    /// `meanwhile` runs before those do: what it does to an object of `early` is not in the snapshot, what it
    /// does to another is. An operation on objects of both kinds is the caller's to prevent.
    pub fn snapshot_crossing(
        &self,
        name: &[u8],
        early: &[&Object],
        meanwhile: impl FnOnce(),
    ) -> Result<Epoch> {
        check_name(name)?;
        let start = Instant::now();
        let _cut = self.cut.lock();
        if self.snapshots.named(name).is_some() {
            return Err(Error::SnapshotExists(shown(name)));
        }
        let flush_start = Instant::now();
        if let Some(flusher) = self.flusher.read().as_ref() {
            flusher(&self.shared_writable())?;
        }
        let barrier = self.barrier.read().clone();
        let prepared = barrier.as_ref().map_or(Ok(()), |barrier| barrier.prepare());
        let flush = flush_start.elapsed();
        self.upkeep.take_longest_wait();
        self.cutting.store(true, Ordering::SeqCst);
        let done = prepared.and_then(|()| match &barrier {
            Some(barrier) => {
                let step = self.bring_patiently(&**barrier)?;
                self.record_cut(name, step)
            }
            None => {
                let next = self.epochs.current().next();
                self.guard_cut(Some(next));
                for object in early {
                    let _held = object.lock();
                    object.cross(next);
                }
                meanwhile();
                self.record_cut(name, self.step(next))
            }
        });
        self.cutting.store(false, Ordering::SeqCst);
        if let Some(barrier) = &barrier {
            barrier.finish();
        }
        let (epoch, quiesce) = done?;
        *self.last_cut.lock() = Some(CutReport {
            name: name.to_vec(),
            total: start.elapsed(),
            flush,
            quiesce,
            longest_wait: self.upkeep.take_longest_wait(),
        });
        Ok(epoch)
    }

    /// The cut once `barrier` has brought every object to it. Should it not succeed, it is tried again after a pause in
    /// which everybody goes on.
    fn bring_patiently(&self, barrier: &dyn Barrier) -> Result<Step> {
        let start = Instant::now();
        loop {
            let held = Held(barrier);
            let cut = self.bring_all(held.0).map(|next| self.step(next));
            drop(held);
            match cut {
                Err(Error::Os(Errno::BUSY)) if start.elapsed() < PATIENCE => {
                    std::thread::sleep(PAUSE);
                    barrier.prepare()?;
                }
                other => return other,
            }
        }
    }

    /// Has `barrier` bring every object to the cut. Returns the epoch that begins with it, with its guard in place.
    fn bring_all(&self, barrier: &dyn Barrier) -> Result<Epoch> {
        for round in 1..=MOST_ROUNDS {
            let next = self.epochs.current().next();
            self.guard_cut(Some(next));
            let brought = barrier.bring(next);
            if matches!(brought, Ok(Brought::All)) {
                log::debug!("an exact cut in round {round}");
                return Ok(next);
            }
            // Objects may have crossed already and left pre-images of values that the next round's are not. They
            // catch up when the epoch that they are in becomes that of all, and it is no snapshot's.
            let old = self.epochs.advance();
            self.epochs.wait_drained(old);
            self.guard_cut(None);
            brought?;
        }
        log::warn!(
            "no exact cut in {MOST_ROUNDS} rounds: too many changes that cannot be made to wait"
        );
        Err(Errno::BUSY.into())
    }

    /// Lets an object cross into epoch `next` ahead of the others: to be called within [`Barrier::bring`].
    ///
    /// # Errors
    /// `ESTALE` for a node that is not known; `EINVAL` for one that is not of the live tree.
    pub fn cross_early(&self, node: NodeId, next: Epoch) -> Result<()> {
        let Node::Live(object) = self.node(node)? else {
            return Err(Errno::INVAL.into());
        };
        let _held = object.lock();
        object.cross(next);
        Ok(())
    }

    /// Notes that an operation waited for a cut.
    pub fn note_wait(&self, wait: Duration) {
        self.upkeep.note_wait(wait);
    }

    /// The cut itself: one atomic step of the epoch. The guard of the new snapshot is in place.
    fn step(&self, next: Epoch) -> Step {
        let created = now();
        let old = self.epochs.advance();
        Step { next, old, created }
    }

    /// Waits for the operations that are in the snapshot, and writes its record.
    fn record_cut(&self, name: &[u8], step: Step) -> Result<(Epoch, Duration)> {
        let Step { next, old, created } = step;
        let start = Instant::now();
        self.epochs.wait_drained(old);
        let quiesce = start.elapsed();
        let settled = self.keep_owed_times().and_then(|()| self.settle_cut(next));
        let info = SnapshotInfo {
            epoch: next,
            name: name.to_vec(),
            created,
            held: false,
            state: SnapshotState::Ready,
        };
        let mut under_cut = self.under_cut.lock();
        let appended = match under_cut.take() {
            // A pre-image of it is missing: it has never been.
            Some(cut) if cut.spoiled => Err(Error::Os(Errno::NOSPC)),
            _ => settled.and_then(|()| self.store.record_snapshot(&info)),
        };
        let there = appended.is_ok();
        let recorded = appended
            .and_then(|lsn| self.settle(lsn))
            .and_then(|()| self.note_cut(next));
        // A record that cannot be taken back is one of a snapshot: pre-images are kept for it, or changes fail.
        if recorded.is_ok() || (there && self.store.delete_snapshot(next).is_err()) {
            // It is guarded already.
            self.snapshots.insert(info);
            self.folder_changed();
        } else {
            // Without its record it does not exist; what was kept for it serves older ones as well.
            self.refresh_guards(None);
        }
        drop(under_cut);
        recorded.map(|()| (next, quiesce))
    }

    fn guard_cut(&self, cut: Option<Epoch>) {
        let mut under_cut = self.under_cut.lock();
        *under_cut = cut.map(|epoch| UnderCut {
            epoch,
            spoiled: false,
        });
        match cut {
            Some(epoch) => self.guard_also(epoch),
            None => self.refresh_guards(None),
        }
    }

    /// Holds a snapshot, or lets it go: one that is held is not deleted, neither by anybody nor for room.
    ///
    /// # Errors
    /// [`Error::SnapshotMissing`]; a failure of the journal.
    pub fn hold_snapshot(&self, name: &[u8], held: bool) -> Result<()> {
        let _cut = self.cut.lock();
        let missing = || Error::SnapshotMissing(shown(name));
        let snapshot = self.snapshots.named(name).ok_or_else(missing)?;
        // So that none that has just been told to be held is given up for room.
        let _under_cut = self.under_cut.lock();
        let epoch = snapshot.info.epoch;
        let update = || self.store.update_snapshot(epoch, |info| info.held = held);
        let lsn = match held {
            true => update()?,
            false => self.store.with_reserve(update)?,
        };
        self.settle(lsn)?;
        self.snapshots.update(epoch, |info| info.held = held);
        Ok(())
    }

    /// Deletes a snapshot; its space is freed in the background.
    ///
    /// # Errors
    /// [`Error::SnapshotBusy`] if a file or directory of it is still open after `patience`.
    pub fn delete_snapshot(&self, name: &[u8], patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            match self.try_delete_snapshot(name) {
                // No lock is held while this waits.
                Err(Error::SnapshotBusy(_)) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                other => return other,
            }
        }
    }

    fn try_delete_snapshot(&self, name: &[u8]) -> Result<()> {
        let snapshot = {
            let _cut = self.cut.lock();
            let missing = || Error::SnapshotMissing(shown(name));
            let snapshot = self.snapshots.named(name).ok_or_else(missing)?;
            if snapshot.info.held {
                return Err(Error::SnapshotHeld(shown(name)));
            }
            // From here on nobody new reads it, and those who do are waited for before anything is freed.
            snapshot.seal()?;
            self.snapshots.dies(&snapshot);
            snapshot
        };
        // Not under the lock: a cut does not wait for the journal of a deletion.
        let delete = || self.store.delete_snapshot(snapshot.info.epoch);
        let deleted = self.store.with_reserve(delete);
        let _cut = self.cut.lock();
        if let Err(error) = &deleted {
            let gone = self.store.snapshots().iter().any(|info| {
                info.epoch == snapshot.info.epoch && info.state == SnapshotState::Deleting
            });
            if !gone {
                self.snapshots.lives(&snapshot);
                return deleted.map(drop);
            }
            log::error!("a snapshot is deleted, but not durably: {error}");
        }
        self.snapshots.remove(snapshot.info.epoch);
        self.folder_changed();
        self.guard_cut(None);
        self.upkeep.kick();
        deleted.map(drop)
    }

    /// Renames a snapshot. A name that exists is not replaced.
    pub fn rename_snapshot(&self, from: &[u8], to: &[u8]) -> Result<()> {
        check_name(to)?;
        let _cut = self.cut.lock();
        let snapshot = self
            .snapshots
            .named(from)
            .ok_or_else(|| Error::SnapshotMissing(shown(from)))?;
        if from == to {
            return Ok(());
        }
        if self.snapshots.named(to).is_some() {
            return Err(Error::SnapshotExists(shown(to)));
        }
        let epoch = snapshot.info.epoch;
        let lsn = self
            .store
            .update_snapshot(epoch, |info| info.name = to.to_vec())?;
        self.settle(lsn)?;
        self.snapshots.update(epoch, |info| info.name = to.to_vec());
        self.folder_changed();
        Ok(())
    }

    /// What the last cut of this mount cost.
    pub fn last_cut(&self) -> Option<CutReport> {
        self.last_cut.lock().clone()
    }

    // ---- the snapshot folder

    /// The snapshot folder of `dir`, if it has one: the root always, another directory if a snapshot shows it
    /// and no entry of its own has that name. The kernel is told of it.
    pub(super) fn lookup_own_folder(&self, dir: &ObjectRef) -> Result<Option<Attr>> {
        if dir.ino() != self.backing.root_entry().ino {
            let birth = self.store.birth(dir.ino())?.unwrap_or(Epoch(0));
            let shown = self.snapshots.newest().is_some_and(|newest| newest > birth);
            if !shown || self.find_live(dir, &self.snapshot_dir)?.is_some() {
                return Ok(None);
            }
        }
        self.nodes.told_folder(dir);
        self.folder_attr(dir).map(Some)
    }

    /// Whether the kernel may keep the attributes of the snapshot folder of `dir` until it is told that they have changed.
    /// That of the root alone: it is the one that copiers go through, and always there.
    pub fn tells_of_folder(&self, dir: &Object) -> bool {
        dir.ino() == self.backing.root_entry().ino && !self.user_snapshots
    }

    /// The names of snapshots have changed, and with them the times of the folders.
    pub(super) fn folder_changed(&self) {
        self.snapshots.touch();
        self.tell_listener(folder_node(ROOT_NODE));
    }

    /// What `name` means in the snapshot folder of `dir`; the kernel is told of it.
    pub(super) fn lookup_folder(&self, dir: &ObjectRef, name: &[u8]) -> Result<Attr> {
        let missing = || Error::Os(Errno::NOENT);
        let snapshot = self.snapshots.named(name).ok_or_else(missing)?;
        let birth = self.store.birth(dir.ino())?.unwrap_or(Epoch(0));
        if snapshot.info.epoch <= birth {
            return Err(missing());
        }
        let up = folder_node(self.nodes.live_id(dir.ino()));
        let epoch = snapshot.info.epoch;
        let numbers = self.numbers_through(dir, &snapshot);
        let member = Member::new(epoch, dir.entry.clone(), numbers, up);
        let attr = self.attr_of_member(&member)?;
        self.nodes.told_member(member)?;
        Ok(attr)
    }

    /// How what a snapshot shows is numbered where it is reached through the snapshot folder of `dir`.
    pub(super) fn numbers_through(&self, dir: &Object, snapshot: &Snapshot) -> Numbers {
        if snapshot.is_invalid() {
            Numbers::Lost
        } else if dir.ino() == self.backing.root_entry().ino {
            Numbers::Apart
        } else {
            Numbers::Through(dir.ino())
        }
    }

    /// What stands for an invalid snapshot, so that it can be listed, asked about and deleted: a directory that
    /// cannot be read. `None` if `member` is anything else.
    pub(super) fn attr_of_lost(&self, member: &Member) -> Option<Attr> {
        let snapshot = self.snapshots.get(member.snapshot)?;
        let root = match member.numbers {
            Numbers::Lost => true,
            Numbers::OfLive(root) => root == member.entry.ino,
            Numbers::Apart | Numbers::Through(_) => false,
        };
        (root && snapshot.is_invalid()).then(|| Attr {
            node: member.node(),
            shown: member.shown(),
            image: bare_directory(snapshot.info.created),
        })
    }

    /// The attributes of a snapshot folder: a directory of whoever runs cowfs, in which nobody else can make
    /// or remove anything; with `user-snapshots`, owner and mode of the root directory, whose writers may make
    /// snapshots then.
    pub(super) fn folder_attr(&self, dir: &ObjectRef) -> Result<Attr> {
        let changed = self.snapshots.changed();
        let node = folder_node(self.nodes.live_id(dir.ino()));
        let mut image = bare_directory(changed);
        if self.user_snapshots {
            let root = self.root();
            let fd = self.object_fd(&root)?;
            let live = self.backing.full_attr(fd.as_fd())?;
            // With an ACL the mode says too much.
            let plain = |(name, _): &(Vec<u8>, Vec<u8>)| name != b"system.posix_acl_access";
            if live.xattrs.iter().all(plain) {
                (image.mode, image.uid, image.gid) = (live.mode, live.uid, live.gid);
            }
        }
        Ok(Attr {
            node,
            shown: node,
            image,
        })
    }
}
