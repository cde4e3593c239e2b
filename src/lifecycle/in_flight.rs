//! The number of calls in flight and the flag that stops their admission, in one atomic word.
//!
//! The word is `calls << 1 | closed`. [`acquire`](InFlightGate::acquire) adds a call and reads the flag by one atomic
//! operation, so each `acquire` is ordered either before or after [`close`](InFlightGate::close):
//!
//! - before: the call is admitted, and every read of the count after `close` includes it until its release;
//! - after: the call is not admitted. It is counted for the short time until its permit is dropped.
//!
//! A guard ([`Drain::guard`](super::token::Drain::guard)) ignores the result of `acquire`: it counts in every phase.
//!
//! So after a read that finds the word closed and empty, no call is in flight and no further call will be admitted. A
//! separate counter and flag do not have this property: a call could read the flag as open, and increment the counter
//! only after the drain has read it as zero.
//!
//! The drain reads this word and the phase, which is another atomic. All accesses are `SeqCst`, so that there is one
//! order of all of them. `LifecycleState::advance_to` closes the gate before it publishes a phase in which calls are
//! rejected.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

/// A count of calls that can be closed once, and never opens again.
pub(super) struct InFlightGate(AtomicUsize);

const CLOSED: usize = 1;
const ONE: usize = 2;

impl InFlightGate {
    pub(super) fn new() -> Self {
        Self(AtomicUsize::new(0))
    }

    /// Counts one call, and returns whether the gate is open, so that the call is admitted. The caller must call
    /// [`release`](Self::release) once in either case.
    pub(super) fn acquire(&self) -> bool {
        self.0.fetch_add(ONE, SeqCst) & CLOSED == 0
    }

    pub(super) fn release(&self) {
        self.0.fetch_sub(ONE, SeqCst);
    }

    pub(super) fn close(&self) {
        self.0.fetch_or(CLOSED, SeqCst);
    }

    pub(super) fn is_open(&self) -> bool {
        self.0.load(SeqCst) & CLOSED == 0
    }

    pub(super) fn in_flight(&self) -> usize {
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
    fn call_after_the_close_is_counted_and_not_admitted() {
        let gate = InFlightGate::new();
        assert!(gate.acquire() && gate.is_open());
        gate.close();
        assert!(!gate.acquire() && !gate.is_open());
        assert_eq!(gate.in_flight(), 2);
        gate.release();
        gate.release();
        assert_eq!((gate.in_flight(), gate.is_open()), (0, false));
    }

    /// After the gate is observed closed and empty, no call is admitted.
    #[test]
    fn no_call_is_admitted_after_the_gate_was_closed_and_empty() {
        const THREADS: usize = 4;
        for _ in 0..200 {
            let (gate, ended, begin) =
                (InFlightGate::new(), AtomicBool::new(false), Barrier::new(THREADS + 1));
            let admitted = AtomicUsize::new(0);
            let acquire_until_closed = || {
                begin.wait();
                while gate.acquire() {
                    assert!(!ended.load(SeqCst), "admitted after the end");
                    admitted.fetch_add(1, SeqCst);
                    gate.release();
                }
                gate.release();
            };
            thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(acquire_until_closed);
                }
                begin.wait();
                while admitted.load(SeqCst) == 0 {
                    thread::yield_now();
                }
                gate.close();
                while gate.in_flight() > 0 {
                    thread::yield_now();
                }
                ended.store(true, SeqCst);
            });
            assert_eq!(gate.in_flight(), 0);
        }
    }
}
