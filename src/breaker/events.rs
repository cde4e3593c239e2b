//! The events of the changes of circuits, and the limits on the number of these events.

use super::state::{ChangedBy, CircuitState, Transition};
use crate::{
    event::{RepeatedEvent, event, prose},
    outcome::LayerKind,
    time::Nanos,
};

const LAYER: &str = LayerKind::CircuitBreaker.as_str();

/// The events of one circuit, or of all circuits of a keyed layer.
///
/// An event above DEBUG that an outage repeats is limited: the first occurrence is emitted at its level, and later ones
/// at most once in 10 s, with the number of `occurrences` since the previous one. The others are emitted at DEBUG. For
/// a single circuit, the limit applies to the openings of an episode after the first one. An outage can open all
/// circuits of a keyed layer at once, so these share three limits: for first openings, for later openings and for
/// closings.
#[derive(Debug)]
pub(super) struct CircuitEvents {
    opened: RepeatedEvent,
    reopened: RepeatedEvent,
    closed: RepeatedEvent,
    is_keyed: bool,
}

impl CircuitEvents {
    /// Returns the events of a circuit without a key.
    pub(super) fn of_one() -> Self {
        Self {
            opened: RepeatedEvent::new(),
            reopened: RepeatedEvent::new(),
            closed: RepeatedEvent::new(),
            is_keyed: false,
        }
    }

    /// Returns the events that all circuits of a keyed layer share.
    pub(super) fn of_keyed() -> Self {
        Self { is_keyed: true, ..Self::of_one() }
    }

    /// Emits the events of a change of the circuit `name`. Must be called without a lock.
    ///
    /// A change without effect on the reported state emits no event: forcing a state that the circuit already has, or a
    /// transition beneath an isolation. A trip beneath an isolation is the exception.
    pub(super) fn emit(&self, name: &str, change: &Transition) {
        if change.tripped.is_some() {
            self.emit_opened(name, change);
        }
        match (change.by, change.to) {
            (Some(by), _) if change.from != change.to => emit_forced(name, change, by),
            (Some(_), _) => {}
            // A combined change can lead from half-open to half-open by way of a trip.
            (None, CircuitState::HalfOpen)
                if change.from != change.to || change.tripped.is_some() =>
            {
                event!(breaker, DEBUG, LAYER, name, "circuit half-open");
            }
            (None, CircuitState::Closed) if change.from != change.to => {
                self.emit_closed(name, change);
            }
            _ => {}
        }
    }

    fn emit_opened(&self, name: &str, change: &Transition) {
        let Some(reason) = change.tripped else { return };
        let opened = change.episode.map_or(1, |episode| episode.opened);
        let probes = change.probes;
        macro_rules! emit {
            ($level:ident, $occurrences:expr) => {
                event!(
                    breaker,
                    $level,
                    LAYER,
                    name,
                    reason = reason.as_str(),
                    why = prose(reason),
                    open_for_ms = ms(change.open_for),
                    opened = opened,
                    passed = probes.map(|probes| probes.passed),
                    failed = probes.map(|probes| probes.failed),
                    probes = probes.map(|probes| probes.total),
                    occurrences = $occurrences,
                    "circuit opened",
                )
            };
        }
        let is_first = opened == 1;
        let limit = match (is_first, self.is_keyed) {
            (true, false) => None,
            (true, true) => Some(&self.opened),
            (false, _) => Some(&self.reopened),
        };
        match (limit.map(RepeatedEvent::record), is_first) {
            (None, _) => emit!(WARN, None::<u64>),
            (Some(Some(occurrences)), true) => emit!(WARN, occurrences),
            (Some(Some(occurrences)), false) => emit!(INFO, occurrences),
            (Some(None), _) => emit!(DEBUG, None::<u64>),
        }
    }

    fn emit_closed(&self, name: &str, change: &Transition) {
        let (episode, probes) = (change.episode, change.probes);
        macro_rules! emit {
            ($level:ident, $occurrences:expr) => {
                event!(
                    breaker,
                    $level,
                    LAYER,
                    name,
                    open_ms = episode.map(|episode| ms(episode.lasted)),
                    opened = episode.map(|episode| episode.opened),
                    passed = probes.map(|probes| probes.passed),
                    failed = probes.map(|probes| probes.failed),
                    probes = probes.map(|probes| probes.total),
                    occurrences = $occurrences,
                    "circuit closed",
                )
            };
        }
        match self.is_keyed.then(|| self.closed.record()) {
            None => emit!(INFO, None::<u64>),
            Some(Some(occurrences)) => emit!(INFO, occurrences),
            Some(None) => emit!(DEBUG, None::<u64>),
        }
    }
}

/// Emits the event of a state that was set by hand, or that an isolation covers or uncovers.
fn emit_forced(name: &str, change: &Transition, by: ChangedBy) {
    let episode = change.episode.filter(|_| change.to == CircuitState::Closed);
    macro_rules! emit {
        ($level:ident) => {
            event!(
                breaker,
                $level,
                LAYER,
                name,
                state = change.to.as_str(),
                by = by.as_str(),
                open_ms = episode.map(|episode| ms(episode.lasted)),
                opened = episode.map(|episode| episode.opened),
                "circuit forced",
            )
        };
    }
    let is_end = match by {
        ChangedBy::Isolation => change.to != CircuitState::ForcedOpen,
        ChangedBy::Hand => change.to == CircuitState::Closed,
    };
    if is_end { emit!(INFO) } else { emit!(WARN) }
}

fn ms(time: Nanos) -> u64 {
    time / 1_000_000
}
