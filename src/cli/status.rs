//! `cowfs status`: what a running mount says of itself.

use super::output;
use crate::control::{self, Status};
use crate::error::Result;
use std::path::{Path, PathBuf};

/// Show the state of a mount: its store, its snapshots, how long the last cut took.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Args {
    /// The mount point, or any path inside the mount.
    #[arg(default_value = ".")]
    path: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

const EXAMPLE: &str = "\
EXAMPLE
  cowfs status /srv/data
  cowfs status /srv/data --json | jq .store_bytes";

pub(super) fn run(args: &Args) -> Result<()> {
    let root = control::find_mount(&args.path)?;
    let status = control::status(&root)?;
    if args.json {
        return output::json(&status);
    }
    for (label, value) in rows(&root, &status) {
        output::line(format!("{label:<16}{value}"))?;
    }
    Ok(())
}

fn space(status: &Status) -> String {
    let space = &status.space;
    let mut text = format!(
        "{}: {} taken, room for {}; on-full={}",
        space.state,
        output::size(space.used),
        match space.left {
            crate::sys::BOUNDLESS => "any amount".to_owned(),
            left => format!("{} more", output::size(left)),
        },
        space.on_full
    );
    if let Some(limit) = space.limit {
        text += &format!(", limit {}", output::size(limit));
    }
    if space.reserve > 0 {
        text += &format!(
            ", {} of the disk's {} free to stay so",
            output::size(space.reserve),
            output::size(space.free)
        );
    }
    text
}

fn rows(root: &Path, status: &Status) -> Vec<(&'static str, String)> {
    let mut rows = vec![
        ("mount point", output::printable(root.as_os_str())),
        ("source", output::printable(status.source.as_ref())),
        (
            "shows",
            match &status.snapshot {
                Some(name) => format!(
                    "snapshot {}, by itself, read-only",
                    output::printable(name.as_ref())
                ),
                None => "the live tree".into(),
            },
        ),
        ("state", status.state.clone()),
        (
            "mode",
            format!(
                "durability={}, cache={}, idle={}",
                status.durability, status.cache, status.idle
            ),
        ),
        (
            "snapshots",
            format!(
                "{}, in {}",
                status.snapshots,
                output::printable(status.snapshot_dir.as_ref())
            ),
        ),
        (
            "store",
            format!(
                "{} in {} (kept data {}, index {})",
                output::size(status.store_bytes),
                output::printable(status.store.as_ref()),
                output::size(status.preimage_bytes),
                match status.index_in_memory {
                    true => "in memory".into(),
                    false => output::size(status.index_bytes),
                }
            ),
        ),
        ("space", space(status)),
        ("retained files", status.retained_files.to_string()),
        ("open files", status.open_files.to_string()),
        ("known objects", status.known_objects.to_string()),
        ("cuts", status.epoch.to_string()),
    ];
    rows.push((
        "last cut",
        match &status.last_cut {
            None => "none since the mount".into(),
            Some(cut) => format!(
                "{}: {} in all (flush {}, quiesce {}); longest wait of a writer {}",
                output::printable(cut.name.as_ref()),
                output::micros(cut.total_us),
                output::micros(cut.flush_us),
                output::micros(cut.quiesce_us),
                output::micros(cut.longest_write_wait_us)
            ),
        },
    ));
    rows.push((
        "daemon",
        format!(
            "pid {}, keeper {}, {} before, version {}",
            status.pid, status.keeper, status.takeovers, status.version
        ),
    ));
    rows.extend(status.snapshot_mounts.iter().map(|mount| {
        let places: Vec<_> = mount
            .mountpoints
            .iter()
            .map(|at| output::printable(at.as_ref()))
            .collect();
        let places = if places.is_empty() {
            "out of sight".into()
        } else {
            places.join(", ")
        };
        let name = output::printable(mount.snapshot.as_ref());
        ("by itself", format!("{name}, at {places}"))
    }));
    rows.extend(status.suspect.iter().map(|name| {
        let name = output::printable(name.as_ref());
        ("suspect", format!("{name}, which may not be exact"))
    }));
    rows.extend(status.damage.iter().map(|line| ("damage", line.clone())));
    rows
}
