use std::time::Duration;

use crate::ConfigError;

/// How long to wait before the next attempt: exponential, with full jitter.
///
/// The nth wait is drawn evenly from zero to `base × factorⁿ⁻¹`, and never is longer than `max`
/// ("Exponential Backoff And Jitter", AWS Architecture Blog, 2015). By default 50 ms, doubling, up to
/// 5 s.
#[derive(Clone, Copy, Debug, PartialEq)]
#[must_use]
pub struct Backoff {
    base: Duration,
    factor: f64,
    max: Duration,
    jitter: bool,
}

impl Backoff {
    /// Starts at `base` and doubles, up to 5 s or `base`, whichever is longer.
    pub const fn exponential(base: Duration) -> Self {
        let max = Duration::from_secs(5);
        let max = if base.as_nanos() > max.as_nanos() { base } else { max };
        Self { base, factor: 2.0, max, jitter: true }
    }

    /// The same wait each time.
    pub const fn constant(wait: Duration) -> Self {
        Self { base: wait, factor: 1.0, max: wait, jitter: true }
    }

    /// What each wait is multiplied with for the next: 1 or more.
    pub const fn factor(mut self, factor: f64) -> Self {
        self.factor = factor;
        self
    }

    /// The longest wait, jitter included. Not below the base.
    pub const fn max(mut self, max: Duration) -> Self {
        self.max = max;
        self
    }

    /// Waits exactly the computed times. All clients that failed together then return together.
    pub const fn without_jitter(mut self) -> Self {
        self.jitter = false;
        self
    }

    /// The waits, first to last, for ever.
    pub fn delays(self) -> impl Iterator<Item = Duration> {
        (1..).map(move |retry| self.delay(retry))
    }

    /// The wait before this retry, 1 being the first.
    pub(super) fn delay(&self, retry: u32) -> Duration {
        let cap = self.cap(retry);
        if self.jitter { cap.mul_f64(fastrand::f64()) } else { cap }
    }

    /// The longest that the wait before this retry can be.
    pub(super) fn cap(&self, retry: u32) -> Duration {
        let growth = self.factor.powi(i32::try_from(retry.saturating_sub(1)).unwrap_or(i32::MAX));
        let nanos = self.base.as_nanos() as f64 * growth;
        // Not `mul_f64`: that one panics where the product leaves a Duration's range. No wait times
        // infinite growth is no number, which becomes 0.
        if nanos >= self.max.as_nanos() as f64 {
            self.max
        } else {
            Duration::from_nanos(nanos as u64)
        }
    }

    /// Whether it can work.
    ///
    /// # Errors
    ///
    /// A factor below 1 or not finite, or a maximum below the base.
    pub fn check(&self) -> Result<(), ConfigError> {
        if !(self.factor >= 1.0 && self.factor.is_finite()) {
            let remedy = "use 1 or more, such as 2";
            return Err(ConfigError::new("backoff.factor", self.factor, remedy));
        }
        if self.max < self.base {
            let remedy = format!("use at least the base, {:?}", self.base);
            return Err(ConfigError::new("backoff.max", self.max, remedy));
        }
        Ok(())
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self::exponential(Duration::from_millis(50))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn doubles_up_to_the_maximum() {
        let waits: Vec<_> = Backoff::exponential(Duration::from_millis(25))
            .max(Duration::from_millis(250))
            .without_jitter()
            .delays()
            .take(6)
            .map(|wait| wait.as_millis())
            .collect();
        assert_eq!(waits, [25, 50, 100, 200, 250, 250]);
    }

    #[test]
    fn no_wait_stays_no_wait_however_often() {
        let none = Backoff::exponential(Duration::ZERO).without_jitter();
        assert_eq!(none.delay(2000), Duration::ZERO);
    }

    proptest! {
        #[test]
        fn no_wait_is_ever_over_the_maximum_and_none_panics(
            base in any::<u64>(), max in any::<u64>(), factor in 1.0f64..1e300, retry in any::<u32>(),
        ) {
            let backoff = Backoff::exponential(Duration::from_nanos(base))
                .factor(factor)
                .max(Duration::from_nanos(max));
            prop_assert!(backoff.delay(retry) <= Duration::from_nanos(max));
        }
    }
}
