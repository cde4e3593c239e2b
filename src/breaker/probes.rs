//! The probes of a half-open circuit: which are under way, and what they have said so far.

use std::time::Duration;

use super::{state::Settings, trip::Tripped};
use crate::call::{Nanos, WaitsFor, nanos};

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
    lease: Lease,
    /// Whether its response head was good, once it is here.
    head: Option<bool>,
}

/// How long a probe keeps its slot.
#[derive(Clone, Copy, Debug)]
enum Lease {
    /// The upstream has the request: without a good head by then, the probe has failed.
    AtUpstream { ends: Nanos },
    /// The call waits inside the client: then its slot goes to another call, and nothing is decided.
    InClient { ends: Nanos },
    /// The request is still to be sent: for as long as its caller takes, other calls may have the slot.
    Unsent,
    /// The response waits for its reader: other calls may have the slot meanwhile.
    AtReader { ends: Nanos },
}

impl Lease {
    fn ends(self) -> Option<Nanos> {
        match self {
            Self::AtUpstream { ends } | Self::InClient { ends } | Self::AtReader { ends } => {
                Some(ends)
            }
            Self::Unsent => None,
        }
    }

    /// Whether the probe keeps other calls from its slot.
    fn takes_slot(self) -> bool {
        matches!(self, Self::AtUpstream { .. } | Self::InClient { .. })
    }
}

/// No more probes than this are under way beyond the slots, however many wait for their callers.
const MAX_BEYOND_SLOTS: usize = 16;

/// What the probes say as soon as it is certain.
pub(super) enum Verdict {
    Close,
    Open(Tripped, Option<Duration>),
}

impl Probes {
    pub(super) fn under_way(&self) -> usize {
        self.under_way.len()
    }

    /// Whether a call gets a probe slot. A probe that waits for its caller leaves its slot to other calls, but for one
    /// thing: of probes whose request is still to be sent no more may be under way than there are slots.
    pub(super) fn has_room(&self, is_unsent: bool, settings: &Settings) -> bool {
        let slots = usize::from(settings.probes);
        let unsent =
            self.under_way.iter().filter(|probe| matches!(probe.lease, Lease::Unsent)).count();
        let decided = usize::from(self.passed) + usize::from(self.failed);
        let taken =
            decided + self.under_way.iter().filter(|probe| probe.lease.takes_slot()).count();
        !settings.outside_probes
            && taken < slots
            && self.under_way.len() < slots + MAX_BEYOND_SLOTS
            && !(is_unsent && unsent >= slots)
    }

    /// Begins a probe, for which there is [room](Self::has_room).
    pub(super) fn begin(
        &mut self,
        generation: u64,
        is_unsent: bool,
        now: Nanos,
        settings: &Settings,
    ) {
        let ends = now.saturating_add(nanos(settings.lease));
        let lease = if is_unsent { Lease::Unsent } else { Lease::AtUpstream { ends } };
        self.under_way.push(Probe { generation, lease, head: None });
    }

    /// Notes what a probe waits for, since then.
    pub(super) fn waits_for(
        &mut self,
        generation: u64,
        what: WaitsFor,
        since: Nanos,
        settings: &Settings,
    ) {
        let probe = self.under_way.iter_mut().find(|probe| probe.generation == generation);
        let ends = since.saturating_add(nanos(settings.lease));
        if let Some(probe) = probe {
            let same = probe.lease.ends().unwrap_or(ends);
            probe.lease = match (what, probe.head) {
                (WaitsFor::Upstream, None) => Lease::AtUpstream { ends },
                (WaitsFor::Upstream, Some(_)) => Lease::AtUpstream { ends: same },
                (WaitsFor::Client, _) => Lease::InClient { ends: same },
                (WaitsFor::Caller, None) => Lease::Unsent,
                (WaitsFor::Caller, Some(_)) => Lease::AtReader { ends: same },
            };
        }
    }

    pub(super) fn has(&self, generation: u64) -> bool {
        self.under_way.iter().any(|probe| probe.generation == generation)
    }

    pub(super) fn head(&mut self, generation: u64, good: bool) {
        if let Some(probe) = self.under_way.iter_mut().find(|probe| probe.generation == generation)
        {
            probe.head = Some(good);
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
        self.under_way.iter().filter_map(|probe| probe.lease.ends()).min()
    }

    /// Decides the probe whose lease ended first, by the head it saw and by what it waited for; tells when that was.
    pub(super) fn end_lease(&mut self, now: Nanos) -> Option<Nanos> {
        let ended = self.next_lease().filter(|ends| *ends <= now)?;
        let at = self.under_way.iter().position(|probe| probe.lease.ends() == Some(ended))?;
        match self.under_way.remove(at) {
            Probe { head: Some(true), .. } => self.pass(),
            Probe { lease: Lease::AtUpstream { .. }, .. } => self.fail(Tripped::ProbeLease, None),
            _ => {}
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
