//! Look-ups of labels alone, without the values that they are of.

use super::Store;
use super::key::{self, Piece};
use super::lookup::label_at_end;
use crate::error::Result;
use crate::ids::{CHUNK_BLOCKS, Epoch, Ino};

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
        // Mostly the first will do, and a scan takes many at once.
        let Some((key, value)) = self.layers.first(&from, &to)? else {
            return Ok(None);
        };
        let first = Piece::parse(&key, &value)?;
        if first.label >= k {
            return Ok(Some(first.chunk));
        }
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

    /// The latest label below `below` of the attributes of `ino`; 0: there is none.
    ///
    /// # Errors
    /// As [`Store::attr_at`].
    pub fn attr_label(&self, ino: Ino, below: Epoch) -> Result<Epoch> {
        self.last_label(&key::attr(ino, Epoch(0)), &key::attr(ino, below))
    }

    /// The latest label below `below` of `name` in `dir`; 0: there is none.
    ///
    /// # Errors
    /// As [`Store::attr_at`].
    pub fn entry_label(&self, dir: Ino, name: &[u8], below: Epoch) -> Result<Epoch> {
        let key = |label| key::entry(dir, name, label);
        self.last_label(&key(Epoch(0)), &key(below))
    }

    fn last_label(&self, from: &[u8], to: &[u8]) -> Result<Epoch> {
        let last = self.layers.last(from, to)?;
        last.map_or(Ok(Epoch(0)), |(key, _)| label_at_end(&key))
    }

    /// The earliest, over the blocks `from..to` of one chunk, of the latest label below `below` that the block has;
    /// 0: one has none.
    ///
    /// # Errors
    /// As [`Store::attr_at`].
    pub fn blocks_label(&self, ino: Ino, from: u64, to: u64, below: Epoch) -> Result<Epoch> {
        let Some(below) = below.0.checked_sub(1) else {
            return Ok(Epoch(0));
        };
        let mut latest = [Epoch(0); CHUNK_BLOCKS as usize];
        for piece in self.pieces(ino, from / CHUNK_BLOCKS, Epoch(0), Some(Epoch(below)))? {
            for block in piece.range() {
                latest[block] = latest[block].max(piece.label);
            }
        }
        let blocks = (from..to).map(|block| latest[(block % CHUNK_BLOCKS) as usize]);
        Ok(blocks.min().unwrap_or(Epoch(0)))
    }
}
