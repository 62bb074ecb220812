//! The parts of `scripts/power-cuts`: the work inside the guest, the disk that forgets what was not flushed, a round of
//! one guest until its power is cut, and the check of what is left.
//!
//! `power_cuts guest …` runs in the guest, `power_cuts round …` and `power_cuts check …` on the host.

mod check;
mod disk;
mod guest;
mod plan;
mod round;

use std::process::ExitCode;

/// What went wrong, for the person who runs the script.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The value of `--name VALUE` among the arguments.
fn option(args: &[String], name: &str) -> Result<String, Failure> {
    let at = args.iter().position(|arg| arg == name);
    let value = at.and_then(|at| args.get(at + 1));
    value
        .cloned()
        .ok_or_else(|| format!("{name} is missing").into())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let done = match args.first().map(String::as_str) {
        Some("guest") => guest::run(&args),
        Some("round") => round::run(&args),
        Some("check") => check::run(&args),
        _ => Err("a part of scripts/power-cuts: guest, round or check".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("power_cuts: {error}");
            ExitCode::FAILURE
        }
    }
}
