//! What a fuzzer calls: each function takes any bytes, and panics only if cowfs has a bug.

use super::frame::{self, Body, MAX_INLINE};
use super::journal::lsn_at;
use super::key::{self, IndexState, Piece, Touch};
use super::media::MediaFile;
use super::record::Record;
use super::replay::{read_record, read_segment};
use crate::error::Result;
use crate::sync::Mutex;

const UUID: u128 = 0x00c0_ffee;
/// Bytes of the log of the segments that are read.
const LOG_AREA: u64 = 16 << 10;

/// A file that is all of the input.
struct Bytes(Mutex<Vec<u8>>);

impl MediaFile for Bytes {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let bytes = self.0.lock();
        let from = usize::try_from(offset)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        let len = buf.len().min(bytes.len() - from);
        buf[..len].copy_from_slice(&bytes[from..from + len]);
        Ok(len)
    }

    fn write_at(&self, _: &[u8], _: u64) -> Result<()> {
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn punch(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn size(&self) -> Result<u64> {
        Ok(self.0.lock().len() as u64)
    }
}

/// The body of one record; its first byte is the type. What decodes encodes to the same value again.
pub fn record(data: &[u8]) {
    let Some((kind, body)) = data.split_first() else {
        return;
    };
    let Ok(record) = Record::decode(*kind % 10, body) else {
        return;
    };
    let again = Record::decode(record.kind(), &record.body());
    assert_eq!(
        again.ok().as_ref(),
        Some(&record),
        "a record changes by being written"
    );
    for (key, value) in key::pairs_of(&record, lsn_at(1, 64)) {
        assert!(
            key::check(&key, &value).is_ok(),
            "the index of a record cannot be read: {record:?}"
        );
    }
}

/// A segment as it stands on the disk.
pub fn segment(data: &[u8]) {
    read(data.to_vec());
}

/// A segment with good checksums around hostile bodies: type, flags, two bytes of length, body, and so on.
pub fn framed(data: &[u8]) {
    let header = Record::Segment {
        uuid: UUID,
        number: 1,
        log_area: LOG_AREA,
    };
    let mut log = Vec::new();
    put(&mut log, header.kind(), Body::Inline(header.body()));
    let mut rest = data;
    while let [kind, flags, a, b, tail @ ..] = rest {
        let len = usize::from(u16::from_le_bytes([*a, *b]))
            .min(tail.len())
            .min(MAX_INLINE);
        let (body, after) = tail.split_at(len);
        rest = after;
        let body = match (flags & 1, body) {
            (1, [offset @ .., c, d, e, f]) if offset.len() >= 8 => {
                let mut number = [0; 8];
                number.copy_from_slice(&offset[..8]);
                // Often within the file, and often with the checksum that is right for zeros.
                let offset = u64::from_le_bytes(number) % (4 * LOG_AREA);
                let len = u32::from_le_bytes([*c, *d, *e, *f]);
                let crc = crc32c::crc32c(&vec![0; (len % 8192) as usize]);
                Body::Spilled { offset, len, crc }
            }
            _ => Body::Inline(body.to_vec()),
        };
        put(&mut log, *kind % 10, body);
    }
    log.truncate(LOG_AREA as usize);
    log.resize(3 * LOG_AREA as usize, 0);
    read(log);
}

fn put(log: &mut Vec<u8>, kind: u8, body: Body) {
    let lsn = lsn_at(1, log.len() as u32);
    frame::put_frame(log, UUID, kind, &body, lsn);
}

fn read(bytes: Vec<u8>) {
    let file = Bytes(Mutex::new(bytes));
    let Ok(log) = read_segment(&file, 1, UUID, 0, LOG_AREA) else {
        return;
    };
    for (lsn, record) in &log.records {
        for (key, value) in key::pairs_of(record, *lsn) {
            assert!(key::check(&key, &value).is_ok(), "{record:?}");
        }
        assert_eq!(
            read_record(&file, UUID, *lsn).ok().flatten().as_ref(),
            Some(record)
        );
    }
}

/// An entry of the index: the length of the key, the key, the value.
pub fn entry(data: &[u8]) {
    let Some((len, rest)) = data.split_first() else {
        return;
    };
    let (key, value) = rest.split_at(usize::from(*len).min(rest.len()));
    let _ = key::footprint(key, value);
    let _ = (
        IndexState::parse(value),
        key::parse_table(value),
        key::parse_usage(key, value),
    );
    let _ = Touch::parse(key);
    if key::check(key, value).is_ok()
        && key.first() == Some(&b'd')
        && let Ok(piece) = Piece::parse(key, value)
    {
        assert_eq!((piece.key(), piece.value()), (key.to_vec(), value.to_vec()));
        let range = piece.range();
        let _ = piece.part(range.start..range.end);
    }
}
