//! The state machine: pure, synchronous, told the time and the luck.

use std::time::Duration;

use super::{
    counts::{Counts, Ended, Seen, TimeWindows},
    trip::{Trip, Tripped},
    wait::OpenFor,
};
use crate::call::{Nanos, Outcome, OutcomeKind, nanos};

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
    HalfOpen {
        passed: u16,
        failed: u16,
        last_id: u16,
        under_way: Vec<Probe>,
    },
    ForcedOpen,
    ForcedClosed,
}

#[derive(Debug)]
struct Probe {
    id: u16,
    lease_ends: Nanos,
    good_head: bool,
}

impl Phase {
    fn half_open() -> Self {
        Self::HalfOpen { passed: 0, failed: 0, last_id: 0, under_way: Vec::new() }
    }
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

    pub(super) fn state(&self, now: Nanos) -> State {
        match self.phase {
            _ if self.isolations > 0 => State::ForcedOpen,
            Phase::Closed { .. } => State::Closed,
            // The end of the wait is part of what comes after it.
            Phase::Open { until } if now >= until => State::HalfOpen,
            Phase::Open { .. } => State::Open,
            Phase::HalfOpen { .. } => State::HalfOpen,
            Phase::ForcedOpen => State::ForcedOpen,
            Phase::ForcedClosed => State::ForcedClosed,
        }
    }

    // ===== A call comes =====

    /// May a call go? Half-open, at most `probes` go, each with a slot that comes back. `roll` is drawn
    /// from [0, 1).
    pub(super) fn admit(
        &mut self,
        now: Nanos,
        roll: impl FnOnce() -> f64,
        times: &TimeWindows,
    ) -> (Result<Ticket, Refusal>, Option<Change>) {
        if self.isolations > 0 {
            return (Err(Refusal::Forced), None);
        }
        let change = self.pass_time(now, times);
        let generation = self.generation;
        let ticket = Ticket { generation, probe: 0 };
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
            Phase::HalfOpen { passed, failed, last_id, under_way } => {
                let taken = usize::from(*passed) + usize::from(*failed) + under_way.len();
                if self.settings.outside_probes || taken >= usize::from(self.settings.probes) {
                    Err(Refusal::Probing)
                } else {
                    let id = fresh_id(*last_id, under_way);
                    *last_id = id;
                    let lease_ends = now.saturating_add(nanos(self.settings.lease));
                    under_way.push(Probe { id, lease_ends, good_head: false });
                    Ok(Ticket { generation, probe: id })
                }
            }
        };
        (answer, change)
    }

    /// Whether a call would go now; a ramp's luck apart.
    pub(super) fn has_room(&self, now: Nanos) -> bool {
        match (self.state(now), &self.phase) {
            (State::Closed | State::ForcedClosed, _) => true,
            (State::Open | State::ForcedOpen, _) => false,
            (State::HalfOpen, _) if self.settings.outside_probes => false,
            (State::HalfOpen, Phase::HalfOpen { passed, failed, under_way, .. }) => {
                let taken = usize::from(*passed) + usize::from(*failed) + under_way.len();
                taken < usize::from(self.settings.probes)
            }
            (State::HalfOpen, _) => true,
        }
    }

    /// What happens by time alone: a wait ends, a lease ends, a ramp ends.
    pub(super) fn pass_time(&mut self, now: Nanos, times: &TimeWindows) -> Option<Change> {
        match &mut self.phase {
            Phase::Open { until } if now >= *until => {
                Some(self.enter(Phase::half_open(), State::HalfOpen, None))
            }
            Phase::Closed { since, ramps } if *ramps => {
                *ramps = now.saturating_sub(*since) < nanos(self.settings.ramp);
                None
            }
            Phase::HalfOpen { passed, under_way, .. } => {
                // A probe whose lease is over is decided by the head it saw, if it saw one.
                let over = |probe: &Probe| probe.lease_ends <= now;
                if under_way.iter().any(|probe| over(probe) && !probe.good_head) {
                    return Some(self.open(Tripped::ProbeLease, None, now, 0.0));
                }
                let before = under_way.len();
                under_way.retain(|probe| !over(probe));
                *passed += (before - under_way.len()) as u16;
                self.close_if_proven(now, times)
            }
            _ => None,
        }
    }

    // ===== A call ends =====

    /// A probe has seen its response head.
    pub(super) fn head(&mut self, ticket: Ticket, so_far: Outcome) {
        if ticket.generation != self.generation {
            return;
        }
        if let Phase::HalfOpen { under_way, .. } = &mut self.phase {
            if let Some(probe) = under_way.iter_mut().find(|probe| probe.id == ticket.probe) {
                probe.good_head =
                    !matches!(so_far.kind(), OutcomeKind::Failure | OutcomeKind::Throttled);
            }
        }
    }

    /// A call has ended. One of an older generation changes nothing.
    pub(super) fn finish(
        &mut self,
        ticket: Ticket,
        ended: Ended,
        now: Nanos,
        roll: impl FnOnce() -> f64,
        times: &TimeWindows,
    ) -> Option<Change> {
        if ticket.generation != self.generation {
            return None;
        }
        match &mut self.phase {
            Phase::Closed { .. } => {
                let tripped = self.counts.record(ended, now, times)?;
                Some(self.open(tripped, ended.outcome.retry_after(), now, roll()))
            }
            Phase::HalfOpen { under_way, .. } => {
                let slot = under_way.iter().position(|probe| probe.id == ticket.probe)?;
                under_way.swap_remove(slot);
                self.probed(ended, now, roll, times)
            }
            Phase::Open { .. } | Phase::ForcedOpen | Phase::ForcedClosed => None,
        }
    }

    /// An outcome from outside of the stack: counted like a call, or like a probe.
    pub(super) fn told(
        &mut self,
        outcome: Outcome,
        now: Nanos,
        roll: impl FnOnce() -> f64,
        times: &TimeWindows,
    ) -> Option<Change> {
        let by_time = self.pass_time(now, times);
        let ended = Ended { outcome, took: 0 };
        let by_call = match self.phase {
            Phase::HalfOpen { .. } => self.probed(ended, now, roll, times),
            _ => {
                let ticket = Ticket { generation: self.generation, probe: 0 };
                self.finish(ticket, ended, now, roll, times)
            }
        };
        by_call.or(by_time)
    }

    /// Decides as early as it is certain, both ways.
    fn probed(
        &mut self,
        ended: Ended,
        now: Nanos,
        roll: impl FnOnce() -> f64,
        times: &TimeWindows,
    ) -> Option<Change> {
        let slow = self.counts.was_slow(ended);
        let Phase::HalfOpen { passed, failed, .. } = &mut self.phase else { return None };
        match ended.outcome.kind() {
            // It gives its slot back; unless it was given up for being slow.
            OutcomeKind::Cancelled if !slow => return None,
            OutcomeKind::Success if !slow => {
                *passed += 1;
                return self.close_if_proven(now, times);
            }
            _ => *failed += 1,
        }
        let Settings { probes, needed, .. } = self.settings;
        if u32::from(*failed) + u32::from(needed) <= u32::from(probes) {
            return None;
        }
        let tripped = match ended.outcome.kind() {
            OutcomeKind::Failure | OutcomeKind::Throttled => {
                Tripped::Probe { outcome: ended.outcome }
            }
            OutcomeKind::Success | OutcomeKind::Cancelled => Tripped::SlowProbe,
        };
        Some(self.open(tripped, ended.outcome.retry_after(), now, roll()))
    }

    // ===== Changes =====

    fn close_if_proven(&mut self, now: Nanos, times: &TimeWindows) -> Option<Change> {
        match self.phase {
            Phase::HalfOpen { passed, .. } if passed >= self.settings.needed => {
                self.counts.clear(times);
                let ramps = !self.settings.ramp.is_zero();
                Some(self.enter(Phase::Closed { since: now, ramps }, State::Closed, None))
            }
            _ => None,
        }
    }

    fn open(&mut self, tripped: Tripped, hint: Option<Duration>, now: Nanos, roll: f64) -> Change {
        if let Phase::Closed { since, .. } = self.phase {
            if now.saturating_sub(since) >= nanos(self.settings.open_for.calm()) {
                self.restless = 0;
            }
        }
        let wait = self.settings.open_for.wait(self.restless, hint, roll);
        self.restless = self.restless.saturating_add(1);
        self.opened += 1;
        self.last = Some(tripped);
        let until = now.saturating_add(nanos(wait));
        self.enter(Phase::Open { until }, State::Open, Some(tripped))
    }

    /// Somebody says where it is.
    pub(super) fn force(&mut self, to: State, now: Nanos, times: &TimeWindows) -> Change {
        let phase = match to {
            State::ForcedOpen => Phase::ForcedOpen,
            State::ForcedClosed => Phase::ForcedClosed,
            State::HalfOpen => Phase::half_open(),
            State::Open | State::Closed => Phase::Closed { since: now, ramps: false },
        };
        if !matches!(phase, Phase::HalfOpen { .. }) {
            self.counts.clear(times);
            self.restless = 0;
        }
        self.enter(phase, to, None)
    }

    /// One more, or one less, holds it open. What it was goes on underneath.
    pub(super) fn isolate(&mut self, more: bool, now: Nanos) -> Option<Change> {
        let before = self.isolations;
        self.isolations = if more { before.saturating_add(1) } else { before.saturating_sub(1) };
        let turned = (before == 0) != (self.isolations == 0);
        turned.then(|| Change { to: self.state(now), tripped: None })
    }

    /// Takes up where another left off.
    pub(super) fn restore(
        &mut self,
        state: State,
        left: Duration,
        seen: Seen,
        now: Nanos,
        times: &TimeWindows,
    ) -> Change {
        self.counts.restore(seen, now, times);
        let phase = match state {
            State::Closed => Phase::Closed { since: now, ramps: false },
            State::Open => Phase::Open { until: now.saturating_add(nanos(left)) },
            State::HalfOpen => Phase::half_open(),
            State::ForcedOpen => Phase::ForcedOpen,
            State::ForcedClosed => Phase::ForcedClosed,
        };
        self.enter(phase, state, None)
    }

    /// New thresholds for the same rules; what was counted stays. False: they are other rules.
    pub(super) fn adjust(&mut self, trip: &Trip) -> bool {
        let fits = self.counts.adjust(trip, &self.shape);
        if fits {
            self.shape = trip.clone();
        }
        fits
    }

    fn enter(&mut self, phase: Phase, to: State, tripped: Option<Tripped>) -> Change {
        self.generation += 1;
        self.phase = phase;
        let to = if self.isolations > 0 { State::ForcedOpen } else { to };
        Change { to, tripped }
    }

    // ===== What is published for the path without the lock =====

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// The phase as it was entered, when an open one may end, and whether luck decides.
    pub(super) fn entered(&self) -> (State, Nanos, bool) {
        match self.phase {
            _ if self.isolations > 0 => (State::ForcedOpen, 0, false),
            Phase::Open { until } => (State::Open, until, false),
            Phase::Closed { ramps, .. } => (State::Closed, 0, ramps),
            _ => (self.state(0), 0, false),
        }
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

    pub(super) fn opened(&self) -> u64 {
        self.opened
    }

    pub(super) fn last_trip(&self) -> Option<Tripped> {
        self.last
    }

    pub(super) fn probes_under_way(&self) -> usize {
        match &self.phase {
            Phase::HalfOpen { under_way, .. } => under_way.len(),
            _ => 0,
        }
    }

    pub(super) fn seen(&self, now: Nanos, times: &TimeWindows) -> Seen {
        self.counts.seen(now, times)
    }
}

/// The next number that no probe under way has; never 0.
fn fresh_id(last: u16, under_way: &[Probe]) -> u16 {
    let mut id = last;
    loop {
        id = id.wrapping_add(1).max(1);
        if under_way.iter().all(|probe| probe.id != id) {
            return id;
        }
    }
}
