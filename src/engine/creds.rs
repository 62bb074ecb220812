//! Acting for the caller: new objects belong to who asked for them, and only then.

use crate::sync::LazyLock;
use crate::sys;
use rustix::fs::Mode;
use rustix::process::{Gid, getegid, getuid};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities, set_thread_groups};
use std::cell::Cell;

/// Who asked for an operation, and the umask that goes with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// User that new objects belong to.
    pub uid: u32,
    /// Group that new objects belong to, unless the directory hands down its own.
    pub gid: u32,
    /// File mode creation mask, applied unless the directory has a default ACL (acl(5)).
    pub umask: u32,
}

impl Caller {
    /// Whether a new object that came to belong to `group` should belong to the caller's group instead: without
    /// root's powers cowfs could not take the caller's identity to make it.
    pub fn wants_group(&self, group: u32) -> bool {
        !is_root() && group == getegid().as_raw() && self.gid != group
    }

    /// Root, with an empty umask.
    pub const ROOT: Self = Self {
        uid: 0,
        gid: 0,
        umask: 0,
    };
}

/// A caller without `CAP_FSETID`: what it changes of a file's content clears setuid, setgid and capabilities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unprivileged {
    /// The process.
    pub pid: u32,
    /// Its group; the others are in /proc.
    pub gid: u32,
}

impl Unprivileged {
    /// Whether the caller belongs to `group`. Its supplementary groups do not come with the request, so they are
    /// looked up; a caller that cannot be seen counts as no member.
    #[must_use]
    pub fn is_member(self, group: u32) -> bool {
        let listed = || {
            let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
            let groups = status
                .lines()
                .find_map(|line| line.strip_prefix("Groups:"))?;
            Some(groups.split_whitespace().any(|id| id.parse() == Ok(group)))
        };
        self.gid == group || listed().unwrap_or(false)
    }
}

thread_local! {
    /// Whether this thread has a umask of its own (CLONE_FS undone).
    static OWN_UMASK: Cell<bool> = const { Cell::new(false) };
}

/// Whether cowfs runs as root, whose powers it needs to act for others.
fn is_root() -> bool {
    static ROOT: LazyLock<bool> = LazyLock::new(|| getuid().is_root());
    *ROOT
}

/// The file system ids and umask of a [`Caller`], for as long as it lives; restored on drop.
///
/// The kernel has checked permissions on the mount already (`default_permissions`), with supplementary
/// groups that are not known here. So the capabilities that a change of fsuid drops are raised again: only
/// ownership follows the caller.
pub struct ActingAs {
    ids: bool,
    /// The thread's own umask, for what cowfs makes for itself.
    umask: Option<Mode>,
    /// What the thread's umask could not be made to take away.
    masked: u32,
}

impl ActingAs {
    /// Takes the caller's identity on the calling thread. Without root's power to change it, objects belong
    /// to the user that runs cowfs.
    pub fn new(caller: Caller) -> Self {
        let alone = OWN_UMASK.with(|own| {
            own.set(own.get() || sys::unshare_fs().is_ok());
            own.get()
        });
        let umask = alone.then(|| rustix::process::umask(Mode::from_raw_mode(caller.umask)));
        if !alone {
            // What comes on top of what `mode` takes away would be one too many.
            rustix::process::umask(Mode::empty());
        }
        let ids = is_root() && (caller.uid != 0 || caller.gid != 0);
        if ids {
            sys::set_fs_ids(caller.uid, caller.gid);
            change_effective(|set| {
                set | CapabilitySet::DAC_OVERRIDE
                    | CapabilitySet::DAC_READ_SEARCH
                    | CapabilitySet::FOWNER
                    | CapabilitySet::FSETID
                    | CapabilitySet::MKNOD
            });
        }
        let masked = if alone { 0 } else { caller.umask };
        Self { ids, umask, masked }
    }

    /// The mode to make something with. Where a thread cannot have a umask of its own (a container may forbid unshare(2)),
    /// the caller's is taken from it here, though a directory with a default ACL asks for it not to be.
    pub fn mode(&self, mode: u32) -> u32 {
        mode & !self.masked
    }
}

impl Drop for ActingAs {
    fn drop(&mut self) {
        if let Some(own) = self.umask {
            rustix::process::umask(own);
        }
        if self.ids {
            sys::set_fs_ids(0, 0);
        }
    }
}

/// The calling thread without `CAP_FSETID`, so that the backing filesystem itself clears setuid, setgid and
/// capabilities on a write or truncation, as it does for an ordinary caller (`FUSE_HANDLE_KILLPRIV_V2`).
pub struct KillPriv {
    /// The thread has taken another group.
    ids: bool,
    /// It has taken supplementary groups.
    groups: bool,
}

impl KillPriv {
    /// For a change by `caller` to a file of that mode, whose group is, or is going to be, one of `groups`. Of a setgid bit without
    /// permission for the group to execute, the backing filesystem asks whether the caller is of the group: if so
    /// it stays (`setattr_should_drop_sgid` of the kernel's fs/attr.c). So the thread takes the group of a caller
    /// who has it, and else the caller's own: root's is no better than another.
    pub fn of(caller: Unprivileged, mode: u32, groups: &[u32]) -> Self {
        change_effective(|set| set - CapabilitySet::FSETID);
        let asks = mode & (libc::S_ISGID | libc::S_IXGRP) == libc::S_ISGID;
        let ids = asks && is_root();
        let mut of_caller = Vec::new();
        if ids {
            let members = groups.iter().filter(|group| caller.is_member(**group));
            of_caller.extend(members.map(|group| Gid::from_raw(*group)));
            of_caller.dedup();
            let first = of_caller.first().map_or(caller.gid, |gid| gid.as_raw());
            sys::set_fs_ids(0, first);
        }
        // Where a user namespace forbids it the bit goes, which is the safe side.
        let groups = of_caller.len() > 1 && set_thread_groups(&of_caller).is_ok();
        Self { ids, groups }
    }
}

impl Drop for KillPriv {
    fn drop(&mut self) {
        if self.ids {
            sys::set_fs_ids(0, 0);
        }
        if self.groups
            && let Err(errno) = set_thread_groups(&[])
        {
            log::warn!("setgroups: {errno}");
        }
        change_effective(|set| set | CapabilitySet::FSETID);
    }
}

/// Applies `change` to the effective capabilities, within what is permitted. Without the power to do so the
/// thread keeps what it has, which is what a caller without privilege expects.
fn change_effective(change: impl Fn(CapabilitySet) -> CapabilitySet) {
    if let Ok(mut sets) = capabilities(None) {
        sets.effective = change(sets.effective) & sets.permitted;
        if let Err(errno) = set_capabilities(None, sets) {
            log::debug!("capset: {errno}");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use super::*;

    /// What a thread makes for cowfs itself after it has acted for somebody is as open as before.
    #[test]
    fn a_callers_umask_ends_with_what_is_done_for_the_caller() {
        let own = || {
            let own = rustix::process::umask(Mode::RWXU);
            rustix::process::umask(own);
            own
        };
        let acting = move || {
            assert!(sys::unshare_fs().is_ok(), "so that other tests keep theirs");
            let before = own();
            let caller = Caller {
                umask: 0o777,
                ..Caller::ROOT
            };
            let acting = ActingAs::new(caller);
            assert_eq!(own(), Mode::RWXU | Mode::RWXG | Mode::RWXO);
            drop(acting);
            assert_eq!(own(), before);
        };
        std::thread::spawn(acting).join().unwrap();
    }
}
