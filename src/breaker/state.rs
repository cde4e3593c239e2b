//! The state machine: pure, synchronous, told the time and the luck.

use std::time::Duration;

use super::{
    counts::{Counts, Ended, Seen, TimeWindows, Windows},
    probes::{Probes, Verdict},
    trip::{Trip, Tripped},
    wait::OpenFor,
};
use crate::call::{Nanos, Outcome, OutcomeKind, nanos};

/// Draws from [0, 1).
pub(super) type Roll = fn() -> f64;

/// Where a circuit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Calls go, and are counted.
    Closed,
    /// Calls are refused until the wait is over.
    Open,
    /// The wait is over: a few probes decide.
    HalfOpen,
    /// Calls are refused until somebody says otherwise.
    ForcedOpen,
    /// Calls go and nothing is counted until somebody says otherwise.
    ForcedClosed,
}

impl State {
    /// The state in `snake_case`, as metrics have it.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Open => "open",
            Self::HalfOpen => "half_open",
            Self::ForcedOpen => "forced_open",
            Self::ForcedClosed => "forced_closed",
        }
    }
}

/// What a call was given: the generation it belongs to, and which probe it is (0: none).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket {
    pub(super) generation: u64,
    pub(super) probe: u16,
}

/// Why a call was not let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Open { left: Duration },
    Probing,
    Ramping { left: Duration },
    Forced,
}

/// A change of state, with what led to it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Change {
    pub(super) to: State,
    pub(super) tripped: Option<Tripped>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    pub(super) open_for: OpenFor,
    /// How many probes go, at most.
    pub(super) probes: u16,
    /// How many of them must succeed.
    pub(super) needed: u16,
    pub(super) lease: Duration,
    /// Zero: none.
    pub(super) ramp: Duration,
    /// Probes come through the handle alone.
    pub(super) outside_probes: bool,
}

/// The share of calls that goes at the beginning of a ramp.
const RAMP_FROM: f64 = 0.1;

#[derive(Debug)]
pub(super) struct Machine {
    pub(super) settings: Settings,
    shape: Trip,
    counts: Counts,
    phase: Phase,
    /// One more with every change of phase, so that a result can be told to be late.
    generation: u64,
    /// How many hold it open.
    isolations: u32,
    opened: u64,
    /// Trips since it was last calm.
    restless: u32,
    last: Option<Tripped>,
}

#[derive(Debug)]
enum Phase {
    /// Since when it is closed; ramping up again, or not.
    Closed {
        since: Nanos,
        ramps: bool,
    },
    Open {
        until: Nanos,
    },
    HalfOpen(Probes),
    ForcedOpen,
    ForcedClosed,
}

/// All that another circuit takes up.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Past {
    /// Where it is, isolations apart.
    state: State,
    /// What is left of an open circuit's wait.
    left: Duration,
    restless: u32,
    run: u32,
    windows: Windows,
}

impl Machine {
    pub(super) fn new(trip: Trip, settings: Settings) -> (Self, TimeWindows) {
        let (counts, times) = Counts::new(&trip);
        let machine = Self {
            settings,
            shape: trip,
            counts,
            phase: Phase::Closed { since: 0, ramps: false },
            generation: 0,
            isolations: 0,
            opened: 0,
            restless: 0,
            last: None,
        };
        (machine, times)
    }

    /// Right once time has [passed](Self::pass_time).
    pub(super) fn state(&self) -> State {
        if self.isolations > 0 { State::ForcedOpen } else { self.beneath() }
    }

    /// Where it is, isolations apart.
    fn beneath(&self) -> State {
        match self.phase {
            Phase::Closed { .. } => State::Closed,
            Phase::Open { .. } => State::Open,
            Phase::HalfOpen(_) => State::HalfOpen,
            Phase::ForcedOpen => State::ForcedOpen,
            Phase::ForcedClosed => State::ForcedClosed,
        }
    }

    // ===== Time =====

    /// When time alone changes something that callers wait for.
    pub(super) fn next_by_time(&self) -> Option<Nanos> {
        match &self.phase {
            _ if self.isolations > 0 => None,
            Phase::Open { until } => Some(*until),
            Phase::HalfOpen(probes) => probes.next_lease(),
            _ => None,
        }
    }

    /// What happens by time alone: a wait ends, a lease ends, a ramp ends. Each at its own time, also where
    /// nobody looked in between.
    pub(super) fn pass_time(
        &mut self,
        now: Nanos,
        roll: Roll,
        times: &TimeWindows,
    ) -> Option<Change> {
        let mut last: Option<Change> = None;
        loop {
            let next = match &mut self.phase {
                // The end of the wait is part of what comes after it.
                Phase::Open { until } if now >= *until => {
                    Some(self.enter(Phase::HalfOpen(Probes::default()), None))
                }
                Phase::HalfOpen(probes) => match probes.end_lease(now) {
                    Some(ended) => match self.decide(ended, roll, times) {
                        None => continue,
                        decided => decided,
                    },
                    None => self.decide(now, roll, times),
                },
                Phase::Closed { since, ramps } if *ramps => {
                    *ramps = now.saturating_sub(*since) < nanos(self.settings.ramp);
                    None
                }
                _ => None,
            };
            let Some(next) = next else { return last };
            let tripped = next.tripped.or(last.and_then(|last| last.tripped));
            last = Some(Change { to: next.to, tripped });
        }
    }

    // ===== A call comes =====

    /// May a call go? Half-open, at most `probes` go, each with a slot that comes back.
    pub(super) fn admit(
        &mut self,
        now: Nanos,
        roll: Roll,
        times: &TimeWindows,
    ) -> (Result<Ticket, Refusal>, Option<Change>) {
        if self.isolations > 0 {
            return (Err(Refusal::Forced), None);
        }
        let change = self.pass_time(now, roll, times);
        let ticket = Ticket { generation: self.generation, probe: 0 };
        let answer = match &mut self.phase {
            Phase::Closed { since, ramps: true } => {
                let ramp = nanos(self.settings.ramp);
                let gone = now.saturating_sub(*since);
                let share = RAMP_FROM + (1.0 - RAMP_FROM) * (gone as f64 / ramp as f64);
                if roll() < share {
                    Ok(ticket)
                } else {
                    let left = Duration::from_nanos(ramp.saturating_sub(gone));
                    Err(Refusal::Ramping { left })
                }
            }
            Phase::Closed { .. } | Phase::ForcedClosed => Ok(ticket),
            Phase::ForcedOpen => Err(Refusal::Forced),
            Phase::Open { until } => {
                Err(Refusal::Open { left: Duration::from_nanos(until.saturating_sub(now)) })
            }
            Phase::HalfOpen(probes) => match probes.begin(now, &self.settings) {
                Some(probe) => Ok(Ticket { probe, ..ticket }),
                None => Err(Refusal::Probing),
            },
        };
        (answer, change)
    }

    /// Whether a call would go, once time has [passed](Self::pass_time); a ramp's luck apart.
    pub(super) fn has_room(&self) -> bool {
        match &self.phase {
            _ if self.isolations > 0 => false,
            Phase::Closed { .. } | Phase::ForcedClosed => true,
            Phase::Open { .. } | Phase::ForcedOpen => false,
            Phase::HalfOpen(probes) => probes.has_room(&self.settings),
        }
    }

    // ===== A call ends =====

    /// A probe has seen its response head.
    pub(super) fn head(
        &mut self,
        ticket: Ticket,
        so_far: Ended,
        now: Nanos,
        roll: Roll,
        times: &TimeWindows,
    ) -> Option<Change> {
        let change = self.pass_time(now, roll, times);
        if ticket.generation == self.generation {
            if let Phase::HalfOpen(probes) = &mut self.phase {
                let bad =
                    matches!(so_far.outcome.kind(), OutcomeKind::Failure | OutcomeKind::Throttled);
                probes.head(ticket.probe, !bad && !self.counts.was_slow(so_far));
            }
        }
        change
    }

    /// A call has ended. One of an older generation changes nothing.
    pub(super) fn finish(
        &mut self,
        ticket: Ticket,
        ended: Ended,
        now: Nanos,
        roll: Roll,
        times: &TimeWindows,
    ) -> Option<Change> {
        if ticket.generation != self.generation {
            return None;
        }
        if ticket.probe == 0 {
            return self.counted(ended, now, roll, times);
        }
        // Its lease may be over: then it has been decided by its head.
        let by_time = self.pass_time(now, roll, times);
        if ticket.generation == self.generation {
            if let Phase::HalfOpen(probes) = &mut self.phase {
                if probes.end(ticket.probe) {
                    return self.probed(ended, now, roll, times);
                }
            }
        }
        by_time
    }

    /// An outcome from outside of the stack: counted like a call, or like a probe.
    pub(super) fn told(
        &mut self,
        outcome: Outcome,
        now: Nanos,
        roll: Roll,
        times: &TimeWindows,
    ) -> Option<Change> {
        let by_time = self.pass_time(now, roll, times);
        let ended = Ended { outcome, took: 0 };
        let by_call = match self.phase {
            Phase::HalfOpen(_) => self.probed(ended, now, roll, times),
            _ => self.counted(ended, now, roll, times),
        };
        by_call.or(by_time)
    }

    fn counted(
        &mut self,
        ended: Ended,
        now: Nanos,
        roll: Roll,
        times: &TimeWindows,
    ) -> Option<Change> {
        let Phase::Closed { .. } = self.phase else { return None };
        let tripped = self.counts.record(ended, now, times)?;
        Some(self.open(tripped, ended.outcome.retry_after(), now, roll))
    }

    fn probed(
        &mut self,
        ended: Ended,
        now: Nanos,
        roll: Roll,
        times: &TimeWindows,
    ) -> Option<Change> {
        let slow = self.counts.was_slow(ended);
        let Phase::HalfOpen(probes) = &mut self.phase else { return None };
        let outcome = ended.outcome;
        match outcome.kind() {
            OutcomeKind::Success if !slow => probes.pass(),
            // It gives its slot back; unless it was given up for being slow.
            OutcomeKind::Cancelled if !slow => return None,
            OutcomeKind::Success | OutcomeKind::Cancelled => probes.fail(Tripped::SlowProbe, None),
            OutcomeKind::Failure | OutcomeKind::Throttled => {
                probes.fail(Tripped::Probe { outcome }, outcome.retry_after());
            }
        }
        self.decide(now, roll, times)
    }

    // ===== Changes =====

    /// As early as it is certain, both ways.
    fn decide(&mut self, now: Nanos, roll: Roll, times: &TimeWindows) -> Option<Change> {
        let Phase::HalfOpen(probes) = &self.phase else { return None };
        Some(match probes.verdict(&self.settings)? {
            Verdict::Open(tripped, hint) => self.open(tripped, hint, now, roll),
            Verdict::Close => {
                self.counts.clear(times);
                let ramps = !self.settings.ramp.is_zero();
                self.enter(Phase::Closed { since: now, ramps }, None)
            }
        })
    }

    fn open(&mut self, tripped: Tripped, hint: Option<Duration>, now: Nanos, roll: Roll) -> Change {
        if self.is_calm(now) {
            self.restless = 0;
        }
        let wait = self.settings.open_for.wait(self.restless, hint, roll());
        self.restless = self.restless.saturating_add(1);
        self.opened += 1;
        self.last = Some(tripped);
        let until = now.saturating_add(nanos(wait));
        self.enter(Phase::Open { until }, Some(tripped))
    }

    fn is_calm(&self, now: Nanos) -> bool {
        match self.phase {
            Phase::Closed { since, .. } => {
                self.restless == 0
                    || now.saturating_sub(since) >= nanos(self.settings.open_for.calm())
            }
            _ => false,
        }
    }

    /// Somebody says where it is.
    pub(super) fn force(&mut self, to: State, now: Nanos, times: &TimeWindows) -> Change {
        let phase = self.phase(to, Duration::ZERO, now);
        if to != State::HalfOpen {
            self.counts.clear(times);
            self.restless = 0;
        }
        self.enter(phase, None)
    }

    fn phase(&self, state: State, left: Duration, now: Nanos) -> Phase {
        match state {
            State::Closed => Phase::Closed { since: now, ramps: false },
            State::Open => Phase::Open { until: now.saturating_add(nanos(left)) },
            State::HalfOpen => Phase::HalfOpen(Probes::default()),
            State::ForcedOpen => Phase::ForcedOpen,
            State::ForcedClosed => Phase::ForcedClosed,
        }
    }

    /// One more, or one less, holds it open. What it was goes on underneath.
    pub(super) fn isolate(&mut self, more: bool) -> Option<Change> {
        let before = self.isolations;
        self.isolations = if more { before.saturating_add(1) } else { before.saturating_sub(1) };
        let turned = (before == 0) != (self.isolations == 0);
        turned.then(|| Change { to: self.state(), tripped: None })
    }

    pub(super) fn past(&self, now: Nanos, times: &TimeWindows) -> Past {
        let left = match self.phase {
            Phase::Open { until } => Duration::from_nanos(until.saturating_sub(now)),
            _ => Duration::ZERO,
        };
        let (run, windows) = self.counts.past(now, times);
        Past { state: self.beneath(), left, restless: self.restless, run, windows }
    }

    /// Takes up where another left off.
    pub(super) fn restore(&mut self, past: &Past, now: Nanos, times: &TimeWindows) -> Change {
        self.counts.restore(past.run, &past.windows, now, times);
        self.restless = past.restless;
        let phase = self.phase(past.state, past.left, now);
        self.enter(phase, None)
    }

    /// New thresholds for the same rules; what was counted stays. False: they are other rules.
    pub(super) fn adjust(&mut self, trip: &Trip) -> bool {
        let fits = self.counts.adjust(trip, &self.shape);
        if fits {
            self.shape = trip.clone();
        }
        fits
    }

    fn enter(&mut self, phase: Phase, tripped: Option<Tripped>) -> Change {
        self.generation += 1;
        self.phase = phase;
        Change { to: self.state(), tripped }
    }

    // ===== What is published for the path without the lock =====

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// When an open circuit's wait is over.
    pub(super) fn until(&self) -> Nanos {
        match self.phase {
            Phase::Open { until } => until,
            _ => 0,
        }
    }

    /// Whether luck decides.
    pub(super) fn ramps(&self) -> bool {
        matches!(self.phase, Phase::Closed { ramps: true, .. })
    }

    /// Whether a good call would change nothing but the time windows.
    pub(super) fn is_clean(&self) -> bool {
        self.counts.is_clean()
    }

    pub(super) fn slow_from(&self) -> Option<Nanos> {
        self.counts.slow_from()
    }

    // ===== Looking =====

    /// What another circuit like this one is made of.
    pub(super) fn shape(&self) -> (Trip, Settings) {
        (self.shape.clone(), self.settings)
    }

    pub(super) fn isolations(&self) -> u32 {
        self.isolations
    }

    pub(super) fn opened(&self) -> u64 {
        self.opened
    }

    pub(super) fn last_trip(&self) -> Option<Tripped> {
        self.last
    }

    pub(super) fn probes_under_way(&self) -> usize {
        match &self.phase {
            Phase::HalfOpen(probes) => probes.under_way(),
            _ => 0,
        }
    }

    /// Whether it is as good as a new one.
    pub(super) fn is_fresh(&self, now: Nanos, times: &TimeWindows) -> bool {
        self.state() == State::Closed
            && !self.ramps()
            && self.is_calm(now)
            && self.seen(now, times) == Seen::default()
    }

    pub(super) fn seen(&self, now: Nanos, times: &TimeWindows) -> Seen {
        self.counts.seen(now, times)
    }
}
