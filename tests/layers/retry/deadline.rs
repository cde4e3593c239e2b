//! The deadline of a call: no attempt and no delay begins that would not end before it.

use std::time::Duration;

use buttress::{
    Attempts, Backoff, Deadline, DeadlineLayer, Outcome, Rejected, RetryLayer,
    outcome::{Reason, RejectedKind, TimeoutPhase},
    retry::GiveUpReason,
};
use http::Request;
use tokio::time::Instant;
use tower::{Layer, Service, ServiceExt};

use super::fixtures::*;

fn layer(wait: Duration) -> RetryLayer {
    RetryLayer::http().backoff(Backoff::constant(wait).without_jitter()).budget(purse(9))
}

fn within(time: Duration, mut request: Request<ScriptBody>) -> Request<ScriptBody> {
    request.extensions_mut().insert(Deadline::after(time));
    request
}

async fn failing(layer: RetryLayer, request: Request<ScriptBody>) -> Attempts {
    told(&send(&layer.layer(Inner::new(|_| Ok(status(503)))), request).await)
}

#[tokio::test(start_paused = true)]
async fn a_delay_that_leaves_no_time_for_an_attempt_is_not_begun() {
    let start = Instant::now();
    for (time, made, stop) in [
        (109, 1, GiveUpReason::DeadlineTooNear),
        (110, 2, GiveUpReason::DeadlineTooNear),
        (1, 1, GiveUpReason::DeadlineTooNear),
        (500, 3, GiveUpReason::AttemptsUsedUp),
    ] {
        let budget = purse(9);
        let told = failing(layer(ms(100)).budget(budget.clone()), within(ms(time), get())).await;
        assert_eq!((told.made, told.stop), (made, stop), "{time} ms");
        assert_eq!(budget.balance(), 9.0 - f64::from(made - 1), "the budget is checked last");
    }
    assert!(start.elapsed() < ms(310));
    let told = failing(layer(ms(100)).min_attempt_time(ms(50)), within(ms(149), get())).await;
    assert_eq!(told.made, 1);
    assert_eq!(failing(layer(ms(100)), get()).await.made, 3, "without a deadline");
}

#[tokio::test(start_paused = true)]
async fn a_hint_beyond_the_deadline_ends_the_call_at_once() {
    let inner: Inner = Inner::new(|_| Ok(with_headers(503, &[("retry-after", "3")])));
    let start = Instant::now();
    let response = send(&layer(ms(1)).layer(inner), within(ms(2999), get())).await.unwrap();
    let told = Attempts::of(&response);
    assert_eq!((told.made, told.stop, start.elapsed()), (1, GiveUpReason::DeadlineTooNear, ms(0)));
}

/// A hint near the deadline, and a backoff that is longer than the time to the deadline.
#[tokio::test(start_paused = true)]
async fn attempt_after_a_hint_that_fits_has_time_before_the_deadline() {
    let short = || Backoff::exponential(ms(50));
    let long = || Backoff::exponential(ms(5000)).max(ms(5000));
    for (hint, backoff) in [("2.5", short()), ("2.5", long()), ("0", long())] {
        for _ in 0..40 {
            let inner: Inner = Inner::with(move |n, _| async move {
                if n == 1 {
                    return Ok(with_headers(429, &[("retry-after", hint)]));
                }
                tokio::time::sleep(ms(200)).await;
                Ok(status(200))
            });
            let service = RetryLayer::http().backoff(backoff).without_budget().layer(inner);
            let response = send(&service, within(ms(3000), get())).await.unwrap();
            assert_eq!(response.status(), 200, "{hint}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn readiness_is_bounded_by_the_deadline() {
    let inner: Inner = Inner::new(|_| Ok(status(503)));
    let log = inner.log.clone();
    let budget = purse(9);
    let service = layer(ms(100)).budget(budget.clone()).layer(inner);
    let start = Instant::now();
    let call = tokio::spawn({
        let service = service.clone();
        async move { send(&service, within(ms(500), get())).await }
    });
    tokio::time::sleep(ms(50)).await;
    log.gate(Gate::Shut);
    let result = call.await.unwrap();
    assert!(start.elapsed() >= ms(500) && start.elapsed() <= ms(502), "{:?}", start.elapsed());
    assert_eq!((told(&result).made, told(&result).stop), (1, GiveUpReason::DeadlinePassed));
    let error = result.err().unwrap();
    let refused = Rejected::find(&*error).unwrap();
    assert_eq!((refused.layer(), refused.kind()), ("retry", RejectedKind::DeadlinePassed));
    assert_eq!(budget.balance(), 9.0, "the withdrawal is refunded");
}

#[tokio::test(start_paused = true)]
async fn an_attempt_in_flight_ends_with_the_deadline() {
    for (answered, limit, made) in [(0, None, 1), (1, None, 2), (0, Some(ms(100)), 3)] {
        let inner: Inner = Inner::with(move |n, _| async move {
            if n > answered {
                std::future::pending::<()>().await;
            }
            Ok(status(503))
        });
        let (log, budget) = (inner.log.clone(), purse(9));
        let mut layer = layer(ms(0)).attempts(9).budget(budget.clone());
        if let Some(limit) = limit {
            layer = layer.attempt_timeout(limit);
        }
        let start = Instant::now();
        let result = send(&layer.layer(inner), within(ms(250), get())).await;
        assert!(start.elapsed() >= ms(250) && start.elapsed() <= ms(252), "{:?}", start.elapsed());
        let told = told(&result);
        assert_eq!((told.made, told.stop, log.calls()), (made, GiveUpReason::DeadlinePassed, made));
        assert_eq!(told.records().last().unwrap().outcome.reason(), Reason::Timeout);
        assert_eq!(log.taken(), (0, 0), "the attempt is dropped");
        assert_eq!(budget.balance(), 9.0 - f64::from(made - 1));
        let error = result.err().unwrap();
        let late = Rejected::find(&*error).unwrap();
        let kind = RejectedKind::TimedOut(TimeoutPhase::Deadline);
        assert_eq!((late.layer(), late.kind()), ("retry", kind));
        assert_eq!(
            Outcome::of_error(&*error).reason(),
            Reason::Timeout,
            "outer layers see a timeout, too"
        );
    }
}

/// The retry layer and the outer deadline layer have the same deadline. The retry layer ends the call first.
#[tokio::test(start_paused = true)]
async fn the_retry_layer_ends_a_call_before_an_outer_layer_with_the_same_deadline() {
    let outer = || DeadlineLayer::new().default_of(ms(100));
    for shut in [false, true] {
        let inner = || {
            let inner = Inner::<ScriptBody>::with(move |_, _| async move {
                if !shut {
                    std::future::pending::<()>().await;
                }
                Ok(status(503))
            });
            (inner.log.clone(), layer(ms(20)).layer(inner))
        };
        let shut_later = async |log: std::sync::Arc<Log>| {
            tokio::time::sleep(ms(5)).await;
            if shut {
                log.gate(Gate::Shut);
            }
        };
        let mut call = post(ScriptBody::empty());
        call.headers_mut()
            .extend(map(&[("content-type", "application/grpc"), ("idempotency-key", "k")]));
        for (call, grpc_status) in [(get(), None), (call, Some("4"))] {
            let (log, retry) = inner();
            let answers = outer().respond();
            let handle = answers.handle();
            let service = answers.layer(retry);
            let (answer, ()) = tokio::join!(send(&service, call), shut_later(log));
            let answer = answer.unwrap();
            let told = answer.headers().get("grpc-status").map(|told| told.to_str().unwrap());
            assert_eq!(told, grpc_status);
            assert!(told.is_some() || answer.status() == 504);
            assert_eq!(handle.snapshot().ended, 1);
        }
        // Without `respond`, the caller receives the error of the retry layer, which has the record of the attempts.
        let (log, retry) = inner();
        let service = outer().layer(retry);
        let (error, ()) = tokio::join!(send(&service, get()), shut_later(log));
        let told = Attempts::find(&*error.err().unwrap()).unwrap();
        assert_eq!((told.made, told.stop), (1, GiveUpReason::DeadlinePassed));
    }
}

#[tokio::test(start_paused = true)]
async fn a_response_at_the_deadline_is_in_time() {
    let inner: Inner = Inner::with(|_, _| async {
        tokio::time::sleep(ms(250)).await;
        Ok(status(200))
    });
    let response =
        send(&layer(ms(0)).layer(inner), within(ms(250), post(ScriptBody::empty()))).await;
    assert_eq!(response.unwrap().status(), 200);
}

#[tokio::test(start_paused = true)]
async fn draining_a_response_leaves_time_for_the_next_attempt() {
    let inner: Inner = Inner::new(|n| {
        let slow = ScriptBody::new([Piece::Pause(Duration::from_secs(60)), data("late")]);
        Ok(if n == 1 { status(503).map(|_| slow) } else { status(200) })
    });
    let start = Instant::now();
    let response = send(&layer(ms(0)).layer(inner), within(ms(20), get())).await.unwrap();
    assert_eq!((response.status().as_u16(), Attempts::of(&response).made), (200, 2));
    assert!(start.elapsed() >= ms(10) && start.elapsed() <= ms(12), "{:?}", start.elapsed());
}

/// An outer layer may have queued the call for too long.
#[tokio::test(start_paused = true)]
async fn a_call_after_its_deadline_is_not_begun() {
    let inner: Inner = Inner::new(|_| Ok(status(200)));
    let (log, budget) = (inner.log.clone(), purse(9));
    let retry = layer(ms(0)).budget(budget.clone());
    let (handle, mut service) = (retry.handle(), retry.layer(inner));
    let request = within(ms(20), post(ScriptBody::empty()));
    service.ready().await.unwrap();
    assert_eq!(log.taken(), (1, 0));
    tokio::time::sleep(ms(20)).await;
    let call = service.call(request);
    assert_eq!(log.taken(), (0, 0), "the reservation is released");
    let result = call.await;
    assert_eq!((told(&result).made, told(&result).stop), (0, GiveUpReason::DeadlinePassed));
    assert_eq!((log.calls(), told(&result).records().len()), (0, 0));
    let refused = Rejected::find(&**result.as_ref().err().unwrap()).unwrap().kind();
    assert_eq!((refused, handle.snapshot().gave_up), (RejectedKind::DeadlinePassed, 1));
    log.assert_strict();
    assert_eq!(service.ready().await.unwrap().call(get()).await.unwrap().status(), 200);
    log.assert_strict();
}

#[tokio::test(start_paused = true)]
async fn no_attempt_begins_at_the_deadline() {
    let inner: Inner = Inner::new(|_| Ok(status(503)));
    let log = inner.log.clone();
    let layer = layer(ms(20)).min_attempt_time(ms(0));
    let result = send(&layer.layer(inner), within(ms(20), get())).await;
    assert_eq!((log.calls(), told(&result).stop), (1, GiveUpReason::DeadlinePassed));
}

// ===== Rejections by inner layers =====

fn refusing(after: Option<Duration>) -> impl Fn(u32) -> Answer + Send + Sync + 'static {
    move |n| match (n, after) {
        (1, Some(after)) => Err(Rejected::new(RejectedKind::Full).with_retry_after(after).into()),
        (1, None) => Err(Rejected::new(RejectedKind::Full).into()),
        _ => Ok(status(200)),
    }
}

#[tokio::test(start_paused = true)]
async fn inner_rejection_ends_the_call_at_once_with_or_without_a_deadline() {
    for (after, deadline) in [
        (Some(ms(200)), Some(ms(1000))),
        (Some(ms(200)), None),
        (None, Some(ms(1000))),
        (None, None),
    ] {
        let budget = purse(9);
        let service = layer(ms(1)).budget(budget.clone()).layer(Inner::new(refusing(after)));
        let request = deadline.map_or_else(get, |deadline| within(deadline, get()));
        let start = Instant::now();
        let result = send(&service, request).await;
        let told = told(&result);
        assert_eq!((told.made, told.sent, told.stop), (1, 0, GiveUpReason::Rejected), "{after:?}");
        assert_eq!(start.elapsed(), ms(0));
        let text = result.unwrap_err().to_string();
        assert_eq!(
            text,
            "gave up after 1 attempt, nothing was sent (rejected): concurrency limit is reached"
        );
        assert_eq!(budget.balance(), 9.0, "a rejection makes no withdrawal");
    }
}

#[tokio::test(start_paused = true)]
async fn wait_on_rejection_waits_if_the_hint_of_the_rejection_fits() {
    for (after, deadline, made) in [
        (Some(ms(200)), Some(ms(1000)), 2),
        (Some(ms(200)), Some(ms(205)), 1),
        (Some(ms(200)), None, 2),
        (None, Some(ms(1000)), 1),
        (None, None, 1),
    ] {
        let budget = purse(9);
        let layer = layer(ms(1)).budget(budget.clone()).wait_on_rejection(true);
        let service = layer.layer(Inner::new(refusing(after)));
        // The upstream has not received the request, so any method is safe.
        let mut request = post(ScriptBody::empty());
        if let Some(deadline) = deadline {
            request = within(deadline, request);
        }
        let start = Instant::now();
        let result = send(&service, request).await;
        let told = told(&result);
        assert_eq!((told.made, result.is_ok()), (made, made == 2), "{after:?} {deadline:?}");
        if made == 2 {
            assert!(start.elapsed() >= ms(200) && start.elapsed() <= ms(302));
        } else {
            assert_eq!((told.stop, start.elapsed()), (GiveUpReason::Rejected, ms(0)));
        }
        assert_eq!(budget.balance(), 9.0, "a rejection makes no withdrawal");
    }
}

#[tokio::test(start_paused = true)]
async fn repeated_rejections_end_with_the_attempts() {
    let inner: Inner =
        Inner::new(|_| Err(Rejected::new(RejectedKind::Open).with_retry_after(ms(1)).into()));
    let log = inner.log.clone();
    let service = layer(ms(1)).wait_on_rejection(true).layer(inner);
    let result = send(&service, within(ms(9000), get())).await;
    assert_eq!((told(&result).stop, log.calls()), (GiveUpReason::AttemptsUsedUp, 3));
    assert!(Rejected::find(&*result.err().unwrap()).is_some());
}

/// `Retry-After: 1` with a deadline of 3 s, and an upstream that recovers.
#[tokio::test(start_paused = true)]
async fn every_hint_that_fits_the_deadline_is_followed() {
    let inner: Inner = Inner::new(|n| {
        let recovered = n % 2 == 0;
        Ok(if recovered { status(200) } else { with_headers(503, &[("retry-after", "1")]) })
    });
    let service = RetryLayer::http().without_budget().layer(inner);
    for _ in 0..40 {
        let start = Instant::now();
        let response = send(&service, within(ms(3000), get())).await.unwrap();
        assert_eq!(response.status(), 200);
        assert!(start.elapsed() >= ms(1000) && start.elapsed() <= ms(1502));
    }
}

#[tokio::test(start_paused = true)]
async fn grpc_status_of_a_call_that_is_not_grpc_is_not_the_deadline() {
    let inner = Inner::<ScriptBody>::with(|_, _| async {
        tokio::time::sleep(ms(50)).await;
        Ok(with_headers(500, &[("grpc-status", "1")]))
    });
    let result = send(&layer(ms(1)).layer(inner), within(ms(50), get())).await;
    assert_eq!(result.unwrap().status(), 500);
}
