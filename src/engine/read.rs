//! Reads of a view: bytes, holes, links.
//!
//! A snapshot's reader looks the pre-image up, else reads the live value, then looks up again: an operation
//! publishes its pre-image before it changes the live value (I1), so the second look catches any race.

use super::Engine;
use super::handle::{MemberFile, OpenFile};
use super::nodes::Node;
use super::object::{Member, Object};
use super::times::with_owed;
use crate::error::{Error, Result};
use crate::ids::{BLOCK, CHUNK, CHUNK_BLOCKS, Epoch, Ino};
use crate::store::{AttrImage, ExtentRef};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;

/// What a descriptor answers that reads nothing: all of the file is among the pre-images
/// ([`Engine::open_file`]).
const UNREADABLE: Errno = Errno::BADF;

/// A read of so many bytes costs more than a look for pre-images.
const LARGE: usize = 64 << 10;

impl Engine {
    /// Reads until `buf` is full or the file ends; returns the bytes read.
    pub fn read(&self, file: &OpenFile, offset: u64, buf: &mut [u8]) -> Result<usize> {
        match file {
            OpenFile::Live(live) => self.backing.read(live.fd(), offset, buf),
            OpenFile::At(at) => {
                let read = self.read_member(at, offset, buf);
                at.snapshot.sound()?; // I3
                read
            }
        }
    }

    /// As [`Self::read`], but `None` where that might have to wait for a disk.
    pub fn read_cached(
        &self,
        file: &OpenFile,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<Option<usize>> {
        let at = match file {
            OpenFile::Live(live) => return self.backing.read_cached(live.fd(), offset, buf),
            OpenFile::At(at) => at,
        };
        let read = self.read_member_cached(at, offset, buf);
        at.snapshot.sound()?; // I3
        read
    }

    fn read_member_cached(
        &self,
        at: &MemberFile,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<Option<usize>> {
        let (k, fd) = (at.snapshot.epoch, at.fd.as_fd());
        let size = self.member_stat(k, &at.member, Some(fd))?.size;
        let len = size.saturating_sub(offset).min(buf.len() as u64) as usize;
        if len == 0 {
            return Ok(Some(0));
        }
        let (first, last) = (offset / CHUNK, (offset + len as u64 - 1) / CHUNK);
        let has_pre_images = || -> Result<bool> {
            let ino = at.member.entry.ino;
            let kept = self.store.next_extent_chunk(ino, k, first)?;
            Ok(kept.is_some_and(|chunk| chunk <= last))
        };
        // The long way reads again what is read here.
        if len >= LARGE && has_pre_images()? {
            return Ok(None);
        }
        let n = match self.backing.read_cached(fd, offset, &mut buf[..len]) {
            Ok(Some(n)) => n,
            Ok(None) | Err(Error::Os(UNREADABLE)) => return Ok(None),
            Err(error) => return Err(error),
        };
        buf[n..len].fill(0);
        // I3: looked up after the live bytes. Any pre-image: the long way.
        Ok((!has_pre_images()?).then_some(len))
    }

    fn read_member(&self, file: &MemberFile, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let (k, ino) = (file.snapshot.epoch, file.member.entry.ino);
        let size = self
            .member_stat(k, &file.member, Some(file.fd.as_fd()))?
            .size;
        let len = size.saturating_sub(offset).min(buf.len() as u64) as usize;
        let buf = &mut buf[..len];
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let n = (CHUNK - at % CHUNK).min((len - done) as u64) as usize;
            self.read_in_chunk(k, ino, file.fd.as_fd(), at, &mut buf[done..done + n])?;
            done += n;
        }
        Ok(len)
    }

    /// Reads a range within one chunk of an object as of snapshot `k`.
    fn read_in_chunk(
        &self,
        k: Epoch,
        ino: Ino,
        fd: BorrowedFd<'_>,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<()> {
        let chunk = offset / CHUNK;
        let end = offset + buf.len() as u64;
        let block = |at: u64| (at / BLOCK as u64) as usize;
        let blocks = block(offset % CHUNK)..block(end - chunk * CHUNK + BLOCK as u64 - 1);
        let extents = self.store.extents_within(ino, k, chunk, blocks.clone())?;
        if !covers(&extents, offset, end) {
            let n = self.backing.read(fd, offset, buf)?;
            buf[n..].fill(0);
            let extents = self.store.extents_within(ino, k, chunk, blocks)?; // I3
            return self.overlay(&extents, offset, buf);
        }
        self.overlay(&extents, offset, buf)
    }

    /// Puts the bytes of pre-images over `buf`, which stands for the file from `offset` on.
    fn overlay(&self, extents: &[ExtentRef], offset: u64, buf: &mut [u8]) -> Result<()> {
        let block = BLOCK as u64;
        let end = offset + buf.len() as u64;
        let mut scratch = Vec::new();
        for extent in extents {
            let from = offset.max(extent.first_block * block);
            let to = end.min((extent.first_block + u64::from(extent.blocks)) * block);
            if from >= to {
                continue;
            }
            let into = &mut buf[(from - offset) as usize..(to - offset) as usize];
            if extent.is_hole() {
                into.fill(0);
                continue;
            }
            let first = from / block;
            let whole = (to.div_ceil(block) - first) * block;
            scratch.resize(whole as usize, 0);
            let skip = (first - extent.first_block) as u16;
            self.store.read_extent(extent, skip, &mut scratch)?;
            let at = (from - first * block) as usize;
            into.copy_from_slice(&scratch[at..at + into.len()]);
        }
        Ok(())
    }

    /// lseek(2) with `SEEK_DATA` or `SEEK_HOLE`. `ENXIO` past the end of the file, or of its data.
    pub fn seek(&self, file: &OpenFile, offset: u64, hole: bool) -> Result<u64> {
        match file {
            OpenFile::Live(live) => self
                .backing
                .seek(live.fd(), offset, hole)?
                .ok_or(Error::Os(Errno::NXIO)),
            OpenFile::At(at) => {
                let found = self.seek_member(at, offset, hole);
                at.snapshot.sound()?; // I3
                found
            }
        }
    }

    fn seek_member(&self, file: &MemberFile, offset: u64, hole: bool) -> Result<u64> {
        let size = self
            .member_stat(file.snapshot.epoch, &file.member, Some(file.fd.as_fd()))?
            .size;
        if offset >= size {
            return Err(Errno::NXIO.into());
        }
        let mut at = offset;
        while at < size {
            let end = ((at / CHUNK + 1) * CHUNK).min(size);
            for (start, piece_end, data) in self.map_in_chunk(file, at, end)? {
                if data != hole && piece_end > at {
                    return Ok(start.max(offset));
                }
            }
            at = self.skip_untouched(file, end, size, hole)?;
        }
        if hole {
            Ok(size)
        } else {
            Err(Errno::NXIO.into())
        }
    }

    /// Leaps over chunks without pre-images, as far as the live file has nothing to find there.
    fn skip_untouched(&self, file: &MemberFile, at: u64, size: u64, hole: bool) -> Result<u64> {
        let ino = file.member.entry.ino;
        let live = match self.backing.seek(file.fd.as_fd(), at, hole) {
            Err(Error::Os(UNREADABLE)) => None,
            other => other?,
        };
        // Past the end of the live file is what a change that makes holes found as a hole and did not keep.
        let live = live.unwrap_or(if hole { at } else { size }).min(size);
        if at + CHUNK > live {
            return Ok(at);
        }
        let kept = self
            .store
            .next_extent_chunk(ino, file.snapshot.epoch, at / CHUNK)?;
        Ok(match kept {
            Some(chunk) if chunk * CHUNK < live => (chunk * CHUNK).max(at),
            _ => live / CHUNK * CHUNK,
        })
    }

    /// Data and holes of `from..to`, within one chunk, as of the snapshot.
    fn map_in_chunk(&self, file: &MemberFile, from: u64, to: u64) -> Result<Vec<(u64, u64, bool)>> {
        let fd = file.fd.as_fd();
        let live = match super::backing::data_map(&self.backing, fd, from, to) {
            Err(Error::Os(UNREADABLE)) => vec![(from, to, false)],
            other => other?,
        };
        let extents =
            self.store
                .extents_at(file.member.entry.ino, file.snapshot.epoch, from / CHUNK)?;
        let block = BLOCK as u64;
        let mut pieces: Vec<(u64, u64, bool)> = Vec::new();
        let mut push = |start: u64, end: u64, data: bool| match pieces.last_mut() {
            _ if start >= end => {}
            Some(last) if last.2 == data => last.1 = end,
            _ => pieces.push((start, end, data)),
        };
        let mut at = from;
        for extent in &extents {
            let start = (extent.first_block * block).clamp(from, to);
            let end = ((extent.first_block + u64::from(extent.blocks)) * block).clamp(from, to);
            for &(a, b, data) in &live {
                push(a.max(at), b.min(start), data);
            }
            push(start, end, !extent.is_hole());
            at = at.max(end);
        }
        for &(a, b, data) in &live {
            push(a.max(at), b.min(to), data);
        }
        Ok(pieces)
    }

    /// The target of a symlink. A symlink's target never changes, so the live object has it for every view.
    pub fn read_link(&self, node: &Node) -> Result<Vec<u8>> {
        let keeps_atime = self.backing.keeps_atime();
        match node {
            Node::Live(object) => {
                let fd = self.object_fd(object)?;
                match keeps_atime {
                    true => self.backing.read_link(fd.as_fd()),
                    false => self.read_link_of(object, fd.as_fd()),
                }
            }
            Node::At(member) => self.in_snapshot(member.snapshot, |_| {
                let entry = &member.entry;
                if keeps_atime {
                    return self.backing.read_link(self.backing.path_fd(entry)?.as_fd());
                }
                let held = self.backing.hold(entry)?;
                self.read_link_of(&self.nodes.object(entry, None), held.as_fd())
            }),
            Node::Folder(_) => Err(Errno::INVAL.into()),
        }
    }

    /// Reads a link whose access time changes with that: no flag prevents it.
    fn read_link_of(&self, object: &Object, fd: BorrowedFd<'_>) -> Result<Vec<u8>> {
        self.with_room(0, || {
            let mut op = self.begin(&[object]);
            op.keep_attr(object)?;
            op.settle()?; // I1
            self.backing.read_link(fd)
        })
    }

    /// Stat fields of an object as of snapshot `k`. `fd`: one of the live object, if there is one open.
    pub(super) fn member_stat(
        &self,
        k: Epoch,
        member: &Member,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<AttrImage> {
        self.member_image(k, member.entry.ino, || match fd {
            Some(fd) => self.backing.stat(fd),
            None => self
                .backing
                .stat(self.backing.path_fd(&member.entry)?.as_fd()),
        })
    }

    /// Stat fields and extended attributes of an object as of snapshot `k`.
    pub(super) fn member_attr(&self, k: Epoch, member: &Member) -> Result<AttrImage> {
        self.member_image(k, member.entry.ino, || {
            self.backing
                .full_attr(self.backing.path_fd(&member.entry)?.as_fd())
        })
    }

    /// The pre-image of an object's attributes, or what `live` finds if there is none before nor after.
    fn member_image(
        &self,
        k: Epoch,
        ino: Ino,
        live: impl FnOnce() -> Result<AttrImage>,
    ) -> Result<AttrImage> {
        if let Some((_, image)) = self.store.attr_at(ino, k)? {
            return Ok(image);
        }
        let owed = self.times.owed(ino);
        let live = live().map(|image| with_owed(owed, image));
        // I3
        match self.store.attr_at(ino, k)? {
            Some((_, image)) => Ok(image),
            None => live,
        }
    }
}

/// Whether `extents`, sorted, leave no gap in `from..to`.
fn covers(extents: &[ExtentRef], from: u64, to: u64) -> bool {
    let (mut at, last) = (from / BLOCK as u64, to.div_ceil(BLOCK as u64));
    for extent in extents {
        if extent.first_block > at {
            break;
        }
        at = at.max(extent.first_block + u64::from(extent.blocks));
    }
    at >= last
}

const _: () = assert!(CHUNK == CHUNK_BLOCKS * BLOCK as u64);
