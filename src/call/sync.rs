//! Locks and atomics, exchanged for loom's where every interleaving is tried.

#[cfg(not(buttress_loom))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};

#[cfg(buttress_loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard, atomic};
