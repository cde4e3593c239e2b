use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use buttress::{BoxError, ConcurrencyLimitLayer, TimeoutLayer, Timeouts, limit::adaptive::Fixed};
use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use tokio::{runtime::Builder, time::sleep};
use tower::{Layer, ServiceExt, service_fn};

pub struct Endless;

impl Body for Endless {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"frame")))))
    }
}

fn limit(adaptive: bool, max: Duration) -> ConcurrencyLimitLayer {
    let layer = if adaptive {
        ConcurrencyLimitLayer::adaptive(Fixed::new(1).unwrap())
    } else {
        ConcurrencyLimitLayer::new(1)
    };
    layer.max_unread(max)
}

async fn unread(layer: &ConcurrencyLimitLayer) -> impl Sized + use<> {
    let inner = service_fn(|_: Request<()>| async { Ok::<_, BoxError>(Response::new(Endless)) });
    layer.layer(inner).oneshot(Request::new(())).await.unwrap()
}

/// The permit of an unread response is released although an earlier, dropped limit ran its sweeper on a runtime that
/// is no longer driven.
fn sweeper_of_another_runtime(adaptive: bool) {
    let first = Builder::new_current_thread().enable_all().build().unwrap();
    let second = Builder::new_current_thread().enable_all().build().unwrap();
    let mut stuck = 0;
    // Several rounds, because other tests use the free list of slots, too.
    for _ in 0..8 {
        first.block_on(async {
            let layer = limit(adaptive, Duration::from_secs(10));
            drop(unread(&layer).await);
        });
        second.block_on(async {
            let layer = limit(adaptive, Duration::from_millis(40));
            let _held = unread(&layer).await;
            sleep(Duration::from_millis(400)).await;
            stuck += layer.handle().in_flight();
        });
    }
    drop(first);
    assert_eq!(stuck, 0, "permits of unread responses that were not released (of 8)");
}

#[test]
fn sweeper_of_another_runtime_adaptive() {
    sweeper_of_another_runtime(true);
}

#[test]
fn sweeper_of_another_runtime_fixed() {
    sweeper_of_another_runtime(false);
}

/// A response that is not read ends with the timeout of an inner layer, whether the limit still exists or not.
#[tokio::test(start_paused = true)]
async fn unread_response_of_a_dropped_layer_is_ended() {
    for kept in [true, false] {
        let inner =
            service_fn(|_: Request<()>| async { Ok::<_, BoxError>(Response::new(Endless)) });
        let layer = ConcurrencyLimitLayer::new(1).max_unread(Duration::from_secs(60));
        let service = layer.layer(TimeoutLayer::new(Timeouts::new()).as_is().layer(inner));
        let call = tokio::spawn(service.oneshot(Request::new(())));
        let layer = kept.then_some(layer);
        let mut body = call.await.unwrap().unwrap().into_body();
        let _ = body.frame().await.unwrap().unwrap();
        sleep(Duration::from_secs(80)).await;
        let _ = body.frame().await;
        let ended = matches!(body.frame().await, Some(Err(_)) | None);
        drop(layer);
        assert!(ended, "layer kept: {kept}");
    }
}

/// A forked layer copies the algorithm, whose times are relative to the clock of the old layer. It has to adapt at once.
async fn fork_adapts<A>(algorithm: A, answers_first: &'static [u16], is_set: bool)
where
    A: buttress::limit::adaptive::Algorithm + Clone,
{
    fn inner(
        status: u16,
        took: Duration,
    ) -> impl tower::Service<
        Request<()>,
        Response = Response<http_body_util::Empty<Bytes>>,
        Error = BoxError,
        Future: Send,
    > + Clone {
        service_fn(move |_: Request<()>| async move {
            sleep(took).await;
            let mut response = Response::new(http_body_util::Empty::new());
            *response.status_mut() = status.try_into().unwrap();
            Ok(response)
        })
    }
    let layer = ConcurrencyLimitLayer::adaptive(algorithm);
    tokio::time::advance(Duration::from_secs(3600)).await;
    for status in answers_first {
        for _ in 0..2000 {
            let _ = layer
                .layer(inner(*status, Duration::from_millis(10)))
                .oneshot(Request::new(()))
                .await;
        }
    }
    if is_set {
        layer.handle().set_limit(1000).unwrap();
    }
    let before = layer.handle().limit();
    let fork = layer.clone().retry_after(Duration::from_secs(2));
    assert_eq!(fork.handle().limit(), before);
    let mut changes = [0, 0];
    for (layer, changes) in [&layer, &fork].into_iter().zip(&mut changes) {
        for _ in 0..4000 {
            let limit = layer.handle().limit();
            let _ =
                layer.layer(inner(503, Duration::from_millis(10))).oneshot(Request::new(())).await;
            *changes += u32::from(layer.handle().limit() != limit);
        }
    }
    assert!(changes[0] > 0, "the old layer adapts: {changes:?}");
    assert!(
        changes[1] > 0,
        "the fork does not adapt: {changes:?} changes of the limit in 40 s of failures"
    );
}

#[tokio::test(start_paused = true)]
async fn fork_of_aimd_adapts() {
    use buttress::limit::adaptive::Aimd;
    fork_adapts(Aimd::new(1000, 1..=1000).unwrap(), &[503], true).await;
}

#[tokio::test(start_paused = true)]
async fn fork_of_knee_adapts() {
    use buttress::limit::adaptive::Knee;
    fork_adapts(Knee::new(1000, 1..=1000).unwrap(), &[200, 503], false).await;
}

/// One runtime: the sweeper of a dropped limit with a long time is late for the next limit.
#[tokio::test(start_paused = true)]
async fn sweeper_is_not_late_for_the_next_limit() {
    for adaptive in [true, false] {
        let mut late = 0;
        for _ in 0..8 {
            let layer = limit(adaptive, Duration::from_secs(60));
            drop(unread(&layer).await);
            drop(layer);
            tokio::task::yield_now().await;
            let layer = limit(adaptive, Duration::from_millis(80));
            let _held = unread(&layer).await;
            // 80 ms, and a quarter.
            sleep(Duration::from_millis(101)).await;
            late += layer.handle().in_flight();
        }
        assert_eq!(late, 0, "adaptive: {adaptive}");
    }
}
