//! The table of all metrics. The text page, the exporters, `docs/metrics.md` and the checks of the dashboard and the rules
//! are made from it.

use super::metric::{Metric, MetricKind};

macro_rules! metrics {
    ($($NAME:ident = $name:literal, $kind:ident, $unit:literal, $labels:expr, $help:literal;)*) => {
        $(pub(crate) static $NAME: Metric = Metric {
            name: $name,
            kind: MetricKind::$kind,
            unit: $unit,
            labels: &$labels,
            help: $help,
        };)*

        /// All metrics, in the order of the text page.
        pub static METRICS: &[&Metric] = &[$(&$NAME),*];

        /// The number of all metrics.
        pub(super) const COUNT: usize = [$($name),*].len();
    };
}

metrics! {
    CALLS = "buttress.calls", Counter, "{call}", ["name", "outcome"],
        "Whole calls that have ended, with their response bodies, by outcome.";
    CALL_ACTIVE = "buttress.call.active", UpDownCounter, "{call}", ["name"],
        "Whole calls that have begun and not ended.";
    CALL_DURATION = "buttress.call.duration", Histogram, "s", ["name", "outcome"],
        "The time from the beginning of a call to its response head, or to its end without one, by the outcome known then. Rejected calls are left out.";
    REJECTIONS_METRIC = "buttress.rejections", Counter, "{call}", ["name", "layer", "reason"],
        "Calls that a layer has rejected. The rejections of the lifecycle layer have no name.";
    SHADOW_REJECTIONS = "buttress.shadow_rejections", Counter, "{call}", ["name", "layer"],
        "Calls that a layer in shadow mode would have rejected.";
    BREAKER_STATE = "buttress.breaker.state", UpDownCounter, "{circuit}", ["name", "key", "state"],
        "1 for the state of the circuit, 0 for the other states. The label key is absent unless the layer is keyed.";
    BREAKER_STATE_TIME = "buttress.breaker.state.time", Counter, "s", ["name", "state"],
        "The time that the circuit has spent in each state.";
    BREAKER_TRANSITIONS = "buttress.breaker.transitions", Counter, "{transition}", ["name", "state"],
        "Transitions of the circuit, by the state that it entered.";
    BREAKER_TRIPS = "buttress.breaker.trips", Counter, "{trip}", ["name", "reason"],
        "Times that the circuit has opened, by the rule or the probe that opened it.";
    BREAKER_OPEN_REMAINING = "buttress.breaker.open.remaining", Gauge, "s", ["name"],
        "The rest of the open time. 0 in all other states.";
    BREAKER_WINDOW_CALLS = "buttress.breaker.window.calls", Gauge, "{call}", ["name"],
        "The calls in the window of the rules.";
    BREAKER_WINDOW_FAILURES = "buttress.breaker.window.failures", Gauge, "{call}", ["name"],
        "The failures in the window of the rules.";
    BREAKER_WINDOW_SLOW = "buttress.breaker.window.slow", Gauge, "{call}", ["name"],
        "The slow calls in the window of the rules.";
    BREAKER_CONSECUTIVE_FAILURES = "buttress.breaker.consecutive_failures", Gauge, "{call}", ["name"],
        "The failures in a row.";
    BREAKER_FAILURES = "buttress.breaker.failures", Counter, "{call}", ["name", "reason"],
        "Failures that the circuit has counted, by reason.";
    BREAKER_PROBE_ACTIVE = "buttress.breaker.probe.active", UpDownCounter, "{call}", ["name"],
        "Half-open probes in flight.";
    BREAKER_ISOLATIONS = "buttress.breaker.isolations", UpDownCounter, "{isolation}", ["name"],
        "Isolations that hold the circuit open.";
    BREAKER_CIRCUITS = "buttress.breaker.circuits", UpDownCounter, "{circuit}", ["name", "state"],
        "The circuits of a keyed layer, by state.";
    CONCURRENCY_LIMIT = "buttress.concurrency.limit", Gauge, "{call}", ["name"],
        "The maximum number of calls in flight.";
    CONCURRENCY_USAGE = "buttress.concurrency.usage", UpDownCounter, "{call}", ["name"],
        "The calls in flight.";
    CONCURRENCY_EXEMPT = "buttress.concurrency.exempt", Counter, "{call}", ["name"],
        "Calls that were exempt from the limit.";
    CONCURRENCY_EXEMPT_ACTIVE = "buttress.concurrency.exempt.active", UpDownCounter, "{call}", ["name"],
        "Exempt calls in flight.";
    CONCURRENCY_CHANGES = "buttress.concurrency.changes", Counter, "{change}", ["name", "reason"],
        "Changes of an adaptive limit, by reason. Absent for a fixed limit.";
    QUEUE_DEPTH = "buttress.queue.depth", UpDownCounter, "{call}", ["name", "layer"],
        "Calls that wait in the queue of a layer.";
    QUEUE_LIMIT = "buttress.queue.limit", Gauge, "{call}", ["name", "layer"],
        "The maximum number of calls that wait in the queue of a layer.";
    QUEUE_WAIT_DURATION = "buttress.queue.wait.duration", Histogram, "s", ["name", "layer", "result"],
        "The time that calls have waited in the queue of a layer. Calls that need not wait are left out.";
    RETRY_ATTEMPTS = "buttress.retry.attempts", Counter, "{attempt}", ["name", "reason"],
        "Retries, by the reason of the failure before them.";
    RETRY_DECLINED = "buttress.retry.declined", Counter, "{call}", ["name", "reason"],
        "Failed calls for which no further attempt was made, by reason. Calls that end with a response that is not retryable are left out.";
    RETRY_RECOVERIES = "buttress.retry.recoveries", Counter, "{call}", ["name"],
        "Calls that succeeded after a retry.";
    RETRY_CALL_RETRIES = "buttress.retry.call.retries", Histogram, "{retry}", ["name"],
        "The number of retries of a call. Calls without a retry are left out.";
    RETRY_DELAY = "buttress.retry.delay", Histogram, "s", ["name"],
        "The time of a retried call without an attempt in flight.";
    RETRY_BUDGET_REMAINING = "buttress.retry.budget.remaining", Gauge, "{retry}", ["name"],
        "The retries that the budget permits now. Absent without a budget.";
    RETRY_BUDGET_LIMIT = "buttress.retry.budget.limit", Gauge, "{retry}", ["name"],
        "The maximum balance of the budget. Absent without a budget.";
    HEDGE_ATTEMPTS = "buttress.hedge.attempts", Counter, "{attempt}", ["name"],
        "Hedge attempts that were sent.";
    HEDGE_WINS = "buttress.hedge.wins", Counter, "{attempt}", ["name"],
        "Hedge attempts whose response was returned.";
    HEDGE_DECLINED = "buttress.hedge.declined", Counter, "{call}", ["name", "reason"],
        "Hedge attempts that were due and not sent, by reason.";
    HEDGE_DELAY = "buttress.hedge.delay", Gauge, "s", ["name"],
        "The time after which a hedge attempt is sent. Absent while none is sent.";
    TIMEOUTS = "buttress.timeouts", Counter, "{call}", ["name", "layer", "phase"],
        "Calls that a timeout or a deadline has ended, by phase.";
    CONNECTION_COUNT = "buttress.connections", UpDownCounter, "{connection}", ["name", "state"],
        "Connections, by state. A connection whose uses are not reported counts as idle.";
    CONNECTION_LIMIT = "buttress.connection.limit", Gauge, "{connection}", ["name", "scope"],
        "The maximum number of connections. Absent if there is none.";
    CONNECTION_OPENED = "buttress.connection.opened", Counter, "{connection}", ["name"],
        "Connections that were opened.";
    CONNECTION_CLOSED = "buttress.connection.closed", Counter, "{connection}", ["name", "reason"],
        "Connections that ended, by reason.";
    CONNECTION_FAILURES = "buttress.connection.failures", Counter, "{connection}", ["name", "reason"],
        "Connections that could not be opened, by reason.";
    CONNECTION_REUSES = "buttress.connection.reuses", Counter, "{call}", ["name"],
        "Calls that used an idle connection.";
    PROBE_STATE = "buttress.probe.state", UpDownCounter, "{probe}", ["name", "state"],
        "1 for the state of the health probe, 0 for the other states.";
    PROBE_RUNS = "buttress.probe.runs", Counter, "{probe}", ["name", "result"],
        "Health probes that have ended, by result.";
    PROBE_LAST_DURATION = "buttress.probe.last.duration", Gauge, "s", ["name"],
        "The duration of the last health probe. Absent before the first one.";
    PROBE_LAST_TIMESTAMP = "buttress.probe.last.timestamp", Gauge, "s", ["name"],
        "The end of the last health probe, in seconds since 1970. Absent before the first one.";
    HEALTH_CHECK_STATE = "buttress.health.check.state", UpDownCounter, "{check}", ["check", "critical", "state"],
        "1 for the state of the health check, 0 for the other states.";
    HEALTH_READY = "buttress.health.ready", Gauge, "{process}", [],
        "1 if the process is ready, otherwise 0.";
    LIFECYCLE_PHASE = "buttress.lifecycle.phase", UpDownCounter, "{process}", ["phase"],
        "1 for the phase of the process, 0 for the other phases.";
    LIFECYCLE_ACTIVE = "buttress.lifecycle.active", UpDownCounter, "{call}", [],
        "Calls in flight in the lifecycle layer.";
    BUILD_INFO = "buttress.build.info", Gauge, "{process}", ["version"],
        "1, with the version of this crate.";
    FOLDED_SERIES = "buttress.observe.folded_series", Counter, "{series}", [],
        "Keys that were combined into `other`, summed over all reads.";
}
