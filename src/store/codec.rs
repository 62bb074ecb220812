//! Little-endian bytes in and out, with bounds: the base of record.rs and key.rs. Pure.

use crate::error::{Error, Result};

/// Appends little-endian fields to a vector.
#[derive(Debug, Default)]
pub(super) struct Writer(pub(super) Vec<u8>);

impl Writer {
    pub(super) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(super) fn u16(&mut self, value: u16) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn raw(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// A length in 32 bits, then the bytes. Nothing that the store keeps comes near 4 GiB.
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.raw(bytes);
    }

    pub(super) fn count(&mut self, count: usize) {
        self.u32(u32::try_from(count).unwrap_or(u32::MAX));
    }
}

/// Takes little-endian fields from a slice; whatever is missing or too long is [`Error::Corrupt`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn raw(&mut self, len: usize) -> Result<&'a [u8]> {
        let Some((head, tail)) = self.0.split_at_checked(len) else {
            return Err(Error::Corrupt(format!(
                "{len} bytes expected, {} left",
                self.0.len()
            )));
        };
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.raw(N)?);
        Ok(out)
    }

    pub(super) fn u8(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    pub(super) fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(super) fn u128(&mut self) -> Result<u128> {
        Ok(u128::from_le_bytes(self.array()?))
    }

    /// A big-endian number, as in keys.
    pub(super) fn be64(&mut self) -> Result<u64> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// A big-endian number, as in keys.
    pub(super) fn be16(&mut self) -> Result<u16> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    /// A big-endian number, as in keys.
    pub(super) fn be32(&mut self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub(super) fn bytes(&mut self, max: usize) -> Result<&'a [u8]> {
        let len = self.u32()? as usize;
        if len > max {
            return Err(Error::Corrupt(format!(
                "a field of {len} bytes where at most {max} can be"
            )));
        }
        self.raw(len)
    }

    /// A count of items of at least `least` bytes each: never more than the rest of the slice can hold,
    /// so that a hostile count cannot make the reader allocate.
    pub(super) fn count(&mut self, least: usize) -> Result<usize> {
        let count = self.u32()? as usize;
        if count > self.0.len() / least.max(1) {
            return Err(Error::Corrupt(format!(
                "{count} items in {} bytes",
                self.0.len()
            )));
        }
        Ok(count)
    }

    /// Fails unless everything has been taken.
    pub(super) fn end(self) -> Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        Err(Error::Corrupt(format!("{} bytes too many", self.0.len())))
    }
}
