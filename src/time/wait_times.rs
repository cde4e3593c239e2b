//! The times that calls have waited in a queue, for metrics. Without the feature `observe`, nothing is recorded.

use std::time::Duration;

#[cfg(feature = "observe")]
use crate::observe::{FixedHistogram, HistogramSnapshot, WAIT_BOUNDS};

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

/// The waits that have ended, by result. In a box, so that they do not separate the fields that admissions use.
#[derive(Debug)]
#[cfg_attr(not(feature = "observe"), derive(Default))]
pub(crate) struct WaitTimes(
    #[cfg(feature = "observe")] Box<[FixedHistogram<{ WAIT_BOUNDS.len() + 1 }>; 3]>,
);

#[cfg(feature = "observe")]
impl Default for WaitTimes {
    fn default() -> Self {
        Self(Box::new(std::array::from_fn(|_| FixedHistogram::new(WAIT_BOUNDS))))
    }
}

#[cfg(feature = "observe")]
impl WaitTimes {
    pub(crate) fn record(&self, result: WaitResult, time: Duration) {
        self.0[result as usize].record(time);
    }

    /// Returns the waits of each result.
    pub(crate) fn snapshots(&self) -> [(&'static str, HistogramSnapshot); 3] {
        let [admitted, rejected, abandoned] = self.0.each_ref().map(FixedHistogram::snapshot);
        [("admitted", admitted), ("rejected", rejected), ("abandoned", abandoned)]
    }
}

#[cfg(not(feature = "observe"))]
impl WaitTimes {
    pub(crate) fn record(&self, _: WaitResult, _: Duration) {}
}
