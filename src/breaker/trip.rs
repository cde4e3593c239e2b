use std::{fmt, sync::Arc, time::Duration};

use crate::{error::ConfigError, outcome::Outcome};

/// The rule by which a circuit opens, or several rules of which the first to trip opens it.
///
/// Thresholds are inclusive: `consecutive(5)` opens at the fifth failure, `failure_ratio(0.5)` at half of the calls.
/// Rules are evaluated when a call fails or is slow.
///
/// ```
/// # use std::time::Duration;
/// use buttress::Trip;
///
/// let rule = Trip::any([
///     Trip::consecutive(5),
///     Trip::failure_ratio(0.5).within(Duration::from_secs(10)).min_calls(20),
///     Trip::slow_ratio(0.8, Duration::from_secs(2)).over(100),
/// ]);
/// ```
#[derive(Clone, Debug)]
pub struct Trip {
    pub(super) rules: Vec<TripRule>,
}

#[derive(Clone)]
pub(super) enum TripRule {
    Consecutive { failures: u32 },
    Ratio(Ratio),
    When(Arc<Closure>),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Ratio {
    pub(super) of: Bad,
    pub(super) limit: f64,
    pub(super) span: WindowSpan,
    pub(super) min_calls: u32,
    /// One of 16 good calls reads the clock. The others count as of the last reading.
    pub(super) coarse: bool,
}

/// A closure of the user that decides whether the circuit opens.
pub(super) type Closure = dyn Fn(&CallStats) -> bool + Send + Sync;

/// The kind of calls that a ratio counts as bad.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Bad {
    Failed,
    /// A call of this duration or longer.
    Slow(Duration),
}

/// The extent of a ratio's window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WindowSpan {
    Time(Duration),
    Calls(u32),
}

/// The counts of a circuit since it closed, as the argument of [`Trip::when`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CallStats {
    /// The number of consecutive failures.
    pub consecutive_failures: u32,
    /// The maximum number of calls in any window of the ratio rules.
    pub window_calls: u64,
    /// The maximum number of failures in the window of any [failure ratio](Trip::failure_ratio).
    pub window_failures: u64,
    /// The maximum number of slow calls in the window of any [slow ratio](Trip::slow_ratio).
    pub window_slow: u64,
}

/// The maximum number of calls of a window. Their bits occupy 125 KB.
const MAX_WINDOW_CALLS: u32 = 1_000_000;

impl Trip {
    fn of(rule: TripRule) -> Self {
        Self { rules: vec![rule] }
    }

    fn ratio(of: Bad, limit: f64) -> Self {
        let span = WindowSpan::Time(Duration::from_secs(10));
        Self::of(TripRule::Ratio(Ratio { of, limit, span, min_calls: 20, coarse: false }))
    }

    /// Opens the circuit after this number of failures in a row: 1 or more. A success resets the count. Throttled and
    /// cancelled calls do not change it.
    #[must_use]
    pub fn consecutive(failures: u32) -> Self {
        Self::of(TripRule::Consecutive { failures })
    }

    /// Opens the circuit when at least this share of the calls in a window has failed: above 0, at most 1.
    ///
    /// By default the window is the last 10 s ([`within`](Self::within), [`over`](Self::over)) and must contain 20
    /// calls ([`min_calls`](Self::min_calls)). The cost of a call does not depend on the number of calls in the window.
    #[must_use]
    pub fn failure_ratio(ratio: f64) -> Self {
        Self::ratio(Bad::Failed, ratio)
    }

    /// Opens the circuit when at least this share of the calls in a window was slow. The window and the share are those
    /// of [`failure_ratio`](Self::failure_ratio).
    ///
    /// A call is slow if the upstream had it for `slow` or longer before its response head, or before its end if it had
    /// none. A call that is cancelled after that time counts as slow, so that a timeout outside of the breaker does not
    /// hide a hung upstream. Each call reads the clock twice.
    #[must_use]
    pub fn slow_ratio(ratio: f64, slow: Duration) -> Self {
        Self::ratio(Bad::Slow(slow), ratio)
    }

    /// Opens the circuit when this closure returns `true`. Its argument has the failures in a row and the contents of
    /// all windows.
    ///
    /// It runs under a lock when a call fails or is slow. It must be short and must not use a handle of this breaker,
    /// which would deadlock. A panic is caught, also while the thread unwinds, and means `false`.
    #[must_use]
    pub fn when(rule: impl Fn(&CallStats) -> bool + Send + Sync + 'static) -> Self {
        Self::of(TripRule::When(Arc::new(rule)))
    }

    /// Sets the window of the ratio to a duration: 10 ms or more. The window slides by a tenth of the duration.
    #[must_use]
    pub fn within(self, length: Duration) -> Self {
        self.with_ratio(|ratio| ratio.span = WindowSpan::Time(length))
    }

    /// Sets the window of the ratio to a number of last calls: 1 to 1,000,000. It must not be smaller than
    /// [`min_calls`](Self::min_calls), which is 20 by default.
    #[must_use]
    pub fn over(self, calls: u32) -> Self {
        self.with_ratio(|ratio| ratio.span = WindowSpan::Calls(calls))
    }

    /// Sets the minimum number of calls in the window of the ratio. With fewer calls the ratio does not open the
    /// circuit. 20 by default; must be 1 or more, and not more than a window of calls holds.
    #[must_use]
    pub fn min_calls(self, calls: u32) -> Self {
        self.with_ratio(|ratio| ratio.min_calls = calls)
    }

    /// Lets only one of 16 good calls read the clock, which is the largest part of the cost of a time window.
    ///
    /// The other good calls count as of the last reading, so up to 15 of them leave the window early. Calls that fail
    /// or are slow always read the clock, and with a [`slow_ratio`](Self::slow_ratio) each call does.
    #[must_use]
    pub fn coarse_clock(self) -> Self {
        self.with_ratio(|ratio| ratio.coarse = true)
    }

    fn with_ratio(mut self, change: impl Fn(&mut Ratio)) -> Self {
        for rule in &mut self.rules {
            if let TripRule::Ratio(ratio) = rule {
                change(ratio);
            }
        }
        self
    }

    /// Combines rules: the circuit opens when any of them trips. If several trip at the same call, the first of them is
    /// reported. [`last_rule`](super::handle::CircuitBreakerSnapshot::last_rule) in the snapshot has its index.
    #[must_use]
    pub fn any(rules: impl IntoIterator<Item = Self>) -> Self {
        Self { rules: rules.into_iter().flat_map(|trip| trip.rules).collect() }
    }

    /// Checks the rules.
    ///
    /// # Errors
    ///
    /// Returns an error for a count of zero, a ratio outside of (0, 1], a window of less than 10 ms or of no or too
    /// many calls, a minimum of calls that its window cannot hold, a slow time of zero, or an empty list of rules.
    pub fn check(&self) -> Result<(), ConfigError> {
        const MIN_WINDOW: Duration = Duration::from_millis(10);
        if self.rules.is_empty() {
            return Err(ConfigError::new("trip.any", self.rules.len(), "give at least one rule"));
        }
        for rule in &self.rules {
            match *rule {
                TripRule::Consecutive { failures: 0 } => {
                    return Err(ConfigError::new("trip.consecutive", 0, "use 1 or more"));
                }
                TripRule::Consecutive { .. } | TripRule::When(_) => {}
                TripRule::Ratio(Ratio { of, limit, span, min_calls, .. }) => {
                    let (field, slow) = match of {
                        Bad::Failed => ("trip.failure_ratio", None),
                        Bad::Slow(slow) => ("trip.slow_ratio", Some(slow)),
                    };
                    if !(limit > 0.0 && limit <= 1.0) {
                        let remedy = "use a share above 0 and at most 1, such as 0.5";
                        return Err(ConfigError::new(field, limit, remedy));
                    }
                    if slow == Some(Duration::ZERO) {
                        let remedy = "use a time above zero";
                        return Err(ConfigError::new(
                            "trip.slow_ratio.slow",
                            Duration::ZERO,
                            remedy,
                        ));
                    }
                    if min_calls == 0 {
                        return Err(ConfigError::new("trip.min_calls", 0, "use 1 or more"));
                    }
                    match span {
                        WindowSpan::Time(window) if window < MIN_WINDOW => {
                            return Err(ConfigError::new(
                                "trip.within",
                                window,
                                "use 10ms or more",
                            ));
                        }
                        WindowSpan::Calls(calls) if !(1..=MAX_WINDOW_CALLS).contains(&calls) => {
                            return Err(ConfigError::new("trip.over", calls, "use 1 to 1000000"));
                        }
                        WindowSpan::Calls(calls) if min_calls > calls => {
                            let remedy = format!("use at most the window's {calls} calls");
                            return Err(ConfigError::new("trip.min_calls", min_calls, remedy));
                        }
                        WindowSpan::Time(_) | WindowSpan::Calls(_) => {}
                    }
                }
            }
        }
        Ok(())
    }
}

impl Default for Trip {
    /// Returns the rule of five failures in a row.
    fn default() -> Self {
        Self::consecutive(5)
    }
}

impl fmt::Debug for TripRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Consecutive { failures } => write!(f, "consecutive({failures})"),
            Self::Ratio(Ratio { of, limit, span, min_calls, .. }) => {
                write!(f, "ratio({of:?} {limit}, {span:?}, min {min_calls})")
            }
            Self::When(_) => f.write_str("when(..)"),
        }
    }
}

/// The reason for which a circuit opened, with the counts at that time.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum TripReason {
    /// The rule [`Trip::consecutive`] tripped.
    Consecutive {
        /// The number of failures in a row.
        failures: u32,
    },
    /// The rule [`Trip::failure_ratio`] tripped.
    FailureRatio {
        /// The number of failed calls in the window.
        failures: u64,
        /// The number of calls in the window.
        calls: u64,
    },
    /// The rule [`Trip::slow_ratio`] tripped.
    SlowRatio {
        /// The number of slow calls in the window.
        slow: u64,
        /// The number of calls in the window.
        calls: u64,
    },
    /// The closure of [`Trip::when`] returned `true`.
    When {
        /// The argument of the closure.
        seen: CallStats,
    },
    /// Half-open probes failed, so that the circuit can no longer close.
    Probe {
        /// The outcome of the last one.
        outcome: Outcome,
    },
    /// Half-open probes failed, and the last one was slow.
    SlowProbe,
    /// Half-open probes failed, and the last one had no good response head at the end of its timeout.
    ProbeTimeout,
}

impl TripReason {
    /// The labels of all reasons, as [`as_str`](Self::as_str) returns them.
    pub(super) const LABELS: [&str; 7] = [
        "consecutive",
        "failure_ratio",
        "slow_ratio",
        "when",
        "probe",
        "slow_probe",
        "probe_timeout",
    ];

    /// Returns the reason in `snake_case`, as in metrics and events.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        Self::LABELS[self.index()]
    }

    pub(super) const fn index(&self) -> usize {
        match self {
            Self::Consecutive { .. } => 0,
            Self::FailureRatio { .. } => 1,
            Self::SlowRatio { .. } => 2,
            Self::When { .. } => 3,
            Self::Probe { .. } => 4,
            Self::SlowProbe => 5,
            Self::ProbeTimeout => 6,
        }
    }
}

impl fmt::Display for TripReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Consecutive { failures } => write!(f, "{failures} failures in a row"),
            Self::FailureRatio { failures, calls } => {
                write!(f, "{failures} of {calls} calls in the window failed")
            }
            Self::SlowRatio { slow, calls } => {
                write!(f, "{slow} of {calls} calls in the window were slow")
            }
            Self::When { seen } => {
                let CallStats { consecutive_failures, window_calls, window_failures, window_slow } =
                    seen;
                write!(
                    f,
                    "the closure returned true at {consecutive_failures} failures in a row, and \
                     {window_failures} failed and {window_slow} slow of {window_calls} calls in the window"
                )
            }
            Self::Probe { outcome } => {
                let (kind, reason) = (outcome.kind().as_str(), outcome.reason().as_str());
                write!(f, "a probe ended as {kind} ({reason}")?;
                outcome.code().map_or(Ok(()), |code| write!(f, " {code}"))?;
                f.write_str(")")
            }
            Self::SlowProbe => f.write_str("a probe was slow"),
            Self::ProbeTimeout => f.write_str("a probe did not end in time"),
        }
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use super::*;
    use crate::outcome::Reason;

    #[test]
    fn reason_of_a_failed_probe_is_written_in_the_words_of_metrics() {
        let outcome = Outcome::failure().because(Reason::Status).with_code(503);
        let reason = TripReason::Probe { outcome };
        assert_eq!(reason.to_string(), "a probe ended as failure (status 503)");
    }
}
