//! The answers to the hidden attributes of [`crate::control`].

use super::Adapter;
use crate::control::{CutStatus, SNAPSHOT_XATTR, STATUS_XATTR, SnapshotStatus, Status};
use crate::engine::object::Node;
use crate::error::{Error, Result};
use crate::store::{SnapshotInfo, SnapshotState, Timestamp};
use rustix::io::Errno;
use serde::Serialize;
use std::ffi::OsStr;
use std::time::Duration;

impl Adapter {
    /// The value of a hidden attribute of `node`, if `name` is one.
    pub(super) fn hidden_xattr(&self, node: &Node, name: &OsStr) -> Result<Option<Vec<u8>>> {
        let root = self.engine.backing().root_entry().ino;
        match node {
            Node::Live(object) if name == STATUS_XATTR && object.ino() == root => {
                json(&self.status()).map(Some)
            }
            Node::At(member) if name == SNAPSHOT_XATTR && member.entry.ino == root => {
                let snapshot = self
                    .engine
                    .snapshots()
                    .get(member.snapshot)
                    .ok_or(Error::Stale)?;
                json(&snapshot_status(&snapshot.info)).map(Some)
            }
            _ => Ok(None),
        }
    }

    fn status(&self) -> Status {
        let stats = self.engine.store().stats();
        let damage = self.engine.store().damage();
        let state = match (
            self.engine.store().is_poisoned(),
            self.config.read_only,
            damage.is_empty(),
        ) {
            (true, ..) => "poisoned",
            (_, _, false) => "damaged",
            (_, true, _) => "read-only",
            _ => "ok",
        };
        let store = match &self.config.store {
            Some(path) => path.clone(),
            None => self.config.source.join(".cowfs/store"),
        };
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            source: self.config.source.to_string_lossy().into(),
            store: store.to_string_lossy().into(),
            snapshot_dir: String::from_utf8_lossy(&self.config.snapshot_dir).into(),
            state: state.into(),
            durability: self.config.durability.as_str().into(),
            cache: self.config.cache.as_str().into(),
            epoch: self.engine.store().epoch().0,
            snapshots: self.engine.snapshots().count() as u64,
            store_bytes: stats.journal_bytes + stats.index_bytes,
            preimage_bytes: stats.live_payload_bytes,
            index_bytes: stats.index_bytes,
            retained_files: self
                .engine
                .store()
                .retained_all()
                .map_or(0, |all| all.len() as u64),
            open_files: self.engine.open_handles(),
            known_objects: self.engine.nodes.count(),
            last_cut: self.engine.last_cut().map(|cut| CutStatus {
                name: String::from_utf8_lossy(&cut.name).into(),
                total_us: micros(cut.total),
                flush_us: micros(cut.flush),
                quiesce_us: micros(cut.quiesce),
                longest_write_wait_us: micros(cut.longest_wait),
            }),
            damage,
        }
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
