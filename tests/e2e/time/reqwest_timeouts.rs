//! The settings of this crate that correspond to reqwest's timeouts, each beside a bare `reqwest::Client`.

use std::{convert::Infallible, net::SocketAddr, time::Duration};

use axum::{Router, body::Body, routing::post};
use buttress::{
    BoxError, Deadline, DeadlineLayer, Rejected, RetryLayer, TimeoutLayer, Timeouts,
    outcome::RejectedKind, reqwest::HttpClient, timeout::TimeoutPhase,
};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{Request, Response};
use http_body_util::BodyExt;
use tokio::time::{Instant, sleep};
use tower::{Layer, Service, ServiceBuilder, ServiceExt};

use crate::support::{
    ms,
    net::{self, soon},
};

/// A frame each 100 ms.
fn frames(count: usize) -> impl futures_util::Stream<Item = Result<&'static str, Infallible>> {
    stream::iter(0..count).then(|_| async {
        sleep(ms(100)).await;
        Ok("frame")
    })
}

/// Responds late, with a slow body, or after a slow upload.
async fn serve() -> SocketAddr {
    let app = Router::new()
        .route("/head", post(|| async { sleep(ms(900)).await }))
        .route("/body", post(|| async { Body::from_stream(frames(9)) }))
        .route(
            "/upload",
            post(|body: Body| async move { body.collect().await.map(drop).map_err(|_| "cut off") }),
        );
    net::serve(app).await
}

/// The time of a call, and whether it was ended early.
type End = (Duration, bool);

/// Calls the server with `reqwest` alone.
async fn bare(client: &reqwest::Client, at: SocketAddr, path: &str) -> End {
    let start = Instant::now();
    let mut request = client.post(format!("http://{at}{path}"));
    if path == "/upload" {
        request = request.body(reqwest::Body::wrap_stream(frames(9)));
    }
    let call = async { request.send().await?.bytes().await };
    let result = soon(call).await;
    assert!(result.as_ref().err().is_none_or(reqwest::Error::is_timeout), "{result:?}");
    (start.elapsed(), result.is_err())
}

/// Calls the server through a stack around `reqwest`.
async fn stacked<S, B>(service: S, at: SocketAddr, path: &str, phase: TimeoutPhase) -> End
where
    S: Service<Request<reqwest::Body>, Response = Response<B>, Error = BoxError>,
    B: http_body::Body<Data = Bytes, Error: Into<BoxError>>,
{
    let start = Instant::now();
    let body = match path {
        "/upload" => reqwest::Body::wrap_stream(frames(9)),
        _ => reqwest::Body::default(),
    };
    let request = Request::post(format!("http://{at}{path}")).body(body).unwrap();
    let call =
        async { service.oneshot(request).await?.into_body().collect().await.map_err(Into::into) };
    let result: Result<_, BoxError> = soon(call).await;
    if let Err(error) = &result {
        let kind = Rejected::find(&**error).map(Rejected::kind);
        assert_eq!(kind, Some(RejectedKind::TimedOut(phase)), "{path}: {error}");
    }
    (start.elapsed(), result.is_err())
}

const PATHS: [&str; 3] = ["/head", "/body", "/upload"];

#[track_caller]
fn assert_alike(case: &str, (took, ended): End, reqwest: End) {
    assert_eq!(ended, reqwest.1, "{case}: {took:?}, reqwest: {reqwest:?}");
    assert!(took.abs_diff(reqwest.0) < ms(300), "{case}: {took:?}, reqwest: {reqwest:?}");
}

#[tokio::test]
async fn default_deadline_and_total_end_calls_as_the_timeout_of_reqwest_does() {
    let at = serve().await;
    let client = reqwest::Client::builder().timeout(ms(450)).build().unwrap();
    for path in PATHS {
        let reqwest = bare(&client, at, path).await;
        assert!(reqwest.1, "{path}");

        let whole = ServiceBuilder::new()
            .layer(DeadlineLayer::new().default_of(ms(450)).propagate_only())
            .layer(RetryLayer::http())
            .layer(TimeoutLayer::new(Timeouts::new()))
            .service(HttpClient::new(reqwest::Client::new()));
        assert_alike(path, stacked(whole, at, path, TimeoutPhase::Deadline).await, reqwest);

        let attempt = TimeoutLayer::new(Timeouts::new().total(ms(450)))
            .layer(HttpClient::new(reqwest::Client::new()));
        assert_alike(path, stacked(attempt, at, path, TimeoutPhase::Total).await, reqwest);
    }
}

/// The timeout of one request is a deadline of the application.
#[tokio::test]
async fn deadline_of_a_request_ends_it_as_the_timeout_of_a_reqwest_request_does() {
    let at = serve().await;
    let client = reqwest::Client::builder().timeout(ms(100)).build().unwrap();
    let request = client.post(format!("http://{at}/body")).timeout(ms(2000));
    assert!(soon(request.send()).await.unwrap().bytes().await.is_ok());

    let service = ServiceBuilder::new()
        .layer(DeadlineLayer::new().default_of(ms(100)))
        .service(HttpClient::new(reqwest::Client::new()));
    let mut request =
        Request::post(format!("http://{at}/body")).body(reqwest::Body::default()).unwrap();
    request.extensions_mut().insert(Deadline::after(ms(2000)));
    let response = soon(service.oneshot(request)).await.unwrap();
    assert!(soon(response.into_body().collect()).await.is_ok());
}

#[tokio::test]
async fn head_first_frame_and_idle_end_calls_as_the_read_timeout_of_reqwest_does() {
    let at = serve().await;
    for time in [ms(450), ms(60)] {
        let client = reqwest::Client::builder().read_timeout(time).build().unwrap();
        for path in ["/head", "/body"] {
            let reqwest = bare(&client, at, path).await;
            assert_eq!(reqwest.1, path == "/head" || time == ms(60), "{path} {time:?}");
            let timeouts = Timeouts::new().head(time).first_frame(time).response_idle(time);
            let service = ServiceBuilder::new()
                .layer(TimeoutLayer::new(timeouts))
                .service(HttpClient::new(reqwest::Client::new()));
            let phase = if path == "/head" { TimeoutPhase::Head } else { TimeoutPhase::FirstFrame };
            let case = format!("{path} {time:?}");
            assert_alike(&case, stacked(service, at, path, phase).await, reqwest);
        }
    }
}

/// A response total does not count the upload.
#[tokio::test]
async fn response_total_ends_a_slow_response_and_no_slow_upload() {
    let at = serve().await;
    for (path, ended) in [("/head", true), ("/body", true), ("/upload", false)] {
        let service = TimeoutLayer::new(Timeouts::new().response_total(ms(450)))
            .layer(HttpClient::new(reqwest::Client::new()));
        let seen = stacked(service, at, path, TimeoutPhase::ResponseTotal).await;
        assert_eq!(seen.1, ended, "{path}: {seen:?}");
    }
}
