//! kill -9 of the daemon at random instants (C7): nothing acknowledged is lost, nothing is half done, and
//! every snapshot is as it was recorded. One store lives through all rounds.
//!
//! `COWFS_KILL_ROUNDS` (100), `COWFS_SEED`.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use support::model::{Links, Op, Random, State, compare};
use support::{Mount, env_number, seed};

/// Works until an operation fails; returns it with the error, and how many succeeded.
fn work(mount: &Mount, state: &mut State, random: &mut Random, killed: &AtomicBool) -> (Op, usize) {
    let mut count = 0;
    loop {
        let op = state.operation(random);
        match op.execute(&mount.mnt) {
            Ok(()) => state.apply(&op),
            Err(error) => {
                assert!(
                    killed.load(Ordering::SeqCst),
                    "VIOLATION: {op:?} failed with the daemon alive: {error}"
                );
                return (op, count);
            }
        }
        count += 1;
    }
}

/// The snapshots that exist are those of `state`, each as it was.
fn check_snapshots(mount: &Mount, state: &State) -> Result<(), String> {
    let mut names: Vec<String> = fs::read_dir(mount.mnt.join(".snapshots"))
        .map_err(|e| format!(".snapshots: {e}"))?
        .map(|e| e.map(|e| e.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_, _>>()
        .map_err(|e| format!(".snapshots: {e}"))?;
    names.sort();
    if !names.iter().eq(state.snapshots.keys()) {
        return Err(format!(
            "snapshots {names:?}, not {:?}",
            state.snapshots.keys().collect::<Vec<_>>()
        ));
    }
    for (name, tree) in &state.snapshots {
        compare(&mount.snapshot_path(name), tree, Links::Exact)
            .map_err(|why| format!("snapshot {name}: {why}"))?;
    }
    Ok(())
}

fn check(mount: &Mount, state: &State) -> Result<(), String> {
    compare(&mount.mnt, &state.live, Links::Exact).map_err(|why| format!("live tree: {why}"))?;
    check_snapshots(mount, state)
}

#[test]
fn nothing_is_lost_by_kill_9() {
    let rounds = env_number("COWFS_KILL_ROUNDS", 100);
    let seed = seed("mounted_kill");
    let mut random = Random::new(seed);
    let limit = Duration::from_secs(120 + rounds * 6);
    let mount = Mount::new("kill", limit);
    let mut state = State::default();
    let mut total = 0;
    let mut halves = 0; // writes of which a beginning is there
    let mut after = 0; // rounds in which the operation under way had been carried out
    for round in 0..rounds {
        let delay = Duration::from_micros(random.below(150_000) as u64);
        let killed = AtomicBool::new(false);
        let (op, count) = std::thread::scope(|scope| {
            let worker = scope.spawn(|| work(&mount, &mut state, &mut random, &killed));
            std::thread::sleep(delay);
            killed.store(true, Ordering::SeqCst);
            mount.kill9();
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        total += count;
        mount.recover();
        let Err(without) = check(&mount, &state) else {
            continue;
        };
        let mut next = state.clone();
        next.apply(&op);
        if let Err(with) = check(&mount, &next) {
            let part = state.beginnings(&op).into_iter().find_map(|part| {
                let mut next = state.clone();
                next.apply(&part);
                check(&mount, &next).is_ok().then_some(next)
            });
            let Some(part) = part else {
                panic!(
                    "VIOLATION in round {round} (seed {seed}), after {count} operations, {op:?} under way:\n\
                     without it: {without}\nwith it: {with}\nnor with a beginning of it"
                );
            };
            next = part;
            halves += 1;
        }
        state = next;
        after += 1;
    }
    println!(
        "{rounds} rounds, {total} operations, {} snapshots at the end; the operation under way was found \
         carried out in {after} rounds, in part in {halves} of them",
        state.snapshots.len()
    );
    mount.remount();
    check(&mount, &state).unwrap_or_else(|why| panic!("VIOLATION after a clean remount: {why}"));
    let (_, mut names): (Vec<()>, Vec<String>) =
        (Vec::new(), state.snapshots.keys().cloned().collect());
    while !names.is_empty() {
        let name = names.swap_remove(random.below(names.len()));
        let op = Op::DeleteSnapshot { name };
        op.execute(&mount.mnt)
            .unwrap_or_else(|error| panic!("{op:?}: {error}"));
        state.apply(&op);
        check(&mount, &state).unwrap_or_else(|why| panic!("VIOLATION after {op:?}: {why}"));
    }
    mount.umount();
    compare(&mount.backing, &state.live, Links::AtLeast).unwrap_or_else(|why| {
        panic!("VIOLATION: the backing directory is not the live tree: {why}")
    });
    mount.mount();
}
