//! Deadlines of gRPC calls over a tonic channel, whose own timer on `grpc-timeout` expires at the same time as those of
//! the layers.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Deadline, DeadlineLayer, RespondLayer,
    RetryLayer, TimeoutLayer, Trip,
    breaker::{CircuitBreakerHandle, CircuitState},
    config::ClientConfig,
    stack::{ClientHandle, ClientStack},
    timeout::{TimeoutHandle, TimeoutPhase},
};
use http::{Request, Response};
use tokio::{task::JoinSet, time::Instant};
use tonic::{Code, Status, body::Body, transport::Server};
use tonic_health::pb::{health_client::HealthClient, health_server::HealthServer};
use tower::{Layer, Service, ServiceBuilder, util::BoxCloneSyncService};
use tower_http::map_request_body::MapRequestBodyLayer;

use crate::support::{
    net::soon,
    rpc::{Obedient, ask, channel, incoming},
};

const CALLS: u64 = 200;

/// A server that reads `grpc-timeout` as tonic's servers do by themselves: it responds with `CANCELLED`.
async fn serve() -> SocketAddr {
    let (incoming, addr) = incoming().await;
    let server = Server::builder()
        // The calls of a test end almost at once. On a busy machine the server has not accepted all of them by then,
        // and would end the connection for that: its limit is 20.
        .http2_max_pending_accept_reset_streams(Some(10 * CALLS as usize))
        .add_service(HealthServer::new(Obedient::default()));
    tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
    addr
}

/// The error is converted as a generated client converts it. A `BoxError` in this place makes its future not `Send`
/// (rust-lang/rust#110338).
type Call = BoxCloneSyncService<Request<Body>, Response<Body>, Status>;

fn erased<S, B>(service: S) -> Call
where
    S: Service<Request<Body>, Response = Response<B>> + Clone + Send + Sync + 'static,
    S::Future: Send,
    S::Error: Into<BoxError>,
    B: http_body::Body<Data = bytes::Bytes, Error: Into<BoxError>> + Send + 'static,
{
    let service = tower::ServiceExt::<Request<Body>>::map_response(service, |response| {
        Response::map(response, Body::new)
    });
    let status = |error: S::Error| Status::from_error(error.into());
    BoxCloneSyncService::new(tower::ServiceExt::<Request<Body>>::map_err(service, status))
}

/// The source of the deadline: `grpc-timeout` of the caller, or the default of the layer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Source {
    Caller,
    Default,
}

/// Makes many calls at once, each with another deadline, that the server never responds to. Returns the number of calls
/// by their status.
async fn statuses(service: Call, from: Source) -> BTreeMap<String, usize> {
    let mut calls = JoinSet::new();
    for call in 0..CALLS {
        let mut client = HealthClient::new(service.clone());
        calls.spawn(async move {
            let mut request = tonic::Request::new(ask("hold"));
            if from == Source::Caller {
                request.set_timeout(Duration::from_micros(30_000 + 337 * call));
            }
            soon(client.check(request)).await.unwrap_err().code()
        });
    }
    let mut statuses = BTreeMap::new();
    while let Some(code) = calls.join_next().await {
        *statuses.entry(format!("{:?}", code.unwrap())).or_default() += 1;
    }
    statuses
}

#[track_caller]
fn assert_all_exceeded(case: &str, statuses: &BTreeMap<String, usize>) {
    let expected = BTreeMap::from([(format!("{:?}", Code::DeadlineExceeded), CALLS as usize)]);
    assert_eq!(*statuses, expected, "{case}");
}

struct Stack {
    service: Call,
    breaker: CircuitBreakerHandle,
    timeout: Option<TimeoutHandle>,
    client: Option<ClientHandle>,
}

fn breaker() -> CircuitBreakerLayer {
    // Never opens here, so that every call reaches the channel.
    CircuitBreakerLayer::new(Trip::consecutive(u32::MAX))
}

fn deadline() -> DeadlineLayer {
    DeadlineLayer::new().default_of(Duration::from_millis(60))
}

/// The client of the README's table of positions.
fn by_the_table(addr: SocketAddr, responds: bool) -> Stack {
    let (breaker, timeout) = (breaker(), TimeoutLayer::http());
    let handles = (breaker.handle(), timeout.handle());
    let inner = ServiceBuilder::new()
        .layer(deadline().max(Duration::from_secs(9)).propagate_only())
        .layer(RetryLayer::grpc())
        .layer(breaker)
        .layer(ConcurrencyLimitLayer::new(1000))
        .layer(DeadlineLayer::new().header("x-request-timeout-ms").propagate_only())
        .layer(timeout)
        .layer(MapRequestBodyLayer::new(Body::new))
        .service(channel(addr));
    let service = match responds {
        true => erased(RespondLayer::new().layer(inner)),
        false => erased(inner),
    };
    Stack { service, breaker: handles.0, timeout: Some(handles.1), client: None }
}

/// The same without a timeout: the retry keeps the deadline.
fn without_a_timeout(addr: SocketAddr, responds: bool) -> Stack {
    let breaker = breaker();
    let handle = breaker.handle();
    let inner = ServiceBuilder::new()
        .layer(deadline().max(Duration::from_secs(9)).propagate_only())
        .layer(RetryLayer::grpc())
        .layer(breaker)
        .layer(MapRequestBodyLayer::new(Body::new))
        .service(channel(addr));
    let service = match responds {
        true => erased(RespondLayer::new().layer(inner)),
        false => erased(inner),
    };
    Stack { service, breaker: handle, timeout: None, client: None }
}

fn deadline_and_breaker(addr: SocketAddr, responds: bool) -> Stack {
    let (breaker, deadline) = (breaker(), deadline().max(Duration::from_secs(9)));
    let handle = breaker.handle();
    let service = match responds {
        true => erased(deadline.respond().layer(breaker.layer(channel(addr)))),
        false => erased(deadline.layer(breaker.layer(channel(addr)))),
    };
    Stack { service, breaker: handle, timeout: None, client: None }
}

fn ready_made(addr: SocketAddr, responds: bool) -> Stack {
    let toml = "deadline_default = '60ms'\ndeadline_max = '9s'\nretry_attempts = 1\n\
                limit_max = 1000\nlimit_queue = 0\nconnect_queue = 0\nbreaker_failures = 1000000";
    let stack = ClientStack::new(&ClientConfig::from_toml(toml).unwrap()).unwrap();
    let handle = stack.handle();
    let inner = stack.layer(MapRequestBodyLayer::new(Body::new).layer(channel(addr)));
    let service = match responds {
        true => erased(RespondLayer::new().layer(inner)),
        false => erased(inner),
    };
    Stack { service, breaker: handle.breaker(), timeout: None, client: Some(handle) }
}

type Build = fn(SocketAddr, bool) -> Stack;

const STACKS: [(&str, Build); 4] = [
    ("by the table", by_the_table),
    ("without a timeout", without_a_timeout),
    ("deadline and breaker", deadline_and_breaker),
    ("ready-made", ready_made),
];

/// A stream whose deadline expires after its first message.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn stream_cut_off_at_its_deadline_ends_with_deadline_exceeded() {
    let addr = serve().await;
    for (name, build) in STACKS {
        // Only a timeout and a deadline layer keep a deadline to the end of a body.
        for responds in [true, false].into_iter().filter(|_| name != "without a timeout") {
            let stack = build(addr, responds);
            let mut calls = JoinSet::new();
            for call in 0..CALLS {
                let mut client = HealthClient::new(stack.service.clone());
                calls.spawn(async move {
                    let mut request = tonic::Request::new(ask("hold"));
                    request.set_timeout(Duration::from_micros(300_000 + 337 * call));
                    let call = async {
                        let mut watch = client.watch(request).await?.into_inner();
                        let mut messages = 0;
                        while watch.message().await?.is_some() {
                            messages += 1;
                        }
                        Ok::<u32, Status>(messages)
                    };
                    soon(call).await.unwrap_err().code()
                });
            }
            while let Some(code) = calls.join_next().await {
                assert_eq!(code.unwrap(), Code::DeadlineExceeded, "{name}, responds: {responds}");
            }
            let failures = stack.breaker.snapshot().seen.consecutive_failures;
            assert_eq!(failures, 0, "{name}, responds: {responds}");
        }
    }
}

/// Without a deadline layer only the channel reads `grpc-timeout`.
#[tokio::test]
async fn timer_of_the_channel_alone_is_deadline_exceeded_under_a_layer_that_responds() {
    let stack = ServiceBuilder::new()
        .layer(RespondLayer::new())
        .layer(RetryLayer::grpc())
        .layer(CircuitBreakerLayer::http())
        .layer(MapRequestBodyLayer::new(Body::new))
        .service(channel(serve().await));
    let mut request = tonic::Request::new(ask("hold"));
    request.set_timeout(Duration::from_millis(20));
    let status = soon(HealthClient::new(stack).check(request)).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
}

/// A watch call over the client of all other calls.
#[tokio::test]
async fn deadline_of_the_application_replaces_the_default_and_the_maximum_of_a_tonic_client() {
    let addr = serve().await;
    for (name, build) in STACKS {
        let started = Instant::now();
        let mut request = tonic::Request::new(ask("hold"));
        request.extensions_mut().insert(Deadline::after(Duration::from_millis(300)));
        let mut client = HealthClient::new(build(addr, true).service);
        let status = soon(client.check(request)).await.unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded, "{name}");
        assert!(started.elapsed() >= Duration::from_millis(299), "{name}: {:?}", started.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn expired_deadline_is_always_deadline_exceeded() {
    let addr = serve().await;
    for (name, build) in STACKS {
        for responds in [true, false] {
            for from in [Source::Caller, Source::Default] {
                let case = format!("{name}, responds: {responds}, from: {from:?}");
                let stack = build(addr, responds);
                assert_all_exceeded(&case, &statuses(stack.service, from).await);

                // A deadline of the caller is neutral, one of the operator is a failure.
                let failures = if from == Source::Caller { 0 } else { CALLS };
                let snapshot = stack.breaker.snapshot();
                assert_eq!(snapshot.state, CircuitState::Closed, "{case}");
                let counted = u64::from(snapshot.seen.consecutive_failures);
                assert_eq!(counted, failures, "{case}: {snapshot:?}");
                if let Some(timeout) = stack.timeout {
                    let snapshot = timeout.snapshot();
                    assert_eq!(snapshot.timed_out_by(TimeoutPhase::Deadline), CALLS, "{case}");
                }
                if let Some(client) = stack.client {
                    let snapshot = client.snapshot();
                    let counted = (snapshot.timeouts, snapshot.failures, snapshot.cancelled);
                    assert_eq!(counted, (CALLS, failures, CALLS - failures), "{case}");
                }
            }
        }
    }
}
