//! Metrics of all layers: one registry that reads them when they are scraped.
//!
//! Layers count for themselves. A [`Registry`] reads their counts and states when a scrape arrives, so an admitted call
//! costs nothing more. The one exception is a ready-made stack, whose calls record their latency by two atomic
//! additions. `docs/metrics.md` lists the metrics with their units and labels.
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
//! All labels except `name`, `check` and `version` have closed sets of values. Every value of a set is exported from the
//! first scrape, with 0: otherwise `rate()` would miss the first increment.

mod condition;
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
pub(crate) use self::{
    condition::Condition,
    exports::ExportCell,
    histogram::{CALL_BOUNDS, FixedHistogram, RETRY_BOUNDS, WAIT_BOUNDS},
    visit::{ForceCircuit, Observed, VisitHistogram},
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
