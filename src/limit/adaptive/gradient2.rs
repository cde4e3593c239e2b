use std::{ops::RangeInclusive, time::Duration};

use super::{
    algorithm::{ChangeReason, LimitChange, Sample},
    bounded::{BoundedAlgorithm, BoundedLimit},
};
use crate::error::ConfigError;

/// Adjusts the limit by the ratio of the long-term latency to the current latency.
///
/// Modelled on `Gradient2Limit` of Netflix over its `WindowedLimit`: windows of 1 s and 10 calls or more, smoothing
/// 0.2, a queue allowance of 4, tolerance 1.5, a long-term average over 600 windows. It does not use drops. Under
/// lasting overload its long-term average adapts to the latency of the queue: after about 20 minutes the limit is at
/// its upper bound.
#[derive(Clone, Debug)]
pub struct Gradient2 {
    limit: BoundedLimit,
    /// The long-term average of the latency, in seconds.
    long: f64,
    /// The number of windows in `long`, up to [`WARM_UP_WINDOWS`].
    windows: f64,
    window: LatencyWindow,
}

#[derive(Clone, Debug, Default)]
struct LatencyWindow {
    /// The earliest end of the window.
    ends: Option<Duration>,
    total: f64,
    calls: f64,
    in_flight: u32,
}

const WINDOW: Duration = Duration::from_secs(1);
/// The minimum number of calls in a window.
const MIN_CALLS: f64 = 10.0;
/// The number of windows of the long-term average.
const LONG_WINDOWS: f64 = 600.0;
/// The number of windows for which `long` is the mean of all windows.
const WARM_UP_WINDOWS: f64 = 10.0;

impl Default for Gradient2 {
    /// Starts at 20, within 20 to 200, as in Netflix.
    fn default() -> Self {
        Self {
            limit: BoundedLimit::constant(20, 20, 200),
            long: 0.0,
            windows: 0.0,
            window: LatencyWindow::default(),
        }
    }
}

impl Gradient2 {
    /// Returns an algorithm that starts at `initial` and keeps the limit within `bounds`.
    ///
    /// # Errors
    ///
    /// Returns an error if the bounds are invalid, or if `initial` is outside of them.
    pub fn new(initial: usize, bounds: RangeInclusive<usize>) -> Result<Self, ConfigError> {
        Ok(Self { limit: BoundedLimit::new(initial, bounds)?, ..Self::default() })
    }

    fn record_window(&mut self, short: f64) {
        if self.windows < WARM_UP_WINDOWS {
            self.windows += 1.0;
            self.long += (short - self.long) / self.windows;
        } else {
            self.long += (short - self.long) * 2.0 / (LONG_WINDOWS + 1.0);
        }
    }
}

impl BoundedAlgorithm for Gradient2 {
    fn bounded(&self) -> &BoundedLimit {
        &self.limit
    }

    fn bounded_mut(&mut self) -> &mut BoundedLimit {
        &mut self.limit
    }

    fn record(&mut self, sample: &Sample) -> Option<LimitChange> {
        self.window.total += sample.latency.as_secs_f64();
        self.window.calls += 1.0;
        self.window.in_flight = self.window.in_flight.max(sample.in_flight);
        let ends = *self.window.ends.get_or_insert(sample.now.saturating_add(WINDOW));
        if sample.now < ends || self.window.calls < MIN_CALLS {
            return None;
        }
        let window = std::mem::take(&mut self.window);
        let short = (window.total / window.calls).max(1e-9);
        self.record_window(short);
        if self.long / short > 2.0 {
            self.long *= 0.95;
        }
        let limit = self.limit.get();
        if u64::from(window.in_flight) * 2 < limit as u64 {
            return None;
        }
        let gradient = (1.5 * self.long / short).clamp(0.5, 1.0);
        let next = limit * 0.8 + 0.2 * (limit * gradient + 4.0);
        let reason = if next < limit { ChangeReason::Queued } else { ChangeReason::Headroom };
        self.limit.change(next, reason)
    }
}
