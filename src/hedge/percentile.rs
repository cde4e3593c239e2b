//! The latency of recent calls, for a delay that is a percentile of it.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{attempt::lock, time::RecentLatency};

/// A percentile of the latency of recent calls.
pub(crate) struct Live {
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
const LEAST: usize = 20;
/// The number of calls between two computations of the percentile.
const EVERY: u32 = 16;
/// The minimum delay (that of Finagle's backup requests).
const SHORTEST: Duration = Duration::from_millis(1);

impl Live {
    pub(crate) fn new(quantile: f64) -> Self {
        let state = PercentileState { recent: RecentLatency::new(), due: 0 };
        Self { quantile, delay_us: AtomicU64::new(0), state: Mutex::new(state) }
    }

    /// Returns the delay. `None` if too few calls are recorded.
    pub(crate) fn delay(&self) -> Option<Duration> {
        match self.delay_us.load(Ordering::Relaxed) {
            0 => None,
            us => Some(Duration::from_micros(us).max(SHORTEST)),
        }
    }

    /// Records the latency of a call, or a lower bound of it.
    pub(crate) fn took(&self, time: Duration) {
        let mut state = lock(&self.state);
        if !state.recent.add(time) && state.due > 0 {
            state.due -= 1;
            return;
        }
        let (count, delay) = state.recent.quantile(self.quantile);
        let delay = delay.filter(|_| count >= LEAST);
        state.due = if delay.is_some() { EVERY } else { 0 };
        let us = delay.map_or(0, |delay| ((delay * 1e6) as u64).max(1));
        self.delay_us.store(us, Ordering::Relaxed);
    }
}
