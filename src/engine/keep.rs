//! A mutation in progress, and the keeping of pre-images: the heart of copy-on-write.
//!
//! An [`Op`] locks its objects in order of inode number (I6), then enters the epoch (I4). Each `keep_*`
//! appends the pre-image of one aspect to the journal unless one is there already (I2); only then may the
//! caller change the backing directory (I1).

use super::Engine;
use super::backing::data_map;
use super::epoch::InFlight;
use super::object::{Kept, Known, Object};
use crate::error::{Error, Result};
use crate::ids::{BLOCK, CHUNK_BLOCKS, Epoch, Ino, Lsn};
use crate::store::{AttrImage, ExtentData, Retained};
use crate::sync::{Arc, MutexGuard, Ordering};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::OFlags;
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
    locked: [Option<(Ino, MutexGuard<'a, Kept>)>; MOST_OBJECTS],
    /// The last pre-image appended, for strict durability.
    appended: Option<Lsn>,
}

/// What an operation has to keep of an object.
#[derive(Clone, Copy)]
struct Aim {
    /// The label of what is kept now.
    label: Epoch,
    /// The newest snapshot not later than `label`: a pre-image labelled from here on serves it.
    base: Epoch,
}

/// A file of which data is being kept.
struct Keeping<'f> {
    object: &'f Object,
    fd: BorrowedFd<'f>,
    aim: Aim,
    /// Its size at the cut.
    size: u64,
}

impl Engine {
    /// Locks `objects` (the same one may stand there twice) and enters the epoch.
    pub fn begin<'a>(&'a self, objects: &[&'a Object]) -> Op<'a> {
        let waited = self.cutting.load(Ordering::Relaxed).then(Instant::now);
        #[cfg(feature = "plant-epoch-before-lock")]
        let planted = self.planted_epoch();
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
        let entered = inflight.epoch();
        #[cfg(feature = "plant-epoch-before-lock")]
        let entered = planted.min(entered);
        Op {
            engine: self,
            entered,
            _inflight: inflight,
            locked,
            appended: None,
        }
    }

    /// The planted bug: the epoch is read long before the objects are locked, and not again.
    #[cfg(feature = "plant-epoch-before-lock")]
    fn planted_epoch(&self) -> Epoch {
        static CALLS: crate::sync::AtomicU64 = crate::sync::AtomicU64::new(0);
        static READ: crate::sync::AtomicU64 = crate::sync::AtomicU64::new(0);
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

    /// Recomputes the snapshots that pre-images are kept for, with the one being `cut`.
    pub(super) fn refresh_guards(&self, cut: Option<Epoch>) {
        let mut all = self.snapshots.epochs();
        all.extend(cut);
        *self.guards.write() = Arc::from(all);
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

    /// What has to be kept of `object`; `None` if no snapshot shows it: there is none, or it was born after
    /// the newest.
    fn aim(&mut self, object: &Object) -> Result<Option<Aim>> {
        let label = self.epoch_of(object);
        let Some(base) = self.engine.guard(label) else {
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
    /// record of that is appended. `origin`: directory and name where a crash may leave it half-way.
    pub fn retain(&mut self, object: &Object, origin: Option<(&Object, &[u8])>) -> Result<bool> {
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
        };
        self.appended = Some(self.engine.store.record_retained(&record)?);
        Ok(true)
    }

    /// Notes in which epoch the new object `object` was born, so that no snapshot up to then keeps anything
    /// of it.
    pub fn born(&mut self, dir: &Object, object: Ino) -> Result<Epoch> {
        let epoch = self.epoch_of(dir);
        if self.engine.guard(epoch).is_some() {
            self.engine.store.record_birth(object, epoch)?;
        }
        Ok(epoch)
    }

    /// Keeps the attributes of `object`.
    pub fn keep_attr(&mut self, object: &Object) -> Result<()> {
        let Some(aim) = self.aim(object)? else {
            return Ok(());
        };
        // I2
        if !matches!(self.attr_kept(object, aim)?, Known::Yes(_)) {
            let fd = self.engine.object_fd(object)?;
            let image = self.engine.backing.full_attr(fd.as_fd())?;
            self.append_attr(object, aim, &image)?;
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

    fn append_attr(&mut self, object: &Object, aim: Aim, image: &AttrImage) -> Result<()> {
        // Of a removed object the live link is the one in `retained/`, which the cut did not have. Its
        // attributes are kept with its removal at the latest, so that this is only ever about an object
        // removed in an epoch before `label` that is still open.
        let nlink =
            image.nlink - u32::from(object.retained.load(Ordering::SeqCst)).min(image.nlink);
        let image = AttrImage {
            nlink,
            ..image.clone()
        };
        self.appended = Some(
            self.engine
                .store
                .keep_attr(object.ino(), aim.label, &image)?,
        );
        let kept = self.kept(object)?;
        kept.attr = Known::Yes(image.size);
        kept.note(aim.label);
        Ok(())
    }

    /// Keeps what `name` in the directory `dir` means.
    pub fn keep_entry(&mut self, dir: &Object, name: &[u8]) -> Result<()> {
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
        self.appended = Some(
            engine
                .store
                .keep_entry(dir.ino(), name, aim.label, was.as_ref())?,
        );
        Ok(())
    }

    /// Keeps the attributes of a file and what of its bytes `start..end` the cut had and is not kept yet.
    /// `fd` is a descriptor of the file; one that cannot be read from is replaced for the purpose.
    pub fn keep_data(
        &mut self,
        object: &Object,
        fd: BorrowedFd<'_>,
        start: u64,
        end: u64,
    ) -> Result<()> {
        let Some(aim) = self.aim(object)? else {
            return Ok(());
        };
        let size = match self.attr_kept(object, aim)? {
            Known::Yes(size) => size,
            _ => {
                let image = self.engine.backing.full_attr(fd)?;
                self.append_attr(object, aim, &image)?;
                image.size
            }
        };
        let file = Keeping {
            object,
            fd,
            aim,
            size,
        };
        if start >= size {
            return self.keep_tail_hole(&file);
        }
        let end = end.min(size);
        if start >= end {
            return Ok(());
        }
        let (first, last) = (start / BLOCK as u64, (end - 1) / BLOCK as u64);
        for chunk in first / CHUNK_BLOCKS..=last / CHUNK_BLOCKS {
            let from = first.max(chunk * CHUNK_BLOCKS);
            let to = (last + 1).min((chunk + 1) * CHUNK_BLOCKS);
            self.keep_chunk(&file, from, to)?;
        }
        Ok(())
    }

    /// A change past the end that the cut had changes no byte of the snapshot. But the last block, if it is a
    /// hole, may come to be data: by a write into it, or because the filesystem fills it with zeros when the
    /// file grows (C5).
    fn keep_tail_hole(&mut self, file: &Keeping<'_>) -> Result<()> {
        let kept = self.kept(file.object)?;
        if std::mem::replace(&mut kept.tail_looked_at, true)
            || file.size.is_multiple_of(BLOCK as u64)
        {
            return Ok(());
        }
        let last = file.size / BLOCK as u64;
        let at = last * BLOCK as u64;
        let data = self.engine.backing.seek(file.fd, at, false)?;
        if data.is_some_and(|at| at < file.size) {
            return Ok(());
        }
        self.keep_chunk(file, last, last + 1)
    }

    /// Keeps the blocks `from..to` of one chunk that are not kept yet.
    fn keep_chunk(&mut self, file: &Keeping<'_>, from: u64, to: u64) -> Result<()> {
        let chunk = from / CHUNK_BLOCKS;
        let engine = self.engine;
        let kept = self.kept(file.object)?;
        let mut map = match kept.chunks.get(&chunk) {
            Some(map) => *map,
            None if kept.fresh => [0; 4],
            None => engine
                .store
                .kept_blocks(file.object.ino(), file.aim.base, chunk)?,
        };
        let mut block = from;
        while block < to {
            if bit(&map, block) {
                block += 1;
                continue;
            }
            let start = block;
            // I2
            while block < to && !bit(&map, block) {
                set_bit(&mut map, block);
                block += 1;
            }
            self.keep_run(file, start, block)?;
        }
        // Only now: a run that failed must not count as kept.
        self.kept(file.object)?.chunks.insert(chunk, map);
        Ok(())
    }

    /// Keeps the blocks `from..to`, none of which is kept yet, with their holes as holes.
    fn keep_run(&mut self, file: &Keeping<'_>, from: u64, to: u64) -> Result<()> {
        let backing = &self.engine.backing;
        let block = BLOCK as u64;
        let pieces = data_map(backing, file.fd, from * block, (to * block).min(file.size))?;
        for (first, last, data) in block_map(&pieces, from, to) {
            if !data {
                self.append_extent(
                    file,
                    first,
                    ExtentData::Hole {
                        blocks: last - first,
                    },
                )?;
                continue;
            }
            let mut buf = vec![0; ((last - first) * block) as usize];
            match backing.read(file.fd, first * block, &mut buf) {
                // A descriptor opened for writing only.
                Err(Error::Os(Errno::BADF)) => {
                    let readable = backing.open_object(&file.object.entry, OFlags::RDONLY)?;
                    backing.read(readable.as_fd(), first * block, &mut buf)?;
                }
                other => drop(other?),
            }
            self.append_extent(file, first, ExtentData::Bytes(&buf))?;
        }
        Ok(())
    }

    fn append_extent(
        &mut self,
        file: &Keeping<'_>,
        first: u64,
        data: ExtentData<'_>,
    ) -> Result<()> {
        let (ino, label) = (file.object.ino(), file.aim.label);
        self.appended = Some(self.engine.store.keep_extent(ino, label, first, data)?);
        self.kept(file.object)?.note(label);
        Ok(())
    }

    /// To be called after the last `keep_*` and before the change: under strict durability the pre-images
    /// are on stable storage when it returns (I1, C8).
    pub fn settle(&mut self) -> Result<()> {
        self.engine.settle(self.appended.take())
    }
}

/// Pieces of bytes as pieces of the blocks `from..to`: `(first, past the last, is_data)`. A block is a hole
/// if nothing in it is data.
fn block_map(pieces: &[(u64, u64, bool)], from: u64, to: u64) -> Vec<(u64, u64, bool)> {
    let block = BLOCK as u64;
    let mut blocks: Vec<(u64, u64, bool)> = Vec::new();
    let mut done = from;
    for &(start, end, _) in pieces.iter().filter(|piece| piece.2) {
        let (first, last) = ((start / block).max(done), end.div_ceil(block).min(to));
        if first >= last {
            continue;
        }
        if first > done {
            blocks.push((done, first, false));
        }
        match blocks.last_mut() {
            Some(previous) if previous.2 => previous.1 = last,
            _ => blocks.push((first, last, true)),
        }
        done = last;
    }
    if done < to {
        blocks.push((done, to, false));
    }
    blocks
}

fn bit(map: &[u64; 4], block: u64) -> bool {
    let at = (block % CHUNK_BLOCKS) as usize;
    map[at / 64] >> (at % 64) & 1 == 1
}

fn set_bit(map: &mut [u64; 4], block: u64) {
    let at = (block % CHUNK_BLOCKS) as usize;
    map[at / 64] |= 1 << (at % 64);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_a_hole_only_if_nothing_in_it_is_data() {
        let b = BLOCK as u64;
        assert_eq!(block_map(&[(0, 3 * b, false)], 0, 3), [(0, 3, false)]);
        assert_eq!(block_map(&[(b, 2 * b, true)], 1, 2), [(1, 2, true)]);
        // A hole that begins and ends within blocks of data leaves only its whole blocks.
        let pieces = [
            (0, b + 1, true),
            (b + 1, 5 * b - 1, false),
            (5 * b - 1, 6 * b, true),
        ];
        assert_eq!(
            block_map(&pieces, 0, 6),
            [(0, 2, true), (2, 4, false), (4, 6, true)]
        );
        let pieces = [(0, 1, true), (1, b, false), (b - 1, b, true)];
        assert_eq!(block_map(&pieces, 0, 2), [(0, 1, true), (1, 2, false)]);
    }

    #[test]
    fn bits_of_a_chunk_do_not_overlap() {
        let mut map = [0; 4];
        for block in [0, 63, 64, 255, CHUNK_BLOCKS + 1] {
            assert!(!bit(&map, block));
            set_bit(&mut map, block);
            assert!(bit(&map, block));
        }
        assert_eq!(map.iter().map(|word| word.count_ones()).sum::<u32>(), 5);
    }
}
