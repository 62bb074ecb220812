//! Power loss, in process (C8): histories are recorded, and from each moment of them the disks are rebuilt that a
//! power cut may leave; cowfs recovers, and what it then shows is held against what it had promised.
//!
//! The journal's disk (`disk.rs`): of each file what was synced is there, and of what was not, any part: a write
//! whole, not at all, in some sectors, or to some byte; a new file or a removal by itself. The backing directory
//! (`live.rs`): names and attributes as they were at some moment since they were last made durable, as journaling
//! filesystems keep them, and of the bytes of files any sector as it was at any moment since. The index is lost, or
//! as it was last made durable.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

mod disk;
mod image;
mod live;
#[path = "../support/plain.rs"]
mod plain;
mod view;
mod world;

use cowfs::config::Durability;
use cowfs::sync::{AtomicU64, Ordering};
use disk::Event;
use image::{Counts, Trial};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use world::History;

/// Images of one run, unless `COWFS_POWER_IMAGES` says otherwise.
const IMAGES: u64 = 24_000;
/// Images taken of each history.
const OF_ONE: u64 = 300;

fn seed() -> u64 {
    let seed = match std::env::var("COWFS_SEED") {
        Ok(text) => text.parse().expect("COWFS_SEED is a number"),
        Err(_) => rand::rng().random(),
    };
    println!("COWFS_SEED={seed}");
    seed
}

/// A tmpfs: thousands of small trees are made and thrown away.
fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("cowfs-power.")
        .tempdir_in("/dev/shm")
        .unwrap()
}

fn history(rng: &mut SmallRng, base: &std::path::Path, steps: usize, sled: bool) -> History {
    let durability = match rng.random_bool(0.5) {
        true => Durability::Strict,
        false => Durability::Ordered,
    };
    let mut history = History::new(base, durability, sled);
    history.prepare(rng);
    for _ in 0..steps {
        history.step(rng);
    }
    history.end();
    history
}

/// Runs `one` with numbers from 0 up to `count` on every processor; each draws from a seed of its own.
fn spread(count: u64, one: impl Fn(u64) -> Counts + Sync) -> Counts {
    let next = AtomicU64::new(0);
    let work = || {
        let mut counts = Counts::default();
        loop {
            let number = next.fetch_add(1, Ordering::SeqCst);
            if number >= count {
                return counts;
            }
            counts.add(&one(number));
        }
    };
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let mut all = Counts::default();
        for worker in workers {
            match worker.join() {
                Ok(counts) => all.add(&counts),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        all
    })
}

/// Every image, as far as there are not too many of one moment, of short histories.
#[test]
fn every_image_of_small_histories() {
    let seed = seed();
    let counts = spread(24, |number| {
        let mut rng = SmallRng::seed_from_u64(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let scratch = scratch();
        let history = history(&mut rng, scratch.path(), 3, false);
        let label = format!("COWFS_SEED={seed}, history {number}");
        Trial::new(&history, label).every_image(&mut rng)
    });
    println!("{counts:?}");
    counts.assert_telling();
}

/// Images drawn at random of longer histories.
#[test]
fn sampled_images() {
    let seed = seed();
    let images: u64 = match std::env::var("COWFS_POWER_IMAGES") {
        Ok(text) => text.parse().expect("COWFS_POWER_IMAGES is a number"),
        Err(_) => IMAGES,
    };
    let counts = spread(images.div_ceil(OF_ONE), |number| {
        let mut rng = SmallRng::seed_from_u64(!seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let scratch = scratch();
        // An index on disk takes ten times as long to open as none.
        let sled = number % 16 == 0;
        let history = history(&mut rng, scratch.path(), 40, sled);
        let label = format!("COWFS_SEED={seed}, history {number}");
        let count = if sled { OF_ONE / 10 } else { OF_ONE * 21 / 20 };
        Trial::new(&history, label).sampled(&mut rng, count)
    });
    println!("{counts:?}");
    counts.assert_telling();
}

/// What one operation kept and did not settle is durable before another, which finds it kept, applies its change.
#[test]
fn a_change_waits_for_what_another_kept() {
    let mut rng = SmallRng::seed_from_u64(1);
    let scratch = scratch();
    let mut history = History::new(scratch.path(), Durability::Strict, false);
    history.prepare(&mut rng);
    history.write_in_two_steps();
    let events = history.events();
    let place = |wanted: fn(&Event) -> bool| events.iter().position(wanted).expect("it happened");
    let written = place(|event| matches!(event, Event::Write(1.., ..)));
    let synced = place(|event| matches!(event, Event::Sync(1..)));
    let applied = place(|event| matches!(event, Event::Live(_)));
    assert!(
        written < synced && synced < applied,
        "VIOLATION: {written} {synced} {applied}"
    );
}
