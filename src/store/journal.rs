//! The journal: append, rotate. (Making it durable is in commit.rs, reading it back in replay.rs.)
//!
//! An append reserves its place under a short lock, writes its payload under none, and writes its header
//! under the lock of its segment's log. So headers stand in the log without gaps, and a process that dies
//! loses only records whose append had not returned.

use super::ahead::Ahead;
use super::commit::{Durability, Poison};
use super::frame::{self, Body};
use super::key::{self, Usage, segment_of};
use super::media::{Media, MediaFile};
use super::record::{Record, SEAL_LEN};
use super::types::StoreOptions;
use crate::error::{Error, Result};
use crate::ids::{BLOCK, Lsn};
use crate::sync::{Arc, AtomicBool, AtomicU32, AtomicU64, Mutex, Ordering};
use hashlink::LruCache;
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ops::Range;

/// One part in this many of a log is for urgent records alone.
const URGENT_PART: u64 = 16;

/// Files of old segments kept open for readers.
const OPEN_FILES: usize = 128;

/// What is appended at once. Extents name their place in blocks from the start of `payload`.
#[derive(Debug, Default)]
pub(super) struct Batch<'a> {
    pub(super) records: Vec<Record>,
    /// Whole blocks.
    pub(super) payload: &'a [u8],
    /// It may use the part of the log that was set aside for such as must get through on a full disk.
    pub(super) urgent: bool,
}

impl Batch<'_> {
    /// Records without a payload.
    pub(super) fn small(records: Vec<Record>) -> Self {
        Self {
            records,
            ..Self::default()
        }
    }
}

/// One file of the journal that this process has written to.
pub(super) struct Segment {
    pub(super) number: u32,
    pub(super) file: Arc<dyn MediaFile>,
    log_area: u64,
    /// Guards the order of the headers; held while one is written and put into the memtable.
    log: Mutex<Log>,
    /// Where the log ends: `log.end`, to be read without the lock.
    pub(super) end: AtomicU32,
    /// Up to where the log is durable, with all payloads of the records before it.
    pub(super) synced: AtomicU32,
    /// Appends that have a place here and are not finished.
    in_flight: AtomicU32,
    /// No append will get a place here any more.
    left: AtomicBool,
    pub(super) sealed: AtomicBool,
    /// There was no room for the seal the last time.
    pub(super) no_room: AtomicBool,
    /// Where the reserved payloads end; final once the segment is left.
    payload_end: AtomicU64,
    /// Parts of the payload that were filled with zeros and are nobody's.
    unused: Mutex<Vec<Range<u64>>>,
}

struct Log {
    end: u32,
}

/// The segment that appends get their places in.
pub(super) struct Tail {
    pub(super) segment: Arc<Segment>,
    /// Bytes of the log that are promised.
    log: u64,
    /// Where the next payload goes that finds no place in `ahead`.
    pub(super) payload: u64,
    pub(super) ahead: Ahead,
    /// Nothing but the preface is in it.
    fresh: bool,
}

/// A place for one batch.
struct Place {
    segment: Arc<Segment>,
    payload: u64,
}

/// What is known of a segment, for reclaim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Known {
    pub(super) usage: Usage,
    /// Nothing will be appended to it any more.
    pub(super) closed: bool,
    /// It has a record that cannot be read, so what refers to it is not known.
    pub(super) damaged: bool,
    /// The index has `usage.used` of it.
    pub(super) noted: bool,
}

/// The journal. Locks, in the order in which they may be taken: `making`, `tail`, `spare`, `open`, a
/// segment's `log`, `known`; `files` by itself.
pub(super) struct Journal {
    pub(super) media: Arc<dyn Media>,
    pub(super) uuid: u128,
    options: StoreOptions,
    /// Guards who reserves what.
    pub(super) tail: Mutex<Option<Tail>>,
    /// Blocks may be filled before they are needed.
    pub(super) fills_ahead: AtomicBool,
    /// The segment after the tail, made before it is needed.
    spare: Mutex<Option<Arc<Segment>>>,
    /// Held while a spare is made, so that only one is.
    making: Mutex<()>,
    /// Segments of this process that are not yet known to be sealed and durable; ascending.
    pub(super) open: Mutex<Vec<Arc<Segment>>>,
    files: Mutex<LruCache<u32, Arc<dyn MediaFile>>>,
    /// All segments there are.
    pub(super) known: Mutex<BTreeMap<u32, Known>>,
    /// The snapshot table, for the start of each new segment.
    preface: Mutex<Arc<Record>>,
    next: AtomicU32,
    /// The end of what recovery found, or of the last sealed segment of this process after it.
    ended: AtomicU64,
    /// Up to where segments of this process were synced, 0 if none was.
    durable: AtomicU64,
    appended: AtomicU64,
    pub(super) durability: Durability,
    pub(super) poison: Poison,
}

impl Journal {
    /// A journal that goes on after `recovered`, in a new segment numbered `next`.
    pub(super) fn new(
        media: Arc<dyn Media>,
        uuid: u128,
        options: StoreOptions,
        recovered: Lsn,
        next: u32,
        preface: Record,
    ) -> Self {
        Self {
            media,
            uuid,
            options,
            tail: Mutex::new(None),
            fills_ahead: AtomicBool::new(true),
            spare: Mutex::new(None),
            making: Mutex::new(()),
            open: Mutex::new(Vec::new()),
            files: Mutex::new(LruCache::new(OPEN_FILES)),
            known: Mutex::new(BTreeMap::new()),
            preface: Mutex::new(Arc::new(preface)),
            next: AtomicU32::new(next),
            ended: AtomicU64::new(recovered.0),
            durable: AtomicU64::new(0),
            appended: AtomicU64::new(0),
            durability: Durability::default(),
            poison: Poison::default(),
        }
    }

    /// Appends the records and shows them to `publish` before anybody can append after them in the same
    /// segment. Returns the number of the last.
    ///
    /// # Errors
    /// An I/O error poisons the journal (I7), except those that pass, such as `ENOSPC`: then nothing was
    /// appended and the call may be made again.
    pub(super) fn append(
        &self,
        batch: Batch<'_>,
        publish: impl FnOnce(Vec<(Record, Lsn)>),
    ) -> Result<Lsn> {
        self.poison.check()?;
        batch.records.iter().try_for_each(Record::check)?;
        let bodies: Vec<Vec<u8>> = batch.records.iter().map(Record::body).collect();
        let log_len: usize = bodies.iter().map(|body| frame::frame_len(body.len())).sum();
        let spill_len: usize = bodies.iter().map(|body| frame::spill_len(body.len())).sum();
        let payload_len = (batch.payload.len() + spill_len) as u64;
        let place = self.reserve(log_len as u64, payload_len, batch.urgent)?;
        let result = self.write(&place, batch, bodies, publish);
        if let Err(error) = &result {
            self.poison.fail(error);
        }
        place.segment.in_flight.fetch_sub(1, Ordering::SeqCst);
        result
    }

    fn write(
        &self,
        place: &Place,
        batch: Batch<'_>,
        bodies: Vec<Vec<u8>>,
        publish: impl FnOnce(Vec<(Record, Lsn)>),
    ) -> Result<Lsn> {
        let segment = &place.segment;
        if !batch.payload.is_empty() {
            segment.file.write_at(batch.payload, place.payload)?;
        }
        let mut spill = place.payload + batch.payload.len() as u64;
        let first_block = (place.payload / BLOCK as u64) as u32;
        let mut records = Vec::with_capacity(batch.records.len());
        for (mut record, body) in batch.records.into_iter().zip(bodies) {
            let body = match &mut record {
                Record::Extent(extent) if extent.place.is_some() => {
                    extent.place.iter_mut().for_each(|p| p.block += first_block);
                    Body::Inline(record.body())
                }
                _ => spilled(segment, body, &mut spill)?,
            };
            records.push((record, body));
        }
        let mut log = segment.log.lock();
        let mut bytes = Vec::new();
        let mut done = Vec::with_capacity(records.len());
        let mut last = Lsn(0);
        for (record, body) in records {
            last = lsn_at(segment.number, log.end + bytes.len() as u32);
            frame::put_frame(&mut bytes, self.uuid, record.kind(), &body, last);
            done.push((record, last));
        }
        segment.file.write_at(&bytes, u64::from(log.end))?;
        self.appended
            .fetch_add(done.len() as u64, Ordering::Relaxed);
        publish(done);
        log.end += bytes.len() as u32;
        segment.end.store(log.end, Ordering::SeqCst);
        Ok(last)
    }

    fn reserve(&self, log_len: u64, payload_len: u64, urgent: bool) -> Result<Place> {
        if log_len > self.options.log_area / 2 {
            return Err(Error::Os(Errno::INVAL));
        }
        let set_aside = match urgent {
            true => 0,
            false => self.options.log_area / URGENT_PART,
        };
        loop {
            let mut tail = self.tail.lock();
            if let Some(tail) = tail.as_mut()
                && tail.fits(log_len + set_aside, payload_len, self.options.segment_size)
            {
                return Ok(tail.take(log_len, payload_len));
            }
            let Some(spare) = self.spare.lock().take() else {
                drop(tail);
                self.prepare()?;
                continue;
            };
            self.enter(&mut tail, spare);
        }
    }

    /// Makes `segment` the tail; in the one that was nothing more gets a place.
    fn enter(&self, tail: &mut Option<Tail>, segment: Arc<Segment>) {
        self.open.lock().push(segment.clone());
        let log = u64::from(segment.end.load(Ordering::SeqCst));
        let payload = segment.payload_end.load(Ordering::SeqCst);
        if let Some(left) = tail.replace(Tail {
            segment,
            log,
            payload,
            ahead: Ahead::default(),
            fresh: true,
        }) {
            left.leave();
        }
    }

    /// Leaves the tail, so that it can be reclaimed once it is synced. The next append goes to a new segment.
    pub(super) fn rotate(&self) -> Result<()> {
        self.poison.check()?;
        self.prepare()?;
        let mut tail = self.tail.lock();
        if tail.as_ref().is_none_or(|tail| tail.fresh) {
            return Ok(());
        }
        let Some(spare) = self.spare.lock().take() else {
            return Ok(());
        };
        self.enter(&mut tail, spare);
        Ok(())
    }

    /// Leaves the tail: the next sync seals it, so that damage to its end can be told from an append that was cut
    /// short. The next append goes to a new segment.
    pub(super) fn leave_tail(&self) {
        if let Some(left) = self.tail.lock().take() {
            left.leave();
        }
    }

    /// Makes the spare segment if there is none. No append waits for this that finds place in the tail.
    pub(super) fn prepare(&self) -> Result<()> {
        let _making = self.making.lock();
        if self.spare.lock().is_none() {
            let segment = self.create().inspect_err(|error| self.poison.fail(error))?;
            *self.spare.lock() = Some(segment);
        }
        Ok(())
    }

    /// Makes the spare segment early, while there is room: without one what is dead in the tail cannot be given back
    /// on a full disk, as it has to be left first.
    pub(super) fn prepare_early(&self) -> Result<()> {
        if self.tail.lock().is_none() {
            return Ok(());
        }
        match self.prepare() {
            // It is only early: who needs the segment tries again.
            Err(error) if error.is_full() => {
                log::debug!("no segment is made early: {error}");
                Ok(())
            }
            other => other,
        }
    }

    fn create(&self) -> Result<Arc<Segment>> {
        // Only `prepare` calls this, one at a time. A number that came to nothing is used again, so that a gap in
        // the numbers means that something is missing.
        let number = self.next.load(Ordering::SeqCst);
        let file = self.media.create(number)?;
        self.durability.names_changed();
        let log_area = self.options.log_area;
        let segment = Segment {
            number,
            file: file.clone(),
            log_area,
            log: Mutex::new(Log { end: 0 }),
            end: AtomicU32::new(0),
            synced: AtomicU32::new(0),
            in_flight: AtomicU32::new(0),
            left: AtomicBool::new(false),
            sealed: AtomicBool::new(false),
            no_room: AtomicBool::new(false),
            payload_end: AtomicU64::new(log_area),
            unused: Mutex::default(),
        };
        // Small records are not to fail for want of space while there is room in the log.
        let written = file
            .allocate(0, log_area)
            .and_then(|()| self.write_preface(&segment));
        if written.is_err() {
            // A file without a header is ignored and removed at the next open, if this fails too.
            if self.media.remove(number).is_err() {
                self.next.store(number + 1, Ordering::SeqCst);
            }
        }
        written?;
        self.next.store(number + 1, Ordering::SeqCst);
        self.known.lock().insert(number, Known::default());
        self.files.lock().insert(number, file);
        Ok(Arc::new(segment))
    }

    /// The header of the segment, and the snapshot table, so that older segments can go.
    fn write_preface(&self, segment: &Segment) -> Result<()> {
        let header = Record::Segment {
            uuid: self.uuid,
            number: segment.number,
            log_area: segment.log_area,
        };
        let table = self.preface.lock().clone();
        let mut spill = segment.log_area;
        let mut bytes = Vec::new();
        for record in [&header, &table] {
            let body = spilled(segment, record.body(), &mut spill)?;
            let lsn = lsn_at(segment.number, bytes.len() as u32);
            frame::put_frame(&mut bytes, self.uuid, record.kind(), &body, lsn);
        }
        segment.file.write_at(&bytes, 0)?;
        segment.log.lock().end = bytes.len() as u32;
        segment.end.store(bytes.len() as u32, Ordering::SeqCst);
        segment.payload_end.store(spill, Ordering::SeqCst);
        Ok(())
    }

    /// Writes the seal of a segment that is done and wholly durable. False if there was no room for it.
    pub(super) fn seal(&self, segment: &Segment) -> Result<bool> {
        let mut log = segment.log.lock();
        if segment.sealed.load(Ordering::SeqCst) {
            return Ok(true);
        }
        let payload = segment.payload_end.load(Ordering::SeqCst) - segment.log_area;
        let used = u64::from(log.end + SEAL_LEN) + payload;
        let lsn = lsn_at(segment.number, log.end);
        match write_seal(segment.file.as_ref(), self.uuid, lsn, used) {
            Err(error) if matches!(error.errno(), Errno::NOSPC | Errno::DQUOT) => {
                segment.no_room.store(true, Ordering::SeqCst);
                return Ok(false);
            }
            written => written?,
        }
        log.end += SEAL_LEN;
        segment.end.store(log.end, Ordering::SeqCst);
        // Before it counts as sealed, so that a checkpoint that passes it notes its size too.
        if let Some(known) = self.known.lock().get_mut(&segment.number) {
            known.usage.used = used;
            known.closed = true;
        }
        let end = lsn_at(segment.number, log.end);
        self.ended.fetch_max(end.0, Ordering::SeqCst);
        segment.sealed.store(true, Ordering::SeqCst);
        self.give_back_unused(segment, &log);
        Ok(true)
    }

    /// Gives back what is set aside or filled of a segment that gets no more records.
    fn give_back_unused(&self, segment: &Segment, log: &Log) {
        let log_end = u64::from(log.end).next_multiple_of(BLOCK as u64);
        let payload_end = segment.payload_end.load(Ordering::SeqCst);
        let mut unused = std::mem::take(&mut *segment.unused.lock());
        unused.push(log_end..segment.log_area);
        // Beyond the end of a file, too: xfs has blocks there for who might write on.
        unused.push(payload_end..self.options.segment_size);
        for Range { start, end } in unused {
            if start < end
                && let Err(error) = segment.file.punch(start, end - start)
            {
                log::debug!("what is unused of a segment is not given back: {error}");
            }
        }
    }

    /// Calls `swap` with a place in the journal before which every record has been published, at a moment
    /// at which that is so.
    pub(super) fn at_checkpoint(&self, swap: impl FnOnce(Lsn)) {
        let first = self
            .open
            .lock()
            .iter()
            .find(|s| !s.sealed.load(Ordering::SeqCst))
            .cloned();
        // Segments before `first` are sealed: all that was appended to them is published. Appends to later
        // ones may be published too; replaying those twice is harmless.
        match first {
            None => swap(Lsn(self.ended.load(Ordering::SeqCst))),
            Some(segment) => {
                let log = segment.log.lock();
                swap(lsn_at(segment.number, log.end));
            }
        }
    }

    /// The file of a segment; `None` if it has been removed.
    pub(super) fn file(&self, number: u32) -> Result<Option<Arc<dyn MediaFile>>> {
        if let Some(file) = self.files.lock().get(&number) {
            return Ok(Some(file.clone()));
        }
        let file = self.media.open(number)?;
        if let Some(file) = &file {
            self.files.lock().insert(number, file.clone());
        }
        Ok(file)
    }

    /// Up to where the log of each segment that this process has written to is good.
    pub(super) fn ends(&self) -> BTreeMap<u32, u32> {
        let open = self.open.lock();
        let end = |s: &Arc<Segment>| (s.number, s.end.load(Ordering::SeqCst));
        open.iter().map(end).collect()
    }

    /// Where a checkpoint is as long as no segment is open.
    pub(super) fn ended(&self) -> Lsn {
        Lsn(self.ended.load(Ordering::SeqCst))
    }

    pub(super) fn options(&self) -> &StoreOptions {
        &self.options
    }

    /// Bytes of the log of new segments.
    pub(super) fn log_area(&self) -> u64 {
        self.options.log_area
    }

    /// The oldest segment that is not sealed: the checkpoint does not pass it.
    pub(super) fn oldest_unsealed(&self) -> Option<u32> {
        let open = self.open.lock();
        let mut unsealed = open.iter().filter(|s| !s.sealed.load(Ordering::SeqCst));
        unsealed.next().map(|s| s.number)
    }

    /// Returns once every record that is in a log by now can be seen by look-ups.
    pub(super) fn wait_published(&self) {
        let open: Vec<_> = self.open.lock().clone();
        open.iter().for_each(|segment| drop(segment.log.lock()));
    }

    /// Removes a segment for good.
    pub(super) fn remove(&self, number: u32) -> Result<()> {
        self.files.lock().remove(&number);
        self.media.remove(number)?;
        self.media.sync_names()?;
        self.known.lock().remove(&number);
        Ok(())
    }

    /// Adds an index entry to the usage of its segment.
    pub(super) fn count(&self, key: &[u8], value: &[u8]) {
        if let Some(footprint) = key::footprint(key, value) {
            self.known
                .lock()
                .entry(footprint.segment)
                .or_default()
                .usage
                .add(&footprint);
        }
    }

    /// Adds the usage of entries that were not counted; returns the segments that there are none of any more.
    pub(super) fn add_counted(&self, counted: &BTreeMap<u32, Usage>) -> Vec<u32> {
        let mut known = self.known.lock();
        let add = |(number, usage): (&u32, &Usage)| match known.get_mut(number) {
            Some(known) => {
                known.usage.add_all(usage);
                None
            }
            None => Some(*number),
        };
        counted.iter().filter_map(add).collect()
    }

    /// Takes an index entry off the usage of its segment.
    pub(super) fn uncount(&self, key: &[u8], value: &[u8]) {
        if let Some(footprint) = key::footprint(key, value)
            && let Some(known) = self.known.lock().get_mut(&footprint.segment)
        {
            known.usage.sub(&footprint);
        }
    }

    /// The table that new segments begin with from now on. A segment that was made early keeps the table it has: of several
    /// in the journal the newest holds.
    pub(super) fn set_preface(&self, table: Record) {
        *self.preface.lock() = Arc::new(table);
    }

    /// Up to where the journal is durable; `None` if nothing was appended and synced since it was opened.
    pub(super) fn durable_end(&self) -> Option<Lsn> {
        Some(Lsn(self.durable.load(Ordering::SeqCst))).filter(|end| end.0 > 0)
    }

    /// Notes how far a segment was synced.
    pub(super) fn note_durable(&self, segment: &Segment) {
        let synced = segment.synced.load(Ordering::SeqCst);
        if synced > 0 {
            let end = lsn_at(segment.number, synced);
            self.durable.fetch_max(end.0, Ordering::SeqCst);
        }
    }

    /// Records appended since the journal was opened.
    pub(super) fn appended(&self) -> u64 {
        self.appended.load(Ordering::Relaxed)
    }

    /// The segment that appends go to, and whether there has been none to it yet; `None` before the first append.
    pub(super) fn tail(&self) -> Option<(u32, bool)> {
        self.tail
            .lock()
            .as_ref()
            .map(|tail| (tail.segment.number, tail.fresh))
    }
}

impl Segment {
    /// Notes a part that was filled and is given back with the seal.
    pub(super) fn note_unused(&self, range: Range<u64>) {
        if !range.is_empty() {
            self.unused.lock().push(range);
        }
    }

    /// Whether nothing will be appended any more, but the seal.
    pub(super) fn is_done(&self) -> bool {
        self.left.load(Ordering::SeqCst)
            && self.in_flight.load(Ordering::SeqCst) == 0
            && !self.sealed.load(Ordering::SeqCst)
    }
}

impl Tail {
    fn fits(&self, log_len: u64, payload_len: u64, segment_size: u64) -> bool {
        let log_fits = self.log + log_len + u64::from(SEAL_LEN) <= self.segment.log_area;
        // A payload larger than a whole segment gets one of its own, which is then larger.
        let payload_fits = payload_len == 0
            || self.fresh
            || self.ahead.has(payload_len)
            || self.payload + payload_len <= segment_size;
        log_fits && payload_fits
    }

    /// Nothing more gets a place in it.
    fn leave(mut self) {
        let end = self.ahead.end_without(self.payload);
        self.segment.payload_end.store(end, Ordering::SeqCst);
        self.segment.note_unused(self.ahead.rest());
        self.segment.left.store(true, Ordering::SeqCst);
    }

    fn take(&mut self, log_len: u64, payload_len: u64) -> Place {
        let payload = self.ahead.take(payload_len).unwrap_or_else(|| {
            self.payload += payload_len;
            self.payload - payload_len
        });
        let segment = self.segment.clone();
        let place = Place { segment, payload };
        self.log += log_len;
        self.fresh = false;
        self.segment.in_flight.fetch_add(1, Ordering::SeqCst);
        place
    }
}

/// A body as it goes into the log: itself, or the place in the payload area where this has written it.
fn spilled(segment: &Segment, mut body: Vec<u8>, at: &mut u64) -> Result<Body> {
    let padded = frame::spill_len(body.len());
    if padded == 0 {
        return Ok(Body::Inline(body));
    }
    let (offset, len) = (*at, body.len() as u32);
    let crc = crc32c::crc32c(&body);
    body.resize(padded, 0);
    segment.file.write_at(&body, offset)?;
    *at += padded as u64;
    Ok(Body::Spilled { offset, len, crc })
}

/// Writes a seal at `lsn`.
pub(super) fn write_seal(file: &dyn MediaFile, uuid: u128, lsn: Lsn, used: u64) -> Result<()> {
    let seal = Record::Seal { used };
    let mut bytes = Vec::new();
    frame::put_frame(
        &mut bytes,
        uuid,
        seal.kind(),
        &Body::Inline(seal.body()),
        lsn,
    );
    debug_assert_eq!(bytes.len(), SEAL_LEN as usize);
    file.write_at(&bytes, u64::from(offset_of(lsn)))
}

pub(super) fn lsn_at(segment: u32, offset: u32) -> Lsn {
    Lsn(u64::from(segment) << 32 | u64::from(offset))
}

pub(super) fn offset_of(lsn: Lsn) -> u32 {
    lsn.0 as u32
}

/// Segment and offset of `lsn`.
pub(super) fn split(lsn: Lsn) -> (u32, u32) {
    (segment_of(lsn), offset_of(lsn))
}
