//! The times that calls have waited in a queue, for metrics. Without the feature `observe`, nothing is recorded.

#[cfg(feature = "observe")]
use std::sync::Arc;
use std::time::Duration;

#[cfg(feature = "observe")]
use tokio::time::Instant;

#[cfg(feature = "observe")]
use crate::observe::{
    FixedHistogram, HistogramSnapshot, VisitHistogram, WAIT_BOUNDS, metrics::QUEUE_WAIT_DURATION,
};

/// The end of a wait.
#[derive(Clone, Copy, Debug)]
pub(crate) enum WaitResult {
    /// The entry received a permit. The permit is passed on if the call has been dropped or its deadline has passed.
    Admitted,
    /// The maximum wait or the deadline passed, or a call of higher priority displaced the entry.
    Rejected,
    /// The caller dropped the call, or needs no permit any more.
    Abandoned,
}

/// The waits that have ended, by result. Clones share them, so that a queue counts a wait under its lock, and the waits
/// are exported and read without it.
#[derive(Clone, Debug)]
#[cfg_attr(not(feature = "observe"), derive(Default))]
pub(crate) struct WaitTimes(
    #[cfg(feature = "observe")] Arc<[FixedHistogram<{ WAIT_BOUNDS.len() + 1 }>; 3]>,
);

#[cfg(feature = "observe")]
const RESULTS: [&str; 3] = ["admitted", "rejected", "abandoned"];

#[cfg(feature = "observe")]
impl Default for WaitTimes {
    fn default() -> Self {
        Self(Arc::new(std::array::from_fn(|_| FixedHistogram::new(WAIT_BOUNDS))))
    }
}

#[cfg(feature = "observe")]
impl WaitTimes {
    /// Counts a wait.
    pub(crate) fn record(&self, result: WaitResult, time: Duration) {
        self.0[result as usize].record(time);
    }

    /// Exports a wait that has been counted, if a registry needs it. It runs user code, so the caller must hold no
    /// lock.
    pub(crate) fn export(&self, result: WaitResult, time: impl FnOnce() -> Duration) {
        self.0[result as usize].export(time, Instant::now);
    }

    /// Returns the waits of each result.
    pub(crate) fn snapshots(&self) -> [(&'static str, HistogramSnapshot); 3] {
        let [admitted, rejected, abandoned] = RESULTS;
        let [a, r, b] = self.0.each_ref().map(FixedHistogram::snapshot);
        [(admitted, a), (rejected, r), (abandoned, b)]
    }

    /// Visits the histogram of each result.
    pub(crate) fn visit(&self, layer: &'static str, to: &mut VisitHistogram<'_>) {
        for (result, times) in RESULTS.into_iter().zip(&*self.0) {
            let labels = [("layer", layer), ("result", result)];
            to(&QUEUE_WAIT_DURATION, &labels, times.export_cell());
        }
    }
}

#[cfg(not(feature = "observe"))]
impl WaitTimes {
    pub(crate) fn record(&self, _: WaitResult, _: Duration) {}

    pub(crate) fn export(&self, _: WaitResult, _: impl FnOnce() -> Duration) {}
}
