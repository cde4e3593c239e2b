use std::time::Duration;

use tokio::time::Instant;

use super::threshold::ProbeState;
use crate::{
    error::ConfigError,
    time::{Nanos, nanos},
};

/// The times of the runs of a probe or a check.
#[derive(Clone, Debug)]
pub(super) struct Schedule {
    pub(super) every: Duration,
    /// Replaces `every` from the first failure until the state is up and a run has passed.
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

    /// Returns the delay before the next run, after a run that ended in this state. `failing`: the last result was a
    /// failure.
    pub(super) fn delay(&self, state: ProbeState, failing: bool) -> Duration {
        let suspect = failing || state == ProbeState::Down;
        let every = self.every_while_down.filter(|_| suspect).unwrap_or(self.every);
        jittered(every, self.jitter)
    }

    /// Returns the deadline of a run that begins now. Timeouts above one year are reduced to it, because the clock may
    /// not represent a later instant.
    pub(super) fn deadline(timeout: Duration) -> Instant {
        let max = Duration::from_secs(86_400 * 365);
        let now = Instant::now();
        now.checked_add(timeout.min(max)).unwrap_or(now)
    }

    /// Returns the time from the start of a run after which its result is overdue, so that its runtime must be blocked.
    pub(super) fn max_run_time(&self) -> Nanos {
        nanos(self.timeout.saturating_add(self.every.max(Duration::from_secs(1))))
    }
}

/// Returns `every` plus a random share of it from 0 to `jitter`. Does not panic for any values.
fn jittered(every: Duration, jitter: f64) -> Duration {
    let max = (nanos(every) as f64 * jitter) as u64;
    every.saturating_add(Duration::from_nanos(fastrand::u64(..=max)))
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
    fn jitter_only_adds_also_to_extreme_values() {
        let second = Duration::from_secs(1);
        assert_eq!(jittered(second, 0.0), second);
        for _ in 0..1000 {
            let delay = jittered(second, 0.1);
            assert!(second <= delay && delay <= second.mul_f64(1.1), "{delay:?}");
        }
        assert_eq!(jittered(Duration::MAX, 1.0), Duration::MAX);
    }

    #[test]
    fn every_while_down_applies_from_the_first_failure_until_a_run_has_passed() {
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
            let delay = schedule.delay(state, failing);
            assert_eq!(delay == second, fast, "{state} {failing}");
        }
    }
}
