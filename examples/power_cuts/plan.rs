//! What a writer does: step after step, each one system call, so that the state of its directory is a function of the
//! number of steps. Writer and check share it.

use std::fmt;

/// Bytes that one step writes.
pub const BLOCK: usize = 4096;
/// What a disk writes whole or not at all.
pub const SECTOR: usize = 512;
/// Blocks of the file that is overwritten.
pub const BLOCKS: u64 = 64;
/// A writer syncs all it has after so many steps, and reports it.
pub const SYNC_EVERY: u64 = 16;
/// Writers in each round.
pub const WRITERS: u32 = 3;

/// One step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Appends a block to `log`.
    Append,
    /// Overwrites a block of `blocks`.
    Overwrite(u64),
    /// Creates `new`, empty.
    Create,
    /// Writes a block to `new`.
    Fill,
    /// Renames `new` over `cur`.
    Rename,
    /// Changes the mode of `cur`.
    Mode(u32),
    /// Cuts `log` down to nothing.
    Truncate,
}

impl Step {
    /// The step of that number; the first is 1.
    pub fn of(number: u64) -> Self {
        match number % 8 {
            _ if number % 512 == 504 => Self::Truncate,
            1 | 3 => Self::Overwrite(number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 58),
            4 => Self::Create,
            5 => Self::Fill,
            6 => Self::Rename,
            7 => Self::Mode(0o600 | (number / 8 % 64) as u32),
            _ => Self::Append,
        }
    }
}

/// The directory of a writer after some step. Blocks are known by the step that wrote them, 0 is the preparation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// Of each block of `log`.
    pub log: Vec<u64>,
    /// Of each block of `blocks`.
    pub blocks: Vec<u64>,
    /// Of the block of `new`, if it exists and has one.
    pub new: Option<Option<u64>>,
    /// Of the block of `cur`.
    pub cur: u64,
    /// The mode of `cur`.
    pub mode: u32,
}

impl State {
    /// After the preparation.
    pub fn start() -> Self {
        Self {
            log: Vec::new(),
            blocks: vec![0; BLOCKS as usize],
            new: None,
            cur: 0,
            mode: 0o600,
        }
    }

    /// After `steps` steps.
    pub fn after(steps: u64) -> Self {
        let mut state = Self::start();
        (1..=steps).for_each(|step| state.apply(step));
        state
    }

    /// Does one step.
    pub fn apply(&mut self, step: u64) {
        match Step::of(step) {
            Step::Append => self.log.push(step),
            Step::Overwrite(block) => self.blocks[block as usize] = step,
            Step::Create => self.new = Some(None),
            Step::Fill => self.new = Some(Some(step)),
            Step::Rename => {
                if let Some(Some(block)) = self.new.take() {
                    self.cur = block;
                    self.mode = 0o600;
                }
            }
            Step::Mode(mode) => self.mode = mode,
            Step::Truncate => self.log.clear(),
        }
    }
}

/// The writer of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Author {
    /// The round.
    pub round: u32,
    /// The writer.
    pub writer: u32,
}

impl fmt::Display for Author {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r{}.w{}", self.round, self.writer)
    }
}

impl Author {
    fn sector(self, step: u64, number: usize) -> [u8; SECTOR] {
        let mut sector = [0; SECTOR];
        for (word, bytes) in (0_u64..).zip(sector.chunks_mut(8)) {
            let value = match word % 4 {
                0 => 0xC0F5_0000_0000_0000 | u64::from(self.round) << 16 | u64::from(self.writer),
                1 => step,
                2 => number as u64,
                _ => step.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ word,
            };
            bytes.copy_from_slice(&value.to_le_bytes());
        }
        sector
    }

    /// The bytes that a step writes.
    pub fn block(self, step: u64) -> Vec<u8> {
        let sectors = BLOCK / SECTOR;
        (0..sectors)
            .flat_map(|number| self.sector(step, number))
            .collect()
    }

    /// The step that wrote a sector, the `number`th of its block; `None` if no step of this author did.
    pub fn step_of_sector(self, sector: &[u8], number: usize) -> Option<u64> {
        let step = u64::from_le_bytes(sector.get(8..16)?.try_into().ok()?);
        (sector == self.sector(step, number)).then_some(step)
    }

    /// The step that wrote a block, if one did wholly.
    pub fn step_of_block(self, block: &[u8]) -> Option<u64> {
        let mut steps = (0..)
            .zip(block.chunks(SECTOR))
            .map(|(n, s)| self.step_of_sector(s, n));
        let first = steps.next()??;
        (block.len() == BLOCK && steps.all(|step| step == Some(first))).then_some(first)
    }
}
