//! What a server inherits from the keeper of its mount, and what it tells it.
//!
//! One SEQPACKET socket: `hold`, with the device and the inventory, once there is a mount; `ready`, when it answers; or an
//! exit code, a newline and a message when it cannot be.

use crate::error::{Error, Result};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::mem::MaybeUninit;

/// The longest message; a longer one is cut.
const LONGEST: usize = 64 * 1024;

/// The messages that hand a mount to the keeper; in the second the kernel holds writes back.
pub const HOLD: &[u8] = b"hold";
/// See [`HOLD`].
pub const HOLD_WRITEBACK: &[u8] = b"hold writeback";

/// What a server of a mount is given.
pub struct Kept {
    /// Where the keeper listens.
    pub socket: OwnedFd,
    /// The backing directory, opened before anything was mounted over it.
    pub directory: OwnedFd,
    /// The device and the inventory of a mount that an earlier server served.
    pub mount: Option<(OwnedFd, OwnedFd)>,
    /// Whether the kernel holds writes back in that mount.
    pub writeback: bool,
    /// How many servers there were before.
    pub served: u32,
}

/// How serving ended that did not end well.
pub enum Ended {
    /// The mount never came to be usable; the keeper has been told.
    Refused,
    /// The mount that there is cannot be served any more; a new one can be made.
    CannotTakeOver(Error),
    /// The server failed after the mount was usable.
    Failed(Error),
}

impl Kept {
    /// Has the keeper hold a mount, in which the kernel holds writes back or does not.
    pub(super) fn hold(
        &self,
        device: BorrowedFd<'_>,
        inventory: BorrowedFd<'_>,
        writeback: bool,
    ) -> Result<()> {
        let message = if writeback { HOLD_WRITEBACK } else { HOLD };
        say(self.socket.as_fd(), message, &[device, inventory])
    }

    /// Tells the keeper that the mount answers.
    pub(super) fn ready(&self) -> Result<()> {
        say(self.socket.as_fd(), b"ready", &[])
    }

    /// Tells the keeper why there is no mount.
    pub(super) fn refuse(&self, error: &Error) -> Ended {
        let message = format!("{}\n{error}", error.exit_code());
        let cut = &message.as_bytes()[..message.len().min(LONGEST)];
        if let Err(second) = say(self.socket.as_fd(), cut, &[]) {
            log::error!("{error}");
            log::debug!("the keeper cannot be told: {second}");
        }
        Ended::Refused
    }
}

fn say(socket: BorrowedFd<'_>, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut buffer = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !buffer.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Errno::INVAL.into());
    }
    loop {
        match sendmsg(
            socket,
            &[IoSlice::new(message)],
            &mut buffer,
            SendFlags::NOSIGNAL,
        ) {
            Err(Errno::INTR) => {}
            other => return Ok(other.map(drop)?),
        }
    }
}

/// Waits for the next message, with the descriptors that come along; `None` when the other end is closed.
///
/// # Errors
/// Those of recvmsg(2).
pub fn hear(socket: &OwnedFd) -> Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let mut message = vec![0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut buffer = RecvAncillaryBuffer::new(&mut space);
    let length = loop {
        let mut into = [IoSliceMut::new(&mut message)];
        match recvmsg(socket, &mut into, &mut buffer, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => break received.bytes,
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
    };
    if length == 0 {
        return Ok(None);
    }
    message.truncate(length);
    let mut descriptors = Vec::new();
    for part in buffer.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = part {
            descriptors.extend(more);
        }
    }
    Ok(Some((message, descriptors)))
}
