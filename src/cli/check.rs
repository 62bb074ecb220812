//! `cowfs check`: look a store over, and make it right.

use super::{Failure, output};
use crate::config;
use crate::control;
use crate::engine::check;
use crate::error::{Error, Result};
use crate::store::{CheckReport, Finding, Severity};
use serde::Serialize;
use signal_hook::iterator::Signals;
use std::ffi::{OsStr, OsString};
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use tempfile::TempDir;

/// Look over the store of a directory: journal, index, snapshots, removed files, space.
///
/// Nothing is changed without --repair. A directory that is mounted is looked at by its daemon, while others go on
/// working in it; one that is not is kept from being mounted meanwhile, and leaks are looked for as well.
#[derive(clap::Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct Args {
    /// Make right what can be, losing nothing that is right. The directory must not be mounted.
    #[arg(long)]
    repair: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Mount options; only store=DIR has a meaning here.
    #[arg(short = 'o', value_name = "OPTS")]
    options: Vec<OsString>,
    /// The backing directory, or a path in its mount.
    source: PathBuf,
}

const EXAMPLE: &str = "\
EXAMPLE
  cowfs check /srv/data
  cowfs check /srv/data --json | jq '.findings[] | select(.severity == \"lost\")'
  cowfs umount /srv/data && cowfs check --repair /srv/data";

/// What is printed with `--json`.
#[derive(Serialize)]
struct Output<'a> {
    damaged: bool,
    repaired: &'a [String],
    #[serde(flatten)]
    report: &'a CheckReport,
}

pub(super) fn run(args: &Args) -> std::result::Result<(), Failure> {
    let store = config::parse_options(&args.options)?.store;
    let (done, report) = look(args, store)?;
    let damaged = report.is_damaged();
    if args.json {
        output::json(&Output {
            damaged,
            repaired: &done,
            report: &report,
        })?;
    } else {
        print(&done, &report)?;
    }
    if !damaged {
        return Ok(());
    }
    let remedy = if args.repair {
        "what is left is beyond repair"
    } else {
        "unmount it and run `cowfs check --repair`"
    };
    let count = report
        .findings
        .iter()
        .filter(|f| f.severity <= Severity::Wrong)
        .count();
    Err(Failure {
        code: Error::Corrupt(String::new()).exit_code(),
        message: format!(
            "{}: the store is damaged ({} findings); {remedy}",
            args.source.display(),
            count as u64 + report.more
        ),
    })
}

fn look(args: &Args, store: Option<PathBuf>) -> Result<(Vec<String>, CheckReport)> {
    if let Some((root, _)) = control::find_live(&args.source)? {
        if args.repair {
            return Err(Error::Source {
                path: args.source.clone(),
                why: format!(
                    "is mounted at {}; unmount it first (cowfs umount)",
                    root.display()
                ),
            });
        }
        return Ok((Vec::new(), control::check(&root)?));
    }
    let _scratch = scratch()?;
    let store = store.as_deref();
    if args.repair {
        check::repair(&args.source, store)
    } else {
        Ok((Vec::new(), check::examine(&args.source, store)?))
    }
}

/// Makes a directory for temporary files that nobody else may look into, as names are in the copy of the index there. It
/// goes when the value is dropped, and when a signal ends the program.
fn scratch() -> Result<TempDir> {
    let failed = |e: std::io::Error| Error::io("cannot listen for", "signals", &e);
    // First: one that comes in between is looked at by the thread.
    let mut signals = Signals::new(super::ending_signals()).map_err(failed)?;
    let place = std::env::temp_dir();
    let scratch = tempfile::Builder::new()
        .prefix("cowfs-check.")
        .permissions(Permissions::from_mode(0o700))
        .tempdir_in(&place)
        .map_err(|e| Error::io("cannot make a directory in", &place, &e))?;
    let path = scratch.path().to_owned();
    std::thread::Builder::new()
        .spawn(move || {
            for signal in signals.forever() {
                // The other thread may be making files in it.
                let gone = || std::fs::remove_dir_all(&path).is_ok() || !path.exists();
                let _ = (0..100).any(|_| gone());
                // Cannot fail for these signals; and if it did, the program would go on to its end.
                let _ = signal_hook::low_level::emulate_default_handler(signal);
            }
        })
        .map_err(failed)?;
    // Set once, as it is looked into once in the life of the program.
    let _ = tempfile::env::override_temp_dir(scratch.path());
    Ok(scratch)
}

fn print(done: &[String], report: &CheckReport) -> Result<()> {
    for line in done {
        output::line(format!("repaired: {}", output::printable(OsStr::new(line))))?;
    }
    for finding in &report.findings {
        output::line(sentence(finding))?;
    }
    if report.more > 0 {
        output::line(format!("and {} more", report.more))?;
    }
    for mark in &report.marked {
        output::line(format!(
            "marked: snapshot {}",
            output::printable(OsStr::new(mark))
        ))?;
    }
    let count = |severity| {
        report
            .findings
            .iter()
            .filter(|f| f.severity == severity)
            .count()
    };
    output::line(format!(
        "{} segments, {} records, {} entries, {} blocks: {} lost, {} wrong, {} leaks, {} notes",
        report.segments,
        report.records,
        report.entries,
        report.blocks,
        count(Severity::Lost),
        count(Severity::Wrong),
        count(Severity::Leak),
        count(Severity::Note)
    ))
}

fn sentence(finding: &Finding) -> String {
    let severity = match finding.severity {
        Severity::Lost => "lost",
        Severity::Wrong => "wrong",
        Severity::Leak => "leak",
        Severity::Note => "note",
    };
    let mut line = format!("{severity}: {}: {}", finding.thing, finding.what);
    if !finding.snapshots.is_empty() {
        line += &format!("; snapshots concerned: {}", finding.snapshots.join(", "));
    }
    output::printable(OsStr::new(&line))
}
