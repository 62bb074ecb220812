//! The bodies of journal records to bytes and back. Pure: no I/O (docs/FORMAT.md has the tables).

use super::codec::{Reader, Writer};
use super::frame::FRAME;
use super::table::{Change, Edit, Table, get_change, get_table, put_change, put_table};
use super::types::{AttrImage, EntryImage, ObjectHandle, Retained, Timestamp};
use crate::error::{Error, Result};
use crate::ids::{CHUNK_BLOCKS, Epoch, Ino};
use rustix::io::Errno;

/// The version of the journal that this release writes, and the only one that it reads.
pub(super) const VERSION: u32 = 1;
/// First bytes of the first record of a segment.
const MAGIC: [u8; 8] = *b"cowfsseg";
/// Bytes that a segment keeps free in its log for the seal.
pub(super) const SEAL_LEN: u32 = 32;

/// Longest name of an entry, an attribute or a snapshot.
pub(super) const MAX_NAME: usize = 255;
/// Longest object handle (`MAX_HANDLE_SZ`).
const MAX_HANDLE: usize = 128;
/// Longest value of an extended attribute; Linux allows 64 KiB.
const MAX_VALUE: usize = 1 << 20;

/// One record of the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Record {
    /// The first of each segment.
    Segment {
        uuid: u128,
        number: u32,
        log_area: u64,
    },
    Table(Table),
    /// What has changed in the table since the version before.
    Change(Change),
    Attr {
        ino: Ino,
        label: Epoch,
        image: AttrImage,
    },
    Entry {
        dir: Ino,
        label: Epoch,
        name: Vec<u8>,
        was: Option<EntryImage>,
    },
    Extent(Extent),
    Birth {
        ino: Ino,
        epoch: Epoch,
    },
    /// A retained file, or (`gone`) that it is one no longer.
    Retained {
        gone: bool,
        retained: Retained,
    },
    /// The last of a segment that was left in good order.
    Seal {
        used: u64,
    },
}

/// A run of blocks within one chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) ino: Ino,
    pub(super) label: Epoch,
    pub(super) first_block: u64,
    pub(super) blocks: u16,
    /// `None` is a hole.
    pub(super) place: Option<Place>,
}

/// Where the payload is, in blocks from the start of the segment, and a checksum for each block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) block: u32,
    pub(super) crcs: Vec<u32>,
}

impl Record {
    pub(super) fn kind(&self) -> u8 {
        match self {
            Self::Segment { .. } => 1,
            Self::Table(_) => 2,
            Self::Attr { .. } => 3,
            Self::Entry { .. } => 4,
            Self::Extent(_) => 5,
            Self::Birth { .. } => 6,
            Self::Retained { .. } => 7,
            Self::Seal { .. } => 8,
            Self::Change(_) => 9,
        }
    }

    /// The highest epoch that the record speaks of.
    pub(super) fn highest_epoch(&self) -> Epoch {
        match self {
            Self::Table(table) => table.epoch,
            Self::Change(change) => change.epoch,
            Self::Attr { label, .. } | Self::Entry { label, .. } => *label,
            Self::Extent(extent) => extent.label,
            Self::Birth { epoch, .. } => *epoch,
            Self::Retained { retained, .. } => retained.removed.max(retained.birth),
            Self::Segment { .. } | Self::Seal { .. } => Epoch(0),
        }
    }

    pub(super) fn body(&self) -> Vec<u8> {
        let mut w = Writer::default();
        match self {
            Self::Segment {
                uuid,
                number,
                log_area,
            } => {
                w.raw(&MAGIC);
                w.u32(VERSION);
                w.u32(*number);
                w.u64(*log_area);
                w.raw(&uuid.to_le_bytes());
            }
            Self::Table(table) => put_table(&mut w, table),
            Self::Change(change) => put_change(&mut w, change),
            Self::Attr { ino, label, image } => {
                w.u64(ino.0);
                w.u64(label.0);
                put_attr(&mut w, image);
            }
            Self::Entry {
                dir,
                label,
                name,
                was,
            } => {
                w.u64(dir.0);
                w.u64(label.0);
                w.bytes(name);
                put_entry(&mut w, was.as_ref());
            }
            Self::Extent(extent) => put_extent(&mut w, extent),
            Self::Birth { ino, epoch } => {
                w.u64(ino.0);
                w.u64(epoch.0);
            }
            Self::Retained { gone, retained } => {
                w.u8(u8::from(*gone));
                put_retained(&mut w, retained);
            }
            Self::Seal { used } => w.u64(*used),
        }
        w.0
    }

    pub(super) fn decode(kind: u8, body: &[u8]) -> Result<Self> {
        let mut r = Reader(body);
        let record = match kind {
            1 => get_segment(&mut r)?,
            2 => Self::Table(get_table(&mut r)?),
            3 => {
                let (ino, label) = (Ino(r.u64()?), Epoch(r.u64()?));
                Self::Attr {
                    ino,
                    label,
                    image: get_attr(&mut r)?,
                }
            }
            4 => {
                let (dir, label) = (Ino(r.u64()?), Epoch(r.u64()?));
                let name = r.bytes(MAX_NAME)?.to_vec();
                Self::Entry {
                    dir,
                    label,
                    name,
                    was: get_entry(&mut r)?,
                }
            }
            5 => Self::Extent(get_extent(&mut r)?),
            6 => Self::Birth {
                ino: Ino(r.u64()?),
                epoch: Epoch(r.u64()?),
            },
            7 => {
                let gone = r.u8()? != 0;
                Self::Retained {
                    gone,
                    retained: get_retained(&mut r)?,
                }
            }
            8 => Self::Seal { used: r.u64()? },
            9 => Self::Change(get_change(&mut r)?),
            _ => return Err(Error::Corrupt(format!("record of unknown type {kind}"))),
        };
        r.end()?;
        record
            .check()
            .map_err(|_| Error::Corrupt("a record with a field out of range".into()))?;
        Ok(record)
    }

    /// Refuses what could be written but not read back.
    pub(super) fn check(&self) -> Result<()> {
        let handle = |h: &ObjectHandle| h.bytes.len() <= MAX_HANDLE;
        let name = |n: &[u8]| n.len() <= MAX_NAME && !n.contains(&0);
        let good = match self {
            Self::Attr { image, .. } => image
                .xattrs
                .iter()
                .all(|(n, v)| n.len() <= MAX_NAME && v.len() <= MAX_VALUE),
            Self::Entry { name: n, was, .. } => {
                name(n) && was.as_ref().is_none_or(|e| handle(&e.handle))
            }
            Self::Retained { retained, .. } => {
                handle(&retained.handle)
                    && retained
                        .origin
                        .as_ref()
                        .is_none_or(|(_, h, n)| handle(h) && name(n))
            }
            Self::Table(table) => table.snapshots.iter().all(|s| s.name.len() <= MAX_NAME),
            Self::Change(change) => change.edits.iter().all(|(epoch, edit)| match edit {
                Edit::Set(info) => info.epoch == *epoch && info.name.len() <= MAX_NAME,
                Edit::State(_) | Edit::Drop => true,
            }),
            Self::Extent(extent) => extent.is_sound(),
            Self::Segment { .. } | Self::Birth { .. } | Self::Seal { .. } => true,
        };
        if good {
            Ok(())
        } else {
            Err(Error::Os(Errno::INVAL))
        }
    }
}

impl Extent {
    /// The chunk it lies in, and its first block within that chunk.
    pub(super) fn position(&self) -> (u64, u16) {
        (
            self.first_block / CHUNK_BLOCKS,
            (self.first_block % CHUNK_BLOCKS) as u16,
        )
    }

    fn is_sound(&self) -> bool {
        let (_, start) = self.position();
        let placed = self
            .place
            .as_ref()
            .is_none_or(|p| p.crcs.len() == usize::from(self.blocks));
        self.blocks > 0 && u64::from(start) + u64::from(self.blocks) <= CHUNK_BLOCKS && placed
    }
}

pub(super) fn put_time(w: &mut Writer, time: Timestamp) {
    w.u64(time.sec as u64);
    w.u32(time.nsec);
}

pub(super) fn get_time(r: &mut Reader<'_>) -> Result<Timestamp> {
    Ok(Timestamp {
        sec: r.u64()? as i64,
        nsec: r.u32()?,
    })
}

fn put_handle(w: &mut Writer, handle: &ObjectHandle) {
    w.u32(handle.kind as u32);
    w.bytes(&handle.bytes);
}

fn get_handle(r: &mut Reader<'_>) -> Result<ObjectHandle> {
    Ok(ObjectHandle {
        kind: r.u32()? as i32,
        bytes: r.bytes(MAX_HANDLE)?.into(),
    })
}

pub(super) fn put_attr(w: &mut Writer, image: &AttrImage) {
    for field in [image.mode, image.uid, image.gid, image.nlink, image.blksize] {
        w.u32(field);
    }
    for field in [image.size, image.blocks, image.rdev] {
        w.u64(field);
    }
    for time in [image.atime, image.mtime, image.ctime] {
        put_time(w, time);
    }
    w.u8(u8::from(image.btime.is_some()));
    if let Some(time) = image.btime {
        put_time(w, time);
    }
    w.count(image.xattrs.len());
    for (name, value) in &image.xattrs {
        w.bytes(name);
        w.bytes(value);
    }
}

pub(super) fn get_attr(r: &mut Reader<'_>) -> Result<AttrImage> {
    let (mode, uid, gid, nlink, blksize) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?, r.u32()?);
    let (size, blocks, rdev) = (r.u64()?, r.u64()?, r.u64()?);
    let (atime, mtime, ctime) = (get_time(r)?, get_time(r)?, get_time(r)?);
    let btime = if r.u8()? == 0 {
        None
    } else {
        Some(get_time(r)?)
    };
    let count = r.count(8)?;
    let mut xattrs = Vec::with_capacity(count.min(64));
    for _ in 0..count {
        xattrs.push((r.bytes(MAX_NAME)?.to_vec(), r.bytes(MAX_VALUE)?.to_vec()));
    }
    let image = AttrImage {
        mode,
        uid,
        gid,
        nlink,
        size,
        blocks,
        blksize,
        rdev,
        atime,
        mtime,
        ctime,
        btime,
        xattrs,
    };
    Ok(image)
}

pub(super) fn put_entry(w: &mut Writer, was: Option<&EntryImage>) {
    w.u8(u8::from(was.is_some()));
    if let Some(entry) = was {
        w.u64(entry.ino.0);
        w.u8(entry.kind);
        put_handle(w, &entry.handle);
    }
}

pub(super) fn get_entry(r: &mut Reader<'_>) -> Result<Option<EntryImage>> {
    if r.u8()? == 0 {
        return Ok(None);
    }
    Ok(Some(EntryImage {
        ino: Ino(r.u64()?),
        kind: r.u8()?,
        handle: get_handle(r)?,
    }))
}

pub(super) fn put_retained(w: &mut Writer, retained: &Retained) {
    w.u64(retained.ino.0);
    w.u8(retained.kind);
    put_handle(w, &retained.handle);
    w.u64(retained.birth.0);
    w.u64(retained.removed.0);
    w.u8(match (&retained.origin, retained.whiteout) {
        (None, _) => 0,
        (Some(_), false) => 1,
        (Some(_), true) => 2,
    });
    if let Some((dir, handle, name)) = &retained.origin {
        w.u64(dir.0);
        put_handle(w, handle);
        w.bytes(name);
    }
}

pub(super) fn get_retained(r: &mut Reader<'_>) -> Result<Retained> {
    let (ino, kind, handle) = (Ino(r.u64()?), r.u8()?, get_handle(r)?);
    let (birth, removed) = (Epoch(r.u64()?), Epoch(r.u64()?));
    let place = r.u8()?;
    let origin = match place {
        0 => None,
        _ => Some((Ino(r.u64()?), get_handle(r)?, r.bytes(MAX_NAME)?.to_vec())),
    };
    Ok(Retained {
        ino,
        kind,
        handle,
        birth,
        removed,
        origin,
        whiteout: place == 2,
    })
}

fn put_extent(w: &mut Writer, extent: &Extent) {
    w.u64(extent.ino.0);
    w.u64(extent.label.0);
    w.u64(extent.first_block);
    w.u16(extent.blocks);
    w.u8(u8::from(extent.place.is_some()));
    if let Some(place) = &extent.place {
        w.u32(place.block);
        place.crcs.iter().for_each(|crc| w.u32(*crc));
    }
}

fn get_extent(r: &mut Reader<'_>) -> Result<Extent> {
    let (ino, label, first_block) = (Ino(r.u64()?), Epoch(r.u64()?), r.u64()?);
    let blocks = r.u16()?;
    let place = if r.u8()? == 0 {
        None
    } else {
        Some(get_place(r, blocks)?)
    };
    Ok(Extent {
        ino,
        label,
        first_block,
        blocks,
        place,
    })
}

pub(super) fn get_place(r: &mut Reader<'_>, blocks: u16) -> Result<Place> {
    let block = r.u32()?;
    let crcs = r.raw(usize::from(blocks) * 4)?;
    let crcs = crcs
        .chunks_exact(4)
        .map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]]))
        .collect();
    Ok(Place { block, crcs })
}

fn get_segment(r: &mut Reader<'_>) -> Result<Record> {
    if r.raw(8)? != MAGIC {
        return Err(Error::Corrupt("not a segment of a cowfs journal".into()));
    }
    let version = r.u32()?;
    if version != VERSION {
        return Err(Error::Corrupt(format!(
            "segment of format {version}, this release knows {VERSION}"
        )));
    }
    let (number, log_area, uuid) = (r.u32()?, r.u64()?, r.u128()?);
    Ok(Record::Segment {
        uuid,
        number,
        log_area,
    })
}

/// The uuid in what may be the header of a segment.
pub(super) fn segment_uuid(log: &[u8]) -> Option<u128> {
    let mut r = Reader(log.get(FRAME..)?);
    match get_segment(&mut r) {
        Ok(Record::Segment { uuid, .. }) => Some(uuid),
        _ => None,
    }
}
