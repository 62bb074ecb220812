//! Small questions of the engine that need no value.

use super::Store;
use super::key::{self, Piece};
use crate::error::Result;
use crate::ids::{Epoch, Ino};

impl Store {
    /// The first chunk from number `chunk` on that has an extent labelled `k` or later.
    ///
    /// # Errors
    /// As [`Store::attr_at`].
    pub fn next_extent_chunk(&self, ino: Ino, k: Epoch, chunk: u64) -> Result<Option<u64>> {
        let (from, to) = (
            key::chunk(ino, chunk),
            key::after_prefix(&key::extents(ino)),
        );
        let mut found = None;
        self.layers.scan(&from, &to, &mut |key, value| {
            let piece = Piece::parse(key, value)?;
            if piece.label >= k {
                found = Some(piece.chunk);
            }
            Ok(found.is_none())
        })?;
        Ok(found)
    }

    /// Whether a failed append or sync has ended mutation (I7).
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.journal.poison.check().is_err()
    }
}
