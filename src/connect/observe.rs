//! The metrics of connections.

use std::sync::{Arc, Weak, atomic::Ordering::Relaxed};

use super::{
    handle::ConnectHandle,
    layer::{CONNECT_ERROR, CONNECT_TIMEOUT},
    lifetime::CloseReason,
    state::ConnectState,
};
use crate::{
    observe::{
        Condition, Observe, Observed, Part, Severity, Value, Visit, VisitHistogram, counted,
        metrics::*,
    },
    outcome::{LayerKind, RejectedKind},
    sealed::Sealed,
};

const LAYER: &str = LayerKind::Connect.as_str();

impl Sealed for ConnectHandle {}

impl Observe for ConnectHandle {
    fn parts(&self) -> Vec<Part> {
        let state: Weak<ConnectState> = Arc::downgrade(&self.0);
        vec![Part::new(LAYER, self.0.name(), state)]
    }
}

impl Observed for ConnectState {
    fn observe(&self, to: &mut dyn Visit) {
        let counts = &self.counts;
        let open = self.count_open();
        let active = counts.in_use.load(Relaxed).min(open);
        let states = [
            ("connecting", counts.connecting.load(Relaxed)),
            ("active", active),
            ("idle", open - active),
        ];
        to.counts(&CONNECTION_COUNT, "state", states.map(|(state, count)| (state, count as u64)));
        let (max_per_host, max_total) = self.caps();
        let limits = [("host", max_per_host), ("total", max_total)];
        let limits = limits.into_iter().filter_map(|(scope, max)| Some((scope, max? as u64)));
        to.counts(&CONNECTION_LIMIT, "scope", limits);
        to.count(&CONNECTION_OPENED, counts.created.load(Relaxed));
        let closed = CloseReason::LABELS.into_iter().zip(counts.closed());
        to.counts(&CONNECTION_CLOSED, "reason", closed);
        let failures = [
            (CONNECT_ERROR, counts.failed.load(Relaxed)),
            (CONNECT_TIMEOUT, counts.timed_out.load(Relaxed)),
        ];
        to.counts(&CONNECTION_FAILURES, "reason", failures);
        to.count(&CONNECTION_REUSES, counts.reused.load(Relaxed));
        let rejections = [
            (RejectedKind::Saturated.as_str(), counts.saturated.load(Relaxed)),
            (RejectedKind::Misconfigured.as_str(), counts.misconfigured.load(Relaxed)),
        ];
        to.counts_of(&REJECTIONS_METRIC, LAYER, "reason", rejections);
        let waiting = counts.waiting.load(Relaxed) as u64;
        to.counts(&QUEUE_DEPTH, "layer", [(LAYER, waiting)]);
        let max_waiting = self.settings.queue_length() as u64;
        to.counts(&QUEUE_LIMIT, "layer", [(LAYER, max_waiting)]);
        for (result, times) in counts.wait_times.snapshots() {
            let labels = [("layer", LAYER), ("result", result)];
            to.sample(&QUEUE_WAIT_DURATION, &labels, Value::Histogram(times));
        }
    }

    fn condition(&self) -> Condition {
        let (open, waiting) = (self.count_open(), self.counts.waiting.load(Relaxed));
        let max_waiting = self.settings.queue_length();
        let (_, max_total) = self.caps();
        let (severity, state) = match waiting {
            0 => (Severity::Healthy, ""),
            _ if waiting >= max_waiting => (Severity::Failing, "full"),
            _ => (Severity::Strained, "full"),
        };
        let connections = counted(open, "connection is open", "connections are open");
        let sentence = match waiting {
            0 => format!("{connections}."),
            _ => {
                let calls = counted(waiting, "call waits", "calls wait");
                format!("{connections}, and {calls} for one.")
            }
        };
        Condition::new(severity, state, sentence)
            .count("connections", open as u64, max_total.map(|max| max as u64))
            .count("waiting", waiting as u64, Some(max_waiting as u64))
            .count("failed connects", self.counts.failed.load(Relaxed), None)
    }

    fn visit_histograms(&self, to: &mut VisitHistogram<'_>) {
        self.counts.wait_times.visit(LAYER, to);
    }
}
