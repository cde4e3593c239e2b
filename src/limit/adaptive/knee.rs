use std::{ops::RangeInclusive, time::Duration};

use super::{Algorithm, Bounds, Change, Reason, Sample};
use crate::ConfigError;

/// Keeps the limit at the knee: where more calls at once begin to wait for each other.
///
/// It looks at rounds: a round trip long at least, and 32 calls, or more until the mean of them is known within
/// a tenth; begun when those of the limit before are over, or nearly all. In this order, once a round:
///
/// 1. A twentieth of the calls or more were dropped: a tenth less, and small steps up for 10 s.
/// 2. Less than three quarters of the limit were in use: nothing is learnt and nothing changes.
/// 3. Else it follows what calls take without a queue, over what they take now, with room for 40 % more:
///    up to that much more, down to half.
///
/// What calls take without a queue is what the quickest rounds have shown. It cannot learn the queue: after
/// 10 s, or 20 rounds, in which none was about as quick as that (1 s at first), the limit is lowered by a third, again
/// and again until less gets done, nearly in proportion. Then no queue stands: what calls take there
/// replaces it, and the limit goes to where the same gets done as before. The same is done when following
/// has lowered the limit and less got done: then calls have become slower, and nobody waits. No phase
/// pins the limit to a constant, and all of it costs a hundredth of the throughput, or three where calls differ much.
///
/// The baseline and the drain are the idea of BBR (Cardwell et al., ACM Queue 2016) with a proportional
/// drain, the ratio Netflix's gradient, the test of throughput a hill climber's.
#[derive(Clone, Debug)]
pub struct Knee {
    limit: Bounds,
    round: Round,
    /// What a call takes without a queue, in seconds; 0 while that is unknown.
    baseline: f64,
    /// What it took in the last round.
    latency: f64,
    /// When the baseline has to be looked for.
    stale_at: Duration,
    /// The round before a change, whose effect is awaited.
    before: Option<Before>,
    /// Small steps until then.
    careful_until: Duration,
}

/// What is measured between two changes.
#[derive(Clone, Debug, Default)]
struct Round {
    /// What ends before may be of another limit.
    since: Duration,
    /// When the last call ended.
    last: Option<Duration>,
    /// Seconds in which there was work.
    busy: f64,
    answered: f64,
    dropped: f64,
    /// Seconds that the answered calls took, and the squares of them.
    latency: f64,
    squares: f64,
    longest: f64,
    in_flight: f64,
}

/// A round that is over.
#[derive(Clone, Copy, Debug)]
struct Seen {
    /// Seconds.
    busy: f64,
    /// Seconds a call took on average; none if all were dropped.
    latency: Option<f64>,
    /// Answers per second.
    rate: f64,
    /// Calls at once, as those let in saw it.
    at_once: f64,
    /// The share of calls that were dropped.
    dropped: f64,
}

#[derive(Clone, Copy, Debug)]
struct Before {
    seen: Seen,
    step: Step,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Down,
    Drain,
}

/// The limit over the knee: calls that find room must not wait for the next to end.
const HEADROOM: f64 = 1.4;
/// So much is left by a step of a drain. Below 1 / `HEADROOM`, so that a baseline learnt from a queue
/// shrinks from one drain to the next.
const DRAIN: f64 = 0.65;
/// The share of the limit that must be in use for it to be raised.
const IN_USE: f64 = 0.75;
/// A baseline that was not seen for so long is looked for.
const STALE: Duration = Duration::from_secs(10);
/// And not before so many rounds, of which each drain costs one.
const ROUNDS: f64 = 20.0;
/// The first one soon: the calls it is from may have stood in a queue.
const UNPROVEN: Duration = Duration::from_secs(1);
/// Rounds as quick as this over the baseline confirm it.
const AS_QUICK: f64 = 1.1;
/// From so large a share of drops on, there are too many calls at once.
const DROPS: f64 = 0.05;
const DROP_CUT: f64 = 0.9;
/// A round is over when the mean of its calls is known as well as this (one standard error), or after so many.
const UNCERTAIN: f64 = 0.08;
const MOST: f64 = 4096.0;
/// Drops among so few calls say enough.
const FEW: f64 = 16.0;
/// After a change it is waited for the longest call, and not for longer than so many times what they take.
const SETTLED: f64 = 3.0;
/// A call that took longer than so many times what they take counts as that: one that hangs is no queue.
const LONGEST: f64 = 16.0;
/// A change of the calls at once that is large enough to tell something from.
const TELLING: f64 = 1.15;

impl Default for Knee {
    /// From 20 within 1 to 1000.
    fn default() -> Self {
        Self::within(Bounds::constant(20, 1, 1000))
    }
}

impl Knee {
    /// # Errors
    ///
    /// Bounds that are no bounds, or a beginning out of them.
    pub fn new(initial: usize, bounds: RangeInclusive<usize>) -> Result<Self, ConfigError> {
        Ok(Self::within(Bounds::new(initial, bounds)?))
    }

    fn within(limit: Bounds) -> Self {
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

    /// What was measured was of another limit.
    fn begin_anew(&mut self) {
        self.round = Round::default();
        self.before = None;
    }

    // ===== Once a round =====

    fn decide(&mut self, seen: Seen, now: Duration) -> Option<Change> {
        let limit = self.limit.get();
        if seen.dropped >= DROPS {
            self.before = None;
            self.careful_until = now.saturating_add(STALE);
            return self.limit.change(limit * DROP_CUT, Reason::Dropped);
        }
        let latency = seen.latency?;
        if seen.at_once < IN_USE * f64::from(self.limit.whole()) {
            self.before = None;
            return None;
        }
        if let Some(before) = self.before.take() {
            match (before.step, effect(before.seen, seen)) {
                // A queue stood there, and may still.
                (Step::Drain, Some(effect)) if effect < 0.5 => {
                    return self.drain(seen, Reason::Queued);
                }
                (Step::Drain, Some(_)) => return self.learn(before.seen, seen, now),
                // The bounds have kept it from showing anything.
                (Step::Drain, None) => self.stale_at = seen.stale_at(now),
                // No queue stood there, or what was called changed just then: a second look tells.
                (Step::Down, Some(effect)) if effect > 0.75 => {
                    return self.drain(seen, Reason::Slower);
                }
                _ => {}
            }
        }
        let quick = latency <= self.baseline * AS_QUICK || self.limit.whole() == 1;
        if self.baseline == 0.0 {
            self.baseline = latency;
            self.stale_at = now.saturating_add(UNPROVEN);
        } else if quick {
            // The least of many noisy rounds would be too little, so it follows all that are about as quick.
            let share = if latency < self.baseline / AS_QUICK { 0.5 } else { 0.25 };
            self.baseline += share * (latency - self.baseline);
        }
        // At its highest a limit does not grow into a queue, which would show.
        if quick && !self.limit.is_highest() {
            self.stale_at = self.stale_at.max(seen.stale_at(now));
        } else if now >= self.stale_at {
            return self.drain(seen, Reason::Drain);
        }
        self.follow(seen, latency, now)
    }

    fn follow(&mut self, seen: Seen, latency: f64, now: Duration) -> Option<Change> {
        let limit = self.limit.get();
        let ratio = (HEADROOM * self.baseline / latency).clamp(0.5, HEADROOM);
        if ratio > 1.05 {
            let careful = now < self.careful_until;
            let next = if careful { limit + 1.0 } else { limit * ratio };
            self.limit.change(next, Reason::Room)
        } else if ratio < 0.95 {
            self.before = Some(Before { seen, step: Step::Down });
            self.limit.change(limit * ratio, Reason::Queued)
        } else {
            None
        }
    }

    fn drain(&mut self, seen: Seen, reason: Reason) -> Option<Change> {
        self.before = Some(Before { seen, step: Step::Drain });
        self.limit.change((self.limit.get() * DRAIN).floor(), reason)
    }

    /// No queue stood in this round: what it shows is the truth.
    fn learn(&mut self, before: Seen, seen: Seen, now: Duration) -> Option<Change> {
        self.baseline = seen.latency.unwrap_or(self.baseline);
        self.stale_at = seen.stale_at(now);
        // As many calls at once as would get done what got done before, and not more than it took then.
        let knee = seen.at_once * (before.rate / seen.rate.max(1e-9)).max(1.0);
        self.limit.change(knee.min(before.at_once) * HEADROOM, Reason::Drained)
    }
}

/// How much of a change in calls at once has arrived in what gets done: 0 none, 1 all of it. None if
/// too little changed to tell.
fn effect(before: Seen, after: Seen) -> Option<f64> {
    let change = (after.at_once / before.at_once).ln();
    (change.abs() > TELLING.ln()).then(|| (after.rate / before.rate).ln() / change)
}

impl Seen {
    /// So long from now, or so many rounds where each takes long.
    fn stale_at(&self, now: Duration) -> Duration {
        now.saturating_add(STALE.max(seconds(self.busy * ROUNDS)))
    }
}

impl Round {
    /// None counts for longer than `most` seconds.
    fn hear(&mut self, sample: &Sample, most: f64) {
        let took = sample.latency.as_secs_f64().min(most);
        self.longest = self.longest.max(took);
        self.in_flight += f64::from(sample.in_flight);
        if sample.dropped {
            self.dropped += 1.0;
        } else {
            self.answered += 1.0;
            self.latency += took;
            self.squares += took * took;
        }
        let since = sample.now.saturating_sub(*self.last.get_or_insert(sample.now)).as_secs_f64();
        // A pause longer than a call takes is one in which nobody called.
        let is_work = self.answered > 0.0 && since * self.answered <= self.latency;
        self.busy += if is_work { since } else { since.min(self.mean().unwrap_or(took)) };
        self.last = Some(sample.now);
    }

    fn mean(&self) -> Option<f64> {
        (self.answered > 0.0).then(|| self.latency / self.answered)
    }

    /// Whether its mean can be trusted: where calls differ much it takes more of them.
    fn is_certain(&self) -> bool {
        let square = self.latency * self.latency;
        let variance = self.answered * self.squares - square;
        variance <= UNCERTAIN * UNCERTAIN * self.answered * square
    }

    fn over(&self, limit: u32) -> Option<Seen> {
        let calls = self.answered + self.dropped;
        let enough = f64::from(limit.saturating_mul(8).clamp(32, 256));
        let is_enough = if self.dropped >= DROPS * calls {
            // Nothing is gained by waiting.
            calls >= enough || (calls >= FEW && self.busy >= 1.0)
        } else {
            calls >= enough && (calls >= MOST || self.is_certain())
        };
        if !is_enough {
            return None;
        }
        let latency = self.mean();
        if self.busy <= 0.0 || self.busy < latency.unwrap_or(0.0) {
            return None;
        }
        Some(Seen {
            busy: self.busy,
            latency,
            // The first call only began the measuring.
            rate: (self.answered - 1.0).max(0.0) / self.busy,
            at_once: self.in_flight / calls,
            dropped: self.dropped / calls,
        })
    }

    /// The next one, after a change at this moment.
    fn after_change(&self, now: Duration) -> Self {
        let longest = self.mean().map_or(self.longest, |mean| self.longest.min(mean * SETTLED));
        Self { since: now.saturating_add(seconds(longest)), ..Self::default() }
    }
}

fn seconds(long: f64) -> Duration {
    Duration::try_from_secs_f64(long).unwrap_or(Duration::MAX)
}

impl Algorithm for Knee {
    fn limit(&self) -> u32 {
        self.limit.whole()
    }

    fn set_limit(&mut self, limit: u32) {
        self.limit.set(limit.into());
        self.begin_anew();
    }

    fn set_bounds(&mut self, bounds: RangeInclusive<u32>) -> bool {
        self.limit.set_bounds(bounds);
        self.begin_anew();
        true
    }

    fn hear(&mut self, sample: &Sample) -> Option<Change> {
        if sample.now < self.round.since {
            return None;
        }
        let usual = self.latency.max(self.baseline);
        self.round.hear(sample, if usual > 0.0 { usual * LONGEST } else { f64::INFINITY });
        let seen = self.round.over(self.limit.whole())?;
        self.latency = seen.latency.unwrap_or(self.latency);
        let change = self.decide(seen, sample.now);
        self.round = match change {
            Some(_) => self.round.after_change(sample.now),
            None => Round::default(),
        };
        change
    }
}
