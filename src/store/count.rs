//! Counting what a large index refers to in each segment, after a session that did not end in order: in steps of the
//! background job, so that opening takes the time of the journal since the last checkpoint and not of the store.
//!
//! A segment's usage is what is in memory and what is in the counted part of the index, which is that of the keys
//! before the cursor. Nothing changes the index but holders of the upkeep lock, and nothing frees space before all is
//! counted.

use super::Store;
use super::index::SledIndex;
use super::key::{self, Usage};
use super::media::missing;
use super::reclaim::{Upkeep, after};
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// What of the index is not counted yet: the keys from a cursor on.
#[derive(Debug)]
pub(super) struct Uncounted(Option<Vec<u8>>);

impl Uncounted {
    pub(super) const NOTHING: Self = Self(None);

    pub(super) fn all() -> Self {
        Self(Some(Vec::new()))
    }

    pub(super) fn is_nothing(&self) -> bool {
        self.0.is_none()
    }

    /// Whether `key` is not counted if it is in the index.
    pub(super) fn has(&self, key: &[u8]) -> bool {
        self.0.as_deref().is_some_and(|cursor| key >= cursor)
    }
}

impl Store {
    /// Counts and checks the next keys.
    pub(super) fn count_step(&self, upkeep: &mut Upkeep) -> Result<()> {
        let Uncounted(Some(from)) = &upkeep.uncounted else {
            return Ok(());
        };
        let mut counted: BTreeMap<u32, Usage> = BTreeMap::new();
        let (mut left, mut last) = (self.count_step.max(1), None);
        let done = self.layers.index.scan(from, &[u8::MAX], &mut |key, value| {
            key::check(key, value)?;
            if let Some(footprint) = key::footprint(key, value) {
                counted
                    .entry(footprint.segment)
                    .or_default()
                    .add(&footprint);
            }
            left -= 1;
            if left == 0 {
                last = Some(key.to_vec());
            }
            Ok(left > 0)
        });
        if let Err(error @ Error::Corrupt(_)) = done {
            SledIndex::condemn(&self.dir.join("index"))?;
            return Err(error);
        }
        done?;
        for number in self.journal.add_counted(&counted) {
            upkeep.sweep = true;
            let what = missing(number);
            log::error!("the store is damaged: {what}");
            self.damage.lock().push(what);
        }
        upkeep.uncounted = Uncounted(last.as_deref().map(after));
        Ok(())
    }
}
