//! Carrying records from memory into the index.

use super::Store;
use super::index::{Change, Index};
use super::journal::Journal;
use super::key::{self, IndexState, Pair};
use super::reclaim::Upkeep;
use crate::error::Result;

/// Pairs and bytes of one batch.
const BATCH_PAIRS: usize = 2000;
const BATCH_BYTES: usize = 1 << 20;

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
        // One may be left over from a checkpoint that failed.
        if self.layers.frozen().is_none() {
            self.journal.at_checkpoint(|lsn| self.layers.freeze(lsn));
        }
        // The index must not be ahead of the journal after a power cut.
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
        let (table, home) = self.snapshots.for_index();
        if frozen.map.is_empty() && upkeep.written == Some((state, table.version)) {
            self.layers.thaw();
            return Ok(());
        }
        carry(self.layers.index.as_ref(), &self.journal, frozen.map.iter())?;
        let mut last: Vec<Change> = self.usage_changes(clean);
        last.push((
            key::TABLE.to_vec(),
            Some(key::table_value(home.unwrap_or(u32::MAX), &table)),
        ));
        last.push((key::STATE.to_vec(), Some(state.value())));
        self.layers.index.apply(last)?;
        self.layers.index.sync()?;
        self.layers.thaw();
        upkeep.written = Some((state, table.version));
        Ok(())
    }

    /// The usage of segments that have been closed since the last time, or of all.
    fn usage_changes(&self, all: bool) -> Vec<Change> {
        let mut known = self.journal.known.lock();
        let due = known
            .iter_mut()
            .filter(|(_, known)| all || (known.closed && !known.noted));
        let note = |(number, known): (&u32, &mut super::journal::Known)| {
            known.noted = true;
            (key::usage(*number), Some(key::usage_value(&known.usage)))
        };
        due.map(note).collect()
    }

    /// Checkpoints, syncs and marks the store as closed in order, so that the next open is quick.
    ///
    /// # Errors
    /// As [`Store::checkpoint`]; nothing is lost then either.
    pub fn close(self) -> Result<()> {
        let mut upkeep = self.upkeep.lock();
        self.checkpoint_in(&mut upkeep, false)?;
        self.checkpoint_in(&mut upkeep, true)
    }
}

/// Puts the pairs into the index, in batches.
pub(super) fn carry<'a>(
    index: &dyn Index,
    journal: &Journal,
    pairs: impl Iterator<Item = (&'a Vec<u8>, &'a Vec<u8>)>,
) -> Result<()> {
    let (mut batch, mut bytes): (Vec<Change>, usize) = (Vec::new(), 0);
    for (key, value) in pairs {
        // Births and retained files are the values that can be replaced by ones in another segment.
        if matches!(key.first(), Some(b'b' | b'r'))
            && let Some(old) = index.get(key)?
            && old != *value
        {
            journal.uncount(key, &old);
        }
        bytes += key.len() + value.len();
        batch.push((key.clone(), Some(value.clone())));
        if batch.len() >= BATCH_PAIRS || bytes >= BATCH_BYTES {
            index.apply(std::mem::take(&mut batch))?;
            bytes = 0;
        }
    }
    if batch.is_empty() {
        Ok(())
    } else {
        index.apply(batch)
    }
}

/// The changes that remove the pairs.
pub(super) fn removal(pairs: Vec<Pair>) -> Vec<Change> {
    pairs.into_iter().map(|(key, _)| (key, None)).collect()
}
