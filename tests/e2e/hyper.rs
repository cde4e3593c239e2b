//! hyper-util's client under the stack, against a real server that counts the calls in flight.

use std::time::Duration;

use axum::{Router, body::Body, routing::get};
use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Rejected, Trip,
    breaker::{CircuitBreakerHandle, CircuitState, TripReason},
    limit::ConcurrencyLimitHandle,
    outcome::{Reason, RejectedKind},
};
use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Full};
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioIo},
};
use tokio::task::JoinSet;
use tower::{Layer, Service, ServiceBuilder, ServiceExt};

use crate::support::net::{
    self, HALF, Stage, client, closed_address, closes_after, never_answers, serve, soon, until,
};

const CALLERS: usize = 20;

async fn upstream(stage: &Stage) -> std::net::SocketAddr {
    let (a, b, c) = (stage.clone(), stage.clone(), stage.clone());
    let app = Router::new()
        .route("/", get(move || a.plain()))
        .route("/stream", get(move || b.streaming()))
        .route("/cut", get(move || c.breaking_off()))
        .route("/500", get(|| async { (StatusCode::INTERNAL_SERVER_ERROR, vec![0; 256 * 1024]) }));
    serve(app).await
}

/// Two calls reach the server. The others wait in the client and do not reach the server.
async fn two_of_twenty(stage: &Stage, limit: &ConcurrencyLimitHandle, mut calls: JoinSet<Bytes>) {
    until(|| limit.snapshot().waiting as usize == CALLERS - 2).await;
    until(|| stage.inside.now() == 2).await;
    stage.open();
    let mut answered = 0;
    while let Some(body) = soon(calls.join_next()).await {
        assert_eq!(body.unwrap(), "hello");
        answered += 1;
    }
    assert_eq!((answered, stage.inside.peak(), stage.inside.total()), (CALLERS, 2, CALLERS));
    assert_eq!((limit.in_flight(), limit.snapshot().waiting), (0, 0));
}

/// Returns the reason for which the last half-open probe failed.
fn probe(state: &CircuitBreakerHandle) -> Reason {
    match state.snapshot().last_trip {
        Some(TripReason::Probe { outcome }) => outcome.reason(),
        other => panic!("no probe failed: {other:?}"),
    }
}

/// A breaker that trips at the first failure and probes 20 ms later. The failure of the probe states its reason.
fn touchy() -> (CircuitBreakerLayer, CircuitBreakerHandle) {
    let breaker =
        CircuitBreakerLayer::new(Trip::consecutive(1)).open_for(Duration::from_millis(20));
    let state = breaker.handle();
    (breaker, state)
}

/// Waits until the circuit is not open any more.
async fn admits(state: &CircuitBreakerHandle) {
    while state.state() == CircuitState::Open {
        soon(state.changed()).await;
    }
}

// ===== Two calls at once =====

#[tokio::test]
async fn oneshot_in_spawned_tasks_never_has_more_than_two_at_the_server() {
    for path in ["/", "/stream"] {
        let stage = Stage::default();
        let addr = upstream(&stage).await;
        let (breaker, limit) = (CircuitBreakerLayer::http(), ConcurrencyLimitLayer::new(2));
        let handle = limit.handle();
        let client = ServiceBuilder::new()
            .layer(breaker)
            .layer(limit.queue(64, Duration::from_secs(10)))
            .service(Client::builder(TokioExecutor::new()).build_http());
        let mut calls = JoinSet::new();
        for _ in 0..CALLERS {
            let client = client.clone();
            calls.spawn(async move {
                let response = client.oneshot(net::get(addr, path)).await.unwrap();
                response.into_body().collect().await.unwrap().to_bytes()
            });
        }
        two_of_twenty(&stage, &handle, calls).await;
    }
}

#[tokio::test]
async fn ready_and_call_in_spawned_tasks_never_has_more_than_two_at_the_server() {
    let stage = Stage::default();
    let addr = upstream(&stage).await;
    let limit = ConcurrencyLimitLayer::new(2).queue(64, Duration::from_secs(10));
    let handle = limit.handle();
    let client =
        ServiceBuilder::new().layer(limit).layer(CircuitBreakerLayer::http()).service(client());
    let mut calls = JoinSet::new();
    for _ in 0..CALLERS {
        let mut client = client.clone();
        calls.spawn(async move {
            let ready = client.ready().await.unwrap();
            let response = ready.call(net::get(addr, "/stream")).await.unwrap();
            response.into_body().collect().await.unwrap().to_bytes()
        });
    }
    two_of_twenty(&stage, &handle, calls).await;
}

#[tokio::test]
async fn streams_of_one_http2_connection_are_limited_alike() {
    let stage = Stage::default();
    let addr = upstream(&stage).await;
    let limit = ConcurrencyLimitLayer::new(2).queue(64, Duration::from_secs(10));
    let handle = limit.handle();
    let http2 = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let client =
        ServiceBuilder::new().layer(CircuitBreakerLayer::http()).layer(limit).service(http2);
    let mut calls = JoinSet::new();
    for _ in 0..CALLERS {
        let client = client.clone();
        calls.spawn(async move {
            let response = client.oneshot(net::get(addr, "/stream")).await.unwrap();
            response.into_body().collect().await.unwrap().to_bytes()
        });
    }
    two_of_twenty(&stage, &handle, calls).await;
}

// ===== Bodies that are not read =====

#[tokio::test]
async fn unread_responses_hold_their_permits_until_they_are_dropped() {
    let stage = Stage::default();
    stage.open();
    let addr = upstream(&stage).await;
    let limit = ConcurrencyLimitLayer::new(2).queue(1, Duration::from_millis(30));
    let handle = limit.handle();
    let mut client = ServiceBuilder::new().layer(limit).service(client());
    let mut unread = Vec::new();
    for _ in 0..2 {
        unread.push(soon(client.ready().await.unwrap().call(net::get(addr, "/"))).await.unwrap());
    }
    assert_eq!(handle.in_flight(), 2);
    let refused = soon(client.ready().await.unwrap().call(net::get(addr, "/"))).await.unwrap_err();
    assert_eq!(Rejected::find(&*refused).unwrap().kind(), RejectedKind::WaitedTooLong);
    unread.pop();
    assert_eq!(handle.in_flight(), 1);
    soon(client.ready().await.unwrap().call(net::get(addr, "/"))).await.unwrap();
    drop(unread);
    assert_eq!(handle.in_flight(), 0);
}

#[tokio::test]
async fn a_limit_that_releases_at_the_head_does_not_count_unread_responses() {
    let stage = Stage::default();
    let addr = upstream(&stage).await;
    let limit = ConcurrencyLimitLayer::new(1).release_at_head();
    let handle = limit.handle();
    let mut client = ServiceBuilder::new().layer(limit).service(client());
    let mut unread = Vec::new();
    for _ in 0..3 {
        let call = client.ready().await.unwrap().call(net::get(addr, "/stream"));
        unread.push(soon(call).await.unwrap());
        assert_eq!(handle.in_flight(), 0);
    }
    assert_eq!(stage.inside.now(), 3);
}

#[tokio::test]
async fn successful_responses_dropped_unread_close_a_half_open_circuit() {
    let stage = Stage::default();
    stage.open();
    let addr = upstream(&stage).await;
    let (breaker, state) = touchy();
    let mut client = ServiceBuilder::new().layer(breaker).service(client());
    soon(client.ready().await.unwrap().call(net::get(addr, "/500"))).await.unwrap();
    assert_eq!(state.state(), CircuitState::Open);
    assert_eq!(soon(state.changed()).await, CircuitState::HalfOpen);
    drop(soon(client.ready().await.unwrap().call(net::get(addr, "/stream"))).await.unwrap());
    assert_eq!((state.state(), state.snapshot().probes), (CircuitState::Closed, 0));
}

#[tokio::test]
async fn a_500_counts_at_its_head_and_holds_its_permit_to_the_end() {
    let addr = upstream(&Stage::default()).await;
    let (breaker, state) = touchy();
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let client = ServiceBuilder::new().layer(breaker).layer(limit).service(client());
    let response = soon(client.oneshot(net::get(addr, "/500"))).await.unwrap();
    assert_eq!((state.state(), handle.in_flight()), (CircuitState::Open, 1));
    assert_eq!(soon(response.into_body().collect()).await.unwrap().to_bytes().len(), 256 * 1024);
    assert_eq!(handle.in_flight(), 0);
}

// ===== Failures of the transport =====

#[tokio::test]
async fn an_upstream_that_closes_mid_stream_is_a_failure_and_the_permit_is_released() {
    let (breaker, state) = touchy();
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let stage = Stage::default();
    let mut client = ServiceBuilder::new().layer(breaker).layer(limit).service(client());
    for uri in [
        format!("http://{}/", closes_after(HALF).await),
        format!("http://{}/cut", upstream(&stage).await),
    ] {
        admits(&state).await;
        let waits = uri.ends_with("/cut");
        let request = Request::get(uri).body(Empty::<Bytes>::new()).unwrap();
        let response = soon(client.ready().await.unwrap().call(request)).await.unwrap();
        assert_eq!((response.status(), handle.in_flight()), (StatusCode::OK, 1));
        if waits {
            stage.open();
        }
        soon(response.into_body().collect()).await.unwrap_err();
        assert_eq!((state.state(), handle.in_flight()), (CircuitState::Open, 0));
    }
    assert_eq!(probe(&state), Reason::Body);
    until(|| stage.inside.now() == 0).await;
}

#[tokio::test]
async fn errors_of_the_connection_are_distinguished() {
    for (addr, expected) in [
        (closed_address().await, Reason::ConnectRefused),
        (closes_after(b"").await, Reason::Reset),
        (closes_after(b"not http at all\r\n\r\n").await, Reason::Error),
    ] {
        let (breaker, state) = touchy();
        let limit = ConcurrencyLimitLayer::new(1);
        let handle = limit.handle();
        let mut client = ServiceBuilder::new().layer(breaker).layer(limit).service(client());
        for _ in 0..2 {
            admits(&state).await;
            let call = client.ready().await.unwrap().call(net::get(addr, "/"));
            let error: BoxError = soon(call).await.unwrap_err();
            assert!(error.is::<hyper_util::client::legacy::Error>(), "{error}");
            assert_eq!(handle.in_flight(), 0);
        }
        assert_eq!(probe(&state), expected);
    }
}

#[tokio::test]
async fn a_cancelled_call_releases_its_permit_and_is_neutral() {
    let (addr, connected) = never_answers().await;
    let (breaker, state) = touchy();
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let client = ServiceBuilder::new().layer(breaker).layer(limit).service(client());
    let call = tokio::spawn(client.oneshot(net::get(addr, "/")));
    until(|| connected.now() == 1).await;
    assert_eq!(handle.in_flight(), 1);
    call.abort();
    assert!(soon(call).await.unwrap_err().is_cancelled());
    assert_eq!((handle.in_flight(), state.state()), (0, CircuitState::Closed));
    until(|| connected.now() == 0).await;
}

#[tokio::test]
async fn a_full_limit_does_not_open_the_outer_breaker() {
    let stage = Stage::default();
    let addr = upstream(&stage).await;
    let (breaker, state) = touchy();
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let mut client = ServiceBuilder::new().layer(breaker).layer(limit).service(client());
    let first = soon(client.ready().await.unwrap().call(net::get(addr, "/stream"))).await.unwrap();
    for _ in 0..10 {
        let call = client.ready().await.unwrap().call(net::get(addr, "/"));
        let refused = soon(call).await.unwrap_err();
        assert_eq!(Rejected::find(&*refused).unwrap().kind(), RejectedKind::Full);
    }
    assert_eq!(state.state(), CircuitState::Closed);
    drop(first);
    assert_eq!((handle.in_flight(), stage.inside.total()), (0, 1));
}

#[tokio::test]
async fn an_open_breaker_rejects_without_a_call_of_the_upstream() {
    let (addr, connected) = never_answers().await;
    let breaker = CircuitBreakerLayer::http();
    let state = breaker.handle();
    let client = ServiceBuilder::new().layer(breaker).service(client());
    state.force_open();
    let refused = soon(client.oneshot(net::get(addr, "/"))).await.unwrap_err();
    assert_eq!(Rejected::find(&*refused).unwrap().kind(), RejectedKind::ForcedOpen);
    assert_eq!(connected.total(), 0);
}

// ===== Request bodies =====

/// A failed upload is neutral: clients that break off their uploads cannot open the circuit of a gateway.
#[tokio::test]
async fn an_error_of_the_request_body_is_neutral() {
    let app = Router::new().route("/", axum::routing::put(|body: Bytes| async { body }));
    let addr = serve(app).await;
    for http2 in [false, true] {
        let (breaker, state) = touchy();
        let limit = ConcurrencyLimitLayer::new(1);
        let handle = limit.handle();
        let client = Client::builder(TokioExecutor::new()).http2_only(http2).build_http::<Body>();
        let client = ServiceBuilder::new().layer(breaker).layer(limit).service(client);
        let gone = || std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        let chunks = futures_util::stream::iter([Ok(Bytes::from_static(b"hel")), Err(gone())]);
        let put = Request::put(format!("http://{addr}/")).body(Body::from_stream(chunks)).unwrap();
        let error = soon(client.oneshot(put)).await.unwrap_err();
        assert_eq!((state.state(), handle.in_flight()), (CircuitState::Closed, 0), "{error:?}");
    }
}

#[tokio::test]
async fn request_bodies_of_any_type_pass_through() {
    let app =
        Router::new().route("/", axum::routing::post(|body: Bytes| async { Body::from(body) }));
    let addr = serve(app).await;
    let stack = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::http())
        .layer(ConcurrencyLimitLayer::new(1));
    let uri = format!("http://{addr}/");

    let full = Request::post(&uri).body(Full::new(Bytes::from_static(b"full"))).unwrap();
    let response = soon(stack.clone().service(client()).oneshot(full)).await.unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "full");

    let chunks = futures_util::stream::iter(["str", "eam"].map(Ok::<_, BoxError>));
    let streamed = Request::post(&uri).body(Body::from_stream(chunks)).unwrap();
    let response = soon(stack.service(client()).oneshot(streamed)).await.unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "stream");
}

// ===== Upgrades =====

/// An upgrade, such as to WebSocket: the bytes bypass the layers on both sides, and the call ends at its head.
#[tokio::test]
async fn an_upgraded_connection_passes_through_and_holds_no_permit() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let limit = ConcurrencyLimitLayer::new(1);
    let there = limit.handle();
    let app = Router::new().route(
        "/",
        get(|request: axum::extract::Request| async move {
            tokio::spawn(async move {
                let mut io = TokioIo::new(hyper::upgrade::on(request).await.unwrap());
                let mut word = [0; 5];
                io.read_exact(&mut word).await.unwrap();
                io.write_all(&word).await.unwrap();
            });
            (StatusCode::SWITCHING_PROTOCOLS, [("connection", "upgrade"), ("upgrade", "echo")])
        }),
    );
    let addr = serve(app.layer(limit.respond())).await;
    let limit = ConcurrencyLimitLayer::new(1);
    let here = limit.handle();
    let client =
        ServiceBuilder::new().layer(CircuitBreakerLayer::http()).layer(limit).service(client());
    let mut request = net::get(addr, "/");
    request.headers_mut().insert("connection", "upgrade".parse().unwrap());
    request.headers_mut().insert("upgrade", "echo".parse().unwrap());
    let response = soon(client.oneshot(request)).await.unwrap();
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    let mut io = TokioIo::new(soon(hyper::upgrade::on(response)).await.unwrap());
    assert_eq!((here.in_flight(), there.in_flight()), (0, 0));
    soon(io.write_all(b"hello")).await.unwrap();
    let mut word = [0; 5];
    soon(io.read_exact(&mut word)).await.unwrap();
    assert_eq!(&word, b"hello");
}

/// hyper's server sends every body that it is given. Over HTTP/2, a response to `HEAD` with a body is a protocol error.
#[tokio::test]
async fn rejection_of_a_head_request_has_no_body() {
    let layer = ConcurrencyLimitLayer::new(1).respond();
    let limit = layer.handle();
    let service = layer.layer(tower::service_fn(|_: Request<hyper::body::Incoming>| {
        std::future::pending::<Result<http::Response<Full<Bytes>>, std::convert::Infallible>>()
    }));
    let (listener, addr) = net::listener().await;
    tokio::spawn(async move {
        let io = TokioIo::new(listener.accept().await.unwrap().0);
        let service = hyper_util::service::TowerToHyperService::new(service);
        let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        server.serve_connection(io, service).await
    });
    let client: Client<_, Empty<Bytes>> =
        Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let held = tokio::spawn(client.request(net::get(addr, "/")));
    soon(until(|| limit.in_flight() == 1)).await;

    let mut head = net::get(addr, "/");
    *head.method_mut() = http::Method::HEAD;
    let response = soon(client.request(head)).await.unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.headers()["retry-after"], "1");
    assert!(response.into_body().collect().await.unwrap().to_bytes().is_empty());
    held.abort();
}
