//! The description of a metric and its values.

use std::fmt;

use super::exemplar::Exemplar;

/// The kind of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MetricKind {
    /// A count that only increases.
    Counter,
    /// A number of things that exist now, such as calls in flight. Numbers of several processes can be added.
    UpDownCounter,
    /// A value now, such as a limit.
    Gauge,
    /// The distribution of values, in buckets.
    Histogram,
}

impl MetricKind {
    /// Returns the kind in `snake_case`.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::UpDownCounter => "up_down_counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

impl fmt::Display for MetricKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The description of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metric {
    /// The name in OpenTelemetry's form, such as `buttress.breaker.state.time`.
    pub name: &'static str,
    /// The kind.
    pub kind: MetricKind,
    /// The unit in UCUM's form: `s`, or an annotation such as `{call}`.
    pub unit: &'static str,
    /// The labels. The label `name` is the name of the layer.
    pub labels: &'static [&'static str],
    /// The meaning in one sentence.
    pub help: &'static str,
}

impl Metric {
    /// Returns the name of the family in the Prometheus format: `buttress_breaker_state_time_seconds`.
    #[must_use]
    pub fn family(&self) -> String {
        let mut family = self.name.replace('.', "_");
        if self.unit == "s" {
            family.push_str("_seconds");
        }
        family
    }

    /// Returns the name of the samples in the Prometheus format: the family, with `_total` for a counter. The samples of
    /// a histogram have `_bucket`, `_sum` and `_count` instead.
    #[must_use]
    pub fn series(&self) -> String {
        let mut series = self.family();
        if self.kind == MetricKind::Counter {
            series.push_str("_total");
        }
        series
    }

    pub(super) fn is_named(&self) -> bool {
        self.labels.contains(&"name")
    }
}

/// A value of a metric.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Value {
    /// A number of things, or a count.
    Count(u64),
    /// A number with a fraction. Times are in seconds.
    Number(f64),
    /// A distribution.
    Histogram(HistogramSnapshot),
}

/// The counts of a histogram at one time.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct HistogramSnapshot {
    /// The inclusive upper bounds of the buckets. The last bucket has none.
    pub bounds: &'static [f64],
    /// The number of values in each bucket. It has one entry more than `bounds`.
    pub counts: Vec<u64>,
    /// The sum of the values.
    pub sum: f64,
    /// The exemplar of each bucket. Empty unless [`exemplars`](super::registry::Registry::exemplars) are on.
    pub exemplars: Vec<Option<Exemplar>>,
}

impl HistogramSnapshot {
    /// Returns the number of values.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}
