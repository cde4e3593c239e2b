//! A process that leaves politely: no request that came before the end was announced is lost, and the end comes.
//!
//! ```no_run
//! # #[cfg(feature = "serve")]
//! # async fn start() -> Result<(), Box<dyn std::error::Error>> {
//! use axum::{Router, routing::get};
//! use buttress::{Health, Lifecycle};
//!
//! let health = Health::new();
//! let lifecycle = Lifecycle::new(&health)?;               // armed: SIGTERM is heard while it still starts
//! let app: Router = Router::new().route("/", get(|| async { "found" })).layer(health.endpoints());
//! let listener = tokio::net::TcpListener::bind("0.0.0.0:8080").await?;
//! lifecycle.ready();
//! let drained = lifecycle.serve(listener, app).await;
//! println!("{} calls were cut", drained.cut_calls);
//! # Ok(()) }
//! ```
//!
//! The pieces alone, for tonic, and with times of one's own:
//!
//! ```no_run
//! # async fn start(greeter: tonic::service::Routes) -> Result<(), Box<dyn std::error::Error>> {
//! use std::time::Duration;
//! use buttress::{Health, Lifecycle};
//! use tonic::transport::Server;
//!
//! let health = Health::new();
//! let lifecycle =
//!     Lifecycle::new(&health)?.delay(Duration::from_secs(10)).longest(Duration::from_secs(15));
//! let server = Server::builder()
//!     .layer(lifecycle.layer())
//!     .add_routes(greeter)
//!     .serve_with_shutdown("0.0.0.0:50051".parse()?, lifecycle.stopping());
//! lifecycle.ready();
//! lifecycle.run(server).await?;
//! # Ok(()) }
//! ```
//!
//! # How it ends
//!
//! ```text
//!            ready()         SIGTERM, drain()          delay is over              longest is over
//!  starting ────────▶ ready ─────────────────▶ draining ────────────▶ stopping ──────────────────▶ stopped
//!      └──────────────────────────────────────────┘
//! ```
//!
//! | phase | `/readyz` | calls | connections |
//! |---|---|---|---|
//! | starting | 503 | answered, if any come | taken |
//! | ready | 200, if all else is well | answered | taken |
//! | draining | 503 | answered; HTTP/1 is told `Connection: close` | taken |
//! | stopping | 503, where it is still asked | new ones refused: 503, gRPC `UNAVAILABLE`; streams are told to end | none taken; idle ones closed, others after their last answer, GOAWAY |
//! | stopped | – | cut, and counted | cut |
//!
//! A second signal, or [`hurry`](Lifecycle::hurry), ends the delay, and a third all the rest. A `preStop` hook that
//! drains and the first signal after it are in no hurry.
//!
//! The delay is there because routers learn late: between a signal and the moment when no load balancer or
//! kube-proxy sends anything any more seconds go by, and who closes its port before loses what comes in between.
//! Liveness stays as it was.
//!
//! # In the stack
//!
//! The [layer](LifecycleLayer) goes outermost, under the health endpoints, if these are to be asked to the end.
//! `serve` puts it around everything: probes that come while it stops are refused, as all new work is.
//!
//! # Streams
//!
//! A call lasts to the end of its body. Streams that would not end by themselves, as server-sent events do not,
//! ask the [`Drain`] token in their request's extensions:
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
//! What goes on beside its answer, as a WebSocket does, is waited for as long as there is a [guard](Drain::guard):
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
//!         // Talks, until
//!         drain.stopping().await;
//!         let _ = socket.send(Message::Close(None)).await;
//!         drop(guard);
//!     })
//! }
//! # let _: axum::Router = axum::Router::new().route("/", axum::routing::any(socket));
//! ```
//!
//! A handler that blocks its thread, instead of a thread of `spawn_blocking`, can hold up the runtime's timers and
//! signals, and with them the drain and its longest time.
//!
//! # Cancellation
//!
//! A call that is dropped is counted no more. Dropping what [`run`](Lifecycle::run) or `serve` gave drops the server.
//!
//! # Defaults
//!
//! | setting | default |
//! |---|---|
//! | [`delay`](Lifecycle::delay) | 5 s |
//! | [`longest`](Lifecycle::longest) | 20 s: with the delay 5 s less than Kubernetes waits |
//!
//! `axum::serve(..).with_graceful_shutdown(..)` and tonic's `serve_with_shutdown` wait without an end for what is
//! under way, say nothing to streams, and stop listening at once; hyper-util's `GracefulShutdown`, which is
//! underneath, leaves times and signals to its user. tonic's server keeps its port while it ends, so that who
//! connects then hangs until it is gone: its `Routes`, prepared, are a service for `serve`, which lets go of the
//! port at once.

mod door;
mod handle;
mod layer;
#[cfg(feature = "serve")]
mod serve;
mod signals;
mod state;
mod token;

pub use self::{
    handle::{Drained, Lifecycle},
    layer::{LifecycleFuture, LifecycleLayer, WithLifecycle},
    state::Phase,
    token::{Drain, DrainGuard},
};
