//! The totals of a circuit since it was made, for metrics.

use super::super::{state::CircuitState, trip::TripReason};
use crate::{outcome::Reason, time::Nanos};

/// The totals of a circuit. They change only under the lock of the machine.
#[derive(Clone, Debug, Default)]
pub(in super::super) struct History {
    /// The time spent in each state, in the order of [`CircuitState::ALL`], without the current stay.
    pub(in super::super) state_times: [Nanos; CircuitState::ALL.len()],
    /// The number of entries into each state.
    pub(in super::super) entries: [u64; CircuitState::ALL.len()],
    /// The number of trips by reason, in the order of [`TripReason::LABELS`].
    pub(in super::super) trips: [u64; TripReason::LABELS.len()],
    /// The number of failures by reason, in the order of [`Reason::ALL`].
    pub(in super::super) failures: [u64; Reason::ALL.len()],
    /// The time of the last change of the reported state.
    since: Nanos,
}

impl History {
    /// Records a change of the reported state.
    pub(super) fn record_change(&mut self, from: CircuitState, to: CircuitState, now: Nanos) {
        if from != to {
            self.state_times[from as usize] += now.saturating_sub(self.since);
            self.since = self.since.max(now);
            self.entries[to as usize] += 1;
        }
    }

    pub(super) fn record_trip(&mut self, reason: TripReason) {
        self.trips[reason.index()] += 1;
    }

    pub(super) fn record_failure(&mut self, reason: Reason) {
        self.failures[reason as usize] += 1;
    }

    /// Returns the totals with the current stay, which lasts until `now`.
    pub(super) fn at(&self, state: CircuitState, now: Nanos) -> Self {
        let mut totals = self.clone();
        totals.state_times[state as usize] += now.saturating_sub(self.since);
        totals
    }
}
