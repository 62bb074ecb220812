//! How much space snapshots may take, and what gives way when there is none left.

use crate::error::{Error, Result};

/// A limit below this is refused: a store with a single record takes several MiB.
pub const LEAST_LIMIT: u64 = 32 << 20;

/// What gives way when a pre-image finds no room (C9).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnFull {
    /// Snapshots: the oldest are deleted, then the newest becomes invalid.
    #[default]
    Drop,
    /// Snapshots: those that would miss the pre-image become invalid, and none is deleted.
    Invalidate,
    /// The change: it fails with `ENOSPC`.
    Enospc,
}

impl OnFull {
    /// The word that the option and `cowfs status` use.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Drop => "drop",
            Self::Invalidate => "invalidate",
            Self::Enospc => "enospc",
        }
    }
}

/// What must stay free on the filesystem of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reserve {
    /// So many bytes.
    Bytes(u64),
    /// So many hundredths of its size.
    Percent(u8),
}

impl Default for Reserve {
    fn default() -> Self {
        Self::Bytes(0)
    }
}

impl Reserve {
    /// In bytes, of a filesystem of `total` bytes.
    #[must_use]
    pub fn of(self, total: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => total / 100 * u64::from(percent),
        }
    }
}

impl std::fmt::Display for Reserve {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "{bytes}"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

/// How much space snapshots may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SpacePolicy {
    /// Bytes that the store and the retained files may take; `None`: what the disk has.
    pub limit: Option<u64>,
    /// What must stay free on the filesystem of the store.
    pub reserve: Reserve,
    /// What gives way.
    pub on_full: OnFull,
}

pub(super) fn on_full(value: &[u8]) -> Result<OnFull> {
    match value {
        b"drop" => Ok(OnFull::Drop),
        b"invalidate" => Ok(OnFull::Invalidate),
        b"enospc" => Ok(OnFull::Enospc),
        _ => Err(Error::Usage(format!(
            "invalid on-full {:?}; choose drop, invalidate or enospc",
            super::parse::lossy(value)
        ))),
    }
}

pub(super) fn limit(value: &[u8]) -> Result<u64> {
    size(value)
        .filter(|bytes| *bytes >= LEAST_LIMIT)
        .ok_or_else(|| {
            Error::Usage(format!(
                "invalid store-limit {:?}; give a size of at least 32M, as in 500M, 20G or 1T",
                super::parse::lossy(value)
            ))
        })
}

pub(super) fn reserve(value: &[u8]) -> Result<Reserve> {
    let parsed = match value.strip_suffix(b"%") {
        Some(percent) => std::str::from_utf8(percent)
            .ok()
            .and_then(|text| text.parse().ok())
            .filter(|percent| *percent < 100)
            .map(Reserve::Percent),
        None => size(value).map(Reserve::Bytes),
    };
    parsed.ok_or_else(|| {
        Error::Usage(format!(
            "invalid store-reserve {:?}; give a size, as in 500M or 20G, or a part of the disk below 100%, as in 5%",
            super::parse::lossy(value)
        ))
    })
}

/// A number of bytes, with one of the suffixes K, M, G and T for powers of 1024.
fn size(value: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(value).ok()?;
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        b'T' | b't' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(size(b"4096"), Some(4096));
        assert_eq!(size(b"3K"), Some(3072));
        assert_eq!(size(b"2g"), Some(2 << 30));
        assert_eq!(size(b"1T"), Some(1 << 40));
        for wrong in ["", "K", "-1", "+1", "1.5G", "1KB", "99999999T", "1 G"] {
            assert_eq!(size(wrong.as_bytes()), None, "{wrong}");
        }
        assert_eq!(limit(b"32M").unwrap(), LEAST_LIMIT);
        assert_eq!(limit(b"31M").unwrap_err().exit_code(), 2);
    }

    #[test]
    fn a_reserve_is_a_size_or_a_part() {
        assert_eq!(reserve(b"5%").unwrap().of(1000), 50);
        assert_eq!(reserve(b"1K").unwrap().of(1000), 1024);
        for wrong in ["%", "100%", "-5%", "5%%", "much"] {
            assert_eq!(
                reserve(wrong.as_bytes()).unwrap_err().exit_code(),
                2,
                "{wrong}"
            );
        }
    }
}
