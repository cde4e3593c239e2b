//! The recommended client with each preset, over real sockets: open circuit, full limit, hint, slow upstream, hang,
//! stream.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Body as AxumBody,
    http::{HeaderMap, HeaderName, StatusCode},
    routing::any,
};
use buttress::{
    Attempts, Deadline, Rejected, config::ClientConfig, outcome::RejectedKind, retry::GiveUpReason,
    stack::StackClient,
};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{Method, Request};
use http_body_util::{BodyExt, Full};
use tokio::{
    net::TcpListener,
    time::{Instant, sleep, timeout},
};

use crate::support::{alone, ms, net};

type Body = Full<Bytes>;

const PRESETS: [&str; 3] = ["internal", "slow", "llm"];

// ===== The upstream =====

#[derive(Clone, Default)]
struct Upstream {
    calls: Arc<AtomicUsize>,
}

impl Upstream {
    /// Serves `/ok`, `/hint/<status>` (fails once with `Retry-After: 1`), `/once/<status>/<header>/<value>` (fails once
    /// with that header), `/slow` (1 s), `/hang` and `/stream` (20 chunks in 2 s).
    async fn start(&self) -> SocketAddr {
        let calls = self.calls.clone();
        let hint = {
            let calls = calls.clone();
            async move |axum::extract::Path(status): axum::extract::Path<u16>| {
                let first = calls.fetch_add(1, SeqCst) == 0;
                let mut headers = HeaderMap::new();
                headers.insert("retry-after", 1.into());
                match first {
                    true => (StatusCode::from_u16(status).unwrap(), headers),
                    false => (StatusCode::OK, HeaderMap::new()),
                }
            }
        };
        let once = {
            let calls = calls.clone();
            async move |axum::extract::Path((status, name, value)): axum::extract::Path<(
                u16,
                String,
                String,
            )>| {
                let mut headers = HeaderMap::new();
                if calls.fetch_add(1, SeqCst) > 0 {
                    return (StatusCode::OK, headers);
                }
                headers.insert(HeaderName::try_from(name).unwrap(), value.parse().unwrap());
                (StatusCode::from_u16(status).unwrap(), headers)
            }
        };
        let count = move || calls.fetch_add(1, SeqCst);
        let (ok, slow, hang) = (count.clone(), count.clone(), count);
        let chunks = || {
            let chunk = |n: u8| async move {
                sleep(ms(100)).await;
                Ok::<_, Infallible>(Bytes::from(vec![n; 10]))
            };
            AxumBody::from_stream(stream::iter(0..20).then(chunk))
        };
        let app = Router::new()
            .route("/ok", any(async move || ok().to_string()))
            .route("/hint/{status}", any(hint))
            .route("/once/{status}/{name}/{value}", any(once))
            .route(
                "/slow",
                any(async move || {
                    slow();
                    sleep(ms(1000)).await;
                    "slow"
                }),
            )
            .route(
                "/hang",
                any(async move || {
                    hang();
                    std::future::pending::<()>().await;
                }),
            )
            .route("/stream", any(async move || chunks()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        at
    }

    fn calls(&self) -> usize {
        self.calls.load(SeqCst)
    }
}

fn client(preset: &str, settings: &str) -> StackClient<Body> {
    let file = format!("preset = '{preset}'\n{settings}");
    buttress::client(&ClientConfig::load("search").toml(&file).finish().unwrap()).unwrap()
}

fn request(method: Method, at: SocketAddr, path: &str) -> Request<Body> {
    let mut request = Request::new(Body::from("question"));
    *request.method_mut() = method;
    *request.uri_mut() = format!("http://{at}{path}").parse().unwrap();
    request
}

/// The request with a deadline of 10 s, within which a retry could wait for a circuit or a limit.
fn with_deadline(mut request: Request<Body>) -> Request<Body> {
    request.extensions_mut().insert(Deadline::after(Duration::from_secs(10)));
    request
}

/// Runs `scenario` for each preset at the same time.
async fn for_each_preset<F: Future<Output = ()>>(scenario: impl Fn(&'static str) -> F) {
    timeout(Duration::from_secs(60), futures_util::future::join_all(PRESETS.map(scenario)))
        .await
        .expect("a scenario took too long");
}

/// The error of a rejected call, and the shortest of 20 durations: the machine may be busy.
async fn rejected(
    client: &StackClient<Body>,
    request: impl Fn() -> Request<Body>,
) -> (Attempts, Rejected) {
    let mut shortest = Duration::MAX;
    for _ in 0..20 {
        let start = Instant::now();
        client.request(with_deadline(request())).await.map(drop).unwrap_err();
        shortest = shortest.min(start.elapsed());
    }
    assert!(shortest <= ms(1), "rejected after {shortest:?}");
    let error = client.request(request()).await.map(drop).unwrap_err();
    assert!(error.to_string().contains("nothing was sent"), "{error}");
    (Attempts::find(&error).unwrap(), Rejected::find(&error).unwrap().clone())
}

// ===== The scenarios =====

#[tokio::test]
async fn open_circuit_rejects_at_once() {
    for preset in PRESETS {
        let upstream = Upstream::default();
        let at = upstream.start().await;
        let client = client(preset, "");
        client.handle().breaker().force_open();
        for method in [Method::GET, Method::POST] {
            let (attempts, rejected) =
                rejected(&client, || request(method.clone(), at, "/ok")).await;
            assert_eq!(
                (attempts.made, attempts.sent, attempts.stop),
                (1, 0, GiveUpReason::Rejected)
            );
            assert_eq!(rejected.kind(), RejectedKind::ForcedOpen, "{preset}");
        }
        assert_eq!(upstream.calls(), 0, "{preset}");
    }
}

#[tokio::test]
async fn tripped_circuit_rejects_at_once() {
    for preset in PRESETS {
        let upstream = Upstream::default();
        let at = upstream.start().await;
        let client = client(
            preset,
            "timeout_head = '100ms'\nconnect_timeout = '90ms'\nretry_backoff = '1ms'",
        );
        while client.handle().snapshot().breaker_opened == 0 {
            client.request(request(Method::GET, at, "/hang")).await.map(drop).unwrap_err();
        }
        let calls = upstream.calls();
        assert_eq!(calls, 5, "{preset}: five failures open the circuit");
        let (_, rejected) = rejected(&client, || request(Method::GET, at, "/ok")).await;
        assert_eq!((rejected.kind(), upstream.calls()), (RejectedKind::Open, calls), "{preset}");
        assert!(rejected.retry_after().is_some(), "{preset}");
    }
}

#[tokio::test]
async fn full_limit_rejects_at_once() {
    for preset in PRESETS {
        let upstream = Upstream::default();
        let at = upstream.start().await;
        let client = client(preset, "limit_max = 1\nlimit_queue = 0");
        let holder = client.clone();
        let held = tokio::spawn(async move {
            holder.request(request(Method::GET, at, "/hang")).await.map(drop)
        });
        net::until(|| upstream.calls() == 1).await;
        let (attempts, rejected) = rejected(&client, || request(Method::POST, at, "/ok")).await;
        assert_eq!((attempts.made, attempts.sent, attempts.stop), (1, 0, GiveUpReason::Rejected));
        assert_eq!((rejected.kind(), upstream.calls()), (RejectedKind::Full, 1), "{preset}");
        held.abort();
    }
}

#[tokio::test]
async fn full_limit_with_a_queue_rejects_after_one_wait() {
    for_each_preset(async |preset| {
        let upstream = Upstream::default();
        let at = upstream.start().await;
        let client = client(preset, "limit_max = 1\nlimit_queue_wait = '300ms'");
        let holder = client.clone();
        let held = tokio::spawn(async move {
            holder.request(request(Method::GET, at, "/hang")).await.map(drop)
        });
        net::until(|| upstream.calls() == 1).await;
        let start = Instant::now();
        let request = with_deadline(request(Method::GET, at, "/ok"));
        let error = client.request(request).await.map(drop).unwrap_err();
        assert!(start.elapsed() >= ms(300) && start.elapsed() < ms(590), "{preset}: one wait");
        assert_eq!(Attempts::find(&error).unwrap().made, 1, "{preset}");
        held.abort();
    })
    .await;
}

#[tokio::test]
async fn hint_is_followed_where_it_fits_the_deadline() {
    let _alone = alone().await;
    for_each_preset(async |preset| {
        let try_one = async |method: Method, path, left| {
            let upstream = Upstream::default();
            let at = upstream.start().await;
            let client = client(preset, "");
            let mut request = request(method, at, path);
            request.extensions_mut().insert(Deadline::after(left));
            let start = Instant::now();
            let response = client.request(request).await.unwrap();
            (response.status().as_u16(), upstream.calls(), start.elapsed())
        };
        let (status, calls, time) = try_one(Method::GET, "/hint/503", ms(3000)).await;
        assert_eq!((status, calls), (200, 2), "{preset}");
        assert!(time >= ms(1000) && time < ms(1900), "{preset}: {time:?}");
        // The hint exceeds the deadline, so the response of the upstream is returned at once.
        let (status, calls, time) = try_one(Method::GET, "/hint/503", ms(900)).await;
        assert_eq!((status, calls), (503, 1), "{preset}");
        assert!(time < ms(500), "{preset}: {time:?}");
        // A provider of language models does not process a call to which it responds 429 or 529.
        for path in ["/hint/429", "/hint/529"] {
            let (status, calls, _) = try_one(Method::POST, path, ms(3000)).await;
            let expected = if preset == "llm" { (200, 2) } else { (status, 1) };
            assert_eq!((status, calls), expected, "{preset} {path}");
        }
    })
    .await;
}

/// 40 clients for each preset, each with a budget of its own.
#[tokio::test]
async fn every_hint_that_fits_the_deadline_is_followed() {
    let _alone = alone().await;
    // All clients are built before the first call, because a build occupies the thread for part of a call's deadline.
    let mut prepared = Vec::new();
    for preset in PRESETS.iter().flat_map(|preset| [*preset; 40]) {
        let upstream = Upstream::default();
        let at = upstream.start().await;
        prepared.push((preset, upstream, at, client(preset, "")));
    }
    let calls = prepared.into_iter().map(|(preset, upstream, at, client)| async move {
        let mut request = request(Method::GET, at, "/hint/503");
        request.extensions_mut().insert(Deadline::after(ms(3000)));
        let response = client.request(request).await.unwrap();
        assert_eq!((response.status().as_u16(), upstream.calls()), (200, 2), "{preset}");
    });
    futures_util::future::join_all(calls).await;
}

#[tokio::test]
async fn statuses_and_hints_of_proxies_are_followed() {
    const GET: Method = Method::GET;
    const POST: Method = Method::POST;
    // The method, the first response, the number of calls, and the time before the second one.
    let rows = [
        (GET, "520/x-a/b", 2, ms(0)),
        (GET, "522/x-a/b", 2, ms(0)),
        (GET, "524/x-a/b", 2, ms(0)),
        (POST, "524/x-a/b", 1, ms(0)),
        (GET, "525/x-a/b", 1, ms(0)),
        (GET, "529/x-a/b", 2, ms(0)),
        (GET, "421/x-a/b", 2, ms(0)),
        (POST, "425/x-a/b", 2, ms(0)),
        (GET, "501/x-a/b", 1, ms(0)),
        (GET, "503/x-envoy-ratelimited/true", 1, ms(0)),
        (GET, "503/retry-after/0.3", 2, ms(300)),
        (GET, "429/x-ms-retry-after-ms/300", 2, ms(300)),
        (GET, "429/x-ratelimit-reset-after/0.3", 2, ms(300)),
    ];
    for_each_preset(async |preset| {
        for (method, first, calls, time) in &rows {
            let upstream = Upstream::default();
            let at = upstream.start().await;
            let client = client(preset, "retry_backoff = '1ms'");
            let start = Instant::now();
            let path = format!("/once/{first}");
            let response = client.request(request(method.clone(), at, &path)).await.unwrap();
            assert_eq!(upstream.calls(), *calls, "{preset}: {method} {first}");
            assert_eq!(response.status() == 200, *calls == 2, "{preset}: {method} {first}");
            assert!(start.elapsed() >= *time, "{preset}: {method} {first}");
        }
    })
    .await;
}

#[tokio::test]
async fn host_name_without_an_address_is_retried() {
    for_each_preset(async |preset| {
        let client = client(preset, "retry_backoff = '1ms'");
        let mut post = request(Method::POST, ([127, 0, 0, 1], 1).into(), "/");
        *post.uri_mut() = "http://nothing.invalid/".parse().unwrap();
        let error = client.request(post).await.map(drop).unwrap_err();
        let attempts = Attempts::find(&error).unwrap();
        assert_eq!((attempts.made, attempts.sent), (3, 0), "{preset}: {error:#}");
        assert_eq!(attempts.stop, GiveUpReason::AttemptsUsedUp, "{preset}");
    })
    .await;
}

#[tokio::test]
async fn slow_upstream_is_waited_for() {
    for_each_preset(async |preset| {
        let upstream = Upstream::default();
        let at = upstream.start().await;
        let client = client(preset, "");
        for method in [Method::GET, Method::POST] {
            let response = client.request(request(method, at, "/slow")).await.unwrap();
            assert_eq!(Attempts::of(&response).made, 1, "{preset}");
            let body = response.into_body().collect().await.unwrap().to_bytes();
            assert_eq!(body, "slow", "{preset}");
        }
        assert_eq!(upstream.calls(), 2, "{preset}");
        let seen = client.handle().snapshot();
        assert_eq!((seen.failures, seen.breaker_opened, seen.in_flight), (0, 0, 0), "{preset}");
    })
    .await;
}

#[tokio::test]
async fn hang_ends_by_the_timeout_of_each_attempt() {
    for_each_preset(async |preset| {
        let upstream = Upstream::default();
        let at = upstream.start().await;
        let client = client(
            preset,
            "timeout_head = '200ms'\nconnect_timeout = '190ms'\nretry_backoff = '1ms'",
        );
        let start = Instant::now();
        let post = client.request(request(Method::POST, at, "/hang")).await.map(drop);
        let attempts = Attempts::find(&post.unwrap_err()).unwrap();
        assert_eq!((attempts.made, attempts.stop), (1, GiveUpReason::Unsafe), "{preset}");
        let get = client.request(request(Method::GET, at, "/hang")).await.map(drop).unwrap_err();
        let attempts = Attempts::find(&get).unwrap();
        assert_eq!((attempts.made, attempts.stop), (3, GiveUpReason::AttemptsUsedUp), "{preset}");
        let kind = Rejected::find(&get).unwrap().kind();
        assert!(matches!(kind, RejectedKind::TimedOut(_)), "{preset}: {kind:?}");
        assert!(start.elapsed() >= ms(800) && start.elapsed() < ms(2500), "{preset}");
        net::until(|| client.handle().snapshot().in_flight == 0).await;
    })
    .await;
}

/// The preset's own timeouts: 3 s for each attempt, and a deadline of 10 s.
#[tokio::test]
async fn hang_under_the_preset_internal_ends_within_its_deadline() {
    let upstream = Upstream::default();
    let at = upstream.start().await;
    let client = client("internal", "");
    let start = Instant::now();
    let error = client.request(request(Method::GET, at, "/hang")).await.map(drop).unwrap_err();
    assert_eq!((Attempts::find(&error).unwrap().made, upstream.calls()), (3, 3));
    assert!(start.elapsed() >= ms(9000) && start.elapsed() < ms(10_200), "{:?}", start.elapsed());
}

#[tokio::test]
async fn stream_arrives_whole() {
    for_each_preset(async |preset| {
        let upstream = Upstream::default();
        let at = upstream.start().await;
        let client = client(preset, "");
        let response = client.request(request(Method::POST, at, "/stream")).await.unwrap();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let expected: Vec<_> = (0..20).flat_map(|n| [n; 10]).collect();
        assert_eq!(body, expected, "{preset}");
        let seen = client.handle().snapshot();
        assert_eq!((seen.successes, seen.failures, seen.in_flight), (1, 0, 0), "{preset}");
    })
    .await;
}
