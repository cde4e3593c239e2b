//! Limits that find their own number.
//!
//! An [`Algorithm`] hears of every call that ended and says when the limit is to change, to what and why.
//! It is pure and told the time, so that it can be tried in virtual time. [`Knee`] is the one to take;
//! [`Aimd`], [`Vegas`] and [`Gradient2`] are there for those who know them from elsewhere, [`Fixed`] to
//! compare with.
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
//! # What each comes to
//!
//! 20 workers, 10 ms a call, so that 2000 calls a second can be served with 20 at once; 4000 are offered, what
//! finds the limit reached is refused. Virtual time, from `cargo run --example adaptive_limit` and, for the other
//! crates, `cargo run -p buttress-benches --example adaptive_peers`, 2026-11:
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
//! # What it learns from
//!
//! Latency is measured from when the request has been sent to the response head. The time in the queue and the time of
//! a slow upload are not part of it. The end of an upload is detected by a [`SentMark`](crate::call::SentMark) or by a
//! timeout layer inside of the limit. A call that ends before its request has been sent is not a sample, with one
//! exception: a connect timeout is a drop.
//!
//! [`until_body_end`](crate::ConcurrencyLimitLayer::until_body_end) measures to the end of the body instead, without
//! the time for which the response waits for its reader. Use it for streams, which hold their permits for much longer
//! than their heads take. With the latency to the head, each released permit admits a call whose head is quick or slow
//! by chance, and the limit wanders far below what the upstream can serve.
//!
//! A gRPC call whose status comes in the trailers is recorded when they arrive, with the latency to its head. Responses
//! that signal overload (429, 529, 503, 504, 520 to 524, `RESOURCE_EXHAUSTED`, `UNAVAILABLE`, `DEADLINE_EXCEEDED`; see
//! [`Http`](crate::call::Http)) and timeouts are drops. Cancelled calls are not recorded, unless the upstream had the
//! complete request for [`count_cancelled_after`](crate::ConcurrencyLimitLayer::count_cancelled_after): then they are
//! drops. Other failures are not recorded, because a response that fails fast must not count as a fast response.
//! Refused streams and other [connection housekeeping](crate::Outcome::is_housekeeping) are neutral, too.

mod aimd;
mod bounds;
mod gradient2;
mod knee;
mod teller;
mod vegas;

use std::{fmt, ops::RangeInclusive, time::Duration};

pub use self::{aimd::Aimd, gradient2::Gradient2, knee::Knee, vegas::Vegas};
use crate::ConfigError;
use bounds::Bounds;
pub(super) use teller::Teller;

/// An algorithm that determines the limit.
///
/// The methods are called under a lock, [`hear`](Self::hear) at the end of every call. They must be short and must not
/// use a handle of the limit, which would deadlock. A panic is caught, also while the thread unwinds, and reported as
/// an event: the limit keeps its value, and later calls are recorded as before.
pub trait Algorithm: fmt::Debug + Send + 'static {
    /// The limit as it is, 1 or more.
    fn limit(&self) -> u32;

    /// The limit was set by hand: go on from there.
    fn set_limit(&mut self, limit: u32);

    /// The bounds were changed by hand, to these: go on within them. False if there are none.
    fn set_bounds(&mut self, bounds: RangeInclusive<u32>) -> bool {
        let _ = bounds;
        false
    }

    /// A call has ended. What it changes, if anything.
    fn hear(&mut self, sample: &Sample) -> Option<Change>;
}

/// One call, as an [`Algorithm`] hears of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sample {
    /// The time, since the limit was made.
    pub now: Duration,
    /// How long the call took, from when it was let in.
    pub latency: Duration,
    /// How many calls were in flight when it was let in, itself included.
    pub in_flight: u32,
    /// Whether what was called asked for less, or did not answer in time.
    pub dropped: bool,
}

impl Sample {
    /// A call that was answered.
    #[must_use]
    pub const fn new(now: Duration, latency: Duration, in_flight: u32) -> Self {
        Self { now, latency, in_flight, dropped: false }
    }

    /// The same call, not answered but dropped.
    #[must_use]
    pub const fn dropped(mut self) -> Self {
        self.dropped = true;
        self
    }

    /// When the call was let in.
    #[must_use]
    pub const fn started(&self) -> Duration {
        self.now.saturating_sub(self.latency)
    }

    /// Whether too little of the limit was in use to learn from: less than half.
    const fn is_idle(&self, limit: u32) -> bool {
        (self.in_flight as u64) * 2 < limit as u64
    }
}

/// A new limit, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The limit from now on.
    pub limit: u32,
    /// Why.
    pub reason: Reason,
}

/// Why a limit changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// Calls were dropped: timed out, refused, or asked for less.
    Dropped,
    /// Calls take longer than they would without a queue.
    Queued,
    /// There is room: calls are as quick as without a queue, and the limit is in use.
    Room,
    /// Fewer calls at once got less done, so that there may have been no queue: to be looked at.
    Slower,
    /// For a moment, to see how quick calls are without a queue.
    Drain,
    /// That has been seen.
    Drained,
    /// It was set by hand.
    ByHand,
    /// As an algorithm of the user's says.
    Other(&'static str),
}

impl Reason {
    /// The reason in `snake_case`, as events and metrics have it.
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

/// A limit that stays.
#[derive(Clone, Copy, Debug)]
pub struct Fixed(u32);

impl Fixed {
    /// # Errors
    ///
    /// Zero, or more than `u32::MAX`.
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

    fn hear(&mut self, _: &Sample) -> Option<Change> {
        None
    }
}
