//! Where it goes without a type annotation: axum's routers, tonic's servers and clients, tasks.

use std::convert::Infallible;

use axum::{Router, body::Body, routing::get};
use buttress::{DeadlineLayer, TimeoutLayer, Timeouts};
use http::Request;
use http_body_util::BodyExt;
use tokio::time::{Instant, sleep};
use tower::{ServiceBuilder, ServiceExt};
use tower_http::map_request_body::MapRequestBodyLayer;

use crate::kit::*;

#[tokio::test(start_paused = true)]
async fn under_axum() {
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

#[tokio::test(start_paused = true)]
async fn under_axum_with_its_uploads_watched() {
    let app: Router = Router::new().route("/", get(|body: String| async { body })).layer(
        ServiceBuilder::new()
            .layer(TimeoutLayer::new(Timeouts::http()).respond())
            .layer(MapRequestBodyLayer::new(Body::new)),
    );
    let body = Body::new(Paced::every(secs(1), 2).then_silent());
    let start = Instant::now();
    let response = app.oneshot(Request::get("/").body(body).unwrap()).await.unwrap();
    assert_eq!(start.elapsed(), secs(62));
    // The route's own answer to a body that breaks off.
    assert_eq!(response.status(), 400);
}

#[tokio::test(start_paused = true)]
async fn around_a_tonic_client() {
    let channel = tonic::transport::Channel::from_static("http://127.0.0.1:1").connect_lazy();
    let channel = ServiceBuilder::new()
        .layer(TimeoutLayer::http().respond())
        .layer(MapRequestBodyLayer::new(tonic::body::Body::new))
        .service(channel);
    let mut client = tonic_health::pb::health_client::HealthClient::new(channel);
    let check = tonic_health::pb::HealthCheckRequest::default();
    let status = tokio::spawn(async move { client.check(check).await }).await.unwrap().unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable, "nobody listens there: {status}");
}

#[tokio::test(start_paused = true)]
async fn under_a_tonic_server() {
    let (_reporter, health) = tonic_health::server::health_reporter();
    let router = tonic::transport::Server::builder()
        .layer(TimeoutLayer::server().respond())
        .layer(DeadlineLayer::new().default_of(secs(9)).respond())
        .add_service(health);
    // It has nothing to do, and is shut down at once: what is asked is whether its types fit.
    let at = "127.0.0.1:0".parse().unwrap();
    router.serve_with_shutdown(at, std::future::ready(())).await.unwrap();
}
