//! The metrics of a circuit breaker.

use std::sync::{Arc, Weak};

use super::{
    circuit::{Circuit, REJECTIONS},
    handle::CircuitBreakerHandle,
    keyed::{Circuits, KeyedCircuitBreakerHandle},
    state::CircuitState,
    trip::TripReason,
};
use crate::{
    observe::{Observe, Observed, Part, Visit, metrics::*},
    outcome::{LayerKind, Reason},
    sealed::Sealed,
};

const LAYER: &str = LayerKind::CircuitBreaker.as_str();

impl Sealed for CircuitBreakerHandle {}

impl Observe for CircuitBreakerHandle {
    fn parts(&self) -> Vec<Part> {
        let state: Weak<Circuit> = Arc::downgrade(&self.0);
        vec![Part::new(LAYER, self.0.named(), state)]
    }
}

impl<Q> Sealed for KeyedCircuitBreakerHandle<Q> {}

impl<Q: Send + Sync + 'static> Observe for KeyedCircuitBreakerHandle<Q> {
    fn parts(&self) -> Vec<Part> {
        let state: Weak<Circuits<Q>> = Arc::downgrade(self.circuits());
        vec![Part::new("keyed_circuit_breaker", self.circuits().named(), state)]
    }
}

/// A circuit has no series of its own: keys come from requests, and there may be many.
impl<Q: Send + Sync + 'static> Observed for Circuits<Q> {
    fn observe(&self, to: &mut dyn Visit) {
        let states = CircuitState::ALL.iter().map(CircuitState::as_str);
        to.counts(&BREAKER_CIRCUITS, "state", states.zip(self.count_states()));
    }
}

impl Observed for Circuit {
    fn observe(&self, to: &mut dyn Visit) {
        let (state, left, seen, probes, isolations, history) = self.read(|machine, times, now| {
            (
                machine.state(),
                machine.until().saturating_sub(now),
                machine.call_stats(now, times),
                machine.probes_in_flight(),
                machine.isolations(),
                machine.history(now),
            )
        });
        let states = || CircuitState::ALL.iter().map(CircuitState::as_str);
        let rejections = REJECTIONS.iter().map(|kind| kind.as_str()).zip(self.rejected());
        to.counts_of(&REJECTIONS_METRIC, LAYER, "reason", rejections);
        to.counts(&SHADOW_REJECTIONS, "layer", [(LAYER, self.shadowed())]);
        to.state(&BREAKER_STATE, "state", states(), state.as_str());
        for (state, time) in states().zip(history.state_times) {
            to.seconds_of(&BREAKER_STATE_TIME, ("state", state), time);
        }
        to.counts(&BREAKER_TRANSITIONS, "state", states().zip(history.entries));
        to.counts(&BREAKER_TRIPS, "reason", TripReason::LABELS.into_iter().zip(history.trips));
        to.seconds(&BREAKER_OPEN_REMAINING, if state == CircuitState::Open { left } else { 0 });
        to.count(&BREAKER_WINDOW_CALLS, seen.window_calls);
        to.count(&BREAKER_WINDOW_FAILURES, seen.window_failures);
        to.count(&BREAKER_WINDOW_SLOW, seen.window_slow);
        to.count(&BREAKER_CONSECUTIVE_FAILURES, seen.consecutive_failures.into());
        let reasons = Reason::ALL.iter().map(Reason::as_str);
        to.counts(&BREAKER_FAILURES, "reason", reasons.zip(history.failures));
        to.count(&BREAKER_PROBE_ACTIVE, probes as u64);
        to.count(&BREAKER_ISOLATIONS, isolations.into());
        let (waiting, max_waiting) = self.waiting();
        to.counts(&QUEUE_DEPTH, "layer", [(LAYER, waiting.into())]);
        to.counts(&QUEUE_LIMIT, "layer", [(LAYER, max_waiting.into())]);
    }
}
