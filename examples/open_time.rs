//! How long a store takes to open, closed in order and after a crash, by the number of pre-images in it and the number
//! that came since the last checkpoint. A report, not a test.
//!
//! `cargo run --release --example open_time [PRE-IMAGES ...]` (default 100000 1000000), in `$TMPDIR` or /var/tmp.

use cowfs::error::Result;
use cowfs::ids::{Epoch, Ino};
use cowfs::store::{
    EntryImage, ObjectHandle, SnapshotInfo, SnapshotState, Store, StoreOptions, Timestamp,
};
use std::path::Path;
use std::time::Instant;

/// Pre-images that come after the last checkpoint.
const SINCE: u64 = 10_000;

fn options() -> StoreOptions {
    StoreOptions::default()
}

/// Keeps what so many names meant.
fn keep(store: &Store, from: u64, to: u64) -> Result<()> {
    for number in from..to {
        let was = EntryImage {
            ino: Ino(1_000_000 + number),
            kind: libc::DT_REG,
            handle: ObjectHandle {
                kind: 1,
                bytes: vec![7; 8].into(),
            },
        };
        let name = format!("some-file-{number}");
        store.keep_entry(
            Ino(2 + number / 1000),
            name.as_bytes(),
            Epoch(1),
            Some(&was),
        )?;
        if number % 50_000 == 49_999 {
            store.checkpoint()?;
        }
    }
    Ok(())
}

fn opened(dir: &Path) -> Result<(Store, f64)> {
    let begun = Instant::now();
    let store = Store::open(dir, options())?;
    Ok((store, begun.elapsed().as_secs_f64()))
}

fn measure(count: u64) -> Result<()> {
    let base = std::env::var_os("TMPDIR").unwrap_or_else(|| "/var/tmp".into());
    let dir = tempfile::tempdir_in(base)
        .map_err(|error| cowfs::error::Error::Usage(error.to_string()))?;
    let path = dir.path().join("store");
    let (store, _) = opened(&path)?;
    store.record_snapshot(&SnapshotInfo {
        epoch: Epoch(1),
        name: b"s".to_vec(),
        created: Timestamp { sec: 0, nsec: 0 },
        held: false,
        state: SnapshotState::Ready,
    })?;
    keep(&store, 0, count)?;
    store.checkpoint()?;
    store.close()?;
    drop(store);
    let (store, orderly) = opened(&path)?;
    store.checkpoint()?;
    drop(store);
    // Dropped without being closed: that is what a kill leaves.
    let (store, killed) = opened(&path)?;
    keep(&store, count, count + SINCE)?;
    store.sync()?;
    drop(store);
    let (store, behind) = opened(&path)?;
    drop(store);
    let index = std::fs::metadata(path.join("index/db")).map_or(0, |meta| meta.len() >> 20);
    println!("{count:>12} {index:>10} {orderly:>16.2} {killed:>14.2} {behind:>30.2}");
    Ok(())
}

fn main() -> Result<()> {
    let given: Vec<u64> = std::env::args()
        .skip(1)
        .filter_map(|word| word.parse().ok())
        .collect();
    println!(
        "{:>12} {:>10} {:>16} {:>14} {:>30}",
        "pre-images", "index MiB", "in order, s", "killed, s", "killed, 10,000 more, s"
    );
    let counts = if given.is_empty() {
        vec![100_000, 1_000_000]
    } else {
        given
    };
    counts.into_iter().try_for_each(measure)
}
