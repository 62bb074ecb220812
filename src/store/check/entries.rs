//! The index against the journal: each entry has its record, each payload its checksum.

use super::{Check, Finding, Fix, Severity, concerned, space::Blocks};
use crate::error::{Error, Result};
use crate::ids::{BLOCK, CHUNK_BLOCKS, Epoch, Ino, Lsn};
use crate::store::Store;
use crate::store::frame;
use crate::store::key::{self, Aspect, Piece, Touch, pairs_of, segment_of};
use crate::store::lookup::piece_range;
use crate::store::media::name_of;
use crate::store::record::Record;
use crate::store::replay::read_record;
use crate::store::types::SnapshotState;
use std::collections::BTreeSet;

/// Entries looked at before the next are fetched.
const PAGE: usize = 256;

impl Check<'_> {
    /// Every entry of the index.
    pub(super) fn entries(&mut self) -> Result<()> {
        let mut from = Vec::new();
        loop {
            let mut page = Vec::new();
            self.store
                .layers
                .scan(&from, &[u8::MAX], &mut |key, value| {
                    page.push((key.to_vec(), value.to_vec()));
                    Ok(page.len() < PAGE)
                })?;
            let Some((last, _)) = page.last() else {
                return Ok(());
            };
            from = [last.as_slice(), &[0]].concat();
            for (key, value) in &page {
                self.entry(key, value)?;
            }
        }
    }

    fn entry(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        self.report.entries += 1;
        if let Some(footprint) = key::footprint(key, value) {
            self.usage
                .entry(footprint.segment)
                .or_default()
                .add(&footprint);
        }
        let bad = self.confirm(|store| match store.layers.get(key)? {
            Some(value) => unreadable(key, &value),
            None => Ok(None),
        })?;
        if bad {
            return Ok(());
        }
        match key.first() {
            Some(b'a' | b'e' | b'b' | b'r') => {
                self.confirm(|store| small(store, key))?;
            }
            Some(b'd') => self.extent(key, value)?,
            Some(b't') => {
                self.confirm(|store| mark(store, key))?;
                return Ok(());
            }
            _ => return Ok(()),
        }
        self.confirm(|store| unmarked(store, key)).map(drop)
    }

    fn extent(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let piece = Piece::parse(key, value)?;
        if let Some(place) = &piece.place {
            self.report.blocks += u64::from(piece.blocks);
            let needed: &mut Blocks = self.needed.entry(segment_of(piece.lsn)).or_default();
            needed.add(u64::from(place.block), u64::from(piece.blocks));
        }
        let bad = self.confirm(|store| payload(store, key))?;
        if !bad {
            self.confirm(|store| extent_record(store, key))?;
        }
        self.confirm(|store| overlap(store, key)).map(drop)
    }
}

fn shown(key: &[u8]) -> String {
    let number = |at: usize| {
        let bytes = key.get(at..at + 8).and_then(|b| b.try_into().ok());
        bytes.map_or(0, u64::from_be_bytes)
    };
    let ino = number(1);
    match key.first() {
        Some(b'a') => format!("attributes of object {ino} labelled {}", number(9)),
        Some(b'e') => match key::entry_parts(key) {
            Ok((name, label)) => {
                let name = String::from_utf8_lossy(name);
                format!("name {name:?} in object {ino} labelled {label}")
            }
            Err(_) => format!("a name in object {ino}"),
        },
        Some(b'd') => {
            let start = key.get(25..27).and_then(|b| b.try_into().ok());
            let start = start.map_or(0, u16::from_be_bytes);
            let first = number(9)
                .wrapping_mul(CHUNK_BLOCKS)
                .wrapping_add(u64::from(start));
            format!(
                "data of object {ino} from block {first} labelled {}",
                number(17)
            )
        }
        Some(b'b') => format!("birth of object {ino}"),
        Some(b'r') => format!("retained object {ino}"),
        Some(b't') => format!("mark of label {ino}"),
        _ => "an entry of the index".into(),
    }
}

fn finding(severity: Severity, key: &[u8], what: impl Into<String>, fix: Fix) -> Finding {
    Finding::new(severity, shown(key), what).fixed_by(fix)
}

fn unreadable(key: &[u8], value: &[u8]) -> Result<Option<Finding>> {
    let checked = match key.first() {
        Some(b'm') if key == key::STATE => key::IndexState::parse(value).map(drop),
        Some(b'm') if key == key::TABLE => key::parse_table(value).map(drop),
        Some(b'm') => key::parse_usage(key, value).map(drop),
        _ => key::check(key, value),
    };
    match checked {
        Ok(()) => Ok(None),
        Err(Error::Corrupt(why)) => {
            let what = format!("the index has it in a form that cannot be read: {why}");
            Ok(Some(finding(Severity::Wrong, key, what, Fix::Rebuild)))
        }
        Err(error) => Err(error),
    }
}

/// Attributes, names, births, retained files: the record is there and says the same. The value of the index
/// is good all the same if the record is damaged.
fn small(store: &Store, key: &[u8]) -> Result<Option<Finding>> {
    let Some(value) = store.layers.get(key)? else {
        return Ok(None);
    };
    let (lsn, _) = key::stamp(&value)?;
    let (what, fix) = match record_of(store, lsn)? {
        Ok(record) if pairs_of(&record, lsn).first() == Some(&(key.to_vec(), value.clone())) => {
            return Ok(None);
        }
        Ok(_) => ("the index and the journal differ", Fix::Rebuild),
        Err(what) => (what, Fix::Evacuate(segment_of(lsn))),
    };
    let what = format!("{} ({what})", place(lsn));
    let found = finding(Severity::Wrong, key, what, fix);
    Ok(Some(found.concerning(concerned(store, key, &value)?)))
}

fn place(lsn: Lsn) -> String {
    let at = crate::store::journal::offset_of(lsn);
    format!("its record in {} at {at}", name_of(segment_of(lsn)))
}

/// A record, or why there is none.
fn record_of(store: &Store, lsn: Lsn) -> Result<std::result::Result<Record, &'static str>> {
    let Some(file) = store.journal.file(segment_of(lsn))? else {
        return Ok(Err("the segment is missing"));
    };
    let record = read_record(file.as_ref(), store.uuid, lsn)?;
    Ok(record.ok_or("the record is damaged; the index still has its value"))
}

/// The piece of an extent that the index has is part of its record.
fn extent_record(store: &Store, key: &[u8]) -> Result<Option<Finding>> {
    let Some(value) = store.layers.get(key)? else {
        return Ok(None);
    };
    let piece = Piece::parse(key, &value)?;
    let (what, fix) = match record_of(store, piece.lsn)? {
        Err(what) => (what, Fix::Evacuate(segment_of(piece.lsn))),
        Ok(Record::Extent(extent)) => {
            let whole = Piece::of(&extent, piece.lsn);
            let (range, own) = (whole.range(), piece.range());
            let within = range.start <= own.start && own.end <= range.end;
            let same =
                (whole.ino, whole.chunk, whole.label) == (piece.ino, piece.chunk, piece.label);
            if same && within && whole.part(own) == piece {
                return Ok(None);
            }
            ("the index and the journal differ", Fix::Rebuild)
        }
        Ok(_) => ("the index and the journal differ", Fix::Rebuild),
    };
    let what = format!("{} ({what})", place(piece.lsn));
    let found = finding(Severity::Wrong, key, what, fix);
    Ok(Some(found.concerning(concerned(store, key, &value)?)))
}

/// The payload of an extent is what was kept.
fn payload(store: &Store, key: &[u8]) -> Result<Option<Finding>> {
    let Some(value) = store.layers.get(key)? else {
        return Ok(None);
    };
    let piece = Piece::parse(key, &value)?;
    let Some(place) = &piece.place else {
        return Ok(None);
    };
    let segment = segment_of(piece.lsn);
    let mut bytes = vec![0; usize::from(piece.blocks) * BLOCK];
    let read = match store.journal.file(segment)? {
        Some(file) => file.read_at(&mut bytes, u64::from(place.block) * BLOCK as u64)?,
        None => 0,
    };
    let sums = frame::block_checksums(&bytes[..read - read % BLOCK]);
    let good = |i: usize| sums.get(i) == place.crcs.get(i);
    let mut bad: Vec<usize> = (0..usize::from(piece.blocks))
        .filter(|i| !good(*i))
        .collect();
    if bad.is_empty() {
        return Ok(None);
    }
    // A rebuilt index refers to blocks that are dead, and given back, until it is swept.
    let birth = store.birth(piece.ino)?.unwrap_or_default();
    let lower = lower_bounds(store, &piece, birth)?;
    let mut names = Vec::new();
    bad.retain(|i| {
        let served = store.names_between(lower[usize::from(piece.start) + i], piece.label);
        let any = !served.is_empty();
        names.extend(served);
        any
    });
    names.sort_unstable();
    names.dedup();
    if bad.is_empty() {
        return Ok(None);
    }
    let (epochs, known) = marks(store, &names, SnapshotState::Suspect);
    let severity = if known {
        Severity::Note
    } else {
        Severity::Lost
    };
    let what = format!(
        "{} of {} blocks in {} are not what was kept",
        bad.len(),
        piece.blocks,
        name_of(segment)
    );
    // A segment that is damaged otherwise takes its broken blocks along when it is evacuated.
    let fix = match store.journal.file(segment)? {
        None => Fix::Evacuate(segment),
        Some(_) if known => Fix::None,
        Some(_) => Fix::Mark(epochs, SnapshotState::Suspect),
    };
    Ok(Some(finding(severity, key, what, fix).concerning(names)))
}

/// The numbers of snapshots, and whether all of them are marked as `state`, or worse.
fn marks(store: &Store, names: &[String], state: SnapshotState) -> (Vec<Epoch>, bool) {
    let table = store.snapshots.published();
    let named = |name: &[u8]| names.contains(&String::from_utf8_lossy(name).into_owned());
    let mut epochs = Vec::new();
    let mut known = true;
    for info in table
        .all
        .iter()
        .filter(|s| s.state != SnapshotState::Deleting && named(&s.name))
    {
        epochs.push(info.epoch);
        known &= info.state == state || info.state == SnapshotState::Invalid;
    }
    (epochs, known)
}

/// The label below which nothing of this piece serves a snapshot.
pub(super) fn lower_bound(store: &Store, piece: &Piece, birth: Epoch) -> Result<Epoch> {
    let lower = lower_bounds(store, piece, birth)?;
    Ok(lower[piece.range()].iter().copied().min().unwrap_or(birth))
}

/// The same for each block of its chunk.
fn lower_bounds(
    store: &Store,
    piece: &Piece,
    birth: Epoch,
) -> Result<[Epoch; CHUNK_BLOCKS as usize]> {
    let mut lower = [birth; CHUNK_BLOCKS as usize];
    let Some(below) = piece.label.0.checked_sub(1) else {
        return Ok(lower);
    };
    for before in store.pieces(piece.ino, piece.chunk, Epoch(0), Some(Epoch(below)))? {
        before
            .range()
            .for_each(|block| lower[block] = lower[block].max(before.label));
    }
    Ok(lower)
}

/// Extents of one label overlap only where they are equal (I2).
fn overlap(store: &Store, key: &[u8]) -> Result<Option<Finding>> {
    let Some(value) = store.layers.get(key)? else {
        return Ok(None);
    };
    let piece = Piece::parse(key, &value)?;
    let (from, to) = piece_range(piece.ino, piece.chunk, piece.label, Some(piece.label));
    let mut found = None;
    store.layers.scan(&from, &to, &mut |other_key, value| {
        let other = Piece::parse(other_key, value)?;
        let (a, b) = (piece.range(), other.range());
        let common = a.start.max(b.start)..a.end.min(b.end);
        let sums = |piece: &Piece| piece.part(common.clone()).place.map(|place| place.crcs);
        if other_key < key && !common.is_empty() && sums(&piece) != sums(&other) {
            let what = format!("another extent of this label has other blocks {common:?}");
            found = Some(finding(Severity::Wrong, key, what, Fix::None));
        }
        Ok(found.is_none())
    })?;
    let Some(found) = found else {
        return Ok(None);
    };
    let names = concerned(store, key, &value)?;
    let (epochs, known) = marks(store, &names, SnapshotState::Invalid);
    // Which of the two is right cannot be told.
    let fix = Fix::Mark(epochs, SnapshotState::Invalid);
    Ok((!known).then(|| found.concerning(names).fixed_by(fix)))
}

/// A record without the mark by which the deletion of a snapshot finds it.
fn unmarked(store: &Store, key: &[u8]) -> Result<Option<Finding>> {
    let Some(value) = store.layers.get(key)? else {
        return Ok(None);
    };
    let aspect = match key.first() {
        Some(b'a') => Aspect::Attr,
        Some(b'e') => Aspect::Entry(key::entry_parts(key)?.0.to_vec()),
        Some(b'd') => Aspect::Chunk(Piece::parse(key, &value)?.chunk),
        _ => return Ok(None),
    };
    let ino = key.get(1..9).and_then(|b| b.try_into().ok());
    let ino = Ino(ino.map_or(0, u64::from_be_bytes));
    let label = match key.first() {
        Some(b'd') => Piece::parse(key, &value)?.label,
        _ => crate::store::lookup::label_at_end(key)?,
    };
    let mark = Touch { label, ino, aspect }.key();
    // Looked for only if the record is still there: the mark goes after it.
    if store.layers.get(&mark)?.is_some() || store.layers.get(key)?.is_none() {
        return Ok(None);
    }
    let what = "the index does not list it for deletion";
    Ok(Some(finding(Severity::Wrong, key, what, Fix::Put(mark))))
}

/// A mark without a record.
fn mark(store: &Store, key: &[u8]) -> Result<Option<Finding>> {
    if store.layers.get(key)?.is_none() {
        return Ok(None);
    }
    let touch = Touch::parse(key)?;
    let there = match &touch.aspect {
        Aspect::Attr => store
            .layers
            .get(&key::attr(touch.ino, touch.label))?
            .is_some(),
        Aspect::Entry(name) => store
            .layers
            .get(&key::entry(touch.ino, name, touch.label))?
            .is_some(),
        Aspect::Chunk(chunk) => {
            let label = touch.label;
            !store
                .pieces(touch.ino, *chunk, label, Some(label))?
                .is_empty()
        }
    };
    let what = "nothing has this label any more";
    Ok((!there).then(|| finding(Severity::Leak, key, what, Fix::Remove(key.to_vec()))))
}

impl Store {
    /// Which of `objects` some name meant that a record still tells of.
    ///
    /// # Errors
    /// As [`Store::attr_at`].
    pub fn named_in_records(&self, objects: &BTreeSet<Ino>) -> Result<BTreeSet<Ino>> {
        let mut named = BTreeSet::new();
        self.layers.scan(b"e", b"f", &mut |_, value| {
            let was = key::entry_value(value)?;
            named.extend(was.map(|was| was.ino).filter(|ino| objects.contains(ino)));
            Ok(true)
        })?;
        Ok(named)
    }
}
