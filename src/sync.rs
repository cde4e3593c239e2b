//! Locks and atomics.
//!
//! [`Mutex`] ignores poison. The crate holds no lock across code that can leave the protected value half changed: a
//! panic of user code is caught, or happens outside of the lock. A panic of one call must not fail all later calls.
//!
//! The loom models try all interleavings of the types in [`modelled`], which are loom's under `cfg(buttress_loom)`. The
//! other locks remain those of `std` there, because loom's are not `const` and exist only inside a model.

pub(crate) use std::sync::MutexGuard;
use std::sync::{PoisonError, TryLockError, TryLockResult};

/// A `std::sync::Mutex` whose methods ignore poison.
#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(std::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) const fn new(value: T) -> Self {
        Self(std::sync::Mutex::new(value))
    }

    #[inline]
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        #[cfg(test)]
        lock_log::record(std::ptr::from_ref(self) as usize);
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns `None` if the mutex is locked.
    #[inline]
    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        not_locked(self.0.try_lock())
    }
}

/// The locks that the current thread takes, for tests that count them.
#[cfg(test)]
pub(crate) mod lock_log {
    use std::cell::RefCell;

    thread_local! {
        static LOG: RefCell<Option<Vec<usize>>> = const { RefCell::new(None) };
    }

    /// Records that the current thread takes the lock at this address.
    pub(super) fn record(address: usize) {
        LOG.with_borrow_mut(|log| log.iter_mut().for_each(|log| log.push(address)));
    }

    /// Runs the closure and returns the addresses of the locks that it takes.
    pub(crate) fn of(run: impl FnOnce()) -> Vec<usize> {
        LOG.set(Some(Vec::new()));
        run();
        LOG.take().unwrap_or_default()
    }
}

fn not_locked<G>(result: TryLockResult<G>) -> Option<G> {
    match result {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// The locks and atomics of the lock-free code, which has loom models.
#[cfg(not(buttress_loom))]
pub(crate) mod modelled {
    pub(crate) use super::{Mutex, MutexGuard};
    pub(crate) use std::sync::atomic;
}

/// The locks and atomics of the lock-free code, which has loom models.
#[cfg(buttress_loom)]
pub(crate) mod modelled {
    use std::sync::PoisonError;

    pub(crate) use loom::sync::{MutexGuard, atomic};

    /// A mutex of loom with the methods of [`super::Mutex`].
    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }

        pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            super::not_locked(self.0.try_lock())
        }
    }
}
