//! The answers to the hidden attributes of [`crate::control`].

use super::handover::SnapshotMounts;
use crate::config::Idle;
use crate::control::{
    CHECK_XATTR, CutStatus, HELD_XATTR, MountOrder, SNAPSHOT_XATTR, STATUS_XATTR, SnapshotStatus,
    SpaceStatus, Status, XATTR_MAX,
};
use crate::engine::Engine;
use crate::engine::nodes::Node;
use crate::engine::object::Numbers;
use crate::engine::room::Usage;
use crate::error::{Error, Result};
use crate::ids::{Epoch, Ino};
use crate::store::{SnapshotInfo, SnapshotState, Timestamp};
use crate::sync::Arc;
use rustix::io::Errno;
use serde::Serialize;
use std::ffi::OsStr;
use std::time::Duration;

/// Works a hidden attribute out.
type Value = Box<dyn FnOnce() -> Result<Vec<u8>> + Send>;

/// What works the value of a hidden attribute of `node` out, if `name` is one.
pub(super) fn hidden_xattr(
    mounts: &Arc<SnapshotMounts>,
    node: &Node,
    name: &OsStr,
) -> Option<Value> {
    let (mounts, root) = (mounts.clone(), root_of(mounts));
    match node {
        Node::Live(object) if name == STATUS_XATTR && object.ino() == root => {
            Some(Box::new(move || json(&status(&mounts, None))))
        }
        Node::At(member) if member.entry.ino == root => {
            let snapshot = member.snapshot;
            if name == SNAPSHOT_XATTR {
                return Some(Box::new(move || {
                    let snapshot = mounts.engine.snapshots().get(snapshot);
                    json(&snapshot_status(&snapshot.ok_or(Error::Stale)?.info))
                }));
            }
            let alone = matches!(member.numbers, Numbers::OfLive(_));
            (alone && name == STATUS_XATTR).then(|| -> Value {
                Box::new(move || json(&status(&mounts, Some(mounts.name(snapshot)))))
            })
        }
        _ => None,
    }
}

/// Whether `name`, asked of `node` of the live mount, is the order to serve a snapshot to a mount of its own.
pub(super) fn mount_order(
    mounts: &SnapshotMounts,
    node: &Node,
    name: &OsStr,
) -> Option<(Epoch, MountOrder)> {
    match node {
        Node::At(member) if member.entry.ino == root_of(mounts) => {
            Some((member.snapshot, MountOrder::parse(name)?))
        }
        _ => None,
    }
}

/// Whether `name`, asked of `node` of the live mount, asks for the store to be looked over.
pub(super) fn is_check(mounts: &SnapshotMounts, node: &Node, name: &OsStr) -> bool {
    name == CHECK_XATTR && matches!(node, Node::Live(object) if object.ino() == root_of(mounts))
}

/// Looks the store over and gives the report, without the last findings if it is too long for an attribute.
pub(super) fn check(engine: &Engine, uid: u32) -> Result<Vec<u8>> {
    if uid != 0 && uid != rustix::process::geteuid().as_raw() {
        return Err(Errno::PERM.into());
    }
    let mut report = engine.check()?;
    loop {
        let text = json(&report)?;
        if text.len() <= XATTR_MAX {
            return Ok(text);
        }
        let keep = report.findings.len() / 2;
        report.more += (report.findings.len() - keep) as u64;
        report.findings.truncate(keep);
    }
}

fn root_of(mounts: &SnapshotMounts) -> Ino {
    mounts.engine.backing().root_entry().ino
}

fn status(mounts: &SnapshotMounts, snapshot: Option<String>) -> Status {
    let (engine, config) = (&mounts.engine, &mounts.config);
    let (known, open) = mounts.counts();
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
        keeper: rustix::process::getppid()
            .map_or(0, |pid| pid.as_raw_nonzero().get().unsigned_abs()),
        source: config.source.to_string_lossy().into(),
        store: store.to_string_lossy().into(),
        snapshot_dir: String::from_utf8_lossy(&config.snapshot_dir).into(),
        state: state.into(),
        durability: config.durability.as_str().into(),
        cache: config.cache.as_str().into(),
        idle: match mounts.polling {
            Some(_) => Idle::Poll,
            None => Idle::Halt,
        }
        .as_str()
        .into(),
        epoch: engine.store().epoch().0,
        snapshots: engine.snapshots().count() as u64,
        store_bytes: stats.journal_bytes + stats.index_bytes,
        preimage_bytes: stats.live_payload_bytes,
        index_bytes: stats.index_bytes,
        index_in_memory: stats.index_in_memory,
        retained_files: engine
            .store()
            .retained_all()
            .map_or(0, |all| all.len() as u64),
        takeovers: mounts.served,
        open_files: engine.handles().count() + open,
        known_objects: engine.nodes.count() + known,
        snapshot,
        snapshot_mounts: mounts.list(),
        last_cut: engine.last_cut().map(|cut| CutStatus {
            name: String::from_utf8_lossy(&cut.name).into(),
            total_us: micros(cut.total),
            flush_us: micros(cut.flush),
            quiesce_us: micros(cut.quiesce),
            longest_write_wait_us: micros(cut.longest_wait),
        }),
        damage,
        space: space(engine),
        suspect: engine
            .store()
            .snapshots()
            .iter()
            .filter(|info| info.state == SnapshotState::Suspect)
            .map(|info| String::from_utf8_lossy(&info.name).into())
            .collect(),
    }
}

fn space(engine: &Engine) -> SpaceStatus {
    let policy = engine.space_policy();
    let usage = engine.space().unwrap_or_else(|error| {
        log::warn!("{error}");
        Usage::default()
    });
    SpaceStatus {
        state: usage.level.as_str().into(),
        on_full: policy.on_full.as_str().into(),
        limit: policy.limit,
        reserve: usage.reserve,
        used: usage.used,
        retained: usage.retained,
        free: usage.free,
        left: usage.left,
    }
}

/// The snapshot that `node` is the root of, if `name` is the attribute that holds it or lets it go, and whether
/// `value` holds it.
pub(super) fn hold_order(
    engine: &Engine,
    node: &Node,
    name: &OsStr,
    value: &[u8],
) -> Option<Result<(Vec<u8>, bool)>> {
    let Node::At(member) = node else {
        return None;
    };
    if name != HELD_XATTR || member.entry.ino != engine.backing().root_entry().ino {
        return None;
    }
    let held = match value {
        b"1" => true,
        b"0" => false,
        _ => return Some(Err(Errno::INVAL.into())),
    };
    let snapshot = engine.snapshots().get(member.snapshot);
    Some(
        snapshot
            .ok_or(Error::Stale)
            .map(|s| (s.info.name.clone(), held)),
    )
}

fn micros(d: Duration) -> u64 {
    d.as_micros() as u64
}

pub(super) fn json(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|_| Errno::IO.into())
}

fn snapshot_status(info: &SnapshotInfo) -> SnapshotStatus {
    SnapshotStatus {
        name: String::from_utf8_lossy(&info.name).into(),
        epoch: info.epoch.0,
        created: rfc3339(info.created),
        held: info.held,
        state: info.state.as_str().into(),
        why: match info.state {
            SnapshotState::Invalid => {
                Some("something that it shows could not be kept, or is lost".into())
            }
            _ => None,
        },
    }
}

fn rfc3339(t: Timestamp) -> String {
    chrono::DateTime::from_timestamp(t.sec, t.nsec)
        .map(|t| t.to_rfc3339_opts(chrono::SecondsFormat::Nanos, true))
        .unwrap_or_default()
}
