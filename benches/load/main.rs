//! The measuring loops of `scripts/bench`, the same for every filesystem. One call measures one thing in one directory
//! and prints one line of JSON. `scripts/bench` makes the filesystems and knows what the figures mean.

#![allow(clippy::unwrap_used, reason = "a measurement may panic")]

mod cut;
mod data;
mod files;
mod index;

use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

const USAGE: &str = "usage: load WHAT [--OPTION VALUE ...]; scripts/bench calls it";

/// The options of a call; each has a value.
pub struct Options(HashMap<String, String>);

impl Options {
    fn text(&self, name: &str) -> &str {
        let value = self.0.get(name);
        value.unwrap_or_else(|| panic!("--{name} is missing: {USAGE}"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.text(name).into()
    }

    fn number(&self, name: &str) -> u64 {
        let text = self.text(name);
        text.parse()
            .unwrap_or_else(|_| panic!("--{name}: {text} is not a number"))
    }

    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    fn milliseconds(&self, name: &str) -> Duration {
        Duration::from_millis(self.number(name))
    }
}

/// What was done in which time, as the line of JSON that every measurement of speed prints.
fn rate(operations: u64, bytes: u64, began: Instant) -> Value {
    json!({"operations": operations, "bytes": bytes, "seconds": began.elapsed().as_secs_f64()})
}

/// Numbers that look random, the same in every run: xorshift64.
pub struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(88_172_645_463_325_252 ^ (seed << 17))
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }
}

fn main() {
    let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
    let Some(what) = words.next() else {
        println!("{USAGE}");
        return;
    };
    let mut options = HashMap::new();
    while let Some(word) = words.next() {
        let name = word.strip_prefix("--").expect(USAGE).to_owned();
        options.insert(name, words.next().expect(USAGE));
    }
    let options = Options(options);
    let line = match what.as_str() {
        "fill" => data::fill(&options),
        "sequential-read" => data::sequential_read(&options),
        "sequential-write" => data::sequential_write(&options),
        "random-read" => data::random(&options, false),
        "random-write" => data::random(&options, true),
        "sync-write" => data::sync_write(&options),
        "append" => data::append(&options),
        "once" => data::overwrite_once(&options),
        "tree" => files::tree(&options),
        "create" => files::create(&options),
        "stat" => files::stat(&options),
        "open" => files::open(&options),
        "rename" => files::rename(&options),
        "unlink" => files::unlink(&options),
        "cut" => cut::writers(&options),
        "series" => cut::series(&options),
        "index" => index::index(&options),
        _ => panic!("{what}: {USAGE}"),
    };
    println!("{line}");
}
