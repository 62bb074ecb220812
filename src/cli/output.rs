//! What the commands print: raw bytes of names, tables, sizes. A reader that has gone away is no error.

use crate::error::{Error, Result};
use serde::Serialize;
use std::ffi::OsStr;
use std::io::{ErrorKind, Write};
use std::os::unix::ffi::OsStrExt;

/// Prints an error or a warning as every command does.
pub(super) fn complain(message: &str) {
    // When stderr is closed there is nobody left to tell.
    let _ = writeln!(std::io::stderr(), "cowfs: {message}");
}

/// Prints one line, whatever bytes it has.
pub(super) fn line(text: impl AsRef<OsStr>) -> Result<()> {
    let mut bytes = text.as_ref().as_bytes().to_vec();
    bytes.push(b'\n');
    let mut out = std::io::stdout().lock();
    match out.write_all(&bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|error| Error::io("cannot write", "standard output", &error)),
    }
}

/// Prints a value as indented JSON.
pub(super) fn json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| Error::io("cannot write", "standard output", &error.into()))?;
    line(text)
}

/// Prints rows in columns as wide as their widest cell, the first row being the heading.
pub(super) fn table<const N: usize>(rows: &[[String; N]]) -> Result<()> {
    let widths: [usize; N] = std::array::from_fn(|column| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or(0)
    });
    for row in rows {
        let mut text = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let padding = width - cell.chars().count() + 2;
            text.push_str(cell);
            text.extend(std::iter::repeat_n(' ', padding));
        }
        line(text.trim_end())?;
    }
    Ok(())
}

/// A size for people, as in "1.5 MiB".
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// A time for people, as in "1.50 ms".
pub(super) fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.2} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

/// A name for a terminal: control characters written out, so that none can pass for something else.
pub(super) fn printable(name: &OsStr) -> String {
    let mut out = String::new();
    for c in String::from_utf8_lossy(name.as_bytes()).chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_have_units() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1024), "1.0 KiB");
        assert_eq!(size(1536 * 1024), "1.5 MiB");
        assert_eq!(size(1024 * 1024 - 1), "1.0 MiB");
        assert_eq!(size(u64::MAX), "16.0 EiB");
        assert_eq!(micros(999), "999 µs");
        assert_eq!(micros(1_500), "1.50 ms");
        assert_eq!(micros(2_000_000), "2.00 s");
    }

    #[test]
    fn control_characters_are_written_out() {
        assert_eq!(
            printable(OsStr::from_bytes(b"a\n\x1b[1m b")),
            "a\\n\\u{1b}[1m b"
        );
    }
}
