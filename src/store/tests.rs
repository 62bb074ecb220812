//! Codec round trips, hostile bytes, and the memtable's merging.

use super::frame::{self, Body};
use super::index::MemoryIndex;
use super::journal::lsn_at;
use super::key::{self, Aspect, Piece, Touch};
use super::layers::Layers;
use super::record::{Extent, Place, Record};
use super::table::{Change, Edit, Rows, Table};
use super::types::{
    AttrImage, EntryImage, ObjectHandle, Retained, SnapshotInfo, SnapshotState, Timestamp,
};
use crate::ids::{BLOCK, Epoch, Ino, Lsn};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const UUID: u128 = 0x1234_5678_9abc_def0;
const TIME: Timestamp = Timestamp {
    sec: -5,
    nsec: 999_999_999,
};

fn handle(len: usize) -> ObjectHandle {
    ObjectHandle {
        kind: -3,
        bytes: vec![9; len].into(),
    }
}

fn info(epoch: u64, state: SnapshotState) -> SnapshotInfo {
    SnapshotInfo {
        epoch: Epoch(epoch),
        name: vec![0xff, b'n'],
        created: TIME,
        held: epoch == 2,
        state,
    }
}

fn records() -> Vec<Record> {
    let time = TIME;
    let image = AttrImage {
        mode: 0o104_755,
        uid: u32::MAX,
        size: u64::MAX,
        rdev: 0x0103,
        atime: time,
        btime: Some(time),
        xattrs: vec![
            (b"user.a".to_vec(), vec![]),
            (b"security.b".to_vec(), vec![1; 70_000]),
        ],
        ..AttrImage::default()
    };
    let retained = Retained {
        ino: Ino(7),
        kind: 8,
        handle: handle(128),
        birth: Epoch(1),
        removed: Epoch(9),
        origin: Some((Ino(3), handle(0), vec![b'x'; 255])),
        whiteout: true,
    };
    let was = EntryImage {
        ino: Ino(u64::MAX),
        kind: 4,
        handle: handle(8),
    };
    let place = Some(Place {
        block: 77,
        crcs: vec![1, 2, u32::MAX],
    });
    let states = [
        SnapshotState::Ready,
        SnapshotState::Deleting,
        SnapshotState::Suspect,
        SnapshotState::Invalid,
    ];
    let mut snapshots = Rows::default();
    for (state, epoch) in states.into_iter().zip(1..) {
        snapshots.set(info(epoch, state));
    }
    let edits = vec![
        (Epoch(1), Edit::Drop),
        (Epoch(2), Edit::Set(info(2, SnapshotState::Suspect))),
        (Epoch(3), Edit::State(SnapshotState::Invalid)),
    ];
    let (ino, dir, label) = (Ino(5), Ino(6), Epoch(4));
    vec![
        Record::Segment {
            uuid: UUID,
            number: 3,
            log_area: 1 << 20,
        },
        Record::Table(Table {
            version: 8,
            epoch: Epoch(12),
            snapshots,
        }),
        Record::Change(Change {
            version: 9,
            epoch: Epoch(13),
            edits,
        }),
        Record::Attr { ino, label, image },
        Record::Attr {
            ino,
            label,
            image: AttrImage::default(),
        },
        Record::Entry {
            dir,
            label,
            name: vec![0xfe; 255],
            was: Some(was),
        },
        Record::Entry {
            dir,
            label,
            name: b"a".to_vec(),
            was: None,
        },
        Record::Extent(Extent {
            ino,
            label,
            first_block: 253,
            blocks: 3,
            place,
        }),
        Record::Extent(Extent {
            ino,
            label,
            first_block: u64::MAX,
            blocks: 1,
            place: None,
        }),
        Record::Birth { ino, epoch: label },
        Record::Retained {
            gone: true,
            retained,
        },
        Record::Seal { used: 12_345 },
    ]
}

#[test]
fn records_come_back_as_they_were() {
    for record in records() {
        let body = record.body();
        assert_eq!(Record::decode(record.kind(), &body).unwrap(), record);
        let lsn = lsn_at(9, 64);
        let mut bytes = vec![0xee; 3];
        let inline = Body::Inline(body[..body.len().min(frame::MAX_INLINE)].to_vec());
        frame::put_frame(&mut bytes, UUID, record.kind(), &inline, lsn);
        let frame = frame::get_frame(&bytes[3..], UUID, lsn).unwrap();
        assert_eq!(
            (frame.kind, frame.body, frame.len),
            (record.kind(), inline, bytes.len() - 3)
        );
        assert_eq!(frame.len % 8, 0);
        // Neither another store's, nor of another place.
        assert_eq!(frame::get_frame(&bytes[3..], UUID + 1, lsn), None);
        assert_eq!(frame::get_frame(&bytes[3..], UUID, lsn_at(9, 72)), None);
    }
}

#[test]
fn what_could_not_be_read_back_is_refused() {
    let (dir, label) = (Ino(1), Epoch(1));
    let entry = |name: &[u8], was| {
        Record::Entry {
            dir,
            label,
            name: name.to_vec(),
            was,
        }
        .check()
    };
    let was = |len| {
        Some(EntryImage {
            ino: Ino(2),
            kind: 8,
            handle: handle(len),
        })
    };
    assert!(entry(&[b'n'; 255], was(128)).is_ok());
    assert!(entry(&[b'n'; 256], None).is_err());
    assert!(entry(b"a\0b", None).is_err());
    assert!(entry(b"a", was(129)).is_err());
    let extent = |first_block, blocks| Extent {
        ino: dir,
        label,
        first_block,
        blocks,
        place: None,
    };
    assert!(Record::Extent(extent(255, 1)).check().is_ok());
    assert!(Record::Extent(extent(255, 2)).check().is_err());
    assert!(Record::Extent(extent(0, 0)).check().is_err());
}

/// Damages `bytes` in one of the ways a disk or an enemy would.
fn damage(rng: &mut SmallRng, bytes: &mut Vec<u8>) {
    for _ in 0..rng.random_range(1..4) {
        let at = rng.random_range(0..=bytes.len());
        match rng.random_range(0..4) {
            0 => bytes.truncate(at),
            1 => bytes.extend((0..rng.random_range(0..9)).map(|_| rng.random::<u8>())),
            2 if at + 4 <= bytes.len() => bytes[at..at + 4].fill(0xff),
            _ if at < bytes.len() => bytes[at] = rng.random(),
            _ => {}
        }
    }
}

#[test]
fn hostile_bytes_are_an_error_and_nothing_worse() {
    let seed = std::env::var("COWFS_SEED").map_or(1, |seed| seed.parse().unwrap());
    let mut rng = SmallRng::seed_from_u64(seed);
    let lsn = lsn_at(1, 128);
    for round in 0..4000 {
        for record in records() {
            let mut body = record.body();
            body.truncate(2000);
            damage(&mut rng, &mut body);
            let _ = Record::decode(record.kind(), &body);
            let mut frame = Vec::new();
            frame::put_frame(&mut frame, UUID, record.kind(), &Body::Inline(body), lsn);
            damage(&mut rng, &mut frame);
            let _ = frame::get_frame(&frame, UUID, lsn);
            if round % 8 == 0 {
                for (mut key, mut value) in key::pairs_of(&record, lsn) {
                    value.truncate(2000);
                    damage(&mut rng, &mut value);
                    if rng.random() {
                        damage(&mut rng, &mut key);
                    }
                    let _ = key::check(&key, &value);
                    let _ = key::footprint(&key, &value);
                }
            }
        }
    }
}

#[test]
fn a_damaged_frame_is_never_taken_for_a_record() {
    let lsn = lsn_at(1, 0);
    let mut bytes = Vec::new();
    let body = Record::Birth {
        ino: Ino(1),
        epoch: Epoch(2),
    }
    .body();
    frame::put_frame(&mut bytes, UUID, 6, &Body::Inline(body), lsn);
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << bit;
            assert_eq!(
                frame::get_frame(&bad, UUID, lsn),
                None,
                "bit {bit} of byte {at}"
            );
        }
        assert_eq!(
            frame::get_frame(&bytes[..at], UUID, lsn),
            None,
            "torn at {at}"
        );
    }
}

#[test]
fn keys_order_as_their_numbers_do() {
    let label = |l| key::entry(Ino(1), b"ab", Epoch(l));
    assert!(label(255) < label(256));
    assert!(key::entry(Ino(1), b"a", Epoch(u64::MAX - 1)) < label(0));
    assert!(label(u64::MAX) < key::entries(Ino(2)));
    assert!(label(u64::MAX) < key::after_prefix(&key::entries(Ino(1))));
    assert_eq!(key::entry_parts(&label(9)).unwrap(), (&b"ab"[..], Epoch(9)));
    assert_eq!(key::after_prefix(&[1, 255, 255]), [2]);
    for aspect in [Aspect::Attr, Aspect::Chunk(4), Aspect::Entry(vec![1, 255])] {
        let touch = Touch {
            label: Epoch(3),
            ino: Ino(u64::MAX),
            aspect,
        };
        assert_eq!(Touch::parse(&touch.key()).unwrap(), touch);
        let (from, to) = key::touched(Epoch(3), Epoch(3));
        assert!(from <= touch.key() && touch.key() < to);
    }
}

#[test]
fn a_piece_can_be_cut() {
    let place = Some(Place {
        block: 10,
        crcs: (0..5).collect(),
    });
    let extent = Extent {
        ino: Ino(1),
        label: Epoch(2),
        first_block: 259,
        blocks: 5,
        place,
    };
    let piece = Piece::of(&extent, Lsn(7 << 32 | 8));
    assert_eq!((piece.chunk, piece.range()), (1, 3..8));
    assert_eq!(Piece::parse(&piece.key(), &piece.value()).unwrap(), piece);
    let part = piece.part(5..7);
    assert_eq!((part.start, part.blocks), (5, 2));
    assert_eq!(
        part.place,
        Some(Place {
            block: 12,
            crcs: vec![2, 3]
        })
    );
    let footprint = key::footprint(&part.key(), &part.value()).unwrap();
    assert_eq!(
        (footprint.segment, footprint.payload),
        (7, 2 * BLOCK as u64)
    );
}

#[test]
fn layers_merge_by_key_and_the_newest_wins() {
    let layers = Layers::new(Box::new(MemoryIndex::default()));
    let mut rng = SmallRng::seed_from_u64(5);
    let mut expected = std::collections::BTreeMap::new();
    for round in 0..3000_u32 {
        let key = rng.random_range(0..2000_u32).to_be_bytes().to_vec();
        expected.insert(key.clone(), round.to_le_bytes().to_vec());
        layers.put(vec![(key, round.to_le_bytes().to_vec())]);
        if round == 1000 {
            layers.freeze(Lsn(0));
            let frozen = layers.frozen().unwrap();
            frozen
                .map
                .iter()
                .for_each(|(k, v)| layers.index.put(k, v).unwrap());
            layers.thaw();
        }
        if round == 2000 {
            layers.freeze(Lsn(0));
        }
    }
    let mut seen = Vec::new();
    let mut see = |key: &[u8], value: &[u8]| {
        seen.push((key.to_vec(), value.to_vec()));
        Ok(true)
    };
    layers.scan(&[0], &[9], &mut see).unwrap();
    assert_eq!(seen, expected.clone().into_iter().collect::<Vec<_>>());
    for _ in 0..200 {
        let from = rng.random_range(0..2100_u32).to_be_bytes();
        let to = rng.random_range(0..2100_u32).to_be_bytes();
        let (from, to) = (from.min(to), from.max(to));
        let range = || expected.range(from.to_vec()..to.to_vec());
        let owned = |pair: Option<(&Vec<u8>, &Vec<u8>)>| pair.map(|(k, v)| (k.clone(), v.clone()));
        assert_eq!(layers.first(&from, &to).unwrap(), owned(range().next()));
        assert_eq!(layers.last(&from, &to).unwrap(), owned(range().next_back()));
        assert_eq!(
            layers.get(&from).unwrap(),
            expected.get(from.as_slice()).cloned()
        );
    }
    layers.thaw();
    assert!(layers.bytes() > 0);
}

#[test]
fn rows_are_found_by_number_and_old_versions_stay() {
    let mut rows = Rows::default();
    for epoch in [3, 1, 7, 5] {
        rows.set(info(epoch, SnapshotState::Ready));
    }
    let old = rows.clone();
    rows.set(info(5, SnapshotState::Invalid));
    rows.set(info(9, SnapshotState::Ready));
    let numbers = |rows: &Rows| rows.iter().map(|s| s.epoch.0).collect::<Vec<_>>();
    assert_eq!(numbers(&old), [1, 3, 5, 7]);
    assert_eq!(numbers(&rows), [1, 3, 5, 7, 9]);
    assert_eq!(rows.last().map(|s| s.epoch), Some(Epoch(9)));
    assert_eq!(
        old.get(Epoch(5)).map(|s| s.state),
        Some(SnapshotState::Ready)
    );
    assert_eq!(old.get(Epoch(9)), None);
    let within = |after, to| {
        let found = rows.within(Epoch(after), Epoch(to));
        found.map(|s| s.epoch.0).collect::<Vec<_>>()
    };
    assert_eq!(within(1, 7), [3, 5, 7]);
    assert_eq!(within(0, 4), [1, 3]);
    assert!(within(7, 7).is_empty());
    assert!(within(9, 2).is_empty());
    assert!(within(9, 20).is_empty());
}
