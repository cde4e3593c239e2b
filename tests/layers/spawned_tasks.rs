//! Stacks over services that mention `BoxError` must compile inside `tokio::spawn`: a where-clause in a
//! future's fields makes rustc report "implementation of `From` is not general enough" (rust-lang#100013).

use std::time::Duration;

use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Outcome, RetryLayer, Trip,
    retry::ReplayBody,
};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Empty, Full, combinators::BoxBody};
use tower::{
    Layer, Service, ServiceBuilder, ServiceExt, service_fn,
    util::{BoxCloneService, BoxCloneSyncService},
};
use tower_http::{map_request_body::MapRequestBodyLayer, timeout::TimeoutLayer};

type Call = Request<Empty<Bytes>>;
type Answer = Response<Full<Bytes>>;

fn call() -> Call {
    Request::new(Empty::new())
}

async fn hello(_: Call) -> Result<Answer, BoxError> {
    Ok(Response::new(Full::new(Bytes::from_static(b"hello"))))
}

async fn boxed_body(_: Call) -> Result<Response<BoxBody<Bytes, BoxError>>, BoxError> {
    let body = Full::new(Bytes::from_static(b"hello"));
    Ok(Response::new(body.map_err(|never| match never {}).boxed()))
}

async fn double(n: u32) -> Result<u32, BoxError> {
    n.checked_mul(2).ok_or_else(|| "too much".into())
}

/// A stack, built anew for each service.
macro_rules! http_stack {
    ($service:expr) => {
        ServiceBuilder::new()
            .layer(CircuitBreakerLayer::http())
            .layer(ConcurrencyLimitLayer::new(4).queue(4, Duration::from_secs(1)))
            .service($service)
    };
}

macro_rules! any_stack {
    ($service:expr) => {
        ServiceBuilder::new()
            .layer(CircuitBreakerLayer::new(Trip::consecutive(2)).per_response())
            .layer(ConcurrencyLimitLayer::new(4).per_response())
            .service($service)
    };
}

/// `ready().await?.call(..)` inside of a task.
macro_rules! spawned_ready {
    ($service:expr, $request:expr) => {{
        let mut service = $service;
        let request = $request;
        tokio::spawn(async move { service.ready().await?.call(request).await }).await.unwrap()
    }};
}

/// `oneshot` inside of a task.
macro_rules! spawned_oneshot {
    ($service:expr, $request:expr) => {{
        let (service, request) = ($service, $request);
        tokio::spawn(async move { service.oneshot(request).await }).await.unwrap()
    }};
}

async fn is_hello<B>(response: Result<Response<B>, BoxError>)
where
    B: http_body::Body<Data = Bytes>,
    B::Error: std::fmt::Debug,
{
    assert_eq!(response.unwrap().into_body().collect().await.unwrap().to_bytes(), "hello");
}

// ===== HTTP =====

#[tokio::test]
async fn service_fn_with_boxed_errors() {
    is_hello(spawned_ready!(http_stack!(service_fn(hello)), call())).await;
}

#[tokio::test]
async fn service_fn_with_boxed_errors_and_a_boxed_body() {
    is_hello(spawned_ready!(http_stack!(service_fn(boxed_body)), call())).await;
}

#[tokio::test]
async fn box_clone_sync_service() {
    let boxed = BoxCloneSyncService::<Call, Answer, BoxError>::new(service_fn(hello));
    is_hello(spawned_ready!(http_stack!(boxed), call())).await;
}

#[tokio::test]
async fn box_clone_service() {
    let boxed = BoxCloneService::<Call, Answer, BoxError>::new(service_fn(hello));
    is_hello(spawned_ready!(http_stack!(boxed), call())).await;
}

#[tokio::test]
async fn a_stack_that_is_boxed_and_layered_again() {
    let inner = BoxCloneSyncService::new(http_stack!(service_fn(hello)));
    is_hello(spawned_ready!(http_stack!(inner), call())).await;
}

#[tokio::test]
async fn layers_of_tower_with_boxed_errors_above_and_below() {
    let service = ServiceBuilder::new()
        .timeout(Duration::from_secs(1))
        .layer(CircuitBreakerLayer::http())
        .buffer(4)
        .layer(ConcurrencyLimitLayer::new(4))
        .timeout(Duration::from_secs(1))
        .service(service_fn(hello));
    is_hello(spawned_ready!(service, call())).await;
}

#[tokio::test]
async fn a_stack_that_responds() {
    let service = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::http().respond())
        .layer(ConcurrencyLimitLayer::new(4).respond())
        .service(service_fn(hello));
    is_hello(spawned_ready!(service, call())).await;
}

/// The inner service of a retry receives requests whose body can be replayed.
async fn hello_again(_: Request<ReplayBody<Empty<Bytes>>>) -> Result<Answer, BoxError> {
    Ok(Response::new(Full::new(Bytes::from_static(b"hello"))))
}

#[tokio::test]
async fn a_retry_over_boxed_errors() {
    let service = ServiceBuilder::new()
        .layer(RetryLayer::http())
        .service(http_stack!(service_fn(hello_again)));
    is_hello(spawned_ready!(service, call())).await;
    let service = ServiceBuilder::new().layer(RetryLayer::http()).service(service_fn(hello_again));
    is_hello(spawned_oneshot!(service, call())).await;
}

#[tokio::test]
async fn a_retry_over_a_boxed_service_of_the_plain_request_type() {
    let boxed = BoxCloneSyncService::<Request<BoxBody<Bytes, BoxError>>, Answer, BoxError>::new(
        service_fn(async |_| Ok(Response::new(Full::new(Bytes::from_static(b"hello"))))),
    );
    let service = ServiceBuilder::new()
        .layer(RetryLayer::http())
        .layer(CircuitBreakerLayer::http())
        .layer(MapRequestBodyLayer::new(|body: ReplayBody<Empty<Bytes>>| {
            body.map_err(BoxError::from).boxed()
        }))
        .service(boxed);
    is_hello(spawned_ready!(service, call())).await;
}

#[tokio::test]
async fn timeout_of_tower_http_around_each_layer() {
    let timeout =
        TimeoutLayer::with_status_code(StatusCode::GATEWAY_TIMEOUT, Duration::from_secs(1));
    let service = ServiceBuilder::new()
        .layer(timeout)
        .layer(RetryLayer::http())
        .layer(timeout)
        .layer(CircuitBreakerLayer::http())
        .layer(timeout)
        .layer(ConcurrencyLimitLayer::new(1))
        .layer(timeout)
        .service(service_fn(hello_again));
    is_hello(spawned_ready!(service, call())).await;
}

// ===== Custom types =====

#[tokio::test]
async fn own_types_with_boxed_errors() {
    assert_eq!(spawned_ready!(any_stack!(service_fn(double)), 21).unwrap(), 42);
    let boxed = BoxCloneSyncService::<u32, u32, BoxError>::new(service_fn(double));
    assert_eq!(spawned_ready!(any_stack!(boxed), 21).unwrap(), 42);
}

#[tokio::test]
async fn a_retry_of_own_types_with_boxed_errors() {
    fn judge(result: Result<&u32, &BoxError>) -> Outcome {
        result.map_or(Outcome::failure(), |_| Outcome::success())
    }
    let retry = RetryLayer::new().classify(judge);
    let handle = retry.handle();
    let service = ServiceBuilder::new().layer(retry).service(any_stack!(service_fn(double)));
    assert_eq!(spawned_ready!(service.clone(), 21).unwrap(), 42);
    spawned_ready!(service, u32::MAX).unwrap_err();
    // The second failure opened the circuit, which ended the loop.
    assert_eq!(handle.snapshot().retries, 2);
}

#[tokio::test]
async fn a_closure_over_boxed_errors() {
    let layer = CircuitBreakerLayer::new(Trip::consecutive(1)).classify(
        |result: Result<&u32, &BoxError>| match result {
            Ok(_) => Outcome::success(),
            Err(_) => Outcome::failure(),
        },
    );
    let service = layer_of(layer.clone(), service_fn(double));
    spawned_ready!(service, u32::MAX).unwrap_err();
    assert_eq!(layer.handle().snapshot().opened, 1);
}

fn layer_of<L: tower::Layer<S>, S>(layer: L, service: S) -> L::Service {
    layer.layer(service)
}

#[tokio::test]
async fn a_function_over_boxed_errors() {
    fn judge(result: Result<&u32, &BoxError>) -> Outcome {
        result.map_or(Outcome::failure(), |_| Outcome::success())
    }
    let layer = CircuitBreakerLayer::new(Trip::consecutive(1)).classify(judge);
    let service = ServiceBuilder::new().layer(layer).service(service_fn(double));
    assert_eq!(spawned_oneshot!(service, 21).unwrap(), 42);
}

// ===== `oneshot`, where rustc accepts it =====

/// The error type is not a box.
#[tokio::test]
async fn oneshot_over_a_typed_error() {
    async fn typed(_: Call) -> Result<Answer, std::io::Error> {
        Ok(Response::new(Full::new(Bytes::from_static(b"hello"))))
    }
    is_hello(spawned_oneshot!(http_stack!(service_fn(typed)), call())).await;
    let service = ServiceBuilder::new()
        .layer(CircuitBreakerLayer::http().respond())
        .layer(ConcurrencyLimitLayer::new(4))
        .service(service_fn(typed));
    is_hello(spawned_oneshot!(service, call())).await;
}

#[tokio::test]
async fn oneshot_whose_future_is_made_before_the_task() {
    let boxed = BoxCloneSyncService::<Call, Answer, BoxError>::new(service_fn(hello));
    is_hello(tokio::spawn(http_stack!(boxed).oneshot(call())).await.unwrap()).await;
    is_hello(tokio::spawn(http_stack!(service_fn(hello)).oneshot(call())).await.unwrap()).await;
}

// ===== Bodies that are read in a task =====

/// The type of the body names `BoxError`, so reading it in a task must not require another bound on its error.
#[tokio::test]
async fn a_boxed_body_is_read_inside_of_a_task() {
    use buttress::{DeadlineLayer, TimeoutLayer};

    async fn boxed<B>(_: Request<B>) -> Result<Response<BoxBody<Bytes, BoxError>>, BoxError> {
        boxed_body(call()).await
    }

    macro_rules! read {
        ($service:expr) => {{
            let mut service = $service;
            let task = tokio::spawn(async move {
                let response = service.ready().await?.call(call()).await?;
                Ok::<_, BoxError>(response.into_body().collect().await?.to_bytes())
            });
            assert_eq!(task.await.unwrap().unwrap(), "hello");
        }};
    }
    read!(TimeoutLayer::http().layer(service_fn(boxed)));
    read!(DeadlineLayer::new().layer(http_stack!(service_fn(boxed))));
    read!(RetryLayer::http().layer(TimeoutLayer::http().layer(service_fn(boxed))));
    read!(http_stack!(TimeoutLayer::http().layer(service_fn(boxed))));
    {
        let config = buttress::config::ClientConfig::default();
        let stack = buttress::stack::ClientStack::new(&config).unwrap();
        read!(stack.layer(service_fn(boxed)));
    }
}
