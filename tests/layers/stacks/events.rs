//! The events for rejections, faults and changes of state: their texts, fields and frequency.

use std::{
    fmt::{Debug, Write},
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, DeadlineLayer, HealthProbeLayer,
    HedgeLayer, RetryLayer, TimeoutLayer, Timeouts, Trip,
};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use tokio::time::sleep;
use tower::{Service, ServiceBuilder, ServiceExt, service_fn};
use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    span,
    subscriber::DefaultGuard,
};

use crate::support::tracing_events::listen;

type Body = Full<Bytes>;

// ===== The log =====

/// Records every event of this thread as `LEVEL message field=value …`.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn listen() -> (Self, DefaultGuard) {
        let log = Self::default();
        let guard = listen(log.clone());
        (log, guard)
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            name => write!(self.fields, " {name}={value:?}").unwrap(),
        }
    }
}

/// The targets of the crate's documentation, which filters of applications contain.
const TARGETS: [&str; 10] = [
    "breaker",
    "config",
    "connect",
    "health",
    "hedge",
    "lifecycle",
    "limit",
    "listener",
    "retry",
    "timeout",
];

impl Subscriber for Log {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let Some(target) = event.metadata().target().strip_prefix("buttress::") else { return };
        assert!(TARGETS.contains(&target), "{target} is not a documented target");
        let mut line = Line::default();
        event.record(&mut line);
        self.0.lock().unwrap().push(format!(
            "{} {}{}",
            event.metadata().level(),
            line.message,
            line.fields
        ));
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

// ===== The service =====

/// A service that responds with this status after this time.
macro_rules! answers {
    ($status:expr, $after:expr) => {
        service_fn(|_: Request<_>| async {
            sleep($after).await;
            let mut response = Response::new(Body::default());
            *response.status_mut() = StatusCode::from_u16($status).unwrap();
            Ok::<_, BoxError>(response)
        })
    };
}

const AT_ONCE: Duration = Duration::ZERO;

async fn call<S>(service: S) -> Result<S::Response, S::Error>
where
    S: Service<Request<Body>>,
{
    service.oneshot(Request::new(Body::default())).await
}

// ===== Rejections, retries, hedges and health probes =====

#[tokio::test(start_paused = true)]
async fn every_rejection_is_logged_with_the_name_of_its_layer() {
    let (log, _guard) = Log::listen();
    let limit = ConcurrencyLimitLayer::new(1).name("front");
    let held = limit.handle().try_acquire().unwrap();
    call(ServiceBuilder::new().layer(limit).service(answers!(200, AT_ONCE))).await.unwrap_err();
    drop(held);
    assert_eq!(
        log.take(),
        [
            r#"DEBUG call rejected resilience.name="front" layer="concurrency_limit" reason="limit_reached" retry_after_ms=1000 shadow=false"#
        ]
    );

    let breaker = CircuitBreakerLayer::http().name("search");
    breaker.handle().force_open();
    log.take();
    call(ServiceBuilder::new().layer(breaker).service(answers!(200, AT_ONCE))).await.unwrap_err();
    assert_eq!(
        log.take(),
        [
            r#"DEBUG call rejected resilience.name="search" layer="circuit_breaker" reason="circuit_forced_open" shadow=false"#
        ]
    );

    let timeout = TimeoutLayer::http().head(Duration::from_secs(1)).name("search");
    call(ServiceBuilder::new().layer(timeout).service(answers!(200, Duration::from_secs(9))))
        .await
        .unwrap_err();
    assert_eq!(
        log.take(),
        [r#"DEBUG timed out resilience.name="search" layer="timeout" phase="head" after_ms=1000"#]
    );
}

#[tokio::test(start_paused = true)]
async fn retries_and_hedges_are_logged_with_the_name_of_their_layer() {
    let (log, _guard) = Log::listen();
    let retry = RetryLayer::http().attempts(2).name("search").name("too late");
    call(ServiceBuilder::new().layer(retry).service(answers!(503, AT_ONCE))).await.unwrap();
    let lines = log.take();
    assert!(
        lines[0].starts_with(
            r#"DEBUG retrying resilience.name="search" layer="retry" attempt=1 delay_ms="#
        ) && lines[0].ends_with(r#" outcome="failure" reason="status" code=503"#),
        "{lines:?}"
    );
    assert_eq!(
        lines[1],
        r#"DEBUG not retried resilience.name="search" layer="retry" attempt=2 reason="attempts_used_up" outcome="failure" code=503"#
    );

    let hedge = HedgeLayer::http(Duration::from_millis(80)).name("search");
    call(ServiceBuilder::new().layer(hedge).service(answers!(200, Duration::from_secs(1))))
        .await
        .unwrap();
    assert_eq!(
        log.take(),
        [
            r#"DEBUG hedging resilience.name="search" layer="hedge" hedge=1 delay_ms=80"#,
            r#"DEBUG hedge lost resilience.name="search" layer="hedge" sent=1 outcome="success" reason="completed""#,
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_failed_probe_is_logged_with_the_chain_of_its_error() {
    let (log, _guard) = Log::listen();
    let cause = || std::io::Error::other("no route to host");
    let down = service_fn(move |_: Request<Body>| async move { Err::<Response<Body>, _>(cause()) });
    let probe = HealthProbeLayer::get("/healthz").thresholds(1, 1).name("search");
    let handle = probe.handle();
    let _gate = ServiceBuilder::new().layer(probe).service(down);
    handle.changed().await;
    let down = r#"WARN health probe down resilience.name="search" layer="health_probe" reason="error" why="no route to host""#;
    assert_eq!(log.take(), [down]);
    assert_eq!(handle.snapshot().last_error.as_deref(), Some("no route to host"));
}

// ===== Misconfigured layers =====

#[tokio::test(start_paused = true)]
async fn a_misconfigured_layer_logs_its_invalid_setting() {
    let (log, _guard) = Log::listen();
    let limit = ConcurrencyLimitLayer::new(0).name("front").respond();
    let response =
        call(ServiceBuilder::new().layer(limit).service(answers!(200, AT_ONCE))).await.unwrap();
    assert_eq!(response.status(), 503);
    let zero = r#"ERROR misconfigured resilience.name="front" layer="concurrency_limit" field="limit" value="0" remedy="use 1 to"#;
    let lines = log.take();
    assert!(lines[0].starts_with(zero), "{lines:?}");
    assert!(lines[0].contains(r#"why="every call is rejected""#), "{lines:?}");
    let rejected = r#"DEBUG call rejected resilience.name="front" layer="concurrency_limit" reason="misconfigured" shadow=false"#;
    assert_eq!(lines[1..], [rejected]);

    let timeout = TimeoutLayer::http().head(AT_ONCE);
    call(ServiceBuilder::new().layer(timeout).service(answers!(200, AT_ONCE))).await.unwrap_err();
    assert!(log.take()[0].starts_with(
        r#"ERROR misconfigured resilience.name="" layer="timeout" field="head" value="#
    ));

    // These layers let calls through, so the event is the only report of the fault.
    let lenient = ServiceBuilder::new()
        .layer(DeadlineLayer::new().default_of(AT_ONCE))
        .layer(RetryLayer::http().attempts(0))
        .layer(HedgeLayer::http(AT_ONCE))
        .service(answers!(200, AT_ONCE));
    assert_eq!(call(lenient).await.unwrap().status(), 200);
    let lines = log.take();
    for (line, what) in lines.iter().zip(["hedge", "retry", "deadline"]) {
        assert!(line.starts_with("ERROR misconfigured") && line.contains(what), "{lines:?}");
    }
    assert_eq!(lines.len(), 3);

    let said = DeadlineLayer::new().header("no header").propagate_only();
    let lenient = ServiceBuilder::new().layer(said).service(answers!(200, AT_ONCE));
    assert_eq!(call(lenient).await.unwrap().status(), 200);
    assert!(log.take()[0].starts_with(
        r#"ERROR misconfigured resilience.name="" layer="deadline" field="header" value="#
    ));
}

// ===== Frequency =====

/// Returns the events of this level.
fn at(level: &str, lines: &[String]) -> Vec<String> {
    lines.iter().filter(|line| line.starts_with(level)).cloned().collect()
}

const SUMMARY_INTERVAL: Duration = Duration::from_secs(10);

#[tokio::test(start_paused = true)]
async fn misconfigured_layer_logs_one_error_and_then_a_summary_every_ten_seconds() {
    let (log, _guard) = Log::listen();
    let limit = ConcurrencyLimitLayer::new(0).respond();
    let timeout = TimeoutLayer::http().head(AT_ONCE);
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(0));
    for _ in 0..1000 {
        // axum applies a layer once per connection or request.
        call(ServiceBuilder::new().layer(limit.clone()).service(answers!(200, AT_ONCE)))
            .await
            .unwrap();
        call(ServiceBuilder::new().layer(timeout.clone()).service(answers!(200, AT_ONCE)))
            .await
            .unwrap_err();
        call(ServiceBuilder::new().layer(breaker.clone()).service(answers!(200, AT_ONCE)))
            .await
            .unwrap_err();
    }
    let first = at("ERROR", &log.take());
    assert_eq!(first.len(), 3, "{first:?}");
    assert!(first.iter().all(|line| line.ends_with("occurrences=1")), "{first:?}");

    tokio::time::advance(SUMMARY_INTERVAL).await;
    for _ in 0..1000 {
        call(ServiceBuilder::new().layer(limit.clone()).service(answers!(200, AT_ONCE)))
            .await
            .unwrap();
    }
    let summary = at("ERROR", &log.take());
    assert_eq!(summary.len(), 1, "{summary:?}");
    assert!(summary[0].ends_with("occurrences=1000"), "999 before and this one: {summary:?}");
}

#[tokio::test(start_paused = true)]
async fn layer_that_lets_calls_through_reports_its_fault_once_however_often_it_is_applied() {
    let (log, _guard) = Log::listen();
    let layers = ServiceBuilder::new()
        .layer(DeadlineLayer::new().default_of(AT_ONCE))
        .layer(DeadlineLayer::new().header("no header").propagate_only())
        .layer(RetryLayer::http().attempts(0))
        .layer(HedgeLayer::http(AT_ONCE));
    for _ in 0..1000 {
        call(layers.clone().service(answers!(200, AT_ONCE))).await.unwrap();
    }
    assert_eq!(at("ERROR", &log.take()).len(), 4);
    tokio::time::advance(SUMMARY_INTERVAL).await;
    call(layers.service(answers!(200, AT_ONCE))).await.unwrap();
    let summaries = at("ERROR", &log.take());
    assert_eq!(summaries.len(), 4, "{summaries:?}");
    assert!(summaries.iter().all(|line| line.ends_with("occurrences=1000")), "{summaries:?}");
}

#[tokio::test(start_paused = true)]
async fn timeouts_of_requests_that_cannot_work_log_one_error() {
    let (log, _guard) = Log::listen();
    let mut service =
        ServiceBuilder::new().layer(TimeoutLayer::http()).service(answers!(200, AT_ONCE));
    for _ in 0..1000 {
        let mut request = Request::new(Body::default());
        request.extensions_mut().insert(Timeouts::new().head(AT_ONCE));
        service.ready().await.unwrap().call(request).await.unwrap_err();
    }
    assert_eq!(at("ERROR", &log.take()).len(), 1);
}

/// Each round of probes changes the state of the circuit twice.
#[tokio::test(start_paused = true)]
async fn events_of_a_continuing_outage_are_summarised() {
    let (log, _guard) = Log::listen();
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(1))
        .open_for(Duration::from_millis(10))
        .name("search");
    let mut service = ServiceBuilder::new().layer(breaker).service(answers!(503, AT_ONCE));
    for _ in 0..500 {
        let response = service.ready().await.unwrap().call(Request::new(Body::default())).await;
        assert_eq!(response.unwrap().status(), 503);
        tokio::time::advance(Duration::from_millis(10)).await;
    }
    let lines = log.take();
    let (warnings, infos) = (at("WARN", &lines), at("INFO", &lines));
    assert_eq!((warnings.len(), infos.len()), (1, 1), "{warnings:?} {infos:?}");
    assert_eq!(
        warnings[0],
        r#"WARN circuit opened resilience.name="search" layer="circuit_breaker" reason="consecutive" why=1 failures in a row open_for_ms=10 opened=1"#
    );
    let again = r#"INFO circuit opened resilience.name="search" layer="circuit_breaker" reason="probe" why="#;
    assert!(infos[0].starts_with(again), "{infos:?}");
    tokio::time::advance(SUMMARY_INTERVAL).await;
    let _ = service.ready().await.unwrap().call(Request::new(Body::default())).await;
    let lines = log.take();
    let (warnings, infos) = (at("WARN", &lines), at("INFO", &lines));
    assert_eq!((warnings.len(), infos.len()), (0, 1), "{lines:?}");
    // The first call opened the circuit, and the second one was the first that opened it again.
    assert!(
        infos[0].contains(" opened=501 ") && infos[0].ends_with("occurrences=499"),
        "{infos:?}"
    );
}

// ===== Changes of state =====

#[tokio::test(start_paused = true)]
async fn circuit_emits_one_event_per_change_of_the_reported_state() {
    let (log, _guard) = Log::listen();
    let breaker = CircuitBreakerLayer::http().name("search");
    let handle = breaker.handle();
    let event = |level, state, by| {
        let layer = r#"resilience.name="search" layer="circuit_breaker""#;
        format!(r#"{level} circuit forced {layer} state="{state}" by="{by}""#)
    };
    let changed = |state| event("WARN", state, "hand");
    let closed = event("INFO", "closed", "hand");

    handle.reset();
    assert!(log.take().is_empty(), "it was closed");
    for _ in 0..3 {
        handle.force_open();
    }
    assert_eq!(log.take(), [changed("forced_open")]);

    // An isolation is reported as the same state and hides the changes of the circuit.
    let isolation = handle.isolate();
    let second = handle.isolate();
    handle.force_closed();
    handle.half_open();
    handle.force_open();
    drop(second);
    drop(isolation);
    assert!(log.take().is_empty(), "it was forced open all the time");

    handle.force_closed();
    handle.force_closed();
    handle.restore(&handle.snapshot());
    assert_eq!(log.take(), [changed("forced_closed")]);
    handle.reset();
    handle.restore(&handle.snapshot());
    assert_eq!(log.take(), [closed]);

    let isolation = handle.isolate();
    assert_eq!(log.take(), [event("WARN", "forced_open", "isolation")]);
    drop(isolation);
    assert_eq!(log.take(), [event("INFO", "closed", "isolation")]);
}

#[tokio::test(start_paused = true)]
async fn forcing_the_same_state_wakes_callers_without_an_event() {
    let (log, _guard) = Log::listen();
    let breaker = CircuitBreakerLayer::http().half_open_queue(1, Duration::from_secs(60));
    let handle = breaker.handle();
    let stack = ServiceBuilder::new()
        .layer(RetryLayer::http())
        .layer(breaker)
        .service(answers!(200, Duration::from_secs(5)));
    handle.half_open();
    let mut probe = tokio_test::task::spawn(call(stack.clone()));
    let mut waiting = tokio_test::task::spawn(call(stack));
    assert!(probe.poll().is_pending() && waiting.poll().is_pending());
    log.take();
    // The next round of probes has a free slot again.
    handle.half_open();
    assert!(waiting.is_woken());
    assert!(log.take().is_empty());
}

#[tokio::test(start_paused = true)]
async fn events_and_snapshot_report_the_progress_of_half_open_probes() {
    let (log, _guard) = Log::listen();
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(1))
        .open_for(Duration::from_secs(1))
        .half_open_of(2, 3)
        .name("search");
    let handle = breaker.handle();
    let status = std::sync::atomic::AtomicU16::new(503);
    let status = Arc::new(status);
    let upstream = status.clone();
    let stack = ServiceBuilder::new()
        .layer(RetryLayer::http().attempts(1))
        .layer(breaker)
        .layer(ConcurrencyLimitLayer::new(9))
        .service(service_fn(move |_: Request<_>| {
            let mut response = Response::new(Body::default());
            let status = upstream.load(std::sync::atomic::Ordering::SeqCst);
            *response.status_mut() = StatusCode::from_u16(status).unwrap();
            std::future::ready(Ok::<_, BoxError>(response))
        }));
    let respond = |code| {
        status.store(code, std::sync::atomic::Ordering::SeqCst);
        let stack = stack.clone();
        async move { assert_eq!(call(stack).await.unwrap().status(), code) }
    };
    let progress = || {
        let half_open = handle.snapshot().half_open;
        half_open.map(|probes| (probes.passed, probes.failed, probes.needed, probes.total))
    };
    let circuit = |log: &Log| {
        let lines = log.take();
        lines.into_iter().filter(|line| line.contains(" circuit ")).collect::<Vec<_>>()
    };

    respond(503).await;
    assert_eq!(progress(), None, "it is open");
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(progress(), Some((0, 0, 2, 3)));
    respond(200).await;
    assert_eq!(progress(), Some((1, 0, 2, 3)));
    respond(503).await;
    assert_eq!(progress(), Some((1, 1, 2, 3)));
    circuit(&log);
    respond(503).await;
    assert_eq!(progress(), None);
    let [line] = &circuit(&log)[..] else { panic!("one event") };
    assert!(
        line.starts_with("INFO circuit opened")
            && line.contains("opened=2 passed=1 failed=2 probes=3"),
        "{line}"
    );

    tokio::time::advance(Duration::from_secs(1)).await;
    respond(200).await;
    respond(503).await;
    circuit(&log);
    respond(200).await;
    assert_eq!(
        circuit(&log),
        [
            r#"INFO circuit closed resilience.name="search" layer="circuit_breaker" open_ms=2000 opened=2 passed=2 failed=1 probes=3"#
        ]
    );
    assert_eq!(progress(), None);
}
