//! A listener that caps its connections, for axum, tonic's router and bare hyper.
//!
//! A limit on calls says nothing to a thousand idle sockets, each with a descriptor and its buffers.
//!
//! ```no_run
//! # #[cfg(feature = "axum")]
//! # async fn serve() -> std::io::Result<()> {
//! use axum::{Router, routing::get};
//! use buttress::limit::connections::LimitedListener;
//!
//! let app: Router = Router::new().route("/", get(|| async { "…" }));
//! // 10,000 connections; 1024 more in the kernel's queue.
//! let listener = LimitedListener::bind("0.0.0.0:3000".parse().unwrap(), 1024, 10_000)?;
//! let connections = listener.handle();
//! axum::serve(listener, app).await
//! # }
//! ```
//!
//! # How it decides
//!
//! What comes beyond the limit is told so, in its own words, and closed: HTTP/1 by a 503 with `Retry-After`,
//! HTTP/2 by a GOAWAY that says that nothing was looked at (RFC 9113 §6.8), TLS not at all. The client has one second to
//! send its first bytes. After the response the listener reads and discards what the client still sends, up to 16 MiB and
//! for at most one second, because a connection that is closed before is reset and the client loses the response
//! (RFC 9112 §9.6). This is done for at most 64 connections at a time; what comes beyond these is only closed. With
//! [`wait_when_full`](LimitedListener::wait_when_full) it is not accepted at all: it waits in the kernel's
//! queue, the backlog, and beyond that in its client's.
//!
//! A connection holds its place until it is dropped, upgraded or not.
//!
//! # With what
//!
//! - `axum::serve`, with the feature `axum`. For `ConnectInfo<SocketAddr>` put `.tap_io(|_| {})` after it.
//! - tonic: `axum::serve(listener, routes.into_axum_router())`.
//! - hyper: [`accept`](LimitedListener::accept) in a loop.
//!
//! Refusals run in tasks of their own, which stop when the listener is dropped.

mod connection;
mod listener;
mod refusal;

pub use self::{connection::Connection, listener::LimitedListener};
