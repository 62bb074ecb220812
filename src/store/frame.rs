//! Records as they stand in the log of a segment: length, checksum, number and body (docs/FORMAT.md has the table).
//! Pure: no I/O.

use super::codec::{Reader, Writer};
use crate::ids::{BLOCK, Lsn};

/// Bytes before the body of a record.
pub(super) const FRAME: usize = 24;
/// A longer body goes to the payload area, and the record says where.
pub(super) const MAX_INLINE: usize = 4096;
const SPILLED: u8 = 1;
/// What the log has of a record: its body, or where the body is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Body {
    Inline(Vec<u8>),
    /// In the payload area: byte offset in the segment, length, checksum.
    Spilled {
        offset: u64,
        len: u32,
        crc: u32,
    },
}

/// Bytes that a record with a body of `len` bytes takes in the log.
pub(super) fn frame_len(len: usize) -> usize {
    let inline = if len > MAX_INLINE { 16 } else { len };
    (FRAME + inline).next_multiple_of(8)
}

/// Bytes that the record takes in the payload area for its body.
pub(super) fn spill_len(len: usize) -> usize {
    if len > MAX_INLINE {
        len.next_multiple_of(BLOCK)
    } else {
        0
    }
}

/// Appends the record's bytes in the log to `out`.
pub(super) fn put_frame(out: &mut Vec<u8>, uuid: u128, kind: u8, body: &Body, lsn: Lsn) {
    let start = out.len();
    let mut spilled = Writer::default();
    let (flags, body) = match body {
        Body::Inline(bytes) => (0, bytes.as_slice()),
        Body::Spilled { offset, len, crc } => {
            spilled.u64(*offset);
            spilled.u32(*len);
            spilled.u32(*crc);
            (SPILLED, spilled.0.as_slice())
        }
    };
    let mut w = Writer(std::mem::take(out));
    w.u32(0);
    w.count(frame_len(body.len()));
    w.u8(kind);
    w.u8(flags);
    w.u16(0);
    w.count(body.len());
    w.u64(lsn.0);
    w.raw(body);
    *out = w.0;
    out.resize(start + frame_len(body.len()), 0);
    let crc = checksum(uuid, &out[start + 4..]);
    out[start..start + 4].copy_from_slice(&crc.to_le_bytes());
}

/// A record as it stands in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) kind: u8,
    pub(super) body: Body,
    /// Bytes in the log.
    pub(super) len: usize,
}

/// Reads the record that begins at the start of `bytes` and is to have the number `lsn`. `None` if there is
/// no such record: zeros, torn, stale, or damaged.
pub(super) fn get_frame(bytes: &[u8], uuid: u128, lsn: Lsn) -> Option<Frame> {
    let mut r = Reader(bytes);
    let (crc, len) = (r.u32().ok()?, r.u32().ok()? as usize);
    let (kind, flags) = (r.u8().ok()?, r.u8().ok()?);
    let (_, body_len, number) = (r.u16().ok()?, r.u32().ok()? as usize, r.u64().ok()?);
    if number != lsn.0 || body_len > MAX_INLINE || len != frame_len(body_len) || len > bytes.len() {
        return None;
    }
    if checksum(uuid, &bytes[4..len]) != crc {
        return None;
    }
    let mut body = Reader(r.raw(body_len).ok()?);
    let body = if flags & SPILLED == 0 {
        Body::Inline(body.0.to_vec())
    } else {
        Body::Spilled {
            offset: body.u64().ok()?,
            len: body.u32().ok()?,
            crc: body.u32().ok()?,
        }
    };
    Some(Frame { kind, body, len })
}

/// The checksum of a record: CRC-32C, begun with the store's uuid so that no bytes from elsewhere pass.
pub(super) fn checksum(uuid: u128, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&uuid.to_le_bytes()), bytes)
}

/// A checksum for each block of `bytes`.
pub(super) fn block_checksums(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks(BLOCK).map(crc32c::crc32c).collect()
}
