//! The one import of locks, atomics and queues, so that a model checker can stand in for them.

pub use crossbeam::channel;
pub use parking_lot::{Condvar, MappedMutexGuard, Mutex, MutexGuard, RwLock, RwLockReadGuard};
pub use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering};
pub use std::sync::{Arc, LazyLock, OnceLock, Weak};
