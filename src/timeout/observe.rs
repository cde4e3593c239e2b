//! The metrics of a timeout layer and of a deadline layer, which share their state.

use std::sync::{Arc, Weak};

use super::settings::{TimeoutHandle, TimeoutState};
use crate::{
    observe::{Condition, Observe, Observed, Part, Severity, Visit, counted, metrics::*},
    outcome::{LayerKind, RejectedKind, TimeoutPhase},
    sealed::Sealed,
};

impl Sealed for TimeoutHandle {}

/// The label `layer` is `timeout`, or `server_timeout` for a layer of
/// [`TimeoutLayer::server`](super::layer::TimeoutLayer::server).
impl Observe for TimeoutHandle {
    fn parts(&self) -> Vec<Part> {
        let state: Weak<TimeoutState> = Arc::downgrade(&self.0);
        vec![Part::new(self.0.by.as_str(), self.0.name_or_empty(), state)]
    }
}

impl Observed for TimeoutState {
    fn observe(&self, to: &mut dyn Visit) {
        let layer = self.by.as_str();
        let (rejected, timed_out) = self.counts();
        let rejections = [
            (RejectedKind::DeadlinePassed.as_str(), rejected),
            (RejectedKind::Misconfigured.as_str(), self.misconfigured()),
        ];
        to.counts_of(&REJECTIONS_METRIC, layer, "reason", rejections);
        // A deadline layer has no other timeouts.
        let has = |phase| match self.by {
            LayerKind::Deadline => matches!(phase, TimeoutPhase::Deadline | TimeoutPhase::Unread),
            _ => true,
        };
        let phases = TimeoutPhase::ALL.iter().zip(timed_out).filter(|(phase, _)| has(**phase));
        to.counts_of(
            &TIMEOUTS,
            layer,
            "phase",
            phases.map(|(phase, count)| (phase.as_str(), count)),
        );
    }

    fn condition(&self) -> Condition {
        let (rejected, timed_out) = self.counts();
        let timed_out: u64 = timed_out.iter().sum();
        let sentence = counted(timed_out, "call has timed out", "calls have timed out");
        let sentence = format!("{sentence} since the start.");
        Condition::new(Severity::Healthy, "", sentence).count("timed out", timed_out, None).count(
            "calls rejected",
            rejected,
            None,
        )
    }
}
