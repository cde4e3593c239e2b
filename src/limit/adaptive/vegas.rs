use std::{ops::RangeInclusive, time::Duration};

use super::{Algorithm, Bounds, Change, Reason, Sample};
use crate::ConfigError;

/// Reckons how many calls stand in a queue from the quickest call seen, and keeps it small.
///
/// After Netflix's `VegasLimit`. Now and then it takes the latency of the moment for that of the
/// quickest call: under lasting overload that is the queue's, and the limit drifts up.
#[derive(Clone, Debug)]
pub struct Vegas {
    limit: Bounds,
    quickest: Option<Duration>,
    since_probe: f64,
    jitter: f64,
    dice: fastrand::Rng,
}

/// The quickest call is forgotten after so many times the limit of calls.
const PROBE: f64 = 30.0;

impl Default for Vegas {
    /// From 20 within 1 to 1000: Netflix's.
    fn default() -> Self {
        Self {
            limit: Bounds::constant(20, 1, 1000),
            quickest: None,
            since_probe: 0.0,
            jitter: 1.0,
            dice: fastrand::Rng::with_seed(1),
        }
    }
}

impl Vegas {
    /// # Errors
    ///
    /// Bounds that are no bounds, or a beginning out of them.
    pub fn new(initial: usize, bounds: RangeInclusive<usize>) -> Result<Self, ConfigError> {
        Ok(Self { limit: Bounds::new(initial, bounds)?, ..Self::default() })
    }
}

impl Algorithm for Vegas {
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
        let limit = self.limit.get();
        self.since_probe += 1.0;
        if self.since_probe >= PROBE * limit * self.jitter {
            self.since_probe = 0.0;
            self.jitter = 0.5 + self.dice.f64() / 2.0;
            self.quickest = Some(sample.latency);
            return None;
        }
        let quickest = match self.quickest {
            Some(quickest) if quickest <= sample.latency => quickest,
            _ => {
                self.quickest = Some(sample.latency);
                return None;
            }
        };
        let step = limit.log10().floor().max(1.0);
        if sample.dropped {
            return self.limit.change(limit - step, Reason::Dropped);
        }
        if sample.is_idle(self.limit.whole()) {
            return None;
        }
        let ratio = quickest.as_secs_f64() / sample.latency.as_secs_f64().max(1e-9);
        let queue = (limit * (1.0 - ratio)).ceil();
        let (alpha, beta) = (3.0 * step, 6.0 * step);
        if queue <= step {
            self.limit.change(limit + beta, Reason::Room)
        } else if queue < alpha {
            self.limit.change(limit + step, Reason::Room)
        } else if queue > beta {
            self.limit.change(limit - step, Reason::Queued)
        } else {
            None
        }
    }
}
