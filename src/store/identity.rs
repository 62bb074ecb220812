//! The directory of a store: whose it is, of which format, and that nobody else has it open.

use super::Store;
use crate::error::{Error, Result};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

const FORMAT: &str = "cowfs-store 1";

/// Makes the directory of a store, if there is none.
pub(super) fn make_dir(dir: &Path) -> Result<()> {
    match rustix::fs::mkdir(dir, Mode::RWXU) {
        Ok(()) => {
            // The new directory is found after a power cut only if its parent is synced.
            let parent = dir
                .parent()
                .filter(|p| !p.as_os_str().is_empty())
                .unwrap_or(Path::new("."));
            sync_dir(parent)
        }
        Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(Error::path("cannot create", dir, errno)),
    }
}

fn sync_dir(dir: &Path) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(dir, flags, Mode::empty())
        .and_then(|fd| rustix::fs::fsync(&fd))
        .map_err(|errno| Error::path("cannot sync", dir, errno))
}

fn refuse(path: &Path, why: impl Into<String>) -> Error {
    Error::Store {
        path: path.to_path_buf(),
        why: why.into(),
    }
}

impl Store {
    /// Whether there is a store at `dir`, or what is left of one.
    #[must_use]
    pub fn is_at(dir: &Path) -> bool {
        ["format", "journal"]
            .iter()
            .any(|name| dir.join(name).exists())
    }

    /// The uuid of the store at `dir`, if it can be read without opening the store.
    #[must_use]
    pub fn uuid_at(dir: &Path) -> Option<u128> {
        let path = dir.join("format");
        let text = std::fs::read_to_string(&path).ok()?;
        parse_format(&path, &text).ok()
    }
}

/// Reads the store's format file, or writes one for a new store. Returns the uuid, and the file, locked
/// against a second process.
pub(super) fn identify(dir: &Path, has_journal: bool) -> Result<(OwnedFd, u128)> {
    check_owner(dir)?;
    let path = dir.join("format");
    if !path.exists() {
        if has_journal {
            return Err(refuse(
                &path,
                "missing, though there is a journal; restore it from a backup of the store",
            ));
        }
        create_format(dir, &path)?;
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::open(&path, flags, Mode::empty())
        .map_err(|errno| Error::path("cannot open", &path, errno))?;
    match crate::sys::lock_patiently(file.as_fd()) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Err(refuse(dir, "the store is in use; unmount it first")),
        Err(errno) => return Err(Error::path("cannot lock", &path, errno)),
    }
    let text = std::fs::read(&path).map_err(|error| Error::io("cannot read", &path, &error))?;
    Ok((file, parse_format(&path, &String::from_utf8_lossy(&text))?))
}

/// Refuses a directory that is not the user's alone, before anything is made in it.
pub(super) fn check_owner(dir: &Path) -> Result<()> {
    let stat = rustix::fs::lstat(dir).map_err(|errno| Error::path("cannot stat", dir, errno))?;
    if stat.st_uid != rustix::process::geteuid().as_raw() {
        return Err(refuse(
            dir,
            "the store belongs to another user; run cowfs as that user",
        ));
    }
    if stat.st_mode & 0o077 != 0 {
        return Err(refuse(
            dir,
            "the store is open to other users; make sure that it is yours, then `chmod 700`",
        ));
    }
    Ok(())
}

fn parse_format(path: &Path, text: &str) -> Result<u128> {
    let mut lines = text.lines();
    match lines.next() {
        Some(FORMAT) => {}
        Some(other) if other.starts_with("cowfs-store ") => {
            let why = format!(
                "is \"{other}\", this release knows \"{FORMAT}\"; use the release that made it"
            );
            return Err(refuse(path, why));
        }
        _ => {
            return Err(refuse(
                path,
                format!("not the format file of a store (\"{FORMAT}\" expected)"),
            ));
        }
    }
    let uuid = lines.next().and_then(|line| line.strip_prefix("uuid "));
    let uuid = uuid
        .filter(|hex| hex.len() == 32)
        .and_then(|hex| u128::from_str_radix(hex, 16).ok());
    uuid.ok_or_else(|| {
        refuse(
            path,
            "its second line is no uuid; restore it from a backup of the store",
        )
    })
}

fn create_format(dir: &Path, path: &Path) -> Result<()> {
    use std::io::{Read, Write};
    let mut uuid = [0; 16];
    let random = Path::new("/dev/urandom");
    std::fs::File::open(random)
        .and_then(|mut file| file.read_exact(&mut uuid))
        .map_err(|error| Error::io("cannot read", random, &error))?;
    let text = format!("{FORMAT}\nuuid {:032x}\n", u128::from_le_bytes(uuid));
    let new = dir.join("format.new");
    std::fs::File::create(&new)
        .and_then(|mut file| {
            file.write_all(text.as_bytes())
                .and_then(|()| file.sync_all())
        })
        .and_then(|()| std::fs::rename(&new, path))
        .map_err(|error| Error::io("cannot write", path, &error))?;
    sync_dir(dir)
}
