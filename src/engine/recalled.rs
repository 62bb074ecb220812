//! The live objects that the kernel forgot last.

use super::nodes::NodeId;
use crate::store::EntryImage;
use std::collections::HashMap;

/// A table of a fixed number of entries; a new one takes the place of the oldest.
///
/// It is one piece of memory: entries that were allocated one by one, while the kernel forgets a million objects, would
/// lie among these and keep the memory of most of them from being given back.
#[derive(Default)]
pub struct Recalled {
    capacity: usize,
    /// In the order in which they came, beginning anew at the front when all places are taken.
    places: Vec<Option<(NodeId, EntryImage)>>,
    /// Where the next one goes.
    next: usize,
    by_node: HashMap<NodeId, usize>,
}

impl Recalled {
    /// An empty table of so many entries.
    pub fn new(capacity: usize) -> Self {
        Self {
            capacity,
            ..Self::default()
        }
    }

    /// The entry of a node.
    pub fn get(&self, node: NodeId) -> Option<&EntryImage> {
        let (_, entry) = self.places[*self.by_node.get(&node)?].as_ref()?;
        Some(entry)
    }

    /// Gives a node an entry, in place of the one that it may have.
    pub fn insert(&mut self, node: NodeId, entry: EntryImage) {
        self.remove(node);
        let place = Some((node, entry));
        let replaced = match self.places.get_mut(self.next) {
            Some(old) => std::mem::replace(old, place),
            None => {
                self.places.push(place);
                None
            }
        };
        if let Some((old, _)) = replaced {
            self.by_node.remove(&old);
        }
        self.by_node.insert(node, self.next);
        self.next = (self.next + 1) % self.capacity;
    }

    /// Removes the entry of a node.
    pub fn remove(&mut self, node: NodeId) {
        if let Some(place) = self.by_node.remove(&node) {
            self.places[place] = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Ino;

    fn entry(ino: u64) -> EntryImage {
        EntryImage {
            ino: Ino(ino),
            kind: libc::DT_REG,
            handle: crate::store::ObjectHandle {
                kind: 1,
                bytes: vec![0; 8].into(),
            },
        }
    }

    #[test]
    fn the_newest_stay() {
        let mut recalled = Recalled::new(3);
        let found = |recalled: &Recalled| -> Vec<u64> {
            let all = (0..10).filter(|node| {
                let found = recalled.get(*node);
                found.is_some_and(|entry| entry.ino.0 % 100 == *node)
            });
            all.collect()
        };
        (0..5).for_each(|node| recalled.insert(node, entry(node)));
        assert_eq!(found(&recalled), [2, 3, 4]);
        recalled.insert(3, entry(103));
        assert_eq!(recalled.get(3), Some(&entry(103)));
        assert_eq!(found(&recalled), [3, 4]);
        recalled.remove(4);
        recalled.remove(4);
        assert_eq!(found(&recalled), [3]);
        (5..8).for_each(|node| recalled.insert(node, entry(node)));
        assert_eq!(found(&recalled), [5, 6, 7]);
        assert_eq!((recalled.places.len(), recalled.by_node.len()), (3, 3));
    }
}
