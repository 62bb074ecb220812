//! The index of a store that is being opened: the one that there is if it can be trusted, else an empty one in its place.

use super::count::Uncounted;
use super::index::{Index, MemoryIndex, SledIndex};
use super::key::{self, IndexState, Usage};
use super::types::StoreOptions;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// An index without records that takes more than this on disk is made anew.
const HUSK: u64 = 16 << 20;

/// An index and what it says of itself; no state: it is empty, replay the whole journal.
pub(super) struct Found {
    pub(super) index: Box<dyn Index>,
    pub(super) state: Option<IndexState>,
    /// What it refers to in each segment, as far as it is counted.
    pub(super) usage: BTreeMap<u32, Usage>,
    pub(super) uncounted: Uncounted,
    /// It takes much space for nothing: sled gives little back.
    pub(super) husk: bool,
    /// Why there is no state though there was an index.
    pub(super) distrust: Option<String>,
    /// What it had noted of the segments, if it was closed in order.
    pub(super) noted: Option<BTreeMap<u32, Usage>>,
}

impl Found {
    fn empty(index: impl Index + 'static) -> Self {
        Self {
            index: Box::new(index),
            state: None,
            usage: BTreeMap::new(),
            uncounted: Uncounted::NOTHING,
            husk: false,
            distrust: None,
            noted: None,
        }
    }
}

pub(super) fn find_index(dir: &Path, options: &StoreOptions, uuid: u128) -> Result<Found> {
    if options.in_memory_index {
        return Ok(Found::empty(MemoryIndex::default()));
    }
    let path = dir.join("index");
    if !path.exists() {
        return fresh_index(dir, options);
    }
    match trusted_index(&path, options, uuid) {
        Ok(Some(found)) => Ok(found),
        Ok(None) => {
            log::info!("the index was not finished, and is built anew from the journal");
            fresh_index(dir, options)
        }
        // Nothing is wrong with the index, which may have what the journal has lost.
        Err(error) if error.is_lack() || error.is_full() => Err(error),
        Err(error) => {
            log::warn!("the index cannot be used ({error}) and is being rebuilt from the journal");
            let distrust = Some(error.to_string());
            Ok(Found {
                distrust,
                ..fresh_index(dir, options)?
            })
        }
    }
}

/// Opens the index; fails if there is any reason to doubt it. `None`: whoever built it died before it was finished.
fn trusted_index(path: &Path, options: &StoreOptions, uuid: u128) -> Result<Option<Found>> {
    if SledIndex::is_condemned(path) {
        return Err(Error::Corrupt("the index could not be read lately".into()));
    }
    let index = SledIndex::open(path)?;
    let Some(state) = index.get(key::STATE)? else {
        return Ok(None);
    };
    let state = IndexState::parse(&state)?;
    if state.uuid != uuid {
        return Err(Error::Corrupt("the index belongs to another store".into()));
    }
    let noted = noted_usage(&index)?;
    let exact = state.clean.then(|| noted.clone());
    let used = |(number, u): (u32, Usage)| {
        (
            number,
            Usage {
                used: u.used,
                ..Usage::default()
            },
        )
    };
    let (usage, uncounted) = if index.allocated() <= options.read_at_open {
        let uncounted = noted.into_iter().map(used).collect();
        (counted_usage(&index, uncounted)?, Uncounted::NOTHING)
    } else if state.clean {
        (noted, Uncounted::NOTHING)
    } else {
        (noted.into_iter().map(used).collect(), Uncounted::all())
    };
    let husk = is_husk(&index)?;
    Ok(Some(Found {
        index: Box::new(index),
        state: Some(state),
        husk,
        usage,
        uncounted,
        distrust: None,
        noted: exact,
    }))
}

/// Whether the index takes much space and refers to nothing.
fn is_husk(index: &dyn Index) -> Result<bool> {
    let mut husk = index.allocated() > HUSK;
    if husk {
        index.scan(&[], &[u8::MAX], &mut |key, value| {
            husk = key::footprint(key, value).is_none();
            Ok(husk)
        })?;
    }
    Ok(husk)
}

/// What the index has noted of the segments.
pub(super) fn noted_usage(index: &dyn Index) -> Result<BTreeMap<u32, Usage>> {
    let (from, to) = key::usages();
    let mut noted = BTreeMap::new();
    index.scan(&from, &to, &mut |key, value| {
        noted.extend([key::parse_usage(key, value)?]);
        Ok(true)
    })?;
    Ok(noted)
}

/// Reads the whole index, and adds up what it refers to.
fn counted_usage(
    index: &dyn Index,
    mut usage: BTreeMap<u32, Usage>,
) -> Result<BTreeMap<u32, Usage>> {
    index.scan(&[], &[u8::MAX], &mut |key, value| {
        key::check(key, value)?;
        if let Some(footprint) = key::footprint(key, value) {
            usage.entry(footprint.segment).or_default().add(&footprint);
        }
        Ok(true)
    })?;
    Ok(usage)
}

/// An empty index in place of whatever there is.
pub(super) fn fresh_index(dir: &Path, options: &StoreOptions) -> Result<Found> {
    if options.in_memory_index {
        return Ok(Found::empty(MemoryIndex::default()));
    }
    let path = remove_index(dir)?;
    Ok(Found::empty(SledIndex::open(&path)?))
}

/// Removes the index of the store in `dir`; returns where it was.
pub(super) fn remove_index(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("index");
    match std::fs::remove_dir_all(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(Error::io("cannot remove", &path, &error));
        }
        _ => {}
    }
    SledIndex::pardon(&path)?;
    Ok(path)
}
