//! The state machine of a circuit. It is synchronous, and time and random numbers are arguments.
//!
//! `transitions` contains the transitions by calls and by time, `manual` those by the handle, and `view` the queries.
//!
//! # Invariants
//!
//! - Each transition goes through [`Machine::transition_to`], which increments the generation. The admission of a probe
//!   increments it, too. So an outcome with an older generation is late and changes nothing.
//! - The operations for calls and probes first make the changes that are due by time ([`Machine::pass_time`]). Queries
//!   require this, unless they state otherwise.
//! - An isolation is not a phase. It overrides the reported state and rejects calls, while the phase beneath it changes
//!   by time and by the outcomes of earlier calls.
//! - The only user code that the machine runs is the closures of [`Trip::when`](super::trip::Trip::when). It does not
//!   drop them under the lock: [`Machine::adjust`] swaps them with the new ones.

mod history;
mod manual;
mod probes;
mod stats;
mod transitions;
mod view;
mod window;

use std::{mem, time::Duration};

pub(super) use self::{
    history::History,
    probes::{MAX_CHANGES, ProbeReport, Probes},
    stats::{CallCounts, Ended, TimeWindows, Windows},
};
use super::{
    state::{CircuitSettings, CircuitState, OpenEpisode, Transition},
    trip::{Trip, TripReason},
};
use crate::time::{Nanos, nanos};

/// A function that draws a random number from [0, 1).
pub(super) type Rng = fn() -> f64;

/// The context of an operation on the machine: the time, a source of random numbers, and the time windows, which are
/// not part of the machine.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    pub(super) now: Nanos,
    pub(super) rng: Rng,
    pub(super) times: &'a TimeWindows,
}

/// The part of a snapshot that another circuit restores.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct SavedState {
    /// The state beneath all isolations.
    state: CircuitState,
    /// The rest of the open time. Zero unless the circuit is open.
    left: Duration,
    trips_in_row: u32,
    run: u32,
    has_responded: bool,
    windows: Windows,
}

#[derive(Debug)]
pub(super) struct Machine {
    pub(super) settings: CircuitSettings,
    shape: Trip,
    counts: CallCounts,
    phase: MachinePhase,
    /// Incremented by each transition and by each admission of a probe, so that late outcomes are detected.
    generation: u64,
    /// The number of isolations that hold the circuit open.
    isolations: u32,
    history: History,
    /// The number of trips since the last ones were forgotten.
    trips_in_row: u32,
    last: Option<TripReason>,
    /// The index of the rule that caused the last trip. `None` if half-open probes caused it.
    last_rule: Option<usize>,
    /// The probes of a phase that has ended, until the owner of the lock [takes](Self::take_ended) them.
    ended: Option<Probes>,
    /// The time of the last event other than the passage of time.
    last_event: Nanos,
    /// The duration of the last open state, or of the next one if the circuit has not been open yet.
    open_time: Nanos,
    /// The time of the first trip since the circuit was closed, and the number of trips since then. `None` if there was
    /// none.
    episode: Option<(Nanos, u32)>,
}

#[derive(Debug)]
enum MachinePhase {
    /// `since` is the time of closing. `ramps` states whether the ramp after it still runs.
    Closed {
        since: Nanos,
        ramps: bool,
    },
    Open {
        until: Nanos,
    },
    HalfOpen(Probes),
    ForcedOpen,
    ForcedClosed,
}

impl Machine {
    pub(super) fn new(
        trip: Trip,
        settings: CircuitSettings,
        generation: u64,
    ) -> (Self, TimeWindows) {
        let (counts, times) = CallCounts::new(&trip);
        let open_time = nanos(settings.open_for.base());
        let machine = Self {
            settings,
            shape: trip,
            counts,
            phase: MachinePhase::Closed { since: 0, ramps: false },
            generation,
            isolations: 0,
            history: History::default(),
            trips_in_row: 0,
            last: None,
            last_rule: None,
            ended: None,
            last_event: 0,
            open_time,
            episode: None,
        };
        (machine, times)
    }

    /// Returns whether the circuit has been closed for so long that its earlier trips no longer extend the open time.
    fn has_recovered(&self, now: Nanos) -> bool {
        let MachinePhase::Closed { since, .. } = self.phase else { return false };
        self.trips_in_row == 0
            || now.saturating_sub(since) >= nanos(self.settings.open_for.reset_time())
    }

    fn transition_to(
        &mut self,
        phase: MachinePhase,
        tripped: Option<TripReason>,
        now: Nanos,
    ) -> Transition {
        self.generation += 1;
        let (from, progress) = (self.state(), self.half_open_progress());
        if let MachinePhase::HalfOpen(probes) = mem::replace(&mut self.phase, phase) {
            // If a phase ends while the probes of an earlier one are still here, the older ones are dropped. One lock
            // hold ends two phases only if their probes were few.
            self.ended = Some(probes);
        }
        let to = self.state();
        self.history.record_change(from, to, now);
        let episode = self
            .episode
            .map(|(since, opened)| OpenEpisode { opened, lasted: now.saturating_sub(since) });
        if matches!(self.phase, MachinePhase::Closed { .. } | MachinePhase::ForcedClosed) {
            self.episode = None;
        }
        let open_for = if tripped.is_some() { self.open_time } else { 0 };
        Transition { from, to, tripped, probes: progress, open_for, episode, by: None }
    }

    /// Takes the probes of a phase that has ended. There may be many, and they are dropped without the lock.
    pub(super) fn take_ended(&mut self) -> Option<Probes> {
        self.ended.take()
    }
}
