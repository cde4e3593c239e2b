//! A circuit breaker: stops calling what keeps failing, and asks carefully when it is back.
//!
//! ```
//! # use std::time::Duration;
//! # fn client() -> impl Clone { () }
//! use buttress::CircuitBreakerLayer;
//! use tower::ServiceBuilder;
//!
//! let breaker = CircuitBreakerLayer::http();      // 5 failures in a row, open for 30 s, 1 probe
//! let handle = breaker.handle();
//! let client = ServiceBuilder::new().layer(breaker).service(client());
//! println!("{:?}", handle.snapshot());
//! ```
//!
//! With everything said:
//!
//! ```
//! # fn main() -> Result<(), buttress::ConfigError> {
//! use std::time::Duration;
//! use buttress::{CircuitBreakerLayer, Trip};
//!
//! let breaker = CircuitBreakerLayer::new(Trip::any([
//!     Trip::consecutive(5),
//!     Trip::failure_ratio(0.5).within(Duration::from_secs(10)).min_calls(20),
//! ]))
//! .name("search")
//! .open_for(Duration::from_secs(10))
//! .half_open(3)
//! .respond()
//! .checked()?;
//! # let _ = breaker; Ok(()) }
//! ```
//!
//! # How it decides
//!
//! ```text
//!            a rule trips                  the wait is over, a call comes
//!  closed ───────────────▶ open ─────────────────────────────────────────▶ half-open
//!    ▲                      ▲  a probe fails, is throttled, or outlives its lease │
//!    │                      └─────────────────────────────────────────────────────┤
//!    └────────────────────────────────────── all probes succeed ──────────────────┘
//! ```
//!
//! | a call ends as | closed | half-open |
//! |---|---|---|
//! | success | counted; ends a run of failures | one probe passed |
//! | failure | counted | opens again |
//! | throttled (429, `RESOURCE_EXHAUSTED`) | not counted | opens again |
//! | cancelled, or refused further in | not counted | gives its slot back |
//!
//! Thresholds are inclusive, and so is the end of the wait. A result that belongs to an earlier state
//! changes nothing: a straggler admitted before the trip cannot close the circuit, nor open it again.
//!
//! # In the stack
//!
//! For a client: under the retry, over the concurrency limit. What the limit refuses is no failure of
//! the upstream, and is not counted. An open circuit does not touch the service that it wraps; one
//! that opens wakes the callers that wait for it.
//!
//! # Streams
//!
//! A bad head counts at once. After a good one the call ends with its body: one that breaks off is a
//! failure, and so is a gRPC stream whose trailers say so. A good plain answer that nobody reads is a
//! success; a gRPC stream dropped before its status is cancelled.
//!
//! # Cancellation
//!
//! A call dropped before its head says nothing: it is not counted, and a probe's slot is free again. A
//! probe that neither ends nor is dropped counts by its head when its lease is over. A call that
//! panics is a failure.
//!
//! # Defaults
//!
//! | setting | default |
//! |---|---|
//! | rule | 5 failures in a row |
//! | [`open_for`](CircuitBreakerLayer::open_for) | 30 s |
//! | [`half_open`](CircuitBreakerLayer::half_open) | 1 probe |
//! | [`probe_lease`](CircuitBreakerLayer::probe_lease) | 30 s |
//! | [`failure_ratio`](Trip::failure_ratio)'s window | 10 s, at least 20 calls |
//! | refused calls | an error ([`Rejected`](crate::Rejected), boxed) |

mod cell;
mod core;
mod counts;
mod handle;
mod keyed;
mod layer;
mod policy;
mod probes;
mod state;
mod trip;
mod wait;
mod window;

pub use self::{
    counts::Seen,
    handle::{CircuitBreakerHandle, CircuitBreakerSnapshot, Isolation},
    keyed::{
        Key, KeyedCircuitBreaker, KeyedCircuitBreakerHandle, KeyedCircuitBreakerLayer, Origin,
        PerOrigin,
    },
    layer::{CircuitBreaker, CircuitBreakerLayer},
    state::State,
    trip::{Trip, Tripped},
    wait::OpenFor,
};
pub use crate::admission::ResponseFuture;
