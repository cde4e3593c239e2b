//! Health probes of upstreams, and the health endpoints of this process.
//!
//! [`HealthProbeLayer`] probes the service that it wraps in the background, and rejects calls while the service is
//! down. A [`Health`] registry contains named checks: the results of such probes, [`Check`]s that the registry runs in
//! the background, and states that the application sets by a [`Reporter`]. It serves them at the endpoints that
//! Kubernetes probes: `/livez`, `/readyz`, `/healthz`.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() {
//! use axum::{Router, routing::get};
//! use buttress::{Health, HealthProbeLayer};
//! use http_body_util::Empty;
//! use hyper_util::{client::legacy::Client, rt::TokioExecutor};
//! use tower::ServiceBuilder;
//!
//! let health = Health::new();
//! let search = ServiceBuilder::new()
//!     .layer(HealthProbeLayer::get("http://search:8080/healthz").report_to(&health, "search"))
//!     .service(Client::builder(TokioExecutor::new()).build_http::<Empty<bytes::Bytes>>());
//! let app: Router = Router::new()
//!     .route("/", get(|| async { "found" }))
//!     .layer(health.endpoints());                     // outermost
//! # let _ = (search, app); }
//! ```
//!
//! With all settings, for a service of any types, and with a reporter and a check of the application:
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), buttress::ConfigError> {
//! use std::{convert::Infallible, time::Duration};
//! use buttress::{Health, HealthProbeLayer, health::Check};
//! use tower::{Layer, service_fn};
//!
//! let db = service_fn(|query: &'static str| async move { Ok::<_, Infallible>(query.len()) });
//! let health = Health::new();
//! let probe = HealthProbeLayer::new(|| "select lag")
//!     .classify_probe(|result: Result<&usize, &Infallible>| result.is_ok_and(|lag| *lag < 100))
//!     .every(Duration::from_secs(2))
//!     .jitter(0.2)
//!     .timeout(Duration::from_millis(500))
//!     .thresholds(2, 3)
//!     .report_to(&health, "db")
//!     .checked()?;
//! let handle = probe.handle();
//! let db = probe.layer(db);
//! println!("{:?}", handle.snapshot());
//!
//! let cache = health.reporter("cache")?.degrading();
//! cache.fail_because("cold");
//! health.add(Check::watch("queue", || Ok::<(), String>(())))?;
//! assert!(!health.is_ready(), "no probe of the database has ended yet");
//! # let _ = db; Ok(()) }
//! ```
//!
//! # How it decides
//!
//! ```text
//!            a probe passes                    `fall` probes in a row fail
//!  unknown ────────────────▶ up ─────────────────────────────────────────────▶ down
//!     │                       ▲       `rise` probes in a row pass               │ ▲
//!     │                       └─────────────────────────────────────────────────┘ │
//!     └───────────────────────── `fall` probes in a row fail ─────────────────────┘
//! ```
//!
//! The gate of a layer holds this state and decides whether calls are admitted.
//!
//! | result of a probe | counts as |
//! |---|---|
//! | HTTP: 2xx, or an [expected](HealthProbeLayer::expect_status) status | passed |
//! | other types: any response, or a result that the closure of [`classify_probe`](HealthProbeLayer::classify_probe) accepts | passed |
//! | gRPC: `SERVING`, or `UNIMPLEMENTED` | passed |
//! | 503, or gRPC: `NOT_SERVING` | failed, and down at once; with [`immediate_failure(false)`](HealthProbeLayer::immediate_failure) failed |
//! | another status (including 429), an error, a body that ends with an error or is not the [expected](HealthProbeLayer::expect_body) one | failed |
//! | no response head within `timeout`, which includes the time until the service is ready | failed |
//! | a panic of the service or of a closure of the probe | failed |
//! | [connection housekeeping](crate::outcome::Outcome::is_housekeeping), such as a stale pooled connection | as the result of a second request, sent at once within the same `timeout` |
//! | rejected by an inner layer | nothing |
//!
//! | gate | calls | its check in the registry |
//! |---|---|---|
//! | unknown | admitted | unknown: not ready |
//! | up | admitted | pass |
//! | down | rejected: [`Unhealthy`](crate::outcome::RejectedKind::Unhealthy), `retry_after` is the time until the next probe, or until the timeout of the current one; with [`backpressure`](HealthProbeLayer::backpressure) `poll_ready` is pending; in [shadow mode](HealthProbeLayer::shadow) admitted | fail |
//! | down, and too many gates of its [set](FailOpen) are down | admitted | fail |
//!
//! The outcomes of calls never take a gate down or up. A circuit breaker does that, and
//! [`on_probe`](HealthProbeLayer::on_probe) lets health probes replace its half-open probes. A
//! [`passive`](HealthProbeLayer::passive) gate skips probes while calls succeed.
//!
//! A [`Check`] of the registry has the same thresholds: `up` is pass, `down` is fail. The process is ready if all
//! *critical* checks pass. A *degrading* check that does not pass changes the status of the process from `pass` to
//! `warn`.
//!
//! # The probes
//!
//! Each layer has one task, even if the layer is applied several times. The task sends one probe at a time: the first
//! at once, each later one `every` after the end of the previous one. A probe is a call of a clone of the wrapped
//! service, so it passes the same inner layers as calls.
//!
//! The task starts at the first [`layer`](tower_layer::Layer::layer) inside a Tokio runtime with timers, else at the
//! first call inside such a runtime. It ends when the last layer, service and handle are dropped, also during a probe.
//! If its runtime ends earlier, the state becomes unknown, and the next call starts the task on the runtime of that
//! call.
//!
//! Each check of the registry has one task, too. It ends when the last clone of the registry, its last endpoint and its
//! last reporter are dropped. The endpoints report the last result: no request waits for a check.
//!
//! # The endpoints
//!
//! | path | 200 | otherwise |
//! |---|---|---|
//! | `/livez` | always: liveness does not depend on checks | – |
//! | `/readyz` | if every critical check passes | 503 |
//! | `/healthz` | as `/readyz`: for load balancers, not for liveness | 503 |
//! | `/readyz/<check>`, `/healthz/<check>` | if this check passes | 503; 404 if there is no such check |
//!
//! The endpoints respond to `GET` and `HEAD` in plain text, with `Cache-Control: no-store`. `?verbose` lists the checks
//! in Kubernetes' form: `[+]name ok`, `[-]name failed: reason withheld`, or `[-]name degraded: …`. A response with 503
//! lists them, too. `?exclude=name` excludes a check, and may be repeated. A query of more than 4096 bytes is ignored,
//! and so are all parameters after the 64th. The response contains reasons, times and durations only
//! [`with_reasons`](HealthEndpointsLayer::with_reasons). A reason is the text of an error without
//! [secrets](crate#secrets), and may still contain names of hosts and paths.
//!
//! A client whose `Accept` header names `application/health+json` or `application/json` receives JSON (after
//! draft-inadarei-api-health-check-06). `status` is `pass`, `warn` or `fail`. Each check has `status`, `critical`,
//! `healthy` (the result of the last run) and, unless it passes, `output`. With reasons it also has `response_time_ms`
//! (if known) and `last_check` (RFC 3339).
//!
//! [`Health::endpoints`] responds without a call of the wrapped service, so that a saturated server still reports its
//! health. Other paths and methods pass through. [`Health::service`] serves the same endpoints on a separate port, or
//! in axum's `route_service` and `nest_service`.
//!
//! With the feature `tonic`, `Health::grpc` serves `Check` and `Watch` of `grpc.health.v1` from the same checks.
//! A [concurrency limit](crate::limit#health-checks) around the server exempts these calls, so that watchers hold no
//! permits, and a server whose limit is reached still responds.
//!
//! # In the stack
//!
//! The endpoints are the outermost layer of a server. The probe layer is the innermost layer of a client: the retry,
//! the circuit breaker and the concurrency limit are outside it. If a limit were inside it, a probe would need a permit
//! like any call. A limit full of hung calls would then reject every probe, and a rejected probe has no result.
//!
//! The layer is made for clients. In a server it has to wrap the whole router: under axum's `Router::layer` it would
//! probe the route that axum wraps first, which may be a fallback.
//!
//! A gate that is down does not touch the inner service. A gate that goes down wakes the callers that wait for the
//! inner service.
//!
//! # Streams
//!
//! Response bodies of calls pass through unchanged, and an open stream continues when the gate goes down. The body of a
//! probe's response is read within the `timeout`, with a maximum of 64 KiB, so that the connection can be reused. A
//! longer body is dropped. Then the head determines the result, unless
//! [`expect_body`](HealthProbeLayer::expect_body) is set.
//!
//! # Cancellation
//!
//! Dropping a call has no effect on the gate: a cancelled call is not counted.
//!
//! # Changes of a running layer
//!
//! The [handle](HealthProbeHandle) changes the delays, the timeout, the thresholds, the immediate failure, passive mode
//! and shadow mode of a running layer. The kind of the probe, its rules for the response, backpressure, the set of
//! [`fail_open`](HealthProbeLayer::fail_open), the listeners and the checks are fixed: a setter after the layer has
//! built a service returns a layer with state of its own.
//!
//! # Defaults
//!
//! | setting | default |
//! |---|---|
//! | [`every`](HealthProbeLayer::every), also of a [`Check`] | 5 s |
//! | [`every_while_down`](HealthProbeLayer::every_while_down) | as `every` |
//! | [`jitter`](HealthProbeLayer::jitter) | 0.1: a random 0 to 10 % is added to `every` |
//! | [`timeout`](HealthProbeLayer::timeout) | 1 s |
//! | [`thresholds`](HealthProbeLayer::thresholds) | `rise` 1, `fall` 3 |
//! | [`immediate_failure`](HealthProbeLayer::immediate_failure) | on |
//! | [`passive`](HealthProbeLayer::passive), [`fail_open`](HealthProbeLayer::fail_open), [`backpressure`](HealthProbeLayer::backpressure), [`shadow`](HealthProbeLayer::shadow) | off |
//! | rejections | an error; [`respond`](HealthProbeLayer::respond) for a response |
//!
//! tower and tower-http have no layer of this kind. Four rules follow Envoy: the thresholds, the first success that
//! takes a gate up, the immediate failure, and the panic threshold of a set.

mod catch_panic;
mod check;
mod endpoints;
mod entry;
mod fail_open;
mod gate;
#[cfg(feature = "tonic")]
mod grpc;
mod handle;
mod json;
mod layer;
#[cfg(feature = "observe")]
mod observe;
mod probe;
mod registry;
mod reporter;
mod responder;
mod response;
mod schedule;
mod threshold;

#[cfg(feature = "tonic")]
#[cfg_attr(docsrs, doc(cfg(feature = "tonic")))]
pub use self::grpc::{GrpcHealth, HealthWatch};
pub use self::{
    check::Check,
    endpoints::{HealthEndpoints, HealthEndpointsLayer, HealthService},
    entry::{CheckSnapshot, CheckState, HealthStatus},
    fail_open::FailOpen,
    handle::{HealthProbeHandle, HealthProbeSnapshot, LastProbe},
    layer::{HealthProbe, HealthProbeFuture, HealthProbeLayer},
    probe::{
        AnyResponse, CallProbe, ClassifiedProbe, ExpectedResponse, FailedProbe, FnProbe, Get, Grpc,
        HttpProbe, Probe, ProbeFailure, SendRequest, StatusProbe,
    },
    registry::Health,
    reporter::Reporter,
    responder::HealthRoutes,
    threshold::ProbeState,
};
pub use crate::indicator::Indicator;
