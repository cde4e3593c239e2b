use std::{fmt, pin::pin, time::Duration};

use super::{
    core::Circuit,
    counts::{Counts, Seen},
    machine::Past,
    state::{HalfOpenProgress, State},
    trip::{Trip, Tripped},
    wait::OpenFor,
};
use crate::{
    ConfigError,
    call::{Indicator, Outcome, Shared},
};

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
    /// How many [isolations](CircuitBreakerHandle::isolate) hold it open.
    pub isolations: u32,
    /// What the rules have seen since it closed.
    pub seen: Seen,
    /// The number of half-open probes in flight.
    pub probes: usize,
    /// The results of the half-open probes so far. `None` if the circuit is not half-open.
    pub half_open: Option<HalfOpenProgress>,
    /// How often it opened.
    pub opened: u64,
    /// Which rule opened it last, and what that rule saw.
    pub last_trip: Option<Tripped>,
    /// The place of that rule among those that were given, from 0. None where probes have opened it.
    pub last_rule: Option<usize>,
    /// How many calls it refused.
    pub refused: u64,
    /// How many calls it would have refused, had it not been in [shadow mode](CircuitBreakerHandle::shadow).
    pub shadowed: u64,
    past: Past,
}

impl CircuitBreakerHandle {
    // ===== Looking =====

    /// Where the circuit is: right also when no call has come since its wait ended.
    #[must_use]
    pub fn state(&self) -> State {
        self.0.state().0
    }

    /// All there is to know at this moment.
    #[must_use]
    pub fn snapshot(&self) -> CircuitBreakerSnapshot {
        let (refused, shadowed) = (self.0.refused(), self.0.shadowed());
        self.0.look(|machine, times, now| {
            let state = machine.state();
            let left = Duration::from_nanos(machine.until().saturating_sub(now));
            CircuitBreakerSnapshot {
                state,
                open_for: (state == State::Open).then_some(left),
                isolations: machine.isolations(),
                seen: machine.seen(now, times),
                probes: machine.probes_under_way(),
                half_open: machine.half_open_progress(),
                opened: machine.opened(),
                last_trip: machine.last_trip(),
                last_rule: machine.last_rule(),
                refused,
                shadowed,
                past: machine.past(now, times),
            }
        })
    }

    /// Waits until the state is another than when this was called, and tells it.
    ///
    /// That an open circuit's wait is over counts as a change, also without any traffic. Dropping the
    /// future is harmless.
    pub fn changed(&self) -> impl Future<Output = State> + Send + use<> {
        let circuit = self.0.clone();
        let before = self.state();
        async move {
            loop {
                let mut notified = pin!(circuit.changed().notified());
                // From here on no change is missed.
                notified.as_mut().enable();
                let (state, lasts) = circuit.state();
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

    // ===== By hand =====

    /// Refuses every call until [`reset`](Self::reset) or [`force_closed`](Self::force_closed).
    pub fn force_open(&self) {
        self.force(State::ForcedOpen);
    }

    /// Lets every call through, uncounted, until [`reset`](Self::reset) or
    /// [`force_open`](Self::force_open).
    pub fn force_closed(&self) {
        self.force(State::ForcedClosed);
    }

    /// Asks at once: the next calls are probes.
    pub fn half_open(&self) {
        self.force(State::HalfOpen);
    }

    /// Closes the circuit and starts counting anew. What is under way no longer counts.
    pub fn reset(&self) {
        self.force(State::Closed);
    }

    fn force(&self, to: State) {
        self.0.act(|machine, at| Some(machine.force(to, at.now, at.times)));
    }

    /// Refuses every call as long as this, or another isolation of the same circuit, is kept. What the
    /// circuit was goes on underneath.
    #[must_use = "dropping it ends the isolation"]
    pub fn isolate(&self) -> Isolation {
        self.0.act(|machine, _| machine.isolate(true));
        Isolation(self.clone())
    }

    /// Shadow mode, on or off: nobody is refused, and [`shadowed`](CircuitBreakerSnapshot::shadowed) counts who
    /// would have been. Probes and results go on as ever.
    pub fn shadow(&self, on: bool) {
        self.0.steered();
        self.0.set_shadow(on);
    }

    /// An outcome from outside of the stack: of a health probe, say. It counts like a call's, and, once the
    /// wait is over, like a half-open probe's.
    pub fn record(&self, outcome: Outcome) {
        self.0.record(outcome);
    }

    // ===== While it runs =====

    /// Other thresholds for the same rules, in the same order: what was counted stays.
    ///
    /// # Errors
    ///
    /// What [`Trip::check`] finds; or rules of another kind or with other windows, which take a new layer.
    pub fn set_trip(&self, trip: &Trip) -> Result<(), ConfigError> {
        trip.check()?;
        let (mut new, mut fits) = (trip.clone(), false);
        let (mut counts, _) = Counts::new(trip);
        self.0.act(|machine, _| {
            fits = machine.adjust(&mut new, &mut counts);
            None
        });
        if fits {
            self.0.steered();
            return Ok(());
        }
        let remedy = "keep the kinds, the windows and the order of the rules, or build a new layer";
        Err(ConfigError::new("trip", trip, remedy))
    }

    /// How long an open circuit refuses, from the next trip on.
    ///
    /// # Errors
    ///
    /// What [`OpenFor::check`] finds.
    pub fn set_open_for(&self, wait: impl Into<OpenFor>) -> Result<(), ConfigError> {
        let wait = wait.into();
        wait.check()?;
        self.0.steered();
        self.0.configure(|settings| settings.open_for = wait);
        Ok(())
    }

    /// Takes up where the circuit of this snapshot left off: its state beneath all isolations, what is left
    /// of its wait, how often it opened without a calm, and what its rules had seen (by the same rules: a
    /// window of calls takes the share of bad ones, where it holds fewer). Probes start anew, a ramp does
    /// not. Isolations and counts of refusals stay as they are.
    pub fn restore(&self, snapshot: &CircuitBreakerSnapshot) {
        self.0.act(|machine, at| Some(machine.restore(&snapshot.past, at.now, at.times)));
    }
}

impl Indicator for CircuitBreakerHandle {
    /// Not well while it refuses everybody. Half-open is well: a server that is called no more, because it is not
    /// ready, would never close it again.
    fn indicate(&self) -> Result<(), String> {
        match self.state() {
            State::Open => Err("circuit is open".into()),
            State::ForcedOpen => Err("circuit is held open".into()),
            State::Closed | State::HalfOpen | State::ForcedClosed => Ok(()),
        }
    }
}

/// Holds a circuit open until it is dropped; made by [`CircuitBreakerHandle::isolate`].
#[derive(Debug)]
pub struct Isolation(CircuitBreakerHandle);

impl Drop for Isolation {
    fn drop(&mut self) {
        self.0.0.act(|machine, _| machine.isolate(false));
    }
}

impl fmt::Debug for CircuitBreakerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("CircuitBreakerHandle").field(&*self.0).finish()
    }
}
