//! The queries of the machine: for the lock-free paths, for snapshots and for waiting callers. They require that time
//! has [passed](Machine::pass_time), unless they state otherwise.

use super::super::{
    state::{CircuitState, HalfOpenProgress},
    trip::{CallStats, TripReason},
};
use super::{Machine, MachinePhase, history::History, stats::TimeWindows};
use crate::time::{Nanos, nanos};

impl Machine {
    pub(in super::super) fn state(&self) -> CircuitState {
        if self.isolations > 0 { CircuitState::ForcedOpen } else { self.beneath() }
    }

    /// Returns the state beneath all isolations.
    pub(super) fn beneath(&self) -> CircuitState {
        match self.phase {
            MachinePhase::Closed { .. } => CircuitState::Closed,
            MachinePhase::Open { .. } => CircuitState::Open,
            MachinePhase::HalfOpen(_) => CircuitState::HalfOpen,
            MachinePhase::ForcedOpen => CircuitState::ForcedOpen,
            MachinePhase::ForcedClosed => CircuitState::ForcedClosed,
        }
    }

    /// Returns the time of the next change that needs no call and that callers wait for.
    pub(in super::super) fn next_by_time(&self, now: Nanos) -> Option<Nanos> {
        match &self.phase {
            _ if self.isolations > 0 => None,
            MachinePhase::Closed { since, ramps: true } if self.settings.backpressure => {
                Some(self.settings.ramp_step(*since, now).1)
            }
            MachinePhase::Open { until } => Some(*until),
            MachinePhase::HalfOpen(probes) => probes.next_change(),
            _ => None,
        }
    }

    /// Returns whether a call would be admitted. During a ramp without backpressure the result is `true`, although a
    /// random share of the calls is rejected.
    pub(in super::super) fn has_room(&self, now: Nanos) -> bool {
        match &self.phase {
            _ if self.isolations > 0 => false,
            MachinePhase::Closed { since, ramps: true } if self.settings.backpressure => {
                self.settings.ramp_step(*since, now).0
            }
            MachinePhase::Closed { .. } | MachinePhase::ForcedClosed => true,
            MachinePhase::Open { .. } | MachinePhase::ForcedOpen => false,
            MachinePhase::HalfOpen(probes) => probes.has_room(&self.settings),
        }
    }

    /// Returns whether this probe is still in flight and its inner call may still begin.
    pub(in super::super) fn still_probes(&self, generation: u64) -> bool {
        match &self.phase {
            MachinePhase::HalfOpen(probes) if self.isolations == 0 => probes.has(generation),
            _ => false,
        }
    }

    // ===== For the lock-free paths =====

    pub(in super::super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Returns the time at which an open circuit becomes half-open. 0 in all other states.
    pub(in super::super) fn until(&self) -> Nanos {
        match self.phase {
            MachinePhase::Open { until } => until,
            _ => 0,
        }
    }

    /// Returns whether the circuit is closed and ramps up.
    pub(in super::super) fn ramps(&self) -> bool {
        matches!(self.phase, MachinePhase::Closed { ramps: true, .. })
    }

    /// Returns whether a success that is not slow would change nothing but the time windows.
    pub(in super::super) fn is_clean(&self) -> bool {
        self.counts.is_clean()
    }

    pub(in super::super) fn slow_from(&self) -> Option<Nanos> {
        self.counts.slow_from()
    }

    // ===== For snapshots =====

    pub(in super::super) fn isolations(&self) -> u32 {
        self.isolations
    }

    pub(in super::super) fn opened(&self) -> u64 {
        self.history.trips.iter().sum()
    }

    /// Returns the totals since the circuit was made, up to this time.
    pub(in super::super) fn history(&self, now: Nanos) -> History {
        self.history.at(self.state(), now)
    }

    pub(in super::super) fn last_trip(&self) -> Option<TripReason> {
        self.last
    }

    pub(in super::super) fn last_rule(&self) -> Option<usize> {
        self.last_rule
    }

    pub(in super::super) fn probes_in_flight(&self) -> usize {
        match &self.phase {
            MachinePhase::HalfOpen(probes) => probes.count_in_flight(),
            _ => 0,
        }
    }

    pub(in super::super) fn half_open_progress(&self) -> Option<HalfOpenProgress> {
        match &self.phase {
            MachinePhase::HalfOpen(probes) => Some(probes.progress(&self.settings)),
            _ => None,
        }
    }

    pub(in super::super) fn call_stats(&self, now: Nanos, times: &TimeWindows) -> CallStats {
        self.counts.call_stats(now, times)
    }

    // ===== For the eviction of unused circuits =====

    /// Returns for how long the circuit has been idle, or `None` if it differs from a new circuit.
    ///
    /// Does not require that time has [passed](Self::pass_time), because the passage of time can cause an event.
    pub(in super::super) fn idle_for(&self, now: Nanos, times: &TimeWindows) -> Option<Nanos> {
        let idle_for = now.saturating_sub(self.last_event);
        let is_like_new = match &self.phase {
            _ if self.isolations > 0 => false,
            MachinePhase::Closed { since, ramps } => {
                let ramp = if *ramps { nanos(self.settings.ramp) } else { 0 };
                let has_counts = self.call_stats(now, times) != CallStats::default();
                now.saturating_sub(*since) >= ramp
                    && self.has_recovered(now)
                    && (!has_counts || idle_for >= self.counts.quiet_period())
            }
            // The circuit is half-open since `until`, and no call has arrived.
            MachinePhase::Open { until } => now >= until.saturating_add(self.open_time),
            MachinePhase::HalfOpen(probes) => {
                probes.count_in_flight() == 0 && idle_for >= self.open_time
            }
            MachinePhase::ForcedOpen | MachinePhase::ForcedClosed => false,
        };
        is_like_new.then_some(idle_for)
    }
}
