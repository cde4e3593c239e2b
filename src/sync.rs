//! Locks and atomics. Under `cfg(buttress_loom)` they are those of loom, whose models try every interleaving.

#[cfg(not(buttress_loom))]
pub(crate) use std::sync::{Mutex, MutexGuard, atomic};

#[cfg(buttress_loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard, atomic};
