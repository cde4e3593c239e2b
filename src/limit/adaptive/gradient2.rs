use std::{ops::RangeInclusive, time::Duration};

use super::{Algorithm, Bounds, Change, Reason, Sample};
use crate::ConfigError;

/// Follows the ratio between the latency of long and of now.
///
/// After Netflix's `Gradient2Limit` over its `WindowedLimit`: windows of 1 s with 10 calls or more,
/// smoothing 0.2, room for a queue of 4, tolerance 1.5, a long average of 600 windows. It hears no drops,
/// and its long average learns a queue that stands: after some twenty minutes of overload it is at its
/// upper bound.
#[derive(Clone, Debug)]
pub struct Gradient2 {
    limit: Bounds,
    long: f64,
    windows: f64,
    window: Window,
}

#[derive(Clone, Debug, Default)]
struct Window {
    ends: Option<Duration>,
    total: f64,
    calls: f64,
    in_flight: u32,
}

const WINDOW: Duration = Duration::from_secs(1);
const CALLS: f64 = 10.0;
const LONG: f64 = 600.0;
const WARM_UP: f64 = 10.0;

impl Default for Gradient2 {
    /// From 20 within 20 to 200: Netflix's.
    fn default() -> Self {
        Self {
            limit: Bounds::constant(20, 20, 200),
            long: 0.0,
            windows: 0.0,
            window: Window::default(),
        }
    }
}

impl Gradient2 {
    /// # Errors
    ///
    /// Bounds that are no bounds, or a beginning out of them.
    pub fn new(initial: usize, bounds: RangeInclusive<usize>) -> Result<Self, ConfigError> {
        Ok(Self { limit: Bounds::new(initial, bounds)?, ..Self::default() })
    }

    fn remember(&mut self, short: f64) {
        if self.windows < WARM_UP {
            self.windows += 1.0;
            self.long += (short - self.long) / self.windows;
        } else {
            self.long += (short - self.long) * 2.0 / (LONG + 1.0);
        }
    }
}

impl Algorithm for Gradient2 {
    fn limit(&self) -> u32 {
        self.limit.whole()
    }

    fn set_limit(&mut self, limit: u32) {
        self.limit.set(limit.into());
    }

    fn set_bounds(&mut self, bounds: RangeInclusive<u32>) -> bool {
        self.limit.set_bounds(bounds);
        true
    }

    fn hear(&mut self, sample: &Sample) -> Option<Change> {
        self.window.total += sample.latency.as_secs_f64();
        self.window.calls += 1.0;
        self.window.in_flight = self.window.in_flight.max(sample.in_flight);
        let ends = *self.window.ends.get_or_insert(sample.now.saturating_add(WINDOW));
        if sample.now < ends || self.window.calls < CALLS {
            return None;
        }
        let window = std::mem::take(&mut self.window);
        let short = (window.total / window.calls).max(1e-9);
        self.remember(short);
        if self.long / short > 2.0 {
            self.long *= 0.95;
        }
        let limit = self.limit.get();
        if u64::from(window.in_flight) * 2 < limit as u64 {
            return None;
        }
        let gradient = (1.5 * self.long / short).clamp(0.5, 1.0);
        let next = limit * 0.8 + 0.2 * (limit * gradient + 4.0);
        let reason = if next < limit { Reason::Queued } else { Reason::Room };
        self.limit.change(next, reason)
    }
}
