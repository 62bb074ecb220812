//! The work in the guest: writers, and one who cuts and deletes snapshots. What is done is reported over a serial line,
//! and nobody goes on before the host has the report.

use super::plan::{Author, BLOCKS, SYNC_EVERY, State, Step, WRITERS};
use super::{Failure, option};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Snapshots that are left standing.
const MOST_SNAPSHOTS: usize = 14;

/// The line to the host.
struct Report {
    line: Mutex<File>,
    /// Orders what is reported by different threads.
    clock: AtomicU64,
    /// The writers rest. Under `ordered` snapshots are exact for sure only when nobody has written for a while.
    rest: AtomicBool,
}

impl Report {
    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    /// Returns when the host has it.
    fn say(&self, what: &str) -> Result<(), Failure> {
        let mut line = self.line.lock().map_err(|_| "the report broke")?;
        line.write_all(format!("{what}\n").as_bytes())?;
        Ok(rustix::termios::tcdrain(&*line)?)
    }
}

/// Steps that a writer has begun and ended.
#[derive(Default)]
struct Progress {
    begun: AtomicU64,
    ended: AtomicU64,
}

/// Works until the power goes; returns only with a failure.
pub fn run(args: &[String]) -> Result<(), Failure> {
    let mnt = PathBuf::from(option(args, "--mnt")?);
    let round: u32 = option(args, "--round")?.parse()?;
    let seed: u64 = option(args, "--seed")?.parse()?;
    let line = File::options()
        .write(true)
        .open(option(args, "--report")?)?;
    let report = Report {
        line: Mutex::new(line),
        clock: AtomicU64::new(1),
        rest: AtomicBool::new(false),
    };
    let failed = work(&mnt, round, seed, &report);
    if let Err(error) = &failed {
        report.say(&format!("FAIL {error}"))?;
    }
    failed
}

fn work(mnt: &Path, round: u32, seed: u64, report: &Report) -> Result<(), Failure> {
    report.say("MOUNTED")?;
    let mut rng = SmallRng::seed_from_u64(seed);
    // Shows what the last power cut has left, before any of it is changed.
    cut(mnt, &format!("b{round}"), report, String::new)?;
    disturb(mnt, round)?;
    let authors: Vec<Author> = (0..WRITERS)
        .map(|writer| Author { round, writer })
        .collect();
    for author in &authors {
        prepare(mnt, *author)?;
    }
    File::open(mnt)?.sync_all()?;
    report.say("READY")?;
    let progress: Vec<Progress> = authors.iter().map(|_| Progress::default()).collect();
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (author, progress) in authors.iter().zip(&progress) {
            threads.push(scope.spawn(move || write(mnt, *author, progress, report)));
        }
        let progress = &progress;
        threads.push(scope.spawn(move || snapshots(mnt, round, &mut rng, progress, report)));
        // Whoever ends has failed.
        loop {
            if let Some(ended) = threads.iter().position(|thread| thread.is_finished()) {
                let result = threads.swap_remove(ended).join();
                let failed =
                    result.unwrap_or_else(|_| Err("a thread of the guest panicked".into()));
                report.say(&format!("FAIL {:?}", failed.err()))?;
                std::process::exit(1);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    })
}

/// Changes what earlier rounds have left, under all snapshots that show it, and removes what is older than the last.
fn disturb(mnt: &Path, round: u32) -> Result<(), Failure> {
    for entry in fs::read_dir(mnt)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let of = name
            .strip_prefix('r')
            .and_then(|rest| rest.split('.').next());
        let Some(of) = of.and_then(|of| of.parse::<u32>().ok()) else {
            continue;
        };
        if of + 1 < round {
            fs::remove_dir_all(entry.path())?;
        } else if let Ok(blocks) = File::options()
            .write(true)
            .open(entry.path().join("blocks"))
        {
            for block in (0..BLOCKS).step_by(3) {
                blocks.write_all_at(&[0xEE; 4096], block * 4096)?;
            }
            blocks.set_len((BLOCKS - 8) * 4096)?;
        }
    }
    Ok(())
}

fn prepare(mnt: &Path, author: Author) -> Result<(), Failure> {
    let dir = mnt.join(author.to_string());
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    fs::create_dir(&dir)?;
    let blocks = File::create(dir.join("blocks"))?;
    (0..BLOCKS).try_for_each(|block| blocks.write_all_at(&author.block(0), block * 4096))?;
    let cur = File::create(dir.join("cur"))?;
    cur.write_all_at(&author.block(0), 0)?;
    cur.set_permissions(Permissions::from_mode(State::start().mode))?;
    let log = File::create(dir.join("log"))?;
    for file in [&blocks, &cur, &log, &File::open(&dir)?] {
        file.sync_all()?;
    }
    Ok(())
}

fn write(mnt: &Path, author: Author, progress: &Progress, report: &Report) -> Result<(), Failure> {
    let dir = mnt.join(author.to_string());
    let open = |name: &str| File::options().write(true).open(dir.join(name));
    let (log, blocks, folder) = (open("log")?, open("blocks")?, File::open(&dir)?);
    let (mut new, mut end) = (None, 0);
    for step in 1.. {
        while report.rest.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(20));
        }
        progress.begun.store(step, Ordering::SeqCst);
        let bytes = author.block(step);
        match Step::of(step) {
            Step::Append => {
                log.write_all_at(&bytes, end)?;
                end += bytes.len() as u64;
            }
            Step::Overwrite(block) => blocks.write_all_at(&bytes, block * 4096)?,
            Step::Create => {
                let file = File::options()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(dir.join("new"))?;
                new = Some(file);
            }
            Step::Fill => new.as_ref().ok_or("no new")?.write_all_at(&bytes, 0)?,
            Step::Rename => fs::rename(dir.join("new"), dir.join("cur"))?,
            Step::Mode(mode) => fs::set_permissions(dir.join("cur"), Permissions::from_mode(mode))?,
            Step::Truncate => {
                log.set_len(0)?;
                end = 0;
            }
        }
        progress.ended.store(step, Ordering::SeqCst);
        if step % SYNC_EVERY == 0 {
            let begun = report.tick();
            for file in [&log, &blocks, &open("cur")?, &folder] {
                file.sync_all()?;
            }
            report.say(&format!("F {} {step} {begun}", author.writer))?;
        }
    }
    Ok(())
}

/// Cuts a snapshot and reports it, with what `bounds` says when it exists.
fn cut(
    mnt: &Path,
    name: &str,
    report: &Report,
    bounds: impl FnOnce() -> String,
) -> Result<(), Failure> {
    let path = mnt.join(".snapshots").join(name);
    fs::create_dir(&path).map_err(|error| format!("snapshot {name}: {error}"))?;
    let bounds = bounds();
    report.say(&format!("S {name} {} {bounds}", report.tick()))
}

fn snapshots(
    mnt: &Path,
    round: u32,
    rng: &mut SmallRng,
    progress: &[Progress],
    report: &Report,
) -> Result<(), Failure> {
    for number in 0.. {
        let pause = rng.random_range(0..3) * rng.random_range(0..700);
        std::thread::sleep(Duration::from_millis(pause));
        if rng.random_bool(0.2) {
            report.rest.store(true, Ordering::SeqCst);
            report.say("REST")?;
            std::thread::sleep(Duration::from_millis(rng.random_range(1000..16_000)));
            report.rest.store(false, Ordering::SeqCst);
        }
        let ended: Vec<u64> = progress
            .iter()
            .map(|p| p.ended.load(Ordering::SeqCst))
            .collect();
        cut(mnt, &format!("s{round}.{number}"), report, || {
            let begun = progress.iter().map(|p| p.begun.load(Ordering::SeqCst));
            let pairs = ended
                .iter()
                .zip(begun)
                .map(|(from, to)| format!("{from}:{to}"));
            pairs.collect::<Vec<_>>().join(" ")
        })?;
        let mut there: Vec<String> = fs::read_dir(mnt.join(".snapshots"))?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_, std::io::Error>>()?;
        there.sort();
        while there.len() > MOST_SNAPSHOTS {
            let victim = there.swap_remove(rng.random_range(0..there.len()));
            report.say(&format!("d {victim}"))?;
            fs::remove_dir(mnt.join(".snapshots").join(&victim))
                .map_err(|error| format!("deletion of {victim}: {error}"))?;
            report.say(&format!("D {victim}"))?;
        }
    }
    Ok(())
}
