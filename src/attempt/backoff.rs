//! The delays between the attempts of a call: from a backoff, or from an iterator of the user.

use std::{fmt, sync::Arc, time::Duration};

use crate::error::ConfigError;

/// The delays between the attempts of a call.
///
/// By default the delay starts at 50 ms and doubles, to a maximum of 5 s, with full jitter: each delay is drawn evenly
/// from zero to the computed delay ("Exponential Backoff And Jitter", AWS Architecture Blog, 2015). No delay exceeds
/// [`max`](Self::max), including its jitter.
#[derive(Clone, Copy, Debug, PartialEq)]
#[must_use]
pub struct Backoff {
    shape: Shape,
    base: Duration,
    max: Duration,
    jitter: Jitter,
    throttled: Option<Duration>,
    seed: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Shape {
    /// `base × factorⁿ⁻¹`.
    Powers(f64),
    /// `base + step × (n - 1)`.
    Steps(Duration),
    /// Between the base and three times the previous delay.
    Decorrelated,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Jitter {
    None,
    /// From zero to the computed delay.
    Full,
    /// From half of the computed delay to all of it.
    Equal,
    /// The computed delay, plus or minus this share of it.
    Around(f64),
}

const DEFAULT_MAX: Duration = Duration::from_secs(5);

impl Backoff {
    const fn new(shape: Shape, base: Duration) -> Self {
        let max = if base.as_nanos() > DEFAULT_MAX.as_nanos() { base } else { DEFAULT_MAX };
        Self { shape, base, max, jitter: Jitter::Full, throttled: None, seed: None }
    }

    // ===== The shape =====

    /// Returns a backoff with the same delay each time, before jitter.
    pub const fn constant(delay: Duration) -> Self {
        Self::new(Shape::Powers(1.0), delay).max(delay)
    }

    /// Returns a backoff that starts at `base` and grows by `step`. The maximum is 5 s, or `base` if that is longer.
    pub const fn linear(base: Duration, step: Duration) -> Self {
        Self::new(Shape::Steps(step), base)
    }

    /// Returns a backoff that starts at `base` and doubles. The maximum is 5 s, or `base` if that is longer.
    pub const fn exponential(base: Duration) -> Self {
        Self::new(Shape::Powers(2.0), base)
    }

    /// Returns a backoff whose delays are drawn from `base` to three times the previous delay ("decorrelated jitter" in
    /// the article that [`Backoff`] cites). The maximum is 5 s, or `base` if that is longer. Other jitter settings have
    /// no effect, except that [`without_jitter`](Self::without_jitter) triples the delay each time.
    pub const fn decorrelated(base: Duration) -> Self {
        Self::new(Shape::Decorrelated, base)
    }

    /// Sets the factor by which the delay grows with each retry: 1 or more. Turns any other shape into an exponential
    /// one.
    pub const fn factor(mut self, factor: f64) -> Self {
        self.shape = Shape::Powers(factor);
        self
    }

    /// Sets the maximum delay, including jitter. Must not be below the base.
    pub const fn max(mut self, max: Duration) -> Self {
        self.max = max;
        self
    }

    /// Sets another base for throttled calls (429, 529, `RESOURCE_EXHAUSTED`), whose upstream is alive but overloaded.
    pub const fn throttled(mut self, base: Duration) -> Self {
        self.throttled = Some(base);
        self
    }

    // ===== The jitter =====

    /// Removes the jitter: the delays are the computed ones. Clients that fail together then retry together.
    pub const fn without_jitter(mut self) -> Self {
        self.jitter = Jitter::None;
        self
    }

    /// Draws each delay from zero to the computed delay. This is the default.
    pub const fn full_jitter(mut self) -> Self {
        self.jitter = Jitter::Full;
        self
    }

    /// Draws each delay from half of the computed delay to all of it.
    pub const fn equal_jitter(mut self) -> Self {
        self.jitter = Jitter::Equal;
        self
    }

    /// Draws each delay from the computed delay plus or minus this share of it: 0 to 1.
    pub const fn jitter_around(mut self, share: f64) -> Self {
        self.jitter = Jitter::Around(share);
        self
    }

    /// Sets the seed of the jitter, for tests. Every call then has the same delays.
    pub const fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    // ===== The delays =====

    /// Returns the delays of a call, in order. The iterator does not end.
    pub fn delays(self) -> Delays {
        let rng = self.seed.map_or_else(fastrand::Rng::new, fastrand::Rng::with_seed);
        Delays { backoff: self, made: 0, previous: Duration::ZERO, rng }
    }

    pub(crate) fn has_jitter(&self) -> bool {
        self.jitter != Jitter::None
    }

    /// Returns the delay before a retry, without jitter. The first retry is 1.
    fn computed(&self, base: Duration, retry: u32) -> Duration {
        let n = i32::try_from(retry).unwrap_or(i32::MAX);
        match self.shape {
            Shape::Powers(factor) => scaled(base, factor.powi(n - 1)),
            Shape::Steps(step) => base.saturating_add(step.saturating_mul(retry - 1)),
            Shape::Decorrelated => base,
        }
    }

    /// Checks the settings of the backoff.
    ///
    /// # Errors
    ///
    /// The factor is below 1 or not finite, the jitter is not within 0 to 1, or the maximum is below the base.
    pub fn check(&self) -> Result<(), ConfigError> {
        if let Shape::Powers(factor) = self.shape {
            if !(factor >= 1.0 && factor.is_finite()) {
                let remedy = "use 1 or more, such as 2";
                return Err(ConfigError::new("backoff.factor", factor, remedy));
            }
        }
        if let Jitter::Around(share) = self.jitter {
            if !(0.0..=1.0).contains(&share) {
                return Err(ConfigError::new("backoff.jitter", share, "use 0 to 1, such as 0.25"));
            }
        }
        let base = self.throttled.map_or(self.base, |throttled| throttled.max(self.base));
        if self.max < base {
            let remedy = format!("use at least the base, {base:?}");
            return Err(ConfigError::new("backoff.max", self.max, remedy));
        }
        Ok(())
    }
}

/// Multiplies a duration and saturates, where `mul_f64` panics on overflow. Zero stays zero: zero times infinity would
/// be NaN.
fn scaled(time: Duration, by: f64) -> Duration {
    if time.is_zero() {
        return time;
    }
    Duration::try_from_secs_f64(time.as_secs_f64() * by).unwrap_or(Duration::MAX)
}

impl Default for Backoff {
    fn default() -> Self {
        Self::exponential(Duration::from_millis(50))
    }
}

/// The delays of one call, from [`Backoff::delays`]. The iterator does not end.
#[derive(Clone, Debug)]
pub struct Delays {
    backoff: Backoff,
    made: u32,
    previous: Duration,
    rng: fastrand::Rng,
}

impl Delays {
    /// Returns the next delay, after a response that was throttled or not.
    pub(crate) fn draw(&mut self, throttled: bool) -> Duration {
        let Backoff { base, max, jitter, shape, .. } = self.backoff;
        let base = self.backoff.throttled.filter(|_| throttled).unwrap_or(base);
        self.made = self.made.saturating_add(1);
        let delay = if shape == Shape::Decorrelated {
            let upper = self.previous.saturating_mul(3).max(base).min(max);
            match (jitter, self.made) {
                (Jitter::None, _) => upper,
                // The first delay is drawn as if the previous delay had been the base.
                (_, 1) => self.between(base, base.saturating_mul(3).min(max)),
                _ => self.between(base, upper),
            }
        } else {
            let computed = self.backoff.computed(base, self.made).min(max);
            match jitter {
                Jitter::None => computed,
                Jitter::Full => self.between(Duration::ZERO, computed),
                Jitter::Equal => self.between(computed / 2, computed),
                Jitter::Around(share) => {
                    self.between(scaled(computed, 1.0 - share), scaled(computed, 1.0 + share))
                }
            }
        };
        self.previous = delay.min(max);
        self.previous
    }

    pub(crate) fn restart(&mut self) {
        self.made = 0;
        self.previous = Duration::ZERO;
    }

    fn between(&mut self, min: Duration, max: Duration) -> Duration {
        let spread = scaled(max.saturating_sub(min), self.rng.f64());
        min.saturating_add(spread).min(max)
    }
}

impl Iterator for Delays {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(self.draw(false))
    }
}

// ===== The delays of a call =====

type CustomDelays = dyn Iterator<Item = Duration> + Send;

/// The source of the delays of a call.
#[derive(Clone)]
pub(crate) enum DelaySource {
    Backoff(Backoff),
    Custom(Arc<dyn Fn() -> Box<CustomDelays> + Send + Sync>),
}

/// The delays of one call.
pub(crate) enum CallDelays {
    Backoff(Delays),
    Custom(Box<CustomDelays>),
}

impl From<Backoff> for DelaySource {
    fn from(backoff: Backoff) -> Self {
        Self::Backoff(backoff)
    }
}

impl DelaySource {
    pub(crate) fn start(&self) -> CallDelays {
        match self {
            Self::Backoff(backoff) => CallDelays::Backoff(backoff.delays()),
            Self::Custom(start) => CallDelays::Custom(start()),
        }
    }

    pub(crate) fn has_jitter(&self) -> bool {
        match self {
            Self::Backoff(backoff) => backoff.has_jitter(),
            Self::Custom(_) => true,
        }
    }
}

impl CallDelays {
    /// Returns the next delay. `None` if there is no further attempt.
    pub(crate) fn next(&mut self, throttled: bool) -> Option<Duration> {
        match self {
            Self::Backoff(delays) => Some(delays.draw(throttled)),
            Self::Custom(delays) => delays.next(),
        }
    }

    /// Restarts a backoff at its first delay. An iterator of the user continues.
    pub(crate) fn restart(&mut self) {
        if let Self::Backoff(delays) = self {
            delays.restart();
        }
    }
}

impl fmt::Debug for DelaySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Backoff(backoff) => backoff.fmt(f),
            Self::Custom(_) => f.write_str("Custom"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(backoff: Backoff, n: usize) -> Vec<u128> {
        backoff.without_jitter().delays().take(n).map(|delay| delay.as_millis()).collect()
    }

    const BASE: Duration = Duration::from_millis(25);

    #[test]
    fn each_shape_grows_up_to_its_maximum() {
        let max = Duration::from_millis(250);
        for (backoff, delays) in [
            (Backoff::exponential(BASE).max(max), [25, 50, 100, 200, 250, 250]),
            (Backoff::exponential(BASE).factor(3.0).max(max), [25, 75, 225, 250, 250, 250]),
            (Backoff::linear(BASE, BASE * 3).max(max), [25, 100, 175, 250, 250, 250]),
            (Backoff::constant(BASE), [25; 6]),
            (Backoff::decorrelated(BASE).max(max), [25, 75, 225, 250, 250, 250]),
            (Backoff::envoy(), [25, 50, 100, 200, 250, 250]),
            (Backoff::grpc(), [100, 200, 400, 800, 1000, 1000]),
            (Backoff::aws(), [50, 100, 200, 400, 800, 1600]),
        ] {
            assert_eq!(ms(backoff, 6), delays, "{backoff:?}");
        }
    }

    #[test]
    fn each_jitter_stays_in_its_range_and_fills_it() {
        let base = Backoff::constant(Duration::from_millis(100)).max(Duration::from_secs(9));
        for (backoff, min, max) in
            [(base, 0, 100), (base.equal_jitter(), 50, 100), (base.jitter_around(0.2), 80, 120)]
        {
            let delays: Vec<_> =
                backoff.delays().take(500).map(|delay| delay.as_secs_f64() * 1e3).collect();
            let (min, max) = (f64::from(min), f64::from(max));
            assert!(delays.iter().all(|delay| (min..=max).contains(delay)), "{backoff:?}");
            let edge = (max - min) / 10.0;
            assert!(delays.iter().any(|&delay| delay < min + edge), "{backoff:?}");
            assert!(delays.iter().any(|&delay| delay > max - edge), "{backoff:?}");
        }
        let mut previous = BASE;
        for delay in Backoff::decorrelated(BASE).delays().take(200) {
            assert!(
                delay >= BASE && delay <= (previous * 3).min(DEFAULT_MAX),
                "{delay:?} after {previous:?}"
            );
            previous = delay;
        }
    }

    #[test]
    fn delay_of_zero_stays_zero_for_any_number_of_retries() {
        let mut delays = Backoff::exponential(Duration::ZERO).without_jitter().delays();
        delays.made = 2000;
        assert_eq!(delays.draw(false), Duration::ZERO);
    }

    #[test]
    fn same_seed_yields_the_same_delays() {
        let seeded = |seed| Backoff::default().seed(seed).delays().take(9).collect::<Vec<_>>();
        assert_eq!(seeded(7), seeded(7));
        assert_ne!(seeded(7), seeded(8));
    }

    #[test]
    fn throttled_call_has_its_own_base() {
        let mut delays = Backoff::aws().without_jitter().delays();
        assert_eq!(delays.draw(true), Duration::from_secs(1));
        assert_eq!(delays.draw(true), Duration::from_secs(2));
        assert_eq!(delays.draw(false), Duration::from_millis(200));
    }

    proptest! {
        #[test]
        fn no_delay_exceeds_the_maximum_or_panics(
            base in any::<u64>(), max in any::<u64>(), factor in 1.0f64..1e300, skip in any::<u32>(),
            step in any::<u64>(),
        ) {
            let [base, max, step] = [base, max, step].map(Duration::from_nanos);
            for backoff in [
                Backoff::exponential(base).factor(factor),
                Backoff::envoy().factor(factor),
                Backoff::linear(base, step),
                Backoff::decorrelated(base),
                Backoff::exponential(base).jitter_around(0.2),
            ] {
                let mut delays = backoff.max(max).delays();
                delays.made = skip;
                prop_assert!(delays.draw(false) <= max);
                prop_assert!(delays.draw(true) <= max);
            }
        }
    }
}
