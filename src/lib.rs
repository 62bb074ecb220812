//! cowfs: exact, stall-free snapshots of any directory.
//!
//! cowfs mounts over a directory and sees every change before the directory does. From the moment a snapshot
//! is cut, the old value of whatever is about to change is kept, once, in a store beside the data.
//! docs/ARCHITECTURE.md argues what follows, case by case; docs/SEMANTICS.md says what each operation does.
//!
//! # Words
//! - **backing directory**: the ordinary directory that holds the data. **live tree**: what the mount shows at
//!   its root.
//! - **cut**: the instant of a snapshot. **epoch**: the number of cuts so far. An operation that runs in epoch e
//!   is part of every snapshot cut after it, and of none of 1..=e. Snapshot k is cut k.
//! - **object**: a file, directory, symlink or special file, whatever its names, known by its inode number.
//! - **aspect**: one of the things of an object that can change: a block of its data, its attributes (stat
//!   fields and extended attributes), what one name in it means.
//! - **pre-image**: the value of an aspect as of a cut, with the number of that cut as its **label**. An aspect in
//!   snapshot k is the pre-image with the smallest label ≥ k, else the live value.
//! - **view**: the live tree, or the tree as of one snapshot.
//! - **birth**: the epoch in which an object was created; no snapshot up to it shows the object.
//! - **journal**: the append-only files that hold every record of the store. **index**: the ordered map that finds
//!   records in it.
//! - **retained**: said of an object whose last visible name is gone but which a snapshot still shows. Its last
//!   link is in `.cowfs/retained/`.
//!
//! # Invariants
//! - **I1** No byte, name or attribute of the backing directory changes before its pre-image is in the journal,
//!   durable as the mode says.
//! - **I2** At most one pre-image serves each aspect under one label; of copies that a failed or compacting append
//!   leaves, all are equal.
//! - **I3** What a snapshot shows never changes: a reader takes the live value only if, after having read it, it
//!   still finds no pre-image.
//! - **I4** A mutation locks its objects before it reads the epoch, and is counted in that epoch until it is
//!   applied.
//! - **I5** Drop the index, replay the journal: the same answers.
//! - **I6** Locks are taken in one order, which docs/ARCHITECTURE.md lists; [`engine::keep::Op`] takes those of objects by
//!   inode number.
//! - **I7** A failed append or sync poisons mutation with a clear error; reads go on.
//!
//! `// I1` and so on stand at the lines that uphold them.
//!
//! # Who may name whom
//! `main → cli → fuse → engine → store`, each only what stands to its right; [`sys`], [`sync`], [`error`],
//! [`ids`] and [`planted`] are below all, [`config`], [`control`] and [`mounts`] are shared by those that need them. fuser is named only under
//! `fuse/`, sled only in `store/index.rs`, system calls without a safe wrapper only in [`sys`], locks and atomics only in
//! [`sync`].
//! tests/architecture.rs holds this.
pub mod cli;
pub mod config;
pub mod control;
pub mod engine;
pub mod error;
pub mod fuse;
pub mod ids;
pub mod mounts;
pub mod planted;
pub mod store;
pub mod sync;
pub mod sys;
