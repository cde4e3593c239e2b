use std::time::Duration;

use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, TimeoutLayer, Trip, observe::Registry,
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use tokio::time::Instant;
use tower::{Layer, ServiceExt, service_fn};

use super::Page;
use crate::support::ms;

type Nothing = Empty<Bytes>;

#[tokio::test(start_paused = true)]
async fn name_is_required_unique_and_short() {
    let registry = Registry::new();
    let error = registry.watch(&CircuitBreakerLayer::http().handle()).unwrap_err();
    assert_eq!((error.field, error.value.as_str()), ("name", "\"\""));
    assert!(error.remedy.contains(".name("), "{error}");
    let (first, second) =
        (CircuitBreakerLayer::http().name("a"), CircuitBreakerLayer::http().name("a"));
    registry.watch(&first.handle()).unwrap();
    let error = registry.watch(&second.handle()).unwrap_err();
    assert_eq!((error.field, error.value.as_str()), ("name", "\"a\""));
    let long = CircuitBreakerLayer::http().name(&"x".repeat(65));
    let error = registry.watch(&long.handle()).unwrap_err();
    assert!(error.remedy.contains("64 bytes"), "{error}");
    // The name is free once its layer is gone.
    drop(first);
    registry.watch(&second.handle()).unwrap();
}

#[tokio::test(start_paused = true)]
async fn dropped_layer_disappears() {
    let registry = Registry::new();
    let layer = CircuitBreakerLayer::http().name("search");
    registry.watch(&layer.handle()).unwrap();
    assert!(Page::of(&registry).contains("search"));
    drop(layer);
    assert!(!Page::of(&registry).contains("search"));
}

#[test]
fn thousand_circuits_are_read_in_a_few_milliseconds() {
    let registry = Registry::new();
    let layers: Vec<_> =
        (0..1000).map(|nth| CircuitBreakerLayer::http().name(&format!("c{nth}"))).collect();
    for layer in &layers {
        registry.watch(&layer.handle()).unwrap();
    }
    // The shortest of several runs, because the machine may be busy. A debug build is about ten times slower.
    let read = || {
        let start = Instant::now();
        let text = registry.text();
        (start.elapsed(), text.len())
    };
    let (shortest, len) = (0..5).map(|_| read()).min().unwrap();
    assert!(len > 1_000_000, "{len}");
    let max = if cfg!(debug_assertions) { 2000 } else { 50 };
    assert!(shortest < Duration::from_millis(max), "{shortest:?}");
}

#[tokio::test(start_paused = true)]
async fn calls_that_a_misconfigured_layer_rejects_are_counted() {
    let registry = Registry::new();
    let limit = ConcurrencyLimitLayer::new(0).name("a");
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(0)).name("a");
    let timeout = TimeoutLayer::http().head(ms(0)).name("a");
    registry.watch(&limit.handle()).unwrap();
    registry.watch(&breaker.handle()).unwrap();
    registry.watch(&timeout.handle()).unwrap();
    async fn inner<B>(_: Request<B>) -> Result<Response<Nothing>, BoxError> {
        Ok(Response::new(Nothing::new()))
    }
    let get = || Request::new(Nothing::new());
    for _ in 0..2 {
        limit.layer(service_fn(inner)).oneshot(get()).await.unwrap_err();
        breaker.layer(service_fn(inner)).oneshot(get()).await.unwrap_err();
        timeout.layer(service_fn(inner)).oneshot(get()).await.unwrap_err();
    }
    let page = Page::of(&registry);
    for layer in ["concurrency_limit", "circuit_breaker", "timeout"] {
        let labels = format!(r#"{{name="a",layer="{layer}",reason="misconfigured"}}"#);
        assert_eq!(page.get(&format!("buttress_rejections_total{labels}")), 2.0, "{layer}");
    }
    assert_eq!(page.sum("buttress_rejections_total"), 6.0);
}
