//! The metrics of a circuit breaker.

use std::{
    collections::BTreeSet,
    sync::{Arc, Weak},
    time::Duration,
};

use super::{
    circuit::{Circuit, REJECTIONS},
    handle::CircuitBreakerHandle,
    keyed::{Circuits, KeyedCircuit, KeyedCircuitBreakerHandle},
    state::CircuitState,
    trip::TripReason,
};
use crate::{
    observe::{
        Condition, ForceCircuit, KEYED_BREAKER, Observe, Observed, Part, Severity, Value, Visit,
        counted, metrics::*,
    },
    outcome::{LayerKind, Reason},
    report::ReportChange,
    sealed::Sealed,
};

/// The value of the label `key` for the circuits that are combined.
const OTHER: &str = "other";

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
        vec![Part::new(KEYED_BREAKER, self.circuits().named(), state)]
    }
}

/// Only a limited number of circuits have series of their own, because keys come from requests and can be many.
impl<Q: Send + Sync + 'static> Observed for Circuits<Q> {
    fn observe(&self, to: &mut dyn Visit) {
        let max_keys = to.max_keys();
        let mut circuits = self.of_keys(max_keys > 0);
        let states = || CircuitState::ALL.iter().map(CircuitState::as_str);
        to.counts(&BREAKER_CIRCUITS, "state", states().zip(KeyedCircuit::count_states(&circuits)));
        if max_keys == 0 {
            return;
        }
        circuits.sort_by(|a, b| a.rank().cmp(&b.rank()));
        // A series must not occur twice. So circuits without a name of their own are combined, too: those of a layer
        // without named keys, those whose keys have the same name, and a key with the name of the combined ones.
        let mut names = BTreeSet::from([String::new(), OTHER.to_owned()]);
        let (shown, others): (Vec<_>, Vec<_>) = circuits
            .into_iter()
            .partition(|circuit| names.len() < max_keys + 2 && names.insert(circuit.key.clone()));
        for KeyedCircuit { key, state, .. } in &shown {
            for one in CircuitState::ALL {
                let labels = [("key", &**key), ("state", one.as_str())];
                to.sample(&BREAKER_STATE, &labels, Value::Count(u64::from(one == *state)));
            }
        }
        // Absent without such keys, so that a layer with few keys has no series that is always 0.
        if !others.is_empty() {
            for (state, count) in states().zip(KeyedCircuit::count_states(&others)) {
                let labels = [("key", OTHER), ("state", state)];
                to.sample(&BREAKER_STATE, &labels, Value::Count(count));
            }
            to.fold(others.len() as u64);
        }
    }

    fn condition(&self) -> Condition {
        let circuits = self.of_keys(false);
        let counts = KeyedCircuit::count_states(&circuits);
        let open = counts[CircuitState::Open as usize] + counts[CircuitState::ForcedOpen as usize];
        let all = circuits.len() as u64;
        let half_open = counts[CircuitState::HalfOpen as usize];
        // A half-open circuit is not healthy yet. Otherwise a long outage, whose circuits are half-open at times, would
        // be reported as many short ones.
        let (severity, state) = match open {
            0 if half_open == 0 => (Severity::Healthy, "closed"),
            0 => (Severity::Strained, "half_open"),
            _ if open * 2 > all => (Severity::Failing, "open"),
            _ => (Severity::Strained, "open"),
        };
        let mut sentence = match open {
            0 => format!("None of {all} circuits is open."),
            1 => format!("1 of {all} circuits is open."),
            _ => format!("{open} of {all} circuits are open."),
        };
        if half_open > 0 {
            sentence.push_str(&format!(" Half-open circuits: {half_open}."));
        }
        let rejected: u64 = circuits.iter().map(|circuit| circuit.rejected).sum();
        Condition::new(severity, state, sentence).count("open circuits", open, Some(all)).count(
            "calls rejected",
            rejected,
            None,
        )
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

    fn condition(&self) -> Condition {
        let (state, left, seen, progress, isolations, last_trip, opened) =
            self.read(|machine, times, now| {
                (
                    machine.state(),
                    machine.until().saturating_sub(now),
                    machine.call_stats(now, times),
                    machine.half_open_progress(),
                    machine.isolations(),
                    machine.last_trip(),
                    machine.opened(),
                )
            });
        let rejected: u64 = self.rejected().iter().sum();
        let why =
            last_trip.map_or_else(|| "the reason is not known".to_owned(), |why| why.to_string());
        let severity = match state {
            CircuitState::Closed => Severity::Healthy,
            CircuitState::HalfOpen | CircuitState::ForcedClosed => Severity::Strained,
            CircuitState::Open | CircuitState::ForcedOpen => Severity::Failing,
        };
        let sentence = match state {
            CircuitState::Closed if opened == 0 => "The circuit is closed.".to_owned(),
            CircuitState::Closed => {
                format!(
                    "The circuit is closed. It has opened {}.",
                    counted(opened, "time", "times")
                )
            }
            CircuitState::Open => format!("The circuit is open: {why}."),
            CircuitState::HalfOpen => {
                format!("The circuit is half-open. It opened because: {why}.")
            }
            CircuitState::ForcedOpen if isolations > 0 => {
                let isolations = counted(isolations, "isolation", "isolations");
                format!("The circuit is held open by {isolations}.")
            }
            CircuitState::ForcedOpen => "The circuit was forced open.".to_owned(),
            CircuitState::ForcedClosed => {
                "The circuit was forced closed, so it counts no outcomes.".to_owned()
            }
        };
        let is_tripped = matches!(state, CircuitState::Open | CircuitState::HalfOpen);
        let reason = last_trip.as_ref().filter(|_| is_tripped).map(TripReason::as_str);
        let next = match state {
            CircuitState::Closed => None,
            CircuitState::Open => Some("Then calls are admitted as half-open probes."),
            CircuitState::HalfOpen => {
                Some("The results of the half-open probes close or open the circuit.")
            }
            CircuitState::ForcedOpen if isolations > 0 => {
                Some("This state ends with the last isolation.")
            }
            CircuitState::ForcedOpen | CircuitState::ForcedClosed => {
                Some("Reset the circuit to end this state.")
            }
        };
        let is_open = state == CircuitState::Open;
        let mut condition = Condition::new(severity, state.as_str(), sentence)
            .reason(reason)
            .ends_in(is_open.then_some(Duration::from_nanos(left)))
            .count("failures in a row", seen.consecutive_failures.into(), None);
        condition.is_circuit = true;
        condition.next = next.map(Into::into);
        if seen.window_calls > 0 {
            let calls = Some(seen.window_calls);
            condition = condition.count("failures in the window", seen.window_failures, calls);
        }
        if let Some(progress) = progress {
            let (passed, needed) = (progress.passed.into(), progress.needed.into());
            condition = condition.count("passed half-open probes", passed, Some(needed));
        }
        condition.count("calls rejected", rejected, None).in_shadow_mode(self.is_shadow())
    }

    fn add_receiver(&self, receiver: Arc<dyn ReportChange>) {
        self.reports().add(receiver);
    }

    fn force(&self, to: ForceCircuit) -> bool {
        let to = match to {
            ForceCircuit::Open => CircuitState::ForcedOpen,
            ForceCircuit::Closed => CircuitState::ForcedClosed,
            ForceCircuit::Reset => CircuitState::Closed,
        };
        self.change(|machine, at| Some(machine.force(to, at.now, at.times)));
        true
    }
}
