//! A free list of leaked allocations.
//!
//! A permit has to reach its state for as long as its call lasts. A leaked state is reached by a `&'static` reference,
//! so that a call writes no reference count. When the owner of a state is dropped, the state is put on a free list and
//! the next owner uses it again. The memory in use is therefore bounded by the maximum number of states that existed at
//! one time.
//!
//! Only limits still use this list. All other leaked states are in a [slot](super::slot).

use crate::sync::Mutex;

/// A free list of leaked values: see the [module](self).
pub(crate) struct Idle<T: 'static>(Mutex<Vec<&'static T>>);

impl<T> Idle<T> {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// Removes a value from the list and returns it. `None` if the list is empty.
    pub(crate) fn take(&self) -> Option<&'static T> {
        self.0.lock().pop()
    }

    /// Adds a value that is no longer in use.
    pub(crate) fn keep(&self, idle: &'static T) {
        self.0.lock().push(idle);
    }
}
