//! What the daemon inherits of whoever mounts, and should not have: limits of resources (getrlimit(2)) and groups.

use crate::sync::{Arc, AtomicBool};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::SIGXFSZ;

/// Each file that a user has open costs the daemon a descriptor: so many it asks for, if it may have more than it was given.
const FILES: u64 = 1 << 20;

/// Raises what can be raised. How large a file may get is a matter of who writes to the mount, whose own limit the kernel
/// applies; where the daemon's stays, a write past it fails with `EFBIG` and does not end the daemon.
pub fn raise() {
    let own = getrlimit(Resource::Nofile).maximum;
    raise_to(Resource::Nofile, own.map(|own| own.max(FILES)));
    raise_to(Resource::Fsize, None);
    // With a handler the signal is no death; the flag is nobody's.
    if let Err(error) = signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false))) {
        log::warn!("files that grow past the limit of the daemon may end it: {error}");
    }
}

/// Has root be in no group but its own: of a set-group-ID bit the backing filesystem asks whether who changes the file is of its
/// group ([`crate::engine::creds::KillPriv`]), and root has powers instead of groups. Root of a user namespace may need them,
/// for files whose owners have no number there (user_namespaces(7)). For this thread and those that it starts.
pub fn leave_groups() {
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let everybody = map.split_whitespace().eq(["0", "0", "4294967295"]);
    if everybody
        && rustix::process::geteuid().is_root()
        && let Err(errno) = rustix::thread::set_thread_groups(&[])
    {
        log::debug!("setgroups: {errno}");
    }
}

fn raise_to(resource: Resource, most: Option<u64>) {
    let allowed = getrlimit(resource).maximum;
    let limit = |most| Rlimit {
        current: most,
        maximum: most,
    };
    // Past what is allowed only with the privilege.
    if setrlimit(resource, limit(most)).is_err()
        && let Err(errno) = setrlimit(resource, limit(allowed))
    {
        log::warn!("a limit cannot be raised ({resource:?}): {errno}");
    }
}
