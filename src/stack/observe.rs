//! The layers of a stack, as a registry watches them.

use std::sync::{Arc, Weak};

use super::{client::ClientHandle, meter::MeterLayer, server::ServerHandle};
use crate::{
    observe::{
        Condition, Observe, Observed, Part, Severity, Value, Visit, VisitHistogram, counted,
        metrics::*,
    },
    report::ReportChange,
    sealed::Sealed,
};

impl Sealed for ClientHandle {}

/// All layers have the name of the stack. The second deadline layer is left out: it writes the remaining time into the
/// request, and neither rejects nor ends a call. All of its counts would be 0, in the series of the first one.
impl Observe for ClientHandle {
    fn parts(&self) -> Vec<Part> {
        let stack = &self.stack;
        let mut parts = vec![meter(&stack.meter)];
        parts.extend(stack.deadline.handle().parts());
        parts.extend(stack.retry.handle().parts());
        parts.extend(stack.hedge.handle().parts());
        parts.extend(stack.breaker.handle().parts());
        parts.extend(stack.limit.handle().parts());
        parts.extend(stack.timeout.handle().parts());
        #[cfg(feature = "connect")]
        parts.extend(stack.connections.iter().flat_map(Observe::parts));
        parts.extend(stack.probe.iter().flat_map(Observe::parts));
        let name = stack.now.config().name;
        parts.into_iter().map(|part| part.named(&name)).collect()
    }
}

impl Sealed for ServerHandle {}

/// All layers have the name of the stack.
impl Observe for ServerHandle {
    fn parts(&self) -> Vec<Part> {
        let stack = &self.stack;
        let mut parts = vec![meter(&stack.meter)];
        parts.extend(stack.deadline.handle().parts());
        parts.extend(stack.limit.handle().parts());
        parts.extend(stack.timeout.handle().parts());
        let name = stack.now.config().name;
        parts.into_iter().map(|part| part.named(&name)).collect()
    }
}

fn meter(meter: &Arc<MeterLayer>) -> Part {
    let state: Weak<MeterLayer> = Arc::downgrade(meter);
    Part::new("stack", "", state)
}

/// The labels of the outcomes, in the order of [`OutcomeKind`](crate::outcome::OutcomeKind).
const OUTCOMES: [&str; 4] = ["success", "failure", "throttled", "cancelled"];

impl Observed for MeterLayer {
    fn observe(&self, to: &mut dyn Visit) {
        let (begun, ended, rejected) = self.call_counts();
        let durations = self.durations();
        let counts = OUTCOMES.into_iter().zip(ended).chain([("rejected", rejected)]);
        to.counts(&CALLS, "outcome", counts);
        let all_ended = ended.iter().sum::<u64>() + rejected;
        to.count(&CALL_ACTIVE, begun.saturating_sub(all_ended));
        for (outcome, durations) in OUTCOMES.into_iter().zip(durations) {
            to.sample(&CALL_DURATION, &[("outcome", outcome)], Value::Histogram(durations));
        }
    }

    fn condition(&self) -> Condition {
        let counts = self.counts();
        let ended = counts.successes + counts.failures + counts.throttled + counts.cancelled;
        let in_flight = counts.begun.saturating_sub(ended + counts.rejected);
        let sentence = counted(in_flight, "call is in flight.", "calls are in flight.");
        let mut condition = Condition::new(Severity::Healthy, "", sentence)
            .count("in flight", in_flight, None)
            .count("calls", ended + counts.rejected, None);
        if let Some(p99) = counts.p99 {
            condition = condition.seconds("p99", p99);
        }
        condition
    }

    fn add_receiver(&self, receiver: Arc<dyn ReportChange>) {
        self.reports.add(receiver);
    }

    fn visit_histograms(&self, to: &mut VisitHistogram<'_>) {
        for (outcome, cell) in OUTCOMES.into_iter().zip(self.export_cells()) {
            to(&CALL_DURATION, &[("outcome", outcome)], cell);
        }
    }
}
