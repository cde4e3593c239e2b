//! Health over real sockets: a saturated server that still responds to probes, and a client that follows an upstream
//! which dies and returns.

use std::{future::Future, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, body::Body, routing::get};
use buttress::{
    ConcurrencyLimitLayer, Health, HealthProbeLayer, Rejected,
    classify::Http,
    health::{CheckState, Get, ProbeFailure, ProbeState},
    outcome::RejectedKind,
    respond::Respond,
};
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::{net::TcpListener, sync::Semaphore, task::JoinSet, time::timeout};
use tower::{Layer, ServiceBuilder, ServiceExt};

async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), future).await.expect("took too long")
}

fn client() -> Client<HttpConnector, Empty<Bytes>> {
    Client::builder(TokioExecutor::new()).build_http()
}

async fn ask(method: Method, addr: SocketAddr, path: &str) -> (u16, http::HeaderMap, String) {
    let request = Request::builder()
        .method(method)
        .uri(format!("http://{addr}{path}"))
        .body(Empty::new())
        .unwrap();
    let response = within(client().request(request)).await.unwrap();
    let (head, body) = response.into_parts();
    let body = within(body.collect()).await.unwrap().to_bytes();
    (head.status.as_u16(), head.headers, String::from_utf8(body.to_vec()).unwrap())
}

/// A server that can die: dropping it ends its runtime, with its listener and all its connections.
struct Mortal(Option<tokio::runtime::Runtime>);

impl Mortal {
    fn serve(listener: std::net::TcpListener, app: Router) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        runtime.spawn(async move {
            axum::serve(TcpListener::from_std(listener).unwrap(), app).await.unwrap();
        });
        Self(Some(runtime))
    }
}

impl Drop for Mortal {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

async fn listen(addr: SocketAddr) -> std::net::TcpListener {
    within(async {
        loop {
            match TcpListener::bind(addr).await {
                Ok(listener) => break listener.into_std().unwrap(),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    })
    .await
}

async fn serve(app: Router) -> (SocketAddr, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let mut server = JoinSet::new();
    server.spawn(async move { axum::serve(listener, app).await.unwrap() });
    (addr, server)
}

#[tokio::test]
async fn probes_receive_responses_while_the_server_is_full() {
    let health = Health::new();
    let search = health.reporter("search").unwrap();
    let limit = ConcurrencyLimitLayer::new(2).queue(100, Duration::from_secs(60)).respond();
    let full = limit.handle();
    let go = Arc::new(Semaphore::new(0));
    let gate = go.clone();
    let chat = async move || {
        let _go = gate.acquire().await;
        "done"
    };
    let app = Router::new()
        .route("/chat", get(chat))
        .route("/other", get(|| async { "other" }))
        .layer(limit)
        .layer(health.endpoints());
    let (addr, _server) = serve(app).await;

    let mut callers = JoinSet::new();
    for _ in 0..20 {
        callers.spawn(async move { ask(Method::GET, addr, "/chat").await.2 });
    }
    within(async {
        while full.snapshot().waiting < 18 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert_eq!(full.in_flight(), 2);

    let (status, headers, body) = ask(Method::GET, addr, "/livez").await;
    assert_eq!(
        (status, &*body, &headers["cache-control"]),
        (200, "ok", &"no-store".parse().unwrap())
    );
    assert_eq!(ask(Method::GET, addr, "/readyz").await.0, 503);
    search.pass();
    assert_eq!(ask(Method::GET, addr, "/readyz").await.2, "ok");
    assert_eq!(
        ask(Method::GET, addr, "/healthz?verbose").await.2,
        "[+]search ok\nhealthz check passed\n"
    );
    assert_eq!(ask(Method::GET, addr, "/readyz/search").await.0, 200);
    let (status, headers, body) = ask(Method::HEAD, addr, "/readyz").await;
    assert_eq!((status, &headers["content-length"], &*body), (200, &"2".parse().unwrap(), ""));

    go.add_permits(20);
    while let Some(said) = within(callers.join_next()).await {
        assert_eq!(said.unwrap(), "done");
    }
    assert_eq!(ask(Method::GET, addr, "/other").await.2, "other");
    assert_eq!(ask(Method::GET, addr, "/nowhere").await.0, 404);
    assert_eq!(full.in_flight(), 0);
}

/// Measures the time of a call of `/readyz`, over a connection that is reused.
async fn readyz(client: &Client<HttpConnector, Empty<Bytes>>, addr: SocketAddr) -> Duration {
    let began = tokio::time::Instant::now();
    let request = Request::get(format!("http://{addr}/readyz")).body(Empty::new()).unwrap();
    let response = within(client.request(request)).await.unwrap();
    assert_eq!(within(response.into_body().collect()).await.unwrap().to_bytes(), "ok");
    began.elapsed()
}

/// Returns the median and the 99th percentile.
fn spread(mut times: Vec<Duration>) -> (Duration, Duration) {
    times.sort_unstable();
    (times[times.len() / 2], times[times.len() * 99 / 100])
}

/// Sends probes in turn to a full and to an idle server, and compares their times.
#[tokio::test]
async fn a_probe_of_a_full_server_takes_no_longer_than_one_of_an_empty_one() {
    let app = |limit: ConcurrencyLimitLayer| {
        Router::new()
            .route("/", get(std::future::pending::<()>))
            .layer(limit.respond())
            .layer(Health::new().endpoints())
    };
    let limit = || ConcurrencyLimitLayer::new(2).queue(100, Duration::from_secs(60));
    let full = limit();
    let inside = full.handle();
    let (full, _full) = serve(app(full)).await;
    let (empty, _empty) = serve(app(limit())).await;
    let mut callers = JoinSet::new();
    for _ in 0..100 {
        callers.spawn(async move {
            let request = Request::get(format!("http://{full}/")).body(Empty::new()).unwrap();
            client().request(request).await.map(drop)
        });
    }
    within(async {
        while inside.snapshot().waiting < 98 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let client = client();
    let (mut of_full, mut of_empty) = (Vec::new(), Vec::new());
    for _ in 0..300 {
        of_full.push(readyz(&client, full).await);
        of_empty.push(readyz(&client, empty).await);
    }
    let ((of_full, most_full), (of_empty, most_empty)) = (spread(of_full), spread(of_empty));
    println!("a probe of a full server: median {of_full:?}, 99 of 100 within {most_full:?}");
    println!("a probe of an idle server: median {of_empty:?}, 99 of 100 within {most_empty:?}");
    assert!(of_full < 3 * of_empty, "{of_full:?} and {of_empty:?}");
    assert_eq!(inside.snapshot().waiting, 98);
}

#[tokio::test]
async fn health_endpoints_are_served_on_a_separate_port() {
    let health = Health::new();
    let (addr, _server) = serve(Router::new().fallback_service(health.service())).await;
    assert_eq!(ask(Method::GET, addr, "/readyz").await.2, "ok");
    assert_eq!(ask(Method::POST, addr, "/readyz").await.0, 405);
    assert_eq!(ask(Method::GET, addr, "/chat").await.0, 404);
}

fn failing_self_test() -> HealthProbeLayer<Get<Body>, Http, Respond> {
    // A router accepts any body, so the type has to be stated.
    HealthProbeLayer::get::<Body>("/self-test")
        .every(Duration::from_secs(3600))
        .thresholds(1, 1)
        .respond()
}

fn sick() -> Router {
    Router::new()
        .route("/self-test", get(async || StatusCode::INTERNAL_SERVER_ERROR))
        .route("/", get(async || "well"))
}

#[tokio::test]
async fn gate_of_a_whole_router_rejects_calls_while_it_is_down() {
    let probe = failing_self_test();
    let state = probe.handle();
    let app = probe.layer(sick());
    assert_eq!(within(state.changed()).await, ProbeState::Down);
    let why = ProbeFailure::Status(StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(state.snapshot().last.unwrap().result, Err(why));

    let (addr, _server) = serve(Router::new().fallback_service(app)).await;
    let (status, headers, _) = ask(Method::GET, addr, "/").await;
    assert_eq!((status, headers.contains_key("retry-after")), (503, true));
    assert_eq!((state.snapshot().probes, state.snapshot().rejected), (1, 1));
}

#[tokio::test]
async fn all_routes_have_one_gate_however_axum_applies_the_layer() {
    let probe = failing_self_test();
    let state = probe.handle();
    // axum decides which of the wrapped services is probed. The probe fails in either case.
    let app = sick().route("/more", get(async || "well").layer(probe.clone())).layer(probe);
    // A raw router is a service, which may create its routes anew for each request.
    let request = Request::get("/more").body(Body::empty()).unwrap();
    within(app.clone().oneshot(request)).await.unwrap();
    if state.state() == ProbeState::Unknown {
        within(state.changed()).await;
    }
    assert_eq!(state.state(), ProbeState::Down);
    let before = state.snapshot().rejected;
    let (addr, _server) = serve(app.clone()).await;
    for path in ["/", "/more", "/nowhere"] {
        assert_eq!(ask(Method::GET, addr, path).await.0, 503);
        let request = Request::get(path).body(Body::empty()).unwrap();
        assert_eq!(within(app.clone().oneshot(request)).await.unwrap().status(), 503);
    }
    assert_eq!((state.snapshot().probes, state.snapshot().rejected - before), (1, 6));
}

#[tokio::test]
async fn traffic_and_readiness_follow_an_upstream_that_dies_and_returns() {
    let upstream = || {
        Router::new()
            .route("/healthz", get(|| async { "well" }))
            .route("/search", get(|| async { "found" }))
    };
    let listener = listen(([127, 0, 0, 1], 0).into()).await;
    let addr = listener.local_addr().unwrap();
    let server = Mortal::serve(listener, upstream());
    let health = Health::new();
    let probe = HealthProbeLayer::get(&format!("http://{addr}/healthz"))
        .every(Duration::from_millis(20))
        .timeout(Duration::from_secs(5))
        .thresholds(2, 2)
        .report_to(&health, "search");
    let state = probe.handle();
    let search = ServiceBuilder::new().layer(probe).service(client());
    let call = async || {
        let request = Request::get(format!("http://{addr}/search")).body(Empty::new()).unwrap();
        let response = within(search.clone().oneshot(request)).await?;
        let body = within(response.into_body().collect()).await?.to_bytes();
        Ok::<_, buttress::BoxError>(body)
    };

    assert_eq!(within(state.changed()).await, ProbeState::Up);
    assert_eq!(call().await.unwrap(), "found");
    assert!(health.is_ready());

    drop(server);
    assert_eq!(within(state.changed()).await, ProbeState::Down);
    let error = call().await.unwrap_err();
    assert_eq!(Rejected::find(&*error).unwrap().kind(), RejectedKind::Unhealthy);
    assert_eq!(health.check("search"), Some(CheckState::Fail));

    let _server = Mortal::serve(listen(addr).await, upstream());
    assert_eq!(within(state.changed()).await, ProbeState::Up);
    assert_eq!(call().await.unwrap(), "found");
    assert!(health.is_ready());
    let snapshot = state.snapshot();
    assert!(snapshot.rejected == 1 && snapshot.probes >= 5, "{snapshot:?}");
}
