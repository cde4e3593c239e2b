//! The timeout of the whole response, which does not count the upload.

use std::{future::pending, time::Duration};

use axum::body::Body;
use buttress::{
    BoxError, CircuitBreakerLayer, Deadline, DeadlineLayer, RetryLayer, TimeoutLayer, Timeouts,
    Trip,
    timeout::{SendingBody, TimeoutPhase},
};
use http::{Request, Response};
use http_body_util::BodyExt;
use tokio::time::{Instant, sleep};
use tower::{Layer, Service, ServiceBuilder, ServiceExt};

use crate::layers::time::fixtures::*;

fn layer(time: Duration) -> TimeoutLayer {
    TimeoutLayer::new(Timeouts::new().response_total(time))
}

/// Reads the whole request. Then it responds after `thinking`, with a frame each second.
fn reads_first<B>(
    thinking: Duration,
    frames: u32,
) -> impl Service<Request<B>, Response = Response<Paced>, Error = BoxError, Future: Send> + Clone
where
    B: http_body::Body<Error: Into<BoxError> + Send, Data: Send> + Send + 'static,
{
    serve(move |request: Request<B>| async move {
        request.into_body().collect().await.map_err(Into::into)?;
        sleep(thinking).await;
        Ok(Response::new(Paced::every(secs(1), frames)))
    })
}

/// Responds immediately, with a frame each second, and reads the request at the same time.
fn responds_first<B>(
    frames: u32,
) -> impl Service<Request<B>, Response = Response<Paced>, Error = BoxError, Future: Send> + Clone
where
    B: http_body::Body<Error: Into<BoxError> + Send, Data: Send> + Send + 'static,
{
    serve(move |request: Request<B>| async move {
        tokio::spawn(request.into_body().collect());
        Ok(Response::new(Paced::every(secs(1), frames)))
    })
}

/// The number of frames of the response, the time of the call, and the phase that ended it.
type End = (usize, Duration, Option<TimeoutPhase>);

async fn end<S, RB, B>(service: S, body: B) -> End
where
    S: Service<Request<B>, Response = Response<RB>, Error = BoxError>,
    RB: http_body::Body<Error = BoxError> + Unpin,
{
    let start = Instant::now();
    match service.oneshot(Request::new(body)).await {
        Err(error) => (0, start.elapsed(), Some(phase_of(&error))),
        Ok(response) => {
            let (frames, result) = drain(response.into_body()).await;
            (frames, start.elapsed(), result.err().map(|error| phase_of(&error)))
        }
    }
}

const CUT: Option<TimeoutPhase> = Some(TimeoutPhase::ResponseTotal);

#[tokio::test(start_paused = true)]
async fn response_total_bounds_the_head_and_the_body_from_the_end_of_the_request() {
    // The upload takes 100 s.
    let upload = || Paced::every(secs(2), 50);
    for (thinking, frames, expected) in [
        (4, 0, (0, secs(104), None)),
        (6, 0, (0, secs(105), CUT)),
        (1, 3, (3, secs(104), None)),
        (1, 9, (3, secs(105), CUT)),
    ] {
        let service = layer(secs(5)).layer(reads_first(secs(thinking), frames));
        let ended = end(service, upload()).await;
        // A frame at the instant of the timeout is not late.
        let allowed = [expected, (expected.0 + 1, expected.1, expected.2)];
        assert!(allowed.contains(&ended), "{thinking} {frames}: {ended:?}");
    }
    // Without a request body it counts from the call.
    let service = layer(secs(5)).layer(reads_first(secs(6), 0));
    assert_eq!(end(service, Nothing::new()).await, (0, secs(5), CUT));
}

#[tokio::test(start_paused = true)]
async fn response_total_counts_from_the_end_of_a_request_that_outlasts_the_response_head() {
    let service = || layer(ms(5500)).layer(responds_first(1000));
    assert_eq!(end(service(), Paced::every(secs(2), 50)).await, (105, ms(105_500), CUT));
    // The end of the request wakes a reader of a silent response.
    let silent = serve(|request: Request<SendingBody<Paced>>| async move {
        tokio::spawn(request.into_body().collect());
        Ok(Response::new(Paced::at([]).then_silent()))
    });
    let ended = end(layer(ms(5500)).layer(silent), Paced::every(secs(2), 50)).await;
    assert_eq!(ended, (0, ms(105_500), CUT));
    // A request without an end is not sent.
    let service = layer(ms(5500)).layer(responds_first(1000));
    let ended = end(service, Paced::every(secs(2), 3).then_silent()).await;
    assert_eq!(ended, (1000, secs(1000), None));
}

/// The response head is there at the first poll, and the reader is late.
#[tokio::test(start_paused = true)]
async fn response_total_of_a_request_sent_before_the_response_head_counts_a_late_reader() {
    let service = || {
        layer(secs(5)).layer(serve(|request: Request<SendingBody<Paced>>| async move {
            drop(request);
            Ok(Response::new(Paced::at([]).then_silent()))
        }))
    };
    for body in [Paced::every(secs(2), 50), Paced::at([])] {
        let start = Instant::now();
        let response = service().oneshot(Request::new(body)).await.unwrap();
        sleep(secs(3)).await;
        let (_, result) = drain(response.into_body()).await;
        let ended = (phase_of(&result.unwrap_err()), start.elapsed());
        assert_eq!(ended, (TimeoutPhase::ResponseTotal, secs(5)));
    }
}

/// The request is sent completely after 4 s, and the reader is late.
#[tokio::test(start_paused = true)]
async fn response_total_of_a_request_sent_after_the_response_head_counts_a_late_reader() {
    let silent = serve(|request: Request<SendingBody<Paced>>| async move {
        tokio::spawn(request.into_body().collect());
        Ok(Response::new(Paced::at([]).then_silent()))
    });
    let start = Instant::now();
    let service = layer(secs(5)).layer(silent);
    let response = service.oneshot(Request::new(Paced::every(secs(2), 2))).await.unwrap();
    sleep(secs(7)).await;
    let (_, result) = drain(response.into_body()).await;
    let ended = (phase_of(&result.unwrap_err()), start.elapsed());
    assert_eq!(ended, (TimeoutPhase::ResponseTotal, secs(9)));
}

#[tokio::test(start_paused = true)]
async fn request_that_the_service_has_dropped_has_been_sent() {
    let service = layer(secs(5)).layer(serve(|request: Request<SendingBody<Paced>>| async move {
        drop(request);
        Ok(Response::new(Paced::every(ms(1500), 10)))
    }));
    assert_eq!(end(service, Paced::every(secs(2), 50)).await, (3, secs(5), CUT));
}

#[tokio::test(start_paused = true)]
async fn earlier_of_response_total_and_the_other_bounds_ends_the_call() {
    let upload = || Paced::every(secs(1), 10);
    for (timeouts, phase, after) in [
        (Timeouts::new().total(secs(14)), TimeoutPhase::Total, 14),
        (Timeouts::new().total(secs(16)), TimeoutPhase::ResponseTotal, 15),
        (Timeouts::new().head(secs(4)), TimeoutPhase::Head, 14),
        (Timeouts::new().head(secs(6)), TimeoutPhase::ResponseTotal, 15),
    ] {
        let service = layer(secs(5)).layer(reads_first(secs(60), 0));
        let mut request = Request::new(upload());
        request.extensions_mut().insert(timeouts);
        let start = Instant::now();
        let error = service.oneshot(request).await.unwrap_err();
        assert_eq!((phase_of(&error), start.elapsed()), (phase, secs(after)), "{timeouts:?}");
    }
    let service = layer(secs(5)).layer(reads_first(secs(60), 0));
    let mut request = Request::new(upload());
    request.extensions_mut().insert(Deadline::after(secs(13)));
    assert_eq!(phase_of(&service.oneshot(request).await.unwrap_err()), TimeoutPhase::Deadline);
}

#[tokio::test(start_paused = true)]
async fn response_total_is_a_failure_and_counted_and_can_be_changed_while_the_layer_runs() {
    let (breaker, timeout) = (CircuitBreakerLayer::new(Trip::consecutive(9)), layer(secs(60)));
    let (circuit, handle) = (breaker.handle(), timeout.handle());
    let service = breaker.layer(timeout.layer(reads_first(secs(6), 0)));
    handle.set(Timeouts::new().response_total(secs(5))).unwrap();
    let error = service.clone().oneshot(Request::new(Paced::every(secs(2), 50))).await.unwrap_err();
    assert_eq!(phase_of(&error), TimeoutPhase::ResponseTotal);
    assert_eq!(circuit.snapshot().seen.consecutive_failures, 1);
    let snapshot = handle.snapshot();
    assert_eq!((snapshot.timed_out_by(TimeoutPhase::ResponseTotal), snapshot.timed_out()), (1, 1));
    assert_eq!(snapshot.timeouts.get(TimeoutPhase::ResponseTotal), Some(secs(5)));
    let fault = Timeouts::new().response_total(Duration::ZERO).check().unwrap_err();
    assert_eq!(fault.field, "response_total");
    handle.set(Timeouts::new().response_total(None)).unwrap();
    assert!(service.oneshot(Request::new(Paced::every(secs(2), 1))).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn response_total_of_a_server_does_not_count_the_upload_of_an_axum_body() {
    let server =
        TimeoutLayer::server().head(None).min_body_rate(None).response_total(secs(5)).respond();
    let upload = || Body::new(Paced::every(secs(2), 50));
    for (thinking, status, after) in [(4, 200, 104), (6, 503, 105)] {
        let service = server.layer(reads_first::<Body>(secs(thinking), 0));
        let start = Instant::now();
        let response = service.oneshot(Request::new(upload())).await.unwrap();
        assert_eq!((response.status().as_u16(), start.elapsed()), (status, secs(after)));
    }
    let service = server.layer(responds_first::<Body>(1000));
    let start = Instant::now();
    let response = service.oneshot(Request::new(upload())).await.unwrap();
    let (_, result) = drain(response.into_body()).await;
    assert_eq!(phase_of(&result.unwrap_err()), TimeoutPhase::ResponseTotal);
    assert_eq!(start.elapsed(), secs(105));
}

// ===== Each attempt, or the whole call =====

/// Returns a stack with three attempts and delays of up to 1 s.
fn retried<S>(
    deadline: DeadlineLayer,
    timeouts: Timeouts,
    inner: S,
) -> impl Service<Request<Nothing>, Response: Send, Error = BoxError, Future: Send>
where
    S: Service<
            Request<SendingBody<buttress::retry::ReplayBody<Nothing>>>,
            Response = Response<Paced>,
            Error = BoxError,
            Future: Send,
        > + Clone
        + Send
        + Sync
        + 'static,
{
    ServiceBuilder::new()
        .layer(deadline.propagate_only())
        .layer(RetryLayer::http().backoff(buttress::Backoff::constant(secs(1))).without_budget())
        .layer(TimeoutLayer::new(timeouts))
        .service(inner)
}

#[tokio::test(start_paused = true)]
async fn total_and_response_total_apply_to_each_attempt_and_a_deadline_to_the_whole_call() {
    let hangs = || serve(|_| pending::<Result<Response<Paced>, BoxError>>());
    let default = || DeadlineLayer::new().default_of(secs(2));
    for (deadline, timeouts, after) in [
        (DeadlineLayer::new(), Timeouts::new().total(secs(2)), 6),
        (DeadlineLayer::new(), Timeouts::new().response_total(secs(2)), 6),
        (default(), Timeouts::new(), 2),
        (default(), Timeouts::new().total(secs(60)), 2),
    ] {
        let start = Instant::now();
        let call = retried(deadline, timeouts, hangs()).oneshot(request());
        assert!(call.await.is_err());
        let waits = if after == 6 { secs(2) } else { Duration::ZERO };
        let expected = secs(after)..=secs(after) + waits;
        assert!(expected.contains(&start.elapsed()), "{timeouts:?}: {:?}", start.elapsed());
    }
}
