use std::{ops::RangeInclusive, time::Duration};

use super::{
    algorithm::{ChangeReason, LimitChange, Sample},
    bounded::{BoundedAlgorithm, BoundedLimit},
};
use crate::error::ConfigError;

/// Keeps the limit at the knee of the latency curve: the number of calls in flight above which calls begin to queue in
/// the upstream.
///
/// # Rounds
///
/// The algorithm decides once per round. A round lasts for at least one mean latency and for 8 samples per unit of the
/// limit, with a minimum of 32 and a maximum of 256 samples. It lasts longer, for up to 4096 samples, until the
/// standard error of the mean latency is 8 % or less. After a change of the limit, the next round begins when the calls
/// that were admitted under the previous limit have ended, or nearly all of them.
///
/// At the end of a round, in this order:
///
/// 1. If a twentieth of the calls or more were dropped, the limit is lowered by a tenth. For the next 10 s it rises by
///    1 per round only.
/// 2. If less than three quarters of the limit were in use, the limit and the baseline do not change.
/// 3. Otherwise the limit is multiplied by 1.4 × baseline / latency, within 0.5 and 1.4. The baseline is the latency
///    without a queue; the factor 1.4 is headroom. Changes of less than 5 % are left out.
///
/// # The baseline
///
/// The baseline follows the rounds that are faster than it, or slower by 10 % or less. With a limit of 1 it
/// follows every round. The other rounds do not change it, so it cannot adapt to the latency of a queue.
///
/// If there was no such round for 10 s or 20 rounds, whichever is longer (1 s for the first baseline), the limit is
/// lowered to 0.65 of its value (a *drain*). As long as the throughput falls by less than half of what a proportional
/// change would be, there was a queue, and the drain is repeated. Otherwise the queue is gone: the latency of this
/// round becomes the baseline, and the limit is set to the number of calls that gives the previous throughput, with
/// headroom.
///
/// A drain also begins if step 3 has lowered the limit and the throughput has fallen nearly in proportion: then calls
/// have become slower, and there was no queue.
///
/// The limit is never held at a constant for a measurement. Drains cost about 1 % of the throughput, or 3 % if
/// latencies vary much.
///
/// # Sources
///
/// The baseline and the drain are from BBR (Cardwell et al., ACM Queue 2016), with a proportional drain; the ratio is
/// from the gradient algorithm of Netflix; the comparison of throughputs is from hill climbing.
#[derive(Clone, Debug)]
pub struct Knee {
    limit: BoundedLimit,
    round: Round,
    /// The latency without a queue in seconds; 0 while it is unknown.
    baseline: f64,
    /// The mean latency of the last round in seconds.
    latency: f64,
    /// When the baseline has to be measured by a drain.
    stale_at: Duration,
    /// The round before the last decrease, to compare its throughput with.
    before: Option<LastStep>,
    /// Until then the limit rises by 1 per round.
    careful_until: Duration,
}

/// The measurements of the current round.
#[derive(Clone, Debug, Default)]
struct Round {
    /// Samples before this time are ignored, because they may belong to the previous limit.
    since: Duration,
    /// The time of the last sample.
    last: Option<Duration>,
    /// The time in which calls were in flight, in seconds.
    busy: f64,
    /// The number of calls that received a response.
    responses: f64,
    /// The number of calls that were dropped.
    dropped: f64,
    /// The sum of the latencies of the calls with a response, in seconds. `squares` is the sum of their squares.
    latency: f64,
    squares: f64,
    /// The maximum latency, in seconds.
    max_latency: f64,
    /// The sum of the calls in flight that the samples contain.
    in_flight: f64,
}

/// The results of a finished round.
#[derive(Clone, Copy, Debug)]
struct RoundResult {
    /// The time in which calls were in flight, in seconds.
    busy: f64,
    /// The mean latency in seconds; `None` if all calls were dropped.
    latency: Option<f64>,
    /// The throughput in responses per second.
    rate: f64,
    /// The mean number of calls in flight, as observed at the admissions.
    in_flight_mean: f64,
    /// The share of the calls that were dropped.
    dropped: f64,
}

/// The round before a decrease, and the kind of decrease.
#[derive(Clone, Copy, Debug)]
struct LastStep {
    seen: RoundResult,
    step: KneeStep,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KneeStep {
    /// By step 3.
    Down,
    /// To measure the baseline.
    Drain,
}

/// The factor of the limit over the knee. Without it, calls would wait for the end of other calls although the upstream
/// has capacity.
const HEADROOM: f64 = 1.4;
/// The factor of the limit in a drain. It is below 1 / `HEADROOM`, so that a baseline that includes a queue shrinks
/// from one drain to the next.
const DRAIN: f64 = 0.65;
/// The minimum share of the limit that must be in use for a decision.
const MIN_IN_USE: f64 = 0.75;
/// The minimum time after which a baseline that was not confirmed is measured again.
const STALE: Duration = Duration::from_secs(10);
/// The minimum number of rounds for the same. Each drain costs one round.
const STALE_ROUNDS: f64 = 20.0;
/// The same time for the first baseline, which may have been measured with a queue.
const STALE_FIRST: Duration = Duration::from_secs(1);
/// The maximum ratio of latency to baseline with which a round confirms the baseline.
const MAX_CONFIRMING_RATIO: f64 = 1.1;
/// The share of drops from which on the limit is lowered.
const MAX_DROPS: f64 = 0.05;
const DROP_CUT: f64 = 0.9;
/// The maximum standard error of the mean latency, relative to the mean, with which a round ends.
const MAX_STANDARD_ERROR: f64 = 0.08;
/// The number of samples with which a round ends in any case.
const MAX_SAMPLES: f64 = 4096.0;
/// The minimum number of samples for a decision because of drops, if the round lasts for 1 s.
const MIN_DROP_SAMPLES: f64 = 16.0;
/// After a change, samples are ignored for the maximum latency of the last round, but not for more than this multiple
/// of its mean.
const SETTLED: f64 = 3.0;
/// A latency counts as this multiple of the usual one if it is longer: a single call that hangs is not a queue.
const MAX_LATENCY_RATIO: f64 = 16.0;
/// The minimum ratio between two numbers of calls in flight for a comparison of their throughputs.
const MIN_CHANGE: f64 = 1.15;

impl Default for Knee {
    /// Starts at 20, within 1 to 1000.
    fn default() -> Self {
        Self::within(BoundedLimit::constant(20, 1, 1000))
    }
}

impl Knee {
    /// Returns an algorithm that starts at `initial` and keeps the limit within `bounds`.
    ///
    /// # Errors
    ///
    /// Returns an error if the bounds are invalid, or if `initial` is outside of them.
    pub fn new(initial: usize, bounds: RangeInclusive<usize>) -> Result<Self, ConfigError> {
        Ok(Self::within(BoundedLimit::new(initial, bounds)?))
    }

    fn within(limit: BoundedLimit) -> Self {
        Self {
            limit,
            round: Round::default(),
            baseline: 0.0,
            latency: 0.0,
            stale_at: Duration::ZERO,
            before: None,
            careful_until: Duration::ZERO,
        }
    }

    // ===== The end of a round =====

    fn decide(&mut self, seen: RoundResult, now: Duration) -> Option<LimitChange> {
        let limit = self.limit.get();
        if seen.dropped >= MAX_DROPS {
            self.before = None;
            self.careful_until = now.saturating_add(STALE);
            return self.limit.change(limit * DROP_CUT, ChangeReason::Dropped);
        }
        let latency = seen.latency?;
        if seen.in_flight_mean < MIN_IN_USE * f64::from(self.limit.whole()) {
            self.before = None;
            return None;
        }
        if let Some(before) = self.before.take() {
            match (before.step, effect(before.seen, seen)) {
                // The throughput has fallen by less than half of the change: there was a queue, and there may still be
                // one.
                (KneeStep::Drain, Some(effect)) if effect < 0.5 => {
                    return self.drain(seen, ChangeReason::Queued);
                }
                (KneeStep::Drain, Some(_)) => return self.set_baseline(before.seen, seen, now),
                // The bounds have prevented a change that is large enough to compare.
                (KneeStep::Drain, None) => self.stale_at = seen.stale_at(now),
                // Either there was no queue, or the upstream changed at the same time: a drain measures
                // the baseline.
                (KneeStep::Down, Some(effect)) if effect > 0.75 => {
                    return self.drain(seen, ChangeReason::Slower);
                }
                _ => {}
            }
        }
        let is_confirmed =
            latency <= self.baseline * MAX_CONFIRMING_RATIO || self.limit.whole() == 1;
        if self.baseline == 0.0 {
            self.baseline = latency;
            self.stale_at = now.saturating_add(STALE_FIRST);
        } else if is_confirmed {
            // The minimum of many noisy rounds would be too low, so the baseline follows all rounds that are about as
            // fast.
            let share = if latency < self.baseline / MAX_CONFIRMING_RATIO { 0.5 } else { 0.25 };
            self.baseline += share * (latency - self.baseline);
        }
        // At its upper bound the limit cannot grow until a queue shows, so there a fast round does not confirm the
        // baseline.
        if is_confirmed && !self.limit.is_max() {
            self.stale_at = self.stale_at.max(seen.stale_at(now));
        } else if now >= self.stale_at {
            return self.drain(seen, ChangeReason::Drain);
        }
        self.follow(seen, latency, now)
    }

    /// Adjusts the limit by the ratio of baseline to latency.
    fn follow(&mut self, seen: RoundResult, latency: f64, now: Duration) -> Option<LimitChange> {
        let limit = self.limit.get();
        let ratio = (HEADROOM * self.baseline / latency).clamp(0.5, HEADROOM);
        if ratio > 1.05 {
            let careful = now < self.careful_until;
            let next = if careful { limit + 1.0 } else { limit * ratio };
            self.limit.change(next, ChangeReason::Headroom)
        } else if ratio < 0.95 {
            self.before = Some(LastStep { seen, step: KneeStep::Down });
            self.limit.change(limit * ratio, ChangeReason::Queued)
        } else {
            None
        }
    }

    /// Lowers the limit for a measurement without a queue.
    fn drain(&mut self, seen: RoundResult, reason: ChangeReason) -> Option<LimitChange> {
        self.before = Some(LastStep { seen, step: KneeStep::Drain });
        self.limit.change((self.limit.get() * DRAIN).floor(), reason)
    }

    /// Sets the baseline after a drain. There was no queue in this round, so its latency is the baseline.
    fn set_baseline(
        &mut self,
        before: RoundResult,
        seen: RoundResult,
        now: Duration,
    ) -> Option<LimitChange> {
        self.baseline = seen.latency.unwrap_or(self.baseline);
        self.stale_at = seen.stale_at(now);
        // The number of calls in flight that gives the throughput before the drain, and not more than there were before
        // it.
        let knee = seen.in_flight_mean * (before.rate / seen.rate.max(1e-9)).max(1.0);
        self.limit.change(knee.min(before.in_flight_mean) * HEADROOM, ChangeReason::Drained)
    }
}

/// Returns how much of a change in the calls in flight is visible in the throughput: 0 is nothing, 1 is a proportional
/// change. `None` if the change is too small for a comparison.
fn effect(before: RoundResult, after: RoundResult) -> Option<f64> {
    let change = (after.in_flight_mean / before.in_flight_mean).ln();
    (change.abs() > MIN_CHANGE.ln()).then(|| (after.rate / before.rate).ln() / change)
}

impl RoundResult {
    /// Returns when a baseline that is confirmed now becomes stale.
    fn stale_at(&self, now: Duration) -> Duration {
        now.saturating_add(STALE.max(seconds(self.busy * STALE_ROUNDS)))
    }
}

impl Round {
    /// Records a sample. A latency of more than `max` seconds counts as `max`.
    fn record(&mut self, sample: &Sample, max: f64) {
        let took = sample.latency.as_secs_f64().min(max);
        self.max_latency = self.max_latency.max(took);
        self.in_flight += f64::from(sample.in_flight);
        if sample.dropped {
            self.dropped += 1.0;
        } else {
            self.responses += 1.0;
            self.latency += took;
            self.squares += took * took;
        }
        let since = sample.now.saturating_sub(*self.last.get_or_insert(sample.now)).as_secs_f64();
        // In a pause of more than one mean latency between two samples, no call was in flight. Only one latency of it
        // counts as busy.
        let is_work = self.responses > 0.0 && since * self.responses <= self.latency;
        self.busy += if is_work { since } else { since.min(self.mean().unwrap_or(took)) };
        self.last = Some(sample.now);
    }

    fn mean(&self) -> Option<f64> {
        (self.responses > 0.0).then(|| self.latency / self.responses)
    }

    /// Returns whether the standard error of the mean latency is small enough.
    fn is_certain(&self) -> bool {
        let square = self.latency * self.latency;
        let variance = self.responses * self.squares - square;
        variance <= MAX_STANDARD_ERROR * MAX_STANDARD_ERROR * self.responses * square
    }

    /// Returns the results if the round is over.
    fn finished(&self, limit: u32) -> Option<RoundResult> {
        let calls = self.responses + self.dropped;
        let enough = f64::from(limit.saturating_mul(8).clamp(32, 256));
        let is_enough = if self.dropped >= MAX_DROPS * calls {
            // With this share of drops the limit is too high, so a more certain latency is not needed.
            calls >= enough || (calls >= MIN_DROP_SAMPLES && self.busy >= 1.0)
        } else {
            calls >= enough && (calls >= MAX_SAMPLES || self.is_certain())
        };
        if !is_enough {
            return None;
        }
        let latency = self.mean();
        if self.busy <= 0.0 || self.busy < latency.unwrap_or(0.0) {
            return None;
        }
        Some(RoundResult {
            busy: self.busy,
            latency,
            // The first sample is the start of the measurement, so its call is not counted.
            rate: (self.responses - 1.0).max(0.0) / self.busy,
            in_flight_mean: self.in_flight / calls,
            dropped: self.dropped / calls,
        })
    }

    /// Returns the round after a change of the limit.
    fn after_change(&self, now: Duration) -> Self {
        let settling =
            self.mean().map_or(self.max_latency, |mean| self.max_latency.min(mean * SETTLED));
        Self { since: now.saturating_add(seconds(settling)), ..Self::default() }
    }
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

impl BoundedAlgorithm for Knee {
    fn bounded(&self) -> &BoundedLimit {
        &self.limit
    }

    fn bounded_mut(&mut self) -> &mut BoundedLimit {
        &mut self.limit
    }

    fn restart(&mut self) {
        self.round = Round::default();
        self.before = None;
    }

    fn record(&mut self, sample: &Sample) -> Option<LimitChange> {
        if sample.now < self.round.since {
            return None;
        }
        let usual = self.latency.max(self.baseline);
        self.round
            .record(sample, if usual > 0.0 { usual * MAX_LATENCY_RATIO } else { f64::INFINITY });
        let seen = self.round.finished(self.limit.whole())?;
        self.latency = seen.latency.unwrap_or(self.latency);
        let change = self.decide(seen, sample.now);
        self.round = match change {
            Some(_) => self.round.after_change(sample.now),
            None => Round::default(),
        };
        change
    }
}
