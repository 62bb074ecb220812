//! The data of the demo: a generated tree, and beside it, on request, a copy of a directory of the user's own.

use super::interrupt::Interrupt;
use crate::cli::output;
use crate::error::{Error, Result};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const FILES: usize = 3000;
const DIRECTORIES: usize = 60;
/// What the generated tree comes to, and a margin for what the writers and the store add.
pub(super) const GENERATED_BYTES: u64 = 240 << 20;
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// A small generator of numbers that look random: the demo needs variety, not unpredictability.
pub(super) struct Numbers(u64);

impl Numbers {
    pub(super) fn new(seed: u64) -> Self {
        Self(SEED ^ (seed + 1))
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

/// What a tree holds.
#[derive(Default)]
pub(super) struct Extent {
    pub(super) files: u64,
    pub(super) bytes: u64,
}

/// Fills `root` with files of mixed sizes: many small, some middling, a few large.
pub(super) fn generate(root: &Path, interrupt: &Interrupt) -> Result<()> {
    let failed = |path: &Path, error: &std::io::Error| Error::io("cannot create", path, error);
    let mut numbers = Numbers::new(0);
    let noise: Vec<u8> = (0..4 << 20).map(|_| numbers.next() as u8).collect();
    for index in 0..DIRECTORIES {
        let path = directory(root, index);
        fs::create_dir_all(&path).map_err(|error| failed(&path, &error))?;
    }
    for index in 0..FILES {
        interrupt.check()?;
        let size = match index % 50 {
            0 => (1 << 20) + numbers.below(512 << 10),
            1..10 => (64 << 10) + numbers.below(192 << 10),
            _ => (2 << 10) + numbers.below(30 << 10),
        };
        let start = numbers.below(noise.len() - size);
        let path = directory(root, index % DIRECTORIES).join(format!("file-{index:04}"));
        File::create(&path)
            .and_then(|mut file| file.write_all(&noise[start..start + size]))
            .map_err(|error| failed(&path, &error))?;
    }
    Ok(())
}

fn directory(root: &Path, index: usize) -> PathBuf {
    root.join(format!("part-{}", index / 10))
        .join(format!("section-{index:02}"))
}

/// Adds up what `root` holds, without entering other filesystems, and lists its directories.
pub(super) fn measure(root: &Path, interrupt: &Interrupt) -> Result<(Extent, Vec<PathBuf>)> {
    let failed = |path: &Path, error: &std::io::Error| Error::io("cannot read", path, error);
    let device = fs::symlink_metadata(root)
        .map_err(|error| failed(root, &error))?
        .dev();
    let mut extent = Extent::default();
    let mut directories = vec![root.to_path_buf()];
    let mut next = 0;
    while let Some(directory) = directories.get(next).cloned() {
        next += 1;
        interrupt.check()?;
        for entry in fs::read_dir(&directory).map_err(|error| failed(&directory, &error))? {
            let entry = entry.map_err(|error| failed(&directory, &error))?;
            let Ok(meta) = entry.metadata() else {
                continue; // Gone since it was listed.
            };
            if meta.is_dir() && meta.dev() == device {
                directories.push(entry.path());
            } else {
                extent.files += 1;
                extent.bytes += meta.blocks() * 512;
            }
        }
    }
    Ok((extent, directories))
}

/// Refuses to begin what would fill the disk at `place`.
pub(super) fn check_room(place: &Path, needed: u64, remedy: &str) -> Result<()> {
    let disk = rustix::fs::statvfs(place)
        .map_err(|errno| Error::path("cannot ask for the free space", place, errno))?;
    let free = crate::sys::free_bytes(&disk);
    if free < needed {
        return Err(Error::Source {
            path: place.to_path_buf(),
            why: format!(
                "too little free space for the demo: it takes {}, there are {}; {remedy}",
                output::size(needed),
                output::size(free)
            ),
        });
    }
    Ok(())
}
