//! The number of attempts, their delays, and the requests that are retried.

use super::*;

// ===== Attempts, delays and requests =====

#[tokio::test]
async fn three_attempts_over_one_connection_return_the_last_response() {
    let (addr, heard, connections) = upstream().await;
    let breaker = CircuitBreakerLayer::http();
    let limit = ConcurrencyLimitLayer::new(1);
    let (state, handle) = (breaker.handle(), limit.handle());
    let client = ServiceBuilder::new().layer(retry()).layer(breaker).layer(limit).service(client());
    let get = request(Method::GET, addr, "/503/99/10", "");
    let response = soon(tokio::spawn(client.oneshot(get))).await.unwrap().unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    let attempts = Attempts::of(&response);
    assert_eq!((attempts.made, attempts.stop), (3, GiveUpReason::AttemptsUsedUp));
    assert_eq!(read(response).await.len(), 10);
    assert_eq!((heard.attempts(), connections.total(), handle.in_flight()), (3, 1, 0));
    assert_eq!(state.snapshot().seen.consecutive_failures, 3);
}

#[tokio::test]
async fn retry_after_is_followed_and_the_permit_is_released_meanwhile() {
    let (addr, heard, _) = upstream().await;
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let backoff = Backoff::constant(Duration::from_millis(1)).without_jitter();
    let retry = retry().backoff(backoff);
    let client = ServiceBuilder::new().layer(retry).layer(limit).service(client());
    let mut get = request(Method::GET, addr, "/503/1/100", "");
    get.headers_mut().insert("x-say-retry-after", "1".parse().unwrap());
    let start = Instant::now();
    let call = tokio::spawn(client.oneshot(get));
    until(|| heard.attempts() == 1 && handle.in_flight() == 0).await;
    assert!(start.elapsed() < Duration::from_secs(1));
    let response = soon(call).await.unwrap().unwrap();
    let waited = start.elapsed();
    assert!((1.0..2.0).contains(&waited.as_secs_f64()), "{waited:?}");
    assert_eq!((response.status(), Attempts::of(&response).made), (StatusCode::OK, 2));
    assert_eq!((read(response).await.len(), handle.in_flight()), (0, 0));
}

#[tokio::test]
async fn put_is_replayed_with_its_body_and_post_is_not() {
    for (method, key, made) in [
        (Method::PUT, false, 3),
        (Method::DELETE, false, 3),
        (Method::POST, false, 1),
        (Method::PATCH, false, 1),
        (Method::POST, true, 3),
    ] {
        let (addr, heard, _) = upstream().await;
        let client = ServiceBuilder::new().layer(retry()).service(client());
        let mut request = request(method.clone(), addr, "/503/2/0", "hello");
        if key {
            request.headers_mut().insert("idempotency-key", "1".parse().unwrap());
        }
        let response = soon(client.oneshot(request)).await.unwrap();
        assert_eq!(heard.bodies(), vec![Bytes::from_static(b"hello"); made], "{method}");
        let expected = match made {
            1 => (StatusCode::SERVICE_UNAVAILABLE, GiveUpReason::Unsafe, 1),
            _ => (StatusCode::OK, GiveUpReason::Responded, 3),
        };
        let attempts = Attempts::of(&response);
        assert_eq!((response.status(), attempts.stop, attempts.made), expected, "{method}");
    }
}

#[tokio::test]
async fn a_streamed_body_is_replayed_under_the_cap_and_passes_whole_above_it() {
    for (chunks, made, stop) in [(8, 2, GiveUpReason::Responded), (100, 1, GiveUpReason::BodyGone)]
    {
        let (addr, heard, _) = upstream().await;
        let client = ServiceBuilder::new().layer(retry()).service(client());
        let chunk = Bytes::from(vec![b'x'; KIB]);
        let frames = (0..chunks).map(move |_| Ok::<_, BoxError>(Frame::data(chunk.clone())));
        let body = StreamBody::new(stream::iter(frames));
        let put = Request::put(format!("http://{addr}/503/1/0")).body(body).unwrap();
        let response = soon(client.oneshot(put)).await.unwrap();
        let attempts = Attempts::of(&response);
        assert_eq!((attempts.made, attempts.stop), (made, stop));
        assert!(heard.bodies().iter().all(|body| body.len() == chunks * KIB));
        assert_eq!(heard.attempts(), made as usize);
    }
}

// ===== Discarded responses =====

#[tokio::test]
async fn discarded_503_of_256_kib_keeps_its_connection_when_drained() {
    for (size, layer, expected) in [
        (60 * KIB, retry(), 1..=1),
        (256 * KIB, retry().max_drain_bytes(256 * KIB as u64), 1..=1),
        // The control: this body exceeds the default bound of a drain, so each discarded response closes its
        // connection.
        (256 * KIB, retry(), 2..=20),
    ] {
        let (addr, heard, connections) = upstream().await;
        let client = ServiceBuilder::new().layer(layer.attempts(20)).service(client());
        let get = request(Method::GET, addr, &format!("/503/19/{size}"), "");
        let response = soon(client.oneshot(get)).await.unwrap();
        assert_eq!((response.status(), heard.attempts()), (StatusCode::OK, 20));
        let connections = connections.total();
        assert!(expected.contains(&connections), "{size}: {connections} connections");
    }
}

// ===== Ends of a call =====

#[tokio::test]
async fn an_open_circuit_ends_the_loop() {
    let (addr, heard, _) = upstream().await;
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(2));
    let state = breaker.handle();
    let client = ServiceBuilder::new().layer(retry().attempts(10)).layer(breaker).service(client());
    let get = || request(Method::GET, addr, "/503/99/0", "");
    let refused = soon(client.clone().oneshot(get())).await.unwrap_err();
    assert_eq!(Rejected::find(&*refused).unwrap().kind(), RejectedKind::Open);
    let attempts = Attempts::find(&*refused).unwrap();
    assert_eq!((attempts.made, attempts.stop), (3, GiveUpReason::Rejected));
    assert_eq!((heard.attempts(), state.state()), (2, CircuitState::Open));
    // The next call ends with its first attempt.
    let refused = soon(client.oneshot(get())).await.unwrap_err();
    assert_eq!(Attempts::find(&*refused).unwrap().made, 1);
    assert_eq!(heard.attempts(), 2);
}

#[tokio::test]
async fn an_open_circuit_that_responds_ends_the_loop_too() {
    let (addr, heard, _) = upstream().await;
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(2)).respond();
    let client = ServiceBuilder::new().layer(retry().attempts(10)).layer(breaker).service(client());
    let get = request(Method::GET, addr, "/503/99/0", "");
    let response = soon(client.oneshot(get)).await.unwrap();
    let attempts = Attempts::of(&response);
    assert_eq!((attempts.made, attempts.stop), (3, GiveUpReason::Rejected));
    assert!(response.extensions().get::<Rejected>().is_some());
    assert_eq!(heard.attempts(), 2);
}

#[tokio::test]
async fn a_call_cancelled_during_the_delay_leaves_no_permit_in_use() {
    let (addr, heard, _) = upstream().await;
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let client = ServiceBuilder::new().layer(retry()).layer(limit).service(client());
    let mut get = request(Method::GET, addr, "/503/99/10", "");
    get.headers_mut().insert("x-say-retry-after", "20".parse().unwrap());
    let call = tokio::spawn(client.oneshot(get));
    until(|| heard.attempts() == 1 && handle.in_flight() == 0).await;
    call.abort();
    assert!(soon(call).await.unwrap_err().is_cancelled());
    assert_eq!((heard.attempts(), handle.in_flight()), (1, 0));
}

// ===== Body types of the user =====

#[tokio::test]
async fn request_bodies_that_are_neither_unpin_nor_sync_are_replayed() {
    let (addr, heard, _) = upstream().await;
    let client = ServiceBuilder::new().layer(retry()).service(client());
    let chunks = stream::once(async { Ok::<_, BoxError>(Bytes::from_static(b"hello")) });
    let put = Request::put(format!("http://{addr}/503/1/0")).body(Body::from_stream(chunks));
    let response = soon(client.oneshot(put.unwrap())).await.unwrap();
    assert_eq!((response.status(), heard.attempts()), (StatusCode::OK, 2));
    let client = ServiceBuilder::new().layer(retry()).service(net::client());
    let get = Request::get(format!("http://{addr}/503/0/0")).body(Empty::<Bytes>::new());
    assert_eq!(soon(client.oneshot(get.unwrap())).await.unwrap().status(), StatusCode::OK);
}
