//! What the kernel holds of a mount, where it outlives the process that serves it: the nodes that it was told of and
//! the files and directories that it has open.
//!
//! A daemon that is killed takes its memory along, but not the kernel's side of the mount, as long as somebody
//! keeps `/dev/fuse` open. The next daemon has to know what the kernel's numbers mean. So each is written down in
//! an anonymous file in memory (memfd_create(2)), which the keeper of the mount holds as well: one slot for each
//! node and each open file, written through a mapping. A killed process leaves what it wrote; the machine's end
//! ends the mount too. The first word of a slot says what it holds and is written last, so that a slot is either whole
//! or empty.

mod codec;

use super::nodes::NodeId;
use crate::error::{Error, Result};
use crate::ids::{Epoch, Ino};
use crate::store::{EntryImage, ObjectHandle, Timestamp};
use crate::sync::{Mutex, RwLock};
use crate::sys::SharedWords;
use codec::{FIXED, LONGEST_HANDLE, decode, number};
use codec::{encode_handle, encode_intent, encode_node, encode_time, nanoseconds};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{FallocateFlags, MemfdFlags};
use rustix::io::Errno;
use std::collections::BTreeSet;

/// First bytes of the file: what it is, and which layout.
const MAGIC: &[u8; 8] = b"cowfsnv2";
/// Bytes of a word.
const WORD: usize = size_of::<u64>();
/// Words that are mapped, and given back, at once: 256 KiB. No slot lies in two chunks.
const CHUNK: usize = 32 * 1024;

/// A place in the inventory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot(u32);

impl Slot {
    /// As a number, never 0.
    pub fn number(self) -> u32 {
        self.0
    }

    /// The slot of that number; none for 0.
    pub fn from_number(number: u32) -> Option<Self> {
        (number != 0).then_some(Self(number))
    }
}

/// What of an object a node stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Aspect {
    /// The live object.
    Live,
    /// Its state in a snapshot, reached through the snapshot folder of this directory or, with none, of the root.
    At {
        /// The snapshot.
        epoch: Epoch,
        /// The directory.
        through: Option<Ino>,
    },
    /// The snapshot folder of a live directory.
    Folder,
}

/// A node that the kernel knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownNode {
    /// What it names.
    pub aspect: Aspect,
    /// The object.
    pub entry: EntryImage,
    /// How often the kernel was told of it and has not forgotten it.
    pub lookups: u64,
}

/// A file or directory that is open through the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownHandle {
    /// The number that the kernel has for it.
    pub id: u64,
    /// What is open.
    pub node: NodeId,
    /// The flags of open(2); meaningless for a directory.
    pub flags: i32,
    /// The kernel's number of the request that opened it.
    pub unique: u64,
    /// Whether it was opened as a directory.
    pub directory: bool,
}

/// A request that cannot be carried out twice, and may have been when the daemon was killed before it answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Intent {
    /// The kernel's number of the request.
    pub unique: u64,
    /// The object that the request is about; 0 for one that it makes.
    pub ino: Ino,
    /// Whether the attribute that the request sets or removes was there before.
    pub there: bool,
}

/// The time of last modification that the kernel has for a file that is open for writing, where it keeps these times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownTime {
    /// The file.
    pub ino: Ino,
    /// The time.
    pub time: Timestamp,
}

/// What a slot holds.
enum Record {
    Node(KnownNode),
    Handle(KnownHandle),
    Intent(Intent),
    Time(KnownTime),
}

/// What an earlier daemon of the same mount left.
#[derive(Debug, Default)]
pub struct Found {
    /// The nodes, with their slots.
    pub nodes: Vec<(Slot, KnownNode)>,
    /// What was open, with the slots.
    pub handles: Vec<(Slot, KnownHandle)>,
    /// Requests that may have been carried out, with their slots.
    pub intents: Vec<(Slot, Intent)>,
    /// Times that the kernel was told or told, with their slots.
    pub times: Vec<(Slot, KnownTime)>,
}

/// The slots. All methods but [`Self::take_over`] leave what they cannot write unwritten: an inventory that lacks
/// something costs the next daemon an error for that node (`ESTALE`), and this one nothing.
pub struct Inventory {
    file: OwnedFd,
    /// Words of a slot.
    size: usize,
    /// The chunks of the file that are mapped.
    mapped: RwLock<Vec<Option<SharedWords>>>,
    free: Mutex<Free>,
}

/// Which slots are free.
#[derive(Default)]
struct Free {
    chunks: Vec<Chunk>,
    /// The chunks that have a free slot. The first is used first, so that the others may become empty.
    with_room: BTreeSet<u32>,
    /// A chunk without slots in use that keeps its memory, lest one slot that comes and goes move it each time.
    spare: Option<u32>,
}

/// The slots of one chunk, numbered within it.
#[derive(Default)]
struct Chunk {
    /// How many are in use.
    used: u32,
    /// Slots from here on were not used since the chunk was empty.
    next: u32,
    /// Others that are free.
    again: Vec<u32>,
}

impl Free {
    /// The lowest free slot or so: its chunk and its number there.
    fn take(&mut self, per_chunk: u32) -> (u32, u32) {
        let number = self.with_room.first().copied().unwrap_or_else(|| {
            self.chunks.push(Chunk::default());
            let number = self.chunks.len() as u32 - 1;
            self.with_room.insert(number);
            number
        });
        if self.spare == Some(number) {
            self.spare = None;
        }
        let chunk = &mut self.chunks[number as usize];
        let slot = chunk.again.pop().unwrap_or_else(|| {
            chunk.next += 1;
            chunk.next - 1
        });
        chunk.used += 1;
        if chunk.used == per_chunk {
            self.with_room.remove(&number);
        }
        (number, slot)
    }

    /// Takes a slot back; the chunk whose memory is not needed any more, if there is one.
    fn give(&mut self, number: u32, slot: u32) -> Option<u32> {
        let chunk = &mut self.chunks[number as usize];
        chunk.used -= 1;
        chunk.again.push(slot);
        self.with_room.insert(number);
        if chunk.used > 0 {
            return None;
        }
        *chunk = Chunk::default();
        // The higher one of two goes.
        let spare = self.spare.replace(number)?;
        self.spare = Some(spare.min(number));
        Some(spare.max(number))
    }
}

impl Inventory {
    /// A new one for a filesystem whose handles are about as long as `handle`.
    ///
    /// # Errors
    /// Those of memfd_create(2).
    pub fn create(handle: &ObjectHandle) -> Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create(c"cowfs-inventory", flags)?;
        // btrfs makes handles of two lengths; twice that of the root is enough for all known filesystems.
        let room = (2 * handle.bytes.len()).clamp(16, LONGEST_HANDLE);
        let size = (FIXED + room).div_ceil(WORD);
        let inventory = Self {
            file,
            size,
            mapped: RwLock::default(),
            free: Mutex::default(),
        };
        // The first slot is taken by what the file says of itself.
        inventory.free.lock().take(inventory.per_chunk());
        inventory.write(0, 1, u64::to_le((size * WORD) as u64))?;
        inventory.write(0, 0, u64::from_ne_bytes(*MAGIC))?;
        Ok(inventory)
    }

    /// The one that an earlier daemon wrote, with what is in it.
    ///
    /// # Errors
    /// `EIO` if it is none.
    pub fn take_over(file: OwnedFd) -> Result<(Self, Found)> {
        let bytes = read_all(file.as_fd())?;
        let size = bytes
            .strip_prefix(MAGIC)
            .and_then(|rest| number(rest, 0))
            .map(|size| size as usize)
            .filter(|size| (FIXED..=FIXED + LONGEST_HANDLE).contains(size) && size % WORD == 0)
            .ok_or(Error::Os(Errno::IO))?;
        let inventory = Self {
            file,
            size: size / WORD,
            mapped: RwLock::default(),
            free: Mutex::default(),
        };
        let mut found = Found::default();
        let mut free = Free::default();
        for (number, chunk) in (0..).zip(bytes.chunks(CHUNK * WORD)) {
            let mut slots = Chunk::default();
            for (within, bytes) in (0..inventory.per_chunk()).zip(chunk.chunks_exact(size)) {
                let slot = Slot(number * inventory.per_chunk() + within);
                let head = slot.0 == 0;
                match decode(bytes).filter(|_| !head) {
                    Some(Record::Node(node)) => found.nodes.push((slot, node)),
                    Some(Record::Handle(handle)) => found.handles.push((slot, handle)),
                    // It stays until the request has been answered: the next daemon may die over it as well.
                    Some(Record::Intent(intent)) => found.intents.push((slot, intent)),
                    Some(Record::Time(time)) => found.times.push((slot, time)),
                    None if !head => continue,
                    None => {}
                }
                slots.again.extend(slots.next..within);
                slots.next = within + 1;
                slots.used += 1;
            }
            if slots.used < inventory.per_chunk() {
                free.with_room.insert(number);
            }
            free.chunks.push(slots);
        }
        let empty = (0..).zip(&free.chunks).filter(|(_, chunk)| chunk.used == 0);
        empty.for_each(|(number, _)| inventory.give_back(number));
        *inventory.free.lock() = free;
        Ok((inventory, found))
    }

    /// The file, for the keeper to hold.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Writes a node down.
    pub fn add_node(&self, node: &KnownNode) -> Option<Slot> {
        self.add(encode_node(node)?.words())
    }

    /// Writes down how often the kernel was told of a node.
    pub fn set_lookups(&self, slot: Slot, lookups: u64) {
        self.put(slot, 3, &[lookups]);
    }

    /// Writes down what is open.
    pub fn add_handle(&self, handle: &KnownHandle) -> Option<Slot> {
        self.add(encode_handle(handle).words())
    }

    /// Writes down a request before it is carried out. To be removed when it has been answered.
    pub fn add_intent(&self, intent: &Intent) -> Option<Slot> {
        self.add(encode_intent(intent).words())
    }

    /// Writes down a time that the kernel has.
    pub fn add_time(&self, known: &KnownTime) -> Option<Slot> {
        self.add(encode_time(known).words())
    }

    /// The same when it has another.
    pub fn set_time(&self, slot: Slot, time: Timestamp) {
        self.put(slot, 2, &[nanoseconds(time)]);
    }

    /// Empties a slot.
    pub fn remove(&self, slot: Slot) {
        self.put(slot, 0, &[0]);
        let (number, within) = self.place(slot);
        let mut free = self.free.lock();
        if let Some(empty) = free.give(number, within) {
            // Under the lock, so that nobody takes a slot there meanwhile.
            self.give_back(empty);
        }
    }

    /// Slots of a chunk.
    fn per_chunk(&self) -> u32 {
        (CHUNK / self.size) as u32
    }

    /// The chunk of a slot, and its number there.
    fn place(&self, slot: Slot) -> (u32, u32) {
        (slot.0 / self.per_chunk(), slot.0 % self.per_chunk())
    }

    fn add(&self, words: &[u64]) -> Option<Slot> {
        if words.len() > self.size {
            return None;
        }
        let (number, within) = self.free.lock().take(self.per_chunk());
        let slot = Slot(number * self.per_chunk() + within);
        self.put(slot, 0, words);
        Some(slot)
    }

    /// Writes words of a slot from number `at` on, the first of them last.
    fn put(&self, slot: Slot, at: usize, words: &[u64]) {
        let (number, within) = self.place(slot);
        let start = within as usize * self.size + at;
        for (at, word) in words.iter().enumerate().rev() {
            if let Err(errno) = self.write(number as usize, start + at, u64::to_le(*word)) {
                return log::warn!("the inventory cannot be written: {errno}");
            }
        }
    }

    fn write(&self, number: usize, at: usize, word: u64) -> Result<(), Errno> {
        if let Some(Some(words)) = self.mapped.read().get(number) {
            words.store(at, word);
            return Ok(());
        }
        let mut mapped = self.mapped.write();
        if mapped.len() <= number {
            mapped.resize_with(number + 1, || None);
        }
        let words = match &mut mapped[number] {
            Some(words) => words,
            none => none.insert(SharedWords::map(self.file.as_fd(), offset(number), CHUNK)?),
        };
        words.store(at, word);
        Ok(())
    }

    /// Gives the memory of a chunk back that has no slot in use.
    fn give_back(&self, number: u32) {
        let number = number as usize;
        if let Some(mapped) = self.mapped.write().get_mut(number) {
            *mapped = None;
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let punched = rustix::fs::fallocate(&self.file, flags, offset(number), offset(1));
        if let Err(errno) = punched {
            log::debug!("memory of the inventory cannot be given back: {errno}");
        }
    }
}

/// The byte of the file at which a chunk begins.
fn offset(chunk: usize) -> u64 {
    (chunk * CHUNK * WORD) as u64
}

fn read_all(file: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    let size = rustix::fs::fstat(file)?.st_size;
    let mut bytes = vec![0; usize::try_from(size).map_err(|_| Errno::FBIG)?];
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pread(file, &mut bytes[done..], done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(ino: u64, aspect: Aspect) -> KnownNode {
        KnownNode {
            aspect,
            entry: EntryImage {
                ino: Ino(ino),
                kind: libc::DT_REG,
                handle: ObjectHandle {
                    kind: 1,
                    bytes: vec![ino as u8; 8].into(),
                },
            },
            lookups: 1,
        }
    }

    #[test]
    fn what_was_written_is_found_by_the_next() {
        let first = Inventory::create(&node(1, Aspect::Live).entry.handle).unwrap();
        let a = first.add_node(&node(1, Aspect::Live)).unwrap();
        let at = |through| Aspect::At {
            epoch: Epoch(7),
            through,
        };
        let b = first.add_node(&node(2, at(None))).unwrap();
        let folder = first.add_node(&node(3, Aspect::Folder)).unwrap();
        let shown = [node(6, at(None)), node(7, at(Some(Ino(1 << 60))))];
        let places = [0, 1].map(|which: usize| first.add_node(&shown[which]).unwrap());
        let file = KnownHandle {
            id: 9,
            node: 1,
            flags: libc::O_RDWR,
            unique: 3,
            directory: false,
        };
        let open = first.add_handle(&file).unwrap();
        let intent = Intent {
            unique: 4,
            ino: Ino(5),
            there: true,
        };
        let noted = first.add_intent(&intent).unwrap();
        let time = |sec| KnownTime {
            ino: Ino(8),
            time: Timestamp { sec, nsec: 7 },
        };
        let timed = first.add_time(&time(5)).unwrap();
        // Beyond what a word holds: not known.
        assert!(first.add_time(&time(i64::MAX)).is_some());
        first.set_time(timed, time(-6).time);
        first.set_lookups(a, 5);
        first.remove(b);
        let copy = rustix::io::fcntl_dupfd_cloexec(first.file(), 0).unwrap();
        let (second, found) = Inventory::take_over(copy).unwrap();
        let told = KnownNode {
            lookups: 5,
            ..node(1, Aspect::Live)
        };
        let [root, through] = shown;
        let all = [
            (a, told),
            (folder, node(3, Aspect::Folder)),
            (places[0], root),
            (places[1], through),
        ];
        assert_eq!(found.nodes, all);
        assert_eq!(found.handles, [(open, file)]);
        assert_eq!(found.intents, [(noted, intent)]);
        assert_eq!(found.times, [(timed, time(-6))]);
        // What was free or done with is used again, and nothing else.
        let again = [
            second.add_node(&node(8, Aspect::Live)).unwrap(),
            second.add_node(&node(9, Aspect::Live)).unwrap(),
            second.add_node(&node(10, Aspect::Live)).unwrap(),
        ];
        let used = [a, folder, places[0], places[1], open, noted, timed];
        assert!(again.iter().all(|slot| !used.contains(slot)));
    }

    #[test]
    fn many_come_and_go_and_their_memory_with_them() {
        const MANY: u64 = 50_000;
        let first = Inventory::create(&node(1, Aspect::Live).entry.handle).unwrap();
        let held = |inventory: &Inventory| {
            let stat = rustix::fs::fstat(inventory.file()).unwrap();
            u64::try_from(stat.st_blocks).unwrap() * 512
        };
        let add = |inventory: &Inventory, from: u64, to: u64| -> Vec<Slot> {
            let nodes = (from..to).map(|ino| node(ino, Aspect::Live));
            nodes
                .map(|node| inventory.add_node(&node).unwrap())
                .collect()
        };
        let slots = add(&first, 0, MANY);
        let most = held(&first);
        // Every thousandth stays, in its place.
        for (at, slot) in slots.iter().enumerate() {
            if at % 1000 != 0 {
                first.remove(*slot);
            }
        }
        let copy = rustix::io::fcntl_dupfd_cloexec(first.file(), 0).unwrap();
        let (second, found) = Inventory::take_over(copy).unwrap();
        let inos: Vec<u64> = found
            .nodes
            .iter()
            .map(|(_, node)| node.entry.ino.0)
            .collect();
        assert_eq!(inos, (0..MANY).step_by(1000).collect::<Vec<_>>());
        for (slot, _) in &found.nodes {
            second.remove(*slot);
        }
        assert!(held(&second) < most / 4, "{} of {most} left", held(&second));
        // What was given back is used again.
        let slots = add(&second, 0, MANY);
        assert_eq!(
            slots.iter().collect::<std::collections::HashSet<_>>().len() as u64,
            MANY
        );
        assert!(held(&second) <= most + (1 << 20));
        let copy = rustix::io::fcntl_dupfd_cloexec(second.file(), 0).unwrap();
        let (third, found) = Inventory::take_over(copy).unwrap();
        let mut inos: Vec<u64> = found
            .nodes
            .iter()
            .map(|(_, node)| node.entry.ino.0)
            .collect();
        inos.sort_unstable();
        assert_eq!(inos, (0..MANY).collect::<Vec<_>>());
        found.nodes.iter().for_each(|(slot, _)| third.remove(*slot));
        assert!(held(&third) < most / 4);
    }

    #[test]
    fn what_is_no_inventory_is_refused() {
        let file = rustix::fs::memfd_create(c"other", MemfdFlags::CLOEXEC).unwrap();
        assert!(Inventory::take_over(file).is_err());
    }
}
