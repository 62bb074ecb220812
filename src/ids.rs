//! The numbers that name things: shared words of the engine and the store.

use std::fmt;

/// The identity of an object: the inode number that the backing filesystem gave it.
///
/// A number that any snapshot refers to stays allocated, because the last link of such an object is moved
/// into `retained/` and not removed; so the number is unique as long as anything can refer to it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ino(pub u64);

/// The number of cuts so far. A pre-image labelled `e` holds the value as of cut `e`; snapshot `k` is cut `k`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Whether a snapshot can have this name: one that a directory entry can have.
#[must_use]
pub fn is_snapshot_name(name: &[u8]) -> bool {
    let bytes = !name.contains(&b'/') && !name.contains(&0);
    bytes && (1..=255).contains(&name.len()) && !matches!(name, b"." | b"..")
}

/// A journal position: segment number in the high 32 bits, byte offset in its log area in the low 32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl fmt::Display for Ino {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Bytes of the unit in which data pre-images are kept.
pub const BLOCK: usize = 4096;
/// Blocks of one chunk: no extent record crosses a chunk boundary.
pub const CHUNK_BLOCKS: u64 = 256;
/// Bytes of one chunk.
pub const CHUNK: u64 = CHUNK_BLOCKS * BLOCK as u64;
