//! A signal from the body of an outer layer to the body of a timeout layer within it: the response was not read for too
//! long.
//!
//! The outer body cannot end the response itself, because its error type is the inner body's. The body of a timeout
//! layer has an error type that can hold a rejection. It reads a thread-local flag while it is polled.

use std::cell::Cell;

thread_local! {
    /// The response whose body is being polled was not read for too long.
    static IS_UNREAD: Cell<bool> = const { Cell::new(false) };
}

/// Runs `poll` with the flag set.
#[cold]
pub(crate) fn during<O>(poll: impl FnOnce() -> O) -> O {
    struct RestoreFlag(bool);

    impl Drop for RestoreFlag {
        fn drop(&mut self) {
            IS_UNREAD.set(self.0);
        }
    }

    let _restore = RestoreFlag(IS_UNREAD.replace(true));
    poll()
}

/// Returns whether the flag is set, and clears it: the outermost timeout layer ends the body.
#[inline]
pub(crate) fn take() -> bool {
    IS_UNREAD.get() && IS_UNREAD.replace(false)
}
