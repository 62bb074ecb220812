//! A journal on a disk that fails when told to.
#![allow(dead_code, reason = "each test file uses a part of it")]

use cowfs::error::{Error, Result};
use cowfs::store::media::{FileMedia, Media, MediaFile};
use cowfs::sync::{Arc, AtomicBool, AtomicI64, AtomicU32, Ordering};
use rustix::io::Errno;

/// What is wrong with the disk, shared with the test.
#[derive(Default)]
pub(crate) struct Fault {
    /// No space is left but what is set aside already: the logs of the segments there are.
    pub(crate) full: AtomicBool,
    /// Calls until one fails; none does once it is negative.
    pub(crate) countdown: AtomicI64,
    /// The error of that one, and of all that follow if `lasts`.
    pub(crate) errno: AtomicU32,
    pub(crate) lasts: AtomicBool,
    /// How many have failed.
    pub(crate) failed: AtomicU32,
}

impl Fault {
    pub(crate) fn new() -> Arc<Self> {
        let fault = Self::default();
        fault.countdown.store(-1, Ordering::SeqCst);
        Arc::new(fault)
    }

    /// The `nth` call from now on (0: the next) fails.
    pub(crate) fn arm(&self, nth: i64, errno: Errno, lasts: bool) {
        self.errno
            .store(errno.raw_os_error() as u32, Ordering::SeqCst);
        self.lasts.store(lasts, Ordering::SeqCst);
        self.failed.store(0, Ordering::SeqCst);
        self.countdown.store(nth + 1, Ordering::SeqCst);
    }

    pub(crate) fn disarm(&self) {
        self.countdown.store(-1, Ordering::SeqCst);
    }

    fn call(&self) -> Result<()> {
        if self.countdown.load(Ordering::SeqCst) < 0 {
            return Ok(());
        }
        let left = self.countdown.fetch_sub(1, Ordering::SeqCst) - 1;
        if left > 0 {
            return Ok(());
        }
        if self.lasts.load(Ordering::SeqCst) {
            self.countdown.store(1, Ordering::SeqCst);
        } else {
            self.disarm();
        }
        self.failed.fetch_add(1, Ordering::SeqCst);
        let errno = self.errno.load(Ordering::SeqCst);
        Err(Error::Os(Errno::from_raw_os_error(errno as i32)))
    }

    fn room(&self) -> Result<()> {
        match self.full.load(Ordering::SeqCst) {
            true => Err(Error::Os(Errno::NOSPC)),
            false => Ok(()),
        }
    }
}

pub(crate) struct FaultyMedia {
    pub(crate) inner: FileMedia,
    pub(crate) fault: Arc<Fault>,
    /// What is set aside at the start of each file.
    pub(crate) log_area: u64,
}

struct FaultyFile {
    inner: Arc<dyn MediaFile>,
    fault: Arc<Fault>,
    log_area: u64,
}

impl FaultyMedia {
    fn wrap(&self, inner: Arc<dyn MediaFile>) -> Arc<dyn MediaFile> {
        Arc::new(FaultyFile {
            inner,
            fault: self.fault.clone(),
            log_area: self.log_area,
        })
    }
}

impl Media for FaultyMedia {
    fn list(&self) -> Result<Vec<u32>> {
        self.fault.call()?;
        self.inner.list()
    }
    fn create(&self, number: u32) -> Result<Arc<dyn MediaFile>> {
        self.fault.room()?;
        self.fault.call()?;
        Ok(self.wrap(self.inner.create(number)?))
    }
    fn open(&self, number: u32) -> Result<Option<Arc<dyn MediaFile>>> {
        self.fault.call()?;
        Ok(self.inner.open(number)?.map(|file| self.wrap(file)))
    }
    fn remove(&self, number: u32) -> Result<()> {
        self.fault.call()?;
        self.inner.remove(number)
    }
    fn sync_names(&self) -> Result<()> {
        self.fault.call()?;
        self.inner.sync_names()
    }
    fn allocated(&self, number: u32) -> Result<u64> {
        self.inner.allocated(number)
    }
    fn writes_in_place(&self) -> bool {
        true
    }
    fn session(&self) -> Result<Arc<dyn MediaFile>> {
        self.fault.call()?;
        Ok(self.wrap(self.inner.session()?))
    }
}

impl MediaFile for FaultyFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize> {
        self.fault.call()?;
        self.inner.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        if offset + buf.len() as u64 > self.log_area {
            self.fault.room()?;
        }
        // What fails may have written a part.
        self.fault.call().or_else(|error| {
            self.inner.write_at(&buf[..buf.len() / 2], offset)?;
            Err(error)
        })?;
        self.inner.write_at(buf, offset)
    }
    fn sync(&self) -> Result<()> {
        self.fault.call()?;
        self.inner.sync()
    }
    fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        self.fault.call()?;
        self.inner.allocate(offset, len)
    }
    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        self.fault.call()?;
        self.inner.punch(offset, len)
    }
    fn size(&self) -> Result<u64> {
        self.fault.call()?;
        self.inner.size()
    }
}
