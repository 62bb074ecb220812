//! Hostile bytes: what cowfs reads from a disk, from a command line and from the mount table must never make it
//! panic or allocate without bound. The functions are those of fuzz/; here a mutator with a seed drives them.
#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "support/plain.rs"]
mod plain;

use cowfs::config::parse_options;
use cowfs::control::MountOrder;
use cowfs::mounts;
use cowfs::store::fuzz;
use plain::rng;
use rand::Rng;
use rand::rngs::SmallRng;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Inputs for each function; `COWFS_FUZZ_INPUTS` makes it longer (scripts/fuzz).
fn inputs() -> u64 {
    std::env::var("COWFS_FUZZ_INPUTS").map_or(20_000, |n| n.parse().unwrap())
}

/// The segments of the golden store.
fn golden() -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1/journal");
    let files = std::fs::read_dir(dir).unwrap();
    files
        .map(|file| std::fs::read(file.unwrap().path()).unwrap())
        .collect()
}

/// The bodies of all records of the golden store, each after its type.
fn bodies() -> Vec<Vec<u8>> {
    let mut bodies = Vec::new();
    for segment in golden() {
        let mut at = 0;
        while let Some(head) = segment.get(at..at + 24) {
            let number =
                |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap()) as usize;
            let (len, body) = (number(4), number(12));
            if len == 0 {
                break;
            }
            bodies.push([&[head[8]], &segment[at + 24..at + 24 + body]].concat());
            at += len;
        }
    }
    assert!(bodies.len() > 10);
    bodies
}

/// Changes some bytes in one of the ways that find bugs.
fn mutate(rng: &mut SmallRng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut data = seeds[rng.random_range(0..seeds.len())].clone();
    for _ in 0..rng.random_range(0..6) {
        let at = rng.random_range(0..=data.len());
        match rng.random_range(0..7) {
            0 => data.truncate(at),
            1 => data.insert(at, rng.random()),
            2 if at + 8 <= data.len() => data[at..at + 8].fill(0xff),
            3 if at + 4 <= data.len() => {
                let number: u32 = 1 << rng.random_range(0..32);
                data[at..at + 4].copy_from_slice(&number.to_le_bytes());
            }
            4 => {
                let other = &seeds[rng.random_range(0..seeds.len())];
                let from = rng.random_range(0..=other.len());
                data.truncate(at);
                data.extend_from_slice(&other[from..]);
            }
            _ if at < data.len() => data[at] ^= 1 << rng.random_range(0..8),
            _ => {}
        }
    }
    data
}

fn drive(test: &str, seeds: &[Vec<u8>], share: u64, target: impl Fn(&[u8])) {
    let mut rng = rng(test);
    seeds.iter().for_each(|seed| target(seed));
    for _ in 0..inputs() / share {
        target(&mutate(&mut rng, seeds));
    }
}

#[test]
fn records() {
    drive("records", &bodies(), 1, fuzz::record);
}

#[test]
fn frames() {
    let framed: Vec<Vec<u8>> = bodies()
        .chunks(5)
        .map(|some| {
            let mut all = Vec::new();
            for body in some {
                all.extend_from_slice(&[body[0], 0]);
                all.extend_from_slice(&(body.len() as u16 - 1).to_le_bytes());
                all.extend_from_slice(&body[1..]);
            }
            all.extend_from_slice(&[3, 1, 16, 0]);
            all.extend_from_slice(&[0; 8]);
            all.extend_from_slice(&[0, 0, 0, 32, 0, 16, 0, 0]);
            all
        })
        .collect();
    drive("frames", &framed, 10, fuzz::framed);
}

#[test]
fn segments() {
    drive("segments", &golden(), 50, fuzz::segment);
}

#[test]
fn entries_of_the_index() {
    let key = |tag: u8, len: usize| [&[tag], &vec![7; len - 1][..]].concat();
    let pair = |key: Vec<u8>, value: &[u8]| [&[key.len() as u8], &key[..], value].concat();
    let mut seeds = vec![
        pair(key(b'd', 35), &[2, 0, 9, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]),
        pair(key(b't', 18), &[]),
        pair(b"ms\0\0\0\x01".to_vec(), &[0; 32]),
        pair(b"m-state".to_vec(), &[1; 46]),
    ];
    for body in bodies() {
        let tag = [b'a', b'e', b'r', b'b', b'm'][usize::from(body[0]) % 5];
        seeds.push(pair(key(tag, 17), &body));
    }
    drive("entries", &seeds, 1, fuzz::entry);
}

#[test]
fn options_and_orders_and_the_mount_table() {
    let seeds: Vec<Vec<u8>> = [
        "ro,allow_other,store=/a\\,b,snapshot-dir=.s,durability=strict,sync-interval=100,fsname=x",
        "snapshot=nightly,noatime,comment=x,x-systemd.automount",
        "user.cowfs.mount.7.0:57",
        "36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=continue",
    ]
    .iter()
    .map(|text| text.as_bytes().to_vec())
    .collect();
    drive("options", &seeds, 1, |data| {
        let text = OsStr::from_bytes(data);
        let _ = parse_options(&[text]);
        let _ = MountOrder::parse(text);
        let _ = mounts::parse(data);
    });
}
