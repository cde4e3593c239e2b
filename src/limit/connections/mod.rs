//! A listener that limits its connections, for [`Lifecycle::serve`](crate::Lifecycle::serve), axum, tonic's router and
//! bare hyper.
//!
//! A limit on calls does not see idle sockets, each of which has a file descriptor and buffers.
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
//! A connection occupies a slot until it is dropped, upgraded or not. While a slot is free, a new connection gets it.
//! Otherwise:
//!
//! 1. The listener *reclaims* a slot: it closes the connection that has been idle for the longest time, if that is one
//!    second or more. It examines up to 64 connections, a random sample of a larger number. A connection is
//!    idle while its first request head is not complete, and, under `serve` only, between two calls.
//! 2. If no connection is idle, the new one is rejected: HTTP/1 by a 503 with `Retry-After`, HTTP/2 by a GOAWAY with
//!    the last stream id 0 (RFC 9113 §6.8). A TLS connection is closed. The client has one second to send its first
//!    bytes. After the response the listener reads and discards what the client still sends, up to 16 MiB and for at
//!    most one second, because a connection that is closed before is reset and the client loses the response (RFC 9112
//!    §9.6). Up to 64 rejections run at once, and further connections are only closed. With
//!    [`wait_when_full`](LimitedListener::wait_when_full) the new connection waits instead, and others wait in the
//!    kernel's queue, the backlog.
//!
//! # Time limits
//!
//! The first request head of a connection has a [time limit](LimitedListener::head_timeout) of 10 s, under every
//! server. So silent sockets occupy all slots for one second with a reclaim, and for 10 s without new connections.
//!
//! | stage | `axum::serve`, bare hyper | `serve` |
//! |---|---|---|
//! | first byte and first head | 10 s | 10 s |
//! | half a later head | none: axum sets no timer for hyper | [`head_timeout`](crate::lifecycle::Server::head_timeout) |
//! | idle between calls | none; not reclaimed, because an idle connection looks like one with a silent stream | [`idle_timeout`](crate::lifecycle::Server::idle_timeout), reclaimed |
//! | a client that does not read, or has vanished | none | limits of [`Server`](crate::lifecycle::Server) |
//!
//! Under `axum::serve` a client that sends one request on each of its connections can therefore occupy all slots. Use
//! `serve` where clients are not trusted.
//!
//! # With which server
//!
//! - `Lifecycle::serve`, with the feature `serve`.
//! - `axum::serve`, with the feature `axum`. For `ConnectInfo<SocketAddr>` put `.tap_io(|_| {})` after it.
//! - tonic: `axum::serve(listener, routes.into_axum_router())`.
//! - hyper: [`accept`](LimitedListener::accept) in a loop.
//!
//! Rejections run in tasks of their own, which stop when the listener is dropped.
//!
//! # Defaults
//!
//! | setting | default |
//! |---|---|
//! | [`head_timeout`](LimitedListener::head_timeout) | 10 s |
//! | [`wait_when_full`](LimitedListener::wait_when_full) | off: a connection beyond the limit is rejected |

mod connection;
mod listener;
mod refusal;

pub use self::{connection::Connection, listener::LimitedListener};
