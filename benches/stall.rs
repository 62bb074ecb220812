//! The longest write during a cut: `scripts/stall` runs this. A report, not a test: it fails only when
//! something does not work.

#![allow(clippy::unwrap_used, reason = "a measurement may panic")]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Bytes of one file: small, so that ten thousand of them fit.
const FILE_BLOCKS: u64 = 16;
/// Time between cuts.
const EVERY: Duration = Duration::from_millis(100);

struct Options {
    seconds: u64,
    writers: usize,
    dir: PathBuf,
    files: Vec<usize>,
}

fn options() -> Options {
    let mut options = Options {
        seconds: 10,
        writers: 2,
        dir: std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from),
        files: Vec::new(),
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || {
            words
                .next()
                .unwrap_or_else(|| panic!("{word} needs a value"))
        };
        match word.as_str() {
            "--bench" => {} // from cargo
            "--seconds" => options.seconds = value().parse().unwrap(),
            "--writers" => options.writers = value().parse().unwrap(),
            "--dir" => options.dir = value().into(),
            number => {
                options.files.push(number.parse().unwrap_or_else(|_| {
                    panic!("{number}: not an option (see scripts/stall --help)")
                }))
            }
        }
    }
    if options.files.is_empty() {
        options.files = vec![1, 100, 10_000];
    }
    options
}

/// Unmounts and removes what it holds, however the measurement ends.
struct Mounted {
    bin: PathBuf,
    root: PathBuf,
}

impl Mounted {
    fn new(dir: &Path) -> Self {
        let bin = std::env::var_os("COWFS_BIN")
            .map_or_else(|| PathBuf::from(env!("CARGO_BIN_EXE_cowfs")), PathBuf::from);
        let root = dir.join(format!("cowfs-stall.{}", std::process::id()));
        fs::create_dir(&root).unwrap();
        let mounted = Self { bin, root };
        fs::create_dir(mounted.root.join("backing")).unwrap();
        fs::create_dir(mounted.mnt()).unwrap();
        let status = Command::new(&mounted.bin)
            .arg("mount")
            .arg(mounted.root.join("backing"))
            .arg(mounted.mnt())
            .status()
            .unwrap();
        assert!(status.success(), "cowfs mount failed");
        mounted
    }

    fn mnt(&self) -> PathBuf {
        self.root.join("mnt")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let done = Command::new(&self.bin)
            .arg("umount")
            .arg(self.mnt())
            .status();
        if !done.is_ok_and(|status| status.success()) {
            let _ = Command::new("umount").arg("-l").arg(self.mnt()).status();
        }
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// When a write or a cut began and ended, from the start of the run.
type Span = (Duration, Duration);

fn length(span: &Span) -> Duration {
    span.1 - span.0
}

/// Writers at full speed for `time`, with or without cuts. Spans of all writes, and of all cuts.
fn load(
    mnt: &Path,
    files: &[File],
    writers: usize,
    time: Duration,
    cuts: bool,
) -> (Vec<Span>, Vec<Span>) {
    let stop = AtomicBool::new(false);
    let start = Instant::now();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..writers)
            .map(|number| {
                let stop = &stop;
                scope.spawn(move || {
                    let block = [u8::try_from(number).unwrap(); 4096];
                    let mut random = 88_172_645_463_325_252 + number as u64;
                    let mut spans = Vec::with_capacity(1 << 20);
                    while !stop.load(Ordering::Relaxed) {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        let file =
                            &files[usize::try_from((random >> 8) % files.len() as u64).unwrap()];
                        let at = (random >> 40) % FILE_BLOCKS * 4096;
                        let began = start.elapsed();
                        file.write_all_at(&block, at).unwrap();
                        spans.push((began, start.elapsed()));
                    }
                    spans
                })
            })
            .collect();
        let mut cut = Vec::new();
        while start.elapsed() < time {
            if cuts {
                let began = start.elapsed();
                let path = mnt.join(format!(".snapshots/stall-{}", cut.len()));
                fs::create_dir(&path).unwrap();
                cut.push((began, start.elapsed()));
                if cut.len() > 3 {
                    let old = mnt.join(format!(".snapshots/stall-{}", cut.len() - 4));
                    fs::remove_dir(old).unwrap();
                }
            }
            std::thread::sleep(EVERY);
        }
        stop.store(true, Ordering::Relaxed);
        for number in cut.len().saturating_sub(3)..cut.len() {
            fs::remove_dir(mnt.join(format!(".snapshots/stall-{number}"))).unwrap();
        }
        (
            threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap())
                .collect(),
            cut,
        )
    })
}

fn milliseconds(time: Duration) -> String {
    format!("{:.2}", time.as_secs_f64() * 1000.0)
}

fn main() {
    let options = options();
    // 10,000 open files and some
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, raised).unwrap();
    println!(
        "{} writers, 4 KiB at random places; a cut every {} ms; times in ms",
        options.writers,
        EVERY.as_millis()
    );
    println!(
        "{:>7} {:>9} {:>10} {:>9} {:>9} {:>13} {:>11} {:>10}",
        "files",
        "cuts",
        "writes/s",
        "99.99 %",
        "longest",
        "during a cut",
        "cut median",
        "cut longest"
    );
    for count in &options.files {
        let mounted = Mounted::new(&options.dir);
        let mnt = mounted.mnt();
        let whole = vec![0_u8; usize::try_from(FILE_BLOCKS * 4096).unwrap()];
        let files: Vec<File> = (0..*count)
            .map(|number| {
                let path = mnt.join(format!("f{number}"));
                fs::write(&path, &whole).unwrap();
                OpenOptions::new().write(true).open(path).unwrap()
            })
            .collect();
        for cuts in [false, true] {
            let time = Duration::from_secs(options.seconds);
            let (writes, cut) = load(&mnt, &files, options.writers, time, cuts);
            let mut lengths: Vec<Duration> = writes.iter().map(length).collect();
            lengths.sort_unstable();
            let mut cut_lengths: Vec<Duration> = cut.iter().map(length).collect();
            cut_lengths.sort_unstable();
            let longest = |spans: &mut dyn Iterator<Item = Duration>| {
                spans.max().map_or_else(|| "-".to_owned(), milliseconds)
            };
            let during = longest(
                &mut writes
                    .iter()
                    .filter(|w| cut.iter().any(|c| w.0 < c.1 && w.1 > c.0))
                    .map(length),
            );
            println!(
                "{count:>7} {:>9} {:>10} {:>9} {:>9} {during:>13} {:>11} {:>10}",
                cut.len(),
                lengths.len() as u64 / options.seconds.max(1),
                milliseconds(lengths[lengths.len() - 1 - lengths.len() / 10_000]),
                milliseconds(lengths[lengths.len() - 1]),
                cut_lengths
                    .get(cut_lengths.len() / 2)
                    .copied()
                    .map_or_else(|| "-".to_owned(), milliseconds),
                cut_lengths
                    .last()
                    .copied()
                    .map_or_else(|| "-".to_owned(), milliseconds),
            );
        }
    }
}
