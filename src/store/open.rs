//! Opening: the directory, the index if it can be trusted, and what the journal has beyond it.

use super::count::Uncounted;
use super::found::{Found, find_index, fresh_index, noted_usage, remove_index};
use super::identity::{check_owner, identify, make_dir};
use super::index::{self, Index};
use super::journal::{Journal, Known, lsn_at, offset_of, split, write_seal};
use super::key::{self, IndexState, Usage, segment_of};
use super::layers::Layers;
use super::media::{FileMedia, Media, MediaFile, missing, name_of};
use super::reclaim::Upkeep;
use super::record::{Record, SEAL_LEN};
use super::replay::{SegmentLog, read_segment};
use super::room::{self, Reserved};
use super::session::Session;
use super::snapshots::Snapshots;
use super::table::{Change, Table};
use super::types::{SnapshotState, StoreOptions};
use super::{Opened, Store, checkpoint};
use crate::error::{Error, Result};
use crate::ids::{BLOCK, Epoch, Lsn};
use crate::sync::{Arc, AtomicBool, Mutex, RwLock};
use rustix::io::fcntl_dupfd_cloexec;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;

/// The largest index, on disk, that is taken into memory instead on a full disk.
const MOST_IN_MEMORY: u64 = 256 << 20;
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
        check_owner(dir)?;
        let known = options.known.as_deref().unwrap_or(dir).join("journal");
        let media = FileMedia::open_known(&dir.join("journal"), &known)?;
        Self::open_with(dir, options, Arc::new(media))
    }

    /// As [`Store::open`], with the journal on a medium of the caller's.
    ///
    /// # Errors
    /// As [`Store::open`], and those of the medium.
    pub fn open_with(dir: &Path, options: StoreOptions, media: Arc<dyn Media>) -> Result<Self> {
        options.check()?;
        make_dir(dir)?;
        let (lock, uuid) = identify(dir, !media.list()?.is_empty())?;
        // The index may want room that only the reserve has.
        room::drop_reserve_in(dir);
        let again = fcntl_dupfd_cloexec(&lock, 0)?;
        let opened = Self::open_locked(dir, options.clone(), media.clone(), lock, uuid);
        let noted = match &opened {
            Ok(store) if !store.has_no_room() => return opened,
            Ok(store) => noted_usage(store.layers.index.as_ref())?,
            Err(error) if !error.is_full() || options.in_memory_index => return opened,
            Err(_) => BTreeMap::new(),
        };
        if !serves_in_memory(dir, &options, media.as_ref(), uuid, &noted)? {
            return opened;
        }
        // Before its index is taken away.
        drop(opened);
        log::warn!(
            "{}: the disk is full; the index is in memory until it is opened with room again, so that its space serves what makes room",
            options.known.as_deref().unwrap_or(dir).display()
        );
        let in_memory = StoreOptions {
            in_memory_index: true,
            ..options
        };
        remove_index(dir)?;
        let store = Self::open_locked(dir, in_memory, media, again, uuid)?;
        store.keep_reserve();
        Ok(store)
    }

    /// Whether nothing could be set aside for a full disk, on which nothing can be removed then: a removal takes some records.
    fn has_no_room(&self) -> bool {
        self.keep_reserve() == Reserved::No && self.layers.index.allocated() > 0
    }

    /// Opens the store `uuid` whose index is in `dir` and whose journal is `media`.
    pub(super) fn open_locked(
        dir: &Path,
        options: StoreOptions,
        media: Arc<dyn Media>,
        lock: OwnedFd,
        uuid: u128,
    ) -> Result<Self> {
        let mut numbers = media.list()?;
        numbers.sort_unstable();
        let session = Session::read(media.as_ref(), uuid, &options)?;
        let reading = Reading {
            media: media.as_ref(),
            uuid,
            log_area: options.log_area,
            verify: session.went_down,
            end: session.end(),
        };
        let mut found = find_index(dir, &options, uuid)?;
        if found.husk {
            log::info!("the index holds nothing any more and is made anew");
            drop(found);
            found = fresh_index(dir, &options)?;
        }
        let mut recovery = Recovery::read(&reading, &numbers, found.state)?;
        let missing =
            |(number, usage): &(&u32, &Usage)| usage.records > 0 && !numbers.contains(number);
        for (number, _) in found.usage.iter().filter(missing) {
            recovery.missing(*number);
        }
        recovery.finish(Parts {
            dir,
            options,
            media,
            uuid,
            lock,
            found,
            session,
        })
    }
}

/// Whether the journal alone is enough (I5), and the index not too large for memory: it may have what the journal has lost.
/// `noted`: the segments that it tells of.
fn serves_in_memory(
    dir: &Path,
    options: &StoreOptions,
    media: &dyn Media,
    uuid: u128,
    noted: &BTreeMap<u32, Usage>,
) -> Result<bool> {
    let size = index::allocated(&dir.join("index"));
    let mut numbers = media.list()?;
    numbers.sort_unstable();
    if size > MOST_IN_MEMORY || noted.keys().any(|number| !numbers.contains(number)) {
        return Ok(false);
    }
    let session = Session::read(media, uuid, options)?;
    let reading = Reading {
        media,
        uuid,
        log_area: options.log_area,
        verify: session.went_down,
        end: session.end(),
    };
    let whole = Recovery::read(&reading, &numbers, None)?;
    Ok(!whole.lost && whole.damage.is_empty())
}

/// How the journal is read.
struct Reading<'a> {
    media: &'a dyn Media,
    uuid: u128,
    log_area: u64,
    /// Payloads that were not synced may not have reached the disk: they are looked at.
    verify: bool,
    /// Up to where it was durable.
    end: Lsn,
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
    /// Something of the journal is gone that the index cannot have.
    lost: bool,
    /// It ends before it did when its session was closed.
    cut_short: bool,
    /// It was durable once.
    rotten: bool,
    /// The index refers to a segment that is gone: it is an old copy, or the segment is lost.
    stale: bool,
}

/// What a store is made of, besides what the journal says.
struct Parts<'a> {
    dir: &'a Path,
    options: StoreOptions,
    media: Arc<dyn Media>,
    uuid: u128,
    lock: OwnedFd,
    found: Found,
    session: Session,
}

impl Recovery {
    /// Reads all segments that the index, if it has a `state`, does not have wholly.
    fn read(reading: &Reading<'_>, numbers: &[u32], state: Option<IndexState>) -> Result<Self> {
        let checkpoint = state.map_or(Lsn(0), |state| state.checkpoint);
        let (first, offset) = split(checkpoint);
        let mut out = Self {
            state,
            logs: Vec::new(),
            older: Vec::new(),
            end: checkpoint,
            highest: numbers.last().copied().unwrap_or(0).max(first),
            damage: Vec::new(),
            lost: false,
            cut_short: false,
            rotten: false,
            stale: false,
        };
        let (last, durable_end) = split(reading.end);
        let mut before = first;
        for number in numbers.iter().copied() {
            if number < first {
                out.older.push(number);
                continue;
            }
            if state.is_some() && number > before + 1 {
                // Segments after the checkpoint go only after another one.
                out.missing(before + 1);
                out.lost = true;
            }
            before = number;
            let Some(file) = reading.media.open(number)? else {
                continue;
            };
            let indexed = if number == first { offset } else { 0 };
            let durable = match number == last {
                true => indexed.max(durable_end),
                false => indexed,
            };
            let (uuid, log_area) = (reading.uuid, reading.log_area);
            let mut log = read_segment(file.as_ref(), number, uuid, durable, log_area)?;
            if reading.verify {
                log.cut_at_bad_payload(file.as_ref(), durable)?;
            }
            if number == first && log.end < offset {
                let what = "ends before what the index has of it";
                out.damage.push(format!("{}: {what}", name_of(number)));
                out.lost = true;
            }
            if number == last && log.end < durable_end {
                let what = "ends before what was durable of it";
                out.damage.push(format!("{}: {what}", name_of(number)));
                // No power cut takes what was reported as durable.
                (out.cut_short, out.rotten) = (true, true);
            }
            if !log.records.is_empty() {
                out.end = out.end.max(lsn_at(number, log.end));
            }
            // A seal vouches for what is before it: this is no work of a power cut.
            out.rotten |= log.damage.iter().any(|(at, _)| *at >= indexed);
            out.lost |= out.rotten;
            out.damage
                .extend(log.damage.iter().map(|(_, what)| what.clone()));
            out.logs.push((number, file, log));
        }
        if first > 0 && !out.logs.iter().any(|(number, _, _)| *number == first) {
            if state.is_some_and(|state| state.clean && !out.went_on(state.checkpoint)) {
                // Damage if the index refers to it, which is looked at next.
                log::warn!("{}; the index has all of it", missing(first));
            } else {
                out.missing(first);
                out.lost = true;
            }
        }
        Ok(out)
    }

    fn missing(&mut self, number: u32) {
        let what = missing(number);
        if !self.damage.contains(&what) {
            self.damage.push(what);
        }
        self.stale = true;
    }

    /// What the snapshots are to be marked as for what is lost. Which of them a lost record served cannot be
    /// told, so it is all that are not marked already.
    fn doubt(&self, stayed_up: bool) -> Option<SnapshotState> {
        match self.state {
            _ if !self.lost => None,
            // The whole journal was needed.
            None => Some(SnapshotState::Invalid),
            // The index has everything: it was written in order, and nothing came after it.
            Some(state) if state.clean && !self.went_on(state.checkpoint) => None,
            // No power cut has taken it.
            Some(_) if stayed_up || self.rotten => Some(SnapshotState::Invalid),
            // It may be what a power cut took, none of which was reported as durable.
            Some(_) => Some(SnapshotState::Suspect),
        }
    }

    /// Whether the journal has a value that came after `checkpoint`.
    fn went_on(&self, checkpoint: Lsn) -> bool {
        let mut records = self.logs.iter().flat_map(|(_, _, log)| &log.records);
        records.any(|(lsn, record)| *lsn >= checkpoint && !key::pairs_of(record, *lsn).is_empty())
    }

    fn finish(mut self, parts: Parts<'_>) -> Result<Store> {
        let Parts {
            dir,
            options,
            media,
            uuid,
            lock,
            found,
            session,
        } = parts;
        self.close_segments(media.as_ref(), uuid, session.went_down)?;
        let doubt = self.doubt(session.stayed_up());
        let (mut table, mut home, highest) = self.newest_table(found.index.as_ref())?;
        let abandoned = table.epoch < highest;
        if abandoned {
            // A cut was under way. Its number is spent: records bear it already.
            (table.epoch, table.version, home) = (highest, table.version + 1, None);
        }
        let marked = doubt.is_some_and(|state| mark(&mut table, state));
        if marked {
            (table.version, home) = (table.version + 1, None);
        }
        let preface = Record::Table(table.clone());
        let next = self.highest + 1;
        let (count_step, in_memory) = (options.count_step, options.in_memory_index);
        let journal = Journal::new(media, uuid, options, self.end, next, preface);
        let rebuilt = self.state.is_none() && !self.logs.is_empty();
        // What a cut that was given up has left is walked with the snapshots around it, if there are any.
        let sweep = self
            .state
            .map_or(rebuilt, |state| state.sweep || self.stale)
            || (abandoned && table.snapshots.is_empty());
        let store = Store {
            dir: dir.to_path_buf(),
            uuid,
            count_step,
            upkeep: Mutex::new(Upkeep::new(sweep, found.uncounted)),
            moving: RwLock::new(()),
            snapshots: Snapshots::new(table, home),
            journal,
            layers: Layers::new(found.index),
            damage: Mutex::new(Vec::new()),
            reserved: AtomicBool::new(false),
            opened: Opened {
                in_memory,
                distrust: found.distrust,
                noted: Mutex::new(found.noted),
                lost: self.lost && doubt.is_some(),
                cut_short: self.cut_short,
            },
            session,
            _lock: lock,
        };
        self.count(&store.journal, &found.usage);
        let mut upkeep = store.upkeep.lock();
        self.redo(&store, &upkeep.uncounted)?;
        self.damage
            .iter()
            .for_each(|damage| log::error!("the store is damaged: {damage}"));
        *store.damage.lock() = self.damage;
        // From here on the index is not marked as closed in order, and a rebuilt one is finished.
        store.checkpoint_in(&mut upkeep, false)?;
        drop(upkeep);
        if marked {
            // The index has the marks; the journal gets them too, or a later rebuild would forget them.
            let rehomed = store.snapshots.rehome(&store.journal, u32::MAX);
            rehomed.unwrap_or_else(|error| log::error!("{error}"));
        }
        Ok(store)
    }

    /// Ends the segments that a crash left open: nothing is ever appended to them again, lest stale bytes
    /// beyond their end be taken for records.
    fn close_segments(&mut self, media: &dyn Media, uuid: u128, went_down: bool) -> Result<()> {
        // An index that was closed in order knows of every segment.
        let torn = went_down && self.state.is_none_or(|state| !state.clean);
        let mut blank = Vec::new();
        for (number, file, log) in &mut self.logs {
            if log.records.is_empty() {
                if log.blank || (torn && !log.foreign && log.damage.is_empty()) {
                    // Made, but its header never reached the disk, or not whole: so nothing durable was in it.
                    media.remove(*number)?;
                    blank.push(*number);
                } else {
                    let what = match log.foreign {
                        true => "a segment of another store",
                        false => "not a segment of this store, or wholly damaged",
                    };
                    self.damage.push(format!("{}: {what}", name_of(*number)));
                    self.lost |= !log.foreign;
                }
                continue;
            }
            if log.sealed.is_none() && u64::from(log.end + SEAL_LEN) <= log.log_area {
                let used =
                    u64::from(log.end + SEAL_LEN) + file.size()?.saturating_sub(log.log_area);
                // A seal vouches for all before it, so that comes first.
                file.sync()?;
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
        if !blank.is_empty() {
            // Their numbers are used again, lest the gap be taken for a loss.
            let (first, _) = self.state.map_or((0, 0), |state| split(state.checkpoint));
            let logs = self.logs.last().map_or(0, |(number, _, _)| *number);
            let older = self.older.last().copied().unwrap_or(0);
            self.highest = first.max(logs).max(older);
        }
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
        // S2: an index that has lost a part of itself may bear numbers that neither it nor the journal tells of any more.
        let (from, to) = key::touched(highest.next(), Epoch(u64::MAX));
        index.scan(&from, &to, &mut |key, _| {
            highest = highest.max(key::label_touched(key));
            Ok(true)
        })?;
        let mut changes: Vec<&Change> = Vec::new();
        for (_, record) in self.logs.iter().flat_map(|(_, _, log)| &log.records) {
            match record {
                Record::Change(change) if change.version > table.version => changes.push(change),
                _ => {}
            }
        }
        changes.sort_by_key(|change| change.version);
        for change in changes {
            // No segment has the table as it is now.
            home = None;
            table.apply(change);
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
    fn redo(&mut self, store: &Store, uncounted: &Uncounted) -> Result<()> {
        let checkpoint = self.state.map_or(Lsn(0), |state| state.checkpoint);
        for (number, _, log) in std::mem::take(&mut self.logs) {
            for (lsn, record) in log.records {
                if number > segment_of(checkpoint) || offset_of(lsn) >= offset_of(checkpoint) {
                    redo_record(store, uncounted, &record, lsn)?;
                }
            }
            if store.layers.bytes() > REPLAY_BYTES {
                flush(store, uncounted)?;
            }
        }
        Ok(())
    }
}

/// Marks the snapshots that are not marked as badly already; whether there were any.
fn mark(table: &mut Table, state: SnapshotState) -> bool {
    let worse = |now: SnapshotState| match now {
        SnapshotState::Ready => true,
        SnapshotState::Suspect => state == SnapshotState::Invalid,
        SnapshotState::Deleting | SnapshotState::Invalid => false,
    };
    let due: Vec<_> = table
        .snapshots
        .iter()
        .filter(|s| worse(s.state))
        .cloned()
        .collect();
    let marked = !due.is_empty();
    for mut info in due {
        info.state = state;
        table.snapshots.set(info);
    }
    marked
}

fn redo_record(store: &Store, uncounted: &Uncounted, record: &Record, lsn: Lsn) -> Result<()> {
    let pairs = key::pairs_of(record, lsn);
    for (key, value) in &pairs {
        // The index may have it already. Births and retained files that it has otherwise are settled when these
        // are carried; one that is the same would not be noticed then, and would count twice.
        let replaceable = matches!(key.first(), Some(b'b' | b'r'));
        if key.first() != Some(&b't')
            && let Some(old) = store.layers.index.get(key)?
            && (!replaceable || old == *value)
        {
            // What is not counted yet would be, if it were there.
            let counted = !uncounted.has(key);
            if counted {
                store.journal.uncount(key, &old);
            }
            if replaceable || !counted {
                store.layers.index.remove(key)?;
            }
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
fn flush(store: &Store, uncounted: &Uncounted) -> Result<()> {
    store.layers.freeze(Lsn(0));
    if let Some(frozen) = store.layers.frozen() {
        checkpoint::carry(
            store.layers.index.as_ref(),
            &store.journal,
            uncounted,
            frozen.map.iter(),
        )?;
    }
    store.layers.thaw();
    Ok(())
}
