//! What lets a server come back by itself: it begins no work that nobody waits for any more.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use buttress::{ConcurrencyLimitLayer, Deadline, call::RejectedKind, limit::sort::Claim};
use http::{Request, Response};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};
use tower::{Layer, ServiceExt, service_fn};

use crate::support::{Oops, ScriptBody, empty, refused_as, request};

const MS: Duration = Duration::from_millis(1);

/// Five hundred at once, each with 100 ms to go, at a server that does one in 10 ms: ten are worked on, the
/// others are gone when their time is over, and who comes then is served at once.
#[tokio::test(start_paused = true)]
async fn a_burst_under_the_limit_leaves_no_dead_work_behind() {
    let limit = || ConcurrencyLimitLayer::new(1).queue(1000, Duration::from_secs(10));
    burst(limit()).await;
    // The same where calls are told apart.
    let sorted = limit().sorted_by(|_: &Request<()>| Claim::default().partition(0));
    let layer = sorted.partitions(&[1.0]).shed_by_priority();
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

/// 10 ms a call.
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

/// Without a queue, too, and before anything is said about room.
#[tokio::test(start_paused = true)]
async fn a_late_call_is_refused_as_late_also_where_the_limit_is_reached() {
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
    assert_eq!((told.refused_deadline, told.refused_full), (2, 0));
}
