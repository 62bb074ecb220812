//! The exact cut (C1), checked from outside: writers whose every step is known, and a checker that says
//! which step of each writer a frozen view shows.
//!
//! Each writer (a [`Plan`]) makes its steps 1, 2, 3 … one system call each, so the state after step s is a
//! pure function of s. Before and after each step it publishes the step's number. A view cut between two
//! readings of these numbers must show *exactly* the state after one step s of each writer, with
//! `completed before the cut was asked for <= s <= begun when it returned`: a later step without an
//! earlier one, a write in half, half a rename, size without data have no such s. Writers that pass a
//! token around in addition must show steps that one order of events explains.

use rustix::fs::{CWD, OFlags, XattrFlags};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use super::model::Random;

/// So many views are made, however long it takes.
const LEAST: usize = 6;
/// The most bytes that one request of the kernel carries: a longer `write` is several operations.
const REQUEST: usize = 1 << 20;
/// A `write` that begins inside a page which the kernel has not read is two requests, if it goes beyond that
/// page: one up to its end, and the rest. So there, and only there, a `write` may be cut in two.
const PAGE: usize = 4096;

/// The bytes that a record of step `stamp` holds.
fn pattern(stamp: u64, len: usize) -> Vec<u8> {
    stamp
        .to_le_bytes()
        .iter()
        .copied()
        .cycle()
        .take(len)
        .collect()
}

/// The stamp that all of `record` holds; an error when it is a mixture.
fn stamp_of(record: &[u8]) -> Result<u64, String> {
    let Some(head) = record.first_chunk::<8>() else {
        return Err("record shorter than its stamp".to_owned());
    };
    let stamp = u64::from_le_bytes(*head);
    match record
        .chunks(8)
        .position(|part| *part != head[..part.len()])
    {
        None => Ok(stamp),
        Some(at) => {
            let there = &record[at * 8..record.len().min(at * 8 + 8)];
            Err(format!(
                "torn write: stamp {stamp} up to byte {}, then {there:?}",
                at * 8
            ))
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    let bytes = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let size = fs::metadata(path)
        .map_err(|error| format!("{}: {error}", path.display()))?
        .len();
    if size != bytes.len() as u64 {
        return Err(format!(
            "{}: stat says {size} bytes, read gives {}",
            path.display(),
            bytes.len()
        ));
    }
    Ok(bytes)
}

/// The work of one writer.
pub(crate) trait Plan: Send + Sync {
    /// Its directory below the root of the tree, and its name in messages.
    fn name(&self) -> &str;
    /// Makes the state before step 1.
    fn prepare(&self, dir: &Path) -> io::Result<()>;
    /// What makes the steps; called in the writer's own thread.
    fn start(&self, dir: &Path) -> io::Result<Box<dyn FnMut(u64) -> io::Result<()>>>;
    /// The step whose state `dir` shows; an error unless there is one in `low..=high`.
    fn check(&self, dir: &Path, low: u64, high: u64) -> Result<u64, String>;
    /// Operations in one step, when the kernel splits it; each counts as a step then.
    fn parts(&self) -> u64 {
        1
    }
    /// Numbers from below which no step may be, other than those completed (see [`Copies`]).
    fn floor(&self) -> Option<&AtomicU64> {
        None
    }
}

fn in_window(step: u64, low: u64, high: u64) -> Result<u64, String> {
    if step < low {
        Err(format!(
            "shows step {step}, but step {low} had completed before the cut was asked for"
        ))
    } else if step > high {
        Err(format!(
            "shows step {step}, but only {high} had begun when the cut returned"
        ))
    } else {
        Ok(step)
    }
}

/// Overwrites records of one size, in a fixed scattered order, over several files.
struct Slots {
    name: String,
    files: u64,
    slots: u64,
    record: usize,
}

impl Slots {
    fn new(name: &str, files: u64, per_file: u64, record: usize) -> Self {
        Self {
            name: name.to_owned(),
            files,
            slots: files * per_file,
            record,
        }
    }

    /// File and index in it of the record that step `step` writes.
    fn place(&self, step: u64) -> (u64, u64) {
        let slot = step.wrapping_mul(7919) % self.slots; // 7919 is prime and divides no count used here
        (slot % self.files, slot / self.files)
    }
}

impl Plan for Slots {
    fn name(&self) -> &str {
        &self.name
    }

    fn prepare(&self, dir: &Path) -> io::Result<()> {
        let size = usize::try_from(self.slots / self.files).unwrap() * self.record;
        (0..self.files)
            .try_for_each(|file| fs::write(dir.join(format!("slots.{file}")), pattern(0, size)))
    }

    fn start(&self, dir: &Path) -> io::Result<Box<dyn FnMut(u64) -> io::Result<()>>> {
        let open = |file| {
            OpenOptions::new()
                .write(true)
                .open(dir.join(format!("slots.{file}")))
        };
        let files = (0..self.files).map(open).collect::<io::Result<Vec<_>>>()?;
        let plan = Self {
            name: self.name.clone(),
            ..*self
        };
        Ok(Box::new(move |step| {
            let (file, index) = plan.place(step);
            let at = index * plan.record as u64;
            files[usize::try_from(file).unwrap()].write_all_at(&pattern(step, plan.record), at)
        }))
    }

    fn check(&self, dir: &Path, low: u64, high: u64) -> Result<u64, String> {
        let mut shown = vec![0; usize::try_from(self.slots).unwrap()];
        let mut half = None;
        for file in 0..self.files {
            let path = dir.join(format!("slots.{file}"));
            let bytes = read(&path)?;
            if bytes.len() as u64 != self.slots / self.files * self.record as u64 {
                return Err(format!("{}: {} bytes", path.display(), bytes.len()));
            }
            for (index, record) in bytes.chunks(self.record).enumerate() {
                let slot =
                    index * usize::try_from(self.files).unwrap() + usize::try_from(file).unwrap();
                shown[slot] = match stamp_of(record) {
                    Ok(stamp) => stamp,
                    Err(why) => {
                        let (newer, older) = split_at_page(record, index * self.record)
                            .filter(|_| half.is_none())
                            .ok_or_else(|| format!("{} record {index}: {why}", path.display()))?;
                        half = Some(newer);
                        older
                    }
                };
            }
        }
        let step = shown.iter().copied().max().unwrap_or(0);
        for back in 0..self.slots {
            let Some(expected) = step.checked_sub(back) else {
                break;
            };
            let (file, index) = self.place(expected);
            let stamp = shown[usize::try_from(index * self.files + file).unwrap()];
            if expected > 0 && stamp != expected {
                return Err(format!(
                    "step {step} is there, but not step {expected} before it: slots.{file} record {index} \
                     shows {stamp}"
                ));
            }
        }
        match half {
            Some(newer) if newer != step + 1 => Err(format!(
                "half of step {newer} is there, and the last whole one is {step}"
            )),
            Some(newer) => {
                SPLIT.fetch_add(1, Ordering::Relaxed);
                in_window(newer, low, high)?;
                in_window(step, low, high)
            }
            None => in_window(step, low, high),
        }
    }
}

/// Writes seen in half at a page boundary, where they are two requests.
static SPLIT: AtomicUsize = AtomicUsize::new(0);

/// The stamps before and after the first page boundary in a record that starts at `offset` of its file.
fn split_at_page(record: &[u8], offset: usize) -> Option<(u64, u64)> {
    let head = PAGE - offset % PAGE;
    let (new, old) = record.split_at_checked(head)?;
    let newer = stamp_of(new).ok()?;
    // the old half is a part of a pattern that began at the start of the record
    let mut whole = old[(8 - head % 8) % 8..].to_vec();
    whole.truncate(whole.len() / 8 * 8);
    let older = stamp_of(&whole).ok()?;
    (pattern(older, record.len())[head..] == *old && pattern(newer, head) == *new)
        .then_some((newer, older))
}

/// Overwrites one file with a single `write` that is longer than a request.
struct Long {
    parts: u64,
}

impl Plan for Long {
    fn name(&self) -> &str {
        "long"
    }

    fn prepare(&self, dir: &Path) -> io::Result<()> {
        fs::write(
            dir.join("long"),
            pattern(0, usize::try_from(self.parts).unwrap() * REQUEST),
        )
    }

    fn start(&self, dir: &Path) -> io::Result<Box<dyn FnMut(u64) -> io::Result<()>>> {
        let file = OpenOptions::new().write(true).open(dir.join("long"))?;
        let len = usize::try_from(self.parts).unwrap() * REQUEST;
        Ok(Box::new(move |step| {
            file.write_all_at(&pattern(step, len), 0)
        }))
    }

    fn check(&self, dir: &Path, low: u64, high: u64) -> Result<u64, String> {
        let bytes = read(&dir.join("long"))?;
        if bytes.len() as u64 != self.parts * REQUEST as u64 {
            return Err(format!("long: {} bytes", bytes.len()));
        }
        let stamps = bytes
            .chunks(REQUEST)
            .enumerate()
            .map(|(part, bytes)| stamp_of(bytes).map_err(|why| format!("long, part {part}: {why}")))
            .collect::<Result<Vec<_>, _>>()?;
        let newest = stamps[0];
        let done = stamps.iter().take_while(|stamp| **stamp == newest).count() as u64;
        if newest == 0 {
            return if done == self.parts {
                in_window(0, low, high)
            } else {
                Err(format!("long: {stamps:?}"))
            };
        }
        if stamps
            .iter()
            .skip(usize::try_from(done).unwrap())
            .any(|stamp| *stamp != newest - 1)
        {
            return Err(format!("long: requests out of order: {stamps:?}"));
        }
        in_window((newest - 1) * self.parts + done, low, high)
    }

    fn parts(&self) -> u64 {
        self.parts
    }
}

/// Appends records of many lengths to several files, now and then cuts one short.
struct Appends {
    files: u64,
}

enum Append {
    Record(usize),
    Truncate(usize),
}

impl Appends {
    /// What step `step` does to its file, whose size is `size` then.
    fn action(step: u64, size: usize) -> Append {
        let roll = usize::try_from(step.wrapping_mul(2_654_435_761) % 9973).unwrap();
        if size > 120_000 {
            Append::Truncate(if roll % 2 == 0 { 0 } else { roll * 3 })
        } else {
            Append::Record(1 + roll % 9000)
        }
    }
}

impl Plan for Appends {
    fn name(&self) -> &str {
        "appends"
    }

    fn prepare(&self, dir: &Path) -> io::Result<()> {
        (0..self.files).try_for_each(|file| fs::write(dir.join(format!("log.{file}")), b""))
    }

    fn start(&self, dir: &Path) -> io::Result<Box<dyn FnMut(u64) -> io::Result<()>>> {
        let open = |file| {
            OpenOptions::new()
                .append(true)
                .open(dir.join(format!("log.{file}")))
        };
        let files = (0..self.files).map(open).collect::<io::Result<Vec<_>>>()?;
        let mut sizes = vec![0_usize; files.len()];
        Ok(Box::new(move |step| {
            let file = usize::try_from(step).unwrap() % files.len();
            match Self::action(step, sizes[file]) {
                Append::Record(len) => {
                    sizes[file] += len;
                    let written = rustix::io::write(&files[file], &pattern(step, len))?;
                    if written == len {
                        Ok(())
                    } else {
                        Err(io::Error::other("short append"))
                    }
                }
                Append::Truncate(size) => {
                    sizes[file] = size;
                    files[file].set_len(size as u64)
                }
            }
        }))
    }

    fn check(&self, dir: &Path, low: u64, high: u64) -> Result<u64, String> {
        let shown = (0..self.files)
            .map(|file| read(&dir.join(format!("log.{file}"))))
            .collect::<Result<Vec<_>, _>>()?;
        // The sizes alone say which step it is; they are cheap to follow from the start.
        let mut sizes = vec![0_usize; shown.len()];
        let mut candidates = Vec::new();
        let fits = |sizes: &[usize]| {
            sizes
                .iter()
                .zip(&shown)
                .all(|(size, bytes)| *size == bytes.len())
        };
        for step in 0..=high {
            if step > 0 {
                let file = usize::try_from(step).unwrap() % shown.len();
                let before = sizes[file];
                let page_end = before.next_multiple_of(PAGE);
                match Self::action(step, before) {
                    Append::Record(len) => {
                        // The first of the two requests of an append that leaves a half-filled page.
                        sizes[file] = page_end;
                        if page_end > before
                            && page_end < before + len
                            && step > low
                            && fits(&sizes)
                        {
                            candidates.push((step - 1, true));
                        }
                        sizes[file] = before + len;
                    }
                    Append::Truncate(to) => sizes[file] = to,
                }
            }
            if step >= low && fits(&sizes) {
                candidates.push((step, false));
            }
        }
        let mut why = format!(
            "sizes {:?} belong to no step in {low}..={high} (after the last the sizes are {sizes:?})",
            shown.iter().map(Vec::len).collect::<Vec<_>>()
        );
        for (step, half) in candidates {
            let wrong = (0..shown.len()).find(|file| {
                let mut content = Self::content(step, *file, shown.len());
                if half && usize::try_from(step + 1).unwrap() % shown.len() == *file {
                    content.extend(pattern(
                        step + 1,
                        content.len().next_multiple_of(PAGE) - content.len(),
                    ));
                }
                content != shown[*file]
            });
            let Some(file) = wrong else {
                SPLIT.fetch_add(usize::from(half), Ordering::Relaxed);
                return Ok(step);
            };
            why = format!(
                "size without data: log.{file} has the size of step {step} and other bytes"
            );
        }
        Err(why)
    }
}

impl Appends {
    /// The bytes of one file after `step`.
    fn content(step: u64, file: usize, files: usize) -> Vec<u8> {
        let mut records: Vec<(u64, usize)> = Vec::new();
        let mut size = 0;
        for past in (1..=step).filter(|past| usize::try_from(*past).unwrap() % files == file) {
            match Self::action(past, size) {
                Append::Record(len) => {
                    records.push((past, len));
                    size += len;
                }
                Append::Truncate(to) => {
                    while size > to {
                        let (_, len) = records.last_mut().unwrap();
                        let cut = (*len).min(size - to);
                        *len -= cut;
                        size -= cut;
                        if *len == 0 {
                            records.pop();
                        }
                    }
                }
            }
        }
        records
            .into_iter()
            .flat_map(|(stamp, len)| pattern(stamp, len))
            .collect()
    }
}

/// A ring of operations on names in two directories: create, write, link, rename across, rename over,
/// mkdir, rename and remove a directory, unlink.
struct Names;

const NAME_OPS: u64 = 9;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Shown {
    kind: char,
    links: u64,
    content: Vec<u8>,
}

impl Names {
    fn paths(dir: &Path) -> (PathBuf, PathBuf) {
        (dir.join("a"), dir.join("b"))
    }

    /// What there is after `step`: path below the directory → object.
    fn state(step: u64) -> BTreeMap<String, Shown> {
        let file = |links, cycle: Option<u64>| Shown {
            kind: 'f',
            links,
            content: cycle.map_or(Vec::new(), |cycle| pattern(cycle, 3000)),
        };
        let folder = || Shown {
            kind: 'd',
            links: 0,
            content: Vec::new(),
        };
        let (c, done) = (step / NAME_OPS, step % NAME_OPS);
        let mut state = BTreeMap::new();
        // What the cycle before left, and what of it this one has taken away.
        let current = if done >= 5 { Some(c) } else { c.checked_sub(1) };
        if let Some(current) = current {
            state.insert("b/current".to_owned(), file(2, Some(current)));
        }
        if let Some(before) = c.checked_sub(1) {
            if done < 8 {
                state.insert(format!("b/dir.{before}"), folder());
            }
            // its link: 2 while `current` is the same file
            state.insert(
                format!("b/link.{before}"),
                file(if done >= 5 { 1 } else { 2 }, Some(before)),
            );
        }
        match done {
            0 => {}
            1 => drop(state.insert(format!("a/log.{c}"), file(1, None))),
            2 => drop(state.insert(format!("a/log.{c}"), file(1, Some(c)))),
            3 => drop(state.insert(format!("a/log.{c}"), file(2, Some(c)))),
            4 => drop(state.insert(format!("b/log.{c}"), file(2, Some(c)))),
            _ => {}
        }
        if done >= 3 {
            state.insert(format!("b/link.{c}"), file(2, Some(c)));
        }
        if done == 6 {
            state.insert(format!("a/dir.{c}"), folder());
        }
        if done >= 7 {
            state.insert(format!("b/dir.{c}"), folder());
        }
        state
    }

    fn look(dir: &Path) -> Result<BTreeMap<String, Shown>, String> {
        let mut shown = BTreeMap::new();
        for below in ["a", "b"] {
            for entry in fs::read_dir(dir.join(below)).map_err(|e| format!("names/{below}: {e}"))? {
                let entry = entry.map_err(|e| format!("names/{below}: {e}"))?;
                let path = entry.path();
                let name = format!("{below}/{}", entry.file_name().to_string_lossy());
                let data =
                    fs::symlink_metadata(&path).map_err(|e| format!("listed, but {name}: {e}"))?;
                let object = if data.is_dir() {
                    Shown {
                        kind: 'd',
                        links: 0,
                        content: Vec::new(),
                    }
                } else {
                    Shown {
                        kind: 'f',
                        links: data.nlink(),
                        content: read(&path)?,
                    }
                };
                if shown.insert(name.clone(), object).is_some() {
                    return Err(format!("{name} is listed twice"));
                }
            }
        }
        Ok(shown)
    }
}

impl Plan for Names {
    fn name(&self) -> &str {
        "names"
    }

    fn prepare(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir(dir.join("a"))?;
        fs::create_dir(dir.join("b"))
    }

    fn start(&self, dir: &Path) -> io::Result<Box<dyn FnMut(u64) -> io::Result<()>>> {
        let (a, b) = Self::paths(dir);
        let mut open: Option<File> = None;
        Ok(Box::new(move |step| {
            let (c, op) = ((step - 1) / NAME_OPS, (step - 1) % NAME_OPS);
            let log = format!("log.{c}");
            let folder = format!("dir.{c}");
            match op {
                0 => {
                    open = Some(
                        OpenOptions::new()
                            .write(true)
                            .create_new(true)
                            .open(a.join(&log))?,
                    )
                }
                1 => open.as_ref().unwrap().write_all_at(&pattern(c, 3000), 0)?,
                2 => fs::hard_link(a.join(&log), b.join(format!("link.{c}")))?,
                3 => fs::rename(a.join(&log), b.join(&log))?,
                4 => fs::rename(b.join(&log), b.join("current"))?,
                5 => fs::create_dir(a.join(&folder))?,
                6 => fs::rename(a.join(&folder), b.join(&folder))?,
                7 if c > 0 => fs::remove_dir(b.join(format!("dir.{}", c - 1)))?,
                8 if c > 0 => fs::remove_file(b.join(format!("link.{}", c - 1)))?,
                _ => {}
            }
            Ok(())
        }))
    }

    fn check(&self, dir: &Path, low: u64, high: u64) -> Result<u64, String> {
        let shown = Self::look(dir)?;
        for step in low..=high {
            if Self::state(step) == shown {
                return Ok(step);
            }
        }
        let brief = |state: &BTreeMap<String, Shown>| {
            state
                .iter()
                .map(|(name, s)| format!("{name}:{}{}:{}", s.kind, s.links, s.content.len()))
                .collect::<Vec<_>>()
                .join(" ")
        };
        Err(format!(
            "names: [{}] is the state after no step in {low}..={high}; after {low}: [{}], after {high}: [{}]",
            brief(&shown),
            brief(&Self::state(low)),
            brief(&Self::state(high))
        ))
    }
}

/// Sets extended attributes, modes, times and sizes of several files in turn.
struct Attributes {
    files: u64,
}

#[derive(Debug, PartialEq)]
struct FileAttributes {
    xattr: u64,
    mode: u32,
    /// `None`: any, as a change of size sets it to the present.
    mtime: Option<i64>,
    size: u64,
}

impl Attributes {
    fn states(&self, step: u64) -> Vec<FileAttributes> {
        (0..self.files)
            .map(|file| {
                let mut state = FileAttributes {
                    xattr: 0,
                    mode: 0o600,
                    mtime: Some(1),
                    size: 0,
                };
                // The four newest steps of this file say it all, older ones only while it has fewer.
                let newest = step.saturating_sub((step + self.files - file) % self.files);
                let mut own: Vec<u64> = (0..4)
                    .filter_map(|k| newest.checked_sub(k * self.files))
                    .filter(|s| *s > 0)
                    .collect();
                own.reverse();
                for step in own {
                    match (step / self.files) % 4 {
                        0 => state.xattr = step,
                        1 => state.mode = Self::mode(step),
                        2 => {
                            state.size = step % 50_000;
                            state.mtime = None;
                        }
                        _ => state.mtime = Some(i64::try_from(step).unwrap()),
                    }
                }
                state
            })
            .collect()
    }

    /// Always one with which the owner may read and write: not every writer is root.
    fn mode(step: u64) -> u32 {
        0o600 + u32::try_from(step % 128).unwrap()
    }

    fn look(&self, dir: &Path) -> Result<Vec<FileAttributes>, String> {
        (0..self.files)
            .map(|file| {
                let path = dir.join(format!("attr.{file}"));
                let data = fs::metadata(&path).map_err(|e| format!("{}: {e}", path.display()))?;
                let mut value = [0; 8];
                rustix::fs::getxattr(&path, "user.step", &mut value)
                    .map_err(|e| format!("{}: user.step: {e}", path.display()))?;
                Ok(FileAttributes {
                    xattr: u64::from_le_bytes(value),
                    mode: data.mode() & 0o7777,
                    mtime: Some(data.mtime()),
                    size: data.len(),
                })
            })
            .collect()
    }
}

impl Plan for Attributes {
    fn name(&self) -> &str {
        "attributes"
    }

    fn prepare(&self, dir: &Path) -> io::Result<()> {
        for file in 0..self.files {
            let path = dir.join(format!("attr.{file}"));
            fs::write(&path, b"")?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
            rustix::fs::setxattr(&path, "user.step", &0_u64.to_le_bytes(), XattrFlags::CREATE)?;
            let time = std::time::UNIX_EPOCH + Duration::from_secs(1);
            File::open(&path)?.set_modified(time)?;
        }
        Ok(())
    }

    fn start(&self, dir: &Path) -> io::Result<Box<dyn FnMut(u64) -> io::Result<()>>> {
        let open = |file| {
            OpenOptions::new()
                .write(true)
                .open(dir.join(format!("attr.{file}")))
        };
        let files = (0..self.files).map(open).collect::<io::Result<Vec<_>>>()?;
        let count = self.files;
        Ok(Box::new(move |step| {
            let file = &files[usize::try_from(step % count).unwrap()];
            match (step / count) % 4 {
                0 => {
                    rustix::fs::fsetxattr(
                        file,
                        "user.step",
                        &step.to_le_bytes(),
                        XattrFlags::empty(),
                    )?;
                    Ok(())
                }
                1 => file.set_permissions(fs::Permissions::from_mode(Self::mode(step))),
                2 => file.set_len(step % 50_000),
                _ => file.set_modified(std::time::UNIX_EPOCH + Duration::from_secs(step)),
            }
        }))
    }

    fn check(&self, dir: &Path, low: u64, high: u64) -> Result<u64, String> {
        let shown = self.look(dir)?;
        for step in low..=high {
            let fits = |(a, b): (&FileAttributes, &FileAttributes)| {
                a.xattr == b.xattr
                    && a.mode == b.mode
                    && a.size == b.size
                    && (b.mtime.is_none() || a.mtime == b.mtime)
            };
            if shown.iter().zip(&self.states(step)).all(fits) {
                return Ok(step);
            }
        }
        Err(format!(
            "attributes: {shown:?} is the state after no step in {low}..={high}; after {low}: {:?}",
            self.states(low)
        ))
    }
}

/// One empty file whose name is the number of the step.
struct Counter {
    name: String,
}

impl Plan for Counter {
    fn name(&self) -> &str {
        &self.name
    }

    fn prepare(&self, dir: &Path) -> io::Result<()> {
        fs::write(dir.join("0"), b"")
    }

    fn start(&self, dir: &Path) -> io::Result<Box<dyn FnMut(u64) -> io::Result<()>>> {
        let dir = File::open(dir)?;
        Ok(Box::new(move |step| {
            rustix::fs::renameat(&dir, (step - 1).to_string(), &dir, step.to_string())?;
            Ok(())
        }))
    }

    fn check(&self, dir: &Path, low: u64, high: u64) -> Result<u64, String> {
        let names = fs::read_dir(dir)
            .and_then(|list| {
                list.map(|e| e.map(|e| e.file_name()))
                    .collect::<io::Result<Vec<_>>>()
            })
            .map_err(|error| format!("{}: {error}", self.name))?;
        let [name] = names.as_slice() else {
            return Err(format!(
                "{}: half a rename: the directory holds {names:?}",
                self.name
            ));
        };
        fs::metadata(dir.join(name))
            .map_err(|error| format!("{}: listed, but {error}", self.name))?;
        let step = name
            .to_str()
            .and_then(|n| n.parse().ok())
            .ok_or_else(|| format!("{name:?}"))?;
        in_window(step, low, high)
    }
}

/// Copies another writer's file with `copy_file_range`. What it copied must not be newer than what the
/// same view shows of the original: the copy read it.
///
/// Its "step" is the stamp that it copied. The lowest that a cut may show is the original's last completed
/// step before the last completed copy began.
struct Copies {
    from: PathBuf,
    original: Arc<Progress>,
    floor: Arc<AtomicU64>,
    len: usize,
}

impl Plan for Copies {
    fn name(&self) -> &str {
        "copies"
    }

    fn prepare(&self, dir: &Path) -> io::Result<()> {
        fs::write(dir.join("copy"), pattern(0, self.len))
    }

    fn start(&self, dir: &Path) -> io::Result<Box<dyn FnMut(u64) -> io::Result<()>>> {
        let from = File::open(&self.from)?;
        let to = OpenOptions::new().write(true).open(dir.join("copy"))?;
        let (original, floor, len) = (
            Arc::clone(&self.original),
            Arc::clone(&self.floor),
            self.len,
        );
        Ok(Box::new(move |_| {
            let completed = original.done.load(Ordering::SeqCst);
            let copied = rustix::fs::copy_file_range(&from, Some(&mut 0), &to, Some(&mut 0), len)?;
            if copied != len {
                return Err(io::Error::other(format!(
                    "copy_file_range copied {copied} of {len}"
                )));
            }
            floor.store(completed, Ordering::SeqCst);
            Ok(())
        }))
    }

    fn check(&self, dir: &Path, low: u64, _high: u64) -> Result<u64, String> {
        let bytes = read(&dir.join("copy"))?;
        if bytes.len() != self.len {
            return Err(format!("copy: {} bytes", bytes.len()));
        }
        // A copy made while its original is written may be a mixture on any filesystem, so its newest and
        // its oldest part count, each by itself.
        let stamps = bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|part| u64::from_le_bytes(*part));
        let (oldest, newest) = (stamps.clone().min().unwrap_or(0), stamps.max().unwrap_or(0));
        in_window(oldest, low, u64::MAX).map(|_| newest)
    }

    fn floor(&self) -> Option<&AtomicU64> {
        Some(&self.floor)
    }
}

/// How far a writer is.
#[derive(Default)]
pub(crate) struct Progress {
    begun: AtomicU64,
    done: AtomicU64,
}

/// A token that goes round the writers of one ring: writer k makes step s after k − 1 made it, and writer
/// 0 makes s + 1 after the last made s.
struct Turn {
    receive: Receiver<()>,
    send: SyncSender<()>,
}

struct Writer {
    plan: Box<dyn Plan>,
    progress: Arc<Progress>,
    turn: Mutex<Option<Turn>>,
}

/// Writers of one tree, and what must hold between them.
struct Cast {
    writers: Vec<Writer>,
    /// Indices of the writers of each ring, in the order of the token.
    rings: Vec<Vec<usize>>,
    /// (copier, original)
    copies: Vec<(usize, usize)>,
}

impl Cast {
    fn new(root: &Path) -> Self {
        let mut cast = Self {
            writers: Vec::new(),
            rings: Vec::new(),
            copies: Vec::new(),
        };
        cast.add(Slots::new("blocks", 3, 48, 4096));
        cast.add(Slots::new("unaligned", 2, 40, 3001));
        cast.add(Slots::new("big", 2, 5, 200_000));
        cast.add(Long { parts: 3 });
        cast.add(Appends { files: 3 });
        cast.add(Names);
        cast.add(Attributes { files: 4 });
        let (a, b) = (
            cast.add(Slots::new("ping", 1, 1, 4096)),
            cast.add(Slots::new("pong", 1, 1, 4096)),
        );
        cast.ring(vec![a, b]);
        let ring = vec![
            cast.add(Slots::new("ring-0", 1, 1, 300)),
            cast.add(Counter {
                name: "ring-1".to_owned(),
            }),
            cast.add(Slots::new("ring-2", 1, 1, 1 << 18)),
            cast.add(Counter {
                name: "ring-3".to_owned(),
            }),
        ];
        cast.ring(ring);
        let original = cast.add(Slots::new("original", 1, 1, 1 << 16));
        let copier = cast.add(Copies {
            from: root.join("original/slots.0"),
            original: Arc::clone(&cast.writers[original].progress),
            floor: Arc::new(AtomicU64::new(0)),
            len: 1 << 16,
        });
        cast.copies.push((copier, original));
        cast
    }

    fn add(&mut self, plan: impl Plan + 'static) -> usize {
        self.writers.push(Writer {
            plan: Box::new(plan),
            progress: Arc::new(Progress::default()),
            turn: Mutex::new(None),
        });
        self.writers.len() - 1
    }

    fn ring(&mut self, members: Vec<usize>) {
        let (mut sends, receives): (Vec<_>, Vec<_>) =
            members.iter().map(|_| sync_channel(1)).unzip();
        sends[0].send(()).unwrap(); // the token, at writer 0
        sends.rotate_left(1);
        for ((member, send), receive) in members.iter().zip(sends).zip(receives) {
            *self.writers[*member].turn.lock().unwrap() = Some(Turn { receive, send });
        }
        self.rings.push(members);
    }

    fn prepare(&self, root: &Path) -> io::Result<()> {
        for writer in &self.writers {
            let dir = root.join(writer.plan.name());
            fs::create_dir(&dir)?;
            writer.plan.prepare(&dir)?;
        }
        Ok(())
    }

    /// Where each writer is at least: what completed until now.
    fn low(&self) -> Vec<u64> {
        let low = |w: &Writer| match w.plan.floor() {
            Some(floor) => floor.load(Ordering::SeqCst),
            None => w.progress.done.load(Ordering::SeqCst) * w.plan.parts(),
        };
        self.writers.iter().map(low).collect()
    }

    /// Where each writer is at most: what has begun until now.
    fn high(&self) -> Vec<u64> {
        self.writers
            .iter()
            .map(|w| w.progress.begun.load(Ordering::SeqCst) * w.plan.parts())
            .collect()
    }

    /// The steps that a view shows, or why it is not exact.
    fn check(&self, view: &Path, low: &[u64], high: &[u64]) -> Result<Vec<u64>, String> {
        let mut steps = Vec::new();
        for (index, writer) in self.writers.iter().enumerate() {
            let name = writer.plan.name();
            let step = writer
                .plan
                .check(&view.join(name), low[index], high[index])
                .map_err(|why| format!("{name}: {why}"))?;
            steps.push(step);
        }
        for ring in &self.rings {
            let shown: Vec<u64> = ring.iter().map(|member| steps[*member]).collect();
            let falling = shown.windows(2).all(|pair| pair[0] >= pair[1]);
            if !falling || shown[0] > shown[shown.len() - 1] + 1 {
                return Err(format!(
                    "a later step without the one that happened before it: ring at {shown:?}"
                ));
            }
        }
        for (copier, original) in &self.copies {
            if steps[*copier] > steps[*original] {
                return Err(format!(
                    "the copy shows write {} of the file that it was copied from, the file itself only {}",
                    steps[*copier], steps[*original]
                ));
            }
        }
        Ok(steps)
    }

    /// A writer's thread: steps until `stop`.
    fn write(
        &self,
        index: usize,
        root: &Path,
        stop: &AtomicBool,
        pause: &RwLock<()>,
    ) -> io::Result<()> {
        let writer = &self.writers[index];
        let mut step_of = writer.plan.start(&root.join(writer.plan.name()))?;
        let turn = writer.turn.lock().unwrap().take();
        for step in 1.. {
            if let Some(turn) = &turn {
                loop {
                    match turn.receive.recv_timeout(Duration::from_millis(20)) {
                        Ok(()) => break,
                        Err(RecvTimeoutError::Disconnected) => return Ok(()),
                        Err(RecvTimeoutError::Timeout) if stop.load(Ordering::Relaxed) => {
                            return Ok(());
                        }
                        Err(RecvTimeoutError::Timeout) => {}
                    }
                }
            }
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            {
                let _running = pause.read().unwrap();
                writer.progress.begun.store(step, Ordering::SeqCst);
                step_of(step)?;
                writer.progress.done.store(step, Ordering::SeqCst);
            }
            if let Some(turn) = &turn
                && turn.send.send(()).is_err()
            {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// How a view is made.
pub(crate) enum Method {
    /// `mkdir MNT/.snapshots/NAME`.
    Snapshot {
        /// The mount point.
        mnt: PathBuf,
    },
    /// `cp -a` while the writers run: wrong, and the checker must say so.
    Copy {
        /// Where the copies go.
        to: PathBuf,
    },
    /// `cp -a` while the writers are held: right.
    Freeze {
        /// Where the copies go.
        to: PathBuf,
    },
}

/// What a run found.
#[derive(Default)]
pub(crate) struct Report {
    /// Violations of C1 or C2, in words; the run ends soon after the first.
    pub(crate) violations: Vec<String>,
    /// Views made.
    pub(crate) cuts: usize,
    /// Views that were read completely.
    pub(crate) checked: usize,
    /// Steps of all writers.
    pub(crate) steps: u64,
    /// Time of each cut.
    pub(crate) times: Vec<Duration>,
}

impl Report {
    /// One line for the log.
    pub(crate) fn summary(&self) -> String {
        let mut times = self.times.clone();
        times.sort();
        format!(
            "{} cuts, {} of them read completely; {} steps; a cut took {:?} (median), {:?} (longest); {} violations",
            self.cuts,
            self.checked,
            self.steps,
            times.get(times.len() / 2).unwrap_or(&Duration::ZERO),
            times.last().unwrap_or(&Duration::ZERO),
            self.violations.len()
        )
    }
}

struct Job {
    name: String,
    view: PathBuf,
    low: Vec<u64>,
    high: Vec<u64>,
    /// What the view showed the moment it was made.
    glance: Option<Vec<u64>>,
}

/// Reads a few stamps that change all the time, past the caches of the kernel: one more operation that is let
/// into a snapshot after its creation returned shows as a difference between two glances.
fn glance(view: &Path) -> io::Result<Vec<u64>> {
    let mut stamps = Vec::new();
    for file in [
        "original/slots.0",
        "copies/copy",
        "ping/slots.0",
        "pong/slots.0",
        "ring-2/slots.0",
    ] {
        let direct = i32::try_from(OFlags::DIRECT.bits()).unwrap();
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(direct)
            .open(view.join(file))?;
        let mut part = [0; 4096];
        file.read_exact_at(&mut part, 0)?;
        stamps.extend(
            part.as_chunks::<8>()
                .0
                .iter()
                .map(|stamp| u64::from_le_bytes(*stamp)),
        );
    }
    for file in 0..4 {
        let mut value = [0; 8];
        rustix::fs::getxattr(
            view.join(format!("attributes/attr.{file}")),
            "user.step",
            &mut value,
        )?;
        stamps.push(u64::from_le_bytes(value));
    }
    Ok(stamps)
}

struct Run<'a> {
    root: &'a Path,
    method: &'a Method,
    cast: Cast,
    pause: RwLock<()>,
    stop: AtomicBool,
    violations: Mutex<Vec<String>>,
    checked: AtomicUsize,
}

impl Run<'_> {
    fn violation(&self, what: String) {
        self.violations.lock().unwrap().push(what);
        self.stop.store(true, Ordering::SeqCst);
    }

    fn copy(&self, to: &Path, name: &str) -> PathBuf {
        let view = to.join(name);
        // cp fails when files vanish under it; the checker sees what that did
        let _ = std::process::Command::new("cp")
            .arg("-a")
            .arg(self.root)
            .arg(&view)
            .stderr(std::process::Stdio::null())
            .status();
        view
    }

    /// One view, with the window of each writer's steps.
    fn cut(&self, name: &str) -> io::Result<Job> {
        let low = self.cast.low();
        let mut first = None;
        let mut high = None;
        let view = match self.method {
            Method::Snapshot { mnt } => {
                let snapshot = mnt.join(".snapshots").join(name);
                let view = snapshot.join(self.root.strip_prefix(mnt).unwrap());
                fs::create_dir(&snapshot)?;
                high = Some(self.cast.high());
                first = Some(glance(&view)?);
                view
            }
            Method::Copy { to } => self.copy(to, name),
            Method::Freeze { to } => {
                let _held = self.pause.write().unwrap();
                self.copy(to, name)
            }
        };
        let high = high.unwrap_or_else(|| self.cast.high());
        Ok(Job {
            name: name.to_owned(),
            view,
            low,
            high,
            glance: first,
        })
    }

    /// The steps that the view of `job` shows, and that it shows what it showed at first.
    fn check(&self, job: &Job) -> Result<Vec<u64>, String> {
        let steps = self.cast.check(&job.view, &job.low, &job.high)?;
        if let Some(first) = &job.glance {
            let now = glance(&job.view).map_err(|error| format!("second glance: {error}"))?;
            if let Some(at) = first.iter().zip(&now).position(|(a, b)| a != b) {
                return Err(format!(
                    "the snapshot changed after it was made: stamp {} became {}",
                    first[at], now[at]
                ));
            }
        }
        Ok(steps)
    }

    fn drop_view(&self, job: &Job) {
        let result = match self.method {
            Method::Snapshot { mnt } => remove_snapshot(&mnt.join(".snapshots").join(&job.name)),
            Method::Copy { .. } | Method::Freeze { .. } => fs::remove_dir_all(&job.view),
        };
        if let Err(error) = result {
            self.violation(format!("deleting snapshot {}: {error}", job.name));
        }
    }

    /// Reads views as they come; some are kept and must show the same at the end.
    fn checker(&self, jobs: &Mutex<Receiver<Job>>, kept: &Mutex<Vec<(Job, Vec<u64>)>>) {
        loop {
            let Ok(job) = jobs.lock().unwrap().recv() else {
                return;
            };
            match self.check(&job) {
                Ok(steps) => {
                    let number = self.checked.fetch_add(1, Ordering::Relaxed);
                    if number % 16 == 3 && kept.lock().unwrap().len() < 12 {
                        kept.lock().unwrap().push((job, steps));
                    } else {
                        self.drop_view(&job);
                    }
                }
                Err(why) => self.violation(format!("VIOLATION in {}: {why}", job.name)),
            }
        }
    }

    /// Cuts as fast as it goes until the time is over.
    fn cutter(&self, until: Instant, seed: u64, jobs: SyncSender<Job>) -> Vec<Duration> {
        let mut random = Random::new(seed);
        let mut times = Vec::new();
        let mut spare: Vec<Job> = Vec::new();
        // A slow machine makes a few all the same.
        while (Instant::now() < until || times.len() < LEAST) && !self.stop.load(Ordering::SeqCst) {
            let start = Instant::now();
            let job = match self.cut(&format!("cut-{}", times.len())) {
                Ok(job) => job,
                Err(error) => {
                    self.violation(format!("cut {}: {error}", times.len()));
                    break;
                }
            };
            times.push(start.elapsed());
            // The checkers are slower than the cuts. Those that they have no time for live a while among
            // the others and are deleted in any order.
            match jobs.try_send(job) {
                Ok(()) => {}
                Err(TrySendError::Full(job)) => {
                    spare.push(job);
                    while spare.len() > 6 {
                        let job = spare.swap_remove(random.below(spare.len()));
                        if random.below(3) == 0 {
                            let _ = jobs.send(job);
                        } else {
                            self.drop_view(&job);
                        }
                    }
                }
                Err(TrySendError::Disconnected(_)) => break,
            }
        }
        for job in spare {
            self.drop_view(&job);
        }
        times
    }
}

/// `rmdir` of a snapshot; one that is in use may answer EBUSY for a moment.
pub(crate) fn remove_snapshot(path: &Path) -> io::Result<()> {
    let start = Instant::now();
    loop {
        match rustix::fs::unlinkat(CWD, path, rustix::fs::AtFlags::REMOVEDIR) {
            Err(rustix::io::Errno::BUSY) if start.elapsed() < Duration::from_secs(10) => {
                std::thread::sleep(Duration::from_millis(5));
            }
            other => return other.map_err(io::Error::from),
        }
    }
}

/// Runs the writers in `root` for `time`, makes views by `method` all the while, and checks each.
pub(crate) fn exact_cut(root: &Path, method: &Method, time: Duration, seed: u64) -> Report {
    fs::create_dir(root).unwrap();
    let run = Run {
        root,
        method,
        cast: Cast::new(root),
        pause: RwLock::new(()),
        stop: AtomicBool::new(false),
        violations: Mutex::new(Vec::new()),
        checked: AtomicUsize::new(0),
    };
    run.cast.prepare(root).unwrap();
    let kept = Mutex::new(Vec::new());
    let (send, receive) = sync_channel(1);
    let receive = Mutex::new(receive);
    let mut times = Vec::new();
    std::thread::scope(|scope| {
        for index in 0..run.cast.writers.len() {
            let run = &run;
            scope.spawn(move || {
                if let Err(error) = run.cast.write(index, root, &run.stop, &run.pause) {
                    run.violation(format!(
                        "writer {}: {error}",
                        run.cast.writers[index].plan.name()
                    ));
                }
            });
        }
        let checkers: Vec<_> = (0..2)
            .map(|_| scope.spawn(|| run.checker(&receive, &kept)))
            .collect();
        times = run.cutter(Instant::now() + time, seed, send);
        for checker in checkers {
            checker.join().unwrap();
        }
        run.stop.store(true, Ordering::SeqCst);
    });
    for (job, steps) in kept.into_inner().unwrap() {
        match run.check(&job) {
            Ok(now) if now == steps => run.drop_view(&job),
            Ok(now) => run.violation(format!(
                "VIOLATION: {} showed {steps:?} and now {now:?}",
                job.name
            )),
            Err(why) => run.violation(format!("VIOLATION in {}, read again: {why}", job.name)),
        }
    }
    let steps = run
        .cast
        .writers
        .iter()
        .map(|w| w.progress.done.load(Ordering::SeqCst))
        .sum();
    println!(
        "{} writes were seen in half at a page boundary, where the kernel sends two requests",
        SPLIT.load(Ordering::Relaxed)
    );
    println!(
        "steps: {}",
        run.cast
            .writers
            .iter()
            .map(|w| format!(
                "{} {}",
                w.plan.name(),
                w.progress.done.load(Ordering::SeqCst)
            ))
            .collect::<Vec<_>>()
            .join(", ")
    );
    Report {
        violations: run.violations.into_inner().unwrap(),
        cuts: times.len(),
        checked: run.checked.into_inner(),
        steps,
        times,
    }
}

/// Cuts snapshots of a few files that are written all the time, and reads each at once and a little later, past
/// the caches of the kernel. Returns the number of cuts and what changed in a snapshot after its creation had
/// returned.
///
/// [`exact_cut`] looks at all there is, which takes too long to see an operation that comes a millisecond late.
pub(crate) fn stands_still(mnt: &Path, time: Duration) -> (usize, Vec<String>) {
    const FILES: usize = 8;
    let name = |file: usize| format!("still-{file}");
    let direct = i32::try_from(OFlags::DIRECT.bits()).unwrap();
    let look = |view: &Path, file: usize| -> io::Result<u64> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(direct)
            .open(view.join(name(file)))?;
        let mut page = [0; PAGE];
        file.read_exact_at(&mut page, 0)?;
        stamp_of(&page).map_err(io::Error::other)
    };
    let files: Vec<File> = (0..FILES)
        .map(|file| {
            fs::write(mnt.join(name(file)), pattern(0, PAGE)).unwrap();
            OpenOptions::new()
                .write(true)
                .open(mnt.join(name(file)))
                .unwrap()
        })
        .collect();
    let progress: Vec<Progress> = (0..FILES).map(|_| Progress::default()).collect();
    let stop = AtomicBool::new(false);
    let mut changed = Vec::new();
    let mut cuts = 0;
    std::thread::scope(|scope| {
        for (file, progress) in files.iter().zip(&progress) {
            let stop = &stop;
            scope.spawn(move || {
                let mut step = 0;
                while !stop.load(Ordering::Relaxed) {
                    step += 1;
                    progress.begun.store(step, Ordering::SeqCst);
                    file.write_all_at(&pattern(step, PAGE), 0).unwrap();
                    progress.done.store(step, Ordering::SeqCst);
                }
            });
        }
        let end = Instant::now() + time;
        // A slow machine makes a few all the same.
        while (Instant::now() < end || cuts < 10) && changed.len() < 5 {
            let view = mnt.join(format!(".snapshots/still-{cuts}"));
            let low: Vec<u64> = progress
                .iter()
                .map(|p| p.done.load(Ordering::SeqCst))
                .collect();
            let made = fs::create_dir(&view);
            let first: io::Result<Vec<u64>> = made.and_then(|()| {
                (0..FILES)
                    .map(|file| look(&view, (file + cuts) % FILES))
                    .collect()
            });
            let high: Vec<u64> = progress
                .iter()
                .map(|p| p.begun.load(Ordering::SeqCst))
                .collect();
            std::thread::sleep(Duration::from_millis(4));
            for turn in 0..FILES {
                let file = (turn + cuts) % FILES;
                match (&first, look(&view, file)) {
                    (Ok(first), Ok(now)) if first[turn] != now => changed.push(format!(
                        "VIOLATION: file {file} in snapshot {cuts} showed write {} when its creation had \
                         returned, and {now} a moment later",
                        first[turn]
                    )),
                    (Ok(_), Ok(now)) => {
                        if let Err(why) = in_window(now, low[file], high[file]) {
                            changed.push(format!("VIOLATION: file {file} in snapshot {cuts}: {why}"));
                        }
                    }
                    (Err(error), _) => changed.push(format!("snapshot {cuts}: {error}")),
                    (_, Err(error)) => changed.push(format!("snapshot {cuts}, file {file}: {error}")),
                }
            }
            cuts += 1;
            // Not one by one: a deletion keeps the store busy for a while, and the next creation waits for it.
            if cuts % 20 == 0 {
                for old in cuts - 20..cuts {
                    if let Err(error) =
                        remove_snapshot(&mnt.join(format!(".snapshots/still-{old}")))
                    {
                        changed.push(format!("deleting snapshot {old}: {error}"));
                    }
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    (cuts, changed)
}

/// Steps that each writer of [`quiet_tree`] has made.
const QUIET: u64 = 200;

/// Makes a tree in which every writer has made [`QUIET`] steps, then damages copies of it, each in one way.
/// Returns the damages that the check lets pass; the first is "none", and must.
pub(crate) fn damages_accepted(dir: &Path) -> Vec<&'static str> {
    type Damage = (&'static str, fn(&Path));
    /// Where the newest record is that `plan` has written `back` steps ago.
    fn place(plan: &Slots, back: u64) -> (String, u64) {
        let (file, index) = plan.place(QUIET - back);
        (
            format!("{}/slots.{file}", plan.name),
            index * plan.record as u64,
        )
    }
    let damages: [Damage; 17] = [
        ("none", |_| ()),
        ("the last block is missing", |root| {
            let (file, at) = place(&Slots::new("blocks", 3, 48, 4096), 0);
            patch(&root.join(file), at, &pattern(QUIET - 144, 4096));
        }),
        ("an earlier block is missing", |root| {
            let (file, at) = place(&Slots::new("blocks", 3, 48, 4096), 5);
            patch(&root.join(file), at, &pattern(0, 4096));
        }),
        ("half of a block", |root| {
            let (file, at) = place(&Slots::new("blocks", 3, 48, 4096), 0);
            patch(&root.join(file), at + 2048, &pattern(QUIET - 144, 2048));
        }),
        ("a record cut beside a page boundary", |root| {
            let (file, at) = place(&Slots::new("unaligned", 2, 40, 3001), 0);
            let cut = (at.next_multiple_of(4096) - at + 8).min(2992) / 8 * 8;
            patch(
                &root.join(file),
                at + cut,
                &pattern(QUIET - 80, 1000)[..usize::try_from(3001 - cut).unwrap().min(1000)],
            );
        }),
        ("the tail of a big record at a later page", |root| {
            let (file, at) = place(&Slots::new("big", 2, 5, 200_000), 0);
            let page = at.next_multiple_of(4096) + 5 * 4096;
            patch(&root.join(file), page, &pattern(1, 8));
        }),
        ("requests of one write out of order", |root| {
            patch(&root.join("long/long"), 0, &pattern(QUIET - 1, REQUEST));
        }),
        ("a part of a request", |root| {
            patch(
                &root.join("long/long"),
                2 * REQUEST as u64 + 4096,
                &pattern(QUIET - 1, 4096),
            );
        }),
        ("a log is a byte short", |root| {
            let file = OpenOptions::new()
                .write(true)
                .open(root.join("appends/log.1"))
                .unwrap();
            file.set_len(file.metadata().unwrap().len() - 1).unwrap();
        }),
        ("a log has its size and not its data", |root| {
            let path = root.join("appends/log.2");
            let size = fs::metadata(&path).unwrap().len();
            patch(&path, size - 16, &[0; 16]);
        }),
        ("a name too many", |root| {
            fs::write(root.join("names/a/log.1"), b"").unwrap()
        }),
        ("a name is missing", |root| {
            fs::remove_file(root.join("names/b/current")).unwrap()
        }),
        ("a mode is an older one", |root| {
            for file in 0..4 {
                let path = root.join(format!("attributes/attr.{file}"));
                fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
            }
        }),
        ("a size is an older one", |root| {
            OpenOptions::new()
                .write(true)
                .open(root.join("attributes/attr.1"))
                .unwrap()
                .set_len(3)
                .unwrap();
        }),
        ("half a rename", |root| {
            fs::write(root.join("ring-1/199"), b"").unwrap()
        }),
        ("a step of a ring without the one before it", |root| {
            patch(&root.join("pong/slots.0"), 0, &pattern(QUIET + 1, 4096));
        }),
        ("a copy of what is not there", |root| {
            patch(&root.join("copies/copy"), 8, &pattern(QUIET + 1, 8));
        }),
    ];
    let root = dir.join("quiet");
    fs::create_dir(&root).unwrap();
    let cast = Cast::new(&root);
    cast.prepare(&root).unwrap();
    for writer in &cast.writers {
        let mut step_of = writer.plan.start(&root.join(writer.plan.name())).unwrap();
        for step in 1..=QUIET {
            step_of(step).unwrap();
        }
    }
    // what could have begun is left open, so that a step too many is refused for its own sake
    let low: Vec<u64> = cast
        .writers
        .iter()
        .map(|w| {
            if w.plan.floor().is_some() {
                0
            } else {
                QUIET * w.plan.parts()
            }
        })
        .collect();
    let high: Vec<u64> = cast
        .writers
        .iter()
        .map(|w| (QUIET + 50) * w.plan.parts())
        .collect();
    let mut accepted = Vec::new();
    for (what, damage) in damages {
        let copy = dir.join("damaged");
        let status = std::process::Command::new("cp")
            .arg("-a")
            .arg(&root)
            .arg(&copy)
            .status()
            .unwrap();
        assert!(status.success());
        damage(&copy);
        match cast.check(&copy, &low, &high) {
            Ok(_) => accepted.push(what),
            Err(why) => println!("{what}: {why}"),
        }
        fs::remove_dir_all(copy).unwrap();
    }
    accepted
}

fn patch(path: &Path, at: u64, bytes: &[u8]) {
    OpenOptions::new()
        .write(true)
        .open(path)
        .unwrap()
        .write_all_at(bytes, at)
        .unwrap();
}
