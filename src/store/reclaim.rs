//! Space after deletion, in small steps that may be interrupted anywhere.
//!
//! To delete snapshot `k`, whose next existing one is `n`, only records labelled `k..n` can have died: one
//! labelled `n` or later that served `k` serves `n` as well. A second walk over the same labels is
//! harmless, so a step needs no record of its own: the snapshot stays in the table, marked as being
//! deleted, until the index has lost all that died, durably.

use super::Store;
use super::checkpoint::INDEX_ROOM;
use super::count::Uncounted;
use super::key::{self, Aspect, IndexState, Piece, Touch};
use super::lookup::{label_at_end, piece_range, runs};
use super::snapshots::Published;
use super::types::{Retained, SnapshotInfo, SnapshotState};
use crate::error::Result;
use crate::ids::{BLOCK, CHUNK_BLOCKS, Epoch, Ino};
use std::collections::BTreeSet;

/// Touched aspects, births or retained files looked at in one step.
const STEP: usize = 512;
/// Ranges punched in one step, and ranges to remember; a crash forgets them, and what they held comes back
/// with its segment.
const STEP_PUNCHES: usize = 256;
const MAX_PUNCHES: usize = 1 << 18;
/// Blocks freed after which a step ends.
const STEP_BLOCKS: usize = 2048;

/// The state of the background job.
#[derive(Debug)]
pub(super) struct Upkeep {
    job: Option<Job>,
    /// The index was rebuilt, which may have brought dead records back: look at all labels.
    pub(super) sweep: bool,
    /// What of the index is not counted yet.
    pub(super) uncounted: Uncounted,
    /// Segments may have become empty or nearly so.
    pub(super) segments_due: bool,
    /// Invalid snapshots whose space has been freed by this process; a second walk would find nothing.
    emptied: BTreeSet<Epoch>,
    /// There was no room to move what is left in a segment, the last time.
    pub(super) no_room: bool,
    /// What the index says of itself, and the version of its table.
    pub(super) written: Option<(IndexState, u64)>,
}

impl Upkeep {
    pub(super) fn new(sweep: bool, uncounted: Uncounted) -> Self {
        Self {
            job: None,
            sweep,
            uncounted,
            segments_due: true,
            emptied: BTreeSet::new(),
            no_room: false,
            written: None,
        }
    }
}

/// A walk over some labels.
#[derive(Debug)]
struct Job {
    from: Epoch,
    to: Epoch,
    /// The snapshots that are gone when the walk is done.
    done: Vec<Epoch>,
    /// Whether births may have died: the oldest snapshot is among those being deleted.
    births: bool,
    /// All labels are being looked at.
    sweep: bool,
    phase: Phase,
    /// Keys before this are done with in this phase.
    cursor: Vec<u8>,
    /// Payload that has died. Punched out at the end, since until then whole segments may have died.
    punch: Vec<Range>,
}

/// Segment, offset and length in bytes.
type Range = (u32, u64, u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Touched,
    Retained,
    Births,
    Punch,
    Finish,
}

/// What one step does to the index, and to the payloads after that.
#[derive(Default)]
struct Step {
    /// Pairs that go, or shrink.
    dead: Vec<key::Pair>,
    /// What is left of some of them; with the highest keys first.
    born: Vec<key::Pair>,
    /// Keys that say that there is a record, where there is none any more.
    unmarked: Vec<Vec<u8>>,
    punch: Vec<Range>,
    blocks: usize,
}

impl Store {
    /// One bounded step of freeing what deleted snapshots held; true while there is more to do. Retained
    /// files that no snapshot shows any more are handed to `release`, which removes the file (it may be
    /// gone already), and are then forgotten.
    ///
    /// # Errors
    /// Those of the journal, of the index, and of `release`; the next call takes up where this one failed.
    pub fn reclaim(&self, release: &dyn Fn(&Retained) -> Result<()>) -> Result<bool> {
        let mut upkeep = self.upkeep.lock();
        if !upkeep.uncounted.is_nothing() {
            self.count_step(&mut upkeep)?;
            return Ok(true);
        }
        if upkeep.job.is_some() || upkeep.segments_due {
            self.layers.index.ensure_room(INDEX_ROOM)?;
        }
        *self.opened.noted.lock() = None;
        if upkeep.job.is_none() {
            let Some(job) = self.next_job(&upkeep) else {
                return self.segment_step(&mut upkeep);
            };
            // From here on everything that the walk may have to remove is in the index and not in memory.
            self.checkpoint_in(&mut upkeep, false)?;
            upkeep.job = Some(job);
        }
        let Some(mut job) = upkeep.job.take() else {
            return Ok(true);
        };
        let result = self.step(&mut upkeep, &mut job, release);
        if job.phase != Phase::Finish || result.is_err() {
            upkeep.job = Some(job);
        }
        result.map(|()| true)
    }

    fn next_job(&self, upkeep: &Upkeep) -> Option<Job> {
        let table = self.snapshots.published();
        let (from, to) = if upkeep.sweep {
            (Epoch(0), table.epoch)
        } else {
            // One that became invalid first, and was deleted then, has nothing left but its row.
            let due = |s: &&SnapshotInfo| {
                s.state == SnapshotState::Deleting || !upkeep.emptied.contains(&s.epoch)
            };
            let k = table.given_up().find(due)?.epoch;
            let next = table.kept().find(|n| *n > k);
            // What is labelled below the oldest snapshot is of cuts that were given up.
            let oldest = table.kept().next().is_none_or(|oldest| oldest > k);
            (
                if oldest { Epoch(0) } else { k },
                next.map_or(table.epoch, |n| Epoch(n.0 - 1)),
            )
        };
        let (births, sweep) = (from == Epoch(0), upkeep.sweep);
        let done = table
            .given_up()
            .map(|s| s.epoch)
            .filter(|k| (from..=to).contains(k))
            .collect();
        let cursor = key::touched(from, to).0;
        Some(Job {
            from,
            to,
            done,
            births,
            sweep,
            phase: Phase::Touched,
            cursor,
            punch: Vec::new(),
        })
    }

    fn step(
        &self,
        upkeep: &mut Upkeep,
        job: &mut Job,
        release: &dyn Fn(&Retained) -> Result<()>,
    ) -> Result<()> {
        let table = self.snapshots.published();
        let next = match job.phase {
            Phase::Touched => self.step_touched(&table, job)?,
            Phase::Retained => self.step_retained(&table, job, release)?,
            Phase::Births => self.step_births(&table, job)?,
            Phase::Punch => self.step_punch(job, STEP_PUNCHES)?.then(Vec::new),
            Phase::Finish => None,
        };
        if let Some(cursor) = next {
            job.cursor = cursor;
            return Ok(());
        }
        (job.phase, job.cursor) = match job.phase {
            Phase::Touched => (Phase::Retained, b"r".to_vec()),
            Phase::Retained if job.births => (Phase::Births, b"b".to_vec()),
            Phase::Retained | Phase::Births => {
                job.punch = merged(std::mem::take(&mut job.punch));
                (Phase::Punch, Vec::new())
            }
            Phase::Punch | Phase::Finish => (Phase::Finish, Vec::new()),
        };
        if job.phase == Phase::Finish {
            // Durably out of the index before the table forgets that there was something to do.
            self.layers.index.sync()?;
            if !job.done.is_empty() {
                self.snapshots.drop_deleted(&self.journal, &job.done)?;
            }
            upkeep.emptied.extend(&job.done);
            let table = self.snapshots.published();
            upkeep.emptied.retain(|k| table.all.get(*k).is_some());
            // A sweep counts as done once a checkpoint has said so.
            upkeep.sweep &= !job.sweep;
            upkeep.segments_due = true;
        }
        Ok(())
    }

    /// Up to [`STEP`] pairs of the index from the job's cursor on, and the cursor after them; no cursor if
    /// these were the last.
    fn index_page(&self, from: &[u8], to: &[u8]) -> Result<(Vec<key::Pair>, Option<Vec<u8>>)> {
        let mut page = Vec::new();
        self.layers.index.scan(from, to, &mut |key, value| {
            page.push((key.to_vec(), value.to_vec()));
            Ok(page.len() < STEP)
        })?;
        let next = page
            .last()
            .filter(|_| page.len() == STEP)
            .map(|(key, _)| after(key));
        Ok((page, next))
    }

    fn step_touched(&self, table: &Published, job: &mut Job) -> Result<Option<Vec<u8>>> {
        let (page, mut next) = self.index_page(&job.cursor, &key::touched(job.from, job.to).1)?;
        let mut blocks = 0;
        for (key, _) in page {
            let mut step = Step::default();
            let touch = Touch::parse(&key)?;
            let birth = self.birth(touch.ino)?.unwrap_or(Epoch(0));
            let gone = match &touch.aspect {
                Aspect::Attr => {
                    let first = key::attr(touch.ino, Epoch(0));
                    self.weigh(
                        table,
                        &mut step,
                        &first,
                        key::attr(touch.ino, touch.label),
                        birth,
                    )?
                }
                Aspect::Entry(name) => {
                    let first = key::entry(touch.ino, name, Epoch(0));
                    self.weigh(
                        table,
                        &mut step,
                        &first,
                        key::entry(touch.ino, name, touch.label),
                        birth,
                    )?
                }
                Aspect::Chunk(chunk) => {
                    self.weigh_chunk(table, &mut step, (touch.ino, *chunk), touch.label, birth)?
                }
            };
            if gone {
                step.unmarked.push(key.clone());
            }
            blocks += step.blocks;
            job.punch.extend(self.carry_out(step)?);
            if blocks >= STEP_BLOCKS {
                next = Some(after(&key));
                break;
            }
        }
        if job.punch.len() > MAX_PUNCHES {
            job.punch = merged(std::mem::take(&mut job.punch));
            self.step_punch(job, MAX_PUNCHES / 2)?;
        }
        Ok(next)
    }

    /// Removes the record `key` if it is dead; its predecessors have keys from `first` on. Returns whether
    /// nothing is left of it.
    fn weigh(
        &self,
        table: &Published,
        step: &mut Step,
        first: &[u8],
        key: Vec<u8>,
        birth: Epoch,
    ) -> Result<bool> {
        let Some(value) = self.layers.index.get(&key)? else {
            return Ok(true);
        };
        let before = self.layers.last(first, &key)?;
        let before = before.map_or(Ok(Epoch(0)), |(key, _)| label_at_end(&key))?;
        let dead = table.is_dead(before.max(birth), label_at_end(&key)?);
        if dead {
            step.dead.push((key, value));
        }
        Ok(dead)
    }

    /// Block by block, the same for the extents of a chunk that have this label.
    fn weigh_chunk(
        &self,
        table: &Published,
        step: &mut Step,
        (ino, chunk): (Ino, u64),
        label: Epoch,
        birth: Epoch,
    ) -> Result<bool> {
        let mut lower = [birth; CHUNK_BLOCKS as usize];
        if label > Epoch(0) {
            for piece in self.pieces(ino, chunk, Epoch(0), Some(Epoch(label.0 - 1)))? {
                piece
                    .range()
                    .for_each(|block| lower[block] = lower[block].max(piece.label));
            }
        }
        let dead = lower.map(|lower| table.is_dead(lower, label));
        let (from, to) = piece_range(ino, chunk, label, Some(label));
        let mut pieces = Vec::new();
        self.layers.index.scan(&from, &to, &mut |key, value| {
            pieces.push(Piece::parse(key, value)?);
            Ok(true)
        })?;
        let mut gone = true;
        for piece in pieces {
            let range = piece.range();
            gone &= dead[range.clone()].iter().all(|dead| *dead);
            if dead[range.clone()].contains(&true) {
                step.split(&piece, &dead[range]);
            }
        }
        Ok(gone)
    }

    fn step_retained(
        &self,
        table: &Published,
        job: &Job,
        release: &dyn Fn(&Retained) -> Result<()>,
    ) -> Result<Option<Vec<u8>>> {
        let (page, next) = self.index_page(&job.cursor, b"s")?;
        let mut dead = Vec::new();
        for (key, value) in page {
            let (gone, retained) = key::retained_value(&value)?;
            // A newer record in memory is the one that counts, and is not for this walk.
            let current = self
                .layers
                .get(&key)?
                .is_some_and(|current| current == value);
            if current && table.is_dead(retained.birth, retained.removed) {
                // One that cannot be released keeps its record and does not keep the others.
                match if gone { Ok(()) } else { release(&retained) } {
                    Ok(()) => dead.push((key, value)),
                    Err(error) => log::error!("retained object {}: {error}", retained.ino),
                }
            }
        }
        self.forget(dead)?;
        Ok(next)
    }

    fn step_births(&self, table: &Published, job: &Job) -> Result<Option<Vec<u8>>> {
        let (page, next) = self.index_page(&job.cursor, b"c")?;
        let mut dead = Vec::new();
        for (key, value) in page {
            if table.is_dead(Epoch(0), key::birth_value(&value)?) {
                dead.push((key, value));
            }
        }
        self.forget(dead)?;
        Ok(next)
    }

    fn forget(&self, dead: Vec<key::Pair>) -> Result<()> {
        for (key, value) in dead {
            self.layers.index.remove(&key)?;
            self.journal.uncount(&key, &value);
        }
        Ok(())
    }

    /// New parts come before the whole goes, and records before the mark that they exist: cut short, or
    /// seen half done, this leaves too much and never too little.
    fn carry_out(&self, step: Step) -> Result<Vec<Range>> {
        for (key, value) in &step.born {
            self.layers.index.put(key, value)?;
            self.journal.count(key, value);
        }
        for (key, value) in &step.dead {
            if !step.born.iter().any(|(born, _)| born == key) {
                self.layers.index.remove(key)?;
            }
            self.journal.uncount(key, value);
        }
        for key in &step.unmarked {
            self.layers.index.remove(key)?;
        }
        Ok(step.punch)
    }

    /// Gives some of the dead payload back to the disk; whether there is more.
    fn step_punch(&self, job: &mut Job, count: usize) -> Result<bool> {
        // In a segment that is not sealed, a payload that is not what was written counts as one that never
        // reached the disk, and what follows it is not looked at (replay.rs).
        let tail = self.journal.tail().map(|(number, _)| number);
        let in_tail = |range: &Range| Some(range.0) == tail;
        if job.punch.iter().any(in_tail)
            && let Err(error) = self.journal.rotate()
        {
            // On a full disk what lies in other segments makes the room for the next one.
            let (stay, go) = std::mem::take(&mut job.punch)
                .into_iter()
                .partition(in_tail);
            job.punch = stay;
            self.punch(go)?;
            return Err(error);
        }
        if job
            .punch
            .iter()
            .any(|(segment, _, _)| !self.is_closed(*segment))
        {
            self.journal.sync()?;
        }
        let some = job.punch.len().saturating_sub(count);
        self.punch(job.punch.split_off(some))?;
        self.journal.prepare_early()?;
        Ok(!job.punch.is_empty())
    }

    fn punch(&self, ranges: Vec<Range>) -> Result<()> {
        for (segment, offset, len) in ranges {
            // A segment without records goes as a whole.
            let stays = self
                .journal
                .known
                .lock()
                .get(&segment)
                .is_some_and(|known| known.usage.records > 0 && known.closed);
            // Nobody can need these blocks, whatever the index says after a crash: they are dead for good.
            if stays && let Some(file) = self.journal.file(segment)? {
                file.punch(offset, len)?;
            }
        }
        Ok(())
    }

    fn is_closed(&self, segment: u32) -> bool {
        let known = self.journal.known.lock();
        known.get(&segment).is_none_or(|known| known.closed)
    }
}

/// The ranges in order, neighbours joined.
fn merged(mut ranges: Vec<Range>) -> Vec<Range> {
    ranges.sort_unstable();
    let mut out: Vec<Range> = Vec::with_capacity(ranges.len());
    for (segment, offset, len) in ranges {
        match out.last_mut() {
            Some(last) if last.0 == segment && last.1 + last.2 == offset => last.2 += len,
            _ => out.push((segment, offset, len)),
        }
    }
    out
}

impl Step {
    /// Replaces `piece` by its live parts; `dead` is by block of the piece.
    fn split(&mut self, piece: &Piece, dead: &[bool]) {
        let start = usize::from(piece.start);
        self.dead.push((piece.key(), piece.value()));
        for run in runs(dead).into_iter().rev() {
            let part = piece.part(start + run.start..start + run.end);
            if !dead[run.start] {
                self.born.push((part.key(), part.value()));
            } else if let Some(place) = &part.place {
                let (offset, len) = (u64::from(place.block) * BLOCK as u64, run.len() * BLOCK);
                self.punch
                    .push((key::segment_of(part.lsn), offset, len as u64));
                self.blocks += run.len();
            }
        }
    }
}

/// The first key after `key`.
pub(super) fn after(key: &[u8]) -> Vec<u8> {
    [key, &[0]].concat()
}
