//! Stub.
use crate::config::MountConfig;
use crate::error::{Error, Result};
/// Stub.
pub fn serve(config: MountConfig, ready: impl FnOnce() + Send) -> Result<()> {
    let _ = (config, ready);
    Err(Error::Permission("no filesystem in this build".into()))
}
