//! A mutation in progress, and the keeping of pre-images: the heart of copy-on-write.
//!
//! An [`Op`] locks its objects in order of inode number (I6), then enters the epoch (I4). Each `keep_*`
//! appends the pre-image of one aspect to the journal unless one is there already (I2); only then may the
//! caller change the backing directory (I1).

mod data;

pub use data::Range;

use super::Engine;
use super::epoch::InFlight;
use super::object::{Kept, Known, Object, ObjectGuard, Owed};
use super::room::{SMALL, UnderCut};
use super::times::with_owed;
use super::unsettled::can_be_synced;
use crate::config::Durability;
use crate::error::{Error, Result};
use crate::ids::{Epoch, Ino, Lsn};
use crate::planted::{self, Bug};
use crate::store::{AttrImage, Retained, Store};
use crate::sync::{Arc, AtomicU64, Ordering};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;
use std::time::Instant;

/// Objects that one operation can touch: two directories, what is moved, and what is replaced.
const MOST_OBJECTS: usize = 4;

/// A mutation in progress. Dropping it leaves the epoch first and unlocks the objects then.
pub struct Op<'a> {
    engine: &'a Engine,
    /// The epoch that was entered.
    entered: Epoch,
    _inflight: InFlight<'a>,
    locked: [Option<(Ino, ObjectGuard<'a>)>; MOST_OBJECTS],
    /// A name goes: that may exceed the limit of the store, since it is how room is made.
    removes: bool,
}

/// What an operation has to keep of an object.
#[derive(Clone, Copy)]
struct Aim {
    /// The label of what is kept now.
    label: Epoch,
    /// The newest snapshot not later than `label` that shows the object: a pre-image labelled from here on serves it.
    base: Epoch,
}

impl Engine {
    /// Locks `objects` (the same one may stand there twice) and enters the epoch.
    pub fn begin<'a>(&'a self, objects: &[&'a Object]) -> Op<'a> {
        let waited = self.cutting.load(Ordering::Relaxed).then(Instant::now);
        let planted = planted::has(Bug::EpochBeforeLock).then(|| self.planted_epoch());
        let mut order: [Option<&'a Object>; MOST_OBJECTS] = [None; MOST_OBJECTS];
        for (place, object) in order.iter_mut().zip(objects) {
            *place = Some(*object);
        }
        order[..objects.len()].sort_by_key(|object| object.map(Object::ino));
        let mut locked = [const { None }; MOST_OBJECTS];
        let mut last = None;
        for (place, object) in locked.iter_mut().zip(order.into_iter().flatten()) {
            if last != Some(object.ino()) {
                *place = Some((object.ino(), object.lock()));
                last = Some(object.ino());
            }
        }
        let inflight = self.epochs.enter(); // I4: after the last lock
        if let Some(start) = waited {
            self.upkeep.note_wait(start.elapsed());
        }
        let entered = planted.map_or(inflight.epoch(), |planted| planted.min(inflight.epoch()));
        for object in objects {
            let kept = locked
                .iter_mut()
                .flatten()
                .find(|(ino, _)| *ino == object.ino());
            if let Some((_, kept)) = kept {
                self.note_unsettled(object, kept, entered);
            }
        }
        Op {
            engine: self,
            entered,
            _inflight: inflight,
            locked,
            removes: false,
        }
    }

    /// Notes what an operation that entered `epoch` is about to change.
    fn note_unsettled(&self, object: &Object, kept: &mut Kept, epoch: Epoch) {
        let epoch = object.epoch(epoch);
        if kept.changed < Some(epoch) && can_be_synced(&object.entry) {
            kept.changed = Some(epoch);
            self.unsettled.note(epoch, &object.entry);
        }
    }

    /// The planted bug: the epoch is read long before the objects are locked, and not again.
    fn planted_epoch(&self) -> Epoch {
        static CALLS: AtomicU64 = AtomicU64::new(0);
        static READ: AtomicU64 = AtomicU64::new(0);
        if CALLS.fetch_add(1, Ordering::SeqCst).is_multiple_of(64) {
            READ.store(self.epochs.current().0, Ordering::SeqCst);
        }
        Epoch(READ.load(Ordering::SeqCst))
    }

    /// The newest snapshot not later than `epoch`, if pre-images have to be kept for one.
    fn guard(&self, epoch: Epoch) -> Option<Epoch> {
        self.guards
            .read()
            .iter()
            .rev()
            .copied()
            .find(|k| *k <= epoch)
    }

    /// Waits until what of the journal guards an object is durable.
    pub(super) fn pay(&self, owed: Owed) -> Result<()> {
        match owed {
            Owed::Nothing => Ok(()),
            Owed::UpTo(lsn) => self.store.wait_durable(lsn),
            Owed::Unknown => self.store.sync(),
        }
    }

    /// Makes the journal durable as far as it guards an object.
    pub(super) fn pay_for(&self, object: &Object) -> Result<()> {
        let owed = object.lock().owed;
        self.pay(owed)
    }

    /// Recomputes the snapshots that pre-images are kept for, with the one being `cut`. The caller holds the lock
    /// that this comes from.
    pub(super) fn refresh_guards(&self, cut: Option<UnderCut>) {
        let mut all = self.snapshots.kept();
        all.extend(cut.filter(|cut| !cut.spoiled).map(|cut| cut.epoch));
        *self.guards.write() = Arc::new(all);
    }

    /// Has pre-images kept for a new cut as well, in a time that does not depend on how many snapshots there are. The
    /// caller holds the lock of it.
    pub(super) fn guard_also(&self, cut: Epoch) {
        let mut guards = self.guards.write();
        debug_assert!(guards.last().is_none_or(|newest| *newest < cut));
        Arc::make_mut(&mut guards).push(cut);
    }
}

impl<'a> Op<'a> {
    /// The epoch that an operation on `object` belongs to.
    pub fn epoch_of(&self, object: &Object) -> Epoch {
        object.epoch(self.entered)
    }

    fn kept(&mut self, object: &Object) -> Result<&mut Kept> {
        self.locked
            .iter_mut()
            .flatten()
            .find(|(ino, _)| *ino == object.ino())
            .map(|(_, kept)| &mut **kept)
            .ok_or(Error::Os(Errno::INVAL))
    }

    /// Whether no name in `dir` has changed since its changes were `before`.
    pub fn unchanged(&mut self, dir: &Object, before: u64) -> Result<bool> {
        Ok(self.kept(dir)?.changes == before)
    }

    /// Lets this operation keep what a removal needs beyond the limit of the store.
    pub fn removes(&mut self) {
        self.removes = true;
    }

    /// What has to be kept of `object`; `None` if no snapshot shows it: there is none, or it was born after
    /// the newest.
    fn aim(&mut self, object: &Object) -> Result<Option<Aim>> {
        let label = self.epoch_of(object);
        let last_shown = self.kept(object)?.removed.unwrap_or(label).min(label);
        let Some(base) = self.engine.guard(last_shown) else {
            return Ok(None);
        };
        let store = &self.engine.store;
        let kept = self.kept(object)?;
        kept.rebase(base);
        let birth = match kept.birth {
            Some(birth) => birth,
            None => *kept
                .birth
                .insert(store.birth(object.ino())?.unwrap_or(Epoch(0))),
        };
        Ok((birth < base).then_some(Aim { label, base }))
    }

    /// Whether `object`, whose last name is about to go, has to be retained because a snapshot shows it; the
    /// record of that is appended. `origin`: directory and name where a crash may leave it half-way; `whiteout`: what takes
    /// its place there in the end.
    pub fn retain(
        &mut self,
        object: &Object,
        origin: Option<(&Object, &[u8])>,
        whiteout: bool,
    ) -> Result<bool> {
        let Some(aim) = self.aim(object)? else {
            return Ok(false);
        };
        let record = Retained {
            ino: object.ino(),
            kind: object.entry.kind,
            handle: object.entry.handle.clone(),
            birth: self.kept(object)?.birth.unwrap_or(Epoch(0)),
            removed: aim.label,
            origin: origin.map(|(dir, name)| (dir.ino(), dir.entry.handle.clone(), name.to_vec())),
            whiteout,
        };
        let birth = record.birth;
        self.append(
            object,
            aim,
            SMALL,
            |s| s.record_retained(&record),
            |_| Ok(birth),
        )?;
        Ok(true)
    }

    /// Notes that the last name of `object` is gone, which was in `dir`.
    pub fn note_removed(&mut self, dir: &Object, object: &Object) -> Result<()> {
        let epoch = self.epoch_of(dir).max(self.epoch_of(object));
        self.kept(object)?.removed = Some(epoch);
        Ok(())
    }

    /// Notes in which epoch the new object `object` was born, so that no snapshot up to then keeps anything
    /// of it.
    pub fn born(&mut self, dir: &Object, object: Ino) -> Epoch {
        let epoch = self.epoch_of(dir);
        if self.engine.guard(epoch).is_some() {
            // The object is there, so the operation has succeeded. Without a record it counts as old, and more is
            // kept of it than need be.
            if let Err(error) = self.engine.store.record_birth(object, epoch) {
                log::debug!("the birth of object {object} is not recorded: {error}");
                return Epoch(0);
            }
        }
        epoch
    }

    /// Keeps the attributes of `object`.
    pub fn keep_attr(&mut self, object: &Object) -> Result<()> {
        let Some(aim) = self.aim(object)? else {
            return Ok(());
        };
        // I2
        if !matches!(self.attr_kept(object, aim)?, Known::Yes(_)) {
            let fd = self.engine.object_fd(object)?;
            self.append_attr(object, aim, fd.as_fd())?;
        }
        Ok(())
    }

    fn attr_kept(&mut self, object: &Object, aim: Aim) -> Result<Known<u64>> {
        if self.kept(object)?.attr == Known::Unknown {
            let found = self.engine.store.attr_at(object.ino(), aim.base)?;
            self.kept(object)?.attr = found.map_or(Known::No, |(_, image)| Known::Yes(image.size));
        }
        Ok(self.kept(object)?.attr)
    }

    /// Keeps the attributes that `object` has now. Returns its size.
    fn append_attr(&mut self, object: &Object, aim: Aim, fd: BorrowedFd<'_>) -> Result<u64> {
        let owed = self.engine.times.owed(object.ino());
        let image = with_owed(owed, self.engine.backing.full_attr(fd)?);
        // Of a removed object the live link is the one in `retained/`, which the cut did not have. Its
        // attributes are kept with its removal at the latest, so that this is only ever about an object
        // removed in an epoch before `label` that is still open.
        let nlink =
            image.nlink - u32::from(object.retained.load(Ordering::SeqCst)).min(image.nlink);
        let image = AttrImage { nlink, ..image };
        let ino = object.ino();
        let xattrs = image.xattrs.iter().map(|(n, v)| n.len() + v.len());
        let bytes = SMALL + xattrs.sum::<usize>() as u64;
        self.append(
            object,
            aim,
            bytes,
            |store| store.keep_attr(ino, aim.label, &image),
            |store| store.attr_label(ino, aim.base),
        )?;
        let kept = self.kept(object)?;
        kept.attr = Known::Yes(image.size);
        kept.note(aim.label);
        Ok(image.size)
    }

    /// Keeps what `name` in the directory `dir` means.
    pub fn keep_entry(&mut self, dir: &Object, name: &[u8]) -> Result<()> {
        self.kept(dir)?.changes += 1;
        let Some(aim) = self.aim(dir)? else {
            return Ok(());
        };
        let engine = self.engine;
        // I2
        if engine.store.entry_at(dir.ino(), name, aim.base)?.is_some() {
            return Ok(());
        }
        let fd = engine.object_fd(dir)?;
        let was = engine
            .backing
            .find(fd.as_fd(), name)?
            .map(|found| found.entry);
        let ino = dir.ino();
        self.append(
            dir,
            aim,
            SMALL,
            |store| store.keep_entry(ino, name, aim.label, was.as_ref()),
            |store| store.entry_label(ino, name, aim.base),
        )
    }

    /// Appends what `object` needs kept. The change that it guards need not be that of this operation: one that
    /// fails half-way leaves what it kept to the next. `after` is the latest cut that does not need it.
    ///
    /// # Errors
    /// [`Error::StoreFull`] if there is no room for its `bytes`.
    fn append(
        &mut self,
        object: &Object,
        aim: Aim,
        bytes: u64,
        append: impl FnOnce(&Store) -> Result<Lsn>,
        after: impl FnOnce(&Store) -> Result<Epoch>,
    ) -> Result<()> {
        let engine = self.engine;
        let room = engine.room.take(bytes) || self.removes;
        match room.then(|| self.append_durably(object, append)) {
            Some(Err(error)) if !error.is_full() => Err(error),
            Some(Ok(())) => Ok(()),
            _ => {
                let (after, label) = (after(&engine.store)?, aim.label);
                Err(Error::StoreFull { after, label })
            }
        }
    }

    fn append_durably(
        &mut self,
        object: &Object,
        append: impl FnOnce(&Store) -> Result<Lsn>,
    ) -> Result<()> {
        let engine = self.engine;
        let ordered = engine.durability == Durability::Ordered;
        if ordered {
            engine.store.mark_dirty(false)?;
        }
        let lsn = append(&engine.store)?;
        self.kept(object)?.owed = Owed::UpTo(lsn);
        if ordered {
            engine.store.mark_dirty(true)?;
        }
        Ok(())
    }

    /// To be called after the last `keep_*` and before the change: under strict durability the pre-images
    /// are on stable storage when it returns (I1, C8).
    pub fn settle(&mut self) -> Result<()> {
        if self.engine.durability == Durability::Strict {
            for (_, kept) in self.locked.iter_mut().flatten() {
                self.engine.pay(kept.owed)?;
                kept.owed = Owed::Nothing;
            }
        }
        Ok(())
    }

    /// Whether [`Self::settle`] would have to wait for the disk.
    pub fn must_wait(&self) -> bool {
        let store = &self.engine.store;
        let waits = |kept: &Kept| match kept.owed {
            Owed::Nothing => false,
            Owed::UpTo(lsn) => !store.is_durable(lsn),
            Owed::Unknown => !store.is_all_durable(),
        };
        self.engine.durability == Durability::Strict
            && self.locked.iter().flatten().any(|(_, kept)| waits(kept))
    }
}
