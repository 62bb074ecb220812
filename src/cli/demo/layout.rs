//! The files that the writers keep consistent with one another, and their format.
//!
//! * Banks: an amount moves from one account to another, each account being a file of its own. The writer first
//!   notes the transfer in the bank's ledger, then takes the amount, then gives it.
//! * Counters: `first` is counted up before `second`, in two files far apart.
//! * Pages: the same, but each file is replaced by a new one that is renamed over it.
//!
//! Each change is one write or one rename, so at every instant a bank has at most one transfer that is half done
//! (the one in its ledger), and `first` is at most one ahead of `second`.

use std::path::{Path, PathBuf};

pub(super) const BANKS: usize = 2;
pub(super) const ACCOUNTS: usize = 24;
pub(super) const OPENING_BALANCE: i64 = 1_000_000;
pub(super) const PAIRS: usize = 8;
/// Bytes of each of these files.
pub(super) const RECORD: usize = 64;

/// The last transfer that touched an account. Transfer 0 is its opening.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) transfer: i64,
    pub(super) balance: i64,
    pub(super) partner: usize,
    /// Whether this account gave.
    pub(super) gave: bool,
}

/// The newest transfer of a bank: begun, and perhaps not yet done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ledger {
    pub(super) transfer: i64,
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) amount: i64,
}

/// One of the two files of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    First,
    Second,
}

/// How the files of a pair are changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Written in place.
    Counter,
    /// Replaced by rename.
    Page,
}

impl Account {
    pub(super) fn encode(&self) -> Vec<u8> {
        let gave = i64::from(self.gave);
        encode([self.transfer, self.balance, self.partner as i64, gave])
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let [transfer, balance, partner, gave] = decode(bytes)?;
        Some(Self {
            transfer,
            balance,
            partner: index(partner)?,
            gave: gave != 0,
        })
    }
}

impl Ledger {
    pub(super) fn encode(&self) -> Vec<u8> {
        encode([self.transfer, self.from as i64, self.to as i64, self.amount])
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let [transfer, from, to, amount] = decode(bytes)?;
        Some(Self {
            transfer,
            from: index(from)?,
            to: index(to)?,
            amount,
        })
    }
}

fn index(number: i64) -> Option<usize> {
    usize::try_from(number).ok().filter(|&at| at < ACCOUNTS)
}

pub(super) fn encode_count(count: i64) -> Vec<u8> {
    encode([count])
}

pub(super) fn decode_count(bytes: &[u8]) -> Option<i64> {
    decode(bytes).map(|[count]| count)
}

/// Numbers as text, padded to the length of a record, so that one can look at the files.
fn encode<const N: usize>(numbers: [i64; N]) -> Vec<u8> {
    let text = numbers.map(|number| number.to_string()).join(" ");
    let width = RECORD - 1;
    format!("{text:<width$}\n").into_bytes()
}

fn decode<const N: usize>(bytes: &[u8]) -> Option<[i64; N]> {
    if bytes.len() != RECORD || bytes.last() != Some(&b'\n') {
        return None;
    }
    let numbers: Vec<i64> = std::str::from_utf8(bytes)
        .ok()?
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()
        .ok()?;
    numbers.try_into().ok()
}

/// Where the files are, relative to the root of the tree or of a copy.
pub(super) struct Layout {
    directories: Vec<PathBuf>,
}

impl Layout {
    /// Spreads the files over these directories, given relative to the root.
    pub(super) fn new(mut directories: Vec<PathBuf>) -> Self {
        directories.sort();
        Self { directories }
    }

    fn spread(&self, position: usize, of: usize) -> &Path {
        &self.directories[position * (self.directories.len() - 1) / (of - 1).max(1)]
    }

    pub(super) fn account(&self, bank: usize, account: usize) -> PathBuf {
        self.spread(account, ACCOUNTS)
            .join(format!("demo-account-{bank}-{account:02}"))
    }

    /// The ledgers are in the middle of the copier's way.
    pub(super) fn ledger(&self, bank: usize) -> PathBuf {
        self.spread(bank + 1, BANKS + 2)
            .join(format!("demo-ledger-{bank}"))
    }

    /// The two files of a pair are far apart, half of the pairs the one way round, half the other.
    pub(super) fn pair(&self, kind: Kind, pair: usize, side: Side) -> PathBuf {
        let far = (side == Side::Second) != (pair % 2 == 1);
        let position = if far {
            2 * PAIRS - 1 - pair / 2
        } else {
            pair / 2
        };
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Page => "page",
        };
        let side = match side {
            Side::First => "first",
            Side::Second => "second",
        };
        self.spread(position, 2 * PAIRS)
            .join(format!("demo-{kind}-{pair}-{side}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_of_one_length_and_come_back() {
        let account = Account {
            transfer: i64::MAX,
            balance: -5,
            partner: 3,
            gave: true,
        };
        assert_eq!(account.encode().len(), RECORD);
        assert_eq!(Account::decode(&account.encode()), Some(account));
        let ledger = Ledger {
            transfer: 9,
            from: 1,
            to: 2,
            amount: 77,
        };
        assert_eq!(Ledger::decode(&ledger.encode()), Some(ledger));
        assert_eq!(decode_count(&encode_count(12)), Some(12));
    }

    #[test]
    fn torn_records_are_not_read() {
        let whole = encode_count(12);
        assert_eq!(decode_count(&whole[..RECORD - 1]), None);
        assert_eq!(decode_count(b""), None);
        assert_eq!(decode_count(&[0; RECORD]), None);
        assert_eq!(Account::decode(&whole), None);
    }

    #[test]
    fn one_directory_is_enough() {
        let layout = Layout::new(vec!["".into()]);
        assert_eq!(layout.account(1, 23), Path::new("demo-account-1-23"));
        assert_eq!(
            layout.pair(Kind::Page, 7, Side::Second),
            Path::new("demo-page-7-second")
        );
    }
}
