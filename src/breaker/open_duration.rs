use std::time::Duration;

use crate::error::ConfigError;

/// The open time: for how long an open circuit rejects calls.
///
/// It is fixed, grows with each trip, or follows the hint of the upstream. A [`Duration`] converts to a fixed one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OpenDuration {
    base: Duration,
    factor: f64,
    max: Duration,
    jitter: f64,
    max_hint: Duration,
    reset_after: Duration,
}

impl OpenDuration {
    /// Returns an open time that is the same at each trip.
    #[must_use]
    pub const fn fixed(wait: Duration) -> Self {
        Self {
            base: wait,
            factor: 1.0,
            max: wait,
            jitter: 0.0,
            max_hint: Duration::ZERO,
            reset_after: Duration::from_secs(60),
        }
    }

    /// Returns an open time of `base` at the first trip, which doubles with each trip up to `max`. A random part of up
    /// to a tenth is added ([`jitter`](Self::jitter)). A circuit that stays closed for 60 s
    /// ([`reset_after`](Self::reset_after)) starts at `base` again.
    #[must_use]
    pub const fn backoff(base: Duration, max: Duration) -> Self {
        Self { factor: 2.0, max, jitter: 0.1, ..Self::fixed(base) }
    }

    /// Sets the factor by which the open time grows with each trip. Must be 1 or more.
    #[must_use]
    pub const fn factor(mut self, factor: f64) -> Self {
        self.factor = factor;
        self
    }

    /// Sets the maximum of the random part that is added, as a share of the open time: 0 to 1. The sum does not exceed
    /// the maximum, unless the factor is 1.
    #[must_use]
    pub const fn jitter(mut self, share: f64) -> Self {
        self.jitter = share;
        self
    }

    /// Follows the hint of the upstream (`Retry-After` or gRPC pushback) on the failure that trips the circuit: the
    /// open time is at least the hint. A hint counts as `max` if it is longer. It may exceed the maximum of the open
    /// time.
    #[must_use]
    pub const fn follow_retry_after(mut self, max: Duration) -> Self {
        self.max_hint = max;
        self
    }

    /// Sets for how long a circuit must stay closed until the next open time is the base again. 60 s by default.
    #[must_use]
    pub const fn reset_after(mut self, closed_for: Duration) -> Self {
        self.reset_after = closed_for;
        self
    }

    pub(super) const fn base(&self) -> Duration {
        self.base
    }

    pub(super) const fn reset_time(&self) -> Duration {
        self.reset_after
    }

    /// Returns the open time after `before` earlier trips since the trips were last forgotten. `rng` is drawn from
    /// [0, 1).
    pub(super) fn wait(&self, before: u32, hint: Option<Duration>, rng: f64) -> Duration {
        let growth = self.factor.powi(i32::try_from(before).unwrap_or(i32::MAX));
        let (base, max) = (self.base.as_secs_f64(), self.max.as_secs_f64());
        // Calculated in floating point, because the arithmetic of `Duration` panics if a product exceeds its range.
        let grown = (base * growth).min(max.max(base));
        let jittered = grown * (1.0 + self.jitter * rng);
        let capped = if self.factor > 1.0 { jittered.min(max.max(base)) } else { jittered };
        let wait = Duration::try_from_secs_f64(capped).unwrap_or(Duration::MAX);
        wait.max(hint.unwrap_or_default().min(self.max_hint))
    }

    /// Checks the settings.
    ///
    /// # Errors
    ///
    /// Returns an error for a time of zero, a factor that is below 1 or not finite, a maximum below the base, or a
    /// jitter outside of 0 to 1.
    pub fn check(&self) -> Result<(), ConfigError> {
        ConfigError::above_zero("open_for", self.base)?;
        if !(self.factor >= 1.0 && self.factor.is_finite()) {
            let remedy = "use 1 or more, such as 2";
            return Err(ConfigError::new("open_for.factor", self.factor, remedy));
        }
        if self.max < self.base {
            let remedy = format!("use at least the base, {:?}", self.base);
            return Err(ConfigError::new("open_for.max", self.max, remedy));
        }
        if !(0.0..=1.0).contains(&self.jitter) {
            let remedy = "use a share from 0 to 1, such as 0.1";
            return Err(ConfigError::new("open_for.jitter", self.jitter, remedy));
        }
        Ok(())
    }
}

impl From<Duration> for OpenDuration {
    fn from(wait: Duration) -> Self {
        Self::fixed(wait)
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn doubles_up_to_the_maximum_and_follows_the_server_up_to_a_bound() {
        let secs = Duration::from_secs;
        let wait = OpenDuration::backoff(secs(1), secs(5)).follow_retry_after(secs(60));
        let waits: Vec<_> = (0..5).map(|before| wait.wait(before, None, 0.0).as_secs()).collect();
        assert_eq!(waits, [1, 2, 4, 5, 5]);
        assert_eq!(wait.wait(0, Some(secs(30)), 0.0), secs(30));
        assert_eq!(wait.wait(0, Some(secs(300)), 0.0), secs(60));
        assert_eq!(wait.wait(9, None, 0.999), secs(5), "jitter stays below the maximum");
        assert_eq!(OpenDuration::fixed(secs(2)).wait(9, Some(secs(30)), 0.5), secs(2));
    }

    proptest! {
        #[test]
        fn never_panics_and_never_exceeds_its_maximum(
            base in 1u64..u64::MAX, more in any::<u64>(), factor in 1.0f64..1e9,
            jitter in 0.0f64..=1.0, before in any::<u32>(), rng in 0.0f64..1.0,
        ) {
            let (base, max) = (Duration::from_nanos(base), Duration::from_nanos(base.saturating_add(more)));
            let wait = OpenDuration::backoff(base, max).factor(factor).jitter(jitter);
            prop_assert!(wait.check().is_ok());
            let max_wait = max.as_secs_f64() * if factor > 1.0 { 1.0 } else { 1.0 + jitter };
            prop_assert!(wait.wait(before, None, rng).as_secs_f64() <= max_wait * 1.000_001);
        }
    }
}
