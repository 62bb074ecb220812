//! What a slot holds, as words: pure.

use super::{Aspect, Intent, KnownHandle, KnownNode, KnownTime, Record, WORD};
use crate::ids::{Epoch, Ino};
use crate::store::{EntryImage, ObjectHandle, Timestamp};

/// Bytes of a slot before the handle.
pub(super) const FIXED: usize = 32;
/// No filesystem makes longer handles (`MAX_HANDLE_SZ`).
pub(super) const LONGEST_HANDLE: usize = 128;

// A slot: u8 what it holds (0: nothing), u8, u8, u8, u32, u64, u64, u64, then the handle of a node.

const NODE: u8 = 1;
const FILE: u8 = 2;
const DIRECTORY: u8 = 3;
const INTENT: u8 = 4;
const TIME: u8 = 5;
/// In place of a snapshot's number.
const LIVE: u64 = 0;
const FOLDER: u64 = u64::MAX;

/// With the longest handle and one number after it.
pub(super) const MOST_WORDS: usize = (FIXED + LONGEST_HANDLE) / WORD + 1;

/// The words of a slot, as numbers.
pub(super) struct Words {
    all: [u64; MOST_WORDS],
    count: usize,
}

impl Words {
    fn new(bytes: [u8; 4], word: u32, numbers: [u64; 3]) -> Self {
        let mut all = [0; MOST_WORDS];
        all[0] = u64::from(u32::from_le_bytes(bytes)) | u64::from(word) << 32;
        all[1..4].copy_from_slice(&numbers);
        Self {
            all,
            count: FIXED / WORD,
        }
    }

    /// Appends bytes, filled up to whole words.
    fn with(mut self, bytes: &[u8]) -> Self {
        for part in bytes.chunks(WORD) {
            let mut word = [0; WORD];
            word[..part.len()].copy_from_slice(part);
            self.all[self.count] = u64::from_le_bytes(word);
            self.count += 1;
        }
        self
    }

    pub(super) fn words(&self) -> &[u64] {
        &self.all[..self.count]
    }
}

pub(super) fn encode_node(node: &KnownNode) -> Option<Words> {
    let handle = &node.entry.handle;
    let (snapshot, through) = match node.aspect {
        Aspect::Live => (LIVE, None),
        Aspect::At { epoch, through } => (epoch.0, through),
        Aspect::Folder => (FOLDER, None),
    };
    let length = u8::try_from(handle.bytes.len()).ok()?;
    if usize::from(length) > LONGEST_HANDLE {
        return None;
    }
    let bytes = [NODE, node.entry.kind, length, u8::from(through.is_some())];
    let numbers = [node.entry.ino.0, snapshot, node.lookups];
    let words = Words::new(bytes, handle.kind as u32, numbers).with(&handle.bytes);
    Some(match through {
        Some(dir) => words.with(&dir.0.to_le_bytes()),
        None => words,
    })
}

pub(super) fn encode_handle(handle: &KnownHandle) -> Words {
    let what = if handle.directory { DIRECTORY } else { FILE };
    let numbers = [handle.id, handle.node, handle.unique];
    Words::new([what, 0, 0, 0], handle.flags as u32, numbers)
}

pub(super) fn encode_intent(intent: &Intent) -> Words {
    let numbers = [intent.unique, intent.ino.0, u64::from(intent.there)];
    Words::new([INTENT, 0, 0, 0], 0, numbers)
}

pub(super) fn encode_time(known: &KnownTime) -> Words {
    let numbers = [known.ino.0, nanoseconds(known.time), 0];
    Words::new([TIME, 0, 0, 0], 0, numbers)
}

const SECOND: i64 = 1_000_000_000;

/// A time in one word, so that it is written whole: nanoseconds since 1970, or `i64::MIN` for one that is too far from it.
pub(super) fn nanoseconds(time: Timestamp) -> u64 {
    let whole = time.sec.checked_mul(SECOND);
    let all = whole.and_then(|whole| whole.checked_add(i64::from(time.nsec)));
    all.unwrap_or(i64::MIN) as u64
}

fn time_of(nanoseconds: u64) -> Option<Timestamp> {
    let all = nanoseconds as i64;
    (all != i64::MIN).then(|| Timestamp {
        sec: all.div_euclid(SECOND),
        nsec: all.rem_euclid(SECOND) as u32,
    })
}

pub(super) fn number(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at + 8)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

pub(super) fn decode(bytes: &[u8]) -> Option<Record> {
    let word = u32::from_le_bytes(bytes.get(4..8)?.try_into().ok()?);
    let field = |at: usize| number(bytes, 8 + 8 * at);
    match bytes[0] {
        NODE => Some(Record::Node(KnownNode {
            aspect: match field(1)? {
                LIVE => Aspect::Live,
                FOLDER => Aspect::Folder,
                epoch => Aspect::At {
                    epoch: Epoch(epoch),
                    through: match bytes[3] {
                        0 => None,
                        _ => {
                            let at = FIXED + usize::from(bytes[2]).next_multiple_of(WORD);
                            Some(Ino(number(bytes, at)?))
                        }
                    },
                },
            },
            entry: EntryImage {
                ino: Ino(field(0)?),
                kind: bytes[1],
                handle: ObjectHandle {
                    kind: word as i32,
                    bytes: bytes
                        .get(FIXED..FIXED + usize::from(bytes[2]))?
                        .to_vec()
                        .into(),
                },
            },
            lookups: field(2)?,
        })),
        what @ (FILE | DIRECTORY) => Some(Record::Handle(KnownHandle {
            id: field(0)?,
            node: field(1)?,
            flags: word as i32,
            unique: field(2)?,
            directory: what == DIRECTORY,
        })),
        TIME => Some(Record::Time(KnownTime {
            ino: Ino(field(0)?),
            time: time_of(field(1)?)?,
        })),
        INTENT => Some(Record::Intent(Intent {
            unique: field(0)?,
            ino: Ino(field(1)?),
            there: field(2)? != 0,
        })),
        _ => None,
    }
}
