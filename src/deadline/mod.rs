//! One absolute deadline for a call and for the calls that it causes, so that no service works on a request whose
//! caller no longer waits.
//!
//! ```
//! # fn client() -> impl Clone { () }
//! use std::time::Duration;
//! use buttress::{DeadlineLayer, RetryLayer, TimeoutLayer};
//! use tower::ServiceBuilder;
//!
//! // A client: 2 s for all attempts and delays, enforced by the retry and the timeout layer. Each attempt sends the
//! // time left to the server.
//! let client = ServiceBuilder::new()
//!     .layer(DeadlineLayer::new().default_of(Duration::from_secs(2)).propagate_only())
//!     .layer(RetryLayer::http())
//!     .layer(DeadlineLayer::new().header("x-request-timeout-ms").propagate_only())
//!     .layer(TimeoutLayer::http())
//!     .service(client());
//! ```
//!
//! A server that receives a deadline and passes it on:
//!
//! ```
//! use std::time::Duration;
//! use axum::{Extension, Router, routing::get};
//! use buttress::{Deadline, DeadlineLayer};
//!
//! async fn handler(Extension(deadline): Extension<Deadline>) {
//!     let mut request = http::Request::new(());
//!     request.extensions_mut().insert(deadline);
//!     // … the layers of the client use it.
//! }
//!
//! let deadline = DeadlineLayer::new()
//!     .header("x-request-timeout-ms")             // gRPC's `grpc-timeout` is read and written in any case
//!     .default_of(Duration::from_secs(10))
//!     .max(Duration::from_secs(30))           // the maximum that a header can set
//!     .respond();
//! let app: Router = Router::new().route("/", get(handler)).layer(deadline);
//! ```
//!
//! # How it decides
//!
//! The earliest of these applies: a [`Deadline`] in the request's extensions, gRPC's `grpc-timeout`, a
//! [header](DeadlineLayer::header) or [codec](DeadlineLayer::codec) of your own, and, if no header sets a time, the
//! [default](DeadlineLayer::default_of). A header that cannot be read is ignored. Headers come from callers, so they
//! are bounded:
//!
//! | in the extensions | the default | the maximum of a header |
//! |---|---|---|
//! | nothing | applies without a header | [`max`](DeadlineLayer::max), or else the default |
//! | a deadline of the caller that was passed on | applies without a header | the same, also for that deadline |
//! | a deadline that another layer has set by its default or maximum | applies without a header | the same |
//! | a deadline that the application has made itself | is replaced, also by a later one | the deadline of the application |
//!
//! The deadline is inserted in the extensions, less the time that is [reserved](DeadlineLayer::reserve) for sending
//! the response back. The time that is left is written to the requested headers (for gRPC requests always
//! `grpc-timeout`).
//!
//! A call whose deadline has passed before it begins is rejected. A call in flight is ended at the deadline, up to the
//! end of its response body. A call with a long stream therefore needs a late deadline, or none.
//!
//! # Layers that use the deadline
//!
//! | layer | effect |
//! |---|---|
//! | `RetryLayer` | makes no attempt after the deadline, begins no delay that would exceed it, and ends an attempt without a response head at the deadline |
//! | `CircuitBreakerLayer` | rejects calls after the deadline, also half-open probes; a call waits for the result of a probe only until the deadline |
//! | `ConcurrencyLimitLayer` | rejects calls after the deadline; a call is queued only until the deadline |
//! | [`TimeoutLayer`](crate::timeout::TimeoutLayer) | ends the attempt |
//!
//! If there is an inner timeout layer, a deadline layer need not enforce the deadline itself:
//! [`propagate_only`](DeadlineLayer::propagate_only) saves a timer and two wrappers for each call.
//!
//! # Source
//!
//! A deadline records its [source](Deadline::source), which decides whether its expiry is a failure of the upstream:
//!
//! | set by | source | a call that it ends |
//! |---|---|---|
//! | `grpc-timeout`, a [header](DeadlineLayer::header) or [codec](DeadlineLayer::codec) | `Caller` | is cancelled, as if the caller had hung up |
//! | the [default](DeadlineLayer::default_of), [`max`](DeadlineLayer::max) | `Operator` | is a failure: a timeout |
//! | the application, with [`Deadline::after`] | `Operator` | is a failure: a timeout |
//!
//! The source stays the same when a handler passes the deadline on, and when a deadline layer reads the header that
//! another layer of the same stack has written. The [table of causes](crate::outcome#which-side-caused-it) states how
//! every layer counts a call that ends by either source.
//!
//! # In the stack
//!
//! Put the layer outermost, so that it covers all other layers. If the time left is to be sent in a header, put a
//! second one around the timeout layer, so that the header states the time left after earlier attempts and delays. On a
//! server, put the layer outside of the concurrency limit.
//!
//! # Cancellation
//!
//! A call that ends at its deadline is dropped, as after a [timeout](crate::timeout#cancellation), and releases what
//! inner layers hold for it.
//!
//! # Uploads
//!
//! With [`respond`](DeadlineLayer::respond), the body of a request that is still being sent when its deadline passes is
//! [drained](crate::respond::Respond#uploads) if it is axum's or tonic's. This costs two small allocations for each
//! request that has such a body and a deadline.
//!
//! # Defaults
//!
//! | setting | default |
//! |---|---|
//! | [`default_of`](DeadlineLayer::default_of) | none |
//! | [`max`](DeadlineLayer::max) | the time of `default_of` |
//! | [`reserve`](DeadlineLayer::reserve) | none |
//! | [`header`](DeadlineLayer::header) | none; there is no standard |
//! | calls whose deadline has passed | fail with a boxed [`Rejected`](crate::outcome::Rejected) |
//!
//! # Comparison with tonic
//!
//! The server and the channel of tonic also read `grpc-timeout`. They time the response head only, report `CANCELLED`,
//! and forward no deadline. Their timers expire at the same time as those of the layers. A call that ends by its
//! deadline is nevertheless always `DEADLINE_EXCEEDED` for the caller, and has the same outcome for every layer: a
//! [`TimeoutLayer`](crate::timeout::TimeoutLayer), a `RetryLayer` and a deadline layer that enforces the deadline treat
//! an error of the client or a `CANCELLED` of the server as the expiry of the deadline, if it arrives at most 1 ms
//! before the deadline or later. A generated client receives this code with a
//! [`RespondLayer`](crate::respond::RespondLayer), or with the feature `tonic`.

mod codec;
mod handle;
mod layer;
#[cfg(feature = "observe")]
mod observe;
mod propagate;

pub use self::{
    codec::Codec,
    handle::{DeadlineHandle, DeadlineSnapshot},
    layer::{DeadlineLayer, DeadlineService},
    propagate::{PropagateDeadline, PropagateDeadlineLayer},
};
pub use crate::{time::Deadline, timeout::TimeoutFuture};
