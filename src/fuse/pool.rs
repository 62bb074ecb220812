//! Threads for requests that may block for long, so that they hold up no other request.

use crate::error::{Error, Result};
use crate::sync::channel::{Sender, unbounded};

type Job = Box<dyn FnOnce() + Send>;

/// A fixed number of threads that run jobs in the order they come.
pub(super) struct Pool {
    jobs: Sender<Job>,
}

impl Pool {
    /// Starts `threads` threads, which end when the pool is dropped and its jobs are done.
    pub(super) fn new(name: &str, threads: usize) -> Result<Self> {
        let (jobs, queue) = unbounded::<Job>();
        for _ in 0..threads {
            let queue = queue.clone();
            std::thread::Builder::new()
                .name(format!("cowfs-{name}"))
                .spawn(move || queue.iter().for_each(|job| job()))
                .map_err(|e| Error::io("cannot start a thread", name, &e))?;
        }
        Ok(Self { jobs })
    }

    /// Runs `job` on one of the threads.
    pub(super) fn run(&self, job: impl FnOnce() + Send + 'static) {
        // The queue outlives the pool's threads only while the process ends; the kernel then answers the
        // request with ENOTCONN.
        if self.jobs.send(Box::new(job)).is_err() {
            log::error!("a request came after the end");
        }
    }
}
