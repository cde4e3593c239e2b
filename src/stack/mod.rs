//! The recommended stacks: the public layers of this crate in the recommended order, made from one
//! [configuration](crate::config), with one handle.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use buttress::{config::{ClientConfig, ConfigPreset}, stack::ClientStack};
//! use http_body_util::Full;
//! use tower::{Layer, service_fn};
//!
//! let config = ClientConfig::load("search").preset(ConfigPreset::Internal).env().finish()?;
//! let stack = ClientStack::new(&config)?;
//! let handle = stack.handle();
//! let client = stack.layer(service_fn(|_: http::Request<_>| async {
//!     Ok::<_, std::io::Error>(http::Response::new(Full::<bytes::Bytes>::default()))
//! }));
//! # let _ = tower::ServiceExt::oneshot(client, http::Request::new(Full::<bytes::Bytes>::default()));
//! println!("{:?}", handle.snapshot());
//! # Ok(()) }
//! ```
//!
//! With the feature `connect`, `buttress::client` puts the stack of a client around a client with its own connections.
//! With the feature `tonic`, `buttress::grpc` puts it around a tonic channel, for generated clients. The stack of a
//! server is [`buttress::server`](server()), a layer for an axum router.
//!
//! # The layers
//!
//! | a client, outermost first | a server |
//! |---|---|
//! | counters | counters |
//! | [`DeadlineLayer`](crate::deadline::DeadlineLayer): the deadline of all attempts and delays | [`DeadlineLayer`](crate::deadline::DeadlineLayer) |
//! | [`RetryLayer`](crate::retry::RetryLayer) | |
//! | [`HedgeLayer`](crate::hedge::HedgeLayer), off unless `hedge_after` or `hedge_percentile` is set | |
//! | [`CircuitBreakerLayer`](crate::breaker::CircuitBreakerLayer) | |
//! | [`ConcurrencyLimitLayer`](crate::limit::ConcurrencyLimitLayer) | [`ConcurrencyLimitLayer`](crate::limit::ConcurrencyLimitLayer) |
//! | [`DeadlineLayer`](crate::deadline::DeadlineLayer): sends the time left to the next hop | |
//! | [`TimeoutLayer`](crate::timeout::TimeoutLayer): the timeouts of an attempt | [`TimeoutLayer::server`](crate::timeout::TimeoutLayer::server) |
//! | [`AttemptHeadersLayer`](crate::retry::AttemptHeadersLayer), if `attempt_headers` sets a closure | |
//! | [`HealthProbeLayer`](crate::health::HealthProbeLayer), in `buttress::client` if `health_probe_uri` is set | |
//! | the client | the routes |
//!
//! A layer that is off forwards every call. It stays in the stack, so the type of the stack does not depend on the
//! configuration.
//!
//! # Changes at runtime
//!
//! [`update`](ClientHandle::update) applies another configuration to a stack in use. It returns the keys of the
//! settings that cannot change without a new stack.
//!
//! # Cost
//!
//! The counters read the clock twice for each call and take one lock for a short time. With the feature `observe` they
//! also record the latency in a histogram, by two atomic additions. Everything else is the cost of the layers.

pub(crate) mod client;
#[cfg(any(feature = "connect", feature = "tonic"))]
mod future;
#[cfg(feature = "tonic")]
pub(crate) mod grpc;
mod handle;
#[cfg(feature = "connect")]
mod http;
mod meter;
#[cfg(feature = "observe")]
mod observe;
pub(crate) mod server;
mod service;

#[cfg(any(feature = "connect", feature = "tonic"))]
#[cfg_attr(docsrs, doc(cfg(any(feature = "connect", feature = "tonic"))))]
pub use self::future::{ClientBody, ClientFuture, HasBody};
#[cfg(feature = "tonic")]
#[cfg_attr(docsrs, doc(cfg(feature = "tonic")))]
pub use self::grpc::{GrpcClient, IntoTonicBody, grpc};
#[cfg(feature = "connect")]
#[cfg_attr(docsrs, doc(cfg(feature = "connect")))]
pub use self::http::{StackClient, client};
pub use self::{
    client::{ClientHandle, ClientStack, ClientStackService},
    handle::{HealthCheck, StackSnapshot, UpstreamHealth},
    meter::{Meter, MeterFuture},
    server::{ServerHandle, ServerStack, ServerStackService, server},
    service::StackFuture,
};
