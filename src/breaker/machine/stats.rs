//! The counts on which the rules of a [`Trip`] decide: the run of failures and the windows since the circuit closed.

use std::{fmt, mem, sync::Arc};

use super::super::trip::{Bad, CallStats, Closure, Ratio, Trip, TripReason, TripRule, WindowSpan};
use super::window::{CountWindow, Tally, TimeWindow};
use crate::{
    outcome::{Outcome, OutcomeKind, Reason},
    time::{Nanos, nanos},
    user_code::catch_panic,
};

/// The end of a call, as the rules count it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended {
    pub(crate) outcome: Outcome,
    /// The time to the response head, in nanoseconds. 0 if no rule measures calls.
    pub(crate) took: Nanos,
}

/// The time windows of all rules. They are not part of [`CallCounts`], because good calls are counted in them without
/// the lock of the circuit.
pub(crate) type TimeWindows = Box<[TimeWindow]>;

/// The tally of each ratio's window, in the order of the rules.
pub(crate) type Windows = Vec<Tally>;

/// The maximum excess of housekeeping outcomes over responses at which housekeeping is neutral. Servers rarely allow
/// more streams on one HTTP/2 connection, and all of its streams end with the connection.
const MAX_HOUSEKEEPING: u32 = 100;

/// The minimum time for which housekeeping exceeds responses before it counts as failures. One moment of housekeeping
/// can end any number of calls.
const MIN_HOUSEKEEPING_TIME: Nanos = 1_000_000_000;

/// The time without housekeeping after which its count restarts at 0.
const HOUSEKEEPING_GAP: Nanos = 10_000_000_000;

/// The minimum time without a recorded call after which a run of failures and a window of calls no longer matter. Equal
/// to the default time after which a circuit forgets its trips.
const MIN_QUIET_PERIOD: Nanos = 60_000_000_000;

#[derive(Debug)]
pub(crate) struct CallCounts {
    run: u32,
    /// The circuit has recorded a response since it was made.
    has_responded: bool,
    /// The excess of housekeeping outcomes over responses. Its maximum is [`MAX_HOUSEKEEPING`] + 1.
    housekeeping: u32,
    /// The time at which the excess rose above 0, and the time of the last housekeeping outcome.
    housekeeping_since: Nanos,
    housekeeping_last: Nanos,
    rules: Vec<RuleCounts>,
    /// The minimum of the durations that the rules call slow. `None`: no rule measures calls.
    slow_from: Option<Nanos>,
    quiet_period: Nanos,
}

enum RuleCounts {
    Consecutive { limit: u32 },
    Ratio { of: Bad, limit: f64, min_calls: u32, window: RatioWindow },
    When(Arc<Closure>),
}

enum RatioWindow {
    Calls(CountWindow),
    /// The index among the [`TimeWindows`].
    Time(usize),
}

impl RatioWindow {
    fn record(&mut self, bad: bool, now: Nanos, times: &TimeWindows) {
        match self {
            Self::Calls(window) => window.record(bad),
            Self::Time(at) => times[*at].record(bad, now),
        }
    }

    fn tally(&self, now: Nanos, times: &TimeWindows) -> Tally {
        match self {
            Self::Calls(window) => window.tally(),
            Self::Time(at) => times[*at].tally(now),
        }
    }
}

impl CallCounts {
    pub(crate) fn new(trip: &Trip) -> (Self, TimeWindows) {
        let mut times = Vec::new();
        let mut slow_from = None;
        let mut quiet_period = MIN_QUIET_PERIOD;
        let rules = trip
            .rules
            .iter()
            .map(|rule| match rule {
                TripRule::Consecutive { failures } => RuleCounts::Consecutive { limit: *failures },
                TripRule::When(rule) => RuleCounts::When(rule.clone()),
                TripRule::Ratio(Ratio { of, limit, span, min_calls, coarse }) => {
                    if let Bad::Slow(slow) = of {
                        let slow = nanos(*slow);
                        slow_from = Some(slow_from.map_or(slow, |from: Nanos| from.min(slow)));
                    }
                    let window = match span {
                        WindowSpan::Calls(calls) => RatioWindow::Calls(CountWindow::new(*calls)),
                        WindowSpan::Time(length) => {
                            quiet_period = quiet_period.max(nanos(*length));
                            times.push(TimeWindow::new(*length, *coarse));
                            RatioWindow::Time(times.len() - 1)
                        }
                    };
                    RuleCounts::Ratio { of: *of, limit: *limit, min_calls: *min_calls, window }
                }
            })
            .collect();
        let counts = Self {
            run: 0,
            has_responded: false,
            housekeeping: 0,
            housekeeping_since: 0,
            housekeeping_last: 0,
            rules,
            slow_from,
            quiet_period,
        };
        (counts, times.into())
    }

    /// Returns the minimum duration that a rule calls slow. `None`: no rule measures calls.
    pub(crate) fn slow_from(&self) -> Option<Nanos> {
        self.slow_from
    }

    /// Returns the outcome as the rules and the probes count it, and records whether there was a response.
    ///
    /// Connection housekeeping is neutral, so an upstream that accepts and closes every connection would never open the
    /// circuit. Housekeeping becomes a failure and keeps its reason in two cases:
    ///
    /// - Before the first response a connection that broke was new, because none can have been reused. A
    ///   [stale](Reason::StaleConnection) connection is known to be reused, so another circuit has recorded its
    ///   response.
    /// - Each reused connection has delivered a response, so housekeeping cannot exceed the responses for long. If it
    ///   does so by more than [`MAX_HOUSEKEEPING`], for at least [`MIN_HOUSEKEEPING_TIME`], the upstream does not work.
    pub(crate) fn assess(&mut self, outcome: Outcome, now: Nanos) -> Outcome {
        if now.saturating_sub(self.housekeeping_last) >= HOUSEKEEPING_GAP {
            self.housekeeping = 0;
        }
        if outcome.has_response() {
            self.has_responded = true;
            self.housekeeping = self.housekeeping.saturating_sub(1);
        }
        if !outcome.is_housekeeping() {
            return outcome;
        }
        if self.housekeeping == 0 {
            self.housekeeping_since = now;
        }
        self.housekeeping_last = now;
        self.housekeeping = (self.housekeeping + 1).min(MAX_HOUSEKEEPING + 1);
        let is_persistent = self.housekeeping > MAX_HOUSEKEEPING
            && now.saturating_sub(self.housekeeping_since) >= MIN_HOUSEKEEPING_TIME;
        let may_be_new = matches!(outcome.reason(), Reason::NeverSent | Reason::Reset);
        if may_be_new && !self.has_responded || is_persistent {
            return Outcome::failure().because(outcome.reason());
        }
        outcome
    }

    /// Counts one call whose outcome has been [assessed](Self::assess). Returns the index of the first rule that it
    /// trips.
    ///
    /// Throttled calls are not counted. A cancelled call counts for a slow-call rule if it was slow already.
    pub(crate) fn record(
        &mut self,
        ended: Ended,
        now: Nanos,
        times: &TimeWindows,
    ) -> Option<(usize, TripReason)> {
        let slow = self.was_slow(ended);
        let failed = match ended.outcome.kind() {
            OutcomeKind::Success => Some(false),
            OutcomeKind::Failure => Some(true),
            OutcomeKind::Cancelled if slow => None,
            OutcomeKind::Throttled | OutcomeKind::Cancelled => return None,
        };
        if let Some(failed) = failed {
            self.run = if failed { self.run.saturating_add(1) } else { 0 };
        }
        for rule in &mut self.rules {
            let RuleCounts::Ratio { of, window, .. } = rule else { continue };
            match of {
                Bad::Slow(slow) => {
                    let slow = ended.took >= nanos(*slow);
                    // A call that its caller ended before it was slow for this rule is not counted.
                    let given_up = ended.outcome.reason() == Reason::NoResponse;
                    if failed.is_some() && !given_up || slow {
                        window.record(slow, now, times);
                    }
                }
                Bad::Failed => failed.map_or((), |failed| window.record(failed, now, times)),
            }
        }
        // A good call trips no rule. Its window is evaluated again at the next bad call.
        let failed = failed == Some(true);
        if !failed && !slow {
            return None;
        }
        self.rules.iter().enumerate().find_map(|(index, rule)| {
            Some((index, self.tripped(rule, failed, ended.took, now, times)?))
        })
    }

    fn tripped(
        &self,
        rule: &RuleCounts,
        failed: bool,
        took: Nanos,
        now: Nanos,
        times: &TimeWindows,
    ) -> Option<TripReason> {
        match rule {
            RuleCounts::Consecutive { limit } => (failed && self.run >= *limit)
                .then_some(TripReason::Consecutive { failures: self.run }),
            RuleCounts::When(rule) => {
                let seen = self.call_stats(now, times);
                // A panic must not reach the call that ended, because its thread may already unwind.
                let trips = catch_panic(|| rule(&seen)).unwrap_or(false);
                trips.then_some(TripReason::When { seen })
            }
            RuleCounts::Ratio { of, limit, min_calls, window } => {
                let Tally { calls, bad } = window.tally(now, times);
                let concerns = match of {
                    Bad::Failed => failed,
                    Bad::Slow(slow) => took >= nanos(*slow),
                };
                let over = concerns
                    && bad > 0
                    && calls >= u64::from(*min_calls)
                    // Compares the quotient: 7 / 100 is 0.07, but 0.07 * 100 is slightly more than 7.
                    && bad as f64 / calls as f64 >= *limit;
                over.then_some(match of {
                    Bad::Failed => TripReason::FailureRatio { failures: bad, calls },
                    Bad::Slow(_) => TripReason::SlowRatio { slow: bad, calls },
                })
            }
        }
    }

    /// Returns whether the call was slow. The caller may have ended a slow call because of its duration. Connection
    /// housekeeping is not slow, because it carries no information about the upstream.
    pub(crate) fn was_slow(&self, ended: Ended) -> bool {
        !ended.outcome.is_housekeeping() && self.slow_from.is_some_and(|slow| ended.took >= slow)
    }

    /// Returns whether a success that is not slow would change nothing but the time windows.
    pub(crate) fn is_clean(&self) -> bool {
        self.run == 0
            && self.has_responded
            && self.housekeeping == 0
            && self.rules.iter().all(|rule| match rule {
                RuleCounts::Ratio { window: RatioWindow::Calls(window), .. } => window.is_clean(),
                _ => true,
            })
    }

    pub(crate) fn clear(&mut self, times: &TimeWindows) {
        (self.run, self.housekeeping) = (0, 0);
        for rule in &mut self.rules {
            if let RuleCounts::Ratio { window: RatioWindow::Calls(window), .. } = rule {
                window.clear();
            }
        }
        for window in times {
            window.clear();
        }
    }

    pub(crate) fn call_stats(&self, now: Nanos, times: &TimeWindows) -> CallStats {
        let mut seen = CallStats { consecutive_failures: self.run, ..CallStats::default() };
        for rule in &self.rules {
            let RuleCounts::Ratio { of, window, .. } = rule else { continue };
            let tally = window.tally(now, times);
            seen.window_calls = seen.window_calls.max(tally.calls);
            let bad = match of {
                Bad::Failed => &mut seen.window_failures,
                Bad::Slow(_) => &mut seen.window_slow,
            };
            *bad = tally.bad.max(*bad);
        }
        seen
    }

    pub(crate) fn has_responded(&self) -> bool {
        self.has_responded
    }

    /// Records that another circuit for the same upstream has recorded a response.
    pub(crate) fn set_responded(&mut self) {
        self.has_responded = true;
    }

    /// Returns the run of failures and the windows, to be restored in another circuit.
    pub(crate) fn saved(&self, now: Nanos, times: &TimeWindows) -> (u32, Windows) {
        let windows = self.rules.iter().filter_map(|rule| match rule {
            RuleCounts::Ratio { window, .. } => Some(window.tally(now, times)),
            _ => None,
        });
        (self.run, windows.collect())
    }

    /// Replaces the counts by those of another circuit with the same rules.
    pub(crate) fn restore(&mut self, run: u32, from: &Windows, now: Nanos, times: &TimeWindows) {
        self.clear(times);
        self.run = run;
        let windows = self.rules.iter_mut().filter_map(|rule| match rule {
            RuleCounts::Ratio { window, .. } => Some(window),
            _ => None,
        });
        for (window, tally) in windows.zip(from) {
            match window {
                RatioWindow::Time(at) => times[*at].restore(*tally, now),
                RatioWindow::Calls(window) => window.restore(*tally),
            }
        }
    }

    /// Returns the time without a recorded call after which the counts no longer matter: the longest time window, and
    /// at least [`MIN_QUIET_PERIOD`].
    pub(crate) fn quiet_period(&self) -> Nanos {
        self.quiet_period
    }

    /// Replaces the thresholds by those of rules of the same shape. Returns `false` if `trip` has another shape.
    ///
    /// `fresh` is made of `trip`, without the lock. The closures that are replaced are moved into it, so that the
    /// caller drops them without the lock.
    pub(crate) fn adjust(&mut self, trip: &Trip, shape: &Trip, fresh: &mut Self) -> bool {
        let same = trip.rules.len() == shape.rules.len()
            && trip.rules.iter().zip(&shape.rules).all(|pair| match pair {
                (TripRule::Consecutive { .. }, TripRule::Consecutive { .. })
                | (TripRule::When(_), TripRule::When(_)) => true,
                (TripRule::Ratio(a), TripRule::Ratio(b)) => {
                    mem::discriminant(&a.of) == mem::discriminant(&b.of)
                        && (a.span, a.coarse) == (b.span, b.coarse)
                }
                _ => false,
            });
        if !same {
            return false;
        }
        self.slow_from = fresh.slow_from;
        for (rule, new) in self.rules.iter_mut().zip(&mut fresh.rules) {
            match (rule, new) {
                (
                    RuleCounts::Ratio { of, limit, min_calls, .. },
                    RuleCounts::Ratio { of: to, limit: ratio, min_calls: min, .. },
                ) => (*of, *limit, *min_calls) = (*to, *ratio, *min),
                (rule, new) => mem::swap(rule, new),
            }
        }
        true
    }
}

impl fmt::Debug for RuleCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Consecutive { .. } => "consecutive",
            Self::Ratio { .. } => "ratio",
            Self::When(_) => "when",
        })
    }
}
