//! Looking a directory and its store over, and making them right: the store's own check, the retained objects
//! against their records, and files that belong to nobody.

use super::Engine;
use super::backing::{Backing, Reach};
use super::nodes::Node;
use super::pairing;
use super::session;
use crate::error::{Error, Result};
use crate::ids::Ino;
use crate::store::{
    CheckReport, EntryImage, Finding, Retained, Severity, SnapshotState, Store, StoreOptions,
};
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What is in the hidden folder of a directory.
const HIDDEN_FILES: [&str; 5] = ["lock", "retained", "orphans", "store", "store-id"];
/// What is in a store.
const STORE_FILES: [&str; 5] = ["format", "journal", "index", "index.bad", "reserve"];

/// A directory that nobody has mounted, with its store.
struct Unmounted {
    backing: Backing,
    hidden: PathBuf,
    store: PathBuf,
    /// How often the session file was written at least.
    sequence: u64,
}

/// Looks over the directory `source`, which must not be mounted, and its store. Changes nothing.
///
/// # Errors
/// [`Error::Source`] if it has no store or is in use; [`Error::Store`] if the store cannot be opened at all.
/// Damage is no error.
pub fn examine(source: &Path, elsewhere: Option<&Path>) -> Result<CheckReport> {
    let place = Unmounted::open(source, elsewhere)?;
    let examined = Store::examine(&place.store, place.options()?)?;
    pairing::check_store(&place.hidden, &examined.store, &place.store)?;
    let mut report = examined.store.check(false)?;
    place.rest(&examined.store, &mut report, None)?;
    Ok(report)
}

/// Makes right what can be, without losing anything that is right. Returns what was done, a line each, and what
/// a check finds after that.
///
/// # Errors
/// As [`examine`], and those of writing.
pub fn repair(source: &Path, elsewhere: Option<&Path>) -> Result<(Vec<String>, CheckReport)> {
    let place = Unmounted::open(source, elsewhere)?;
    // A directory is not to get a store by being repaired, nor the store of another one.
    let examined = Store::examine(&place.store, place.options()?)?;
    pairing::check_store(&place.hidden, &examined.store, &place.store)?;
    drop(examined);
    let (store, mut done) = Store::repair(&place.store, place.options()?)?;
    place.rest(&store, &mut CheckReport::default(), Some(&mut done))?;
    store.close()?;
    drop(store);
    drop(place);
    Ok((done, examine(source, elsewhere)?))
}

impl Unmounted {
    fn options(&self) -> Result<StoreOptions> {
        Ok(StoreOptions {
            boot: Some(session::boot(&self.backing, &self.store)?),
            sequence: self.sequence,
            ..StoreOptions::default()
        })
    }

    fn open(source: &Path, elsewhere: Option<&Path>) -> Result<Self> {
        let source = std::fs::canonicalize(source)
            .map_err(|e| Error::io("cannot open the directory", source, &e))?;
        let hidden = source.join(crate::config::STORE_DIR);
        let store = elsewhere.map_or_else(|| hidden.join("store"), Path::to_path_buf);
        if !hidden.is_dir() {
            let why = "has no store: there is nothing to check".into();
            return Err(Error::Source { path: source, why });
        }
        let there = std::fs::metadata(&store);
        if let Err(error) = &there
            && error.kind() == std::io::ErrorKind::PermissionDenied
        {
            return Err(Error::io("cannot look at the store", &store, error));
        }
        if !there.is_ok_and(|what| what.is_dir()) {
            let why = match elsewhere {
                Some(_) => format!("has no store in {}", store.display()),
                None => "keeps its store elsewhere; name it with -o store=DIR".into(),
            };
            return Err(Error::Source { path: source, why });
        }
        let backing = Backing::open(&source, None, Reach::AsPermitted)?;
        let sequence = pairing::check(&backing, &store, &store)?;
        Ok(Self {
            backing,
            sequence: sequence.unwrap_or(0),
            hidden,
            store,
        })
    }

    /// Retained objects and stray files. With `done`, what is needed by nobody goes.
    fn rest(
        &self,
        store: &Store,
        report: &mut CheckReport,
        mut done: Option<&mut Vec<String>>,
    ) -> Result<()> {
        for record in store.retained_all()? {
            let Some(finding) = lost_object(store, &self.backing, &record)? else {
                continue;
            };
            if let Some(done) = &mut done {
                let names =
                    store.mark_between(record.birth, record.removed, SnapshotState::Suspect)?;
                if !names.is_empty() {
                    done.push(format!("marked as suspect: {}", names.join(", ")));
                }
            }
            report.add(finding);
        }
        for ino in unneeded_objects(store, &self.backing)? {
            if let Some(finding) = filled(&self.backing, ino)? {
                report.add(finding);
                continue;
            }
            if let Some(done) = &mut done
                && let Some(found) = self.backing.find_retained(ino)?
            {
                let directory = found.entry.kind == libc::DT_DIR;
                self.backing.release_retained(ino, directory)?;
                done.push(format!("{}: removed", retained_path(ino)));
            }
            report.add(unneeded(ino));
        }
        for (dir, known) in [
            (&self.hidden, &HIDDEN_FILES[..]),
            (&self.store, &STORE_FILES),
        ] {
            self.strays(dir, known, report, &mut done)?;
        }
        self.strays(&self.store.join("journal"), &["session"], report, &mut done)
    }

    fn strays(
        &self,
        dir: &Path,
        known: &[&str],
        report: &mut CheckReport,
        done: &mut Option<&mut Vec<String>>,
    ) -> Result<()> {
        let failed = |e: std::io::Error| Error::io("cannot list", dir, &e);
        for entry in std::fs::read_dir(dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let segment = dir.ends_with("journal") && Store::is_segment_name(&name);
            if segment || known.contains(&&*name) {
                continue;
            }
            // Files under a name for the time of writing: a crash leaves them.
            let ours = name == "format.new" || name.starts_with(".tmp");
            let severity = if ours { Severity::Leak } else { Severity::Note };
            let what = if ours {
                "left over from a crash"
            } else {
                "not a file of cowfs; it is left alone"
            };
            if ours && let Some(done) = done {
                let path = entry.path();
                std::fs::remove_file(&path).map_err(|e| Error::io("cannot remove", &path, &e))?;
                done.push(format!("{}: removed", path.display()));
            }
            report.add(Finding::new(severity, entry.path().to_string_lossy(), what));
        }
        Ok(())
    }
}

fn retained_path(ino: Ino) -> String {
    format!("retained/{:016x}", ino.0)
}

fn unneeded(ino: Ino) -> Finding {
    Finding::new(
        Severity::Leak,
        retained_path(ino),
        "no record tells of it and no snapshot shows it",
    )
}

/// A directory among the retained, all of which are empty, in which somebody else has put something.
fn filled(backing: &Backing, ino: Ino) -> Result<Option<Finding>> {
    let Some(found) = backing.find_retained(ino)? else {
        return Ok(None);
    };
    if found.entry.kind != libc::DT_DIR {
        return Ok(None);
    }
    let dir = backing.open_object(&found.entry, OFlags::RDONLY | OFlags::DIRECTORY)?;
    let what = "holds files that cowfs has not put there; it is left alone";
    let filled = !backing.is_empty(&dir)?;
    Ok(filled.then(|| Finding::new(Severity::Note, retained_path(ino), what)))
}

/// A retained object that snapshots show and that is nowhere any more.
pub(super) fn lost_object(
    store: &Store,
    backing: &Backing,
    record: &Retained,
) -> Result<Option<Finding>> {
    let names = store.names_between(record.birth, record.removed);
    if names.is_empty() {
        return Ok(None);
    }
    if let Some(found) = backing.find_retained(record.ino)?
        && found.entry.handle == record.handle
    {
        return Ok(None);
    }
    let entry = EntryImage {
        ino: record.ino,
        kind: record.kind,
        handle: record.handle.clone(),
    };
    // Recorded and never moved, because a crash came between: it has its old name still.
    match backing.open_object(&entry, OFlags::PATH) {
        Ok(fd) => {
            if backing.stat(rustix::fd::AsFd::as_fd(&fd))?.nlink > 0 {
                return Ok(None);
            }
        }
        Err(error) if matches!(error.errno(), Errno::STALE | Errno::NOENT) => {}
        Err(error) => return Err(error),
    }
    let known = store.are_marked(record.birth, record.removed);
    let severity = if known {
        Severity::Note
    } else {
        Severity::Lost
    };
    let finding = Finding::new(
        severity,
        retained_path(record.ino),
        "missing, though snapshots show it",
    );
    Ok(Some(finding.concerning(names)))
}

/// Objects among the retained that nothing speaks of. If records are lost, one may be all that is left of a
/// file: they count as needed as long as a name in a snapshot means them.
fn unneeded_objects(store: &Store, backing: &Backing) -> Result<BTreeSet<Ino>> {
    let mut objects = BTreeSet::new();
    for ino in backing.all_retained()? {
        if store.retained(ino)?.is_none() {
            objects.insert(ino);
        }
    }
    if objects.is_empty() {
        return Ok(objects);
    }
    let named = store.named_in_records(&objects)?;
    objects.retain(|ino| !named.contains(ino));
    Ok(objects)
}

impl Engine {
    /// Looks the store and the retained objects over while the directory is in use. Changes nothing, and makes
    /// no operation wait for longer than one look at one thing. One at a time: `EBUSY`.
    ///
    /// # Errors
    /// Those of reading the files. Damage is no error.
    pub fn check(&self) -> Result<CheckReport> {
        let Some(_one) = self.checking.try_lock() else {
            return Err(Errno::BUSY.into());
        };
        let mut report = self.store.check(true)?;
        for record in self.store.retained_all()? {
            if lost_object(&self.store, &self.backing, &record)?.is_none() {
                continue;
            }
            // Perhaps it is being moved just now: whoever does it holds the object's lock.
            let known = self.nodes.get(self.nodes.live_id(record.ino));
            let held = match &known {
                Some(Node::Live(object)) => Some(object.lock()),
                _ => None,
            };
            if let Some(record) = self.store.retained(record.ino)?
                && let Some(finding) = lost_object(&self.store, &self.backing, &record)?
            {
                report.add(finding);
            }
            drop(held);
        }
        Ok(report)
    }
}
