//! Opening a store without changing it: the index is a copy, and what would be written to the journal is kept
//! in memory.

use super::Store;
use super::identity::identify;
use super::media::{FileMedia, Media, MediaFile};
use super::types::StoreOptions;
use crate::error::{Error, Result};
use crate::sync::{Arc, Mutex};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::path::Path;

/// A store that was opened to be looked at.
pub struct Examined {
    /// The store, as a mount would find it.
    pub store: Store,
    /// Where the copy of its index is.
    _copy: tempfile::TempDir,
}

impl Store {
    /// Opens the store at `dir` as a mount would, with its lock, but changes nothing in it. The index is
    /// copied to the directory for temporary files, which must have room for it.
    ///
    /// # Errors
    /// As [`Store::open`]; [`Error::Store`] if there is none.
    pub fn examine(dir: &Path, options: StoreOptions) -> Result<Examined> {
        let journal = dir.join("journal");
        for needed in [&dir.join("format"), &journal] {
            if !needed.exists() {
                return Err(Error::Store {
                    path: needed.clone(),
                    why: "missing; there is no store here, or it must be restored from a backup"
                        .into(),
                });
            }
        }
        let media = FileMedia::open(&journal)?;
        let (lock, uuid) = identify(dir, true)?;
        let copy = tempfile::tempdir()
            .map_err(|e| Error::io("cannot make a directory in", std::env::temp_dir(), &e))?;
        for name in ["index", "index.bad"] {
            let from = dir.join(name);
            if from.exists() {
                copy_tree(&from, &copy.path().join(name))?;
            }
        }
        let session = match journal.join("session").exists() {
            true => Some(media.session()?),
            false => None,
        };
        let media = Arc::new(ScratchMedia {
            session: Arc::new(ScratchFile {
                beneath: session,
                written: Mutex::default(),
            }),
            beneath: media,
            files: Mutex::default(),
        });
        Ok(Examined {
            store: Self::open_locked(copy.path(), options, media, lock, uuid)?,
            _copy: copy,
        })
    }
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    let failed =
        |e: std::io::Error| Error::io("cannot copy the index: make room, or set TMPDIR:", to, &e);
    if !from.is_dir() {
        return std::fs::copy(from, to).map(drop).map_err(failed);
    }
    std::fs::create_dir(to).map_err(failed)?;
    for entry in std::fs::read_dir(from).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        copy_tree(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}

/// A journal whose changes are kept in memory.
struct ScratchMedia {
    session: Arc<ScratchFile>,
    beneath: FileMedia,
    /// Files that have been opened; `None` for those removed.
    files: Mutex<BTreeMap<u32, Option<Arc<ScratchFile>>>>,
}

impl Media for ScratchMedia {
    fn session(&self) -> Result<Arc<dyn MediaFile>> {
        Ok(self.session.clone())
    }

    fn list(&self) -> Result<Vec<u32>> {
        let mut numbers = self.beneath.list()?;
        let files = self.files.lock();
        numbers.retain(|number| !matches!(files.get(number), Some(None)));
        let made = files
            .iter()
            .filter(|(number, file)| file.is_some() && !numbers.contains(number));
        let made: Vec<u32> = made.map(|(number, _)| *number).collect();
        numbers.extend(made);
        Ok(numbers)
    }

    fn create(&self, number: u32) -> Result<Arc<dyn MediaFile>> {
        let file = Arc::new(ScratchFile::default());
        self.files.lock().insert(number, Some(file.clone()));
        Ok(file)
    }

    fn open(&self, number: u32) -> Result<Option<Arc<dyn MediaFile>>> {
        use std::collections::btree_map::Entry;
        let file = match self.files.lock().entry(number) {
            Entry::Occupied(known) => known.get().clone(),
            Entry::Vacant(place) => {
                let Some(beneath) = self.beneath.open(number)? else {
                    return Ok(None);
                };
                let file = ScratchFile {
                    beneath: Some(beneath),
                    written: Mutex::default(),
                };
                place.insert(Some(Arc::new(file))).clone()
            }
        };
        Ok(file.map(|file| -> Arc<dyn MediaFile> { file }))
    }

    fn remove(&self, number: u32) -> Result<()> {
        self.files.lock().insert(number, None);
        Ok(())
    }

    fn sync_names(&self) -> Result<()> {
        Ok(())
    }

    fn allocated(&self, number: u32) -> Result<u64> {
        self.beneath.allocated(number)
    }
}

#[derive(Default)]
struct ScratchFile {
    beneath: Option<Arc<dyn MediaFile>>,
    /// What was written, by offset, in the order of writing.
    written: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl MediaFile for ScratchFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let mut read = match &self.beneath {
            Some(file) => file.read_at(buf, offset)?,
            None => 0,
        };
        for (at, bytes) in self.written.lock().iter() {
            let (from, to) = (
                (*at).max(offset),
                (at + bytes.len() as u64).min(offset + buf.len() as u64),
            );
            if from >= to {
                continue;
            }
            let (start, end) = ((from - offset) as usize, (to - offset) as usize);
            if start > read {
                buf[read..start].fill(0);
            }
            let source = (from - at) as usize;
            buf[start..end].copy_from_slice(&bytes[source..source + end - start]);
            read = read.max(end);
        }
        Ok(read)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        if offset.checked_add(buf.len() as u64).is_none() {
            return Err(Error::Os(Errno::FBIG));
        }
        self.written.lock().push((offset, buf.to_vec()));
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn punch(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn size(&self) -> Result<u64> {
        let beneath = self.beneath.as_ref().map_or(Ok(0), |file| file.size())?;
        let written = self.written.lock();
        let ends = written.iter().map(|(at, bytes)| at + bytes.len() as u64);
        Ok(ends.fold(beneath, u64::max))
    }
}
