//! Times of last modification that the kernel keeps (`cache=writeback`).
//!
//! The kernel notes when a file was written to, and tells of it with each fsync(2). Set on the backing file each time, it
//! makes every fsync(2) beneath wait for the journal of that filesystem, where an overwrite alone needs none. So for a file
//! that is synced all the time it is set once in a while, and when the file is closed. Until then it is noted here, and
//! shown wherever the file's attributes are; a cut keeps it. The next server of the mount finds it in the inventory. What
//! server and keeper leave on the backing file if both die is the time at which the same bytes were written.

use super::Engine;
use super::attr::Attr;
use super::handle::{LiveFile, OpenFile};
use super::inventory::{Found, Inventory, KnownTime, Slot};
use super::nodes::Node;
use super::object::Object;
use super::snapshot::now;
use crate::error::Result;
use crate::ids::Ino;
use crate::store::{AttrImage, Timestamp};
use crate::sync::{Arc, AtomicUsize, Ordering, RwLock};
use rustix::fd::AsFd;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How often the time is set on a backing file, at most, while its file is open; and how much later what is there may be
/// than what is shown.
const INTERVAL: Duration = Duration::from_secs(1);

/// The times of files that are open for writing through a mount whose kernel keeps them. Told of under the lock of the
/// object; in lock order before the inventory alone.
pub(super) struct KernelTimes {
    /// Where the times are written down for the next server of the mount.
    inventory: Option<Arc<Inventory>>,
    objects: RwLock<HashMap<Ino, Told>>,
    /// How many there are, for those who need not look closer.
    count: AtomicUsize,
}

struct Told {
    /// What the kernel told last, or was told: it shows that, unless it has something to tell.
    time: Timestamp,
    /// When that was last set on the backing file.
    set: Option<Instant>,
    /// The backing file has another time.
    owed: bool,
    /// How often the file is open for writing.
    opens: u32,
    /// Where the time is written down.
    slot: Option<Slot>,
}

impl KernelTimes {
    /// An empty table, written down in `inventory`.
    pub(super) fn new(inventory: Option<Arc<Inventory>>) -> Self {
        Self {
            inventory,
            objects: RwLock::default(),
            count: AtomicUsize::new(0),
        }
    }

    /// Takes up what an earlier server of this mount wrote down, which may not have set it on the backing file.
    fn restore(&self, found: &Found) {
        self.change(|objects| {
            for (slot, KnownTime { ino, time }) in &found.times {
                let told = Told {
                    time: *time,
                    set: None,
                    owed: true,
                    opens: 0,
                    slot: Some(*slot),
                };
                objects.insert(*ino, told);
            }
        });
    }

    fn note(&self, told: &mut Told, time: Timestamp) {
        told.time = time;
        if let (Some(inventory), Some(slot)) = (&self.inventory, told.slot) {
            inventory.set_time(slot, time);
        }
    }

    fn is_empty(&self) -> bool {
        self.count.load(Ordering::SeqCst) == 0
    }

    /// The time of last modification of an object whose backing file has another. To be asked before that file is.
    pub(super) fn owed(&self, ino: Ino) -> Option<Timestamp> {
        if self.is_empty() {
            return None;
        }
        let objects = self.objects.read();
        objects
            .get(&ino)
            .filter(|told| told.owed)
            .map(|told| told.time)
    }

    /// The objects whose backing files have other times.
    fn owing(&self) -> Vec<Ino> {
        let objects = self.objects.read();
        let owing = objects.iter().filter(|(_, told)| told.owed);
        owing.map(|(ino, _)| *ino).collect()
    }

    /// The objects that are not open any more.
    fn closed_meanwhile(&self) -> Vec<Ino> {
        let objects = self.objects.read();
        let closed = objects.iter().filter(|(_, told)| told.opens == 0);
        closed.map(|(ino, _)| *ino).collect()
    }

    /// Whether a file is open for writing whose time the kernel keeps.
    pub(super) fn knows(&self, ino: Ino) -> bool {
        !self.is_empty() && self.objects.read().contains_key(&ino)
    }

    /// A file was opened for writing, which now has this time.
    fn opened(&self, ino: Ino, time: Timestamp) {
        self.change(|objects| {
            let told = objects.entry(ino).or_insert_with(|| Told {
                time,
                set: None,
                owed: false,
                opens: 0,
                slot: self
                    .inventory
                    .as_ref()
                    .and_then(|inventory| inventory.add_time(&KnownTime { ino, time })),
            });
            told.opens += 1;
        });
    }

    /// A file that was opened for writing is closed. False, and not counted, if that is the last time and its time is still
    /// owed, unless it `may_owe`.
    fn closes(&self, ino: Ino, may_owe: bool) -> bool {
        self.change(|objects| {
            let Some(told) = objects.get_mut(&ino) else {
                return true;
            };
            if told.opens <= 1 && told.owed && !may_owe {
                return false;
            }
            told.opens = told.opens.saturating_sub(1);
            if told.opens == 0 {
                if let (Some(inventory), Some(slot)) = (&self.inventory, told.slot) {
                    inventory.remove(slot);
                }
                objects.remove(&ino);
            }
            true
        })
    }

    /// Notes `time` in place of setting it, if the time was set on the backing file not long ago.
    fn owe(&self, ino: Ino, time: Timestamp) -> bool {
        let lately = |set: Instant| set.elapsed() < INTERVAL;
        match self.objects.write().get_mut(&ino) {
            Some(told) if told.set.is_some_and(lately) && is_recent(time) => {
                told.owed = true;
                self.note(told, time);
                true
            }
            _ => false,
        }
    }

    /// The time has been set on the backing file.
    pub(super) fn set(&self, ino: Ino, time: Timestamp) {
        if let Some(told) = self.objects.write().get_mut(&ino) {
            (told.set, told.owed) = (Some(Instant::now()), false);
            self.note(told, time);
        }
    }

    /// The bytes of the backing file have changed, and with them its time. The kernel will tell what it is, unless it is
    /// what it told before: two writes may fall into one tick of its clock.
    pub(super) fn note_write(&self, ino: Ino) {
        if !self.is_empty()
            && let Some(told) = self.objects.write().get_mut(&ino)
        {
            told.owed = true;
        }
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
            self.times.set(object.ino(), time);
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

    /// Keeps the attributes of all objects that owe a time, for a snapshot that is being made: what is owed is in memory
    /// alone, and goes with the daemon. The operations that are in the snapshot are done, and pre-images are kept for it.
    pub(super) fn keep_owed_times(&self) -> Result<()> {
        for ino in self.times.owing() {
            if let Some(Node::Live(object)) = self.nodes.get(self.nodes.live_id(ino)) {
                self.with_room(0, || self.begin(&[&object]).keep_attr(&object))?;
            }
        }
        Ok(())
    }

    /// A file was opened through a mount whose kernel keeps the times of what is written to; `told`: the time that the
    /// kernel is told with that. To be called before it is told that the file is open.
    pub fn leave_time(&self, file: &LiveFile, told: Option<Timestamp>) -> Result<()> {
        if file.writable {
            let ino = file.object.ino();
            let time = match told.or_else(|| self.times.owed(ino)) {
                Some(time) => time,
                None => self.backing.stat(file.fd())?.mtime,
            };
            self.times.opened(ino, time);
        }
        Ok(())
    }

    /// Takes up what an earlier server of this mount had opened, with the times that the kernel has: of what it told that
    /// one of, it does not tell again.
    ///
    /// # Errors
    /// Those of statx(2).
    pub fn leave_times_of_open(&self, found: &Found) -> Result<()> {
        self.times.restore(found);
        for file in self.handles.all_files() {
            if let OpenFile::Live(live) = &*file {
                self.leave_time(live, None)?;
            }
        }
        // What was being closed.
        for ino in self.times.closed_meanwhile() {
            if let Some(Node::Live(object)) = self.nodes.get(self.nodes.live_id(ino)) {
                self.settle_time_of(&object);
            }
            self.times.closes(ino, true);
        }
        Ok(())
    }

    /// Whether there is something to do when a file is closed ([`Self::settle_time`]).
    pub fn keeps_time(&self, file: &OpenFile) -> bool {
        matches!(file, OpenFile::Live(live) if live.writable && self.times.knows(live.object.ino()))
    }

    /// Sets on a backing file that is about to be closed the time that is owed to it. The kernel has told all by then, if
    /// nobody else has the file open for writing.
    pub fn settle_time(&self, file: &OpenFile) {
        if let OpenFile::Live(live) = file {
            let object = &live.object;
            let mut failed = false;
            // Others may open, write and close it meanwhile.
            while !self.times.closes(object.ino(), failed) {
                failed = !self.settle_time_of(object);
            }
        }
    }

    /// False if the time cannot be set, which the log says.
    fn settle_time_of(&self, object: &Object) -> bool {
        if self.times.owed(object.ino()).is_none() {
            return true;
        }
        let done = self.object_fd(object).and_then(|fd| {
            self.change_attr(object, |op| {
                op.settle()?;
                if let Some(time) = self.times.owed(object.ino()) {
                    self.backing.set_mtime(fd.as_fd(), time)?; // I1
                    self.times.set(object.ino(), time);
                }
                Ok(())
            })
        });
        if let Err(error) = &done {
            log::warn!(
                "the time of last modification of object {} is later than it was: {error}",
                object.ino()
            );
        }
        done.is_ok()
    }

    /// The same for all, before the engine ends.
    pub(super) fn settle_times(&self) {
        for ino in self.times.owing() {
            if let Some(Node::Live(object)) = self.nodes.get(self.nodes.live_id(ino)) {
                self.settle_time_of(&object);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two who close at the same time must not both leave it to the other.
    #[test]
    fn who_closes_last_settles_what_is_owed() {
        let times = KernelTimes::new(None);
        let (ino, time) = (Ino(7), Timestamp { sec: 1, nsec: 2 });
        times.opened(ino, time);
        times.opened(ino, time);
        times.note_write(ino);
        assert!(times.closes(ino, false));
        assert!(!times.closes(ino, false));
        assert_eq!(times.owed(ino), Some(time));
        times.set(ino, time);
        assert!(times.closes(ino, false));
        assert!(!times.knows(ino));
        times.opened(ino, time);
        times.note_write(ino);
        assert!(!times.closes(ino, false));
        assert!(times.closes(ino, true));
        assert!(!times.knows(ino));
    }
}
