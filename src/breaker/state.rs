//! The types that the state machine of a circuit exchanges with its callers: states, settings, tokens and changes.

use std::{fmt, time::Duration};

use super::{open_duration::OpenDuration, trip::TripReason};
use crate::{
    outcome::COUNT_CANCELLED_AFTER,
    time::{Nanos, nanos},
};

/// The state of a circuit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CircuitState {
    /// Calls are admitted, and their outcomes are counted.
    Closed,
    /// Calls are rejected until the open time has passed.
    Open,
    /// The open time has passed. A limited number of probes is admitted, and decides.
    HalfOpen,
    /// Calls are rejected until the state is set again by the handle.
    ForcedOpen,
    /// Calls are admitted, and nothing is counted, until the state is set again by the handle.
    ForcedClosed,
}

impl CircuitState {
    /// All states, in the order of their declaration.
    pub(super) const ALL: [Self; 5] =
        [Self::Closed, Self::Open, Self::HalfOpen, Self::ForcedOpen, Self::ForcedClosed];

    /// Returns the state in `snake_case`, as in metrics.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
            Self::ForcedOpen => "forced_open",
            Self::ForcedClosed => "forced_closed",
        }
    }
}

impl fmt::Display for CircuitState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct CircuitSettings {
    pub(super) open_for: OpenDuration,
    /// The maximum number of half-open probes, at the same time and in total.
    pub(super) probes: u16,
    /// The number of successful probes that closes the circuit.
    pub(super) needed: u16,
    pub(super) probe_timeout: Duration,
    /// The time after which a call that its caller ended counts as a failure. `None`: never.
    pub(super) count_cancelled_after: Option<Duration>,
    /// The duration of the ramp after closing. Zero: no ramp.
    pub(super) ramp: Duration,
    /// Calls are never probes. Outcomes that are recorded by the handle decide.
    pub(super) external_probes: bool,
    /// Backpressure: the caller polls for readiness before it has a call. A ramp then admits all calls for a part of
    /// the time, instead of a random part of the calls.
    pub(super) backpressure: bool,
}

/// The share of calls that is admitted at the beginning of a ramp.
const RAMP_FROM: f64 = 0.1;
/// The number of steps of a ramp with backpressure.
const RAMP_STEPS: u64 = 100;

impl CircuitSettings {
    pub(super) const DEFAULT: Self = Self {
        open_for: OpenDuration::fixed(Duration::from_secs(30)),
        probes: 1,
        needed: 1,
        probe_timeout: Duration::from_secs(30),
        count_cancelled_after: Some(COUNT_CANCELLED_AFTER),
        ramp: Duration::ZERO,
        external_probes: false,
        backpressure: false,
    };

    /// Returns the share of calls that is admitted at this time after the beginning of a ramp.
    pub(super) fn ramp_share(&self, gone: Nanos) -> f64 {
        RAMP_FROM + (1.0 - RAMP_FROM) * (gone as f64 / nanos(self.ramp) as f64)
    }

    /// Returns whether a ramp with backpressure admits calls now, and when that changes.
    ///
    /// The ramp is divided into steps of equal length. In each step calls are admitted during the first part. The share
    /// of this part in the step is the share of calls that the ramp admits at the beginning of the step.
    pub(super) fn ramp_step(&self, since: Nanos, now: Nanos) -> (bool, Nanos) {
        let length = (nanos(self.ramp) / RAMP_STEPS).max(1);
        let gone = now.saturating_sub(since);
        let into = gone % length;
        let admitting = (self.ramp_share(gone - into) * length as f64) as Nanos;
        let change = if into < admitting { admitting } else { length };
        (into < admitting, now.saturating_add(change - into))
    }
}

/// The record of an admission: the generation in which the outcome counts. Each probe has its own generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CircuitToken {
    pub(super) generation: u64,
    pub(super) is_probe: bool,
}

impl CircuitToken {
    /// The bit of a tag that marks a probe. The other bits are the generation.
    const PROBE: u64 = 1 << 63;

    /// The token of a call that only shadow mode admits. Its outcome is not recorded: no circuit reaches this
    /// generation, because the published word stores 57 bits.
    pub(super) const UNCOUNTED: Self = Self { generation: Self::PROBE - 1, is_probe: false };

    /// Returns the tag of a permit's token.
    #[inline]
    pub(super) const fn pack(self) -> u64 {
        self.generation | if self.is_probe { Self::PROBE } else { 0 }
    }

    #[inline]
    pub(super) const fn unpack(tag: u64) -> Self {
        Self { generation: tag & !Self::PROBE, is_probe: tag & Self::PROBE != 0 }
    }
}

/// The reason for which a call is not admitted, with the time until that changes without other events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rejection {
    Open { left: Nanos },
    Probing,
    Ramping { left: Nanos },
    Forced,
}

/// The results of the half-open probes of a circuit.
///
/// The circuit closes at the success that makes [`passed`](Self::passed) sufficient, and opens as soon as too many
/// probes have [`failed`](Self::failed). See [`half_open_of`](super::layer::CircuitBreakerLayer::half_open_of).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HalfOpenProgress {
    /// The number of probes that passed.
    pub passed: u16,
    /// The number of probes that failed.
    pub failed: u16,
    /// The number of successes that close the circuit.
    pub needed: u16,
    /// The total number of probes that decide: those that passed, failed, are in flight, or are still to be admitted.
    pub total: u16,
}

/// The combined effect of the transitions of one operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Transition {
    /// The state reported before. Equals `to` if the circuit was forced into the state that it already had, or if the
    /// state beneath an isolation changed.
    pub(super) from: CircuitState,
    pub(super) to: CircuitState,
    pub(super) tripped: Option<TripReason>,
    /// The results of the half-open state that ended, if one did.
    pub(super) probes: Option<HalfOpenProgress>,
    /// The open time of the trip. 0 without one.
    pub(super) open_for: Nanos,
    /// The episode that the change belongs to. The episode ends if the change closes the circuit.
    pub(super) episode: Option<OpenEpisode>,
    /// The origin of a change that neither calls nor time caused.
    pub(super) by: Option<ChangedBy>,
}

/// The time from a trip until the circuit is closed again. Probes that fail open the circuit again within an episode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OpenEpisode {
    /// The number of times that the circuit has opened.
    pub(super) opened: u32,
    /// The time since the first trip.
    pub(super) lasted: Nanos,
}

/// The origin of a change that neither calls nor time caused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChangedBy {
    /// A method of the handle that sets the state.
    Hand,
    /// An isolation that began or ended.
    Isolation,
}

impl ChangedBy {
    /// Returns the origin as in the field `by` of events.
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Hand => "hand",
            Self::Isolation => "isolation",
        }
    }
}

impl Transition {
    /// Combines this change with the one that preceded it. The reason of the later trip is kept.
    pub(super) fn after(self, before: Option<Self>) -> Self {
        let Some(before) = before else { return self };
        Self {
            from: before.from,
            to: self.to,
            tripped: self.tripped.or(before.tripped),
            probes: self.probes.or(before.probes),
            open_for: self.open_for.max(before.open_for),
            episode: self.episode.or(before.episode),
            by: self.by.or(before.by),
        }
    }
}
