//! `trait Index`: one ordered map of bytes, in sled or in memory. The only file that names sled.
//!
//! sled 0.34 loses what it has not flushed when the process dies, its `flush` is no fsync, and it can panic
//! on damaged files. Hence: nothing is only here (the journal is the truth), [`Index::sync`] syncs the
//! files itself, and a panic becomes [`Error::Corrupt`], upon which the next open rebuilds the index.

use super::key::Pair;
use crate::error::{Error, Result};
use crate::sync::RwLock;
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::ops::Bound;
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Is shown each pair of a scan; says whether to go on.
pub(super) type Visit<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> Result<bool>;

/// An ordered map of bytes. Ranges are `from..to`, keys in ascending order.
///
/// Changes are made one at a time: nothing needs several at once (docs/FORMAT.md), and sled's batches hold
/// up readers and take five times the memory.
pub(super) trait Index: Send + Sync {
    /// The value of `key`.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>>;
    /// Shows the pairs of the range in order. Not isolated from changes made meanwhile.
    fn scan(&self, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<()>;
    /// The last pair of the range.
    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<Pair>>;
    /// Gives `key` a value.
    fn put(&self, key: &[u8], value: &[u8]) -> Result<()>;
    /// Removes `key`, if it is there.
    fn remove(&self, key: &[u8]) -> Result<()>;
    /// Makes all changes so far durable.
    fn sync(&self) -> Result<()>;
    /// Sees to it that `bytes` more can be written, before anything is: sled does not survive a full disk.
    fn ensure_room(&self, _bytes: u64) -> Result<()> {
        Ok(())
    }
    /// Bytes allocated on disk.
    fn allocated(&self) -> u64;
}

/// The index of a store that asks for none on disk.
#[derive(Debug, Default)]
pub(super) struct MemoryIndex(RwLock<BTreeMap<Vec<u8>, Vec<u8>>>);

impl Index for MemoryIndex {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        Ok(self.0.read().get(key).cloned())
    }

    fn scan(&self, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<()> {
        let mut at = Bound::Included(from.to_vec());
        loop {
            // The lock is not held while `visit` runs, which may look at the index again.
            let next = {
                let map = self.0.read();
                let range = (at.as_ref().map(Vec::as_slice), Bound::Excluded(to));
                let mut range = map.range::<[u8], _>(range);
                range.next().map(|(k, v)| (k.clone(), v.clone()))
            };
            match next {
                Some((key, value)) if visit(&key, &value)? => at = Bound::Excluded(key),
                _ => return Ok(()),
            }
        }
    }

    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<Pair>> {
        let map = self.0.read();
        let mut range = map.range::<[u8], _>((Bound::Included(from), Bound::Excluded(to)));
        Ok(range.next_back().map(|(k, v)| (k.clone(), v.clone())))
    }

    fn put(&self, key: &[u8], value: &[u8]) -> Result<()> {
        self.0.write().insert(key.to_vec(), value.to_vec());
        Ok(())
    }

    fn remove(&self, key: &[u8]) -> Result<()> {
        self.0.write().remove(key);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn allocated(&self) -> u64 {
        0
    }
}

/// The index on disk: one sled tree.
pub(super) struct SledIndex {
    db: Guarded,
    path: PathBuf,
}

/// Closed without a panic: sled unwraps the error of a last write to a filesystem that has become read-only.
struct Guarded(Option<sled::Db>);

impl Deref for Guarded {
    type Target = sled::Db;

    fn deref(&self) -> &Self::Target {
        match &self.0 {
            Some(db) => db,
            None => unreachable!("taken where it is dropped, and nowhere else"),
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let db = self.0.take();
        if let Err(error) = guarded(|| {
            drop(db);
            Ok(())
        }) {
            log::warn!("the index cannot be closed: {error}");
        }
    }
}

/// Bytes of memory that sled may use for pages.
const CACHE: u64 = 64 << 20;
/// sled lets go of its lock a moment after its last handle was dropped.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

impl SledIndex {
    /// Opens the index in the directory `path`, or makes a new one. Any error means: rebuild it.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let begun = Instant::now();
        loop {
            let config = sled::Config::new()
                .path(path)
                .cache_capacity(CACHE)
                .flush_every_ms(None);
            match guarded(|| config.open()) {
                Ok(db) => {
                    return Ok(Self {
                        db: Guarded(Some(db)),
                        path: path.to_path_buf(),
                    });
                }
                Err(error)
                    if error.to_string().contains("lock") && begun.elapsed() < LOCK_PATIENCE =>
                {
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(error) => return Err(error),
            }
        }
    }
}

impl SledIndex {
    /// Whether an earlier process could not read the index at `path`.
    pub(super) fn is_condemned(path: &Path) -> bool {
        mark(path).exists()
    }

    /// Marks the index at `path` as bad, so that the next open rebuilds it.
    pub(super) fn condemn(path: &Path) -> Result<()> {
        let mark = mark(path);
        std::fs::write(&mark, "the index is not what the journal says\n")
            .map_err(|e| Error::io("cannot write", &mark, &e))
    }

    /// Takes back that the index at `path` is bad, after it was removed.
    pub(super) fn pardon(path: &Path) -> Result<()> {
        match std::fs::remove_file(mark(path)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("cannot remove", mark(path), &e))
            }
            _ => Ok(()),
        }
    }

    /// Runs sled; if that fails, has the next open rebuild the index.
    fn run<T>(&self, run: impl FnOnce() -> sled::Result<T>) -> Result<T> {
        guarded(run).inspect_err(|error| {
            log::error!("{error}");
            if matches!(error, Error::Corrupt(_)) {
                // If the mark cannot be made, the next open finds the damage by itself or meets it again.
                let _ = std::fs::write(mark(&self.path), "the index could not be read\n");
            }
        })
    }
}

fn mark(path: &Path) -> PathBuf {
    path.with_extension("bad")
}

/// Runs sled; its errors and panics are [`Error::Corrupt`], or the errno if it met one.
fn guarded<T>(run: impl FnOnce() -> sled::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => Ok(value),
        // What its own threads meet comes without a number.
        Ok(Err(sled::Error::Io(error)))
            if error.raw_os_error().is_some() || error.kind() == ErrorKind::StorageFull =>
        {
            Err(Error::io("cannot use", "index", &error))
        }
        Ok(Err(error)) => Err(Error::Corrupt(format!("index: {error}"))),
        Err(_) => Err(Error::Corrupt("index: sled gave up on its files".into())),
    }
}

impl Index for SledIndex {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        Ok(self.run(|| self.db.get(key))?.map(|value| value.to_vec()))
    }

    fn scan(&self, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<()> {
        let mut range = self.db.range::<&[u8], _>(from..to);
        while let Some((key, value)) = self.run(|| range.next().transpose())? {
            if !visit(&key, &value)? {
                break;
            }
        }
        Ok(())
    }

    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<Pair>> {
        let mut range = self.db.range::<&[u8], _>(from..to);
        let last = self.run(|| range.next_back().transpose())?;
        Ok(last.map(|(key, value)| (key.to_vec(), value.to_vec())))
    }

    fn put(&self, key: &[u8], value: &[u8]) -> Result<()> {
        self.run(|| self.db.insert(key, value)).map(drop)
    }

    fn remove(&self, key: &[u8]) -> Result<()> {
        self.run(|| self.db.remove(key)).map(drop)
    }

    fn sync(&self) -> Result<()> {
        self.run(|| self.db.flush())?;
        sync_tree(&self.path)
    }

    fn ensure_room(&self, bytes: u64) -> Result<()> {
        let path = self.path.join("db");
        let failed = |errno| Error::path("cannot set space aside in", &path, errno);
        let flags = OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = rustix::fs::open(&path, flags, Mode::empty()).map_err(failed)?;
        let stat = rustix::fs::fstat(&file).map_err(failed)?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        // Set aside in better times.
        if u64::try_from(stat.st_blocks).unwrap_or(0) * 512 >= size + bytes {
            return Ok(());
        }
        let flags = FallocateFlags::KEEP_SIZE;
        match retry_on_intr(|| rustix::fs::fallocate(&file, flags, size, bytes)) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(errno) => Err(failed(errno)),
        }
    }

    fn allocated(&self) -> u64 {
        allocated(&self.path)
    }
}

/// Syncs every file below `dir`, and the directories. sled may remove files meanwhile.
fn sync_tree(dir: &Path) -> Result<()> {
    let failed = |error: std::io::Error| Error::io("cannot sync", dir, &error);
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_type().map_err(failed)?.is_dir() {
            sync_tree(&entry.path())?;
        } else {
            sync_path(&entry.path(), OFlags::empty())?;
        }
    }
    sync_path(dir, OFlags::DIRECTORY)
}

fn sync_path(path: &Path, flags: OFlags) -> Result<()> {
    let flags = flags | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(fd) => rustix::fs::fsync(&fd).map_err(|errno| Error::path("cannot sync", path, errno)),
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(Error::path("cannot sync", path, errno)),
    }
}

pub(super) fn allocated(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => allocated(&entry.path()),
        Ok(meta) => meta.blocks() * 512,
        Err(_) => 0,
    });
    sizes.sum()
}
