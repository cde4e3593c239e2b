//! The exports of a registry besides counters and gauges: the values of histograms one by one, and exemplars.
//!
//! A histogram of a layer has an [`ExportCell`], which is empty until a registry needs the values. With an empty cell, a
//! call that records a value pays for one load. The registry fills the cell with a [`HistogramExport`]. The hook for trace
//! ids, the recorder of the facade and the SDK of OpenTelemetry are user code, so a value is exported without a lock of
//! this crate, and a panic is caught.

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

#[cfg(feature = "opentelemetry_0_33")]
use ::opentelemetry::{KeyValue, metrics::Histogram as MeterHistogram};
use tokio::time::Instant;

#[cfg(feature = "metrics")]
use super::facade_key::{self, FacadeHistogram};
use super::{
    exemplar::{BucketExemplars, Exemplar, TraceId},
    metric::Metric,
    metrics::{CALL_DURATION, QUEUE_WAIT_DURATION},
};
use crate::{sync::Mutex, user_code::catch_panic};

/// Returns the trace of the current call.
type TraceHook = Arc<dyn Fn() -> Option<TraceId> + Send + Sync>;

/// The exports of one registry. Its clones share them.
#[derive(Default)]
pub(super) struct Exports {
    /// Whether there is a hook, which is read without the lock.
    has_hook: AtomicBool,
    hook: Mutex<Option<TraceHook>>,
    /// Whether the metrics are published through the `metrics` facade.
    #[cfg(feature = "metrics")]
    facade: AtomicBool,
    /// The histograms of the first meter.
    #[cfg(feature = "opentelemetry_0_33")]
    meters: OnceLock<Box<MeterHistograms>>,
    /// Whether the durations of calls are exported one by one.
    #[cfg(any(feature = "metrics", feature = "opentelemetry_0_33"))]
    call_durations: AtomicBool,
}

impl Exports {
    pub(super) fn set_hook(&self, hook: TraceHook) {
        let before = self.hook.lock().replace(hook);
        self.has_hook.store(true, Relaxed);
        drop(before);
    }

    /// Calls the hook.
    fn trace_id(&self) -> Option<TraceId> {
        let hook = self.hook.lock().clone()?;
        catch_panic(|| hook()).flatten()
    }

    /// Turns the facade on. Returns whether it was off.
    #[cfg(feature = "metrics")]
    pub(super) fn use_facade(&self) -> bool {
        !self.facade.swap(true, Relaxed)
    }

    /// Returns whether the facade is on.
    #[cfg(feature = "metrics")]
    pub(super) fn uses_facade(&self) -> bool {
        self.facade.load(Relaxed)
    }

    /// Adds the histograms of a meter.
    #[cfg(feature = "opentelemetry_0_33")]
    pub(super) fn add_meter(&self, histograms: Vec<(&'static Metric, MeterHistogram<f64>)>) {
        let mut new = Box::new(MeterHistograms { histograms, next: OnceLock::new() });
        let mut end = &self.meters;
        while let Err(rest) = end.set(new) {
            let Some(meter) = end.get() else { return };
            (new, end) = (rest, &meter.next);
        }
    }

    /// Exports the durations of calls one by one, too.
    #[cfg(any(feature = "metrics", feature = "opentelemetry_0_33"))]
    pub(super) fn export_call_durations(&self) {
        self.call_durations.store(true, Relaxed);
    }

    /// Returns whether the values of a histogram are exported one by one. Exemplars do not count.
    fn exports_values(&self, metric: &'static Metric) -> bool {
        let mut exports = false;
        #[cfg(feature = "metrics")]
        {
            exports |= self.uses_facade();
        }
        #[cfg(feature = "opentelemetry_0_33")]
        {
            exports |= self.meters.get().is_some();
        }
        #[cfg(any(feature = "metrics", feature = "opentelemetry_0_33"))]
        if std::ptr::eq(metric, &CALL_DURATION) {
            exports &= self.call_durations.load(Relaxed);
        }
        let _ = (metric, &mut exports);
        exports
    }

    /// Returns whether a histogram needs an export.
    pub(super) fn needs(&self, metric: &'static Metric) -> bool {
        self.has_hook.load(Relaxed) && has_exemplars(metric) || self.exports_values(metric)
    }
}

impl fmt::Debug for Exports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exports").field("has_hook", &self.has_hook).finish_non_exhaustive()
    }
}

/// Returns whether a histogram has exemplars.
fn has_exemplars(metric: &'static Metric) -> bool {
    [&CALL_DURATION, &QUEUE_WAIT_DURATION].into_iter().any(|with| std::ptr::eq(with, metric))
}

/// The histograms of one meter, and a link to those of the next meter. Meters are added and never removed, so that a
/// record reads the list without a lock.
#[cfg(feature = "opentelemetry_0_33")]
struct MeterHistograms {
    histograms: Vec<(&'static Metric, MeterHistogram<f64>)>,
    next: OnceLock<Box<Self>>,
}

/// The export of a histogram, or nothing. The first registry that exports the histogram fills the cell.
#[derive(Debug, Default)]
pub(crate) struct ExportCell(OnceLock<Box<HistogramExport>>);

impl ExportCell {
    #[inline]
    pub(super) fn get(&self) -> Option<&HistogramExport> {
        self.0.get().map(|export| &**export)
    }

    pub(super) fn connect(&self, export: impl FnOnce() -> HistogramExport) {
        self.0.get_or_init(|| Box::new(export()));
    }
}

/// The exports of the values of one histogram.
pub(super) struct HistogramExport {
    exports: Arc<Exports>,
    metric: &'static Metric,
    exemplars: Option<BucketExemplars>,
    #[cfg(feature = "metrics")]
    facade: FacadeHistogram,
    #[cfg(feature = "opentelemetry_0_33")]
    attributes: Box<[KeyValue]>,
}

impl HistogramExport {
    pub(super) fn new(
        exports: Arc<Exports>,
        metric: &'static Metric,
        name: Option<&str>,
        labels: &[(&'static str, &str)],
        buckets: usize,
    ) -> Self {
        #[cfg(feature = "opentelemetry_0_33")]
        let attributes = {
            let name = name.map(|name| ("name", name));
            let labels = name.iter().chain(labels);
            labels.map(|(label, value)| KeyValue::new(*label, (*value).to_owned())).collect()
        };
        let _ = (name, labels);
        Self {
            exports,
            metric,
            exemplars: has_exemplars(metric).then(|| BucketExemplars::new(buckets)),
            #[cfg(feature = "metrics")]
            facade: FacadeHistogram::new(metric, facade_key::key(metric, name, labels)),
            #[cfg(feature = "opentelemetry_0_33")]
            attributes,
        }
    }

    /// Exports one value. The caller holds no lock.
    pub(super) fn record(&self, bucket: usize, value: f64, now: impl FnOnce() -> Instant) {
        let exports = &self.exports;
        if let Some(exemplars) = self.exemplars.as_ref().filter(|_| exports.has_hook.load(Relaxed))
        {
            exemplars.record(bucket, value, now(), || exports.trace_id());
        }
        if exports.exports_values(self.metric) {
            self.record_value(value);
        }
    }

    fn record_value(&self, value: f64) {
        #[cfg(feature = "metrics")]
        if self.exports.uses_facade() {
            let _ = catch_panic(|| self.facade.record(value));
        }
        #[cfg(feature = "opentelemetry_0_33")]
        {
            let meters = std::iter::successors(self.exports.meters.get(), |meter| meter.next.get());
            for meter in meters {
                let of = meter.histograms.iter().find(|(of, _)| std::ptr::eq(*of, self.metric));
                if let Some((_, histogram)) = of {
                    let _ = catch_panic(|| histogram.record(value, &self.attributes));
                }
            }
        }
        let _ = (self, value);
    }

    /// Returns the exemplar of each bucket, or an empty list if the histogram has no exemplars.
    pub(super) fn exemplars(&self) -> Vec<Option<Exemplar>> {
        self.exemplars.as_ref().map(BucketExemplars::exemplars).unwrap_or_default()
    }
}

impl fmt::Debug for HistogramExport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HistogramExport").field("metric", &self.metric.name).finish_non_exhaustive()
    }
}
