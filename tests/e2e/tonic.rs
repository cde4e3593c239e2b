//! tonic 0.14 on both sides of a loopback connection, layered on either.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use buttress::{
    Backoff, BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Rejected, RespondLayer,
    RetryLayer, Trip, breaker::CircuitState, outcome::RejectedKind,
};
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use tonic::{
    Code, Status,
    transport::{Channel, Server},
};
use tonic_health::pb::{health_client::HealthClient, health_server::HealthServer};
use tower::ServiceBuilder;
use tower_http::map_request_body::MapRequestBodyLayer;
use tower_http::trace::TraceLayer;

use crate::support::{
    net::{closed_address, listener, soon, until},
    rpc::{Obedient, ask, channel, incoming},
};

const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// Serves [`Obedient`] under a layer. A macro, because the bounds on tonic's layers are long.
macro_rules! serve {
    ($service:expr $(, $layer:expr)*) => {{
        let (incoming, addr) = incoming().await;
        let server = Server::builder()$(.layer($layer))*.add_service(HealthServer::new($service));
        tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
        addr
    }};
}

fn bare(addr: SocketAddr) -> HealthClient<Channel> {
    HealthClient::new(channel(addr))
}

fn pushback(status: &Status) -> Option<u64> {
    status.metadata().get(PUSHBACK)?.to_str().ok()?.parse().ok()
}

// ===== Around a server =====

#[tokio::test]
async fn limit_works_under_tonic_and_a_stream_holds_its_permit_until_dropped() {
    let (reporter, service) = tonic_health::server::health_reporter();
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let (incoming, addr) = incoming().await;
    let server = Server::builder().layer(limit.respond()).add_service(service);
    tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
    reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;

    let mut watch = soon(bare(addr).watch(ask(""))).await.unwrap().into_inner();
    assert_eq!(soon(watch.message()).await.unwrap().unwrap().status, 1);
    assert_eq!(handle.in_flight(), 1);

    // Another connection, because all connections share the limit.
    let refused = soon(bare(addr).check(ask(""))).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::Unavailable, "limit_reached"));
    assert_eq!(pushback(&refused), Some(1000));

    drop(watch);
    until(|| handle.in_flight() == 0).await;
    assert_eq!(soon(bare(addr).check(ask(""))).await.unwrap().into_inner().status, 1);
    until(|| handle.in_flight() == 0).await;
}

#[tokio::test]
async fn limit_under_tonic_counts_streams_at_the_service_itself() {
    let service = Obedient::default();
    let limit = ConcurrencyLimitLayer::new(2).queue(64, Duration::from_secs(10));
    let handle = limit.handle();
    let addr = serve!(service.clone(), limit.respond());
    let mut client = bare(addr);
    let mut open = Vec::new();
    for _ in 0..2 {
        open.push(soon(client.watch(ask("hold"))).await.unwrap());
    }
    let waiting: Vec<_> = (0..18)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move { client.check(ask("")).await })
        })
        .collect();
    until(|| handle.snapshot().waiting == 18).await;
    assert_eq!((service.inside.now(), service.inside.total()), (2, 2));
    open.clear();
    for call in waiting {
        soon(call).await.unwrap().unwrap();
    }
    until(|| handle.in_flight() == 0 && service.inside.now() == 0).await;
    assert_eq!((service.inside.peak(), service.inside.total()), (2, 20));
}

#[tokio::test]
async fn breaker_works_under_tonic_and_counts_failures_in_the_head() {
    let service = Obedient::default();
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(3)).name("health");
    let state = breaker.handle();
    let addr = serve!(service.clone(), breaker.respond());
    for _ in 0..3 {
        let failed = soon(bare(addr).check(ask("14"))).await.unwrap_err();
        assert_eq!((failed.code(), failed.message()), (Code::Unavailable, "as asked for"));
    }
    let refused = soon(bare(addr).check(ask(""))).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::Unavailable, "circuit_open"));
    assert!(matches!(pushback(&refused), Some(29_000..=30_000)));
    assert_eq!((state.state(), service.inside.total()), (CircuitState::Open, 3));
}

#[tokio::test]
async fn breaker_under_tonic_counts_failures_in_the_trailers() {
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(3));
    let state = breaker.handle();
    let addr = serve!(Obedient::default(), breaker.respond());
    for round in 1..=3 {
        let mut watch = soon(bare(addr).watch(ask("cut 14"))).await.unwrap().into_inner();
        assert_eq!(soon(watch.message()).await.unwrap().unwrap().status, 1);
        assert_eq!(soon(watch.message()).await.unwrap_err().code(), Code::Unavailable);
        until(|| {
            state.snapshot().seen.consecutive_failures == round
                || state.state() == CircuitState::Open
        })
        .await;
    }
    assert_eq!(state.state(), CircuitState::Open);
}

#[tokio::test]
async fn breaker_under_tonic_does_not_count_invalid_requests_and_dropped_streams() {
    let service = Obedient::default();
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(1));
    let state = breaker.handle();
    let addr = serve!(service.clone(), breaker.respond());
    for code in
        [Code::InvalidArgument, Code::NotFound, Code::ResourceExhausted, Code::Unauthenticated]
    {
        let failed = soon(bare(addr).check(ask(&(code as i32).to_string()))).await.unwrap_err();
        assert_eq!(failed.code(), code);
    }
    let mut watch = soon(bare(addr).watch(ask("hold"))).await.unwrap().into_inner();
    soon(watch.message()).await.unwrap().unwrap();
    drop(watch);
    until(|| service.inside.now() == 0).await;
    let snapshot = state.snapshot();
    assert_eq!((snapshot.state, snapshot.seen.consecutive_failures), (CircuitState::Closed, 0));
}

#[tokio::test]
async fn breaker_and_limit_stack_under_tonic_with_tracing_between() {
    let service = Obedient::default();
    let breaker = CircuitBreakerLayer::http();
    let limit = ConcurrencyLimitLayer::new(1);
    let (state, handle) = (breaker.handle(), limit.handle());
    let addr =
        serve!(service.clone(), breaker.respond(), TraceLayer::new_for_grpc(), limit.respond());
    let mut client = bare(addr);
    let watch = soon(client.watch(ask("hold"))).await.unwrap();
    for _ in 0..10 {
        assert_eq!(soon(client.check(ask(""))).await.unwrap_err().message(), "limit_reached");
    }
    // A rejection by an inner layer is not a failure of the service, so the circuit stays closed.
    assert_eq!((state.state(), handle.snapshot().rejected_full), (CircuitState::Closed, 10));
    drop(watch);
    until(|| handle.in_flight() == 0).await;
    soon(client.check(ask(""))).await.unwrap();
    until(|| handle.in_flight() == 0 && service.inside.now() == 0).await;
}

// ===== Around a client =====

#[tokio::test]
async fn rejection_as_an_error_is_unavailable_to_a_generated_client_and_among_the_sources() {
    let addr = serve!(Obedient::default());
    let breaker = CircuitBreakerLayer::http().name("upstream");
    let state = breaker.handle();
    let stack = ServiceBuilder::new().layer(breaker).service(channel(addr));
    let mut client = HealthClient::new(stack);
    soon(client.check(ask(""))).await.unwrap();
    state.force_open();
    let refused = soon(client.check(ask(""))).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::Unavailable, "unavailable"));
    let rejected = Rejected::find(&refused).expect("a rejection among the sources");
    assert_eq!(rejected.kind(), RejectedKind::ForcedOpen);
    assert_eq!((rejected.layer(), rejected.name()), ("circuit_breaker", Some("upstream")));
}

#[tokio::test]
async fn rejection_of_a_client_as_a_response_is_unavailable_with_pushback() {
    let addr = serve!(Obedient::default());
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let breaker = CircuitBreakerLayer::http();
    let state = breaker.handle();
    let stack = ServiceBuilder::new()
        .layer(breaker.respond())
        .layer(limit.respond())
        .service(channel(addr));
    let mut client = HealthClient::new(stack);
    let mut watch = soon(client.watch(ask("hold"))).await.unwrap().into_inner();
    soon(watch.message()).await.unwrap().unwrap();
    assert_eq!(handle.in_flight(), 1);
    let refused = soon(client.check(ask(""))).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::Unavailable, "limit_reached"));
    assert_eq!(pushback(&refused), Some(1000));
    drop(watch);
    assert_eq!(handle.in_flight(), 0, "released by the drop");
    soon(client.check(ask(""))).await.unwrap();
    assert_eq!((handle.in_flight(), state.state()), (0, CircuitState::Closed));
}

#[tokio::test]
async fn rejections_of_a_whole_client_stack_have_their_codes_under_a_layer_that_responds() {
    let addr = serve!(Obedient::default());
    let breaker = CircuitBreakerLayer::grpc().name("upstream");
    let state = breaker.handle();
    let stack = ServiceBuilder::new()
        .layer(RespondLayer::new())
        .layer(RetryLayer::grpc())
        .layer(breaker)
        .layer(MapRequestBodyLayer::new(tonic::body::Body::new))
        .service(channel(addr));
    let mut client = HealthClient::new(stack);
    soon(client.check(ask(""))).await.unwrap();
    state.force_open();
    let refused = soon(client.check(ask(""))).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::Unavailable, "unavailable"));
}

#[tokio::test]
async fn a_client_s_breaker_counts_failures_in_the_head_and_in_the_trailers() {
    let addr = serve!(Obedient::default());
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(4));
    let state = breaker.handle();
    let mut client = HealthClient::new(ServiceBuilder::new().layer(breaker).service(channel(addr)));
    for _ in 0..2 {
        assert_eq!(soon(client.check(ask("14"))).await.unwrap_err().code(), Code::Unavailable);
    }
    assert_eq!(state.snapshot().seen.consecutive_failures, 2);
    for failures in 3..=4 {
        let mut watch = soon(client.watch(ask("cut 13"))).await.unwrap().into_inner();
        assert_eq!(
            state.snapshot().seen.consecutive_failures,
            failures - 1,
            "a good head alone decides nothing"
        );
        soon(watch.message()).await.unwrap().unwrap();
        assert_eq!(soon(watch.message()).await.unwrap_err().code(), Code::Internal);
    }
    assert_eq!(state.state(), CircuitState::Open);
}

/// The circuit of `grpc()` in a client's stack: five failures in a row open it.
#[tokio::test]
async fn grpc_breaker_counts_the_statuses_that_the_server_causes() {
    let addr = serve!(Obedient::default());
    for (code, failures) in
        [("14", 5), ("13", 5), ("2", 5), ("15", 5), ("4", 5), ("5", 0), ("3", 0), ("8", 0)]
    {
        let breaker = CircuitBreakerLayer::grpc();
        let state = breaker.handle();
        let stack = ServiceBuilder::new()
            .layer(RetryLayer::grpc().attempts(1))
            .layer(breaker.respond())
            .layer(ConcurrencyLimitLayer::new(9).respond())
            .layer(MapRequestBodyLayer::new(tonic::body::Body::new))
            .service(channel(addr));
        let mut client = HealthClient::new(stack);
        for _ in 0..5 {
            let status = soon(client.check(ask(code))).await.unwrap_err();
            assert_eq!((status.code() as i32).to_string(), code);
        }
        assert_eq!(state.state() == CircuitState::Open, failures == 5, "{code}");
        if failures == 5 {
            let rejected = soon(client.check(ask(""))).await.unwrap_err();
            assert_eq!(rejected.code(), Code::Unavailable);
            assert!(pushback(&rejected).is_some());
        }
    }
}

#[tokio::test]
async fn breaker_of_a_client_over_a_dead_upstream_returns_the_code_and_opens() {
    let addr = closed_address().await;
    let as_is = soon(bare(addr).check(ask(""))).await.unwrap_err();
    for respond in [false, true] {
        let breaker = CircuitBreakerLayer::new(Trip::consecutive(2));
        let state = breaker.handle();
        let mut codes = Vec::new();
        for _ in 0..3 {
            let status = if respond {
                let stack = ServiceBuilder::new().layer(breaker.clone().respond());
                soon(HealthClient::new(stack.service(channel(addr))).check(ask(""))).await
            } else {
                let stack = ServiceBuilder::new().layer(breaker.clone());
                soon(HealthClient::new(stack.service(channel(addr))).check(ask(""))).await
            };
            codes.push(status.unwrap_err().code());
        }
        assert_eq!(codes, [as_is.code(), as_is.code(), Code::Unavailable]);
        assert_eq!((state.state(), state.snapshot().rejected), (CircuitState::Open, 1));
    }
}

#[tokio::test]
async fn stack_of_a_client_can_move_into_spawned_tasks() {
    let service = Obedient::default();
    let addr = serve!(service.clone());
    let limit = ConcurrencyLimitLayer::new(2).queue(64, Duration::from_secs(10));
    let handle = limit.handle();
    let stack = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::http())
        .layer(limit)
        .service(channel(addr));
    let client = HealthClient::new(stack);
    let calls: Vec<_> = (0..20)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move {
                let mut watch = client.watch(ask("")).await?.into_inner();
                while watch.message().await?.is_some() {}
                Ok::<_, BoxError>(())
            })
        })
        .collect();
    for call in calls {
        soon(call).await.unwrap().unwrap();
    }
    assert!(service.inside.peak() <= 2);
    assert_eq!((handle.in_flight(), handle.snapshot().waiting), (0, 0));
}

#[tokio::test]
async fn an_interceptor_can_wrap_the_stack_of_a_client() {
    let addr = serve!(Obedient::default());
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let stack = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::http().respond())
        .layer(limit.respond())
        .service(channel(addr));
    let mut client = HealthClient::with_interceptor(stack, |request: tonic::Request<()>| {
        match request.metadata().get("stop") {
            None => Ok(request),
            Some(_) => Err(Status::cancelled("stopped")),
        }
    });
    soon(client.check(ask(""))).await.unwrap();
    let mut stopped = tonic::Request::new(ask(""));
    stopped.metadata_mut().insert("stop", "1".parse().unwrap());
    assert_eq!(soon(client.check(stopped)).await.unwrap_err().code(), Code::Cancelled);
    assert_eq!(handle.in_flight(), 0);
}

// ===== An HTTP server that does not speak gRPC =====

/// Responds to the first calls like an HTTP proxy without a backend, with this status and this HTML page. Every later
/// call gets a gRPC response.
async fn proxy(failures: usize, status: u16, html: &'static str) -> (SocketAddr, Arc<AtomicUsize>) {
    let (listener, addr) = listener().await;
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = calls.clone();
    tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let calls = counted.clone();
            tokio::spawn(async move {
                let service = service_fn(move |request: Request<Incoming>| {
                    let calls = calls.clone();
                    async move {
                        request.into_body().collect().await?;
                        let call = calls.fetch_add(1, Ordering::SeqCst) + 1;
                        let response =
                            if call <= failures { page(status, html) } else { serving() };
                        Ok::<_, hyper::Error>(response)
                    }
                });
                let server = auto::Builder::new(TokioExecutor::new());
                let _ = server.serve_connection(TokioIo::new(socket), service).await;
            });
        }
    });
    (addr, calls)
}

type Frames = StreamBody<stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, Infallible>>>>;

fn page(status: u16, html: &'static str) -> Response<Frames> {
    let html = (!html.is_empty()).then(|| Ok(Frame::data(Bytes::from_static(html.as_bytes()))));
    let frames = StreamBody::new(stream::iter(html.into_iter().collect::<Vec<_>>()));
    let response = Response::builder().status(status).header("content-type", "text/html");
    response.body(frames).unwrap()
}

fn serving() -> Response<Frames> {
    // `HealthCheckResponse { status: SERVING }`.
    let message = Frame::data(Bytes::from_static(&[0, 0, 0, 0, 2, 8, 1]));
    let ok = HeaderMap::from_iter([("grpc-status".parse().unwrap(), 0.into())]);
    let frames = StreamBody::new(stream::iter(vec![Ok(message), Ok(Frame::trailers(ok))]));
    Response::builder().header("content-type", "application/grpc").body(frames).unwrap()
}

/// The layers of a client in their order, over a channel.
macro_rules! retrying_client {
    ($addr:expr, $breaker:expr) => {
        HealthClient::new(
            ServiceBuilder::new()
                .layer(RespondLayer::new())
                .layer(RetryLayer::grpc().backoff(Backoff::constant(Duration::from_millis(1))))
                .layer($breaker)
                .layer(MapRequestBodyLayer::new(tonic::body::Body::new))
                .service(channel($addr)),
        )
    };
}

#[tokio::test]
async fn http_503_with_html_for_a_tonic_call_is_unavailable_and_retried() {
    const HTML: &str = "<h1>no backend</h1>";
    let (addr, calls) = proxy(2, 503, HTML).await;
    let breaker = CircuitBreakerLayer::http();
    let state = breaker.handle();
    let response = soon(retrying_client!(addr, breaker).check(ask(""))).await.unwrap();
    assert_eq!((response.into_inner().status, calls.load(Ordering::SeqCst)), (1, 3));
    until(|| state.snapshot().seen.consecutive_failures == 0).await;
    assert_eq!(state.state(), CircuitState::Closed);

    let (addr, calls) = proxy(usize::MAX, 503, HTML).await;
    let breaker = CircuitBreakerLayer::http();
    let state = breaker.handle();
    let failed = soon(retrying_client!(addr, breaker).check(ask(""))).await.unwrap_err();
    // tonic reports the page as a malformed message. The layers have classified the head.
    assert_eq!((failed.code(), calls.load(Ordering::SeqCst)), (Code::Internal, 3));
    assert_eq!(state.snapshot().seen.consecutive_failures, 3);
}

#[tokio::test]
async fn layers_map_http_statuses_to_the_codes_that_tonic_maps_them_to() {
    for (status, code, attempts, failures) in [
        (400, Code::Internal, 1, 1),
        (401, Code::Unauthenticated, 1, 0),
        (404, Code::Unimplemented, 1, 0),
        (429, Code::Unavailable, 3, 0),
        (500, Code::Unknown, 1, 1),
        (504, Code::Unavailable, 3, 3),
    ] {
        let (addr, calls) = proxy(usize::MAX, status, "").await;
        let breaker = CircuitBreakerLayer::http();
        let state = breaker.handle();
        let failed = soon(retrying_client!(addr, breaker).check(ask(""))).await.unwrap_err();
        assert_eq!((failed.code(), calls.load(Ordering::SeqCst)), (code, attempts), "{status}");
        assert_eq!(state.snapshot().seen.consecutive_failures, failures, "{status}");
    }
}
