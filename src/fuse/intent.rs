//! Requests that the kernel sends again after the server was killed, and what was done of them.
//!
//! Most requests can be carried out twice: a write, a truncation, a change of mode come out the same. Those that change
//! names, or make or remove an attribute, cannot. So each of those is written down in the inventory before it is carried
//! out, and when it comes again, the names tell whether it was: the kernel holds the locks of their directories until it
//! is answered, so nobody else has changed them.

use super::Adapter;
use crate::engine::inventory::{Found, Intent, Inventory, Slot};
use crate::ids::Ino;
use crate::sync::Arc;
use fuser::Request;
use std::collections::HashMap;

/// Marks the number of a request that is sent again (`FUSE_UNIQUE_RESEND` of include/uapi/linux/fuse.h).
const RESENT: u64 = 1 << 63;

/// What an earlier server may have carried out without an answer, by the number of the request.
pub(super) struct Resent {
    intents: HashMap<u64, (Slot, Intent)>,
    opened: HashMap<u64, u64>,
}

impl Resent {
    pub(super) fn new(found: &Found) -> Self {
        let number = |unique: u64| unique & !RESENT;
        Self {
            intents: found
                .intents
                .iter()
                .map(|(slot, intent)| (number(intent.unique), (*slot, *intent)))
                .collect(),
            opened: found
                .handles
                .iter()
                .map(|(_, handle)| (number(handle.unique), handle.id))
                .collect(),
        }
    }

    fn number(req: &Request) -> Option<u64> {
        let unique = req.unique().0;
        (unique & RESENT != 0).then_some(unique & !RESENT)
    }

    /// What an earlier server opened for this request, if it is one that is sent again.
    pub(super) fn opened(&self, req: &Request) -> Option<u64> {
        self.opened.get(&Self::number(req)?).copied()
    }
}

/// How things are before a request is carried out.
#[derive(Debug, Default)]
pub(super) struct Before {
    /// The object that the request moves.
    pub(super) ino: Ino,
    /// Whether the attribute is there that the request is about.
    pub(super) there: bool,
}

/// A request that is written down until it has been answered.
pub(super) struct Intended {
    noted: Option<(Arc<Inventory>, Slot)>,
    earlier: Option<Intent>,
}

impl Intended {
    /// What an earlier server wrote down of this request, and may have carried out.
    pub(super) fn earlier(&self) -> Option<Intent> {
        self.earlier
    }

    /// Whether an earlier server may have carried the request out.
    pub(super) fn again(&self) -> bool {
        self.earlier.is_some()
    }
}

impl Drop for Intended {
    fn drop(&mut self) {
        if let Some((inventory, slot)) = &self.noted {
            inventory.remove(*slot);
        }
    }
}

impl Adapter {
    /// Writes a request down that cannot be carried out twice. What an earlier server wrote down of it stands: that is
    /// how it was before anything was done.
    pub(super) fn intend(&self, req: &Request, before: impl FnOnce() -> Before) -> Intended {
        let inventory = self.engine.inventory();
        let earlier = Resent::number(req).and_then(|number| self.resent.intents.get(&number));
        if let (Some((slot, intent)), Some(inventory)) = (earlier, inventory) {
            return Intended {
                noted: Some((inventory.clone(), *slot)),
                earlier: Some(*intent),
            };
        }
        let noted = inventory.and_then(|inventory| {
            let Before { ino, there } = before();
            let unique = req.unique().0;
            let slot = inventory.add_intent(&Intent { unique, ino, there })?;
            Some((inventory.clone(), slot))
        });
        Intended {
            noted,
            earlier: None,
        }
    }
}
