//! The rejections of a whole stack as responses.

use std::{convert::Infallible, time::Duration};

use buttress::{
    Attempts, BoxError, CircuitBreakerLayer, Deadline, DeadlineLayer, Rejected, RespondLayer,
    RetryLayer, outcome::RejectedKind, retry::GiveUpReason,
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use tokio::time::sleep;
use tower::{Layer, ServiceBuilder, ServiceExt, service_fn};

type Body = Full<Bytes>;

fn get() -> Request<Body> {
    Request::new(Body::default())
}

fn grpc() -> Request<Body> {
    let mut request = get();
    *request.method_mut() = http::Method::POST;
    request.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    request
}

#[tokio::test(start_paused = true)]
async fn rejection_after_a_retry_names_the_layer_and_the_attempts() {
    let breaker = CircuitBreakerLayer::http().name("search");
    breaker.handle().force_open();
    let client = ServiceBuilder::new()
        .layer(RespondLayer::new())
        .layer(RetryLayer::http())
        .layer(breaker.open_for(Duration::from_secs(7)))
        .service(service_fn(|_: Request<_>| async {
            Ok::<_, BoxError>(Response::new(Body::default()))
        }));
    let response = client.clone().oneshot(get()).await.unwrap();
    assert_eq!(response.status(), 503);
    let refused = response.extensions().get::<Rejected>().unwrap();
    assert_eq!((refused.kind(), refused.name()), (RejectedKind::ForcedOpen, Some("search")));
    let attempts = Attempts::of(&response);
    assert_eq!((attempts.made, attempts.stop), (1, GiveUpReason::Rejected));
    assert!(!response.into_body().collect().await.unwrap().to_bytes().is_empty());

    let response = client.oneshot(grpc()).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), &response.headers()["grpc-status"]),
        (200, &"14".parse().unwrap())
    );
}

#[tokio::test(start_paused = true)]
async fn attempt_timeouts_and_deadlines_become_responses() {
    macro_rules! slow {
        () => {
            service_fn(|_: Request<_>| async {
                sleep(Duration::from_secs(60)).await;
                Ok::<_, BoxError>(Response::new(Body::default()))
            })
        };
    }
    let retry = RetryLayer::http().attempts(1).attempt_timeout(Duration::from_secs(1));
    let client = ServiceBuilder::new().layer(RespondLayer::new()).layer(retry).service(slow!());
    assert_eq!(client.clone().oneshot(get()).await.unwrap().status(), 504);
    assert_eq!(client.oneshot(grpc()).await.unwrap().headers()["grpc-status"], "4");

    let late = DeadlineLayer::new();
    let client = ServiceBuilder::new().layer(RespondLayer::new()).layer(late).service(slow!());
    let mut request = get();
    request.extensions_mut().insert(Deadline::after(Duration::ZERO));
    assert_eq!(client.oneshot(request).await.unwrap().status(), 504);
}

#[tokio::test]
async fn a_rejection_of_the_application_becomes_a_response() {
    let over = || Rejected::new(RejectedKind::Quota).with_retry_after(Duration::from_secs(30));
    let boxed = service_fn(move |_: Request<Body>| async move {
        Err::<Response<Body>, BoxError>(over().into())
    });
    let response = RespondLayer::new().layer(boxed).oneshot(get()).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), &response.headers()["retry-after"]),
        (429, &"30".parse().unwrap())
    );
    let bare = service_fn(move |_: Request<Body>| async move { Err::<Response<Body>, _>(over()) });
    assert_eq!(RespondLayer::new().layer(bare).oneshot(get()).await.unwrap().status(), 429);
}

#[tokio::test]
async fn other_errors_pass_unchanged() {
    let fails = service_fn(|_: Request<Body>| async {
        Err::<Response<Body>, _>(std::io::Error::other("own"))
    });
    let error: std::io::Error = RespondLayer::new().layer(fails).oneshot(get()).await.unwrap_err();
    assert_eq!(error.to_string(), "own");
    let boxed =
        service_fn(|_: Request<Body>| async { Err::<Response<Body>, BoxError>("own".into()) });
    assert_eq!(
        RespondLayer::new().layer(boxed).oneshot(get()).await.unwrap_err().to_string(),
        "own"
    );
    let well = service_fn(|_: Request<Body>| async {
        Ok::<_, Infallible>(Response::new(Body::from("well")))
    });
    let response = RespondLayer::new().layer(well).oneshot(get()).await.unwrap();
    assert_eq!(http_body::Body::size_hint(response.body()).exact(), Some(4));
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "well");
}
