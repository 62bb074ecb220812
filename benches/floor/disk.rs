//! Where the floor keeps bytes if it is to keep any (`--files DIR`), so that a database can work on it: a file for each
//! node. While there is a snapshot, the old bytes of each block that is overwritten go to one more file first, once,
//! and that is synced before the file that it guards. This is the least that a filesystem with snapshots does: nothing
//! is recorded of what was kept, and nobody can read it.

use cowfs::sync::channel::{Sender, unbounded};
use fuser::{Errno, ReplyEmpty};
use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// What is kept at once.
const BLOCK: u64 = 4096;
/// Files that are synced side by side.
const SYNCERS: usize = 4;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Kept {
    /// Node and number of each block kept since the newest snapshot, if there is one.
    blocks: Option<HashSet<(u64, u64)>>,
    /// Of the file of what was kept, which grows as long as there is a snapshot.
    end: u64,
    synced: u64,
}

pub struct Disk {
    dir: PathBuf,
    old: Arc<File>,
    kept: Arc<Mutex<Kept>>,
    syncers: Sender<Job>,
}

fn file(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).open(path)
}

impl Disk {
    pub fn new(dir: PathBuf) -> io::Result<Self> {
        let old = Arc::new(file(&dir.join("old"))?);
        let (syncers, jobs) = unbounded::<Job>();
        for _ in 0..SYNCERS {
            let jobs = jobs.clone();
            std::thread::spawn(move || jobs.iter().for_each(|job| job()));
        }
        Ok(Self {
            dir,
            old,
            kept: Arc::default(),
            syncers,
        })
    }

    /// The file of a new node.
    pub fn create(&self, node: u64) -> io::Result<Arc<File>> {
        file(&self.dir.join(node.to_string())).map(Arc::new)
    }

    /// There is a snapshot from now on, or none.
    pub fn snapshot(&self, is_there: bool) {
        let mut kept = self.kept.lock().unwrap();
        kept.blocks = is_there.then(HashSet::new);
        if !is_there {
            self.old.set_len(0).unwrap();
            (kept.end, kept.synced) = (0, 0);
        }
    }

    /// Overwrites `data.len()` bytes of a file that has `size`.
    pub fn write(
        &self,
        node: u64,
        to: &File,
        size: u64,
        offset: u64,
        data: &[u8],
    ) -> io::Result<()> {
        let mut kept = self.kept.lock().unwrap();
        if let Some(blocks) = &mut kept.blocks {
            let end = size.min(offset + data.len() as u64).div_ceil(BLOCK);
            let mut old = Vec::new();
            for block in offset / BLOCK..end {
                if blocks.insert((node, block)) {
                    let from = old.len();
                    old.resize(from + BLOCK as usize, 0);
                    // The last block of a file may be short.
                    to.read_at(&mut old[from..], block * BLOCK)?;
                }
            }
            if !old.is_empty() {
                self.old.write_all_at(&old, kept.end)?;
                kept.end += old.len() as u64;
            }
        }
        drop(kept);
        to.write_all_at(data, offset)
    }

    /// Answers when the file is on the disk.
    pub fn sync(&self, file: Arc<File>, reply: ReplyEmpty) {
        let (old, kept) = (Arc::clone(&self.old), Arc::clone(&self.kept));
        let job = move || match sync(&old, &kept, &file) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(Errno::from(error)),
        };
        self.syncers.send(Box::new(job)).unwrap();
    }
}

fn sync(old: &File, kept: &Mutex<Kept>, file: &File) -> io::Result<()> {
    let (end, synced) = {
        let kept = kept.lock().unwrap();
        (kept.end, kept.synced)
    };
    if synced < end {
        old.sync_data()?;
        let mut kept = kept.lock().unwrap();
        kept.synced = kept.synced.max(end);
    }
    file.sync_data()
}
