//! Compares the table of `docs/events.md` with the events that each layer emits in a scenario.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    ops::RangeInclusive,
};

use buttress::{
    AttemptHeadersLayer, BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, ConnectLayer,
    Deadline, DeadlineLayer, Health, HealthProbeLayer, HedgeLayer, Lifecycle, Outcome, RetryLayer,
    TimeoutLayer, Trip,
    config::ClientConfig,
    health::Check,
    hedge::HedgeAttempt,
    lifecycle::Listener,
    limit::adaptive::{Algorithm, ChangeReason, LimitChange, Sample},
    stack::ClientStack,
};
use http::{Request, Uri};
use tokio::{
    io::{AsyncWriteExt, DuplexStream, duplex},
    time::{advance, sleep},
};
use tower::{Layer, Service, ServiceExt, service_fn};

use super::{AT_ONCE, Body, call, request, status, upstream};
use crate::support::{
    ms, secs, settle,
    tracing_events::{Entry, EventLog},
};

// ===== The table =====

#[derive(Debug)]
struct Row {
    levels: BTreeSet<String>,
    targets: BTreeSet<String>,
    /// The fields, and whether each may be absent.
    fields: BTreeMap<String, bool>,
}

fn words(cell: &str) -> impl Iterator<Item = &str> {
    cell.split(',').map(str::trim).filter(|word| *word != "–")
}

/// Returns the rows of the table in `docs/events.md`, by message.
fn documented() -> BTreeMap<String, Row> {
    let page = include_str!("../../../docs/events.md");
    let table = page.split("|---|---|---|---|---|\n").nth(1).unwrap();
    let rows = table.lines().take_while(|line| line.starts_with('|'));
    rows.map(|row| {
        let cells: Vec<_> = row.split(" | ").map(|cell| cell.trim_matches(['|', ' '])).collect();
        let field = |word: &str| {
            (word.trim_end_matches('?').trim_matches('`').to_owned(), word.ends_with('?'))
        };
        let row = Row {
            levels: words(cells[1]).map(str::to_owned).collect(),
            targets: words(cells[2]).map(str::to_owned).collect(),
            fields: words(cells[3]).map(field).collect(),
        };
        (cells[0].to_owned(), row)
    })
    .collect()
}

/// The events without a scenario here.
const ELSEWHERE: [&str; 10] = [
    // `tests/layers/observe/sampler.rs`.
    "calls rejected",
    "calls are admitted again",
    "retry budget used up",
    "retry budget is back",
    // `tests/layers/observe/dashboard.rs`.
    "control used",
    // `tests/layers/limit/unread.rs` and `tests/e2e/serve` have the clients that do not read.
    "response not read, permit released",
    "stream reset",
    // The runtime has no timers, or ends.
    "health prober panicked",
    "runtime of the lifecycle has ended",
    // `tests/layers/breaker/many_keys.rs`.
    "calls are made without a circuit",
];

/// The texts of `layer`.
const LAYERS: [&str; 14] = [
    "circuit_breaker",
    "concurrency_limit",
    "connect",
    "deadline",
    "health_check",
    "health_probe",
    "hedge",
    "lifecycle",
    "listener",
    "retry",
    "server_timeout",
    "stack",
    "timeout",
    "user",
];

fn check(event: &Entry, table: &BTreeMap<String, Row>) {
    let row = table.get(&event.message).unwrap_or_else(|| panic!("not in the table: {event:?}"));
    assert!(row.levels.contains(&event.level), "level: {event:?}");
    assert!(row.targets.contains(&event.target), "target: {event:?}");
    assert!(event.fields.contains_key("resilience.name"), "name: {event:?}");
    assert!(LAYERS.contains(&event.get("layer")), "layer: {event:?}");
    let common = ["resilience.name", "layer"];
    for field in event.fields.keys().filter(|field| !common.contains(&field.as_str())) {
        assert!(row.fields.contains_key(field), "{field} is not in the table: {event:?}");
    }
    for (field, _) in row.fields.iter().filter(|(_, is_optional)| !**is_optional) {
        assert!(event.fields.contains_key(field), "{field} is missing: {event:?}");
    }
    for (field, value) in &event.fields {
        if field.ends_with("_ms") {
            assert!(value.parse::<u64>().is_ok(), "{field}: {event:?}");
        }
        if ["reason", "outcome", "phase", "state", "by", "layer"].contains(&field.as_str()) {
            let is_word = |c: char| c.is_ascii_lowercase() || c == '_';
            assert!(!value.is_empty() && value.chars().all(is_word), "{field}: {event:?}");
        }
    }
}

// ===== The scenarios =====

async fn limits() {
    let limit = ConcurrencyLimitLayer::new(1).name("front");
    let (handle, service) = (limit.handle(), limit.layer(upstream([(200, AT_ONCE)])));
    let held = handle.try_acquire().unwrap();
    call(service.clone()).await.unwrap_err();
    handle.set_shadow(true);
    call(service.clone()).await.unwrap();
    drop(held);
    handle.set_limit(7).unwrap();
    handle.set_limit(7).unwrap();

    #[derive(Clone, Debug)]
    struct Touchy;
    impl Algorithm for Touchy {
        fn limit(&self) -> u32 {
            5
        }
        fn set_limit(&mut self, _: u32) {}
        fn set_bounds(&mut self, _: RangeInclusive<u32>) -> bool {
            panic!("bounds")
        }
        fn on_sample(&mut self, _: &Sample) -> Option<LimitChange> {
            Some(LimitChange { limit: 4, reason: ChangeReason::Dropped })
        }
    }
    let adaptive = ConcurrencyLimitLayer::adaptive(Touchy).name("front");
    let handle = adaptive.handle();
    call(adaptive.layer(upstream([(200, AT_ONCE)]))).await.unwrap();
    handle.set_bounds(1..=9).unwrap_err();
}

async fn circuits() {
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(1)).open_for(secs(1)).name("search");
    let (handle, service) = (breaker.handle(), breaker.layer(upstream([(200, AT_ONCE)])));
    handle.record(Outcome::failure());
    call(service.clone()).await.unwrap_err();
    for _ in 0..2 {
        advance(secs(1)).await;
        handle.half_open();
        handle.record(Outcome::failure());
    }
    advance(secs(1)).await;
    call(service.clone()).await.unwrap();
    let isolation = handle.isolate();
    handle.set_shadow(true);
    call(service).await.unwrap();
    drop(isolation);
    handle.force_open();
    handle.reset();

    // Two circuits of a keyed layer open and close at the same time.
    let keyed = CircuitBreakerLayer::new(Trip::consecutive(1)).open_for(secs(1));
    let keyed = keyed.keyed(|request: &Request<Body>| request.uri().path().to_owned());
    let (handle, service) = (keyed.handle(), keyed.layer(upstream([(200, AT_ONCE)])));
    for step in 0..3 {
        for key in ["/a", "/b"] {
            let request = Request::get(key).body(Body::default()).unwrap();
            let called = service.clone().oneshot(request).await;
            assert_eq!(called.is_ok(), step != 1);
            if step == 0 {
                handle.get(&key.to_owned()).unwrap().record(Outcome::failure());
            }
        }
        if step == 1 {
            advance(secs(1)).await;
        }
    }
}

async fn retries_and_hedges() {
    let retry = || RetryLayer::http().attempts(2).name("search");
    call(retry().layer(upstream([(503, AT_ONCE), (200, AT_ONCE)]))).await.unwrap();
    call(retry().layer(upstream([(503, AT_ONCE)]))).await.unwrap();
    let timed = retry().attempt_timeout(ms(50));
    call(timed.layer(upstream([(200, secs(9))]))).await.unwrap_err();
    let mut late = request();
    late.extensions_mut().insert(Deadline::after(AT_ONCE));
    retry().layer(upstream([(200, AT_ONCE)])).oneshot(late).await.unwrap_err();

    let hedge = || HedgeLayer::http(ms(80)).name("search");
    let slow_first = service_fn(|request: Request<_>| async move {
        let is_hedge = request.extensions().get::<HedgeAttempt>().is_some();
        sleep(if is_hedge { ms(10) } else { secs(1) }).await;
        Ok::<_, BoxError>(status(200))
    });
    call(hedge().layer(slow_first)).await.unwrap();
    call(hedge().layer(upstream([(200, secs(1))]))).await.unwrap();
    call(hedge().layer(upstream([(503, ms(90)), (200, ms(90))]))).await.unwrap();
    let mut brief = request();
    brief.extensions_mut().insert(Deadline::after(ms(80)));
    hedge().layer(upstream([(200, secs(1))])).oneshot(brief).await.unwrap();

    let headers = AttemptHeadersLayer::new(|_, _| panic!("headers"));
    call(headers.layer(upstream([(200, AT_ONCE)]))).await.unwrap();
}

async fn timeouts() {
    let timeout = TimeoutLayer::http().head(secs(1)).name("search");
    call(timeout.clone().layer(upstream([(200, secs(9))]))).await.unwrap_err();
    let mut late = request();
    late.extensions_mut().insert(Deadline::after(AT_ONCE));
    timeout.layer(upstream([(200, AT_ONCE)])).oneshot(late).await.unwrap_err();
    let deadline = DeadlineLayer::new().default_of(secs(1));
    call(deadline.clone().layer(upstream([(200, secs(9))]))).await.unwrap_err();
    deadline.handle().set_max(secs(5)).unwrap();
    let server = TimeoutLayer::server().head(secs(1));
    call(server.layer(upstream([(200, secs(9))]))).await.unwrap_err();
}

async fn health() {
    let health = Health::new();
    let fails = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let answer = {
        let fails = fails.clone();
        move || {
            let fails = fails.load(std::sync::atomic::Ordering::SeqCst);
            async move { if fails { Err("no route".to_owned()) } else { Ok(()) } }
        }
    };
    health.add(Check::new("db", answer.clone()).thresholds(1, 1)).unwrap();
    let probe = HealthProbeLayer::check(answer).thresholds(1, 1).name("search");
    let (handle, service) = (probe.handle(), probe.layer(upstream([(200, AT_ONCE)])));
    handle.changed().await;
    call(service.clone()).await.unwrap_err();
    handle.set_shadow(true);
    call(service.clone()).await.unwrap();
    sleep(secs(20)).await;
    fails.store(false, std::sync::atomic::Ordering::SeqCst);
    sleep(secs(60)).await;
}

async fn connections() {
    let connect = ConnectLayer::new().max_total(1).queue(0, AT_ONCE).name("search");
    let connector = service_fn(|uri: Uri| async move {
        match uri.host() {
            Some("down") => Err(io::Error::other("no route to 192.0.2.1")),
            _ => Ok(duplex(1).0),
        }
    });
    let handle = connect.handle();
    let mut connector = connect.layer(connector);
    let mut dial = async |uri| connector.ready().await.unwrap().call(Uri::from_static(uri)).await;
    dial("http://down/").await.unwrap_err();
    let open = dial("http://up/").await.unwrap();
    dial("http://up/").await.unwrap_err();
    advance(secs(3)).await;
    drop(open);
    handle.set_max_total(9).unwrap();
}

/// Fails once, and then accepts one connection, whose client sends half of a request head.
struct Once(Option<DuplexStream>, u8);

impl Listener for Once {
    type Io = DuplexStream;
    type Addr = ();

    async fn accept(&mut self) -> io::Result<(DuplexStream, ())> {
        self.1 = self.1.saturating_add(1);
        match (self.1, self.0.take()) {
            (1, io) => {
                self.0 = io;
                Err(io::Error::other("too many open files"))
            }
            (_, Some(io)) => Ok((io, ())),
            (_, None) => std::future::pending().await,
        }
    }
}

async fn lifecycles() {
    let health = Health::new();
    let lifecycle = Lifecycle::without_signals(&health).unwrap().grace(AT_ONCE);
    lifecycle.set_drain_delay(secs(1));
    lifecycle.ready();
    let (mut client, io) = duplex(1 << 10);
    client.write_all(b"GET / HTTP/1.1\r\nhost:").await.unwrap();
    let served = lifecycle.clone();
    let app = upstream::<hyper::body::Incoming>([(200, AT_ONCE)]);
    let server = tokio::spawn(async move { served.serve(Once(Some(io), 0), app).await });
    sleep(secs(60)).await;
    let guard = lifecycle.token().guard();
    lifecycle.drain();
    sleep(secs(2)).await;
    call(lifecycle.layer().layer(upstream([(200, AT_ONCE)]))).await.unwrap();
    assert_eq!(server.await.unwrap().cut_calls, 1);
    drop(guard);

    let quick = Lifecycle::without_signals(&Health::new()).unwrap().drain_delay(AT_ONCE);
    quick.drain();
    quick.run(async { Ok::<_, BoxError>(()) }).await.unwrap();
}

async fn settings() {
    call(ConcurrencyLimitLayer::new(0).name("front").respond().layer(upstream([(200, AT_ONCE)])))
        .await
        .unwrap();
    let config = |toml| {
        let mut config = ClientConfig::from_toml(toml).unwrap();
        config.name = "search".into();
        config
    };
    let stack = ClientStack::new(&config("")).unwrap();
    drop(stack.layer(upstream::<Body>([(200, AT_ONCE)])));
    stack.handle().update(&config("limit_max = 9\nretry_attempts = 2")).unwrap();
    let retry = RetryLayer::http().name("search");
    let handle = retry.handle();
    handle.set_attempts(2).unwrap();
    drop(retry.layer(upstream::<Body>([(200, AT_ONCE)])));
    handle.set_attempts(3).unwrap();
    let hedge = HedgeLayer::http(secs(1)).name("search");
    let handle = hedge.handle();
    drop(hedge.layer(upstream::<Body>([(200, AT_ONCE)])));
    handle.set_max_hedges(2).unwrap();
}

// ===== The tests =====

#[tokio::test(start_paused = true)]
async fn events_of_all_layers_are_those_of_the_documented_table() {
    let table = documented();
    let (log, _guard) = EventLog::listen();
    limits().await;
    circuits().await;
    retries_and_hedges().await;
    timeouts().await;
    health().await;
    connections().await;
    lifecycles().await;
    settings().await;
    settle().await;
    let events = log.take();
    for event in &events {
        check(event, &table);
    }
    // Each event has been emitted at each of its levels, by each of its targets.
    for (message, row) in &table {
        let seen: Vec<_> = events.iter().filter(|event| event.message == *message).collect();
        if ELSEWHERE.contains(&message.as_str()) {
            continue;
        }
        for level in &row.levels {
            assert!(seen.iter().any(|event| event.level == *level), "{message} at {level}");
        }
        for target in &row.targets {
            assert!(seen.iter().any(|event| event.target == *target), "{message} of {target}");
        }
    }
    let addressed =
        events.iter().find(|event| event.fields.values().any(|value| value.contains("192.0.2.1")));
    assert!(addressed.is_none(), "an address: {addressed:?}");
}

/// Returns the events with this message, as `level target layer name` and these fields.
fn lines(events: &[Entry], message: &str, fields: &[&str]) -> Vec<String> {
    let line = |event: &Entry| {
        let common = [&*event.level, event.get("layer"), event.get("resilience.name")];
        let all = common.into_iter().chain(fields.iter().map(|field| event.get(field)));
        all.collect::<Vec<_>>().join(" ")
    };
    events.iter().filter(|event| event.message == message).map(line).collect()
}

#[tokio::test(start_paused = true)]
async fn all_layers_report_rejection_by_one_message() {
    let (log, _guard) = EventLog::listen();
    let fields = ["reason", "retry_after_ms", "shadow"];
    limits().await;
    assert_eq!(
        lines(&log.take(), "call rejected", &fields),
        [
            "DEBUG concurrency_limit front limit_reached 1000 false",
            "DEBUG concurrency_limit front limit_reached 1000 true"
        ]
    );
    circuits().await;
    assert_eq!(
        lines(&log.take(), "call rejected", &fields),
        [
            "DEBUG circuit_breaker search circuit_open 1000 false",
            "DEBUG circuit_breaker search circuit_forced_open  true",
            "DEBUG circuit_breaker  circuit_open 1000 false",
            "DEBUG circuit_breaker  circuit_open 1000 false"
        ]
    );
    timeouts().await;
    let deadline_passed = ["DEBUG timeout search deadline_passed  false"];
    assert_eq!(lines(&log.take(), "call rejected", &fields), deadline_passed);
    retries_and_hedges().await;
    let deadline_passed = ["DEBUG retry search deadline_passed  false"];
    assert_eq!(lines(&log.take(), "call rejected", &fields), deadline_passed);
    connections().await;
    let saturated = ["DEBUG connect search connections_saturated 1000 false"];
    assert_eq!(lines(&log.take(), "call rejected", &fields), saturated);
    lifecycles().await;
    let shutting_down = ["DEBUG lifecycle  shutting_down 0 false"];
    assert_eq!(lines(&log.take(), "call rejected", &fields), shutting_down);
    health().await;
    let health = lines(&log.take(), "call rejected", &["reason", "shadow"]);
    assert_eq!(
        health,
        ["DEBUG health_probe search unhealthy false", "DEBUG health_probe search unhealthy true"]
    );
}

#[tokio::test(start_paused = true)]
async fn episode_of_circuit_begins_at_warn_and_ends_with_its_duration() {
    let (log, _guard) = EventLog::listen();
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(1)).open_for(secs(1)).name("search");
    let (handle, service) = (breaker.handle(), breaker.layer(upstream([(200, AT_ONCE)])));
    for _ in 0..2 {
        handle.record(Outcome::failure());
        for _ in 0..2 {
            advance(secs(11)).await;
            let _ = handle.state();
            handle.record(Outcome::failure());
        }
        advance(secs(1)).await;
        call(service.clone()).await.unwrap();
        let events = log.take();
        assert_eq!(
            lines(&events, "circuit opened", &["reason", "open_for_ms", "opened", "occurrences"]),
            [
                "WARN circuit_breaker search consecutive 1000 1 ",
                "INFO circuit_breaker search probe 1000 2 1",
                "INFO circuit_breaker search probe 1000 3 1",
            ]
        );
        assert_eq!(
            lines(&events, "circuit closed", &["open_ms", "opened"]),
            ["INFO circuit_breaker search 23000 3"]
        );
        assert_eq!(lines(&events, "circuit half-open", &[]).len(), 3);
        advance(secs(30)).await;
    }

    // A reset ends an episode, too.
    handle.record(Outcome::failure());
    advance(ms(500)).await;
    handle.reset();
    let forced = lines(&log.take(), "circuit forced", &["state", "by", "open_ms", "opened"]);
    assert_eq!(forced, ["INFO circuit_breaker search closed hand 500 1"]);
    handle.record(Outcome::failure());
    assert_eq!(
        lines(&log.take(), "circuit opened", &["opened"]),
        ["WARN circuit_breaker search 1"]
    );
}

#[tokio::test(start_paused = true)]
async fn outcomes_and_reasons_of_attempts_are_words_of_the_metrics() {
    let (log, _guard) = EventLog::listen();
    retries_and_hedges().await;
    let events = log.take();
    let retrying = lines(&events, "retrying", &["attempt", "outcome", "reason", "code"]);
    assert_eq!(
        retrying,
        [
            "DEBUG retry search 1 failure status 503",
            "DEBUG retry search 1 failure status 503",
            "DEBUG retry search 1 failure timeout "
        ]
    );
    assert_eq!(
        lines(&events, "not retried", &["attempt", "reason", "outcome", "code"]),
        [
            "DEBUG retry search 2 attempts_used_up failure 503",
            "DEBUG retry search 2 attempts_used_up failure "
        ]
    );
    assert_eq!(lines(&events, "recovered", &["attempts"]), ["DEBUG retry search 2"]);
    assert_eq!(
        lines(&events, "timed out", &["phase", "after_ms"]),
        ["DEBUG retry search head 50", "DEBUG retry search head 50"]
    );
    assert_eq!(
        lines(&events, "hedge won", &["sent", "outcome", "reason"])[0],
        "DEBUG hedge search 1 success completed"
    );
    assert_eq!(lines(&events, "not hedged", &["reason"]), ["DEBUG hedge search deadline_passed"]);
}

#[tokio::test(start_paused = true)]
async fn changed_settings_are_reported_once_with_their_keys() {
    let (log, _guard) = EventLog::listen();
    settings().await;
    let events = log.take();
    assert_eq!(
        lines(&events, "settings changed", &["keys"]),
        [
            "INFO stack search retry_attempts,limit_max",
            "INFO retry search attempts",
            "INFO hedge search max_hedges"
        ]
    );
    assert_eq!(
        lines(&events, "limit changed", &["limit", "reason"]),
        ["INFO concurrency_limit search 9 by_hand"]
    );
    assert_eq!(
        lines(&events, "misconfigured", &["field", "value"]),
        ["ERROR concurrency_limit front limit 0"]
    );
}

#[tokio::test(start_paused = true)]
async fn drain_that_cuts_calls_emits_warning() {
    let (log, _guard) = EventLog::listen();
    lifecycles().await;
    let events = log.take();
    let messages: Vec<_> = events.iter().map(|event| event.message.as_str()).collect();
    let phases = ["starting", "ready", "draining", "stopping", "stopped", "drained"];
    let of_first = messages.iter().filter(|message| phases.contains(message)).take(6);
    assert_eq!(of_first.copied().collect::<Vec<_>>(), phases);
    let drained = lines(&events, "drained", &["cut_calls", "cut_connections", "rejected"]);
    assert_eq!(drained, ["WARN lifecycle  1 0 1", "INFO lifecycle  0 0 0"]);
    let left = lines(&events, "draining", &["in_flight", "left_ms"]);
    assert_eq!(left[0], "INFO lifecycle  1 1000");
}
