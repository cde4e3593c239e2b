//! Stacks without a type annotation: axum's routers, tonic's servers and clients, tasks.

use std::convert::Infallible;

use axum::{Router, body::Body, routing::get};
use buttress::{DeadlineLayer, TimeoutLayer, Timeouts};
use http::Request;
use http_body_util::BodyExt;
use tokio::time::{Instant, sleep};
use tower::{Layer, ServiceBuilder, ServiceExt};
use tower_http::map_request_body::MapRequestBodyLayer;

use crate::layers::time::fixtures::*;

#[tokio::test(start_paused = true)]
async fn a_timeout_works_under_axum() {
    let app: Router = Router::new()
        .route("/", get(|| async { "hello" }))
        .route("/late", get(|| async { sleep(secs(31)).await }))
        .layer(TimeoutLayer::server().respond());
    for (path, status) in [("/", 200), ("/late", 503)] {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let task = tokio::spawn(app.clone().oneshot(request));
        let response: Result<_, Infallible> = task.await.unwrap();
        let response = response.unwrap();
        assert_eq!(response.status(), status);
        if path == "/" {
            assert_eq!(response.headers()["content-length"], "5");
            assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "hello");
        }
    }
}

/// Makes a call to a server with this upload. Returns the status and the time.
async fn answers<B>(
    layer: TimeoutLayer<buttress::timeout::AsIs, buttress::respond::Respond>,
    upload: B,
    thinks: Option<std::time::Duration>,
) -> (u16, std::time::Duration)
where
    B: http_body::Body<Data = bytes::Bytes, Error: Into<buttress::BoxError>> + Send + 'static,
{
    let handler = async move |request: Request<Body>| {
        match thinks {
            Some(time) => {
                request.into_body().collect().await.map_err(|_| http::StatusCode::BAD_REQUEST)?;
                sleep(time).await;
                Ok("hello")
            }
            // The handler holds the request and never reads it.
            None => {
                std::future::pending::<()>().await;
                drop(request);
                Err(http::StatusCode::OK)
            }
        }
    };
    let app: Router = Router::new().route("/", axum::routing::post(handler)).layer(layer);
    let request = Request::post("/").body(Body::new(upload)).unwrap();
    let start = Instant::now();
    let response = app.oneshot(request).await.unwrap();
    (response.status().as_u16(), start.elapsed())
}

#[tokio::test(start_paused = true)]
async fn the_timeout_of_a_server_begins_when_the_request_has_been_received() {
    let layer = || TimeoutLayer::server().min_body_rate(None).respond();
    let slow = || Paced::every(secs(2), 50);
    assert_eq!(answers(layer(), slow(), Some(secs(29))).await, (200, secs(129)));
    assert_eq!(answers(layer(), slow(), Some(secs(31))).await, (503, secs(130)));
    // The client causes the timeout of an upload that stalls, and the reader of the body receives the error.
    let silent = Paced::every(secs(2), 5).then_silent();
    assert_eq!(answers(layer(), silent, Some(secs(1))).await, (400, secs(70)));
    // A handler that never reads the request has no more time than any other.
    assert_eq!(answers(layer(), slow(), None).await, (503, secs(30)));
    assert_eq!(answers(layer().head(secs(180)), slow(), None).await, (503, secs(180)));
    assert_eq!(answers(layer().head(None).total(secs(7)), slow(), None).await, (503, secs(7)));
}

#[tokio::test(start_paused = true)]
async fn the_timeout_of_a_tonic_server_begins_when_the_request_has_been_received() {
    let service = serve(|request: Request<tonic::body::Body>| async move {
        request.into_body().collect().await?;
        sleep(secs(29)).await;
        Ok(http::Response::new(Nothing::new()))
    });
    let body = tonic::body::Body::new(Paced::every(secs(2), 50).map_err(|never| match never {}));
    let start = Instant::now();
    let layer = TimeoutLayer::server().min_body_rate(None);
    layer.layer(service).oneshot(Request::new(body)).await.unwrap();
    assert_eq!(start.elapsed(), secs(129));
}

#[tokio::test(start_paused = true)]
async fn a_timeout_watches_uploads_under_axum() {
    let app: Router = Router::new().route("/", get(|body: String| async { body })).layer(
        ServiceBuilder::new()
            .layer(TimeoutLayer::new(Timeouts::http()).respond())
            .layer(MapRequestBodyLayer::new(Body::new)),
    );
    let body = Body::new(Paced::every(secs(1), 2).then_silent());
    let start = Instant::now();
    let response = app.oneshot(Request::get("/").body(body).unwrap()).await.unwrap();
    assert_eq!(start.elapsed(), secs(62));
    // The response of the route to a body that ends with an error.
    assert_eq!(response.status(), 400);
}

#[tokio::test(start_paused = true)]
async fn a_timeout_works_around_a_tonic_client() {
    let channel = tonic::transport::Channel::from_static("http://127.0.0.1:1").connect_lazy();
    let channel = ServiceBuilder::new()
        .layer(TimeoutLayer::http().respond())
        .layer(MapRequestBodyLayer::new(tonic::body::Body::new))
        .service(channel);
    let mut client = tonic_health::pb::health_client::HealthClient::new(channel);
    let check = tonic_health::pb::HealthCheckRequest::default();
    let status = tokio::spawn(async move { client.check(check).await }).await.unwrap().unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable, "the port has no listener: {status}");
}

#[tokio::test(start_paused = true)]
async fn a_timeout_works_under_a_tonic_server() {
    let (_reporter, health) = tonic_health::server::health_reporter();
    let router = tonic::transport::Server::builder()
        .layer(TimeoutLayer::server().respond())
        .layer(DeadlineLayer::new().default_of(secs(9)).respond())
        .add_service(health);
    // The server is shut down immediately, because the test only checks the types.
    let at = "127.0.0.1:0".parse().unwrap();
    router.serve_with_shutdown(at, std::future::ready(())).await.unwrap();
}
