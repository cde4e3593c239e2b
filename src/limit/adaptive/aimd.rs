use std::{ops::RangeInclusive, time::Duration};

use super::{
    algorithm::{ChangeReason, LimitChange, Sample},
    bounded::{BoundedAlgorithm, BoundedLimit},
};
use crate::error::ConfigError;

/// Additive increase, multiplicative decrease: adds 1 for each response while at least half of the limit is in use, and
/// subtracts a tenth for a call that was dropped or took longer than the timeout.
///
/// Modelled on `AIMDLimit` of Netflix, but with one decrease per round trip: with one per call, a single congested
/// round trip costs a third of the throughput. The timeout has to be close to the latency that is acceptable, because a
/// queue whose latency stays below it is never detected.
#[derive(Clone, Debug)]
pub struct Aimd {
    limit: BoundedLimit,
    timeout: Duration,
    /// The time of the last decrease. Calls that began before it do not decrease the limit again.
    cut_at: Option<Duration>,
}

const BACKOFF: f64 = 0.9;

impl Default for Aimd {
    /// Starts at 20, within 20 to 200, with a timeout of 5 s, as in Netflix.
    fn default() -> Self {
        Self {
            limit: BoundedLimit::constant(20, 20, 200),
            timeout: Duration::from_secs(5),
            cut_at: None,
        }
    }
}

impl Aimd {
    /// Returns an algorithm that starts at `initial` and keeps the limit within `bounds`.
    ///
    /// # Errors
    ///
    /// Returns an error if the bounds are invalid, or if `initial` is outside of them.
    pub fn new(initial: usize, bounds: RangeInclusive<usize>) -> Result<Self, ConfigError> {
        Ok(Self { limit: BoundedLimit::new(initial, bounds)?, ..Self::default() })
    }

    /// Sets the latency above which a call counts as dropped. 5 s by default.
    ///
    /// # Errors
    ///
    /// Returns an error for zero.
    pub fn timeout(mut self, timeout: Duration) -> Result<Self, ConfigError> {
        self.timeout = ConfigError::above_zero("adaptive.timeout", timeout)?;
        Ok(self)
    }
}

impl BoundedAlgorithm for Aimd {
    fn bounded(&self) -> &BoundedLimit {
        &self.limit
    }

    fn bounded_mut(&mut self) -> &mut BoundedLimit {
        &mut self.limit
    }

    fn record(&mut self, sample: &Sample) -> Option<LimitChange> {
        let limit = self.limit.get();
        if sample.dropped || sample.latency > self.timeout {
            if self.cut_at.is_some_and(|at| sample.started() < at) {
                return None;
            }
            self.cut_at = Some(sample.now);
            return self.limit.change((limit * BACKOFF).floor(), ChangeReason::Dropped);
        }
        if sample.is_idle(self.limit.whole()) {
            return None;
        }
        self.limit.change(limit + 1.0, ChangeReason::Headroom)
    }
}
