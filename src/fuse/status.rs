//! The answers to the hidden attributes of [`crate::control`].

use super::Adapter;
use crate::config::MountConfig;
use crate::control::{CutStatus, SNAPSHOT_XATTR, STATUS_XATTR, SnapshotStatus, Status};
use crate::engine::Engine;
use crate::engine::object::Node;
use crate::error::{Error, Result};
use crate::store::{SnapshotInfo, SnapshotState, Timestamp};
use rustix::io::Errno;
use serde::Serialize;
use std::ffi::OsStr;
use std::time::Duration;

/// Works a hidden attribute out.
type Value = Box<dyn FnOnce() -> Result<Vec<u8>> + Send>;

impl Adapter {
    /// What works the value of a hidden attribute of `node` out, if `name` is one.
    pub(super) fn hidden_xattr(&self, node: &Node, name: &OsStr) -> Option<Value> {
        let (engine, root) = (self.engine.clone(), self.engine.backing().root_entry().ino);
        match node {
            Node::Live(object) if name == STATUS_XATTR && object.ino() == root => {
                let config = self.config.clone();
                Some(Box::new(move || json(&status(&engine, &config))))
            }
            Node::At(member) if name == SNAPSHOT_XATTR && member.entry.ino == root => {
                let snapshot = member.snapshot;
                Some(Box::new(move || {
                    let snapshot = engine.snapshots().get(snapshot).ok_or(Error::Stale)?;
                    json(&snapshot_status(&snapshot.info))
                }))
            }
            _ => None,
        }
    }
}

fn status(engine: &Engine, config: &MountConfig) -> Status {
    let stats = engine.store().stats();
    let damage = engine.store().damage();
    let state = match (
        engine.store().is_poisoned(),
        config.read_only,
        damage.is_empty(),
    ) {
        (true, ..) => "poisoned",
        (_, _, false) => "damaged",
        (_, true, _) => "read-only",
        _ => "ok",
    };
    let store = match &config.store {
        Some(path) => path.clone(),
        None => config.source.join(".cowfs/store"),
    };
    Status {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        source: config.source.to_string_lossy().into(),
        store: store.to_string_lossy().into(),
        snapshot_dir: String::from_utf8_lossy(&config.snapshot_dir).into(),
        state: state.into(),
        durability: config.durability.as_str().into(),
        cache: config.cache.as_str().into(),
        epoch: engine.store().epoch().0,
        snapshots: engine.snapshots().count() as u64,
        store_bytes: stats.journal_bytes + stats.index_bytes,
        preimage_bytes: stats.live_payload_bytes,
        index_bytes: stats.index_bytes,
        retained_files: engine
            .store()
            .retained_all()
            .map_or(0, |all| all.len() as u64),
        open_files: engine.open_handles(),
        known_objects: engine.nodes.count(),
        last_cut: engine.last_cut().map(|cut| CutStatus {
            name: String::from_utf8_lossy(&cut.name).into(),
            total_us: micros(cut.total),
            flush_us: micros(cut.flush),
            quiesce_us: micros(cut.quiesce),
            longest_write_wait_us: micros(cut.longest_wait),
        }),
        damage,
    }
}

fn micros(d: Duration) -> u64 {
    d.as_micros() as u64
}

fn json(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|_| Errno::IO.into())
}

fn snapshot_status(info: &SnapshotInfo) -> SnapshotStatus {
    SnapshotStatus {
        name: String::from_utf8_lossy(&info.name).into(),
        epoch: info.epoch.0,
        created: rfc3339(info.created),
        held: info.held,
        state: match info.state {
            SnapshotState::Ready => "ok",
            SnapshotState::Deleting => "deleting",
            SnapshotState::Suspect => "suspect",
            SnapshotState::Invalid => "invalid",
        }
        .into(),
    }
}

fn rfc3339(t: Timestamp) -> String {
    chrono::DateTime::from_timestamp(t.sec, t.nsec)
        .map(|t| t.to_rfc3339_opts(chrono::SecondsFormat::Nanos, true))
        .unwrap_or_default()
}
