//! Reading and writing of bytes. Files are `DIR/data.0` and so on, of `--size` bytes each.

use crate::{Options, Random, rate};
use rustix::fs::{Advice, fadvise};
use serde_json::{Value, json};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

const MIB: usize = 1 << 20;
const BLOCK: usize = 4096;
/// Between two looks at the clock.
const BATCH: u64 = 16;

fn paths(dir: &Path, options: &Options) -> Vec<PathBuf> {
    (0..options.number("files"))
        .map(|number| dir.join(format!("data.{number}")))
        .collect()
}

/// Takes the pages of a file out of the page cache.
fn evict(path: &Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    fadvise(&file, 0, None, Advice::DontNeed).unwrap();
}

/// Makes the files, by writes of 1 MiB, and syncs them.
pub fn fill(options: &Options) -> Value {
    let began = Instant::now();
    let (dir, size) = (options.path("dir"), options.number("size"));
    let block = vec![0x5a_u8; MIB];
    for path in paths(&dir, options) {
        let mut file = File::create(path).unwrap();
        let mut left = size;
        while left > 0 {
            let n = left.min(MIB as u64);
            file.write_all(&block[..usize::try_from(n).unwrap()])
                .unwrap();
            left -= n;
        }
        file.sync_all().unwrap();
    }
    json!({"seconds": began.elapsed().as_secs_f64()})
}

/// Reads the files from beginning to end, 1 MiB at a time. With `--cold BACKING` the pages of the files there and here
/// are dropped first.
pub fn sequential_read(options: &Options) -> Value {
    let dir = options.path("dir");
    let paths = paths(&dir, options);
    if options.has("cold") {
        let backing = options.path("cold");
        for path in &paths {
            evict(path);
            evict(&backing.join(path.file_name().unwrap()));
        }
    }
    let mut buffer = vec![0; MIB];
    let (mut bytes, mut operations) = (0, 0);
    let began = Instant::now();
    for path in &paths {
        let mut file = File::open(path).unwrap();
        loop {
            let n = file.read(&mut buffer).unwrap();
            if n == 0 {
                break;
            }
            bytes += n as u64;
            operations += 1;
        }
    }
    rate(operations, bytes, began)
}

/// Writes a file anew, 1 MiB at a time, and syncs it once.
pub fn sequential_write(options: &Options) -> Value {
    let path = options.path("dir").join("sequential");
    let pieces = options.number("size") / MIB as u64;
    let block = vec![0xa5_u8; MIB];
    let mut file = File::create(&path).unwrap();
    let began = Instant::now();
    for _ in 0..pieces {
        file.write_all(&block).unwrap();
    }
    file.sync_all().unwrap();
    rate(pieces, pieces * MIB as u64, began)
}

/// A block at an address that `O_DIRECT` accepts.
struct Aligned {
    memory: Vec<u8>,
    at: usize,
}

impl Aligned {
    fn new(byte: u8) -> Self {
        let memory = vec![byte; 2 * BLOCK];
        let at = memory.as_ptr().align_offset(BLOCK);
        Self { memory, at }
    }

    fn block(&mut self) -> &mut [u8] {
        &mut self.memory[self.at..self.at + BLOCK]
    }
}

/// Reads or writes blocks of 4 KiB at random places of the files for `--time` milliseconds, one after the other.
/// With `--direct` past the page cache. What was written is synced afterwards, which is not measured.
pub fn random(options: &Options, write: bool) -> Value {
    let flags = if options.has("direct") {
        libc::O_DIRECT
    } else {
        0
    };
    let files: Vec<File> = paths(&options.path("dir"), options)
        .iter()
        .map(|path| {
            let mut open = OpenOptions::new();
            open.read(!write).write(write).custom_flags(flags);
            open.open(path).unwrap()
        })
        .collect();
    let blocks = options.number("size") / BLOCK as u64;
    let mut memory = Aligned::new(0x33);
    let block = memory.block();
    let mut random = Random::new(options.number("seed"));
    let (mut operations, limit) = (0, options.milliseconds("time"));
    let began = Instant::now();
    while began.elapsed() < limit {
        for _ in 0..BATCH {
            let file = &files[usize::try_from(operations).unwrap() % files.len()];
            let at = random.below(blocks) * BLOCK as u64;
            if write {
                file.write_all_at(block, at).unwrap();
            } else {
                file.read_exact_at(block, at).unwrap();
            }
            operations += 1;
        }
    }
    let line = rate(operations, operations * BLOCK as u64, began);
    if write {
        for file in &files {
            file.sync_all().unwrap();
        }
    }
    line
}

/// Overwrites 8 KiB at random places of a file, each write followed by fsync, for `--time` milliseconds.
pub fn sync_write(options: &Options) -> Value {
    let path = options.path("dir").join("data.0");
    let file = OpenOptions::new().write(true).open(path).unwrap();
    let block = [0x77; 2 * BLOCK];
    let places = options.number("size") / block.len() as u64;
    let mut random = Random::new(options.number("seed"));
    let (mut operations, limit) = (0, options.milliseconds("time"));
    let began = Instant::now();
    while began.elapsed() < limit {
        let at = random.below(places) * block.len() as u64;
        file.write_all_at(&block, at).unwrap();
        file.sync_all().unwrap();
        operations += 1;
    }
    rate(operations, operations * block.len() as u64, began)
}

/// Appends records of 100 bytes to a new file for `--time` milliseconds.
pub fn append(options: &Options) -> Value {
    let path = options.path("dir").join("log");
    if path.exists() {
        std::fs::remove_file(&path).unwrap();
    }
    let mut file = OpenOptions::new()
        .append(true)
        .create_new(true)
        .open(path)
        .unwrap();
    let record = [b'r'; 100];
    let (mut operations, limit) = (0, options.milliseconds("time"));
    let began = Instant::now();
    while began.elapsed() < limit {
        for _ in 0..BATCH {
            file.write_all(&record).unwrap();
            operations += 1;
        }
    }
    let line = rate(operations, operations * record.len() as u64, began);
    file.sync_all().unwrap();
    line
}

/// Overwrites `--blocks` different blocks of `data.0` in random order, each once; then the same blocks again, in the
/// same order. With `--cut DIR` the snapshot DIR is created before (`mkdir`). Prints the seconds of both passes; with
/// `--sync` each write is followed by fdatasync.
pub fn overwrite_once(options: &Options) -> Value {
    let path = options.path("dir").join("data.0");
    let file = OpenOptions::new().write(true).open(path).unwrap();
    let mut order: Vec<u64> = (0..options.number("size") / BLOCK as u64).collect();
    let mut random = Random::new(options.number("seed"));
    for at in (1..order.len()).rev() {
        let other = usize::try_from(random.below(at as u64 + 1)).unwrap();
        order.swap(at, other);
    }
    order.truncate(usize::try_from(options.number("blocks")).unwrap());
    if options.has("cut") {
        std::fs::create_dir(options.path("cut")).unwrap();
    }
    let block = [0x11; BLOCK];
    let seconds: Vec<f64> = (0..2)
        .map(|_| {
            let began = Instant::now();
            for number in &order {
                file.write_all_at(&block, number * BLOCK as u64).unwrap();
                if options.has("sync") {
                    file.sync_data().unwrap();
                }
            }
            began.elapsed().as_secs_f64()
        })
        .collect();
    file.sync_all().unwrap();
    json!({"operations": order.len(), "first": seconds[0], "second": seconds[1]})
}
