//! Look-ups. "At `k`" is always: the record with the smallest label ≥ `k`.

use super::Store;
use super::frame;
use super::key::{self, Piece};
use super::media::{MediaFile, MissingFile};
use super::types::{AttrImage, EntryImage, ExtentRef, Payload, Retained};
use crate::error::{Error, Result};
use crate::ids::{BLOCK, CHUNK_BLOCKS, Epoch, Ino};
use crate::sync::Arc;
use rustix::io::Errno;
use std::ops::Range;

/// How often a look-up is repeated because compaction removed a segment meanwhile.
const PATIENCE: usize = 100;

impl Store {
    /// The attributes of `ino` in snapshot `k`, with their label; `None`: as they are now.
    ///
    /// # Errors
    /// Of all look-ups: [`Error::Corrupt`] if the index cannot be read; the next open rebuilds it.
    pub fn attr_at(&self, ino: Ino, k: Epoch) -> Result<Option<(Epoch, AttrImage)>> {
        let (from, to) = (key::attr(ino, k), key::attr(ino, Epoch(u64::MAX)));
        let Some((key, value)) = self.layers.first(&from, &to)? else {
            return Ok(None);
        };
        Ok(Some((label_at_end(&key)?, key::attr_value(&value)?)))
    }

    /// What `name` meant in `dir` in snapshot `k`, with the label; outer `None`: what it means now.
    ///
    /// # Errors
    /// As [`Store::attr_at`].
    pub fn entry_at(
        &self,
        dir: Ino,
        name: &[u8],
        k: Epoch,
    ) -> Result<Option<(Epoch, Option<EntryImage>)>> {
        let (from, to) = (
            key::entry(dir, name, k),
            key::entry(dir, name, Epoch(u64::MAX)),
        );
        let Some((key, value)) = self.layers.first(&from, &to)? else {
            return Ok(None);
        };
        Ok(Some((label_at_end(&key)?, key::entry_value(&value)?)))
    }

    /// Every name of `dir` that has changed since snapshot `k`, in order of bytes, with what it meant.
    ///
    /// # Errors
    /// As [`Store::attr_at`].
    pub fn entries_at(&self, dir: Ino, k: Epoch) -> Result<Vec<(Vec<u8>, Option<EntryImage>)>> {
        let from = key::entries(dir);
        let mut found: Vec<(Vec<u8>, Option<EntryImage>)> = Vec::new();
        self.layers
            .scan(&from, &key::after_prefix(&from), &mut |key, value| {
                let (name, label) = key::entry_parts(key)?;
                if label >= k && found.last().is_none_or(|(last, _)| last != name) {
                    found.push((name.to_vec(), key::entry_value(value)?));
                }
                Ok(true)
            })?;
        Ok(found)
    }

    /// The kept extents of a chunk in snapshot `k`: sorted, not overlapping. Blocks between them are as
    /// they are now.
    ///
    /// # Errors
    /// As [`Store::attr_at`].
    pub fn extents_at(&self, ino: Ino, k: Epoch, chunk: u64) -> Result<Vec<ExtentRef>> {
        self.extents_within(ino, k, chunk, 0..CHUNK_BLOCKS as usize)
    }

    /// As [`Self::extents_at`], of these blocks of the chunk alone.
    ///
    /// # Errors
    /// As [`Store::attr_at`].
    pub fn extents_within(
        &self,
        ino: Ino,
        k: Epoch,
        chunk: u64,
        blocks: Range<usize>,
    ) -> Result<Vec<ExtentRef>> {
        let within = (ino, chunk, blocks);
        for _ in 0..PATIENCE {
            if let Some(extents) = self.try_extents_at(&within, k, None)? {
                return Ok(extents);
            }
        }
        // It is lost: reading what it had fails, and nothing else does.
        let lost: Arc<dyn MediaFile> = Arc::new(MissingFile);
        Ok(self
            .try_extents_at(&within, k, Some(&lost))?
            .unwrap_or_default())
    }

    /// `None`: a segment went between finding it in the index and opening it; what it held has moved.
    /// Of one that does not come back, `instead` is the file.
    fn try_extents_at(
        &self,
        (ino, chunk, blocks): &(Ino, u64, Range<usize>),
        k: Epoch,
        instead: Option<&Arc<dyn MediaFile>>,
    ) -> Result<Option<Vec<ExtentRef>>> {
        let pieces = self.pieces(*ino, *chunk, k, None)?;
        let mut owner = [usize::MAX; CHUNK_BLOCKS as usize];
        for (i, piece) in pieces.iter().enumerate() {
            for block in piece.range().filter(|block| blocks.contains(block)) {
                // The smallest label wins; of copies with one label, that which was moved last.
                let better = pieces
                    .get(owner[block])
                    .is_none_or(|other| other.label == piece.label && other.lsn < piece.lsn);
                if better {
                    owner[block] = i;
                }
            }
        }
        let mut found = Vec::new();
        for run in runs(&owner) {
            let Some(piece) = pieces.get(owner[run.start]) else {
                continue;
            };
            let Some(extent) = self.extent_ref(&piece.part(run), instead)? else {
                return Ok(None);
            };
            found.push(extent);
        }
        Ok(Some(found))
    }

    fn extent_ref(
        &self,
        piece: &Piece,
        instead: Option<&Arc<dyn MediaFile>>,
    ) -> Result<Option<ExtentRef>> {
        let first_block = piece.chunk.wrapping_mul(CHUNK_BLOCKS) + u64::from(piece.start);
        let payload = match &piece.place {
            None => None,
            Some(place) => {
                let segment = key::segment_of(piece.lsn);
                let file = self.journal.file(segment)?;
                let Some(file) = file.or_else(|| instead.cloned()) else {
                    return Ok(None);
                };
                Some(Payload {
                    file,
                    segment,
                    block: place.block,
                    crcs: place.crcs.clone(),
                })
            }
        };
        Ok(Some(ExtentRef {
            label: piece.label,
            first_block,
            blocks: piece.blocks,
            payload,
        }))
    }

    /// The pieces of a chunk labelled `from..=to` (to the highest if `None`), by label, start and age.
    pub(super) fn pieces(
        &self,
        ino: Ino,
        chunk: u64,
        from: Epoch,
        to: Option<Epoch>,
    ) -> Result<Vec<Piece>> {
        let (from, to) = piece_range(ino, chunk, from, to);
        let mut pieces = Vec::new();
        self.layers.scan(&from, &to, &mut |key, value| {
            pieces.push(Piece::parse(key, value)?);
            Ok(true)
        })?;
        Ok(pieces)
    }

    /// The blocks of a chunk that have a record labelled `from` or later: bit `i % 64` of word `i / 64` is
    /// block `i` of the chunk.
    ///
    /// # Errors
    /// As [`Store::attr_at`].
    pub fn kept_blocks(&self, ino: Ino, from: Epoch, chunk: u64) -> Result<[u64; 4]> {
        let mut kept = [0; 4];
        for piece in self.pieces(ino, chunk, from, None)? {
            piece
                .range()
                .for_each(|block| kept[block / 64] |= 1 << (block % 64));
        }
        Ok(kept)
    }

    /// Reads blocks of an extent, from its block `skip_blocks` on, into `buf`.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if a block is not what was kept; `EINVAL` if `buf` is not whole blocks or
    /// reaches beyond the extent.
    pub fn read_extent(&self, extent: &ExtentRef, skip_blocks: u16, buf: &mut [u8]) -> Result<()> {
        let (skip, blocks) = (usize::from(skip_blocks), buf.len() / BLOCK);
        if !buf.len().is_multiple_of(BLOCK) || skip + blocks > usize::from(extent.blocks) {
            return Err(Error::Os(Errno::INVAL));
        }
        let Some(payload) = &extent.payload else {
            buf.fill(0);
            return Ok(());
        };
        let block = u64::from(payload.block) + skip as u64;
        let read = payload.file.read_at(buf, block * BLOCK as u64)?;
        let good =
            read == buf.len() && frame::block_checksums(buf) == payload.crcs[skip..skip + blocks];
        if good {
            return Ok(());
        }
        buf.fill(0);
        let first = extent.first_block + skip as u64;
        let (segment, last) = (
            super::media::name_of(payload.segment),
            first + blocks as u64,
        );
        let why = format!(
            "{segment}: blocks {first}..{last} labelled {} fail their checksum",
            extent.label
        );
        log::error!("{why}");
        Err(Error::Corrupt(why))
    }

    /// The epoch in which `ino` was created, if that is after the oldest snapshot.
    ///
    /// # Errors
    /// As [`Store::attr_at`].
    pub fn birth(&self, ino: Ino) -> Result<Option<Epoch>> {
        self.layers
            .get(&key::birth(ino))?
            .map(|value| key::birth_value(&value))
            .transpose()
    }

    /// The record of a retained file.
    ///
    /// # Errors
    /// As [`Store::attr_at`].
    pub fn retained(&self, ino: Ino) -> Result<Option<Retained>> {
        let Some(value) = self.layers.get(&key::retained(ino))? else {
            return Ok(None);
        };
        let (gone, retained) = key::retained_value(&value)?;
        Ok((!gone).then_some(retained))
    }

    /// All retained files, by number.
    ///
    /// # Errors
    /// As [`Store::attr_at`].
    pub fn retained_all(&self) -> Result<Vec<Retained>> {
        let mut all = Vec::new();
        self.layers.scan(b"r", b"s", &mut |_, value| {
            let (gone, retained) = key::retained_value(value)?;
            if !gone {
                all.push(retained);
            }
            Ok(true)
        })?;
        Ok(all)
    }
}

/// The keys of the pieces of a chunk labelled `from..=to`.
pub(super) fn piece_range(
    ino: Ino,
    chunk: u64,
    from: Epoch,
    to: Option<Epoch>,
) -> (Vec<u8>, Vec<u8>) {
    let end = match to {
        Some(to) if to.0 < u64::MAX => key::extents_from(ino, chunk, to.next()),
        _ => key::after_prefix(&key::chunk(ino, chunk)),
    };
    (key::extents_from(ino, chunk, from), end)
}

/// The label that is the last number of the key.
pub(super) fn label_at_end(key: &[u8]) -> Result<Epoch> {
    let label = key
        .last_chunk()
        .ok_or_else(|| Error::Corrupt("a key without a label".into()))?;
    Ok(Epoch(u64::from_be_bytes(*label)))
}

/// The maximal runs of equal neighbours.
pub(super) fn runs<T: PartialEq>(items: &[T]) -> Vec<std::ops::Range<usize>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for i in 0..items.len() {
        match runs.last_mut() {
            Some(run) if items[run.start] == items[i] => run.end = i + 1,
            _ => runs.push(i..i + 1),
        }
    }
    runs
}
