//! The transitions of the machine by calls and by time.

use std::time::Duration;

use super::super::{
    state::{CircuitToken, Rejection, Transition},
    trip::TripReason,
};
use super::{
    At, Machine, MachinePhase,
    probes::{MAX_CHANGES, ProbeReport, ProbeVerdict, Probes},
    stats::Ended,
};
use crate::{
    outcome::{Outcome, OutcomeKind, Reason},
    time::{Nanos, nanos},
};

impl Machine {
    // ===== Changes by time =====

    /// Makes the changes that are due by time alone: the end of an open time, of a probe timeout, of a ramp. Each
    /// change has the time at which it was due, even if no call arrived then.
    pub(in super::super) fn pass_time(&mut self, at: At<'_>) -> Option<Transition> {
        self.pass_time_within(at, usize::MAX)
    }

    /// Returns whether more changes are due than one lock hold may make: see [`pass_some_time`](Self::pass_some_time).
    pub(in super::super) fn is_far_behind(&self, now: Nanos) -> bool {
        matches!(&self.phase, MachinePhase::HalfOpen(probes) if probes.has_many_due(now))
    }

    /// Makes the changes that are due by time, up to as many as one lock hold may make.
    pub(in super::super) fn pass_some_time(&mut self, at: At<'_>) -> Option<Transition> {
        self.pass_time_within(at, MAX_CHANGES)
    }

    fn pass_time_within(&mut self, at: At<'_>, max_changes: usize) -> Option<Transition> {
        let (mut last, mut changes): (Option<Transition>, usize) = (None, 0);
        loop {
            if changes == max_changes {
                return last;
            }
            changes += 1;
            let next = match &mut self.phase {
                // `until` is inclusive: at that time the circuit is half-open.
                MachinePhase::Open { until } if at.now >= *until => {
                    self.last_event = self.last_event.max(*until);
                    let due = *until;
                    Some(self.transition_to(MachinePhase::HalfOpen(Probes::default()), None, due))
                }
                MachinePhase::HalfOpen(probes) => match probes.pass_time(at.now) {
                    Some(ended) => match self.decide(At { now: ended, ..at }) {
                        None => continue,
                        decided => decided,
                    },
                    None => self.decide(at),
                },
                MachinePhase::Closed { since, ramps } if *ramps => {
                    *ramps = at.now.saturating_sub(*since) < nanos(self.settings.ramp);
                    None
                }
                _ => None,
            };
            let Some(next) = next else { return last };
            last = Some(next.after(last));
        }
    }

    // ===== The admission of a call =====

    /// Admits or rejects a call. A half-open circuit admits a call only with a free probe slot.
    ///
    /// `is_unsent`: the request body is still to be sent.
    pub(in super::super) fn admit(
        &mut self,
        is_unsent: bool,
        at: At<'_>,
    ) -> (Result<CircuitToken, Rejection>, Option<Transition>) {
        if self.isolations > 0 {
            return (Err(Rejection::Forced), None);
        }
        let change = self.pass_time(at);
        let admitted = Ok(CircuitToken { generation: self.generation, is_probe: false });
        let admission = match &mut self.phase {
            MachinePhase::Closed { since, ramps: true } => {
                let gone = at.now.saturating_sub(*since);
                if self.settings.backpressure || (at.rng)() < self.settings.ramp_share(gone) {
                    admitted
                } else {
                    Err(Rejection::Ramping { left: nanos(self.settings.ramp).saturating_sub(gone) })
                }
            }
            MachinePhase::Closed { .. } | MachinePhase::ForcedClosed => admitted,
            MachinePhase::ForcedOpen => Err(Rejection::Forced),
            MachinePhase::Open { until } => {
                Err(Rejection::Open { left: until.saturating_sub(at.now) })
            }
            MachinePhase::HalfOpen(probes) if probes.has_room(&self.settings) => {
                self.generation += 1;
                self.last_event = at.now;
                probes.begin(self.generation, is_unsent, at.now, &self.settings);
                Ok(CircuitToken { generation: self.generation, is_probe: true })
            }
            MachinePhase::HalfOpen(_) => Err(Rejection::Probing),
        };
        (admission, change)
    }

    /// Records what a probe waits for. Returns whether the state of its slot has changed, and the change of the
    /// circuit.
    pub(in super::super) fn record_probe_report(
        &mut self,
        generation: u64,
        report: ProbeReport,
        at: At<'_>,
    ) -> (bool, Option<Transition>) {
        let slot_changed = match &mut self.phase {
            MachinePhase::HalfOpen(probes) => {
                probes.record_report(generation, report, &self.settings)
            }
            _ => false,
        };
        (slot_changed, self.pass_time(at))
    }

    // ===== The end of a call =====

    /// Records the response head of a probe.
    pub(in super::super) fn record_head(
        &mut self,
        probe: CircuitToken,
        so_far: Ended,
        at: At<'_>,
    ) -> Option<Transition> {
        let change = self.pass_time(at);
        if let MachinePhase::HalfOpen(probes) = &mut self.phase {
            let kind = so_far.outcome.kind();
            let bad = matches!(kind, OutcomeKind::Failure | OutcomeKind::Throttled);
            probes.record_head(probe.generation, !bad && !self.counts.was_slow(so_far));
        }
        change
    }

    /// Records the outcome of a call. The outcome of a call of an older generation changes nothing.
    pub(in super::super) fn release(
        &mut self,
        token: CircuitToken,
        ended: Ended,
        at: At<'_>,
    ) -> Option<Transition> {
        if !token.is_probe {
            return if token.generation == self.generation {
                self.record_call(ended, at)
            } else {
                None
            };
        }
        // The timeout of the probe may have passed. Then it has been decided by its response head.
        let by_time = self.pass_time(at);
        if let MachinePhase::HalfOpen(probes) = &mut self.phase {
            self.last_event = at.now;
            if probes.end(token.generation) {
                return self.record_probe(ended, at);
            }
        }
        by_time
    }

    /// Records an outcome that does not come from a call of this layer. It counts like the outcome of a call or of a
    /// probe.
    pub(in super::super) fn record_external(
        &mut self,
        outcome: Outcome,
        at: At<'_>,
    ) -> Option<Transition> {
        let by_time = self.pass_time(at);
        self.last_event = at.now;
        let ended = Ended { outcome, took: 0 };
        let by_call = match self.phase {
            MachinePhase::HalfOpen(_) => self.record_probe(ended, at),
            _ => self.record_call(ended, at),
        };
        by_call.map(|change| change.after(by_time)).or(by_time)
    }

    fn record_call(&mut self, ended: Ended, at: At<'_>) -> Option<Transition> {
        let MachinePhase::Closed { .. } = self.phase else { return None };
        self.last_event = at.now;
        let ended = Ended { outcome: self.counts.assess(ended.outcome, at.now), ..ended };
        if ended.outcome.is_failure() {
            self.history.record_failure(ended.outcome.reason());
        }
        let (rule, tripped) = self.counts.record(ended, at.now, at.times)?;
        let change = self.open(tripped, ended.outcome.retry_after(), at);
        self.last_rule = Some(rule);
        Some(change)
    }

    fn record_probe(&mut self, ended: Ended, at: At<'_>) -> Option<Transition> {
        let outcome = self.counts.assess(ended.outcome, at.now);
        let slow = self.counts.was_slow(Ended { outcome, ..ended });
        let MachinePhase::HalfOpen(probes) = &mut self.phase else { return None };
        match outcome.kind() {
            OutcomeKind::Success if !slow => probes.pass(),
            // The slot is already free. A probe that was cancelled after it was slow for a rule has failed.
            OutcomeKind::Cancelled if !slow => return None,
            OutcomeKind::Success | OutcomeKind::Cancelled => {
                probes.fail(TripReason::SlowProbe, None)
            }
            // The caller ended the call after it was slow for a rule.
            OutcomeKind::Failure if slow && outcome.reason() == Reason::NoResponse => {
                probes.fail(TripReason::SlowProbe, None);
            }
            OutcomeKind::Failure | OutcomeKind::Throttled => {
                probes.fail(TripReason::Probe { outcome }, outcome.retry_after());
            }
        }
        self.decide(at)
    }

    // ===== Transitions =====

    /// Closes or opens a half-open circuit as soon as the verdict of its probes is certain.
    fn decide(&mut self, at: At<'_>) -> Option<Transition> {
        let MachinePhase::HalfOpen(probes) = &self.phase else { return None };
        Some(match probes.verdict(&self.settings)? {
            ProbeVerdict::Open(tripped, hint) => self.open(tripped, hint, at),
            ProbeVerdict::Close => {
                self.counts.clear(at.times);
                let ramps = !self.settings.ramp.is_zero();
                self.transition_to(MachinePhase::Closed { since: at.now, ramps }, None, at.now)
            }
        })
    }

    fn open(&mut self, tripped: TripReason, hint: Option<Duration>, at: At<'_>) -> Transition {
        if self.has_recovered(at.now) {
            self.trips_in_row = 0;
        }
        let wait = self.settings.open_for.wait(self.trips_in_row, hint, (at.rng)());
        self.trips_in_row = self.trips_in_row.saturating_add(1);
        self.history.record_trip(tripped);
        (self.last, self.last_rule) = (Some(tripped), None);
        self.open_time = nanos(wait);
        let (since, opened) = self.episode.unwrap_or((at.now, 0));
        self.episode = Some((since, opened.saturating_add(1)));
        let until = at.now.saturating_add(self.open_time);
        self.transition_to(MachinePhase::Open { until }, Some(tripped), at.now)
    }
}
