//! Stub
use crate::error::Result;
/// Show it.
#[derive(clap::Args)]
#[command(after_help = "EXAMPLE")]
pub(super) struct Args {}
pub(super) fn run(_: &Args) -> Result<()> {
    Ok(())
}
