//! The latency of recent calls, for a delay that is a percentile of it.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::Instant;

use crate::sync::Mutex;
use crate::time::RecentLatency;

/// A percentile of the latency of recent calls.
pub(crate) struct LatencyPercentile {
    quantile: f64,
    /// The percentile in microseconds when it was last computed. 0 if too few calls are recorded.
    delay_us: AtomicU64,
    state: Mutex<PercentileState>,
}

struct PercentileState {
    recent: RecentLatency,
    /// The number of calls until the percentile is computed again.
    due: u32,
}

/// The minimum number of recorded calls for a delay. Fewer do not determine the 95th percentile.
const MIN_CALLS: u64 = 20;
/// The number of calls between two computations of the percentile.
const CALLS_PER_UPDATE: u32 = 16;
/// The minimum delay (that of Finagle's backup requests).
const MIN_DELAY: Duration = Duration::from_millis(1);

impl LatencyPercentile {
    pub(crate) fn new(quantile: f64) -> Self {
        let state = PercentileState { recent: RecentLatency::default(), due: 0 };
        Self { quantile, delay_us: AtomicU64::new(0), state: Mutex::new(state) }
    }

    /// Returns the same percentile, without records.
    pub(crate) fn fork(&self) -> Self {
        Self::new(self.quantile)
    }

    /// Returns the delay. `None` if too few calls are recorded.
    pub(crate) fn delay(&self) -> Option<Duration> {
        match self.delay_us.load(Ordering::Relaxed) {
            0 => None,
            us => Some(Duration::from_micros(us).max(MIN_DELAY)),
        }
    }

    /// Records the latency of a call that began at this time, or a lower bound of it.
    pub(crate) fn record(&self, began: Instant) {
        let now = Instant::now();
        let mut state = self.state.lock();
        let latency = now.saturating_duration_since(began);
        if !state.recent.record(latency, now) && state.due > 0 {
            state.due -= 1;
            return;
        }
        let delay = state.recent.percentile(self.quantile, now);
        let delay = delay.filter(|_| state.recent.count() >= MIN_CALLS);
        state.due = if delay.is_some() { CALLS_PER_UPDATE } else { 0 };
        let us =
            delay.map_or(0, |delay| u64::try_from(delay.as_micros()).unwrap_or(u64::MAX).max(1));
        self.delay_us.store(us, Ordering::Relaxed);
    }
}
