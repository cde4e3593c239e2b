//! `Health::endpoints` and `Health::service` through their public API, with a paused clock.

use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    task::{Context, Poll},
    time::Duration,
};

use buttress::{Health, health::Check};
use bytes::Bytes;
use http::{Method, Request, Response, header};
use http_body::Body;
use http_body_util::{BodyExt, Full};
use tower::{Layer, Service, ServiceExt, limit::GlobalConcurrencyLimitLayer, service_fn};

use crate::support::within_an_hour;

type Req = Request<Full<Bytes>>;

fn to(method: Method, uri: &str) -> Req {
    Request::builder().method(method).uri(uri).body(Full::default()).unwrap()
}

fn get(uri: &str) -> Req {
    to(Method::GET, uri)
}

fn app(
    calls: &Arc<AtomicUsize>,
) -> impl Service<Req, Response = Response<Full<Bytes>>, Error = Infallible, Future: Send>
+ Clone
+ Send
+ use<> {
    let calls = calls.clone();
    service_fn(move |_: Req| {
        calls.fetch_add(1, SeqCst);
        async { Ok(Response::new(Full::from("app"))) }
    })
}

async fn text<B: Body<Error: std::fmt::Debug>>(response: Response<B>) -> (u16, String) {
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test(start_paused = true)]
async fn serves_the_health_routes_and_forwards_other_paths() {
    let health = Health::new();
    let calls = Arc::default();
    let service = health.endpoints().layer(app(&calls));
    for (request, answered) in [
        (get("/livez"), true),
        (get("/readyz?verbose"), true),
        (get("http://host/healthz"), true),
        (to(Method::HEAD, "/readyz"), true),
        (get("/"), false),
        (get("/livez/"), false),
        (get("/LIVEZ"), false),
        (get("/api/livez"), false),
        (to(Method::POST, "/livez"), false),
        (to(Method::OPTIONS, "*"), false),
    ] {
        let before = calls.load(SeqCst);
        let what = format!("{} {}", request.method(), request.uri());
        let response = service.clone().oneshot(request).await.unwrap();
        assert_eq!(calls.load(SeqCst) == before, answered, "{what}");
        assert_eq!(response.headers().contains_key("cache-control"), answered, "{what}");
        assert_eq!(text(response).await.1 == "app", !answered, "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn readiness_follows_the_checks_and_liveness_does_not() {
    let health = Health::new();
    let service = health.endpoints().layer(app(&Arc::default()));
    let ask = async |uri: &str| text(service.clone().oneshot(get(uri)).await.unwrap()).await;
    let search = health.reporter("search").unwrap();
    let unknown = "[-]search failed: no verdict yet\nreadyz check failed\n";
    assert_eq!(ask("/readyz").await, (503, unknown.into()));
    search.pass();
    assert_eq!(ask("/readyz").await, (200, "ok".into()));
    assert_eq!(ask("/healthz?verbose").await.1, "[+]search ok\nhealthz check passed\n");
    search.fail();
    assert_eq!(ask("/readyz").await.0, 503);
    assert_eq!(ask("/readyz?exclude=search").await.0, 200);
    assert_eq!(ask("/readyz/search").await.0, 503);
    assert_eq!(ask("/livez").await, (200, "ok".into()));
}

#[tokio::test(start_paused = true)]
async fn head_has_the_headers_of_get_and_no_body() {
    let service = Health::new().endpoints().layer(app(&Arc::default()));
    let got = service.clone().oneshot(get("/readyz?verbose")).await.unwrap();
    let head = service.oneshot(to(Method::HEAD, "/readyz?verbose")).await.unwrap();
    assert_eq!(got.headers(), head.headers());
    assert_eq!(got.headers()["cache-control"], "no-store");
    assert_eq!(got.headers()["content-type"], "text/plain; charset=utf-8");
    assert_eq!(got.body().size_hint().exact(), Some(20));
    assert!(head.body().is_end_stream());
}

#[tokio::test(start_paused = true)]
async fn a_probe_never_waits_for_the_inner_service() {
    let (health, calls) = (Health::new(), Arc::default());
    let limited = GlobalConcurrencyLimitLayer::new(1).layer(app(&calls));
    let service = health.endpoints().layer(limited.clone());
    let mut holder = limited.clone();
    holder.ready().await.unwrap();

    for _ in 0..10 {
        let response = within_an_hour(service.clone().oneshot(get("/readyz"))).await.unwrap();
        assert_eq!(text(response).await, (200, "ok".into()));
    }
    // Any other call waits for the inner service.
    let waiting = tokio::spawn(service.clone().oneshot(get("/")));
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    drop(holder);
    within_an_hour(waiting).await.unwrap().unwrap();
    assert_eq!(calls.load(SeqCst), 1);
}

/// The test counts polls instead of measuring time: the response is available at the first poll, and the inner service
/// is not polled for it.
#[tokio::test(start_paused = true)]
async fn a_probe_receives_its_response_at_the_first_poll_of_a_full_server() {
    let polls = Arc::new(AtomicUsize::new(0));
    let seen = polls.clone();
    let hangs = service_fn(move |_: Req| {
        seen.fetch_add(1, SeqCst);
        std::future::pending::<Result<Response<Full<Bytes>>, Infallible>>()
    });
    let limit =
        buttress::ConcurrencyLimitLayer::new(1).queue(10, Duration::from_secs(60)).respond();
    let inside = limit.handle();
    let service = Health::new().endpoints().layer(limit.layer(hangs));
    let waiting: Vec<_> =
        (0..11).map(|_| tokio::spawn(service.clone().oneshot(get("/")))).collect();
    while inside.snapshot().waiting < 10 {
        tokio::task::yield_now().await;
    }
    for uri in ["/livez", "/readyz", "/healthz?verbose"] {
        let mut service = service.clone();
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(Service::<Req>::poll_ready(&mut service, &mut cx).is_ready());
        let answer = std::pin::pin!(service.call(get(uri))).poll(&mut cx);
        assert!(matches!(answer, Poll::Ready(Ok(answer)) if answer.status() == 200), "{uri}");
    }
    assert_eq!((polls.load(SeqCst), inside.in_flight(), inside.snapshot().waiting), (1, 1, 10));
    waiting.into_iter().for_each(|call| call.abort());
}

#[tokio::test(start_paused = true)]
async fn an_idle_service_holds_no_reservation_of_the_inner_service() {
    let (health, calls) = (Health::new(), Arc::default());
    let limited = GlobalConcurrencyLimitLayer::new(1).layer(app(&calls));
    let mut service = health.endpoints().layer(limited.clone());
    // The service has reserved the permit, and the call is a health request.
    service.ready().await.unwrap();
    service.call(get("/livez")).await.unwrap();
    let mut holder = limited.clone();
    within_an_hour(holder.ready()).await.unwrap();
    // The service was polled ready behind `holder` and is idle. Another caller must receive the permit.
    service.ready().await.unwrap();
    drop(holder);
    within_an_hour(limited.clone().oneshot(get("/"))).await.unwrap();
    // The service has reserved the permit and is dropped.
    service.ready().await.unwrap();
    drop(service);
    within_an_hour(limited.oneshot(get("/"))).await.unwrap();
}

/// Panics if it is called without readiness. `poll_ready` fails after more than 100 polls.
struct Strict {
    ready: bool,
    polls: Arc<AtomicUsize>,
}

impl Clone for Strict {
    fn clone(&self) -> Self {
        Self { ready: false, polls: self.polls.clone() }
    }
}

impl Service<Req> for Strict {
    type Response = Response<Full<Bytes>>;
    type Error = &'static str;
    type Future = std::future::Ready<Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        if self.polls.fetch_add(1, SeqCst) > 100 {
            return Poll::Ready(Err("worn out"));
        }
        self.ready = true;
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Req) -> Self::Future {
        assert!(std::mem::take(&mut self.ready), "called without readiness");
        std::future::ready(Ok(Response::default()))
    }
}

#[tokio::test(start_paused = true)]
async fn calls_only_the_instance_that_was_polled_ready() {
    let polls = Arc::default();
    let mut service =
        Health::new().endpoints().layer(Strict { ready: false, polls: Arc::clone(&polls) });
    for _ in 0..5 {
        // A ready service stays ready.
        poll_fn(|cx| service.poll_ready(cx)).await.unwrap();
        poll_fn(|cx| service.poll_ready(cx)).await.unwrap();
        // A clone needs its own readiness.
        service.clone().oneshot(get("/")).await.unwrap();
        // After a health request the service needs a new readiness.
        service.call(get("/livez")).await.unwrap();
        poll_fn(|cx| service.poll_ready(cx)).await.unwrap();
        service.call(get("/")).await.unwrap();
    }
    assert_eq!(polls.load(SeqCst), 15);
    polls.store(101, SeqCst);
    let failed = poll_fn(|cx| Service::<Req>::poll_ready(&mut service, cx)).await;
    assert_eq!(failed.unwrap_err(), "worn out");
}

#[tokio::test(start_paused = true)]
async fn the_plain_service_responds_to_every_request() {
    let health = Health::new();
    let search = health.reporter("search").unwrap();
    let service = health.service();
    let ask = async |request: Req| service.clone().oneshot(request).await.unwrap();
    assert_eq!(text(ask(get("/readyz/search")).await).await.0, 503);
    search.pass();
    assert_eq!(text(ask(get("/readyz/search")).await).await, (200, "ok".into()));
    assert_eq!(text(ask(get("/readyz/other")).await).await.0, 404);
    assert_eq!(text(ask(get("/metrics")).await).await, (404, "not found\n".into()));
    let refused = ask(to(Method::DELETE, "/readyz")).await;
    assert_eq!(
        (refused.status().as_u16(), &refused.headers()["allow"]),
        (405, &"GET, HEAD".parse().unwrap())
    );
    assert!(ask(to(Method::HEAD, "/livez")).await.body().is_end_stream());
}

// ===== JSON =====

fn wants(uri: &str, accept: &str) -> Req {
    let mut request = get(uri);
    request.headers_mut().insert(header::ACCEPT, accept.parse().unwrap());
    request
}

#[tokio::test(start_paused = true)]
async fn health_json_contains_every_check() {
    let health = Health::new();
    let took = Duration::from_millis(12);
    let slow = move || async move {
        tokio::time::sleep(took).await;
        Ok::<(), String>(())
    };
    health.add(Check::new("db", slow)).unwrap();
    let search = health.reporter("search").unwrap().degrading();
    let queue = health.reporter("queue").unwrap();
    assert!(!within_an_hour(health.changed()).await);
    search.fail_because("say \"please\" to 10.0.0.7");
    let service = health.endpoints().layer(app(&Arc::default()));
    let ask = async |uri: &str, accept: &str| {
        let response = service.clone().oneshot(wants(uri, accept)).await.unwrap();
        let headers = response.headers().clone();
        let (status, body) = text(response).await;
        (status, headers, serde_json::from_str::<serde_json::Value>(&body).unwrap())
    };

    let (status, headers, told) = ask("/readyz", "application/health+json").await;
    assert_eq!((status, &told["status"]), (503, &"fail".into()));
    assert_eq!(headers["content-type"], "application/health+json");
    assert_eq!(headers["cache-control"], "no-store");
    let db = &told["checks"]["db"][0];
    assert_eq!(
        (&db["status"], &db["healthy"], &db["critical"]),
        (&"pass".into(), &true.into(), &true.into())
    );
    let degraded = &told["checks"]["search"][0];
    assert_eq!((&degraded["status"], &degraded["critical"]), (&"warn".into(), &false.into()));
    assert_eq!(degraded["output"], "reason withheld");
    let unknown = &told["checks"]["queue"][0];
    assert_eq!(
        (&unknown["status"], &unknown["healthy"]),
        (&"fail".into(), &serde_json::Value::Null)
    );
    assert_eq!(unknown["output"], "no verdict yet");

    queue.pass();
    let (status, _, told) = ask("/healthz", "text/html, application/json;q=0.9").await;
    assert_eq!((status, &told["status"]), (200, &"warn".into()));
    let (status, _, told) = ask("/readyz?exclude=search", "application/json").await;
    assert_eq!(
        (status, &told["status"], &told["checks"]["search"]),
        (200, &"pass".into(), &serde_json::Value::Null)
    );
    let (status, _, told) = ask("/readyz/search", "application/json").await;
    assert_eq!((status, told["checks"].as_object().unwrap().len()), (503, 1));
    let (status, _, told) = ask("/livez", "application/json").await;
    assert_eq!((status, told), (200, serde_json::json!({ "status": "pass" })));

    // Reasons and times are sent only by a service with `with_reasons`.
    let friends = health.service().with_reasons();
    let response = friends.clone().oneshot(wants("/readyz", "application/json")).await.unwrap();
    let told: serde_json::Value = serde_json::from_str(&text(response).await.1).unwrap();
    assert_eq!(told["checks"]["search"][0]["output"], "say \"please\" to 10.0.0.7");
    let db = &told["checks"]["db"][0];
    let ms = db["response_time_ms"].as_f64().unwrap();
    assert!((12.0..20.0).contains(&ms), "{ms}");
    let at = db["last_check"].as_str().unwrap();
    assert!(at.len() == 24 && at.starts_with("20") && at.ends_with('Z'), "{at}");
    tokio::time::advance(Duration::from_secs(3)).await;
    let said = text(friends.oneshot(get("/readyz?verbose")).await.unwrap()).await.1;
    let line = "[-]search degraded: say \"please\" to 10.0.0.7 (3 s ago)\n";
    assert!(said.contains(line) && said.ends_with("readyz check passed\n"), "{said}");
    let said = text(service.oneshot(get("/readyz?verbose")).await.unwrap()).await.1;
    assert!(said.contains("[-]search degraded: reason withheld\n"), "{said}");
}

#[tokio::test(start_paused = true)]
async fn other_clients_receive_plain_text() {
    let service = Health::new().service();
    for accept in ["*/*", "text/plain", "text/html", "application/json;q=0", "application/xml"] {
        let response = service.clone().oneshot(wants("/readyz", accept)).await.unwrap();
        assert_eq!(response.headers()["content-type"], "text/plain; charset=utf-8", "{accept}");
    }
    let head = Request::head("/readyz").header("accept", "application/json");
    let head = service.oneshot(head.body(Full::<Bytes>::default()).unwrap()).await.unwrap();
    assert_eq!(head.headers()["content-type"], "application/health+json");
    assert_eq!(
        (&head.headers()["content-length"], head.body().is_end_stream()),
        (&"17".parse().unwrap(), true)
    );
}

#[tokio::test(start_paused = true)]
async fn service_works_as_an_axum_route() {
    let health = Health::new();
    let app = axum::Router::new()
        .route_service("/readyz", health.service())
        .nest_service("/internal", health.service());
    for (uri, status) in [("/readyz", 200), ("/internal/livez", 200), ("/internal/readyz/db", 404)]
    {
        let request = Request::get(uri).body(axum::body::Body::empty()).unwrap();
        assert_eq!(app.clone().oneshot(request).await.unwrap().status().as_u16(), status, "{uri}");
    }
}
