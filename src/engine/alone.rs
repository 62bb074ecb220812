//! A snapshot that is mounted by itself: what the kernel knows of it through that mount, and what is open there.
//!
//! Its objects have the numbers of the live tree, so they are counted in a table of their own and not in the
//! engine's. Dropping the view forgets all of it, also what the kernel never took back.

use super::Engine;
use super::handle::Handles;
use super::nodes::{Node, Nodes};
use super::object::{Member, Numbers};
use super::view::OpenSnapshot;
use crate::error::Result;
use crate::ids::Epoch;
use crate::sync::Arc;

/// One snapshot for a mount of its own. Keeps it from being deleted. Nothing can be changed through it: its
/// nodes are members, and what changes the tree takes a live object.
pub struct AloneView {
    /// What the kernel knows through the mount.
    pub nodes: Arc<Nodes>,
    /// What is open through the mount.
    pub handles: Arc<Handles>,
    root: Arc<Member>,
    _snapshot: OpenSnapshot,
}

impl AloneView {
    /// The snapshot's root directory.
    pub fn root(&self) -> Node {
        Node::At(self.root.clone())
    }
}

impl Engine {
    /// Begins the use of snapshot `epoch` by a mount of its own; `ESTALE` once it is deleted.
    pub fn view_alone(&self, epoch: Epoch) -> Result<AloneView> {
        let entry = self.backing.root_entry().clone();
        Ok(AloneView {
            _snapshot: self.open_snapshot(epoch)?,
            nodes: Nodes::new(entry.ino, self.epochs.clone(), None),
            handles: Arc::default(),
            root: Arc::new(Member::new(
                epoch,
                entry.clone(),
                Numbers::OfLive(entry.ino),
                entry.ino.0,
            )),
        })
    }
}
