//! The metrics of the lifecycle of a process.

use std::sync::{Arc, Weak};

use super::{
    handle::Lifecycle,
    state::{LifecyclePhase, LifecycleState},
};
#[cfg(feature = "dashboard")]
use crate::observe::Stopping;
use crate::{
    observe::{Condition, Observe, Observed, Part, Severity, Visit, counted, metrics::*},
    outcome::{LayerKind, RejectedKind},
    report::ReportChange,
    sealed::Sealed,
};

const LAYER: &str = LayerKind::Lifecycle.as_str();
const PHASES: [LifecyclePhase; 5] = [
    LifecyclePhase::Starting,
    LifecyclePhase::Ready,
    LifecyclePhase::Draining,
    LifecyclePhase::Stopping,
    LifecyclePhase::Stopped,
];

impl Sealed for Lifecycle {}

/// The registry holds a weak reference: a lifecycle ends with its last handle, layer and token.
impl Observe for Lifecycle {
    fn parts(&self) -> Vec<Part> {
        let state: Weak<LifecycleState> = Arc::downgrade(self.0.state());
        vec![Part::of_process(LAYER, state)]
    }
}

impl Observed for LifecycleState {
    #[cfg(feature = "dashboard")]
    fn stopping(&self) -> Option<Stopping> {
        let mut steps = self.steps();
        Some(Box::pin(async move {
            // `wait_for` fails if the lifecycle was dropped. Then no drain begins, so the future never resolves.
            if steps.wait_for(|now| *now >= super::state::LifecycleStep::Stopping).await.is_err() {
                std::future::pending::<()>().await;
            }
        }))
    }

    fn observe(&self, to: &mut dyn Visit) {
        let phases = PHASES.into_iter().map(LifecyclePhase::as_str);
        to.state(&LIFECYCLE_PHASE, "phase", phases, self.phase().as_str());
        to.count(&LIFECYCLE_ACTIVE, self.in_flight() as u64);
        let rejections = [(RejectedKind::ShuttingDown.as_str(), self.rejected())];
        to.counts_of(&REJECTIONS_METRIC, LAYER, "reason", rejections);
    }

    fn condition(&self) -> Condition {
        let (phase, in_flight) = (self.phase(), self.in_flight());
        let calls = counted(in_flight, "call is in flight", "calls are in flight");
        let severity = match phase {
            LifecyclePhase::Ready => Severity::Healthy,
            LifecyclePhase::Stopped => Severity::Failing,
            _ => Severity::Strained,
        };
        let sentence = match phase {
            LifecyclePhase::Starting => "The process is starting. It is not ready yet.".to_owned(),
            LifecyclePhase::Ready => "The process is ready.".to_owned(),
            LifecyclePhase::Draining => {
                format!("The process is draining: {calls}.")
            }
            LifecyclePhase::Stopping => {
                format!("The process is stopping: {calls}.")
            }
            LifecyclePhase::Stopped => "The process has stopped.".to_owned(),
        };
        Condition::new(severity, phase.as_str(), sentence).count(
            "in flight",
            in_flight as u64,
            None,
        )
    }

    fn add_receiver(&self, receiver: Arc<dyn ReportChange>) {
        self.reports.add(receiver);
    }
}
