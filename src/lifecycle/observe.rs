//! The metrics of the lifecycle of a process.

use std::sync::{Arc, Weak};

use super::{
    handle::Lifecycle,
    state::{LifecyclePhase, LifecycleState},
};
use crate::{
    observe::{Observe, Observed, Part, Visit, metrics::*},
    outcome::{LayerKind, RejectedKind},
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
    fn observe(&self, to: &mut dyn Visit) {
        let phases = PHASES.into_iter().map(LifecyclePhase::as_str);
        to.state(&LIFECYCLE_PHASE, "phase", phases, self.phase().as_str());
        to.count(&LIFECYCLE_ACTIVE, self.in_flight() as u64);
        let rejections = [(RejectedKind::ShuttingDown.as_str(), self.rejected())];
        to.counts_of(&REJECTIONS_METRIC, LAYER, "reason", rejections);
    }
}
