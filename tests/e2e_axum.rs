//! What today's crates get wrong under axum, over a real server on TCP.
#![cfg(all(feature = "breaker", feature = "limit"))]

mod net;

use std::{
    iter::repeat_n,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Router, error_handling::HandleErrorLayer, extract::Request, middleware::Next, routing::get,
};
use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Rejected, Trip,
    breaker::{CircuitBreakerHandle, State},
    call::Respond,
    limit::ConcurrencyLimitHandle,
};
use http::StatusCode;
use http_body_util::BodyExt;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use net::{Stage, answers, client, listener, send_all, serve, soon, until};
use tower::{ServiceBuilder, ServiceExt};
use tower_http::{
    catch_panic::CatchPanicLayer, compression::CompressionLayer, timeout::TimeoutLayer,
    trace::TraceLayer,
};

const CALLERS: usize = 20;

/// Two at once; everybody else waits.
fn two() -> (ConcurrencyLimitLayer<buttress::call::Http, Respond>, ConcurrencyLimitHandle) {
    let limit = ConcurrencyLimitLayer::new(2).queue(64, Duration::from_secs(10));
    let handle = limit.handle();
    (limit.respond(), handle)
}

/// Twenty callers: two get in and eighteen wait until somebody leaves, however the server is built.
async fn two_of_twenty(
    addr: std::net::SocketAddr,
    stage: Stage,
    limit: ConcurrencyLimitHandle,
    paths: &[&'static str],
) {
    let mut calls = send_all(addr, paths.iter().copied().cycle().take(CALLERS));
    until(|| limit.snapshot().waiting as usize == CALLERS - 2).await;
    until(|| stage.inside.now() == 2).await;
    stage.open();
    for answer in answers(&mut calls, CALLERS).await {
        assert_eq!((answer.status, &answer.body[..]), (StatusCode::OK, &b"hello"[..]));
    }
    assert_eq!((stage.inside.peak(), stage.inside.total()), (2, CALLERS));
    all_free(&stage, &limit).await;
    assert_eq!(limit.snapshot().refused_full + limit.snapshot().refused_waited, 0);
}

/// The client has its last byte a moment before the server lets go of the body.
async fn all_free(stage: &Stage, limit: &ConcurrencyLimitHandle) {
    until(|| stage.inside.now() == 0).await;
    until(|| limit.in_flight() == 0 && limit.snapshot().waiting == 0).await;
}

fn routes(stage: &Stage) -> Router {
    let (a, b, c, d) = (stage.clone(), stage.clone(), stage.clone(), stage.clone());
    Router::new()
        .route("/a", get(move || a.plain()))
        .route("/b", get(move || b.plain()))
        .route("/stream", get(move || c.streaming()))
        .route("/cut", get(move || d.breaking_off()))
}

// ===== Two at once =====

/// The others are worth something only if twenty really come at once.
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
async fn one_layer_given_to_three_routes_is_one_limit() {
    let (stage, (limit, handle)) = (Stage::default(), two());
    let (a, b, c) = (stage.clone(), stage.clone(), stage.clone());
    let app = Router::new()
        .route("/a", get(move || a.plain()).layer(limit.clone()))
        .route("/b", get(move || b.plain()).layer(limit.clone()))
        .route("/c", get(move || c.streaming()).layer(limit));
    two_of_twenty(serve(app).await, stage, handle, &["/a", "/b", "/c"]).await;
}

#[tokio::test]
async fn streams_hold_their_place_to_the_end_not_to_the_head() {
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

// ===== Shedding =====

#[tokio::test]
async fn shedding_refuses_eighteen_and_says_when_to_come_back() {
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
    assert_eq!(handle.snapshot().refused_full, 18);
    assert_eq!(stage.inside.peak(), 2);
}

#[tokio::test]
async fn an_idle_handle_does_not_swallow_the_freed_place() {
    let stage = Stage::default();
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let addr = serve(routes(&stage).layer(limit.respond())).await;
    // Connections that were refused stay open and idle; each has polled its service ready.
    let mut calls = send_all(addr, repeat_n("/a", CALLERS));
    answers(&mut calls, CALLERS - 1).await;
    stage.open();
    answers(&mut calls, 1).await;
    all_free(&stage, &handle).await;
    // Nothing is in flight now, so nobody has a reason to be refused.
    for _ in 0..CALLERS {
        let answer = answers(&mut send_all(addr, ["/a"]), 1).await.remove(0);
        assert_eq!(answer.status, StatusCode::OK);
        all_free(&stage, &handle).await;
    }
}

#[tokio::test]
async fn a_short_answer_keeps_its_content_length() {
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

// ===== The breaker =====

#[tokio::test]
async fn a_handler_that_always_answers_500_opens_the_breaker() {
    for per_route in [false, true] {
        let hits = Arc::new(AtomicUsize::new(0));
        let seen = hits.clone();
        let handler = get(move || {
            seen.fetch_add(1, Ordering::SeqCst);
            async { StatusCode::INTERNAL_SERVER_ERROR }
        });
        let breaker = CircuitBreakerLayer::new(Trip::consecutive(3)).respond();
        let state = breaker.handle();
        let app = if per_route {
            Router::new().route("/", handler.layer(breaker))
        } else {
            Router::new().route("/", handler).layer(breaker)
        };
        let addr = serve(app).await;
        let mut statuses = Vec::new();
        for _ in 0..5 {
            // Each over a connection of its own: the state must not be theirs.
            let answer = answers(&mut send_all(addr, ["/"]), 1).await.remove(0);
            if answer.status == StatusCode::SERVICE_UNAVAILABLE {
                assert_eq!(answer.headers["retry-after"], "30");
                assert_eq!(answer.headers["content-type"], "application/problem+json");
            }
            statuses.push(answer.status.as_u16());
        }
        assert_eq!(statuses, [500, 500, 500, 503, 503]);
        assert_eq!(hits.load(Ordering::SeqCst), 3);
        assert_eq!((state.state(), state.snapshot().refused), (State::Open, 2));
    }
}

#[tokio::test]
async fn a_handler_that_recovers_closes_the_breaker() {
    let well = Arc::new(AtomicUsize::new(0));
    let answer = well.clone();
    let handler = get(move || async move {
        match answer.load(Ordering::SeqCst) {
            0 => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::OK,
        }
    });
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(1))
        .open_for(Duration::from_millis(50))
        .respond();
    let state = breaker.handle();
    let addr = serve(Router::new().route("/", handler).layer(breaker)).await;
    answers(&mut send_all(addr, ["/"]), 1).await;
    assert_eq!(state.state(), State::Open);
    well.store(1, Ordering::SeqCst);
    assert_eq!(soon(state.changed()).await, State::HalfOpen);
    let answer = answers(&mut send_all(addr, ["/"]), 1).await.remove(0);
    assert_eq!(answer.status, StatusCode::OK);
    until(|| state.state() == State::Closed).await;
    assert_eq!(state.snapshot().probes, 0);
}

/// A route that fails once, then is a [`Stage`], behind a breaker that is half-open by now.
async fn half_open() -> (std::net::SocketAddr, Stage, CircuitBreakerHandle) {
    let (stage, failed) = (Stage::default(), Arc::new(AtomicUsize::new(0)));
    let inner = stage.clone();
    let handler = get(move || async move {
        match failed.fetch_add(1, Ordering::SeqCst) {
            0 => Err(StatusCode::INTERNAL_SERVER_ERROR),
            _ => Ok(inner.plain().await),
        }
    });
    let breaker =
        CircuitBreakerLayer::new(Trip::consecutive(1)).open_for(Duration::from_millis(20));
    let state = breaker.handle();
    let addr = serve(Router::new().route("/", handler).layer(breaker.respond())).await;
    answers(&mut send_all(addr, ["/"]), 1).await;
    while state.state() == State::Open {
        soon(state.changed()).await;
    }
    assert_eq!(state.state(), State::HalfOpen);
    (addr, stage, state)
}

#[tokio::test]
async fn half_open_lets_one_probe_through_of_twenty_callers() {
    let (addr, stage, state) = half_open().await;
    let mut calls = send_all(addr, repeat_n("/", CALLERS));
    for refused in answers(&mut calls, CALLERS - 1).await {
        assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(refused.headers["retry-after"], "1");
    }
    assert_eq!((stage.inside.now(), stage.inside.total(), state.snapshot().probes), (1, 1, 1));
    stage.open();
    assert_eq!(answers(&mut calls, 1).await[0].status, StatusCode::OK);
    until(|| state.state() == State::Closed).await;
    assert_eq!(state.snapshot().probes, 0);
}

#[tokio::test]
async fn a_probe_whose_client_goes_away_does_not_shut_the_gate_for_ever() {
    let (addr, stage, state) = half_open().await;
    for round in 1..=3 {
        let mut probe = send_all(addr, ["/"]);
        until(|| stage.inside.total() == round).await;
        assert_eq!(state.snapshot().probes, 1);
        probe.abort_all();
        until(|| stage.inside.now() == 0 && state.snapshot().probes == 0).await;
        assert_eq!(state.state(), State::HalfOpen);
    }
    stage.open();
    assert_eq!(answers(&mut send_all(addr, ["/"]), 1).await[0].status, StatusCode::OK);
    until(|| state.state() == State::Closed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_breaker_refuses_many_callers_at_once_and_nobody_hangs() {
    let breaker = CircuitBreakerLayer::http();
    let state = breaker.handle();
    let addr = serve(routes(&Stage::default()).layer(breaker.respond())).await;
    state.force_open();
    for answer in answers(&mut send_all(addr, repeat_n("/a", 200)), 200).await {
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    }
    assert_eq!(state.snapshot().refused, 200);
}

// ===== Calls that end badly =====

#[tokio::test]
async fn a_client_that_disconnects_mid_stream_frees_its_place() {
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
async fn a_client_that_disconnects_while_it_waits_gives_up_its_turn() {
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
async fn a_client_that_disconnects_before_the_head_frees_its_place() {
    let (stage, (limit, handle)) = (Stage::default(), two());
    let addr = serve(routes(&stage).layer(limit)).await;
    let mut calls = send_all(addr, ["/a", "/a"]);
    until(|| stage.inside.now() == 2).await;
    calls.abort_all();
    all_free(&stage, &handle).await;
}

#[tokio::test]
async fn a_panic_in_a_handler_frees_its_place() {
    let stage = Stage::default();
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let panics = get(|| async {
        if true {
            panic!("a handler's panic, as expected");
        }
    });
    let app = routes(&stage).route("/panic", panics).layer(limit.respond());
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
async fn a_handler_whose_body_breaks_off_frees_its_place_and_counts_as_failure() {
    let stage = Stage::default();
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(1));
    let state = breaker.handle();
    let stack = ServiceBuilder::new().layer(breaker.respond()).layer(limit.respond());
    let addr = serve(routes(&stage).layer(stack)).await;
    let response = soon(client().request(net::get(addr, "/cut"))).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!((handle.in_flight(), state.state()), (1, State::Closed));
    stage.open();
    soon(response.into_body().collect()).await.unwrap_err();
    all_free(&stage, &handle).await;
    assert_eq!(state.state(), State::Open);
}

// ===== With layers of others =====

#[tokio::test]
async fn mixed_with_tower_http_in_one_stack_the_limit_still_holds() {
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
    assert_eq!(state.state(), State::Closed);
}

#[tokio::test]
async fn compression_around_the_limit_holds_the_place_to_its_end() {
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
async fn a_timeout_around_the_limit_frees_its_place() {
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
async fn axum_s_own_middleware_between_and_an_error_handler_around() {
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

// ===== Many at once, on several threads =====

/// Two hundred clients in waves, of which every third goes away at some moment of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn with_clients_that_come_and_go_on_many_threads_nothing_is_lost() {
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
    assert!(stage.inside.total() >= 3, "some got in: {}", stage.inside.total());
    // Neither a refusal nor a client that went away is a failure.
    assert_eq!((circuit.state(), circuit.snapshot().probes), (State::Closed, 0));
}

// ===== Panics =====

/// Where a panic is caught before it ends the task, the call is dropped after it, not by it.
#[tokio::test]
async fn a_panic_counts_as_failure_whether_or_not_a_layer_catches_it() {
    for caught in [false, true] {
        let breaker = CircuitBreakerLayer::new(Trip::consecutive(2));
        let state = breaker.handle();
        let app = Router::new().route(
            "/",
            get(|| async {
                if true {
                    panic!("a handler's panic, as expected");
                }
            }),
        );
        let app = app.layer(breaker.respond());
        let addr = serve(if caught { app.layer(CatchPanicLayer::new()) } else { app }).await;
        for _ in 0..2 {
            let result = soon(client().request(net::get(addr, "/"))).await;
            assert_eq!(
                result.map(|response| response.status().as_u16()).ok(),
                caught.then_some(500)
            );
        }
        until(|| state.state() == State::Open).await;
    }
}
