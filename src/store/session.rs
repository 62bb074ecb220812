//! The session file: what a power cut may have taken, known durably before it can happen (C8).
//!
//! A session is the life of one process with the store. While records are in the journal that are not durable
//! yet, though the changes that they guard may be applied (durability `ordered`), the file says *dirty*. It
//! says how far snapshots are *settled* too: all that they show was durable once, at or after their cut. And it
//! names the boot of the machine, which tells a process that was killed, and lost nothing, from a machine that
//! went down. docs/FORMAT.md has the bytes and the argument.

use super::Store;
use super::codec::{Reader, Writer};
use super::media::{Media, MediaFile};
use super::types::{SnapshotInfo, SnapshotState, StoreOptions};
use crate::error::{Error, Result};
use crate::ids::{Epoch, Lsn};
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, Ordering};
use rustix::io::Errno;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Two slots, written in turn: one that is torn leaves the other, with what held before.
const SLOT: u64 = 4096;
const MAGIC: &[u8; 8] = b"cowfssn2";
/// Magic, sequence, uuid, boot, settled, dirty, end, checksum.
const LEN: usize = 8 + 8 + 16 + 16 + 8 + 1 + 8 + 4;
/// The first version does not say where the journal ends.
const MAGIC_1: &[u8; 8] = b"cowfssn1";
const LEN_1: usize = LEN - 8;

/// What the file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    /// Counts the writes; the slot with the higher one holds.
    sequence: u64,
    boot: u128,
    /// Snapshots up to this one are settled.
    settled: Epoch,
    dirty: bool,
    /// Up to where the journal was durable when this was written, as far as a process of this or an earlier session has
    /// appended to it; 0 if that is not known.
    end: Lsn,
}

impl State {
    fn encode(&self, uuid: u128) -> Vec<u8> {
        let mut w = Writer::default();
        w.raw(MAGIC);
        w.u64(self.sequence);
        w.raw(&uuid.to_le_bytes());
        w.raw(&self.boot.to_le_bytes());
        w.u64(self.settled.0);
        w.u8(u8::from(self.dirty));
        w.u64(self.end.0);
        let crc = crc32c::crc32c(&w.0);
        w.u32(crc);
        w.0
    }

    /// `None` for bytes that are no whole slot of the store `uuid`.
    fn decode(bytes: &[u8], uuid: u128) -> Option<Self> {
        let (len, magic) = match bytes.starts_with(MAGIC_1) {
            true => (LEN_1, MAGIC_1),
            false => (LEN, MAGIC),
        };
        let (body, crc) = bytes.get(..len)?.split_last_chunk::<4>()?;
        if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
            return None;
        }
        let mut r = Reader(body.strip_prefix(magic)?);
        let state = |r: &mut Reader<'_>| -> Result<(u128, Self)> {
            let sequence = r.u64()?;
            let (uuid, boot) = (r.u128()?, r.u128()?);
            let (settled, dirty) = (Epoch(r.u64()?), r.u8()? != 0);
            let end = match magic == MAGIC {
                true => Lsn(r.u64()?),
                false => Lsn(0),
            };
            let state = Self {
                sequence,
                boot,
                settled,
                dirty,
                end,
            };
            Ok((uuid, state))
        };
        state(&mut r)
            .ok()
            .filter(|(of, _)| *of == uuid)
            .map(|s| s.1)
    }
}

/// The number of the next write after that with the number `last`, if there were `before` as far as is known. It goes to the
/// same slot in any case, as the other one has what holds.
fn next_sequence(last: u64, before: u64) -> u64 {
    let next = last + 1;
    next + (before + 1).saturating_sub(next).next_multiple_of(2)
}

/// The session of this process.
pub(super) struct Session {
    file: Arc<dyn MediaFile>,
    uuid: u128,
    /// [`StoreOptions::sequence`].
    before: u64,
    /// The machine's boot; `None`: no sessions are kept.
    boot: Option<u128>,
    /// The machine went down since the last session.
    pub(super) went_down: bool,
    /// What the file says durably; `None`: there was no file, or nothing readable in it. Held while the file is
    /// written, and while a session that was dirty is made clean.
    written: Mutex<Option<State>>,
    /// `written` is dirty, and stays so until somebody takes its lock.
    dirty: AtomicBool,
    /// `written.settled`, to be read without the lock.
    settled: AtomicU64,
}

impl Session {
    /// Reads what the last session has left.
    pub(super) fn read(media: &dyn Media, uuid: u128, options: &StoreOptions) -> Result<Self> {
        let boot = options.boot;
        let file = media.session()?;
        let mut found: Option<State> = None;
        for slot in 0..2 {
            let mut bytes = [0; LEN];
            let read = file.read_at(&mut bytes, slot * SLOT)?;
            let state = State::decode(&bytes[..read], uuid);
            if state.map(|s| s.sequence) > found.map(|s| s.sequence) {
                found = state;
            }
        }
        let last = found.map(|state| state.boot);
        Ok(Self {
            file,
            uuid,
            before: options.sequence,
            boot,
            went_down: boot.is_some() && last.is_some() && last != boot,
            written: Mutex::new(found),
            dirty: AtomicBool::new(false),
            settled: AtomicU64::new(found.map_or(0, |state| state.settled.0)),
        })
    }
}

impl Session {
    /// Up to where the journal must reach.
    pub(super) fn end(&self) -> Lsn {
        self.written.lock().map_or(Lsn(0), |state| state.end)
    }

    /// The machine has not gone down since the last session, as far as is known.
    pub(super) fn stayed_up(&self) -> bool {
        let known = self.boot.is_some() && self.written.lock().is_some();
        known && !self.went_down
    }
}

/// The number of the machine's present boot (random(4)).
///
/// # Errors
/// [`Error::Path`] if /proc is not there: without it a power cut could not be told.
pub fn boot_id() -> Result<u128> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = std::fs::read_to_string(path).map_err(|e| Error::io("cannot read", path, &e))?;
    let hex: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&hex, 16).map_err(|_| Error::path("cannot read", path, Errno::INVAL))
}

impl Store {
    /// How often the session file of the store `uuid`, open as `file`, was written at the most. Each session writes it, so
    /// an older state of the store has a smaller number. `None` if it says nothing.
    #[must_use]
    pub fn sequence_in(file: &File, uuid: u128) -> Option<u64> {
        let slot = |slot| {
            let mut bytes = [0; LEN];
            let read = file.read_at(&mut bytes, slot * SLOT).ok()?;
            State::decode(&bytes[..read], uuid).map(|state| state.sequence)
        };
        match (slot(0), slot(1)) {
            (Some(one), Some(other)) => Some(one.max(other)),
            // What cannot be read may have been the later one.
            (Some(known), None) | (None, Some(known)) => Some(known + 1),
            (None, None) => None,
        }
    }

    /// How often the session file of this store has been written, as far as it says.
    #[must_use]
    pub fn sequence(&self) -> Option<u64> {
        self.session.written.lock().map(|state| state.sequence)
    }

    /// Makes `next`, numbered anew, what the session file says, durably.
    fn write_session(&self, written: &mut Option<State>, next: State) -> Result<()> {
        let session = &self.session;
        let sequence = next_sequence(written.map_or(0, |state| state.sequence), session.before);
        let next = State { sequence, ..next };
        let place = sequence % 2 * SLOT;
        session
            .file
            .write_at(&next.encode(session.uuid), place)
            .inspect_err(|error| self.journal.poison.fail(error))?;
        // What the file says after this has failed nobody knows.
        session
            .file
            .sync()
            .inspect_err(|error| self.journal.poison.fail_for_good(error))?;
        *written = Some(next);
        session.settled.store(next.settled.0, Ordering::SeqCst);
        Ok(())
    }

    /// Begins the session of this process, if sessions are kept. If the last one ended with the machine, the
    /// snapshots that may have missed a pre-image, or what they show, become suspect, durably. So do all if
    /// records are lost, or nothing is known of the last session. Returns those that became suspect.
    ///
    /// Done twice, as after a crash in the middle, it comes to the same.
    ///
    /// # Errors
    /// As [`Store::sync`].
    pub fn begin_session(&self) -> Result<Vec<SnapshotInfo>> {
        let Some(boot) = self.session.boot else {
            return Ok(Vec::new());
        };
        let mut written = self.session.written.lock();
        let last = *written;
        // Opening has made durable what it found of the journal.
        let went_down = last.is_none_or(|last| last.boot != boot);
        let settled = last.map_or(Epoch(0), |last| last.settled);
        let suspect = self.mark_suspect(|epoch| self.is_in_doubt(last, boot, epoch))?;
        // What there is after a power cut is on the disk.
        let settled = if went_down {
            self.epoch()
        } else {
            settled.min(self.epoch())
        };
        let next = State {
            sequence: 0,
            boot,
            settled,
            dirty: false,
            // Told once: what is missing stays so.
            end: match self.opened.cut_short {
                true => Lsn(0),
                false => last.map_or(Lsn(0), |last| last.end),
            },
        };
        self.write_session(&mut written, next)?;
        if last.is_none() {
            // Both slots are there from now on, so that a later write changes no size; and the name is.
            self.write_session(&mut written, next)?;
            self.journal.media.sync_names()?;
        }
        Ok(suspect)
    }

    /// Whether a snapshot may not be exact after what `last` says of the last session, on the boot `boot`.
    fn is_in_doubt(&self, last: Option<State>, boot: u128, epoch: Epoch) -> bool {
        match last {
            _ if self.opened.lost => true,
            None => true,
            Some(last) => last.boot != boot && (last.dirty || epoch > last.settled),
        }
    }

    /// The names of the snapshots that [`Store::begin_session`] makes suspect, before it is called.
    #[must_use]
    pub fn in_doubt(&self) -> Vec<String> {
        let Some(boot) = self.session.boot else {
            return Vec::new();
        };
        let last = *self.session.written.lock();
        let all = self.snapshots();
        let doubtful = all.iter().filter(|info| {
            info.state == SnapshotState::Ready && self.is_in_doubt(last, boot, info.epoch)
        });
        doubtful
            .map(|info| String::from_utf8_lossy(&info.name).into_owned())
            .collect()
    }

    /// Whether the machine went down since the last session, as far as sessions are kept.
    #[must_use]
    pub fn went_down(&self) -> bool {
        self.session.went_down
    }

    /// Makes the snapshots that are ready and `doubtful` suspect, durably; returns them.
    ///
    /// # Errors
    /// As [`Store::sync`].
    pub fn mark_suspect(&self, doubtful: impl Fn(Epoch) -> bool) -> Result<Vec<SnapshotInfo>> {
        let due = |s: &SnapshotInfo| s.state == SnapshotState::Ready && doubtful(s.epoch);
        if !self.snapshots().iter().any(due) {
            return Ok(Vec::new());
        }
        let marked = self
            .snapshots
            .mark(&self.journal, due, SnapshotState::Suspect)?;
        self.sync()?;
        Ok(marked)
    }

    /// To be called before a record is appended that will not be synced before the change that it guards is
    /// applied, and again after: the session is dirty, durably, when it returns. The second call is for the case
    /// that the session was made clean in between.
    ///
    /// # Errors
    /// As [`Store::keep_attr`]; an error of the second call poisons the store, since the record is there.
    pub fn mark_dirty(&self, appended: bool) -> Result<()> {
        if self.session.dirty.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut written = self.session.written.lock();
        self.journal.poison.check()?;
        match *written {
            // A store without a session: nobody asked for one.
            None => return Ok(()),
            Some(last) if last.dirty => {}
            Some(last) => {
                let next = State {
                    dirty: true,
                    ..last
                };
                self.write_session(&mut written, next)
                    .inspect_err(|error| {
                        if appended {
                            self.journal.poison.fail_for_good(error);
                        }
                    })?;
            }
        }
        self.session.dirty.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Makes the journal durable and the session clean. Nobody but the first who appends after it waits for it.
    ///
    /// # Errors
    /// As [`Store::sync`]; then the session is dirty as before.
    pub fn mark_clean(&self) -> Result<()> {
        let mut written = self.session.written.lock();
        let Some(last) = written.filter(|last| last.dirty) else {
            return Ok(());
        };
        // In this order: whoever appended before it found the flag up, and what it appended is synced; whoever
        // finds it down waits for the lock, and finds the store poisoned if this fails half-way.
        self.session.dirty.store(false, Ordering::SeqCst);
        self.journal.sync()?;
        let next = State {
            dirty: false,
            end: self.journal.durable_end().unwrap_or(last.end),
            ..last
        };
        self.write_session(&mut written, next)
    }

    /// Notes where the journal ends, durably: an end that is damaged looks like one that a crash has torn.
    ///
    /// # Errors
    /// As [`Store::sync`].
    pub(super) fn note_end(&self) -> Result<()> {
        self.journal.sync()?;
        let mut written = self.session.written.lock();
        match (*written, self.journal.durable_end()) {
            (Some(last), Some(end)) if last.end != end => {
                self.write_session(&mut written, State { end, ..last })
            }
            _ => Ok(()),
        }
    }

    /// Whether the session is dirty.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.session.dirty.load(Ordering::SeqCst)
    }

    /// The last snapshot that is settled: what it and those before it show was durable at or after their cuts.
    #[must_use]
    pub fn settled(&self) -> Epoch {
        Epoch(self.session.settled.load(Ordering::SeqCst))
    }

    /// Notes, durably, that the snapshots up to `epoch`, which are in the journal, are settled: the caller has
    /// made the backing directory durable since the cut.
    ///
    /// # Errors
    /// As [`Store::sync`].
    pub fn mark_settled(&self, epoch: Epoch) -> Result<()> {
        // The number of a snapshot whose record is lost may be given to another, which is not settled.
        self.journal.sync()?;
        let mut written = self.session.written.lock();
        match *written {
            Some(last) if last.settled < epoch => {
                let next = State {
                    settled: epoch,
                    end: self.journal.durable_end().unwrap_or(last.end),
                    ..last
                };
                self.write_session(&mut written, next)
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_counted_on() {
        for last in 0..6 {
            for before in 0..9 {
                let next = next_sequence(last, before);
                assert!(next > last && next > before, "{last} {before}");
                assert_eq!(next % 2, (last + 1) % 2, "{last} {before}");
                assert!(next <= (last + 1).max(before + 2), "{last} {before}");
            }
        }
    }

    #[test]
    fn a_slot_comes_back_whole_or_not_at_all() {
        let state = State {
            sequence: 7,
            boot: 1 << 100,
            settled: Epoch(9),
            dirty: true,
            end: Lsn(3 << 40),
        };
        let bytes = state.encode(5);
        assert_eq!(bytes.len(), LEN);
        assert_eq!(State::decode(&bytes, 5), Some(state));
        assert_eq!(State::decode(&bytes, 6), None);
        for at in 0..LEN {
            assert_eq!(State::decode(&bytes[..at], 5), None);
            let mut torn = bytes.clone();
            torn[at] ^= 1;
            assert_eq!(State::decode(&torn, 5), None);
        }
    }
}
