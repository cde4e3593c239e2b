//! Tower layers for resilient services: circuit breaker, retry, hedge, concurrency limit, health probe, timeouts
//! and deadlines.
//!
//! The layers support HTTP and gRPC **streams**: a call ends with its response body, and the trailers of a gRPC call
//! decide its outcome. Limits also hold inside **axum** and tonic, which apply a layer once per connection or request:
//! the state lives in the layer, so all services share it. Every rejection states the layer, the reason and the time to
//! retry.
//!
//! ```
//! use std::time::Duration;
//! use axum::{Router, routing::post};
//! use buttress::ConcurrencyLimitLayer;
//!
//! // A server: one limit for all routes. A call holds its permit until its response stream ends.
//! let app: Router = Router::new()
//!     .route("/chat", post(|| async { "…" }))
//!     .layer(ConcurrencyLimitLayer::new(512).queue(128, Duration::from_millis(200)).respond());
//! ```
//!
//! ```
//! use std::time::Duration;
//! use buttress::{CircuitBreakerLayer, ConcurrencyLimitLayer, RetryLayer};
//! use hyper_util::{client::legacy::Client, rt::TokioExecutor};
//! use tower::ServiceBuilder;
//! # type Body = http_body_util::Empty<bytes::Bytes>;
//!
//! // A client: retries, a circuit breaker, and a limit on calls in flight.
//! let breaker = CircuitBreakerLayer::http();
//! let state = breaker.handle();
//! let client = ServiceBuilder::new()
//!     .layer(RetryLayer::http())
//!     .layer(breaker)
//!     .layer(ConcurrencyLimitLayer::new(50).queue(500, Duration::from_secs(5)))
//!     .service(Client::builder(TokioExecutor::new()).build_http());
//! # let _: &tower::util::Oneshot<_, http::Request<Body>> =
//! #     &tower::ServiceExt::oneshot(client, http::Request::new(Body::new()));
//! ```
//!
//! # Layers
//!
//! | layer | protects | rejects with |
//! |---|---|---|
//! | [`CircuitBreakerLayer`] | callers from waiting for a failing upstream, and the upstream from their calls | 503, `UNAVAILABLE` |
//! | [`ConcurrencyLimitLayer`] | a service from more concurrent calls than it can process | 503, `UNAVAILABLE` |
//! | [`HealthProbeLayer`] | callers from an upstream that fails its health probe | 503, `UNAVAILABLE` |
//! | [`RetryLayer`] | callers from transient failures | – |
//! | [`HedgeLayer`] | callers from the slowest responses | – |
//! | [`ConnectLayer`] | client and server from too many connections, and from stale ones | an error |
//! | [`TimeoutLayer`] | callers from an upstream that does not respond in time | 504, on a server 503; `DEADLINE_EXCEEDED` |
//! | [`DeadlineLayer`] | services from work whose deadline has passed | 504, `DEADLINE_EXCEEDED` |
//!
//! # Order of the layers
//!
//! The order of a client, outermost first: deadline, retry, hedge, circuit breaker, concurrency limit, health probe,
//! timeout, the client. If a [header](deadline) states the time left for the next hop, a second deadline layer is right
//! outside of the timeout. With tonic, a [`RespondLayer`] is outermost. The health probe is inside of the limit, so
//! that a limit full of hung calls does not block probes.
//!
//! The order of a server: health endpoints, lifecycle, deadline, concurrency limit, timeout, the routes.
//!
//! Any order compiles. Other orders have these effects:
//!
//! | this outside of that | effect |
//! |---|---|
//! | circuit breaker, retry | the breaker counts calls and not attempts: it does not count a failure that a retry hides, and an open circuit does not end retries |
//! | concurrency limit, retry | a call that waits for its next attempt holds a permit, and a hedge attempt has no permit of its own |
//! | concurrency limit, circuit breaker | a call that an open circuit rejects has to wait for a permit first |
//! | timeout, retry | the timeout bounds all attempts together, and the breaker does not count a slow attempt as a failure |
//! | on a server: limit, health endpoints | a full server responds to its probes with 503, and is removed or restarted |
//! | `axum`'s or tower's `Timeout`, any layer of this crate | the timeout drops calls in flight, which count as [hang-ups of the caller](outcome#which-side-caused-it): failures only after `count_cancelled_after` |
//!
//! | layer of tower-http | position on a server | in any other position |
//! |---|---|---|
//! | `TraceLayer` | outermost | it does not see rejections |
//! | `CorsLayer`, with `.expose_headers([RETRY_AFTER])` | outside of every layer that rejects | scripts of a browser cannot read a rejection, and preflights are rejected |
//! | authorization (`AsyncRequireAuthorizationLayer`, `ValidateRequestHeaderLayer`) | inside of `CorsLayer`, because preflights have no credentials; outside of the limit | callers without credentials acquire permits |
//! | `CompressionLayer` | inside or outside of the limit; outside of the timeout | the timeout measures the compressed frames instead of the frames of the service |
//!
//! A browser closes an `EventSource` permanently after a 503, and does not expose the response to a failed WebSocket
//! handshake to scripts. [`Respond`](respond::Respond#browsers) states the remedies.
//!
//! # What counts against an upstream
//!
//! Only failures that the upstream caused count against it. A caller that hangs up, has a short deadline, sends slowly
//! or reads slowly opens no circuit, lowers no adaptive limit and holds no half-open probe slot. The same holds for
//! connections that servers close as a matter of routine. One [table](outcome#which-side-caused-it) states how every
//! layer counts every cause.
//!
//! # Errors and responses
//!
//! A ready-made client fails with a [`ClientError`], which converts by `?` into `Box<dyn Error>` and `anyhow::Error`.
//!
//! A rejection is a [`Rejected`]. By default it is a boxed error, and [`Rejected::find`] finds it anywhere in a chain
//! of sources. With `.respond()` it is a response, and the error type stays the same. A [`RespondLayer`] converts the
//! rejections of all inner layers into responses. A response reaches a client that is still sending its request: the
//! rest of the request body is [drained](respond::Respond#uploads) within bounds.
//!
//! An invalid setting never panics: `checked()` of each layer returns it as a [`ConfigError`]. A layer that is used
//! without `checked()` reports it in the log.
//!
//! # Why was this call rejected?
//!
//! | source | information |
//! |---|---|
//! | the error | [`Rejected::find`]: the layer, its name, the reason and the time to retry; [`Attempts::find`]: the attempts |
//! | the response | the same, in its extensions: `response.extensions().get::<Rejected>()`, [`Attempts::of`] |
//! | a server's client | the status, `Retry-After`, and `reason` in the problem document; no internal state |
//! | the log (`buttress=debug`, or one of the targets below) | an event for each rejection, each further attempt and each change of state, with `resilience.name`, `layer` and `reason`; DEBUG for calls, INFO and WARN for state changes, ERROR for invalid settings and panics of closures. `docs/events.md` of the repository lists all events |
//! | a trace | a span `attempt` for each attempt of a retry or a hedge, with its outcome; [`AttemptHeadersLayer`] writes its context to the headers |
//! | `/metrics` (feature `observe`) | the counts since the start and the current state of every layer that a [`Registry`](observe::Registry) watches |
//! | the live page (feature `dashboard`) | the state of every layer with its reason, five minutes of history, and the last decisions: see [`dashboard`](observe::dashboard) |
//! | a handle's `snapshot()` | the same of one layer, for code |
//!
//! The targets of the events are `buttress::breaker`, `buttress::retry`, `buttress::hedge`, `buttress::limit`,
//! `buttress::health`, `buttress::timeout`, `buttress::connect`, `buttress::listener` and `buttress::lifecycle`;
//! invalid settings of every layer and updates of whole stacks are reported under `buttress::config`.
//!
//! The enums with a closed set of values, such as [`RejectedKind`](outcome::RejectedKind), [`Reason`](outcome::Reason)
//! and [`GiveUpReason`](retry::GiveUpReason), have an `as_str()` for the label of a metric. The name of a layer is set
//! by `.name("search")`.
//!
//! ```
//! use buttress::{Attempts, BoxError, Rejected};
//!
//! fn explain(error: &BoxError) {
//!     if let Some(rejected) = Rejected::find(&**error) {
//!         // `circuit_breaker search circuit_open`, and the time to retry.
//!         println!("{} {:?} {}", rejected.layer(), rejected.name(), rejected.kind().as_str());
//!         println!("{:?}", rejected.retry_after());
//!     }
//!     for attempt in Attempts::find(&**error).iter().flat_map(|attempts| attempts.records()) {
//!         println!("{}, then a delay of {:?}", attempt.outcome, attempt.waited);
//!     }
//! }
//! # explain(&Rejected::new(buttress::outcome::RejectedKind::Open).into());
//! ```
//!
//! # Secrets
//!
//! Userinfo, queries and fragments of URIs, credentials and header values are not part of any text of this crate:
//! `Debug` output, errors, `explain()`, events, snapshots and health pages show `http://***@search:8080/healthz?***`.
//! The texts of other crates' errors pass through the same redaction where this crate embeds them. Text in a path is
//! shown. Input is shortened: a value to 256 bytes, an error to 512, with `…` and the full length. Three things contain
//! the original: the public fields of a configuration, its serialized form, and `source()`, which returns the client's
//! own error.
//!
//! # Compile errors
//!
//! If the types of a stack do not match, `oneshot` and `ready` only report that a bound is not satisfied. A function
//! that requires the service makes the compiler report the bound and the reason:
//!
//! ```
//! fn takes<Request>(_: &impl tower::Service<Request>) {}
//!
//! # let client = tower::service_fn(|_: http::Request<()>| async { Ok::<_, std::io::Error>(()) });
//! takes::<http::Request<()>>(&client);
//! ```
//!
//! | error | remedy |
//! |---|---|
//! | `Infallible: From<Box<dyn Error…>>`, under axum | `.respond()`, on each layer of this crate |
//! | `Channel: Service<Request<ReplayBody<_>>>` is not satisfied; the same of a client with one body type, or with `SendingBody` | retry, hedge and timeout send body types of their own: let the compiler infer the body type of the client, as in `build_http()`; for tonic use `buttress::grpc`; or put `MapRequestBodyLayer` of tower-http (feature `map-request-body`) directly around the client, with `tonic::body::Body::new` or with `UnsyncBoxBody::new` of http-body-util |
//! | expected closure `fn(Result<&Row, &Box<dyn Error…>>)` | an inner layer rejects with errors, so the errors are boxed: see below |
//! | `Http` cannot classify or replay … | `.classify(…)`, for types other than those of HTTP |
//! | … cannot be cloned | `derive(Clone)`, or a `tower::buffer` around the service |
//!
//! # Naming the type of a client
//!
//! ```
//! use buttress::{BoxError, CircuitBreakerLayer, RetryLayer};
//! use bytes::Bytes;
//! use http::{Request, Response};
//! use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
//! use hyper_util::{client::legacy::Client, rt::TokioExecutor};
//! use tower::{ServiceBuilder, ServiceExt, util::BoxCloneSyncService};
//!
//! struct Search {
//!     client: BoxCloneSyncService<Request<Full<Bytes>>, Response<UnsyncBoxBody<Bytes, BoxError>>, BoxError>,
//! }
//!
//! let client = ServiceBuilder::new()
//!     .layer(RetryLayer::http())
//!     .layer(CircuitBreakerLayer::http().name("search"))
//!     .service(Client::builder(TokioExecutor::new()).build_http())
//!     .map_response(|response| response.map(|body| BodyExt::map_err(body, BoxError::from).boxed_unsync()));
//! let search = Search { client: BoxCloneSyncService::new(client) };
//! # let _ = search.client;
//! ```
//!
//! # Layers around a service of your own types
//!
//! A layer that rejects boxes the errors of its inner service, so that the closures of outer layers get a [`BoxError`]:
//!
//! ```
//! use buttress::{BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Outcome, RetryLayer, Trip};
//! use tower::ServiceBuilder;
//! # #[derive(Clone, Debug)] struct Query;
//! # #[derive(Debug)] struct Row;
//! # #[derive(Debug)] enum DbError { Constraint, Gone }
//! # impl std::fmt::Display for DbError { fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result { Ok(()) } }
//! # impl std::error::Error for DbError {}
//!
//! fn classify(result: Result<&Row, &BoxError>) -> Outcome {
//!     match result.map_err(|error| error.downcast_ref()) {
//!         Ok(_) | Err(Some(DbError::Constraint)) => Outcome::success(),
//!         Err(Some(DbError::Gone)) => Outcome::failure(),
//!         // A rejection by an inner layer, which is not a failure of the upstream; or another error.
//!         Err(None) => result.map_or_else(|error| Outcome::of_error(&**error), |_| Outcome::success()),
//!     }
//! }
//!
//! # let db = tower::service_fn(|_: Query| async { Err::<Row, _>(DbError::Gone) });
//! let db = ServiceBuilder::new()
//!     .layer(RetryLayer::new().classify(classify))
//!     .layer(CircuitBreakerLayer::new(Trip::consecutive(5)).classify(classify))
//!     .layer(ConcurrencyLimitLayer::new(20).per_response())
//!     .service(db);
//! # let _ = tower::ServiceExt::oneshot(db, Query);
//! ```
//!
//! With `.respond_with(|rejected| Err(DbError::Rejected(rejected.clone())))` on each layer that rejects, the error type
//! does not change.
//!
//! # Features
//!
//! | feature | default | adds |
//! |---|---|---|
//! | `breaker` `retry` `limit` `health` | yes | the layers |
//! | `timeout` | yes | [`TimeoutLayer`] and [`DeadlineLayer`] |
//! | `hyper` | yes | distinguishes the errors of hyper, h2 and hyper-util's client: failed connects, stale connections, refused streams, GOAWAY |
//! | `tracing` | yes | one event per decision; events that traffic repeats are summarised once in 10 s |
//! | `lifecycle` | | [`Lifecycle`]: starting, ready, draining, stopping; signals; the parts for tonic and hyper |
//! | `serve` | | [`Lifecycle::serve`]: a server for axum that drains and limits the time of every stage of a connection, on hyper-util |
//! | `reqwest` | | a service of `http` types around a `reqwest::Client`; layers for reqwest's own requests; a retry directly around the client |
//! | `listener` | | a listener with a maximum number of connections, for `serve` and hyper |
//! | `axum` | | this listener for `axum::serve`; `Rejected` as an axum response |
//! | `connect` | | [connections](connect) that are bounded, fresh and visible: a layer over connectors, and a client |
//! | `rustls` | | TLS for that client, and for the server of `serve` |
//! | `config` | | [settings](config) from TOML, JSON or the environment, checked against each other and explained |
//! | `stack` | | whole [client and server stacks](stack) from such settings, each in one call; `buttress::client` needs `connect` too, `buttress::grpc` needs `tonic` |
//! | `observe` | | a [registry](observe) of layers, which serves their metrics in the text formats of Prometheus and OpenMetrics |
//! | `metrics` | | publishes these metrics through the `metrics` facade |
//! | `opentelemetry_0_33` | | exports these metrics as [instruments of a meter](observe::Registry::meter_into) of `opentelemetry` 0.33 |
//! | `dashboard` | | a [live page](observe::dashboard) with the state of all layers of a registry, which the application mounts |
//! | `tower` | | [`ServiceBuilderExt`]: `.retries(…)`, `.circuit_breaker(…)` and the other layers as methods of tower's `ServiceBuilder` |
//! | `tower-http` | | classification by a classifier of `tower_http::classify` |
//! | `tonic` | | classifies the errors of a tonic channel directly inside of a layer; a rejection has a `tonic::Status` as its source; `grpc.health.v1` from the [`Health`] registry; needs Rust 1.88 |
//! | `full` | | all features |
#![cfg_attr(docsrs, feature(doc_cfg))]
#![forbid(unsafe_code)]
#![warn(missing_docs, missing_debug_implementations, unreachable_pub, rust_2018_idioms)]
// Without all features, some links of the docs lead to items that do not exist.
#![cfg_attr(not(feature = "full"), allow(rustdoc::broken_intra_doc_links))]

// The shared modules are always built. With a subset of the features, some of their items are unused.
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
mod admission;
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
mod attempt;
#[cfg(feature = "breaker")]
#[cfg_attr(docsrs, doc(cfg(feature = "breaker")))]
pub mod breaker;
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
pub mod classify;
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
mod client_error;
#[cfg(feature = "config")]
#[cfg_attr(docsrs, doc(cfg(feature = "config")))]
pub mod config;
#[cfg(feature = "connect")]
#[cfg_attr(docsrs, doc(cfg(feature = "connect")))]
pub mod connect;
#[cfg(feature = "timeout")]
#[cfg_attr(docsrs, doc(cfg(feature = "timeout")))]
pub mod deadline;
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
mod drain;
#[cfg(any(feature = "health", feature = "observe"))]
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
pub mod endpoint;
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
mod error;
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
mod event;
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
mod fault;
#[cfg(feature = "health")]
#[cfg_attr(docsrs, doc(cfg(feature = "health")))]
pub mod health;
#[cfg(feature = "retry")]
#[cfg_attr(docsrs, doc(cfg(feature = "retry")))]
pub mod hedge;
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
mod indicator;
#[cfg(any(feature = "health", feature = "observe"))]
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
mod json;
#[cfg(feature = "lifecycle")]
#[cfg_attr(docsrs, doc(cfg(feature = "lifecycle")))]
pub mod lifecycle;
#[cfg(feature = "limit")]
#[cfg_attr(docsrs, doc(cfg(feature = "limit")))]
pub mod limit;
#[cfg(any(feature = "listener", feature = "serve"))]
#[cfg_attr(docsrs, doc(cfg(feature = "listener")))]
pub mod listener;
#[cfg(feature = "observe")]
#[cfg_attr(docsrs, doc(cfg(feature = "observe")))]
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
pub mod observe;
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
mod origin;
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
pub mod outcome;
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
pub mod permit;
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
mod redact;
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
mod report;
#[cfg(feature = "reqwest")]
#[cfg_attr(docsrs, doc(cfg(feature = "reqwest")))]
pub mod reqwest;
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
pub mod respond;
#[cfg(feature = "retry")]
#[cfg_attr(docsrs, doc(cfg(feature = "retry")))]
pub mod retry;
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
mod sealed;
#[cfg(feature = "tower")]
mod service_builder;
#[cfg(feature = "stack")]
#[cfg_attr(docsrs, doc(cfg(feature = "stack")))]
pub mod stack;
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
mod sync;
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
mod time;
#[cfg(feature = "timeout")]
#[cfg_attr(docsrs, doc(cfg(feature = "timeout")))]
pub mod timeout;
#[cfg_attr(not(feature = "full"), allow(unused, unreachable_pub))]
mod user_code;

#[cfg(feature = "breaker")]
pub use crate::breaker::{CircuitBreaker, CircuitBreakerLayer, Trip};

#[cfg(feature = "connect")]
pub use crate::connect::ConnectLayer;
#[cfg(feature = "health")]
pub use crate::health::{Health, HealthProbe, HealthProbeLayer};
#[cfg(feature = "lifecycle")]
pub use crate::lifecycle::Lifecycle;
#[cfg(feature = "limit")]
pub use crate::limit::{ConcurrencyLimit, ConcurrencyLimitLayer};
#[cfg(feature = "tower")]
#[cfg_attr(docsrs, doc(cfg(feature = "tower")))]
pub use crate::service_builder::ServiceBuilderExt;
#[cfg(all(feature = "stack", feature = "connect"))]
pub use crate::stack::client;
#[cfg(all(feature = "stack", feature = "tonic"))]
pub use crate::stack::grpc;
#[cfg(feature = "stack")]
pub use crate::stack::server;
#[cfg(feature = "retry")]
pub use crate::{
    attempt::{AttemptHeaders, AttemptHeadersLayer, Attempts, Backoff, RetryBudget},
    hedge::{Hedge, HedgeLayer},
    retry::{Retry, RetryLayer},
};
#[cfg(feature = "timeout")]
pub use crate::{
    deadline::DeadlineLayer,
    timeout::{Timeout, TimeoutLayer, Timeouts},
};

pub use crate::{
    admission::Reusable,
    client_error::{ClientError, ClientErrorKind},
    error::{BoxError, ConfigError},
    indicator::Indicator,
    origin::Origin,
    outcome::{Outcome, Rejected},
    respond::{RespondFuture, RespondLayer, RespondService},
    time::{Deadline, DeadlineSource},
};
