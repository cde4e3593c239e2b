//! Retries and hedge attempts.

use std::{
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress::{
    Backoff, BoxError, CircuitBreakerLayer, Deadline, HedgeLayer, Outcome, RetryBudget, RetryLayer,
    Trip, observe::Registry, outcome::Reason,
};
use http::{Request, Response, StatusCode};
use http_body_util::Empty;
use tokio::time::{advance, sleep};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};

use super::Page;
use crate::support::{ms, secs, settle};

type Nothing = Empty<bytes::Bytes>;

fn get() -> Request<Nothing> {
    Request::new(Nothing::new())
}

fn attempts(page: &Page, reason: &str) -> f64 {
    page.get(&format!(r#"buttress_retry_attempts_total{{name="search",reason="{reason}"}}"#))
}

fn declined(page: &Page, reason: &str) -> f64 {
    page.get(&format!(r#"buttress_retry_declined_total{{name="search",reason="{reason}"}}"#))
}

fn of(page: &Page, metric: &str) -> f64 {
    page.get(&format!(r#"buttress_{metric}{{name="search"}}"#))
}

/// Returns a layer with a delay of 100 ms, without a budget.
fn constant() -> RetryLayer {
    RetryLayer::http().backoff(Backoff::constant(ms(100)).without_jitter()).without_budget()
}

/// Returns a service whose attempts end with these outcomes in turn, and with the last one from then on.
fn scripted(
    layer: RetryLayer,
    outcomes: Vec<Outcome>,
) -> (Registry, impl Service<(), Response = Outcome, Error = Outcome, Future: Send> + Clone) {
    let layer = layer.name("search");
    let registry = Registry::new();
    registry.watch(&layer.handle()).unwrap();
    let made = Arc::new(AtomicUsize::new(0));
    let layer =
        layer.classify(|result: Result<&Outcome, &Outcome>| *result.unwrap_or_else(|error| error));
    let service = layer.layer(service_fn(move |()| {
        let outcome = outcomes[made.fetch_add(1, SeqCst).min(outcomes.len() - 1)];
        async move { if outcome.is_success() { Ok(outcome) } else { Err(outcome) } }
    }));
    (registry, service)
}

fn failed(reason: Reason) -> Outcome {
    Outcome::failure().because(reason)
}

#[tokio::test(start_paused = true)]
async fn unused_retry_has_every_reason() {
    let layer = RetryLayer::http().name("search");
    let registry = Registry::new();
    registry.watch(&layer.handle()).unwrap();
    let page = Page::of(&registry);
    assert_eq!(page.family("buttress_retry_attempts_total").len(), 23);
    let reasons = page.labels("buttress_retry_declined_total", "reason");
    assert_eq!(reasons.len(), 15);
    assert!(reasons.contains(&"budget_used_up") && !reasons.contains(&"responded"), "{reasons:?}");
    assert_eq!(page.sum("buttress_retry_attempts_total"), 0.0);
    assert_eq!(page.sum("buttress_retry_declined_total"), 0.0);
    assert_eq!(of(&page, "retry_recoveries_total"), 0.0);
    assert_eq!(of(&page, "retry_call_retries_count"), 0.0);
    assert_eq!(page.family("buttress_retry_call_retries_bucket").len(), 7);
    assert_eq!(of(&page, "retry_delay_seconds_count"), 0.0);
    assert_eq!(page.family("buttress_retry_delay_seconds_bucket").len(), 13);
    // The default budget.
    assert_eq!(of(&page, "retry_budget_remaining"), 10.0);
    assert_eq!(of(&page, "retry_budget_limit"), 100.0);
}

/// A retry around a circuit, and five calls whose upstream responds with 503.
#[tokio::test(start_paused = true)]
async fn failures_that_open_the_circuit_are_declined_once_per_call() {
    let retry = constant().attempts(3).name("search");
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(5)).name("search");
    let registry = Registry::new();
    registry.watch(&retry.handle()).unwrap();
    registry.watch(&breaker.handle()).unwrap();
    let service =
        ServiceBuilder::new().layer(retry.clone()).layer(breaker).service(service_fn(async |_| {
            let mut response = Response::new(Nothing::new());
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            Ok::<_, BoxError>(response)
        }));
    for _ in 0..5 {
        let _ = service.clone().oneshot(get()).await;
    }
    let page = Page::of(&registry);
    assert_eq!(page.sum("buttress_retry_attempts_total"), 4.0);
    assert_eq!(attempts(&page, "status"), 4.0);
    assert_eq!(page.sum("buttress_rejections_total"), 4.0);
    assert_eq!(page.sum("buttress_breaker_trips_total"), 1.0);
    assert_eq!(page.sum("buttress_retry_declined_total"), 5.0);
    assert_eq!((declined(&page, "attempts_used_up"), declined(&page, "rejected")), (1.0, 4.0));
    assert_eq!(of(&page, "retry_recoveries_total"), 0.0);
    assert_eq!(of(&page, "retry_call_retries_count"), 2.0);
    assert_eq!(of(&page, "retry_call_retries_sum"), 4.0);
    let snapshot = retry.handle().snapshot();
    assert_eq!((snapshot.retries, snapshot.gave_up, snapshot.budget_denied), (4, 5, 0));
}

#[tokio::test(start_paused = true)]
async fn recovered_call_counts_its_retries_by_reason_and_its_delay() {
    let outcomes = vec![failed(Reason::Reset), failed(Reason::ConnectRefused), Outcome::success()];
    let (registry, service) = scripted(constant(), outcomes);
    service.clone().oneshot(()).await.unwrap();
    // This call needs no retry.
    service.clone().oneshot(()).await.unwrap();
    let page = Page::of(&registry);
    assert_eq!((attempts(&page, "reset"), attempts(&page, "connect_refused")), (1.0, 1.0));
    assert_eq!(page.sum("buttress_retry_attempts_total"), 2.0);
    assert_eq!(page.sum("buttress_retry_declined_total"), 0.0);
    assert_eq!(of(&page, "retry_recoveries_total"), 1.0);
    assert_eq!(of(&page, "retry_call_retries_count"), 1.0);
    assert_eq!(of(&page, "retry_call_retries_sum"), 2.0);
    let bucket = |le: &str| {
        let labels = format!(r#"{{name="search",le="{le}"}}"#);
        page.get(&format!("buttress_retry_call_retries_bucket{labels}"))
    };
    assert_eq!((bucket("1.0"), bucket("2.0")), (0.0, 1.0));
    assert_eq!(of(&page, "retry_delay_seconds_count"), 1.0);
    assert_eq!(of(&page, "retry_delay_seconds_sum"), 0.2);
}

#[tokio::test(start_paused = true)]
async fn error_of_a_first_attempt_that_is_not_retryable_is_declined() {
    let (registry, service) = scripted(constant(), vec![Outcome::cancelled()]);
    service.clone().oneshot(()).await.unwrap_err();
    let page = Page::of(&registry);
    assert_eq!(declined(&page, "not_retryable"), 1.0);
    assert_eq!(page.sum("buttress_retry_declined_total"), 1.0);
    assert_eq!(page.sum("buttress_retry_attempts_total"), 0.0);
}

#[tokio::test(start_paused = true)]
async fn dropped_call_counts_its_retries_and_the_delay_so_far() {
    let (registry, service) = scripted(constant(), vec![failed(Reason::Reset)]);
    let call = tokio::spawn(service.clone().oneshot(()));
    settle().await;
    advance(ms(101)).await;
    settle().await;
    let page = Page::of(&registry);
    assert_eq!((attempts(&page, "reset"), of(&page, "retry_call_retries_count")), (1.0, 0.0));
    advance(ms(50)).await;
    call.abort();
    settle().await;
    let page = Page::of(&registry);
    assert_eq!(of(&page, "retry_call_retries_count"), 1.0);
    assert_eq!(of(&page, "retry_call_retries_sum"), 1.0);
    assert_eq!(of(&page, "retry_delay_seconds_sum"), 0.151);
    assert_eq!(page.sum("buttress_retry_declined_total"), 0.0);
}

#[tokio::test(start_paused = true)]
async fn call_dropped_in_its_first_delay_is_not_retried() {
    let (registry, service) = scripted(constant(), vec![failed(Reason::Reset)]);
    let call = tokio::spawn(service.clone().oneshot(()));
    settle().await;
    call.abort();
    settle().await;
    let page = Page::of(&registry);
    assert_eq!(of(&page, "retry_call_retries_count"), 0.0);
    assert_eq!(page.sum("buttress_retry_attempts_total"), 0.0);
}

#[tokio::test(start_paused = true)]
async fn budget_is_reported_by_each_layer_and_absent_without_one() {
    let budget = RetryBudget::with(0.1, 0, 20);
    let layers = ["a", "b"].map(|name| RetryLayer::http().budget(budget.clone()).name(name));
    let without = RetryLayer::http().without_budget().name("c");
    let registry = Registry::new();
    for layer in layers.iter().chain([&without]) {
        registry.watch(&layer.handle()).unwrap();
    }
    (0..5).for_each(|_| budget.deposit());
    let page = Page::of(&registry);
    for name in ["a", "b"] {
        let labels = format!(r#"{{name="{name}"}}"#);
        assert_eq!(page.get(&format!("buttress_retry_budget_remaining{labels}")), 0.5);
        assert_eq!(page.get(&format!("buttress_retry_budget_limit{labels}")), 20.0);
    }
    assert_eq!(page.family("buttress_retry_budget_remaining").len(), 2);
    assert_eq!(page.family("buttress_retry_budget_limit").len(), 2);
    let text = registry.text();
    let values = text.lines().filter(|line| !line.starts_with('#'));
    let mut values = values.map(|line| line.rsplit(' ').next().unwrap());
    assert!(values.all(|value| value.parse::<f64>().unwrap().is_finite()));
}

#[tokio::test(start_paused = true)]
async fn retry_beyond_the_budget_is_declined() {
    let layer = constant().budget(RetryBudget::with(0.1, 0, 20));
    let (registry, service) = scripted(layer, vec![failed(Reason::Reset)]);
    service.clone().oneshot(()).await.unwrap_err();
    let page = Page::of(&registry);
    assert_eq!(declined(&page, "budget_used_up"), 1.0);
    assert_eq!(page.sum("buttress_retry_declined_total"), 1.0);
}

// ===== Hedging =====

/// Watches the layer, and returns a service whose attempts take these times in turn, and the last one from then on.
fn slow(
    layer: HedgeLayer,
    times: Vec<Duration>,
) -> (
    Registry,
    impl Service<Request<Nothing>, Response: Send, Error = BoxError, Future: Send> + Clone,
) {
    let layer = layer.name("search");
    let registry = Registry::new();
    registry.watch(&layer.handle()).unwrap();
    let made = Arc::new(AtomicUsize::new(0));
    let service = layer.layer(service_fn(move |_| {
        let time = times[made.fetch_add(1, SeqCst).min(times.len() - 1)];
        async move {
            if time == Duration::MAX {
                pending::<()>().await;
            }
            sleep(time).await;
            Ok::<_, BoxError>(Response::new(Nothing::new()))
        }
    }));
    (registry, service)
}

fn not_hedged(page: &Page, reason: &str) -> f64 {
    page.get(&format!(r#"buttress_hedge_declined_total{{name="search",reason="{reason}"}}"#))
}

#[tokio::test(start_paused = true)]
async fn hedge_attempts_and_their_wins_are_counted() {
    let times = [500, 10, 150, 500].map(ms).to_vec();
    let (registry, service) = slow(HedgeLayer::http(ms(100)), times);
    let page = Page::of(&registry);
    assert_eq!(of(&page, "hedge_attempts_total"), 0.0);
    assert_eq!(of(&page, "hedge_wins_total"), 0.0);
    assert_eq!(
        page.labels("buttress_hedge_declined_total", "reason"),
        ["body", "budget_used_up", "deadline_passed"]
    );
    assert_eq!(of(&page, "hedge_delay_seconds"), 0.1);
    // The hedge attempt of the first call wins, that of the second one does not.
    service.clone().oneshot(get()).await.unwrap();
    service.clone().oneshot(get()).await.unwrap();
    let page = Page::of(&registry);
    assert_eq!(of(&page, "hedge_attempts_total"), 2.0);
    assert_eq!(of(&page, "hedge_wins_total"), 1.0);
    assert_eq!(page.sum("buttress_hedge_declined_total"), 0.0);
    // A retry layer of the same name reports the budget.
    assert!(!page.contains("budget_remaining"));
}

#[tokio::test(start_paused = true)]
async fn hedge_attempt_beyond_the_budget_is_declined() {
    let layer = HedgeLayer::http(ms(100)).budget(RetryBudget::with(0.1, 0, 20));
    let handle = layer.handle();
    let (registry, service) = slow(layer, vec![ms(200)]);
    service.clone().oneshot(get()).await.unwrap();
    let page = Page::of(&registry);
    assert_eq!(not_hedged(&page, "budget_used_up"), 1.0);
    assert_eq!(page.sum("buttress_hedge_declined_total"), 1.0);
    assert_eq!(of(&page, "hedge_attempts_total"), 0.0);
    assert_eq!(handle.snapshot().budget_denied, 1);
}

#[tokio::test(start_paused = true)]
async fn hedge_attempt_after_the_deadline_is_declined() {
    let (registry, service) = slow(HedgeLayer::http(ms(100)), vec![ms(200)]);
    let mut request = get();
    request.extensions_mut().insert(Deadline::after(ms(50)));
    service.clone().oneshot(request).await.unwrap();
    assert_eq!(not_hedged(&Page::of(&registry), "deadline_passed"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn delay_of_a_percentile_is_absent_before_it_is_known() {
    let (registry, service) = slow(HedgeLayer::after_percentile(0.95), vec![secs(1)]);
    assert!(!Page::of(&registry).contains("hedge_delay"));
    for _ in 0..40 {
        service.clone().oneshot(get()).await.unwrap();
    }
    let delay = of(&Page::of(&registry), "hedge_delay_seconds");
    assert!((1.0..1.01).contains(&delay), "{delay}");
}
