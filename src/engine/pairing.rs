//! The pairing of a directory and its store (C12).
//!
//! What a store keeps names objects by the inode numbers and handles of one filesystem, and its other half, the retained
//! objects, is in the directory. So `.cowfs/store-id` says which store belongs to the directory, and which directory that
//! was written for: of a copy, or what was restored from one, the snapshots would show what happens to have these numbers.

use super::backing::Backing;
use crate::error::{Error, Result};
use crate::store::{ObjectHandle, Store};
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// What stands in `.cowfs/store-id`: a line for the store, and one for the directory, which the first stores do not have.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mark {
    store: u128,
    directory: Option<ObjectHandle>,
}

impl Mark {
    /// That of the hidden directory at `hidden`, if there is one.
    fn read(hidden: &Path) -> Result<Option<Self>> {
        let path = path_of(hidden);
        match std::fs::read(&path) {
            Ok(text) => Self::parse(&String::from_utf8_lossy(&text))
                .map(Some)
                .ok_or_else(|| Error::Store {
                    path,
                    why: "does not say what it should, and may be damaged".into(),
                }),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io("cannot read", &path, &e)),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let store = u128::from_str_radix(lines.next()?, 16).ok()?;
        let directory = match lines.next() {
            None => None,
            Some(line) => {
                let (kind, bytes) = line.split_once(':')?;
                let digits = bytes.as_bytes().chunks(2);
                let byte = |two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok();
                Some(ObjectHandle {
                    kind: i32::from_str_radix(kind, 16).ok()?,
                    bytes: digits.map(byte).collect::<Option<Vec<u8>>>()?.into(),
                })
            }
        };
        Some(Self { store, directory })
    }

    fn text(&self) -> String {
        let mut text = format!("{:032x}\n", self.store);
        if let Some(handle) = &self.directory {
            // Writing to a String does not fail.
            let _ = write!(text, "{:x}:", handle.kind);
            for byte in &*handle.bytes {
                let _ = write!(text, "{byte:02x}");
            }
            text.push('\n');
        }
        text
    }

    /// Whether it was written for this directory.
    fn is_of(&self, backing: &Backing) -> Result<bool> {
        match &self.directory {
            Some(handle) => backing.is_hidden_dir(handle),
            None => Ok(true),
        }
    }
}

/// What it is called until it is written, as `check` knows leftovers.
const NEW: &str = ".tmp-store-id";

fn path_of(hidden: &Path) -> PathBuf {
    hidden.join("store-id")
}

fn refusal(store: &Path, why: &str) -> Error {
    Error::Store {
        path: store.to_path_buf(),
        why: why.into(),
    }
}

const OF_ANOTHER: &str = "is that of another directory, of which this one is a copy: its snapshots cannot be read here. \
    `cowfs destroy --yes` makes it a plain directory";
const ELSEWHERE: &str = "is not the store of this directory, whose snapshots are kept elsewhere; pass the same store= as before \
    (or give them up: `cowfs destroy --yes`)";

/// Refuses, before anything is made or opened, a directory whose store is not at `store`, or is that of another directory;
/// `shown` is what the user calls that place.
///
/// # Errors
/// [`Error::Store`].
pub fn check(backing: &Backing, store: &Path, shown: &Path) -> Result<()> {
    match Mark::read(&backing.hidden_path()).map_err(|error| backing.named(error))? {
        None => Ok(()),
        Some(mark) if !mark.is_of(backing)? => Err(refusal(shown, OF_ANOTHER)),
        Some(_) if !Store::is_at(store) => Err(refusal(shown, ELSEWHERE)),
        Some(_) => Ok(()),
    }
}

/// Whether the directory and the store, which is at `at`, belong together; `hidden` is the directory's `.cowfs`.
///
/// # Errors
/// [`Error::Store`] when either belongs to another.
pub fn check_store(hidden: &Path, store: &Store, at: &Path) -> Result<()> {
    match Mark::read(hidden)? {
        Some(mark) if mark.store == store.uuid() => Ok(()),
        Some(_) => Err(refusal(at, ELSEWHERE)),
        None if store.epoch().0 == 0 => Ok(()),
        None => Err(refusal(
            at,
            "belongs to another directory: this one has no store-id in its .cowfs; choose an empty store=",
        )),
    }
}

/// As [`check_store`], and notes that they do belong together the first time.
///
/// # Errors
/// As [`check_store`], and those of writing.
pub fn pair(backing: &Backing, store: &Store, at: &Path) -> Result<()> {
    pair_in(backing, store, at).map_err(|error| backing.named(error))
}

fn pair_in(backing: &Backing, store: &Store, at: &Path) -> Result<()> {
    let hidden = backing.hidden_path();
    check_store(&hidden, store, at)?;
    let mark = Mark {
        store: store.uuid(),
        directory: Some(backing.hidden_handle()?),
    };
    let path = path_of(&hidden);
    match Mark::read(&hidden)? {
        Some(old) if old.directory.is_some() => Ok(()),
        Some(_) => {
            // It was good enough so far, and the disk may be full.
            if let Err(error) = write_durably(&path, mark.text().as_bytes()) {
                log::warn!(
                    "{}: that it is of this directory cannot be noted: {error}",
                    at.display()
                );
            }
            Ok(())
        }
        None => write_durably(&path, mark.text().as_bytes())
            .map_err(|e| Error::io("cannot write", &path, &e)),
    }
}

/// Writes a small file under a temporary name, syncs it, and gives it its name.
fn write_durably(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let new = dir.join(NEW);
    let mut file = File::create(&new)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    if let Err(error) = written.and_then(|()| std::fs::rename(&new, path)) {
        // Nothing is lost with it.
        let _ = std::fs::remove_file(&new);
        return Err(error);
    }
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for bytes in [vec![], vec![0], vec![1, 0xfe, 0x80]] {
            let directory = Some(ObjectHandle {
                kind: 0x81,
                bytes: bytes.into(),
            });
            let mark = Mark {
                store: 5 << 100,
                directory,
            };
            assert_eq!(Mark::parse(&mark.text()), Some(mark));
        }
        let alone = Mark {
            store: u128::MAX,
            directory: None,
        };
        assert_eq!(alone.text().len(), 33);
        assert_eq!(Mark::parse(&alone.text()), Some(alone));
        for damaged in ["", "\n", "x\n", "1\n81\n", "1\n81:0g\n", "1\n:00\n"] {
            assert_eq!(Mark::parse(damaged), None, "{damaged:?}");
        }
    }
}
