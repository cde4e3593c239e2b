//! Streams through a whole stack with its defaults.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, RetryLayer, TimeoutLayer, Trip,
    breaker::CircuitState, timeout::TimeoutPhase,
};
use http::{Request, Response};
use tokio::time::Instant;
use tower::{Layer, Service, ServiceBuilder, ServiceExt};

use crate::layers::time::fixtures::*;

/// Responds with these bodies, one after the other.
fn answering<B: 'static>(
    bodies: impl IntoIterator<Item = Paced>,
) -> impl Service<Request<B>, Response = Response<Paced>, Error = BoxError, Future: Send> + Clone {
    let bodies: Vec<_> = bodies.into_iter().collect();
    let bodies = Arc::new(Mutex::new(bodies));
    serve(move |_| {
        let body = bodies.lock().unwrap().remove(0);
        async move { Ok(Response::new(body)) }
    })
}

#[tokio::test(start_paused = true)]
async fn five_minutes_with_a_frame_every_20_seconds_pass_all_defaults() {
    let service = ServiceBuilder::new()
        .layer(RetryLayer::http())
        .layer(CircuitBreakerLayer::http())
        .layer(ConcurrencyLimitLayer::new(1).queue(1, Duration::from_secs(1)))
        .layer(TimeoutLayer::http())
        .service(answering([Paced::every(secs(20), 15)]));
    let start = Instant::now();
    let response = service.oneshot(Request::new(Nothing::new())).await.unwrap();
    let (frames, end) = drain(response.into_body()).await;
    end.unwrap();
    assert_eq!((frames, start.elapsed()), (15, secs(300)));

    // A server that responds with the stream.
    let service = TimeoutLayer::server().respond().layer(answering([Paced::every(secs(20), 15)]));
    let response = service.oneshot(Request::new(Nothing::new())).await.unwrap();
    assert_eq!(drain(response.into_body()).await.0, 15);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_stalls_is_a_failure_after_the_idle_time() {
    let breaker = CircuitBreakerLayer::new(Trip::consecutive(2));
    let limit = ConcurrencyLimitLayer::new(1);
    let (circuit, places) = (breaker.handle(), limit.handle());
    let service =
        ServiceBuilder::new().layer(breaker).layer(limit).layer(TimeoutLayer::http()).service(
            answering([Paced::every(secs(20), 3).then_silent(), Paced::at([]).then_silent()]),
        );
    for (frames, phase, state) in [
        (3, TimeoutPhase::Idle, CircuitState::Closed),
        (0, TimeoutPhase::FirstFrame, CircuitState::Open),
    ] {
        let start = Instant::now();
        let response = service.clone().oneshot(Request::new(Nothing::new())).await.unwrap();
        let (seen, end) = drain(response.into_body()).await;
        assert_eq!((seen, phase_of(&end.unwrap_err())), (frames, phase));
        assert!(start.elapsed() <= secs(121));
        assert_eq!((circuit.state(), places.in_flight()), (state, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_timeout_is_retried_where_that_is_safe() {
    let calls = Arc::new(Mutex::new(0));
    let inner = {
        let calls = calls.clone();
        serve(move |_: Request<_>| {
            *calls.lock().unwrap() += 1;
            let late = *calls.lock().unwrap() == 1;
            async move {
                if late {
                    std::future::pending::<()>().await;
                }
                Ok(Response::new(Nothing::new()))
            }
        })
    };
    let service =
        ServiceBuilder::new().layer(RetryLayer::http()).layer(TimeoutLayer::http()).service(inner);
    service.clone().oneshot(Request::new(Nothing::new())).await.unwrap();
    assert_eq!(*calls.lock().unwrap(), 2);
    *calls.lock().unwrap() = 0;
    let post = Request::post("/").body(Nothing::new()).unwrap();
    assert!(service.oneshot(post).await.is_err());
    assert_eq!(*calls.lock().unwrap(), 1, "the server may have processed the request");
}
