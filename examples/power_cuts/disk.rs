//! A disk that forgets: what the guest writes is lost in part when the power is cut, unless a flush came between. It is
//! served to qemu by the NBD protocol (newstyle handshake, simple replies), on a socket, to one client.
//!
//! The image always holds all that was written. For each sector written since the last flush its durable bytes are
//! remembered, and each write; the cut chooses anew which of these writes happened.

use super::Failure;
use super::plan::SECTOR;
use rand::Rng;
use rand::rngs::SmallRng;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY: u64 = 0x0003_E889_0455_65A9;
const REQUEST: u32 = 0x2560_9513;
const REPLY: u32 = 0x6744_6698;
/// Of the export: flags are sent, there is a flush, a write can be durable by itself.
const FLAGS: u16 = 1 | 1 << 2 | 1 << 3;

struct Pending {
    offset: u64,
    bytes: Vec<u8>,
    /// It was acknowledged as durable by itself.
    durable: bool,
}

/// What a cut did.
#[derive(Debug, Default)]
pub struct Lost {
    /// Writes that were not flushed.
    pub pending: usize,
    /// Of these, the ones that did not happen.
    pub dropped: usize,
    /// Those of which a part of the sectors happened.
    pub torn: usize,
}

struct State {
    image: File,
    size: u64,
    pending: Vec<Pending>,
    /// The durable bytes of the sectors that `pending` writes.
    before: BTreeMap<u64, [u8; SECTOR]>,
    flushes: u64,
    /// Answers flushes and forgets what they covered all the same (to prove that the check would notice).
    lies: bool,
    dead: bool,
}

/// The disk, shared by who serves it and who cuts it off.
pub struct Disk(Mutex<State>);

impl Disk {
    /// Of the whole image. One that lies forgets what was flushed, too.
    pub fn new(image: File, lies: bool) -> Result<Self, Failure> {
        let size = image.metadata()?.len();
        Ok(Self(Mutex::new(State {
            image,
            size,
            pending: Vec::new(),
            before: BTreeMap::new(),
            flushes: 0,
            lies,
            dead: false,
        })))
    }

    fn state(&self) -> Result<std::sync::MutexGuard<'_, State>, Failure> {
        let state = self.0.lock().map_err(|_| "the disk broke")?;
        if state.dead {
            return Err("the power is off".into());
        }
        Ok(state)
    }

    fn write(&self, offset: u64, bytes: Vec<u8>, durable: bool) -> Result<(), Failure> {
        let mut state = self.state()?;
        let sector = SECTOR as u64;
        if !offset.is_multiple_of(sector) || !bytes.len().is_multiple_of(SECTOR) {
            return Err(format!("a write of {} bytes at {offset}", bytes.len()).into());
        }
        for at in (offset..offset + bytes.len() as u64).step_by(SECTOR) {
            if !state.before.contains_key(&at) {
                let mut old = [0; SECTOR];
                state.image.read_exact_at(&mut old, at)?;
                state.before.insert(at, old);
            }
        }
        state.image.write_all_at(&bytes, offset)?;
        state.pending.push(Pending {
            offset,
            bytes,
            durable,
        });
        Ok(())
    }

    fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, Failure> {
        let mut bytes = vec![0; len];
        self.state()?.image.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    fn flush(&self) -> Result<(), Failure> {
        let mut state = self.state()?;
        state.flushes += 1;
        if !state.lies {
            state.pending.clear();
            state.before.clear();
        }
        Ok(())
    }

    /// Flushes so far.
    pub fn flushes(&self) -> u64 {
        self.0.lock().map_or(0, |state| state.flushes)
    }

    /// Whether the power is on.
    pub fn has_power(&self) -> bool {
        self.0.lock().is_ok_and(|state| !state.dead)
    }

    /// Cuts the power: from here on nothing is written or answered. Of the writes since the last flush any may have
    /// happened, in part too.
    pub fn cut(&self, rng: &mut SmallRng) -> Result<Lost, Failure> {
        let mut state = self.state()?;
        state.dead = true;
        let mut lost = Lost {
            pending: state.pending.len(),
            ..Lost::default()
        };
        for (at, bytes) in &state.before {
            state.image.write_all_at(bytes, *at)?;
        }
        // Sometimes all, sometimes none, sometimes all from one on, mostly any.
        let kind = rng.random_range(0..8);
        let first = rng.random_range(0..=state.pending.len());
        let share = rng.random_range(0.1..0.9);
        for (number, write) in state.pending.iter().enumerate() {
            let happens = match kind {
                0 => false,
                1 => true,
                2 | 3 => number < first,
                _ => rng.random_bool(share),
            };
            let torn = kind > 1 && !write.durable && rng.random_bool(0.1);
            let sectors = (write.offset..)
                .step_by(SECTOR)
                .zip(write.bytes.chunks(SECTOR));
            for (at, bytes) in sectors {
                if write.durable || (torn && rng.random_bool(0.5)) || (!torn && happens) {
                    state.image.write_all_at(bytes, at)?;
                }
            }
            lost.torn += usize::from(torn);
            lost.dropped += usize::from(!torn && !happens && !write.durable);
        }
        state.image.sync_all()?;
        Ok(lost)
    }

    /// Serves one client until it goes or the power is cut.
    pub fn serve(&self, mut client: UnixStream) -> Result<(), Failure> {
        self.shake_hands(&mut client)?;
        loop {
            let head = take::<28>(&mut client)?;
            let word = |at: usize| {
                u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]])
            };
            let long = |at: usize| u64::from(word(at)) << 32 | u64::from(word(at + 4));
            if word(0) != REQUEST {
                return Err("not a request".into());
            }
            let (flags, kind) = (word(4) >> 16, word(4) & 0xFFFF);
            let (offset, len) = (long(16), word(24) as usize);
            let mut data = Vec::new();
            match kind {
                0 => data = self.read(offset, len)?,
                1 => {
                    let mut bytes = vec![0; len];
                    client.read_exact(&mut bytes)?;
                    self.write(offset, bytes, flags & 1 != 0)?;
                }
                2 => return Ok(()),
                3 => self.flush()?,
                other => return Err(format!("request {other}").into()),
            }
            let mut answer = REPLY.to_be_bytes().to_vec();
            answer.extend(0_u32.to_be_bytes());
            answer.extend(&head[8..16]);
            answer.extend(data);
            client.write_all(&answer)?;
        }
    }

    fn shake_hands(&self, client: &mut UnixStream) -> Result<(), Failure> {
        client.write_all(b"NBDMAGICIHAVEOPT\x00\x03")?;
        take::<4>(client)?;
        let size = self.state()?.size;
        let export = [&size.to_be_bytes()[..], &FLAGS.to_be_bytes()].concat();
        loop {
            if u64::from_be_bytes(take(client)?) != OPTION_MAGIC {
                return Err("not an option".into());
            }
            let option = u32::from_be_bytes(take(client)?);
            let len = u32::from_be_bytes(take(client)?);
            let mut data = vec![0; len as usize];
            client.read_exact(&mut data)?;
            let mut reply = |kind: u32, data: &[u8]| -> Result<(), Failure> {
                let mut bytes = OPTION_REPLY.to_be_bytes().to_vec();
                for word in [option, kind, data.len() as u32] {
                    bytes.extend(word.to_be_bytes());
                }
                bytes.extend(data);
                Ok(client.write_all(&bytes)?)
            };
            match option {
                // The old way to choose an export ends the options without a reply.
                1 => return Ok(client.write_all(&export)?),
                7 => {
                    reply(3, &[&[0, 0][..], &export].concat())?;
                    return reply(1, &[]);
                }
                _ => reply(0x8000_0001, &[])?,
            }
        }
    }
}

fn take<const N: usize>(client: &mut UnixStream) -> Result<[u8; N], Failure> {
    let mut bytes = [0; N];
    client.read_exact(&mut bytes)?;
    Ok(bytes)
}
