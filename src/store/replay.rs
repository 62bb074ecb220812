//! Reading a segment back: where its log ends, what of it is damaged.

use super::journal::lsn_at;
use super::media::{MediaFile, name_of};
use super::record::{self, Body, Record};
use crate::error::{Error, Result};
use crate::ids::Lsn;

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
    /// What cannot be read though it must once have been good.
    pub(super) damage: Vec<String>,
    /// Bytes of the log area.
    pub(super) log_area: u64,
    /// Nothing at all was ever written, or nothing of it reached the disk.
    pub(super) blank: bool,
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

    let mut position = 0;
    // Where good records begin again after bad bytes: (bad from, good from, records before).
    let mut gaps = Vec::new();
    while position < log.len() {
        let lsn = lsn_at(number, position as u32);
        let Some(frame) = record::get_frame(&log[position..], uuid, lsn) else {
            let Some(next) = next_frame(&log, position + 8, number, uuid) else {
                break;
            };
            gaps.push((position, next, out.records.len()));
            position = next;
            continue;
        };
        match decode(file, frame.kind, frame.body) {
            Ok(record) => out.records.push((lsn, record)),
            Err(why) => out
                .damage
                .push(format!("{}: record at {position}: {why}", name_of(number))),
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

/// Decides which gaps are damage and where the log ends.
fn settle(out: &mut SegmentLog, number: u32, durable: u32, gaps: Vec<(usize, usize, usize)>) {
    for (bad, good, before) in gaps {
        if out.sealed.is_none() && bad >= durable as usize {
            out.records.truncate(before);
            out.end = bad as u32;
            return;
        }
        out.damage.push(format!(
            "{}: {} bytes at {bad} are not what was written",
            name_of(number),
            good - bad
        ));
    }
}

fn log_area(file: &dyn MediaFile, number: u32, uuid: u128) -> Result<Option<u64>> {
    let mut head = [0; 256];
    let read = file.read_at(&mut head, 0)?;
    let Some(frame) = record::get_frame(&head[..read], uuid, lsn_at(number, 0)) else {
        return Ok(None);
    };
    match decode(file, frame.kind, frame.body) {
        Ok(Record::Segment { log_area, .. }) if log_area <= 1 << 30 => Ok(Some(log_area)),
        _ => Ok(None),
    }
}

/// The next good record. The number of a record is part of its checksum, so no stale bytes can pass.
fn next_frame(log: &[u8], from: usize, number: u32, uuid: u128) -> Option<usize> {
    (from..log.len()).step_by(8).find(|position| {
        record::get_frame(&log[*position..], uuid, lsn_at(number, *position as u32)).is_some()
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
