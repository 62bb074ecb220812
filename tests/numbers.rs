//! Inode numbers that the backing filesystem gives a second time, on the engine without a mount.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "support/drive.rs"]
mod drive;

use cowfs::engine::Engine;
use cowfs::engine::creds::Caller;
use cowfs::engine::names::Make;
use cowfs::sync::{AtomicBool, AtomicU64, Ordering};
use drive::{find, options, root, seen};
use std::collections::BTreeSet;
use std::time::Duration;

/// Who holds a handle of a removed object asks for its number (open_by_handle_at(2)) while a new object gets it: the new
/// one stays known.
#[test]
fn a_number_that_is_asked_for_while_it_gets_a_new_object() {
    // On a disk: a filesystem in memory gives no number twice.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let engine = Engine::open(dir.path(), options()).unwrap();
    let before = engine.nodes.count();
    let (number, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut seen = BTreeSet::new();
    let mut again = 0;
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    let node = number.load(Ordering::SeqCst);
                    if engine.recall(node).is_ok() {
                        engine.nodes.forget(node, 1);
                    }
                }
            });
        }
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for round in 0..20_000 {
                let make = Make::Directory(0o755);
                let made = engine
                    .make(&root(&engine), b"d", make, Caller::ROOT)
                    .unwrap();
                number.store(made.node, Ordering::SeqCst);
                again += u32::from(!seen.insert(made.node));
                for _ in 0..3 {
                    let node = engine.node(made.node);
                    assert!(node.is_ok(), "round {round}: {:?}", node.err());
                    let known = engine.getattr(&node.unwrap(), None);
                    assert!(known.is_ok(), "getattr, round {round}: {:?}", known.err());
                }
                engine.remove(&root(&engine), b"d", true).unwrap();
                engine.nodes.forget(made.node, 1);
            }
        }));
        done.store(true, Ordering::SeqCst);
        result.unwrap();
    });
    assert!(again > 1000, "the filesystem gave no number twice: {again}");
    assert_eq!(engine.nodes.count(), before);
}

/// Of two names that go at the same time one is the last, whatever was seen of the other before: the snapshot keeps the
/// file.
#[test]
fn two_names_of_a_file_go_at_the_same_time() {
    let dir = tempfile::tempdir().unwrap();
    for at in ["a", "b"] {
        std::fs::create_dir(dir.path().join(at)).unwrap();
    }
    let engine = Engine::open(dir.path(), options()).unwrap();
    let above = ["a", "b"].map(|name| find(&engine, root(&engine), &[name]).unwrap());
    for round in 0..2000 {
        engine
            .make(&above[0], b"f", Make::Node(0o100_644, 0), Caller::ROOT)
            .unwrap();
        let file = find(&engine, above[0].clone(), &["f"]).unwrap();
        engine.link(&file, &above[1], b"f").unwrap();
        drop(file);
        let name = format!("s{round}");
        engine.snapshot(name.as_bytes()).unwrap();
        let both = std::sync::Barrier::new(above.len());
        std::thread::scope(|scope| {
            for dir in &above {
                scope.spawn(|| {
                    both.wait();
                    engine.remove(dir, b"f", false).unwrap();
                });
            }
        });
        for at in ["a", "b"] {
            let kept = seen(&engine, &[&name, at, "f"]);
            assert!(kept.is_ok(), "round {round}: {:?}", kept.err());
        }
        engine
            .delete_snapshot(name.as_bytes(), Duration::from_secs(10))
            .unwrap();
    }
    engine.close().unwrap();
}
