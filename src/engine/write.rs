//! The write path: write, truncate, fallocate, copy. Each keeps what it is about to change, settles, applies.

use super::Engine;
use super::creds::{KillPriv, Unprivileged};
use super::handle::{LiveFile, OpenFile};
use super::keep::{Op, Range};
use super::object::{Object, SET_ID};
use crate::error::{Error, Result};
use crate::planted::{self, Bug};
use crate::sync::Ordering;
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;

/// One copy_file_range request moves no more than this, so that a cut never waits long for one (C3); the
/// caller comes again for the rest.
const COPY_LIMIT: u64 = 4 << 20;

impl Engine {
    /// Writes `data` at `offset`: one operation of C1, wholly in a snapshot or wholly out.
    ///
    /// `caller`: one who lacks `CAP_FSETID`, whose write clears setuid, setgid and capabilities. `all`: what finds room for
    /// a part only is an error. That is for what the kernel has held back: it takes no answer for a part
    /// (`fuse_writepage_end` of fs/fuse/file.c), and would lose the rest without a word.
    pub fn write(
        &self,
        file: &LiveFile,
        offset: u64,
        data: &[u8],
        caller: Option<Unprivileged>,
        all: bool,
    ) -> Result<usize> {
        self.with_room(data.len() as u64, || {
            let (op, range) = self.begin_write(file, offset, data)?;
            self.finish_data(op, &file.object, file.fd(), &range, || {
                self.put(file, offset, data, caller, all)
            })
        })
    }

    /// As [`Self::write`], but `None` where that would have to wait, for the journal
    /// (strict durability) or for what is given up on a full disk; the same write, done over, will go on from there.
    pub fn try_write(
        &self,
        file: &LiveFile,
        offset: u64,
        data: &[u8],
        caller: Option<Unprivileged>,
        all: bool,
    ) -> Result<Option<usize>> {
        let write = || {
            let (mut op, range) = self.begin_write(file, offset, data)?;
            op.keep_data(&file.object, file.fd(), &range)?;
            if op.must_wait() {
                return Ok(None);
            }
            op.settle()?;
            self.put(file, offset, data, caller, all).map(Some) // I1
        };
        match write() {
            Err(error) if error.is_full() && self.gives_way() => Ok(None),
            done => done,
        }
    }

    fn begin_write<'a>(
        &'a self,
        file: &'a LiveFile,
        offset: u64,
        data: &[u8],
    ) -> Result<(Op<'a>, Range)> {
        let end = offset.checked_add(data.len() as u64);
        let range = Range::new(offset, end.ok_or(Error::Os(Errno::FBIG))?);
        Ok((self.begin(&[&file.object]), range))
    }

    fn put(
        &self,
        file: &LiveFile,
        offset: u64,
        data: &[u8],
        caller: Option<Unprivileged>,
        all: bool,
    ) -> Result<usize> {
        self.for_caller(&file.object, file.fd(), caller, || {
            let mut done = self.backing.write(file.fd(), offset, data)?;
            while all && done < data.len() {
                let at = offset + done as u64;
                done += self.backing.write(file.fd(), at, &data[done..])?;
            }
            Ok(done)
        })
    }

    /// What `O_SYNC` and `O_DSYNC` ask for after a write: the journal first, then the file that it guards (C8).
    pub fn sync_write(&self, file: &LiveFile) -> Result<()> {
        match file.sync_each_write {
            None => Ok(()),
            Some(data_only) => self.fsync(file, data_only),
        }
    }

    /// Sets the size of a file through a descriptor opened for writing.
    pub fn truncate(
        &self,
        object: &Object,
        fd: BorrowedFd<'_>,
        size: u64,
        caller: Option<Unprivileged>,
    ) -> Result<()> {
        self.change_data(object, fd, &Range::from_size(size), 0, || {
            self.for_caller(object, fd, caller, || self.backing.truncate(fd, size))
        })
    }

    /// fallocate(2), in every mode that the backing filesystem has.
    pub fn fallocate(
        &self,
        file: &LiveFile,
        mode: i32,
        offset: u64,
        len: u64,
        caller: Option<Unprivileged>,
    ) -> Result<()> {
        let end = offset.checked_add(len).ok_or(Error::Os(Errno::FBIG))?;
        let shifts = mode & (libc::FALLOC_FL_COLLAPSE_RANGE | libc::FALLOC_FL_INSERT_RANGE) != 0;
        let clears = mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0;
        let punches = mode & libc::FALLOC_FL_PUNCH_HOLE != 0;
        let range = match (shifts, clears) {
            (true, _) => Range::new(offset, u64::MAX),
            (false, true) if punches => Range::punched(offset, end),
            (false, true) => Range::new(offset, end),
            // Mere allocation changes no byte. But it may move the end of the file, and the blocks in which the
            // file ends before and after may be filled with zeros then.
            (false, false) => Range::new(end.saturating_sub(1), end),
        };
        let wanted = if punches { 0 } else { len };
        self.change_data(&file.object, file.fd(), &range, wanted, || {
            self.for_caller(&file.object, file.fd(), caller, || {
                // A kernel that holds writes back goes by the size that it knows, also if this fails half-way.
                let held = !shifts && self.barrier.read().is_some();
                let before = held.then(|| self.backing.stat(file.fd())).transpose()?;
                let done = self.backing.fallocate(file.fd(), mode, offset, len);
                if let (Err(_), Some(before)) = (&done, before)
                    && self.backing.stat(file.fd())?.size != before.size
                {
                    self.backing.truncate(file.fd(), before.size)?;
                }
                done
            })
        })
    }

    /// Copies between two open files of the mount; the source may be in a snapshot. Returns the bytes copied,
    /// which may be fewer than asked for (copy_file_range(2)).
    pub fn copy_range(
        &self,
        from: &OpenFile,
        from_offset: u64,
        to: &LiveFile,
        to_offset: u64,
        len: u64,
        caller: Option<Unprivileged>,
    ) -> Result<usize> {
        let mut buf = vec![0; len.min(COPY_LIMIT) as usize];
        let n = self.read(from, from_offset, &mut buf)?;
        if n == 0 {
            Ok(0)
        } else {
            self.write(to, to_offset, &buf[..n], caller, false)
        }
    }

    /// Applies a change of a file's content on behalf of `caller`: of one who lacks `CAP_FSETID`, or of any other
    /// (`None`). Tells the listener when setuid or setgid may have gone with it: the kernel expects a write to
    /// change times and size only.
    pub(super) fn for_caller<T>(
        &self,
        object: &Object,
        fd: BorrowedFd<'_>,
        caller: Option<Unprivileged>,
        apply: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let done = match caller {
            None => apply()?,
            Some(caller) => self.without_fsetid(object, fd, caller, apply)?,
        };
        self.times.note_write(object.ino());
        Ok(done)
    }

    fn without_fsetid<T>(
        &self,
        object: &Object,
        fd: BorrowedFd<'_>,
        caller: Unprivileged,
        apply: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        // Capabilities of the file go with any change of its content, whoever makes it (`dentry_needs_remove_privs` of the
        // kernel's fs/inode.c).
        if object.without_set_id.load(Ordering::SeqCst) {
            return apply();
        }
        let before = self.backing.stat(fd)?;
        if before.mode & SET_ID == 0 {
            object.without_set_id.store(true, Ordering::SeqCst);
            return apply();
        }
        let done = {
            let _killing = KillPriv::of(caller, before.mode, &[before.gid]);
            apply()?
        };
        self.tell_listener(self.nodes.live_id(object.ino()));
        Ok(done)
    }

    /// The one way to change bytes of a file: lock, enter the epoch, keep `range`, settle, `apply`.
    /// `wanted`: the space that it may take.
    fn change_data<T>(
        &self,
        object: &Object,
        fd: BorrowedFd<'_>,
        range: &Range,
        wanted: u64,
        mut apply: impl FnMut() -> Result<T>,
    ) -> Result<T> {
        self.with_room(wanted, || {
            self.finish_data(self.begin(&[object]), object, fd, range, &mut apply)
        })
    }

    fn finish_data<T>(
        &self,
        mut op: Op<'_>,
        object: &Object,
        fd: BorrowedFd<'_>,
        range: &Range,
        apply: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        if planted::has(Bug::ApplyBeforeJournal) {
            let done = apply()?;
            op.keep_data(object, fd, range)?;
            return Ok(done);
        }
        op.keep_data(object, fd, range)?;
        op.settle()?;
        apply() // I1
    }
}

impl LiveFile {
    /// Its descriptor on the backing filesystem.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
