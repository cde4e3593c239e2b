use std::{fmt, time::Duration};

use super::window::TimeWindow;
use crate::{
    ConfigError,
    call::{Nanos, Outcome, OutcomeKind},
};

/// When a circuit opens: one rule, or the first of several.
///
/// Thresholds are inclusive: `consecutive(5)` opens at the fifth failure, `failure_ratio(0.5)` at half.
///
/// ```
/// # use std::time::Duration;
/// use buttress::Trip;
///
/// let rule = Trip::any([
///     Trip::consecutive(5),
///     Trip::failure_ratio(0.5).within(Duration::from_secs(10)).min_calls(20),
/// ]);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Trip {
    rules: Vec<Rule>,
}

#[derive(Clone, Debug, PartialEq)]
enum Rule {
    Consecutive { failures: u32 },
    Ratio { ratio: f64, window: Duration, min_calls: u32 },
}

impl Trip {
    /// After this many failures in a row. A success in between starts the count again; throttled and
    /// cancelled calls do not touch it.
    #[must_use]
    pub fn consecutive(failures: u32) -> Self {
        Self { rules: vec![Rule::Consecutive { failures }] }
    }

    /// When at least this share of the calls within a time window failed: above 0, at most 1.
    ///
    /// The window is 10 s long and needs 20 calls, unless [`within`](Self::within) and
    /// [`min_calls`](Self::min_calls) say otherwise. It is exact, in ten buckets, and costs the same
    /// however many calls are in it.
    #[must_use]
    pub fn failure_ratio(ratio: f64) -> Self {
        let rule = Rule::Ratio { ratio, window: Duration::from_secs(10), min_calls: 20 };
        Self { rules: vec![rule] }
    }

    /// The length of the ratio's window: 10 ms or more.
    #[must_use]
    pub fn within(mut self, length: Duration) -> Self {
        for rule in &mut self.rules {
            if let Rule::Ratio { window, .. } = rule {
                *window = length;
            }
        }
        self
    }

    /// How many calls must be in the ratio's window before it can trip: 1 or more.
    #[must_use]
    pub fn min_calls(mut self, calls: u32) -> Self {
        for rule in &mut self.rules {
            if let Rule::Ratio { min_calls, .. } = rule {
                *min_calls = calls;
            }
        }
        self
    }

    /// The first of these rules that trips; where two trip at once, the one named first is told.
    #[must_use]
    pub fn any(rules: impl IntoIterator<Item = Self>) -> Self {
        Self { rules: rules.into_iter().flat_map(|trip| trip.rules).collect() }
    }

    /// Whether it can work.
    ///
    /// # Errors
    ///
    /// A count of zero, a ratio that is not within (0, 1], a window under 10 ms, or no rule at all.
    pub fn check(&self) -> Result<(), ConfigError> {
        const SHORTEST: Duration = Duration::from_millis(10);
        if self.rules.is_empty() {
            return Err(ConfigError::new("trip.any", self.rules.len(), "give at least one rule"));
        }
        for rule in &self.rules {
            match *rule {
                Rule::Consecutive { failures: 0 } => {
                    return Err(ConfigError::new("trip.consecutive", 0, "use 1 or more"));
                }
                Rule::Ratio { ratio, .. } if !(ratio > 0.0 && ratio <= 1.0) => {
                    return Err(ConfigError::new(
                        "trip.failure_ratio",
                        ratio,
                        "use a share above 0 and at most 1, such as 0.5",
                    ));
                }
                Rule::Ratio { window, .. } if window < SHORTEST => {
                    return Err(ConfigError::new("trip.within", window, "use 10ms or more"));
                }
                Rule::Ratio { min_calls: 0, .. } => {
                    return Err(ConfigError::new("trip.min_calls", 0, "use 1 or more"));
                }
                Rule::Consecutive { .. } | Rule::Ratio { .. } => {}
            }
        }
        Ok(())
    }
}

impl Default for Trip {
    /// Five failures in a row.
    fn default() -> Self {
        Self::consecutive(5)
    }
}

/// Which rule opened the circuit, and what it saw.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Tripped {
    /// So many failures in a row.
    Consecutive {
        /// How many.
        failures: u32,
    },
    /// So many of the calls within the window.
    FailureRatio {
        /// How many failed.
        failures: u64,
        /// Of how many.
        calls: u64,
    },
    /// A half-open probe failed.
    Probe {
        /// How it ended.
        outcome: Outcome,
    },
    /// A half-open probe did not end within its lease, and had not seen a good head.
    ProbeLease,
}

impl fmt::Display for Tripped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Consecutive { failures } => write!(f, "{failures} failures in a row"),
            Self::FailureRatio { failures, calls } => {
                write!(f, "{failures} of {calls} calls in the window failed")
            }
            Self::Probe { outcome } => write!(f, "a probe ended as {outcome:?}"),
            Self::ProbeLease => f.write_str("a probe did not end in time"),
        }
    }
}

// ===== Counting =====

/// What the rules of a [`Trip`] have seen since the circuit closed.
#[derive(Debug)]
pub(super) struct Counts(Vec<Count>);

#[derive(Debug)]
enum Count {
    Consecutive { limit: u32, run: u32 },
    Ratio { limit: f64, min_calls: u32, window: TimeWindow },
}

impl Counts {
    pub(super) fn new(trip: &Trip) -> Self {
        Self(
            trip.rules
                .iter()
                .map(|rule| match *rule {
                    Rule::Consecutive { failures } => {
                        Count::Consecutive { limit: failures, run: 0 }
                    }
                    Rule::Ratio { ratio, window, min_calls } => {
                        Count::Ratio { limit: ratio, min_calls, window: TimeWindow::new(window) }
                    }
                })
                .collect(),
        )
    }

    /// Counts one call; tells the first rule that it trips.
    pub(super) fn record(&mut self, outcome: Outcome, now: Nanos) -> Option<Tripped> {
        let failed = match outcome.kind() {
            OutcomeKind::Success => false,
            OutcomeKind::Failure => true,
            OutcomeKind::Throttled | OutcomeKind::Cancelled => return None,
        };
        // Every rule counts, also after one of them has tripped.
        self.0.iter_mut().fold(None, |first, count| {
            let tripped = count.record(failed, now);
            first.or(tripped)
        })
    }

    /// Whether a success would change nothing.
    pub(super) fn is_clean(&self) -> bool {
        self.0.iter().all(|count| matches!(count, Count::Consecutive { run: 0, .. }))
    }

    pub(super) fn clear(&mut self) {
        for count in &mut self.0 {
            match count {
                Count::Consecutive { run, .. } => *run = 0,
                Count::Ratio { window, .. } => window.clear(),
            }
        }
    }

    /// The longest run of failures and the fullest window that any rule sees.
    pub(super) fn seen(&mut self, now: Nanos) -> (u32, u64, u64) {
        self.0.iter_mut().fold((0, 0, 0), |(run, calls, failures), count| match count {
            Count::Consecutive { run: r, .. } => (run.max(*r), calls, failures),
            Count::Ratio { window, .. } => {
                let tally = window.tally(now);
                (run, calls.max(tally.calls), failures.max(tally.failures))
            }
        })
    }
}

impl Count {
    fn record(&mut self, failed: bool, now: Nanos) -> Option<Tripped> {
        match self {
            Self::Consecutive { limit, run } => {
                *run = if failed { run.saturating_add(1) } else { 0 };
                (*run >= *limit).then_some(Tripped::Consecutive { failures: *run })
            }
            Self::Ratio { limit, min_calls, window } => {
                let tally = window.record(failed, now);
                let enough = failed && tally.calls >= u64::from(*min_calls);
                // Divided, not multiplied: 7 / 100 is 0.07, but 0.07 * 100 is a little over 7.
                let tripped = enough && tally.failures as f64 / tally.calls as f64 >= *limit;
                tripped.then_some(Tripped::FailureRatio {
                    failures: tally.failures,
                    calls: tally.calls,
                })
            }
        }
    }
}
