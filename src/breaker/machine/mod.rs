//! The state machine: pure, synchronous, told the time and the luck.
//!
//! `rule` has what calls and time do to it, `by_hand` what a hand does, `view` what others see of it.

mod by_hand;
mod rule;
mod view;

use std::mem;

pub(super) use self::by_hand::Past;
use super::{
    counts::{Counts, TimeWindows},
    probes::Probes,
    state::{Change, Settings},
    trip::{Trip, Tripped},
};
use crate::call::{Nanos, nanos};

#[derive(Debug)]
pub(super) struct Machine {
    pub(super) settings: Settings,
    shape: Trip,
    counts: Counts,
    phase: Phase,
    /// One more with every change of phase and with every probe, so that a result can be told to be late.
    generation: u64,
    /// How many hold it open.
    isolations: u32,
    opened: u64,
    /// Trips since it was last calm.
    restless: u32,
    last: Option<Tripped>,
    /// The place of the rule that was; none for probes.
    last_rule: Option<usize>,
    /// The probes of a phase that has ended, until the owner of the lock [takes](Self::take_ended) them.
    ended: Option<Probes>,
    /// The time of the last event other than the passage of time.
    last_event: Nanos,
    /// The duration of the last open state, or of the next one if the circuit has not been open yet.
    open_time: Nanos,
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

impl Machine {
    pub(super) fn new(trip: Trip, settings: Settings, generation: u64) -> (Self, TimeWindows) {
        let (counts, times) = Counts::new(&trip);
        let open_time = nanos(settings.open_for.base());
        let machine = Self {
            settings,
            shape: trip,
            counts,
            phase: Phase::Closed { since: 0, ramps: false },
            generation,
            isolations: 0,
            opened: 0,
            restless: 0,
            last: None,
            last_rule: None,
            ended: None,
            last_event: 0,
            open_time,
        };
        (machine, times)
    }

    /// Closed for so long that its trips are forgotten.
    fn is_calm(&self, now: Nanos) -> bool {
        let Phase::Closed { since, .. } = self.phase else { return false };
        self.restless == 0 || now.saturating_sub(since) >= nanos(self.settings.open_for.calm())
    }

    fn enter(&mut self, phase: Phase, tripped: Option<Tripped>) -> Change {
        self.generation += 1;
        let (from, progress) = (self.state(), self.half_open_progress());
        if let Phase::HalfOpen(probes) = mem::replace(&mut self.phase, phase) {
            // If a phase ends while the probes of an earlier one are still here, the older ones are dropped. One lock
            // hold ends two phases only if their probes were few.
            self.ended = Some(probes);
        }
        Change { from, to: self.state(), tripped, probes: progress }
    }

    /// Takes the probes of a phase that has ended. There may be many, and they are dropped without the lock.
    pub(super) fn take_ended(&mut self) -> Option<Probes> {
        self.ended.take()
    }
}
