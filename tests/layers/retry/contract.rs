//! The test list for every layer, for the retry layer.

use std::{
    error::Error,
    panic::AssertUnwindSafe,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress::{
    Attempts, Backoff, BoxError, RetryBudget, RetryLayer,
    retry::{Attempt, GiveUpReason, ReplayBody, RetryError},
};
use bytes::Bytes;
use futures_util::FutureExt;
use http::Request;
use http_body::Body;
use tokio_test::{assert_pending, assert_ready_err, assert_ready_ok, task};
use tower::{Layer, Service, ServiceExt};
use tower_test::mock::Spawn;

use super::fixtures::*;

/// Returns a layer with delays of exactly 100 ms and this budget.
fn steady(budget: &RetryBudget) -> RetryLayer {
    RetryLayer::http().backoff(Backoff::constant(ms(100)).without_jitter()).budget(budget.clone())
}

#[tokio::test(start_paused = true)]
async fn passes_through() {
    let inner = Inner::with(|n, request: Request<ReplayBody<ScriptBody>>| async move {
        assert!(request.extensions().get::<Attempt>().is_none());
        assert_eq!(request.headers()["x-mine"], "1");
        assert_eq!(request.extensions().get(), Some(&7u8));
        assert_eq!(read(request.into_body()).await.0, "ping");
        match n {
            1 => Ok(with_headers(200, &[("x-yours", "2")]).map(|_| ScriptBody::text("pong"))),
            _ => Err(Oops("of its own").into()),
        }
    });
    let service = RetryLayer::http().layer(inner);
    let ask = || {
        let mut request = post(ScriptBody::text("ping"));
        request.headers_mut().insert("x-mine", "1".parse().unwrap());
        request.extensions_mut().insert(7u8);
        request
    };
    let response = send(&service, ask()).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), &response.headers()["x-yours"]),
        (200, &"2".parse().unwrap())
    );
    assert!(response.extensions().is_empty(), "a call without a retry has no record");
    assert_eq!(read(response.into_body()).await.0, "pong");

    let error = send(&service, ask()).await.unwrap_err();
    let told = Attempts::find(&*error).unwrap();
    assert_eq!(
        (told.made, told.waited, told.stop),
        (1, Duration::ZERO, GiveUpReason::NotRetryable)
    );
    let retry = error.downcast_ref::<RetryError>().unwrap();
    assert_eq!(retry.source().unwrap().downcast_ref(), Some(&Oops("of its own")));
    service.get_ref().log.assert_strict();
}

// ===== Readiness =====

#[tokio::test(start_paused = true)]
async fn clone_resets_readiness() {
    let inner: Inner = Inner::new(|_| Ok(status(200)));
    let log = inner.log.clone();
    let mut service = Spawn::new(RetryLayer::http().layer(inner));
    assert_ready_ok!(service.poll_ready());
    log.gate(Gate::Shut);
    let mut clone = service.clone();
    assert_pending!(clone.poll_ready(), "a clone starts without readiness");
    assert_eq!(log.taken(), (1, 0));
    log.gate(Gate::Open);
    assert!(clone.is_woken());
    assert_ready_ok!(clone.poll_ready());
    clone.call(get()).await.unwrap();
    service.call(get()).await.unwrap();
    log.assert_strict();
}

#[tokio::test(start_paused = true)]
async fn no_call_without_ready_at_every_attempt() {
    let inner: Inner = Inner::new(|_| Ok(status(503)));
    let log = inner.log.clone();
    log.gate(Gate::Slow);
    let service = RetryLayer::http().attempts(5).without_budget().layer(inner);
    let response = send(&service, get()).await.unwrap();
    assert_eq!(Attempts::of(&response).made, 5);
    assert_eq!((log.calls(), log.readied()), (5, 5), "each attempt has its own readiness");
    log.assert_strict();
    // Calls on the same instance also have their own readiness.
    let mut service = service;
    for _ in 0..2 {
        service.ready().await.unwrap().call(get()).await.unwrap();
    }
    assert_eq!((log.calls(), log.readied()), (15, 15));
    log.assert_strict();
}

#[tokio::test(start_paused = true)]
async fn inner_poll_ready_error_propagates() {
    let inner: Inner = Inner::new(|_| Ok(status(503)));
    let log = inner.log.clone();
    let budget = purse(3);
    let mut service = Spawn::new(steady(&budget).layer(inner));
    log.gate(Gate::Broken);
    let error: BoxError = assert_ready_err!(service.poll_ready());
    assert_eq!(error.source().unwrap().downcast_ref(), Some(&Oops("not ready")));
    let told = Attempts::find(&*error).unwrap();
    assert_eq!((told.made, told.stop), (0, GiveUpReason::NotReady), "no attempt was made");

    log.gate(Gate::Open);
    assert_ready_ok!(service.poll_ready());
    let mut future = task::spawn(service.call(get()));
    assert_pending!(future.poll());
    log.gate(Gate::Broken);
    tokio::time::sleep(ms(101)).await;
    let error = assert_ready_err!(future.poll());
    assert_eq!(error.source().unwrap().downcast_ref(), Some(&Oops("not ready")));
    let told = Attempts::find(&*error).unwrap();
    assert_eq!(
        (told.made, told.stop),
        (1, GiveUpReason::NotReady),
        "the second attempt was not made"
    );
    drop(future);
    assert_eq!((log.calls(), budget.balance()), (1, 3.0), "the second attempt is not charged");
}

// ===== Release =====

#[tokio::test(start_paused = true)]
async fn service_drop_releases() {
    let inner: Inner = Inner::new(|_| Ok(status(200)));
    let log = inner.log.clone();
    let mut service = Spawn::new(RetryLayer::http().layer(inner));
    assert_ready_ok!(service.poll_ready());
    assert_eq!(log.taken(), (1, 0));
    drop(service);
    assert_eq!(log.taken(), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn unpolled_future_drop_releases() {
    let inner: Inner = Inner::new(|_| Ok(status(200)));
    let log = inner.log.clone();
    let budget = purse(3);
    let mut service = Spawn::new(steady(&budget).layer(inner));
    assert_ready_ok!(service.poll_ready());
    drop(service.call(get()));
    assert_eq!((log.taken(), budget.balance()), ((0, 0), 3.0));
}

/// The future is dropped during the first attempt, the drain, the delay, the wait for readiness, or the second attempt.
/// An unused withdrawal is refunded, and a used one is not.
#[tokio::test(start_paused = true)]
async fn pending_future_drop_releases() {
    let hanging = Inner::<ScriptBody>::with(|_, _| std::future::pending::<Answer>());
    let stuck = || ScriptBody::new([data("x"), Piece::Stuck]);
    let failing = move |n| if n == 1 { Ok(status(503).map(|_| stuck())) } else { Ok(status(200)) };
    let then_hanging = Inner::<ScriptBody>::with(|n, _| async move {
        if n > 1 { std::future::pending().await } else { Ok(status(503)) }
    });
    // The inner service, the milliseconds until the drop, whether the inner service is not ready then, and the balance.
    let cases = [
        ("calling", hanging, 0, false, 5.0),
        ("draining", Inner::new(failing), 49, false, 5.0),
        ("waiting", Inner::new(failing), 99, false, 5.0),
        ("readying", Inner::new(failing), 150, true, 5.0),
        ("calling again", then_hanging, 150, false, 4.0),
    ];
    for (case, inner, after, shut, left) in cases {
        let (log, budget) = (inner.log.clone(), purse(5));
        let mut service = Spawn::new(steady(&budget).layer(inner));
        assert_ready_ok!(service.poll_ready());
        let mut future = task::spawn(service.call(get()));
        assert_pending!(future.poll(), "{case}");
        if case != "calling" {
            assert_eq!(budget.balance(), 4.0, "{case}");
        }
        for _ in 0..after {
            tokio::time::advance(ms(1)).await;
            if shut {
                log.gate(Gate::Shut);
            }
            assert_pending!(future.poll(), "{case}");
        }
        let calls = if case == "calling again" { 2 } else { 1 };
        assert_eq!(log.calls(), calls, "{case}");
        drop(future);
        assert_eq!((log.taken(), budget.balance()), ((0, 0), left), "{case}");
        log.assert_strict();
    }
}

#[tokio::test(start_paused = true)]
async fn inner_panic_releases() {
    // The second attempt panics in its future, or in `poll_ready`.
    for panics_in_ready in [false, true] {
        let inner = Inner::<ScriptBody>::with(|n, _| async move {
            assert!(n != 2, "scripted panic");
            Ok(status(if n == 1 { 503 } else { 200 }))
        });
        let (log, budget) = (inner.log.clone(), purse(5));
        let mut service = steady(&budget).layer(inner);
        let mut future = task::spawn(service.ready().await.unwrap().call(get()));
        assert_pending!(future.poll());
        if panics_in_ready {
            log.gate(Gate::Panics);
        }
        tokio::time::sleep(ms(101)).await;
        std::panic::catch_unwind(AssertUnwindSafe(|| future.poll())).unwrap_err();
        drop(future);
        let left = if panics_in_ready { 5.0 } else { 4.0 };
        assert_eq!((log.taken(), budget.balance()), ((0, 0), left));
        if !panics_in_ready {
            assert_eq!(
                send(&service, get()).await.unwrap().status(),
                200,
                "the service still works"
            );
        }
    }
}

/// A call runs the closures of the user. The panic of a closure ends this call only.
#[tokio::test(start_paused = true)]
async fn a_panic_in_a_closure_of_the_user_affects_only_its_call() {
    let budget = purse(5);
    let panics_once = || {
        let armed = Arc::new(AtomicBool::new(true));
        move || assert!(!armed.swap(false, SeqCst), "scripted panic")
    };
    let (asked, begun, drawn) = (panics_once(), panics_once(), panics_once());
    let layers = [
        steady(&budget).retry_if(move |_| {
            asked();
            None
        }),
        steady(&budget).backoff_with(move || {
            begun();
            std::iter::repeat(ms(100))
        }),
        steady(&budget).backoff_with(move || {
            let drawn = drawn.clone();
            std::iter::repeat_with(move || {
                drawn();
                ms(100)
            })
        }),
    ];
    for layer in layers {
        let inner: Inner = Inner::new(|n| Ok(status(if n < 3 { 503 } else { 200 })));
        let (log, handle, service) = (inner.log.clone(), layer.handle(), layer.layer(inner));
        let call = AssertUnwindSafe(send(&service, get())).catch_unwind();
        assert!(call.await.is_err());
        assert_eq!((log.taken(), budget.balance(), log.calls()), ((0, 0), 5.0, 1));
        let response = send(&service, get()).await.unwrap();
        assert_eq!((Attempts::of(&response).made, handle.snapshot().retries), (2, 1));
        budget.deposit();
    }
}

/// The body panics while the lock of the saved request is held.
#[tokio::test(start_paused = true)]
async fn a_request_body_that_panics_is_not_replayed() {
    let inner = Inner::<ScriptBody>::with(|_, request| async move {
        let read = tokio::spawn(read(request.into_body())).await;
        assert!(read.unwrap_err().is_panic());
        Ok(status(503))
    });
    let service = RetryLayer::http().layer(inner);
    let body = ScriptBody::new([data("a"), Piece::Panic]).without_hints();
    let response = send(&service, put(body)).await.unwrap();
    assert_eq!(Attempts::of(&response).stop, GiveUpReason::BodyGone);
}

// ===== Request and response bodies =====

#[tokio::test(start_paused = true)]
async fn trailers_and_size_hint_forwarded() {
    for attempt in [1, 2] {
        let inner = Inner::<ScriptBody>::with(move |n, request| async move {
            let body = request.into_body();
            assert_eq!(body.size_hint().exact(), Some(5), "attempt {n}");
            assert!(!body.is_end_stream());
            let hello = Bytes::from("hello");
            assert_eq!(read(body).await, (hello, Some(map(&[("x-sum", "5")]))));
            if n < attempt {
                return Ok(status(503));
            }
            Ok(status(200).map(|_| ScriptBody::new([data("world!"), trailers(&[("x-sum", "6")])])))
        });
        let service = RetryLayer::http().layer(inner);
        let body = ScriptBody::new([data("hel"), data("lo"), trailers(&[("x-sum", "5")])]);
        let body = send(&service, put(body)).await.unwrap().into_body();
        assert_eq!(body.size_hint().exact(), Some(6));
        assert!(!body.is_end_stream());
        let world = Bytes::from("world!");
        assert_eq!(read(body).await, (world, Some(map(&[("x-sum", "6")]))));
    }
    let inner = Inner::<ScriptBody>::with(|_, request| async move {
        assert!(request.body().is_end_stream());
        assert_eq!(request.body().size_hint().exact(), Some(0));
        Ok(status(200))
    });
    let body = send(&RetryLayer::http().layer(inner), get()).await.unwrap().into_body();
    assert!(body.is_end_stream());
    assert_eq!(body.size_hint().exact(), Some(0));
}
