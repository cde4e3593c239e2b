//! Health: asks what is called whether it is well, before callers find out, and answers for this process.
//!
//! [`HealthProbeLayer`] probes the service that it wraps, in the background, and refuses calls while it is
//! down. A [`Health`] registry collects what such probes say, asks [`Check`]s of your own in the background,
//! takes what you say yourself, and answers Kubernetes' questions: `/livez`, `/readyz`, `/healthz`.
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
//! With everything said, for a service of any types, and with a check of one's own:
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
//!     .judge(|answer: Result<&usize, &Infallible>| answer.is_ok_and(|lag| *lag < 100))
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
//! assert!(!health.is_ready(), "the database has not been asked yet");
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
//! | a probe ends as | counts as |
//! |---|---|
//! | 2xx, or what is [expected](HealthProbeLayer::expect_status); any answer, or what the judge says, for other types | passed |
//! | gRPC: `SERVING`, or `UNIMPLEMENTED` | passed |
//! | 503, or gRPC: `NOT_SERVING` | failed, and down at once; with [`immediate_failure(false)`](HealthProbeLayer::immediate_failure) failed |
//! | another status (429 too), an error, a body that breaks off or is not the [expected](HealthProbeLayer::expect_body) one | failed |
//! | no head within `timeout`, readying the service included | failed |
//! | a panic of the service, of the request's closure or of the judge | failed |
//! | [connection housekeeping](crate::Outcome::is_housekeeping), such as a stale pooled connection | as the result of a second request, sent at once within the same `timeout` |
//! | rejected by an inner layer | nothing |
//!
//! | the gate is | calls | its check in the registry |
//! |---|---|---|
//! | unknown | go through | unknown: not ready |
//! | up | go through | pass |
//! | down | refused: [`Unhealthy`](crate::call::RejectedKind::Unhealthy), come back at the next probe; or as [`while_down`](HealthProbeLayer::while_down) says | fail |
//! | down, and too much of its [set](PanicGuard) with it | go through | fail |
//!
//! What user traffic meets opens no gate: that is what a circuit breaker is for, and [`on_probe`](HealthProbeLayer::on_probe)
//! lets probes try that instead of calls. A [`passive`](HealthProbeLayer::passive) gate sends no probe while calls
//! prove health.
//!
//! A [`Check`] of the registry goes by the same thresholds: `up` is pass, `down` is fail. Readiness is what the
//! *critical* checks say; one that is *degrading* turns the whole from `pass` to `warn`, and no more.
//!
//! # The probes
//!
//! One task for each layer, however often it is applied, one probe at a time: the next one is due `every`
//! after the end of the last, the first at once. A probe is a call on a clone of the wrapped service, so
//! that it takes the way that calls take. It begins with the first [`layer`](tower_layer::Layer::layer)
//! inside a Tokio runtime with timers, or else with the first call inside one. It ends with the last
//! layer, service and handle, also in the midst of a probe. If its runtime ends before, the state is
//! unknown again, and the next call starts it in its own.
//!
//! One task for each check of the registry, too, which ends with the registry's last clone, endpoint and
//! reporter. Whoever asks the registry is told what was found last: no request waits for a check.
//!
//! # The endpoints
//!
//! | path | answers 200 | else |
//! |---|---|---|
//! | `/livez` | always: liveness never asks a dependency | – |
//! | `/readyz` | if every critical check passes | 503 |
//! | `/healthz` | as `/readyz`: for load balancers, not for liveness | 503 |
//! | `/readyz/<check>`, `/healthz/<check>` | if this check passes | 503; 404 if there is none |
//!
//! `GET` and `HEAD`, plain text, `Cache-Control: no-store`. `?verbose` lists the checks in Kubernetes'
//! form, `[+]name ok`, `[-]name failed: reason withheld`, or `[-]name degraded: …`, and so does a failed answer;
//! `?exclude=name` leaves one out, and may be repeated. A query of more than 4096 bytes is not looked at, nor is
//! what follows its 64th parameter. The response contains reasons, times and durations only
//! [`with_reasons`](HealthEndpointsLayer::with_reasons). A reason is the text of an error without
//! [secrets](crate#secrets), and may still name hosts and paths.
//!
//! Who accepts `application/health+json` or `application/json`, by name, gets that (after
//! draft-inadarei-api-health-check-06): `status` is `pass`, `warn` or `fail`, and of each check there are
//! `status`, `critical`, `healthy` (the result of the last run) and, unless it passes, `output`. With reasons there are
//! also `response_time_ms` (where it is known) and `last_check` (RFC 3339).
//!
//! [`Health::endpoints`] answers before what it wraps is asked, so that a saturated server still tells how it
//! is; other paths and methods pass through. [`Health::service`] is the same for a port of its own, and for
//! axum's `route_service` and `nest_service`.
//!
//! With the feature `tonic-health`, `Health::grpc` answers `grpc.health.v1` from the same checks, Check and Watch. A
//! [concurrency limit](crate::limit#health-checks) around the server exempts these calls, so that watchers take no
//! permits and a server whose limit is reached still responds.
//!
//! # In the stack
//!
//! The endpoints go outermost. The gate goes right around the client, under the retry, the circuit breaker
//! and the concurrency limit. Over a limit a probe would need a place like any call: refused there it says
//! nothing, so that a limit full of hung calls would keep it from looking.
//!
//! It is made for what you call. In front of a server, wrap the whole router with it: under axum's
//! `Router::layer` it would probe the one route that axum happens to wrap first, which may be a fallback.
//!
//! A gate that is down does not touch the service that it wraps; one that goes down wakes the callers
//! that wait for it.
//!
//! # Streams
//!
//! Response bodies of calls pass through as they are; a stream that is open goes on when the gate goes
//! down. The body of a probe's answer is read, up to 64 KiB and within the `timeout`, so that the
//! connection can be used again; what is longer is dropped, and the head counts.
//!
//! # Cancellation
//!
//! A call holds nothing of the gate: dropping it changes nothing.
//!
//! # Defaults
//!
//! | setting | default |
//! |---|---|
//! | [`every`](HealthProbeLayer::every), of a check too | 5 s |
//! | [`every_while_down`](HealthProbeLayer::every_while_down) | as `every` |
//! | [`jitter`](HealthProbeLayer::jitter) | 0.1 (up to 10 % longer) |
//! | [`timeout`](HealthProbeLayer::timeout) | 1 s |
//! | [`thresholds`](HealthProbeLayer::thresholds) | 1 to rise, 3 to fall |
//! | [`immediate_failure`](HealthProbeLayer::immediate_failure) | on |
//! | [`while_down`](HealthProbeLayer::while_down) | calls are rejected |
//! | [`passive`](HealthProbeLayer::passive), [`panic_guard`](HealthProbeLayer::panic_guard) | off |
//! | rejections | an error; [`respond`](HealthProbeLayer::respond) for a response |
//!
//! tower and tower-http have no layer of this kind. The thresholds, the first success that suffices, the immediate
//! failure and the share below which a set panics follow Envoy.

mod answer;
mod caught;
mod check;
mod endpoints;
mod entry;
mod gate;
#[cfg(feature = "tonic-health")]
mod grpc;
mod handle;
mod json;
mod layer;
mod over_grpc;
mod over_http;
mod panic;
mod probe;
mod prober;
mod registry;
mod reporter;
mod schedule;
mod threshold;

#[cfg(feature = "tonic-health")]
#[cfg_attr(docsrs, doc(cfg(feature = "tonic-health")))]
pub use self::grpc::{GrpcHealth, HealthWatch};
pub use self::{
    check::Check,
    endpoints::{
        HealthBody, HealthEndpoints, HealthEndpointsFuture, HealthEndpointsLayer, HealthService,
    },
    entry::{CheckSnapshot, CheckState, HealthStatus},
    gate::WhileDown,
    handle::{HealthProbeHandle, HealthProbeSnapshot, LastProbe},
    layer::{HealthProbe, HealthProbeLayer},
    over_grpc::Grpc,
    over_http::{Get, OverHttp, SendRequest},
    panic::PanicGuard,
    probe::{AnyAnswer, Ask, Judged, Probe, ProbeFailure, Run, StatusProbe},
    registry::Health,
    reporter::Reporter,
    threshold::ProbeState,
};
pub use crate::{admission::ResponseFuture, call::Indicator};
