//! A disk for the journal that remembers everything done to it, and can be rebuilt as a power cut may leave it.

use cowfs::error::{Error, Result};
use cowfs::store::media::{Media, MediaFile};
use cowfs::sync::{Arc, Mutex};
use rand::Rng;
use rand::rngs::SmallRng;
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet};

/// A file of the journal; 0 is the session file.
pub type FileId = u32;
const SESSION: FileId = 0;
/// What a disk writes at once, if anything.
pub const SECTOR: usize = 512;

/// One thing that happened, to the journal's disk or to the backing directory.
#[derive(Debug, Clone)]
pub enum Event {
    Create(FileId),
    Remove(FileId),
    Write(FileId, u64, Vec<u8>),
    Punch(FileId, u64, u64),
    Sync(FileId),
    SyncNames,
    /// The backing directory is now as in this state (`live.rs`).
    Live(usize),
    /// The file of this inode number was made durable.
    LiveSynced(u64),
    LiveAllSynced,
}

/// All events in the order in which they happened.
pub type Timeline = Arc<Mutex<Vec<Event>>>;

/// The contents of the files there are.
pub type Files = BTreeMap<FileId, Vec<u8>>;

/// The disk as the process sees it.
pub struct Disk {
    files: Mutex<BTreeMap<FileId, Arc<Mutex<Vec<u8>>>>>,
    timeline: Timeline,
}

impl Disk {
    pub fn new(files: Files, timeline: Timeline) -> Arc<Self> {
        let files = files
            .into_iter()
            .map(|(id, bytes)| (id, Arc::new(Mutex::new(bytes))));
        Arc::new(Self {
            files: Mutex::new(files.collect()),
            timeline,
        })
    }

    /// What is on it, as after a process was killed.
    pub fn contents(&self) -> Files {
        let files = self.files.lock();
        files
            .iter()
            .map(|(id, bytes)| (*id, bytes.lock().clone()))
            .collect()
    }

    fn happened(&self, event: Event) {
        self.timeline.lock().push(event);
    }

    fn file(&self, id: FileId, bytes: Arc<Mutex<Vec<u8>>>) -> Arc<dyn MediaFile> {
        Arc::new(DiskFile {
            id,
            bytes,
            timeline: self.timeline.clone(),
        })
    }
}

/// The disk, as the store takes it.
pub struct Drive(pub Arc<Disk>);

impl Media for Drive {
    fn list(&self) -> Result<Vec<u32>> {
        let files = self.0.files.lock();
        Ok(files.keys().copied().filter(|id| *id != SESSION).collect())
    }

    fn create(&self, number: u32) -> Result<Arc<dyn MediaFile>> {
        let bytes: Arc<Mutex<Vec<u8>>> = Arc::default();
        if let Some(old) = self.0.files.lock().insert(number, bytes.clone()) {
            self.0.files.lock().insert(number, old);
            return Err(Error::Os(Errno::EXIST));
        }
        self.0.happened(Event::Create(number));
        Ok(self.0.file(number, bytes))
    }

    fn open(&self, number: u32) -> Result<Option<Arc<dyn MediaFile>>> {
        let bytes = self.0.files.lock().get(&number).cloned();
        Ok(bytes.map(|bytes| self.0.file(number, bytes)))
    }

    fn remove(&self, number: u32) -> Result<()> {
        self.0.files.lock().remove(&number);
        self.0.happened(Event::Remove(number));
        Ok(())
    }

    fn sync_names(&self) -> Result<()> {
        self.0.happened(Event::SyncNames);
        Ok(())
    }

    fn allocated(&self, number: u32) -> Result<u64> {
        let files = self.0.files.lock();
        Ok(files.get(&number).map_or(0, |b| b.lock().len() as u64))
    }

    fn writes_in_place(&self) -> bool {
        true
    }

    fn session(&self) -> Result<Arc<dyn MediaFile>> {
        match self.open(SESSION)? {
            Some(file) => Ok(file),
            None => self.create(SESSION),
        }
    }
}

struct DiskFile {
    id: FileId,
    bytes: Arc<Mutex<Vec<u8>>>,
    timeline: Timeline,
}

impl MediaFile for DiskFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        let bytes = self.bytes.lock();
        let from = bytes.len().min(offset as usize);
        let n = buf.len().min(bytes.len() - from);
        buf[..n].copy_from_slice(&bytes[from..from + n]);
        Ok(n)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        put(&mut self.bytes.lock(), offset, buf);
        let event = Event::Write(self.id, offset, buf.to_vec());
        self.timeline.lock().push(event);
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.timeline.lock().push(Event::Sync(self.id));
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        clear(&mut self.bytes.lock(), offset, len);
        self.timeline
            .lock()
            .push(Event::Punch(self.id, offset, len));
        Ok(())
    }

    fn size(&self) -> Result<u64> {
        Ok(self.bytes.lock().len() as u64)
    }
}

fn put(bytes: &mut Vec<u8>, offset: u64, buf: &[u8]) {
    let end = offset as usize + buf.len();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[offset as usize..end].copy_from_slice(buf);
}

fn clear(bytes: &mut [u8], offset: u64, len: u64) {
    let from = bytes.len().min(offset as usize);
    let to = bytes.len().min((offset + len) as usize);
    bytes[from..to].fill(0);
}

/// What became of something that was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Lost,
    Kept,
    /// This seed decides which sectors, and whether one breaks in the middle.
    Torn(u64),
}

/// What is known at a moment of the journal's disk: what is durable, and what is not yet.
#[derive(Clone, Default)]
pub struct Pending {
    durable: Files,
    /// Names that are durable, whatever became of the files since.
    names: BTreeSet<FileId>,
    /// Names made or removed since, in order.
    changed: Vec<(FileId, bool)>,
    /// Writes and punches since the file was synced, in order.
    written: Vec<Event>,
}

impl Pending {
    /// All that is there is durable.
    pub fn of(files: &Files) -> Self {
        Self {
            durable: files.clone(),
            names: files.keys().copied().collect(),
            ..Self::default()
        }
    }

    /// One thing more happens.
    pub fn then(&mut self, event: &Event) {
        match event {
            Event::Create(id) => {
                self.durable.insert(*id, Vec::new());
                self.changed.push((*id, true));
            }
            Event::Remove(id) => self.changed.push((*id, false)),
            Event::Write(..) | Event::Punch(..) => self.written.push(event.clone()),
            Event::Sync(id) => {
                let mut later = Vec::new();
                for event in std::mem::take(&mut self.written) {
                    match file_of(&event) == *id {
                        true => apply(&mut self.durable, &event),
                        false => later.push(event),
                    }
                }
                self.written = later;
            }
            Event::SyncNames => {
                for (id, made) in std::mem::take(&mut self.changed) {
                    match made {
                        true => drop(self.names.insert(id)),
                        false => drop(self.names.remove(&id)),
                    }
                }
            }
            Event::Live(_) | Event::LiveSynced(_) | Event::LiveAllSynced => {}
        }
    }

    /// How many things have a fate of their own: changes of names, then writes.
    pub fn open(&self) -> usize {
        self.changed.len() + self.written.len()
    }

    /// The disk that is found after a power cut, given the fate of each.
    pub fn image(&self, fates: &[Fate]) -> Files {
        let (of_names, of_writes) = fates.split_at(self.changed.len());
        let mut names = self.names.clone();
        for ((id, made), fate) in self.changed.iter().zip(of_names) {
            match (fate, made) {
                (Fate::Lost, _) => false,
                (_, true) => names.insert(*id),
                (_, false) => names.remove(id),
            };
        }
        let mut files: Files = self.durable.clone();
        for (event, fate) in self.written.iter().zip(of_writes) {
            match (fate, event) {
                (Fate::Lost, _) => {}
                (Fate::Torn(seed), Event::Write(id, offset, bytes)) => {
                    tear(&mut files, *id, *offset, bytes, *seed);
                }
                _ => apply(&mut files, event),
            }
        }
        files.retain(|id, _| names.contains(id));
        files
    }
}

fn file_of(event: &Event) -> FileId {
    match event {
        Event::Write(id, ..) | Event::Punch(id, ..) => *id,
        _ => unreachable!("only writes and punches wait for a sync"),
    }
}

fn apply(files: &mut Files, event: &Event) {
    match event {
        Event::Write(id, offset, bytes) => put(files.entry(*id).or_default(), *offset, bytes),
        Event::Punch(id, offset, len) => clear(files.entry(*id).or_default(), *offset, *len),
        _ => {}
    }
}

/// Writes some sectors of `bytes`, and of one of them perhaps only a beginning.
fn tear(files: &mut Files, id: FileId, offset: u64, bytes: &[u8], seed: u64) {
    use rand::SeedableRng;
    let mut rng = SmallRng::seed_from_u64(seed);
    let file = files.entry(id).or_default();
    let (mut at, end) = (offset as usize, offset as usize + bytes.len());
    // Either a beginning of it, or any of its sectors.
    let cut = rng.random_bool(0.5).then(|| rng.random_range(at..=end));
    while at < end {
        let next = end.min((at / SECTOR + 1) * SECTOR);
        let to = match cut {
            Some(cut) => next.min(cut.max(at)),
            None if rng.random_bool(0.5) => next,
            None => at,
        };
        if to > at {
            let from = at - offset as usize;
            put(file, at as u64, &bytes[from..from + (to - at)]);
        }
        at = next;
    }
}
