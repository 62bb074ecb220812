//! Ctrl-C, SIGTERM and the end of the terminal end the demo in good order: each step looks here, and the clean-up runs.

use crate::error::{Error, Result};
use crate::sync::{Arc, AtomicBool, Ordering};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

/// Whether the user wants the demo to end.
#[derive(Clone)]
pub(super) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    pub(super) fn install() -> Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in crate::cli::ending_signals() {
            signal_hook::flag::register(signal, Arc::clone(&flag))
                .map_err(|error| Error::io("cannot handle", "signals", &error))?;
        }
        Ok(Self(flag))
    }

    pub(super) fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) {
            return Err(Error::path("stopped and cleaned up", "demo", Errno::INTR));
        }
        Ok(())
    }

    pub(super) fn sleep(&self, time: Duration) -> Result<()> {
        std::thread::sleep(time);
        self.check()
    }

    /// Runs a program to its end, or kills it when interrupted.
    pub(super) fn run(&self, command: &mut Command) -> Result<ExitStatus> {
        let name = command.get_program().to_os_string();
        let mut child = command
            .spawn()
            .map_err(|error| Error::io("cannot run", &name, &error))?;
        let end = self.wait(&mut child, &name);
        if end.is_err() {
            // It may have ended by itself, which is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
        end
    }

    fn wait(&self, child: &mut Child, name: &OsStr) -> Result<ExitStatus> {
        loop {
            match child.try_wait() {
                Ok(Some(status)) => return Ok(status),
                Ok(None) => self.sleep(Duration::from_millis(2))?,
                Err(error) => return Err(Error::io("cannot wait for", name, &error)),
            }
        }
    }
}
