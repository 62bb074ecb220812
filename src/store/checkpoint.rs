//! Carrying records from memory into the index.

use super::Store;
use super::count::Uncounted;
use super::index::Index;
use super::journal::Journal;
use super::key::{self, IndexState, Pair};
use super::reclaim::Upkeep;
use crate::error::Result;

/// Bytes that a step of the index may need, besides those of the records that it is given.
pub(super) const INDEX_ROOM: u64 = 1 << 20;
/// Bytes of room for the index that are kept ready while the disk has them, so that space can be freed on a full
/// one: freeing takes some.
const INDEX_SPARE: u64 = 8 << 20;

impl Store {
    /// Carries what is in memory into the index, durably, so that the next open need not replay it.
    ///
    /// # Errors
    /// As [`Store::sync`]; an error of the index leaves everything in memory for the next try.
    pub fn checkpoint(&self) -> Result<()> {
        let mut upkeep = self.upkeep.lock();
        self.checkpoint_in(&mut upkeep, false)?;
        self.journal.prepare_early()
    }

    /// Keeps room for the index ready, if the disk has it.
    pub(super) fn keep_index_room(&self) {
        if let Err(error) = self.layers.index.ensure_room(INDEX_SPARE) {
            log::debug!("no room is kept ready for the index: {error}");
        }
    }

    pub(super) fn checkpoint_in(&self, upkeep: &mut Upkeep, clean: bool) -> Result<()> {
        // One may be left over from a checkpoint that failed. It goes first, and then what came after it:
        // when this returns, nothing of before the call is in memory only, and callers rely on that.
        if self.layers.frozen().is_some() {
            self.carry_frozen(upkeep, false)?;
        }
        self.journal.at_checkpoint(|lsn| self.layers.freeze(lsn));
        self.carry_frozen(upkeep, clean)
    }

    fn carry_frozen(&self, upkeep: &mut Upkeep, clean: bool) -> Result<()> {
        // The index must not be ahead of the journal after a power cut: this comes before the sync.
        let (table, home) = self.snapshots.for_index();
        self.journal.sync()?;
        let Some(frozen) = self.layers.frozen() else {
            return Ok(());
        };
        let state = IndexState {
            uuid: self.uuid,
            checkpoint: frozen.checkpoint,
            highest_epoch: self.snapshots.highest(),
            sweep: upkeep.sweep,
            clean,
        };
        if frozen.map.is_empty() && upkeep.written == Some((state, table.version)) {
            self.layers.thaw();
            return Ok(());
        }
        let index = &self.layers.index;
        index.ensure_room(self.memtable_bytes() as u64 + INDEX_ROOM)?;
        let journal = &self.journal;
        carry(
            index.as_ref(),
            journal,
            &upkeep.uncounted,
            frozen.map.iter(),
        )?;
        for (key, value) in self.usages(clean) {
            index.put(&key, &value)?;
        }
        index.put(
            key::TABLE,
            &key::table_value(home.unwrap_or(u32::MAX), &table),
        )?;
        // All of it is durable before the state says that it is there.
        index.sync()?;
        index.put(key::STATE, &state.value())?;
        index.sync()?;
        self.layers.thaw();
        upkeep.written = Some((state, table.version));
        Ok(())
    }

    /// The usage of segments that have been closed since the last time, or of all.
    fn usages(&self, all: bool) -> Vec<Pair> {
        let mut known = self.journal.known.lock();
        let due = known
            .iter_mut()
            .filter(|(_, known)| all || (known.closed && !known.noted));
        let note = |(number, known): (&u32, &mut super::journal::Known)| {
            known.noted = true;
            (key::usage(*number), key::usage_value(&known.usage))
        };
        due.map(note).collect()
    }

    /// Checkpoints, syncs and marks the store as closed in order, so that the next open is quick.
    ///
    /// # Errors
    /// As [`Store::checkpoint`]; nothing is lost then either.
    pub fn close(&self) -> Result<()> {
        let mut upkeep = self.upkeep.lock();
        self.journal.leave_tail();
        self.checkpoint_in(&mut upkeep, false)?;
        // Closing does not wait for the counting; the next session does it.
        let counted = upkeep.uncounted.is_nothing();
        self.checkpoint_in(&mut upkeep, counted)?;
        self.note_end()
    }
}

/// Puts the pairs into the index.
pub(super) fn carry<'a>(
    index: &dyn Index,
    journal: &Journal,
    uncounted: &Uncounted,
    pairs: impl Iterator<Item = (&'a Vec<u8>, &'a Vec<u8>)>,
) -> Result<()> {
    for (key, value) in pairs {
        if uncounted.has(key) {
            // It is counted again with the index; a carrying that failed may have come this far before.
            let carried = index.get(key)?.as_ref() == Some(value);
            index.put(key, value)?;
            if !carried {
                journal.uncount(key, value);
            }
            continue;
        }
        // Births and retained files are the values that can be replaced by ones in another segment.
        if matches!(key.first(), Some(b'b' | b'r'))
            && let Some(old) = index.get(key)?
            && old != *value
        {
            journal.uncount(key, &old);
        }
        index.put(key, value)?;
    }
    Ok(())
}
