//! The parts that all layers have in common: outcomes, protocols, permits, tracked bodies and rejections.
//!
//! ```text
//!             peek                  admit                      classify              end of stream
//!  poll_ready ─────▶ inner ready ───────▶ Permit ─▶ inner call ─▶ Protocol ─▶ Outcome ────▶ released
//!      │                             │                             └─▶ body decides ─▶ TrackedBody ─┘
//!      └ rejected: inner not polled  └ rejected: Rejected ─▶ Reject ─▶ an error, or a response
//! ```
//!
//! 1. [`Outcome`]: the result of a call as classified by a layer, and the reason for it.
//! 2. [`Protocol`]: classifies a response head, an error, or the end of a response body.
//! 3. [`Permit`]: the right to make one call. It is released exactly once, also if the call is dropped or panics. A
//!    permit of an earlier generation never changes the current state.
//! 4. [`TrackedBody`]: holds the permit until the end of the response body.
//! 5. [`Rejected`]: the rejection of a call. A [`Reject`] strategy converts it into an error or a response.
//!
//! # Which side caused it
//!
//! A failure counts against the upstream only if the upstream caused it. This table states how every layer counts every
//! cause. The column *retry* assumes an attempt left, a budget and a body that can be replayed. A *drop* is a
//! [sample](crate::limit::adaptive#samples) that signals overload to an adaptive limit.
//!
//! | cause | outcome | breaker | half-open probe | adaptive limit | retry | hedge |
//! |---|---|---|---|---|---|---|
//! | the caller hangs up, or its [`Deadline`] passes | cancelled | neutral | releases its slot | neutral | ends the call | ends the call |
//! | the same, and the upstream had the complete request for `count_cancelled_after` without a response head | failure, [`NoResponse`](Reason::NoResponse) | failure | failed | drop | ends the call | ends the call |
//! | the upstream reports the caller's deadline: 504, `DEADLINE_EXCEEDED`, or a body cut off at that time | as the deadline itself | neutral | releases its slot | neutral | ends the call | a failed attempt |
//! | a timeout, or a deadline of the [operator](crate::DeadlineSource::Operator) | failure, [`Timeout`](Reason::Timeout) | failure | failed | drop | safe methods, before the deadline | a failed attempt |
//! | a timeout that expires during an upload or in the queue of an inner layer, or before the upstream had the request for half of it | cancelled | neutral | releases its slot | neutral | safe methods, before the deadline | a failed attempt |
//! | a slow upload | as the response | its time is not measured | releases its slot after 100 ms, its outcome still counts | its time is not measured | – | – |
//! | the request body stalls, is below its minimum rate, or fails | cancelled, [`Caller`](Reason::Caller) | neutral | releases its slot | neutral | not retried | a failed attempt |
//! | a slow reader of the response | as the response | its time is not measured | passes after 100 ms if the head was a success | its time is not measured | – | – |
//! | a wait inside the client: for a permit, a connection, the next attempt | – | its time is not measured | releases its slot when its timeout expires | its time is not measured | – | – |
//! | a rejection by an inner layer | cancelled, [`Rejected`](Reason::Rejected) | neutral | releases its slot | neutral | ends the call | a failed attempt |
//! | never sent, `REFUSED_STREAM`, a stream above the last one of a `GOAWAY` with `NO_ERROR` | [housekeeping](Outcome::is_housekeeping) | neutral | releases its slot | neutral | at once, any method | the other attempt decides |
//! | a stale connection, a reset of a reused one | [housekeeping](Outcome::is_housekeeping) | neutral | releases its slot | neutral | at once, safe methods | the other attempt decides |
//! | a stream above the last one of a `GOAWAY` with an error code, a reset stream, a reset of a new connection | failure | failure | failed | neutral | `GOAWAY`: at once, any method; else safe methods | a failed attempt |
//! | no connection: refused, timed out, TLS | failure | failure | failed | neutral, timed out: drop | any method | a failed attempt |
//! | 429, 529, `RESOURCE_EXHAUSTED` | throttled | neutral | failed | drop | safe methods, after the hint | a failed attempt |
//! | another hedge attempt won | cancelled, [`Superseded`](Reason::Superseded) | neutral | releases its slot | neutral | – | – |
//!
//! h2 does not report the error code of a `GOAWAY` to the streams at or below the last one. The end of such a
//! connection is therefore classified like the end of any other connection. An HTTP/1 connection that ends within the
//! response head is classified as if it had ended before the first byte.
//!
//! `count_cancelled_after` is 1 s by default. The [breaker](crate::breaker::CircuitBreakerLayer::count_cancelled_after)
//! and the [limit](crate::limit::ConcurrencyLimitLayer::count_cancelled_after) have setters for it. Time is attributed
//! to the upstream from when the request has been sent. A request without a body is sent at the call. The end of a
//! request body is detected if a retry or a hedge is outside of the measuring layer (they publish a [`SentMark`]), or a
//! timeout is inside of it. Otherwise the clock starts at the call.
//!
//! A layer attributes the drop of a call to an outer timeout only if the drop happens in the task of the timeout.
//! `tokio::spawn` between the two layers hides the cause, and the call counts as a hang-up.
//!
//! The [breaker](crate::breaker#connection-housekeeping) lists the transports that do not reveal whether a connection
//! was reused. [`Http`] describes gRPC.
//!
//! [`Protocol`]: crate::classify::Protocol
//! [`Http`]: crate::classify::Http
//! [`Permit`]: crate::permit::Permit
//! [`TrackedBody`]: crate::permit::TrackedBody
//! [`Reject`]: crate::respond::Reject
//! [`Deadline`]: crate::Deadline

mod attribution;
mod connection;
mod eos;
pub(crate) mod grpc;
pub(crate) mod http;
#[allow(clippy::module_inception)] // The file of the type that the module is named for.
mod outcome;
mod rejected;
mod rejected_kind;
pub(crate) mod retry_after;
#[cfg(feature = "tonic")]
mod tonic_status;

pub(crate) use self::attribution::DropCause;
pub(crate) use self::attribution::is_mark_requested;
pub(crate) use self::connection::{ConnectionError, RetiredConnection};
#[cfg(feature = "tonic")]
pub(crate) use self::tonic_status::is_timeout_of_tonic;
pub(crate) use self::{
    attribution::dropped,
    retry_after::{MAX_HINT, Pushback},
};
pub(crate) use self::{
    attribution::{
        COUNT_CANCELLED_AFTER, CallerDeadline, Ending, UpstreamClock, attribute, request_mark,
    },
    rejected::{LayerKind, report_rejection},
};
pub use self::{
    attribution::{SentMark, WaitsFor},
    grpc::HealthCall,
    outcome::{Outcome, OutcomeKind, Reason},
    rejected::Rejected,
    rejected_kind::{RejectedKind, TimeoutPhase},
};
pub(crate) use self::{eos::Eos, http::known};
