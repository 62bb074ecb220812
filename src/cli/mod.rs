//! The command line: one file per command. Here: the choice of the command, and the way an error leaves.

mod check;
mod daemon;
mod demo;
mod destroy;
mod keeper;
mod mount;
mod mount_snapshot;
mod output;
mod snapshot;
mod status;
mod umount;
mod verify;

use crate::error::Error;
use clap::{Parser, Subcommand};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Exact snapshots of any directory, without making writers wait.
///
/// cowfs mounts a directory and keeps the old value of whatever changes after a snapshot was cut. A snapshot is
/// a read-only directory that any program can copy at leisure while writers go on.
#[derive(Parser)]
#[command(name = "cowfs", version, max_term_width = 100, after_help = EXAMPLE, after_long_help = EXAMPLE_LONG)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLE: &str = "\
EXAMPLE
  cowfs mount /srv/data               mount a directory over itself
  mkdir /srv/data/.snapshots/monday   cut a snapshot
  cp -a /srv/data/.snapshots/monday /backup/
  rmdir /srv/data/.snapshots/monday   delete it
  cowfs umount /srv/data";

const EXAMPLE_LONG: &str = "\
EXAMPLE
  cowfs mount /srv/data               mount a directory over itself
  mkdir /srv/data/.snapshots/monday   cut a snapshot
  cp -a /srv/data/.snapshots/monday /backup/
  rmdir /srv/data/.snapshots/monday   delete it
  cowfs umount /srv/data

EXIT CODES
  0 done   1 a system call failed   2 wrong use   3 the source cannot be used
  4 the mount point cannot be used, or is no cowfs mount   5 no permission, or no /dev/fuse
  6 the store is damaged or foreign   7 the snapshot's name   8 a check found wrong data";

#[derive(Subcommand)]
enum Command {
    Mount(mount::Args),
    Umount(umount::Args),
    Snapshot(snapshot::Args),
    Status(status::Args),
    Demo(demo::Args),
    Destroy(destroy::Args),
    Check(check::Args),
    Verify(verify::Args),
    /// Started by the daemon itself (see [`crate::fuse::flush`]).
    ///
    /// EXAMPLE: not for use by hand.
    #[command(name = crate::fuse::flush::HELPER_COMMAND, hide = true)]
    FlushHelper {
        /// Try what the kernel does, on a mount made for it.
        #[arg(long)]
        probe: bool,
        /// The mount.
        mountpoint: PathBuf,
    },
}

/// Runs the command that the arguments (with the program's name first) ask for.
pub fn run(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.collect();
    take_name();
    match dispatch(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::complain(&failure.message);
            ExitCode::from(failure.code)
        }
    }
}

/// ps(1), top(1) and pgrep(1) show the last part of the path that was executed, and cowfs starts its own processes by
/// `/proc/self/exe`.
fn take_name() {
    if rustix::thread::name().is_ok_and(|name| name.as_c_str() == c"exe")
        && let Err(errno) = rustix::thread::set_name(c"cowfs")
    {
        log::debug!("the process has no name: {errno}");
    }
}

/// How a command ends that does not end well: its own error, or what the daemon reported.
struct Failure {
    code: u8,
    message: String,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self {
            code: error.exit_code(),
            message: error.to_string(),
        }
    }
}

fn dispatch(arguments: &[OsString]) -> Result<(), Failure> {
    match called_as(arguments) {
        // mount(8) and umount(8) look for helpers of these names.
        Some("mount.cowfs" | "mount.fuse.cowfs") => {
            mount::run_as_helper(&mount::HelperArgs::parse_from(arguments))
        }
        Some("umount.cowfs" | "umount.fuse.cowfs") => Ok(umount::run(
            &umount::HelperArgs::parse_from(arguments).into(),
        )?),
        _ => match Cli::parse_from(arguments).command {
            Command::Mount(args) => mount::run(&args),
            Command::Umount(args) => Ok(umount::run(&args)?),
            Command::Snapshot(args) => Ok(snapshot::run(&args)?),
            Command::Status(args) => Ok(status::run(&args)?),
            Command::Demo(args) => demo::run(&args),
            Command::Destroy(args) => Ok(destroy::run(&args)?),
            Command::Check(args) => check::run(&args),
            Command::Verify(args) => verify::run(&args),
            Command::FlushHelper {
                probe: true,
                mountpoint,
            } => Ok(crate::fuse::probe::run_writer(&mountpoint)?),
            Command::FlushHelper { mountpoint, .. } => {
                Ok(crate::fuse::flush::run_helper(&mountpoint)?)
            }
        },
    }
}

/// The signals that end a command which has something to take away first, but for those that were ignored when it was
/// started: by nohup(1), or by a shell for its background jobs.
fn ending_signals() -> Vec<i32> {
    // proc(5)
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    let is_ignored = |signal: &i32| ignored.unwrap_or(0) >> (signal - 1) & 1 == 1;
    let mut signals = vec![SIGINT, SIGTERM, SIGHUP];
    signals.retain(|signal| !is_ignored(signal));
    signals
}

fn called_as(arguments: &[OsString]) -> Option<&str> {
    Path::new(arguments.first()?)
        .file_name()
        .and_then(OsStr::to_str)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
        mount::HelperArgs::command().debug_assert();
        umount::HelperArgs::command().debug_assert();
    }

    #[test]
    fn every_command_shows_an_example() {
        fn check(command: &mut clap::Command) {
            let help = command.render_long_help().to_string();
            assert!(help.contains("EXAMPLE"), "{help}");
            for sub in command
                .get_subcommands_mut()
                .filter(|sub| sub.get_name() != "help")
            {
                check(sub);
            }
        }
        check(&mut Cli::command());
    }
}
