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
//! The results are from virtual time, by `cargo run -p offline-examples --bin adaptive_limit` and, for the other
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
//! # Samples
//!
//! Latency is measured from when the request has been sent to the response head. The time in the queue and the time of
//! a slow upload are not part of it. The end of an upload is detected by a [`SentMark`](crate::outcome::SentMark) or by
//! a timeout layer inside of the limit. A call that ends before its request has been sent is not a sample, with one
//! exception: a connect timeout is a drop.
//!
//! [`until_body_end`](super::layer::ConcurrencyLimitLayer::until_body_end) measures to the end of the body instead,
//! without the time for which the response waits for its reader. Use it for streams, which hold their permits for much
//! longer than their heads take. With the latency to the head, each released permit admits a call whose head is quick
//! or slow by chance, and the limit wanders far below what the upstream can serve.
//!
//! A gRPC call whose status comes in the trailers is recorded when they arrive, with the latency to its head. Responses
//! that signal overload (429, 529, 503, 504, 520 to 524, `RESOURCE_EXHAUSTED`, `UNAVAILABLE`, `DEADLINE_EXCEEDED`; see
//! [`Http`](crate::classify::Http)) and timeouts are drops. Cancelled calls are not recorded, unless the upstream had
//! the complete request for [`count_cancelled_after`](super::layer::ConcurrencyLimitLayer::count_cancelled_after): then
//! they are drops. Other failures are not recorded, because a response that fails fast must not count as a fast
//! response. Refused streams and other [connection housekeeping](crate::outcome::Outcome::is_housekeeping) are neutral,
//! too.

mod aimd;
mod algorithm;
mod bounded;
mod gradient2;
mod knee;
mod sampler;
mod vegas;

pub(super) use self::sampler::{LimitStep, Sampler};
pub use self::{
    aimd::Aimd,
    algorithm::{Algorithm, ChangeReason, Fixed, LimitChange, Sample},
    gradient2::Gradient2,
    knee::Knee,
    vegas::Vegas,
};
