//! The engine against a reference that is obviously right: a tree in memory, of which a snapshot is a deep
//! clone. Random operations with every kind of interruption; no mount.
//!
//! `COWFS_SEED` (64 hex digits) repeats a run, `COWFS_MODEL_CASES` changes its length,
//! `COWFS_MODEL_SHRINK` how long it looks for a shorter case that fails.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod tree;
mod walk;
mod world;

use cowfs::engine::Reach;
use proptest::collection::vec;
use proptest::prelude::{Just, ProptestConfig, any};
use proptest::prop_oneof;
use proptest::test_runner::{RngAlgorithm, TestCaseError, TestRng, TestRunner};
use std::path::{Path, PathBuf};
use std::process::Command;
use world::{Op, World, op};

/// Operations of one case.
const OPS: usize = 300;
/// Cases of a run; with `OPS` well over 100,000 operations.
const CASES: u32 = 360;

/// `COWFS_SEED`, or a new one.
fn seed() -> [u8; 32] {
    let mut seed = [0; 32];
    match std::env::var("COWFS_SEED").ok() {
        Some(hex) => {
            for (at, byte) in seed.iter_mut().enumerate() {
                *byte = u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).unwrap();
            }
        }
        None => {
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

fn number(name: &str, default: u32) -> u32 {
    std::env::var(name).map_or(default, |n| n.parse().unwrap())
}

/// Where the backing directories go.
fn base() -> PathBuf {
    std::env::var_os("COWFS_TEST_DIR")
        .map_or_else(|| env!("CARGO_TARGET_TMPDIR").into(), PathBuf::from)
}

fn run(cases: u32, in_memory_index: bool, base: &Path) {
    let cases = number("COWFS_MODEL_CASES", cases);
    let config = ProptestConfig {
        cases,
        failure_persistence: None,
        max_shrink_iters: number("COWFS_MODEL_SHRINK", 2000),
        ..ProptestConfig::default()
    };
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed());
    let mut runner = TestRunner::new_with_rng(config, rng);
    let count = std::cell::Cell::new(0_usize);
    let ops = (
        vec(op(), OPS / 2..OPS * 3 / 2),
        any::<bool>(),
        prop_oneof![3 => Just(Reach::AsPermitted), 1 => Just(Reach::ByPlace)],
    );
    let outcome = runner.run(&ops, |(ops, strict, reach): (Vec<Op>, bool, Reach)| {
        count.set(count.get() + ops.len());
        let mut world = World::new(base, in_memory_index, strict, reach);
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

/// Runs these operations and compares all.
fn run_steps(base: &Path, steps: &[Op]) {
    let mut world = World::new(base, true, false, Reach::AsPermitted);
    for step in steps {
        world.apply(step).unwrap();
    }
    world.finish().unwrap();
}

// In parts that run at the same time: most of it is waiting for a disk.

#[test]
fn random_operations_with_the_index_on_disk() {
    run(CASES / 6, false, &base());
}

#[test]
fn more_random_operations_with_the_index_on_disk() {
    run(CASES / 6, false, &base());
}

#[test]
fn random_operations_with_the_index_in_memory() {
    run(CASES / 3, true, &base());
}

#[test]
fn more_random_operations_with_the_index_in_memory() {
    run(CASES / 3, true, &base());
}

/// Found once: a hole that begins where a chunk does, in a file that was cut short since, was taken for data.
#[test]
fn a_hole_behind_the_end_of_the_live_file_stays_one() {
    let file = 0;
    let steps = [
        Op::Create { dir: 0, name: 0 },
        Op::Write {
            file,
            at: (1 << 20) - 8192,
            len: 8192,
            byte: 7,
        },
        Op::Truncate {
            file,
            size: 3 << 20,
        },
        Op::Snapshot,
        Op::Truncate { file, size: 4096 },
        Op::Compare,
    ];
    run_steps(&base(), &steps);
}

/// A filesystem of its own in a file, unmounted when the value goes.
struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    fn new(mkfs: &[&str], options: &str) -> Self {
        std::fs::create_dir_all(base()).unwrap();
        let dir = tempfile::Builder::new()
            .prefix("disk")
            .tempdir_in(base())
            .unwrap();
        let (image, root) = (dir.path().join("image"), dir.path().join("root"));
        let file = std::fs::File::create(&image).unwrap();
        file.set_len(1 << 30).unwrap();
        std::fs::create_dir(&root).unwrap();
        let done = |command: &mut Command| {
            let output = command.output().unwrap();
            assert!(output.status.success(), "{command:?}: {output:?}");
        };
        done(Command::new(mkfs[0]).args(&mkfs[1..]).arg(&image));
        done(
            Command::new("mount")
                .args(["-o", options])
                .args([&image, &root]),
        );
        Self { dir }
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let status = Command::new("umount").arg("-l").arg(self.root()).status();
        if !status.is_ok_and(|status| status.success()) {
            eprintln!("{} cannot be unmounted", self.root().display());
        }
    }
}

#[test]
fn random_operations_on_xfs() {
    // What xfs allocates ahead of writes is data for lseek(2) while the page cache has it, and a hole when it has not.
    let disk = Disk::new(&["mkfs.xfs", "-q"], "loop,allocsize=4k");
    run(CASES / 24, true, &disk.root());
}

/// Found once: the hole in which a cut ended came to be data, with what xfs had allocated ahead of a later write, when
/// the file was cut short and grew again.
#[test]
fn the_hole_at_the_end_of_a_cut_stays_one_on_xfs() {
    let file = 0;
    let write = |at, len| Op::Write {
        file,
        at,
        len,
        byte: 7,
    };
    let steps = [
        Op::Create { dir: 0, name: 0 },
        write(0, 4096),
        Op::Truncate {
            file,
            size: 1_406_628,
        },
        Op::Snapshot,
        Op::Truncate {
            file,
            size: 131_331,
        },
        // It lets go of that when the file is closed, the first time.
        write(1_133_943, 28_815),
        write(1_354_316, 46_769),
        Op::Snapshot,
        write(1_691_279, 4290),
        Op::Compare,
    ];
    run_steps(&Disk::new(&["mkfs.xfs", "-q"], "loop").root(), &steps);
}

/// Found once: btrfs fills the block in which a file ends when the file grows past it. An older snapshot, in which the file was
/// longer, had a hole there.
#[test]
fn a_hole_in_which_the_live_file_ended_stays_one_on_btrfs() {
    let file = 0;
    let truncate = |size| Op::Truncate { file, size };
    let write = Op::Write {
        file,
        at: 1_914_447,
        len: 5671,
        byte: 7,
    };
    let disk = Disk::new(&["mkfs.btrfs", "-q"], "loop");
    let create = Op::Create { dir: 0, name: 0 };
    let end = truncate(1_156_522);
    let (long, short) = (truncate(1_493_888), truncate(8135));
    for changes in [
        vec![long.clone(), Op::Snapshot, end.clone(), write.clone()],
        vec![long, Op::Snapshot, short, Op::Snapshot, end, write],
        // Within the block, and in a chunk in which the file did not end before.
        vec![
            truncate(3_000_000),
            Op::Snapshot,
            truncate(100),
            Op::Snapshot,
            truncate(2_000_135),
            truncate(2_000_190),
        ],
    ] {
        let mut steps = vec![create.clone()];
        steps.extend(changes);
        steps.push(Op::Compare);
        run_steps(&disk.root(), &steps);
    }
}

#[test]
fn random_operations_on_btrfs() {
    run(
        CASES / 24,
        true,
        &Disk::new(&["mkfs.btrfs", "-q"], "loop").root(),
    );
}
