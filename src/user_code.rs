//! Calls of user code whose panic must not end the caller.

use std::{
    mem,
    panic::{AssertUnwindSafe, catch_unwind},
};

/// Runs user code and returns its result, or `None` if it panicked.
///
/// This also works while the thread unwinds, where a panic that leaves a destructor aborts the process. The payload of
/// the panic is user code, too: if its destructor panics, the payload of that panic is leaked.
pub(crate) fn catch_panic<T>(run: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => Some(result),
        Err(payload) => {
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
                mem::forget(payload);
            }
            None
        }
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use std::panic::panic_any;

    use super::*;

    /// A payload that panics when it is dropped.
    struct Payload;

    impl Drop for Payload {
        fn drop(&mut self) {
            panic_any(Self);
        }
    }

    struct CatchesOnDrop;

    impl Drop for CatchesOnDrop {
        fn drop(&mut self) {
            assert_eq!(catch_panic(|| panic_any(Payload)), None);
            assert_eq!(catch_panic(|| 5), Some(5));
        }
    }

    #[test]
    fn panics_and_their_payloads_are_caught_while_the_thread_unwinds() {
        let unwound = catch_unwind(|| {
            let _during_the_unwind = CatchesOnDrop;
            panic_any(5);
        });
        assert_eq!(unwound.unwrap_err().downcast_ref(), Some(&5));
    }
}
