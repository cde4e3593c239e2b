//! Waits inside the client: for a permit, a connection or the next attempt. They are never attributed to the upstream.

use buttress::{
    CircuitBreakerLayer, ConcurrencyLimitLayer, HedgeLayer, RetryLayer, TimeoutLayer, Timeouts,
    breaker::CircuitState,
    connect::{Client, ConnectLayer},
};
use http::Request;
use http_body_util::{BodyExt, Empty};
use tokio::{io::AsyncReadExt, net::TcpListener, time::timeout};
use tower::{Layer, ServiceBuilder, ServiceExt};
use tower_http::map_request_body::MapRequestBodyLayer;

use super::fixtures::{Upstream, UpstreamService, get, ms, secs};
use crate::support::{Strict, empty, request, status};

#[tokio::test(start_paused = true)]
async fn a_hang_up_in_the_queue_of_a_limit_is_neutral() {
    let breaker = CircuitBreakerLayer::http();
    let (inner, watch) = Strict::holding();
    let limit = ConcurrencyLimitLayer::new(1).queue(10, secs(60));
    let client = breaker.layer(limit.layer(inner));
    let holder = tokio::spawn(client.clone().oneshot(request()));
    tokio::task::yield_now().await;
    for _ in 0..5 {
        timeout(secs(5), client.clone().oneshot(request())).await.unwrap_err();
    }
    assert_eq!(breaker.handle().snapshot().seen.consecutive_failures, 0);
    watch.end(0, Ok(empty()));
    holder.await.unwrap().unwrap();
    assert_eq!(breaker.handle().state(), CircuitState::Closed);
}

/// The clock starts when the call has acquired the permit of the limit.
#[tokio::test(start_paused = true)]
async fn the_time_in_the_queue_of_a_limit_is_not_measured() {
    for (left, failures) in [(ms(900), 0), (ms(1100), 1)] {
        let breaker = CircuitBreakerLayer::http();
        let (inner, watch) = Strict::holding();
        let limit = ConcurrencyLimitLayer::new(1).queue(10, secs(60));
        let client = breaker.layer(limit.layer(inner));
        let holder = tokio::spawn(client.clone().oneshot(request()));
        tokio::task::yield_now().await;
        let queued = tokio::spawn(timeout(secs(5) + left, client.clone().oneshot(request())));
        tokio::time::sleep(secs(5)).await;
        watch.end(0, Ok(empty()));
        holder.await.unwrap().unwrap();
        queued.await.unwrap().unwrap_err();
        assert_eq!(breaker.handle().snapshot().seen.consecutive_failures, failures, "{left:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_hang_up_while_the_inner_service_is_not_ready_is_neutral() {
    let breaker = CircuitBreakerLayer::http();
    let (inner, watch) = Strict::holding();
    watch.set_ready(false);
    let client = breaker.layer(inner);
    for _ in 0..5 {
        timeout(secs(5), client.clone().oneshot(request())).await.unwrap_err();
    }
    assert_eq!(breaker.handle().snapshot().seen.consecutive_failures, 0);
}

#[tokio::test(start_paused = true)]
async fn a_hang_up_between_two_attempts_is_neutral() {
    let breaker = CircuitBreakerLayer::http();
    let (inner, watch) = Strict::answering(|| crate::support::Then::Answer(status(503)));
    let backoff = || std::iter::repeat(secs(20));
    let retry = RetryLayer::http().backoff_with(backoff);
    // The unusual order: the breaker records whole calls.
    let client = breaker.layer(retry.layer(inner));
    for _ in 0..5 {
        let request = Request::new(Empty::<bytes::Bytes>::new());
        timeout(secs(10), client.clone().oneshot(request)).await.unwrap_err();
    }
    assert_eq!(watch.seen().calls, 5);
    assert_eq!(breaker.handle().snapshot().seen.consecutive_failures, 0);
}

#[tokio::test(start_paused = true)]
async fn a_hedge_attempt_in_a_queue_does_not_hide_that_the_first_attempt_hangs() {
    let breaker = CircuitBreakerLayer::http();
    let limit = ConcurrencyLimitLayer::new(1).queue(100, secs(600));
    let limited = limit.layer(UpstreamService::new(Upstream::Hangs));
    let client = breaker.layer(HedgeLayer::http(ms(100)).layer(limited));
    for _ in 0..5 {
        timeout(secs(20), client.clone().oneshot(get())).await.unwrap_err();
    }
    assert_eq!(breaker.handle().state(), CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn a_hang_up_is_neutral_if_both_attempts_wait_inside_the_client() {
    let breaker = CircuitBreakerLayer::http();
    let limit = ConcurrencyLimitLayer::new(1).queue(100, secs(600));
    let limited = limit.layer(UpstreamService::new(Upstream::Hangs));
    let _holder = tokio::spawn(limited.clone().oneshot(get()));
    tokio::task::yield_now().await;
    let client = breaker.layer(HedgeLayer::http(ms(100)).layer(limited));
    for _ in 0..5 {
        timeout(secs(20), client.clone().oneshot(get())).await.unwrap_err();
    }
    assert_eq!(breaker.handle().snapshot().seen.consecutive_failures, 0);
}

/// Over sockets, with one connection that a hung call holds.
#[tokio::test]
async fn a_hang_up_while_waiting_for_a_connection_is_neutral() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut sockets = Vec::new();
        while let Ok((mut socket, _)) = listener.accept().await {
            sockets.push(tokio::spawn(async move {
                let mut sink = Vec::new();
                let _ = socket.read_to_end(&mut sink).await;
            }));
        }
    });
    let connections = ConnectLayer::new().max_per_host(1);
    let breaker = CircuitBreakerLayer::http().count_cancelled_after(ms(100));
    let client = ServiceBuilder::new()
        .layer(breaker.clone())
        .service(Client::builder(connections).build_http::<Empty<bytes::Bytes>>());
    let get = || Request::get(format!("http://{address}/")).body(Empty::new()).unwrap();
    let holder = tokio::spawn(client.clone().oneshot(get()));
    tokio::time::sleep(ms(50)).await;
    for _ in 0..5 {
        timeout(ms(150), client.clone().oneshot(get())).await.unwrap_err();
    }
    assert_eq!(breaker.handle().snapshot().seen.consecutive_failures, 0);
    holder.abort();
    let _ = holder.await;
    assert_eq!(
        breaker.handle().snapshot().seen.consecutive_failures,
        1,
        "the upstream had the request"
    );
}

#[tokio::test(start_paused = true)]
async fn a_hang_up_before_the_request_has_been_sent_is_neutral() {
    let breaker = CircuitBreakerLayer::http();
    let client =
        RetryLayer::http().layer(breaker.layer(UpstreamService::new(Upstream::ReadsNothing)));
    for _ in 0..5 {
        let upload = super::fixtures::upload(ms(1));
        timeout(secs(5), client.clone().oneshot(upload)).await.unwrap_err();
    }
    assert_eq!(breaker.handle().snapshot().seen.consecutive_failures, 0);
    for _ in 0..5 {
        timeout(secs(5), client.clone().oneshot(get())).await.unwrap_err();
    }
    assert_eq!(
        breaker.handle().state(),
        CircuitState::Open,
        "a request without a body is sent at once"
    );
}

#[tokio::test(start_paused = true)]
async fn a_timeout_in_the_queue_of_an_inner_limit_is_neutral() {
    for with_retry in [false, true] {
        let breaker = CircuitBreakerLayer::http();
        let limit = ConcurrencyLimitLayer::new(1).queue(100, secs(60));
        let inner = breaker.layer(limit.layer(UpstreamService::new(Upstream::Hangs)));
        let holder = tokio::spawn(inner.clone().oneshot(get()));
        tokio::task::yield_now().await;
        for _ in 0..5 {
            match with_retry {
                true => {
                    let retry = RetryLayer::http().attempts(1).attempt_timeout(secs(2));
                    retry.layer(inner.clone()).oneshot(get()).await.unwrap_err();
                }
                false => {
                    let total = TimeoutLayer::new(Timeouts::new().total(secs(2)));
                    let limited = MapRequestBodyLayer::new(BodyExt::boxed_unsync);
                    let limited = limited.layer(inner.clone());
                    total.layer(limited).oneshot(get()).await.unwrap_err();
                }
            }
        }
        assert_eq!(breaker.handle().snapshot().seen.consecutive_failures, 0, "{with_retry}");
        holder.abort();
    }
}

/// The clock stops while the retry waits for its next attempt, and keeps the time of the attempts before.
#[tokio::test(start_paused = true)]
async fn short_attempts_inside_of_a_breaker_do_not_hide_a_hung_upstream() {
    let breaker = CircuitBreakerLayer::http();
    let retry = RetryLayer::http().attempts(100).attempt_timeout(ms(900));
    let client = breaker.layer(retry.layer(UpstreamService::new(Upstream::Hangs)));
    for _ in 0..5 {
        timeout(ms(2500), client.clone().oneshot(get())).await.unwrap_err();
    }
    assert_eq!(breaker.handle().state(), CircuitState::Open);
}
