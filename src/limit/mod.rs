//! A concurrency limit that really limits: over all connections, and to the end of each stream.
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
//! For a client, and resized while it runs:
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
//! A call goes at once if there is room and nobody waits. Else it waits for its turn, first come first
//! served unless [another order](QueueOrder) is chosen, if the queue has room; else it is refused at once, without a timer. It waits in the future
//! that the call returned, so that an idle clone of the service never holds a place.
//!
//! # Deadlines
//!
//! A request that carries a [`Deadline`](crate::Deadline) in its extensions waits until then at most, and
//! is refused before it begins if that has passed: 504, `DEADLINE_EXCEEDED`. Work that nobody waits for any
//! more is what keeps a server down that was overloaded for a moment.
//!
//! # A limit that finds its own number
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
//! causes](crate::call#which-side-caused-it).
//!
//! # Calls that are told apart
//!
//! Exempt paths, partitions with a share each, and priorities: see [`sort`].
//!
//! # Health checks
//!
//! A server whose limit is reached still answers health checks. As soon as a [health registry](crate::Health) of the
//! process serves `grpc.health.v1`, every limit exempts 1024 `Check` calls and 64 `Watch` streams at once; further
//! ones take permits. An HTTP endpoint such as `/livez` belongs outside of the limit, or in
//! [`exempt_paths`](ConcurrencyLimitLayer::exempt_paths).
//!
//! A client cannot use this to evade the limit: the registry responds at these two paths, and does no work of the
//! application. A server in the same process that serves something else there, such as a proxy for all paths, has
//! to turn [`exempt_grpc_health`](ConcurrencyLimitLayer::exempt_grpc_health) off.
//!
//! # Before it is trusted
//!
//! In [shadow mode](ConcurrencyLimitLayer::shadow) it refuses nobody and counts who would have been. The
//! [handle](ConcurrencyLimitHandle) tells how full it is, how long calls wait and why they were refused, and
//! changes everything while calls are under way: limit, bounds, queue and its order.
//!
//! # In the stack
//!
//! For a server: outside of the routes, inside of the health endpoints. For a client: under the retry and
//! the circuit breaker, next to the client itself, so that a call that waits for its next attempt holds no
//! place.
//!
//! # Streams
//!
//! A place is held until the response body has ended, failed or been dropped, unless
//! [`release_at_head`](ConcurrencyLimitLayer::release_at_head) says otherwise. A response that is kept and
//! not read keeps its place: a caller that holds as many of them as the limit allows waits for itself.
//!
//! On a server, [`max_unread`](ConcurrencyLimitLayer::max_unread) releases the permit of a response whose client has
//! stopped reading; [`buttress::server`](https://docs.rs/buttress/latest/buttress/stack/fn.server.html) sets it to 60
//! s, as nginx's `send_timeout`. The connection is not closed: under `axum::serve` the response, its buffers and its
//! connection remain until the client closes it, so limit the number of connections, too. If the client
//! reads on, a [`TimeoutLayer`](crate::TimeoutLayer) further in fails the body. An idle stream that the client reads is
//! not affected: its body waits for its producer.
//!
//! # Upgrades
//!
//! An upgraded connection, such as a WebSocket, lives on after its call: the 101 has no body that could hold
//! a place. With [`upgrades`](ConcurrencyLimitLayer::upgrades) the handler takes the place along:
//!
//! ```
//! use axum::{Extension, Router, extract::ws::WebSocketUpgrade, response::Response, routing::any};
//! use buttress::{ConcurrencyLimitLayer, limit::Held};
//!
//! async fn chat(upgrade: WebSocketUpgrade, Extension(held): Extension<Held>) -> Response {
//!     let place = held.take();
//!     upgrade.on_upgrade(async move |mut socket| {
//!         while let Some(Ok(_)) = socket.recv().await {}
//!         drop(place);
//!     })
//! }
//!
//! let limit = ConcurrencyLimitLayer::new(1000).upgrades().respond();
//! let app: Router = Router::new().route("/chat", any(chat)).layer(limit);
//! ```
//!
//! A full server refuses that with 503 before the upgrade, which a browser tells nobody. To close with
//! code 1013 after it instead, leave the route out of the layer, and let its handler ask the
//! [handle](ConcurrencyLimitHandle::try_acquire) for a place.
//!
//! # Connections
//!
//! A limit on calls does not bound idle connections. The feature `listener` adds a listener with a maximum number of
//! connections.
//!
//! # Cancellation
//!
//! Dropping a call frees its place or its turn; dropping it just when its turn has come hands the turn to
//! the next.
//!
//! # Cost
//!
//! A call that finds room costs two atomic operations on one word, and no allocation, lock or clock read; with an
//! [adaptive](ConcurrencyLimitLayer::adaptive) limit two clock reads and four more, with
//! [partitions or priorities](sort) a short lock. The memory of a fixed limit, a few hundred bytes, is used again for another
//! one instead of being given back.
//!
//! With [`max_unread`](ConcurrencyLimitLayer::max_unread), a response whose body has not ended with its head costs two
//! more atomic operations on a word of its own and two stores per poll, and one task per limit watches all of them.
//! The task ends when there are no such responses.
//!
//! # Defaults
//!
//! | setting | default |
//! |---|---|
//! | [`queue`](ConcurrencyLimitLayer::queue) | none: what finds no room is refused |
//! | [`queue_order`](ConcurrencyLimitLayer::queue_order) | first come, first served |
//! | [`retry_after`](ConcurrencyLimitLayer::retry_after) | 1 s |
//! | [`max_unread`](ConcurrencyLimitLayer::max_unread) | none: an unread response holds its permit |
//! | [`exempt_grpc_health`](ConcurrencyLimitLayer::exempt_grpc_health) | on, where a registry serves `grpc.health.v1` |
//! | [`adaptive`](ConcurrencyLimitLayer::adaptive) measures | to the response head |
//! | [`count_cancelled_after`](ConcurrencyLimitLayer::count_cancelled_after), adaptive | 1 s |
//! | place held | to the end of the body |
//! | refused calls | an error ([`Rejected`](crate::Rejected), boxed) |
//!
//! # Beside tower's
//!
//! `tower::limit::ConcurrencyLimitLayer` makes its state when it is applied, so that under axum each
//! connection or request has a limit of its own; `GlobalConcurrencyLimitLayer` shares it, and frees a place
//! at the response head. Both wait without end, in `poll_ready`.

pub mod adaptive;
#[cfg(feature = "listener")]
#[cfg_attr(docsrs, doc(cfg(feature = "listener")))]
pub mod connections;
mod core;
mod handle;
mod lasting;
mod layer;
mod policy;
mod queue;
pub mod sort;
mod upgrade;
mod wait;
mod waits;

pub use self::{
    handle::{ConcurrencyLimitHandle, ConcurrencyLimitSnapshot},
    layer::{ConcurrencyLimit, ConcurrencyLimitLayer},
    queue::QueueOrder,
    upgrade::{Held, HeldPlace, Upgrades},
};
pub use crate::admission::ResponseFuture;
