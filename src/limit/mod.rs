//! A concurrency limit that covers all connections and holds each permit to the end of the response body.
//!
//! ```
//! use std::time::Duration;
//! use axum::{Router, routing::get};
//! use buttress::ConcurrencyLimitLayer;
//!
//! // One limit for both routes, on all connections.
//! let app: Router = Router::new()
//!     .route("/chat", get(|| async { "…" }))
//!     .route("/search", get(|| async { "…" }))
//!     .layer(ConcurrencyLimitLayer::new(512).queue(128, Duration::from_millis(200)).respond());
//! ```
//!
//! A limit for a client, resized at run time:
//!
//! ```
//! # fn client() -> impl Clone { () }
//! # fn main() -> Result<(), buttress::ConfigError> {
//! use std::time::Duration;
//! use buttress::ConcurrencyLimitLayer;
//! use tower::ServiceBuilder;
//!
//! let limit = ConcurrencyLimitLayer::new(50).queue(500, Duration::from_secs(5)).checked()?;
//! let handle = limit.handle();
//! let client = ServiceBuilder::new().layer(limit).service(client());
//! handle.set_limit(80)?;
//! # Ok(()) }
//! ```
//!
//! # How it decides
//!
//! A call acquires a permit at once if one is free and the queue is empty. Otherwise the call joins the queue; without
//! a queue, or if the queue is full, the layer rejects the call at once, without a timer. The queue is first in, first
//! out by default; [`QueueOrder`] selects another order. The call waits in the future that `Service::call` returned, so
//! an idle clone of the service never holds a permit or a queue entry.
//!
//! # Deadlines
//!
//! If a request carries a [`Deadline`](crate::time::Deadline) in its extensions, its call waits in the queue until the
//! deadline and no longer. A call whose deadline has passed is rejected (504, `DEADLINE_EXCEEDED`) before it reaches
//! the inner service. Without this check, a short overload can last: the server spends its capacity on responses that
//! arrive too late to be used.
//!
//! # Adaptive limits
//!
//! [`ConcurrencyLimitLayer::adaptive`] takes an [algorithm](adaptive) instead of a number:
//!
//! ```
//! use buttress::{ConcurrencyLimitLayer, limit::adaptive::Knee};
//!
//! let layer = ConcurrencyLimitLayer::adaptive(Knee::default()).respond();
//! ```
//!
//! An adaptive limit uses only the time that the upstream takes and the failures that the upstream causes. Slow
//! uploads, slow readers and callers that end their calls early do not change the limit: see the [table of
//! causes](crate::outcome#which-side-caused-it).
//!
//! # Exemptions, partitions and priorities
//!
//! The module [`partition`] exempts paths from the limit, divides the limit into partitions with a share each, and
//! rejects calls by priority.
//!
//! # Health checks
//!
//! A server whose limit is reached still responds to health checks. As soon as a [health
//! registry](crate::health::Health) of the process serves `grpc.health.v1`, every limit exempts 1024 `Check` calls and
//! 64 `Watch` streams at a time; further ones acquire permits. Place an HTTP endpoint such as `/livez` outside of the
//! limit, or list it in [`exempt_paths`](ConcurrencyLimitLayer::exempt_paths).
//!
//! A client cannot use this to evade the limit: the registry responds at these two paths, and does no work of the
//! application. If a server in the same process serves something else at these paths, such as a proxy for all paths,
//! turn [`exempt_grpc_health`](ConcurrencyLimitLayer::exempt_grpc_health) off.
//!
//! # Shadow mode and handle
//!
//! In [shadow mode](ConcurrencyLimitLayer::shadow) the limit rejects no call; it counts the calls that it would have
//! rejected. The [handle](ConcurrencyLimitHandle) returns the calls in flight, the waiting times and the rejections by
//! reason. It also changes the settings at run time. A setter of the layer does not: after the layer has built a
//! service, the setter returns a layer with a limit of its own.
//!
//! # Position in the stack
//!
//! On a server, place the limit outside of the routes and inside of the health endpoints. In a client, place it inside
//! of retry and circuit breaker, next to the client itself, so that a call holds no permit during the delay before its
//! next attempt.
//!
//! # Streams
//!
//! A call holds its permit until the response body has ended, failed or been dropped. With
//! [`release_at_head`](ConcurrencyLimitLayer::release_at_head) it releases the permit at the response head. A response
//! that its caller neither reads nor drops holds its permit: a caller that keeps as many such responses as the limit
//! allows blocks its own next call.
//!
//! On a server, [`max_unread`](ConcurrencyLimitLayer::max_unread) releases the permit of a response whose client has
//! stopped reading. [`buttress::server`](https://docs.rs/buttress/latest/buttress/stack/fn.server.html) sets it to 60
//! s, the default of `send_timeout` in nginx. The connection is not closed: under `axum::serve` the response, its
//! buffers and its connection remain until the client closes it, so limit the number of connections, too. If the client
//! reads on, an inner [`TimeoutLayer`](crate::timeout::TimeoutLayer) fails the body. An idle stream that the client
//! reads is not affected: its body waits for its producer.
//!
//! # Upgrades
//!
//! An upgraded connection, such as a WebSocket, outlives its call: the 101 response has no body that could hold a
//! permit. With [`upgrades`](ConcurrencyLimitLayer::upgrades) the handler can take the permit and hold it for the life
//! of the connection:
//!
//! ```
//! use axum::{Extension, Router, extract::ws::WebSocketUpgrade, response::Response, routing::any};
//! use buttress::{ConcurrencyLimitLayer, limit::CallPermit};
//!
//! async fn chat(upgrade: WebSocketUpgrade, Extension(held): Extension<CallPermit>) -> Response {
//!     let permit = held.take();
//!     upgrade.on_upgrade(async move |mut socket| {
//!         while let Some(Ok(_)) = socket.recv().await {}
//!         drop(permit);
//!     })
//! }
//!
//! let limit = ConcurrencyLimitLayer::new(1000).upgrades().respond();
//! let app: Router = Router::new().route("/chat", any(chat)).layer(limit);
//! ```
//!
//! A full server rejects the request with 503 before the upgrade, a status which browsers do not expose to scripts. To
//! close the WebSocket with code 1013 after the upgrade instead, leave the route out of the layer and let its handler
//! acquire a permit through the [handle](ConcurrencyLimitHandle::try_acquire).
//!
//! # Connections
//!
//! A limit on calls does not bound idle connections. The feature `listener` adds a listener with a maximum number of
//! connections.
//!
//! # Cancellation
//!
//! Dropping the future of a call releases its permit or removes its queue entry. If the queue entry has just received a
//! permit, the drop passes the permit to the next entry.
//!
//! # Cost
//!
//! A call that acquires its permit at once costs two atomic operations on one word, and no allocation, lock or clock
//! read. An [adaptive](ConcurrencyLimitLayer::adaptive) limit adds two clock reads and four atomic operations;
//! [partitions and priorities](partition) add a short lock, and a partition two atomic operations. A few hundred bytes
//! of each limit are never deallocated: after the last use of the limit, a new limit reuses them.
//!
//! With [`max_unread`](ConcurrencyLimitLayer::max_unread), a response whose body has not ended with its head costs two
//! more atomic operations on a word of its own and two stores per poll, and one task per limit watches all of them. The
//! task ends when there are no such responses. The words are in chunks of 6 KiB and more, which are reused and never
//! deallocated.
//!
//! # Defaults
//!
//! | setting | default |
//! |---|---|
//! | [`queue`](ConcurrencyLimitLayer::queue) | none: a call without a free permit is rejected at once |
//! | [`queue_order`](ConcurrencyLimitLayer::queue_order) | first in, first out |
//! | [`retry_after`](ConcurrencyLimitLayer::retry_after) | 1 s |
//! | [`max_unread`](ConcurrencyLimitLayer::max_unread) | none: an unread response holds its permit |
//! | [`exempt_grpc_health`](ConcurrencyLimitLayer::exempt_grpc_health) | on, where a registry serves `grpc.health.v1` |
//! | [`adaptive`](ConcurrencyLimitLayer::adaptive) measures | to the response head |
//! | [`count_cancelled_after`](ConcurrencyLimitLayer::count_cancelled_after), adaptive | 1 s |
//! | permit held | to the end of the body |
//! | rejected calls | an error ([`Rejected`](crate::outcome::Rejected), boxed) |
//!
//! # Comparison with tower
//!
//! `tower::limit::ConcurrencyLimitLayer` creates its state when the layer is applied, so under axum each connection or
//! request has a limit of its own. `GlobalConcurrencyLimitLayer` shares its state, and releases a permit at the
//! response head. Both wait without a bound, in `poll_ready`.

pub mod adaptive;
mod check;
mod handle;
mod layer;
mod limiter;
#[cfg(feature = "observe")]
mod observe;
pub mod partition;
mod policy;
mod queue;
mod reader_slots;
mod shared;
mod sweeper;
mod tag;
mod upgrade;
mod wait;

pub use self::{
    handle::{ConcurrencyLimitHandle, ConcurrencyLimitSnapshot},
    layer::{ConcurrencyLimit, ConcurrencyLimitFuture, ConcurrencyLimitLayer},
    queue::QueueOrder,
    upgrade::{CallPermit, OwnedPermit, UpgradableCall, Upgrades},
};
