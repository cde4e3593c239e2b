//! Connections that are bounded, fresh and visible: a layer over connectors, and a client on top of it.
//!
//! A pool that nobody bounds opens a connection for each call that finds none idle, hands out one that the
//! server is just closing, stays with addresses that DNS has long forgotten, and says nothing of all this.
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
//! A connection takes a place of its host and one of all before it is made, and holds both until it is closed: the
//! place is in the connection itself, wherever a pool keeps it. Who finds none waits for one, first come, first
//! served, if the line has room. With a [`Client`] it is the call that waits, before it asks the pool, and goes when a
//! connection becomes idle or may be made. Where the cap of all is reached, a connection that another host leaves idle is
//! closed for who waits.
//!
//! # Streams of HTTP/2
//!
//! Calls over HTTP/2 share connections. A connection has as many streams as the server's SETTINGS allow
//! (`MAX_CONCURRENT_STREAMS`, RFC 9113 §5.1.2). When all streams are in use, a [`Client`] opens another connection, up to
//! the caps and to 64 per host. A call beyond that waits in the line for a stream: `waits_for_stream` in the
//! [`ConnectSnapshot`] counts it, a circuit breaker does not count the wait against the upstream, and the call is
//! [refused](crate::call::RejectedKind::Saturated) after the maximum wait of the [`queue`](ConnectLayer::queue). A call
//! holds its stream to the end of the response body. Calls use the oldest connections first, so that the others become
//! idle and are closed.
//!
//! Only the first SETTINGS of a connection are read: if a server lowers the maximum later, requests wait inside hyper.
//! They wait there, too, if they began before a TLS handshake with their host had negotiated HTTP/2.
//!
//! | a connection | is closed |
//! |---|---|
//! | unused for [`max_idle`](ConnectLayer::max_idle) | at once; also if nobody had the time to, when it is to be used |
//! | as old as [`max_age`](ConnectLayer::max_age), or [renewed](ConnectHandle::renew) | at once if idle, else after its calls; no call begins on it, unless calls share it (HTTP/2) and a cap leaves no room for another |
//! | idle, while another host waits for the cap of all | at once |
//!
//! A request that meets a connection at the moment when it is closed for one of these is sent over another one:
//! none of it has been written.
//!
//! # With what
//!
//! | | caps, queue, connect timeout, counters | age, idle, streams, `in_use`, `reused` |
//! |---|---|---|
//! | [`Client`] | yes | yes |
//! | hyper-util's client, tonic's `connect_with_connector`, with a [`Connector`] | yes | no |
//! | reqwest's `connector_layer`, with [`dials`](ConnectLayer::dials) | connect timeout and counters | no |
//!
//! Who wraps a connector alone cannot know which connection is in use. hyper-util's client is to be built with the
//! [`Executor`] here, or what it leaves behind fills the line. tonic has one connection for each endpoint.
//! reqwest's connections are of a type that nobody else can make.
//!
//! The client is hyper-util's `legacy` one, not one made of its composable `client::pool`: these parts (0.1.21)
//! keep connections that have closed, have no idle time, no bound on their map, nothing that is told when a
//! connection becomes idle, no request that comes back when its connection has closed, and types without
//! names. What the older client lacks can be had from outside: the caps and the times above.
//!
//! # In the stack
//!
//! At the very bottom. A [`ConcurrencyLimitLayer`](crate::ConcurrencyLimitLayer) bounds calls; this bounds
//! connections, which over HTTP/2 are not the same, and over HTTP/1 include the idle ones.
//!
//! # Streams
//!
//! A connection is in use until the response body has ended, failed or been dropped. One that was upgraded, or
//! made a tunnel by `CONNECT`, is in use until it is closed. A response that is kept and not read keeps its
//! connection: a caller that holds as many of them as the cap allows waits for itself.
//!
//! # Cancellation
//!
//! Dropping a call that waits or connects gives its place back; dropping one just when its turn has come hands the
//! turn to the next. Over HTTP/2 one call at a time connects for all that wait: when it is dropped the next of them does
//! (hyper's pool would fail them). A connection that is nearly made when its caller is served by another one is kept for the
//! next.
//!
//! # Defaults
//!
//! | setting | default |
//! |---|---|
//! | [`max_per_host`](ConnectLayer::max_per_host), [`max_total`](ConnectLayer::max_total) | none |
//! | [`queue`](ConnectLayer::queue) | 1024 for 5 s each |
//! | [`connect_timeout`](ConnectLayer::connect_timeout) | 5 s |
//! | [`max_age`](ConnectLayer::max_age) | 5 minutes |
//! | [`max_idle`](ConnectLayer::max_idle) | 4 s |
//! | [`jitter`](ConnectLayer::jitter) | each up to a fifth less |
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
//! # Beside others
//!
//! A concurrency limit around a connector bounds attempts to connect: its permit is free again when the connection
//! is there. `pool_max_idle_per_host` of hyper-util and reqwest bounds what is kept idle, not what is open.

mod client;
mod conn;
mod core;
mod dial;
mod executor;
mod gate;
mod handle;
mod host;
mod io;
mod layer;
mod life;
mod resolve;
mod streams;
mod tcp;
mod turn;

pub use self::{
    client::{Client, ClientBuilder, ResponseFuture},
    dial::{Dial, DialFuture, DialLayer},
    executor::Executor,
    handle::{ConnectHandle, ConnectSnapshot},
    io::Io,
    layer::{ConnectFuture, ConnectLayer, Connector},
    resolve::{Addresses, Resolver, Resolving},
    tcp::TcpConnector,
};
