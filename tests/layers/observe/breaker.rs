use std::{
    convert::Infallible,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use buttress::{CircuitBreakerLayer, Outcome, Trip, breaker::OpenDuration, observe::Registry};
use futures_util::FutureExt;
use http::{Request, Response, StatusCode};
use http_body_util::Empty;
use tokio::time::{Instant, advance};
use tower::{Layer, ServiceExt};

use super::Page;
use crate::support::request;

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

fn search() -> (Registry, CircuitBreakerLayer) {
    let layer = CircuitBreakerLayer::new(Trip::consecutive(5))
        .open_for(OpenDuration::fixed(secs(30)))
        .name("search");
    let registry = Registry::new();
    registry.watch(&layer.handle()).unwrap();
    (registry, layer)
}

#[tokio::test(start_paused = true)]
async fn unused_circuit_has_every_state_and_is_closed() {
    let (registry, _layer) = search();
    let page = Page::of(&registry);
    let states = page.family("buttress_breaker_state");
    assert_eq!(states.len(), 5, "{states:?}");
    assert_eq!(page.get(r#"buttress_breaker_state{name="search",state="closed"}"#), 1.0);
    assert_eq!(page.sum("buttress_breaker_state"), 1.0);
    assert_eq!(page.family("buttress_breaker_trips_total").len(), 7);
    assert_eq!(page.family("buttress_breaker_transitions_total").len(), 5);
    assert_eq!(page.family("buttress_rejections_total").len(), 6);
    assert_eq!(page.sum("buttress_rejections_total"), 0.0);
    assert_eq!(page.get(r#"buttress_breaker_open_remaining_seconds{name="search"}"#), 0.0);
    assert_eq!(page.sum("buttress_build_info"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn open_circuit_states_trips_rejections_and_the_time_in_each_state() {
    let (registry, layer) = search();
    let service = layer.layer(tower::service_fn(async |_: Request<()>| {
        let mut response = Response::new(Empty::<bytes::Bytes>::new());
        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        Ok::<_, Infallible>(response)
    }));
    advance(secs(10)).await;
    for _ in 0..5 {
        service.clone().oneshot(request()).await.unwrap();
    }
    let page = Page::of(&registry);
    assert_eq!(page.get(r#"buttress_breaker_state{name="search",state="open"}"#), 1.0);
    assert_eq!(page.sum("buttress_breaker_state"), 1.0);
    assert_eq!(page.get(r#"buttress_breaker_transitions_total{name="search",state="open"}"#), 1.0);
    assert_eq!(page.sum("buttress_breaker_transitions_total"), 1.0);
    assert_eq!(
        page.get(r#"buttress_breaker_trips_total{name="search",reason="consecutive"}"#),
        1.0
    );
    assert_eq!(page.sum("buttress_breaker_trips_total"), 1.0);
    assert_eq!(page.get(r#"buttress_breaker_failures_total{name="search",reason="status"}"#), 5.0);
    assert_eq!(page.sum("buttress_breaker_failures_total"), 5.0);
    assert_eq!(page.get(r#"buttress_breaker_open_remaining_seconds{name="search"}"#), 30.0);
    for _ in 0..4 {
        service.clone().oneshot(request()).await.unwrap_err();
    }
    let rejected = r#"{name="search",layer="circuit_breaker",reason="circuit_open"}"#;
    let page = Page::of(&registry);
    assert_eq!(page.get(&format!("buttress_rejections_total{rejected}")), 4.0);
    assert_eq!(page.sum("buttress_rejections_total"), 4.0);
    // The open time passes without a call and without a scrape.
    advance(secs(40)).await;
    let page = Page::of(&registry);
    let time = |state| {
        page.get(&format!(
            r#"buttress_breaker_state_time_seconds_total{{name="search",state="{state}"}}"#
        ))
    };
    assert_eq!(page.get(r#"buttress_breaker_state{name="search",state="half_open"}"#), 1.0);
    assert_eq!((time("closed"), time("open"), time("half_open")), (10.0, 30.0, 10.0));
    assert_eq!(page.sum("buttress_breaker_state_time_seconds_total"), 50.0);
}

#[tokio::test(start_paused = true)]
async fn open_period_between_two_scrapes_is_visible() {
    let (registry, layer) = search();
    let handle = layer.handle();
    Page::of(&registry);
    handle.force_open();
    advance(secs(3)).await;
    handle.reset();
    let page = Page::of(&registry);
    let time = r#"buttress_breaker_state_time_seconds_total{name="search",state="forced_open"}"#;
    assert_eq!(page.get(time), 3.0);
    assert_eq!(
        page.get(r#"buttress_breaker_transitions_total{name="search",state="forced_open"}"#),
        1.0
    );
    assert_eq!(
        page.get(r#"buttress_breaker_transitions_total{name="search",state="closed"}"#),
        1.0
    );
}

#[tokio::test(start_paused = true)]
async fn isolation_counts_as_forced_open() {
    let (registry, layer) = search();
    let isolation = layer.handle().isolate();
    advance(secs(2)).await;
    let page = Page::of(&registry);
    assert_eq!(page.get(r#"buttress_breaker_isolations{name="search"}"#), 1.0);
    drop(isolation);
    advance(secs(1)).await;
    let page = Page::of(&registry);
    assert_eq!(page.get(r#"buttress_breaker_isolations{name="search"}"#), 0.0);
    let time = |state| {
        page.get(&format!(
            r#"buttress_breaker_state_time_seconds_total{{name="search",state="{state}"}}"#
        ))
    };
    assert_eq!((time("closed"), time("forced_open")), (1.0, 2.0));
}

#[tokio::test(start_paused = true)]
async fn keyed_layer_with_many_keys_adds_five_series() {
    let layer =
        CircuitBreakerLayer::new(Trip::consecutive(1)).name("tenants").keyed(|key: &u32| *key);
    let layer = layer.max_keys(20_000).per_response();
    let registry = Registry::new();
    let before = Page::of(&registry).len();
    registry.watch(&layer.handle()).unwrap();
    let service = layer.layer(tower::service_fn(async |key: u32| {
        if key < 3 { Err(std::io::Error::other("down")) } else { Ok(()) }
    }));
    for key in 0..10_000 {
        let _ = service.clone().oneshot(key).await;
    }
    let page = Page::of(&registry);
    assert_eq!(page.len() - before, 5);
    assert_eq!(page.get(r#"buttress_breaker_circuits{name="tenants",state="open"}"#), 3.0);
    assert_eq!(page.sum("buttress_breaker_circuits"), 10_000.0);
}

#[tokio::test(start_paused = true)]
async fn recorded_outcomes_count_by_reason() {
    let (registry, layer) = search();
    layer.handle().record(Outcome::failure());
    let page = Page::of(&registry);
    assert_eq!(page.get(r#"buttress_breaker_consecutive_failures{name="search"}"#), 1.0);
    assert_eq!(page.sum("buttress_breaker_failures_total"), 1.0);
}

#[test]
fn new_keys_have_circuits_while_the_layer_is_read() {
    let layer =
        CircuitBreakerLayer::new(Trip::consecutive(1)).name("tenants").keyed(|key: &u32| *key);
    let layer = layer.max_keys(5_000).per_response();
    let registry = Registry::new();
    registry.watch(&layer.handle()).unwrap();
    let service = layer.layer(tower::service_fn(async |_: u32| Ok::<_, Infallible>(())));
    let call = |key: u32| {
        service.clone().oneshot(key).now_or_never().unwrap().unwrap();
    };
    (0..5_000).for_each(call);
    let is_done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_done.load(Ordering::Relaxed) {
                let _ = registry.status();
            }
        });
        let until = Instant::now() + Duration::from_millis(500);
        (5_000..).take_while(|_| Instant::now() < until).for_each(call);
        is_done.store(true, Ordering::Relaxed);
    });
    let seen = layer.handle().snapshot();
    assert!(seen.evicted > 1000, "{seen:?}");
    assert_eq!(seen.uncovered, 0, "{seen:?}");
}
