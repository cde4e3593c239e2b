use std::time::Duration;

use tokio::time::Instant;

use super::threshold::ProbeState;
use crate::{
    ConfigError,
    call::{Nanos, nanos},
};

/// When to look, and how long a look may take: of probes and of checks.
#[derive(Clone, Debug)]
pub(super) struct Schedule {
    pub(super) every: Duration,
    /// Instead of `every`, from the first failure to the first success that makes all well again.
    pub(super) every_while_down: Option<Duration>,
    pub(super) timeout: Duration,
    pub(super) jitter: f64,
}

impl Schedule {
    pub(super) const DEFAULT: Self = Self {
        every: Duration::from_secs(5),
        every_while_down: None,
        timeout: Duration::from_secs(1),
        jitter: 0.1,
    };

    /// How long to wait after a look that left things so.
    pub(super) fn wait(&self, state: ProbeState, failing: bool) -> Duration {
        let suspect = failing || state == ProbeState::Down;
        let every = self.every_while_down.filter(|_| suspect).unwrap_or(self.every);
        jittered(every, self.jitter)
    }

    /// When a look that begins now has taken too long. Beyond what a clock can tell there is no deadline to
    /// miss.
    pub(super) fn deadline(timeout: Duration) -> Instant {
        let far = Duration::from_secs(86_400 * 365);
        let now = Instant::now();
        now.checked_add(timeout.min(far)).unwrap_or(now)
    }

    /// How long after the beginning of a look its result must be there, if its runtime works at all.
    pub(super) fn patience(&self) -> Nanos {
        nanos(self.timeout.saturating_add(self.every.max(Duration::from_secs(1))))
    }
}

/// `every`, or up to `jitter` of it longer. Never panics, whatever the two are.
fn jittered(every: Duration, jitter: f64) -> Duration {
    let most = (nanos(every) as f64 * jitter) as u64;
    every.saturating_add(Duration::from_nanos(fastrand::u64(..=most)))
}

// ===== Settings =====

pub(super) fn checked_jitter(ratio: f64) -> Result<f64, ConfigError> {
    match ratio {
        0.0..=1.0 => Ok(ratio),
        _ => Err(ConfigError::new("jitter", ratio, "use a ratio from 0 to 1")),
    }
}

pub(super) fn checked_thresholds(rise: u32, fall: u32) -> Result<(u32, u32), ConfigError> {
    for (field, value) in [("thresholds.rise", rise), ("thresholds.fall", fall)] {
        if value == 0 {
            return Err(ConfigError::new(field, value, "use 1 probe or more"));
        }
    }
    Ok((rise, fall))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jitter_only_adds_and_survives_the_extremes() {
        let second = Duration::from_secs(1);
        assert_eq!(jittered(second, 0.0), second);
        for _ in 0..1000 {
            let wait = jittered(second, 0.1);
            assert!(second <= wait && wait <= second.mul_f64(1.1), "{wait:?}");
        }
        assert_eq!(jittered(Duration::MAX, 1.0), Duration::MAX);
    }

    #[test]
    fn faster_from_the_first_failure_until_all_is_well() {
        use ProbeState::{Down, Unknown, Up};
        let second = Duration::from_secs(1);
        let schedule =
            Schedule { jitter: 0.0, every_while_down: Some(second), ..Schedule::DEFAULT };
        for (state, failing, fast) in [
            (Unknown, false, false),
            (Up, false, false),
            (Unknown, true, true),
            (Up, true, true),
            (Down, true, true),
            (Down, false, true),
        ] {
            let wait = schedule.wait(state, failing);
            assert_eq!(wait == second, fast, "{state} {failing}");
        }
    }
}
