//! Times of last modification that the kernel keeps (`cache=writeback`).
//!
//! The kernel notes when a file was written to, and tells of it with each fsync(2). Set on the backing file each time, it
//! makes every fsync(2) beneath wait for the journal of that filesystem, where an overwrite alone needs none. So for a file
//! that is synced all the time it is set once in a while, and when the file is closed. Until then it is noted here, and
//! shown wherever the file's attributes are. What a daemon that dies leaves on the backing file is the time at which it
//! wrote the same bytes.

use super::Engine;
use super::attr::Attr;
use super::handle::{LiveFile, OpenFile};
use super::snapshot::now;
use crate::error::Result;
use crate::ids::Ino;
use crate::store::{AttrImage, Timestamp};
use crate::sync::{AtomicUsize, Ordering, RwLock};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How often the time is set on a backing file, at most, while its file is open; and how much later what is there may be
/// than what is shown.
const INTERVAL: Duration = Duration::from_secs(1);

/// What the kernel has told, by object. Written to under the lock of the object.
#[derive(Default)]
pub(super) struct KernelTimes {
    objects: RwLock<HashMap<Ino, Told>>,
    /// How many there are, for those who need not look closer.
    count: AtomicUsize,
}

struct Told {
    /// When the time was last set on the backing file.
    set: Instant,
    /// What the backing file does not have yet.
    owed: Option<Timestamp>,
}

impl KernelTimes {
    /// The time of last modification of an object whose backing file does not have it yet. To be asked before that file is.
    pub(super) fn owed(&self, ino: Ino) -> Option<Timestamp> {
        match self.count.load(Ordering::SeqCst) {
            0 => None,
            _ => self.objects.read().get(&ino)?.owed,
        }
    }

    /// Notes `time` in place of setting it, if it was set on the backing file not long ago.
    fn owe(&self, ino: Ino, time: Timestamp) -> bool {
        let mut objects = self.objects.write();
        match objects.get_mut(&ino) {
            Some(told) if told.set.elapsed() < INTERVAL && is_recent(time) => {
                told.owed = Some(time);
                true
            }
            _ => false,
        }
    }

    /// The kernel's time has been set on the backing file.
    fn set(&self, ino: Ino) {
        let told = Told {
            set: Instant::now(),
            owed: None,
        };
        self.change(|objects| objects.insert(ino, told));
    }

    /// Nothing is owed to an object any more: its time was set by somebody, or it has none of those who write.
    pub(super) fn forget(&self, ino: Ino) {
        if self.count.load(Ordering::SeqCst) > 0 {
            self.change(|objects| objects.remove(&ino));
        }
    }

    /// Forgets an object to which nothing is owed. False if something is.
    fn forget_if_set(&self, ino: Ino) -> bool {
        let owes = |told: &Told| told.owed.is_some();
        self.change(|objects| match objects.get(&ino).is_some_and(owes) {
            true => false,
            false => {
                objects.remove(&ino);
                true
            }
        })
    }

    fn change<T>(&self, change: impl FnOnce(&mut HashMap<Ino, Told>) -> T) -> T {
        let mut objects = self.objects.write();
        let changed = change(&mut objects);
        self.count.store(objects.len(), Ordering::SeqCst);
        changed
    }
}

/// Whether a time is less than [`INTERVAL`] from the present.
fn is_recent(time: Timestamp) -> bool {
    let nanos = |t: Timestamp| i128::from(t.sec) * 1_000_000_000 + i128::from(t.nsec);
    nanos(time).abs_diff(nanos(now())) < INTERVAL.as_nanos()
}

/// Attributes of a backing file with the time that is owed to it.
pub(super) fn with_owed(owed: Option<Timestamp>, image: AttrImage) -> AttrImage {
    let mtime = owed.unwrap_or(image.mtime);
    AttrImage { mtime, ..image }
}

impl Engine {
    /// Takes the time of last modification that the kernel tells of a file of which it holds writes back: one operation
    /// of C1. `changed`: the time of the last change of its attributes, as the kernel shows it.
    pub fn take_kernel_time(
        &self,
        file: &LiveFile,
        time: Timestamp,
        changed: Timestamp,
    ) -> Result<Attr> {
        let object = &file.object;
        self.change_attr(object, |op| {
            if self.times.owe(object.ino(), time) {
                return Ok(());
            }
            op.settle()?;
            self.backing.set_mtime(file.fd(), time)?; // I1
            self.times.set(object.ino());
            Ok(())
        })?;
        // Who asks a file for its times makes its next change one for the journal (multigrain timestamps, Linux 6.13).
        let image = AttrImage {
            mtime: time,
            ctime: changed,
            ..self.backing.stat_but_times(file.fd())?
        };
        Ok(self.attr_of_live(object, image))
    }

    /// Whether something is left to do for a file that is about to be closed ([`Self::settle_time`]).
    pub fn owes_time(&self, file: &OpenFile) -> bool {
        matches!(file, OpenFile::Live(live) if live.writable)
            && self.times.count.load(Ordering::SeqCst) > 0
    }

    /// Sets on a backing file, which was open for writing, the time that is owed to it.
    pub fn settle_time(&self, file: &OpenFile) {
        let OpenFile::Live(live) = file else {
            return;
        };
        let object = &live.object;
        if self.times.forget_if_set(object.ino()) {
            return;
        }
        let done = self.change_attr(object, |op| {
            op.settle()?;
            if let Some(time) = self.times.owed(object.ino()) {
                self.backing.set_mtime(live.fd(), time)?; // I1
            }
            self.times.forget(object.ino());
            Ok(())
        });
        if let Err(error) = done {
            self.times.forget(object.ino());
            log::warn!(
                "the time of last modification of object {} is later than it was by up to a second: {error}",
                object.ino()
            );
        }
    }

    /// The same for all files that are still open.
    pub(super) fn settle_times(&self) {
        for file in self.handles.files() {
            if self.owes_time(&file) {
                self.settle_time(&file);
            }
        }
    }
}
