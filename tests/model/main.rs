//! The engine against a reference that is obviously right: a tree in memory, of which a snapshot is a deep
//! clone. Random operations with every kind of interruption; no mount.
//!
//! `COWFS_SEED` (64 hex digits) repeats a run, `COWFS_MODEL_CASES` changes its length.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod tree;
mod walk;
mod world;

use proptest::collection::vec;
use proptest::prelude::{ProptestConfig, any};
use proptest::test_runner::{RngAlgorithm, TestCaseError, TestRng, TestRunner};
use world::{Op, World, op};

/// Operations of one case.
const OPS: usize = 300;
/// Cases of a run; with `OPS` well over 100,000 operations.
const CASES: u32 = 360;

fn seed() -> [u8; 32] {
    let mut seed = [0; 32];
    match std::env::var("COWFS_SEED") {
        Ok(hex) => {
            for (at, byte) in seed.iter_mut().enumerate() {
                *byte = u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap();
            }
        }
        Err(_) => {
            use std::io::Read;
            std::fs::File::open("/dev/urandom")
                .unwrap()
                .read_exact(&mut seed)
                .unwrap();
        }
    }
    let hex: String = seed.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("COWFS_SEED={hex}");
    seed
}

fn run(cases: u32, in_memory_index: bool) {
    let cases = std::env::var("COWFS_MODEL_CASES").map_or(cases, |n| n.parse().unwrap());
    let config = ProptestConfig {
        cases,
        failure_persistence: None,
        max_shrink_iters: 2000,
        ..ProptestConfig::default()
    };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed());
    let mut runner = TestRunner::new_with_rng(config, rng);
    let count = std::cell::Cell::new(0_usize);
    let ops = (vec(op(), OPS / 2..OPS * 3 / 2), any::<bool>());
    let outcome = runner.run(&ops, |(ops, strict): (Vec<Op>, bool)| {
        count.set(count.get() + ops.len());
        let mut world = World::new(in_memory_index, strict);
        for op in &ops {
            world
                .apply(op)
                .map_err(|why| TestCaseError::fail(format!("{op:?}: {why}")))?;
        }
        world.finish().map_err(TestCaseError::fail)
    });
    println!("{} operations in {cases} cases", count.get());
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

#[test]
fn random_operations_with_the_index_on_disk() {
    run(CASES / 3, false);
}

#[test]
fn random_operations_with_the_index_in_memory() {
    run(CASES - CASES / 3, true);
}
