//! What opening does after the store has recovered: retained objects whose move a crash interrupted.

use super::{Engine, check};
use crate::error::Result;
use crate::store::{EntryImage, Finding, Retained, SnapshotInfo, SnapshotState};
use rustix::fd::AsFd;
use rustix::fs::{OFlags, RenameFlags};

/// Finishes or takes back the moves of retained objects that a crash interrupted.
pub fn retained(engine: &Engine) -> Result<()> {
    let records = engine.store.retained_all()?;
    // The directory may be older than the store then, or younger.
    if engine.store.went_down() {
        drop_unrecorded(engine, &records)?;
    }
    for record in records {
        let found = engine.backing.find_retained(record.ino)?;
        match found {
            // A second link, made before the last name was to be replaced: that did not happen.
            Some(found) if record.kind != libc::DT_DIR && found.attr.nlink > 1 => {
                engine.backing.release_retained(record.ino, false)?;
                engine.store.forget_retained(record.ino)?;
            }
            Some(found) => engine
                .room
                .note_retained(record.ino, found.attr.blocks * 512),
            // Recorded, and not moved: either half-way, or the removal did not happen.
            None if finish_exchange(engine, &record)? => {}
            // Who cannot open by handle does not see whether it has its old name still.
            None if !engine.backing.overrides_modes() => {
                engine.store.forget_retained(record.ino)?;
            }
            None => match check::lost_object(&engine.store, &engine.backing, &record)? {
                None => engine.store.forget_retained(record.ino)?,
                Some(finding) => note_lost(engine, &record, &finding)?,
            },
        }
    }
    // Without a snapshot nothing among the retained is needed, whatever the records say.
    if engine.store.snapshots().is_empty() {
        for ino in engine.backing.all_retained()? {
            if let Some(found) = engine.backing.find_retained(ino)? {
                let directory = found.entry.kind == libc::DT_DIR;
                engine.backing.release_retained(ino, directory)?;
                engine.room.note_released(ino);
            }
        }
    }
    Ok(())
}

/// Somebody has removed what snapshots show, from among the retained. The record stays, by which `check` knows.
fn note_lost(engine: &Engine, record: &Retained, finding: &Finding) -> Result<()> {
    let marked = engine.mark_suspect(|epoch| record.birth < epoch && epoch <= record.removed)?;
    if !marked.is_empty() {
        let (thing, what) = (&finding.thing, &finding.what);
        let names = finding.snapshots.join(", ");
        log::error!("{thing}: {what}, which are suspect from now on: {names}");
    }
    Ok(())
}

/// Removes from among the retained what has no record. Either its record is gone, and its removal did not reach the
/// disk; or, after a loss of records, it was about to be moved there: what has another link is not needed, and what
/// has none may be all that is left for a suspect snapshot.
fn drop_unrecorded(engine: &Engine, records: &[Retained]) -> Result<()> {
    let suspect = |info: &SnapshotInfo| info.state == SnapshotState::Suspect;
    let suspects = engine.store.snapshots().iter().any(suspect);
    for ino in engine.backing.all_retained()? {
        if records.iter().any(|record| record.ino == ino) {
            continue;
        }
        let Some(found) = engine.backing.find_retained(ino)? else {
            continue;
        };
        let directory = found.entry.kind == libc::DT_DIR;
        if !suspects || (!directory && found.attr.nlink > 1) {
            engine.backing.release_retained(ino, directory)?;
        }
    }
    Ok(())
}

/// A directory that has changed places with its successor is moved to the retained from there.
fn finish_exchange(engine: &Engine, record: &Retained) -> Result<bool> {
    let Some((ino, handle, name)) = &record.origin else {
        return Ok(false);
    };
    let dir = EntryImage {
        ino: *ino,
        kind: libc::DT_DIR,
        handle: handle.clone(),
    };
    let Ok(fd) = engine.backing.path_fd(&dir) else {
        return Ok(false);
    };
    match engine.backing.find(fd.as_fd(), name)? {
        // What is replaced is empty; anything else is not what the record was about.
        Some(found) if found.entry.handle == record.handle && is_empty(engine, &found.entry)? => {
            let retain = |flags| engine.backing.retain(fd.as_fd(), name, record.ino, flags);
            match record.whiteout.then(|| retain(RenameFlags::WHITEOUT)) {
                Some(Ok(())) => {}
                // No room, or no whiteouts on this filesystem: the directory can be mounted all the same.
                Some(Err(error)) => {
                    log::warn!("the whiteout of an interrupted rename is not made: {error}");
                    retain(RenameFlags::empty())?;
                }
                None => retain(RenameFlags::empty())?,
            }
            Ok(true)
        }
        _ => Ok(false),
    }
}

fn is_empty(engine: &Engine, dir: &EntryImage) -> Result<bool> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    engine
        .backing
        .is_empty(&engine.backing.open_object(dir, flags)?)
}
