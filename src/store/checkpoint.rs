//! Carrying records from memory into the index.

use super::Store;
use super::index::Index;
use super::journal::Journal;
use super::key::{self, IndexState, Pair};
use super::reclaim::Upkeep;
use crate::error::Result;

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
        carry(self.layers.index.as_ref(), &self.journal, frozen.map.iter())?;
        let index = &self.layers.index;
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
        self.checkpoint_in(&mut upkeep, false)?;
        self.checkpoint_in(&mut upkeep, true)
    }
}

/// Puts the pairs into the index.
pub(super) fn carry<'a>(
    index: &dyn Index,
    journal: &Journal,
    pairs: impl Iterator<Item = (&'a Vec<u8>, &'a Vec<u8>)>,
) -> Result<()> {
    for (key, value) in pairs {
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
