//! A limit of two calls holds for the whole server, regardless of how the server is built.

use super::*;

// ===== Limit of two =====

/// The control for the other tests: without a limit, all twenty calls are in flight at once.
#[tokio::test]
async fn without_a_limit_all_twenty_are_in_flight() {
    let stage = Stage::default();
    let addr = serve(routes(&stage)).await;
    let mut calls = send_all(addr, ["/a", "/stream"].into_iter().cycle().take(CALLERS));
    until(|| stage.inside.now() == CALLERS).await;
    stage.open();
    answers(&mut calls, CALLERS).await;
    until(|| stage.inside.now() == 0).await;
}

#[tokio::test]
async fn router_layer_does_not_make_a_limit_per_connection() {
    let (stage, (limit, handle)) = (Stage::default(), two());
    let addr = serve(routes(&stage).layer(limit)).await;
    two_of_twenty(addr, stage, handle, &["/a"]).await;
}

#[tokio::test]
async fn router_layer_has_one_limit_for_three_routes() {
    let (stage, (limit, handle)) = (Stage::default(), two());
    let addr = serve(routes(&stage).layer(limit)).await;
    two_of_twenty(addr, stage, handle, &["/a", "/b", "/stream"]).await;
}

#[tokio::test]
async fn method_router_layer_does_not_make_a_limit_per_request() {
    let (stage, (limit, handle)) = (Stage::default(), two());
    let a = stage.clone();
    let addr = serve(Router::new().route("/a", get(move || a.plain()).layer(limit))).await;
    two_of_twenty(addr, stage, handle, &["/a"]).await;
}

#[tokio::test]
async fn one_layer_on_three_routes_is_one_limit() {
    let (stage, (limit, handle)) = (Stage::default(), two());
    let (a, b, c) = (stage.clone(), stage.clone(), stage.clone());
    let app = Router::new()
        .route("/a", get(move || a.plain()).layer(limit.clone()))
        .route("/b", get(move || b.plain()).layer(limit.clone()))
        .route("/c", get(move || c.streaming()).layer(limit));
    two_of_twenty(serve(app).await, stage, handle, &["/a", "/b", "/c"]).await;
}

#[tokio::test]
async fn stream_holds_its_permit_to_the_end_of_the_body() {
    let (stage, (limit, handle)) = (Stage::default(), two());
    let addr = serve(routes(&stage).layer(limit)).await;
    two_of_twenty(addr, stage, handle, &["/stream"]).await;
}

#[tokio::test]
async fn raw_router_as_a_connection_s_service_does_not_make_a_limit_per_request() {
    let (stage, (limit, handle)) = (Stage::default(), two());
    let app = routes(&stage).layer(limit);
    let (listener, addr) = listener().await;
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let service = TowerToHyperService::new(app.clone());
            tokio::spawn(async move {
                let server = auto::Builder::new(TokioExecutor::new());
                server.serve_connection(TokioIo::new(tcp), service).await.unwrap();
            });
        }
    });
    two_of_twenty(addr, stage, handle, &["/a", "/stream"]).await;
}

#[tokio::test]
async fn raw_router_called_directly_does_not_make_a_limit_per_call() {
    let (stage, (limit, handle)) = (Stage::default(), two());
    let app = routes(&stage).layer(limit);
    let mut calls = tokio::task::JoinSet::new();
    for path in repeat_n("/stream", CALLERS) {
        let request = Request::get(path).body(axum::body::Body::empty()).unwrap();
        let call = app.clone().oneshot(request);
        calls.spawn(
            async move { call.await.unwrap().into_body().collect().await.unwrap().to_bytes() },
        );
    }
    until(|| handle.snapshot().waiting as usize == CALLERS - 2).await;
    assert_eq!(stage.inside.now(), 2);
    stage.open();
    while let Some(body) = soon(calls.join_next()).await {
        assert_eq!(body.unwrap(), "hello");
    }
    assert_eq!((stage.inside.peak(), stage.inside.total()), (2, CALLERS));
    all_free(&stage, &handle).await;
}

#[tokio::test]
async fn into_make_service_does_not_make_a_limit_per_connection() {
    let (stage, (limit, handle)) = (Stage::default(), two());
    let app = routes(&stage).layer(limit).into_make_service();
    let (listener, addr) = listener().await;
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    two_of_twenty(addr, stage, handle, &["/a", "/stream"]).await;
}

// ===== Rejections =====

#[tokio::test]
async fn limit_of_two_rejects_eighteen_of_twenty_with_a_hint() {
    let stage = Stage::default();
    let limit = ConcurrencyLimitLayer::new(2);
    let handle = limit.handle();
    let addr = serve(routes(&stage).layer(limit.respond())).await;
    let mut calls = send_all(addr, repeat_n("/stream", CALLERS));
    for answer in answers(&mut calls, CALLERS - 2).await {
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(answer.headers["retry-after"], "1");
        assert_eq!(answer.headers["content-type"], "application/problem+json");
        assert_eq!(
            answer.body,
            r#"{"type":"about:blank","title":"Service Unavailable","status":503,"reason":"limit_reached"}"#
        );
        assert_eq!(answer.headers["content-length"], answer.body.len().to_string());
    }
    stage.open();
    for answer in answers(&mut calls, 2).await {
        assert_eq!((answer.status, &answer.body[..]), (StatusCode::OK, &b"hello"[..]));
    }
    all_free(&stage, &handle).await;
    assert_eq!(handle.snapshot().rejected_full, 18);
    assert_eq!(stage.inside.peak(), 2);
}

#[tokio::test]
async fn an_idle_clone_does_not_hold_the_released_permit() {
    let stage = Stage::default();
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let addr = serve(routes(&stage).layer(limit.respond())).await;
    // The connections of the rejected calls stay open and idle. Each of them has polled its service ready.
    let mut calls = send_all(addr, repeat_n("/a", CALLERS));
    answers(&mut calls, CALLERS - 1).await;
    stage.open();
    answers(&mut calls, 1).await;
    all_free(&stage, &handle).await;
    // No call is in flight, so no call may be rejected.
    for _ in 0..CALLERS {
        let answer = answers(&mut send_all(addr, ["/a"]), 1).await.remove(0);
        assert_eq!(answer.status, StatusCode::OK);
        all_free(&stage, &handle).await;
    }
}

#[tokio::test]
async fn a_short_response_has_a_content_length() {
    let (stage, (limit, handle)) = (Stage::default(), two());
    let app = routes(&stage)
        .layer(ServiceBuilder::new().layer(CircuitBreakerLayer::http().respond()).layer(limit));
    stage.open();
    let addr = serve(app).await;
    let answer = answers(&mut send_all(addr, ["/a"]), 1).await.remove(0);
    assert_eq!(answer.headers["content-length"], "5");
    assert!(!answer.headers.contains_key("transfer-encoding"));
    all_free(&stage, &handle).await;
}
