//! The counters of a retry layer.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

#[cfg(feature = "observe")]
use tokio::time::Instant;

#[cfg(feature = "observe")]
use crate::observe::{
    FixedHistogram, HistogramSnapshot, RETRY_BOUNDS, VisitHistogram, WAIT_BOUNDS,
    metrics::{RETRY_CALL_RETRIES, RETRY_DELAY},
};
use crate::{attempt::GiveUpReason, outcome::Reason};

/// The counters of one retry layer. On cache lines of their own, so that a retry does not invalidate the lines that
/// every call reads.
#[repr(align(128))]
pub(super) struct RetryCounters {
    /// Retries by the reason of the failure before them, in the order of [`Reason::ALL`].
    retries: [AtomicU64; Reason::ALL.len()],
    /// Calls that ended without a further attempt, in the order of [`GiveUpReason::ALL`].
    give_ups: [AtomicU64; GiveUpReason::ALL.len()],
    recoveries: AtomicU64,
    #[cfg(feature = "observe")]
    retries_per_call: FixedHistogram<{ RETRY_BOUNDS.len() + 1 }>,
    #[cfg(feature = "observe")]
    delays: FixedHistogram<{ WAIT_BOUNDS.len() + 1 }>,
}

impl RetryCounters {
    pub(super) fn new() -> Self {
        Self {
            retries: [const { AtomicU64::new(0) }; Reason::ALL.len()],
            give_ups: [const { AtomicU64::new(0) }; GiveUpReason::ALL.len()],
            recoveries: AtomicU64::new(0),
            #[cfg(feature = "observe")]
            retries_per_call: FixedHistogram::new(RETRY_BOUNDS),
            #[cfg(feature = "observe")]
            delays: FixedHistogram::new(WAIT_BOUNDS),
        }
    }

    /// Records a retry after a failure with this reason.
    pub(super) fn record_retry(&self, reason: Reason) {
        self.retries[reason as usize].fetch_add(1, Relaxed);
    }

    pub(super) fn record_give_up(&self, reason: GiveUpReason) {
        self.give_ups[reason as usize].fetch_add(1, Relaxed);
    }

    /// Records a call that succeeded after a retry.
    pub(super) fn record_recovery(&self) {
        self.recoveries.fetch_add(1, Relaxed);
    }

    /// Records a retried call that has ended: the number of its retries, and its time without an attempt in flight.
    pub(super) fn record_retried_call(&self, retries: u32, delay: Duration) {
        #[cfg(feature = "observe")]
        {
            self.retries_per_call.record_number(retries);
            self.delays.record(delay);
            self.delays.export(|| delay, Instant::now);
        }
        #[cfg(not(feature = "observe"))]
        let _ = (self, retries, delay);
    }

    /// Returns the number of retries by reason, in the order of [`Reason::ALL`].
    pub(super) fn retries(&self) -> [u64; Reason::ALL.len()] {
        self.retries.each_ref().map(|count| count.load(Relaxed))
    }

    /// Returns the number of calls that ended without a further attempt, in the order of [`GiveUpReason::ALL`].
    pub(super) fn give_ups(&self) -> [u64; GiveUpReason::ALL.len()] {
        self.give_ups.each_ref().map(|count| count.load(Relaxed))
    }

    #[cfg(feature = "observe")]
    pub(super) fn recoveries(&self) -> u64 {
        self.recoveries.load(Relaxed)
    }

    /// Returns the numbers of retries of the retried calls, and their times without an attempt in flight.
    #[cfg(feature = "observe")]
    pub(super) fn retried_calls(&self) -> [HistogramSnapshot; 2] {
        [self.retries_per_call.snapshot(), self.delays.snapshot()]
    }

    #[cfg(feature = "observe")]
    pub(super) fn visit_histograms(&self, to: &mut VisitHistogram<'_>) {
        to(&RETRY_CALL_RETRIES, &[], self.retries_per_call.export_cell());
        to(&RETRY_DELAY, &[], self.delays.export_cell());
    }
}
