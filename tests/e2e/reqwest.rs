//! reqwest under the stack, through [`HttpClient`], against a real server.

use std::{
    cell::Cell,
    pin::pin,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::RawQuery,
    response::Redirect,
    routing::{get, post, put},
};
use buttress::{
    Attempts, Backoff, BoxError, CircuitBreakerLayer, ClientError, ClientErrorKind,
    ConcurrencyLimitLayer, RetryLayer, Trip,
    breaker::{CircuitState, TripReason},
    outcome::Reason,
    reqwest::{HttpClient, SendThrough},
};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use tokio::{sync::mpsc, task::JoinSet};
use tower::{Service, ServiceBuilder, ServiceExt};

use crate::support::net::{
    self, HALF, Stage, closed_address, closes_after, never_answers, serve, soon, until,
};

const CALLERS: usize = 20;

fn client() -> HttpClient {
    HttpClient::new(builder().build().unwrap())
}

/// Without a proxy, because the environment of the test may name one.
fn builder() -> reqwest::ClientBuilder {
    reqwest::Client::builder().no_proxy()
}

async fn upstream(stage: &Stage) -> std::net::SocketAddr {
    let (a, b) = (stage.clone(), stage.clone());
    let app = Router::new()
        .route("/", get(move || a.plain()))
        .route("/stream", get(move || b.streaming()))
        .route("/echo", post(|body: Body| async { body }))
        .route(
            "/moved",
            get(|| async { Redirect::temporary("/empty") })
                .post(|| async { Redirect::temporary("/echo") }),
        )
        .route("/empty", get(|| async {}));
    serve(app).await
}

// ===== The service itself =====

#[test]
fn auto_traits() {
    fn all<T: Clone + Send + Sync + 'static>(_: &T) {}
    fn sent<T: Send + 'static>(_: T) {}
    let mut client = client();
    all(&client);
    sent(client.call(Request::new(Empty::<Bytes>::new())));
}

#[tokio::test]
async fn bodies_stream_both_ways_at_the_same_time() {
    let addr = upstream(&Stage::default()).await;
    let (chunks, body) = mpsc::channel::<&'static str>(1);
    let body = stream::unfold(body, |mut body| async move {
        Some((Ok::<_, BoxError>(Bytes::from(body.recv().await?)), body))
    });
    let request = Request::post(format!("http://{addr}/echo"));
    let request = request.body(StreamBody::new(body.map(|chunk| chunk.map(Frame::data)))).unwrap();
    let mut call = pin!(client().oneshot(request));
    // The response head arrives before the request body ends, and each chunk arrives before the next one is sent.
    let mut response = None;
    for chunk in ["one", "two", "three"] {
        soon(chunks.send(chunk)).await.unwrap();
        if response.is_none() {
            response = Some(soon(call.as_mut()).await.unwrap());
        }
        let frame = soon(response.as_mut().unwrap().body_mut().frame()).await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), chunk);
    }
    drop(chunks);
    assert!(soon(response.unwrap().body_mut().frame()).await.is_none());
}

#[tokio::test]
async fn content_length_of_a_known_body_is_sent() {
    let app = Router::new().route(
        "/",
        post(|request: Request<Body>| async move {
            let header = |name| request.headers().get(name).map(|v| v.to_str().unwrap().to_owned());
            format!("{:?} {:?}", header("content-length"), header("transfer-encoding"))
        }),
    );
    let addr = serve(app).await;
    let request = Request::post(format!("http://{addr}/")).body(Full::new(&b"hello"[..])).unwrap();
    let response = soon(client().oneshot(request)).await.unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), r#"Some("5") None"#);
}

#[tokio::test]
async fn a_request_without_a_host_is_an_error_and_never_a_panic() {
    for (uri, said) in [
        ("/", "relative URL without a base"),
        ("/a?b", "relative URL without a base"),
        ("*", "relative URL without a base"),
        ("localhost:1", "relative URL without a base"),
        ("http:80", "relative URL without a base"),
        ("ftp://localhost/", "URL scheme is not allowed"),
    ] {
        let uri: http::Uri = uri.parse().unwrap();
        let request = Request::get(uri.clone()).body(Empty::<Bytes>::new()).unwrap();
        let error = soon(client().oneshot(request)).await.unwrap_err();
        assert!(error.is_builder(), "{uri}: {error:?}");
        let why = std::error::Error::source(&error).expect("a source with the reason").to_string();
        assert_eq!(why, said, "{uri}");
    }
}

#[tokio::test]
async fn a_redirect_is_followed_if_the_body_can_be_sent_again() {
    let addr = upstream(&Stage::default()).await;
    let request = Request::get(format!("http://{addr}/moved")).body(Empty::<Bytes>::new()).unwrap();
    assert_eq!(soon(client().oneshot(request)).await.unwrap().status(), StatusCode::OK);
    let request = Request::post(format!("http://{addr}/moved")).body(Full::new(&b"x"[..])).unwrap();
    let response = soon(client().oneshot(request)).await.unwrap();
    assert_eq!(response.status(), StatusCode::TEMPORARY_REDIRECT);
}

/// A body that is neither `Sync` nor `Unpin`, as axum's and tonic's may be.
fn not_sync(texts: [&'static str; 2]) -> impl http_body::Body<Data = Bytes, Error = BoxError> {
    let frames = stream::unfold(Cell::new(0), move |at| async move {
        let nth = at.replace(at.get() + 1);
        let text = texts.get(nth)?;
        Some((Ok(Frame::data(Bytes::from_static(text.as_bytes()))), at))
    });
    StreamBody::new(frames)
}

#[tokio::test]
async fn body_that_is_not_sync_is_sent() {
    let addr = upstream(&Stage::default()).await;
    let client = ServiceBuilder::new().layer(RetryLayer::http()).service(client());
    let uri = format!("http://{addr}/echo");
    let axum = Request::post(&uri).body(Body::from("axum")).unwrap();
    let tonic = tonic::body::Body::new(Full::new(Bytes::from_static(b"tonic")));
    let tonic = Request::post(&uri).body(tonic).unwrap();
    let boxed = not_sync(["un", "sync"]).boxed_unsync();
    let boxed = Request::post(&uri).body(boxed).unwrap();
    let raw = Request::post(&uri).body(not_sync(["r", "aw"])).unwrap();
    async fn text(response: Response<reqwest::Body>) -> Bytes {
        response.into_body().collect().await.unwrap().to_bytes()
    }
    let http = self::client();
    assert_eq!(text(soon(http.clone().oneshot(axum)).await.unwrap()).await, "axum");
    assert_eq!(text(soon(http.clone().oneshot(tonic)).await.unwrap()).await, "tonic");
    assert_eq!(text(soon(http.oneshot(raw)).await.unwrap()).await, "raw");
    let response = soon(client.oneshot(boxed)).await.unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "unsync");
}

#[tokio::test]
async fn content_length_and_trailers_of_a_body_that_is_not_sync_are_sent() {
    let app = Router::new().route(
        "/",
        post(|request: Request<Body>| async move {
            let length = format!("{:?}", request.headers().get("content-length"));
            let trailers = request.into_body().collect().await.unwrap().trailers().cloned();
            format!("{length} {:?}", trailers.unwrap_or_default().get("x-sum"))
        }),
    );
    let addr = serve(app).await;
    let send = async |body: Body| {
        let request = Request::post(format!("http://{addr}/"))
            .header("trailer", "x-sum")
            .header("te", "trailers")
            .body(body)
            .unwrap();
        let response = soon(client().oneshot(request)).await.unwrap();
        response.into_body().collect().await.unwrap().to_bytes()
    };
    assert_eq!(send(Body::from("hello")).await, r#"Some("5") None"#);
    let mut trailers = HeaderMap::new();
    trailers.insert("x-sum", "7".parse().unwrap());
    let frames =
        [Ok::<_, BoxError>(Frame::data(Bytes::from("hello"))), Ok(Frame::trailers(trailers))];
    let body = Body::new(StreamBody::new(stream::iter(frames)));
    assert_eq!(send(body).await, r#"None Some("7")"#);
}

// ===== Requests made with reqwest =====

#[tokio::test]
async fn request_builder_is_sent_through_the_layers() {
    static HITS: AtomicUsize = AtomicUsize::new(0);
    let app = Router::new()
        .route(
            "/json",
            put(|RawQuery(query): RawQuery, body: String| async move {
                match HITS.fetch_add(1, SeqCst) {
                    0 => Err(StatusCode::SERVICE_UNAVAILABLE),
                    _ => Ok(format!("[{query:?},{body}]", query = query.unwrap_or_default())),
                }
            }),
        )
        .route("/moved", get(|| async { Redirect::temporary("/") }))
        .route("/", get(|| async { "home" }));
    let addr = serve(app).await;
    let http = HttpClient::from_builder(builder()).unwrap();
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(2));
    let circuit = breaker.handle();
    let client = ServiceBuilder::new()
        .layer(RetryLayer::http().backoff(Backoff::exponential(Duration::from_millis(1))))
        .layer(breaker)
        .service(http.clone());

    let request = http.get_ref().put(format!("http://{addr}/json?q=one"));
    let response = soon(request.json(&["two"]).send_through(&client)).await.unwrap();
    let (told, url) = (response.extensions().get::<Attempts>().cloned(), response.url().clone());
    assert_eq!(response.json::<(String, Vec<String>)>().await.unwrap().1, ["two"]);
    assert_eq!(told.unwrap().made, 2, "the layers retried it");
    assert_eq!(url.as_str(), format!("http://{addr}/json?q=one"));

    let moved = http.get_ref().get(format!("http://{addr}/moved")).build().unwrap();
    let response = soon(moved.send_through(&client)).await.unwrap();
    assert_eq!(response.url().path(), "/", "the URL after the redirect");

    // In a task, with `?` into `anyhow::Error`.
    let task = tokio::spawn(async move {
        circuit.force_open();
        let text =
            http.get_ref().get("http://localhost/").send_through(&client).await?.text().await?;
        Ok::<_, anyhow::Error>(text)
    });
    let error: ClientError = soon(task).await.unwrap().unwrap_err().downcast().unwrap();
    assert_eq!(error.kind(), ClientErrorKind::Rejected);
}

#[tokio::test]
async fn request_builder_that_cannot_be_built_is_an_error_of_the_request() {
    let http = client();
    let request = http.get_ref().get("not a URL").send_through(&http);
    let error = soon(request).await.unwrap_err();
    assert_eq!(error.kind(), ClientErrorKind::Request, "{error:#}");
    let request = http.get_ref().get("http://localhost/").header("a b", "c").send_through(&http);
    assert_eq!(soon(request).await.unwrap_err().kind(), ClientErrorKind::Request);
}

#[tokio::test]
async fn timeout_of_a_request_builder_applies() {
    let (addr, _held) = never_answers().await;
    let client = ServiceBuilder::new().layer(RetryLayer::http().attempts(1)).service(client());
    let request = reqwest::Client::new().get(format!("http://{addr}/"));
    let request = request.timeout(Duration::from_millis(20)).send_through(&client);
    assert_eq!(soon(request).await.unwrap_err().kind(), ClientErrorKind::Timeout);
}

// ===== Under the stack =====

#[tokio::test]
async fn oneshot_in_spawned_tasks_never_has_more_than_two_at_the_server() {
    for path in ["/", "/stream"] {
        let stage = Stage::default();
        let addr = upstream(&stage).await;
        let limit = ConcurrencyLimitLayer::new(2).queue(64, Duration::from_secs(10));
        let handle = limit.handle();
        let client =
            ServiceBuilder::new().layer(CircuitBreakerLayer::http()).layer(limit).service(client());
        let mut calls = JoinSet::new();
        for _ in 0..CALLERS {
            let client = client.clone();
            calls.spawn(async move {
                let response = client.oneshot(net::get(addr, path)).await.unwrap();
                response.into_body().collect().await.unwrap().to_bytes()
            });
        }
        until(|| handle.snapshot().waiting as usize == CALLERS - 2).await;
        until(|| stage.inside.now() == 2).await;
        stage.open();
        while let Some(body) = soon(calls.join_next()).await {
            assert_eq!(body.unwrap(), "hello");
        }
        assert_eq!((stage.inside.peak(), stage.inside.total()), (2, CALLERS));
        assert_eq!((handle.in_flight(), handle.snapshot().waiting), (0, 0));
    }
}

#[tokio::test]
async fn a_body_dropped_mid_stream_releases_the_permits_of_client_and_server() {
    let stage = Stage::default();
    let addr = upstream(&stage).await;
    let limit = ConcurrencyLimitLayer::new(1);
    let handle = limit.handle();
    let client = ServiceBuilder::new().layer(limit).service(client());
    let mut response = soon(client.oneshot(net::get(addr, "/stream"))).await.unwrap();
    let first = soon(response.body_mut().frame()).await.unwrap().unwrap();
    assert_eq!(first.into_data().unwrap(), "hel");
    assert_eq!((handle.in_flight(), stage.inside.now()), (1, 1));
    drop(response);
    assert_eq!(handle.in_flight(), 0);
    until(|| stage.inside.now() == 0).await;
}

#[tokio::test]
async fn errors_of_the_connection_are_distinguished() {
    let hasty = builder().timeout(Duration::from_millis(50)).build().unwrap();
    for (addr, client, expected) in [
        (closed_address().await, client(), Reason::ConnectRefused),
        (closes_after(b"").await, client(), Reason::Reset),
        (closes_after(b"not http at all\r\n\r\n").await, client(), Reason::Error),
        (closes_after(HALF).await, client(), Reason::Body),
        (never_answers().await.0, HttpClient::from(hasty), Reason::Timeout),
    ] {
        let breaker =
            CircuitBreakerLayer::new(Trip::consecutive(1)).open_for(Duration::from_millis(20));
        let state = breaker.handle();
        let limit = ConcurrencyLimitLayer::new(1);
        let handle = limit.handle();
        let client = ServiceBuilder::new().layer(breaker).layer(limit).service(client);
        for _ in 0..2 {
            while state.state() == CircuitState::Open {
                soon(state.changed()).await;
            }
            match soon(client.clone().oneshot(net::get(addr, "/"))).await {
                Err(error) => assert!(error.is::<reqwest::Error>(), "{error}"),
                Ok(response) => drop(soon(response.into_body().collect()).await.unwrap_err()),
            }
            assert_eq!(handle.in_flight(), 0);
        }
        match state.snapshot().last_trip {
            Some(TripReason::Probe { outcome }) => assert_eq!(outcome.reason(), expected),
            other => panic!("{expected:?}: no probe failed, {other:?}"),
        }
    }
}

#[tokio::test]
async fn an_invalid_request_is_neutral() {
    let addr = upstream(&Stage::default()).await;
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(1));
    let state = breaker.handle();
    let client = ServiceBuilder::new().layer(breaker).service(client());
    let relative = Request::new(Empty::<Bytes>::new());
    soon(client.clone().oneshot(relative)).await.unwrap_err();
    let gone = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
    let frames = stream::iter([Ok(Frame::data(Bytes::from_static(b"hel"))), Err(gone)]);
    let post = Request::post(format!("http://{addr}/echo")).body(StreamBody::new(frames)).unwrap();
    match soon(client.oneshot(post)).await {
        Err(error) => assert!(error.is::<reqwest::Error>(), "{error}"),
        Ok(response) => drop(soon(response.into_body().collect()).await.unwrap_err()),
    }
    assert_eq!(state.state(), CircuitState::Closed);
}
