//! Hedging: further attempts of a slow call, to shorten the tail of the latency.
//!
//! ```
//! # fn client() -> impl Clone { () }
//! use std::time::Duration;
//! use buttress::HedgeLayer;
//! use tower::ServiceBuilder;
//!
//! // 95 % of the calls have a response within 80 ms. The others get a hedge attempt.
//! let hedge = HedgeLayer::http(Duration::from_millis(80));
//! let client = ServiceBuilder::new().layer(hedge).service(client());
//! ```
//!
//! With a budget that it shares with the retry. Both make a deposit for each call:
//!
//! ```
//! # fn main() -> Result<(), buttress::ConfigError> {
//! use std::time::Duration;
//! use buttress::{HedgeLayer, RetryBudget, RetryLayer};
//!
//! let budget = RetryBudget::ratio(0.05);
//! let retry = RetryLayer::http().budget(budget.clone()).checked()?;
//! let hedge = HedgeLayer::http(Duration::from_millis(80)).budget(budget).checked()?;
//! # let _ = (retry, hedge); Ok(()) }
//! ```
//!
//! [`HedgeLayer::after_percentile`] derives the delay from the latency of recent calls.
//!
//! # How it decides
//!
//! If no attempt has a response after the delay, the layer sends a hedge attempt, provided that all of this holds:
//!
//! - The request is safe to repeat, by its method (RFC 9110 §9.2.2), an `Idempotency-Key`, or
//!   [`assume_idempotent`](HedgeLayer::assume_idempotent).
//! - Its body can be replayed at that time.
//! - Its [`Deadline`](crate::time::Deadline) has not passed.
//! - The budget permits it.
//!
//! A call has at most one hedge attempt by default. [`max_hedges`](HedgeLayer::max_hedges) permits more, each a delay
//! after the previous one.
//!
//! A response is *good* if it is neither a failure nor throttled nor retryable, such as a 200 or a 404. An error, a 429
//! and a 500 are *bad*. A gRPC call is classified by its gRPC status, in the head, in the trailers or mapped from the
//! HTTP status; a stream that begins slowly is good. [`Http`](crate::classify::Http) has the table, which all layers
//! share.
//!
//! | a response arrives | if it is good | if it is bad |
//! |---|---|---|
//! | before a hedge attempt is sent | returned | returned: hedging does not retry |
//! | while other attempts are in flight | returned, the others are dropped | dropped: the others decide |
//! | from the last attempt in flight | returned | returned |
//!
//! A bad response is dropped at once with its permit and its connection, because another attempt may wait for these. No
//! hedge attempt is sent after a bad response, which may be a 429, a rejection by an inner layer, or a pushback that
//! forbids a retry. gRPC's hedging policy sends the next attempt at once after a failure. Here a retry layer does so.
//!
//! # In the stack
//!
//! Put the layer inside of a retry and outside of the circuit breaker and the limit, so that they count and limit each
//! attempt. It is most useful outside of a balancer: two attempts to one slow server help little. The wrapped service
//! receives `http::Request<ReplayBody<B>>`, as under a retry.
//!
//! The extensions of a hedge attempt contain [`HedgeAttempt`], and an [`Attempt`](crate::attempt::Attempt) whose number
//! is that of the first attempt plus the number of the hedge attempt. Over gRPC, `grpc-previous-rpc-attempts` is
//! greater by one for each hedge attempt (gRFC A6). The extensions of the response contain [`Hedged`] if a hedge
//! attempt was sent. If an inner limit rejects a hedge attempt, no further one is sent for this call, and the attempts
//! in flight decide.
//!
//! # Bodies
//!
//! A request body is saved while it is sent, up to 64 KiB. A request whose body the previous attempt still reads when
//! the delay is over is not hedged, and neither is one with a larger body. A request without a body can always be
//! hedged. The response is chosen by its head (gRPC: by its first frame); its body is not raced.
//!
//! # Readiness
//!
//! `poll_ready` is that of the wrapped service. A hedge attempt is made with a clone of the service. The other attempts
//! continue while the clone is not ready. If the readiness of the clone fails, only the hedge attempt is not sent. The
//! withdrawal for a hedge attempt that is not sent is refunded.
//!
//! # Cancellation
//!
//! Dropping the call drops all attempts. A panic in any of them is a panic of the call.
//!
//! # Telemetry
//!
//! Each attempt has a span `attempt` at DEBUG, as under a [retry](crate::retry#telemetry). A hedge attempt is a sibling
//! of the first attempt: its field `hedge` is `true`, and `http.request.resend_count` is its number. An attempt that is
//! dropped because another one has won ends as `cancelled`, with the reason `superseded`. Each hedge attempt that is
//! sent, or that is due and not sent, emits an event at DEBUG, and so does the end of a call with hedge attempts.
//!
//! # Cost
//!
//! A call without a hedge attempt costs a copy of the request's head, two small allocations if it has a body, and a
//! timer if its response is not available at once. A request that cannot be hedged costs none of these. A hedge attempt
//! is boxed: two allocations.
//!
//! # Defaults
//!
//! | setting | default |
//! |---|---|
//! | delay | must be set, or derived from [a percentile](HedgeLayer::after_percentile); begin near the 95th percentile of the latency |
//! | [`max_hedges`](HedgeLayer::max_hedges) | 1 |
//! | [`budget`](HedgeLayer::budget) | 5 %, and 1 per second |
//! | [`max_replay_bytes`](HedgeLayer::max_replay_bytes) | 64 KiB |
//!
//! A hedge attempt after the 95th percentile adds 5 % of the calls. Dean and Barroso measured 2 % ("The Tail at Scale",
//! CACM 2013). If more calls than that need a hedge attempt, the delay is too short, or all calls are slow and more
//! load does not help. gRPC's throttling bounds hedge attempts too (gRFC A6).
//!
//! # Unlike `tower::hedge`
//!
//! `tower::hedge` returns the first response, even if it is an error. It has no layer and no `Clone`, does not bound
//! the number of hedge attempts, and leaves it to the user to decide which requests are safe to repeat.

mod handle;
mod layer;
#[cfg(feature = "observe")]
mod observe;
mod percentile;
mod service;
mod settings;

pub use self::{
    handle::{HedgeHandle, HedgeSnapshot},
    layer::HedgeLayer,
    service::{Hedge, HedgeFuture},
};
pub use crate::attempt::{
    AttemptHeaders, AttemptHeadersLayer, ClassifyAttempt, HedgeAttempt, Hedged, ReplayRequest,
    SavedCall,
};
