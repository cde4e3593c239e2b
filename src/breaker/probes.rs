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
    last_id: u16,
    under_way: Vec<Probe>,
}

#[derive(Debug)]
struct Probe {
    id: u16,
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

    /// The number of the probe that goes now, if one may; never 0.
    pub(super) fn begin(&mut self, now: Nanos, settings: &Settings) -> Option<u16> {
        if !self.has_room(settings) {
            return None;
        }
        let mut id = self.last_id;
        loop {
            id = id.wrapping_add(1).max(1);
            if self.under_way.iter().all(|probe| probe.id != id) {
                break;
            }
        }
        self.last_id = id;
        let lease_ends = now.saturating_add(nanos(settings.lease));
        self.under_way.push(Probe { id, lease_ends, good_head: false });
        Some(id)
    }

    pub(super) fn head(&mut self, id: u16, good: bool) {
        if let Some(probe) = self.under_way.iter_mut().find(|probe| probe.id == id) {
            probe.good_head = good;
        }
    }

    /// Gives the slot of this probe back. False: it has none.
    pub(super) fn end(&mut self, id: u16) -> bool {
        let at = self.under_way.iter().position(|probe| probe.id == id);
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
