//! A free list of leaked allocations.
//!
//! A permit has to reach its state for as long as its call lasts. A leaked state is reached by a `&'static` reference,
//! so that a call writes no reference count. When the owner of a state is dropped, the state is put on a free list and
//! the next owner uses it again. The memory in use is therefore bounded by the maximum number of states that existed at
//! one time.
//!
//! A call may outlive the owner of its state. The users of this list ensure that such a call does not affect the next
//! owner: a limit puts its state on the list only when its last call has ended, and a slot with a generation
//! ([`Far`](super::slot::Far), the front of a circuit breaker) ignores tokens and handles of an earlier generation.

#[cfg(all(test, feature = "breaker"))]
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A free list of leaked values: see the [module](self).
pub(crate) struct Idle<T: 'static>(Mutex<Vec<&'static T>>);

impl<T> Idle<T> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// Removes a value from the list and returns it. `None` if the list is empty.
    pub(crate) fn take(&self) -> Option<&'static T> {
        self.list().pop()
    }

    /// Removes this value from the list. Returns whether it was on the list.
    #[cfg(all(test, feature = "breaker"))]
    pub(crate) fn take_this(&self, wanted: &'static T) -> bool {
        let mut list = self.list();
        let at = list.iter().position(|idle| ptr::eq(*idle, wanted));
        at.map(|at| list.remove(at)).is_some()
    }

    /// Adds a value that is no longer in use.
    pub(crate) fn keep(&self, idle: &'static T) {
        self.list().push(idle);
    }

    fn list(&self) -> MutexGuard<'_, Vec<&'static T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
