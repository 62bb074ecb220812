//! The writers of the demo: they never stop by themselves, and note how long each of their writes took.

use super::layout::{
    ACCOUNTS, Account, BANKS, Kind, Layout, Ledger, OPENING_BALANCE, PAIRS, Side, encode_count,
};
use super::tree::Numbers;
use crate::error::{Error, Result};
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, Ordering, RwLock};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Each writer rests this long between transactions, as programs do. What is measured is how long a write takes,
/// so the rest is in no figure.
const REST: Duration = Duration::from_micros(300);
/// Writes below this are not noted one by one.
const NOTED: Duration = Duration::from_micros(100);

/// How long the writes took.
pub(super) struct Gauge {
    writes: AtomicU64,
    transactions: [AtomicU64; BANKS + 1],
    long: Mutex<Vec<(Instant, Instant)>>,
}

impl Gauge {
    /// Notes how long one call of a writer takes, and counts it.
    fn write<T>(&self, write: impl FnOnce() -> T) -> T {
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.time(write)
    }

    fn time<T>(&self, what: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let value = what();
        let end = Instant::now();
        if end - start >= NOTED {
            self.long.lock().push((start, end));
        }
        value
    }

    /// The longest write that was running at any time from `start` to `end`.
    pub(super) fn longest(&self, start: Instant, end: Instant) -> Duration {
        self.long
            .lock()
            .iter()
            .filter(|(from, to)| *to >= start && *from <= end)
            .map(|(from, to)| *to - *from)
            .max()
            .unwrap_or(NOTED)
    }

    pub(super) fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    fn counts(&self) -> [u64; BANKS + 1] {
        std::array::from_fn(|at| self.transactions[at].load(Ordering::Relaxed))
    }
}

/// The running writers.
pub(super) struct Writers {
    stop: Arc<AtomicBool>,
    /// Writers hold this shared for each transaction; a freeze holds it alone.
    pub(super) gate: Arc<RwLock<()>>,
    pub(super) gauge: Arc<Gauge>,
    threads: Vec<JoinHandle<Result<()>>>,
}

/// What each writer has at hand.
struct Desk {
    stop: Arc<AtomicBool>,
    gate: Arc<RwLock<()>>,
    gauge: Arc<Gauge>,
    number: usize,
}

impl Desk {
    /// Repeats a transaction until it is told to stop.
    fn work(&self, mut transaction: impl FnMut() -> Result<()>) -> Result<()> {
        while !self.stop.load(Ordering::Relaxed) {
            // A writer that is held up here is held up as by a frozen filesystem: it counts.
            let hold = self.gauge.time(|| self.gate.read());
            transaction()?;
            drop(hold);
            self.gauge.transactions[self.number].fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(REST);
        }
        Ok(())
    }
}

impl Writers {
    /// Creates the writers' files in the mount at `root` and sets them to work.
    pub(super) fn start(root: &Path, layout: &Layout) -> Result<Self> {
        let gauge = Gauge {
            writes: AtomicU64::new(0),
            transactions: std::array::from_fn(|_| AtomicU64::new(0)),
            long: Mutex::new(Vec::new()),
        };
        let mut writers = Self {
            stop: Arc::new(AtomicBool::new(false)),
            gate: Arc::new(RwLock::new(())),
            gauge: Arc::new(gauge),
            threads: Vec::new(),
        };
        let banks: Vec<Bank> = (0..BANKS)
            .map(|bank| Bank::open(root, layout, bank))
            .collect::<Result<_>>()?;
        let pairs = Pairs::open(root, layout)?;
        for (number, bank) in banks.into_iter().enumerate() {
            let desk = writers.desk(number);
            let work = move || bank.work(&desk);
            writers.threads.push(std::thread::spawn(work));
        }
        let desk = writers.desk(BANKS);
        let work = move || pairs.work(&desk);
        writers.threads.push(std::thread::spawn(work));
        Ok(writers)
    }

    fn desk(&self, number: usize) -> Desk {
        Desk {
            stop: Arc::clone(&self.stop),
            gate: Arc::clone(&self.gate),
            gauge: Arc::clone(&self.gauge),
            number,
        }
    }

    pub(super) fn count(&self) -> usize {
        self.threads.len()
    }

    /// Waits until each writer has finished what it was at, so that the gauge has it.
    pub(super) fn settle(&self) -> Result<()> {
        let before = self.gauge.counts();
        let deadline = Instant::now() + Duration::from_secs(20);
        // The second transaction from here began after now.
        while std::iter::zip(before, self.gauge.counts()).any(|(old, new)| new < old + 2) {
            if self.threads.iter().any(JoinHandle::is_finished) || Instant::now() > deadline {
                return Err(Error::Check(
                    "a writer got stuck or failed; the demo is not valid".into(),
                ));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Ends the writers; says so if one had failed.
    pub(super) fn stop(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let mut result = Ok(());
        for thread in self.threads.drain(..) {
            let end = thread
                .join()
                .unwrap_or_else(|_| Err(Error::Check("a writer of the demo panicked".into())));
            result = result.and(end);
        }
        result
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        // Only reached with writers running when something else has failed already.
        let _ = self.stop();
    }
}

/// A file that is kept open and written in place.
struct Slot {
    path: PathBuf,
    file: File,
}

impl Slot {
    fn create(path: PathBuf, record: &[u8]) -> Result<Self> {
        let file =
            File::create(&path).map_err(|error| Error::io("cannot create", &path, &error))?;
        let slot = Self { path, file };
        slot.write(record)?;
        Ok(slot)
    }

    fn write(&self, record: &[u8]) -> Result<()> {
        self.file
            .write_all_at(record, 0)
            .map_err(|error| Error::io("cannot write", &self.path, &error))
    }
}

struct Bank {
    ledger: Slot,
    accounts: Vec<Slot>,
    numbers: Numbers,
}

impl Bank {
    fn open(root: &Path, layout: &Layout, bank: usize) -> Result<Self> {
        let ledger = Ledger {
            transfer: 0,
            from: 0,
            to: 1,
            amount: 0,
        };
        let account = Account {
            transfer: 0,
            balance: OPENING_BALANCE,
            partner: 0,
            gave: false,
        };
        let accounts = (0..ACCOUNTS).map(|at| {
            let path = root.join(layout.account(bank, at));
            Slot::create(path, &account.encode())
        });
        Ok(Self {
            ledger: Slot::create(root.join(layout.ledger(bank)), &ledger.encode())?,
            accounts: accounts.collect::<Result<_>>()?,
            numbers: Numbers::new(bank as u64),
        })
    }

    fn work(mut self, desk: &Desk) -> Result<()> {
        let mut balances = [OPENING_BALANCE; ACCOUNTS];
        let mut transfer = 0;
        desk.work(|| {
            transfer += 1;
            let from = self.numbers.below(ACCOUNTS);
            let to = (from + 1 + self.numbers.below(ACCOUNTS - 1)) % ACCOUNTS;
            let amount = 1 + self.numbers.below(999) as i64;
            balances[from] -= amount;
            balances[to] += amount;
            let ledger = Ledger {
                transfer,
                from,
                to,
                amount,
            };
            let account = |own: usize, partner, gave| Account {
                transfer,
                balance: balances[own],
                partner,
                gave,
            };
            let write = |slot: &Slot, record: &[u8]| desk.gauge.write(|| slot.write(record));
            write(&self.ledger, &ledger.encode())?;
            write(&self.accounts[from], &account(from, to, true).encode())?;
            write(&self.accounts[to], &account(to, from, false).encode())
        })
    }
}

struct Pairs {
    counters: Vec<[Slot; 2]>,
    pages: Vec<[PathBuf; 2]>,
}

impl Pairs {
    fn open(root: &Path, layout: &Layout) -> Result<Self> {
        let zero = encode_count(0);
        let paths = |kind, pair| {
            [Side::First, Side::Second].map(|side| root.join(layout.pair(kind, pair, side)))
        };
        let mut pairs = Self {
            counters: Vec::new(),
            pages: Vec::new(),
        };
        for pair in 0..PAIRS {
            let [first, second] = paths(Kind::Counter, pair);
            let slots = [Slot::create(first, &zero)?, Slot::create(second, &zero)?];
            pairs.counters.push(slots);
            let pages = paths(Kind::Page, pair);
            for page in &pages {
                Slot::create(page.clone(), &zero)?;
            }
            pairs.pages.push(pages);
        }
        Ok(pairs)
    }

    fn work(self, desk: &Desk) -> Result<()> {
        let mut step = 0;
        desk.work(|| {
            let pair = step % PAIRS;
            let record = encode_count((step / PAIRS) as i64 + 1);
            step += 1;
            for slot in &self.counters[pair] {
                desk.gauge.write(|| slot.write(&record))?;
            }
            for page in &self.pages[pair] {
                replace(page, &record, &desk.gauge)?;
            }
            Ok(())
        })
    }
}

/// Puts a new file in the place of an old one, as programs save documents.
fn replace(path: &Path, record: &[u8], gauge: &Gauge) -> Result<()> {
    let new = path.with_extension("new");
    let create = || -> std::io::Result<()> {
        let file = gauge.write(|| File::create(&new))?;
        gauge.write(|| file.write_all_at(record, 0))?;
        gauge.write(|| fs::rename(&new, path))
    };
    create().map_err(|error| Error::io("cannot replace", path, &error))
}
