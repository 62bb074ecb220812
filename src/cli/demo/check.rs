//! Is a copy of the writers' files from one instant? Every way in which it is not, is counted.

use super::layout::{
    ACCOUNTS, Account, BANKS, Kind, Layout, Ledger, OPENING_BALANCE, PAIRS, Side, decode_count,
};
use std::path::Path;

/// What is wrong with the copy at `root`; nothing for one that is consistent.
pub(super) fn violations(root: &Path, layout: &Layout) -> Vec<String> {
    let mut found = Vec::new();
    for bank in 0..BANKS {
        check_bank(root, layout, bank, &mut found);
    }
    for kind in [Kind::Counter, Kind::Page] {
        for pair in 0..PAIRS {
            check_pair(root, layout, (kind, pair), &mut found);
        }
    }
    found
}

/// Reads one file; one that is missing or torn is a violation.
fn read<T>(path: &Path, decode: impl Fn(&[u8]) -> Option<T>, found: &mut Vec<String>) -> Option<T> {
    let name = || path.file_name().unwrap_or_default().to_string_lossy();
    match std::fs::read(path) {
        Err(error) => {
            found.push(format!("{}: {error}", name()));
            None
        }
        Ok(bytes) => {
            let value = decode(&bytes);
            if value.is_none() {
                found.push(format!("{}: torn", name()));
            }
            value
        }
    }
}

fn check_bank(root: &Path, layout: &Layout, bank: usize, found: &mut Vec<String>) {
    let ledger = read(&root.join(layout.ledger(bank)), Ledger::decode, found);
    let accounts: Vec<Option<Account>> = (0..ACCOUNTS)
        .map(|at| read(&root.join(layout.account(bank, at)), Account::decode, found))
        .collect();
    let accounts: Option<Vec<Account>> = accounts.into_iter().collect();
    if let (Some(ledger), Some(accounts)) = (ledger, accounts) {
        let wrong = bank_violations(&ledger, &accounts);
        found.extend(wrong.into_iter().map(|text| format!("bank {bank}: {text}")));
    }
}

fn bank_violations(ledger: &Ledger, accounts: &[Account]) -> Vec<String> {
    let mut found = Vec::new();
    for (at, account) in accounts.iter().enumerate() {
        let number = account.transfer;
        if number > ledger.transfer {
            found.push(format!(
                "account {at} has transfer {number}, the ledger knows only {}",
                ledger.transfer
            ));
        }
        let running = number == ledger.transfer && account.gave;
        let partner = &accounts[account.partner];
        if partner.transfer < number && !running {
            let (verb, gap) = if account.gave {
                ("gave", "never got it")
            } else {
                ("got", "never gave it")
            };
            found.push(format!(
                "account {at} {verb} in transfer {number}, account {} {gap}",
                account.partner
            ));
        }
    }
    // The newest transfer may be half done; then its amount is on the way.
    let taken = accounts[ledger.from].transfer >= ledger.transfer;
    let given = accounts[ledger.to].transfer >= ledger.transfer;
    let underway = if taken && !given { ledger.amount } else { 0 };
    let sum: i64 = accounts.iter().map(|account| account.balance).sum();
    let expected = OPENING_BALANCE * ACCOUNTS as i64;
    if sum + underway != expected {
        found.push(format!(
            "the accounts hold {:+} of what they should",
            sum + underway - expected
        ));
    }
    found
}

fn check_pair(root: &Path, layout: &Layout, (kind, pair): (Kind, usize), found: &mut Vec<String>) {
    let mut side = |side| {
        let path = root.join(layout.pair(kind, pair, side));
        read(&path, decode_count, found)
    };
    if let (Some(first), Some(second)) = (side(Side::First), side(Side::Second))
        && !(0..=1).contains(&(first - second))
    {
        found.push(format!(
            "{kind:?} {pair}: the first is at {first}, the second, written after it, at {second}"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> (Ledger, Vec<Account>) {
        let opening = Account {
            transfer: 0,
            balance: OPENING_BALANCE,
            partner: 0,
            gave: false,
        };
        let ledger = Ledger {
            transfer: 5,
            from: 1,
            to: 2,
            amount: 10,
        };
        (ledger, vec![opening; ACCOUNTS])
    }

    fn apply(accounts: &mut [Account], ledger: &Ledger, gave: bool) {
        let (own, partner) = if gave {
            (ledger.from, ledger.to)
        } else {
            (ledger.to, ledger.from)
        };
        let amount = if gave { -ledger.amount } else { ledger.amount };
        accounts[own] = Account {
            transfer: ledger.transfer,
            balance: accounts[own].balance + amount,
            partner,
            gave,
        };
    }

    #[test]
    fn every_step_of_a_transfer_is_consistent() {
        let (ledger, mut accounts) = state();
        assert!(bank_violations(&ledger, &accounts).is_empty());
        apply(&mut accounts, &ledger, true);
        assert!(bank_violations(&ledger, &accounts).is_empty());
        apply(&mut accounts, &ledger, false);
        assert!(bank_violations(&ledger, &accounts).is_empty());
    }

    #[test]
    fn mixed_instants_are_not() {
        // The receiver without the giver.
        let (ledger, mut accounts) = state();
        apply(&mut accounts, &ledger, false);
        assert_eq!(bank_violations(&ledger, &accounts).len(), 2);
        // A finished transfer of which only half is there.
        let (ledger, mut accounts) = state();
        apply(&mut accounts, &ledger, true);
        let later = Ledger {
            transfer: 6,
            from: 3,
            to: 4,
            amount: 1,
        };
        assert_eq!(bank_violations(&later, &accounts).len(), 2);
        // A ledger that is behind its accounts.
        let (ledger, mut accounts) = state();
        apply(&mut accounts, &ledger, true);
        apply(&mut accounts, &ledger, false);
        let earlier = Ledger {
            transfer: 4,
            ..ledger
        };
        assert_eq!(bank_violations(&earlier, &accounts).len(), 2);
    }
}
