//! Opening: the directory, the index if it can be trusted, and what the journal has beyond it.

use super::identity::{identify, make_dir};
use super::index::{Index, MemoryIndex, SledIndex};
use super::journal::{Journal, Known, lsn_at, offset_of, split, write_seal};
use super::key::{self, IndexState, Usage, segment_of};
use super::layers::Layers;
use super::media::{FileMedia, Media, MediaFile, name_of};
use super::reclaim::Upkeep;
use super::record::{Record, SEAL_LEN, Table};
use super::replay::{SegmentLog, read_segment};
use super::snapshots::Snapshots;
use super::types::StoreOptions;
use super::{Store, checkpoint};
use crate::error::{Error, Result};
use crate::ids::{BLOCK, Epoch, Lsn};
use crate::sync::{Arc, Mutex, RwLock};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;

/// An index that takes less than this on disk is read whole at every open, a larger one only if the store
/// was not closed in order.
const ALWAYS_CHECKED: u64 = 32 << 20;
/// An index without records that takes more than this on disk is made anew.
const HUSK: u64 = 16 << 20;
/// Memory for replayed records before they go to the index.
const REPLAY_BYTES: usize = 32 << 20;

impl StoreOptions {
    fn check(&self) -> Result<()> {
        let area = self.log_area;
        if !area.is_multiple_of(BLOCK as u64) || !(16 << 10..=1 << 30).contains(&area) {
            return Err(Error::Usage(format!(
                "log area of {area} bytes: 16 KiB to 1 GiB, in whole blocks"
            )));
        }
        if !(area + BLOCK as u64..=1 << 40).contains(&self.segment_size) {
            let size = self.segment_size;
            return Err(Error::Usage(format!(
                "segment size of {size} bytes: more than the log area, at most 1 TiB"
            )));
        }
        Ok(())
    }
}

impl Store {
    /// Makes the store at `dir` (mode 0700) if there is none; else opens it and recovers what a crash left.
    ///
    /// # Errors
    /// [`Error::Store`] if `dir` belongs to somebody else, is open to others, is in use, or is of another
    /// format; [`Error::Usage`] for options out of range; [`Error::Path`] if a file cannot be used. Damage
    /// in the journal is no error: see [`Store::damage`].
    pub fn open(dir: &Path, options: StoreOptions) -> Result<Self> {
        make_dir(dir)?;
        let media = FileMedia::open(&dir.join("journal"))?;
        Self::open_with(dir, options, Arc::new(media))
    }

    /// As [`Store::open`], with the journal on a medium of the caller's.
    ///
    /// # Errors
    /// As [`Store::open`], and those of the medium.
    pub fn open_with(dir: &Path, options: StoreOptions, media: Arc<dyn Media>) -> Result<Self> {
        options.check()?;
        make_dir(dir)?;
        let mut numbers = media.list()?;
        numbers.sort_unstable();
        let (lock, uuid) = identify(dir, !numbers.is_empty())?;
        let mut found = find_index(dir, &options, uuid)?;
        if found.is_husk() {
            log::info!(
                "{}: the index holds nothing any more and is made anew",
                dir.display()
            );
            drop(found);
            found = fresh_index(dir, &options)?;
        }
        let mut recovery = Recovery::read(media.as_ref(), uuid, &options, &numbers, found.state)?;
        let missing =
            |(number, usage): &(&u32, &Usage)| usage.records > 0 && !numbers.contains(number);
        if let Some((number, _)) = found.usage.iter().find(missing) {
            let why = format!(
                "{}: missing, though the index refers to it",
                name_of(*number)
            );
            recovery.contradiction = Some(why);
        }
        if let Some(why) = recovery.contradiction.take() {
            log::warn!(
                "{}: {why}; the index is being rebuilt from the journal",
                dir.display()
            );
            drop(found);
            found = fresh_index(dir, &options)?;
            recovery = Recovery::read(media.as_ref(), uuid, &options, &numbers, None)?;
            recovery.damage.push(why);
        }
        recovery.finish(Parts {
            dir,
            options,
            media,
            uuid,
            lock,
            found,
        })
    }
}

/// An index and what it says of itself; no state: it is empty, replay the whole journal.
struct Found {
    index: Box<dyn Index>,
    state: Option<IndexState>,
    /// What it refers to in each segment.
    usage: BTreeMap<u32, Usage>,
}

impl Found {
    /// Whether the index takes much space for nothing: sled gives little back.
    fn is_husk(&self) -> bool {
        self.usage.values().all(|usage| usage.records == 0) && self.index.allocated() > HUSK
    }

    fn empty(index: impl Index + 'static) -> Self {
        Self {
            index: Box::new(index),
            state: None,
            usage: BTreeMap::new(),
        }
    }
}

fn find_index(dir: &Path, options: &StoreOptions, uuid: u128) -> Result<Found> {
    if options.in_memory_index {
        return Ok(Found::empty(MemoryIndex::default()));
    }
    let path = dir.join("index");
    if !path.exists() {
        return fresh_index(dir, options);
    }
    match trusted_index(&path, uuid) {
        Ok(found) => Ok(found),
        Err(error) => {
            log::warn!(
                "{}: {error}; it is being rebuilt from the journal",
                path.display()
            );
            fresh_index(dir, options)
        }
    }
}

/// Opens the index; fails if there is any reason to doubt it.
fn trusted_index(path: &Path, uuid: u128) -> Result<Found> {
    if SledIndex::is_condemned(path) {
        return Err(Error::Corrupt("the index could not be read lately".into()));
    }
    let index = SledIndex::open(path)?;
    let Some(state) = index.get(key::STATE)? else {
        return Err(Error::Corrupt("the index was never finished".into()));
    };
    let state = IndexState::parse(&state)?;
    if state.uuid != uuid {
        return Err(Error::Corrupt("the index belongs to another store".into()));
    }
    let noted = noted_usage(&index)?;
    let usage = if !state.clean || index.allocated() < ALWAYS_CHECKED {
        let used = |(number, u): (u32, Usage)| {
            (
                number,
                Usage {
                    used: u.used,
                    ..Usage::default()
                },
            )
        };
        counted_usage(&index, noted.into_iter().map(used).collect())?
    } else {
        noted
    };
    Ok(Found {
        index: Box::new(index),
        state: Some(state),
        usage,
    })
}

/// What the index has noted of the segments.
fn noted_usage(index: &dyn Index) -> Result<BTreeMap<u32, Usage>> {
    let (from, to) = key::usages();
    let mut noted = BTreeMap::new();
    index.scan(&from, &to, &mut |key, value| {
        noted.extend([key::parse_usage(key, value)?]);
        Ok(true)
    })?;
    Ok(noted)
}

/// Reads the whole index, and adds up what it refers to.
fn counted_usage(
    index: &dyn Index,
    mut usage: BTreeMap<u32, Usage>,
) -> Result<BTreeMap<u32, Usage>> {
    index.scan(&[], &[u8::MAX], &mut |key, value| {
        key::check(key, value)?;
        if let Some(footprint) = key::footprint(key, value) {
            usage.entry(footprint.segment).or_default().add(&footprint);
        }
        Ok(true)
    })?;
    Ok(usage)
}

/// An empty index in place of whatever there is.
fn fresh_index(dir: &Path, options: &StoreOptions) -> Result<Found> {
    if options.in_memory_index {
        return Ok(Found::empty(MemoryIndex::default()));
    }
    let path = dir.join("index");
    match std::fs::remove_dir_all(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::io("cannot remove", &path, &error));
        }
        _ => {}
    }
    SledIndex::pardon(&path);
    Ok(Found::empty(SledIndex::open(&path)?))
}

/// What the journal says.
struct Recovery {
    state: Option<IndexState>,
    /// Segments that the index does not have wholly.
    logs: Vec<(u32, Arc<dyn MediaFile>, SegmentLog)>,
    /// Segments that it has.
    older: Vec<u32>,
    /// The end of the journal.
    end: Lsn,
    highest: u32,
    damage: Vec<String>,
    /// Why the index cannot belong to this journal.
    contradiction: Option<String>,
}

/// What a store is made of, besides what the journal says.
struct Parts<'a> {
    dir: &'a Path,
    options: StoreOptions,
    media: Arc<dyn Media>,
    uuid: u128,
    lock: OwnedFd,
    found: Found,
}

impl Recovery {
    /// Reads all segments that the index, if it has a `state`, does not have wholly.
    fn read(
        media: &dyn Media,
        uuid: u128,
        options: &StoreOptions,
        numbers: &[u32],
        state: Option<IndexState>,
    ) -> Result<Self> {
        let checkpoint = state.map_or(Lsn(0), |state| state.checkpoint);
        let (first, offset) = split(checkpoint);
        let mut out = Self {
            state,
            logs: Vec::new(),
            older: Vec::new(),
            end: checkpoint,
            highest: numbers.last().copied().unwrap_or(0).max(first),
            damage: Vec::new(),
            contradiction: None,
        };
        for number in numbers.iter().copied() {
            if number < first {
                out.older.push(number);
                continue;
            }
            let Some(file) = media.open(number)? else {
                continue;
            };
            let durable = if number == first { offset } else { 0 };
            let log = read_segment(file.as_ref(), number, uuid, durable, options.log_area)?;
            if number == first && log.end < offset {
                out.contradiction = Some(format!(
                    "{}: ends before what the index has of it",
                    name_of(number)
                ));
            }
            if !log.records.is_empty() {
                out.end = out.end.max(lsn_at(number, log.end));
            }
            out.damage.extend(log.damage.iter().cloned());
            out.logs.push((number, file, log));
        }
        if first > 0 && !out.logs.iter().any(|(number, _, _)| *number == first) {
            out.contradiction = Some(format!(
                "{}: missing, though the index has some of it",
                name_of(first)
            ));
        }
        Ok(out)
    }

    fn finish(mut self, parts: Parts<'_>) -> Result<Store> {
        let Parts {
            dir,
            options,
            media,
            uuid,
            lock,
            found,
        } = parts;
        self.close_segments(media.as_ref(), uuid)?;
        let (mut table, mut home, highest) = self.newest_table(found.index.as_ref())?;
        let abandoned = table.epoch < highest;
        if abandoned {
            // A cut was under way. Its number is spent: records bear it already.
            (table.epoch, table.version, home) = (highest, table.version + 1, None);
        }
        let preface = Record::Table(table.clone());
        let next = self.highest + 1;
        let journal = Journal::new(media, uuid, options, self.end, next, preface);
        let rebuilt = self.state.is_none() && !self.logs.is_empty();
        // What a cut that was given up has left is walked with the snapshots around it, if there are any.
        let sweep = self.state.map_or(rebuilt, |state| state.sweep)
            || (abandoned && table.snapshots.is_empty());
        let store = Store {
            dir: dir.to_path_buf(),
            uuid,
            upkeep: Mutex::new(Upkeep::new(sweep)),
            moving: RwLock::new(()),
            snapshots: Snapshots::new(table, home),
            journal,
            layers: Layers::new(found.index),
            damage: Mutex::new(Vec::new()),
            _lock: lock,
        };
        self.count(&store.journal, &found.usage);
        self.redo(&store)?;
        self.damage
            .iter()
            .for_each(|damage| log::error!("{}: {damage}", store.dir.display()));
        *store.damage.lock() = self.damage;
        // From here on the index is not marked as closed in order, and a rebuilt one is finished.
        store.checkpoint_in(&mut store.upkeep.lock(), false)?;
        Ok(store)
    }

    /// Ends the segments that a crash left open: nothing is ever appended to them again, lest stale bytes
    /// beyond their end be taken for records.
    fn close_segments(&mut self, media: &dyn Media, uuid: u128) -> Result<()> {
        let mut blank = Vec::new();
        for (number, file, log) in &mut self.logs {
            if log.records.is_empty() {
                if log.blank {
                    // Made, but its header never reached the disk: so nothing durable was in it.
                    media.remove(*number)?;
                    blank.push(*number);
                } else {
                    self.damage.push(format!(
                        "{}: not a segment of this store, or wholly damaged",
                        name_of(*number)
                    ));
                }
                continue;
            }
            if log.sealed.is_none() && u64::from(log.end + SEAL_LEN) <= log.log_area {
                let used =
                    u64::from(log.end + SEAL_LEN) + file.size()?.saturating_sub(log.log_area);
                write_seal(file.as_ref(), uuid, lsn_at(*number, log.end), used)?;
                log.sealed = Some(used);
            }
            // A process that was killed may have left it in the page cache only.
            file.sync()?;
        }
        if !self.logs.is_empty() {
            media.sync_names()?;
        }
        self.logs.retain(|(number, _, _)| !blank.contains(number));
        Ok(())
    }

    /// The snapshot table, the segment that has it, and the highest epoch of any record.
    fn newest_table(&self, index: &dyn Index) -> Result<(Table, Option<u32>, Epoch)> {
        let mut highest = self.state.map_or(Epoch(0), |state| state.highest_epoch);
        let (mut home, mut table) = match index.get(key::TABLE)? {
            Some(value) => {
                let (home, table) = key::parse_table(&value)?;
                (Some(home).filter(|home| self.older.contains(home)), table)
            }
            None => (None, Table::default()),
        };
        highest = highest.max(table.epoch);
        for (lsn, record) in self.logs.iter().flat_map(|(_, _, log)| &log.records) {
            highest = highest.max(record.highest_epoch());
            if let Record::Table(found) = record
                && found.version >= table.version
            {
                (home, table) = (Some(segment_of(*lsn)), found.clone());
            }
        }
        Ok((table, home, highest))
    }

    /// Tells the journal what each segment holds.
    fn count(&self, journal: &Journal, usage: &BTreeMap<u32, Usage>) {
        let mut known = journal.known.lock();
        let usage = |number: &u32| usage.get(number).copied().unwrap_or_default();
        for number in &self.older {
            let usage = usage(number);
            known.insert(
                *number,
                Known {
                    usage,
                    closed: true,
                    noted: usage.used > 0,
                    damaged: false,
                },
            );
        }
        for (number, _, log) in &self.logs {
            let used = log.sealed.unwrap_or(log.log_area);
            let noted = usage(number).used == used;
            let usage = Usage {
                used,
                ..usage(number)
            };
            known.insert(
                *number,
                Known {
                    usage,
                    closed: true,
                    noted,
                    damaged: log.records.is_empty(),
                },
            );
        }
    }

    /// Puts what the index does not have into it.
    fn redo(&mut self, store: &Store) -> Result<()> {
        let checkpoint = self.state.map_or(Lsn(0), |state| state.checkpoint);
        for (number, _, log) in std::mem::take(&mut self.logs) {
            for (lsn, record) in log.records {
                if number > segment_of(checkpoint) || offset_of(lsn) >= offset_of(checkpoint) {
                    redo_record(store, &record, lsn)?;
                }
            }
            if store.layers.bytes() > REPLAY_BYTES {
                flush(store)?;
            }
        }
        Ok(())
    }
}

fn redo_record(store: &Store, record: &Record, lsn: Lsn) -> Result<()> {
    let pairs = key::pairs_of(record, lsn);
    for (key, value) in &pairs {
        // The index may have it already; births and retained files are settled when they are carried.
        if matches!(key.first(), Some(b'a' | b'd' | b'e'))
            && let Some(old) = store.layers.index.get(key)?
        {
            store.journal.uncount(key, &old);
        }
        store.journal.count(key, value);
    }
    let replaced = store.layers.put(pairs);
    replaced
        .iter()
        .for_each(|(key, value)| store.journal.uncount(key, value));
    Ok(())
}

/// Empties the memory of a long replay. The index does not count as having it before a checkpoint says so.
fn flush(store: &Store) -> Result<()> {
    store.layers.freeze(Lsn(0));
    if let Some(frozen) = store.layers.frozen() {
        checkpoint::carry(
            store.layers.index.as_ref(),
            &store.journal,
            frozen.map.iter(),
        )?;
    }
    store.layers.thaw();
    Ok(())
}
