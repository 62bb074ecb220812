//! Space: the accounts of the segments, and what takes room and is needed by nobody.

use super::{Check, Finding, Fix, Severity};
use crate::error::Result;
use crate::ids::BLOCK;
use crate::store::key::Usage;
use crate::store::media::name_of;
use crate::store::replay::read_segment;

/// Blocks read at once.
const AT_ONCE: usize = 256;

/// A set of blocks of one segment.
#[derive(Debug, Default)]
pub(super) struct Blocks(Vec<u64>);

impl Blocks {
    pub(super) fn add(&mut self, first: u64, count: u64) {
        for block in first..first.saturating_add(count) {
            let word = (block / 64) as usize;
            if word >= self.0.len() {
                self.0.resize(word + 1, 0);
            }
            self.0[word] |= 1 << (block % 64);
        }
    }

    fn has(&self, block: u64) -> bool {
        let word = self.0.get((block / 64) as usize);
        word.is_some_and(|word| word >> (block % 64) & 1 == 1)
    }
}

impl Check<'_> {
    /// The accounts, and each segment's payload that nothing refers to.
    pub(super) fn space(&mut self) -> Result<()> {
        self.accounts();
        let mut numbers = self.store.journal.media.list()?;
        numbers.sort_unstable();
        for number in numbers {
            self.unneeded(number)?;
        }
        Ok(())
    }

    /// What an index that was closed in order has noted must be what it refers to.
    fn accounts(&mut self) {
        let noted = self.store.opened.noted.lock().clone();
        let Some(noted) = noted.filter(|_| self.store.journal.appended() == 0) else {
            return;
        };
        let counted = |number: &u32| self.usage.get(number).copied().unwrap_or_default();
        let differs = |(number, noted): &(&u32, &Usage)| {
            let counted = counted(number);
            (noted.live, noted.payload, noted.records)
                != (counted.live, counted.payload, counted.records)
        };
        let wrong: Vec<_> = noted.iter().filter(differs).collect();
        for (number, noted) in wrong {
            let counted = counted(number);
            let what = format!(
                "its account says {} records, {} bytes, {} of them payload; it has {}, {} and {}",
                noted.records,
                noted.live,
                noted.payload,
                counted.records,
                counted.live,
                counted.payload
            );
            let finding = Finding::new(Severity::Wrong, name_of(*number), what);
            self.report.add(finding.fixed_by(Fix::Account));
        }
    }

    fn unneeded(&mut self, number: u32) -> Result<()> {
        let Some(file) = self.store.journal.media.open(number)? else {
            return Ok(());
        };
        let area = self.store.journal.log_area();
        let log = read_segment(file.as_ref(), number, self.store.uuid, 0, area)?;
        if log.records.is_empty() {
            return Ok(());
        }
        let needed = self.needed.entry(number).or_default();
        for (offset, len) in &log.spills {
            needed.add(offset / BLOCK as u64, len.div_ceil(BLOCK as u64));
        }
        let (mut at, size) = (log.log_area, file.size()?);
        let mut bytes = vec![0; AT_ONCE * BLOCK];
        let mut leaks: Vec<(u64, u64)> = Vec::new();
        while at < size {
            let read = file.read_at(&mut bytes, at)?;
            if read == 0 {
                break;
            }
            for (block, bytes) in (at / BLOCK as u64..).zip(bytes[..read].chunks(BLOCK)) {
                if needed.has(block) || bytes.iter().all(|byte| *byte == 0) {
                    continue;
                }
                let start = block * BLOCK as u64;
                match leaks.last_mut() {
                    Some((from, len)) if *from + *len == start => *len += BLOCK as u64,
                    _ => leaks.push((start, BLOCK as u64)),
                }
            }
            at += read as u64;
        }
        for (offset, len) in leaks {
            let what = format!("{len} bytes at {offset} are needed by no record");
            let finding = Finding::new(Severity::Leak, name_of(number), what);
            self.report
                .add(finding.fixed_by(Fix::Punch(number, offset, len)));
        }
        Ok(())
    }
}
