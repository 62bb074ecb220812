//! Acting for the caller: new objects belong to who asked for them, and only then.

use crate::sys;
use rustix::process::getuid;
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
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
    /// Root, with an empty umask.
    pub const ROOT: Self = Self {
        uid: 0,
        gid: 0,
        umask: 0,
    };
}

thread_local! {
    /// Whether this thread has a umask of its own (CLONE_FS undone).
    static OWN_FS: Cell<bool> = const { Cell::new(false) };
}

/// The file system ids and umask of a [`Caller`], for as long as it lives; restored on drop.
///
/// The kernel has checked permissions on the mount already (`default_permissions`), with supplementary
/// groups that are not known here. So the capabilities that a change of fsuid drops are raised again: only
/// ownership follows the caller.
pub struct ActingAs {
    ids: bool,
}

impl ActingAs {
    /// Takes the caller's identity on the calling thread. Without root's power to change it, objects belong
    /// to the user that runs cowfs.
    pub fn new(caller: Caller) -> Self {
        OWN_FS.with(|own| {
            if !own.get() && sys::unshare_fs().is_ok() {
                own.set(true);
            }
            if own.get() {
                rustix::process::umask(rustix::fs::Mode::from_raw_mode(caller.umask));
            }
        });
        let ids = getuid().is_root() && (caller.uid != 0 || caller.gid != 0);
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
        Self { ids }
    }
}

impl Drop for ActingAs {
    fn drop(&mut self) {
        if self.ids {
            sys::set_fs_ids(0, 0);
        }
    }
}

/// The calling thread without `CAP_FSETID`, so that the backing filesystem itself clears setuid, setgid and
/// capabilities on a write or truncation, as it does for an ordinary caller (`FUSE_HANDLE_KILLPRIV_V2`).
pub struct KillPriv(());

impl KillPriv {
    /// Drops the capability when `wanted`; it comes back when the value is dropped.
    pub fn when(wanted: bool) -> Option<Self> {
        wanted.then(|| {
            change_effective(|set| set - CapabilitySet::FSETID);
            Self(())
        })
    }
}

impl Drop for KillPriv {
    fn drop(&mut self) {
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
