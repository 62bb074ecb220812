//! What a power cut has left, looked at through a mount of cowfs on the host, against what the guest has reported.

use super::plan::{Author, BLOCK, BLOCKS, SECTOR, SYNC_EVERY, State, WRITERS};
use super::{Failure, option};
use serde_json::{Value, json};
use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::hash::{Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

/// A snapshot that is known to have been created.
#[derive(Default)]
struct Known {
    /// In which round.
    round: u32,
    /// When its creation was reported; `None`: it never was.
    clock: Option<u64>,
    /// Between which steps of each writer it was cut; none if that was not reported.
    bounds: Bounds,
    /// What it showed at an earlier check, or must show because nothing had been changed before it.
    digest: Option<String>,
    suspect: bool,
}

impl Known {
    fn from_json(value: &Value) -> Self {
        let pair = |pair: &Value| (pair[0].as_u64().unwrap_or(0), pair[1].as_u64().unwrap_or(0));
        Self {
            round: value["round"].as_u64().unwrap_or(0) as u32,
            clock: value["clock"].as_u64(),
            bounds: value["bounds"]
                .as_array()
                .into_iter()
                .flatten()
                .map(pair)
                .collect(),
            digest: value["digest"].as_str().map(str::to_owned),
            suspect: value["suspect"] == true,
        }
    }

    fn to_json(&self) -> Value {
        json!({"round": self.round, "clock": self.clock, "bounds": self.bounds, "digest": self.digest,
            "suspect": self.suspect})
    }
}

/// A snapshot that the guest has reported: its name, when, and its bounds.
type Created = (String, u64, Bounds);
/// Between which steps of each writer.
type Bounds = Vec<(u64, u64)>;

/// What the guest has said in this round.
#[derive(Default)]
struct Said {
    ready: bool,
    created: Vec<Created>,
    /// Deletions that were begun, and those that were done.
    deleting: BTreeSet<String>,
    deleted: BTreeSet<String>,
    /// The last step of each writer that was synced.
    synced: BTreeMap<u32, u64>,
    /// When the latest of the syncs that are done began.
    sync_clock: u64,
}

impl Said {
    fn parse(text: &str) -> Result<Self, Failure> {
        let mut said = Self::default();
        // What came without its end was not acknowledged.
        for line in text
            .split_inclusive('\n')
            .filter(|line| line.ends_with('\n'))
        {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["READY"] => said.ready = true,
                ["S", name, clock, ref bounds @ ..] => {
                    let bounds: Result<_, Failure> = bounds
                        .iter()
                        .map(|pair| {
                            let (from, to) = pair.split_once(':').ok_or("no bounds")?;
                            Ok((from.parse()?, to.parse()?))
                        })
                        .collect();
                    said.created
                        .push((name.to_owned(), clock.parse()?, bounds?));
                }
                ["F", writer, step, clock] => {
                    said.synced.insert(writer.parse()?, step.parse()?);
                    said.sync_clock = said.sync_clock.max(clock.parse()?);
                }
                ["d", name] => drop(said.deleting.insert(name.to_owned())),
                ["D", name] => drop(said.deleted.insert(name.to_owned())),
                ["FAIL", ..] => return Err(format!("the guest failed: {line}").into()),
                _ => {}
            }
        }
        Ok(said)
    }
}

/// Checks, prints what it saw in a line, and fails at the first violation.
pub fn run(args: &[String]) -> Result<(), Failure> {
    let (mnt, file) = (option(args, "--mnt")?, option(args, "--known")?);
    let round: u32 = option(args, "--round")?.parse()?;
    let strict = option(args, "--durability")? == "strict";
    let mnt = Path::new(&mnt);
    let said = Said::parse(&fs::read_to_string(option(args, "--report")?)?)?;
    let old: Value = match fs::read_to_string(&file) {
        Ok(text) => serde_json::from_str(&text)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => json!({}),
        Err(error) => return Err(error.into()),
    };
    let rows = old["snapshots"].as_object().into_iter().flatten();
    let mut known: BTreeMap<String, Known> = rows
        .map(|(name, row)| (name.clone(), Known::from_json(row)))
        .collect();
    for (name, clock, bounds) in &said.created {
        let new = Known {
            round,
            clock: Some(*clock),
            bounds: bounds.clone(),
            ..Known::default()
        };
        known.insert(name.clone(), new);
    }
    let there = listed(&option(args, "--cowfs")?, mnt)?;
    for name in there
        .keys()
        .filter(|name| !known.contains_key(*name))
        .cloned()
        .collect::<Vec<_>>()
    {
        let new = Known {
            round,
            ..Known::default()
        };
        known.insert(name, new);
    }
    // Nothing had been changed before this one.
    if let Some(first) = known.get_mut(&format!("b{round}")) {
        first.digest = old["live"].as_str().map(str::to_owned);
    }
    let mut seen = BTreeMap::from([
        ("ok", 0),
        ("suspect", 0),
        ("suspect and changed", 0),
        ("gone", 0),
    ]);
    let mut count = |what| *seen.entry(what).or_insert(0) += 1;
    let mut left = BTreeMap::new();
    for (name, mut snapshot) in known {
        let Some(state) = there.get(&name) else {
            let excused = said.deleting.contains(&name) || said.deleted.contains(&name);
            // Its record is durable as soon as anything is that was synced after it.
            let unsynced =
                !strict && snapshot.round == round && snapshot.clock > Some(said.sync_clock);
            if !excused && !unsynced {
                return Err(
                    format!("VIOLATION: snapshot {name} was acknowledged and is gone").into(),
                );
            }
            if !excused {
                count("gone");
            }
            continue;
        };
        if said.deleted.contains(&name) {
            return Err(format!("VIOLATION: snapshot {name} was deleted and is back").into());
        }
        let exact = compare(&mnt.join(".snapshots").join(&name), &mut snapshot);
        match state.as_str() {
            "ok" => {
                exact.map_err(|why| {
                    format!("VIOLATION: snapshot {name} is ok and not what it was: {why}")
                })?;
                count("ok");
            }
            "suspect" if !strict || snapshot.clock.is_none() => {
                snapshot.suspect = true;
                count("suspect");
                if exact.is_err() {
                    count("suspect and changed");
                }
            }
            other => return Err(format!("VIOLATION: snapshot {name} is {other}").into()),
        }
        left.insert(name, snapshot.to_json());
    }
    let synced: u64 = said.synced.values().sum();
    if said.ready {
        for writer in 0..WRITERS {
            let steps = said.synced.get(&writer).copied().unwrap_or(0);
            let author = Author { round, writer };
            live(&mnt.join(author.to_string()), author, steps)
                .map_err(|why| format!("VIOLATION: {author}, synced after step {steps}: {why}"))?;
        }
    }
    let record = json!({"snapshots": left, "live": digest(mnt)?});
    fs::write(&file, record.to_string())?;
    let seen: Vec<String> = seen
        .iter()
        .map(|(what, count)| format!("{what} {count}"))
        .collect();
    println!(
        "{synced} steps synced; {} snapshots reported; {}",
        said.created.len(),
        seen.join(", ")
    );
    Ok(())
}

/// The snapshots that there are, with their states.
fn listed(cowfs: &str, mnt: &Path) -> Result<BTreeMap<String, String>, Failure> {
    let listing = Command::new(cowfs)
        .args(["snapshot", "list", "--json"])
        .arg(mnt)
        .output()?;
    if !listing.status.success() {
        return Err(format!(
            "snapshot list: {}",
            String::from_utf8_lossy(&listing.stderr)
        )
        .into());
    }
    let rows: Vec<Value> = serde_json::from_slice(&listing.stdout)?;
    let row = |row: Value| {
        let field = |name: &str| row[name].as_str().map(str::to_owned);
        Some((field("name")?, field("state")?))
    };
    rows.into_iter()
        .map(|value| row(value).ok_or_else(|| "a row without a name".into()))
        .collect()
}

/// Whether a snapshot is what it was. What one that is sound shows is remembered.
fn compare(path: &Path, snapshot: &mut Known) -> Result<(), Failure> {
    let now = digest(path)?;
    match &snapshot.digest {
        Some(before) if *before != now => return Err(format!("digest {now}, not {before}").into()),
        Some(_) => return Ok(()),
        None => {}
    }
    for writer in 0..WRITERS {
        let author = Author {
            round: snapshot.round,
            writer,
        };
        let (from, to) = match snapshot.bounds.get(writer as usize) {
            Some(bounds) => *bounds,
            // Cut before the writers began, or never reported: between any two steps.
            None if !path.join(author.to_string()).exists() => continue,
            None => (0, u64::MAX),
        };
        let found = observe(&path.join(author.to_string()), author)?;
        // No step later than the latest that left a trace, and the few that leave none.
        let trace = found
            .log
            .iter()
            .chain(&found.blocks)
            .max()
            .copied()
            .unwrap_or(0);
        let mut state = State::after(from);
        let mut step = from;
        while state != found {
            step += 1;
            if step > to.min(trace.max(found.cur) + 600) {
                return Err(format!(
                    "{author} is in no state between steps {from} and {to}: {found:?}"
                )
                .into());
            }
            state.apply(step);
        }
    }
    snapshot.digest = Some(now);
    Ok(())
}

/// Reads the directory of a writer in which every block must be whole.
fn observe(dir: &Path, author: Author) -> Result<State, Failure> {
    let read =
        |name: &str| fs::read(dir.join(name)).map_err(|error| format!("{author}/{name}: {error}"));
    let steps = |bytes: Vec<u8>| -> Result<Vec<u64>, Failure> {
        let step = |(at, block)| {
            let step = author.step_of_block(block);
            step.ok_or_else(|| format!("{author}: block {at} is no step's").into())
        };
        (0..)
            .zip(bytes.chunks(BLOCK))
            .map(step)
            .collect::<Result<_, Failure>>()
    };
    let new = match fs::read(dir.join("new")) {
        Ok(bytes) => Some(steps(bytes)?.first().copied()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        Err(error) => return Err(format!("{author}/new: {error}").into()),
    };
    let cur = steps(read("cur")?)?;
    Ok(State {
        log: steps(read("log")?)?,
        blocks: steps(read("blocks")?)?,
        new,
        cur: cur.first().copied().ok_or("cur is empty")?,
        mode: fs::metadata(dir.join("cur"))?.mode() & 0o7777,
    })
}

/// Checks the live directory of a writer who had synced all up to a step. Steps after it may have happened each or not,
/// and in part: there are no more of them than a writer makes before it syncs again.
fn live(dir: &Path, author: Author, synced: u64) -> Result<(), Failure> {
    let mut state = State::after(synced);
    let mut window = vec![state.clone()];
    for step in synced + 1..=synced + SYNC_EVERY {
        state.apply(step);
        window.push(state.clone());
    }
    let allowed =
        |of: &dyn Fn(&State) -> Option<u64>| window.iter().map(of).collect::<BTreeSet<_>>();
    let read = |name: &str| fs::read(dir.join(name)).map_err(|error| format!("{name}: {error}"));
    // Each sector of a block, which may be missing, must be of one of these steps.
    let block = |name: &str,
                 bytes: &[u8],
                 number: usize,
                 steps: BTreeSet<Option<u64>>|
     -> Result<(), Failure> {
        let settled = steps.len() == 1;
        for at in 0..BLOCK / SECTOR {
            let start = number * BLOCK + at * SECTOR;
            let found = bytes.get(start..start + SECTOR);
            let step = found.and_then(|sector| author.step_of_sector(sector, at));
            // A file that was not synced may have its length and not its bytes.
            let zeros = found.is_none_or(|sector| sector.iter().all(|byte| *byte == 0));
            if (found.is_none() || step.is_some()) && steps.contains(&step) || (zeros && !settled) {
                continue;
            }
            return Err(format!(
                "{name}, block {number}, sector {at} is of step {step:?}, not {steps:?}"
            )
            .into());
        }
        Ok(())
    };
    let (blocks, log, cur) = (read("blocks")?, read("log")?, read("cur")?);
    if blocks.len() != BLOCKS as usize * BLOCK {
        return Err(format!("blocks has {} bytes", blocks.len()).into());
    }
    for number in 0..BLOCKS as usize {
        block(
            "blocks",
            &blocks,
            number,
            allowed(&|state| Some(state.blocks[number])),
        )?;
    }
    let longest = window
        .iter()
        .map(|state| state.log.len())
        .max()
        .unwrap_or(0);
    if log.len() > longest * BLOCK {
        return Err(format!(
            "log has {} bytes, at most {longest} blocks were written",
            log.len()
        )
        .into());
    }
    for number in 0..longest {
        block(
            "log",
            &log,
            number,
            allowed(&|state| state.log.get(number).copied()),
        )?;
    }
    block("cur", &cur, 0, allowed(&|state| Some(state.cur)))?;
    let mode = fs::metadata(dir.join("cur"))?.mode() & 0o7777;
    // A new `cur` has the mode of a new file first.
    if !allowed(&|state| Some(u64::from(state.mode))).contains(&Some(u64::from(mode))) {
        return Err(format!("cur has mode {mode:o}").into());
    }
    let exists = allowed(&|state| state.new.map(|_| 1));
    if !exists.contains(&dir.join("new").exists().then_some(1)) {
        return Err("new is there or not, and must not be so".into());
    }
    Ok(())
}

/// Names, kinds, modes, owners, sizes, times and bytes of a tree.
fn digest(root: &Path) -> Result<String, Failure> {
    fn walk(path: &Path, hasher: &mut DefaultHasher) -> Result<(), Failure> {
        let failed = |error: std::io::Error| format!("{}: {error}", path.display());
        let meta = fs::symlink_metadata(path).map_err(failed)?;
        (
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.nlink(),
            meta.mtime(),
            meta.mtime_nsec(),
        )
            .hash(hasher);
        if !meta.is_dir() {
            fs::read(path).map_err(failed)?.hash(hasher);
            return Ok(());
        }
        let mut names = Vec::new();
        for entry in fs::read_dir(path).map_err(failed)? {
            names.push(entry.map_err(failed)?.file_name());
        }
        names.sort();
        for name in names {
            name.hash(hasher);
            walk(&path.join(name), hasher)?;
        }
        Ok(())
    }
    let mut hasher = DefaultHasher::new();
    walk(root, &mut hasher)?;
    Ok(format!("{:016x}", hasher.finish()))
}
