//! Calls that end by a disconnect, a panic or an error of the body: one by one, and many at once.

use super::*;

// ===== Single calls =====

#[tokio::test]
async fn a_client_that_disconnects_mid_stream_releases_its_permit() {
    let stage = Stage::default();
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let addr = serve(routes(&stage).layer(limit.respond())).await;
    let mut response = soon(client().request(net::get(addr, "/stream"))).await.unwrap();
    let first = soon(response.body_mut().frame()).await.unwrap().unwrap();
    assert_eq!(first.into_data().unwrap(), "hel");
    assert_eq!((stage.inside.now(), handle.in_flight()), (1, 1));
    drop(response);
    all_free(&stage, &handle).await;
}

#[tokio::test]
async fn a_client_that_disconnects_while_it_waits_leaves_the_queue() {
    let (stage, (limit, handle)) = (Stage::default(), two());
    let addr = serve(routes(&stage).layer(limit)).await;
    let mut inside = send_all(addr, ["/a", "/a"]);
    until(|| stage.inside.now() == 2).await;
    let mut waiting = send_all(addr, repeat_n("/a", 5));
    until(|| handle.snapshot().waiting == 5).await;
    waiting.abort_all();
    until(|| handle.snapshot().waiting == 0).await;
    stage.open();
    answers(&mut inside, 2).await;
    all_free(&stage, &handle).await;
    assert_eq!(stage.inside.total(), 2);
}

#[tokio::test]
async fn a_client_that_disconnects_before_the_head_releases_its_permit() {
    let (stage, (limit, handle)) = (Stage::default(), two());
    let addr = serve(routes(&stage).layer(limit)).await;
    let mut calls = send_all(addr, ["/a", "/a"]);
    until(|| stage.inside.now() == 2).await;
    calls.abort_all();
    all_free(&stage, &handle).await;
}

#[tokio::test]
async fn a_panic_in_a_handler_releases_its_permit() {
    let stage = Stage::default();
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let is_active = get(|| async {
        if true {
            panic!("a handler's panic, as expected");
        }
    });
    let app = routes(&stage).route("/panic", is_active).layer(limit.respond());
    let addr = serve(app).await;
    stage.open();
    for _ in 0..3 {
        soon(client().request(net::get(addr, "/panic"))).await.unwrap_err();
        all_free(&stage, &handle).await;
        let answer = answers(&mut send_all(addr, ["/a"]), 1).await.remove(0);
        assert_eq!(answer.status, StatusCode::OK);
        all_free(&stage, &handle).await;
    }
}

#[tokio::test]
async fn a_body_error_of_a_handler_releases_the_permit_and_is_a_failure() {
    let stage = Stage::default();
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(1));
    let state = breaker.handle();
    let stack = ServiceBuilder::new().layer(breaker.respond()).layer(limit.respond());
    let addr = serve(routes(&stage).layer(stack)).await;
    let response = soon(client().request(net::get(addr, "/cut"))).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!((handle.in_flight(), state.state()), (1, CircuitState::Closed));
    stage.open();
    soon(response.into_body().collect()).await.unwrap_err();
    all_free(&stage, &handle).await;
    assert_eq!(state.state(), CircuitState::Open);
}

// ===== Many calls, on several threads =====

/// Sends ten waves of 30 calls. A third of each wave is cancelled, at a moment that differs between the waves.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn clients_that_disconnect_on_many_threads_lose_no_permit() {
    let stage = Stage::default();
    let limit = ConcurrencyLimitLayer::new(3).queue(4, Duration::from_millis(20));
    let places = limit.handle();
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(1));
    let circuit = breaker.handle();
    let stack = ServiceBuilder::new().layer(breaker.respond()).layer(limit.respond());
    let addr = serve(routes(&stage).layer(stack)).await;
    let gate = stage.gate.clone();
    let opener = tokio::spawn(async move {
        loop {
            gate.add_permits(1);
            tokio::time::sleep(Duration::from_micros(300)).await;
        }
    });
    for wave in 0..10 {
        let mut calls =
            send_all(addr, ["/a", "/stream", "/b", "/stream"].into_iter().cycle().take(20));
        let mut gone = send_all(addr, ["/a", "/stream"].into_iter().cycle().take(10));
        for n in 0..10 {
            tokio::time::sleep(Duration::from_micros(137 * (n + wave))).await;
            if n == 5 {
                gone.abort_all();
            }
        }
        for answer in answers(&mut calls, 20).await {
            match answer.status {
                StatusCode::OK => assert_eq!(answer.body, "hello"),
                status => assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE),
            }
        }
    }
    all_free(&stage, &places).await;
    opener.abort();
    assert!(stage.inside.peak() <= 3, "{}", stage.inside.peak());
    assert!(stage.inside.total() >= 3, "only {} calls were served", stage.inside.total());
    // Neither a rejection nor a disconnect is a failure.
    assert_eq!((circuit.state(), circuit.snapshot().probes), (CircuitState::Closed, 0));
}
