use std::{fmt, pin::pin, time::Duration};

use super::{core::Circuit, state::State, trip::Tripped};
use crate::call::Shared;

/// Looks at a circuit and steers it, from outside of the stack.
///
/// Clones see the same circuit, and so do all services that the layer or a clone of it made.
#[derive(Clone)]
pub struct CircuitBreakerHandle(pub(super) Shared<Circuit>);

/// A circuit at one moment.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct CircuitBreakerSnapshot {
    /// Where it is.
    pub state: State,
    /// How long an open circuit still refuses.
    pub open_for: Option<Duration>,
    /// The failures in a row that the rules see.
    pub consecutive_failures: u32,
    /// The calls in the time window, if a rule has one.
    pub window_calls: u64,
    /// How many of them failed.
    pub window_failures: u64,
    /// Half-open probes under way.
    pub probes: usize,
    /// How often it opened.
    pub opened: u64,
    /// Which rule opened it last, and what that rule saw.
    pub last_trip: Option<Tripped>,
    /// How many calls it refused.
    pub refused: u64,
}

impl CircuitBreakerHandle {
    /// Where the circuit is: right also when no call has come since its wait ended.
    #[must_use]
    pub fn state(&self) -> State {
        self.0.state().0
    }

    /// All there is to know at this moment.
    #[must_use]
    pub fn snapshot(&self) -> CircuitBreakerSnapshot {
        let (state, open_for) = self.0.state();
        let now = self.0.now();
        let refused = self.0.refused();
        self.0.with_machine(|machine| {
            let (consecutive_failures, window_calls, window_failures) = machine.seen(now);
            CircuitBreakerSnapshot {
                state,
                open_for,
                consecutive_failures,
                window_calls,
                window_failures,
                probes: machine.probes_under_way(),
                opened: machine.opened(),
                last_trip: machine.last_trip(),
                refused,
            }
        })
    }

    /// Refuses every call until [`reset`](Self::reset) or [`force_closed`](Self::force_closed).
    pub fn force_open(&self) {
        self.0.force(State::ForcedOpen);
    }

    /// Lets every call through, uncounted, until [`reset`](Self::reset) or
    /// [`force_open`](Self::force_open).
    pub fn force_closed(&self) {
        self.0.force(State::ForcedClosed);
    }

    /// Closes the circuit and starts counting anew. What is under way no longer counts.
    pub fn reset(&self) {
        self.0.force(State::Closed);
    }

    /// Waits until the state is another than now, and tells it.
    ///
    /// That an open circuit's wait is over counts as a change, also without any traffic. Dropping the
    /// future is harmless.
    pub async fn changed(&self) -> State {
        let before = self.state();
        loop {
            let mut notified = pin!(self.0.changed().notified());
            // From here on no change is missed.
            notified.as_mut().enable();
            let (state, lasts) = self.0.state();
            if state != before {
                return state;
            }
            match lasts {
                Some(left) => {
                    let _ = tokio::time::timeout(left, notified).await;
                }
                None => notified.await,
            }
        }
    }
}

impl fmt::Debug for CircuitBreakerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CircuitBreakerHandle").field(&*self.0).finish()
    }
}
