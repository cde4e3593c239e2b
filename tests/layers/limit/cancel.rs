//! A hundred thousand callers wait and are dropped at random: no permit is lost, and no caller is woken twice.

use std::{
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Wake, Waker},
    time::Duration,
};

use buttress::{
    ConcurrencyLimit, ConcurrencyLimitLayer,
    limit::{ConcurrencyLimitHandle, QueueOrder},
};
use http::Request;
use tower::{Layer, ServiceExt, util::Oneshot};

use crate::support::{Strict, empty, request};

#[derive(Default)]
struct Wakes(AtomicUsize);

impl Wake for Wakes {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct Caller {
    call: Pin<Box<Oneshot<ConcurrencyLimit<Strict>, Request<()>>>>,
    wakes: Arc<Wakes>,
    /// The number of the call at the inner service, once it has the permit.
    number: Option<usize>,
}

impl Caller {
    fn wakes(&self) -> usize {
        self.wakes.0.load(Ordering::Relaxed)
    }

    /// Polls the call, whether it was woken or not. Returns whether it is still pending.
    fn look(&mut self, calls: impl Fn() -> usize) -> bool {
        let waker = Waker::from(self.wakes.clone());
        let before = calls();
        let stays = self.call.as_mut().poll(&mut Context::from_waker(&waker)).is_pending();
        if calls() > before {
            self.number = Some(before);
        }
        stays
    }
}

const CALLERS: usize = 100_000;
const LIMIT: usize = 4;

#[tokio::test(start_paused = true)]
async fn a_hundred_thousand_cancelled_callers_lose_no_permit_and_wake_no_caller_twice() {
    for (seed, order) in [
        (1, QueueOrder::Fifo),
        (2, QueueOrder::Lifo),
        (3, QueueOrder::Adaptive(Duration::from_millis(5))),
    ] {
        let layer = ConcurrencyLimitLayer::new(LIMIT)
            .queue(32, Duration::from_secs(3600))
            .queue_order(order);
        let (inner, watch) = Strict::holding();
        let (service, handle) = (layer.layer(inner), layer.handle());
        let calls = || watch.seen().calls;
        let mut dice = fastrand::Rng::with_seed(seed);
        let mut callers: Vec<Caller> = Vec::new();
        let (mut come, mut waited, mut cancelled) = (0, 0, 0);
        while waited < CALLERS.div_ceil(3) {
            match dice.u8(..8) {
                0..=3 => {
                    let call = Box::pin(service.clone().oneshot(request()));
                    let mut caller = Caller { call, wakes: Arc::default(), number: None };
                    // Some callers are dropped before their first poll.
                    if dice.u8(..10) > 0 && caller.look(calls) {
                        waited += usize::from(caller.number.is_none());
                        callers.push(caller);
                    }
                    come += 1;
                }
                4 if !callers.is_empty() => {
                    let at = dice.usize(..callers.len());
                    cancelled += usize::from(callers.swap_remove(at).number.is_none());
                }
                5 => {
                    let inside = callers.iter().position(|caller| caller.number.is_some());
                    if let Some(at) = inside {
                        let mut gone = callers.swap_remove(at);
                        assert!(watch.end(gone.number.unwrap(), Ok(empty())));
                        assert!(!gone.look(calls));
                    }
                }
                6 if !callers.is_empty() => {
                    let at = dice.usize(..callers.len());
                    assert!(callers[at].look(calls), "a queued call is not rejected");
                }
                7 => tokio::time::advance(Duration::from_millis(1)).await,
                _ => {}
            }
            let seen = handle.snapshot();
            assert!(seen.in_flight as usize <= LIMIT);
            assert!(
                seen.waiting == 0 || seen.in_flight as usize == LIMIT,
                "a call waits beside a free permit"
            );
            assert_eq!((seen.in_flight + seen.waiting) as usize, callers.len());
            for caller in &callers {
                assert!(caller.wakes() <= 1, "woken {} times", caller.wakes());
            }
        }
        assert!(come > waited && cancelled > waited / 4, "{cancelled} of {waited} were cancelled");
        callers.clear();
        let seen = handle.snapshot();
        assert_eq!((seen.in_flight, seen.waiting, watch.seen().in_flight), (0, 0, 0));
    }
}

/// The last clone of a waker may own the task, whose destructor may take a snapshot of the limit.
#[test]
fn a_waker_may_use_the_limit_when_it_is_dropped() {
    struct Looks(ConcurrencyLimitHandle);

    impl Wake for Looks {
        fn wake(self: Arc<Self>) {}
    }

    impl Drop for Looks {
        fn drop(&mut self) {
            let _ = self.0.snapshot();
        }
    }

    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.unwrap().block_on(async {
            let longest = Duration::from_millis(50);
            let layer = ConcurrencyLimitLayer::new(1).queue(2, longest);
            let (handle, service) = (layer.handle(), layer.layer(Strict::holding().0));
            let _place = handle.try_acquire().unwrap();
            let mut call = Box::pin(service.oneshot(request()));
            let mut look = || {
                let waker = Waker::from(Arc::new(Looks(handle.clone())));
                call.as_mut().poll(&mut Context::from_waker(&waker)).is_pending()
            };
            assert!(look());
            // The timer has dropped its clone of the waker. The queue holds the last one until the next poll.
            tokio::time::sleep(2 * longest).await;
            assert!(!look());
        });
        done.send(()).unwrap();
    });
    assert_eq!(is_done.recv_timeout(Duration::from_secs(10)), Ok(()));
}
