//! What every layer must get right, as far as a retry is concerned.

use std::{
    error::Error,
    panic::AssertUnwindSafe,
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use buttress::{
    Attempts, Backoff, BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Outcome, Retry,
    RetryBudget, RetryLayer,
    call::Http,
    retry::{Attempt, PeekedBody, ReplayBody, ResponseFuture, RetryError, RetryHandle, Stop},
};
use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use http_body_util::{Empty, Full};
use tokio::{task::yield_now, time::Instant};
use tokio_test::{assert_pending, assert_ready, assert_ready_err, assert_ready_ok, task};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn, util::BoxCloneSyncService};
use tower_test::mock::Spawn;

use crate::kit::*;

/// Waits of exactly 100 ms, and `budget`.
fn steady(budget: &RetryBudget) -> RetryLayer {
    RetryLayer::http().backoff(Backoff::constant(ms(100)).without_jitter()).budget(budget.clone())
}

#[tokio::test(start_paused = true)]
async fn passes_through() {
    let inner = Inner::with(|n, request: Request<ReplayBody<Script>>| async move {
        assert!(request.extensions().get::<Attempt>().is_none());
        assert_eq!(request.headers()["x-mine"], "1");
        assert_eq!(request.extensions().get(), Some(&7u8));
        assert_eq!(read(request.into_body()).await.0, "ping");
        match n {
            1 => Ok(with_headers(200, &[("x-yours", "2")]).map(|_| Script::text("pong"))),
            _ => Err(Oops("of its own").into()),
        }
    });
    let service = RetryLayer::http().layer(inner);
    let ask = || {
        let mut request = post(Script::text("ping"));
        request.headers_mut().insert("x-mine", "1".parse().unwrap());
        request.extensions_mut().insert(7u8);
        request
    };
    let response = send(&service, ask()).await.unwrap();
    assert_eq!(
        (response.status().as_u16(), &response.headers()["x-yours"]),
        (200, &"2".parse().unwrap())
    );
    assert!(response.extensions().is_empty(), "nothing to tell");
    assert_eq!(read(response.into_body()).await.0, "pong");

    let error = send(&service, ask()).await.unwrap_err();
    let told = Attempts::find(&*error).unwrap();
    assert_eq!((told.made, told.waited, told.stop), (1, Duration::ZERO, Stop::Answered));
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
    assert_pending!(clone.poll_ready(), "readiness went along");
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
    assert_eq!((log.calls(), log.readied()), (5, 5), "readied anew each time");
    log.assert_strict();
    // The first of the next call as well, on the same instance.
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
    assert_eq!(Attempts::find(&*error).unwrap().made, 1);

    log.gate(Gate::Open);
    assert_ready_ok!(service.poll_ready());
    let mut future = task::spawn(service.call(get()));
    assert_pending!(future.poll());
    log.gate(Gate::Broken);
    tokio::time::sleep(ms(101)).await;
    let error = assert_ready_err!(future.poll());
    assert_eq!(error.source().unwrap().downcast_ref(), Some(&Oops("not ready")));
    assert_eq!(Attempts::find(&*error).unwrap().made, 1, "the second was not made");
    drop(future);
    assert_eq!((log.calls(), budget.balance()), (1, 3.0), "nor charged");
}

// ===== Giving back =====

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

/// Dropped while it calls, drains, waits, readies or calls again: what was withdrawn and not used comes
/// back, what was used does not.
#[tokio::test(start_paused = true)]
async fn pending_future_drop_releases() {
    let hanging = Inner::<Script>::with(|_, _| std::future::pending::<Answer>());
    let stuck = || Script::new([data("x"), Piece::Stuck]);
    let failing = move |n| if n == 1 { Ok(status(503).map(|_| stuck())) } else { Ok(status(200)) };
    let then_hanging = Inner::<Script>::with(|n, _| async move {
        if n > 1 { std::future::pending().await } else { Ok(status(503)) }
    });
    // The inner service, how far the clock goes, whether it is not ready by then, what is left.
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
    // A call that panics, and one that panics when it is made ready again.
    for panics_in_ready in [false, true] {
        let inner = Inner::<Script>::with(|n, _| async move {
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
            assert_eq!(send(&service, get()).await.unwrap().status(), 200, "and goes on");
        }
    }
}

/// A body that panics under the lock of what is kept of it.
#[tokio::test(start_paused = true)]
async fn a_panicking_request_body_is_not_sent_again_and_breaks_nothing() {
    let inner = Inner::<Script>::with(|_, request| async move {
        let read = tokio::spawn(read(request.into_body())).await;
        assert!(read.unwrap_err().is_panic());
        Ok(status(503))
    });
    let service = RetryLayer::http().layer(inner);
    let body = Script::new([data("a"), Piece::Panic]).untold();
    let response = send(&service, put(body)).await.unwrap();
    assert_eq!(Attempts::of(&response).stop, Stop::BodyGone);
}

// ===== Both directions =====

#[tokio::test(start_paused = true)]
async fn trailers_and_size_hint_forwarded() {
    for attempt in [1, 2] {
        let inner = Inner::<Script>::with(move |n, request| async move {
            let body = request.into_body();
            assert_eq!(body.size_hint().exact(), Some(5), "attempt {n}");
            assert!(!body.is_end_stream());
            let hello = Bytes::from("hello");
            assert_eq!(read(body).await, (hello, Some(map(&[("x-sum", "5")]))));
            if n < attempt {
                return Ok(status(503));
            }
            Ok(status(200).map(|_| Script::new([data("world!"), trailers(&[("x-sum", "6")])])))
        });
        let service = RetryLayer::http().layer(inner);
        let body = Script::new([data("hel"), data("lo"), trailers(&[("x-sum", "5")])]);
        let body = send(&service, put(body)).await.unwrap().into_body();
        assert_eq!(body.size_hint().exact(), Some(6));
        assert!(!body.is_end_stream());
        let world = Bytes::from("world!");
        assert_eq!(read(body).await, (world, Some(map(&[("x-sum", "6")]))));
    }
    let inner = Inner::<Script>::with(|_, request| async move {
        assert!(request.body().is_end_stream());
        assert_eq!(request.body().size_hint().exact(), Some(0));
        Ok(status(200))
    });
    let body = send(&RetryLayer::http().layer(inner), get()).await.unwrap().into_body();
    assert!(body.is_end_stream());
    assert_eq!(body.size_hint().exact(), Some(0));
}

// ===== One state =====

#[tokio::test(start_paused = true)]
async fn state_shared_across_layer_calls() {
    let layer =
        RetryLayer::http().backoff(Backoff::constant(ms(1))).budget(RetryBudget::with(0.1, 0, 10));
    let handle = layer.handle();
    let mut attempts = 0;
    for n in 0..40 {
        // As axum does it: the layer is applied anew, and cloned, for each call.
        let inner: Inner = Inner::new(|_| Ok(status(503)));
        let log = inner.log.clone();
        let layer = if n % 2 == 0 { layer.clone() } else { layer.clone().clone() };
        let response = send(&layer.layer(inner), get()).await.unwrap();
        assert_eq!(Attempts::of(&response).made, log.calls());
        attempts += log.calls();
    }
    assert_eq!(attempts, 44, "10 % of 40");
    let seen = handle.snapshot();
    assert_eq!((seen.retries, seen.gave_up), (4, 40));
    assert_eq!((seen.budget_denied, seen.budget_balance), (40, Some(0.0)));
}

#[tokio::test(start_paused = true)]
async fn setters_after_handle_are_seen() {
    let layer = RetryLayer::http().without_budget();
    let handle = layer.handle();
    let inner: Inner = Inner::new(|_| Ok(status(503)));
    let service = layer.clone().layer(inner);
    assert_eq!(handle.snapshot().budget_balance, None);
    let _layer =
        layer.attempts(5).backoff(Backoff::constant(ms(7)).without_jitter()).budget(purse(9));
    let response = send(&service, get()).await.unwrap();
    let told = Attempts::of(&response);
    assert_eq!((told.made, told.waited), (5, ms(28)), "by a service made before");
    let seen = handle.snapshot();
    assert_eq!((seen.retries, seen.budget_balance), (4, Some(9.0)));
    let _layer = _layer.assume_idempotent().longest_wait(Duration::ZERO).replay_up_to(0);
    let start = Instant::now();
    let response = send(&service, post(Script::text("x"))).await.unwrap();
    assert_eq!(Attempts::of(&response).stop, Stop::BodyGone, "idempotent, and over the cap");
    send(&service, post(Script::empty())).await.unwrap();
    assert_eq!(start.elapsed(), Duration::ZERO);
}

// ===== Configuration =====

#[tokio::test(start_paused = true)]
async fn bad_config_is_a_typed_error() {
    let backoff = Backoff::exponential(ms(50));
    let cases = [
        (RetryLayer::http().attempts(0), "attempts", "0"),
        (RetryLayer::http().backoff(backoff.factor(f64::NAN)), "backoff.factor", "NaN"),
        (RetryLayer::http().backoff(backoff.factor(0.9)), "backoff.factor", "0.9"),
        (RetryLayer::http().backoff(backoff.factor(f64::INFINITY)), "backoff.factor", "inf"),
        (RetryLayer::http().backoff(backoff.max(ms(49))), "backoff.max", "49ms"),
        (RetryLayer::http().budget(RetryBudget::ratio(0.0)), "budget.ratio", "0.0"),
        (RetryLayer::http().budget(RetryBudget::ratio(-0.2)), "budget.ratio", "-0.2"),
        (RetryLayer::http().budget(RetryBudget::ratio(f64::NAN)), "budget.ratio", "NaN"),
        (RetryLayer::http().budget(RetryBudget::ratio(50.0)), "budget.ratio", "50.0"),
        // As good as zero: it would never pay anything in.
        (RetryLayer::http().budget(RetryBudget::ratio(1e-9)), "budget.ratio", "1e-9"),
        (RetryLayer::http().budget(RetryBudget::with(0.2, 1, 0)), "budget.cap", "0"),
    ];
    for (layer, field, value) in cases {
        let error = layer.clone().checked().unwrap_err();
        assert_eq!((error.field, &*error.value), (field, value));
        let text = error.to_string();
        assert!(text.contains(field) && text.contains(value) && text.contains("use "), "{text}");

        let inner: Inner = Inner::new(|_| Err(io(std::io::ErrorKind::ConnectionRefused)));
        let log = inner.log.clone();
        let error = send(&layer.layer(inner), get()).await.unwrap_err();
        assert_eq!(Attempts::find(&*error).unwrap().stop, Stop::Misconfigured, "{field} {value}");
        assert_eq!(log.calls(), 1);
    }
    // The first of several is told, and a good value afterwards does not hide it.
    let layer = RetryLayer::http().attempts(0).backoff(backoff.factor(0.0)).attempts(3);
    assert_eq!(layer.checked().unwrap_err().field, "attempts");
    let layer = RetryLayer::http().attempts(1).backoff(Backoff::constant(ms(0)));
    let _layer = layer.budget(RetryBudget::with(10.0, 0, 1)).checked().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_misconfigured_layer_still_passes_calls_through() {
    let inner: Inner = Inner::new(|n| Ok(status(if n == 1 { 503 } else { 200 })));
    let service = RetryLayer::http().attempts(0).layer(inner);
    let response = send(&service, put(Script::text("x"))).await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(Attempts::of(&response).stop, Stop::Misconfigured);
    let response = send(&service, get()).await.unwrap();
    assert!(response.extensions().is_empty());
}

// ===== Types =====

#[test]
fn auto_traits() {
    fn service<T: Clone + Send + Sync + 'static>() {}
    fn send<T: Send + 'static>() {}
    fn unpin<T: Unpin>() {}
    service::<RetryLayer>();
    service::<RetryHandle>();
    service::<RetryBudget>();
    service::<Retry<Inner>>();
    type Future = <Retry<Inner> as Service<Request<Script>>>::Future;
    send::<Future>();
    // A client over bodies that are `Send` only, and not `Unpin`.
    type Client = hyper_util::client::legacy::Client<
        hyper_util::client::legacy::connect::HttpConnector,
        ReplayBody<OnlySend>,
    >;
    service::<Retry<Client>>();
    send::<<Retry<Client> as Service<Request<OnlySend>>>::Future>();
    send::<ReplayBody<OnlySend>>();
    send::<PeekedBody<hyper::body::Incoming>>();
    unpin::<PeekedBody<hyper::body::Incoming>>();
    fn _named<S, R, F, K, H>(_: ResponseFuture<S, R, F, Http, K, H>) {}
}

type OnlySend = http_body_util::combinators::UnsyncBoxBody<Bytes, BoxError>;

#[tokio::test(start_paused = true)]
async fn works_inside_tokio_spawn() {
    // Over an inner that mentions `BoxError`, which is where the compiler gives up.
    let boxed = BoxCloneSyncService::new(service_fn(|_: Request<ReplayBody<Full<Bytes>>>| async {
        Err::<Response<Full<Bytes>>, BoxError>(Oops("boxed").into())
    }));
    let mut service = RetryLayer::http().layer(boxed);
    let result =
        tokio::spawn(
            async move { service.ready().await?.call(Request::new(Full::from("x"))).await },
        );
    assert_eq!(told(&result.await.unwrap()).made, 1);

    fn failed(result: Result<&u32, &BoxError>) -> Outcome {
        result.map_or(Outcome::failure(), |_| Outcome::success())
    }
    let boxed = BoxCloneSyncService::new(service_fn(|n: u32| async move {
        if n == 0 { Err::<u32, BoxError>(Oops("zero").into()) } else { Ok(n) }
    }));
    let mut service = RetryLayer::http().classify(failed).layer(boxed);
    let result = tokio::spawn(async move { service.ready().await?.call(0).await });
    assert!(result.await.unwrap().is_err());
}

/// The client stack of the first page, without a type annotation, with `oneshot`.
#[tokio::test]
async fn the_client_stack_compiles_inside_tokio_spawn() {
    let breaker = CircuitBreakerLayer::http();
    let client = ServiceBuilder::new()
        .layer(RetryLayer::http().backoff(Backoff::constant(ms(1))))
        .layer(breaker)
        .layer(ConcurrencyLimitLayer::new(50).queue(500, Duration::from_secs(5)))
        .service(service_fn(refused));
    let request = Request::get("http://127.0.0.1/").body(Empty::<Bytes>::new()).unwrap();
    let ask = client.clone();
    let result = tokio::spawn(async move { ask.oneshot(request).await }).await.unwrap();
    assert_eq!(told(&result).stop, Stop::AttemptsUsedUp);
    assert_eq!(told(&result).made, 3);

    // Over the real client; not driven, because that would open a socket.
    let client = ServiceBuilder::new()
        .layer(RetryLayer::http())
        .layer(CircuitBreakerLayer::http())
        .layer(ConcurrencyLimitLayer::new(50).queue(500, Duration::from_secs(5)))
        .service(
            hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new())
                .build_http(),
        );
    let request = Request::get("http://127.0.0.1/").body(Empty::<Bytes>::new()).unwrap();
    let task = tokio::spawn(async move {
        yield_now().await;
        client.oneshot(request).await.map(|_| ())
    });
    task.abort();
    assert!(task.await.unwrap_err().is_cancelled());
}

async fn refused<B>(_: Request<B>) -> Result<Response<Empty<Bytes>>, std::io::Error> {
    Err(std::io::ErrorKind::ConnectionRefused.into())
}

/// A service of any types, with a closure: `Clone` requests, and an error type that is left alone.
#[tokio::test(start_paused = true)]
async fn any_clone_type_is_retried_by_a_closure() {
    let calls = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let count = calls.clone();
    let layer = RetryLayer::http().classify(|result: Result<&u32, &Oops>| match result {
        Ok(_) => Outcome::success(),
        Err(Oops("final")) => Outcome::success(),
        Err(Oops("busy")) => Outcome::throttled().with_retry_after(ms(500)),
        Err(_) => Outcome::failure(),
    });
    let handle = layer.handle();
    let service = layer.layer(service_fn(move |errors: Vec<&'static str>| {
        let n = count.fetch_add(1, SeqCst) as usize;
        async move { errors.get(n).map_or(Ok(n as u32), |error| Err(Oops(error))) }
    }));
    let start = Instant::now();
    assert_eq!(send(&service, vec!["busy", "x"]).await, Ok(2));
    assert!(start.elapsed() >= ms(500));
    calls.store(0, SeqCst);
    assert_eq!(send(&service, vec!["final"]).await, Err(Oops("final")));
    assert_eq!(calls.swap(0, SeqCst), 1);
    assert_eq!(send(&service, vec!["1", "2", "3"]).await, Err(Oops("3")));
    assert_eq!(handle.snapshot().retries, 4);
    let mut future = task::spawn(service.clone().oneshot(Vec::new()));
    assert_eq!(assert_ready!(future.poll()), Ok(3));
}
