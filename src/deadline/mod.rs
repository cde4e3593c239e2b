//! One absolute deadline for a call and for all that is called because of it: no work that nobody waits for.
//!
//! ```
//! # fn client() -> impl Clone { () }
//! use std::time::Duration;
//! use buttress::{DeadlineLayer, RetryLayer, TimeoutLayer};
//! use tower::ServiceBuilder;
//!
//! // A client: 2 s for all attempts and waits, which the retry and the timeout keep; each attempt tells the server
//! // what is left.
//! let client = ServiceBuilder::new()
//!     .layer(DeadlineLayer::new().default_of(Duration::from_secs(2)).propagate_only())
//!     .layer(RetryLayer::http())
//!     .layer(DeadlineLayer::new().header("x-request-timeout-ms").propagate_only())
//!     .layer(TimeoutLayer::http())
//!     .service(client());
//! ```
//!
//! A server that is called with a deadline, and calls on:
//!
//! ```
//! use std::time::Duration;
//! use axum::{Extension, Router, routing::get};
//! use buttress::{Deadline, DeadlineLayer};
//!
//! async fn handler(Extension(deadline): Extension<Deadline>) {
//!     let mut request = http::Request::new(());
//!     request.extensions_mut().insert(deadline);
//!     // … and the client does the rest.
//! }
//!
//! let deadline = DeadlineLayer::new()
//!     .header("x-request-timeout-ms")             // gRPC's `grpc-timeout` is read and written anyway
//!     .default_of(Duration::from_secs(10))
//!     .at_most(Duration::from_secs(30))           // whatever strangers say
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
//! | nothing | applies without a header | [`at_most`](DeadlineLayer::at_most), or else the default |
//! | a deadline of the caller that was passed on | applies without a header | the same, also for that deadline |
//! | a deadline that another layer has set by its default or maximum | applies without a header | the same |
//! | a deadline that the application has made itself | is replaced, also by a later one | the deadline of the application |
//!
//! The deadline is inserted in the extensions, less the time that is [kept back](DeadlineLayer::keep_back). The time
//! that is left is written to the requested headers (for gRPC requests always `grpc-timeout`).
//!
//! A call that is too late is not begun, and one under way is ended, to the last byte of its answer: a stream that
//! may last needs no deadline, or a distant one.
//!
//! # Who sees it
//!
//! | layer | |
//! |---|---|
//! | `RetryLayer` | makes no attempt, and begins no wait, that would end too late |
//! | `CircuitBreakerLayer` | admits no probe after the deadline, and lets no call wait for a verdict beyond it |
//! | `ConcurrencyLimitLayer` | queues no longer, and begins nothing that is late |
//! | [`TimeoutLayer`](crate::TimeoutLayer) | ends the attempt |
//!
//! Where a timeout is further in, a deadline layer need not keep the deadline itself:
//! [`propagate_only`](DeadlineLayer::propagate_only) saves a timer and two wrappers a call.
//!
//! # Source
//!
//! A deadline records its [source](Deadline::source), which decides whether its expiry is a failure of the upstream:
//!
//! | set by | source | a call that it ends |
//! |---|---|---|
//! | `grpc-timeout`, a [header](DeadlineLayer::header) or [codec](DeadlineLayer::codec) | `Caller` | is cancelled, as if the caller had hung up |
//! | the [default](DeadlineLayer::default_of), [`at_most`](DeadlineLayer::at_most) | `Operator` | is a failure: a timeout |
//! | the application, with [`Deadline::after`] | `Operator` | is a failure: a timeout |
//!
//! The source stays the same when a handler passes the deadline on, and when a deadline layer reads the header that
//! another layer of the same stack has written. The [table of causes](crate::call#which-side-caused-it) states how
//! every layer counts a call that ends by either source.
//!
//! # In the stack
//!
//! Outermost, so that it counts for everything. Once more innermost where a header is to be said, so that it says what
//! is left after waits and earlier attempts. On a server: outside of the concurrency limit.
//!
//! # Cancellation
//!
//! As a [timeout](crate::timeout)'s: what the call holds is given back as it ends.
//!
//! # Uploads
//!
//! With [`respond`](DeadlineLayer::respond), the body of a request that is still being sent when its deadline passes is
//! [drained](crate::call::Respond#uploads) if it is axum's or tonic's. This costs two small allocations for each
//! request that has such a body and a deadline.
//!
//! # Defaults
//!
//! | setting | default |
//! |---|---|
//! | [`default_of`](DeadlineLayer::default_of) | none |
//! | [`at_most`](DeadlineLayer::at_most) | as `default_of` |
//! | [`keep_back`](DeadlineLayer::keep_back) | none |
//! | [`header`](DeadlineLayer::header) | none; there is no standard |
//! | late calls | an error ([`Rejected`](crate::Rejected), boxed) |
//!
//! # Beside tonic's
//!
//! tonic's server and its channel also read `grpc-timeout`. They time the response head only, report `CANCELLED`, and
//! forward no deadline. Their timers expire at the same time as those of the layers. A call that ends by its deadline
//! is nevertheless always `DEADLINE_EXCEEDED` for the caller, and has the same outcome for every layer. A
//! [`TimeoutLayer`](crate::TimeoutLayer), a `RetryLayer` and a deadline layer that keeps the deadline treat an error of
//! the client or a `CANCELLED` of the server as the expiry of the deadline, if it arrives at most 1 ms before the
//! deadline or later. A generated client receives this code with a [`RespondLayer`](crate::RespondLayer), or with the
//! feature `tonic` or `tonic-health`.

mod codec;
mod layer;
mod propagate;
mod times;

pub use self::{
    codec::Codec,
    layer::{DeadlineLayer, Deadlined},
    propagate::{PropagateLayer, Propagated},
    times::{DeadlineHandle, DeadlineSnapshot},
};
pub use crate::{call::Deadline, timeout::ResponseFuture};
