//! The pairing of a directory and its store (C12).
//!
//! What a store keeps names objects by the inode numbers and handles of one filesystem, and its other half, the retained
//! objects, is in the directory. So `.cowfs/store-id` says which store belongs to the directory, and which directory that
//! was written for: of a copy, or what was restored from one, the snapshots would show what happens to have these numbers.

use super::backing::{self, Backing};
use crate::error::{Error, Result};
use crate::store::{ObjectHandle, Store, Timestamp};
use crate::sys;
use rustix::fd::AsFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// What stands in `.cowfs/store-id`, a line each; the first stores have the first alone, later ones two.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Mark {
    /// The store's uuid.
    store: u128,
    /// The handle of `.cowfs`.
    hidden: Option<ObjectHandle>,
    /// When `.cowfs` was made, which nobody can set: on btrfs two filesystems give the same handles.
    born: Option<Timestamp>,
    /// The handle of the directory: `.cowfs` may have been moved into another.
    root: Option<ObjectHandle>,
    /// The handle of the store's session file, which changes with each session: who puts an older store back over a
    /// newer one by name makes it anew. Not of a store on another filesystem: it may be moved to a larger one, and handles
    /// there need not last.
    session: Option<ObjectHandle>,
    /// How often the session file had been written when the store was last used with the directory, or left: who has an
    /// older state of it, as a copy that is not in use any more, is told.
    sequence: Option<u64>,
}

/// More often than this no session file is written.
const MOST_WRITES: u64 = 1 << 60;

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

    /// That of this directory, with a store that is in use.
    fn of(backing: &Backing, store: &Store, at: &Path) -> Result<Self> {
        Ok(Self {
            store: store.uuid(),
            hidden: Some(backing.hidden_handle()?),
            born: backing.hidden_birth()?,
            root: Some(backing.root_entry().handle.clone()),
            session: session_of(backing, at)?.map(|(handle, _)| handle),
            sequence: store.sequence(),
        })
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let mut mark = Self {
            store: u128::from_str_radix(lines.next()?, 16).ok()?,
            hidden: match lines.next() {
                Some(line) => Some(parse_handle(line)?),
                None => None,
            },
            ..Self::default()
        };
        for line in lines {
            // Later programs may say more.
            match line.split_once(' ')? {
                ("born", time) => mark.born = Some(parse_time(time)?),
                ("root", handle) => mark.root = Some(parse_handle(handle)?),
                ("session", handle) => mark.session = Some(parse_handle(handle)?),
                ("sequence", number) => {
                    let number = number.parse().ok();
                    mark.sequence = Some(number.filter(|number| *number < MOST_WRITES)?);
                }
                _ => {}
            }
        }
        Some(mark)
    }

    fn text(&self) -> String {
        let mut text = format!("{:032x}\n", self.store);
        let handle = |handle: &ObjectHandle| {
            let digits: String = handle
                .bytes
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            format!("{:x}:{digits}\n", handle.kind)
        };
        text.extend(self.hidden.as_ref().map(handle));
        let born = self
            .born
            .map(|at| format!("born {}.{:09}\n", at.sec, at.nsec));
        text.extend(born);
        text.extend(
            self.root
                .as_ref()
                .map(|root| format!("root {}", handle(root))),
        );
        text.extend(
            self.session
                .as_ref()
                .map(|file| format!("session {}", handle(file))),
        );
        text.extend(self.sequence.map(|number| format!("sequence {number}\n")));
        text
    }

    /// Whether it was written for this directory.
    fn is_of(&self, backing: &Backing) -> Result<bool> {
        let hidden = match &self.hidden {
            Some(handle) => backing.is_hidden_dir(handle)?,
            None => true,
        };
        let root = match &self.root {
            Some(handle) => backing.is_root(handle)?,
            None => true,
        };
        let born = match (self.born, backing.hidden_birth()?) {
            (Some(noted), Some(found)) => noted == found,
            _ => true,
        };
        Ok(hidden && root && born)
    }

    /// Whether the store at `at` is the one that was last in use here, and not an older state of it. One without a
    /// session file knows nothing of the last session, which makes all snapshots suspect.
    fn is_last(&self, backing: &Backing, at: &Path) -> Result<bool> {
        match (&self.session, session_of(backing, at)?) {
            (Some(known), Some((_, file))) => backing::is_object(file.as_fd(), known, file.as_fd()),
            _ => Ok(true),
        }
    }

    /// Whether the store at `at` is an older state of the one that was last in use here.
    fn is_older(&self, at: &Path) -> Result<bool> {
        let Some(noted) = self.sequence else {
            return Ok(false);
        };
        Ok(sequence_of(at, self.store)?.is_some_and(|found| found < noted))
    }
}

fn parse_handle(text: &str) -> Option<ObjectHandle> {
    let (kind, bytes) = text.split_once(':')?;
    let digits = bytes.as_bytes().chunks(2);
    let byte = |two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok();
    Some(ObjectHandle {
        kind: i32::from_str_radix(kind, 16).ok()?,
        bytes: digits.map(byte).collect::<Option<Vec<u8>>>()?.into(),
    })
}

fn parse_time(text: &str) -> Option<Timestamp> {
    let (sec, nsec) = text.split_once('.')?;
    Some(Timestamp {
        sec: sec.parse().ok()?,
        nsec: nsec.parse().ok()?,
    })
}

/// The session file of the store at `at`, if there is one.
fn open_session(at: &Path) -> Result<Option<File>> {
    let path = at.join("journal/session");
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    match rustix::fs::open(&path, flags, Mode::empty()) {
        Ok(file) => Ok(Some(file.into())),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
        Err(errno) => Err(Error::path("cannot open", &path, errno)),
    }
}

/// What the session file of the store `uuid` at `at` says of how often it was written.
fn sequence_of(at: &Path, uuid: u128) -> Result<Option<u64>> {
    Ok(open_session(at)?.and_then(|file| Store::sequence_in(&file, uuid)))
}

/// The session file of the store at `at` and its handle, if there is one that is in use and on the filesystem of the
/// directory. One that somebody has made by opening the store, without a session, is empty.
fn session_of(backing: &Backing, at: &Path) -> Result<Option<(ObjectHandle, File)>> {
    let Some(file) = open_session(at)? else {
        return Ok(None);
    };
    let here = sys::device(backing.root())? == sys::device(file.as_fd())?;
    if !here || rustix::fs::fstat(&file)?.st_size == 0 {
        return Ok(None);
    }
    Ok(Some((backing::handle_of(file.as_fd())?, file)))
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

const OF_ANOTHER: &str = "is that of another directory, of which this one is a copy, or from which its .cowfs was moved: the \
    snapshots cannot be read here. `cowfs destroy --yes` makes it a plain directory";
const PUT_BACK: &str = "was put back from a backup: its snapshots are of files that are not here. \
    `cowfs destroy --yes` makes the directory a plain one";
const OLDER: &str = "is an older state of the store of this directory, put back from a backup or a copy that is not in use any \
    more: its snapshots would be wrong. Pass the store= that was used last (or give the snapshots up: `cowfs destroy --yes`)";
const ELSEWHERE: &str = "is not the store of this directory, whose snapshots are kept elsewhere; pass the same store= as before \
    (or give them up: `cowfs destroy --yes`)";

/// Refuses, before anything is made or opened, a directory whose store is not at `store`, or is that of another directory;
/// `shown` is what the user calls that place. Returns how often the session file of the store was written at least.
///
/// # Errors
/// [`Error::Store`].
pub fn check(backing: &Backing, store: &Path, shown: &Path) -> Result<Option<u64>> {
    match Mark::read(&backing.hidden_path()).map_err(|error| backing.named(error))? {
        None => Ok(None),
        Some(mark) if !mark.is_of(backing)? => Err(refusal(shown, OF_ANOTHER)),
        Some(_) if !Store::is_at(store) => Err(refusal(shown, ELSEWHERE)),
        // That of another store is refused when it is open.
        Some(mark)
            if Store::uuid_at(store) == Some(mark.store) && !mark.is_last(backing, store)? =>
        {
            Err(refusal(shown, PUT_BACK))
        }
        Some(mark) if Store::uuid_at(store) == Some(mark.store) && mark.is_older(store)? => {
            Err(refusal(shown, OLDER))
        }
        Some(mark) => Ok(mark.sequence),
    }
}

/// To be called before the store at `at` is opened, which makes a session file where there is none: what is noted of one
/// that is gone must not outlive it, or the new one would be refused.
///
/// # Errors
/// Those of writing.
pub fn forget_lost_session(backing: &Backing, at: &Path) -> Result<()> {
    forget_in(backing, at).map_err(|error| backing.named(error))
}

fn forget_in(backing: &Backing, at: &Path) -> Result<()> {
    let hidden = backing.hidden_path();
    let forgotten = match Mark::read(&hidden)? {
        Some(mark)
            if mark.session.is_some()
                // That of another store is refused when it is open.
                && Store::uuid_at(at) == Some(mark.store)
                && session_of(backing, at)?.is_none() =>
        {
            Mark {
                session: None,
                ..mark
            }
        }
        _ => return Ok(()),
    };
    let path = path_of(&hidden);
    write_durably(&path, forgotten.text().as_bytes())
        .map_err(|e| Error::io("cannot write", &path, &e))
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

/// Notes that they do belong together, as [`check_store`] has found, when the session has begun; and, if the store is `used`,
/// how often its session file was written, so that no older state of it is accepted from now on. `shown` is what the user
/// calls the store at `at`.
///
/// # Errors
/// Those of reading and writing the mark.
pub fn pair(
    backing: &Backing,
    store: &Store,
    (at, shown): (&Path, &Path),
    used: bool,
) -> Result<()> {
    pair_in(backing, store, (at, shown), used).map_err(|error| backing.named(error))
}

fn pair_in(
    backing: &Backing,
    store: &Store,
    (at, shown): (&Path, &Path),
    used: bool,
) -> Result<()> {
    let hidden = backing.hidden_path();
    let old = Mark::read(&hidden)?;
    let mut mark = Mark::of(backing, store, at)?;
    if !used {
        mark.sequence = old.as_ref().and_then(|old| old.sequence);
    }
    let path = path_of(&hidden);
    match old {
        Some(old) if old == mark => Ok(()),
        Some(old) => {
            let is_of_it = Mark {
                sequence: mark.sequence,
                ..old
            } == mark;
            // It was good enough so far, and the disk may be full.
            if let Err(error) = write_durably(&path, mark.text().as_bytes()) {
                let level = if is_of_it {
                    log::Level::Debug
                } else {
                    log::Level::Warn
                };
                log::log!(
                    level,
                    "{}: that it is of this directory cannot be noted: {error}",
                    shown.display()
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
            let handle = ObjectHandle {
                kind: 0x81,
                bytes: bytes.into(),
            };
            let mark = Mark {
                store: 5 << 100,
                hidden: Some(handle.clone()),
                ..Mark::default()
            };
            assert_eq!(Mark::parse(&mark.text()).as_ref(), Some(&mark));
            let whole = Mark {
                born: Some(Timestamp { sec: -3, nsec: 7 }),
                root: Some(handle.clone()),
                session: Some(handle),
                sequence: Some(MOST_WRITES - 1),
                ..mark
            };
            assert_eq!(Mark::parse(&whole.text()).as_ref(), Some(&whole));
            let more = whole.text() + "planet earth\n";
            assert_eq!(Mark::parse(&more), Some(whole));
        }
        let alone = Mark {
            store: u128::MAX,
            ..Mark::default()
        };
        assert_eq!(alone.text().len(), 33);
        assert_eq!(Mark::parse(&alone.text()), Some(alone));
        for damaged in [
            "",
            "\n",
            "x\n",
            "1\n81\n",
            "1\n81:0g\n",
            "1\n:00\n",
            "1\n81:00\nroot\n",
            "1\n81:00\nroot 81\n",
            "1\n81:00\nborn 7\n",
            "1\n81:00\nsequence x\n",
            "1\n81:00\nsequence 18446744073709551615\n",
        ] {
            assert_eq!(Mark::parse(damaged), None, "{damaged:?}");
        }
    }
}
