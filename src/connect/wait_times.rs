//! The times that callers have waited in the queue, by the result of the wait.

use crate::time::Nanos;

#[cfg(feature = "observe")]
use crate::observe::{FixedHistogram, HistogramSnapshot, WAIT_BOUNDS};

/// The result of a wait in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WaitResult {
    Admitted,
    /// The maximum wait was over.
    Rejected,
    /// The caller has left the queue: it was cancelled, or it needs no permit any more.
    Abandoned,
}

/// The times of the queue entries that have ended. Without the feature `observe` it is empty.
#[derive(Debug)]
pub(super) struct WaitTimes {
    /// In the order of [`WaitResult`].
    #[cfg(feature = "observe")]
    by_result: [FixedHistogram<13>; 3],
}

impl Default for WaitTimes {
    fn default() -> Self {
        Self {
            #[cfg(feature = "observe")]
            by_result: std::array::from_fn(|_| FixedHistogram::new(WAIT_BOUNDS)),
        }
    }
}

impl WaitTimes {
    pub(super) fn record(&self, result: WaitResult, waited: Nanos) {
        #[cfg(feature = "observe")]
        self.by_result[result as usize].record(std::time::Duration::from_nanos(waited));
        let _ = (result, waited);
    }

    /// Returns the label and the times of each result.
    #[cfg(feature = "observe")]
    pub(super) fn snapshot(&self) -> impl Iterator<Item = (&'static str, HistogramSnapshot)> {
        let labels = ["admitted", "rejected", "abandoned"].into_iter();
        labels.zip(self.by_result.iter().map(FixedHistogram::snapshot))
    }
}
