//! Algorithms that determine the limit from the calls.
//!
//! An [`Algorithm`] receives a [`Sample`] of each call that has ended, and returns a new limit with a reason when the
//! limit should change. The sample contains the time, so an algorithm needs no clock and can be tested in virtual time.
//! [`Knee`] is recommended. [`Aimd`], [`Vegas`] and [`Gradient2`] are known from other libraries; [`Fixed`] is for
//! comparisons.
//!
//! ```
//! # fn main() -> Result<(), buttress::ConfigError> {
//! use buttress::{ConcurrencyLimitLayer, limit::adaptive::Knee};
//!
//! let layer = ConcurrencyLimitLayer::adaptive(Knee::default());
//! let bounded = ConcurrencyLimitLayer::adaptive(Knee::new(50, 10..=400)?);
//! assert_eq!(bounded.handle().snapshot().limit, 50);
//! # let _ = layer;
//! # Ok(()) }
//! ```
//!
//! # Measurements
//!
//! An upstream with 20 workers and 10 ms per call serves 2000 calls per second with 20 calls in flight. 4000 calls per
//! second are offered, and a call that finds the limit reached is rejected. The columns contain:
//!
//! - the limit after 10 s, from three initial limits,
//! - the goodput and the 99th percentile of the latency in the 20th minute,
//! - with 8000 calls per second offered, the limit 5 s after the number of workers changes to 10, and 5 s after it
//!   changes to 40.
//!
//! The results are from virtual time, by `cargo run -p offline-examples --bin adaptive_limit` and, for the other crates,
//! `cargo run -p buttress-benches --example adaptive_peers`, 2026-11:
//!
//! | | after 10 s, from 1, 10, 1000 | goodput and p99 after 20 min | capacity halved, then fourfold |
//! |---|---|---|---|
//! | [`Knee`] | 29, 30, 29 | 1989/s, 20 ms | 14, 58 |
//! | [`Aimd`] with 30 ms | 63, 74, 77 | 1999/s, 49 ms | 36, 139 |
//! | [`Vegas`] | 10, 12, 10 | 1141/s, 15 ms | 9, 9 |
//! | [`Gradient2`] | 8, 17, 1000 | 1998/s, 157 ms | 27, 26 |
//! | tower-resilience 0.13, AIMD with 30 ms | 1, 1, 1 | 1470/s, 60 ms | 1, 1 |
//! | tower-resilience 0.13, Vegas | 6, 10, 4 | 482/s, 15 ms | 8, 5 |
//! | little-loadshedder 0.2 (its rule) | 30, 41, 999 | 1998/s, 36 ms | 49, 53 |
//!
//! # Samples
//!
//! Latency is measured from when the request has been sent to the response head. The time in the queue and the time of
//! a slow upload are not part of it. The end of an upload is detected by a [`SentMark`](crate::outcome::SentMark) or by a
//! timeout layer inside of the limit. A call that ends before its request has been sent is not a sample, with one
//! exception: a connect timeout is a drop.
//!
//! [`until_body_end`](super::layer::ConcurrencyLimitLayer::until_body_end) measures to the end of the body instead, without
//! the time for which the response waits for its reader. Use it for streams, which hold their permits for much longer
//! than their heads take. With the latency to the head, each released permit admits a call whose head is quick or slow
//! by chance, and the limit wanders far below what the upstream can serve.
//!
//! A gRPC call whose status comes in the trailers is recorded when they arrive, with the latency to its head. Responses
//! that signal overload (429, 529, 503, 504, 520 to 524, `RESOURCE_EXHAUSTED`, `UNAVAILABLE`, `DEADLINE_EXCEEDED`; see
//! [`Http`](crate::classify::Http)) and timeouts are drops. Cancelled calls are not recorded, unless the upstream had the
//! complete request for [`count_cancelled_after`](super::layer::ConcurrencyLimitLayer::count_cancelled_after): then they are
//! drops. Other failures are not recorded, because a response that fails fast must not count as a fast response.
//! Refused streams and other [connection housekeeping](crate::outcome::Outcome::is_housekeeping) are neutral, too.

mod aimd;
mod bounds;
mod gradient2;
mod knee;
mod sampler;
mod vegas;

use std::{fmt, ops::RangeInclusive, time::Duration};

pub use self::{aimd::Aimd, gradient2::Gradient2, knee::Knee, vegas::Vegas};
use crate::error::ConfigError;
use bounds::Bounds;
pub(super) use sampler::Teller;

/// An algorithm that determines the limit.
///
/// The methods are called under a lock, [`on_sample`](Self::on_sample) at the end of every call that is a sample. They must be
/// short and must not use a handle of the limit, which would deadlock. A panic is caught, also while the thread
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
    /// The latency of the call; see the [module](self#samples).
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
    const fn is_idle(&self, limit: u32) -> bool {
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

/// The reason for a change of the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ChangeReason {
    /// Calls were dropped: they timed out, or the upstream signalled overload.
    Dropped,
    /// Calls take longer than without a queue in the upstream.
    Queued,
    /// Calls are as fast as without a queue, and the limit is in use.
    Room,
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
    /// Returns the reason in `snake_case`, as in events and metrics.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Dropped => "dropped",
            Self::Queued => "queued",
            Self::Room => "room",
            Self::Slower => "slower",
            Self::Drain => "drain",
            Self::Drained => "drained",
            Self::ByHand => "by_hand",
            Self::Other(why) => why,
        }
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
        super::handle::checked(limit).map(Self)
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
