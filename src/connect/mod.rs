//! A layer that bounds, recycles and counts the connections of a connector, and a client that uses it.
//!
//! A pool without bounds opens a connection for each call that finds no idle one. It reuses connections that the server
//! is about to close, and keeps connections to addresses that DNS no longer returns. It does not report any of this.
//!
//! ```no_run
//! use std::time::Duration;
//! use buttress::connect::{Client, ConnectLayer};
//! use http_body_util::Empty;
//!
//! # async fn run() -> Result<(), buttress::BoxError> {
//! let connections = ConnectLayer::new().max_per_host(50);
//! let handle = connections.handle();
//! let client = Client::builder(connections).build_http();
//!
//! let request = http::Request::get("http://localhost:8080/").body(Empty::<bytes::Bytes>::new())?;
//! let response = client.request(request).await?;
//! println!("{} over one of {} connections", response.status(), handle.snapshot().open);
//! # Ok(()) }
//! ```
//!
//! With every setting, and with TLS (feature `rustls`):
//!
#![cfg_attr(feature = "rustls", doc = "```no_run")]
#![cfg_attr(not(feature = "rustls"), doc = "```ignore")]
//! use std::time::Duration;
//! use buttress::connect::{Client, ConnectLayer};
//!
//! # type Body = http_body_util::Empty<bytes::Bytes>;
//! # fn main() -> Result<(), buttress::BoxError> {
//! let connections = ConnectLayer::new()
//!     .max_per_host(50)
//!     .max_total(200)
//!     .queue(500, Duration::from_secs(2))
//!     .connect_timeout(Duration::from_secs(1))
//!     .max_age(Duration::from_secs(600))
//!     .max_idle(Duration::from_secs(50))
//!     .jitter(0.1)
//!     .name("search");
//! let client = Client::builder(connections)
//!     .tcp_keepalive(Duration::from_secs(30), Duration::from_secs(10), 3)
//!     .http2_keepalive(Duration::from_secs(300), Duration::from_secs(20))
//!     .checked()?
//!     .build_https::<Body>()?;
//! # Ok(()) }
//! ```
//!
//! # How it decides
//!
//! A connect acquires two permits before it opens the connection: one of its host and one of the total. The connection
//! itself holds both permits until it is closed, in whichever pool it is. If a permit is not free, the connect waits in
//! the queue, first come, first served. If the queue is full, the connect is rejected.
//!
//! With a [`Client`], the call waits instead, before it asks the pool for a connection. It continues when a connection
//! becomes idle or when another one may be opened. If the total is at its maximum, an idle connection of another host
//! is closed for the call that waits.
//!
//! # Streams of HTTP/2
//!
//! Calls over HTTP/2 share connections. A connection has as many streams as the server's SETTINGS allow
//! (`MAX_CONCURRENT_STREAMS`, RFC 9113 §5.1.2). When all streams are in use, a [`Client`] opens another connection, up
//! to the caps and to 64 per host. A call beyond that waits in the queue for a stream. `waits_for_stream` in the
//! [`ConnectSnapshot`] counts it, and a circuit breaker does not count the wait against the upstream. The call is
//! [rejected](crate::outcome::RejectedKind::Saturated) after the maximum wait of the [`queue`](ConnectLayer::queue). A
//! call holds its stream to the end of the response body. Calls use the oldest connections first, so that the others
//! become idle and are closed. If an additional connection cannot be opened, its call waits for a stream of the others,
//! and does not fail with the error of the connect. `failed` and `timed_out` in the snapshot count the connect.
//!
//! Clients of one layer share the caps, but not connections. Each has a queue of its own for the streams of a host.
//!
//! If a server changes the maximum later, calls follow it. After a GOAWAY (RFC 9113 §6.8) calls use another connection.
//!
//! For `https`, TLS negotiates the version of HTTP. While it is unknown, one call connects, and the other calls to this
//! host wait for its connection, but not longer than the connect timeout. Then they connect concurrently over HTTP/1,
//! and over HTTP/2 they are distributed over the streams. If the host does not respond, a call therefore fails after at
//! most two connect timeouts: one for the connect of the other call, and one for its own.
//!
//! The version is known while the client has a call or a connection to the host. If the host negotiates HTTP/1 after
//! HTTP/2, an HTTP/1 connection counts as one with a single stream, so there are at most 64 of them. If it negotiates
//! HTTP/2 after HTTP/1, requests wait inside hyper if they connected before the first HTTP/2 connection was open.
//!
//! # When a connection is closed
//!
//! | a connection | is closed |
//! |---|---|
//! | unused for [`max_idle`](ConnectLayer::max_idle) | at once; if its task has not run in time, before its next use |
//! | as old as [`max_age`](ConnectLayer::max_age), [recycled](ConnectHandle::recycle), or used by a call with a 421 response | at once if idle, otherwise after its calls; no call begins on it, except over HTTP/2 while the caps permit no other connection |
//! | idle, while a call to another host waits for a permit of the total | at once |
//!
//! If a request is assigned to a connection just when that connection is closed for one of these reasons, the request
//! is sent over another connection, because no part of it has been written.
//!
//! # Supported clients
//!
//! | | caps, queue, connect timeout, counters | age, idle, streams, `in_use`, `reused` |
//! |---|---|---|
//! | [`Client`] | yes | yes |
//! | hyper-util's client, tonic's `connect_with_connector`, with a [`Connector`] | yes | no |
//! | reqwest's `connector_layer`, with [`untracked`](ConnectLayer::untracked) | connect timeout and counters | no |
//!
//! A wrapped connector does not observe which of its connections are in use. Build hyper-util's client with the
//! [`Executor`] of this module: otherwise connects that the client no longer needs occupy the queue. tonic has one
//! connection for each endpoint. The type of reqwest's connections is private to reqwest, so they cannot be wrapped.
//!
//! [`Client`] uses hyper-util's `legacy` client and not its composable `client::pool`. The latter (0.1.21) keeps
//! connections that have closed. It has no idle timeout, no bound on its map and no notification when a connection
//! becomes idle. It does not return a request whose connection has closed, and its types cannot be named. The caps and
//! times that the `legacy` client lacks can be added from outside.
//!
//! # In the stack
//!
//! Place the layer at the bottom. A [`ConcurrencyLimitLayer`](crate::limit::ConcurrencyLimitLayer) bounds calls. This
//! layer bounds connections: over HTTP/2 several calls share a connection, and over HTTP/1 idle connections count too.
//!
//! # Streaming bodies
//!
//! A connection is in use until the response body has ended, failed or been dropped. A connection that was upgraded, or
//! that `CONNECT` made a tunnel, is in use until it is closed. An unread response keeps its connection in use: a caller
//! that holds as many unread responses as the cap allows blocks its own next call.
//!
//! # Cancellation
//!
//! Dropping a call that waits or connects releases its permits. If a call is dropped just when it gets a permit, the
//! permit passes to the next call in the queue. Over HTTP/2 one call at a time connects for all calls that wait. If
//! that call is dropped, the next of them connects; hyper's pool would fail them. If a call is served by another
//! connection while its own connection is still being opened, the new connection is stored for the next call.
//!
//! # Changes while the layer is in use
//!
//! A [`ConnectHandle`] changes every setting of a running layer. A setter after the layer has built a service returns a
//! layer with state of its own: with the same settings and name, and with no connections.
//!
//! # Defaults
//!
//! | setting | default |
//! |---|---|
//! | [`max_per_host`](ConnectLayer::max_per_host), [`max_total`](ConnectLayer::max_total) | none |
//! | [`queue`](ConnectLayer::queue) | 1024 entries, 5 s each |
//! | [`connect_timeout`](ConnectLayer::connect_timeout) | 5 s |
//! | [`max_age`](ConnectLayer::max_age) | 5 minutes |
//! | [`max_idle`](ConnectLayer::max_idle) | 4 s |
//! | [`jitter`](ConnectLayer::jitter) | 0.2: age and idle time are each up to 20 % shorter |
//! | [`tcp_keepalive`](ClientBuilder::tcp_keepalive) | after 15 s, every 15 s, 3 times |
//! | [`http2_keepalive`](ClientBuilder::http2_keepalive) | off |
//!
//! # Addresses and lookups
//!
//! A [`TcpConnector`] divides the connect timeout among the addresses of a host and tries IPv4 and IPv6 concurrently
//! (RFC 8305). [`build_http`](ClientBuilder::build_http) and `build_https` use it. Any other connector has to divide
//! the timeout itself, for example by `HttpConnector::set_connect_timeout`, because a [`ConnectLayer`] observes one
//! connect and not its addresses.
//!
//! A DNS lookup cannot be cancelled. A [`Resolver`] therefore bounds the number of lookups in progress.
//!
//! # Difference from other limits
//!
//! A concurrency limit that wraps a connector bounds concurrent connects: it releases its permit when the connection is
//! open. `pool_max_idle_per_host` of hyper-util and reqwest bounds the idle connections, not the open ones.

mod checkout;
mod client;
mod conn;
mod dial;
mod executor;
mod handle;
mod hosts;
mod io;
mod layer;
mod lifetime;
#[cfg(feature = "observe")]
mod observe;
mod resolve;
mod semaphore;
mod state;
mod streams;
mod tcp;

pub use self::{
    client::{Client, ClientBuilder, ClientResponseFuture},
    dial::{Untracked, UntrackedFuture, UntrackedLayer},
    executor::Executor,
    handle::{ConnectHandle, ConnectSnapshot},
    io::Io,
    layer::{ConnectFuture, ConnectLayer, Connector},
    resolve::{Addresses, Resolver, Resolving},
    tcp::TcpConnector,
};
