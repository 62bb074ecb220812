//! Reading a segment back: where its log ends, what of it is damaged.

use super::frame::{self, Body};
use super::journal::{lsn_at, offset_of};
use super::media::{MediaFile, name_of};
use super::record::{self, Extent, Record};
use crate::error::{Error, Result};
use crate::ids::{BLOCK, Lsn};

/// A body in the payload area longer than this is taken for damage.
const MAX_SPILL: u32 = 256 << 20;

/// What a segment's log says.
#[derive(Debug, Default)]
pub(super) struct SegmentLog {
    /// Good records in order, header and seal among them.
    pub(super) records: Vec<(Lsn, Record)>,
    /// Where the good part ends.
    pub(super) end: u32,
    /// Bytes used, if the segment is sealed.
    pub(super) sealed: Option<u64>,
    /// What cannot be read though it must once have been good: where it begins in the log, and what it is.
    pub(super) damage: Vec<(u32, String)>,
    /// Bodies in the payload area: offset and length.
    pub(super) spills: Vec<(u64, u64)>,
    /// Bytes of the log area.
    pub(super) log_area: u64,
    /// Nothing at all was ever written, or nothing of it reached the disk.
    pub(super) blank: bool,
    /// It is a segment of another store.
    pub(super) foreign: bool,
}

impl SegmentLog {
    /// Ends the log of a segment that is not sealed before the first extent beyond `durable` whose payload is not
    /// what was written. The two are written one after the other, and a power cut may keep the second alone.
    pub(super) fn cut_at_bad_payload(&mut self, file: &dyn MediaFile, durable: u32) -> Result<()> {
        if self.sealed.is_some() {
            return Ok(());
        }
        for (at, (lsn, record)) in self.records.iter().enumerate() {
            if let Record::Extent(extent) = record
                && offset_of(*lsn) >= durable
                && !payload_is_good(file, extent)?
            {
                self.end = offset_of(*lsn);
                self.records.truncate(at);
                break;
            }
        }
        Ok(())
    }
}

fn payload_is_good(file: &dyn MediaFile, extent: &Extent) -> Result<bool> {
    let Some(place) = &extent.place else {
        return Ok(true);
    };
    let mut bytes = vec![0; usize::from(extent.blocks) * BLOCK];
    let read = file.read_at(&mut bytes, u64::from(place.block) * BLOCK as u64)?;
    Ok(read == bytes.len() && frame::block_checksums(&bytes) == place.crcs)
}

/// Reads the log of segment `number`. A bad record in a sealed segment, or before `durable` in another, is
/// damage: it is reported and skipped. Elsewhere the first bad record is the torn end.
///
/// # Errors
/// Those of reading the file; bad bytes are no error.
pub(super) fn read_segment(
    file: &dyn MediaFile,
    number: u32,
    uuid: u128,
    durable: u32,
    default_log_area: u64,
) -> Result<SegmentLog> {
    let log_area = log_area(file, number, uuid)?;
    let mut out = SegmentLog {
        log_area: log_area.unwrap_or(default_log_area),
        ..SegmentLog::default()
    };
    let len = file.size()?.min(out.log_area);
    let mut log = vec![0; usize::try_from(len).unwrap_or(0)];
    let read = file.read_at(&mut log, 0)?;
    log.truncate(read);
    out.blank = log.iter().all(|byte| *byte == 0);
    out.foreign = is_foreign(&log, number, uuid);

    let mut position = 0;
    let mut gaps = Vec::new();
    while position < log.len() {
        let lsn = lsn_at(number, position as u32);
        let Some(frame) = frame::get_frame(&log[position..], uuid, lsn) else {
            let Some(next) = next_frame(&log, position + 8, number, uuid) else {
                break;
            };
            gaps.push(Gap {
                bad: position,
                before: out.records.len(),
                what: format!(
                    "{} bytes at {position} are not what was written",
                    next - position
                ),
            });
            position = next;
            continue;
        };
        if let Body::Spilled { offset, len, .. } = &frame.body {
            out.spills.push((*offset, u64::from(*len)));
        }
        match decode(file, frame.kind, frame.body) {
            Ok(record) => out.records.push((lsn, record)),
            // Its body may not have reached the disk: torn as well, if nothing says that it was durable.
            Err(why) => gaps.push(Gap {
                bad: position,
                before: out.records.len(),
                what: format!("record at {position}: {why}"),
            }),
        }
        position += frame.len;
        out.end = position as u32;
        if let Some((_, Record::Seal { used })) = out.records.last() {
            out.sealed = Some(*used);
            break;
        }
    }
    settle(&mut out, number, durable, gaps);
    Ok(out)
}

/// Bad bytes with good records after them.
struct Gap {
    /// Where they begin.
    bad: usize,
    /// Good records before them.
    before: usize,
    what: String,
}

/// Decides which gaps are damage and where the log ends.
fn settle(out: &mut SegmentLog, number: u32, durable: u32, gaps: Vec<Gap>) {
    for gap in gaps {
        if out.sealed.is_none() && gap.bad >= durable as usize {
            out.records.truncate(gap.before);
            out.end = gap.bad as u32;
            return;
        }
        let what = format!("{}: {}", name_of(number), gap.what);
        out.damage.push((gap.bad as u32, what));
    }
}

/// The record `lsn` of a segment, read by itself; `None` if there is none that is good.
pub(super) fn read_record(file: &dyn MediaFile, uuid: u128, lsn: Lsn) -> Result<Option<Record>> {
    let mut bytes = vec![0; frame::frame_len(frame::MAX_INLINE)];
    let read = file.read_at(&mut bytes, u64::from(offset_of(lsn)))?;
    let Some(frame) = frame::get_frame(&bytes[..read], uuid, lsn) else {
        return Ok(None);
    };
    match decode(file, frame.kind, frame.body) {
        Ok(record) => Ok(Some(record)),
        Err(Error::Corrupt(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn log_area(file: &dyn MediaFile, number: u32, uuid: u128) -> Result<Option<u64>> {
    let mut head = [0; 256];
    let read = file.read_at(&mut head, 0)?;
    let Some(frame) = frame::get_frame(&head[..read], uuid, lsn_at(number, 0)) else {
        return Ok(None);
    };
    match decode(file, frame.kind, frame.body) {
        Ok(Record::Segment { log_area, .. }) if log_area <= 1 << 30 => Ok(Some(log_area)),
        _ => Ok(None),
    }
}

/// Whether the log begins as that of a store other than `uuid`.
fn is_foreign(log: &[u8], number: u32, uuid: u128) -> bool {
    record::segment_uuid(log).is_some_and(|found| {
        found != uuid && frame::get_frame(log, found, lsn_at(number, 0)).is_some()
    })
}

/// The next good record. The number of a record is part of its checksum, so no stale bytes can pass.
fn next_frame(log: &[u8], from: usize, number: u32, uuid: u128) -> Option<usize> {
    (from..log.len()).step_by(8).find(|position| {
        frame::get_frame(&log[*position..], uuid, lsn_at(number, *position as u32)).is_some()
    })
}

fn decode(file: &dyn MediaFile, kind: u8, body: Body) -> Result<Record> {
    match body {
        Body::Inline(bytes) => Record::decode(kind, &bytes),
        Body::Spilled { offset, len, crc } => {
            if len > MAX_SPILL || offset.saturating_add(u64::from(len)) > file.size()? {
                return Err(Error::Corrupt("its body lies outside the segment".into()));
            }
            let mut bytes = vec![0; len as usize];
            let read = file.read_at(&mut bytes, offset)?;
            if read < bytes.len() || crc32c::crc32c(&bytes) != crc {
                return Err(Error::Corrupt("its body is not what was written".into()));
            }
            Record::decode(kind, &bytes)
        }
    }
}
