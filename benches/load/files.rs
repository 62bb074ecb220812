//! Names and attributes of many small files: `DIR/00/f00000` and so on, 1,000 in a directory.

use crate::{Options, rate};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

const PER_DIRECTORY: u64 = 1000;
const CONTENT: [u8; 4096] = [0x42; 4096];

fn directories(dir: &Path, files: u64) -> impl Iterator<Item = PathBuf> {
    (0..files.div_ceil(PER_DIRECTORY)).map(move |number| dir.join(format!("{number:02}")))
}

fn paths(dir: &Path, files: u64, letter: char) -> impl Iterator<Item = PathBuf> {
    (0..files).map(move |number| {
        let directory = number / PER_DIRECTORY;
        dir.join(format!("{directory:02}/{letter}{number:05}"))
    })
}

fn operands(options: &Options, letter: char) -> (PathBuf, u64, Vec<PathBuf>) {
    let (dir, files) = (options.path("dir"), options.number("files"));
    let paths = paths(&dir, files, letter).collect();
    (dir, files, paths)
}

fn write_all(paths: &[PathBuf]) {
    for path in paths {
        File::create_new(path).unwrap().write_all(&CONTENT).unwrap();
    }
}

/// Makes the tree that other measurements read.
pub fn tree(options: &Options) -> Value {
    let began = Instant::now();
    let (dir, files, paths) = operands(options, 'f');
    fs::create_dir(&dir).unwrap();
    for directory in directories(&dir, files) {
        fs::create_dir(directory).unwrap();
    }
    write_all(&paths);
    json!({"seconds": began.elapsed().as_secs_f64()})
}

/// Creates files, writes 4 KiB to each, closes them.
pub fn create(options: &Options) -> Value {
    let (dir, files, paths) = operands(options, 'f');
    fs::create_dir(&dir).unwrap();
    for directory in directories(&dir, files) {
        fs::create_dir(directory).unwrap();
    }
    let began = Instant::now();
    write_all(&paths);
    rate(files, files * CONTENT.len() as u64, began)
}

/// Asks for the attributes of each file by its path, `--passes` times if that is given.
pub fn stat(options: &Options) -> Value {
    let (_, files, paths) = operands(options, 'f');
    let passes = if options.has("passes") {
        options.number("passes")
    } else {
        1
    };
    let began = Instant::now();
    for _ in 0..passes {
        for path in &paths {
            assert_eq!(fs::symlink_metadata(path).unwrap().len(), 4096);
        }
    }
    rate(passes * files, 0, began)
}

/// Opens, reads and closes each file.
pub fn open(options: &Options) -> Value {
    let (_, files, paths) = operands(options, 'f');
    let mut buffer = CONTENT;
    let began = Instant::now();
    for path in &paths {
        File::open(path).unwrap().read_exact(&mut buffer).unwrap();
    }
    rate(files, files * buffer.len() as u64, began)
}

/// Gives each file that [`create`] made another name in the same directory.
pub fn rename(options: &Options) -> Value {
    let (dir, files, from) = operands(options, 'f');
    let to: Vec<PathBuf> = paths(&dir, files, 'g').collect();
    let began = Instant::now();
    for (from, to) in from.iter().zip(&to) {
        fs::rename(from, to).unwrap();
    }
    rate(files, 0, began)
}

/// Removes what [`rename`] left.
pub fn unlink(options: &Options) -> Value {
    let (dir, files, paths) = operands(options, 'g');
    let began = Instant::now();
    for path in &paths {
        fs::remove_file(path).unwrap();
    }
    let line = rate(files, 0, began);
    for directory in directories(&dir, files) {
        fs::remove_dir(directory).unwrap();
    }
    fs::remove_dir(dir).unwrap();
    line
}
