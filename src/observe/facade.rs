//! Publishes counters and gauges through the `metrics` facade.

use std::collections::BTreeSet;

use ::metrics::{Counter, Gauge, Key, KeyName, Recorder, with_recorder};

use super::{
    facade_key::{METADATA, has_address, key, unit},
    metric::{Metric, MetricKind, Value},
    registry::{NamedVisit, Registry},
    series::SeriesMap,
};
use crate::user_code::catch_panic;

impl Registry {
    /// Publishes the counters and gauges through the `metrics` facade, once a second while the sampler of this registry
    /// [runs](Self::run). A process without the sampler calls [`MetricsPublisher::publish`] itself.
    ///
    /// The values of histograms are recorded when they arise, from this call on: waits in queues, delays and numbers of
    /// retries, and the durations of calls after [`export_call_durations`](Self::export_call_durations).
    #[cfg_attr(docsrs, doc(cfg(feature = "metrics")))]
    pub fn publish_metrics(&self) {
        if self.exports().use_facade() {
            self.connect_histograms();
        }
    }
}

/// Publishes the counters and gauges of a [`Registry`] through the `metrics` facade.
///
/// The values go to the recorder that is installed when [`publish`](Self::publish) is called. Without one they are
/// discarded. The publisher makes one handle for each series and stores it, so use one publisher for all publications.
///
/// The names are those of the text page, such as `buttress_calls_total`. The facade has no counter of seconds, so those
/// counters are gauges, which `rate()` accepts. The facade cannot remove a series: the gauges of a dropped layer, and
/// gauges that have become absent, are set to 0 once. The counters of a dropped layer keep their values, and a new layer
/// of that name continues them, unless more than 10,000 counters of other layers have ended since then.
///
/// ```
/// use buttress::{CircuitBreakerLayer, observe::{MetricsPublisher, Registry}};
///
/// # fn main() -> Result<(), buttress::ConfigError> {
/// let registry = Registry::new();
/// let breaker = CircuitBreakerLayer::http().name("search");
/// registry.watch(&breaker.handle())?;
/// // Once a second, after the recorder has been installed.
/// let mut publisher = MetricsPublisher::new();
/// publisher.publish(&registry);
/// # Ok(()) }
/// ```
#[cfg_attr(docsrs, doc(cfg(feature = "metrics")))]
#[derive(Debug, Default)]
pub struct MetricsPublisher {
    /// The address of the recorder that has made the handles.
    recorder: usize,
    series: SeriesMap<Handle>,
    /// The names of the metrics that are described to the recorder.
    described: BTreeSet<&'static str>,
}

/// The handle of a series.
enum Handle {
    /// A counter of the facade does not decrease. A layer that replaces one of the same name counts from 0 again, so
    /// `base` is the sum of the counts of the layers before it.
    Counter {
        handle: Counter,
        base: u64,
        last: u64,
    },
    Gauge(Gauge),
}

impl MetricsPublisher {
    /// Returns a publisher that has published nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Publishes the current values if the metrics of the registry are published. A panic of the recorder is caught.
    pub(super) fn publish_if_on(&mut self, registry: Registry) {
        if registry.exports().uses_facade() {
            let _ = catch_panic(|| self.publish(&registry));
        }
    }

    /// Publishes the current values of all counters and gauges to the installed recorder. Also turns on
    /// [`Registry::publish_metrics`], so that the values of histograms are recorded from the first publication on.
    pub fn publish(&mut self, registry: &Registry) {
        registry.publish_metrics();
        with_recorder(|recorder| {
            // A handle belongs to the recorder that has made it. A stored handle of the no-op recorder would discard the
            // values of a recorder that is installed later.
            let address = std::ptr::from_ref(recorder).cast::<()>() as usize;
            if self.recorder != address || !has_address(recorder) {
                *self = Self { recorder: address, ..Self::default() };
            }
            let Self { series, described, .. } = self;
            series.begin();
            registry.visit(&mut Pass { recorder, series, described });
            series.end(Handle::end_layer);
        });
    }
}

/// One visit of all series.
struct Pass<'a> {
    recorder: &'a dyn Recorder,
    series: &'a mut SeriesMap<Handle>,
    described: &'a mut BTreeSet<&'static str>,
}

impl NamedVisit for Pass<'_> {
    fn sample(
        &mut self,
        metric: &'static Metric,
        name: Option<&str>,
        labels: &[(&'static str, &str)],
        value: Value,
    ) {
        if metric.kind == MetricKind::Histogram {
            return;
        }
        let Self { recorder, series, described } = self;
        let handle = series.get(metric, name, labels, || {
            if described.insert(metric.name) {
                describe(*recorder, metric);
            }
            Handle::new(*recorder, metric, key(metric, name, labels))
        });
        handle.set(&value);
    }
}

impl Handle {
    fn new(recorder: &dyn Recorder, metric: &Metric, key: Key) -> Self {
        match is_counter(metric) {
            true => {
                let handle = recorder.register_counter(&key, &METADATA);
                Self::Counter { handle, base: 0, last: 0 }
            }
            false => Self::Gauge(recorder.register_gauge(&key, &METADATA)),
        }
    }

    fn set(&mut self, value: &Value) {
        match (self, value) {
            (Self::Counter { handle, base, last }, Value::Count(count)) => {
                if count < last {
                    *base = base.saturating_add(*last);
                }
                *last = *count;
                handle.absolute(base.saturating_add(*count));
            }
            (Self::Gauge(gauge), Value::Count(count)) => gauge.set(*count as f64),
            (Self::Gauge(gauge), Value::Number(number)) => gauge.set(*number),
            // No metric has values of both forms.
            (Self::Counter { .. }, _) | (Self::Gauge(_), Value::Histogram(_)) => {}
        }
    }

    /// Ends the series of a layer that has been dropped. Returns whether the handle is needed for a new layer of the
    /// same name.
    fn end_layer(&mut self) -> bool {
        match self {
            Self::Counter { base, last, .. } => {
                *base = base.saturating_add(std::mem::take(last));
                true
            }
            Self::Gauge(gauge) => {
                gauge.set(0.0);
                false
            }
        }
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Counter { .. } => "Counter",
            Self::Gauge(_) => "Gauge",
        })
    }
}

/// Returns whether the facade has a counter for this metric. A counter of the facade is an integer, so it has none for
/// seconds.
fn is_counter(metric: &Metric) -> bool {
    metric.kind == MetricKind::Counter && metric.unit != "s"
}

fn describe(recorder: &dyn Recorder, metric: &Metric) {
    let (name, help) = (KeyName::from(metric.series()), metric.help.into());
    match is_counter(metric) {
        true => recorder.describe_counter(name, unit(metric), help),
        false => recorder.describe_gauge(name, unit(metric), help),
    }
}
