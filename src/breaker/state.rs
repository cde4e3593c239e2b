//! The words of the state machine: where a circuit is, what a call is given, what changed.

use std::time::Duration;

use super::{counts::TimeWindows, trip::Tripped, wait::OpenFor};
use crate::call::{COUNT_CANCELLED_AFTER, Nanos, nanos};

/// Where a circuit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Calls go, and are counted.
    Closed,
    /// Calls are refused until the wait is over.
    Open,
    /// The wait is over: a few probes decide.
    HalfOpen,
    /// Calls are refused until somebody says otherwise.
    ForcedOpen,
    /// Calls go and nothing is counted until somebody says otherwise.
    ForcedClosed,
}

impl State {
    /// The state in `snake_case`, as metrics have it.
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

#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    pub(super) open_for: OpenFor,
    /// How many probes go, at most.
    pub(super) probes: u16,
    /// How many of them must succeed.
    pub(super) needed: u16,
    pub(super) lease: Duration,
    /// The time after which a call that its caller ended counts as a failure. `None`: never.
    pub(super) count_cancelled_after: Option<Duration>,
    /// Zero: none.
    pub(super) ramp: Duration,
    /// Probes come through the handle alone.
    pub(super) outside_probes: bool,
    /// It is asked whether a call would go before there is one: a ramp gives turns then, and refuses nobody.
    pub(super) holds_back: bool,
}

/// The share of calls that goes at the beginning of a ramp.
const RAMP_FROM: f64 = 0.1;
/// How many turns a ramp gives to who is asked before there is a call.
const TURNS: u64 = 100;

impl Settings {
    pub(super) const DEFAULT: Self = Self {
        open_for: OpenFor::fixed(Duration::from_secs(30)),
        probes: 1,
        needed: 1,
        lease: Duration::from_secs(30),
        count_cancelled_after: Some(COUNT_CANCELLED_AFTER),
        ramp: Duration::ZERO,
        outside_probes: false,
        holds_back: false,
    };

    /// The share of calls that goes so long after a ramp has begun.
    pub(super) fn ramp_share(&self, gone: Nanos) -> f64 {
        RAMP_FROM + (1.0 - RAMP_FROM) * (gone as f64 / nanos(self.ramp) as f64)
    }

    /// Whether it is a turn in which calls go, and when that changes: of each stretch of the ramp the first
    /// part, and as large a part as calls are to go.
    pub(super) fn turn(&self, since: Nanos, now: Nanos) -> (bool, Nanos) {
        let length = (nanos(self.ramp) / TURNS).max(1);
        let gone = now.saturating_sub(since);
        let into = gone % length;
        let goes = (self.ramp_share(gone - into) * length as f64) as Nanos;
        let change = if into < goes { goes } else { length };
        (into < goes, now.saturating_add(change - into))
    }
}

/// Draws from [0, 1).
pub(super) type Roll = fn() -> f64;

/// What the machine is told with every event: the time, the luck, and the windows beside it.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    pub(super) now: Nanos,
    pub(super) roll: Roll,
    pub(super) times: &'a TimeWindows,
}

/// What a call was given: the generation that it counts in. A probe has one of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket {
    pub(super) generation: u64,
    pub(super) probe: bool,
}

/// Why a call was not let through; and for how long, unless something happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Open { left: Nanos },
    Probing,
    Ramping { left: Nanos },
    Forced,
}

/// The results of the half-open probes of a circuit.
///
/// The circuit closes at the success that makes [`passed`](Self::passed) sufficient, and opens as soon as too many
/// probes have [`failed`](Self::failed). See [`half_open_of`](super::CircuitBreakerLayer::half_open_of).
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
pub(super) struct Change {
    /// The state reported before. Equals `to` if the circuit was forced into the state that it already had, or if the
    /// state beneath an isolation changed.
    pub(super) from: State,
    pub(super) to: State,
    pub(super) tripped: Option<Tripped>,
    /// The results of the half-open state that ended, if one did.
    pub(super) probes: Option<HalfOpenProgress>,
}

impl Change {
    /// Combines this change with the one that preceded it. The reason of the later trip is kept.
    pub(super) fn after(self, before: Option<Self>) -> Self {
        let Some(before) = before else { return self };
        Self {
            from: before.from,
            to: self.to,
            tripped: self.tripped.or(before.tripped),
            probes: self.probes.or(before.probes),
        }
    }
}
