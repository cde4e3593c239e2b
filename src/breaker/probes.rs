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
    wait: ProbeWait,
    /// Whether the response head was good. `None` before the head.
    head: Option<bool>,
}

/// What a probe waits for, and when its timeout ends.
#[derive(Clone, Copy, Debug)]
enum ProbeWait {
    /// The upstream has the request. Without a good response head at the end of the timeout, the probe has failed.
    AtUpstream { ends: Nanos },
    /// The call waits inside the client. At the end of the timeout the slot becomes free without a result.
    InClient { ends: Nanos },
    /// The request is still to be sent. Other calls may use the slot, and no timeout runs.
    Unsent,
    /// The response waits for its reader. Other calls may use the slot.
    AtReader { ends: Nanos },
}

impl ProbeWait {
    fn ends(self) -> Option<Nanos> {
        match self {
            Self::AtUpstream { ends } | Self::InClient { ends } | Self::AtReader { ends } => {
                Some(ends)
            }
            Self::Unsent => None,
        }
    }

    /// Returns whether the probe occupies its slot.
    fn takes_slot(self) -> bool {
        matches!(self, Self::AtUpstream { .. } | Self::InClient { .. })
    }
}

/// The maximum number of probes in flight beyond the number of slots. Probes that wait for their callers leave their
/// slots to other probes.
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

    /// Returns whether a call can get a probe slot. A probe that waits for its caller leaves its slot to other calls.
    /// The number of probes whose request is still to be sent is limited to the number of slots.
    pub(super) fn has_room(&self, is_unsent: bool, settings: &Settings) -> bool {
        let slots = usize::from(settings.probes);
        let unsent =
            self.under_way.iter().filter(|probe| matches!(probe.wait, ProbeWait::Unsent)).count();
        let decided = usize::from(self.passed) + usize::from(self.failed);
        let taken = decided + self.under_way.iter().filter(|probe| probe.wait.takes_slot()).count();
        !settings.outside_probes
            && taken < slots
            && self.under_way.len() < slots + MAX_BEYOND_SLOTS
            && !(is_unsent && unsent >= slots)
    }

    /// Begins a probe. Requires [`has_room`](Self::has_room).
    pub(super) fn begin(
        &mut self,
        generation: u64,
        is_unsent: bool,
        now: Nanos,
        settings: &Settings,
    ) {
        let ends = now.saturating_add(nanos(settings.lease));
        let wait = if is_unsent { ProbeWait::Unsent } else { ProbeWait::AtUpstream { ends } };
        self.under_way.push(Probe { generation, wait, head: None });
    }

    /// Records what a probe waits for since `since`.
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
            let same = probe.wait.ends().unwrap_or(ends);
            probe.wait = match (what, probe.head) {
                (WaitsFor::Upstream, None) => ProbeWait::AtUpstream { ends },
                (WaitsFor::Upstream, Some(_)) => ProbeWait::AtUpstream { ends: same },
                (WaitsFor::Client, _) => ProbeWait::InClient { ends: same },
                (WaitsFor::Caller, None) => ProbeWait::Unsent,
                (WaitsFor::Caller, Some(_)) => ProbeWait::AtReader { ends: same },
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
        self.under_way.iter().filter_map(|probe| probe.wait.ends()).min()
    }

    /// Decides the probe whose timeout ended first, by its response head and by what it waited for. Returns that time.
    pub(super) fn end_lease(&mut self, now: Nanos) -> Option<Nanos> {
        let ended = self.next_lease().filter(|ends| *ends <= now)?;
        let at = self.under_way.iter().position(|probe| probe.wait.ends() == Some(ended))?;
        match self.under_way.remove(at) {
            Probe { head: Some(true), .. } => self.pass(),
            Probe { wait: ProbeWait::AtUpstream { .. }, .. } => {
                self.fail(Tripped::ProbeLease, None)
            }
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
