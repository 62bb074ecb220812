//! The backing directory: every state it was in, and the states that a power cut may leave it in.
//!
//! The store knows objects by inode number and handle, so a state cannot be built from new files: the objects
//! themselves are put back. What loses its last name in the run of a history is kept in a vault beside the
//! directory, and comes from there when a state is rebuilt.

use crate::disk::{Event, SECTOR, Timeline};
use cowfs::engine::{Change, Witness};
use cowfs::sync::{Arc, Mutex};
use rand::Rng;
use rand::rngs::SmallRng;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

const XATTR: &str = "user.x";

/// An object, without its names.
#[derive(Debug, Clone, PartialEq)]
pub struct Inode {
    mode: u32,
    mtime: (i64, i64),
    xattr: Vec<u8>,
    /// Bytes of a file.
    data: Arc<Vec<u8>>,
}

impl Inode {
    fn is_dir(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFDIR
    }
    fn is_file(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFREG
    }
}

/// The directory at one moment: `.cowfs/retained` is part of it, the rest of `.cowfs` is not.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct State {
    inodes: BTreeMap<u64, Inode>,
    /// By directory and name.
    names: BTreeMap<(u64, Vec<u8>), u64>,
}

/// The real directory with its vault.
pub struct Place {
    pub source: PathBuf,
    retained: PathBuf,
    vault: PathBuf,
}

/// All states of a history; the events refer to them by number.
pub type States = Arc<Mutex<Vec<Arc<State>>>>;

impl Place {
    pub fn new(base: &Path) -> Self {
        let source = base.join("source");
        let vault = base.join("vault");
        std::fs::create_dir(&source).unwrap();
        std::fs::create_dir(&vault).unwrap();
        let retained = source.join(".cowfs/retained");
        Self {
            source,
            retained,
            vault,
        }
    }

    /// The directory as it is now.
    pub fn scan(&self, before: &State) -> State {
        let mut state = State::default();
        self.scan_dir(&self.source, before, &mut state);
        if self.retained.exists() {
            self.scan_dir(&self.retained, before, &mut state);
        }
        state
    }

    fn scan_dir(&self, dir: &Path, before: &State, state: &mut State) {
        let ino = dir.metadata().unwrap().ino();
        // The two places that stay where they are.
        state
            .inodes
            .insert(ino, inode(dir, before.inodes.get(&ino)));
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().as_bytes().to_vec();
            if name == b".cowfs" {
                continue;
            }
            let child = path.symlink_metadata().unwrap();
            state.names.insert((ino, name), child.ino());
            if child.is_dir() {
                self.scan_dir(&path, before, state);
            } else {
                let old = before.inodes.get(&child.ino());
                let place = state.inodes.entry(child.ino());
                place.or_insert_with(|| inode(&path, old));
            }
        }
    }

    fn kept(&self, ino: u64) -> PathBuf {
        self.vault.join(ino.to_string())
    }

    /// Where a directory is. The engine's descriptors belong to a mount of its own, across which nothing moves.
    fn path_of(&self, state: &State, dir: u64) -> PathBuf {
        for fixed in [&self.source, &self.retained] {
            if fixed.metadata().unwrap().ino() == dir {
                return fixed.clone();
            }
        }
        let mut names = state.names.iter();
        let ((parent, name), _) = names.find(|(_, ino)| **ino == dir).unwrap();
        let name = std::ffi::OsStr::from_bytes(name);
        self.path_of(state, *parent).join(name)
    }

    /// Sees to it that what `name` means outlives the change that is about to come.
    fn save(&self, state: &State, dir: BorrowedFd<'_>, name: &[u8]) {
        let dir = self.path_of(state, rustix::fs::fstat(dir).unwrap().st_ino);
        let dir = rustix::fs::open(dir, OFlags::PATH, Mode::empty()).unwrap();
        let Ok(stat) = rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) else {
            return;
        };
        let kept = self.kept(stat.st_ino);
        if stat.st_mode & libc::S_IFMT != libc::S_IFDIR {
            let linked = rustix::fs::linkat(&dir, name, CWD, &kept, AtFlags::empty());
            assert!(linked.is_ok() || kept.exists(), "{linked:?}");
            return;
        }
        // A removed directory never comes back: one that nobody knows is removed in its place.
        let stand_in = self.vault.join("stand-in");
        std::fs::create_dir(&stand_in).unwrap();
        let mode = std::fs::Permissions::from_mode(stat.st_mode & 0o7777);
        std::fs::set_permissions(&stand_in, mode).unwrap();
        rustix::fs::renameat_with(CWD, &stand_in, &dir, name, RenameFlags::EXCHANGE).unwrap();
        std::fs::rename(&stand_in, kept).unwrap();
    }

    /// Takes out of the vault what has names elsewhere, so that link counts are right.
    fn tidy(&self) {
        for entry in std::fs::read_dir(&self.vault).unwrap() {
            let path = entry.unwrap().path();
            let stat = path.symlink_metadata().unwrap();
            if !stat.is_dir() && stat.nlink() > 1 {
                std::fs::remove_file(path).unwrap();
            }
        }
    }

    /// Makes the directory what `state` says, of the objects that it had.
    pub fn rebuild(&self, state: &State) {
        self.clear(&self.source);
        self.clear(&self.retained);
        for dir in [&self.source, &self.retained] {
            self.fill(state, dir);
        }
        self.tidy();
        self.dress(state, &self.source);
        self.dress(state, &self.retained);
    }

    /// Moves everything in `dir` to the vault.
    fn clear(&self, dir: &Path) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().unwrap() == ".cowfs" {
                continue;
            }
            let stat = path.symlink_metadata().unwrap();
            let kept = self.kept(stat.ino());
            if stat.is_dir() {
                self.clear(&path);
                std::fs::rename(&path, kept).unwrap();
            } else if kept.symlink_metadata().is_ok() {
                std::fs::remove_file(path).unwrap();
            } else {
                std::fs::rename(path, kept).unwrap();
            }
        }
    }

    fn fill(&self, state: &State, dir: &Path) {
        let ino = dir.metadata().unwrap().ino();
        let of = (ino, Vec::new())..(ino + 1, Vec::new());
        for ((_, name), child) in state.names.range(of) {
            let to = dir.join(std::ffi::OsStr::from_bytes(name));
            let kept = self.kept(*child);
            if state.inodes[child].is_dir() {
                std::fs::rename(&kept, &to).unwrap();
                self.fill(state, &to);
            } else {
                rustix::fs::linkat(CWD, &kept, CWD, &to, AtFlags::empty()).unwrap();
            }
        }
    }

    /// Gives all in `dir`, and it itself, content and attributes.
    fn dress(&self, state: &State, dir: &Path) {
        let ino = dir.metadata().unwrap().ino();
        let of = (ino, Vec::new())..(ino + 1, Vec::new());
        for ((_, name), child) in state.names.range(of) {
            let path = dir.join(std::ffi::OsStr::from_bytes(name));
            let wanted = &state.inodes[child];
            if wanted.is_dir() {
                self.dress(state, &path);
            } else if wanted.is_file() {
                let file = std::fs::File::options().write(true).read(true).open(&path);
                let file = file.unwrap();
                let there = std::fs::read(&path).unwrap();
                if there != *wanted.data {
                    file.set_len(0).unwrap();
                    file.write_all_at(&wanted.data, 0).unwrap();
                }
                set_attr(&path, wanted);
            }
        }
        if let Some(wanted) = state.inodes.get(&ino) {
            set_attr(dir, wanted);
        }
    }

    /// What only sees to it that no object of `state` is lost for good.
    pub fn keeper(self: &Arc<Self>, state: State) -> Witness {
        let place = self.clone();
        Arc::new(move |change| match change {
            Change::Dooms(dir, name) => place.save(&state, dir, name),
            Change::Made => place.tidy(),
            _ => {}
        })
    }

    /// What records a history: every state goes into `states`, every event into `timeline`.
    pub fn witness(self: &Arc<Self>, states: States, timeline: Timeline) -> Witness {
        let place = self.clone();
        Arc::new(move |change| match change {
            Change::Dooms(dir, name) => place.save(states.lock().last().unwrap(), dir, name),
            Change::Made => {
                place.tidy();
                let mut states = states.lock();
                let last = states.last().unwrap().clone();
                let now = place.scan(&last);
                if now != *last {
                    states.push(Arc::new(now));
                    timeline.lock().push(Event::Live(states.len() - 1));
                }
            }
            Change::Synced(ino) => timeline.lock().push(Event::LiveSynced(ino.0)),
            Change::AllSynced => timeline.lock().push(Event::LiveAllSynced),
        })
    }
}

fn inode(path: &Path, before: Option<&Inode>) -> Inode {
    let stat = path.symlink_metadata().unwrap();
    let mut xattr = Vec::with_capacity(8192);
    let mut data = Arc::default();
    if stat.is_file() {
        let bytes = std::fs::read(path).unwrap();
        data = match before {
            Some(old) if *old.data == bytes => old.data.clone(),
            _ => Arc::new(bytes),
        };
    }
    if !stat.is_symlink()
        && rustix::fs::getxattr(path, XATTR, rustix::buffer::spare_capacity(&mut xattr)).is_err()
    {
        xattr.clear();
    }
    Inode {
        mode: stat.mode(),
        mtime: (stat.mtime(), stat.mtime_nsec()),
        xattr,
        data,
    }
}

fn set_attr(path: &Path, wanted: &Inode) {
    let mode = std::fs::Permissions::from_mode(wanted.mode & 0o7777);
    std::fs::set_permissions(path, mode).unwrap();
    let none = rustix::fs::XattrFlags::empty();
    if wanted.xattr.is_empty() {
        let _ = rustix::fs::removexattr(path, XATTR);
    } else {
        rustix::fs::setxattr(path, XATTR, &wanted.xattr, none).unwrap();
    }
    let spec = |(sec, nsec)| rustix::fs::Timespec {
        tv_sec: sec,
        tv_nsec: nsec,
    };
    let times = rustix::fs::Timestamps {
        last_access: spec(wanted.mtime),
        last_modification: spec(wanted.mtime),
    };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// What is known at a moment of the backing directory: since which state it need not be durable.
#[derive(Clone, Default)]
pub struct Since {
    pub now: usize,
    /// Names and attributes are durable at least as of this state.
    names: usize,
    /// The bytes of each file that was synced, as of a state; all others as of `all`.
    data: BTreeMap<u64, usize>,
    all: usize,
}

impl Since {
    pub fn then(&mut self, event: &Event) {
        match event {
            Event::Live(state) => self.now = *state,
            // A journaling filesystem commits all that was done to names up to then.
            Event::LiveSynced(ino) => {
                self.names = self.now;
                self.data.insert(*ino, self.now);
            }
            Event::LiveAllSynced => {
                (self.names, self.all) = (self.now, self.now);
                self.data.clear();
            }
            _ => {}
        }
    }

    /// The states whose names and attributes a power cut may leave.
    pub fn choices(&self) -> std::ops::RangeInclusive<usize> {
        self.names..=self.now
    }

    /// The directory with names and attributes as in state `names`, and of the bytes that were not synced what
    /// `taste` says.
    pub fn image(
        &self,
        states: &[Arc<State>],
        names: usize,
        taste: Taste,
        rng: &mut SmallRng,
    ) -> State {
        let mut image = (*states[names]).clone();
        for (ino, inode) in &mut image.inodes {
            if !inode.is_file() {
                continue;
            }
            let from = self.data.get(ino).copied().unwrap_or(self.all);
            let mut versions: Vec<&Arc<Vec<u8>>> = Vec::new();
            for state in &states[from..=self.now] {
                if let Some(found) = state.inodes.get(ino)
                    && versions
                        .last()
                        .is_none_or(|last| !Arc::ptr_eq(last, &found.data))
                {
                    versions.push(&found.data);
                }
            }
            if versions.len() > 1 || versions.iter().any(|v| !Arc::ptr_eq(v, &inode.data)) {
                inode.data = Arc::new(mix(inode.data.len(), &versions, taste, rng));
            }
        }
        image
    }
}

/// Which bytes reached the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taste {
    Oldest,
    Newest,
    /// Of each sector any.
    Any,
}

fn mix(len: usize, versions: &[&Arc<Vec<u8>>], taste: Taste, rng: &mut SmallRng) -> Vec<u8> {
    let mut data = vec![0; len];
    for at in (0..len).step_by(SECTOR) {
        let version = match taste {
            Taste::Oldest => versions[0],
            Taste::Newest => versions[versions.len() - 1],
            Taste::Any => versions[rng.random_range(0..versions.len())],
        };
        let to = len.min(at + SECTOR).min(version.len());
        if to > at {
            data[at..to].copy_from_slice(&version[at..to]);
        }
    }
    data
}

impl State {
    /// What the live tree shows: by path, mode and bytes of files, without what is retained.
    pub fn shown(&self, root: u64) -> BTreeMap<Vec<u8>, (u32, Arc<Vec<u8>>)> {
        let mut shown = BTreeMap::new();
        let mut todo = vec![(root, Vec::new())];
        let mut seen = BTreeSet::new();
        while let Some((dir, path)) = todo.pop() {
            assert!(seen.insert(dir), "a directory in two places");
            for ((_, name), ino) in self.names.range((dir, Vec::new())..(dir + 1, Vec::new())) {
                let path = [&path[..], b"/", name].concat();
                let inode = &self.inodes[ino];
                if inode.is_dir() {
                    todo.push((*ino, path.clone()));
                }
                shown.insert(path, (inode.mode, inode.data.clone()));
            }
        }
        shown
    }
}
