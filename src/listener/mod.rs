//! A listener that limits its connections, for [`Lifecycle::serve`](crate::lifecycle::Lifecycle::serve), axum, tonic's
//! router and bare hyper.
//!
//! A limit on calls does not bound idle connections, each of which uses a file descriptor and buffers.
//!
//! ```no_run
//! # #[cfg(feature = "axum")]
//! # async fn serve() -> std::io::Result<()> {
//! use axum::{Router, routing::get};
//! use buttress::listener::LimitedListener;
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
//! A connection occupies a slot until it is dropped, even after an upgrade. A new connection gets a free slot. If no
//! slot is free:
//!
//! 1. The listener *reclaims* a slot: it closes the connection that has been idle for the longest time, if that is one
//!    second or more. It examines a random sample of 64 connections if there are more. A connection is idle while its
//!    first request head is not complete and, under `serve` only, between two calls.
//! 2. If no connection can be reclaimed, the new one is rejected: HTTP/1 by a 503 with `Retry-After`, HTTP/2 by a
//!    GOAWAY with the last stream id 0 (RFC 9113 §6.8). A TLS connection is closed. The client has one second to send
//!    its first bytes. After the response, the listener drains the connection: it reads and discards up to 16 MiB for a
//!    maximum of one second. A connection that is closed before the client has sent everything is reset, and the client
//!    loses the response (RFC 9112 §9.6). The maximum is 64 rejections at the same time, and further connections are
//!    closed without a response.
//!
//! With [`wait_when_full`](LimitedListener::wait_when_full) the new connection waits for a slot instead of being
//! rejected, and later ones wait in the kernel's queue, the backlog.
//!
//! # Time limits
//!
//! The first request head of a connection has a [time limit](LimitedListener::head_timeout) of 10 s, under every
//! server. A connection that sends nothing therefore occupies its slot for 10 s, and for one second if a new connection
//! needs the slot.
//!
//! | stage | `axum::serve`, bare hyper | `serve` |
//! |---|---|---|
//! | first byte and first head | 10 s | 10 s |
//! | the rest of a later head | none: axum sets no timer for hyper | [`head_timeout`](crate::lifecycle::Server::head_timeout) |
//! | idle between calls | none; not reclaimed, because the listener cannot distinguish it from a call without traffic | [`idle_timeout`](crate::lifecycle::Server::idle_timeout), reclaimed |
//! | a client that does not read, or has vanished | none | limits of [`Server`](crate::lifecycle::Server) |
//!
//! Under `axum::serve` a client that sends one request on each of its connections can therefore occupy all slots. Use
//! `serve` where clients are not trusted.
//!
//! # Supported servers
//!
//! - `Lifecycle::serve`, with the feature `serve`.
//! - `axum::serve`, with the feature `axum`. For `ConnectInfo<SocketAddr>` put `.tap_io(|_| {})` after it.
//! - tonic: `axum::serve(listener, routes.into_axum_router())`.
//! - hyper: [`accept`](LimitedListener::accept) in a loop.
//!
//! Each rejection runs in a spawned task, which is aborted when the listener is dropped.
//!
//! # Defaults
//!
//! | setting | default |
//! |---|---|
//! | [`head_timeout`](LimitedListener::head_timeout) | 10 s |
//! | [`wait_when_full`](LimitedListener::wait_when_full) | off: a connection beyond the limit is rejected |

//!
//! The handling of failed accepts, the scanners for the end of a request head and the slots of connections are shared
//! with [`Lifecycle::serve`](crate::lifecycle::Lifecycle::serve).

mod accept;
#[cfg(feature = "listener")]
mod connection;
#[cfg(feature = "listener")]
mod limited;
#[cfg(feature = "listener")]
mod rejection;
mod scan;
mod slot;
mod timer;

pub use self::slot::ConnectionSlot;
pub(crate) use self::{
    accept::AcceptErrors,
    scan::{Frames, Preface, PrefaceMatch},
    timer::LazyTimer,
};
#[cfg(feature = "listener")]
#[cfg_attr(docsrs, doc(cfg(feature = "listener")))]
pub use self::{connection::Connection, limited::LimitedListener};
