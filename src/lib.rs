//! cowfs: exact, stall-free snapshots of any directory.
pub mod error;
pub mod ids;
pub mod store;
pub mod sync;
