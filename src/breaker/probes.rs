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
    slot: ProbeSlot,
    wait: ProbeWait,
    /// Whether the response head was good. `None` before the head.
    head: Option<bool>,
}

/// The state of the slot of a probe. No other call can get a slot that is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ProbeSlot {
    Held,
    /// The probe waits for its caller. It releases the slot at this time.
    HeldUntil(Nanos),
    /// The probe has waited too long for its caller. Its outcome still counts.
    Released,
}

/// The current wait of a probe, with the end of its timeout.
#[derive(Clone, Copy, Debug)]
enum ProbeWait {
    /// The upstream has the request. Without a good response head at the end of the timeout, the probe has failed.
    AtUpstream { ends: Nanos },
    /// The call waits inside the client. At the end of the timeout the slot becomes free without a result.
    InClient { ends: Nanos },
    /// The caller delays the request, and no timeout runs.
    AtSender,
    /// The response waits for its reader.
    AtReader { ends: Nanos },
}

impl ProbeWait {
    fn ends(self) -> Option<Nanos> {
        match self {
            Self::AtUpstream { ends } | Self::InClient { ends } | Self::AtReader { ends } => {
                Some(ends)
            }
            Self::AtSender => None,
        }
    }
}

impl Probe {
    /// The time of the next change without a report: the end of the timeout, or the release of the slot.
    fn next_change(&self) -> Option<Nanos> {
        match (self.wait.ends(), self.slot) {
            (Some(ends), ProbeSlot::HeldUntil(until)) => Some(ends.min(until)),
            (None, ProbeSlot::HeldUntil(until)) => Some(until),
            (ends, _) => ends,
        }
    }
}

/// The maximum time for which a probe that waits for its caller holds its slot. Most request and response bodies need
/// less. The constant bounds the rate at which calls with slow bodies reach a half-open upstream, and the time for
/// which such a call keeps other calls from probing.
const MAX_CALLER_WAIT: Nanos = 100_000_000;

/// The maximum number of probes in flight beyond the number of slots. A further probe replaces the oldest probe
/// that has released its slot.
const MAX_BEYOND_SLOTS: usize = 256;

/// A report on what a probe waits for.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProbeReport {
    pub(super) what: WaitsFor,
    pub(super) since: Nanos,
    /// The request has been sent, as far as the reporting layer can detect.
    pub(super) is_sent: bool,
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

    /// Returns whether a call can get a probe slot.
    pub(super) fn has_room(&self, now: Nanos, settings: &Settings) -> bool {
        let holds = |probe: &&Probe| match probe.slot {
            ProbeSlot::Held => true,
            ProbeSlot::HeldUntil(until) => now < until,
            ProbeSlot::Released => false,
        };
        let decided = usize::from(self.passed) + usize::from(self.failed);
        let taken = decided + self.under_way.iter().filter(holds).count();
        !settings.outside_probes && taken < usize::from(settings.probes)
    }

    /// Begins a probe. Requires [`has_room`](Self::has_room).
    pub(super) fn begin(
        &mut self,
        generation: u64,
        is_unsent: bool,
        now: Nanos,
        settings: &Settings,
    ) {
        if self.under_way.len() >= usize::from(settings.probes) + MAX_BEYOND_SLOTS {
            if let Some(oldest) =
                self.under_way.iter().position(|probe| probe.slot == ProbeSlot::Released)
            {
                self.under_way.remove(oldest);
            }
        }
        let ends = now.saturating_add(nanos(settings.lease));
        let (slot, wait) = match is_unsent {
            // The body has not been polled, so the call may still wait for a permit or a connection.
            true => (ProbeSlot::HeldUntil(ends), ProbeWait::InClient { ends }),
            false => (ProbeSlot::Held, ProbeWait::AtUpstream { ends }),
        };
        self.under_way.push(Probe { generation, slot, wait, head: None });
    }

    /// Records what a probe waits for. Returns whether the state of its slot has changed.
    pub(super) fn record_report(
        &mut self,
        generation: u64,
        report: ProbeReport,
        settings: &Settings,
    ) -> bool {
        let probe = self.under_way.iter_mut().find(|probe| probe.generation == generation);
        let Some(probe) = probe else { return false };
        let ends = report.since.saturating_add(nanos(settings.lease));
        let unchanged = probe.wait.ends().unwrap_or(ends);
        let before = probe.slot;
        match (report.what, probe.head) {
            (WaitsFor::Client, _) => probe.wait = ProbeWait::InClient { ends: unchanged },
            (WaitsFor::Upstream, head) => {
                let ends = if head.is_none() { ends } else { unchanged };
                probe.wait = ProbeWait::AtUpstream { ends };
                if report.is_sent {
                    probe.slot = ProbeSlot::Held;
                }
            }
            // Without a mark, no report follows when the transport begins to read the request. A wait for the transport
            // is therefore bounded like a wait for the caller.
            (WaitsFor::Caller | WaitsFor::Transport, head) => {
                probe.wait = match (report.what, head) {
                    (WaitsFor::Transport, _) => ProbeWait::InClient { ends: unchanged },
                    (_, None) => ProbeWait::AtSender,
                    (_, Some(_)) => ProbeWait::AtReader { ends: unchanged },
                };
                let until = report.since.saturating_add(MAX_CALLER_WAIT);
                probe.slot = match probe.slot {
                    ProbeSlot::Held => ProbeSlot::HeldUntil(until),
                    ProbeSlot::HeldUntil(earlier) => ProbeSlot::HeldUntil(until.min(earlier)),
                    ProbeSlot::Released => ProbeSlot::Released,
                };
            }
        }
        probe.slot != before
    }

    pub(super) fn has(&self, generation: u64) -> bool {
        self.under_way.iter().any(|probe| probe.generation == generation)
    }

    pub(super) fn head(&mut self, generation: u64, good: bool) {
        if let Some(probe) = self.under_way.iter_mut().find(|probe| probe.generation == generation)
        {
            (probe.head, probe.slot) = (Some(good), ProbeSlot::Held);
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

    /// The time of the next change without a report.
    pub(super) fn next_change(&self) -> Option<Nanos> {
        self.under_way.iter().filter_map(Probe::next_change).min()
    }

    /// Makes the first change that is due by now, and returns its time.
    ///
    /// At the end of its timeout the result of a probe depends on its response head and on what it waits for. A probe
    /// with a good response head that its caller does not read passes when it releases its slot.
    pub(super) fn pass_time(&mut self, now: Nanos) -> Option<Nanos> {
        let due = self.next_change().filter(|due| *due <= now)?;
        let at = self.under_way.iter().position(|probe| probe.next_change() == Some(due))?;
        let probe = &mut self.under_way[at];
        let is_over = probe.wait.ends() == Some(due);
        match (probe.head, probe.wait) {
            (Some(true), _) => self.pass(),
            _ if !is_over => {
                probe.slot = ProbeSlot::Released;
                return Some(due);
            }
            (None, ProbeWait::AtUpstream { .. }) | (Some(false), _) => {
                self.fail(Tripped::ProbeLease, None);
            }
            _ => {}
        }
        self.under_way.remove(at);
        Some(due)
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
