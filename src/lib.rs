//! cowfs: exact, stall-free snapshots of any directory.
pub mod cli;
pub mod config;
pub mod control;
pub mod engine;
pub mod error;
pub mod fuse;
pub mod ids;
pub mod store;
pub mod sync;
pub mod sys;
