//! Limits are dropped and created, and calls outlive their limits.

use std::{
    collections::VecDeque,
    future::{Ready, pending, ready},
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Arc, Mutex, mpsc},
    task::{Context, Poll},
    thread,
    time::Duration,
};

use buttress::{
    BoxError, ConcurrencyLimitLayer,
    limit::{CallPermit, OwnedPermit, partition::CallClass},
};
use bytes::Bytes;
use futures_util::FutureExt;
use http::{Request, Response};
use http_body::{Body, Frame};
use tokio::runtime::Builder;
use tokio_test::{assert_pending, task};
use tower::{Layer, Service, ServiceExt, service_fn};

use crate::support::{Piece, ScriptBody, Strict, Then, empty, request};

#[test]
fn each_layer_has_its_own_limit_while_calls_of_dropped_layers_continue() {
    let pending = || service_fn(|()| pending::<Result<(), BoxError>>());
    let mut under_way = VecDeque::new();
    for round in 0..10_000 {
        let layer = ConcurrencyLimitLayer::new(2).per_response();
        let handle = layer.handle();
        assert_eq!((handle.snapshot().limit, handle.in_flight()), (2, 0), "round {round}");
        let mut calls: Vec<_> = (0..3).map(|_| layer.layer(pending()).oneshot(())).collect();
        let refused = calls.iter_mut().filter_map(|call| call.now_or_never()).count();
        assert_eq!((handle.in_flight(), refused), (2, 1), "round {round}");
        calls.truncate(2);
        drop((layer, handle));
        under_way.extend(calls);
        // The oldest call of a dropped limit, whose memory may be reused soon.
        if under_way.len() > 14 {
            under_way.pop_front();
        }
        if round % 100 == 99 {
            under_way.clear();
        }
    }
}

/// The ends of these calls do not change a limit that reuses the memory of theirs, now or later.
#[tokio::test(start_paused = true)]
async fn limit_is_not_changed_by_calls_of_a_dropped_limit() {
    type Gone = Vec<Box<dyn std::any::Any>>;

    /// Everything that can outlive its limit: calls, bodies and permits of each kind.
    async fn gone() -> Gone {
        let mut gone = Gone::new();
        let layer = || ConcurrencyLimitLayer::new(2).queue(4, Duration::from_secs(9));
        // Calls within the limit, a call admitted in shadow mode, and a response body.
        let shadow = layer().shadow();
        let calls = (0..3).map(|_| {
            let mut call = task::spawn(shadow.layer(Strict::holding().0).oneshot(request()));
            assert_pending!(call.poll());
            call
        });
        let calls: Vec<_> = calls.collect();
        let (inner, watch) = Strict::new();
        watch.script([Then::Answer(Response::new(ScriptBody::new([Piece::Stuck])))]);
        let streams = shadow.layer(inner).oneshot(request()).await.unwrap();
        // A call with a partition, exempt calls, and a permit that was acquired with the handle.
        let sorted = layer()
            .classify_by(|request: &Request<()>| match request.uri().path() {
                "/exempt" => CallClass::exempt(),
                _ => CallClass::default().partition(0),
            })
            .partitions(&[0.5]);
        let told_apart = ["/", "/exempt", "/exempt"].map(|path| {
            let mut request = request();
            *request.uri_mut() = path.parse().unwrap();
            let mut call = task::spawn(sorted.layer(Strict::holding().0).oneshot(request));
            assert_pending!(call.poll());
            call
        });
        let by_hand = sorted.handle().limit().acquire().await.unwrap();
        // A permit for an upgrade, with one limit inside of another.
        let (inner, outer) = (layer().upgrades(), layer().upgrades());
        let held = Arc::new(Mutex::new(None));
        let place = held.clone();
        let service = service_fn(move |request: Request<()>| {
            *place.lock().unwrap() =
                request.extensions().get::<CallPermit>().and_then(CallPermit::take);
            async { Ok::<_, BoxError>(empty()) }
        });
        drop(outer.layer(inner.layer(service)).oneshot(request()).await.unwrap());
        let held = held.lock().unwrap().take().unwrap();
        gone.push(Box::new(calls));
        gone.push(Box::new(streams));
        gone.push(Box::new(told_apart));
        gone.push(Box::new(by_hand));
        gone.push(Box::new(held));
        gone
    }

    let mut dice = fastrand::Rng::with_seed(7);
    let mut under_way = Gone::new();
    for round in 0..200 {
        under_way.extend(gone().await);
        dice.shuffle(&mut under_way);
        let live: Vec<_> = (0..12)
            .map(|_| {
                let handle = ConcurrencyLimitLayer::new(2).handle();
                let snapshot = handle.snapshot();
                assert_eq!((snapshot.exempt_in_flight, snapshot.in_flight), (0, 0), "{round}");
                (handle.try_acquire().unwrap(), handle)
            })
            .collect();
        under_way.truncate(dice.usize(..10));
        for (place, handle) in live {
            let seen = handle.snapshot();
            assert_eq!((seen.exempt_in_flight, seen.in_flight, seen.limit), (0, 1, 2), "{round}");
            drop(place);
            assert_eq!(handle.in_flight(), 0);
        }
    }
}

/// One thread releases a permit, which passes to a queued caller, while another one drops this caller and all owners of
/// the limit.
#[test]
fn limit_dropped_while_a_permit_passes_on_leaves_a_clean_slot() {
    let pairs: Vec<_> = (0..4)
        .map(|_| {
            thread::spawn(|| {
                let (to, ends) = mpsc::sync_channel::<OwnedPermit>(0);
                let ender = thread::spawn(move || ends.into_iter().for_each(drop));
                let runtime = Builder::new_current_thread().enable_time().build().unwrap();
                let _timers = runtime.enter();
                for round in 0..20_000 {
                    let layer = ConcurrencyLimitLayer::new(1).queue(2, Duration::from_secs(9));
                    let handle = layer.handle();
                    let seen = handle.snapshot();
                    assert_eq!((seen.limit, seen.in_flight, seen.waiting), (1, 0, 0), "{round}");
                    let place = handle.try_acquire().unwrap();
                    let mut waits = task::spawn(handle.acquire());
                    assert_pending!(waits.poll());
                    assert_eq!((handle.in_flight(), handle.snapshot().waiting), (1, 1), "{round}");
                    to.send(place).unwrap();
                    drop((waits, layer));
                }
                drop(to);
                ender.join().unwrap();
            })
        })
        .collect();
    pairs.into_iter().for_each(|pair| pair.join().unwrap());
}

/// User code panics between the admission of a call and its end: neither a permit nor a queue position is lost.
#[tokio::test(start_paused = true)]
async fn panics_of_user_code_lose_no_permit_and_no_queue_entry() {
    /// Panics when it is cloned. Its response panics when it is dropped.
    struct Touchy;
    impl Clone for Touchy {
        fn clone(&self) -> Self {
            panic!("a clone")
        }
    }
    impl Service<Request<()>> for Touchy {
        type Response = Response<Grumpy>;
        type Error = BoxError;
        type Future = Ready<Result<Self::Response, BoxError>>;
        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
            Poll::Ready(Ok(()))
        }
        fn call(&mut self, _: Request<()>) -> Self::Future {
            ready(Ok(Response::new(Grumpy)))
        }
    }
    struct Grumpy;
    impl Drop for Grumpy {
        fn drop(&mut self) {
            panic!("a body")
        }
    }
    impl Body for Grumpy {
        type Data = Bytes;
        type Error = BoxError;
        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
            Poll::Pending
        }
    }
    let is_active = |run: &mut dyn FnMut()| {
        assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
    };

    let layer = ConcurrencyLimitLayer::new(1).queue(1, Duration::from_secs(9));
    let handle = layer.handle();
    let mut service = layer.layer(Touchy);
    is_active(&mut || drop(service.call(request())));
    assert_eq!((handle.in_flight(), handle.snapshot().waiting), (0, 0));
    let place = handle.try_acquire().unwrap();
    is_active(&mut || drop(service.call(request())));
    assert_eq!((handle.in_flight(), handle.snapshot().waiting), (1, 0));
    drop(place);
    let mut response = Some(service.ready().await.unwrap().call(request()).await.unwrap());
    assert_eq!(handle.in_flight(), 1);
    is_active(&mut || drop(response.take()));
    assert_eq!(handle.in_flight(), 0);
}
