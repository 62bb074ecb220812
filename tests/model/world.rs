//! Random operations, applied to an engine and to the reference.
use crate::tree::{Body, Id, Name, Tree};
use crate::walk::{View, walk};
use cowfs::config::{Durability, SpacePolicy};
use cowfs::engine::attr::{SetAttr, SetTime};
use cowfs::engine::creds::Caller;
use cowfs::engine::handle::{LiveFile, OpenFile};
use cowfs::engine::names::Make;
use cowfs::engine::nodes::{Node, ROOT_NODE, folder_node};
use cowfs::engine::{Engine, EngineOptions, Reach};
use cowfs::error::Error;
use cowfs::store::{StoreOptions, Timestamp};
use cowfs::sync::Arc;
use proptest::prelude::*;
use rustix::fs::RenameFlags;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Operands are indices into what there is at the time, so that a shortened case stays valid; names are few,
/// so that they collide.
#[derive(Clone, Debug)]
pub enum Op {
    Create {
        dir: usize,
        name: u8,
    },
    Mkdir {
        dir: usize,
        name: u8,
    },
    Symlink {
        dir: usize,
        name: u8,
        target: u8,
    },
    Fifo {
        dir: usize,
        name: u8,
    },
    Write {
        file: usize,
        at: u32,
        len: u32,
        byte: u8,
    },
    Truncate {
        file: usize,
        size: u32,
    },
    Punch {
        file: usize,
        at: u32,
        len: u32,
    },
    Zero {
        file: usize,
        at: u32,
        len: u32,
    },
    Shift {
        file: usize,
        at: u8,
        len: u8,
        insert: bool,
    },
    Copy {
        from: usize,
        to: usize,
        at: u32,
        into: u32,
        len: u32,
    },
    Chmod {
        path: usize,
        mode: u16,
    },
    Chown {
        path: usize,
        id: u8,
    },
    Touch {
        path: usize,
        sec: i32,
        nsec: u32,
    },
    SetXattr {
        path: usize,
        name: u8,
        len: u16,
    },
    RemoveXattr {
        path: usize,
        name: u8,
    },
    Remove {
        path: usize,
    },
    Rename {
        path: usize,
        dir: usize,
        name: u8,
        exchange: bool,
    },
    Link {
        path: usize,
        dir: usize,
        name: u8,
    },
    /// Opens a file and keeps it open.
    Hold {
        file: usize,
    },
    /// Writes through a file kept open, which may be removed by now.
    WriteHeld {
        held: usize,
        at: u32,
        len: u32,
        byte: u8,
    },
    Release {
        held: usize,
    },
    Snapshot,
    /// One object crosses into the new epoch before the cut, and is written to in between.
    SnapshotEarly {
        file: usize,
        at: u32,
        len: u32,
        byte: u8,
    },
    DeleteSnapshot {
        which: usize,
    },
    RenameSnapshot {
        which: usize,
    },
    Upkeep,
    Checkpoint,
    /// Ends the engine in good order and opens it anew.
    Reopen,
    /// Drops the engine as a kill -9 would and opens it anew.
    Crash,
    /// As `Reopen`, with the index lost.
    DropIndex,
    Compare,
}

pub fn op() -> impl Strategy<Value = Op> {
    let i = any::<usize>;
    // Most offsets and lengths are small; some reach into further chunks.
    let at = || prop_oneof![6 => 0..40_000_u32, 2 => 0..300_000_u32, 1 => 1_000_000..2_300_000_u32];
    let len = || prop_oneof![4 => 1..9_000_u32, 2 => 1..70_000_u32, 1 => 4096..4097_u32];
    let name = || 0..5_u8;
    prop_oneof![
        6 => (i(), name()).prop_map(|(dir, name)| Op::Create { dir, name }),
        3 => (i(), name()).prop_map(|(dir, name)| Op::Mkdir { dir, name }),
        1 => (i(), name(), any::<u8>()).prop_map(|(dir, name, target)| Op::Symlink { dir, name, target }),
        1 => (i(), name()).prop_map(|(dir, name)| Op::Fifo { dir, name }),
        14 => (i(), at(), len(), any::<u8>())
            .prop_map(|(file, at, len, byte)| Op::Write { file, at, len, byte }),
        4 => (i(), at()).prop_map(|(file, size)| Op::Truncate { file, size }),
        2 => (i(), at(), len()).prop_map(|(file, at, len)| Op::Punch { file, at, len }),
        1 => (i(), at(), len()).prop_map(|(file, at, len)| Op::Zero { file, at, len }),
        1 => (i(), 0..8_u8, 1..4_u8, any::<bool>())
            .prop_map(|(file, at, len, insert)| Op::Shift { file, at, len, insert }),
        2 => (i(), i(), at(), at(), len())
            .prop_map(|(from, to, at, into, len)| Op::Copy { from, to, at, into, len }),
        2 => (i(), 0..0o7777_u16).prop_map(|(path, mode)| Op::Chmod { path, mode }),
        1 => (i(), any::<u8>()).prop_map(|(path, id)| Op::Chown { path, id }),
        1 => (i(), any::<i32>(), 0..1_000_000_000_u32)
            .prop_map(|(path, sec, nsec)| Op::Touch { path, sec, nsec }),
        2 => (i(), 0..3_u8, 0..600_u16).prop_map(|(path, name, len)| Op::SetXattr { path, name, len }),
        1 => (i(), 0..3_u8).prop_map(|(path, name)| Op::RemoveXattr { path, name }),
        6 => i().prop_map(|path| Op::Remove { path }),
        7 => (i(), i(), name(), prop::bool::weighted(0.2))
            .prop_map(|(path, dir, name, exchange)| Op::Rename { path, dir, name, exchange }),
        3 => (i(), i(), name()).prop_map(|(path, dir, name)| Op::Link { path, dir, name }),
        2 => i().prop_map(|file| Op::Hold { file }),
        3 => (i(), at(), len(), any::<u8>())
            .prop_map(|(held, at, len, byte)| Op::WriteHeld { held, at, len, byte }),
        1 => i().prop_map(|held| Op::Release { held }),
        8 => Just(Op::Snapshot),
        1 => (i(), at(), len(), any::<u8>())
            .prop_map(|(file, at, len, byte)| Op::SnapshotEarly { file, at, len, byte }),
        5 => i().prop_map(|which| Op::DeleteSnapshot { which }),
        1 => i().prop_map(|which| Op::RenameSnapshot { which }),
        2 => Just(Op::Upkeep),
        1 => Just(Op::Checkpoint),
        1 => Just(Op::Reopen),
        1 => Just(Op::Crash),
        1 => Just(Op::DropIndex),
        2 => Just(Op::Compare),
    ]
}

/// A snapshot with what it showed when it was cut.
struct Cut {
    name: Vec<u8>,
    /// The live tree as the engine showed it then, times and all.
    live: View,
    /// The snapshot's own first view, with its inode numbers.
    own: View,
    tree: Tree,
}

pub struct World {
    dir: tempfile::TempDir,
    engine: Option<Arc<Engine>>,
    in_memory_index: bool,
    reach: Reach,
    durability: Durability,
    live: Tree,
    cuts: Vec<Cut>,
    held: Vec<(OpenFile, Id)>,
    /// Files without a name that are still open.
    nameless: BTreeMap<Id, Vec<u8>>,
    names: u64,
    /// Whether the kernel is played as one that forgets at once, or never.
    forgets: bool,
}

type Check = Result<(), String>;

fn text(error: Error) -> String {
    error.to_string()
}

impl World {
    pub fn new(base: &std::path::Path, in_memory_index: bool, strict: bool, reach: Reach) -> Self {
        std::fs::create_dir_all(base).unwrap();
        let dir = tempfile::Builder::new()
            .prefix("model")
            .tempdir_in(base)
            .unwrap();
        let mode = std::os::unix::fs::MetadataExt::mode(&dir.path().metadata().unwrap());
        let mut world = Self {
            dir,
            engine: None,
            in_memory_index,
            reach,
            durability: if strict {
                Durability::Strict
            } else {
                Durability::Ordered
            },
            live: Tree::new(mode),
            cuts: Vec::new(),
            held: Vec::new(),
            nameless: BTreeMap::new(),
            names: 0,
            forgets: strict,
        };
        world.open().unwrap();
        world
    }

    fn open(&mut self) -> Check {
        let options = EngineOptions {
            store: None,
            durability: self.durability,
            upkeep: None,
            snapshot_dir: b".snapshots".to_vec(),
            reach: self.reach,
            space: SpacePolicy::default(),
            user_snapshots: false,
            tuning: StoreOptions {
                in_memory_index: self.in_memory_index,
                // Small, so that segments are left, deleted and compacted in a short case.
                segment_size: 1 << 20,
                fill_ahead: 64 << 10,
                fill_after: 2,
                log_area: 64 << 10,
                boot: None,
                sequence: 0,
                known: None,
                // Opening leaves the counting to the background job, as it does with a large index.
                read_at_open: 0,
                count_step: 50,
            },
            media: None,
            witness: None,
            faults: None,
        };
        // Another test of this process may just be starting a program, which holds the lock of the directory
        // for a moment, until it is that program.
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            match Engine::open(self.dir.path(), options.clone()) {
                Ok(engine) => {
                    self.engine = Some(engine);
                    return Ok(());
                }
                Err(error) => {
                    let locked = error.to_string();
                    let locked = locked.contains("already") || locked.contains("in use");
                    if !locked || Instant::now() > deadline {
                        return Err(text(error));
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
            }
        }
    }

    fn close(&mut self, cleanly: bool) -> Check {
        self.held.clear();
        self.nameless.clear();
        let engine = self.engine.take().unwrap();
        if cleanly {
            engine.close().map_err(text)?;
        }
        Ok(())
    }

    fn engine(&self) -> Arc<Engine> {
        self.engine.clone().unwrap()
    }

    // ---- operands

    fn pick_path(&self, index: usize, wanted: impl Fn(Id) -> bool) -> Option<(Vec<Name>, Id)> {
        let all: Vec<_> = self
            .live
            .paths()
            .into_iter()
            .filter(|(_, id)| wanted(*id))
            .collect();
        (!all.is_empty()).then(|| all[index % all.len()].clone())
    }

    fn pick_dir(&self, index: usize) -> (Vec<Name>, Id) {
        self.pick_path(index, |id| self.live.is_dir(id)).unwrap()
    }

    fn pick_file(&self, index: usize) -> Option<(Vec<Name>, Id)> {
        self.pick_path(index, |id| self.live.is_file(id))
    }

    /// Runs `f` with the node of a path, which the engine is then told to forget.
    fn with<T>(&self, path: &[Name], f: impl FnOnce(&Node) -> T) -> T {
        let engine = self.engine();
        let mut node = engine.node(ROOT_NODE).unwrap();
        let mut told = Vec::new();
        for name in path {
            let attr = engine.lookup(&node, name).unwrap();
            told.push(attr.node);
            node = engine.node(attr.node).unwrap();
        }
        let value = f(&node);
        drop(node);
        if self.forgets {
            told.into_iter().for_each(|id| engine.nodes.forget(id, 1));
        }
        value
    }

    fn on_file<T>(
        &self,
        path: &[Name],
        f: impl FnOnce(&LiveFile) -> Result<T, Error>,
    ) -> Result<T, String> {
        let engine = self.engine();
        let file = self
            .with(path, |node| engine.open_file(node, libc::O_RDWR))
            .map_err(text)?;
        match &file {
            OpenFile::Live(live) => f(live).map_err(text),
            OpenFile::At(_) => unreachable!(),
        }
    }

    // ---- operations

    pub fn apply(&mut self, op: &Op) -> Check {
        let engine = self.engine();
        match *op {
            Op::Create { dir, name } => self.make(dir, name, None),
            Op::Mkdir { dir, name } => self.make(dir, name, Some(Make::Directory(0o755))),
            Op::Symlink { dir, name, target } => {
                let target = vec![b'a' + target % 26; 1 + usize::from(target)];
                self.make(dir, name, Some(Make::Symlink(&target)))
            }
            Op::Fifo { dir, name } => {
                self.make(dir, name, Some(Make::Node(libc::S_IFIFO | 0o640, 0)))
            }
            Op::Write {
                file,
                at,
                len,
                byte,
            } => {
                let Some((path, id)) = self.pick_file(file) else {
                    return Ok(());
                };
                let data = pattern(at, len, byte);
                self.on_file(&path, |live| {
                    engine.write(live, at.into(), &data, None, false)
                })?;
                put(self.live.data_mut(id), at, &data);
                Ok(())
            }
            Op::Truncate { file, size } => {
                let Some((path, id)) = self.pick_file(file) else {
                    return Ok(());
                };
                let set = SetAttr {
                    size: Some(size.into()),
                    ..SetAttr::default()
                };
                self.with(&path, |node| engine.setattr(node, &set, None, None))
                    .map_err(text)?;
                self.live.data_mut(id).resize(size as usize, 0);
                Ok(())
            }
            Op::Punch { file, at, len } => self.clear(file, at, len, true),
            Op::Zero { file, at, len } => self.clear(file, at, len, false),
            Op::Shift {
                file,
                at,
                len,
                insert,
            } => self.shift(file, at, len, insert),
            Op::Copy {
                from,
                to,
                at,
                into,
                len,
            } => self.copy(from, to, at, into, len),
            Op::Chmod { path, mode } => {
                // A symlink has no mode of its own to change.
                let wanted = |id| !matches!(self.live.objects[&id].body, Body::Link(_));
                let Some((path, id)) = self.pick_path(path, wanted) else {
                    return Ok(());
                };
                let mode = u32::from(mode) & 0o7777;
                let set = SetAttr {
                    mode: Some(mode),
                    ..SetAttr::default()
                };
                self.with(&path, |node| engine.setattr(node, &set, None, None))
                    .map_err(text)?;
                let object = self.live.objects.get_mut(&id).unwrap();
                object.mode = object.mode & libc::S_IFMT | mode;
                Ok(())
            }
            Op::Chown { path, id } => self.chown(path, id.into()),
            Op::Touch { path, sec, nsec } => {
                let Some((path, _)) = self.pick_path(path, |_| true) else {
                    return Ok(());
                };
                let time = SetTime::At(Timestamp {
                    sec: sec.into(),
                    nsec,
                });
                let set = SetAttr {
                    mtime: Some(time),
                    atime: Some(SetTime::Now),
                    ..SetAttr::default()
                };
                self.with(&path, |node| engine.setattr(node, &set, None, None))
                    .map_err(text)?;
                Ok(())
            }
            Op::SetXattr { path, name, len } => {
                let Some((path, id)) = self.pick_path(path, |id| self.takes_xattrs(id)) else {
                    return Ok(());
                };
                let (name, value) = (xattr_name(name), vec![name; len.into()]);
                self.with(&path, |node| engine.setxattr(node, &name, &value, 0, None))
                    .map_err(text)?;
                self.live
                    .objects
                    .get_mut(&id)
                    .unwrap()
                    .xattrs
                    .insert(name, value);
                Ok(())
            }
            Op::RemoveXattr { path, name } => {
                let Some((path, id)) = self.pick_path(path, |id| self.takes_xattrs(id)) else {
                    return Ok(());
                };
                let name = xattr_name(name);
                let done = self.with(&path, |node| engine.removexattr(node, &name));
                let had = self
                    .live
                    .objects
                    .get_mut(&id)
                    .unwrap()
                    .xattrs
                    .remove(&name)
                    .is_some();
                expect(done, had.then_some(()).ok_or(libc::ENODATA))
            }
            Op::Remove { path } => self.remove(path),
            Op::Rename {
                path,
                dir,
                name,
                exchange,
            } => self.rename(path, dir, name, exchange),
            Op::Link { path, dir, name } => self.link(path, dir, name),
            Op::Hold { file } => {
                let Some((path, id)) = self.pick_file(file) else {
                    return Ok(());
                };
                let opened = self.with(&path, |node| engine.open_file(node, libc::O_RDWR));
                self.held.push((opened.map_err(text)?, id));
                Ok(())
            }
            Op::WriteHeld {
                held,
                at,
                len,
                byte,
            } => self.write_held(held, at, len, byte),
            Op::Release { held } => {
                if !self.held.is_empty() {
                    self.held.swap_remove(held % self.held.len());
                }
                Ok(())
            }
            Op::Snapshot => self.snapshot(None),
            Op::SnapshotEarly {
                file,
                at,
                len,
                byte,
            } => self.snapshot(Some((file, at, len, byte))),
            Op::DeleteSnapshot { which } => {
                if self.cuts.is_empty() {
                    return Ok(());
                }
                let cut = self.cuts.remove(which % self.cuts.len());
                engine
                    .delete_snapshot(&cut.name, Duration::ZERO)
                    .map_err(text)
            }
            Op::RenameSnapshot { which } => {
                if self.cuts.is_empty() {
                    return Ok(());
                }
                let name = self.fresh_name();
                let which = which % self.cuts.len();
                engine
                    .rename_snapshot(&self.cuts[which].name, &name)
                    .map_err(text)?;
                self.cuts[which].name = name;
                Ok(())
            }
            Op::Upkeep => engine.upkeep().map_err(text),
            Op::Checkpoint => engine.store().checkpoint().map_err(text),
            Op::Reopen => {
                drop(engine);
                self.close(true)?;
                self.open()?;
                self.compare()
            }
            Op::Crash => {
                drop(engine);
                self.close(false)?;
                self.open()?;
                self.compare()
            }
            Op::DropIndex => {
                drop(engine);
                self.close(true)?;
                let index = self.dir.path().join(".cowfs/store/index");
                if index.exists() {
                    std::fs::remove_dir_all(index).unwrap();
                }
                self.open()?;
                self.compare()
            }
            Op::Compare => self.compare(),
        }
    }

    /// A check of the store finds nothing, in the state in which it is.
    fn check_store(&self) -> Check {
        let report = self.engine().check().map_err(text)?;
        match report.findings.first() {
            None => Ok(()),
            Some(found) => Err(format!("a check of the store finds: {found:?}")),
        }
    }

    pub fn finish(&mut self) -> Check {
        self.compare()?;
        self.check_store()?;
        // With all snapshots gone nothing may be left behind.
        for cut in std::mem::take(&mut self.cuts) {
            self.engine()
                .delete_snapshot(&cut.name, Duration::ZERO)
                .map_err(text)?;
        }
        self.held.clear();
        self.engine().upkeep().map_err(text)?;
        self.compare()?;
        self.check_store()?;
        let retained = std::fs::read_dir(self.dir.path().join(".cowfs/retained"))
            .unwrap()
            .count();
        if retained != 0 {
            return Err(format!(
                "{retained} retained files are left without a snapshot"
            ));
        }
        let left = self.engine().store().stats().live_payload_bytes;
        if left != 0 {
            return Err(format!(
                "{left} bytes of pre-images are left without a snapshot"
            ));
        }
        Ok(())
    }

    fn make(&mut self, dir: usize, name: u8, make: Option<Make<'_>>) -> Check {
        let (path, dir) = self.pick_dir(dir);
        let (engine, name) = (self.engine(), entry_name(name));
        let done = self.with(&path, |parent| match make {
            Some(make) => engine
                .make(parent, &name, make, Caller::ROOT)
                .map(|attr| attr.node),
            None => engine
                .create(
                    parent,
                    &name,
                    0o644,
                    libc::O_RDWR | libc::O_EXCL,
                    Caller::ROOT,
                )
                .map(|(attr, _)| attr.node),
        });
        let exists = self.live.entries(dir).contains_key(&name);
        if let Ok(node) = done
            && self.forgets
        {
            engine.nodes.forget(node, 1);
        }
        expect(done.map(drop), (!exists).then_some(()).ok_or(libc::EEXIST))?;
        if !exists {
            let (body, mode) = match make {
                None => (Body::File(Vec::new()), libc::S_IFREG | 0o644),
                Some(Make::Directory(mode)) => (Body::Dir(BTreeMap::new()), libc::S_IFDIR | mode),
                Some(Make::Node(mode, _)) => (Body::Fifo, mode),
                Some(Make::Symlink(target)) => (Body::Link(target.to_vec()), libc::S_IFLNK | 0o777),
            };
            // A directory with the set-group-ID bit hands it and its group down (inode(7)).
            let parent = &self.live.objects[&dir];
            let (inherits, gid) = (parent.mode & libc::S_ISGID != 0, parent.gid);
            let sgid = if inherits && matches!(body, Body::Dir(_)) {
                libc::S_ISGID
            } else {
                0
            };
            let id = self.live.add(dir, &name, body, mode | sgid);
            if inherits {
                self.live.objects.get_mut(&id).unwrap().gid = gid;
            }
        }
        Ok(())
    }

    fn clear(&mut self, file: usize, at: u32, len: u32, punch: bool) -> Check {
        let Some((path, id)) = self.pick_file(file) else {
            return Ok(());
        };
        let size = self.live.data_mut(id).len() as u32;
        let (mode, len) = match punch {
            true => (libc::FALLOC_FL_PUNCH_HOLE, len),
            false => (libc::FALLOC_FL_ZERO_RANGE, len.min(size.saturating_sub(at))),
        };
        let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
        if len == 0 || !self.fallocate(&path, mode, at.into(), len.into())? {
            return Ok(());
        }
        let end = size.min(at + len);
        if at >= end {
            return Ok(());
        }
        let cleared = &mut self.live.data_mut(id)[at as usize..end as usize];
        cleared.fill(0);
        if !punch {
            // What is allocated and not written is data for lseek(2) while the page cache has it, and a hole when it has
            // not (ext4): the filesystem's own doing (docs/SEMANTICS.md), but not to be compared.
            let engine = self.engine();
            self.on_file(&path, |live| {
                engine.write(live, at.into(), &vec![0; (end - at) as usize], None, false)
            })?;
        }
        Ok(())
    }

    /// False where the backing filesystem does not have the mode.
    fn fallocate(&self, path: &[Name], mode: i32, at: u64, len: u64) -> Result<bool, String> {
        let engine = self.engine();
        self.on_file(path, |live| {
            match engine.fallocate(live, mode, at, len, None) {
                Err(error) if error.errno() == rustix::io::Errno::OPNOTSUPP => Ok(false),
                other => other.map(|()| true),
            }
        })
    }

    fn shift(&mut self, file: usize, at: u8, len: u8, insert: bool) -> Check {
        let Some((path, id)) = self.pick_file(file) else {
            return Ok(());
        };
        let (at, len) = (usize::from(at) * 4096, usize::from(len) * 4096);
        let size = self.live.data_mut(id).len();
        // fallocate(2): what is inserted or collapsed must lie before the end of the file.
        let (fits, mode) = match insert {
            true => (at < size, libc::FALLOC_FL_INSERT_RANGE),
            false => (at + len < size, libc::FALLOC_FL_COLLAPSE_RANGE),
        };
        if fits && self.fallocate(&path, mode, at as u64, len as u64)? {
            let data = self.live.data_mut(id);
            if insert {
                data.splice(at..at, vec![0; len]);
            } else {
                data.drain(at..at + len);
            }
        }
        Ok(())
    }

    fn copy(&mut self, from: usize, to: usize, at: u32, into: u32, len: u32) -> Check {
        let Some((from_path, from)) = self.pick_file(from) else {
            return Ok(());
        };
        let Some((to_path, to)) = self.pick_file(to) else {
            return Ok(());
        };
        if from == to {
            return Ok(());
        }
        let engine = self.engine();
        let source = self
            .with(&from_path, |node| engine.open_file(node, libc::O_RDONLY))
            .map_err(text)?;
        let n = self.on_file(&to_path, |live| {
            engine.copy_range(&source, at.into(), live, into.into(), len.into(), None)
        })?;
        let data = self.live.data_mut(from);
        let end = data.len().min((at + len) as usize);
        let piece = data.get(at as usize..end).unwrap_or(&[]).to_vec();
        if n != piece.len() {
            return Err(format!("copied {n} bytes, not {}", piece.len()));
        }
        if n > 0 {
            put(self.live.data_mut(to), into, &piece);
        }
        Ok(())
    }

    fn chown(&mut self, path: usize, owner: u32) -> Check {
        let Some((path, id)) = self.pick_path(path, |_| true) else {
            return Ok(());
        };
        let engine = self.engine();
        let set = SetAttr {
            uid: Some(owner),
            gid: Some(owner + 1),
            ..SetAttr::default()
        };
        self.with(&path, |node| engine.setattr(node, &set, None, None))
            .map_err(text)?;
        let is_dir = self.live.is_dir(id);
        let object = self.live.objects.get_mut(&id).unwrap();
        (object.uid, object.gid) = (owner, owner + 1);
        // chown(2) clears these on everything but directories; the group bit only if the group may execute.
        if !is_dir {
            object.mode &= !libc::S_ISUID;
            if object.mode & libc::S_IXGRP != 0 {
                object.mode &= !libc::S_ISGID;
            }
        }
        Ok(())
    }

    /// user.* attributes belong to files and directories only (xattr(7)).
    fn takes_xattrs(&self, id: Id) -> bool {
        matches!(self.live.objects[&id].body, Body::Dir(_) | Body::File(_))
    }

    fn remove(&mut self, path: usize) -> Check {
        let Some((mut path, id)) = self.pick_path(path, |id| id != 0) else {
            return Ok(());
        };
        let name = path.pop().unwrap();
        let is_dir = self.live.is_dir(id);
        let engine = self.engine();
        let done = self.with(&path, |parent| engine.remove(parent, &name, is_dir));
        if is_dir && !self.live.entries(id).is_empty() {
            return expect(done, Err(libc::ENOTEMPTY));
        }
        expect(done, Ok(()))?;
        let dir = self.id_of(&path);
        self.live.entries_mut(dir).remove(&name);
        self.drop_nameless(id);
        Ok(())
    }

    fn id_of(&self, path: &[Name]) -> Id {
        path.iter()
            .fold(0, |dir, name| self.live.entries(dir)[name])
    }

    fn drop_nameless(&mut self, id: Id) {
        if self.live.links(id) == 0 {
            let object = self.live.objects.remove(&id).unwrap();
            if let Body::File(data) = object.body {
                self.nameless.insert(id, data);
            }
        }
    }

    fn rename(&mut self, path: usize, dir: usize, name: u8, exchange: bool) -> Check {
        let Some((mut path, id)) = self.pick_path(path, |id| id != 0) else {
            return Ok(());
        };
        let (to_path, to_dir) = self.pick_dir(dir);
        let (from_name, to_name) = (path.pop().unwrap(), entry_name(name));
        let from_dir = self.id_of(&path);
        let target = self.live.entries(to_dir).get(&to_name).copied();
        // What rename(2) refuses for the shape of the tree, the kernel refuses before a filesystem is asked.
        let loops = self.live.contains(id, to_dir)
            || target.is_some_and(|target| target != id && self.live.contains(target, from_dir));
        if loops {
            return Ok(());
        }
        let engine = self.engine();
        let flags = if exchange {
            RenameFlags::EXCHANGE
        } else {
            RenameFlags::empty()
        };
        let done = self.with(&path, |from| {
            self.with(&to_path, |to| {
                engine.rename((from, &from_name), (to, &to_name), flags, Caller::ROOT)
            })
        });
        let expected = match target {
            None if exchange => Err(libc::ENOENT),
            Some(target) if target != id && !exchange => {
                match (self.live.is_dir(id), self.live.is_dir(target)) {
                    (true, false) => Err(libc::ENOTDIR),
                    (false, true) => Err(libc::EISDIR),
                    (true, true) if !self.live.entries(target).is_empty() => Err(libc::ENOTEMPTY),
                    _ => Ok(()),
                }
            }
            _ => Ok(()),
        };
        expect(done, expected)?;
        if expected.is_err() || target == Some(id) {
            return Ok(());
        }
        self.live.entries_mut(from_dir).remove(&from_name);
        self.live.entries_mut(to_dir).insert(to_name, id);
        if let Some(target) = target {
            if exchange {
                self.live.entries_mut(from_dir).insert(from_name, target);
            } else {
                self.drop_nameless(target);
            }
        }
        Ok(())
    }

    fn link(&mut self, path: usize, dir: usize, name: u8) -> Check {
        let Some((path, id)) = self.pick_path(path, |id| !self.live.is_dir(id)) else {
            return Ok(());
        };
        let (to_path, to_dir) = self.pick_dir(dir);
        let (engine, name) = (self.engine(), entry_name(name));
        let done = self.with(&path, |node| {
            self.with(&to_path, |to| engine.link(node, to, &name))
        });
        if let Ok(attr) = &done
            && self.forgets
        {
            engine.nodes.forget(attr.node, 1);
        }
        let exists = self.live.entries(to_dir).contains_key(&name);
        expect(done.map(drop), (!exists).then_some(()).ok_or(libc::EEXIST))?;
        if !exists {
            self.live.entries_mut(to_dir).insert(name, id);
        }
        Ok(())
    }

    fn write_held(&mut self, held: usize, at: u32, len: u32, byte: u8) -> Check {
        if self.held.is_empty() {
            return Ok(());
        }
        let (file, id) = &self.held[held % self.held.len()];
        let (OpenFile::Live(live), data) = (file, pattern(at, len, byte)) else {
            unreachable!()
        };
        self.engine()
            .write(live, at.into(), &data, None, false)
            .map_err(text)?;
        match self.nameless.get_mut(id) {
            Some(content) => put(content, at, &data),
            None => put(self.live.data_mut(*id), at, &data),
        }
        Ok(())
    }

    // ---- snapshots and comparison

    fn fresh_name(&mut self) -> Vec<u8> {
        self.names += 1;
        format!("snapshot-{}", self.names).into_bytes()
    }

    fn snapshot(&mut self, early: Option<(usize, u32, u32, u8)>) -> Check {
        let (engine, name) = (self.engine(), self.fresh_name());
        let live = walk(&engine, ROOT_NODE, self.forgets)?;
        let tree = self.live.clone();
        let early = early.and_then(|(file, at, len, byte)| {
            self.pick_file(file)
                .map(|(path, id)| (path, id, at, pattern(at, len, byte)))
        });
        match early {
            None => engine.snapshot(&name).map(drop).map_err(text)?,
            Some((path, id, at, data)) => {
                let file = self
                    .with(&path, |node| engine.open_file(node, libc::O_RDWR))
                    .map_err(text)?;
                let OpenFile::Live(file) = &file else {
                    unreachable!()
                };
                let written = std::cell::RefCell::new(Ok(0));
                engine
                    .snapshot_crossing(&name, &[&file.object], || {
                        *written.borrow_mut() = engine.write(file, at.into(), &data, None, false);
                    })
                    .map_err(text)?;
                written.into_inner().map_err(text)?;
                put(self.live.data_mut(id), at, &data);
            }
        }
        let own = self.view_of(&name)?;
        let cut = Cut {
            name,
            live,
            own,
            tree,
        };
        self.compare_cut(&cut)?;
        self.cuts.push(cut);
        Ok(())
    }

    fn view_of(&self, name: &[u8]) -> Result<View, String> {
        let engine = self.engine();
        let root = engine.node(ROOT_NODE).map_err(text)?;
        let folder = engine.lookup(&root, b".snapshots").map_err(text)?.node;
        assert_eq!(folder, folder_node(ROOT_NODE));
        let node = engine.node(folder).map_err(text)?;
        let top = engine.lookup(&node, name).map_err(text)?.node;
        let view = walk(&engine, top, self.forgets);
        drop(node);
        engine.nodes.forget(top, 1);
        engine.nodes.forget(folder, 1);
        view
    }

    fn compare(&self) -> Check {
        let live = walk(&self.engine(), ROOT_NODE, self.forgets)?;
        self.compare_tree(&live, &self.live)
            .map_err(|why| format!("live tree: {why}"))?;
        for (file, id) in &self.held {
            let content = match self.nameless.get(id) {
                Some(content) => content,
                None => match &self.live.objects[id].body {
                    Body::File(data) => data,
                    _ => unreachable!(),
                },
            };
            let mut data = vec![0; content.len() + 1];
            let n = self.engine().read(file, 0, &mut data).map_err(text)?;
            if data[..n] != content[..] {
                return Err("an open file differs".into());
            }
        }
        self.cuts.iter().try_for_each(|cut| self.compare_cut(cut))
    }

    fn compare_cut(&self, cut: &Cut) -> Check {
        let name = String::from_utf8_lossy(&cut.name);
        let now = self
            .view_of(&cut.name)
            .map_err(|why| format!("{name}: {why}"))?;
        self.compare_tree(&now, &cut.tree)
            .map_err(|why| format!("{name}: {why}"))?;
        difference(&now, &cut.own, true).map_or(Ok(()), |d| Err(format!("{name} changed: {d}")))?;
        difference(&now, &cut.live, false)
            .map_or(Ok(()), |d| Err(format!("{name}, as it was live: {d}")))
    }

    fn compare_tree(&self, view: &View, tree: &Tree) -> Check {
        let mut first: BTreeMap<Id, Vec<u8>> = BTreeMap::new();
        let mut expected = BTreeMap::new();
        for (path, id) in tree.paths() {
            expected.insert(full(&path), id);
        }
        if expected.keys().ne(view.keys()) {
            let (want, have): (Vec<_>, Vec<_>) = (expected.keys().collect(), view.keys().collect());
            return Err(format!("names are {have:?}, not {want:?}"));
        }
        for (path, id) in &expected {
            let (object, seen) = (&tree.objects[id], &view[path]);
            let shown = String::from_utf8_lossy(path);
            let attr = &seen.attr;
            if (attr.mode, attr.uid, attr.gid) != (object.mode, object.uid, object.gid) {
                return Err(format!(
                    "{shown}: {:o} {} {}, not {:o} {} {}",
                    attr.mode, attr.uid, attr.gid, object.mode, object.uid, object.gid
                ));
            }
            if seen.xattrs != object.xattrs {
                return Err(format!("{shown}: extended attributes differ"));
            }
            let links = expected.values().filter(|other| *other == id).count();
            let right = match &object.body {
                Body::Dir(_) => true,
                Body::File(data) => seen.data == *data && attr.size == data.len() as u64,
                Body::Link(target) => seen.target == *target,
                Body::Fifo => true,
            };
            if !right {
                return Err(format!("{shown}: content differs"));
            }
            if !tree.is_dir(*id) && attr.nlink as usize != links {
                return Err(format!("{shown}: {} links, not {links}", attr.nlink));
            }
            // One object, one number: names of the same object agree, others do not.
            let group = first.entry(*id).or_insert_with(|| seen.first.clone());
            if *group != seen.first {
                return Err(format!("{shown}: hard links do not agree"));
            }
        }
        Ok(())
    }
}

/// The first difference between two views; inode numbers count if `nodes`.
fn difference(now: &View, then: &View, nodes: bool) -> Option<String> {
    if now.keys().ne(then.keys()) {
        return Some("names".into());
    }
    for (path, seen) in now {
        let before = &then[path];
        let shown = String::from_utf8_lossy(path);
        if seen.attr != before.attr {
            return Some(format!("{shown}: {:?}, was {:?}", seen.attr, before.attr));
        }
        if seen.data != before.data {
            return Some(format!("{shown}: data"));
        }
        if seen.map != before.map {
            return Some(format!(
                "{shown}: data at {:?}, was {:?}",
                seen.map, before.map
            ));
        }
        if (&seen.xattrs, &seen.target, &seen.first)
            != (&before.xattrs, &before.target, &before.first)
        {
            return Some(format!("{shown}: xattrs, target or links"));
        }
        if nodes && seen.node != before.node {
            return Some(format!("{shown}: inode number"));
        }
    }
    None
}

fn expect(done: Result<(), Error>, expected: Result<(), i32>) -> Check {
    let done = done.map_err(|error| error.errno().raw_os_error());
    if done == expected {
        Ok(())
    } else {
        Err(format!("answered {done:?}, not {expected:?}"))
    }
}

fn pattern(at: u32, len: u32, byte: u8) -> Vec<u8> {
    (0..len)
        .map(|i| byte.wrapping_add(((at + i) / 512) as u8))
        .collect()
}

fn put(content: &mut Vec<u8>, at: u32, data: &[u8]) {
    let end = at as usize + data.len();
    if content.len() < end {
        content.resize(end, 0);
    }
    content[at as usize..end].copy_from_slice(data);
}

fn entry_name(name: u8) -> Name {
    match name {
        0 => b"a".to_vec(),
        1 => b"b".to_vec(),
        2 => vec![0xff, b'\n', b' '],
        3 => vec![b'n'; 255],
        _ => b".snapshots2".to_vec(),
    }
}

fn xattr_name(name: u8) -> Vec<u8> {
    format!("user.{name}").into_bytes()
}

fn full(path: &[Name]) -> Vec<u8> {
    if path.is_empty() {
        b"/".to_vec()
    } else {
        path.iter()
            .flat_map(|name| [b"/", &name[..]].concat())
            .collect()
    }
}
