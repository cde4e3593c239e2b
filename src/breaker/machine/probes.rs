//! The half-open probes of a circuit: which are in flight, and their results so far.
//!
//! # Mechanism
//!
//! A half-open circuit admits `probes` probes in total. A probe holds a *slot* from its admission until it passes,
//! fails, or releases the slot without a result. A slot is free if fewer than `probes` probes have a result or hold
//! one. The [verdict](Probes::verdict) follows as soon as `needed` successes are reached or have become impossible.
//!
//! A probe is identified by its generation, which no other call of the circuit has. So the outcome of a probe that has
//! been decided, or that belongs to an earlier half-open state, finds no record and changes nothing.
//!
//! The timeout and the slot of a probe depend on what it waits for ([`ProbeWait`]):
//!
//! | the probe waits | its timeout | at the end of the timeout | its slot |
//! |---|---|---|---|
//! | for the upstream | starts when the request has been sent | fails | held |
//! | inside the client | keeps its end | ends without a result | held |
//! | for the transport to read the request | keeps its end | ends without a result | released after 100 ms |
//! | for the caller to send | does not run | | released after 100 ms |
//! | for the caller to read | keeps its end | fails | released after 100 ms |
//!
//! A probe with a good response head passes instead, at the end of its timeout or at the release of its slot.
//!
//! A probe that has released its slot is still in flight, and its outcome still counts. It holds a slot again when its
//! request has been sent or its response head arrives, even if other probes have all slots by then.
//!
//! # Bounds
//!
//! The lock of the circuit protects these records, and a half-open circuit can have many probes in flight. Therefore no
//! operation scans all probes: each finds its probe by an index, and time makes at most [`MAX_CHANGES`] changes under
//! one lock hold. The number of probes in flight exceeds the number of slots by at most [`MAX_BEYOND_SLOTS`].
//!
//! # Invariants
//!
//! - `by_time` has one entry for each probe in flight with a [next change](ProbeRecord::next_change), and no other
//!   entry.
//! - `released` has the generations of the probes in flight whose slot is [released](ProbeSlot::Released), and no
//!   other.
//! - All writes go through [`Probes::put`] and [`Probes::remove`], which maintain both indices.
//! - Results are recorded in the order of their time: each operation of the machine first makes the changes that are
//!   due.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::super::{
    state::{CircuitSettings, HalfOpenProgress},
    trip::TripReason,
};
use crate::{
    outcome::WaitsFor,
    time::{Nanos, nanos},
};

#[derive(Debug, Default)]
pub(crate) struct Probes {
    passed: u16,
    failed: u16,
    /// The reason of the last failure, with the hint of the upstream.
    failure: Option<(TripReason, Option<Duration>)>,
    /// The probes in flight, by generation. No other call of this circuit ever has the generation of a probe.
    in_flight: BTreeMap<u64, ProbeRecord>,
    /// The times at which probes change without a report.
    by_time: BTreeSet<(Nanos, u64)>,
    /// The probes that have released their slots. The others hold one.
    released: BTreeSet<u64>,
}

#[derive(Clone, Copy, Debug)]
struct ProbeRecord {
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

impl ProbeRecord {
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

/// The maximum number of probes in flight beyond the number of slots. A further probe replaces the oldest probe that
/// has released its slot.
const MAX_BEYOND_SLOTS: usize = 256;

/// The maximum number of changes that time makes while the lock is held once.
pub(crate) const MAX_CHANGES: usize = 64;

/// A report on the side that a probe waits for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProbeReport {
    pub(crate) what: WaitsFor,
    pub(crate) since: Nanos,
    /// The request has been sent, as far as the reporting layer can detect.
    pub(crate) is_sent: bool,
}

/// The decision of the probes.
pub(crate) enum ProbeVerdict {
    Close,
    Open(TripReason, Option<Duration>),
}

impl Probes {
    /// Returns the number of probes in flight.
    pub(crate) fn count_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Returns whether a call can get a probe slot. Requires that time [has passed](Self::pass_time).
    pub(crate) fn has_room(&self, settings: &CircuitSettings) -> bool {
        let decided = usize::from(self.passed) + usize::from(self.failed);
        let held = self.in_flight.len() - self.released.len();
        !settings.external_probes && decided + held < usize::from(settings.probes)
    }

    /// Begins a probe. Requires [`has_room`](Self::has_room).
    pub(crate) fn begin(
        &mut self,
        generation: u64,
        is_unsent: bool,
        now: Nanos,
        settings: &CircuitSettings,
    ) {
        if self.in_flight.len() >= usize::from(settings.probes) + MAX_BEYOND_SLOTS {
            if let Some(oldest) = self.released.first().copied() {
                self.remove(oldest);
            }
        }
        let ends = now.saturating_add(nanos(settings.probe_timeout));
        let (slot, wait) = match is_unsent {
            // The body has not been polled, so the call may still wait for a permit or a connection.
            true => (ProbeSlot::HeldUntil(ends), ProbeWait::InClient { ends }),
            false => (ProbeSlot::Held, ProbeWait::AtUpstream { ends }),
        };
        self.put(generation, ProbeRecord { slot, wait, head: None });
    }

    /// Inserts or replaces a probe, and updates the indices.
    fn put(&mut self, generation: u64, probe: ProbeRecord) {
        let before = self.in_flight.insert(generation, probe);
        let (before, next) = (before.and_then(|before| before.next_change()), probe.next_change());
        if before != next {
            if let Some(at) = before {
                self.by_time.remove(&(at, generation));
            }
            if let Some(at) = next {
                self.by_time.insert((at, generation));
            }
        }
        match probe.slot {
            ProbeSlot::Released => self.released.insert(generation),
            ProbeSlot::Held | ProbeSlot::HeldUntil(_) => self.released.remove(&generation),
        };
    }

    fn remove(&mut self, generation: u64) -> Option<ProbeRecord> {
        let probe = self.in_flight.remove(&generation)?;
        if let Some(at) = probe.next_change() {
            self.by_time.remove(&(at, generation));
        }
        self.released.remove(&generation);
        Some(probe)
    }

    /// Records what a probe waits for. Returns whether the state of its slot has changed.
    pub(crate) fn record_report(
        &mut self,
        generation: u64,
        report: ProbeReport,
        settings: &CircuitSettings,
    ) -> bool {
        let Some(mut probe) = self.in_flight.get(&generation).copied() else { return false };
        let ends = report.since.saturating_add(nanos(settings.probe_timeout));
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
        self.put(generation, probe);
        probe.slot != before
    }

    pub(crate) fn has(&self, generation: u64) -> bool {
        self.in_flight.contains_key(&generation)
    }

    pub(crate) fn record_head(&mut self, generation: u64, good: bool) {
        if let Some(probe) = self.in_flight.get(&generation).copied() {
            self.put(generation, ProbeRecord { head: Some(good), slot: ProbeSlot::Held, ..probe });
        }
    }

    /// Ends this probe and releases its slot. Returns `false` if there is no such probe.
    pub(crate) fn end(&mut self, generation: u64) -> bool {
        self.remove(generation).is_some()
    }

    pub(crate) fn pass(&mut self) {
        self.passed = self.passed.saturating_add(1);
    }

    pub(crate) fn fail(&mut self, how: TripReason, hint: Option<Duration>) {
        self.failed = self.failed.saturating_add(1);
        self.failure = Some((how, hint));
    }

    /// Returns the time of the next change without a report.
    pub(crate) fn next_change(&self) -> Option<Nanos> {
        self.by_time.first().map(|(at, _)| *at)
    }

    /// Returns whether more than [`MAX_CHANGES`] changes are due.
    pub(crate) fn has_many_due(&self, now: Nanos) -> bool {
        self.by_time.len() > MAX_CHANGES
            && self.by_time.iter().nth(MAX_CHANGES).is_some_and(|(due, _)| *due <= now)
    }

    /// Makes the first change that is due by now, and returns its time.
    ///
    /// At the end of its timeout the result of a probe depends on its response head and on what it waits for. A probe
    /// with a good response head that its caller does not read passes when it releases its slot.
    pub(crate) fn pass_time(&mut self, now: Nanos) -> Option<Nanos> {
        let (due, generation) = self.by_time.first().copied().filter(|(due, _)| *due <= now)?;
        let probe = self.in_flight.get(&generation).copied()?;
        let is_over = probe.wait.ends() == Some(due);
        match (probe.head, probe.wait) {
            (Some(true), _) => self.pass(),
            _ if !is_over => {
                self.put(generation, ProbeRecord { slot: ProbeSlot::Released, ..probe });
                return Some(due);
            }
            (None, ProbeWait::AtUpstream { .. }) | (Some(false), _) => {
                self.fail(TripReason::ProbeTimeout, None);
            }
            _ => {}
        }
        self.remove(generation);
        Some(due)
    }

    pub(crate) fn progress(&self, settings: &CircuitSettings) -> HalfOpenProgress {
        HalfOpenProgress {
            passed: self.passed,
            failed: self.failed,
            needed: settings.needed,
            total: settings.probes,
        }
    }

    pub(crate) fn verdict(&self, settings: &CircuitSettings) -> Option<ProbeVerdict> {
        if self.passed >= settings.needed {
            return Some(ProbeVerdict::Close);
        }
        let (how, hint) = self.failure?;
        let lost = u32::from(self.failed) + u32::from(settings.needed) > u32::from(settings.probes);
        lost.then_some(ProbeVerdict::Open(how, hint))
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use proptest::prelude::*;

    use super::super::{
        super::{state::CircuitState, trip::Trip},
        At, Machine,
    };
    use super::*;

    const SETTINGS: CircuitSettings =
        CircuitSettings { probes: 1000, needed: 1000, ..CircuitSettings::DEFAULT };

    fn assert_indices(probes: &Probes) {
        let by_time: BTreeSet<_> = probes
            .in_flight
            .iter()
            .filter_map(|(generation, probe)| Some((probe.next_change()?, *generation)))
            .collect();
        let released: BTreeSet<_> = probes
            .in_flight
            .iter()
            .filter(|(_, probe)| probe.slot == ProbeSlot::Released)
            .map(|(generation, _)| *generation)
            .collect();
        assert_eq!((&probes.by_time, &probes.released), (&by_time, &released));
    }

    proptest! {
        #[test]
        fn indices_match_the_probes_after_any_operations(
            steps in prop::collection::vec((0u8..6, 0u64..40, 0u8..4, any::<bool>()), 1..300),
        ) {
            let settings = CircuitSettings { probe_timeout: Duration::from_nanos(50), probes: 3, ..SETTINGS };
            let (mut probes, mut now, mut last) = (Probes::default(), 0, 0_u64);
            for (step, number, what, flag) in steps {
                // The last probes, and some that do not exist.
                let probe = (last + 1).saturating_sub(number % 8);
                match step {
                    0 => {
                        last += 1;
                        probes.begin(last, flag, now, &settings);
                    }
                    1 => {
                        let what = [
                            WaitsFor::Client,
                            WaitsFor::Upstream,
                            WaitsFor::Caller,
                            WaitsFor::Transport,
                        ][usize::from(what)];
                        let report = ProbeReport { what, since: now, is_sent: flag };
                        probes.record_report(probe, report, &settings);
                    }
                    2 => probes.record_head(probe, flag),
                    3 => drop(probes.end(probe)),
                    4 => now += number * 3_000_000,
                    _ => while probes.pass_time(now).is_some() {
                        assert_indices(&probes);
                    },
                }
                assert_indices(&probes);
            }
        }
    }

    #[test]
    fn time_changes_at_most_64_probes_per_lock_hold() {
        let (mut machine, times) = Machine::new(Trip::consecutive(1), SETTINGS, 1);
        let at = |now| At { now, rng: || 0.5, times: &times };
        machine.force(CircuitState::HalfOpen, 0, &times);
        for _ in 0..1000 {
            assert!(machine.admit(true, at(0)).0.is_ok_and(|token| token.is_probe));
        }
        let late = at(nanos(SETTINGS.probe_timeout));
        let mut holds = 0;
        while machine.is_far_behind(late.now) {
            let before = machine.probes_in_flight();
            machine.pass_some_time(late);
            assert_eq!(before - machine.probes_in_flight(), MAX_CHANGES);
            holds += 1;
        }
        assert_eq!((holds, machine.probes_in_flight()), (15, 40));
        machine.pass_time(late);
        assert_eq!(machine.probes_in_flight(), 0);
    }
}
