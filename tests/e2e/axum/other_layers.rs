//! Layers of other crates in the same stack.

use super::*;

#[tokio::test]
async fn the_limit_applies_in_one_stack_with_layers_of_tower_http() {
    let (stage, (limit, handle)) = (Stage::default(), two());
    let breaker = CircuitBreakerLayer::http();
    let state = breaker.handle();
    let stack = ServiceBuilder::new()
        .layer(TraceLayer::new_for_http())
        .layer(breaker.respond())
        .layer(TraceLayer::new_for_http())
        .layer(limit)
        .layer(CompressionLayer::new())
        .layer(TimeoutLayer::with_status_code(
            StatusCode::GATEWAY_TIMEOUT,
            Duration::from_secs(10),
        ));
    let addr = serve(routes(&stage).layer(stack)).await;
    two_of_twenty(addr, stage, handle, &["/a", "/stream"]).await;
    assert_eq!(state.state(), CircuitState::Closed);
}

#[tokio::test]
async fn compression_outside_of_the_limit_holds_the_permit_to_the_end() {
    let (stage, (limit, handle)) = (Stage::default(), two());
    let stack = ServiceBuilder::new().layer(CompressionLayer::new()).layer(limit);
    let addr = serve(routes(&stage).layer(stack)).await;
    let mut request = net::get(addr, "/stream");
    request.headers_mut().insert("accept-encoding", "gzip".parse().unwrap());
    let response = soon(client().request(request)).await.unwrap();
    assert_eq!(response.headers()["content-encoding"], "gzip");
    assert_eq!((stage.inside.now(), handle.in_flight()), (1, 1));
    stage.open();
    soon(response.into_body().collect()).await.unwrap();
    all_free(&stage, &handle).await;
}

#[tokio::test]
async fn a_timeout_outside_of_the_limit_releases_the_permit() {
    let (stage, (limit, handle)) = (Stage::default(), two());
    let timeout = Duration::from_millis(50);
    let stack = ServiceBuilder::new()
        .layer(TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, timeout))
        .layer(limit);
    let addr = serve(routes(&stage).layer(stack)).await;
    for answer in answers(&mut send_all(addr, repeat_n("/a", 6)), 6).await {
        assert_eq!(answer.status, StatusCode::GATEWAY_TIMEOUT);
    }
    all_free(&stage, &handle).await;
    assert!(stage.inside.peak() <= 2);
}

#[tokio::test]
async fn rejections_reach_an_outer_error_handler_of_axum() {
    let stage = Stage::default();
    let limit = ConcurrencyLimitLayer::new(1);
    let (places, breaker) = (limit.handle(), CircuitBreakerLayer::http());
    let told = |error: BoxError| async move {
        let kind = Rejected::find(&*error).map(|rejected| rejected.kind().as_str());
        (StatusCode::IM_A_TEAPOT, kind.unwrap_or("not ours"))
    };
    let stack = ServiceBuilder::new()
        .layer(HandleErrorLayer::new(told))
        .layer(breaker)
        .layer(limit)
        .layer(axum::middleware::from_fn(|request, next: Next| next.run(request)));
    let addr = serve(routes(&stage).layer(stack)).await;
    let mut calls = send_all(addr, ["/stream", "/stream"]);
    let refused = answers(&mut calls, 1).await.remove(0);
    assert_eq!(
        (refused.status, &refused.body[..]),
        (StatusCode::IM_A_TEAPOT, &b"limit_reached"[..])
    );
    stage.open();
    assert_eq!(answers(&mut calls, 1).await.remove(0).body, "hello");
    all_free(&stage, &places).await;
}
