//! Metrics of all layers: one registry that reads them when they are scraped, and exports them.
//!
//! Layers count for themselves. A [`Registry`] reads their counts and states when a scrape arrives, so an admitted call
//! costs nothing more. There are two exceptions: the calls of a ready-made stack record their latency by two atomic
//! additions, and an [export](#exports) receives the values of histograms from the calls. `docs/metrics.md` lists the
//! metrics with their units and labels.
//!
//! ```
//! use axum::Router;
//! use buttress::{CircuitBreakerLayer, ConcurrencyLimitLayer, observe::Registry};
//!
//! # fn main() -> Result<(), buttress::ConfigError> {
//! let registry = Registry::new();
//! let breaker = CircuitBreakerLayer::http().name("search");
//! let limit = ConcurrencyLimitLayer::new(512).name("front");
//! registry.watch(&breaker.handle())?;
//! registry.watch(&limit.handle())?;
//!
//! // `GET /metrics`, outside of the limit: a full server can still be scraped.
//! let app: Router = Router::new().layer(limit.respond()).layer(registry.endpoints());
//! # let _ = app;
//! # Ok(()) }
//! ```
//!
//! # Status and decisions
//!
//! [`Registry::status`] returns the state of each layer in words, with the reason, the time at which the state ends, and
//! the next step. [`Registry::decisions`] returns changes of states and summaries of rejections as they arise.
//! [`Registry::run`] is the sampler: spawn it once, for the history of the status and the summaries.
//!
//! # Names
//!
//! Each layer needs a name (`.name("search")`) before [`watch`](Registry::watch): the label `name` of its metrics. Two
//! layers of the same kind need different names. The layers of one stack should have the same name, so that rules can
//! combine their metrics. The handle of a stack watches all of its layers under the name of its configuration. A
//! [health registry](crate::health::Health) and a [lifecycle](crate::lifecycle::Lifecycle) exist once in a process, so
//! they need no name, and their metrics have no label `name`.
//!
//! # Labels
//!
//! All labels except `name`, `key`, `check` and `version` have closed sets of values. Every value of a set is exported
//! from the first scrape, with 0: otherwise `rate()` would miss the first increment.
//!
//! # Exports
//!
//! Three paths export the same names, labels and values of counters and gauges, so one dashboard fits all of them:
//!
//! | path | feature | read | difference |
//! |---|---|---|---|
//! | [`endpoints`](Registry::endpoints), [`text`](Registry::text) | `observe` | at each scrape | |
//! | [`publish_metrics`](Registry::publish_metrics), [`MetricsPublisher`] | `metrics` | at each publication | counters of seconds are gauges; the gauges of a dropped layer stay, with the value 0 |
//! | [`meter_into`](Registry::meter_into) | `opentelemetry_0_33` | at each collection | the names have dots, and the units are in UCUM's form; the Prometheus exporter of OpenTelemetry converts both |
//!
//! Times are in seconds. The Prometheus exporter of OpenTelemetry adds the label `otel_scope_name`, unless it is built
//! with `without_scope_info`. Its SDK combines the series of an instrument beyond its cardinality limit (2,000 by default).
//!
//! # Histograms
//!
//! The text page has all histograms, with fixed buckets. Neither the facade nor OpenTelemetry accepts a histogram that was
//! counted elsewhere, so each value is exported when it is recorded: the waits in queues, and the delays and numbers of
//! retries. The durations of calls are exported only after
//! [`export_call_durations`](Registry::export_call_durations), because each call has one. OpenTelemetry uses the buckets of the text page; an exporter behind the facade has buckets of its own, or
//! quantiles.
//!
//! # Exemplars
//!
//! With [`exemplars`](Registry::exemplars), the buckets of call durations and queue waits have the id of the trace of one
//! call, in the format of OpenMetrics. Prometheus stores them with `--enable-feature=exemplar-storage`.

mod condition;
#[cfg(feature = "dashboard")]
#[cfg_attr(docsrs, doc(cfg(feature = "dashboard")))]
pub mod dashboard;
mod decision;
mod endpoint;
mod episode;
mod exemplar;
mod exports;
#[cfg(feature = "metrics")]
mod facade;
#[cfg(feature = "metrics")]
mod facade_key;
mod histogram;
mod history;
mod metric;
pub(crate) mod metrics;
#[cfg(feature = "opentelemetry_0_33")]
mod opentelemetry;
mod registry;
mod sampler;
#[cfg(any(feature = "metrics", feature = "opentelemetry_0_33"))]
mod series;
mod status;
mod text;
mod visit;

#[cfg(feature = "metrics")]
pub use self::facade::MetricsPublisher;
#[cfg(feature = "dashboard")]
pub(crate) use self::visit::Stopping;
pub(crate) use self::{
    condition::{Condition, counted},
    exports::ExportCell,
    histogram::{CALL_BOUNDS, FixedHistogram, RETRY_BOUNDS, WAIT_BOUNDS},
    visit::{ForceCircuit, KEYED_BREAKER, Observed, VisitHistogram},
};
pub use self::{
    condition::{Fact, Severity},
    decision::{Decision, Decisions},
    endpoint::{MetricsEndpoint, MetricsEndpointLayer, MetricsService},
    exemplar::{Exemplar, TraceId},
    history::Track,
    metric::{HistogramSnapshot, Metric, MetricKind, Value},
    metrics::METRICS,
    registry::{NamedVisit, Registry},
    status::{LayerStatus, Status},
    visit::{Observe, Part, Visit},
};
