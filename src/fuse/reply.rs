//! Replies: what of the engine's answers reaches the kernel, and for how long it holds.

use super::convert::{errno, file_attr};
use super::{Adapter, FOREVER};
use crate::engine::attr::Attr;
use crate::engine::dir::Line;
use crate::engine::handle::OpenDir;
use crate::engine::object::{Node, ROOT_NODE, folder_node, unreachable_node};
use crate::error::Result;
use fuser::{Errno, Generation, INodeNo, ReplyDirectoryPlus, ReplyEntry, ReplyXattr};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

/// Replies with what `$ok` makes of the value of `$result`, or with its errno.
macro_rules! answer {
    ($reply:expr, $result:expr, $value:pat => $ok:expr) => {
        match $result {
            Ok($value) => $ok,
            Err(error) => $reply.error(errno(&error)),
        }
    };
}
pub(super) use answer;

impl Adapter {
    /// How long the entry and the attributes of what was found in `parent` hold. A snapshot's name may come
    /// to mean another, and the folder's own times change.
    fn lifetimes(&self, parent: &Node, attr: &Attr) -> (Duration, Duration) {
        match parent {
            Node::Folder(_) => (FOREVER, Duration::ZERO),
            Node::Live(dir) if attr.node == folder_node(self.engine.nodes.live_id(dir.ino())) => {
                (Duration::ZERO, Duration::ZERO)
            }
            _ => (FOREVER, FOREVER),
        }
    }

    pub(super) fn attr_lifetime(node: &Node) -> Duration {
        if matches!(node, Node::Folder(_)) {
            Duration::ZERO
        } else {
            FOREVER
        }
    }

    pub(super) fn reply_entry(&self, reply: ReplyEntry, parent: &Node, result: Result<Attr>) {
        answer!(reply, result, attr => {
            let (attr_ttl, entry_ttl) = self.lifetimes(parent, &attr);
            reply.entry_with_ttls(&attr_ttl, &entry_ttl, &file_attr(&attr, attr.node), Generation(0));
        });
    }
    /// Adds a line with its attributes; false if there was no room.
    pub(super) fn add_plus(
        &self,
        dir: &OpenDir,
        line: &Line,
        reply: &mut ReplyDirectoryPlus,
    ) -> Result<bool> {
        let name = OsStr::from_bytes(&line.name);
        if line.name == b"." || line.name == b".." {
            // The kernel takes no reference from these two (fuse_direntplus_link of fs/fuse/readdir.c).
            let attr = self.engine.getattr(&self.engine.node(ROOT_NODE)?, None)?;
            let mut attr = file_attr(&attr, line.ino);
            attr.kind = fuser::FileType::Directory;
            return Ok(!reply.add(
                INodeNo(line.ino),
                line.next,
                name,
                &Duration::ZERO,
                &attr,
                Generation(0),
            ));
        }
        let attr = match self.engine.look_up_line(dir, line) {
            Ok(Some(attr)) => attr,
            Ok(None) => return Ok(true),
            Err(error) => {
                // Listed all the same; who asks for it gets the error.
                log::debug!("{name:?} in a listing: {error}");
                let node = unreachable_node(line.ino);
                let attr = file_attr(&Attr::of_kind(node, line.kind), node);
                return Ok(!reply.add(
                    INodeNo(node),
                    line.next,
                    name,
                    &Duration::ZERO,
                    &attr,
                    Generation(0),
                ));
            }
        };
        let ttl = if matches!(dir, OpenDir::Folder(_)) {
            Duration::ZERO
        } else {
            FOREVER
        };
        let full = reply.add(
            INodeNo(attr.node),
            line.next,
            name,
            &ttl,
            &file_attr(&attr, attr.node),
            Generation(0),
        );
        if full {
            self.engine.nodes.forget(attr.node, 1);
        }
        Ok(!full)
    }
}

pub(super) fn reply_xattr(reply: ReplyXattr, value: Result<Vec<u8>>, size: u32) {
    answer!(reply, value, value => match size as usize {
        0 => reply.size(value.len() as u32),
        room if value.len() <= room => reply.data(&value),
        _ => reply.error(Errno::ERANGE),
    });
}
