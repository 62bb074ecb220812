//! What look-ups see: the records appended lately, in memory, over the index.
//!
//! A record goes into the active map in the call that appends it. A checkpoint freezes that map, carries it
//! into the index, and drops it. Readers take the maps under one guard and look at the index after that:
//! what a checkpoint has dropped by then is in the index already.

use super::index::{Index, Visit};
use super::key::Pair;
use crate::error::Result;
use crate::ids::Lsn;
use crate::sync::{Arc, AtomicUsize, Ordering, RwLock};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

type Map = BTreeMap<Vec<u8>, Vec<u8>>;

/// Pairs looked at under one guard, so that a long scan holds up no append.
const PAGE: usize = 512;
/// Memory of a map for each pair, besides its bytes.
const OVERHEAD: usize = 96;

/// A frozen map, and the place in the journal before which every record is in it or in the index.
#[derive(Clone)]
pub(super) struct Frozen {
    pub(super) map: Arc<Map>,
    pub(super) checkpoint: Lsn,
}

#[derive(Default)]
struct Mem {
    active: Map,
    frozen: Option<Frozen>,
}

/// The maps and the index below them.
pub(super) struct Layers {
    /// Guards the maps; held for a few map operations, never for I/O. Taken inside a segment's log lock.
    mem: RwLock<Mem>,
    bytes: AtomicUsize,
    pub(super) index: Box<dyn Index>,
}

impl Layers {
    pub(super) fn new(index: Box<dyn Index>) -> Self {
        Self {
            mem: RwLock::default(),
            bytes: AtomicUsize::new(0),
            index,
        }
    }

    /// Adds pairs; returns those of the active map that they replace.
    pub(super) fn put(&self, pairs: Vec<Pair>) -> Vec<Pair> {
        let mut replaced = Vec::new();
        let mut mem = self.mem.write();
        for (key, value) in pairs {
            match mem.active.entry(key) {
                Entry::Vacant(place) => {
                    let bytes = place.key().len() + value.len() + OVERHEAD;
                    self.bytes.fetch_add(bytes, Ordering::Relaxed);
                    place.insert(value);
                }
                Entry::Occupied(mut place) => {
                    self.bytes.fetch_add(value.len(), Ordering::Relaxed);
                    let old = place.insert(value);
                    self.bytes.fetch_sub(old.len(), Ordering::Relaxed);
                    replaced.push((place.key().clone(), old));
                }
            }
        }
        replaced
    }

    /// Bytes of memory in both maps.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(super) fn frozen(&self) -> Option<Frozen> {
        self.mem.read().frozen.clone()
    }

    /// Makes the active map the frozen one. There must be no frozen one.
    pub(super) fn freeze(&self, checkpoint: Lsn) {
        let mut mem = self.mem.write();
        let map = Arc::new(std::mem::take(&mut mem.active));
        mem.frozen = Some(Frozen { map, checkpoint });
    }

    /// Drops the frozen map, which is in the index now.
    pub(super) fn thaw(&self) {
        let Some(frozen) = self.mem.write().frozen.take() else {
            return;
        };
        let bytes: usize = frozen
            .map
            .iter()
            .map(|(k, v)| k.len() + v.len() + OVERHEAD)
            .sum();
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        {
            let mem = self.mem.read();
            let frozen = || mem.frozen.as_ref().and_then(|f| f.map.get(key));
            if let Some(value) = mem.active.get(key).or_else(frozen) {
                return Ok(Some(value.clone()));
            }
        }
        self.index.get(key)
    }

    /// The first pair of `from..to`.
    pub(super) fn first(&self, from: &[u8], to: &[u8]) -> Result<Option<Pair>> {
        let mut found = self.page(from, to, 1).pop();
        self.index.scan(from, to, &mut |key, value| {
            if found.as_ref().is_none_or(|(best, _)| key < best.as_slice()) {
                found = Some((key.to_vec(), value.to_vec()));
            }
            Ok(false)
        })?;
        Ok(found)
    }

    /// The last pair of `from..to`.
    pub(super) fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<Pair>> {
        let in_memory = {
            let mem = self.mem.read();
            let active = mem.active.range::<[u8], _>(bounds(from, to)).next_back();
            let frozen = mem
                .frozen
                .as_ref()
                .and_then(|f| f.map.range::<[u8], _>(bounds(from, to)).next_back());
            let best = match (active, frozen) {
                (Some(a), Some(f)) if f.0 > a.0 => Some(f),
                (a, f) => a.or(f),
            };
            best.map(|(k, v)| (k.clone(), v.clone()))
        };
        Ok(match (in_memory, self.index.last(from, to)?) {
            (Some(m), Some(i)) if i.0 > m.0 => Some(i),
            (m, i) => m.or(i),
        })
    }

    /// Shows the pairs of `from..to` in order until `visit` says no. No lock is held while it runs.
    pub(super) fn scan(&self, from: &[u8], to: &[u8], visit: Visit<'_>) -> Result<()> {
        let mut from = from.to_vec();
        loop {
            let page = self.page(&from, to, PAGE);
            let full = page.len() == PAGE;
            // A page speaks for the range up to its last key only, since the next one begins there.
            let end = match page.last() {
                Some((key, _)) if full => [key.as_slice(), &[0]].concat(),
                _ => to.to_vec(),
            };
            if !self.merge(&from, &end, page, visit)? || !full {
                return Ok(());
            }
            from = end;
        }
    }

    fn merge(&self, from: &[u8], to: &[u8], page: Vec<Pair>, visit: Visit<'_>) -> Result<bool> {
        let mut page = page.into_iter().peekable();
        let mut more = true;
        self.index.scan(from, to, &mut |key, value| {
            while let Some((k, v)) = page.next_if(|(k, _)| k.as_slice() < key) {
                more = visit(&k, &v)?;
                if !more {
                    return Ok(false);
                }
            }
            more = match page.next_if(|(k, _)| k.as_slice() == key) {
                Some((k, v)) => visit(&k, &v)?,
                None => visit(key, value)?,
            };
            Ok(more)
        })?;
        for (key, value) in page {
            more = more && visit(&key, &value)?;
        }
        Ok(more)
    }

    /// The first `limit` pairs of the range that are in memory.
    fn page(&self, from: &[u8], to: &[u8], limit: usize) -> Vec<Pair> {
        let mem = self.mem.read();
        let mut active = mem.active.range::<[u8], _>(bounds(from, to)).peekable();
        let empty = Map::new();
        let frozen = mem.frozen.as_ref().map_or(&empty, |f| &f.map);
        let mut frozen = frozen.range::<[u8], _>(bounds(from, to)).peekable();
        let mut page = Vec::new();
        while page.len() < limit {
            let next = match (active.peek(), frozen.peek()) {
                (Some(a), Some(f)) if f.0 < a.0 => frozen.next(),
                (Some(a), Some(f)) => {
                    if a.0 == f.0 {
                        frozen.next();
                    }
                    active.next()
                }
                (Some(_), None) => active.next(),
                (None, _) => frozen.next(),
            };
            let Some((key, value)) = next else { break };
            page.push((key.clone(), value.clone()));
        }
        page
    }
}

fn bounds<'a>(
    from: &'a [u8],
    to: &'a [u8],
) -> (std::ops::Bound<&'a [u8]>, std::ops::Bound<&'a [u8]>) {
    use std::ops::Bound;
    // An empty range the wrong way round would panic in BTreeMap.
    (
        Bound::Included(from),
        Bound::Excluded(if to < from { from } else { to }),
    )
}
