use std::{fmt, sync::Arc, time::Duration};

use super::counts::{Seen, Span};
use crate::{ConfigError, call::Outcome};

/// When a circuit opens: one rule, or the first of several.
///
/// Thresholds are inclusive: `consecutive(5)` opens at the fifth failure, `failure_ratio(0.5)` at half.
/// Rules are looked at whenever a call fails or is slow.
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
    pub(super) rules: Vec<Rule>,
}

#[derive(Clone)]
pub(super) enum Rule {
    Consecutive { failures: u32 },
    Ratio(Ratio),
    When(Arc<Closure>),
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Ratio {
    pub(super) of: Bad,
    pub(super) limit: f64,
    pub(super) span: Span,
    pub(super) min_calls: u32,
    /// Good calls read the clock only now and then.
    pub(super) coarse: bool,
}

/// A rule of the user's.
pub(super) type Closure = dyn Fn(&Seen) -> bool + Send + Sync;

/// What a ratio counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Bad {
    Failed,
    /// At least this long.
    Slow(Duration),
}

/// As many as fit 125 KiB.
const MOST_CALLS: u32 = 1_000_000;

impl Trip {
    fn of(rule: Rule) -> Self {
        Self { rules: vec![rule] }
    }

    fn ratio(of: Bad, limit: f64) -> Self {
        let span = Span::Time(Duration::from_secs(10));
        Self::of(Rule::Ratio(Ratio { of, limit, span, min_calls: 20, coarse: false }))
    }

    /// After this many failures in a row. A success in between starts the count again; throttled and
    /// cancelled calls do not touch it.
    #[must_use]
    pub fn consecutive(failures: u32) -> Self {
        Self::of(Rule::Consecutive { failures })
    }

    /// When at least this share of the calls in a window failed: above 0, at most 1.
    ///
    /// The window is the last 10 s and needs 20 calls, unless [`within`](Self::within) or
    /// [`over`](Self::over), and [`min_calls`](Self::min_calls), say otherwise. It is exact, and costs the
    /// same however many calls are in it.
    #[must_use]
    pub fn failure_ratio(ratio: f64) -> Self {
        Self::ratio(Bad::Failed, ratio)
    }

    /// When at least this share of the calls in a window took `slow` or longer to their response head
    /// (without one, to their end). Otherwise like [`failure_ratio`](Self::failure_ratio).
    ///
    /// A call that is cancelled after that time counts as slow: a timeout outside of the breaker does not
    /// hide a hang. Costs two clock reads a call.
    #[must_use]
    pub fn slow_ratio(ratio: f64, slow: Duration) -> Self {
        Self::ratio(Bad::Slow(slow), ratio)
    }

    /// When this closure says so, looking at what the circuit has [`Seen`] in a row and in all windows.
    ///
    /// It runs under a lock when a call fails or is slow. It must be short and must not use a handle of this breaker,
    /// which would deadlock. A panic is caught, also while the thread unwinds, and means `false`.
    #[must_use]
    pub fn when(rule: impl Fn(&Seen) -> bool + Send + Sync + 'static) -> Self {
        Self::of(Rule::When(Arc::new(rule)))
    }

    /// The ratio's window is the last stretch of time: 10 ms or more, in ten buckets.
    #[must_use]
    pub fn within(self, length: Duration) -> Self {
        self.with_ratio(|ratio| ratio.span = Span::Time(length))
    }

    /// The ratio's window is the last so many calls: 1 to 1,000,000. It needs as many of them as
    /// [`min_calls`](Self::min_calls) says, at most all.
    #[must_use]
    pub fn over(self, calls: u32) -> Self {
        self.with_ratio(|ratio| ratio.span = Span::Calls(calls))
    }

    /// How many calls must be in the ratio's window before it can trip: 1 or more, and no more than a
    /// window of calls holds.
    #[must_use]
    pub fn min_calls(self, calls: u32) -> Self {
        self.with_ratio(|ratio| ratio.min_calls = calls)
    }

    /// Reads the clock for one good call in sixteen only, which is most of what the ratio's window of time
    /// costs. The others count as of the last reading: up to fifteen of them leave the window early. What
    /// fails, or is slow, always reads it; and a [`slow_ratio`](Self::slow_ratio) times every call.
    #[must_use]
    pub fn coarse_clock(self) -> Self {
        self.with_ratio(|ratio| ratio.coarse = true)
    }

    fn with_ratio(mut self, change: impl Fn(&mut Ratio)) -> Self {
        for rule in &mut self.rules {
            if let Rule::Ratio(ratio) = rule {
                change(ratio);
            }
        }
        self
    }

    /// The first of these rules that trips; where two trip at once, the one named first is told. Which one it was
    /// is in the snapshot, as [`last_rule`](super::CircuitBreakerSnapshot::last_rule).
    #[must_use]
    pub fn any(rules: impl IntoIterator<Item = Self>) -> Self {
        Self { rules: rules.into_iter().flat_map(|trip| trip.rules).collect() }
    }

    /// Whether it can work.
    ///
    /// # Errors
    ///
    /// A count of zero, a ratio that is not within (0, 1], a window under 10 ms or of no or too many calls,
    /// a minimum of calls that its window cannot hold, a slow time of zero, or no rule at all.
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
                Rule::Consecutive { .. } | Rule::When(_) => {}
                Rule::Ratio(Ratio { of, limit, span, min_calls, .. }) => {
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
                        Span::Time(window) if window < SHORTEST => {
                            return Err(ConfigError::new(
                                "trip.within",
                                window,
                                "use 10ms or more",
                            ));
                        }
                        Span::Calls(calls) if !(1..=MOST_CALLS).contains(&calls) => {
                            return Err(ConfigError::new("trip.over", calls, "use 1 to 1000000"));
                        }
                        Span::Calls(calls) if min_calls > calls => {
                            let remedy = format!("use at most the window's {calls} calls");
                            return Err(ConfigError::new("trip.min_calls", min_calls, remedy));
                        }
                        Span::Time(_) | Span::Calls(_) => {}
                    }
                }
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

impl fmt::Debug for Rule {
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

/// Which rule opened the circuit, and what it saw.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Tripped {
    /// So many failures in a row.
    Consecutive {
        /// How many.
        failures: u32,
    },
    /// So many of the calls in the window failed.
    FailureRatio {
        /// How many failed.
        failures: u64,
        /// Of how many.
        calls: u64,
    },
    /// So many of the calls in the window were slow.
    SlowRatio {
        /// How many were slow.
        slow: u64,
        /// Of how many.
        calls: u64,
    },
    /// The closure said so.
    When {
        /// Looking at this.
        seen: Seen,
    },
    /// Half-open probes failed: more than may.
    Probe {
        /// How the last of them ended.
        outcome: Outcome,
    },
    /// Half-open probes failed, the last of them by being slow.
    SlowProbe,
    /// Half-open probes failed, the last of them as its lease ended before it had seen a good head in time.
    ProbeLease,
}

impl Tripped {
    /// Returns whether half-open probes opened the circuit again.
    pub(super) const fn is_of_probes(&self) -> bool {
        matches!(self, Self::Probe { .. } | Self::SlowProbe | Self::ProbeLease)
    }
}

impl fmt::Display for Tripped {
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
                let Seen { consecutive_failures, window_calls, window_failures, window_slow } =
                    seen;
                write!(
                    f,
                    "the closure said so at {consecutive_failures} failures in a row, and \
                     {window_failures} failed and {window_slow} slow of {window_calls} in the window"
                )
            }
            Self::Probe { outcome } => write!(f, "a probe ended as {outcome:?}"),
            Self::SlowProbe => f.write_str("a probe was slow"),
            Self::ProbeLease => f.write_str("a probe did not end in time"),
        }
    }
}
