use std::ops::RangeInclusive;

use super::{
    super::check::{checked_bounds, checked_limit},
    algorithm::{Algorithm, ChangeReason, LimitChange, Sample},
};
use crate::error::ConfigError;

/// A limit with a fractional part, kept within its bounds.
#[derive(Clone, Debug)]
pub(super) struct BoundedLimit {
    limit: f64,
    min: f64,
    max: f64,
}

impl BoundedLimit {
    pub(super) const fn constant(initial: u32, min: u32, max: u32) -> Self {
        Self { limit: initial as f64, min: min as f64, max: max as f64 }
    }

    pub(super) fn new(initial: usize, bounds: RangeInclusive<usize>) -> Result<Self, ConfigError> {
        let (min, max) = checked_bounds(bounds.clone())?.into_inner();
        if !bounds.contains(&initial) {
            return Err(ConfigError::new("adaptive.initial", initial, "begin within the bounds"));
        }
        Ok(Self::constant(checked_limit(initial)?, min, max))
    }

    /// Returns the limit that is applied to calls, without the fractional part.
    pub(super) fn whole(&self) -> u32 {
        self.limit as u32
    }

    pub(super) fn get(&self) -> f64 {
        self.limit
    }

    pub(super) fn is_max(&self) -> bool {
        self.limit >= self.max
    }

    fn set(&mut self, limit: f64) {
        self.limit = limit.clamp(self.min, self.max);
    }

    /// Sets the bounds. Invalid bounds, which only a direct call of [`Algorithm::set_bounds`] can contain, are
    /// corrected to valid ones.
    fn set_bounds(&mut self, bounds: RangeInclusive<u32>) {
        let min = (*bounds.start()).max(1);
        (self.min, self.max) = (min.into(), (*bounds.end()).max(min).into());
        self.set(self.limit);
    }

    /// Sets the limit. Returns the change if the whole limit differs.
    pub(super) fn change(&mut self, limit: f64, reason: ChangeReason) -> Option<LimitChange> {
        let before = self.whole();
        self.set(limit);
        (self.whole() != before).then(|| LimitChange { limit: self.whole(), reason })
    }
}

/// An algorithm with a [`BoundedLimit`]: the part that its [`Algorithm`] does not share with others.
pub(super) trait BoundedAlgorithm: std::fmt::Debug + Send + 'static {
    fn bounded(&self) -> &BoundedLimit;

    fn bounded_mut(&mut self) -> &mut BoundedLimit;

    /// Discards the measurements that belong to another limit, after the limit or its bounds have been set.
    fn restart(&mut self) {}

    fn record(&mut self, sample: &Sample) -> Option<LimitChange>;
}

#[diagnostic::do_not_recommend]
impl<A: BoundedAlgorithm> Algorithm for A {
    fn limit(&self) -> u32 {
        self.bounded().whole()
    }

    fn set_limit(&mut self, limit: u32) {
        self.bounded_mut().set(limit.into());
        self.restart();
    }

    fn set_bounds(&mut self, bounds: RangeInclusive<u32>) -> bool {
        self.bounded_mut().set_bounds(bounds);
        self.restart();
        true
    }

    fn on_sample(&mut self, sample: &Sample) -> Option<LimitChange> {
        self.record(sample)
    }
}
