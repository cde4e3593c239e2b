//! The state machine: pure, synchronous, told the time.

use std::time::Duration;

use super::trip::{Counts, Trip, Tripped};
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
    pub(super) open_for: Duration,
    pub(super) probes: u16,
    pub(super) lease: Duration,
}

#[derive(Debug)]
pub(super) struct Machine {
    pub(super) settings: Settings,
    counts: Counts,
    phase: Phase,
    /// One more with every change of phase, so that a result can be told to be late.
    generation: u64,
    opened: u64,
    last: Option<Tripped>,
}

#[derive(Debug)]
enum Phase {
    Closed,
    Open { until: Nanos },
    HalfOpen { passed: u16, last_id: u16, under_way: Vec<Probe> },
    ForcedOpen,
    ForcedClosed,
}

#[derive(Debug)]
struct Probe {
    id: u16,
    lease_ends: Nanos,
    good_head: bool,
}

impl Machine {
    pub(super) fn new(trip: &Trip, settings: Settings) -> Self {
        Self {
            settings,
            counts: Counts::new(trip),
            phase: Phase::Closed,
            generation: 0,
            opened: 0,
            last: None,
        }
    }

    pub(super) fn state(&self, now: Nanos) -> State {
        match self.phase {
            Phase::Closed => State::Closed,
            // The end of the wait is part of what comes after it.
            Phase::Open { until } if now >= until => State::HalfOpen,
            Phase::Open { .. } => State::Open,
            Phase::HalfOpen { .. } => State::HalfOpen,
            Phase::ForcedOpen => State::ForcedOpen,
            Phase::ForcedClosed => State::ForcedClosed,
        }
    }

    /// May a call go? Half-open, at most `probes` go, each with a slot that comes back.
    pub(super) fn admit(&mut self, now: Nanos) -> (Result<Ticket, Refusal>, Option<Change>) {
        let mut change = None;
        match self.phase {
            Phase::Open { until } if now >= until => {
                let fresh = Phase::HalfOpen { passed: 0, last_id: 0, under_way: Vec::new() };
                change = Some(self.enter(fresh, None));
            }
            Phase::HalfOpen { .. } => change = self.end_leases(now),
            _ => {}
        }
        let generation = self.generation;
        let answer = match &mut self.phase {
            Phase::Closed | Phase::ForcedClosed => Ok(Ticket { generation, probe: 0 }),
            Phase::ForcedOpen => Err(Refusal::Forced),
            Phase::Open { until } => {
                Err(Refusal::Open { left: Duration::from_nanos(until.saturating_sub(now)) })
            }
            Phase::HalfOpen { passed, last_id, under_way } => {
                if !has_slot(self.settings.probes, *passed, under_way) {
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

    /// Whether [`admit`](Self::admit) would say yes, leases apart.
    pub(super) fn lets_through(&self, now: Nanos) -> bool {
        match &self.phase {
            Phase::Closed | Phase::ForcedClosed => true,
            Phase::Open { until } => now >= *until,
            Phase::ForcedOpen => false,
            Phase::HalfOpen { passed, under_way, .. } => {
                has_slot(self.settings.probes, *passed, under_way)
            }
        }
    }

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
        outcome: Outcome,
        now: Nanos,
    ) -> Option<Change> {
        if ticket.generation != self.generation {
            return None;
        }
        match &mut self.phase {
            Phase::Closed => {
                let tripped = self.counts.record(outcome, now)?;
                Some(self.open(tripped, now))
            }
            Phase::HalfOpen { passed, under_way, .. } => {
                let slot = under_way.iter().position(|probe| probe.id == ticket.probe)?;
                under_way.swap_remove(slot);
                match outcome.kind() {
                    OutcomeKind::Cancelled => None,
                    OutcomeKind::Success => {
                        *passed += 1;
                        self.close_if_proven()
                    }
                    OutcomeKind::Failure | OutcomeKind::Throttled => {
                        Some(self.open(Tripped::Probe { outcome }, now))
                    }
                }
            }
            Phase::Open { .. } | Phase::ForcedOpen | Phase::ForcedClosed => None,
        }
    }

    /// Decides the probes whose lease is over by the head they saw, if they saw one.
    pub(super) fn end_leases(&mut self, now: Nanos) -> Option<Change> {
        let Phase::HalfOpen { passed, under_way, .. } = &mut self.phase else { return None };
        let over = |probe: &Probe| probe.lease_ends <= now;
        if under_way.iter().any(|probe| over(probe) && !probe.good_head) {
            return Some(self.open(Tripped::ProbeLease, now));
        }
        let before = under_way.len();
        under_way.retain(|probe| !over(probe));
        *passed += (before - under_way.len()) as u16;
        self.close_if_proven()
    }

    pub(super) fn force(&mut self, to: State) -> Change {
        let phase = match to {
            State::ForcedOpen => Phase::ForcedOpen,
            State::ForcedClosed => Phase::ForcedClosed,
            _ => Phase::Closed,
        };
        self.counts.clear();
        self.enter(phase, None)
    }

    fn close_if_proven(&mut self) -> Option<Change> {
        match self.phase {
            Phase::HalfOpen { passed, .. } if passed >= self.settings.probes => {
                self.counts.clear();
                Some(self.enter(Phase::Closed, None))
            }
            _ => None,
        }
    }

    fn open(&mut self, tripped: Tripped, now: Nanos) -> Change {
        self.opened += 1;
        self.last = Some(tripped);
        let until = now.saturating_add(nanos(self.settings.open_for));
        self.enter(Phase::Open { until }, Some(tripped))
    }

    fn enter(&mut self, phase: Phase, tripped: Option<Tripped>) -> Change {
        self.generation += 1;
        self.phase = phase;
        // Whatever the phase, its own beginning: `state` at time 0 never takes an open one for over.
        let to = match self.phase {
            Phase::Closed => State::Closed,
            Phase::Open { .. } => State::Open,
            Phase::HalfOpen { .. } => State::HalfOpen,
            Phase::ForcedOpen => State::ForcedOpen,
            Phase::ForcedClosed => State::ForcedClosed,
        };
        Change { to, tripped }
    }

    // ===== What is published for the path without a lock =====

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// The phase as it was entered: open stays open until somebody asks.
    pub(super) fn entered(&self) -> (State, Nanos) {
        match self.phase {
            Phase::Open { until } => (State::Open, until),
            _ => (self.state(0), 0),
        }
    }

    pub(super) fn is_clean(&self) -> bool {
        self.counts.is_clean()
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

    pub(super) fn seen(&mut self, now: Nanos) -> (u32, u64, u64) {
        self.counts.seen(now)
    }
}

/// Probes that have passed keep their slot: so many go, all in all.
fn has_slot(probes: u16, passed: u16, under_way: &[Probe]) -> bool {
    usize::from(passed) + under_way.len() < usize::from(probes)
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
