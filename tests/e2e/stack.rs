//! The recommended client and server, each made in one call, over real sockets.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{Extension, Router, http::StatusCode, routing::get};
use buttress::{
    Attempts, BoxError, ClientError, ClientErrorKind, Deadline, Outcome, Rejected, RespondLayer,
    breaker::CircuitState,
    config::{ClientConfig, ServerConfig},
    health::ProbeState,
    outcome::{Reason, RejectedKind},
    stack::{StackClient, UpstreamHealth},
};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    net::TcpListener,
    time::{Instant, sleep},
};
use tower::{ServiceBuilder, ServiceExt};

use crate::support::net;

type Body = Full<Bytes>;

async fn upstream(fails: Arc<AtomicUsize>) -> SocketAddr {
    let stack = buttress::server(&ServerConfig::default()).unwrap();
    let app = Router::new()
        .route(
            "/",
            get(async move || {
                match fails.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)) {
                    Ok(_) => (StatusCode::SERVICE_UNAVAILABLE, "later"),
                    Err(_) => (StatusCode::OK, "hello"),
                }
            }),
        )
        .route("/healthz", get(|| async { "x".repeat(10_000) }))
        .layer(stack);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    at
}

fn to(at: SocketAddr) -> Request<Body> {
    Request::get(format!("http://{at}/")).body(Body::default()).unwrap()
}

fn client(at: SocketAddr, more: &str) -> StackClient<Body> {
    let settings = format!(
        "check_health_uri = 'http://{at}/healthz'\nretry_backoff = '1ms'\nbreaker_open_for = '100ms'\n{more}"
    );
    let config = ClientConfig::load("search").toml(&settings).finish().unwrap();
    buttress::client(&config).unwrap()
}

#[tokio::test]
async fn client_from_config_retries_and_counts_its_calls() {
    let fails = Arc::new(AtomicUsize::new(1));
    let at = upstream(fails.clone()).await;
    let client = client(at, "connect_max_total = 2");
    let handle = client.handle();
    let caller = client.clone();
    let task = tokio::spawn(async move { caller.request(to(at)).await });
    let response = net::soon(task).await.unwrap().unwrap();
    assert_eq!(Attempts::of(&response).made, 2);
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "hello");
    for _ in 0..20 {
        let response = net::soon(client.request(to(at))).await.unwrap();
        response.into_body().collect().await.unwrap();
    }
    let seen = handle.snapshot();
    assert_eq!((seen.total, seen.successes, seen.retries, seen.in_flight), (21, 21, 1, 0));
    assert_eq!((seen.connections, seen.healthy), (1, true), "all calls share one connection");
    assert!(seen.average.unwrap() <= Duration::from_secs(5) && seen.p99.is_some());

    // 100 calls at once over two connections, and then over three after a live update.
    let calls = |count| {
        let tasks = (0..count).map(|_| tokio::spawn(client.clone().oneshot(to(at))));
        let tasks: Vec<_> = tasks.collect();
        async move {
            for task in tasks {
                let response = net::soon(task).await.unwrap().unwrap();
                response.into_body().collect().await.unwrap();
            }
        }
    };
    calls(100).await;
    assert!(handle.snapshot().connections <= 2);
    let mut config = handle.config();
    config.connect.max_total = Some(3);
    assert_eq!(handle.update(&config).unwrap(), Vec::<&str>::new());
    calls(100).await;
    assert!(handle.snapshot().connections <= 3);
    assert_eq!(handle.snapshot().failures, 0);
    let connections = handle.connections().unwrap().snapshot();
    assert_eq!((connections.max_total, connections.failed), (Some(3), 0));
    assert!(connections.created <= 3 && connections.reused >= 200, "{connections:?}");
}

#[tokio::test]
async fn ready_made_clients_write_headers_to_each_attempt() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let ids = seen.clone();
    let app = Router::new().route(
        "/",
        get(async move |headers: HeaderMap| {
            let mut ids = ids.lock().unwrap();
            ids.push(headers["x-attempt"].to_str().unwrap().to_owned());
            if ids.len() == 1 { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }
        }),
    );
    let at = serve(app).await;
    let number = |attempt: u32, headers: &mut HeaderMap| {
        headers.insert("x-attempt", attempt.into());
    };
    let client = client(at, "").attempt_headers(number);
    let response = net::soon(client.request(to(at))).await.unwrap();
    assert_eq!((response.status(), client.handle().snapshot().retries), (StatusCode::OK, 1));
    assert_eq!(*seen.lock().unwrap(), ["1", "2"]);

    let ids = seen.clone();
    let channel = tower::service_fn(move |request: Request<tonic::body::Body>| {
        let id = request.headers()["x-attempt"].to_str().unwrap().to_owned();
        ids.lock().unwrap().push(id);
        let response = Response::builder().header("grpc-status", "0");
        std::future::ready(Ok::<_, BoxError>(response.body(tonic::body::Body::empty()).unwrap()))
    });
    let config = ClientConfig::load("search").finish().unwrap();
    let grpc = buttress::grpc(&config, channel).unwrap().attempt_headers(number);
    let request = Request::post("/search.Search/Find").header("content-type", "application/grpc");
    let request = request.body(tonic::body::Body::empty()).unwrap();
    net::soon(grpc.oneshot(request)).await.unwrap();
    assert_eq!(seen.lock().unwrap().pop().unwrap(), "1");
}

#[tokio::test]
async fn client_from_config_rejects_calls_while_its_probe_is_down() {
    let (well, calls) = (Arc::new(AtomicUsize::new(200)), Arc::new(AtomicUsize::new(0)));
    let (says, counts) = (well.clone(), calls.clone());
    let app = Router::new()
        .route("/", get(async move || counts.fetch_add(1, SeqCst).to_string()))
        .route("/up", get(async move || StatusCode::from_u16(says.load(SeqCst) as u16).unwrap()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    let settings = format!("[health_probe]\nuri = 'http://{at}/up'\nevery = '10ms'\nfall = 2");
    let config = ClientConfig::load("search").toml(&settings).finish().unwrap();
    let client = buttress::client::<Body>(&config).unwrap();
    let (handle, probe) = (client.handle(), client.handle().probe().unwrap());
    assert_eq!(net::soon(probe.changed()).await, ProbeState::Up);
    assert_eq!(net::soon(client.request(to(at))).await.unwrap().status(), 200);

    well.store(500, SeqCst);
    assert_eq!(net::soon(probe.changed()).await, ProbeState::Down);
    let error = net::soon(client.request(to(at))).await.map(drop).unwrap_err();
    let refused = error.rejected().unwrap();
    assert_eq!((refused.kind(), refused.name()), (RejectedKind::Unhealthy, Some("search")));
    let seen = handle.snapshot();
    assert_eq!((seen.probe, seen.healthy), (Some(ProbeState::Down), false));
    assert_eq!((seen.rejected, calls.load(SeqCst)), (1, 1), "no call reached the upstream");
    assert_eq!(seen.breaker_opened, 0);

    well.store(200, SeqCst);
    assert_eq!(net::soon(probe.changed()).await, ProbeState::Up);
    assert_eq!(net::soon(client.request(to(at))).await.unwrap().status(), 200);
    assert_eq!(net::soon(client.check_health()).await.status, UpstreamHealth::Healthy);
    // Without the settings of a health probe there is none.
    assert!(self::client(at, "").handle().probe().is_none());
}

/// The server hangs for the first attempt and for the first hedge attempt.
#[tokio::test]
async fn client_sends_a_second_hedge_attempt_that_responds() {
    let requests = Arc::new(AtomicUsize::new(0));
    let count = requests.clone();
    let handler = get(async move || {
        if count.fetch_add(1, SeqCst) < 2 {
            std::future::pending::<()>().await;
        }
        "hello"
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let app = Router::new().route("/", handler);
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    let client = client(at, "hedge_after = '50ms'\nhedge_max_hedges = 2");
    let response = net::soon(client.request(to(at))).await.unwrap();
    let hedged = buttress::hedge::Hedged::of(&response).unwrap();
    assert_eq!((hedged.won, hedged.sent, Attempts::of(&response).made), (true, 2, 1));
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "hello");
    let snapshot = client.handle().snapshot();
    assert_eq!((requests.load(SeqCst), snapshot.hedges, snapshot.in_flight), (3, 2, 0));
}

#[tokio::test]
async fn client_rejects_calls_after_one_probe_response_503() {
    let app = Router::new().route("/up", get(async || StatusCode::SERVICE_UNAVAILABLE));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    for (settings, failures) in [("", 1), ("immediate_failure = false", 3)] {
        let settings =
            format!("[health_probe]\nuri = 'http://{at}/up'\nevery = '10ms'\n{settings}");
        let config = ClientConfig::from_toml(&settings).unwrap();
        let client = buttress::client::<Body>(&config).unwrap();
        let probe = client.handle().probe().unwrap();
        while probe.state() != ProbeState::Down {
            net::soon(probe.changed()).await;
        }
        assert!(probe.snapshot().consecutive_failures >= failures);
        assert_eq!(failures == 1, probe.snapshot().probes == 1, "{:?}", probe.snapshot());
        let error = net::soon(client.request(to(at))).await.map(drop).unwrap_err();
        assert_eq!(Rejected::find(&error).unwrap().kind(), RejectedKind::Unhealthy);
    }
}

#[tokio::test]
async fn client_from_config_uses_http2_from_the_first_byte() {
    let at = upstream(Arc::default()).await;
    let client = client(
        at,
        "connect_http2_only = true\nconnect_http2_keepalive = '30s'\nconnect_tcp_keepalive = 'off'",
    );
    let calls = (0..50).map(|_| tokio::spawn(client.clone().oneshot(to(at))));
    for call in calls.collect::<Vec<_>>() {
        let response = net::soon(call).await.unwrap().unwrap();
        assert_eq!(
            (response.status(), response.version()),
            (StatusCode::OK, http::Version::HTTP_2)
        );
        response.into_body().collect().await.unwrap();
    }
    assert_eq!(client.handle().snapshot().connections, 1, "all calls share one connection");
}

#[tokio::test]
async fn client_from_config_opens_its_circuit_and_checks_health() {
    let fails = Arc::new(AtomicUsize::new(6));
    let at = upstream(fails.clone()).await;
    let client = client(at, "breaker_failures = 6");
    let handle = client.handle();
    for _ in 0..20 {
        let check = net::soon(client.check_health()).await;
        assert_eq!(check.status, UpstreamHealth::Healthy);
        assert_eq!(handle.snapshot().last_check, Some(check));
    }
    let connections = handle.connections().unwrap().snapshot();
    assert_eq!(
        connections.created, 1,
        "the response of a check is read, so its connection is reused"
    );
    for _ in 0..2 {
        let response = net::soon(client.clone().oneshot(to(at))).await.unwrap();
        assert_eq!(response.status(), 503, "after three attempts");
    }
    let seen = handle.snapshot();
    assert_eq!((seen.breaker, seen.healthy, seen.failures), (Some(CircuitState::Open), false, 2));
    let error = net::soon(client.clone().oneshot(to(at))).await.map(drop).unwrap_err();
    assert_eq!(Rejected::find(&error).unwrap().layer(), "circuit_breaker");
    assert_eq!(net::soon(client.check_health()).await.status, UpstreamHealth::Unhealthy);
    net::until(|| handle.snapshot().healthy).await;
    assert_eq!(net::soon(client.check_health()).await.status, UpstreamHealth::Healthy);
    assert_eq!(
        handle.snapshot().breaker,
        Some(CircuitState::Closed),
        "a check is a half-open probe"
    );
}

#[tokio::test]
async fn call_to_a_closed_port_fails_and_the_check_is_unhealthy() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    drop(listener);
    let client = client(at, "");
    let error = net::soon(client.clone().oneshot(to(at))).await.map(drop).unwrap_err();
    assert!(Rejected::find(&error).is_none(), "not a rejection: {error}");
    assert_eq!(net::soon(client.check_health()).await.status, UpstreamHealth::Unhealthy);
}

/// Serves a whole stack on both sides: the handler waits for `before` and then calls `next` with the rest of the
/// deadline of its caller.
async fn hop(next: SocketAddr, before: Duration) -> SocketAddr {
    let settings = "deadline_header = 'x-left'\ndeadline_reserve = '40ms'\ndeadline_default = '2s'\ntimeout_head = '1500ms'\n\
                    retry_attempts = 1\nconnect_timeout = '1s'\nconnect_queue_wait = '1s'\nlimit_queue_wait = '1s'";
    let client = buttress::client::<Body>(&ClientConfig::from_toml(settings).unwrap()).unwrap();
    let handler = async move |Extension(deadline): Extension<Deadline>| {
        let mut request = to(next);
        request.extensions_mut().insert(deadline);
        // In a task, so that the work continues after the caller has hung up.
        let task = tokio::spawn(async move {
            sleep(before).await;
            client.oneshot(request).await.map(|response| response.status())
        });
        task.await.unwrap().unwrap_or(StatusCode::GATEWAY_TIMEOUT)
    };
    serve(Router::new().route("/", get(handler))).await
}

async fn serve(app: Router) -> SocketAddr {
    let config = ServerConfig::from_toml("deadline_header = 'x-left'").unwrap();
    let app = app.layer(buttress::server(&config).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
    at
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deadline_passes_through_three_services_with_whole_stacks() {
    let (ticks, calls) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let last = {
        let (ticks, calls) = (ticks.clone(), calls.clone());
        serve(Router::new().route(
            "/",
            get(async move || {
                calls.fetch_add(1, SeqCst);
                for _ in 0..400 {
                    ticks.fetch_add(1, SeqCst);
                    sleep(Duration::from_millis(5)).await;
                }
            }),
        ))
        .await
    };
    let ms = Duration::from_millis;
    let ask = async |first: SocketAddr| {
        let config = ClientConfig::from_toml("deadline_header = 'x-left'").unwrap();
        let client = buttress::client::<Body>(&config).unwrap();
        let mut request = to(first);
        request.extensions_mut().insert(Deadline::after(ms(400)));
        let start = Instant::now();
        let result = net::soon(client.oneshot(request)).await;
        assert!(start.elapsed() < ms(1500), "{:?}", start.elapsed());
        result.map(|response| response.status()).ok()
    };
    let first = hop(hop(last, ms(0)).await, ms(0)).await;
    assert_ne!(ask(first).await, Some(StatusCode::OK));
    let then = ticks.load(SeqCst);
    assert!(then > 10, "the handler has started: {then}");
    sleep(ms(100)).await;
    // At most the tick that was in progress when the first service gave up.
    assert!(ticks.load(SeqCst) <= then + 1, "the handler continued without a caller");

    // The second service waits beyond the deadline, so the last one is not called.
    let slow = hop(hop(last, ms(450)).await, ms(0)).await;
    assert_ne!(ask(slow).await, Some(StatusCode::OK));
    sleep(ms(300)).await;
    assert_eq!(calls.load(SeqCst), 1);
}

// ===== The error =====

async fn request_with_anyhow(
    client: StackClient<Body>,
    at: SocketAddr,
) -> anyhow::Result<StatusCode> {
    Ok(client.request(to(at)).await?.status())
}

async fn request_with_a_box(
    client: StackClient<Body>,
    at: SocketAddr,
) -> Result<StatusCode, Box<dyn std::error::Error>> {
    Ok(client.oneshot(to(at)).await?.status())
}

async fn unused_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

#[tokio::test]
async fn error_of_the_client_converts_and_states_what_failed() {
    let at = unused_address().await;
    let client = client(at, "breaker_failures = 3");

    // Three attempts open the circuit.
    let error = net::soon(client.request(to(at))).await.unwrap_err();
    assert_eq!(error.kind(), ClientErrorKind::Connect);
    assert!(error.rejected().is_none());
    assert_eq!(error.attempts().unwrap().made, 3);
    assert_eq!(
        error.to_string(),
        "call failed after 3 attempts, nothing was sent: connect_refused"
    );
    assert!(format!("{error:#}").contains("gave up after 3 attempts"), "{error:#}");
    assert_eq!(Outcome::of_error(&error).reason(), Reason::ConnectRefused);

    let error = net::soon(request_with_anyhow(client.clone(), at)).await.unwrap_err();
    assert_eq!(Rejected::find(&*error).unwrap().kind(), RejectedKind::Open);
    let error: ClientError = error.downcast().unwrap();
    assert_eq!(error.kind(), ClientErrorKind::Rejected);
    assert!(
        error.to_string().starts_with("call rejected, nothing was sent: circuit is open"),
        "{error}"
    );
    assert_eq!(Rejected::find(&error).unwrap().name(), Some("search"));
    assert_eq!(Rejected::find(&*error.into_inner()).unwrap().layer(), "circuit_breaker");

    let error = net::soon(request_with_a_box(client.clone(), at)).await.unwrap_err();
    assert_eq!(Rejected::find(&*error).unwrap().kind(), RejectedKind::Open);
    assert!(Attempts::find(&*error).is_some());
    assert!(error.source().is_some());
}

#[tokio::test]
async fn error_of_the_client_distinguishes_deadline_timeout_and_request() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let client = client(
        at,
        "timeout_head = '50ms'\nretry_attempts = 1\nconnect_timeout = '20ms'\nconnect_queue_wait = '20ms'",
    );
    let error = net::soon(client.request(to(at))).await.unwrap_err();
    assert_eq!(error.kind(), ClientErrorKind::Timeout);
    assert_eq!(error.to_string(), "call timed out: no response head in time");

    let mut request = to(at);
    request.extensions_mut().insert(Deadline::after(Duration::from_millis(5)));
    let error = net::soon(client.request(request)).await.unwrap_err();
    assert_eq!(error.kind(), ClientErrorKind::DeadlineExceeded);

    let client = buttress::client(&ClientConfig::default()).unwrap();
    let frames = stream::iter([Err::<Frame<Bytes>, _>("the file is gone")]);
    let upload = Request::post(format!("http://{at}/")).body(StreamBody::new(frames)).unwrap();
    let error = net::soon(client.request(upload)).await.unwrap_err();
    assert_eq!(error.kind(), ClientErrorKind::Request, "{error:#}");
}

#[tokio::test]
async fn request_that_cannot_be_sent_does_not_count_against_the_upstream() {
    let client = client(net::closed_address().await, "breaker_failures = 3");
    for _ in 0..3 {
        let relative = Request::get("/no-host").body(Body::default()).unwrap();
        let mut old = to(net::closed_address().await);
        *old.version_mut() = http::Version::HTTP_09;
        for request in [relative, old] {
            let error = net::soon(client.request(request)).await.unwrap_err();
            assert_eq!(error.kind(), ClientErrorKind::Request, "{error:#}");
            assert_eq!(Outcome::of_error(&error).reason(), Reason::Caller);
        }
    }
    assert_eq!(client.handle().snapshot().breaker, Some(CircuitState::Closed));
}

#[tokio::test]
async fn error_of_a_response_body_converts_and_states_what_failed() {
    let app = Router::new().route(
        "/",
        get(|| async {
            let first = stream::iter([Ok::<_, BoxError>(Bytes::from("hel"))]);
            axum::body::Body::from_stream(first.chain(stream::pending()))
        }),
    );
    let at = serve(app).await;
    let client = client(at, "timeout_response_idle = '50ms'");
    async fn read(client: StackClient<Body>, at: SocketAddr) -> anyhow::Result<Bytes> {
        Ok(client.request(to(at)).await?.into_body().collect().await?.to_bytes())
    }
    let error = net::soon(read(client, at)).await.unwrap_err();
    let error: ClientError = error.downcast().unwrap();
    assert_eq!(error.kind(), ClientErrorKind::Timeout);
    assert_eq!(error.to_string(), "call timed out: no frame of the response body in time");
}

#[tokio::test]
async fn respond_layer_around_the_client_finds_the_rejection() {
    let at = unused_address().await;
    let client = client(at, "breaker_failures = 3");
    net::soon(client.request(to(at))).await.unwrap_err();
    let gateway = ServiceBuilder::new().layer(RespondLayer::new()).service(client);
    let response = net::soon(gateway.oneshot(to(at))).await.unwrap();
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    assert!(response.extensions().get::<Attempts>().is_some());
}

// ===== HTTP/2 with all streams in use =====

/// Allows one stream per connection. Responds once the gate is open.
async fn one_stream_each(stage: &net::Stage) -> SocketAddr {
    let held = stage.clone();
    let app = Router::new().route("/", get(move || held.plain()));
    let (listener, at) = net::listener().await;
    tokio::spawn(async move {
        loop {
            let (tcp, _) = listener.accept().await.unwrap();
            let service = TowerToHyperService::new(app.clone());
            tokio::spawn(async move {
                let mut server = auto::Builder::new(TokioExecutor::new());
                server.http2().max_concurrent_streams(1);
                let _ = server.serve_connection(TokioIo::new(tcp), service).await;
            });
        }
    });
    at
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn client_opens_another_connection_for_a_stream_and_names_the_wait_beyond_the_cap() {
    let stage = net::Stage::default();
    let at = one_stream_each(&stage).await;
    let settings = "connect_http2_only = true\nconnect_max_per_host = 8\nconnect_queue_wait = '200ms'\n\
                    breaker_failures = 3";
    let client = client(at, settings);
    let handle = client.handle();
    let calls = |count| {
        let calls = (0..count).map(|_| tokio::spawn(client.clone().oneshot(to(at))));
        calls.collect::<Vec<_>>()
    };
    let held = calls(8);
    net::until(|| stage.inside.now() == 8).await;
    for call in calls(12) {
        let error = net::soon(call).await.unwrap().unwrap_err();
        assert_eq!(error.rejected().unwrap().kind(), RejectedKind::Saturated);
        assert_eq!(error.kind(), ClientErrorKind::Rejected);
    }
    let connections = handle.connections().unwrap().snapshot();
    assert_eq!((connections.open, connections.waits_for_stream > 0), (8, true), "{connections:?}");
    assert_eq!(
        (handle.snapshot().breaker, handle.snapshot().rejected),
        (Some(CircuitState::Closed), 12)
    );
    stage.open();
    for call in held {
        let response = net::soon(call).await.unwrap().unwrap();
        response.into_body().collect().await.unwrap();
    }
    assert_eq!(handle.snapshot().successes, 8);
}
