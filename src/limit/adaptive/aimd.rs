use std::{ops::RangeInclusive, time::Duration};

use super::{Algorithm, Bounds, Change, Reason, Sample};
use crate::ConfigError;

/// One more for a call that was answered while the limit was in use, a tenth less for one that was
/// dropped or took too long.
///
/// After Netflix's `AIMDLimit`, with at most one cut per round trip: with one per call, a single
/// congested round trip costs a third of the throughput. It needs a timeout that means something: below
/// it a queue may stand for ever.
#[derive(Clone, Debug)]
pub struct Aimd {
    limit: Bounds,
    timeout: Duration,
    cut_at: Option<Duration>,
}

const BACKOFF: f64 = 0.9;

impl Default for Aimd {
    /// From 20 within 20 to 200, with a timeout of 5 s: Netflix's.
    fn default() -> Self {
        Self { limit: Bounds::constant(20, 20, 200), timeout: Duration::from_secs(5), cut_at: None }
    }
}

impl Aimd {
    /// # Errors
    ///
    /// Bounds that are no bounds, or a beginning out of them.
    pub fn new(initial: usize, bounds: RangeInclusive<usize>) -> Result<Self, ConfigError> {
        Ok(Self { limit: Bounds::new(initial, bounds)?, ..Self::default() })
    }

    /// A call that takes longer than this counts as dropped: 5 s by default.
    ///
    /// # Errors
    ///
    /// Zero.
    pub fn timeout(mut self, timeout: Duration) -> Result<Self, ConfigError> {
        self.timeout = ConfigError::above_zero("adaptive.timeout", timeout)?;
        Ok(self)
    }
}

impl Algorithm for Aimd {
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
        if sample.dropped || sample.latency > self.timeout {
            if self.cut_at.is_some_and(|at| sample.started() < at) {
                return None;
            }
            self.cut_at = Some(sample.now);
            return self.limit.change((limit * BACKOFF).floor(), Reason::Dropped);
        }
        if sample.is_idle(self.limit.whole()) {
            return None;
        }
        self.limit.change(limit + 1.0, Reason::Room)
    }
}
