//! `cowfs destroy`: turn a backing directory back into a plain one (C10).

use crate::config::STORE_DIR;
use crate::engine::pairing;
use crate::error::{Error, Result};
use crate::mounts;
use crate::store::{Store, StoreOptions};
use crate::sys;
use rustix::fd::AsFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::path::{Path, PathBuf};

/// Remove all snapshots and the store of an unmounted directory.
///
/// The live tree stays as it is; the hidden folder .cowfs goes, and with it every snapshot. A store that was
/// kept elsewhere with store=DIR is no longer used by anything; remove that directory by hand.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Args {
    /// Do it even though there are snapshots, or the store cannot be read.
    #[arg(short, long)]
    yes: bool,
    /// The backing directory.
    source: PathBuf,
}

const EXAMPLE: &str = "\
EXAMPLE
  cowfs umount /srv/data
  cowfs destroy --yes /srv/data";

pub(super) fn run(args: &Args) -> Result<()> {
    let source = std::fs::canonicalize(&args.source)
        .map_err(|e| Error::io("cannot open the directory", &args.source, &e))?;
    let mounts = mounts::read()?;
    if let Some(mount) = mounts::of(&source, &mounts).filter(|mount| mount.is_cowfs()) {
        return Err(Error::Source {
            path: source.clone(),
            why: format!(
                "is mounted by cowfs, at {}; unmount it first (cowfs umount)",
                mount.mountpoint.display()
            ),
        });
    }
    let hidden = source.join(STORE_DIR);
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = rustix::fs::open(&hidden, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::NOENT => Error::Source {
            path: source.clone(),
            why: "has no store: there is nothing to destroy".into(),
        },
        errno => Error::path("cannot open", &hidden, errno),
    })?;
    let lock = rustix::fs::openat(
        &dir,
        c"lock",
        OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::from_raw_mode(0o600),
    )
    .map_err(|errno| Error::path("cannot open the lock of", &hidden, errno))?;
    // After umount(8) the daemon writes its store for a moment.
    sys::lock_patiently(lock.as_fd()).map_err(|_| Error::Source {
        path: source.clone(),
        why: "is mounted by cowfs; unmount it first (cowfs umount)".into(),
    })?;
    if !args.yes {
        check_unused(&source, &hidden)?;
    }
    std::fs::remove_dir_all(&hidden).map_err(|e| Error::io("cannot remove", &hidden, &e))
}

/// Refuses while there are snapshots, or when that cannot be told.
fn check_unused(source: &Path, hidden: &Path) -> Result<()> {
    let refuse = |why: String| Error::Source {
        path: source.to_path_buf(),
        why,
    };
    let store = hidden.join("store");
    if !Store::is_at(&store) {
        return Err(refuse(
            "keeps its store elsewhere; add --yes to give up its snapshots".into(),
        ));
    }
    let opened = Store::open(&store, StoreOptions::default());
    let checked = opened.and_then(|opened| {
        pairing::check_store(hidden, &opened, &store)?;
        Ok(opened.snapshots().len())
    });
    match checked {
        Ok(0) => Ok(()),
        Ok(n) => Err(refuse(format!(
            "has {n} snapshots; add --yes to delete them"
        ))),
        Err(error) => Err(refuse(format!(
            "has a store that cannot be read ({error}); add --yes to remove it all the same"
        ))),
    }
}
