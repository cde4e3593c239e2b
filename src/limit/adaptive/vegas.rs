use std::{ops::RangeInclusive, time::Duration};

use super::{
    algorithm::{ChangeReason, LimitChange, Sample},
    bounded::{BoundedAlgorithm, BoundedLimit},
};
use crate::error::ConfigError;

/// Estimates the number of calls that queue in the upstream from the minimum latency, and keeps it small.
///
/// Modelled on `VegasLimit` of Netflix. From time to time it replaces the minimum latency by the current latency. Under
/// lasting overload that includes the time in the queue, so the limit drifts up.
#[derive(Clone, Debug)]
pub struct Vegas {
    limit: BoundedLimit,
    /// The minimum latency since the last probe.
    min_latency: Option<Duration>,
    /// The number of calls since the last probe.
    since_probe: f64,
    /// The factor by which the interval of the next probe is shortened, so that clients do not probe at the same time.
    jitter: f64,
    rng: fastrand::Rng,
}

/// The interval of probes in calls, as a multiple of the limit. A probe replaces the minimum latency by that of the
/// current call.
const PROBE: f64 = 30.0;

impl Default for Vegas {
    /// Starts at 20, within 1 to 1000, as in Netflix.
    fn default() -> Self {
        Self {
            limit: BoundedLimit::constant(20, 1, 1000),
            min_latency: None,
            since_probe: 0.0,
            jitter: 1.0,
            rng: fastrand::Rng::with_seed(1),
        }
    }
}

impl Vegas {
    /// Returns an algorithm that starts at `initial` and keeps the limit within `bounds`.
    ///
    /// # Errors
    ///
    /// Returns an error if the bounds are invalid, or if `initial` is outside of them.
    pub fn new(initial: usize, bounds: RangeInclusive<usize>) -> Result<Self, ConfigError> {
        Ok(Self { limit: BoundedLimit::new(initial, bounds)?, ..Self::default() })
    }
}

impl BoundedAlgorithm for Vegas {
    fn bounded(&self) -> &BoundedLimit {
        &self.limit
    }

    fn bounded_mut(&mut self) -> &mut BoundedLimit {
        &mut self.limit
    }

    fn record(&mut self, sample: &Sample) -> Option<LimitChange> {
        let limit = self.limit.get();
        self.since_probe += 1.0;
        if self.since_probe >= PROBE * limit * self.jitter {
            self.since_probe = 0.0;
            self.jitter = 0.5 + self.rng.f64() / 2.0;
            self.min_latency = Some(sample.latency);
            return None;
        }
        let min_latency = match self.min_latency {
            Some(min_latency) if min_latency <= sample.latency => min_latency,
            _ => {
                self.min_latency = Some(sample.latency);
                return None;
            }
        };
        let step = limit.log10().floor().max(1.0);
        if sample.dropped {
            return self.limit.change(limit - step, ChangeReason::Dropped);
        }
        if sample.is_idle(self.limit.whole()) {
            return None;
        }
        let ratio = min_latency.as_secs_f64() / sample.latency.as_secs_f64().max(1e-9);
        let queue = (limit * (1.0 - ratio)).ceil();
        let (alpha, beta) = (3.0 * step, 6.0 * step);
        if queue <= step {
            self.limit.change(limit + beta, ChangeReason::Headroom)
        } else if queue < alpha {
            self.limit.change(limit + step, ChangeReason::Headroom)
        } else if queue > beta {
            self.limit.change(limit - step, ChangeReason::Queued)
        } else {
            None
        }
    }
}
