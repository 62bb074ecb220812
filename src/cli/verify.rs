//! `cowfs verify`: whether a copy is what the snapshot shows.

use super::{Failure, output};
use crate::control;
use crate::engine::nodes::is_in_snapshot;
use crate::error::{Error, Result};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Statx, StatxFlags};
use rustix::io::Errno;
use serde::Serialize;
use std::collections::{BTreeSet, HashMap};
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Bytes of content compared at once.
const PIECE: usize = 256 << 10;

/// Compare a copy with the snapshot that it was made from.
///
/// Names, kinds, content, sizes, modes, owners, times of modification, hard links, targets of symlinks, extended
/// attributes, ACLs and device numbers must agree. Access and change times are not compared: no copier keeps them.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Args {
    /// Do not compare owners and groups.
    #[arg(long)]
    no_owner: bool,
    /// Do not compare extended attributes, of which ACLs are part.
    #[arg(long)]
    no_xattrs: bool,
    /// Do not compare times of modification.
    #[arg(long)]
    no_times: bool,
    /// Print at most this many differences; the rest is counted.
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// A snapshot, as MOUNTPOINT/.snapshots/NAME, or a directory or file in one, or in a snapshot mounted by itself.
    snapshot: PathBuf,
    /// The copy.
    copy: PathBuf,
}

const EXAMPLE: &str = "\
EXAMPLE
  cp -a /srv/data/.snapshots/monday /backup/
  cowfs verify /srv/data/.snapshots/monday /backup/monday
  cowfs verify --no-owner /srv/data/.snapshots/monday/home /backup/home";

/// One thing in which the copy differs.
#[derive(Serialize)]
struct Difference {
    /// The path below the roots (bytes that are not UTF-8 replaced).
    path: String,
    /// In what, as "mode" or "content".
    what: &'static str,
    /// What the two have.
    detail: String,
}

#[derive(Serialize)]
struct Output<'a> {
    equal: bool,
    objects: u64,
    bytes: u64,
    differences: &'a [Difference],
    more: u64,
}

pub(super) fn run(args: &Args) -> std::result::Result<(), Failure> {
    check_snapshot(&args.snapshot)?;
    let mut compare = Compare {
        args,
        objects: 0,
        bytes: 0,
        found: Vec::new(),
        more: 0,
        links: HashMap::new(),
        backwards: HashMap::new(),
    };
    compare.trees()?;
    let (found, more) = (&compare.found, compare.more);
    let count = found.len() as u64 + more;
    if args.json {
        output::json(&Output {
            equal: count == 0,
            objects: compare.objects,
            bytes: compare.bytes,
            differences: found,
            more,
        })?;
    } else {
        for difference in found {
            let path = output::printable(OsStr::new(&difference.path));
            let detail = output::printable(OsStr::new(&difference.detail));
            output::line(format!("{path}: {}: {detail}", difference.what))?;
        }
        if more > 0 {
            output::line(format!("and {more} more"))?;
        }
        let (objects, bytes) = (compare.objects, output::size(compare.bytes));
        output::line(format!(
            "{objects} objects, {bytes} of content: {count} differences"
        ))?;
    }
    if count == 0 {
        return Ok(());
    }
    let copy = args.copy.display();
    Err(Error::Check(format!(
        "{copy}: not what the snapshot shows ({count} differences)"
    ))
    .into())
}

/// Refuses what is in no snapshot: the live tree changes while it is compared.
fn check_snapshot(path: &Path) -> Result<()> {
    let root = control::find_mount(path)?;
    if control::status(&root)?.snapshot.is_some() {
        return Ok(());
    }
    if is_in_snapshot(stat(path)?.stx_ino) {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "{}: not in a snapshot; name MOUNTPOINT/.snapshots/NAME, or a path in it",
        path.display()
    )))
}

struct Compare<'a> {
    args: &'a Args,
    objects: u64,
    bytes: u64,
    found: Vec<Difference>,
    more: u64,
    /// For objects with several names: what the copy has for one of the snapshot's, and the other way.
    links: HashMap<(u64, u64), (u64, u64)>,
    backwards: HashMap<(u64, u64), (u64, u64)>,
}

impl Compare<'_> {
    /// Goes through both trees side by side, without recursion, so that depth costs no stack.
    fn trees(&mut self) -> Result<()> {
        let mut todo = vec![PathBuf::new()];
        while let Some(dir) = todo.pop() {
            if self.object(&dir)? != Some(FileType::Directory) {
                continue;
            }
            let ours = names(&below(&self.args.snapshot, &dir))?;
            let theirs = names(&below(&self.args.copy, &dir))?;
            for name in theirs.difference(&ours) {
                self.differ(&dir.join(name), "name", "only in the copy".into());
            }
            for name in ours.difference(&theirs) {
                self.differ(&dir.join(name), "name", "missing from the copy".into());
            }
            let common = ours.intersection(&theirs).map(|name| dir.join(name));
            let common: Vec<_> = common.collect();
            todo.extend(common.into_iter().rev());
        }
        Ok(())
    }

    fn differ(&mut self, path: &Path, what: &'static str, detail: String) {
        if self.found.len() >= self.args.limit {
            self.more += 1;
            return;
        }
        let path = if path.as_os_str().is_empty() {
            "."
        } else {
            &path.to_string_lossy()
        };
        self.found.push(Difference {
            path: path.into(),
            what,
            detail,
        });
    }

    fn differ_if<T: PartialEq + std::fmt::Display>(
        &mut self,
        path: &Path,
        what: &'static str,
        ours: T,
        theirs: T,
    ) {
        if ours != theirs {
            self.differ(
                path,
                what,
                format!("{ours} in the snapshot, {theirs} in the copy"),
            );
        }
    }

    /// Compares one object; returns its kind if both have the same.
    fn object(&mut self, path: &Path) -> Result<Option<FileType>> {
        self.objects += 1;
        let (ours, theirs) = (
            below(&self.args.snapshot, path),
            below(&self.args.copy, path),
        );
        let (a, b) = (stat(&ours)?, stat(&theirs)?);
        let kind = FileType::from_raw_mode(u32::from(a.stx_mode));
        let other = FileType::from_raw_mode(u32::from(b.stx_mode));
        if kind != other {
            self.differ(
                path,
                "kind",
                format!("{kind:?} in the snapshot, {other:?} in the copy"),
            );
            return Ok(None);
        }
        if kind != FileType::Symlink {
            let mode = |st: &Statx| format!("{:04o}", st.stx_mode & 0o7777);
            self.differ_if(path, "mode", mode(&a), mode(&b));
        }
        if !self.args.no_owner {
            let owner = |st: &Statx| format!("{}:{}", st.stx_uid, st.stx_gid);
            self.differ_if(path, "owner", owner(&a), owner(&b));
        }
        if !self.args.no_times {
            let time = |st: &Statx| format!("{}.{:09}", st.stx_mtime.tv_sec, st.stx_mtime.tv_nsec);
            self.differ_if(path, "mtime", time(&a), time(&b));
        }
        if !self.args.no_xattrs {
            self.xattrs(path, &ours, &theirs)?;
        }
        if kind != FileType::Directory {
            self.links(path, &a, &b);
        }
        match kind {
            FileType::RegularFile => self.content(path, &ours, &theirs, (&a, &b))?,
            FileType::Symlink => {
                let target = |path: &Path| -> Result<String> {
                    let target = rustix::fs::readlink(path, Vec::new());
                    let target =
                        target.map_err(|e| Error::path("cannot read the link", path, e))?;
                    Ok(target.to_string_lossy().into_owned())
                };
                self.differ_if(path, "target", target(&ours)?, target(&theirs)?);
            }
            FileType::CharacterDevice | FileType::BlockDevice => {
                let device = |st: &Statx| format!("{}:{}", st.stx_rdev_major, st.stx_rdev_minor);
                self.differ_if(path, "device", device(&a), device(&b));
            }
            _ => {}
        }
        Ok(Some(kind))
    }

    /// Two names are one object in both trees, or in neither.
    fn links(&mut self, path: &Path, a: &Statx, b: &Statx) {
        let id = |st: &Statx| {
            (
                u64::from(st.stx_dev_major) << 32 | u64::from(st.stx_dev_minor),
                st.stx_ino,
            )
        };
        if a.stx_nlink < 2 && b.stx_nlink < 2 {
            return;
        }
        let (ours, theirs) = (id(a), id(b));
        let first = *self.links.entry(ours).or_insert(theirs);
        let back = *self.backwards.entry(theirs).or_insert(ours);
        if first != theirs {
            self.differ(
                path,
                "links",
                "the copy has other hard links: a file of its own here".into(),
            );
        } else if back != ours {
            self.differ(
                path,
                "links",
                "the copy has other hard links: one file for several here".into(),
            );
        }
    }

    fn xattrs(&mut self, path: &Path, ours: &Path, theirs: &Path) -> Result<()> {
        let (a, b) = (attributes(ours)?, attributes(theirs)?);
        for (name, value) in &a {
            let shown = String::from_utf8_lossy(name).into_owned();
            match b.get(name) {
                None => self.differ(path, "xattr", format!("{shown} is missing from the copy")),
                Some(other) if other != value => {
                    self.differ(
                        path,
                        "xattr",
                        format!("{shown} has another value in the copy"),
                    );
                }
                Some(_) => {}
            }
        }
        for name in b.keys().filter(|name| !a.contains_key(*name)) {
            let shown = String::from_utf8_lossy(name).into_owned();
            self.differ(path, "xattr", format!("{shown} is only in the copy"));
        }
        Ok(())
    }

    fn content(
        &mut self,
        path: &Path,
        ours: &Path,
        theirs: &Path,
        looked_at: (&Statx, &Statx),
    ) -> Result<()> {
        let (size, other) = (looked_at.0.stx_size, looked_at.1.stx_size);
        if size != other {
            self.differ_if(path, "size", size, other);
            return Ok(());
        }
        let sparse = is_sparse(looked_at.0) && is_sparse(looked_at.1);
        let (mut a, mut b) = (open(ours)?, open(theirs)?);
        let (mut left, mut right) = (vec![0; PIECE], vec![0; PIECE]);
        let mut at = 0;
        loop {
            if sparse {
                let next = next_data(&a, at, size).min(next_data(&b, at, size));
                self.bytes += next - at;
                at = next;
                for (file, path) in [(&mut a, ours), (&mut b, theirs)] {
                    let moved = file.seek(SeekFrom::Start(at));
                    moved.map_err(|e| Error::io("cannot read", path, &e))?;
                }
            }
            let (n, m) = (
                fill(&mut a, &mut left, ours)?,
                fill(&mut b, &mut right, theirs)?,
            );
            self.bytes += n as u64;
            if left[..n] != right[..m] {
                let same = left[..n]
                    .iter()
                    .zip(&right[..m])
                    .take_while(|(x, y)| x == y)
                    .count();
                self.differ(
                    path,
                    "content",
                    format!("differs from byte {}", at + same as u64),
                );
                return Ok(());
            }
            if n < PIECE {
                return Ok(());
            }
            at += n as u64;
        }
    }
}

/// What has `path` below `root`; that itself is looked at where it leads to if it is a link to a directory.
fn below(root: &Path, path: &Path) -> PathBuf {
    match path.as_os_str().is_empty() && !root.is_dir() {
        true => root.to_path_buf(),
        false => root.join(path),
    }
}

fn stat(path: &Path) -> Result<Statx> {
    rustix::fs::statx(
        CWD,
        path,
        AtFlags::SYMLINK_NOFOLLOW,
        StatxFlags::BASIC_STATS,
    )
    .map_err(|e| Error::path("cannot look at", path, e))
}

fn names(dir: &Path) -> Result<BTreeSet<OsString>> {
    let failed = |e: std::io::Error| Error::io("cannot list", dir, &e);
    let entries = std::fs::read_dir(dir).map_err(failed)?;
    entries
        .map(|entry| Ok(entry.map_err(failed)?.file_name()))
        .collect()
}

fn open(path: &Path) -> Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::open(path, flags, Mode::empty());
    fd.map(File::from)
        .map_err(|e| Error::path("cannot open", path, e))
}

/// Whether a file has fewer blocks than its size takes, so that it has holes to look for.
fn is_sparse(st: &Statx) -> bool {
    st.stx_blocks * 512 < st.stx_size
}

/// Where the first data at or after `at` begins, `size` if there is only a hole. A filesystem that cannot tell has data.
fn next_data(file: &File, at: u64, size: u64) -> u64 {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
        Ok(data) => data.clamp(at, size.max(at)),
        Err(Errno::NXIO) => size.max(at),
        Err(_) => at,
    }
}

/// Reads until the buffer is full or the file ends.
fn fill(file: &mut File, buf: &mut [u8], path: &Path) -> Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read(&mut buf[done..]) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io("cannot read", path, &e)),
        }
    }
    Ok(done)
}

/// All extended attributes of an object, of a symlink its own.
fn attributes(path: &Path) -> Result<HashMap<Vec<u8>, Vec<u8>>> {
    let mut list = vec![0; control::XATTR_MAX];
    let failed = |e| Error::path("cannot read the extended attributes of", path, e);
    let len = match rustix::fs::llistxattr(path, &mut list) {
        Err(Errno::OPNOTSUPP) => 0,
        other => other.map_err(failed)?,
    };
    let mut found = HashMap::new();
    for name in list[..len]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let mut value = vec![0; control::XATTR_MAX];
        let Ok(c_name) = CString::new(name) else {
            continue;
        };
        match rustix::fs::lgetxattr(path, c_name, &mut value) {
            Ok(len) => value.truncate(len),
            Err(Errno::NODATA) => continue,
            Err(errno) => return Err(failed(errno)),
        }
        found.insert(name.to_vec(), value);
    }
    Ok(found)
}
