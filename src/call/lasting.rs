//! States whose calls nobody counts: what they end at is never given back.

#[cfg(all(test, feature = "breaker"))]
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Memory for states that is never given back, and used for another one once it is idle: as much of it as there
/// ever were such states at once.
pub(crate) struct Idle<T: 'static>(Mutex<Vec<&'static T>>);

impl<T> Idle<T> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// One that nobody uses, if there is one.
    pub(crate) fn take(&self) -> Option<&'static T> {
        self.list().pop()
    }

    /// This one, if it is idle.
    #[cfg(all(test, feature = "breaker"))]
    pub(crate) fn take_this(&self, wanted: &'static T) -> bool {
        let mut list = self.list();
        let at = list.iter().position(|idle| ptr::eq(*idle, wanted));
        at.map(|at| list.remove(at)).is_some()
    }

    /// Nobody uses it any more.
    pub(crate) fn keep(&self, idle: &'static T) {
        self.list().push(idle);
    }

    fn list(&self) -> MutexGuard<'_, Vec<&'static T>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
