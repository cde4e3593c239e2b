//! The operations of the handle on the machine: set a state, isolate, restore a snapshot, set thresholds.

use std::{mem, time::Duration};

use super::super::{
    state::{ChangedBy, CircuitSettings, CircuitState, Transition},
    trip::Trip,
};
use super::{
    Machine, MachinePhase, SavedState,
    probes::Probes,
    stats::{CallCounts, TimeWindows},
};
use crate::time::{Nanos, nanos};

impl Machine {
    /// Sets the state. Clears the counts, except for half-open.
    pub(in super::super) fn force(
        &mut self,
        to: CircuitState,
        now: Nanos,
        times: &TimeWindows,
    ) -> Transition {
        if to != CircuitState::HalfOpen {
            self.counts.clear(times);
            self.trips_in_row = 0;
        }
        self.last_event = now;
        let change = self.transition_to(phase(to, Duration::ZERO, now), None, now);
        Transition { by: Some(ChangedBy::Hand), ..change }
    }

    /// Adds or removes an isolation, which holds the circuit open. The state beneath it continues to change.
    pub(in super::super) fn isolate(&mut self, more: bool, now: Nanos) -> Option<Transition> {
        let (before, from) = (self.isolations, self.state());
        self.isolations = if more { before.saturating_add(1) } else { before.saturating_sub(1) };
        let turned = (before == 0) != (self.isolations == 0);
        let to = self.state();
        self.history.record_change(from, to, now);
        turned.then_some(Transition {
            from,
            to,
            tripped: None,
            probes: None,
            open_for: 0,
            episode: None,
            by: Some(ChangedBy::Isolation),
        })
    }

    /// Returns the part of a snapshot that another circuit restores.
    pub(in super::super) fn saved_state(&self, now: Nanos, times: &TimeWindows) -> SavedState {
        let left = match self.phase {
            MachinePhase::Open { until } => Duration::from_nanos(until.saturating_sub(now)),
            _ => Duration::ZERO,
        };
        let (run, windows) = self.counts.saved(now, times);
        let (state, has_responded) = (self.beneath(), self.counts.has_responded());
        SavedState { state, left, trips_in_row: self.trips_in_row, run, has_responded, windows }
    }

    /// Replaces the state and the counts by those of another circuit.
    pub(in super::super) fn restore(
        &mut self,
        saved: &SavedState,
        now: Nanos,
        times: &TimeWindows,
    ) -> Transition {
        self.counts.restore(saved.run, &saved.windows, now, times);
        if saved.has_responded {
            self.counts.set_responded();
        }
        self.trips_in_row = saved.trips_in_row;
        self.last_event = now;
        self.open_time = self.open_time.max(nanos(saved.left));
        if matches!(saved.state, CircuitState::Open | CircuitState::HalfOpen) {
            // The circuit of the snapshot has tripped.
            self.episode.get_or_insert((now, saved.trips_in_row.max(1)));
        }
        let change = self.transition_to(phase(saved.state, saved.left, now), None, now);
        Transition { by: Some(ChangedBy::Hand), ..change }
    }

    /// Sets new thresholds of the same rules, and keeps the counts. Returns `false` if they are other rules.
    ///
    /// `new` and its counts are made without the lock, and contain the replaced rules after this call: rules contain
    /// closures, whose destructors are user code.
    pub(in super::super) fn adjust(&mut self, new: &mut Trip, counts: &mut CallCounts) -> bool {
        let fits = self.counts.adjust(new, &self.shape, counts);
        if fits {
            mem::swap(&mut self.shape, new);
        }
        fits
    }

    /// Returns the rules and settings, to make another circuit with them.
    pub(in super::super) fn shape(&self) -> (Trip, CircuitSettings) {
        (self.shape.clone(), self.settings)
    }
}

fn phase(state: CircuitState, left: Duration, now: Nanos) -> MachinePhase {
    match state {
        CircuitState::Closed => MachinePhase::Closed { since: now, ramps: false },
        CircuitState::Open => MachinePhase::Open { until: now.saturating_add(nanos(left)) },
        CircuitState::HalfOpen => MachinePhase::HalfOpen(Probes::default()),
        CircuitState::ForcedOpen => MachinePhase::ForcedOpen,
        CircuitState::ForcedClosed => MachinePhase::ForcedClosed,
    }
}
