//! Replies: what of the engine's answers reaches the kernel, and for how long it holds.

use super::FOREVER;
use super::convert::{errno, file_attr};
use super::read::Reader;
use crate::engine::attr::Attr;
use crate::engine::dir::Line;
use crate::engine::handle::OpenDir;
use crate::engine::nodes::{Node, NodeId, ObjectRef, folder_node, unreachable_node};
use crate::error::{Error, Result};
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

impl Reader {
    /// How long the attributes and the entry of what was found in `parent` hold. A snapshot's name may come
    /// to mean another.
    fn lifetimes(&self, parent: &Node, attr: &Attr) -> (Duration, Duration) {
        match parent {
            Node::Folder(_) => (FOREVER, Duration::ZERO),
            Node::Live(dir) if attr.node == folder_node(self.engine.nodes.live_id(dir.ino())) => {
                // Of an inode that the kernel has not had before it could not be told that they changed meanwhile; it asks
                // for them once more (GETATTR), and then it has it.
                (Duration::ZERO, self.folder_lifetime(dir))
            }
            _ => (FOREVER, FOREVER),
        }
    }

    /// How long the attributes of the snapshot folder of `dir`, and its own name, hold: its times change, and it may go.
    pub(super) fn folder_lifetime(&self, dir: &ObjectRef) -> Duration {
        match self.engine.tells_of_folder(dir) {
            true => FOREVER,
            false => Duration::ZERO,
        }
    }

    /// Answers with what was found in `parent`; the kernel may believe its attributes for no longer than `ttl`.
    pub(super) fn reply_entry_for(
        &self,
        reply: ReplyEntry,
        parent: &Node,
        attr: &Attr,
        ttl: Duration,
    ) {
        let (attr_ttl, entry_ttl) = self.lifetimes(parent, attr);
        let shown = file_attr(attr, attr.node);
        reply.entry_with_ttls(&attr_ttl.min(ttl), &entry_ttl, &shown, Generation(0));
    }

    /// Answers with a live file that is known, under a name that holds for this once. With nothing else: a directory would
    /// be moved to that name in the kernel's memory ([`Self::recall_file`]).
    pub(super) fn reply_node(&self, reply: ReplyEntry, node: NodeId) {
        let attr = self.engine.node(node).and_then(|found| match &found {
            Node::Live(object) if object.entry.kind == libc::DT_REG => {
                let attr = self.engine.getattr(&found, None)?;
                self.engine.nodes.told(object);
                Ok(attr)
            }
            _ => Err(Error::Stale),
        });
        answer!(reply, attr, attr => {
            let shown = file_attr(&attr, attr.node);
            reply.entry_with_ttls(&FOREVER, &Duration::ZERO, &shown, Generation(0));
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
            let attr = self.engine.getattr(&self.root, None)?;
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
        let attr = match self.engine.look_up_line(&self.nodes, dir, line) {
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
            self.nodes.forget(attr.node, 1);
        }
        Ok(!full)
    }
}

/// Replies that a name means nothing, and goes on to mean nothing until the kernel makes it: a node 0 of lookup
/// (`fuse_lookup_name` of the kernel's fs/fuse/dir.c).
pub(super) fn reply_absent(reply: ReplyEntry) {
    let nothing = file_attr(&Attr::of_kind(0, libc::DT_REG), 0);
    reply.entry_with_ttls(&FOREVER, &FOREVER, &nothing, Generation(0));
}

pub(super) fn reply_xattr(reply: ReplyXattr, value: Result<Vec<u8>>, size: u32) {
    answer!(reply, value, value => match size as usize {
        0 => reply.size(value.len() as u32),
        room if value.len() <= room => reply.data(&value),
        _ => reply.error(Errno::ERANGE),
    });
}
