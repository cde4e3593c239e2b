//! The metrics as observable instruments of OpenTelemetry.

use std::{collections::HashMap, ptr, sync::Arc, time::Duration};

use ::opentelemetry::{
    KeyValue,
    metrics::{AsyncInstrument, Meter},
};
use tokio::time::Instant;

use super::{
    histogram::bounds,
    metric::{Metric, MetricKind, Value},
    metrics::METRICS,
    registry::{NamedVisit, Registry, WeakRegistry},
    series::SeriesMap,
};
use crate::sync::Mutex;

/// The maximum age of values that the callbacks of one collection share.
const MAX_AGE: Duration = Duration::from_secs(1);

impl Registry {
    /// Makes an observable instrument for each counter and gauge on this meter, with the names of `docs/metrics.md`. The
    /// labels are attributes.
    ///
    /// The instruments keep neither the layers nor the registry alive. They have no values after the last clone of the
    /// registry is dropped. Call this method once for each meter, because a meter does not replace instruments.
    ///
    /// The callbacks of one collection share one visit of all layers.
    ///
    /// OpenTelemetry has no observable histogram. The values of histograms are recorded when they arise, from this call
    /// on: waits in queues, delays and numbers of retries, and the durations of calls after
    /// [`export_call_durations`](Self::export_call_durations). Only the first registry that exports the histograms of a
    /// layer receives them.
    ///
    /// ```
    /// use buttress::{CircuitBreakerLayer, observe::Registry};
    /// use opentelemetry::metrics::MeterProvider;
    /// use opentelemetry_sdk::metrics::SdkMeterProvider;
    ///
    /// # fn main() -> Result<(), buttress::ConfigError> {
    /// let provider = SdkMeterProvider::builder().build();
    /// let registry = Registry::new();
    /// let breaker = CircuitBreakerLayer::http().name("search");
    /// registry.watch(&breaker.handle())?;
    /// registry.meter_into(&provider.meter("buttress"));
    /// # Ok(()) }
    /// ```
    #[cfg_attr(docsrs, doc(cfg(feature = "opentelemetry_0_33")))]
    pub fn meter_into(&self, meter: &Meter) {
        let collections =
            Arc::new(Collections { registry: self.downgrade(), state: Mutex::default() });
        for metric in METRICS {
            instrument(meter, metric, collections.clone());
        }
        let histograms = METRICS.iter().filter(|metric| metric.kind == MetricKind::Histogram);
        let histograms = histograms.map(|metric| {
            let histogram =
                meter.f64_histogram(metric.name).with_boundaries(bounds(metric).to_vec());
            (*metric, histogram.with_unit(metric.unit).with_description(metric.help).build())
        });
        self.exports().add_meter(histograms.collect());
        self.connect_histograms();
    }
}

/// Makes the instrument of a metric. A counter of seconds has a fraction, the other counters have none.
fn instrument(meter: &Meter, metric: &'static Metric, from: Arc<Collections>) {
    let (name, unit, help) = (metric.name, metric.unit, metric.help);
    match metric.kind {
        MetricKind::Counter if unit == "s" => {
            let counter = meter.f64_observable_counter(name).with_unit(unit).with_description(help);
            counter.with_callback(move |to| from.observe(metric, to, as_f64)).build();
        }
        MetricKind::Counter => {
            let counter = meter.u64_observable_counter(name).with_unit(unit).with_description(help);
            counter.with_callback(move |to| from.observe(metric, to, as_u64)).build();
        }
        MetricKind::UpDownCounter => {
            let counter =
                meter.i64_observable_up_down_counter(name).with_unit(unit).with_description(help);
            counter.with_callback(move |to| from.observe(metric, to, as_i64)).build();
        }
        MetricKind::Gauge => {
            let gauge = meter.f64_observable_gauge(name).with_unit(unit).with_description(help);
            gauge.with_callback(move |to| from.observe(metric, to, as_f64)).build();
        }
        MetricKind::Histogram => {}
    }
}

fn as_f64(number: Number) -> f64 {
    match number {
        Number::Count(count) => count as f64,
        Number::Fraction(number) => number,
    }
}

fn as_u64(number: Number) -> u64 {
    match number {
        Number::Count(count) => count,
        Number::Fraction(number) => number as u64,
    }
}

fn as_i64(number: Number) -> i64 {
    i64::try_from(as_u64(number)).unwrap_or(i64::MAX)
}

#[derive(Clone, Copy)]
enum Number {
    Count(u64),
    Fraction(f64),
}

/// The values of one metric with their attributes.
type Points = Vec<(Arc<[KeyValue]>, Number)>;

/// The values that the callbacks of one meter share.
///
/// OpenTelemetry has no callback for a whole collection: it calls the callback of each instrument, one after the other.
/// The first one visits all layers, and each takes the points of its metric. If the points of a metric are missing, its
/// callback has taken them before, so a new collection has begun.
struct Collections {
    registry: WeakRegistry,
    state: Mutex<CollectionState>,
}

#[derive(Default)]
struct CollectionState {
    /// The attributes by series.
    attributes: SeriesMap<Arc<[KeyValue]>>,
    /// The points that no callback has removed, by the address of the metric.
    points: HashMap<usize, Points>,
    visited: Option<Instant>,
}

impl Collections {
    /// Observes the values of a metric. The observer is user code, so no lock is held while it runs.
    fn observe<T>(
        &self,
        metric: &'static Metric,
        to: &dyn AsyncInstrument<T>,
        convert: fn(Number) -> T,
    ) {
        for (attributes, number) in self.take(metric) {
            to.observe(convert(number), &attributes);
        }
    }

    /// Removes and returns the points of a metric. Visits all layers first, unless another callback of this collection has
    /// done so.
    fn take(&self, metric: &'static Metric) -> Points {
        let key = ptr::from_ref(metric) as usize;
        let mut attributes = {
            let mut state = self.state.lock();
            let is_fresh = state.visited.is_some_and(|visited| visited.elapsed() <= MAX_AGE);
            if let Some(points) = state.points.remove(&key).filter(|_| is_fresh) {
                return points;
            }
            std::mem::take(&mut state.attributes)
        };
        // The visit runs without the lock: it may drop the last reference to a layer, and thereby closures of the user.
        let Some(registry) = self.registry.upgrade() else { return Vec::new() };
        // A metric without a series has no points, but its callback must not visit all layers again.
        let all = METRICS.iter().map(|metric| (ptr::from_ref(*metric) as usize, Vec::new()));
        let mut points = all.collect();
        attributes.begin();
        registry.visit(&mut Visitor { attributes: &mut attributes, points: &mut points });
        attributes.end(|_| false);
        let own = points.remove(&key).unwrap_or_default();
        let visited = Some(Instant::now());
        let before = {
            let mut state = self.state.lock();
            std::mem::replace(&mut *state, CollectionState { attributes, points, visited })
        };
        drop(before);
        own
    }
}

/// One visit of all layers.
struct Visitor<'a> {
    attributes: &'a mut SeriesMap<Arc<[KeyValue]>>,
    points: &'a mut HashMap<usize, Points>,
}

impl NamedVisit for Visitor<'_> {
    fn sample(
        &mut self,
        metric: &'static Metric,
        name: Option<&str>,
        labels: &[(&'static str, &str)],
        value: Value,
    ) {
        let number = match value {
            Value::Count(count) => Number::Count(count),
            Value::Number(number) => Number::Fraction(number),
            Value::Histogram(_) => return,
        };
        let attributes = self.attributes.get(metric, name, labels, || attributes(name, labels));
        let points = self.points.entry(ptr::from_ref(metric) as usize).or_default();
        points.push((attributes.clone(), number));
    }
}

fn attributes(name: Option<&str>, labels: &[(&'static str, &str)]) -> Arc<[KeyValue]> {
    let name = name.map(|name| ("name", name));
    let labels = name.iter().chain(labels);
    labels.map(|(label, value)| KeyValue::new(*label, (*value).to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    use ::opentelemetry::metrics::MeterProvider;
    use opentelemetry_sdk::metrics::SdkMeterProvider;

    use super::*;
    use crate::{
        observe::{
            Condition, Observe, Observed, Part, Severity, Visit,
            metrics::{CONCURRENCY_EXEMPT, CONCURRENCY_LIMIT},
        },
        sealed::Sealed,
    };

    /// A layer that exports the number of its reads.
    struct Counted(Arc<AtomicU64>);

    impl Observed for AtomicU64 {
        fn observe(&self, to: &mut dyn Visit) {
            let reads = self.fetch_add(1, Relaxed) + 1;
            to.count(&CONCURRENCY_LIMIT, reads);
            to.count(&CONCURRENCY_EXEMPT, reads);
        }

        fn condition(&self) -> Condition {
            Condition::new(Severity::Healthy, "", "")
        }
    }

    impl Sealed for Counted {}

    impl Observe for Counted {
        fn parts(&self) -> Vec<Part> {
            let state = Arc::downgrade(&self.0);
            vec![Part::new("counted", "a", state)]
        }
    }

    #[test]
    fn callbacks_of_one_collection_share_one_visit() {
        let prometheus = prometheus::Registry::new();
        let exporter = opentelemetry_prometheus::exporter().with_registry(prometheus.clone());
        let provider = SdkMeterProvider::builder().with_reader(exporter.build().unwrap()).build();
        let (registry, layer) = (Registry::new(), Counted(Arc::default()));
        registry.watch(&layer).unwrap();
        registry.meter_into(&provider.meter("buttress"));
        let before = layer.0.load(Relaxed);
        for reads in before + 1..before + 4 {
            let families = prometheus.gather();
            assert_eq!(layer.0.load(Relaxed), reads);
            let value = |name: &str| {
                let family = families.iter().find(|family| family.name() == name).unwrap();
                let metric = &family.get_metric()[0];
                metric.get_gauge().get_value() + metric.get_counter().get_value()
            };
            assert_eq!(value("buttress_concurrency_limit"), reads as f64);
            assert_eq!(value("buttress_concurrency_exempt_total"), reads as f64);
        }
    }
}
