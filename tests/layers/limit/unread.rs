//! Responses that their readers abandon, on a paused clock: a body is read by polling it.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use buttress::{
    BoxError, ConcurrencyLimitLayer, Rejected, TimeoutLayer, Timeouts,
    limit::{adaptive::Vegas, partition::CallClass},
    outcome::{RejectedKind, TimeoutPhase},
};
use bytes::Bytes;
use futures_util::FutureExt;
use http::{Request, Response};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, combinators::UnsyncBoxBody};
use tokio::{
    runtime::{Builder, Handle},
    time::{Instant, sleep},
};
use tower::{Layer, ServiceExt, service_fn};

const MAX: Duration = Duration::from_secs(60);
/// The sweeper may be late by a quarter.
const LATE: Duration = Duration::from_secs(75);

/// A body that has a frame at each poll, or never if it is silent.
struct Endless {
    is_silent: bool,
}

impl Body for Endless {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.is_silent {
            return Poll::Pending;
        }
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"frame")))))
    }
}

fn layer(limit: usize) -> ConcurrencyLimitLayer {
    ConcurrencyLimitLayer::new(limit).max_unread(MAX)
}

/// Makes a call through `layer`.
async fn call<L, S, B>(
    layer: &L,
    is_silent: bool,
) -> Result<UnsyncBoxBody<Bytes, BoxError>, BoxError>
where
    L: Layer<
            tower::util::BoxCloneSyncService<Request<()>, Response<Endless>, BoxError>,
            Service = S,
        >,
    S: tower::Service<Request<()>, Response = Response<B>, Error = BoxError>,
    B: Body<Data = Bytes, Error = BoxError> + Send + 'static,
{
    let inner = service_fn(move |_: Request<()>| async move {
        Ok::<_, BoxError>(Response::new(Endless { is_silent }))
    });
    let service = layer.layer(tower::util::BoxCloneSyncService::new(inner));
    Ok(service.oneshot(Request::new(())).await?.into_body().boxed_unsync())
}

#[tokio::test(start_paused = true)]
async fn response_that_is_never_polled_releases_its_permit() {
    let layer = layer(1);
    let handle = layer.handle();
    let _body = call(&layer, false).await.unwrap();
    sleep(MAX - Duration::from_secs(1)).await;
    assert_eq!((handle.in_flight(), handle.snapshot().unread), (1, 0));
    assert!(call(&layer, false).await.is_err());
    sleep(LATE - MAX + Duration::from_secs(1)).await;
    assert_eq!((handle.in_flight(), handle.snapshot().unread), (0, 1));
    call(&layer, false).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn response_that_is_polled_in_time_keeps_its_permit_until_its_reader_stops() {
    let layer = layer(1);
    let handle = layer.handle();
    let mut body = call(&layer, false).await.unwrap();
    for _ in 0..20 {
        sleep(MAX - Duration::from_secs(1)).await;
        body.frame().await.unwrap().unwrap();
    }
    assert_eq!((handle.in_flight(), handle.snapshot().unread), (1, 0));
    sleep(LATE).await;
    assert_eq!((handle.in_flight(), handle.snapshot().unread), (0, 1));
}

#[tokio::test(start_paused = true)]
async fn response_whose_reader_waits_for_its_producer_keeps_its_permit() {
    let layer = layer(1);
    let handle = layer.handle();
    let mut body = call(&layer, true).await.unwrap();
    assert!(body.frame().now_or_never().is_none());
    sleep(LATE * 100).await;
    assert_eq!((handle.in_flight(), handle.snapshot().unread), (1, 0));
    drop(body);
    assert_eq!(handle.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn permit_of_an_unread_response_is_released_once() {
    let layer = layer(2);
    let handle = layer.handle();
    let mut unread = call(&layer, false).await.unwrap();
    let dropped = call(&layer, false).await.unwrap();
    sleep(LATE).await;
    assert_eq!(handle.in_flight(), 0);
    let mut bodies = vec![call(&layer, false).await.unwrap(), call(&layer, false).await.unwrap()];
    // Neither the end of the first body nor the drop of the second one releases a permit of the others.
    drop(dropped);
    unread.frame().await.unwrap().unwrap();
    drop(unread);
    assert_eq!((handle.in_flight(), handle.snapshot().unread), (2, 2));
    bodies.pop();
    assert_eq!(handle.in_flight(), 1);
}

#[tokio::test(start_paused = true)]
async fn queued_caller_gets_the_permit_of_an_unread_response() {
    let layer = layer(1).queue(1, LATE);
    let _unread = call(&layer, false).await.unwrap();
    let start = Instant::now();
    call(&layer, false).await.unwrap();
    assert!(start.elapsed() >= MAX && start.elapsed() <= LATE, "{:?}", start.elapsed());
}

#[tokio::test(start_paused = true)]
async fn inner_timeout_layer_fails_an_unread_response_that_is_read_on() {
    let (limit, timeout) = (layer(1), TimeoutLayer::new(Timeouts::new()));
    let (permits, timeouts) = (limit.handle(), timeout.handle());
    let layer = tower::layer::layer_fn(move |inner: tower::util::BoxCloneSyncService<_, _, _>| {
        let inner = inner.map_request(|_: Request<timeout_body::Of>| Request::new(()));
        limit.layer(timeout.layer(inner))
    });
    let inner = service_fn(|_: Request<()>| async {
        Ok::<_, BoxError>(Response::new(Endless { is_silent: false }))
    });
    let service = layer.layer(tower::util::BoxCloneSyncService::new(inner));
    let request = Request::new(http_body_util::Empty::<Bytes>::new());
    let mut body = service.oneshot(request).await.unwrap().into_body();
    body.frame().await.unwrap().unwrap();
    sleep(LATE).await;
    assert_eq!((permits.in_flight(), permits.snapshot().unread), (0, 1));
    // This poll detects the time without polls and still returns a frame. The next poll fails.
    body.frame().await.unwrap().unwrap();
    let error = body.frame().await.unwrap().unwrap_err();
    let kind = Rejected::find(&*error).unwrap().kind();
    assert_eq!(kind, RejectedKind::TimedOut(TimeoutPhase::Unread));
    assert!(body.frame().await.is_none());
    assert_eq!(timeouts.snapshot().timed_out_by(TimeoutPhase::Unread), 1);
    assert_eq!(permits.in_flight(), 0);
}

mod timeout_body {
    pub type Of = buttress::timeout::SendingBody<http_body_util::Empty<bytes::Bytes>>;
}

#[tokio::test(start_paused = true)]
async fn unread_responses_release_permits_of_adaptive_and_partitioned_limits() {
    let adaptive = ConcurrencyLimitLayer::adaptive(Vegas::default()).max_unread(MAX);
    let handle = adaptive.handle();
    let bodies = [call(&adaptive, false).await.unwrap(), call(&adaptive, true).await.unwrap()];
    sleep(LATE).await;
    assert_eq!((handle.in_flight(), handle.snapshot().unread), (0, 2));
    drop(bodies);
    assert_eq!(handle.in_flight(), 0);

    let sorted = layer(2).classify_by(|_: &Request<()>| CallClass::default().partition(0));
    let sorted = sorted.partitions(&[0.5]);
    let handle = sorted.handle();
    let body = call(&sorted, false).await.unwrap();
    assert_eq!(handle.partitions()[0].in_flight, 1);
    sleep(LATE).await;
    assert_eq!((handle.limit().in_flight(), handle.partitions()[0].in_flight), (0, 0));
    drop(body);
    assert_eq!((handle.limit().in_flight(), handle.partitions()[0].in_flight), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn sweeper_ends_when_no_response_is_left_also_of_a_dropped_layer() {
    let tasks = || Handle::current().metrics().num_alive_tasks();
    let fixed = layer(1);
    let adaptive = ConcurrencyLimitLayer::adaptive(Vegas::default()).max_unread(MAX);
    let mut bodies =
        vec![call(&fixed, false).await.unwrap(), call(&adaptive, false).await.unwrap()];
    drop((fixed, adaptive));
    assert_eq!(tasks(), 2);
    bodies.pop();
    sleep(LATE * 2).await;
    assert_eq!(tasks(), 0);

    // The memory of the first limit may be used for this one while the unread body still exists.
    let layer = layer(1);
    let handle = layer.handle();
    let body = call(&layer, false).await.unwrap();
    drop(bodies);
    assert_eq!((handle.in_flight(), tasks()), (1, 1));
    drop(body);
    sleep(LATE).await;
    assert_eq!((handle.in_flight(), tasks()), (0, 0));
}

#[test]
fn rejected_call_restarts_the_sweeper_that_ended_with_its_runtime() {
    let layer = layer(1);
    let handle = layer.handle();
    let runtime =
        || Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let first = runtime();
    let _body = first.block_on(call(&layer, false)).unwrap();
    drop(first);
    runtime().block_on(async {
        assert!(call(&layer, false).await.is_err());
        sleep(LATE).await;
        assert_eq!((handle.in_flight(), handle.snapshot().unread), (0, 1));
        call(&layer, false).await.unwrap();
    });
}

#[tokio::test(start_paused = true)]
async fn many_responses_are_watched_at_once() {
    let layer = layer(10_000);
    let handle = layer.handle();
    let mut bodies = Vec::new();
    for n in 0..10_000 {
        bodies.push(call(&layer, n % 2 == 0).await.unwrap());
    }
    // After this poll the silent bodies wait for the upstream, so they are not unread.
    for body in &mut bodies {
        let _ = body.frame().now_or_never();
    }
    sleep(LATE).await;
    assert_eq!((handle.in_flight(), handle.snapshot().unread), (5_000, 5_000));
    drop(bodies);
    assert_eq!(handle.in_flight(), 0);
}

#[test]
fn max_unread_of_zero_is_an_error() {
    let error = ConcurrencyLimitLayer::new(1).max_unread(Duration::ZERO).checked().unwrap_err();
    assert_eq!(error.field, "max_unread");
    assert!(layer(1).handle().set_max_unread(Duration::ZERO).is_err());
    assert!(layer(1).max_unread(Duration::MAX).checked().is_ok());
}
