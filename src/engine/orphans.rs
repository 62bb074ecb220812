//! Files that are open and have no name, in a mount that may outlive the daemon.
//!
//! A descriptor keeps the inode of such a file, and goes with its process. So that the next daemon finds the file again,
//! its last link is moved to `.cowfs/orphans/` instead of being removed, and removed when the file is closed.

use super::Engine;
use super::handle::OpenFile;
use super::inventory::{Aspect, Found, KnownHandle, KnownNode, Slot};
use super::nodes::{Node, NodeId, ObjectRef};
use super::object::Object;
use crate::error::{Error, Result};
use crate::ids::Ino;
use crate::sync::Ordering;
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::collections::{HashMap, HashSet};

fn is_closed(object: &ObjectRef) -> bool {
    object.opens.load(Ordering::SeqCst) == 0
}

impl Engine {
    /// Whether the last link of an object must be kept, because another daemon may have to open it again.
    pub(super) fn must_outlive(&self, object: &Object) -> bool {
        self.inventory.is_some() && !object.is_dir() && object.opens.load(Ordering::SeqCst) > 0
    }

    /// Notes that the last link of `object` is among the orphans now.
    pub(super) fn orphaned(&self, object: &ObjectRef) {
        object.retained.store(true, Ordering::SeqCst);
        self.orphans.lock().push(object.clone());
    }

    /// Whether there is something for [`Self::drop_orphans`] to do.
    pub(super) fn has_closed_orphans(&self) -> bool {
        self.orphans.lock().iter().any(is_closed)
    }

    /// Removes the links of orphans that are not open any more.
    pub(super) fn drop_orphans(&self) {
        let done: Vec<ObjectRef> = {
            let mut orphans = self.orphans.lock();
            orphans.extract_if(.., |object| is_closed(object)).collect()
        };
        for object in done {
            // The kernel may not have forgotten it, and one that an earlier daemon removed has no pin (C2).
            let released = self
                .pin_number(&object)
                .and_then(|()| self.backing.release_orphan(object.ino()));
            if let Err(error) = released {
                log::error!("an orphan cannot be removed: {error}");
            }
        }
    }

    /// Takes up what an earlier daemon of this mount left: what the kernel knows, what is open, and the orphans of
    /// that. Other orphans go. What cannot be opened again is open no more, and taken from what was found.
    pub(super) fn restore(&self, found: &mut Found) -> Result<()> {
        self.restore_nodes(found);
        let retained = self.store.retained_all()?;
        for record in &retained {
            // Not of the live tree any more, whoever asks for it by its number.
            if let Some(Node::Live(object)) = self.nodes.get(self.nodes.live_id(record.ino))
                && object.entry.handle == record.handle
            {
                object.retained.store(true, Ordering::SeqCst);
                object.lock().removed = Some(record.removed);
            }
        }
        let orphans: HashSet<Ino> = self.backing.all_orphans()?.into_iter().collect();
        found.handles.retain(|(slot, handle)| {
            let opened = self.reopen(*slot, handle, &orphans);
            if let Err(error) = &opened {
                log::warn!("node {} cannot be opened again: {error}", handle.node);
                self.handles.erase(Some(*slot));
            }
            opened.is_ok()
        });
        for ino in orphans {
            match self.nodes.get(self.nodes.live_id(ino)) {
                Some(Node::Live(object)) if object.opens.load(Ordering::SeqCst) > 0 => {
                    self.orphans.lock().push(object);
                }
                _ => self.backing.release_orphan(ino)?,
            }
        }
        Ok(())
    }

    /// A daemon that dies may leave a removed object beside the one that has its number since: only what is there counts.
    fn restore_nodes(&self, found: &Found) {
        let mut times: HashMap<(NodeId, Aspect), u32> = HashMap::new();
        let of = |node: &KnownNode| (node.entry.ino.0, node.aspect);
        for (_, node) in &found.nodes {
            *times.entry(of(node)).or_default() += 1;
        }
        for (slot, node) in &found.nodes {
            let there = || self.backing.open_object(&node.entry, OFlags::PATH).is_ok();
            if times[&of(node)] == 1 || there() {
                self.nodes.restore(*slot, node);
            } else if let Some(inventory) = &self.inventory {
                inventory.remove(*slot);
            }
        }
    }

    fn reopen(&self, slot: Slot, handle: &KnownHandle, orphans: &HashSet<Ino>) -> Result<()> {
        let node = self.node(handle.node)?;
        if let Node::Live(object) = &node
            && orphans.contains(&object.ino())
        {
            object.retained.store(true, Ordering::SeqCst);
        }
        if handle.directory {
            let dir = self.open_dir(&node)?;
            self.handles.restore_dir(slot, handle.id, dir);
            return Ok(());
        }
        let file = self.open_file(&node, handle.flags)?;
        if let OpenFile::Live(live) = &file
            && live.object.entry.kind != libc::DT_REG
        {
            return Err(Error::Os(Errno::STALE));
        }
        self.handles.restore_file(slot, handle.id, file);
        Ok(())
    }
}
