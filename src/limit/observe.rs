//! The metrics of a concurrency limit.

use super::{
    adaptive::ChangeReason, handle::ConcurrencyLimitHandle, limiter::Limiter,
    partition::PartitionedLimitHandle,
};
use crate::{
    observe::{
        Condition, Observe, Observed, Part, Severity, Value, Visit, VisitHistogram, metrics::*,
    },
    outcome::{LayerKind, RejectedKind},
    sealed::Sealed,
};

const LAYER: &str = LayerKind::ConcurrencyLimit.as_str();

/// The kinds of rejections by a limit.
const REJECTIONS: [RejectedKind; 5] = [
    RejectedKind::Full,
    RejectedKind::WaitedTooLong,
    RejectedKind::DeadlinePassed,
    RejectedKind::Outranked,
    RejectedKind::Misconfigured,
];

impl Sealed for ConcurrencyLimitHandle {}

impl Observe for ConcurrencyLimitHandle {
    fn parts(&self) -> Vec<Part> {
        vec![Part::new(LAYER, self.0.name(), self.0.downgrade())]
    }
}

impl Sealed for PartitionedLimitHandle {}

/// The part is that of the [limit](PartitionedLimitHandle::limit) itself.
impl Observe for PartitionedLimitHandle {
    fn parts(&self) -> Vec<Part> {
        self.limit().parts()
    }
}

impl Observed for Limiter {
    fn observe(&self, to: &mut dyn Visit) {
        let changes = self.adaptive().map(|adaptive| adaptive.changes());
        let (exempt, exempt_in_flight) = self.exempt();
        let rejections = REJECTIONS.iter().map(|kind| (kind.as_str(), self.rejected(*kind)));
        to.counts_of(&REJECTIONS_METRIC, LAYER, "reason", rejections);
        to.counts(&SHADOW_REJECTIONS, "layer", [(LAYER, self.shadowed())]);
        to.count(&CONCURRENCY_LIMIT, self.limit().into());
        to.count(&CONCURRENCY_USAGE, self.in_flight().into());
        to.count(&CONCURRENCY_EXEMPT, exempt);
        to.count(&CONCURRENCY_EXEMPT_ACTIVE, exempt_in_flight.into());
        if let Some(changes) = changes {
            let changes = ChangeReason::LABELS.into_iter().zip(changes);
            to.counts(&CONCURRENCY_CHANGES, "reason", changes);
        }
        to.counts(&QUEUE_DEPTH, "layer", [(LAYER, self.waiting().into())]);
        to.counts(&QUEUE_LIMIT, "layer", [(LAYER, self.max_queue().into())]);
        for (result, times) in self.wait_times().snapshots() {
            let labels = [("layer", LAYER), ("result", result)];
            to.sample(&QUEUE_WAIT_DURATION, &labels, Value::Histogram(times));
        }
    }

    fn condition(&self) -> Condition {
        let (limit, in_flight) = (self.limit(), self.in_flight());
        let (waiting, max_queue) = (self.waiting(), self.max_queue());
        let (severity, state) = match () {
            () if in_flight < limit => (Severity::Healthy, ""),
            () if max_queue > 0 && waiting >= max_queue => (Severity::Failing, "full"),
            () => (Severity::Strained, "full"),
        };
        let mut sentence = format!("{in_flight} of {limit} calls are in flight");
        if max_queue > 0 {
            sentence.push_str(&format!(", and {waiting} of {max_queue} wait in the queue"));
        }
        sentence.push('.');
        let mut condition = Condition::new(severity, state, sentence).count(
            "in flight",
            in_flight.into(),
            Some(limit.into()),
        );
        if max_queue > 0 {
            condition = condition.count("waiting", waiting.into(), Some(max_queue.into()));
        }
        if severity > Severity::Healthy {
            condition = condition.next("The next call is admitted when a call in flight ends.");
        }
        condition.in_shadow_mode(self.is_shadow())
    }

    fn visit_histograms(&self, to: &mut VisitHistogram<'_>) {
        self.wait_times().visit(LAYER, to);
    }
}
