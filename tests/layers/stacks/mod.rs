//! The stacks of the documentation compile without a type annotation, inside `tokio::spawn` and with
//! `ServiceExt::oneshot`, and work.

mod events;
mod locks;
mod responses;

use std::{convert::Infallible, fmt, time::Duration};

use axum::{Router, body::Body, routing::get};
use buttress::{BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Outcome, Rejected, Trip};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tower::{Service, ServiceBuilder, ServiceExt, service_fn, util::BoxCloneSyncService};
use tower_http::{compression::CompressionLayer, timeout::TimeoutLayer, trace::TraceLayer};

#[derive(Debug)]
struct Row;

#[derive(Debug)]
struct DbError {
    constraint: bool,
}

impl fmt::Display for DbError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("database")
    }
}

impl std::error::Error for DbError {}

async fn query(ok: bool) -> Result<Row, DbError> {
    if ok { Ok(Row) } else { Err(DbError { constraint: true }) }
}

fn for_root() -> Request<Body> {
    Request::new(Body::empty())
}

#[tokio::test(start_paused = true)]
async fn an_axum_server() {
    let limit = ConcurrencyLimitLayer::new(512).queue(128, Duration::from_millis(200));
    let handle = limit.handle();
    let app = Router::new().route("/", get(|| async { "hello" })).layer(limit.respond());
    let response = tokio::spawn(app.oneshot(for_root())).await.unwrap().unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "hello");
    assert_eq!(handle.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_axum_server_among_the_layers_of_tower_http() {
    let breaker = CircuitBreakerLayer::http().respond();
    let handle = breaker.handle();
    let app: Router = Router::new().route("/", get(|| async { "hello" })).layer(
        ServiceBuilder::new()
            .layer(TraceLayer::new_for_http())
            .layer(ConcurrencyLimitLayer::new(512).respond())
            .layer(CompressionLayer::new())
            .layer(TimeoutLayer::with_status_code(
                StatusCode::GATEWAY_TIMEOUT,
                Duration::from_secs(1),
            ))
            .layer(breaker),
    );
    assert_eq!(app.clone().oneshot(for_root()).await.unwrap().status(), 200);
    handle.force_open();
    let response = tokio::spawn(app.oneshot(for_root())).await.unwrap().unwrap();
    assert_eq!(response.status(), 503);
}

#[tokio::test(start_paused = true)]
async fn an_axum_handler_and_a_route() {
    let limit = ConcurrencyLimitLayer::new(2).respond();
    let app: Router = Router::new()
        .route("/", get(async || "one").layer(limit.clone()))
        .route("/two", get(async || "two"))
        .route_layer(CircuitBreakerLayer::http().respond());
    assert_eq!(app.oneshot(for_root()).await.unwrap().status(), 200);
    assert_eq!(limit.handle().in_flight(), 0, "the drop of an axum body ends the call");
}

#[tokio::test(start_paused = true)]
async fn a_hyper_client() {
    let breaker = CircuitBreakerLayer::http();
    let state = breaker.handle();
    let client = ServiceBuilder::new()
        .layer(breaker)
        .layer(ConcurrencyLimitLayer::new(50).queue(500, Duration::from_secs(5)))
        .service(Client::builder(TokioExecutor::new()).build_http());
    state.force_open();
    let request = || Request::get("http://localhost/").body(Empty::<bytes::Bytes>::new()).unwrap();
    let error = tokio::spawn(client.clone().oneshot(request())).await.unwrap().unwrap_err();
    assert!(Rejected::find(&*error).is_some());
    let task =
        tokio::spawn(async move { client.oneshot(request()).await.map(Response::into_body) });
    assert!(task.await.unwrap().is_err());
}

#[tokio::test(start_paused = true)]
async fn a_service_of_its_own_types() {
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(1));
    let state = breaker.handle();
    let db = ServiceBuilder::new()
        .layer(breaker.classify(|r: Result<&Row, &DbError>| match r {
            Ok(_) => Outcome::success(),
            Err(e) if e.constraint => Outcome::success(),
            Err(_) => Outcome::failure(),
        }))
        .service(service_fn(query));
    tokio::spawn(db.clone().oneshot(true)).await.unwrap().unwrap();
    let error = db.clone().oneshot(false).await.unwrap_err();
    assert!(error.downcast_ref::<DbError>().is_some_and(|error| error.constraint));
    assert_eq!(state.state(), buttress::breaker::CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn both_layers_over_a_service_of_its_own_types() {
    fn judge(result: Result<&Row, &BoxError>) -> Outcome {
        result.map_or(Outcome::failure(), |_| Outcome::success())
    }
    let db = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::http().classify(judge))
        .layer(ConcurrencyLimitLayer::new(2).per_response())
        .service(service_fn(query));
    tokio::spawn(db.clone().oneshot(true)).await.unwrap().unwrap();
    // An error that already is a `BoxError` is not boxed again.
    let mut boxed = ServiceBuilder::new()
        .layer(ConcurrencyLimitLayer::new(9).per_response())
        .service(BoxCloneSyncService::new(db));
    let task = tokio::spawn(async move { boxed.ready().await?.call(true).await });
    assert!(task.await.unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_rejection_has_the_form_of_the_user() {
    let layer = ConcurrencyLimitLayer::new(1).per_response().respond_with(|refused: &Rejected| {
        Ok::<_, Infallible>(format!("later: {}", refused.kind().as_str()))
    });
    let handle = layer.handle();
    let service =
        ServiceBuilder::new().layer(layer).service(service_fn(|()| std::future::pending()));
    let mut under_way = tokio_test::task::spawn(service.clone().oneshot(()));
    tokio_test::assert_pending!(under_way.poll());
    assert_eq!(tokio::spawn(service.oneshot(())).await.unwrap(), Ok("later: limit_reached".into()));
    drop(under_way);
    assert_eq!(handle.in_flight(), 0);
}
