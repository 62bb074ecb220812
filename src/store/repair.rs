//! Making a damaged store right, without losing anything in it that is right.
//!
//! What the journal has lost and the index still has is appended anew, and the damaged segment goes; what the
//! index has wrong is replayed from the journal. Blocks of payload that are lost keep their old checksums, so
//! that they go on failing them; the snapshots that they served are marked.

use super::check::{CheckReport, Fix, Severity};
use super::journal::Batch;
use super::key::{self, Piece};
use super::media::name_of;
use super::record::Record;
use super::types::{SnapshotState, StoreOptions};
use super::{Store, index::SledIndex};
use crate::error::{Error, Result};
use crate::ids::{Epoch, Ino};
use std::collections::BTreeSet;
use std::path::Path;

/// Rounds of looking and mending: a segment goes, then what it had lost is marked, then nothing is left.
const ROUNDS: usize = 6;

impl Store {
    /// Opens the store at `dir` and makes right what can be. Returns it, and what was done, a line each.
    /// A second call finds nothing to do.
    ///
    /// # Errors
    /// As [`Store::open`]; those of writing. What was mended before stays so.
    pub fn repair(dir: &Path, options: StoreOptions) -> Result<(Self, Vec<String>)> {
        let mut done = Vec::new();
        for _ in 0..ROUNDS {
            let store = Self::open(dir, options.clone())?;
            let report = store.check(false)?;
            let fixes: Vec<Fix> = report.findings.iter().map(|f| f.fix.clone()).collect();
            if store.opened.distrust.is_some() {
                done.push("the index was rebuilt from the journal".into());
            }
            if store.opened.lost {
                done.push(marked_line(&report));
            }
            if fixes.iter().all(|fix| *fix == Fix::None)
                && store.opened.distrust.is_none()
                && !store.opened.lost
            {
                return Ok((store, done));
            }
            store.mend(&fixes, &mut done)?;
            store.close()?;
            drop(store);
            if fixes.contains(&Fix::Rebuild) {
                SledIndex::condemn(&dir.join("index"))?;
            }
        }
        Ok((Self::open(dir, options)?, done))
    }

    fn mend(&self, fixes: &[Fix], done: &mut Vec<String>) -> Result<()> {
        let segments: BTreeSet<u32> = fixes
            .iter()
            .filter_map(|fix| match fix {
                Fix::Evacuate(segment) => Some(*segment),
                _ => None,
            })
            .collect();
        for segment in segments {
            let count = self.evacuate(segment)?;
            done.push(format!(
                "{}: removed, after what is good of it ({count} records) was written anew",
                name_of(segment)
            ));
        }
        let mut punched = 0;
        for fix in fixes {
            match fix {
                Fix::Put(key) => self.layers.index.put(key, &[])?,
                Fix::Remove(key) => self.layers.index.remove(key)?,
                Fix::Punch(segment, offset, len) => {
                    if let Some(file) = self.journal.file(*segment)? {
                        file.punch(*offset, *len)?;
                        punched += len;
                    }
                }
                Fix::Rehome => {
                    self.snapshots.rehome(&self.journal, u32::MAX)?;
                    done.push("the snapshot table was written anew".into());
                }
                Fix::Mark(epochs, state) => {
                    let names = self.mark(epochs, *state)?;
                    if !names.is_empty() {
                        done.push(format!(
                            "marked as {}: {}",
                            state.as_str(),
                            names.join(", ")
                        ));
                    }
                }
                Fix::Evacuate(_) | Fix::Rebuild | Fix::Account | Fix::None => {}
            }
        }
        let count = |wanted: fn(&Fix) -> bool| fixes.iter().filter(|fix| wanted(fix)).count();
        let lines = [
            (
                count(|fix| matches!(fix, Fix::Put(_))),
                "entries of the index were added",
            ),
            (
                count(|fix| matches!(fix, Fix::Remove(_))),
                "entries of the index were removed",
            ),
            (
                count(|fix| matches!(fix, Fix::Account)),
                "accounts of segments were corrected",
            ),
            (punched as usize, "bytes that nothing needs were given back"),
        ];
        let lines = lines.into_iter().filter(|(count, _)| *count > 0);
        done.extend(lines.map(|(count, what)| format!("{count} {what}")));
        self.layers.index.sync()
    }

    /// Marks snapshots, durably, unless they are marked as badly already; returns the names of the others.
    ///
    /// # Errors
    /// As [`Store::record_snapshot`].
    pub fn mark(&self, epochs: &[Epoch], state: SnapshotState) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for info in self
            .snapshots()
            .iter()
            .filter(|s| epochs.contains(&s.epoch))
        {
            let better = info.state == SnapshotState::Ready
                || (info.state == SnapshotState::Suspect && state == SnapshotState::Invalid);
            if !better {
                continue;
            }
            let mut info = super::SnapshotInfo::clone(info);
            info.state = state;
            let lsn = self.record_snapshot(&info)?;
            self.wait_durable(lsn)?;
            names.push(String::from_utf8_lossy(&info.name).into_owned());
        }
        Ok(names)
    }

    /// As [`Self::mark`], for the snapshots in `(after, to]`.
    ///
    /// # Errors
    /// As [`Store::record_snapshot`].
    pub fn mark_between(
        &self,
        after: Epoch,
        to: Epoch,
        state: SnapshotState,
    ) -> Result<Vec<String>> {
        let all = self.snapshots();
        let within = all.within(after, to);
        self.mark(&within.map(|s| s.epoch).collect::<Vec<_>>(), state)
    }

    /// Appends what the index has of a segment anew, and removes the file, if there is one. Returns the number
    /// of records.
    fn evacuate(&self, segment: u32) -> Result<usize> {
        let mut upkeep = self.upkeep.lock();
        self.checkpoint_in(&mut upkeep, false)?;
        // The journal's end stays known when the last of its segments goes, and the table is not only there.
        self.snapshots.rehome(&self.journal, u32::MAX)?;
        let mut keys = Vec::new();
        self.layers.index.scan(&[], &[u8::MAX], &mut |key, value| {
            let there = key::footprint(key, value).is_some_and(|f| f.segment == segment);
            // Entries that cannot be read are for a rebuild.
            if there && key::check(key, value).is_ok() {
                keys.push((key.to_vec(), value.to_vec()));
            }
            Ok(true)
        })?;
        for (key, value) in &keys {
            if key.first() == Some(&b'd') {
                self.move_piece(&Piece::parse(key, value)?)?;
                continue;
            }
            let _moving = self.moving.write();
            self.append(Batch::small(vec![record_of(key, value)?]))?;
        }
        self.checkpoint_in(&mut upkeep, false)?;
        for (key, _) in keys.iter().filter(|(key, _)| key.first() == Some(&b'd')) {
            self.layers.index.remove(key)?;
        }
        self.layers.index.remove(&key::usage(segment))?;
        self.layers.index.sync()?;
        self.journal.remove(segment)?;
        Ok(keys.len())
    }
}

fn marked_line(report: &CheckReport) -> String {
    let lost = report
        .findings
        .iter()
        .find(|f| f.severity == Severity::Lost);
    let names = lost.map_or(&[][..], |f| &f.snapshots[..]);
    format!(
        "records are lost; the snapshots there are were marked: {}",
        names.join(", ")
    )
}

/// The journal record that an entry of the index came from.
fn record_of(key: &[u8], value: &[u8]) -> Result<Record> {
    let bad = || Error::Corrupt("an entry of the index that no record makes".into());
    let ino = key
        .get(1..9)
        .and_then(|b| b.try_into().ok())
        .ok_or_else(bad)?;
    let ino = Ino(u64::from_be_bytes(ino));
    Ok(match key.first() {
        Some(b'a') => Record::Attr {
            ino,
            label: super::lookup::label_at_end(key)?,
            image: key::attr_value(value)?,
        },
        Some(b'e') => {
            let (name, label) = key::entry_parts(key)?;
            Record::Entry {
                dir: ino,
                label,
                name: name.to_vec(),
                was: key::entry_value(value)?,
            }
        }
        Some(b'b') => Record::Birth {
            ino,
            epoch: key::birth_value(value)?,
        },
        Some(b'r') => {
            let (gone, retained) = key::retained_value(value)?;
            Record::Retained { gone, retained }
        }
        _ => return Err(bad()),
    })
}
