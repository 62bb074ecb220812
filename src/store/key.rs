//! Keys and values of the index, and what each journal record puts there. Pure.
//!
//! Numbers in keys are big-endian, so that bytes order as numbers do; the first byte is a tag.

use super::codec::{Reader, Writer};
use super::record::{Extent, Place, Record, get_place};
use super::record::{get_attr, get_entry, get_retained, put_attr, put_entry, put_retained};
use super::table::{Table, get_table, put_table};
use super::types::{AttrImage, EntryImage, Retained};
use crate::error::{Error, Result};
use crate::ids::{BLOCK, CHUNK_BLOCKS, Epoch, Ino, Lsn};

/// A key and its value.
pub(super) type Pair = (Vec<u8>, Vec<u8>);

/// Builds a key.
struct Key(Vec<u8>);

impl Key {
    fn new(tag: u8) -> Self {
        let mut bytes = Vec::with_capacity(40);
        bytes.push(tag);
        Self(bytes)
    }

    fn num(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_be_bytes());
        self
    }

    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
}

pub(super) fn attr(ino: Ino, label: Epoch) -> Vec<u8> {
    Key::new(b'a').num(ino.0).num(label.0).0
}

/// The first key after all of those that begin with `prefix`.
pub(super) fn after_prefix(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            break;
        }
    }
    end
}

pub(super) fn entry(dir: Ino, name: &[u8], label: Epoch) -> Vec<u8> {
    Key::new(b'e').num(dir.0).raw(name).raw(&[0]).num(label.0).0
}

/// What all entries of a directory begin with.
pub(super) fn entries(dir: Ino) -> Vec<u8> {
    Key::new(b'e').num(dir.0).0
}

/// Name and label from the key of an entry.
pub(super) fn entry_parts(key: &[u8]) -> Result<(&[u8], Epoch)> {
    let bad = || Error::Corrupt("key of an entry".into());
    let rest = key.get(9..).ok_or_else(bad)?;
    let (head, label) = rest.split_last_chunk::<8>().ok_or_else(bad)?;
    let (zero, name) = head.split_last().ok_or_else(bad)?;
    if *zero == 0 {
        Ok((name, Epoch(u64::from_be_bytes(*label))))
    } else {
        Err(bad())
    }
}

/// What all extents of an object begin with.
pub(super) fn extents(ino: Ino) -> Vec<u8> {
    Key::new(b'd').num(ino.0).0
}

/// What all extents of a chunk begin with.
pub(super) fn chunk(ino: Ino, chunk: u64) -> Vec<u8> {
    Key::new(b'd').num(ino.0).num(chunk).0
}

/// The first key that an extent of the chunk labelled `from` or later can have.
pub(super) fn extents_from(ino: Ino, chunk_no: u64, from: Epoch) -> Vec<u8> {
    Key(chunk(ino, chunk_no)).num(from.0).0
}

fn extent(ino: Ino, chunk_no: u64, label: Epoch, start: u16, lsn: Lsn) -> Vec<u8> {
    Key(chunk(ino, chunk_no))
        .num(label.0)
        .raw(&start.to_be_bytes())
        .num(lsn.0)
        .0
}

pub(super) fn birth(ino: Ino) -> Vec<u8> {
    Key::new(b'b').num(ino.0).0
}

pub(super) fn retained(ino: Ino) -> Vec<u8> {
    Key::new(b'r').num(ino.0).0
}

/// One aspect of one object that has a record of one label: what reclaim walks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Touch {
    pub(super) label: Epoch,
    pub(super) ino: Ino,
    pub(super) aspect: Aspect,
}

/// Which aspect; extents go together by chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Aspect {
    Attr,
    Entry(Vec<u8>),
    Chunk(u64),
}

impl Touch {
    pub(super) fn key(&self) -> Vec<u8> {
        let key = Key::new(b't').num(self.label.0).num(self.ino.0);
        match &self.aspect {
            Aspect::Attr => key.raw(b"a").0,
            Aspect::Entry(name) => key.raw(b"e").raw(name).0,
            Aspect::Chunk(chunk) => key.raw(b"d").num(*chunk).0,
        }
    }

    pub(super) fn parse(key: &[u8]) -> Result<Self> {
        let mut r = Reader(key);
        let (_, label, ino, aspect) = (r.u8()?, Epoch(r.be64()?), Ino(r.be64()?), r.u8()?);
        let aspect = match aspect {
            b'a' => Aspect::Attr,
            b'e' => Aspect::Entry(r.0.to_vec()),
            b'd' => Aspect::Chunk(r.be64()?),
            _ => return Err(Error::Corrupt("key of a touched aspect".into())),
        };
        Ok(Self { label, ino, aspect })
    }
}

/// The label of such a key, which may be damaged otherwise.
pub(super) fn label_touched(key: &[u8]) -> Epoch {
    let label = key.get(1..9).and_then(|bytes| bytes.try_into().ok());
    Epoch(label.map_or(0, u64::from_be_bytes))
}

/// The keys of aspects touched under the labels `from..=to`.
pub(super) fn touched(from: Epoch, to: Epoch) -> (Vec<u8>, Vec<u8>) {
    let end =
        to.0.checked_add(1)
            .map_or_else(|| vec![b't' + 1], |end| Key::new(b't').num(end).0);
    (Key::new(b't').num(from.0).0, end)
}

/// A run of blocks of a chunk, as the index has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) ino: Ino,
    pub(super) chunk: u64,
    pub(super) label: Epoch,
    /// First block within the chunk.
    pub(super) start: u16,
    /// Of the journal record that holds the payload.
    pub(super) lsn: Lsn,
    pub(super) blocks: u16,
    pub(super) place: Option<Place>,
}

impl Piece {
    pub(super) fn of(extent: &Extent, lsn: Lsn) -> Self {
        let (chunk, start) = extent.position();
        let place = extent.place.clone();
        Self {
            ino: extent.ino,
            chunk,
            label: extent.label,
            start,
            lsn,
            blocks: extent.blocks,
            place,
        }
    }

    pub(super) fn key(&self) -> Vec<u8> {
        extent(self.ino, self.chunk, self.label, self.start, self.lsn)
    }

    pub(super) fn value(&self) -> Vec<u8> {
        let mut w = Writer::default();
        w.u16(self.blocks);
        if let Some(place) = &self.place {
            w.u32(place.block);
            place.crcs.iter().for_each(|crc| w.u32(*crc));
        }
        w.0
    }

    pub(super) fn parse(key: &[u8], value: &[u8]) -> Result<Self> {
        let mut r = Reader(key);
        let (_, ino, chunk) = (r.u8()?, Ino(r.be64()?), r.be64()?);
        let (label, start, lsn) = (Epoch(r.be64()?), r.be16()?, Lsn(r.be64()?));
        r.end()?;
        let mut r = Reader(value);
        let blocks = r.u16()?;
        let place = if r.0.is_empty() {
            None
        } else {
            Some(get_place(&mut r, blocks)?)
        };
        r.end()?;
        if blocks == 0 || u64::from(start) + u64::from(blocks) > CHUNK_BLOCKS {
            return Err(Error::Corrupt("an extent across chunks".into()));
        }
        Ok(Self {
            ino,
            chunk,
            label,
            start,
            lsn,
            blocks,
            place,
        })
    }

    /// The blocks of the chunk that it covers.
    pub(super) fn range(&self) -> std::ops::Range<usize> {
        usize::from(self.start)..usize::from(self.start) + usize::from(self.blocks)
    }

    /// The part of it that covers `range`, which must lie within.
    pub(super) fn part(&self, range: std::ops::Range<usize>) -> Self {
        let skip = range.start - usize::from(self.start);
        let place = self.place.as_ref().map(|place| Place {
            block: place.block.saturating_add(skip as u32),
            crcs: place.crcs[skip..skip + range.len()].to_vec(),
        });
        Self {
            start: range.start as u16,
            blocks: range.len() as u16,
            place,
            ..self.clone()
        }
    }
}

fn stamped(lsn: Lsn, put: impl FnOnce(&mut Writer)) -> Vec<u8> {
    let mut w = Writer::default();
    w.u64(lsn.0);
    put(&mut w);
    w.0
}

/// Takes the record's number off a value of tag a, e, b or r.
pub(super) fn stamp(value: &[u8]) -> Result<(Lsn, Reader<'_>)> {
    let mut r = Reader(value);
    Ok((Lsn(r.u64()?), r))
}

pub(super) fn attr_value(value: &[u8]) -> Result<AttrImage> {
    let (_, mut r) = stamp(value)?;
    let image = get_attr(&mut r)?;
    r.end()?;
    Ok(image)
}

pub(super) fn entry_value(value: &[u8]) -> Result<Option<EntryImage>> {
    let (_, mut r) = stamp(value)?;
    let was = get_entry(&mut r)?;
    r.end()?;
    Ok(was)
}

pub(super) fn birth_value(value: &[u8]) -> Result<Epoch> {
    let (_, mut r) = stamp(value)?;
    let epoch = Epoch(r.u64()?);
    r.end()?;
    Ok(epoch)
}

/// Whether it is gone, and what it is or was.
pub(super) fn retained_value(value: &[u8]) -> Result<(bool, Retained)> {
    let (_, mut r) = stamp(value)?;
    let gone = r.u8()? != 0;
    let retained = get_retained(&mut r)?;
    r.end()?;
    Ok((gone, retained))
}

/// What the index has of a record: the one place that says so, for appends and for replay alike (I5).
pub(super) fn pairs_of(record: &Record, lsn: Lsn) -> Vec<Pair> {
    let touch = |label: Epoch, ino: Ino, aspect| (Touch { label, ino, aspect }.key(), Vec::new());
    match record {
        Record::Attr { ino, label, image } => {
            let value = stamped(lsn, |w| put_attr(w, image));
            vec![
                (attr(*ino, *label), value),
                touch(*label, *ino, Aspect::Attr),
            ]
        }
        Record::Entry {
            dir,
            label,
            name,
            was,
        } => {
            let value = stamped(lsn, |w| put_entry(w, was.as_ref()));
            vec![
                (entry(*dir, name, *label), value),
                touch(*label, *dir, Aspect::Entry(name.clone())),
            ]
        }
        Record::Extent(extent) => {
            let piece = Piece::of(extent, lsn);
            vec![
                (piece.key(), piece.value()),
                touch(piece.label, piece.ino, Aspect::Chunk(piece.chunk)),
            ]
        }
        Record::Birth { ino, epoch } => vec![(birth(*ino), stamped(lsn, |w| w.u64(epoch.0)))],
        Record::Retained {
            gone,
            retained: file,
        } => {
            let value = stamped(lsn, |w| {
                w.u8(u8::from(*gone));
                put_retained(w, file);
            });
            vec![(retained(file.ino), value)]
        }
        Record::Segment { .. } | Record::Table(_) | Record::Change(_) | Record::Seal { .. } => {
            Vec::new()
        }
    }
}

/// What an index entry holds on to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Footprint {
    pub(super) segment: u32,
    /// Bytes of the segment, roughly, payload included.
    pub(super) bytes: u64,
    pub(super) payload: u64,
}

/// What the entry holds on to in the journal; `None` if it is not a record's.
pub(super) fn footprint(key: &[u8], value: &[u8]) -> Option<Footprint> {
    match key.first()? {
        b'a' | b'e' | b'b' | b'r' => {
            let (lsn, _) = stamp(value).ok()?;
            let bytes = 24 + key.len() as u64 + value.len() as u64;
            Some(Footprint {
                segment: segment_of(lsn),
                bytes,
                payload: 0,
            })
        }
        b'd' => {
            let lsn = Lsn(u64::from_be_bytes(*key.last_chunk()?));
            let blocks = if value.len() > 2 {
                u64::from(Reader(value).u16().ok()?)
            } else {
                0
            };
            let payload = blocks * BLOCK as u64;
            let bytes = 24 + key.len() as u64 + value.len() as u64 + payload;
            Some(Footprint {
                segment: segment_of(lsn),
                bytes,
                payload,
            })
        }
        _ => None,
    }
}

/// Whether the entry can be read back.
pub(super) fn check(key: &[u8], value: &[u8]) -> Result<()> {
    match key.first() {
        Some(b'a') => attr_value(value).map(drop),
        Some(b'e') => entry_parts(key).and_then(|_| entry_value(value)).map(drop),
        Some(b'd') => Piece::parse(key, value).map(drop),
        Some(b'b') => birth_value(value).map(drop),
        Some(b'r') => retained_value(value).map(drop),
        Some(b't') => Touch::parse(key).map(drop),
        Some(b'm') => Ok(()),
        _ => Err(Error::Corrupt("an index key of unknown kind".into())),
    }
}

/// The segment that a record is in.
pub(super) fn segment_of(lsn: Lsn) -> u32 {
    (lsn.0 >> 32) as u32
}

pub(super) const STATE: &[u8] = b"m-state";
pub(super) const TABLE: &[u8] = b"m-table";
const SEGMENTS: &[u8] = b"ms";

/// What the index says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct IndexState {
    pub(super) uuid: u128,
    /// Every record before this place is in the index.
    pub(super) checkpoint: Lsn,
    pub(super) highest_epoch: Epoch,
    /// Whether the index was rebuilt and may hold records that are dead.
    pub(super) sweep: bool,
    /// Whether the store was closed in order, so that the counts of the segments are right.
    pub(super) clean: bool,
}

impl IndexState {
    pub(super) fn value(&self) -> Vec<u8> {
        let mut w = Writer::default();
        w.u32(super::record::VERSION);
        w.raw(&self.uuid.to_le_bytes());
        w.u64(self.checkpoint.0);
        w.u64(self.highest_epoch.0);
        w.u8(u8::from(self.sweep));
        w.u8(u8::from(self.clean));
        w.0
    }

    pub(super) fn parse(value: &[u8]) -> Result<Self> {
        let mut r = Reader(value);
        let version = r.u32()?;
        if version != super::record::VERSION {
            return Err(Error::Corrupt(format!("index of format {version}")));
        }
        let (uuid, checkpoint, highest_epoch) = (r.u128()?, Lsn(r.u64()?), Epoch(r.u64()?));
        let (sweep, clean) = (r.u8()? != 0, r.u8()? != 0);
        r.end()?;
        Ok(Self {
            uuid,
            checkpoint,
            highest_epoch,
            sweep,
            clean,
        })
    }
}

/// The snapshot table and the segment that has its newest copy.
pub(super) fn table_value(home: u32, table: &Table) -> Vec<u8> {
    let mut w = Writer::default();
    w.u32(home);
    put_table(&mut w, table);
    w.0
}

pub(super) fn parse_table(value: &[u8]) -> Result<(u32, Table)> {
    let mut r = Reader(value);
    let (home, table) = (r.u32()?, get_table(&mut r)?);
    r.end()?;
    Ok((home, table))
}

/// What a segment holds, in bytes and records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Usage {
    /// Bytes written to it, once it was left.
    pub(super) used: u64,
    /// Bytes of it that the index refers to.
    pub(super) live: u64,
    /// Of those, payload.
    pub(super) payload: u64,
    pub(super) records: u64,
}

impl Usage {
    pub(super) fn add(&mut self, footprint: &Footprint) {
        self.live += footprint.bytes;
        self.payload += footprint.payload;
        self.records += 1;
    }

    /// Adds what another count of the same segment found.
    pub(super) fn add_all(&mut self, more: &Self) {
        self.live += more.live;
        self.payload += more.payload;
        self.records += more.records;
    }

    pub(super) fn sub(&mut self, footprint: &Footprint) {
        self.live = self.live.saturating_sub(footprint.bytes);
        self.payload = self.payload.saturating_sub(footprint.payload);
        self.records = self.records.saturating_sub(1);
    }
}

pub(super) fn usage(segment: u32) -> Vec<u8> {
    [SEGMENTS, &segment.to_be_bytes()].concat()
}

/// The keys of all segments' usage.
pub(super) fn usages() -> (Vec<u8>, Vec<u8>) {
    (SEGMENTS.to_vec(), after_prefix(SEGMENTS))
}

pub(super) fn usage_value(usage: &Usage) -> Vec<u8> {
    let mut w = Writer::default();
    for field in [usage.used, usage.live, usage.payload, usage.records] {
        w.u64(field);
    }
    w.0
}

pub(super) fn parse_usage(key: &[u8], value: &[u8]) -> Result<(u32, Usage)> {
    let mut k = Reader(key);
    k.raw(SEGMENTS.len())?;
    let mut r = Reader(value);
    let usage = Usage {
        used: r.u64()?,
        live: r.u64()?,
        payload: r.u64()?,
        records: r.u64()?,
    };
    r.end()?;
    Ok((k.be32()?, usage))
}
