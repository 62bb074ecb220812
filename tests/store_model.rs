//! The store against a reference that is obviously right: a snapshot is a deep clone of the world.
//!
//! The test plays the part of the engine: it keeps a pre-image just when the store has none yet. After
//! every few operations each snapshot is read back through the store and compared. `COWFS_SEED=n` repeats
//! the run that a failure names.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "support/plain.rs"]
mod plain;

use cowfs::error::Result;
use cowfs::ids::{BLOCK, CHUNK_BLOCKS, Epoch, Ino};
use cowfs::store::{
    AttrImage, EntryImage, ExtentData, ObjectHandle, Retained, SnapshotInfo, SnapshotState, Store,
    StoreOptions, Timestamp,
};
use plain::copy_tree;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;

/// Blocks of a file: into a second chunk, around the border of which the writes fall.
const FIRST: u64 = CHUNK_BLOCKS - 12;
const BLOCKS: usize = 24;
const DIR: Ino = Ino(1);
const INOS: u64 = 6;

#[derive(Debug, Clone, PartialEq)]
struct Object {
    /// Distinguishes objects that have the same inode number one after the other.
    generation: u64,
    birth: Epoch,
    attr: u32,
    /// 0: a hole.
    data: [u8; BLOCKS],
}

#[derive(Debug, Clone, PartialEq, Default)]
struct World {
    objects: BTreeMap<Ino, Object>,
    names: BTreeMap<Vec<u8>, Ino>,
}

struct Test {
    rng: SmallRng,
    store: Option<Store>,
    options: StoreOptions,
    dir: tempfile::TempDir,
    /// Distinguishes the copies of the store.
    copies: u32,
    live: World,
    epoch: Epoch,
    /// A cut whose snapshot is not recorded yet.
    pending: Option<(Epoch, World)>,
    snapshots: BTreeMap<Epoch, World>,
    deleting: Vec<Epoch>,
    retained: BTreeMap<Ino, Object>,
    generation: u64,
}

fn image(attr: u32) -> AttrImage {
    let xattrs = vec![(b"user.x".to_vec(), vec![7; attr as usize % 6000])];
    AttrImage {
        mode: attr,
        size: u64::from(attr),
        xattrs,
        ..AttrImage::default()
    }
}

fn entry(ino: Ino) -> EntryImage {
    EntryImage {
        ino,
        kind: 8,
        handle: ObjectHandle {
            kind: 1,
            bytes: ino.0.to_le_bytes().to_vec().into(),
        },
    }
}

fn handle(generation: u64) -> ObjectHandle {
    ObjectHandle {
        kind: 2,
        bytes: generation.to_le_bytes().to_vec().into(),
    }
}

/// Where the index is, and when it is counted after a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Index {
    InMemory,
    OnDisk,
    CountedLater,
}

impl Test {
    fn new(seed: u64, index: Index) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let options = StoreOptions {
            in_memory_index: index == Index::InMemory,
            log_area: 16 << 10,
            segment_size: 80 << 10,
            fill_ahead: 16 << 10,
            fill_after: 2,
            boot: None,
            sequence: 0,
            known: None,
            read_at_open: if index == Index::CountedLater {
                0
            } else {
                u64::MAX
            },
            count_step: 7,
        };
        let mut live = World::default();
        for ino in 2..2 + INOS / 2 {
            let object = Object {
                generation: 0,
                birth: Epoch(0),
                attr: 5,
                data: [0; BLOCKS],
            };
            live.objects.insert(Ino(ino), object);
        }
        let store = Store::open(&dir.path().join("store0"), options.clone()).unwrap();
        Self {
            rng: SmallRng::seed_from_u64(seed),
            store: Some(store),
            options,
            dir,
            copies: 0,
            live,
            epoch: Epoch(0),
            pending: None,
            snapshots: BTreeMap::new(),
            deleting: Vec::new(),
            retained: BTreeMap::new(),
            generation: 1,
        }
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join(format!("store{}", self.copies))
    }

    /// The newest cut that pre-images must be kept for.
    fn newest(&self) -> Option<Epoch> {
        self.pending
            .as_ref()
            .map(|(epoch, _)| *epoch)
            .or(self.store().newest())
    }

    fn some_object(&mut self) -> Option<Ino> {
        let inos: Vec<Ino> = self.live.objects.keys().copied().collect();
        (!inos.is_empty()).then(|| inos[self.rng.random_range(0..inos.len())])
    }

    fn needs(&self, ino: Ino) -> Option<Epoch> {
        self.newest()
            .filter(|newest| self.live.objects[&ino].birth < *newest)
    }

    fn keep_attr(&self, ino: Ino) {
        if let Some(newest) = self.needs(ino)
            && self.store().attr_at(ino, newest).unwrap().is_none()
        {
            let image = image(self.live.objects[&ino].attr);
            self.store().keep_attr(ino, self.epoch, &image).unwrap();
        }
    }

    fn set_attr(&mut self) {
        let Some(ino) = self.some_object() else {
            return;
        };
        self.keep_attr(ino);
        let attr = self.rng.random_range(0..20_000);
        self.live.objects.get_mut(&ino).unwrap().attr = attr;
    }

    fn write(&mut self) {
        let Some(ino) = self.some_object() else {
            return;
        };
        let start = self.rng.random_range(0..BLOCKS);
        let end = self.rng.random_range(start..BLOCKS) + 1;
        if let Some(newest) = self.needs(ino) {
            let kept: Vec<bool> = (0..BLOCKS)
                .map(|block| self.is_kept(ino, newest, block))
                .collect();
            let data = self.live.objects[&ino].data;
            let mut at = start;
            while at < end {
                let same = |b: &usize| kept[*b] == kept[at] && (data[*b] == 0) == (data[at] == 0);
                let to = (at..end).take_while(same).last().unwrap() + 1;
                if !kept[at] {
                    self.keep_run(ino, at, &data[at..to]);
                }
                at = to;
            }
        }
        let byte = if self.rng.random_bool(0.2) {
            0
        } else {
            self.rng.random_range(1..=255)
        };
        self.live.objects.get_mut(&ino).unwrap().data[start..end].fill(byte);
    }

    fn keep_run(&self, ino: Ino, at: usize, data: &[u8]) {
        let bytes: Vec<u8> = data.iter().flat_map(|byte| [*byte; BLOCK]).collect();
        let extent = match data[0] {
            0 => ExtentData::Hole {
                blocks: data.len() as u64,
            },
            _ => ExtentData::Bytes(&bytes),
        };
        self.store()
            .keep_extent(ino, self.epoch, FIRST + at as u64, extent)
            .unwrap();
    }

    fn is_kept(&self, ino: Ino, from: Epoch, block: usize) -> bool {
        let block = FIRST + block as u64;
        let (chunk, bit) = (block / CHUNK_BLOCKS, (block % CHUNK_BLOCKS) as usize);
        self.store().kept_blocks(ino, from, chunk).unwrap()[bit / 64] & 1 << (bit % 64) != 0
    }

    fn keep_name(&self, name: &[u8]) {
        if let Some(newest) = self.newest()
            && self.store().entry_at(DIR, name, newest).unwrap().is_none()
        {
            let was = self.live.names.get(name).map(|ino| entry(*ino));
            self.store()
                .keep_entry(DIR, name, self.epoch, was.as_ref())
                .unwrap();
        }
    }

    fn set_name(&mut self) {
        let name = vec![b'a' + self.rng.random_range(0..4); self.rng.random_range(1..3)];
        self.keep_name(&name);
        match self.some_object() {
            Some(ino) if self.rng.random_bool(0.6) => self.live.names.insert(name, ino),
            _ => self.live.names.remove(&name),
        };
    }

    fn create(&mut self) {
        let taken =
            |ino: &Ino| self.live.objects.contains_key(ino) || self.retained.contains_key(ino);
        let Some(ino) = (2..2 + INOS).map(Ino).find(|ino| !taken(ino)) else {
            return;
        };
        self.store().record_birth(ino, self.epoch).unwrap();
        let (generation, birth) = (self.generation, self.epoch);
        self.generation += 1;
        self.live.objects.insert(
            ino,
            Object {
                generation,
                birth,
                attr: 1,
                data: [0; BLOCKS],
            },
        );
    }

    fn remove(&mut self) {
        let Some(ino) = self.some_object() else {
            return;
        };
        let needed = self.needs(ino).is_some() || self.is_in_a_snapshot(ino);
        let object = self.live.objects.remove(&ino).unwrap();
        if needed {
            let (birth, removed) = (object.birth, self.epoch);
            let handle = handle(object.generation);
            let retained = Retained {
                ino,
                kind: 8,
                handle,
                birth,
                removed,
                origin: None,
                whiteout: false,
            };
            if self.rng.random_bool(0.2) {
                self.store().record_retained(&retained).unwrap();
                self.store().forget_retained(ino).unwrap();
                assert_eq!(self.store().retained(ino).unwrap(), None);
            }
            self.store().record_retained(&retained).unwrap();
            self.retained.insert(ino, object);
        }
    }

    fn is_in_a_snapshot(&self, ino: Ino) -> bool {
        let generation = self.live.objects[&ino].generation;
        let shows = |world: &World| {
            world
                .objects
                .get(&ino)
                .is_some_and(|o| o.generation == generation)
        };
        self.snapshots.values().any(shows)
    }

    fn cut(&mut self) {
        if self.pending.is_none() {
            self.epoch = self.epoch.next();
            self.pending = Some((self.epoch, self.live.clone()));
        }
        if self.rng.random_bool(0.6) {
            self.finish_cut();
        }
    }

    fn finish_cut(&mut self) {
        let Some((epoch, world)) = self.pending.take() else {
            return;
        };
        let name = format!("s{epoch}").into_bytes();
        let (created, state) = (Timestamp::default(), SnapshotState::Ready);
        self.store()
            .record_snapshot(&SnapshotInfo {
                epoch,
                name,
                created,
                held: false,
                state,
            })
            .unwrap();
        self.snapshots.insert(epoch, world);
    }

    fn delete(&mut self) {
        let epochs: Vec<Epoch> = self.snapshots.keys().copied().collect();
        if !epochs.is_empty() {
            let k = epochs[self.rng.random_range(0..epochs.len())];
            self.store().delete_snapshot(k).unwrap();
            self.snapshots.remove(&k);
            self.deleting.push(k);
        }
    }

    /// Some steps; true when there is nothing more to do.
    fn reclaim(&mut self, steps: usize) -> bool {
        for _ in 0..steps {
            let released = RefCell::new(Vec::new());
            let release = |retained: &Retained| -> Result<()> {
                released.borrow_mut().push(retained.clone());
                Ok(())
            };
            let more = self.store().reclaim(&release).unwrap();
            for file in released.into_inner() {
                let is_it = |object: &Object| handle(object.generation) == file.handle;
                let shown = |world: &World| world.objects.get(&file.ino).is_some_and(is_it);
                assert!(
                    !self.snapshots.values().any(shown),
                    "{file:?} is still shown"
                );
                assert!(
                    !self.pending.iter().any(|(_, world)| shown(world)),
                    "{file:?} will be shown"
                );
                if self.retained.get(&file.ino).is_some_and(is_it) {
                    self.retained.remove(&file.ino);
                }
            }
            if !more {
                self.deleting.clear();
                return true;
            }
        }
        false
    }

    fn reopen(&mut self, clean: bool, drop_index: bool) {
        let old = self.path();
        if !clean {
            // What a process that is killed leaves behind is what is in its files now.
            self.copies += 1;
            copy_tree(&old, &self.path());
        }
        let store = self.store.take().unwrap();
        if clean {
            store.close().unwrap();
            drop(store);
        } else {
            drop(store);
            std::fs::remove_dir_all(old).unwrap();
        }
        if drop_index {
            let _ = std::fs::remove_dir_all(self.path().join("index"));
        }
        self.store = Some(Store::open(&self.path(), self.options.clone()).unwrap());
        assert_eq!(self.store().damage(), Vec::<String>::new());
        // A cut that was under way is given up; its number must not be given again if a record bears it.
        self.pending = None;
        let last = self.epoch;
        self.epoch = self.store().epoch();
        assert!(
            self.epoch == last || self.epoch.next() == last,
            "{} after {last}",
            self.epoch
        );
    }

    fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..15 => self.set_attr(),
            15..45 => self.write(),
            45..60 => self.set_name(),
            60..66 => self.create(),
            66..70 => self.remove(),
            70..77 => self.cut(),
            77..81 => self.delete(),
            81..91 => drop(self.reclaim(2)),
            91..96 => self.store().checkpoint().unwrap(),
            96 => self.reopen(true, false),
            97..99 => self.reopen(false, false),
            _ => self.reopen(false, true),
        }
    }

    fn verify(&self) {
        for (k, world) in &self.snapshots {
            self.verify_snapshot(*k, world);
        }
        for (ino, object) in &self.live.objects {
            // Without it the object would seem to have been in that snapshot.
            if self.snapshots.keys().any(|k| *k <= object.birth) {
                assert_eq!(
                    self.store().birth(*ino).unwrap(),
                    Some(object.birth),
                    "birth of {ino}"
                );
            }
        }
        let table = self.store().snapshots();
        let ready: Vec<_> = table
            .iter()
            .filter(|s| s.state == SnapshotState::Ready)
            .map(|s| s.epoch)
            .collect();
        assert_eq!(ready, self.snapshots.keys().copied().collect::<Vec<_>>());
    }

    fn verify_snapshot(&self, k: Epoch, world: &World) {
        let store = self.store();
        for (ino, object) in &world.objects {
            let live = self
                .live
                .objects
                .get(ino)
                .filter(|o| o.generation == object.generation);
            let now = live.or_else(|| {
                let retained = store.retained(*ino).unwrap().expect("retained");
                assert_eq!(
                    retained.handle,
                    handle(object.generation),
                    "object {ino} in snapshot {k}"
                );
                self.retained.get(ino)
            });
            let now = now.expect("an object of a snapshot is live or retained");
            let attr = store
                .attr_at(*ino, k)
                .unwrap()
                .map_or(image(now.attr), |(_, image)| image);
            assert_eq!(
                attr,
                image(object.attr),
                "attributes of {ino} in snapshot {k}"
            );
            assert_eq!(
                self.read(*ino, k, now),
                object.data,
                "data of {ino} in snapshot {k}"
            );
            let birth = store.birth(*ino).unwrap().unwrap_or(Epoch(0));
            assert!(birth < k, "{ino} born in {birth} is in snapshot {k}");
        }
        let mut names: BTreeMap<Vec<u8>, EntryImage> = self
            .live
            .names
            .iter()
            .map(|(name, ino)| (name.clone(), entry(*ino)))
            .collect();
        for (name, was) in store.entries_at(DIR, k).unwrap() {
            assert_eq!(
                store.entry_at(DIR, &name, k).unwrap().map(|(_, was)| was),
                Some(was.clone())
            );
            match was {
                Some(was) => names.insert(name, was),
                None => names.remove(&name),
            };
        }
        let expected: BTreeMap<_, _> = world
            .names
            .iter()
            .map(|(n, ino)| (n.clone(), entry(*ino)))
            .collect();
        assert_eq!(names, expected, "names in snapshot {k}");
    }

    fn read(&self, ino: Ino, k: Epoch, now: &Object) -> [u8; BLOCKS] {
        let mut data = now.data;
        for chunk in 0..2 {
            let mut last = 0;
            for extent in self.store().extents_at(ino, k, chunk).unwrap() {
                assert!(extent.first_block >= last && extent.label >= k);
                last = extent.first_block + u64::from(extent.blocks);
                let mut bytes = vec![1; usize::from(extent.blocks) * BLOCK];
                self.store().read_extent(&extent, 0, &mut bytes).unwrap();
                for (i, block) in bytes.chunks(BLOCK).enumerate() {
                    assert!(block.iter().all(|byte| *byte == block[0]));
                    assert_eq!(extent.is_hole(), block[0] == 0);
                    data[(extent.first_block - FIRST) as usize + i] = block[0];
                }
            }
        }
        data
    }

    /// Nothing is damaged. A crash may have left space that nothing needs.
    fn check(&self) {
        let report = self.store().check(false).unwrap();
        assert!(!report.is_damaged(), "{:#?}", report.findings);
    }

    /// What the background job counted is what counting at opening finds.
    fn counts(&mut self) {
        // An index made anew from the journal has dead records again.
        if self.options.in_memory_index {
            return;
        }
        while !self.reclaim(1000) {}
        self.store().checkpoint().unwrap();
        let copy = self.dir.path().join("counted");
        copy_tree(&self.path(), &copy);
        let options = StoreOptions {
            read_at_open: u64::MAX,
            ..self.options.clone()
        };
        let again = Store::open(&copy, options).unwrap().stats();
        std::fs::remove_dir_all(copy).unwrap();
        let stats = self.store().stats();
        assert_eq!(
            (stats.records, stats.live_payload_bytes),
            (again.records, again.live_payload_bytes)
        );
    }

    /// Deletes everything, and looks at what is left.
    fn finish(&mut self) {
        self.finish_cut();
        self.check();
        self.reopen(false, false);
        self.check();
        self.counts();
        while !self.snapshots.is_empty() {
            self.delete();
            if self.rng.random_bool(0.5) {
                self.reclaim(1);
                self.verify();
            }
        }
        while !self.reclaim(1000) {}
        self.check();
        let store = self.store();
        assert_eq!(store.retained_all().unwrap(), Vec::new());
        assert!(store.snapshots().is_empty());
        store.checkpoint().unwrap();
        let stats = store.stats();
        assert_eq!(
            (stats.live_payload_bytes, stats.records),
            (0, 0),
            "{stats:?}"
        );
        assert!(stats.journal_bytes < 200 << 10, "{stats:?}");
        // The session's, the segment in which the journal ends, and the next.
        assert!(journal_files(&self.path()) <= 3, "{stats:?}");
    }
}

fn journal_files(store: &Path) -> usize {
    std::fs::read_dir(store.join("journal")).unwrap().count()
}

fn run(seed: u64, index: Index, steps: usize) {
    let result = std::panic::catch_unwind(|| {
        let mut test = Test::new(seed, index);
        for step in 0..steps {
            test.step();
            if step % 8 == 0 {
                test.verify();
            }
        }
        test.verify();
        test.finish();
    });
    if let Err(panic) = result {
        eprintln!("failed with COWFS_SEED={seed} ({index:?})");
        std::panic::resume_unwind(panic);
    }
}

fn seeds(count: u64) -> std::ops::Range<u64> {
    match std::env::var("COWFS_SEED") {
        Ok(seed) => {
            let seed = seed.parse().unwrap();
            seed..seed + 1
        }
        Err(_) => 0..count,
    }
}

#[test]
fn agrees_with_the_model_with_the_index_in_memory() {
    seeds(16).for_each(|seed| run(seed, Index::InMemory, 600));
}

#[test]
fn agrees_with_the_model_with_the_index_on_disk() {
    seeds(4).for_each(|seed| run(seed, Index::OnDisk, 400));
}

#[test]
fn agrees_with_the_model_with_the_index_counted_later() {
    seeds(6).for_each(|seed| run(seed, Index::CountedLater, 400));
}
