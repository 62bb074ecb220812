//! Open directories: listings of the live tree, of snapshots, and of the snapshot folder.

use super::Engine;
use super::attr::Attr;
use super::backing::{Call, HIDDEN};
use super::handle::OpenDir;
use super::nodes::{Node, Nodes, ObjectRef, folder_node};
use super::object::Member;
use super::view::OpenSnapshot;
use crate::error::Result;
use crate::ids::{Epoch, Ino};
use crate::store::EntryImage;
use crate::sync::{Arc, Mutex, Ordering};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{OFlags, RawDir, SeekFrom};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::mem::MaybeUninit;

/// One line of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The entry's name.
    pub name: Vec<u8>,
    /// What `d_ino` shows; equal to the `st_ino` of the entry.
    pub ino: u64,
    /// `DT_*` of readdir(3).
    pub kind: u8,
    /// Where a listing goes on after this line.
    pub next: u64,
}

/// A directory of the live tree, open.
pub struct LiveDir {
    /// The directory.
    pub object: ObjectRef,
    fd: OwnedFd,
    cursor: Mutex<Cursor>,
}

/// Where the descriptor stands, and what was read ahead of it.
#[derive(Default)]
struct Cursor {
    /// Position that `ahead` begins at.
    at: u64,
    ahead: Vec<Line>,
}

/// A directory of a snapshot, open: listed once, in the order of names, so that the order never changes (C2).
pub struct MemberDir {
    /// The directory.
    pub member: Arc<Member>,
    entries: Vec<(Vec<u8>, EntryImage)>,
    /// Keeps the snapshot from being deleted.
    snapshot: OpenSnapshot,
}

impl Engine {
    /// Opens a directory for listing.
    pub fn open_dir(&self, node: &Node) -> Result<OpenDir> {
        match node {
            Node::Live(object) => {
                let fd = self
                    .backing
                    .open_object(&object.entry, OFlags::RDONLY | OFlags::DIRECTORY)?;
                let cursor = Mutex::new(Cursor::default());
                Ok(OpenDir::Live(LiveDir {
                    object: object.clone(),
                    fd,
                    cursor,
                }))
            }
            Node::At(member) => {
                let snapshot = self.open_snapshot(member.snapshot)?;
                let listed = self.in_snapshot(member.snapshot, |k| self.list_member(k, member));
                let entries = listed?.into_iter().collect();
                Ok(OpenDir::At(MemberDir {
                    member: member.clone(),
                    entries,
                    snapshot,
                }))
            }
            Node::Folder(dir) => Ok(OpenDir::Folder(dir.clone())),
        }
    }

    /// The lines of a directory from position `offset` on (0: the beginning), as many as `take` accepts:
    /// it returns whether the line found room. Live entries come in the order of the backing filesystem.
    pub fn read_dir(
        &self,
        dir: &OpenDir,
        offset: u64,
        mut take: impl FnMut(&Line) -> Result<bool>,
    ) -> Result<()> {
        match dir {
            OpenDir::Live(live) => self.read_live_dir(live, offset, take),
            OpenDir::At(at) => {
                at.snapshot.sound()?;
                for line in member_lines(at, offset) {
                    if !take(&line)? {
                        break;
                    }
                }
                Ok(())
            }
            OpenDir::Folder(dir) => {
                for line in self.folder_lines(dir, offset)? {
                    if !take(&line)? {
                        break;
                    }
                }
                Ok(())
            }
        }
    }

    fn read_live_dir(
        &self,
        dir: &LiveDir,
        offset: u64,
        mut take: impl FnMut(&Line) -> Result<bool>,
    ) -> Result<()> {
        let mut cursor = dir.cursor.lock();
        if offset != cursor.at {
            *cursor = Cursor {
                at: offset,
                ahead: Vec::new(),
            };
        }
        loop {
            if cursor.ahead.is_empty() {
                cursor.ahead = self.fill(dir, cursor.at)?;
                if cursor.ahead.is_empty() {
                    return Ok(());
                }
            }
            let mut taken = 0;
            for line in &cursor.ahead {
                if !self.is_hidden(dir.object.ino(), &line.name) && !take(line)? {
                    break;
                }
                taken += 1;
            }
            if let Some(last) = cursor.ahead[..taken].last() {
                cursor.at = last.next;
            }
            cursor.ahead.drain(..taken);
            if !cursor.ahead.is_empty() {
                return Ok(());
            }
        }
    }

    /// Reads the next lines of a live directory from position `at` on.
    fn fill(&self, dir: &LiveDir, at: u64) -> Result<Vec<Line>> {
        self.backing.before(Call::Read)?;
        rustix::fs::seek(&dir.fd, SeekFrom::Start(at))?;
        let mut buf = [MaybeUninit::uninit(); 32 * 1024];
        let mut lines = Vec::new();
        let mut raw = RawDir::new(&dir.fd, &mut buf);
        let root = self.backing.root_entry().ino;
        while let Some(entry) = raw.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            // As in the root of any filesystem; what is above the backing directory is nobody's business.
            let out = dir.object.ino() == root && name == b"..";
            lines.push(Line {
                name: name.to_vec(),
                ino: if out { root.0 } else { entry.ino() },
                kind: kind(entry.file_type()),
                next: entry.next_entry_cookie(),
            });
            if raw.is_buffer_empty() {
                break;
            }
        }
        Ok(lines)
    }

    /// Whether a name of the live tree is not shown: the store, and what the snapshot folder stands before.
    pub(super) fn is_hidden(&self, dir: Ino, name: &[u8]) -> bool {
        dir == self.backing.root_entry().ino && (name == HIDDEN || name == self.snapshot_dir)
    }

    /// The entries of a directory as of its snapshot: live entries first, then the pre-images over them.
    /// Whatever changes in between published its pre-image before (I1).
    fn list_member(&self, k: Epoch, member: &Member) -> Result<BTreeMap<Vec<u8>, EntryImage>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let fd = self.backing.open_object(&member.entry, flags)?;
        self.backing.before(Call::Read)?;
        let mut entries = BTreeMap::new();
        let mut buf = [MaybeUninit::uninit(); 32 * 1024];
        let mut raw = RawDir::new(&fd, &mut buf);
        while let Some(entry) = raw.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." || self.is_hidden(member.entry.ino, name) {
                continue;
            }
            // The handle is looked up when the entry is: a listing needs number and kind alone.
            let image = EntryImage {
                ino: Ino(entry.ino()),
                kind: kind(entry.file_type()),
                handle: crate::store::ObjectHandle::default(),
            };
            entries.insert(name.to_vec(), image);
        }
        // I3
        for (name, was) in self.store.entries_at(member.entry.ino, k)? {
            match was {
                Some(image) => entries.insert(name, image),
                None => entries.remove(&name),
            };
        }
        Ok(entries)
    }

    /// The snapshots that show `dir`, oldest first; the position of a line is the snapshot's number.
    fn folder_lines(&self, dir: &ObjectRef, offset: u64) -> Result<Vec<Line>> {
        let mut lines = Vec::new();
        let own = folder_node(self.nodes.live_id(dir.ino()));
        for (at, name) in [(1, &b"."[..]), (2, b"..")] {
            if offset < at {
                let ino = if at == 1 { own } else { dir.ino().0 };
                lines.push(Line {
                    name: name.to_vec(),
                    ino,
                    kind: libc::DT_DIR,
                    next: at,
                });
            }
        }
        let birth = self.store.birth(dir.ino())?.unwrap_or(Epoch(0)).0;
        let from = Epoch((birth + 1).max((offset + 1).saturating_sub(2)));
        for snapshot in self.snapshots.from(from) {
            let epoch = snapshot.info.epoch;
            lines.push(Line {
                name: snapshot.info.name.clone(),
                ino: self.numbers_through(dir, &snapshot).node(epoch, dir.ino()),
                kind: libc::DT_DIR,
                next: epoch.0 + 2,
            });
        }
        Ok(lines)
    }

    /// fsync(2) of a directory: the journal first (C8).
    pub fn fsync_dir(&self, dir: &OpenDir) -> Result<()> {
        self.store.sync()?;
        match dir {
            OpenDir::Live(live) => self.backing.sync(live.fd.as_fd(), false),
            OpenDir::At(_) | OpenDir::Folder(_) => Ok(()),
        }
    }

    /// Looks an entry of a listing up, for a listing with attributes. `None` if it is gone by now. `nodes` as
    /// for [`Self::lookup_in`].
    pub fn look_up_line(&self, nodes: &Nodes, dir: &OpenDir, line: &Line) -> Result<Option<Attr>> {
        let parent = match dir {
            OpenDir::Live(live) => Node::Live(live.object.clone()),
            OpenDir::At(at) => Node::At(at.member.clone()),
            OpenDir::Folder(dir) => Node::Folder(dir.clone()),
        };
        match self.lookup_in(nodes, &parent, &line.name) {
            Ok(attr) => Ok(Some(attr)),
            Err(error) if error.errno() == Errno::NOENT => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn member_lines(dir: &MemberDir, offset: u64) -> impl Iterator<Item = Line> + '_ {
    let own = dir.member.shown();
    let up = dir.member.up.load(Ordering::Relaxed);
    let dots = [(&b"."[..], own), (b"..", up)]
        .into_iter()
        .map(|(name, ino)| (name, ino, libc::DT_DIR));
    let entries = dir.entries.iter().map(|(name, entry)| {
        let node = dir.member.node_of(entry.ino);
        (name.as_slice(), node, entry.kind)
    });
    dots.chain(entries)
        .zip(1..)
        .skip(offset as usize)
        .map(|((name, ino, kind), next)| Line {
            name: name.to_vec(),
            ino,
            kind,
            next,
        })
}

fn kind(file_type: rustix::fs::FileType) -> u8 {
    match file_type {
        rustix::fs::FileType::Unknown => libc::DT_UNKNOWN,
        known => super::backing::kind_of_mode(known.as_raw_mode()),
    }
}
