//! rename(2) and what it replaces.

use super::check_there;
use super::remove::unpin;
use crate::engine::Engine;
use crate::engine::creds::{ActingAs, Caller};
use crate::engine::keep::Op;
use crate::engine::nodes::{Node, ObjectRef};
use crate::engine::object::Object;
use crate::error::Result;
use rustix::fd::AsFd;
use rustix::fs::RenameFlags;
use rustix::io::Errno;

impl Engine {
    /// renameat2(2) with the flags that it has. `caller`: to whom a whiteout belongs.
    pub fn rename(
        &self,
        from: (&Node, &[u8]),
        to: (&Node, &[u8]),
        flags: RenameFlags,
        caller: Caller,
    ) -> Result<()> {
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        let both = RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        if !known.contains(flags) || flags.contains(both) {
            return Err(Errno::INVAL.into());
        }
        let (from_dir, to_dir) = (
            self.writable_dir(from.0, from.1)?,
            self.writable_dir(to.0, to.1)?,
        );
        let how = How { flags, caller };
        self.with_room_to_remove(|| self.rename_from((&from_dir, from.1), (&to_dir, to.1), how))
    }

    fn rename_from(
        &self,
        (from_dir, from): (&ObjectRef, &[u8]),
        (to_dir, to): (&ObjectRef, &[u8]),
        how: How,
    ) -> Result<()> {
        loop {
            let before = [from_dir.changes(), to_dir.changes()];
            let moved = self
                .find_live(from_dir, from)?
                .ok_or_else(|| self.absent(from))?;
            let moved = self.object(&moved.entry, None)?;
            let target = self
                .find_live(to_dir, to)?
                .map(|found| self.object(&found.entry, None))
                .transpose()?;
            let places = Places {
                from_dir,
                from,
                to_dir,
                to,
                moved: &moved,
                target: target.as_ref(),
                before,
                how,
            };
            if self.rename_objects(&places)? {
                return Ok(());
            }
        }
    }

    /// One try; false if a name meant something else once the locks were held.
    fn rename_objects(&self, at: &Places<'_>) -> Result<bool> {
        let (moved, target, flags) = (at.moved, at.target, at.how.flags);
        let mut objects: Vec<&Object> = vec![at.from_dir, at.to_dir, moved];
        objects.extend(target.map(|target| &**target));
        let mut op = self.begin(&objects);
        op.removes();
        check_there(at.to_dir)?;
        let unchanged =
            op.unchanged(at.from_dir, at.before[0])? && op.unchanged(at.to_dir, at.before[1])?;
        if !unchanged && !self.still_hold(at)? {
            return Ok(false);
        }
        if let Some(target) = target {
            if flags.contains(RenameFlags::NOREPLACE) {
                return Err(Errno::EXIST.into());
            }
            if target.ino() == moved.ino() {
                return Ok(true); // two names of one object: rename(2) does nothing
            }
            if !flags.contains(RenameFlags::EXCHANGE) {
                check_replaces(moved, target)?;
                self.check_empty(target)?;
            }
        } else if flags.contains(RenameFlags::EXCHANGE) {
            return Err(Errno::NOENT.into());
        }
        let whiteout_in = match at.how.whiteout().is_empty() {
            true => None,
            false => Some(self.object_fd(at.from_dir)?),
        };
        op.keep_entry(at.from_dir, at.from)?;
        op.keep_entry(at.to_dir, at.to)?;
        for object in objects {
            op.keep_attr(object)?;
        }
        match target {
            Some(target) if !flags.contains(RenameFlags::EXCHANGE) => {
                self.replace(&mut op, at, target)?;
            }
            _ => {
                op.settle()?;
                self.move_name(at, flags)?; // I1
            }
        }
        if let Some(dir) = whiteout_in {
            // The rename is done, and must not be told to have failed, nor tried again. A whiteout that is not taken up
            // counts as old: more is kept of it than need be.
            let taken = self.adopt(&mut op, at.from_dir, dir.as_fd(), at.from, at.how.caller);
            if let Err(error) = taken {
                log::warn!("a whiteout is not taken up: {error}");
            }
        }
        Ok(true)
    }

    /// Whether both names still mean what was locked.
    fn still_hold(&self, at: &Places<'_>) -> Result<bool> {
        let target_holds = match at.target {
            Some(target) => self.means(at.to_dir, at.to, target)?,
            None => self.find_live(at.to_dir, at.to)?.is_none(),
        };
        Ok(target_holds && self.means(at.from_dir, at.from, at.moved)?)
    }

    fn move_name(&self, at: &Places<'_>, flags: RenameFlags) -> Result<()> {
        let from = self.object_fd(at.from_dir)?;
        let to = self.object_fd(at.to_dir)?;
        let acting = at.how.acting();
        self.backing
            .rename((from.as_fd(), at.from), (to.as_fd(), at.to), flags)?;
        drop(acting);
        self.backing
            .note_place(at.to_dir.ino(), at.to, at.moved.ino());
        match at.target {
            Some(target) if flags.contains(RenameFlags::EXCHANGE) => {
                let (dir, name) = (at.from_dir.ino(), at.from);
                self.backing.note_place(dir, name, target.ino());
            }
            Some(target) => {
                self.backing
                    .forget_place(at.to_dir.ino(), at.to, target.ino(), !target.is_dir())
            }
            None => {}
        }
        Ok(())
    }

    /// Renames over `target`. One that has to be retained gets a second link there first, so that the
    /// replacement itself stays one atomic step; a directory, which can have no second link, changes places
    /// with its successor and is moved away from there, and recovery finishes that if a crash comes between.
    fn replace(&self, op: &mut Op<'_>, at: &Places<'_>, target: &ObjectRef) -> Result<()> {
        let directory = target.is_dir();
        let origin = directory.then_some((at.from_dir, at.from));
        let last = self.last_name(target, directory)?;
        let whiteout = !at.how.whiteout().is_empty();
        let retain = last && op.retain(target, origin, whiteout)?;
        if !retain {
            op.settle()?;
            self.pin(target, last)?;
            let done = match last && self.must_outlive(target) {
                true => self.replace_open(at, target),
                false => self.move_name(at, at.how.whiteout()),
            };
            done.inspect_err(|_| unpin(target, last))?;
            if last {
                self.unsettled.forget(target.ino());
                op.note_removed(at.to_dir, target)?;
            }
            return Ok(());
        }
        let done = op.settle().and_then(|()| match directory {
            true => self.replace_directory(at, target),
            false => self.replace_file(at, target),
        });
        done.map_err(|error| self.unretain(target, error))?;
        self.note_retained(target);
        op.note_removed(at.to_dir, target)
    }

    fn replace_directory(&self, at: &Places<'_>, target: &Object) -> Result<()> {
        self.move_name(at, RenameFlags::EXCHANGE)?;
        let from = self.object_fd(at.from_dir)?;
        let acting = at.how.acting();
        let moved = self
            .backing
            .retain(from.as_fd(), at.from, target.ino(), at.how.whiteout());
        drop(acting);
        if moved.is_err() {
            self.move_name(at, RenameFlags::EXCHANGE)?;
        }
        moved
    }

    /// Renames over a file that is open and that no snapshot shows.
    fn replace_open(&self, at: &Places<'_>, target: &ObjectRef) -> Result<()> {
        let fd = self.object_fd(target)?;
        self.backing.orphan_link(fd.as_fd(), target.ino())?;
        let moved = self.move_name(at, at.how.whiteout());
        match moved {
            Ok(()) => self.orphaned(target),
            Err(_) => self.backing.release_orphan(target.ino())?,
        }
        moved
    }

    fn replace_file(&self, at: &Places<'_>, target: &Object) -> Result<()> {
        let fd = self.object_fd(target)?;
        self.backing.retain_link(fd.as_fd(), target.ino())?;
        let moved = self.move_name(at, at.how.whiteout());
        if moved.is_err() {
            self.backing.release_retained(target.ino(), false)?;
        }
        moved
    }
}

/// The two names of a rename, and what they mean.
struct Places<'a> {
    from_dir: &'a Object,
    from: &'a [u8],
    to_dir: &'a Object,
    to: &'a [u8],
    moved: &'a ObjectRef,
    target: Option<&'a ObjectRef>,
    /// How often names in the two directories had changed before these were looked up.
    before: [u64; 2],
    how: How,
}

/// What is asked of a rename besides.
#[derive(Clone, Copy)]
struct How {
    flags: RenameFlags,
    caller: Caller,
}

impl How {
    /// `RENAME_WHITEOUT` if a character device 0:0 is to stand where the moved name was, as overlayfs needs it.
    fn whiteout(self) -> RenameFlags {
        self.flags & RenameFlags::WHITEOUT
    }

    /// The identity for the call that makes the whiteout.
    fn acting(self) -> Option<ActingAs> {
        (!self.whiteout().is_empty()).then(|| ActingAs::new(self.caller))
    }
}

/// rename(2): a directory replaces only a directory, and nothing else replaces one.
fn check_replaces(moved: &Object, target: &Object) -> Result<()> {
    match (moved.is_dir(), target.is_dir()) {
        (true, false) => Err(Errno::NOTDIR.into()),
        (false, true) => Err(Errno::ISDIR.into()),
        _ => Ok(()),
    }
}
