use std::{convert::Infallible, time::Duration};

use buttress::{
    CircuitBreakerLayer, ConcurrencyLimitLayer, Outcome, RetryBudget, RetryLayer, Trip,
    breaker::OpenDuration,
    observe::{Registry, Severity},
};
use http::{Request, Response, StatusCode};
use http_body_util::Empty;
use tokio::time::sleep;
use tower::{Layer, Service, ServiceExt};
use tracing_subscriber::prelude::*;

use crate::support::tracing_events::EventLog;

type Body = Empty<bytes::Bytes>;

const SECOND: Duration = Duration::from_secs(1);

/// A layer that rejects all calls.
fn full(
    registry: &Registry,
) -> impl Service<Request<Body>, Response: Send, Error: std::fmt::Debug, Future: Send> + Clone + use<>
{
    let layer = CircuitBreakerLayer::http().name("front");
    registry.watch(&layer.handle()).unwrap();
    layer.handle().force_open();
    layer.layer(tower::service_fn(async |_: Request<Body>| {
        Ok::<_, Infallible>(Response::new(Body::new()))
    }))
}

fn request() -> Request<Body> {
    Request::new(Body::new())
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_rejections_are_two_warnings_whose_counts_add_up() {
    let registry = Registry::new();
    let mut decisions = registry.decisions();
    let service = full(&registry);
    let (log, _guard) = EventLog::listen();
    let sampler = tokio::spawn(registry.run());
    tokio::task::yield_now().await;
    for _ in 0..5 {
        for _ in 0..2000 {
            assert!(service.clone().oneshot(request()).await.is_err());
        }
        sleep(SECOND).await;
    }
    sleep(30 * SECOND).await;
    let events = log.take();
    let rejected: Vec<_> =
        events.iter().filter(|event| event.message == "calls rejected").collect();
    assert_eq!(rejected.len(), 2, "{events:#?}");
    let sum: u64 = rejected.iter().map(|event| event.get("count").parse::<u64>().unwrap()).sum();
    assert_eq!(sum, 10_000);
    for event in &rejected {
        assert_eq!((&*event.target, &*event.level), ("breaker", "WARN"));
        assert_eq!(
            (event.get("resilience.name"), event.get("reason")),
            ("front", "circuit_forced_open")
        );
        assert_eq!(event.get("layer"), "circuit_breaker");
    }
    let ended: Vec<_> =
        events.iter().filter(|event| event.message == "calls are admitted again").collect();
    assert_eq!(ended.len(), 1, "{events:#?}");
    assert_eq!(ended[0].get("count"), "10000");
    let mut received = Vec::new();
    while let Ok(Some(decision)) = tokio::time::timeout(Duration::ZERO, decisions.next()).await {
        received.push((decision.event, decision.count));
    }
    assert_eq!(received[0], ("circuit forced", 1));
    let rejected: u64 = received
        .iter()
        .filter(|(event, _)| *event == "calls rejected")
        .map(|(_, count)| count)
        .sum();
    assert_eq!(rejected, 10_000, "{received:?}");
    sampler.abort();
}

#[tokio::test(start_paused = true)]
async fn history_begins_before_the_status_is_read_and_is_five_minutes_long() {
    let registry = Registry::new();
    let service = full(&registry);
    let sampler = tokio::spawn(registry.run());
    tokio::task::yield_now().await;
    assert!(registry.status().is_sampled);
    for _ in 0..3 {
        for _ in 0..7 {
            let _ = service.clone().oneshot(request()).await;
        }
        sleep(SECOND).await;
    }
    let status = registry.status();
    let layer = &status.layers[0];
    let track = layer.tracks.iter().find(|track| track.label == "rejected").unwrap();
    let sum: f32 = track.values.iter().sum();
    assert!((20.0..=21.5).contains(&sum), "{:?}", track.values);
    assert!(layer.since.is_some());
    assert!(layer.sentence.contains("21 calls were rejected in"), "{}", layer.sentence);
    sleep(400 * SECOND).await;
    let status = registry.status();
    assert!(status.layers[0].tracks.iter().all(|track| track.values.len() == 300));
    sampler.abort();
    tokio::task::yield_now().await;
    assert!(!registry.status().is_sampled);
}

#[tokio::test(start_paused = true)]
async fn one_of_several_samplers_samples_and_another_continues_after_it() {
    let registry = Registry::new();
    let _service = full(&registry);
    let first = tokio::spawn(registry.run());
    let second = tokio::spawn(registry.run());
    sleep(5 * SECOND).await;
    let samples = |registry: &Registry| registry.status().layers[0].tracks[0].values.len();
    assert!((4..=5).contains(&samples(&registry)), "{}", samples(&registry));
    first.abort();
    sleep(10 * SECOND).await;
    assert!(samples(&registry) > 10);
    // The sampler ends with the registry.
    drop(registry);
    sleep(2 * SECOND).await;
    assert!(second.is_finished());
}

#[tokio::test(start_paused = true)]
async fn used_up_budget_and_its_recovery_are_reported_once_each() {
    let registry = Registry::new();
    let budget = RetryBudget::with(0.1, 1, 10);
    let layer = RetryLayer::http().budget(budget).name("search");
    registry.watch(&layer.handle()).unwrap();
    let service =
        layer.layer(tower::service_fn(|_: Request<buttress::retry::ReplayBody<Body>>| async {
            let mut response = Response::new(Body::new());
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            Ok::<_, Infallible>(response)
        }));
    let (log, _guard) = EventLog::listen();
    let _sampler = tokio::spawn(registry.run());
    tokio::task::yield_now().await;
    for _ in 0..30 {
        for _ in 0..20 {
            let _ = service.clone().oneshot(request()).await;
        }
        sleep(SECOND).await;
    }
    sleep(30 * SECOND).await;
    let events: Vec<_> = log.take().into_iter().filter(|event| event.level != "DEBUG").collect();
    let messages: Vec<_> = events.iter().map(|event| (&*event.level, &*event.message)).collect();
    let expected = [("WARN", "retry budget used up"), ("INFO", "retry budget is back")];
    assert_eq!(messages, expected);
}

#[tokio::test(start_paused = true)]
async fn full_limit_is_strained_and_names_the_reason_of_its_rejections() {
    let registry = Registry::new();
    let layer = ConcurrencyLimitLayer::new(1).name("front");
    registry.watch(&layer.handle()).unwrap();
    let _sampler = tokio::spawn(registry.run());
    tokio::task::yield_now().await;
    let service = layer.layer(tower::service_fn(async |_: Request<Body>| {
        sleep(3600 * SECOND).await;
        Ok::<_, Infallible>(Response::new(Body::new()))
    }));
    let held = tokio::spawn(service.clone().oneshot(request()));
    tokio::task::yield_now().await;
    assert!(service.clone().oneshot(request()).await.is_err());
    sleep(2 * SECOND).await;
    let status = registry.status();
    let limit = &status.layers[0];
    assert_eq!((limit.severity, limit.state), (Severity::Strained, "full"));
    assert!(limit.sentence.starts_with("1 of 1 calls are in flight"), "{}", limit.sentence);
    assert!(limit.sentence.contains(" rejected in "), "{}", limit.sentence);
    assert!(limit.next.is_some());
    held.abort();
    sleep(20 * SECOND).await;
    assert!(registry.status().is_healthy());
}

#[tokio::test(start_paused = true)]
async fn status_reports_no_old_rejections_after_the_sampler_has_ended() {
    let registry = Registry::new();
    let layer = ConcurrencyLimitLayer::new(1).name("front");
    registry.watch(&layer.handle()).unwrap();
    let service = layer.layer(tower::service_fn(async |_: Request<Body>| {
        sleep(3 * SECOND).await;
        Ok::<_, Infallible>(Response::new(Body::new()))
    }));
    let sampler = tokio::spawn(registry.run());
    tokio::task::yield_now().await;
    let held = tokio::spawn(service.clone().oneshot(request()));
    tokio::task::yield_now().await;
    assert!(service.clone().oneshot(request()).await.is_err());
    sleep(2 * SECOND).await;
    assert!(registry.status().layers[0].sentence.contains(" rejected in "));
    // The runtime of the sampler ends, for example.
    sampler.abort();
    held.await.unwrap().unwrap();
    sleep(3600 * SECOND).await;
    let status = registry.status();
    assert!(status.is_healthy(), "{:?}", status.layers[0].sentence);
    assert!(status.layers[0].tracks.is_empty() && status.layers[0].since.is_none());
}

#[tokio::test(start_paused = true)]
async fn samples_stay_on_the_time_axis_if_the_sampler_is_late() {
    let registry = Registry::new();
    let service = full(&registry);
    let rejected = |registry: &Registry| {
        let tracks = registry.status().layers.remove(0).tracks;
        tracks.into_iter().find(|track| track.label == "rejected").unwrap().values
    };
    let sampler = tokio::spawn(registry.run());
    sleep(SECOND * 21 / 2).await;
    let before = rejected(&registry).len();
    for _ in 0..60 {
        let _ = service.clone().oneshot(request()).await;
    }
    // The runtime does not run for one minute.
    tokio::time::advance(60 * SECOND).await;
    sleep(SECOND).await;
    let values = rejected(&registry);
    assert!((before + 60..=before + 62).contains(&values.len()), "{} {}", before, values.len());
    // The calls were rejected at any time of this minute.
    let sum: f32 = values.iter().sum();
    assert!((59.0..=61.0).contains(&sum) && values.iter().all(|value| *value < 2.0), "{values:?}");
    // Another sampler continues half a minute after the first one.
    sampler.abort();
    let before = rejected_after(&registry, 30 * SECOND, rejected).await;
    assert!((values.len() + 29..=values.len() + 32).contains(&before), "{before}");
    sleep(SECOND * 7200).await;
    assert_eq!(rejected(&registry).len(), 300);
}

/// Runs a sampler after this time without one, and returns the number of samples.
async fn rejected_after(
    registry: &Registry,
    time: Duration,
    rejected: impl Fn(&Registry) -> Vec<f32>,
) -> usize {
    sleep(time).await;
    tokio::spawn(registry.run());
    sleep(SECOND / 2).await;
    rejected(registry).len()
}

#[tokio::test(start_paused = true)]
async fn sampler_and_decisions_survive_a_subscriber_that_panics() {
    struct Panics;
    impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Panics {
        fn on_event(&self, _: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
            panic!("on purpose");
        }
    }
    let registry = Registry::new();
    let layer = CircuitBreakerLayer::new(Trip::consecutive(1))
        .open_for(OpenDuration::fixed(5 * SECOND))
        .name("search");
    registry.watch(&layer.handle()).unwrap();
    let mut decisions = registry.decisions();
    layer.handle().record(Outcome::failure());
    let _subscriber = tracing::subscriber::set_default(tracing_subscriber::registry().with(Panics));
    let sampler = tokio::spawn(registry.run());
    // The sampler is the first reader of the circuit after its open time, so it emits the event.
    sleep(SECOND * 41 / 2).await;
    assert!(!sampler.is_finished());
    assert_eq!(registry.status().layers[0].tracks[0].values.len(), 20);
    let events = [decisions.next().await, decisions.next().await].map(|one| one.unwrap().event);
    assert_eq!(events, ["circuit opened", "circuit half-open"]);
}

#[tokio::test(start_paused = true)]
async fn keyed_layer_reports_its_first_open_circuit_and_when_none_is_open() {
    let registry = Registry::new();
    let layer =
        CircuitBreakerLayer::http().name("api").keyed(|request: &Request<u32>| *request.body());
    registry.watch(&layer.handle()).unwrap();
    let service = layer.layer(tower::service_fn(async |_: Request<u32>| {
        Ok::<_, Infallible>(Response::new(Body::new()))
    }));
    let _sampler = tokio::spawn(registry.run());
    let mut decisions = registry.decisions();
    for key in 0..100 {
        service.clone().oneshot(Request::new(key)).await.unwrap();
    }
    sleep(2 * SECOND).await;
    let circuits: Vec<_> = layer.handle().all().into_iter().map(|(_, circuit)| circuit).collect();
    circuits.iter().for_each(|circuit| circuit.force_open());
    sleep(5 * SECOND).await;
    circuits.iter().for_each(|circuit| circuit.reset());
    sleep(5 * SECOND).await;
    let mut received = Vec::new();
    while let Ok(Some(decision)) = tokio::time::timeout(Duration::ZERO, decisions.next()).await {
        received.push((decision.event, decision.why));
    }
    let expected = [
        ("circuits opened", "100 of 100 circuits are open.".to_owned()),
        ("circuits closed", "None of 100 circuits is open.".to_owned()),
    ];
    assert_eq!(received, expected);
}
