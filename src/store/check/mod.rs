//! Looking a store over: the journal by itself, the index against it, the space that both take.
//!
//! Two kinds of stores are looked at. One that nobody uses is opened on a copy of its index, with what
//! opening would write kept in memory (`examine.rs`), so nothing of it changes. One that is in use is looked
//! at by its own process while records come and go. There, whatever looks wrong is looked at again while the
//! background job is held and every append is published; only what is wrong then as well is reported.

mod entries;
mod records;
mod space;

use super::Store;
use super::lookup::label_at_end;
use super::types::SnapshotState;
use super::{key, media::name_of};
use crate::error::Result;
use crate::ids::{Epoch, Ino};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Findings that are kept in full; further ones are only counted.
const MOST: usize = 1000;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// A value that snapshots need is gone. Reading it fails; no other value is served for it.
    Lost,
    /// Something is not as it must be, and nothing is lost: it can be made right.
    Wrong,
    /// Space that nothing needs.
    Leak,
    /// A loss of which the snapshots concerned are marked, or a thing that is none of cowfs's business.
    Note,
}

/// What would make a finding right.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) enum Fix {
    #[default]
    None,
    /// Append anew what the index has of this segment, and remove the file.
    Evacuate(u32),
    /// Drop the index and replay the journal.
    Rebuild,
    /// Give the index an empty value of this key.
    Put(Vec<u8>),
    /// Take this key out of the index.
    Remove(Vec<u8>),
    /// Give back a range of bytes of a segment.
    Punch(u32, u64, u64),
    /// Append the table anew.
    Rehome,
    /// Mark these snapshots.
    Mark(Vec<Epoch>, SnapshotState),
    /// Write the accounts of the segments anew.
    Account,
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is about: a file of the store, an object, a name.
    pub thing: String,
    /// What is the matter with it.
    pub what: String,
    /// The names of the snapshots that it concerns (bytes that are not UTF-8 replaced).
    #[serde(default)]
    pub snapshots: Vec<String>,
    #[serde(skip)]
    pub(super) fix: Fix,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CheckReport {
    /// What was found, the journal first.
    pub findings: Vec<Finding>,
    /// Findings beyond those listed.
    pub more: u64,
    /// Segments of the journal.
    pub segments: u64,
    /// Good records in them, the dead among them.
    pub records: u64,
    /// Entries of the index.
    pub entries: u64,
    /// Blocks of payload that were compared with their checksums.
    pub blocks: u64,
    /// Snapshots that are marked as suspect or invalid, with the mark.
    pub marked: Vec<String>,
}

impl CheckReport {
    /// Whether anything is lost or wrong; leaks and notes do not count.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        self.more > 0 || self.findings.iter().any(|f| f.severity <= Severity::Wrong)
    }

    /// Adds a finding.
    pub fn add(&mut self, finding: Finding) {
        if self.findings.len() < MOST {
            self.findings.push(finding);
        } else {
            self.more += 1;
        }
    }
}

impl Finding {
    /// A finding that concerns no snapshot.
    #[must_use]
    pub fn new(severity: Severity, thing: impl Into<String>, what: impl Into<String>) -> Self {
        Self {
            severity,
            thing: thing.into(),
            what: what.into(),
            snapshots: Vec::new(),
            fix: Fix::None,
        }
    }

    pub(super) fn fixed_by(self, fix: Fix) -> Self {
        Self { fix, ..self }
    }

    /// The same, with the snapshots that it concerns.
    #[must_use]
    pub fn concerning(self, snapshots: Vec<String>) -> Self {
        Self { snapshots, ..self }
    }
}

/// One run of a check.
struct Check<'a> {
    store: &'a Store,
    /// Others use the store meanwhile.
    live: bool,
    report: CheckReport,
    /// The blocks of each segment that something refers to.
    needed: BTreeMap<u32, space::Blocks>,
    usage: BTreeMap<u32, key::Usage>,
}

impl Store {
    /// Looks everything over. `live`: others use the store meanwhile; leaks are looked for only if not.
    /// Changes nothing.
    ///
    /// # Errors
    /// Those of reading the files. Damage is no error.
    pub fn check(&self, live: bool) -> Result<CheckReport> {
        let mut check = Check {
            store: self,
            live,
            report: CheckReport::default(),
            needed: BTreeMap::new(),
            usage: BTreeMap::new(),
        };
        check.opening();
        check.segments()?;
        check.entries()?;
        check.table()?;
        if !live {
            check.space()?;
        }
        let table = self.snapshots.published();
        for info in table.all.iter() {
            let mark = match info.state {
                SnapshotState::Ready | SnapshotState::Deleting => continue,
                SnapshotState::Suspect => "suspect",
                SnapshotState::Invalid => "invalid",
            };
            let name = String::from_utf8_lossy(&info.name);
            check.report.marked.push(format!("{name} ({mark})"));
        }
        Ok(check.report)
    }

    /// The names of the snapshots in `(after, to]`.
    #[must_use]
    pub fn names_between(&self, after: Epoch, to: Epoch) -> Vec<String> {
        let table = self.snapshots.published();
        let within = table.all.within(after, to).filter(|s| s.state.keeps());
        within
            .map(|s| String::from_utf8_lossy(&s.name).into_owned())
            .collect()
    }
}

impl Store {
    /// Whether all snapshots in `(after, to]` are marked as suspect or invalid.
    #[must_use]
    pub fn are_marked(&self, after: Epoch, to: Epoch) -> bool {
        let table = self.snapshots.published();
        let mut within = table.all.within(after, to);
        within.all(|s| s.state != SnapshotState::Ready)
    }

    /// Whether a file of the journal can have this name.
    #[must_use]
    pub fn is_segment_name(name: &str) -> bool {
        super::media::number_of(name.as_bytes()).is_some()
    }
}

impl Check<'_> {
    /// Looks; in a live store once more, while nothing moves, if something was found.
    fn confirm(&mut self, look: impl Fn(&Store) -> Result<Option<Finding>>) -> Result<bool> {
        let mut found = look(self.store)?;
        if found.is_some() && self.live {
            let _still = self.store.upkeep.lock();
            self.store.journal.wait_published();
            found = look(self.store)?;
        }
        let any = found.is_some();
        if let Some(finding) = found {
            self.report.add(finding);
        }
        Ok(any)
    }

    /// What opening could not put right without help.
    fn opening(&mut self) {
        if self.live {
            return;
        }
        if let Some(why) = &self.store.opened.distrust {
            let what =
                format!("cannot be used ({why}); the next mount rebuilds it from the journal");
            self.report
                .add(Finding::new(Severity::Wrong, "index", what));
        }
        if self.store.opened.lost {
            let what = "records are lost that the index does not have either, and which they were cannot be told";
            let names = self.store.names_between(Epoch(0), Epoch(u64::MAX));
            let finding = Finding::new(Severity::Lost, "journal", what);
            self.report.add(finding.concerning(names));
            return;
        }
        let names = self.store.in_doubt();
        if !names.is_empty() {
            let what = match self.store.went_down() {
                true => {
                    "the machine went down, or the filesystem was mounted anew, while the directory was mounted"
                }
                false => "missing or damaged",
            };
            let what = format!("{what}: the next mount makes the snapshots suspect");
            let finding = Finding::new(Severity::Note, "journal/session", what);
            self.report.add(finding.concerning(names));
        }
    }

    /// The table: where the newest copy of it is, and whether it makes sense.
    fn table(&mut self) -> Result<()> {
        self.confirm(|store| {
            let (table, home) = store.snapshots.for_index();
            let mut names: Vec<_> = table
                .snapshots
                .iter()
                .filter(|s| s.state != SnapshotState::Deleting)
                .map(|s| &s.name)
                .collect();
            names.sort_unstable();
            let twice = names.windows(2).find(|pair| pair[0] == pair[1]);
            if let Some(pair) = twice {
                let name = String::from_utf8_lossy(pair[0]).into_owned();
                return Ok(Some(Finding::new(
                    Severity::Wrong,
                    name,
                    "two snapshots have this name",
                )));
            }
            let Some(home) = home else { return Ok(None) };
            let there = match store.journal.file(home)? {
                None => false,
                Some(file) => records::has_table(store, file.as_ref(), home, &table)?,
            };
            let what = format!("{} does not have it, as the index says", name_of(home));
            Ok((!there).then(|| {
                Finding::new(Severity::Wrong, "snapshot table", what).fixed_by(Fix::Rehome)
            }))
        })
        .map(drop)
    }
}

/// The snapshots that the value of an index entry serves.
fn concerned(store: &Store, key: &[u8], value: &[u8]) -> Result<Vec<String>> {
    let number = |at: usize| {
        let bytes: Option<[u8; 8]> = key.get(at..at + 8).and_then(|b| b.try_into().ok());
        Ino(bytes.map_or(0, u64::from_be_bytes))
    };
    let ino = number(1);
    let birth = store.birth(ino).ok().flatten().unwrap_or_default();
    let (after, to) = match key.first() {
        Some(b'a' | b'e') => {
            let first = &key[..key.len().saturating_sub(8)];
            let before = store.layers.last(first, key)?;
            let before = before.map_or(Ok(Epoch(0)), |(key, _)| label_at_end(&key))?;
            (before.max(birth), label_at_end(key)?)
        }
        Some(b'd') => {
            let piece = key::Piece::parse(key, value)?;
            (entries::lower_bound(store, &piece, birth)?, piece.label)
        }
        Some(b'b') => (Epoch(0), Epoch(u64::MAX)),
        Some(b'r') => {
            let (_, retained) = key::retained_value(value)?;
            (retained.birth, retained.removed)
        }
        _ => return Ok(Vec::new()),
    };
    Ok(store.names_between(after, to))
}
