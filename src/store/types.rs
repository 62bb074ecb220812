//! The values that the store keeps and hands out. None of them knows a byte of the format.

use super::media::MediaFile;
use crate::ids::{Epoch, Ino};
use crate::sync::Arc;
use std::path::PathBuf;

/// How a store is laid out and indexed; every field has a sensible default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreOptions {
    /// Keep the index in memory only and rebuild it from the journal at each open.
    pub in_memory_index: bool,
    /// Bytes after which a segment of the journal is left for a new one.
    pub segment_size: u64,
    /// Bytes of a new segment set aside for headers and small records; a multiple of 4096.
    pub log_area: u64,
    /// Bytes of the payload that are filled with zeros at once, before they are needed, where somebody waits for each sync
    /// (ahead.rs); 0: none.
    pub fill_ahead: u64,
    /// After so many of these syncs.
    pub fill_after: u32,
    /// The number of the machine's present boot, if sessions are kept (session.rs): another one than that of
    /// the last session means that the machine went down meanwhile.
    pub boot: Option<u128>,
    /// How often the session file was written before, as far as somebody else knows: what is written now counts on from
    /// there, also if the file is lost.
    pub sequence: u64,
    /// An index of at most so many bytes on disk is read whole at every open, to be checked and counted; a larger one
    /// only if the store was not closed in order, and then by the background job.
    pub read_at_open: u64,
    /// What the directory is called in messages about the journal, if it is opened by another path.
    pub known: Option<PathBuf>,
    /// Keys that the background job then reads in one step, which nothing else of it can interrupt.
    pub count_step: usize,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            in_memory_index: false,
            segment_size: 64 << 20,
            log_area: 1 << 20,
            fill_ahead: 1 << 20,
            fill_after: 8,
            boot: None,
            sequence: 0,
            read_at_open: 32 << 20,
            known: None,
            count_step: 1 << 16,
        }
    }
}

/// A point in time as the kernel reports it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Timestamp {
    /// Seconds since 1970, negative before.
    pub sec: i64,
    /// Nanoseconds within the second.
    pub nsec: u32,
}

/// The attributes of an object as of a cut.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AttrImage {
    /// Type and permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Visible links.
    pub nlink: u32,
    /// Size in bytes.
    pub size: u64,
    /// Allocated units of 512 bytes.
    pub blocks: u64,
    /// Preferred I/O size in bytes.
    pub blksize: u32,
    /// Device number of a device file.
    pub rdev: u64,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of the data.
    pub mtime: Timestamp,
    /// Last change of the attributes.
    pub ctime: Timestamp,
    /// Birth, where the backing filesystem knows it.
    pub btime: Option<Timestamp>,
    /// Extended attributes, name and value, in the order of the backing filesystem.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A handle as name_to_handle_at(2) gives it: opaque, at most 128 bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct ObjectHandle {
    /// The type that the backing filesystem gave it.
    pub kind: i32,
    /// Its bytes.
    pub bytes: HandleBytes,
}

/// Handles up to this length are kept in place: there is one for each object that the kernel knows, and an
/// allocation of its own would cost more than its bytes. ext4 and xfs need 8, tmpfs 12, btrfs 20.
const SHORT_HANDLE: usize = 22;

/// The bytes of a handle.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct HandleBytes(Bytes);

#[derive(Clone, PartialEq, Eq, Hash)]
enum Bytes {
    /// What follows the first `len` bytes is zero.
    Short {
        len: u8,
        bytes: [u8; SHORT_HANDLE],
    },
    Long(Box<[u8]>),
}

impl From<&[u8]> for HandleBytes {
    fn from(all: &[u8]) -> Self {
        if all.len() > SHORT_HANDLE {
            return Self(Bytes::Long(all.into()));
        }
        let mut bytes = [0; SHORT_HANDLE];
        bytes[..all.len()].copy_from_slice(all);
        Self(Bytes::Short {
            len: all.len() as u8,
            bytes,
        })
    }
}

impl From<Vec<u8>> for HandleBytes {
    fn from(all: Vec<u8>) -> Self {
        Self::from(all.as_slice())
    }
}

impl Default for HandleBytes {
    fn default() -> Self {
        Self::from(&[][..])
    }
}

impl std::ops::Deref for HandleBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match &self.0 {
            Bytes::Short { len, bytes } => &bytes[..usize::from(*len)],
            Bytes::Long(bytes) => bytes,
        }
    }
}

impl std::fmt::Debug for HandleBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        (**self).fmt(f)
    }
}

/// What a name in a directory meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryImage {
    /// The object.
    pub ino: Ino,
    /// Its type, one of `DT_*`.
    pub kind: u8,
    /// The way to open it.
    pub handle: ObjectHandle,
}

/// The old contents of a run of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentData<'a> {
    /// Whole blocks; the caller pads the last one with zeros.
    Bytes(&'a [u8]),
    /// Nothing was allocated there.
    Hole {
        /// Length of the run in blocks.
        blocks: u64,
    },
}

/// Where the bytes of an [`ExtentRef`] are.
#[derive(Clone)]
pub struct Payload {
    pub(super) file: Arc<dyn MediaFile>,
    pub(super) segment: u32,
    /// In blocks from the start of the segment.
    pub(super) block: u32,
    pub(super) crcs: Vec<u32>,
}

impl std::fmt::Debug for Payload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Payload")
            .field("segment", &self.segment)
            .field("block", &self.block)
            .finish()
    }
}

impl PartialEq for Payload {
    fn eq(&self, other: &Self) -> bool {
        (self.segment, self.block, &self.crcs) == (other.segment, other.block, &other.crcs)
    }
}

impl Eq for Payload {}

/// A run of kept blocks, found by a look-up. It stays readable while it is held, even if the store moves
/// the bytes elsewhere meanwhile, as long as its snapshot is not deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExtentRef {
    /// The label of the record.
    pub label: Epoch,
    /// First block of the run, counted in the file.
    pub first_block: u64,
    /// Length of the run in blocks.
    pub blocks: u16,
    /// The bytes; `None` is a hole.
    pub payload: Option<Payload>,
}

impl ExtentRef {
    /// Whether the run reads as zeros and had nothing allocated.
    #[must_use]
    pub fn is_hole(&self) -> bool {
        self.payload.is_none()
    }
}

/// A file whose last visible name is gone but which a snapshot still shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retained {
    /// The object.
    pub ino: Ino,
    /// Its type, one of `DT_*`.
    pub kind: u8,
    /// The way to open it.
    pub handle: ObjectHandle,
    /// The epoch in which it was created (0 if unknown): it is in no snapshot up to this one.
    pub birth: Epoch,
    /// The epoch in which its last name went: it is in no snapshot after this one.
    pub removed: Epoch,
    /// Directory, handle of the directory, and name where a half-done replacement may have left it.
    pub origin: Option<(Ino, ObjectHandle, Vec<u8>)>,
    /// A whiteout is to take its place there (`RENAME_WHITEOUT`).
    pub whiteout: bool,
}

/// What may be done with a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotState {
    /// Exact and readable.
    Ready,
    /// No longer visible; its space is being freed.
    Deleting,
    /// A pre-image may be missing after a power cut.
    Suspect,
    /// A pre-image is missing; never to be read.
    Invalid,
}

impl SnapshotState {
    /// The word for people and JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ok",
            Self::Deleting => "deleting",
            Self::Suspect => "suspect",
            Self::Invalid => "invalid",
        }
    }

    /// Whether what the snapshot shows is kept.
    #[must_use]
    pub fn keeps(self) -> bool {
        matches!(self, Self::Ready | Self::Suspect)
    }
}

/// One row of the snapshot table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// The number of its cut, at least 1.
    pub epoch: Epoch,
    /// Its name, as in `.snapshots/NAME`.
    pub name: Vec<u8>,
    /// When the cut was.
    pub created: Timestamp,
    /// Whether it is kept when space runs out.
    pub held: bool,
    /// What may be done with it.
    pub state: SnapshotState,
}

/// What the store holds, for people to look at.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StoreStats {
    /// Bytes that the journal has allocated on disk.
    pub journal_bytes: u64,
    /// Bytes that the index has allocated on disk.
    pub index_bytes: u64,
    /// The index is in memory, not on disk.
    pub index_in_memory: bool,
    /// Bytes of kept data that some snapshot may still need.
    pub live_payload_bytes: u64,
    /// Segments of the journal.
    pub segments: u64,
    /// Records that the index refers to.
    pub records: u64,
    /// Records appended since the store was opened.
    pub appended: u64,
    /// Bytes of the records that the index does not have on disk yet.
    pub memtable_bytes: u64,
    /// Snapshots, those being deleted among them.
    pub snapshots: u64,
}
