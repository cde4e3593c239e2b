//! The live page over HTTP: its access rules, headers, document, streams and controls.

use std::{
    collections::HashSet,
    convert::Infallible,
    net::SocketAddr,
    task::{Context, Poll},
};

use axum::extract::ConnectInfo;
use buttress::{
    CircuitBreakerLayer, Health, HealthProbeLayer, Lifecycle, Trip,
    breaker::{CircuitState, OpenDuration},
    endpoint::EndpointBody,
    observe::{
        Registry,
        dashboard::{Dashboard, DashboardEndpoint, DashboardLayer, DashboardService, PeerAddr},
    },
    permit::TrackedBody,
};
use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, request::Builder};
use http_body_util::{BodyExt, Empty, Full};
use serde_json::Value;
use tokio::time::advance;
use tower::{Layer, Service, ServiceExt, service_fn};

use crate::support::{ms, secs, settle, tracing_events::EventLog};

type Body = Empty<Bytes>;

fn get(path: &str) -> Builder {
    Request::get(path).header("host", "localhost:8080")
}

fn post(path: &str) -> Builder {
    Request::post(path).header("host", "localhost:8080")
}

fn peer(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

/// A service that accepts every request for an allowed host.
fn open(registry: &Registry) -> DashboardService {
    registry.dashboard().guard(|_| true).service().unwrap()
}

async fn send<S, B>(service: &S, request: Builder) -> Response<B>
where
    S: Service<Request<Body>, Response = Response<B>, Error = Infallible> + Clone,
{
    service.clone().oneshot(request.body(Body::new()).unwrap()).await.unwrap()
}

async fn status_of<S, B>(service: &S, request: Builder) -> u16
where
    S: Service<Request<Body>, Response = Response<B>, Error = Infallible> + Clone,
{
    send(service, request).await.status().as_u16()
}

async fn text_of<B>(response: Response<B>) -> String
where
    B: http_body::Body<Data = Bytes>,
    B::Error: std::fmt::Debug,
{
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    String::from_utf8(bytes.to_vec()).unwrap()
}

async fn status_json(service: &DashboardService) -> Value {
    let response = send(service, get("/buttress/status.json")).await;
    assert_eq!(response.headers()["content-type"], "application/json");
    serde_json::from_str(&text_of(response).await).unwrap()
}

fn search() -> (Registry, CircuitBreakerLayer) {
    breaker("search")
}

fn breaker(name: &str) -> (Registry, CircuitBreakerLayer) {
    let layer = CircuitBreakerLayer::new(Trip::consecutive(5))
        .open_for(OpenDuration::fixed(secs(30)))
        .name(name);
    let registry = Registry::new();
    registry.watch(&layer.handle()).unwrap();
    (registry, layer)
}

// ===== Mounting =====

#[test]
fn page_without_a_choice_of_access_is_an_error() {
    let error = Registry::new().dashboard().title("checkout").layer().unwrap_err();
    assert_eq!(error.field, "dashboard.access");
    assert!(error.to_string().contains("call `loopback()`, or `guard(…)`"), "{error}");
    let controls = Registry::new().dashboard().controls(|_| Some("ops")).service();
    assert_eq!(controls.unwrap_err().field, "dashboard.access");
}

#[test]
fn host_with_scheme_or_port_is_an_error() {
    for host in ["http://ops.example", "ops.example:80", "", "*"] {
        let error = Registry::new().dashboard().loopback().host(host).layer().unwrap_err();
        assert_eq!(error.field, "dashboard.host", "{host}");
    }
    let page = Registry::new().dashboard().loopback().host("ops.example").host("[fd00::1]");
    assert!(page.layer().is_ok());
}

/// A service that is never ready.
#[derive(Clone)]
struct NeverReady;

impl Service<Request<Body>> for NeverReady {
    type Response = Response<Full<Bytes>>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Pending
    }

    fn call(&mut self, _: Request<Body>) -> Self::Future {
        unreachable!("it is never ready")
    }
}

#[tokio::test(start_paused = true)]
async fn layer_responds_in_front_of_a_service_that_is_not_ready() {
    let layer = Registry::new().dashboard().guard(|_| true).layer().unwrap();
    let service = layer.layer(NeverReady);
    let response = send(&service, get("/buttress/")).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert!(text_of(response).await.starts_with("<!doctype html>"));
    let mut events = send(&service, get("/buttress/events")).await.into_body();
    let frame = events.frame().await.unwrap().unwrap().into_data().unwrap();
    assert!(frame.starts_with(b"retry: 1000\n\nevent: snapshot\n"));
}

#[tokio::test(start_paused = true)]
async fn other_paths_pass_through() {
    let inner = service_fn(async |_: Request<Body>| {
        Ok::<_, Infallible>(Response::new(Full::<Bytes>::from("inner")))
    });
    let service = Registry::new().dashboard().loopback().layer().unwrap().layer(inner);
    for path in ["/", "/buttressed", "/x/buttress/", "/metrics"] {
        let request = Request::post(path).header("host", "evil.example");
        assert_eq!(text_of(send(&service, request).await).await, "inner", "{path}");
    }
    assert_eq!(status_of(&service, Request::post("/buttress/x")).await, 421);
}

// ===== Headers and methods =====

#[tokio::test(start_paused = true)]
async fn page_has_a_policy_with_a_fresh_nonce() {
    let service = open(&Registry::new());
    let mut nonces = HashSet::new();
    for _ in 0..3 {
        let response = send(&service, get("/buttress/")).await;
        let headers = response.headers().clone();
        assert_eq!(headers["content-type"], "text/html; charset=utf-8");
        let policy = headers["content-security-policy"].to_str().unwrap().to_owned();
        let start = policy.find("'nonce-").unwrap() + 7;
        let nonce = policy[start..start + 32].to_owned();
        assert_eq!(
            policy,
            format!(
                "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; \
                 connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            )
        );
        let page = text_of(response).await;
        assert_eq!(page.matches(&format!(" nonce=\"{nonce}\">")).count(), 2);
        assert!(!page.contains("{nonce}"));
        assert!(nonces.insert(nonce));
    }
}

fn assert_safe(headers: &HeaderMap) {
    assert_eq!(headers["cache-control"], "no-store");
    assert_eq!(headers["x-content-type-options"], "nosniff");
    assert_eq!(headers["referrer-policy"], "no-referrer");
    assert_eq!(headers["cross-origin-resource-policy"], "same-origin");
    let policy = headers["content-security-policy"].to_str().unwrap();
    assert!(policy.starts_with("default-src 'none'; "), "{policy}");
    let cors = headers.keys().find(|name| name.as_str().starts_with("access-control"));
    assert_eq!(cors, None);
}

#[tokio::test(start_paused = true)]
async fn all_responses_have_safe_headers_and_permit_no_other_origin() {
    let service = open(&Registry::new());
    for (path, status) in [
        ("/buttress", 308),
        ("/buttress/", 200),
        ("/buttress/status.json", 200),
        ("/buttress/events", 403),
        ("/buttress/circuits/a/open", 405),
        ("/buttress/circuits/a/explode", 404),
        ("/buttress/../etc/passwd", 404),
        ("/buttress//", 404),
        ("/buttress/%00", 404),
    ] {
        let request = get(path).header("origin", "http://evil.example");
        let response = send(&service, request).await;
        assert_eq!(response.status(), status, "{path}");
        assert_safe(response.headers());
    }
    let foreign = Request::get("/buttress/").header("host", "evil.example");
    assert_safe(send(&service, foreign).await.headers());
    let redirect = send(&service, get("/buttress")).await;
    assert_eq!(redirect.headers()["location"], "buttress/");
    let events = send(&service, get("/buttress/events")).await;
    assert_eq!(events.headers()["content-type"], "text/event-stream");
    assert_eq!(events.headers()["x-accel-buffering"], "no");
    assert_eq!(events.headers().get("content-length"), None);
}

#[tokio::test(start_paused = true)]
async fn paths_that_are_read_accept_get_and_head_only() {
    let service = open(&Registry::new());
    for path in ["/buttress", "/buttress/", "/buttress/status.json", "/buttress/events"] {
        for method in ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"] {
            let request = get(path).method(method);
            let response = send(&service, request).await;
            assert_eq!(response.status(), 405, "{method} {path}");
            assert_eq!(response.headers()["allow"], "GET, HEAD");
        }
    }
    let get_page = send(&service, get("/buttress/")).await;
    let head = send(&service, get("/buttress/").method("HEAD")).await;
    assert_eq!(head.headers()["content-length"], get_page.headers()["content-length"]);
    assert_eq!(text_of(head).await, "");
    let head = send(&service, get("/buttress/events").method("HEAD")).await;
    assert_eq!(head.status(), 200);
    assert_eq!(text_of(head).await, "");
}

// ===== Access =====

#[tokio::test(start_paused = true)]
async fn foreign_host_is_misdirected() {
    let registry = Registry::new();
    let service = registry.dashboard().guard(|_| true).host("ops.example").service().unwrap();
    let long = "a".repeat(5000);
    for (host, status) in [
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("127.0.0.1:8080", 200),
        ("[::1]", 200),
        ("[::1]:9", 200),
        ("ops.example", 200),
        ("ops.example:8443", 200),
        ("evil.example", 421),
        ("evil.example:8080", 421),
        ("localhost.evil.example", 421),
        ("evil-localhost", 421),
        ("localhost@evil.example", 421),
        ("evil@localhost", 421),
        ("127.0.0.1.evil.example", 421),
        ("127.0.0.2", 421),
        ("0.0.0.0", 421),
        ("[::]", 421),
        ("[::1", 421),
        ("[::1]evil", 421),
        ("localhost:", 421),
        ("localhost:80:80", 421),
        ("localhost, evil.example", 421),
        ("localhost\u{e4}", 421),
        ("", 421),
        (&*long, 421),
    ] {
        let request = Request::get("/buttress/").header("host", host);
        assert_eq!(status_of(&service, request).await, status, "{host}");
    }
    assert_eq!(status_of(&service, Request::get("/buttress/")).await, 421);
    let two = get("/buttress/").header("host", "evil.example");
    assert_eq!(status_of(&service, two).await, 421);
    // The form of HTTP/2, and of requests to a proxy.
    assert_eq!(status_of(&service, Request::get("http://localhost:1/buttress/")).await, 200);
    assert_eq!(status_of(&service, Request::get("http://evil.example/buttress/")).await, 421);
    assert_eq!(status_of(&service, get("http://evil.example/buttress/")).await, 421);
}

#[tokio::test(start_paused = true)]
async fn loopback_serves_peers_of_this_machine_only() {
    let service = Registry::new().dashboard().loopback().service().unwrap();
    for (address, status) in [
        ("127.0.0.1:5000", 200),
        ("127.8.8.8:5000", 200),
        ("[::1]:5000", 200),
        ("[::ffff:127.0.0.1]:5000", 200),
        ("10.0.0.7:5000", 403),
        ("[fd00::7]:5000", 403),
        ("[::ffff:10.0.0.7]:5000", 403),
        ("0.0.0.0:5000", 403),
    ] {
        let with_own = get("/buttress/").extension(PeerAddr(peer(address)));
        assert_eq!(status_of(&service, with_own).await, status, "{address}");
        let with_axum = get("/buttress/").extension(ConnectInfo(peer(address)));
        assert_eq!(status_of(&service, with_axum).await, status, "{address}");
    }
    let unknown = send(&service, get("/buttress/")).await;
    assert_eq!(unknown.status(), 403);
    assert!(text_of(unknown).await.contains("PeerAddr"));
    let contradiction = get("/buttress/")
        .extension(PeerAddr(peer("127.0.0.1:1")))
        .extension(ConnectInfo(peer("10.0.0.7:1")));
    assert_eq!(status_of(&service, contradiction).await, 403);
}

#[tokio::test(start_paused = true)]
async fn loopback_declines_forwarded_requests() {
    let service = Registry::new().dashboard().loopback().service().unwrap();
    let local = || get("/buttress/").extension(PeerAddr(peer("127.0.0.1:1")));
    for header in [
        "forwarded",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-proto",
        "x-forwarded-anything",
        "x-real-ip",
        "via",
        "true-client-ip",
        "x-forwarded",
        "forwarded-for",
        "x-original-forwarded-for",
        "x-original-host",
        "x-cluster-client-ip",
        "x-envoy-external-address",
        "fastly-client-ip",
        "fly-client-ip",
        "cf-connecting-ipv6",
        "cdn-loop",
    ] {
        assert_eq!(status_of(&service, local().header(header, "x")).await, 403, "{header}");
    }
    assert_eq!(status_of(&service, local().header("x-request-id", "7")).await, 200);
}

#[tokio::test(start_paused = true)]
async fn guard_decides_and_its_panic_declines() {
    let guard = |parts: &http::request::Parts| {
        let token = parts.headers.get("x-token").map(|token| token.as_bytes());
        assert_ne!(token, Some(&b"panic"[..]), "on purpose");
        token == Some(b"right")
    };
    let service = Registry::new().dashboard().guard(guard).service().unwrap();
    for path in ["/buttress/", "/buttress/status.json", "/buttress/events", "/buttress/other"] {
        assert_eq!(status_of(&service, get(path)).await, 403);
        assert_eq!(status_of(&service, get(path).header("x-token", "wrong")).await, 403);
        assert_eq!(status_of(&service, get(path).header("x-token", "panic")).await, 403);
        assert_ne!(status_of(&service, get(path).header("x-token", "right")).await, 403);
    }
    let both = Registry::new().dashboard().guard(guard).loopback().service().unwrap();
    let right = || get("/buttress/").header("x-token", "right");
    assert_eq!(status_of(&both, right()).await, 403);
    assert_eq!(status_of(&both, right().extension(PeerAddr(peer("[::1]:1")))).await, 200);
}

#[tokio::test(start_paused = true)]
async fn guard_does_not_run_for_a_foreign_host() {
    let service = Registry::new().dashboard().guard(|_| panic!("not called")).service().unwrap();
    assert_eq!(status_of(&service, Request::get("/buttress/").header("host", "evil")).await, 421);
}

// ===== Document =====

#[tokio::test(start_paused = true)]
async fn document_has_state_reason_and_limits() {
    let (registry, layer) = search();
    let service = registry.dashboard().guard(|_| true).title("checkout").service().unwrap();
    let status = status_json(&service).await;
    assert_eq!(status["schema"], 1);
    assert_eq!(status["healthy"], true);
    assert_eq!(status["process"]["title"], "checkout");
    assert_eq!(status["layers"][0]["controls"].as_array().unwrap().len(), 0);
    for _ in 0..5 {
        layer.handle().record(buttress::Outcome::failure());
    }
    let status = status_json(&service).await;
    assert_eq!(status["healthy"], false);
    let layer = &status["layers"][0];
    assert_eq!(layer["id"], "circuit_breaker/search");
    assert_eq!((&layer["severity"], &layer["state"]), (&"failing".into(), &"open".into()));
    assert_eq!(layer["reason"], "consecutive");
    let left = layer["ends_at"].as_u64().unwrap() - status["at"].as_u64().unwrap();
    assert_eq!(left, 30_000);
    assert_eq!(status["decisions"][0]["event"], "circuit opened");
}

#[tokio::test(start_paused = true)]
async fn long_title_is_truncated() {
    let title = "ä".repeat(100);
    let service = Registry::new().dashboard().guard(|_| true).title(title).service().unwrap();
    assert_eq!(status_json(&service).await["process"]["title"], "ä".repeat(64));
}

const HOSTILE: [&str; 5] = [
    "</script><img src=x onerror=alert(1)>",
    "a\"},{\"id\":\"x",
    "a\n\nevent: tick\ndata: {}",
    "\u{202e}\u{2028}%2f/../..",
    "\\u003c\u{0}\r",
];

#[tokio::test(start_paused = true)]
async fn hostile_names_stay_texts() {
    for name in HOSTILE {
        let (registry, layer) = breaker(name);
        let service = registry
            .dashboard()
            .guard(|_| true)
            .controls(|_| Some("\n</b>evil"))
            .title(name)
            .service()
            .unwrap();
        let status = status_json(&service).await;
        // JSON has no control characters: they are spaces.
        let shown: String = name.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        assert_eq!(status["layers"].as_array().unwrap().len(), 1);
        assert_eq!(status["layers"][0]["name"], *shown);
        layer.handle().force_open();
        let mut events = Events::open(&service, get("/buttress/events")).await;
        let (event, _, data) = events.next().await;
        assert_eq!(event, "snapshot");
        assert_eq!(data["layers"][0]["name"], *shown);
        assert_eq!(data["decisions"][0]["name"], *shown);
        let page = text_of(send(&service, get("/buttress/")).await).await;
        assert!(!page.contains(name));
        // The name as `encodeURIComponent` encodes it.
        let encoded: String = name.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let close = post(&format!("/buttress/circuits/{encoded}/close"));
        let response = send(&service, close.header("x-buttress-confirm", encoded)).await;
        assert_eq!(response.status(), 200);
        assert_eq!(layer.handle().state(), CircuitState::ForcedClosed);
        let status = status_json(&service).await;
        let whys = status["decisions"].as_array().unwrap().iter().map(|one| &one["why"]);
        assert_eq!(whys.filter(|why| why.as_str().unwrap().ends_with("by </b>evil")).count(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn texts_of_errors_are_withheld_by_default() {
    let registry = Registry::new();
    let probe = HealthProbeLayer::get("/healthz").jitter(0.0).thresholds(1, 1).name("db");
    registry.watch(&probe.handle()).unwrap();
    let _probed = probe.layer(service_fn(async |_: Request<Full<Bytes>>| {
        Err::<Response<Full<Bytes>>, _>(std::io::Error::other("no route to db-7.internal"))
    }));
    settle().await;
    let withheld = text_of(send(&open(&registry), get("/buttress/status.json")).await).await;
    assert!(withheld.contains("\"down\""), "{withheld}");
    assert!(!withheld.contains("db-7"), "{withheld}");
    let with_reasons = registry.dashboard().guard(|_| true).with_reasons().service().unwrap();
    let shown = text_of(send(&with_reasons, get("/buttress/status.json")).await).await;
    assert!(shown.contains("db-7"), "{shown}");
}

// ===== Streams =====

/// Reads a stream event by event.
struct Events<B> {
    body: std::pin::Pin<Box<B>>,
    text: String,
    pings: usize,
}

impl<B> Events<B>
where
    B: http_body::Body<Data = Bytes, Error = Infallible>,
{
    async fn open<S>(service: &S, request: Builder) -> Self
    where
        S: Service<Request<Body>, Response = Response<B>, Error = Infallible> + Clone,
    {
        let response = send(service, request).await;
        assert_eq!(response.status(), StatusCode::OK);
        Self { body: Box::pin(response.into_body()), text: String::new(), pings: 0 }
    }

    /// Returns the name, the `id` and the data of the next event. Waits for it at most an hour.
    async fn next(&mut self) -> (String, Option<u64>, Value) {
        loop {
            while let Some(end) = self.text.find("\n\n") {
                let block: String = self.text.drain(..end + 2).collect();
                let (mut event, mut id, mut data) = (None, None, None);
                for line in block.trim_end().lines() {
                    match line.split_once(": ").unwrap() {
                        ("event", name) => event = Some(name.to_owned()),
                        ("id", number) => id = Some(number.parse().unwrap()),
                        ("data", json) => data = Some(serde_json::from_str(json).unwrap()),
                        ("", "ping") => self.pings += 1,
                        ("retry", "1000") => {}
                        other => panic!("{other:?}"),
                    }
                }
                if let Some(event) = event {
                    return (event, id, data.expect("data"));
                }
            }
            let frame = tokio::time::timeout(secs(3600), self.body.frame()).await.expect("a frame");
            let data = frame.expect("no end").unwrap().into_data().unwrap();
            self.text.push_str(std::str::from_utf8(&data).unwrap());
        }
    }

    async fn has_ended(&mut self) -> bool {
        tokio::time::timeout(ms(1), self.body.frame()).await.is_ok_and(|frame| frame.is_none())
    }
}

#[tokio::test(start_paused = true)]
async fn stream_begins_with_a_snapshot_and_ticks_once_a_second() {
    let (registry, layer) = search();
    let (_, other) = breaker("other");
    registry.watch(&other.handle()).unwrap();
    tokio::spawn(registry.run());
    settle().await;
    let start = tokio::time::Instant::now();
    let mut events = Events::open(&open(&registry), get("/buttress/events")).await;
    let (event, id, data) = events.next().await;
    assert_eq!((&*event, id, start.elapsed()), ("snapshot", None, ms(0)));
    assert_eq!(data["layers"].as_array().unwrap().len(), 2);
    assert_eq!(data["schema"], 1);
    for second in 1..=20 {
        let (event, _, data) = events.next().await;
        assert_eq!(event, "tick");
        assert_eq!(start.elapsed().as_secs(), second);
        assert_eq!(
            data["order"],
            serde_json::json!(["circuit_breaker/other", "circuit_breaker/search"])
        );
    }
    assert_eq!(events.pings, 1);

    layer.handle().force_open();
    let (event, id, decision) = events.next().await;
    assert_eq!((&*event, id), ("decision", Some(1)));
    assert_eq!((&decision["event"], &decision["id"]), (&"circuit forced".into(), &1.into()));
    let (event, _, tick) = events.next().await;
    assert_eq!(event, "tick");
    // The most severe layer is first, and only the layer that has changed is sent.
    assert_eq!(tick["order"][0], "circuit_breaker/search");
    let changed = tick["layers"].as_array().unwrap();
    assert_eq!(changed.len(), 1, "{tick}");
    assert_eq!(
        (&changed[0]["name"], &changed[0]["state"]),
        (&"search".into(), &"forced_open".into())
    );
    for track in changed[0]["tracks"].as_array().unwrap() {
        assert_eq!(track["values"].as_array().unwrap().len(), 1);
    }
    for _ in 0..40 {
        assert_eq!(events.next().await.0, "tick");
    }
    assert_eq!(events.pings, 4);
}

#[tokio::test(start_paused = true)]
async fn streams_of_one_page_share_the_ticks() {
    let (registry, layer) = search();
    let service = open(&registry);
    let mut first = Events::open(&service, get("/buttress/events")).await;
    first.next().await;
    advance(ms(400)).await;
    let mut second = Events::open(&service, get("/buttress/events")).await;
    second.next().await;
    layer.handle().force_open();
    for _ in 0..3 {
        let (of_first, of_second) = tokio::join!(first.next(), second.next());
        assert_eq!(of_first, of_second);
    }
}

#[tokio::test(start_paused = true)]
async fn last_event_id_continues_the_decisions() {
    let (registry, layer) = search();
    for _ in 0..3 {
        layer.handle().force_open();
        layer.handle().reset();
    }
    let service = open(&registry);
    for (last, expected) in [("2", 3..7), ("6", 7..7), ("900", 1..7), ("0", 1..7)] {
        let request = get("/buttress/events").header("last-event-id", last);
        let mut events = Events::open(&service, request).await;
        let (event, id, _) = events.next().await;
        assert_eq!((&*event, id), ("snapshot", Some(6)), "{last}");
        for id in expected {
            let (event, found, _) = events.next().await;
            assert_eq!((&*event, found), ("decision", Some(id)), "{last}");
        }
        assert_eq!(events.next().await.0, "tick", "{last}");
    }
    for last in ["", "x", "-1", "18446744073709551615", "99999999999999999999"] {
        let request = get("/buttress/events").header("last-event-id", last);
        let mut events = Events::open(&service, request).await;
        assert_eq!(events.next().await.0, "snapshot");
        assert_eq!(events.next().await.0, "tick", "{last}");
    }
}

#[tokio::test(start_paused = true)]
async fn slow_reader_skips_to_the_newest_sample() {
    let (registry, layer) = search();
    let service = open(&registry);
    let mut slow = Events::open(&service, get("/buttress/events")).await;
    let mut fast = Events::open(&service, get("/buttress/events")).await;
    assert_eq!(slow.next().await.0, "snapshot");
    assert_eq!(fast.next().await.0, "snapshot");
    for _ in 0..30 {
        assert_eq!(fast.next().await.0, "tick");
    }
    layer.handle().force_open();
    assert_eq!(fast.next().await.0, "decision");
    assert_eq!(fast.next().await.0, "tick");
    // One frame contains all data that the reader has missed, and nothing else is queued.
    let frame = slow.body.frame().await.unwrap().unwrap().into_data().unwrap();
    let frame = std::str::from_utf8(&frame).unwrap();
    assert_eq!(frame.matches("event: decision").count(), 1);
    assert_eq!(frame.matches("event: snapshot").count(), 1);
    assert_eq!(frame.matches("event: tick").count(), 0);
    let next = tokio::time::timeout(ms(10), slow.body.frame()).await;
    assert!(next.is_err(), "{next:?}");
    assert_eq!(slow.next().await.0, "tick");
}

#[tokio::test(start_paused = true)]
async fn seventeenth_stream_is_declined_until_a_stream_is_dropped() {
    let (registry, _layer) = search();
    // Both pages of a registry share its streams.
    let services = [open(&registry), open(&registry)];
    let mut streams = Vec::new();
    for nth in 0..16 {
        streams.push(Events::open(&services[nth % 2], get("/buttress/events")).await);
    }
    let declined = send(&services[0], get("/buttress/events")).await;
    assert_eq!(declined.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(declined.headers()["retry-after"], "15");
    assert_safe(declined.headers());
    assert_eq!(status_json(&services[0]).await["schema"], 1);
    // A response to `HEAD` has no stream.
    drop(streams.pop());
    assert_eq!(status_of(&services[1], get("/buttress/events").method("HEAD")).await, 200);
    streams.push(Events::open(&services[1], get("/buttress/events")).await);
    assert_eq!(status_of(&services[1], get("/buttress/events")).await, 503);
    streams.clear();
    for _ in 0..16 {
        streams.push(Events::open(&services[0], get("/buttress/events")).await);
    }
    // Other registries have streams of their own.
    assert_eq!(status_of(&open(&Registry::new()), get("/buttress/events")).await, 200);
}

#[tokio::test(start_paused = true)]
async fn pages_of_other_sites_cannot_open_streams() {
    let service = open(&Registry::new());
    for (site, status) in
        [("same-origin", 200), ("none", 200), ("same-site", 403), ("cross-site", 403)]
    {
        let request = get("/buttress/events").header("sec-fetch-site", site);
        assert_eq!(status_of(&service, request).await, status, "{site}");
    }
}

#[tokio::test(start_paused = true)]
async fn origin_of_another_site_is_declined_if_the_browser_states_no_fetch_site() {
    // Browsers send `sec-fetch-site` over HTTPS and to loopback only, and `origin` always.
    let (registry, layer) = search();
    let service = controlled(&registry).host("10.0.0.7").service().unwrap();
    let at = |builder: Builder| builder.header("host", "10.0.0.7:8080");
    for (origin, status) in [
        ("http://10.0.0.7:8080", 200),
        ("HTTP://10.0.0.7:8080", 200),
        ("http://10.0.0.7", 403),
        ("http://10.0.0.7:9000", 403),
        ("http://evil.example", 403),
        ("http://evil.example:8080", 403),
        ("http://10.0.0.7:8080.evil.example", 403),
        ("10.0.0.7:8080", 403),
        ("null", 403),
        ("", 403),
    ] {
        let events = at(Request::get("/buttress/events")).header("origin", origin);
        assert_eq!(status_of(&service, events).await, status, "{origin}");
        let control = at(Request::post("/buttress/circuits/search/open"))
            .header("x-buttress-confirm", "search")
            .header("x-person", "alice")
            .header("origin", origin);
        assert_eq!(status_of(&service, control).await, status, "{origin}");
        let is_forced = layer.handle().state() == CircuitState::ForcedOpen;
        assert_eq!(is_forced, status == 200, "{origin}");
        layer.handle().reset();
    }
    // A browser that states the site compares the origins itself. A proxy may have changed the host.
    let proxied = at(Request::get("/buttress/events"))
        .header("origin", "https://ops.example")
        .header("sec-fetch-site", "same-origin");
    assert_eq!(status_of(&service, proxied).await, 200);
    let two = at(Request::get("/buttress/events"))
        .header("origin", "http://10.0.0.7:8080")
        .header("origin", "http://evil.example");
    assert_eq!(status_of(&service, two).await, 403);
}

#[tokio::test(start_paused = true)]
async fn streams_end_when_the_process_stops() {
    let (registry, health) = (Registry::new(), Health::new());
    let service = open(&registry);
    let mut early = Events::open(&service, get("/buttress/events")).await;
    early.next().await;
    let lifecycle = Lifecycle::without_signals(&health).unwrap().drain_delay(secs(5));
    registry.watch(&lifecycle).unwrap();
    let mut late = Events::open(&service, get("/buttress/events")).await;
    late.next().await;
    lifecycle.ready();
    lifecycle.drain();
    // While the process is draining, the page shows the drain.
    let phase = loop {
        let (_, _, data) = late.next().await;
        if data["process"]["phase"] != Value::Null {
            break data["process"]["phase"].clone();
        }
    };
    assert_eq!(phase, "draining");
    early.next().await;
    lifecycle.skip_delay();
    assert!(late.has_ended().await);
    assert!(early.has_ended().await);
    assert!(late.has_ended().await, "a read after the end");
    assert_eq!(status_of(&service, get("/buttress/events")).await, 503);
    assert_eq!(status_json(&service).await["process"]["phase"], "stopping");
}

#[tokio::test(start_paused = true)]
async fn stream_does_not_keep_layers_and_lifecycle_alive() {
    let (registry, layer) = search();
    let lifecycle = Lifecycle::without_signals(&Health::new()).unwrap();
    registry.watch(&lifecycle).unwrap();
    let mut events = Events::open(&open(&registry), get("/buttress/events")).await;
    events.next().await;
    drop((layer, lifecycle));
    let (event, _, tick) = events.next().await;
    assert_eq!((&*event, &tick["order"]), ("tick", &serde_json::json!([])));
    assert_eq!(tick["verdict"], "No layer is watched");
    assert_eq!(events.next().await.0, "tick");
}

// ===== Controls =====

fn controlled(registry: &Registry) -> Dashboard {
    registry.dashboard().guard(|_| true).controls(|parts| {
        let name = parts.headers.get("x-person")?.to_str().ok()?.to_owned();
        assert_ne!(name, "panic", "on purpose");
        Some(name)
    })
}

fn control(action: &str) -> Builder {
    post(&format!("/buttress/circuits/search/{action}"))
        .header("x-buttress-confirm", "search")
        .header("x-person", "alice")
}

#[tokio::test(start_paused = true)]
async fn control_without_controls_is_not_allowed() {
    let (registry, layer) = search();
    for action in ["open", "close", "reset"] {
        let response = send(&open(&registry), control(action)).await;
        assert_eq!(
            (response.status(), &response.headers()["allow"]),
            (StatusCode::METHOD_NOT_ALLOWED, &"".parse().unwrap())
        );
    }
    assert_eq!(layer.handle().state(), CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn controls_force_and_reset_the_circuit() {
    let (registry, layer) = search();
    let service = controlled(&registry).service().unwrap();
    let controls = &status_json(&service).await["layers"][0]["controls"];
    assert_eq!(*controls, serde_json::json!(["open", "close", "reset"]));
    for (action, state) in [
        ("open", CircuitState::ForcedOpen),
        ("close", CircuitState::ForcedClosed),
        ("reset", CircuitState::Closed),
    ] {
        let response = send(&service, control(action)).await;
        assert_eq!(response.status(), 200);
        assert_safe(response.headers());
        assert_eq!(layer.handle().state(), state);
        let status = status_json(&service).await;
        let used = status["decisions"]
            .as_array()
            .unwrap()
            .iter()
            .find(|one| one["event"] == "control used")
            .unwrap();
        assert!(used["why"].as_str().unwrap().ends_with("on the live page, by alice"), "{used}");
        assert_eq!((&used["name"], &used["layer"]), (&"search".into(), &"circuit_breaker".into()));
    }
    let unknown = post("/buttress/circuits/none/open").header("x-buttress-confirm", "none");
    assert_eq!(status_of(&service, unknown.header("x-person", "alice")).await, 404);
}

#[tokio::test(start_paused = true)]
async fn control_needs_all_conditions() {
    let (registry, layer) = search();
    let service = controlled(&registry).service().unwrap();
    let path = "/buttress/circuits/search/open";
    let named = || post(path).header("x-person", "alice");
    let confirmed = |value: &str| named().header("x-buttress-confirm", value);
    for (request, status) in [
        (get(path).header("x-person", "alice").header("x-buttress-confirm", "search"), 405),
        (control("open").method("PUT"), 405),
        (named(), 403),
        (confirmed("other"), 403),
        (confirmed("search").header("x-buttress-confirm", "search"), 403),
        (confirmed("%"), 403),
        (control("open").header("sec-fetch-site", "cross-site"), 403),
        (control("open").header("sec-fetch-site", "same-site"), 403),
        (post(path).header("x-buttress-confirm", "search"), 403),
        (post(path).header("x-buttress-confirm", "search").header("x-person", "panic"), 403),
        (Request::post(path).header("host", "evil.example"), 421),
        (post("/buttress/circuits/search%2/open"), 404),
        (post("/buttress/circuits/search%ff/open"), 404),
        (post("/buttress/circuits/search/"), 404),
        (post("/buttress/circuits/search"), 404),
    ] {
        let request = request.body(Body::new()).unwrap();
        let shown = format!("{request:?}");
        let response = service.clone().oneshot(request).await.unwrap();
        assert_eq!(response.status(), status, "{shown}");
        assert_eq!(layer.handle().state(), CircuitState::Closed, "{shown}");
    }
    assert_eq!(
        status_of(&service, control("open").header("sec-fetch-site", "same-origin")).await,
        200
    );
    assert_eq!(layer.handle().state(), CircuitState::ForcedOpen);
    assert_eq!(status_json(&service).await["decisions"].as_array().unwrap().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn use_of_a_control_is_a_warning_with_its_sender() {
    let (registry, _layer) = search();
    let service = controlled(&registry).service().unwrap();
    let (log, _guard) = EventLog::listen();
    send(&service, control("open")).await;
    let events = log.take();
    let used = events.iter().filter(|event| event.message == "control used").collect::<Vec<_>>();
    assert_eq!(used.len(), 1, "{events:?}");
    assert_eq!((&*used[0].level, &*used[0].target), ("WARN", "breaker"));
    assert_eq!(
        (used[0].get("layer"), used[0].get("resilience.name")),
        ("circuit_breaker", "search")
    );
    assert_eq!((used[0].get("state"), used[0].get("sender")), ("forced_open", "alice"));
}

#[test]
fn page_and_its_bodies_can_be_shared_by_threads() {
    fn shared<T: Send + Sync + Unpin + 'static>() {}
    shared::<Dashboard>();
    shared::<DashboardLayer>();
    shared::<DashboardService>();
    shared::<DashboardEndpoint<()>>();
    shared::<EndpointBody>();
    shared::<TrackedBody<Full<Bytes>>>();
}
