//! Graceful shutdown of a process: signals, readiness, a drain within a time limit, and an HTTP server that loses no
//! call.
//!
//! A [`Lifecycle`] holds the phase of the process. It handles the signals, reports readiness to a
//! [`Health`](crate::health::Health) registry, counts the calls in flight, and bounds the time of the drain.
//!
//! ```no_run
//! # #[cfg(feature = "serve")]
//! # async fn start() -> Result<(), Box<dyn std::error::Error>> {
//! use axum::{Router, routing::get};
//! use buttress::{Health, Lifecycle};
//!
//! let health = Health::new();
//! let lifecycle = Lifecycle::new(&health)?;               // handles SIGTERM from here on
//! let app: Router = Router::new().route("/", get(|| async { "found" })).layer(health.endpoints());
//! let listener = tokio::net::TcpListener::bind("0.0.0.0:8080").await?;
//! lifecycle.ready();
//! let drained = lifecycle.serve(listener, app).await;
//! println!("{} calls were cut", drained.cut_calls);
//! # Ok(()) }
//! ```
//!
//! With tonic's own server, and with other times:
//!
//! ```no_run
//! # async fn start(greeter: tonic::service::Routes) -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//! use buttress::{Health, Lifecycle};
//! use tonic::transport::Server;
//!
//! let health = Health::new();
//! let lifecycle =
//!     Lifecycle::new(&health)?.drain_delay(Duration::from_secs(10)).drain_timeout(Duration::from_secs(15));
//! let server = Server::builder()
//!     .layer(lifecycle.layer())
//!     .add_routes(greeter)
//!     .serve_with_shutdown("0.0.0.0:50051".parse()?, lifecycle.stopping());
//! lifecycle.ready();
//! lifecycle.run(server).await?;
//! # Ok(()) }
//! ```
//!
//! # Phases
//!
//! ```text
//!            ready()         SIGTERM, drain()          after the delay         after the drain timeout
//!  starting ────────▶ ready ─────────────────▶ draining ────────────▶ stopping ────────────────────▶ stopped
//!      └──────────────────────────────────────────┘
//! ```
//!
//! | phase | `/readyz` | calls | connections of `serve` |
//! |---|---|---|---|
//! | starting | 503 | served | accepted |
//! | ready | 200, if all other checks pass | served | accepted |
//! | draining | 503 | served; responses over HTTP/1 carry `Connection: close` | accepted; open connections of HTTP/2 receive GOAWAY |
//! | stopping, [grace](Lifecycle::grace) | 503 | served as before; the tokens of streams resolve | accepted from the backlog for 50 ms, then not accepted; the other connections of HTTP/2 receive GOAWAY |
//! | stopping, after the grace | 503 | calls in flight are served to their end, new ones are rejected: 503, gRPC `UNAVAILABLE` | closed when idle |
//! | stopped | – | cut, and counted | cut, and counted |
//!
//! The drain timeout is the setting [`drain_timeout`](Lifecycle::drain_timeout): the maximum time in *stopping*. A
//! second signal, or [`skip_delay`](Lifecycle::skip_delay), ends the delay, and a third one ends *stopping*. A
//! `preStop` hook that calls [`drain`](Lifecycle::drain) does not count as a signal.
//!
//! The delay is needed because load balancers and kube-proxy continue to route calls to this process for some seconds
//! after it has become unready. A process that closes its listener earlier loses these calls. `/livez` does not change.
//!
//! # No call is lost
//!
//! A client may send a call before it receives the announcement that its connection ends. Therefore the server first
//! announces the end, then serves the calls that arrive, and closes the connection last. With `serve`:
//!
//! - **HTTP/1**: a response carries `Connection: close`, and the connection is closed after it. A connection that
//!   carries no call from the beginning of the drain to the end of the grace is closed without an announcement, and a
//!   call that is sent at this moment is lost. Therefore the sum of the delay and the grace should be longer than the
//!   pauses between calls.
//! - **HTTP/2** (RFC 9113 §6.8): GOAWAY with the last stream id 2³¹−1 announces the end. The streams that arrive before
//!   the client has acknowledged a PING are served. Then a second GOAWAY states the last stream that was served. A
//!   client can send later streams again on another connection, because the server has not processed them. The server
//!   sends GOAWAY when the drain begins, and at *stopping* to clients that connected during the delay: a client that
//!   connects again at once after a GOAWAY would otherwise do so throughout the delay.
//! - **Upgrades**: a WebSocket handshake in progress completes. Its response does not carry `Connection: close`.
//! - **Idle connections**: after the grace, a connection is closed if it has no call and nothing has been written to it
//!   for the grace. This includes a connection with an incomplete request head or preface, and an HTTP/2 connection
//!   whose client does not acknowledge PING. A response that the client reads slowly is not cut off before the end of
//!   *stopping*.
//!
//! tonic's own server and `axum::serve` manage their connections themselves. They send GOAWAY and close idle HTTP/1
//! connections when [`stopping`](Lifecycle::stopping) resolves. The layer continues to serve calls for the grace, so
//! that calls that were on their way are not rejected. Two things differ from `serve`: during the delay
//! `Connection: close` is the only announcement, and `axum::serve` adds `close` to the response of an upgrade that
//! completes at *stopping*.
//!
//! # In the stack
//!
//! The [layer](LifecycleLayer) is the outermost layer, except for the health endpoints: they wrap it, so that they
//! respond until the process ends. `serve` wraps the whole service in the layer, so after the grace it also rejects
//! calls of the health endpoints.
//!
//! # Streams
//!
//! A call lasts until its response body ends. A stream that does not end by itself, such as server-sent events, ends
//! when the [`Drain`] token in the extensions of its request resolves:
//!
//! ```
//! use axum::{Extension, body::Body};
//! use buttress::lifecycle::Drain;
//! use futures_util::{StreamExt, stream};
//!
//! async fn events(Extension(drain): Extension<Drain>) -> Body {
//!     let ticks = stream::pending::<Result<&str, std::io::Error>>();
//!     Body::from_stream(ticks.take_until(Box::pin(drain.stopping())))
//! }
//! ```
//!
//! Work that outlasts its response, such as a WebSocket, holds a [guard](Drain::guard). The drain waits until the guard
//! is dropped:
//!
//! ```
//! use axum::{
//!     Extension,
//!     extract::ws::{Message, WebSocketUpgrade},
//!     response::Response,
//! };
//! use buttress::lifecycle::Drain;
//!
//! async fn socket(upgrade: WebSocketUpgrade, Extension(drain): Extension<Drain>) -> Response {
//!     let guard = drain.guard();
//!     upgrade.on_upgrade(async move |mut socket| {
//!         // Exchanges messages until the process stops.
//!         drain.stopping().await;
//!         let _ = socket.send(Message::Close(None)).await;
//!         drop(guard);
//!     })
//! }
//! # let _: axum::Router = axum::Router::new().route("/", axum::routing::any(socket));
//! ```
//!
//! A handler that blocks a thread of the runtime can delay the runtime's timers and signals, and with them the drain
//! and its timeout. Blocking work belongs on a thread of `spawn_blocking`.
//!
//! # Cancellation
//!
//! A call that is dropped is no longer in flight. Dropping the future of [`run`](Lifecycle::run) or of `serve` drops
//! the server with all its connections.
//!
//! # Stages of a connection
//!
//! `serve` limits the time of every stage of a connection, so that a client that is silent, slow or gone holds neither
//! a connection nor a permit. [`Server`] has the table of the limits and their setters. The listener is any
//! [`Listener`]: a `TcpListener`, a `UnixListener`, the capped
//! [`LimitedListener`](crate::listener::LimitedListener), or another implementation. With the feature
//! `rustls` the server serves TLS.
//!
//! ```no_run
//! # #[cfg(all(feature = "serve", feature = "listener"))]
//! # async fn start(app: axum::Router) -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//! use buttress::{Health, Lifecycle, listener::LimitedListener};
//!
//! let lifecycle = Lifecycle::new(&Health::new())?;
//! let listener = LimitedListener::bind("0.0.0.0:8080".parse()?, 1024, 10_000)?;
//! lifecycle.ready();
//! lifecycle.server().idle_timeout(Duration::from_secs(75)).serve(listener, app).await?;
//! # Ok(()) }
//! ```
//!
//! # Defaults
//!
//! | setting | default |
//! |---|---|
//! | [`drain_delay`](Lifecycle::drain_delay) | 5 s |
//! | [`grace`](Lifecycle::grace) | 1 s |
//! | [`drain_timeout`](Lifecycle::drain_timeout) | 20 s, including the grace; with the delay 25 s, which is 5 s less than the default `terminationGracePeriodSeconds` of Kubernetes |
//! | limits of a connection | see [`Server`] |
//!
//! `axum::serve(..).with_graceful_shutdown(..)` and tonic's `serve_with_shutdown` wait for calls without a time limit,
//! do not notify streams, and stop accepting connections at once. hyper-util's `GracefulShutdown` closes idle
//! connections of HTTP/1, breaks upgrades in progress, and has neither time limits nor signal handling. tonic's server
//! keeps its listener open while it shuts down, so clients that connect hang until it has ended. `serve` with tonic's
//! prepared `Routes` as the service closes the listener.

#[cfg(feature = "serve")]
mod connection;
mod handle;
mod in_flight;
mod layer;
#[cfg(feature = "serve")]
mod listener;
#[cfg(feature = "observe")]
mod observe;
#[cfg(feature = "serve")]
mod serve;
#[cfg(feature = "serve")]
mod server;
mod signals;
#[cfg(feature = "serve")]
mod socket;
#[cfg(feature = "serve")]
mod stages;
mod state;
#[cfg(feature = "serve")]
mod streams;
#[cfg(feature = "serve")]
mod tls;
mod token;

pub use self::{
    handle::Lifecycle,
    layer::{LifecycleFuture, LifecycleLayer, LifecycleService},
    state::{Drained, LifecyclePhase},
    token::{Drain, DrainGuard},
};
#[cfg(feature = "serve")]
#[cfg_attr(docsrs, doc(cfg(feature = "serve")))]
pub use self::{listener::Listener, server::Server, streams::StreamExecutor};
#[cfg(feature = "serve")]
#[cfg_attr(docsrs, doc(cfg(feature = "serve")))]
pub use crate::listener::ConnectionSlot;
