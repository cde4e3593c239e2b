//! The keys of the `metrics` facade, and its histograms.

use std::sync::OnceLock;

use ::metrics::{Histogram, Key, KeyName, Label, Level, Metadata, Recorder, Unit, with_recorder};

use super::metric::Metric;

pub(super) const METADATA: Metadata<'static> =
    Metadata::new("buttress::observe", Level::INFO, None);

/// Returns the key of a series.
pub(super) fn key(metric: &Metric, name: Option<&str>, labels: &[(&'static str, &str)]) -> Key {
    let name = name.map(|name| ("name", name));
    let labels = name.iter().chain(labels);
    let labels = labels.map(|(label, value)| Label::new(*label, (*value).to_owned()));
    Key::from_parts(metric.series(), labels.collect::<Vec<_>>())
}

pub(super) fn unit(metric: &Metric) -> Option<Unit> {
    Some(if metric.unit == "s" { Unit::Seconds } else { Unit::Count })
}

/// Returns whether a recorder can be distinguished from others by its address. The facade uses a no-op recorder until
/// another one is installed. It has no size and therefore no address of its own.
pub(super) fn has_address(recorder: &dyn Recorder) -> bool {
    size_of_val(recorder) > 0
}

/// A histogram of the facade.
pub(super) struct FacadeHistogram {
    metric: &'static Metric,
    key: Key,
    /// The handle of the recorder that was installed when the first value was recorded.
    handle: OnceLock<Histogram>,
}

impl FacadeHistogram {
    pub(super) fn new(metric: &'static Metric, key: Key) -> Self {
        Self { metric, key, handle: OnceLock::new() }
    }

    pub(super) fn record(&self, value: f64) {
        if let Some(handle) = self.handle.get() {
            return handle.record(value);
        }
        with_recorder(|recorder| {
            let handle = recorder.register_histogram(&self.key, &METADATA);
            handle.record(value);
            if has_address(recorder) && self.handle.set(handle).is_ok() {
                let (name, metric) = (KeyName::from(self.metric.series()), self.metric);
                recorder.describe_histogram(name, unit(metric), metric.help.into());
            }
        });
    }
}
