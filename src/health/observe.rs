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
    observe::{Observe, Observed, Part, Value, Visit, metrics::*},
    outcome::{LayerKind, RejectedKind},
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
        let rejections = [(RejectedKind::Unhealthy.as_str(), self.rejected())];
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
}
