//! An index that fails: what is in it is answered with the error or rightly, never with something else; a checkpoint
//! that fails is made up for by the next one, and nothing is lost by it.

use super::count::Uncounted;
use super::index::{Index, MemoryIndex, Visit};
use super::key::Pair;
use super::layers::Layers;
use super::types::{
    EntryImage, ObjectHandle, Retained, SnapshotInfo, SnapshotState, StoreOptions, Timestamp,
};
use super::{Store, key};
use crate::error::{Error, Result};
use crate::ids::{Epoch, Ino};
use crate::sync::{Arc, AtomicI64, AtomicU64, Ordering};
use rustix::io::Errno;
use std::path::Path;

/// Counts the calls down; the one at zero fails, and all after it if they are `lasting`.
#[derive(Default)]
struct Countdown {
    left: AtomicI64,
    lasting: AtomicU64,
    failed: AtomicU64,
}

impl Countdown {
    fn arm(&self, left: i64, lasting: bool) {
        self.lasting.store(u64::from(lasting), Ordering::SeqCst);
        self.failed.store(0, Ordering::SeqCst);
        self.left.store(left + 1, Ordering::SeqCst);
    }

    fn disarm(&self) -> bool {
        self.left.store(0, Ordering::SeqCst);
        self.failed.load(Ordering::SeqCst) > 0
    }

    fn call(&self) -> Result<()> {
        let left = self.left.load(Ordering::SeqCst);
        if left <= 0 {
            return Ok(());
        }
        if left > 1 {
            self.left.store(left - 1, Ordering::SeqCst);
            return Ok(());
        }
        if self.lasting.load(Ordering::SeqCst) == 0 {
            self.left.store(0, Ordering::SeqCst);
        }
        self.failed.fetch_add(1, Ordering::SeqCst);
        Err(Error::Os(Errno::IO))
    }
}

struct Faulty {
    inner: MemoryIndex,
    countdown: Arc<Countdown>,
}

impl Index for Faulty {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.countdown.call()?;
        self.inner.get(key)
    }
    fn scan(&self, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<()> {
        self.countdown.call()?;
        self.inner.scan(from, to, visit)
    }
    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<Pair>> {
        self.countdown.call()?;
        self.inner.last(from, to)
    }
    fn put(&self, key: &[u8], value: &[u8]) -> Result<()> {
        self.countdown.call()?;
        self.inner.put(key, value)
    }
    fn remove(&self, key: &[u8]) -> Result<()> {
        self.countdown.call()?;
        self.inner.remove(key)
    }
    fn sync(&self) -> Result<()> {
        self.countdown.call()
    }
    fn ensure_room(&self, _bytes: u64) -> Result<()> {
        self.countdown.call()
    }
    fn allocated(&self) -> u64 {
        0
    }
}

fn options() -> StoreOptions {
    StoreOptions {
        in_memory_index: true,
        segment_size: 1 << 20,
        log_area: 64 << 10,
        boot: Some(1),
        ..StoreOptions::default()
    }
}

/// A store whose index is made to fail by the countdown.
fn open(dir: &Path, countdown: &Arc<Countdown>) -> Store {
    let mut store = Store::open(dir, options()).unwrap();
    let index = MemoryIndex::default();
    store
        .layers
        .index
        .scan(&[], &[u8::MAX], &mut |key, value| {
            index.put(key, value).map(|()| true)
        })
        .unwrap();
    store.layers = Layers::new(Box::new(Faulty {
        inner: index,
        countdown: countdown.clone(),
    }));
    store
}

fn was(number: u64) -> EntryImage {
    EntryImage {
        ino: Ino(1000 + number),
        kind: 8,
        handle: ObjectHandle {
            kind: 1,
            bytes: vec![number as u8; 8].into(),
        },
    }
}

fn cut(store: &Store, epoch: u64, state: SnapshotState) {
    let info = SnapshotInfo {
        epoch: Epoch(epoch),
        name: format!("s{epoch}").into_bytes(),
        created: Timestamp { sec: 0, nsec: 0 },
        held: false,
        state,
    };
    store.record_snapshot(&info).unwrap();
}

/// Every value is found, or the look-up says that the index fails. `None`: it must be found.
fn look(store: &Store, kept: u64, context: &str, countdown: Option<(&Countdown, i64)>) {
    for number in 0..kept {
        if let Some((countdown, left)) = countdown {
            countdown.arm(left, false);
        }
        let name = format!("n{number}");
        let found = store.entry_at(Ino(2), name.as_bytes(), Epoch(1));
        let failed = countdown.is_some_and(|(countdown, _)| countdown.disarm());
        match found {
            Ok(found) => assert_eq!(found, Some((Epoch(1), Some(was(number)))), "{context}"),
            Err(error) => {
                assert!(failed, "{context}: {error}");
                assert_eq!(error.errno(), Errno::IO);
            }
        }
    }
}

/// Whichever call of the index fails, once or from then on, in checkpoints, reclamation and look-ups.
#[test]
fn no_fault_of_the_index_loses_or_mixes_anything() {
    let mut checkpoints = 0;
    for lasting in [false, true] {
        for left in 0..60 {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("store");
            let countdown = Arc::new(Countdown::default());
            let store = open(&path, &countdown);
            let context = format!("call {left} fails, lasting: {lasting}");
            cut(&store, 1, SnapshotState::Ready);
            keep(&store, 0, 10);
            countdown.arm(left, lasting);
            let done = store.checkpoint();
            let failed = countdown.disarm();
            assert_eq!(done.is_err(), failed, "{context}: {done:?}");
            checkpoints += u32::from(failed);
            assert!(!store.is_poisoned(), "{context}");
            look(&store, 10, &context, None);
            // What comes after a checkpoint that failed is carried by the next one, too.
            keep(&store, 10, 20);
            look(&store, 20, &context, Some((&countdown, left % 4)));
            store.checkpoint().unwrap();
            look(&store, 20, &context, None);
            let state = store.layers.index.get(key::STATE).unwrap();
            assert!(state.is_some(), "{context}: the checkpoint is not there");
            assert_eq!(store.check(true).unwrap().findings, [], "{context}");
            drop(store);
            // The index in memory is gone with it: the journal alone has all of it.
            look(&open(&path, &countdown), 20, &context, None);
        }
    }
    assert!(checkpoints > 40, "only {checkpoints} checkpoints failed");
}

fn keep(store: &Store, from: u64, to: u64) {
    for number in from..to {
        let name = format!("n{number}");
        let was = was(number);
        store
            .keep_entry(Ino(2), name.as_bytes(), Epoch(1), Some(&was))
            .unwrap();
    }
}

/// Checkpoints that fail half-way and are made again, while the index is being counted, take nothing off twice.
#[test]
fn what_is_carried_twice_is_counted_once() {
    let (mut first, mut both) = (0, 0);
    for (left, again) in (0..40).flat_map(|left| (0..60).step_by(3).map(move |again| (left, again)))
    {
        let dir = tempfile::tempdir().unwrap();
        let countdown = Arc::new(Countdown::default());
        let store = open(&dir.path().join("store"), &countdown);
        store.upkeep.lock().uncounted = Uncounted::all();
        cut(&store, 1, SnapshotState::Ready);
        keep(&store, 0, 10);
        countdown.arm(left, false);
        let failed = store.checkpoint().is_err();
        keep(&store, 10, 15);
        countdown.arm(again, false);
        let failed_again = store.checkpoint().is_err();
        countdown.disarm();
        // Some is in memory still, and counted there.
        let mut upkeep = store.upkeep.lock();
        while !upkeep.uncounted.is_nothing() {
            store.count_step(&mut upkeep).unwrap();
        }
        drop(upkeep);
        store.checkpoint().unwrap();
        assert_eq!(store.stats().records, 15, "calls {left} and {again} fail");
        first += u32::from(failed);
        both += u32::from(failed && failed_again);
    }
    assert!(first > 300 && both > 100, "{first} and {both} failed");
}

/// An entry that cannot be right is met by the background job, which has the next opening make the index anew.
#[test]
fn a_wrong_entry_of_a_large_index_is_found_later() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let options = StoreOptions {
        in_memory_index: false,
        read_at_open: 0,
        count_step: 3,
        ..options()
    };
    let store = Store::open(&path, options.clone()).unwrap();
    cut(&store, 1, SnapshotState::Ready);
    keep(&store, 0, 20);
    store.layers.index.put(b"e?", b"?").unwrap();
    store.checkpoint().unwrap();
    drop(store);
    let release = |_: &Retained| Ok(());
    let count = |store: &Store| {
        while !store.upkeep.lock().uncounted.is_nothing() {
            store.reclaim(&release)?;
        }
        Ok::<_, Error>(())
    };
    let store = Store::open(&path, options.clone()).unwrap();
    assert!(store.opened.distrust.is_none());
    assert!(matches!(count(&store), Err(Error::Corrupt(_))));
    drop(store);
    let store = Store::open(&path, options.clone()).unwrap();
    assert!(store.opened.distrust.is_some());
    count(&store).unwrap();
    look(&store, 20, "made anew", None);
    drop(store);
    let store = Store::open(&path, options).unwrap();
    assert!(store.opened.distrust.is_none());
    count(&store).unwrap();
    assert_eq!(store.stats().records, 20);
}
