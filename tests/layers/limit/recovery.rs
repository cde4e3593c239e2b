//! A server recovers by itself, because it does not start work whose caller has given up.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use buttress::{
    ConcurrencyLimitLayer, Deadline, limit::partition::CallClass, outcome::RejectedKind,
};
use http::{Request, Response};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};
use tower::{Layer, ServiceExt, service_fn};

use crate::support::{Oops, ScriptBody, empty, refused_as, request};

const MS: Duration = Duration::from_millis(1);

/// 500 calls arrive at once, each with a deadline of 100 ms, at a server that serves one call in 10 ms. Ten are served,
/// the others are rejected at their deadline, and a later call is served at once.
#[tokio::test(start_paused = true)]
async fn a_burst_beyond_its_deadline_does_not_delay_later_calls() {
    let limit = || ConcurrencyLimitLayer::new(1).queue(1000, Duration::from_secs(10));
    burst(limit()).await;
    // The same with partitions and priorities.
    let sorted = limit().classify_by(|_: &Request<()>| CallClass::default().partition(0));
    let layer = sorted.partitions(&[1.0]).reject_by_priority();
    burst(layer).await;
}

async fn burst<L>(layer: L)
where
    L: Layer<Inner>,
    L::Service: tower::Service<Request<()>, Error = buttress::BoxError> + Clone + Send + 'static,
    <L::Service as tower::Service<Request<()>>>::Future: Send,
    <L::Service as tower::Service<Request<()>>>::Response: Send,
{
    let begun = Arc::new(AtomicUsize::new(0));
    let service = layer.layer(Inner(begun.clone()));
    let start = Instant::now();
    let mut callers = JoinSet::new();
    for _ in 0..500 {
        let mut call = request();
        call.extensions_mut().insert(Deadline::after(100 * MS));
        callers.spawn(service.clone().oneshot(call));
    }
    let (mut served, mut late) = (0, 0);
    while let Some(answer) = callers.join_next().await {
        match answer.unwrap() {
            Ok(_) => served += 1,
            refused => {
                assert_eq!(refused_as(refused), RejectedKind::DeadlinePassed);
                late += 1;
            }
        }
    }
    assert_eq!((served, late, begun.load(Ordering::SeqCst)), (10, 490, 10));
    assert!(start.elapsed() <= 105 * MS, "{:?}", start.elapsed());
    let next = Instant::now();
    assert!(service.oneshot(request()).await.is_ok());
    assert!(next.elapsed() <= 11 * MS);
}

/// A service that needs 10 ms per call.
#[derive(Clone)]
struct Inner(Arc<AtomicUsize>);

impl tower::Service<Request<()>> for Inner {
    type Response = Response<ScriptBody>;
    type Error = Oops;
    type Future = futures_util::future::BoxFuture<'static, Result<Response<ScriptBody>, Oops>>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Oops>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<()>) -> Self::Future {
        self.0.fetch_add(1, Ordering::SeqCst);
        Box::pin(async {
            sleep(10 * MS).await;
            Ok(empty())
        })
    }
}

/// The deadline is checked before the limit, so the rejection names the deadline also when the limit is reached.
#[tokio::test(start_paused = true)]
async fn a_call_after_its_deadline_is_rejected_for_it_also_at_the_limit() {
    let layer = ConcurrencyLimitLayer::new(1);
    let inner = service_fn(|_: Request<()>| async { Ok::<_, Oops>(empty()) });
    let service = layer.layer(inner);
    let late = || {
        let mut call = request();
        call.extensions_mut().insert(Deadline::after(Duration::ZERO));
        service.clone().oneshot(call)
    };
    assert_eq!(refused_as(late().await), RejectedKind::DeadlinePassed);
    let _place = layer.handle().try_acquire().unwrap();
    assert_eq!(refused_as(late().await), RejectedKind::DeadlinePassed);
    let told = layer.handle().snapshot();
    assert_eq!((told.rejected_deadline, told.rejected_full), (2, 0));
}
