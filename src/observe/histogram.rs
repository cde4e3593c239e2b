//! A histogram with fixed bounds, which counts without a lock.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    exports::ExportCell,
    metric::{HistogramSnapshot, Metric},
    metrics::{CALL_DURATION, RETRY_CALL_RETRIES},
};
use crate::time::nanos;

/// The bounds for waits inside the process, in seconds.
pub(crate) const WAIT_BOUNDS: &[f64] =
    &[0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// The bounds for the durations of calls, in seconds: those of OpenTelemetry's `http.client.request.duration`.
pub(crate) const CALL_BOUNDS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];

/// The bounds for the number of retries of a call: those of gRFC A96.
pub(crate) const RETRY_BOUNDS: &[f64] = &[1.0, 2.0, 3.0, 4.0, 5.0, 10.0];

/// Returns the bounds of a histogram.
pub(super) fn bounds(metric: &'static Metric) -> &'static [f64] {
    match metric {
        _ if std::ptr::eq(metric, &CALL_DURATION) => CALL_BOUNDS,
        _ if std::ptr::eq(metric, &RETRY_CALL_RETRIES) => RETRY_BOUNDS,
        _ => WAIT_BOUNDS,
    }
}

/// A histogram of values that many threads record. `N` is the number of bounds plus one.
#[derive(Debug)]
pub(crate) struct FixedHistogram<const N: usize> {
    bounds: &'static [f64],
    counts: [AtomicU64; N],
    /// The sum of the values in units of 1e-9, which for times are nanoseconds.
    sum: AtomicU64,
    export: ExportCell,
}

impl<const N: usize> FixedHistogram<N> {
    pub(crate) fn new(bounds: &'static [f64]) -> Self {
        const { assert!(N > 0) };
        debug_assert_eq!(bounds.len() + 1, N);
        Self {
            bounds,
            counts: [const { AtomicU64::new(0) }; N],
            sum: AtomicU64::new(0),
            export: ExportCell::default(),
        }
    }

    /// Counts a time, without its export.
    #[inline]
    pub(crate) fn record(&self, time: Duration) {
        self.add(time.as_secs_f64(), nanos(time));
    }

    /// Exports a time that has been counted, if a registry needs it. Calls user code, so the caller holds no lock.
    #[inline]
    pub(crate) fn export(&self, time: impl FnOnce() -> Duration, now: impl FnOnce() -> Instant) {
        if let Some(export) = self.export.get() {
            let value = time().as_secs_f64();
            export.record(self.bucket(value), value, now);
        }
    }

    /// Counts and exports a number. Calls user code, so the caller holds no lock.
    pub(crate) fn record_number(&self, number: u32) {
        let value = f64::from(number);
        self.add(value, u64::from(number) * 1_000_000_000);
        if let Some(export) = self.export.get() {
            export.record(self.bucket(value), value, Instant::now);
        }
    }

    #[inline]
    fn bucket(&self, value: f64) -> usize {
        self.bounds.partition_point(|bound| *bound < value).min(N - 1)
    }

    #[inline]
    fn add(&self, value: f64, billionths: u64) {
        self.counts[self.bucket(value)].fetch_add(1, Relaxed);
        self.sum.fetch_add(billionths, Relaxed);
    }

    /// Returns the cell for the export.
    pub(crate) fn export_cell(&self) -> &ExportCell {
        &self.export
    }

    pub(crate) fn snapshot(&self) -> HistogramSnapshot {
        // `add` increases the counts before the sum, so the sum is read before the counts. `Relaxed` does not guarantee
        // this order, so counts and sum can differ by the values that other threads record at this moment.
        let sum = self.sum.load(Relaxed) as f64 / 1e9;
        let counts = self.counts.iter().map(|count| count.load(Relaxed)).collect();
        let exemplars = self.export.get().map(|export| export.exemplars()).unwrap_or_default();
        HistogramSnapshot { bounds: self.bounds, counts, sum, exemplars }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_equal_to_a_bound_is_in_its_bucket() {
        let histogram = FixedHistogram::<13>::new(WAIT_BOUNDS);
        for ms in [0, 1, 2, 250, 251, 20_000] {
            histogram.record(Duration::from_millis(ms));
        }
        let seen = histogram.snapshot();
        assert_eq!(seen.counts, [2, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1]);
        assert_eq!(seen.count(), 6);
        assert!((seen.sum - 20.504).abs() < 1e-9, "{}", seen.sum);
    }

    #[test]
    fn numbers_are_summed() {
        let histogram = FixedHistogram::<7>::new(RETRY_BOUNDS);
        [1, 2, 2, 11].iter().for_each(|number| histogram.record_number(*number));
        assert_eq!(histogram.snapshot().counts, [1, 2, 0, 0, 0, 0, 1]);
        assert_eq!(histogram.snapshot().sum, 16.0);
    }
}
