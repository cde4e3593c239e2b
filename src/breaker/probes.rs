//! The probes of a half-open circuit: which are under way, and what they have said so far.

use std::time::Duration;

use super::{state::Settings, trip::Tripped};
use crate::call::{Nanos, nanos};

#[derive(Debug, Default)]
pub(super) struct Probes {
    passed: u16,
    failed: u16,
    /// How the last of them failed, with the server's hint.
    failure: Option<(Tripped, Option<Duration>)>,
    under_way: Vec<Probe>,
}

#[derive(Debug)]
struct Probe {
    /// Its own: no other call of this circuit ever has the same.
    generation: u64,
    lease_ends: Nanos,
    good_head: bool,
}

/// What the probes say as soon as it is certain.
pub(super) enum Verdict {
    Close,
    Open(Tripped, Option<Duration>),
}

impl Probes {
    pub(super) fn under_way(&self) -> usize {
        self.under_way.len()
    }

    /// All in all, not only at once.
    pub(super) fn has_room(&self, settings: &Settings) -> bool {
        let taken = usize::from(self.passed) + usize::from(self.failed) + self.under_way.len();
        !settings.outside_probes && taken < usize::from(settings.probes)
    }

    /// One goes; there is [room](Self::has_room).
    pub(super) fn begin(&mut self, generation: u64, now: Nanos, settings: &Settings) {
        let lease_ends = now.saturating_add(nanos(settings.lease));
        self.under_way.push(Probe { generation, lease_ends, good_head: false });
    }

    pub(super) fn has(&self, generation: u64) -> bool {
        self.under_way.iter().any(|probe| probe.generation == generation)
    }

    pub(super) fn head(&mut self, generation: u64, good: bool) {
        if let Some(probe) = self.under_way.iter_mut().find(|probe| probe.generation == generation)
        {
            probe.good_head = good;
        }
    }

    /// Gives the slot of this probe back. False: it has none.
    pub(super) fn end(&mut self, generation: u64) -> bool {
        let at = self.under_way.iter().position(|probe| probe.generation == generation);
        at.map(|at| self.under_way.remove(at)).is_some()
    }

    pub(super) fn pass(&mut self) {
        self.passed = self.passed.saturating_add(1);
    }

    pub(super) fn fail(&mut self, how: Tripped, hint: Option<Duration>) {
        self.failed = self.failed.saturating_add(1);
        self.failure = Some((how, hint));
    }

    /// When the first of the leases ends.
    pub(super) fn next_lease(&self) -> Option<Nanos> {
        self.under_way.iter().map(|probe| probe.lease_ends).min()
    }

    /// Decides the probe whose lease ended first, by the head it saw; tells when that was.
    pub(super) fn end_lease(&mut self, now: Nanos) -> Option<Nanos> {
        let ended = self.next_lease().filter(|ends| *ends <= now)?;
        let at = self.under_way.iter().position(|probe| probe.lease_ends == ended)?;
        if self.under_way.remove(at).good_head {
            self.pass();
        } else {
            self.fail(Tripped::ProbeLease, None);
        }
        Some(ended)
    }

    pub(super) fn verdict(&self, settings: &Settings) -> Option<Verdict> {
        if self.passed >= settings.needed {
            return Some(Verdict::Close);
        }
        let (how, hint) = self.failure?;
        let lost = u32::from(self.failed) + u32::from(settings.needed) > u32::from(settings.probes);
        lost.then_some(Verdict::Open(how, hint))
    }
}
