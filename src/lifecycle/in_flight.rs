//! The number of calls in flight and the flag that stops their admission, in one atomic word.
//!
//! The word is `calls << 1 | closed`. [`enter`](InFlightGate::enter) adds a call and reads the flag by one atomic operation, so
//! each `enter` is ordered either before or after [`close`](InFlightGate::close):
//!
//! - before: the call is admitted, and every read of the count after `close` includes it until it leaves;
//! - after: the call is not admitted. It is counted for the short time until its permit is dropped.
//!
//! A guard ([`Drain::guard`](super::token::Drain::guard)) ignores the result of `enter`: it counts in every phase.
//!
//! So after a read that finds the word closed and empty, no call is in flight and no further call will be admitted. A
//! separate counter and flag do not have this property: a call could read the flag as open, and increment the counter
//! only after the drain has read it as zero.
//!
//! The drain reads this word and the phase, which is another atomic. All accesses are `SeqCst`, so that there is
//! one order of all of them. `LifecycleState::go_to` closes the door before it publishes a phase in which calls are rejected.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// A count of calls that can be closed once, and never opens again.
pub(super) struct InFlightGate(AtomicUsize);

const CLOSED: usize = 1;
const ONE: usize = 2;

impl InFlightGate {
    pub(super) fn new() -> Self {
        Self(AtomicUsize::new(0))
    }

    /// Counts one call, and returns whether the door is open, so that the call is admitted. The caller must call
    /// [`leave`](Self::leave) once in either case.
    pub(super) fn enter(&self) -> bool {
        self.0.fetch_add(ONE, SeqCst) & CLOSED == 0
    }

    pub(super) fn leave(&self) {
        self.0.fetch_sub(ONE, SeqCst);
    }

    pub(super) fn close(&self) {
        self.0.fetch_or(CLOSED, SeqCst);
    }

    pub(super) fn is_open(&self) -> bool {
        self.0.load(SeqCst) & CLOSED == 0
    }

    pub(super) fn inside(&self) -> usize {
        self.0.load(SeqCst) / ONE
    }
}

#[cfg(test)]
mod tests {
    use std::{
        sync::{Barrier, atomic::AtomicBool},
        thread,
    };

    use super::*;

    #[test]
    fn who_comes_too_late_is_told_so_and_leaves() {
        let door = InFlightGate::new();
        assert!(door.enter() && door.is_open());
        door.close();
        assert!(!door.enter() && !door.is_open());
        assert_eq!(door.inside(), 2);
        door.leave();
        door.leave();
        assert_eq!((door.inside(), door.is_open()), (0, false));
    }

    /// After the door is seen closed and empty, no call is admitted.
    #[test]
    fn nobody_is_inside_after_it_was_closed_and_empty() {
        const THREADS: usize = 4;
        for _ in 0..200 {
            let (door, gone, begin) =
                (InFlightGate::new(), AtomicBool::new(false), Barrier::new(THREADS + 1));
            let came = AtomicUsize::new(0);
            let comes_until_told = || {
                begin.wait();
                while door.enter() {
                    assert!(!gone.load(SeqCst), "admitted after the end");
                    came.fetch_add(1, SeqCst);
                    door.leave();
                }
                door.leave();
            };
            thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(comes_until_told);
                }
                begin.wait();
                while came.load(SeqCst) == 0 {
                    thread::yield_now();
                }
                door.close();
                while door.inside() > 0 {
                    thread::yield_now();
                }
                gone.store(true, SeqCst);
            });
            assert_eq!(door.inside(), 0);
        }
    }
}
