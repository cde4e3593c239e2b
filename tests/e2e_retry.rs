//! Retry over breaker over limit, over hyper-util, reqwest and tonic, against real servers.
#![cfg(all(feature = "breaker", feature = "limit", feature = "retry"))]

mod net;
mod rpc;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{Path, State as Shared},
    response::{IntoResponse, Response},
    routing::any,
};
use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Rejected, RetryLayer, Trip,
    breaker::State,
    call::RejectedKind,
    retry::{Attempts, Backoff, Stop},
};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use net::{HALF, client, closes_after, nobody, serve_counting, soon, until};
use rpc::{Obedient, ask, channel, incoming};
use tokio::time::Instant;
use tonic::{Code, transport::Server};
use tonic_health::pb::{health_client::HealthClient, health_server::HealthServer};
use tower::{ServiceBuilder, ServiceExt};
use tower_http::map_request_body::MapRequestBodyLayer;

const KIB: usize = 1024;

/// A retry that does not keep the tests waiting.
fn retry() -> RetryLayer {
    RetryLayer::http().backoff(Backoff::constant(Duration::from_millis(1))).without_budget()
}

// ===== An upstream that fails as it is asked to =====

/// What it has heard: the body of every attempt.
#[derive(Clone, Default)]
struct Heard(Arc<std::sync::Mutex<Vec<Bytes>>>);

impl Heard {
    fn attempts(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn bodies(&self) -> Vec<Bytes> {
        self.0.lock().unwrap().clone()
    }
}

/// `/status/failures/size`: answers so many times with that status and a body of that size, then echoes.
async fn upstream() -> (SocketAddr, Heard, net::Gauge) {
    let heard = Heard::default();
    let answer = |Shared(heard): Shared<Heard>,
                  Path((status, failures, size)): Path<(u16, usize, usize)>,
                  headers: HeaderMap,
                  body: Bytes| async move {
        let attempt = {
            let mut heard = heard.0.lock().unwrap();
            heard.push(body.clone());
            heard.len()
        };
        if attempt > failures {
            return body.into_response();
        }
        let mut response: Response =
            (StatusCode::from_u16(status).unwrap(), vec![b'x'; size]).into_response();
        if let Some(after) = headers.get("x-say-retry-after") {
            response.headers_mut().insert("retry-after", after.clone());
        }
        response
    };
    let app =
        Router::new().route("/{status}/{failures}/{size}", any(answer)).with_state(heard.clone());
    let (addr, connections) = serve_counting(app).await;
    (addr, heard, connections)
}

fn request(
    method: Method,
    addr: SocketAddr,
    path: &str,
    body: &'static str,
) -> Request<Full<Bytes>> {
    let request = Request::builder().method(method).uri(format!("http://{addr}{path}"));
    request.body(Full::new(Bytes::from_static(body.as_bytes()))).unwrap()
}

async fn read<B>(response: http::Response<B>) -> Bytes
where
    B: http_body::Body,
    B::Error: std::fmt::Debug,
{
    soon(response.into_body().collect()).await.unwrap().to_bytes()
}

// ===== How often, how soon, and what =====

#[tokio::test]
async fn three_attempts_over_one_connection_then_the_last_answer() {
    let (addr, heard, connections) = upstream().await;
    let breaker = CircuitBreakerLayer::http();
    let limit = ConcurrencyLimitLayer::new(1);
    let (state, handle) = (breaker.handle(), limit.handle());
    let client = ServiceBuilder::new().layer(retry()).layer(breaker).layer(limit).service(client());
    let get = request(Method::GET, addr, "/503/99/10", "");
    let response = soon(tokio::spawn(client.oneshot(get))).await.unwrap().unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    let attempts = Attempts::of(&response);
    assert_eq!((attempts.made, attempts.stop), (3, Stop::AttemptsUsedUp));
    assert_eq!(read(response).await.len(), 10);
    assert_eq!((heard.attempts(), connections.total(), handle.in_flight()), (3, 1, 0));
    assert_eq!(state.snapshot().consecutive_failures, 3);
}

#[tokio::test]
async fn retry_after_is_honoured_and_the_place_is_free_meanwhile() {
    let (addr, heard, _) = upstream().await;
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let client = ServiceBuilder::new().layer(retry()).layer(limit).service(client());
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
async fn put_is_sent_again_with_its_body_and_post_is_not() {
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
            1 => (StatusCode::SERVICE_UNAVAILABLE, Stop::Unsafe, 1),
            _ => (StatusCode::OK, Stop::Answered, 3),
        };
        let attempts = Attempts::of(&response);
        assert_eq!((response.status(), attempts.stop, attempts.made), expected, "{method}");
    }
}

#[tokio::test]
async fn a_streamed_body_is_replayed_under_the_cap_and_passes_whole_above_it() {
    for (chunks, made, stop) in [(8, 2, Stop::Answered), (100, 1, Stop::BodyGone)] {
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

// ===== What a discarded answer costs =====

#[tokio::test]
async fn a_discarded_503_of_256_kib_does_not_cost_a_connection_each_when_drained() {
    for (size, layer, expected) in [
        (60 * KIB, retry(), 1..=1),
        (256 * KIB, retry().drain_up_to(256 * KIB as u64), 1..=1),
        // What happens otherwise; and that the two above can fail.
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

// ===== What ends it =====

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
    assert_eq!((attempts.made, attempts.stop), (3, Stop::Rejected));
    assert_eq!((heard.attempts(), state.state()), (2, State::Open));
    // And the next does not even begin.
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
    assert_eq!((attempts.made, attempts.stop), (3, Stop::Rejected));
    assert!(response.extensions().get::<Rejected>().is_some());
    assert_eq!(heard.attempts(), 2);
}

#[tokio::test]
async fn a_caller_that_goes_away_during_the_wait_leaves_nothing_behind() {
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

// ===== Errors on the way =====

#[tokio::test]
async fn what_never_left_is_retried_for_any_method_and_what_may_have_is_not() {
    for (addr, get, post) in [
        (nobody().await, 3, 3),
        (closes_after(b"").await, 3, 1),
        // A head has been seen: what follows is the caller's.
        (closes_after(HALF).await, 0, 0),
    ] {
        for (method, made) in [(Method::GET, get), (Method::POST, post)] {
            let limit = ConcurrencyLimitLayer::new(1);
            let handle = limit.handle();
            let client = ServiceBuilder::new().layer(retry()).layer(limit).service(client());
            let result = soon(client.oneshot(request(method.clone(), addr, "/", "hello"))).await;
            match result {
                Err(error) => {
                    let attempts = Attempts::find(&*error).unwrap();
                    assert_eq!(attempts.made, made, "{method} {error:?}");
                }
                Ok(response) => {
                    assert_eq!(made, 0);
                    soon(response.into_body().collect()).await.unwrap_err();
                }
            }
            assert_eq!(handle.in_flight(), 0);
        }
    }
}

/// Nothing has been read of a body whose request never left, however long it is.
#[tokio::test]
async fn a_body_over_the_cap_that_never_left_is_retried() {
    let addr = nobody().await;
    for method in [Method::PUT, Method::POST] {
        let client = ServiceBuilder::new().layer(retry()).service(client());
        let body = Full::new(Bytes::from(vec![b'x'; 1024 * KIB]));
        let request = Request::builder().method(method).uri(format!("http://{addr}/"));
        let error = soon(client.oneshot(request.body(body).unwrap())).await.unwrap_err();
        assert_eq!(Attempts::find(&*error).unwrap().made, 3, "{error:?}");
    }
}

/// RFC 9113 §8.7: the server has not looked at it, so a POST may go again, and its body with it.
#[cfg(feature = "hyper")]
#[tokio::test]
async fn a_refused_stream_is_sent_again_for_any_method_and_at_once() {
    let (listener, addr) = net::listener().await;
    let seen = Arc::new(AtomicUsize::new(0));
    let counter = seen.clone();
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let seen = counter.clone();
            tokio::spawn(async move {
                let mut connection = h2::server::handshake(tcp).await.unwrap();
                while let Some(Ok((_, mut respond))) = connection.accept().await {
                    if seen.fetch_add(1, Ordering::SeqCst) == 0 {
                        respond.send_reset(h2::Reason::REFUSED_STREAM);
                    } else {
                        respond.send_response(http::Response::new(()), true).unwrap();
                    }
                }
            });
        }
    });
    let http2 = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
        .http2_only(true)
        .build_http();
    let client =
        ServiceBuilder::new().layer(retry()).layer(CircuitBreakerLayer::http()).service(http2);
    let response = soon(client.oneshot(request(Method::POST, addr, "/", ""))).await.unwrap();
    assert_eq!((response.status(), Attempts::of(&response).made), (StatusCode::OK, 2));
    assert_eq!(seen.load(Ordering::SeqCst), 2);
}

/// RFC 9113 §6.8: a server that goes away names the last stream it looked at; ours is above it.
#[cfg(feature = "hyper")]
#[tokio::test]
async fn a_stream_above_goaway_s_last_is_sent_again_for_any_method() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];
    const GOAWAY_LAST_0_NO_ERROR: &[u8] = &[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    const HEADERS: u8 = 1;
    let (listener, addr) = net::listener().await;
    tokio::spawn(async move {
        // The first connection goes away at the first request.
        let (mut tcp, _) = listener.accept().await.unwrap();
        tcp.write_all(SETTINGS).await.unwrap();
        tcp.read_exact(&mut [0; b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len()]).await.unwrap();
        let mut head = [0; 9];
        while head[3] != HEADERS {
            tcp.read_exact(&mut head).await.unwrap();
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            tcp.read_exact(&mut vec![0; length]).await.unwrap();
        }
        tcp.write_all(GOAWAY_LAST_0_NO_ERROR).await.unwrap();
        // The second one answers.
        let (second, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(second).await.unwrap();
        while let Some(Ok((_, mut respond))) = connection.accept().await {
            respond.send_response(http::Response::new(()), true).unwrap();
        }
        drop(tcp);
    });
    let http2 = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
        .http2_only(true)
        .build_http();
    let client = ServiceBuilder::new().layer(retry()).service(http2);
    let response = soon(client.oneshot(request(Method::POST, addr, "/", "hello"))).await.unwrap();
    assert_eq!((response.status(), Attempts::of(&response).made), (StatusCode::OK, 2));
}

// ===== reqwest =====

#[cfg(feature = "reqwest")]
#[tokio::test]
async fn the_same_over_reqwest() {
    let (addr, heard, connections) = upstream().await;
    let reqwest = reqwest::Client::builder().no_proxy().build().unwrap();
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let client = ServiceBuilder::new()
        .layer(retry())
        .layer(CircuitBreakerLayer::http())
        .layer(limit)
        .service(buttress::reqwest::HttpClient::new(reqwest));
    let put = request(Method::PUT, addr, "/503/2/1000", "hello");
    let response = soon(tokio::spawn(client.clone().oneshot(put))).await.unwrap().unwrap();
    assert_eq!((response.status(), Attempts::of(&response).made), (StatusCode::OK, 3));
    assert_eq!(read(response).await, "hello");
    assert_eq!(heard.bodies(), vec![Bytes::from_static(b"hello"); 3]);
    let post = request(Method::POST, addr, "/503/99/1000", "hello");
    let response = soon(client.clone().oneshot(post)).await.unwrap();
    assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(read(response).await.len(), 1000);
    assert_eq!((heard.attempts(), connections.total(), handle.in_flight()), (4, 1, 0));
    let dead = request(Method::POST, nobody().await, "/", "hello");
    let error = soon(client.oneshot(dead)).await.unwrap_err();
    assert_eq!(Attempts::find(&*error).unwrap().made, 3);
}

// ===== tonic =====

/// Serves [`Obedient`]; what comes back is where, and who is inside.
async fn grpc() -> (SocketAddr, net::Gauge) {
    let service = Obedient::default();
    let inside = service.inside.clone();
    let (incoming, addr) = incoming().await;
    let server = Server::builder().add_service(HealthServer::new(service));
    tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
    (addr, inside)
}

fn grpc_retry() -> RetryLayer {
    RetryLayer::grpc().backoff(Backoff::constant(Duration::from_millis(1))).without_budget()
}

#[tokio::test]
async fn retry_works_under_tonic_and_repeats_unavailable_in_the_head_and_in_the_trailers() {
    let (addr, inside) = grpc().await;
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let stack = ServiceBuilder::new()
        .layer(grpc_retry())
        .layer(CircuitBreakerLayer::new(Trip::consecutive(100)).respond())
        .layer(limit.respond())
        .layer(MapRequestBodyLayer::new(tonic::body::Body::new))
        .service(channel(addr));
    let mut client = HealthClient::new(stack);
    let head = soon(client.check(ask("14"))).await.unwrap_err();
    assert_eq!((head.code(), inside.total()), (Code::Unavailable, 3));
    let other = soon(client.check(ask("13"))).await.unwrap_err();
    assert_eq!((other.code(), inside.total()), (Code::Internal, 4));
    // The trailers, with nothing before them.
    let mut watch = soon(client.watch(ask("late 14"))).await.unwrap().into_inner();
    let trailers = soon(watch.message()).await.unwrap_err();
    assert_eq!((trailers.code(), inside.total()), (Code::Unavailable, 7));
    // A message has been seen: what follows is the caller's.
    let mut watch = soon(client.watch(ask("cut 14"))).await.unwrap().into_inner();
    soon(watch.message()).await.unwrap().unwrap();
    let trailers = soon(watch.message()).await.unwrap_err();
    assert_eq!((trailers.code(), inside.total()), (Code::Unavailable, 8));
    drop(watch);
    assert_eq!(handle.in_flight(), 0);
    until(|| inside.now() == 0).await;
}

#[tokio::test]
async fn an_open_circuit_ends_a_tonic_client_s_loop() {
    let (addr, inside) = grpc().await;
    let stack = ServiceBuilder::new()
        .layer(grpc_retry())
        .layer(CircuitBreakerLayer::new(Trip::consecutive(2)).respond())
        .layer(MapRequestBodyLayer::new(tonic::body::Body::new))
        .service(channel(addr));
    let mut client = HealthClient::new(stack);
    let refused = soon(client.check(ask("14"))).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::Unavailable, "circuit_open"));
    assert_eq!(inside.total(), 2);
}

#[tokio::test]
async fn retry_works_around_a_tonic_server() {
    let service = Obedient::default();
    let inside = service.inside.clone();
    let (incoming, addr) = incoming().await;
    let server = Server::builder().layer(grpc_retry()).add_service(HealthServer::new(service));
    tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
    let failed = soon(HealthClient::new(channel(addr)).check(ask("14"))).await.unwrap_err();
    assert_eq!((failed.code(), inside.total()), (Code::Unavailable, 3));
}

// ===== A body type of the user's =====

#[tokio::test]
async fn request_bodies_that_are_neither_unpin_nor_sync_go_too() {
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

// ===== Servers that answer before they have read =====

/// A refusal of our own layer comes back while the request's body is still on its way.
#[tokio::test]
async fn a_server_that_sheds_without_reading_the_body_is_tried_again() {
    let hits = net::Gauge::default();
    let seen = hits.clone();
    let shed = move || {
        drop(seen.enter());
        async { (StatusCode::SERVICE_UNAVAILABLE, "busy") }
    };
    let addr = net::serve(Router::new().route("/", any(shed))).await;
    for http2 in [false, true] {
        for size in [0, 10, 40 * KIB] {
            let before = hits.total();
            let client =
                hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
                    .http2_only(http2)
                    .build_http();
            let client = ServiceBuilder::new().layer(retry()).service(client);
            let body = Full::new(Bytes::from(vec![b'x'; size]));
            let put = Request::put(format!("http://{addr}/")).body(body).unwrap();
            let response = soon(client.oneshot(put)).await.unwrap();
            let attempts = Attempts::of(&response);
            assert_eq!((attempts.made, attempts.stop), (3, Stop::AttemptsUsedUp), "{http2} {size}");
            assert_eq!(hits.total() - before, 3);
        }
    }
}
