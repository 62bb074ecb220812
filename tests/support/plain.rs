//! What tests without a mount have in common: seeds and copies of directories.

#![allow(dead_code, reason = "each test uses a part")]

use rand::SeedableRng;
use rand::rngs::SmallRng;
use std::path::Path;

/// The number in `COWFS_SEED`, which repeats a run.
pub(crate) fn given_seed() -> Option<u64> {
    let text = std::env::var("COWFS_SEED").ok()?;
    Some(text.parse().expect("COWFS_SEED is a number"))
}

fn new_seed() -> u64 {
    std::time::UNIX_EPOCH.elapsed().unwrap().as_micros() as u64
}

/// The seed given, or `count` new ones.
pub(crate) fn seeds(count: u64) -> Vec<u64> {
    let new = || (0..count).map(|n| new_seed().wrapping_add(n)).collect();
    given_seed().map_or_else(new, |seed| vec![seed])
}

/// Random numbers of a test, which says how to have them again.
pub(crate) fn rng(test: &str) -> SmallRng {
    let seed = given_seed().unwrap_or_else(new_seed);
    println!("{test}: COWFS_SEED={seed} repeats this run");
    SmallRng::seed_from_u64(seed)
}

/// Copies a directory; every directory is for its owner alone, as those of a store are.
pub(crate) fn copy_tree(from: &Path, to: &Path) {
    use std::os::unix::fs::DirBuilderExt;
    let mut private = std::fs::DirBuilder::new();
    private.recursive(true).mode(0o700).create(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}
