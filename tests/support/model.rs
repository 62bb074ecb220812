//! A tree that is obviously right, operations that keep it valid, and the comparison with a real one.

use rustix::fs::{CWD, FallocateFlags, RenameFlags, XattrFlags};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use super::cut::remove_snapshot;

/// SplitMix64: the same numbers from the same seed on every machine.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// 0 ≤ result < `bound`, which is at least 1.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).unwrap()
    }

    fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Kind {
    File(Arc<Vec<u8>>),
    Dir,
    Link(String),
}

#[derive(Clone, Debug, PartialEq)]
struct Object {
    kind: Kind,
    mode: u32,
    xattrs: BTreeMap<String, Vec<u8>>,
}

/// Names (paths relative to the root) and the objects they mean.
#[derive(Clone, Default, Debug)]
pub(crate) struct Tree {
    names: BTreeMap<String, u64>,
    objects: BTreeMap<u64, Object>,
    next: u64,
}

/// One change: a single system call that changes something.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Create {
        path: String,
        mode: u32,
    },
    Write {
        path: String,
        at: u64,
        len: usize,
        fill: u64,
    },
    Append {
        path: String,
        len: usize,
        fill: u64,
    },
    Truncate {
        path: String,
        size: u64,
    },
    Punch {
        path: String,
        at: u64,
        len: u64,
    },
    Rename {
        from: String,
        to: String,
    },
    Exchange {
        one: String,
        other: String,
    },
    Unlink {
        path: String,
    },
    Link {
        from: String,
        to: String,
    },
    Symlink {
        path: String,
        target: String,
    },
    Mkdir {
        path: String,
    },
    Rmdir {
        path: String,
    },
    Chmod {
        path: String,
        mode: u32,
    },
    SetXattr {
        path: String,
        name: String,
        value: Vec<u8>,
    },
    RemoveXattr {
        path: String,
        name: String,
    },
    Snapshot {
        name: String,
    },
    DeleteSnapshot {
        name: String,
    },
    RenameSnapshot {
        from: String,
        to: String,
    },
}

/// The live tree and every snapshot.
#[derive(Clone, Default)]
pub(crate) struct State {
    pub(crate) live: Tree,
    pub(crate) snapshots: BTreeMap<String, Arc<Tree>>,
    taken: u64,
}

fn fill(stamp: u64, len: usize) -> Vec<u8> {
    stamp
        .to_le_bytes()
        .iter()
        .copied()
        .cycle()
        .take(len)
        .collect()
}

fn within(path: &str, dir: &str) -> bool {
    path.strip_prefix(dir)
        .is_some_and(|rest| rest.starts_with('/'))
}

impl Tree {
    fn object(&mut self, path: &str) -> &mut Object {
        let id = self.names[path];
        self.objects.get_mut(&id).unwrap()
    }

    fn content(&mut self, path: &str) -> &mut Vec<u8> {
        match &mut self.object(path).kind {
            Kind::File(content) => Arc::make_mut(content),
            other => panic!("{path} is {other:?}"),
        }
    }

    fn add(&mut self, path: &str, kind: Kind, mode: u32) {
        self.next += 1;
        self.objects.insert(
            self.next,
            Object {
                kind,
                mode,
                xattrs: BTreeMap::new(),
            },
        );
        self.names.insert(path.to_owned(), self.next);
    }

    fn remove(&mut self, path: &str) {
        let id = self.names.remove(path).unwrap();
        if !self.names.values().any(|other| *other == id) {
            self.objects.remove(&id);
        }
    }

    /// Takes a name and all below it out.
    fn take(&mut self, path: &str) -> Vec<(String, u64)> {
        let all: Vec<String> = self
            .names
            .keys()
            .filter(|name| *name == path || within(name, path))
            .cloned()
            .collect();
        all.into_iter()
            .map(|name| {
                (
                    name[path.len()..].to_owned(),
                    self.names.remove(&name).unwrap(),
                )
            })
            .collect()
    }

    fn put(&mut self, path: &str, below: Vec<(String, u64)>) {
        self.names.extend(
            below
                .into_iter()
                .map(|(tail, id)| (format!("{path}{tail}"), id)),
        );
    }

    fn is_dir(&self, path: &str) -> bool {
        self.objects[&self.names[path]].kind == Kind::Dir
    }

    fn is_file(&self, path: &str) -> bool {
        matches!(self.objects[&self.names[path]].kind, Kind::File(_))
    }

    fn is_empty(&self, dir: &str) -> bool {
        !self.names.keys().any(|name| within(name, dir))
    }

    fn paths(&self, wanted: impl Fn(&Self, &str) -> bool) -> Vec<String> {
        self.names
            .keys()
            .filter(|path| wanted(self, path))
            .cloned()
            .collect()
    }
}

impl State {
    /// Carries an operation out in the model.
    pub(crate) fn apply(&mut self, op: &Op) {
        let live = &mut self.live;
        match op {
            Op::Create { path, mode } => live.add(path, Kind::File(Arc::default()), *mode),
            Op::Write {
                path,
                at,
                len,
                fill: stamp,
            } => {
                let (content, at) = (live.content(path), usize::try_from(*at).unwrap());
                if content.len() < at + len {
                    content.resize(at + len, 0);
                }
                content[at..at + len].copy_from_slice(&fill(*stamp, *len));
            }
            Op::Append {
                path,
                len,
                fill: stamp,
            } => live.content(path).extend(fill(*stamp, *len)),
            Op::Truncate { path, size } => live
                .content(path)
                .resize(usize::try_from(*size).unwrap(), 0),
            Op::Punch { path, at, len } => {
                let content = live.content(path);
                let at = usize::try_from(*at).unwrap().min(content.len());
                let end = (at + usize::try_from(*len).unwrap()).min(content.len());
                content[at..end].fill(0);
            }
            Op::Rename { from, to } => {
                if live.names.get(from) == live.names.get(to) {
                    return; // two names of one object: rename(2) does nothing
                }
                let moved = live.take(from);
                if live.names.contains_key(to) {
                    live.remove(to);
                }
                live.put(to, moved);
            }
            Op::Exchange { one, other } => {
                let (a, b) = (live.take(one), live.take(other));
                live.put(other, a);
                live.put(one, b);
            }
            Op::Unlink { path } | Op::Rmdir { path } => live.remove(path),
            Op::Link { from, to } => {
                let id = live.names[from];
                live.names.insert(to.clone(), id);
            }
            Op::Symlink { path, target } => live.add(path, Kind::Link(target.clone()), 0o777),
            Op::Mkdir { path } => live.add(path, Kind::Dir, 0o755),
            Op::Chmod { path, mode } => live.object(path).mode = *mode,
            Op::SetXattr { path, name, value } => {
                live.object(path).xattrs.insert(name.clone(), value.clone());
            }
            Op::RemoveXattr { path, name } => {
                live.object(path).xattrs.remove(name);
            }
            Op::Snapshot { name } => {
                self.taken += 1;
                self.snapshots
                    .insert(name.clone(), Arc::new(self.live.clone()));
            }
            Op::DeleteSnapshot { name } => {
                self.snapshots.remove(name);
            }
            Op::RenameSnapshot { from, to } => {
                let tree = self.snapshots.remove(from).unwrap();
                self.snapshots.insert(to.clone(), tree);
            }
        }
    }

    /// A random operation that must succeed.
    pub(crate) fn operation(&self, random: &mut Random) -> Op {
        loop {
            if let Some(op) = self.propose(random) {
                return op;
            }
        }
    }

    fn propose(&self, random: &mut Random) -> Option<Op> {
        let live = &self.live;
        let files = live.paths(Tree::is_file);
        let dirs = live.paths(Tree::is_dir);
        let some = |list: &[String], random: &mut Random| {
            (!list.is_empty()).then(|| random.pick(list).clone())
        };
        // Few names, so that they collide and are used again.
        let name = |random: &mut Random| {
            let base = if dirs.is_empty() || random.below(3) == 0 {
                String::new()
            } else {
                format!("{}/", random.pick(&dirs))
            };
            format!("{base}{}{}", random.pick(&["f", "g", "d"]), random.below(6))
        };
        let free = |random: &mut Random| Some(name(random)).filter(|n| !live.names.contains_key(n));
        let stamp = random.next();
        let length = |random: &mut Random| match random.below(10) {
            0 => 1 + random.below(200_000),
            1..4 => 4096 * (1 + random.below(8)),
            _ => 1 + random.below(6000),
        };
        let full = live.names.len() > 50;
        match random.below(100) {
            0..8 if !full => free(random).map(|path| Op::Create {
                path,
                mode: *random.pick(&[0o644, 0o600, 0o755, 0o640]),
            }),
            8..30 => {
                let path = some(&files, random)?;
                let at =
                    (random.below(120_000) as u64) & if random.below(2) == 0 { !4095 } else { !0 };
                Some(Op::Write {
                    path,
                    at,
                    len: length(random),
                    fill: stamp,
                })
            }
            30..40 => {
                let path = some(&files, random)?;
                (self.size(&path) < 300_000).then(|| Op::Append {
                    path,
                    len: length(random),
                    fill: stamp,
                })
            }
            40..46 => {
                let size = if random.below(3) == 0 {
                    0
                } else {
                    random.below(150_000) as u64
                };
                some(&files, random).map(|path| Op::Truncate { path, size })
            }
            46..49 => {
                let (at, len) = (random.below(90_000) as u64, 1 + random.below(50_000) as u64);
                some(&files, random).map(|path| Op::Punch { path, at, len })
            }
            49..62 => {
                let from = some(&live.paths(|_, _| true), random)?;
                let to = name(random);
                let fits = match live.names.contains_key(&to) {
                    false => true,
                    true if live.is_dir(&from) => {
                        live.is_dir(&to) && live.is_empty(&to) && from != to
                    }
                    true => !live.is_dir(&to) && from != to,
                };
                (fits && !within(&to, &from) && to != from).then_some(Op::Rename { from, to })
            }
            62..65 => {
                let all = live.paths(|_, _| true);
                let (one, other) = (some(&all, random)?, some(&all, random)?);
                (one != other
                    && live.names[&one] != live.names[&other]
                    && !within(&one, &other)
                    && !within(&other, &one))
                .then_some(Op::Exchange { one, other })
            }
            65..71 => {
                some(&live.paths(|t, p| !t.is_dir(p)), random).map(|path| Op::Unlink { path })
            }
            71..75 if !full => {
                let from = some(&files, random)?;
                free(random).map(|to| Op::Link { from, to })
            }
            75..77 if !full => free(random).map(|path| Op::Symlink {
                path,
                target: format!("../to/{stamp}"),
            }),
            77..81 if dirs.len() < 8 => free(random)
                .filter(|p| p.matches('/').count() < 3)
                .map(|path| Op::Mkdir { path }),
            81..84 => some(&live.paths(|t, p| t.is_dir(p) && t.is_empty(p)), random)
                .map(|path| Op::Rmdir { path }),
            84..88 => some(&live.paths(|t, p| t.is_file(p) || t.is_dir(p)), random).map(|path| {
                let mode = *random.pick(&[0o700, 0o711, 0o750, 0o755, 0o775]);
                Op::Chmod { path, mode }
            }),
            88..92 => {
                let path = some(&live.paths(|t, p| t.is_file(p) || t.is_dir(p)), random)?;
                let name = format!("user.x{}", random.below(4));
                let len = [0, 8, 100, 700][random.below(4)];
                Some(Op::SetXattr {
                    path,
                    name,
                    value: fill(stamp, len),
                })
            }
            92..94 => {
                let path = some(
                    &live.paths(|t, p| !t.objects[&t.names[p]].xattrs.is_empty()),
                    random,
                )?;
                let name = live.objects[&live.names[&path]]
                    .xattrs
                    .keys()
                    .next()?
                    .clone();
                Some(Op::RemoveXattr { path, name })
            }
            94..97 if self.snapshots.len() < 8 => Some(Op::Snapshot {
                name: format!("snap-{}", self.taken),
            }),
            97..99 if self.snapshots.len() > 3 => {
                let names: Vec<_> = self.snapshots.keys().cloned().collect();
                some(&names, random).map(|name| Op::DeleteSnapshot { name })
            }
            99 => {
                let names: Vec<_> = self.snapshots.keys().cloned().collect();
                let from = some(&names, random)?;
                let to = format!("renamed-{}", random.next());
                Some(Op::RenameSnapshot { from, to })
            }
            _ => None,
        }
    }

    /// What may be there of a write when the daemon was killed in the middle of it: the beginning of it up to
    /// some page. The kernel makes two requests of a write that begins inside a page that it has not read, and
    /// the backing filesystem ends a write of a killed process between two pages. (Empty for everything else.)
    pub(crate) fn beginnings(&self, op: &Op) -> Vec<Op> {
        let (path, at, len, stamp) = match op {
            Op::Write {
                path,
                at,
                len,
                fill,
            } => (path, *at, *len, *fill),
            Op::Append { path, len, fill } => (path, self.size(path) as u64, *len, *fill),
            _ => return Vec::new(),
        };
        let end = at + len as u64;
        let first = (at + 1).next_multiple_of(4096);
        (first..end)
            .step_by(4096)
            .map(|cut| Op::Write {
                path: path.clone(),
                at,
                len: usize::try_from(cut - at).unwrap(),
                fill: stamp,
            })
            .collect()
    }

    fn size(&self, path: &str) -> usize {
        match &self.live.objects[&self.live.names[path]].kind {
            Kind::File(content) => content.len(),
            _ => 0,
        }
    }
}

impl Op {
    /// Carries the operation out on a real tree.
    pub(crate) fn execute(&self, root: &Path) -> io::Result<()> {
        let at = |path: &str| root.join(path);
        let snapshot = |name: &str| root.join(".snapshots").join(name);
        let open = |path: &str| OpenOptions::new().write(true).open(at(path));
        let whole = |written: usize, len: usize| {
            if written == len {
                Ok(())
            } else {
                Err(io::Error::other("short write"))
            }
        };
        match self {
            Self::Create { path, mode } => OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(*mode)
                .open(at(path))
                .map(drop),
            Self::Write {
                path,
                at: offset,
                len,
                fill: stamp,
            } => whole(open(path)?.write_at(&fill(*stamp, *len), *offset)?, *len),
            Self::Append {
                path,
                len,
                fill: stamp,
            } => {
                let file = OpenOptions::new().append(true).open(at(path))?;
                whole(rustix::io::write(&file, &fill(*stamp, *len))?, *len)
            }
            Self::Truncate { path, size } => open(path)?.set_len(*size),
            Self::Punch {
                path,
                at: offset,
                len,
            } => {
                let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                Ok(rustix::fs::fallocate(open(path)?, mode, *offset, *len)?)
            }
            Self::Rename { from, to } => fs::rename(at(from), at(to)),
            Self::Exchange { one, other } => Ok(rustix::fs::renameat_with(
                CWD,
                at(one),
                CWD,
                at(other),
                RenameFlags::EXCHANGE,
            )?),
            Self::Unlink { path } => fs::remove_file(at(path)),
            Self::Link { from, to } => fs::hard_link(at(from), at(to)),
            Self::Symlink { path, target } => std::os::unix::fs::symlink(target, at(path)),
            Self::Mkdir { path } => fs::create_dir(at(path)),
            Self::Rmdir { path } => fs::remove_dir(at(path)),
            Self::Chmod { path, mode } => {
                fs::set_permissions(at(path), fs::Permissions::from_mode(*mode))
            }
            Self::SetXattr { path, name, value } => Ok(rustix::fs::setxattr(
                at(path),
                name.as_str(),
                value,
                XattrFlags::empty(),
            )?),
            Self::RemoveXattr { path, name } => {
                Ok(rustix::fs::removexattr(at(path), name.as_str())?)
            }
            Self::Snapshot { name } => fs::create_dir(snapshot(name)),
            Self::DeleteSnapshot { name } => remove_snapshot(&snapshot(name)),
            Self::RenameSnapshot { from, to } => fs::rename(snapshot(from), snapshot(to)),
        }
    }
}

/// How strictly [`compare`] looks.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Links {
    /// Link counts as the tree has names.
    Exact,
    /// The backing directory: a file that a snapshot retains has one more name there.
    AtLeast,
}

/// Says how the tree at `root` differs from `tree`.
pub(crate) fn compare(root: &Path, tree: &Tree, links: Links) -> Result<(), String> {
    let mut numbers: BTreeMap<u64, BTreeSet<u64>> = BTreeMap::new();
    let mut seen = 0;
    let mut stack = vec![String::new()];
    while let Some(dir) = stack.pop() {
        let list = fs::read_dir(root.join(&dir)).map_err(|e| format!("{dir:?}: {e}"))?;
        for entry in list {
            let entry = entry.map_err(|e| format!("{dir:?}: {e}"))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if dir.is_empty() && name == ".cowfs" && links == Links::AtLeast {
                continue;
            }
            let path = if dir.is_empty() {
                name
            } else {
                format!("{dir}/{name}")
            };
            let Some(id) = tree.names.get(&path) else {
                return Err(format!("{path} should not be there"));
            };
            seen += 1;
            let expected = tree.names.values().filter(|other| *other == id).count() as u64;
            let number = one(&root.join(&path), &tree.objects[id], expected, links)
                .map_err(|why| format!("{path}: {why}"))?;
            numbers.entry(*id).or_default().insert(number);
            if tree.is_dir(&path) {
                stack.push(path);
            }
        }
    }
    if seen != tree.names.len() {
        let missing: Vec<_> = tree
            .names
            .keys()
            .filter(|path| fs::symlink_metadata(root.join(path)).is_err())
            .collect();
        return Err(format!(
            "{seen} names listed, {} expected; missing: {missing:?}",
            tree.names.len()
        ));
    }
    let distinct: BTreeSet<_> = numbers.values().flatten().collect();
    if numbers.values().any(|set| set.len() != 1) || distinct.len() != numbers.len() {
        return Err("inode numbers do not tell which names are one object".to_owned());
    }
    Ok(())
}

/// Compares one object, returns its inode number.
fn one(path: &Path, object: &Object, expected: u64, links: Links) -> Result<u64, String> {
    let data = fs::symlink_metadata(path).map_err(|e| e.to_string())?;
    match &object.kind {
        Kind::Dir if data.is_dir() => {}
        Kind::Link(target) if data.is_symlink() => {
            let shown = fs::read_link(path).map_err(|e| e.to_string())?;
            if shown.as_os_str().as_bytes() != target.as_bytes() {
                return Err(format!("points to {}, not {target}", shown.display()));
            }
        }
        Kind::File(content) if data.is_file() => {
            if data.len() != content.len() as u64 {
                return Err(format!("size {}, not {}", data.len(), content.len()));
            }
            let mut shown = Vec::with_capacity(content.len());
            File::open(path)
                .and_then(|mut file| io::Read::read_to_end(&mut file, &mut shown))
                .map_err(|e| e.to_string())?;
            if shown != **content {
                let at = shown.iter().zip(content.iter()).position(|(a, b)| a != b);
                return Err(format!(
                    "content differs from byte {at:?} on ({} bytes)",
                    content.len()
                ));
            }
        }
        kind => return Err(format!("is {:?}, not {}", data.file_type(), name_of(kind))),
    }
    if !data.is_symlink() && data.mode() & 0o7777 != object.mode {
        return Err(format!(
            "mode {:o}, not {:o}",
            data.mode() & 0o7777,
            object.mode
        ));
    }
    let fits = match links {
        Links::Exact => data.nlink() == expected,
        Links::AtLeast => data.nlink() >= expected,
    };
    if !data.is_dir() && !fits {
        return Err(format!("{} links, not {expected}", data.nlink()));
    }
    if !data.is_symlink() {
        let shown = xattrs(path).map_err(|e| format!("xattrs: {e}"))?;
        if shown != object.xattrs {
            return Err(format!(
                "xattrs {:?}, not {:?}",
                shown.keys().collect::<Vec<_>>(),
                object.xattrs.keys().collect::<Vec<_>>()
            ));
        }
    }
    Ok(data.ino())
}

fn name_of(kind: &Kind) -> &'static str {
    match kind {
        Kind::File(_) => "a file",
        Kind::Dir => "a directory",
        Kind::Link(_) => "a symbolic link",
    }
}

fn xattrs(path: &Path) -> io::Result<BTreeMap<String, Vec<u8>>> {
    let mut names = vec![0; 65536];
    let len = rustix::fs::llistxattr(path, &mut names)?;
    names.truncate(len);
    let mut out = BTreeMap::new();
    for name in names.split(|b| *b == 0).filter(|n| n.starts_with(b"user.")) {
        let name = String::from_utf8_lossy(name).into_owned();
        let mut value = vec![0; 65536];
        let len = rustix::fs::lgetxattr(path, name.as_str(), &mut value)?;
        value.truncate(len);
        out.insert(name, value);
    }
    Ok(out)
}
