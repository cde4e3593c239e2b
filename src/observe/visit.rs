//! The traits by which a registry reads the state of a layer.

use std::sync::{Arc, Weak};

use super::{
    condition::Condition,
    exports::ExportCell,
    metric::{Metric, Value},
};
use crate::{report::ReportChange, sealed::Sealed, time::Nanos};

/// Receives the values of metrics.
pub trait Visit {
    /// Receives one value. The labels do not contain the `name`.
    fn sample(&mut self, metric: &'static Metric, labels: &[(&'static str, &str)], value: Value);

    /// Returns the maximum number of keys of a keyed layer whose values are visited.
    fn max_keys(&self) -> usize {
        0
    }

    /// Receives the number of keys that were combined into the key `other`.
    fn fold(&mut self, _keys: u64) {}
}

/// The methods for the forms of values that layers have.
impl dyn Visit + '_ {
    pub(crate) fn count(&mut self, metric: &'static Metric, value: u64) {
        self.sample(metric, &[], Value::Count(value));
    }

    pub(crate) fn number(&mut self, metric: &'static Metric, value: f64) {
        self.sample(metric, &[], Value::Number(value));
    }

    /// Visits a time in seconds.
    pub(crate) fn seconds(&mut self, metric: &'static Metric, nanos: Nanos) {
        self.number(metric, nanos as f64 / 1e9);
    }

    /// Visits a time in seconds with a label.
    pub(crate) fn seconds_of(
        &mut self,
        metric: &'static Metric,
        label: (&'static str, &str),
        nanos: Nanos,
    ) {
        self.sample(metric, &[label], Value::Number(nanos as f64 / 1e9));
    }

    /// Visits a count for each value of a label.
    pub(crate) fn counts<'a>(
        &mut self,
        metric: &'static Metric,
        label: &'static str,
        counts: impl IntoIterator<Item = (&'a str, u64)>,
    ) {
        for (value, count) in counts {
            self.sample(metric, &[(label, value)], Value::Count(count));
        }
    }

    /// Visits a count for each value of a second label. The first one is the layer.
    pub(crate) fn counts_of<'a>(
        &mut self,
        metric: &'static Metric,
        layer: &str,
        label: &'static str,
        counts: impl IntoIterator<Item = (&'a str, u64)>,
    ) {
        for (value, count) in counts {
            self.sample(metric, &[("layer", layer), (label, value)], Value::Count(count));
        }
    }

    /// Visits a value of 1 for the state that holds, and of 0 for all others.
    pub(crate) fn state<'a>(
        &mut self,
        metric: &'static Metric,
        label: &'static str,
        states: impl IntoIterator<Item = &'a str>,
        now: &str,
    ) {
        self.counts(
            metric,
            label,
            states.into_iter().map(|state| (state, u64::from(state == now))),
        );
    }
}

/// The kind of a keyed circuit breaker as a watched layer. Its metrics differ from those of a single circuit.
pub(crate) const KEYED_BREAKER: &str = "keyed_circuit_breaker";

/// The state of a layer, as a registry reads it.
pub(crate) trait Observed: Send + Sync + 'static {
    /// Visits the values of all metrics of this layer. Takes each lock of the layer at most once, and does not call the
    /// visitor under a lock.
    fn observe(&self, to: &mut dyn Visit);

    /// Visits the histograms of this layer with their labels, without the name.
    fn visit_histograms(&self, _: &mut VisitHistogram<'_>) {}

    /// Returns the state in words. No lock may be held: a read can emit the event of a change that is due by time, and the
    /// subscriber of the event is user code.
    fn condition(&self) -> Condition;

    /// Adds a receiver of the changes of the state.
    fn add_receiver(&self, _: Arc<dyn ReportChange>) {}

    /// Returns a future that resolves when the process is *stopping*. `None` if this is not a lifecycle.
    #[cfg(feature = "dashboard")]
    fn stopping(&self) -> Option<Stopping> {
        None
    }

    /// Forces the state of a circuit. Returns `false` if the layer is not a circuit.
    fn force(&self, _: ForceCircuit) -> bool {
        false
    }
}

/// A future that resolves when the process is *stopping*. It does not keep the lifecycle alive.
#[cfg(feature = "dashboard")]
pub(crate) type Stopping = std::pin::Pin<Box<dyn Future<Output = ()> + Send + Sync>>;

/// A change of a circuit by hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ForceCircuit {
    Open,
    Closed,
    Reset,
}

/// Receives a histogram of a layer.
pub(crate) type VisitHistogram<'a> =
    dyn FnMut(&'static Metric, &[(&'static str, &str)], &ExportCell) + 'a;

/// One layer, or one part of the process, that a [`Registry`](super::registry::Registry) watches.
///
/// It does not keep the layer alive.
pub struct Part {
    pub(super) layer: &'static str,
    /// The name of the layer. `None` for a part of the process.
    pub(super) name: Option<String>,
    pub(super) state: Weak<dyn Observed>,
}

impl Part {
    pub(crate) fn new(layer: &'static str, name: &str, state: Weak<dyn Observed>) -> Self {
        Self { layer, name: Some(name.to_owned()), state }
    }

    /// Returns a part that exists once in a process, so it needs no name.
    #[cfg(feature = "health")]
    pub(crate) fn of_process(layer: &'static str, state: Weak<dyn Observed>) -> Self {
        Self { layer, name: None, state }
    }

    /// Returns the part under the name of the stack that contains its layer.
    #[cfg(feature = "stack")]
    pub(crate) fn named(self, name: &str) -> Self {
        Self { name: Some(name.to_owned()), ..self }
    }
}

impl std::fmt::Debug for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Part")
            .field("layer", &self.layer)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// A handle that a [`Registry`](super::registry::Registry) can watch: that of a layer or a stack, a health registry, or a
/// lifecycle.
///
/// The trait is sealed: it cannot be implemented outside of this crate.
pub trait Observe: Sealed {
    /// Returns the layers to watch.
    fn parts(&self) -> Vec<Part>;
}
