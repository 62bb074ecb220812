//! The keeping of data: which blocks of a file a change touches, which of them are kept already, and which are holes.

use super::{Aim, Op};
use crate::engine::backing::data_map;
use crate::engine::object::{Known, Object, Run};
use crate::engine::room::SMALL;
use crate::error::{Error, Result};
use crate::ids::{BLOCK, CHUNK, CHUNK_BLOCKS, Epoch};
use crate::store::ExtentData;
use crate::sync::Arc;
use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::OFlags;
use rustix::io::Errno;

/// The bytes of a file that a change may concern.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first byte.
    pub start: u64,
    /// Past the last byte; `u64::MAX`: the end of the file.
    pub end: u64,
    /// The change makes holes and nothing else (it cuts the file short, or punches): what is a hole there
    /// before is one afterwards.
    pub holes_stay: bool,
}

impl Range {
    /// Bytes that the change may give any value.
    pub fn new(start: u64, end: u64) -> Self {
        Self {
            start,
            end,
            holes_stay: false,
        }
    }

    /// Bytes that the change makes a hole of.
    pub fn punched(start: u64, end: u64) -> Self {
        Self {
            holes_stay: true,
            ..Self::new(start, end)
        }
    }

    /// All from a new end of the file on.
    pub fn from_size(size: u64) -> Self {
        Self::punched(size, u64::MAX)
    }
}

/// A file of which data is being kept.
struct Keeping<'f> {
    object: &'f Object,
    fd: BorrowedFd<'f>,
    aim: Aim,
    /// Its size at the cut.
    size: u64,
}

/// Blocks that are kept ahead of writes that follow each other: 64 KiB at first, up to a chunk.
const LEAST_AHEAD: u64 = 16;
const MOST_AHEAD: u64 = CHUNK_BLOCKS;

impl Op<'_> {
    /// Keeps the attributes of a file and what of its bytes in `range` the cut had and is not kept yet.
    /// `fd` is a descriptor of the file; one that cannot be read from is replaced for the purpose.
    pub fn keep_data(&mut self, object: &Object, fd: BorrowedFd<'_>, range: &Range) -> Result<()> {
        let Some(aim) = self.aim(object)? else {
            return Ok(());
        };
        if self.engine.backing.fills_ends()
            && let Some(end) = self.end_before(fd, range)?
        {
            self.keep_range(object, fd, aim, &end)?;
        }
        self.keep_range(object, fd, aim, range)
    }

    /// The rest of the block in which the file ends now, if the change comes behind its end: there are filesystems that fill
    /// it with zeros when the file grows past it, and some snapshot may have a hole there, in which it did not end (C5).
    fn end_before(&self, fd: BorrowedFd<'_>, range: &Range) -> Result<Option<Range>> {
        let block = BLOCK as u64;
        let size = self.engine.backing.stat_but_times(fd)?.size;
        let end = size.next_multiple_of(block);
        Ok((size < end && size < range.start).then(|| Range::new(size, end)))
    }

    fn keep_range(
        &mut self,
        object: &Object,
        fd: BorrowedFd<'_>,
        aim: Aim,
        range: &Range,
    ) -> Result<()> {
        let size = match self.attr_kept(object, aim)? {
            Known::Yes(size) => size,
            _ => self.append_attr(object, aim, fd)?,
        };
        let file = Keeping {
            object,
            fd,
            aim,
            size,
        };
        if range.end > size && !range.holes_stay {
            self.keep_holes_of_older(&file, range)?;
        }
        if range.start >= size {
            return self.keep_tail_hole(&file);
        }
        let end = range.end.min(size);
        if range.start >= end {
            return Ok(());
        }
        if range.holes_stay && range.end >= size && !size.is_multiple_of(BLOCK as u64) {
            // The block in which the cut ends may be filled with zeros when the file grows again, though nobody writes
            // to it: it stays a hole in the snapshot only if it is kept as one.
            let last = size / BLOCK as u64;
            self.keep_chunk(&file, last, last + 1)?;
        }
        let (first, last) = (range.start / BLOCK as u64, (end - 1) / BLOCK as u64);
        let is_new = !range.holes_stay && !self.kept(object)?.has(first, last);
        let mut chunk = first / CHUNK_BLOCKS;
        while chunk <= last / CHUNK_BLOCKS {
            let from = first.max(chunk * CHUNK_BLOCKS);
            let to = (last + 1).min((chunk + 1) * CHUNK_BLOCKS);
            self.keep_chunk(&file, from, to)?;
            chunk += 1;
            if range.holes_stay {
                chunk = self.next_data_chunk(fd, chunk)?.unwrap_or(u64::MAX);
            }
        }
        if is_new {
            self.keep_ahead(&file, first, last)?;
        }
        Ok(())
    }

    /// Keeps more than a write needs where it goes on where the last one ended, more each time: a log that is written over
    /// in order has its pre-images in few records then, and most of its fsync(2) calls find the journal durable.
    fn keep_ahead(&mut self, file: &Keeping<'_>, first: u64, last: u64) -> Result<()> {
        let kept = self.kept(file.object)?;
        let ahead = match kept.run {
            Run { next, ahead } if (first..=last).contains(&next) => {
                (2 * ahead).clamp(LEAST_AHEAD, MOST_AHEAD)
            }
            _ => 0,
        };
        // Not beyond the chunk in which the write ends, nor the cut's end.
        let limit = (last / CHUNK_BLOCKS + 1) * CHUNK_BLOCKS;
        let next = (last + 1 + ahead)
            .min(limit)
            .min(file.size.div_ceil(BLOCK as u64));
        kept.run = Run { next, ahead };
        if next > last + 1 {
            // The write does not need it, so that it may fail.
            if let Err(error) = self.keep_chunk(file, last + 1, next) {
                log::debug!("nothing is kept ahead: {error}");
            }
        }
        Ok(())
    }

    /// The first chunk from `chunk` on that has data; `None` if all behind it are holes. A hole that is not
    /// kept is one that the cut had, and where the change makes only holes it needs no keeping: so a sparse
    /// file costs what it has of data, not what it has of size.
    fn next_data_chunk(&self, fd: BorrowedFd<'_>, chunk: u64) -> Result<Option<u64>> {
        let data = self.engine.backing.seek(fd, chunk * CHUNK, false)?;
        Ok(data.map(|at| at / CHUNK))
    }

    /// Keeps what a change past the end that the newest cut had takes from older ones, in which the file was
    /// longer: holes that were not kept when it was cut short. Whatever else they had there was.
    fn keep_holes_of_older(&mut self, file: &Keeping<'_>, range: &Range) -> Result<()> {
        let block = BLOCK as u64;
        // Not the block in which the newest cut ends: whoever moved the end there has kept it.
        let mut from = (range.start / block).max(file.size.div_ceil(block));
        for &(k, size) in self.longer(file)?.iter() {
            let to = range.end.min(size).div_ceil(block);
            while from < to {
                let end = to.min((from / CHUNK_BLOCKS + 1) * CHUNK_BLOCKS);
                let store = &self.engine.store;
                let map = store.kept_blocks(file.object.ino(), k, from / CHUNK_BLOCKS)?;
                for (first, last) in unset_runs(&map, from, end) {
                    let blocks = last - first;
                    self.append_extent(file, first, ExtentData::Hole { blocks })?;
                }
                from = end;
            }
        }
        Ok(())
    }

    fn longer(&mut self, file: &Keeping<'_>) -> Result<Arc<[(Epoch, u64)]>> {
        let engine = self.engine;
        let (ino, base) = (file.object.ino(), file.aim.base);
        let kept = self.kept(file.object)?;
        if let Some(known) = &kept.longer {
            return Ok(known.clone());
        }
        let birth = kept.birth.unwrap_or(Epoch(0));
        let mut longer: Vec<(Epoch, u64)> = Vec::new();
        // Cloned: a cut must not wait for these look-ups.
        let guards = engine.guards.read().clone();
        let mut older = &guards[..guards.partition_point(|k| *k < base)];
        let mut after = birth;
        while let Some(&k) = {
            older = &older[older.partition_point(|k| *k <= after)..];
            older.first()
        } {
            // What serves k serves all up to its label.
            let Some((label, image)) = engine.store.attr_at(ino, k)? else {
                break;
            };
            let last = Epoch(label.0.min(base.0 - 1));
            longer.retain(|(_, size)| *size > image.size);
            longer.push((last, image.size));
            after = label;
        }
        longer.retain(|(_, size)| *size > file.size);
        longer.reverse();
        let longer: Arc<[_]> = longer.into();
        self.kept(file.object)?.longer = Some(longer.clone());
        Ok(longer)
    }

    /// A change past the end that the cut had changes no byte of the snapshot. But the last block, if it is a
    /// hole, may come to be data: by a write into it, or because the filesystem fills it with zeros when the
    /// file grows (C5).
    fn keep_tail_hole(&mut self, file: &Keeping<'_>) -> Result<()> {
        if self.kept(file.object)?.tail_looked_at {
            return Ok(());
        }
        let last = file.size / BLOCK as u64;
        let at = last * BLOCK as u64;
        if at < file.size {
            let data = self.engine.backing.seek(file.fd, at, false)?;
            if data.is_none_or(|at| at >= file.size) {
                self.keep_chunk(file, last, last + 1)?;
            }
        }
        self.kept(file.object)?.tail_looked_at = true;
        Ok(())
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
        for (first, last) in unset_runs(&map, from, to) {
            self.keep_run(file, first, last)?; // I2
            (first..last).for_each(|block| set_bit(&mut map, block));
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
        let (ino, aim) = (file.object.ino(), file.aim);
        let (blocks, bytes) = match data {
            ExtentData::Hole { blocks } => (blocks, 0),
            ExtentData::Bytes(bytes) => ((bytes.len() / BLOCK) as u64, bytes.len() as u64),
        };
        self.append(
            file.object,
            aim,
            SMALL + bytes,
            |store| store.keep_extent(ino, aim.label, first, data),
            |store| store.blocks_label(ino, first, first + blocks, aim.base),
        )?;
        self.kept(file.object)?.note(aim.label);
        Ok(())
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

/// The runs of blocks in `from..to`, within one chunk, that `map` does not have: `(first, past the last)`.
fn unset_runs(map: &[u64; 4], from: u64, to: u64) -> Vec<(u64, u64)> {
    let mut runs: Vec<(u64, u64)> = Vec::new();
    for block in (from..to).filter(|block| !bit(map, *block)) {
        match runs.last_mut() {
            Some(run) if run.1 == block => run.1 += 1,
            _ => runs.push((block, block + 1)),
        }
    }
    runs
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
