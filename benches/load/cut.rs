//! What the creation of a snapshot costs those who write meanwhile, and how long it takes.

use crate::{Options, Random};
use cowfs::sys;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const BLOCK: u64 = 4096;
const MIB: usize = 1 << 20;
/// Snapshots that are left while further ones are cut.
const KEPT: usize = 3;
/// Threads that ask for what a cut needs, as many as the flush helper has.
const HANDS: usize = 4;

/// When something began and ended, from the start of the run.
type Span = (Duration, Duration);

fn milliseconds(span: &Span) -> f64 {
    (span.1 - span.0).as_secs_f64() * 1000.0
}

fn sorted(spans: &[Span]) -> Vec<f64> {
    let mut lengths: Vec<f64> = spans.iter().map(milliseconds).collect();
    lengths.sort_unstable_by(f64::total_cmp);
    lengths
}

/// Does to a snapshot what `template` says, `%` being its number: `mkdir PATH`, `rmdir PATH`, nothing, or any other
/// command, for the shell.
fn carry_out(template: &str, number: usize) {
    let command = template.replace('%', &number.to_string());
    match command.split_once(' ') {
        None if command.is_empty() => {}
        Some(("mkdir", path)) => fs::create_dir(path).unwrap(),
        Some(("rmdir", path)) => fs::remove_dir(path).unwrap(),
        _ => {
            let mut shell = Command::new("sh");
            let run = shell
                .args(["-ec", &command])
                .stdin(Stdio::null())
                .stdout(Stdio::null());
            assert!(run.status().unwrap().success(), "{command} failed");
        }
    }
}

/// As many descriptors as the process is allowed: ten thousand files are open at once.
fn raise_file_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
}

/// For reading and writing, as databases do: it could be mapped, so a cut has to ask the kernel for its pages.
fn open_for_both(path: &Path) -> File {
    let mut options = OpenOptions::new();
    options.read(true).write(true).open(path).unwrap()
}

/// Where the file with this number is.
fn opened(dir: &Path, number: usize) -> PathBuf {
    dir.join(format!("open.{number}"))
}

fn open_files(options: &Options, dir: &Path) -> Vec<File> {
    let size = options.number("size");
    let piece = vec![0x44_u8; usize::try_from(size).unwrap().min(MIB)];
    (0..usize::try_from(options.number("files")).unwrap())
        .map(|number| {
            let path = opened(dir, number);
            if !path.exists() {
                let file = File::create(&path).unwrap();
                for at in (0..size).step_by(piece.len()) {
                    file.write_all_at(&piece, at).unwrap();
                }
            }
            open_for_both(&path)
        })
        .collect()
}

/// What one stretch of time showed.
#[derive(Default)]
struct Stretch {
    writes: Vec<Span>,
    cuts: Vec<Span>,
}

struct Load<'a> {
    dir: &'a Path,
    files: &'a [File],
    /// Closed to the writers while they are held.
    gate: RwLock<()>,
    blocks: u64,
    writers: u64,
    /// The time from one write to the next; zero: none.
    pace: Duration,
    time: Duration,
    every: Duration,
}

impl Load<'_> {
    fn write(&self, number: u64, start: Instant, stop: &AtomicBool) -> Vec<Span> {
        let block = [u8::try_from(number).unwrap(); BLOCK as usize];
        let mut random = Random::new(number);
        let mut spans = Vec::with_capacity(1 << 20);
        // At least once, even if the thread comes late to a busy machine.
        loop {
            let which = random.below(self.files.len() as u64);
            let file = &self.files[usize::try_from(which).unwrap()];
            let at = random.below(self.blocks) * BLOCK;
            let began = start.elapsed();
            let open = self.gate.read().unwrap();
            file.write_all_at(&block, at).unwrap();
            drop(open);
            spans.push((began, start.elapsed()));
            if stop.load(Ordering::Relaxed) {
                return spans;
            }
            if !self.pace.is_zero() {
                let next = began + self.pace;
                std::thread::sleep(next.saturating_sub(start.elapsed()));
            }
        }
    }

    /// Four threads do something with each file.
    fn each(&self, work: impl Fn(usize, &File) + Sync) {
        let numbered: Vec<_> = self.files.iter().enumerate().collect();
        std::thread::scope(|scope| {
            for part in numbered.chunks(numbered.len().div_ceil(HANDS)) {
                scope.spawn(|| part.iter().for_each(|(number, file)| work(*number, file)));
            }
        });
    }

    /// Makes a snapshot as `create` says: a command, or what a cut has to ask of the kernel at the least, and then a
    /// command that does nothing else.
    fn cut(&self, create: &str, number: usize) {
        let write_back = |_: usize, file: &File| sys::write_back(file.as_fd(), 0, 0).unwrap();
        match create.split_once(' ') {
            // What is stored through mappings, of all files that could be mapped.
            Some(("open-each", create)) => {
                self.each(|number, _| {
                    let file = File::open(opened(self.dir, number)).unwrap();
                    write_back(number, &file);
                });
                carry_out(create, number);
            }
            // What the kernel holds back: all of it, and then, while writers are held, what they have written meanwhile.
            Some(("write-back", create)) => {
                self.each(write_back);
                let _held = self.gate.write().unwrap();
                self.each(write_back);
                carry_out(create, number);
            }
            _ => carry_out(create, number),
        }
    }

    /// Lets the writers run, and has snapshots made and removed meanwhile.
    fn run(&self, cut: Option<(&str, &str)>, made: &mut usize) -> Stretch {
        let stop = AtomicBool::new(false);
        let start = Instant::now();
        let mut stretch = Stretch::default();
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.writers)
                .map(|number| {
                    let stop = &stop;
                    scope.spawn(move || self.write(number, start, stop))
                })
                .collect();
            while start.elapsed() < self.time {
                // The first one comes when the writers are at work.
                std::thread::sleep(self.every);
                let Some((create, remove)) = cut else {
                    continue;
                };
                let began = start.elapsed();
                self.cut(create, *made);
                stretch.cuts.push((began, start.elapsed()));
                if *made >= KEPT {
                    carry_out(remove, *made - KEPT);
                }
                *made += 1;
            }
            stop.store(true, Ordering::Relaxed);
            for thread in threads {
                stretch.writes.extend(thread.join().unwrap());
            }
        });
        stretch
    }
}

fn summary(stretches: &[Stretch]) -> Value {
    let mut longest = Vec::new();
    let (mut at_a_cut, mut create) = (Vec::new(), Vec::new());
    let mut all = Vec::new();
    for stretch in stretches {
        let lengths = sorted(&stretch.writes);
        longest.push(*lengths.last().unwrap());
        let meets = |write: &&Span| {
            stretch
                .cuts
                .iter()
                .any(|cut| write.0 < cut.1 && write.1 > cut.0)
        };
        // Only long writes are looked at: there may be millions.
        let long = stretch
            .writes
            .iter()
            .filter(|write| milliseconds(write) > 0.05);
        at_a_cut.extend(long.filter(meets).map(milliseconds).max_by(f64::total_cmp));
        create.extend(stretch.cuts.iter().map(milliseconds));
        all.extend(lengths);
    }
    all.sort_unstable_by(f64::total_cmp);
    json!({
        "writes": all.len(),
        "longest_ms": longest,
        "at_a_cut_ms": at_a_cut,
        "p999_ms": all[all.len() - 1 - all.len() / 1000],
        "create_ms": create,
    })
}

/// Writers overwrite 4 KiB at random places of `--files` open files of `--size` bytes, at full speed or every `--pace`
/// microseconds. In turn, for `--time` milliseconds each and `--stretches` times, without a snapshot and with one made
/// by `--create` every `--every` milliseconds (the fourth last is removed by `--remove`). On a floor, what a
/// cut asks for at the least can be measured: `--create` `open-each COMMAND` or `write-back COMMAND`.
pub fn writers(options: &Options) -> Value {
    raise_file_limit();
    let dir = options.path("dir");
    let files = open_files(options, &dir);
    let load = Load {
        dir: &dir,
        files: &files,
        gate: RwLock::default(),
        blocks: options.number("size") / BLOCK,
        writers: options.number("writers"),
        pace: Duration::from_micros(options.number("pace")),
        time: options.milliseconds("time"),
        every: options.milliseconds("every"),
    };
    let (create, remove) = (options.text("create"), options.text("remove"));
    let (mut control, mut cuts, mut made) = (Vec::new(), Vec::new(), 0);
    // What was just made is on its way to the disk, which is not what is measured.
    for file in &files {
        file.sync_all().unwrap();
    }
    for _ in 0..options.number("stretches") {
        control.push(load.run(None, &mut made));
        cuts.push(load.run(Some((create, remove)), &mut made));
    }
    for number in made.saturating_sub(KEPT)..made {
        carry_out(remove, number);
    }
    json!({"control": summary(&control), "cuts": summary(&cuts)})
}

/// Creates `--count` snapshots `--snapshots`/sN one after the other, with nobody writing, and after each overwrites one
/// block of `data.0`. Prints how long each took, in microseconds.
pub fn series(options: &Options) -> Value {
    let file = open_for_both(&options.path("dir").join("data.0"));
    let (snapshots, blocks) = (options.path("snapshots"), options.number("size") / BLOCK);
    let block = [0x66; BLOCK as usize];
    let mut random = Random::new(1);
    let (mut create, mut first_write) = (Vec::new(), Vec::new());
    for number in 0..options.number("count") {
        let path = snapshots.join(format!("s{number}"));
        let began = Instant::now();
        fs::create_dir(path).unwrap();
        create.push(began.elapsed().as_micros() as u64);
        let at = random.below(blocks) * BLOCK;
        let began = Instant::now();
        file.write_all_at(&block, at).unwrap();
        first_write.push(began.elapsed().as_micros() as u64);
    }
    json!({"create_us": create, "first_write_us": first_write})
}
