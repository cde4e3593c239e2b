//! Half-open circuits with slow uploads and slow readers.

use buttress::{
    CircuitBreakerLayer, ConcurrencyLimitLayer, Deadline, RetryLayer, TimeoutLayer, Timeouts,
    breaker::CircuitState, config::ClientConfig, stack::ClientStack, timeout::SendingBody,
};
use http::{Method, Request};
use http_body_util::BodyExt;
use tokio::{task::yield_now, time::sleep};
use tower::{Layer, ServiceExt, service_fn};

use super::fixtures::{
    TestBody, Upstream, UpstreamService, get, make_half_open, ms, post, secs, trickle, upload,
};
use crate::support::hello;

fn healthy() -> UpstreamService {
    UpstreamService::new(Upstream::Responds(ms(1)))
}

#[tokio::test(start_paused = true)]
async fn one_slow_upload_does_not_prevent_probes_with_bodies() {
    let breaker = CircuitBreakerLayer::http();
    let client = RetryLayer::http().layer(breaker.layer(healthy()));
    make_half_open(&breaker).await;
    let slow = tokio::spawn(client.clone().oneshot(trickle(secs(20), 10_000)));
    for _ in 0..100 {
        sleep(secs(1)).await;
        client.clone().oneshot(post()).await.unwrap();
        assert_eq!(breaker.handle().state(), CircuitState::Closed);
    }
    slow.abort();
}

#[tokio::test(start_paused = true)]
async fn one_slow_upload_does_not_delay_the_circuit_of_the_default_stack() {
    let stack = ClientStack::new(&ClientConfig::default()).unwrap();
    let client = stack.layer(healthy());
    stack.handle().breaker().half_open();
    let mut request = trickle(secs(20), 10_000);
    request.extensions_mut().insert(Deadline::after(secs(24 * 3600)));
    let slow = tokio::spawn(client.clone().oneshot(request));
    sleep(ms(101)).await;
    client.clone().oneshot(post()).await.unwrap();
    assert_eq!(stack.handle().breaker().state(), CircuitState::Closed);
    slow.abort();
}

/// Without a mark the breaker detects a slow upload only after it has admitted the call.
#[tokio::test(start_paused = true)]
async fn many_slow_uploads_without_a_mark_do_not_prevent_the_probe_of_a_quick_call() {
    let breaker = CircuitBreakerLayer::http();
    let client = breaker.layer(TimeoutLayer::http().layer(healthy()));
    make_half_open(&breaker).await;
    let mut slow = Vec::new();
    for _ in 0..50 {
        slow.push(tokio::spawn(client.clone().oneshot(trickle(secs(20), 10_000))));
        sleep(ms(20)).await;
    }
    sleep(ms(100)).await;
    client.oneshot(get()).await.unwrap();
    assert_eq!(breaker.handle().state(), CircuitState::Closed);
    slow.iter().for_each(|call| call.abort());
}

/// The upstream responds before the end of a slow upload, and the caller does not read the response.
#[tokio::test(start_paused = true)]
async fn unread_early_responses_do_not_delay_the_circuit() {
    let breaker = CircuitBreakerLayer::http();
    let inner = service_fn(|request: Request<SendingBody<TestBody>>| async move {
        if request.method() == Method::PUT {
            sleep(ms(5)).await;
        }
        tokio::spawn(request.into_body().collect());
        Ok::<_, buttress::BoxError>(hello())
    });
    let client = breaker.layer(TimeoutLayer::http().layer(inner));
    make_half_open(&breaker).await;
    let unread = client.clone().oneshot(trickle(secs(20), 100)).await.unwrap();
    sleep(ms(100)).await;
    assert_eq!(breaker.handle().state(), CircuitState::Closed, "a good response");
    drop(unread);
}

#[tokio::test(start_paused = true)]
async fn slow_uploads_reach_a_half_open_upstream_one_after_the_other() {
    let breaker = CircuitBreakerLayer::http();
    let upstream = UpstreamService::new(Upstream::Hangs);
    let client = breaker.layer(TimeoutLayer::http().layer(upstream.clone()));
    make_half_open(&breaker).await;
    for calls in 1..=3 {
        for _ in 0..50 {
            tokio::spawn(client.clone().oneshot(upload(secs(2))));
            yield_now().await;
        }
        assert_eq!(upstream.calls(), calls);
        sleep(ms(100)).await;
    }
}

/// The probe has released its slot long before its outcome.
#[tokio::test(start_paused = true)]
async fn a_slow_upload_alone_closes_the_circuit_when_it_succeeds() {
    let breaker = CircuitBreakerLayer::http();
    let client = RetryLayer::http().layer(breaker.layer(healthy()));
    make_half_open(&breaker).await;
    client.oneshot(upload(secs(120))).await.unwrap();
    assert_eq!(breaker.handle().state(), CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_runs_into_a_timeout_during_its_upload_decides_nothing() {
    let breaker = CircuitBreakerLayer::http();
    let retry = RetryLayer::http().attempts(1).attempt_timeout(secs(10));
    let client = retry.layer(breaker.layer(healthy()));
    make_half_open(&breaker).await;
    client.oneshot(trickle(ms(300), 10_000)).await.unwrap_err();
    assert_eq!(breaker.handle().state(), CircuitState::HalfOpen);
}

#[tokio::test(start_paused = true)]
async fn probes_with_bodies_do_not_queue_at_an_inner_limit() {
    let breaker = CircuitBreakerLayer::http();
    let limit = ConcurrencyLimitLayer::new(1).queue(100, secs(3600));
    let limited = limit.layer(UpstreamService::new(Upstream::Hangs));
    tokio::spawn(limited.clone().oneshot(get()));
    yield_now().await;
    let client = breaker.layer(TimeoutLayer::new(Timeouts::new().head(secs(3000))).layer(limited));
    make_half_open(&breaker).await;
    for _ in 0..40 {
        tokio::spawn(client.clone().oneshot(post()));
        yield_now().await;
    }
    assert_eq!(limit.handle().snapshot().waiting, 1);
}
