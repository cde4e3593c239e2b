use std::{fmt, ops::RangeInclusive, time::Duration};

use super::super::check::checked_limit;
use crate::error::ConfigError;

/// An algorithm that determines the limit.
///
/// The methods are called under a lock, [`on_sample`](Self::on_sample) at the end of every call that is a sample. They
/// must be short and must not use a handle of the limit, which would deadlock. A panic is caught, also while the thread
/// unwinds, and reported as an event: the limit keeps its value, and later calls are recorded as before.
pub trait Algorithm: fmt::Debug + Send + 'static {
    /// Returns the current limit, 1 or more.
    fn limit(&self) -> u32;

    /// Replaces the limit by a value that was set through the handle. The algorithm continues from it.
    fn set_limit(&mut self, limit: u32);

    /// Sets the bounds of the limit. The algorithm continues within them. Returns `false` if it has no bounds.
    fn set_bounds(&mut self, bounds: RangeInclusive<u32>) -> bool {
        let _ = bounds;
        false
    }

    /// Records a call that has ended. Returns the change of the limit, if there is one.
    fn on_sample(&mut self, sample: &Sample) -> Option<LimitChange>;
}

/// A call, as an [`Algorithm`] records it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sample {
    /// The time of the sample, since the limit was made.
    pub now: Duration,
    /// The latency of the call; see the [module](super#samples).
    pub latency: Duration,
    /// The number of calls in flight when the call was admitted, including the call.
    pub in_flight: u32,
    /// Whether the upstream signalled overload, or did not respond in time.
    pub dropped: bool,
}

impl Sample {
    /// Returns the sample of a call that received a response.
    #[must_use]
    pub const fn new(now: Duration, latency: Duration, in_flight: u32) -> Self {
        Self { now, latency, in_flight, dropped: false }
    }

    /// Marks the call as dropped.
    #[must_use]
    pub const fn dropped(mut self) -> Self {
        self.dropped = true;
        self
    }

    /// Returns the time at which the latency of the call began.
    #[must_use]
    pub const fn started(&self) -> Duration {
        self.now.saturating_sub(self.latency)
    }

    /// Returns whether the call used too little of the limit to be a useful sample: less than half.
    pub(super) const fn is_idle(&self, limit: u32) -> bool {
        (self.in_flight as u64) * 2 < limit as u64
    }
}

/// A change of the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitChange {
    /// The new limit.
    pub limit: u32,
    /// The reason for the change.
    pub reason: ChangeReason,
}

impl LimitChange {
    /// Returns the change to a limit that the handle sets.
    pub(super) const fn by_hand(limit: u32) -> Self {
        Self { limit, reason: ChangeReason::ByHand }
    }
}

/// The reason for a change of the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ChangeReason {
    /// Calls were dropped: they timed out, or the upstream signalled overload.
    Dropped,
    /// Calls take longer than without a queue in the upstream.
    Queued,
    /// Calls are as fast as without a queue, and the limit is in use.
    Headroom,
    /// A lower limit has lowered the throughput, so there may have been no queue. The limit is lowered once more to
    /// find out.
    Slower,
    /// The limit is lowered for a short time, to measure the latency without a queue.
    Drain,
    /// The latency without a queue has been measured.
    Drained,
    /// The limit was set through the handle.
    ByHand,
    /// A reason of an algorithm of the application.
    Other(&'static str),
}

impl ChangeReason {
    /// The values of the label of a metric. All reasons of algorithms of applications are `other`, so that the set is
    /// closed.
    pub(in crate::limit) const LABELS: [&'static str; 8] =
        ["dropped", "queued", "headroom", "slower", "drain", "drained", "by_hand", "other"];

    /// Returns the index of the reason in [`LABELS`](Self::LABELS).
    pub(super) const fn index(&self) -> usize {
        match self {
            Self::Dropped => 0,
            Self::Queued => 1,
            Self::Headroom => 2,
            Self::Slower => 3,
            Self::Drain => 4,
            Self::Drained => 5,
            Self::ByHand => 6,
            Self::Other(_) => 7,
        }
    }

    /// Returns the reason in `snake_case`, as in events and metrics.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Dropped => "dropped",
            Self::Queued => "queued",
            Self::Headroom => "headroom",
            Self::Slower => "slower",
            Self::Drain => "drain",
            Self::Drained => "drained",
            Self::ByHand => "by_hand",
            Self::Other(reason) => reason,
        }
    }
}

impl fmt::Display for ChangeReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An algorithm with a constant limit.
#[derive(Clone, Copy, Debug)]
pub struct Fixed(u32);

impl Fixed {
    /// Returns an algorithm with this limit.
    ///
    /// # Errors
    ///
    /// Returns an error if the limit is zero or more than `u32::MAX`.
    pub fn new(limit: usize) -> Result<Self, ConfigError> {
        checked_limit(limit).map(Self)
    }
}

impl Algorithm for Fixed {
    fn limit(&self) -> u32 {
        self.0
    }

    fn set_limit(&mut self, limit: u32) {
        self.0 = limit.max(1);
    }

    fn on_sample(&mut self, _: &Sample) -> Option<LimitChange> {
        None
    }
}
