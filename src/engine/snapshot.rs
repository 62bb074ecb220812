//! Snapshots: the cut, deletion, renaming, and the folder that shows them.

use super::Engine;
use super::attr::Attr;
use super::object::{Object, ObjectRef, folder_node};
use crate::error::{Error, Result};
use crate::ids::Epoch;
use crate::store::{AttrImage, SnapshotInfo, SnapshotState, Timestamp};
use crate::sync::{Arc, Ordering};
use rustix::io::Errno;
use std::time::{Duration, Instant};

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

/// The time of day.
pub fn now() -> Timestamp {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    Timestamp {
        sec: now.tv_sec,
        nsec: now.tv_nsec as u32,
    }
}

fn check_name(name: &[u8]) -> Result<()> {
    let bad = name.is_empty()
        || name.len() > 255
        || name == b"."
        || name == b".."
        || name.contains(&b'/')
        || name.contains(&0);
    if bad {
        Err(Error::SnapshotName(String::from_utf8_lossy(name).into()))
    } else {
        Ok(())
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
        let flush = flush_start.elapsed();
        self.upkeep.take_longest_wait();
        self.cutting.store(true, Ordering::SeqCst);
        let done = self.advance(name, early, meanwhile);
        self.cutting.store(false, Ordering::SeqCst);
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

    /// The cut itself: one atomic step of the epoch, with the guard of the new snapshot in place before it.
    fn advance(
        &self,
        name: &[u8],
        early: &[&Object],
        meanwhile: impl FnOnce(),
    ) -> Result<(Epoch, Duration)> {
        let next = self.epochs.current().next();
        self.refresh_guards(Some(next));
        for object in early {
            let _held = object.lock();
            object.cross(next);
        }
        meanwhile();
        let created = now();
        let old = self.epochs.advance();
        let start = Instant::now();
        self.epochs.wait_drained(old);
        let quiesce = start.elapsed();
        let info = SnapshotInfo {
            epoch: next,
            name: name.to_vec(),
            created,
            held: false,
            state: SnapshotState::Ready,
        };
        let recorded = self
            .store
            .record_snapshot(&info)
            .and_then(|lsn| self.settle(Some(lsn)));
        if recorded.is_ok() {
            self.snapshots.insert(info);
            self.snapshots.touch();
        }
        // Without its record the snapshot does not exist; what was kept for it serves older ones as well.
        self.refresh_guards(None);
        recorded.map(|()| (next, quiesce))
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
            // From here on nobody new reads it, and those who do are waited for before anything is freed.
            snapshot.seal()?;
            self.snapshots.dies(&snapshot);
            snapshot
        };
        // Not under the lock: a cut does not wait for the journal of a deletion.
        let mut deleted = self.store.delete_snapshot(snapshot.info.epoch);
        // Deleting is how space is made, so it must not fail for want of space.
        if matches!(&deleted, Err(error) if error.errno() == Errno::NOSPC)
            && self.backing.drop_reserve()
        {
            deleted = self.store.delete_snapshot(snapshot.info.epoch);
        }
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
        self.snapshots.touch();
        self.refresh_guards(None);
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
        let info = SnapshotInfo {
            name: to.to_vec(),
            ..snapshot.info.clone()
        };
        let lsn = self.store.record_snapshot(&info)?;
        self.settle(Some(lsn))?;
        self.snapshots.insert(info);
        self.snapshots.touch();
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

    /// What `name` means in the snapshot folder of `dir`; the kernel is told of it.
    pub(super) fn lookup_folder(&self, dir: &ObjectRef, name: &[u8]) -> Result<Attr> {
        let missing = || Error::Os(Errno::NOENT);
        let snapshot = self.snapshots.named(name).ok_or_else(missing)?;
        let birth = self.store.birth(dir.ino())?.unwrap_or(Epoch(0));
        if snapshot.info.epoch <= birth {
            return Err(missing());
        }
        let (_, member) = self.nodes.told_member(snapshot.info.epoch, &dir.entry);
        self.attr_of_member(&member)
    }

    /// The attributes of a snapshot folder: a directory of whoever runs cowfs, in which nobody else can make
    /// or remove anything.
    pub(super) fn folder_attr(&self, dir: &ObjectRef) -> Result<Attr> {
        let changed = self.snapshots.changed();
        let node = folder_node(self.nodes.live_id(dir.ino()));
        let image = AttrImage {
            mode: libc::S_IFDIR | 0o755,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            nlink: 2,
            size: 0,
            blocks: 0,
            blksize: 4096,
            rdev: 0,
            atime: changed,
            mtime: changed,
            ctime: changed,
            btime: None,
            xattrs: Vec::new(),
        };
        Ok(Attr {
            node,
            shown: node,
            image,
        })
    }

    /// The directory `dir` in the snapshot called `name`.
    pub fn snapshot_named(&self, name: &[u8]) -> Option<Arc<super::view::Snapshot>> {
        self.snapshots.named(name)
    }
}
