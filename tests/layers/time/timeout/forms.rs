//! The forms of a timeout: errors, responses and gRPC statuses, but never a 408.

use buttress::{Rejected, TimeoutLayer, Timeouts, outcome::Outcome, timeout::TimeoutPhase};
use http::{Request, Response, StatusCode};
use http_body_util::BodyExt;
use tower::{Layer, ServiceExt};

use crate::layers::time::fixtures::*;
use crate::support::{Oops, Piece, Strict, Then, grpc, status};

fn asking(content: &'static str) -> Request<Nothing> {
    Request::post("/").header("content-type", content).body(Nothing::new()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_client_responds_504_and_a_server_503() {
    let (inner, _watch) = Strict::holding();
    let client = TimeoutLayer::http().respond().layer(inner.clone());
    let server = TimeoutLayer::server().respond().layer(inner.clone());
    let [client, server] = [
        client.oneshot(request()).await.unwrap().map(BodyExt::boxed_unsync),
        server.oneshot(request()).await.unwrap().map(BodyExt::boxed_unsync),
    ];
    assert_eq!(client.status(), StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(server.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(server.extensions().get::<Rejected>().unwrap().layer(), "server_timeout");
    assert_eq!(client.headers()["content-type"], "application/problem+json");
    let text = client.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(
        text,
        r#"{"type":"about:blank","title":"Gateway Timeout","status":504,"reason":"timeout_head"}"#
    );
    let own = TimeoutLayer::http().respond_with(|_: &Rejected| Err(Oops("late"))).layer(inner);
    assert_eq!(own.oneshot(request()).await.map(drop), Err(Oops("late")));
}

#[tokio::test(start_paused = true)]
async fn grpc_callers_receive_deadline_exceeded_in_the_head_or_in_the_trailers() {
    let (inner, watch) = Strict::holding();
    let service = TimeoutLayer::http().respond().layer(inner);
    let response = service.clone().oneshot(asking("application/grpc")).await.unwrap();
    assert_eq!(
        (response.status(), &response.headers()["grpc-status"]),
        (StatusCode::OK, &"4".parse().unwrap())
    );

    watch.script([Then::Answer(grpc([Piece::data("a"), Piece::Stuck]))]);
    let response = service.clone().oneshot(asking("application/grpc+proto")).await.unwrap();
    let mut body = response.into_body();
    assert!(body.frame().await.unwrap().unwrap().is_data());
    let trailers = body.frame().await.unwrap().unwrap().into_trailers().unwrap();
    assert_eq!(
        (&trailers["grpc-status"], &trailers["grpc-message"]),
        (&"4".parse().unwrap(), &"timeout_response_idle".parse().unwrap())
    );
    assert!(body.frame().await.is_none());

    // Without gRPC the body can only end with an error.
    watch.script([Then::Answer(grpc([Piece::data("a"), Piece::Stuck]))]);
    let body = service.oneshot(request()).await.unwrap().into_body();
    assert_eq!(phase_of(&drain(body).await.1.unwrap_err()), TimeoutPhase::Idle);
}

#[tokio::test(start_paused = true)]
async fn services_of_any_types_are_timed() {
    let service = tower::service_fn(|n: u64| async move {
        tokio::time::sleep(secs(n)).await;
        Ok::<_, Oops>(n)
    });
    let timeouts = Timeouts::new().head(secs(3));
    let layer = TimeoutLayer::new(timeouts).per_response();
    assert_eq!(layer.layer(service).oneshot(3).await.unwrap(), 3);
    let error = layer.layer(service).oneshot(4).await.unwrap_err();
    assert_eq!(phase_of(&error), TimeoutPhase::Head);
    let own = layer.respond_with(|_: &Rejected| Ok(0)).layer(service);
    assert_eq!(own.oneshot(4).await, Ok::<_, Oops>(0));
}

#[tokio::test(start_paused = true)]
async fn an_error_of_the_service_is_returned_unchanged() {
    let (inner, watch) = Strict::new();
    watch.script([Then::Fail(Oops("of its own"))]);
    let error = TimeoutLayer::http().layer(inner).oneshot(request()).await.unwrap_err();
    assert_eq!(error.downcast_ref(), Some(&Oops("of its own")), "not wrapped");
}

#[tokio::test(start_paused = true)]
async fn a_timeout_is_a_failure_and_a_stalled_request_is_attributed_to_the_caller() {
    let of = |timeouts, body: Paced| async move {
        let layer = TimeoutLayer::new(timeouts);
        let service = layer.layer(serve(|request: Request<_>| async move {
            BodyExt::collect(request.into_body()).await?;
            std::future::pending::<()>().await;
            Ok(Response::new(status(200).into_body()))
        }));
        let error = service.oneshot(Request::new(body)).await.map(drop).unwrap_err();
        Outcome::of_error(&*error)
    };
    let head = of(Timeouts::http(), Paced::every(secs(1), 1)).await;
    assert!(head.is_failure());
    assert_eq!(format!("{head:?}"), "Failure(Timeout)");
    let silent = of(Timeouts::http(), Paced::every(secs(1), 1).then_silent()).await;
    assert_eq!(format!("{silent:?}"), "Cancelled(Caller)");
}
