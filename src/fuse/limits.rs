//! The limits of resources that the daemon inherits (getrlimit(2)): of whoever mounts, not of those who use the mount.

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
