//! cowfs: exact, stall-free snapshots of any directory.
pub mod config;
pub mod control;
pub mod error;
pub mod ids;
pub mod sync;
