//! The metrics of health probes and of the checks of a process.

use std::{
    sync::{Arc, Weak},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    entry::CheckState,
    gate::{Gate, Probing},
    handle::HealthProbeHandle,
    probe::ProbeFailure,
    registry::{CheckRegistry, Health},
    threshold::ProbeState,
};
use crate::{
    observe::{Condition, Observe, Observed, Part, Severity, Value, Visit, metrics::*},
    outcome::{LayerKind, RejectedKind},
    report::ReportChange,
    sealed::Sealed,
};

const LAYER: &str = LayerKind::HealthProbe.as_str();
const PROBE_STATES: [ProbeState; 3] = [ProbeState::Unknown, ProbeState::Up, ProbeState::Down];
const CHECK_STATES: [CheckState; 3] = [CheckState::Unknown, CheckState::Pass, CheckState::Fail];

impl Sealed for HealthProbeHandle {}

/// The registry holds a weak reference: a handle would keep the prober alive.
impl Observe for HealthProbeHandle {
    fn parts(&self) -> Vec<Part> {
        let state: Weak<Gate> = Arc::downgrade(&self.0);
        vec![Part::new(LAYER, self.0.name(), state)]
    }
}

impl Observed for Gate {
    fn observe(&self, to: &mut dyn Visit) {
        let (state, last, passed, skipped, failed) = self.with(|probing| {
            let Probing { passed, skipped, failed, .. } = *probing;
            (probing.threshold.state(), probing.last, passed, skipped, failed)
        });
        let rejections = [
            (RejectedKind::Unhealthy.as_str(), self.rejected()),
            (RejectedKind::Misconfigured.as_str(), self.misconfigured()),
        ];
        to.counts_of(&REJECTIONS_METRIC, LAYER, "reason", rejections);
        to.counts(&SHADOW_REJECTIONS, "layer", [(LAYER, self.shadowed())]);
        let states = PROBE_STATES.into_iter().map(ProbeState::as_str);
        to.state(&PROBE_STATE, "state", states, state.as_str());
        let runs = [("pass", passed), ("skipped", skipped)].into_iter();
        let failures = ProbeFailure::LABELS.into_iter().zip(failed);
        to.counts(&PROBE_RUNS, "result", runs.chain(failures));
        let Some(last) = last else { return };
        to.number(&PROBE_LAST_DURATION, last.took.as_secs_f64());
        let age = Duration::from_nanos(self.now().saturating_sub(last.ended));
        let ended = SystemTime::now().checked_sub(age).unwrap_or(UNIX_EPOCH);
        let ended = ended.duration_since(UNIX_EPOCH).unwrap_or_default();
        to.number(&PROBE_LAST_TIMESTAMP, ended.as_secs_f64());
    }

    fn condition(&self) -> Condition {
        let (state, last, error) = self
            .with(|probing| (probing.threshold.state(), probing.last, probing.last_error.clone()));
        let failure = last.and_then(|last| last.result.err()).map(|failure| failure.as_str());
        let (severity, sentence) = match (state, failure) {
            (ProbeState::Up, None) => (Severity::Healthy, "The upstream is up.".to_owned()),
            (ProbeState::Up, Some(failure)) => {
                let sentence =
                    format!("The upstream is up, but its last health probe failed: {failure}.");
                (Severity::Strained, sentence)
            }
            (ProbeState::Down, Some(failure)) => (
                Severity::Failing,
                format!("The upstream is down: its last health probe failed: {failure}."),
            ),
            (ProbeState::Down, None) => (
                Severity::Failing,
                "The upstream is down, but its last health probe passed.".to_owned(),
            ),
            (ProbeState::Unknown, _) => {
                (Severity::Strained, "The state of the upstream is not known yet.".to_owned())
            }
        };
        let mut condition = Condition::new(severity, state.as_str(), sentence)
            .reason(failure)
            .count("calls rejected", self.rejected(), None);
        condition.detail = error.map(String::from);
        if let Some(last) = last {
            condition = condition.seconds("last health probe", last.took);
        }
        if state == ProbeState::Down {
            condition = condition
                .next("Health probes continue, and the layer admits calls when they pass.");
        }
        condition
    }

    fn add_receiver(&self, receiver: Arc<dyn ReportChange>) {
        self.reports().add(receiver);
    }
}

impl Sealed for Health {}

impl Observe for Health {
    fn parts(&self) -> Vec<Part> {
        let state: Weak<CheckRegistry> = Arc::downgrade(self.registry());
        vec![Part::of_process("health", state)]
    }
}

impl Observed for CheckRegistry {
    fn observe(&self, to: &mut dyn Visit) {
        let checks = self.states();
        for (name, now, is_critical) in &checks {
            let critical = if *is_critical { "true" } else { "false" };
            for state in CHECK_STATES {
                let labels =
                    [("check", &**name), ("critical", critical), ("state", state.as_str())];
                let is_now = Value::Count(u64::from(state == *now));
                to.sample(&HEALTH_CHECK_STATE, &labels, is_now);
            }
        }
        let is_ready =
            checks.iter().all(|(_, now, is_critical)| *now == CheckState::Pass || !is_critical);
        to.count(&HEALTH_READY, u64::from(is_ready));
    }

    fn condition(&self) -> Condition {
        let checks = self.states();
        let not_passed = |only_critical: bool| {
            let names = checks.iter().filter(|(_, state, is_critical)| {
                *state != CheckState::Pass && (*is_critical || !only_critical)
            });
            names.map(|(name, ..)| &**name).collect::<Vec<_>>()
        };
        let (critical, all) = (not_passed(true), not_passed(false));
        let (severity, state) = match (critical.is_empty(), all.is_empty()) {
            (false, _) => (Severity::Failing, "not_ready"),
            (true, false) => (Severity::Strained, "ready"),
            (true, true) => (Severity::Healthy, "ready"),
        };
        let sentence = match all.len() {
            0 => format!("{0} of {0} health checks pass.", checks.len()),
            failing => {
                let names = all.join(", ");
                let verb = if failing == 1 { "does" } else { "do" };
                format!("{failing} of {} health checks {verb} not pass: {names}.", checks.len())
            }
        };
        let (passed, checks) = ((checks.len() - all.len()) as u64, checks.len() as u64);
        Condition::new(severity, state, sentence).count("passed", passed, Some(checks))
    }

    fn add_receiver(&self, receiver: Arc<dyn ReportChange>) {
        self.reports.add(receiver);
    }
}
