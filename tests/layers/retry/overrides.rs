//! Settings that change the rules: failures, methods, limits of failure kinds, and a closure with the final decision.

use std::{io::ErrorKind, sync::Arc, time::Duration};

use buttress::{
    Attempts, Backoff, Outcome, RetryLayer,
    outcome::Reason,
    retry::{Failure, FailureKind, GiveUpReason},
};
use http::{Method, StatusCode};
use tower::{Layer, service_fn};

use super::fixtures::*;

fn quick() -> RetryLayer {
    RetryLayer::http().backoff(Backoff::constant(ms(0))).without_budget()
}

async fn made(
    layer: RetryLayer,
    request: http::Request<ScriptBody>,
    answer: impl Fn() -> Answer + Send + Sync + 'static,
) -> (u32, GiveUpReason) {
    let told = told(&send(&layer.layer(Inner::new(move |_| answer())), request).await);
    (told.made, told.stop)
}

const UP: (u32, GiveUpReason) = (3, GiveUpReason::AttemptsUsedUp);
const ANSWERED: (u32, GiveUpReason) = (1, GiveUpReason::Responded);

#[tokio::test(start_paused = true)]
async fn retry_on_and_never_on_change_the_retried_failures() {
    let also = || quick().retry_on(StatusCode::INTERNAL_SERVER_ERROR).retry_on(Reason::Error);
    assert_eq!(made(also(), get(), || Ok(status(500))).await, UP);
    assert_eq!(made(also(), get(), || Err(Oops("x").into())).await, UP);
    assert_eq!(
        made(also(), post(ScriptBody::empty()), || Ok(status(500))).await,
        (1, GiveUpReason::Unsafe)
    );
    assert_eq!(made(also(), get(), || Ok(status(503))).await, UP, "the other rules are unchanged");
    let less = quick().never_on(StatusCode::SERVICE_UNAVAILABLE).never_on(Reason::Reset);
    assert_eq!(made(less.clone(), get(), || Ok(status(503))).await, ANSWERED);
    let reset = || Err(io(ErrorKind::ConnectionReset));
    assert_eq!(made(less.clone(), get(), reset).await, (1, GiveUpReason::NotRetryable));
    // The last setting for a failure applies.
    let again = less.retry_on(StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(made(again, get(), || Ok(status(503))).await, UP);
    // A status that is not retried by default, with a hint.
    let layer = quick().retry_on(StatusCode::CONFLICT);
    let inner: Inner = Inner::new(|n| {
        Ok(if n == 1 { with_headers(409, &[("retry-after", "2")]) } else { status(200) })
    });
    let response = send(&layer.layer(inner), get()).await.unwrap();
    let told = Attempts::of(&response);
    assert!(told.made == 2 && told.waited >= Duration::from_secs(2), "{told:?}");
}

#[tokio::test(start_paused = true)]
async fn each_attempt_is_reported_with_its_reason_and_the_delay_after_it() {
    let answer = |n| match n {
        1 => Err(io(ErrorKind::ConnectionRefused)),
        2 => Ok(with_headers(503, &[("retry-after-ms", "700")])),
        _ => Ok(status(200)),
    };
    let layer = RetryLayer::http().backoff(Backoff::constant(ms(100)).without_jitter());
    let response = send(&layer.clone().layer(Inner::new(answer)), get()).await.unwrap();
    let told = Attempts::of(&response);
    let each: Vec<_> =
        told.records().iter().map(|tried| (tried.outcome.reason(), tried.waited)).collect();
    assert_eq!(
        each,
        [(Reason::ConnectRefused, ms(100)), (Reason::Status, ms(700)), (Reason::Completed, ms(0)),]
    );
    assert_eq!((told.made, told.waited), (3, ms(800)));
    assert_eq!(told.records()[1].outcome.code(), Some(503));
    // The error has the attempts, too, but only the first of many.
    let reset = |_| Err(io(ErrorKind::ConnectionReset));
    let service = layer.attempts(99).without_budget().layer(Inner::new(reset));
    let error = send(&service, get()).await.unwrap_err();
    let told = Attempts::find(&*error).unwrap();
    assert_eq!((told.made, told.records().len()), (99, 32));
    // A call whose first attempt succeeds has no record of its attempts.
    let response = send(&quick().layer(Inner::new(|_| Ok(status(200)))), get()).await.unwrap();
    assert_eq!(Attempts::of(&response).records(), []);
}

#[tokio::test(start_paused = true)]
async fn grpc_statuses_are_matched_in_head_and_trailers() {
    let aborted = |in_head: bool| {
        let mut response = status(200);
        response.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
        if in_head {
            response.headers_mut().insert("grpc-status", "10".parse().unwrap());
            return response;
        }
        response.map(|_| ScriptBody::new([trailers(&[("grpc-status", "10")])]).without_hints())
    };
    for in_head in [true, false] {
        let layer = quick().retry_on(Failure::Grpc(10));
        assert_eq!(made(layer, get(), move || Ok(aborted(in_head))).await, UP);
        assert_eq!(made(quick(), get(), move || Ok(aborted(in_head))).await, ANSWERED);
        let other = quick().retry_on(StatusCode::OK);
        assert_eq!(made(other, get(), move || Ok(aborted(in_head))).await, ANSWERED);
    }
}

#[tokio::test(start_paused = true)]
async fn a_pushback_that_forbids_retries_is_not_overridden() {
    let no = [("grpc-retry-pushback-ms", "-1")];
    let layers =
        || [quick().retry_on(StatusCode::INTERNAL_SERVER_ERROR), quick().retry_if(|_| Some(true))];
    for layer in layers() {
        let answer = move || Ok(with_headers(500, &no));
        assert_eq!(made(layer, get(), answer).await, (1, GiveUpReason::Pushback));
    }
    // 422: the server has received the same key with another request.
    let mut keyed = get();
    keyed.headers_mut().insert("idempotency-key", "k".parse().unwrap());
    let layer = quick().retry_on(StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(made(layer.clone(), keyed, || Ok(status(422))).await, ANSWERED);
    assert_eq!(made(layer, get(), || Ok(status(422))).await, UP);
}

#[tokio::test(start_paused = true)]
async fn methods_replace_those_of_the_rfc() {
    let layer = quick().methods([Method::POST, Method::GET]);
    assert_eq!(made(layer.clone(), post(ScriptBody::text("x")), || Ok(status(503))).await, UP);
    let put = put(ScriptBody::text("x"));
    assert_eq!(made(layer.clone(), put, || Ok(status(503))).await, (1, GiveUpReason::Unsafe));
    let mut keyed = request(Method::PATCH, ScriptBody::empty());
    keyed.headers_mut().insert("idempotency-key", "k".parse().unwrap());
    assert_eq!(made(layer, keyed, || Ok(status(503))).await, UP);
}

#[tokio::test(start_paused = true)]
async fn a_closure_overrides_the_other_rules() {
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let log = seen.clone();
    let layer = quick().retry_if(move |seen| {
        log.lock().unwrap().push((seen.attempt(), seen.status(), seen.error().is_some()));
        if seen.request().method() == Method::DELETE {
            return Some(false);
        }
        seen.headers()?.get("again").map(|_| true)
    });
    let again = || Ok(with_headers(200, &[("again", "1")]));
    assert_eq!(
        made(layer.clone(), post(ScriptBody::text("x")), again).await,
        UP,
        "the closure permits a retry of a good response to an unsafe request"
    );
    let ok = Some(StatusCode::OK);
    assert_eq!(*seen.lock().unwrap(), [(1, ok, false), (2, ok, false), (3, ok, false)]);
    let delete = request(Method::DELETE, ScriptBody::empty());
    assert_eq!(made(layer.clone(), delete, || Ok(status(503))).await, ANSWERED);
    assert_eq!(
        made(layer.clone(), get(), || Ok(status(503))).await,
        UP,
        "without a decision of the closure the rules apply"
    );
    seen.lock().unwrap().clear();
    let reset = || Err(io(ErrorKind::ConnectionReset));
    assert_eq!(
        made(layer.clone(), post(ScriptBody::empty()), reset).await,
        (1, GiveUpReason::Unsafe)
    );
    assert_eq!(*seen.lock().unwrap(), [(1, None, true)]);
    // A good response has no record.
    let response = send(&layer.layer(Inner::new(|_| Ok(status(200)))), get()).await.unwrap();
    assert!(response.extensions().is_empty());
}

#[tokio::test(start_paused = true)]
async fn each_kind_of_failure_has_its_own_limit() {
    let layer = quick()
        .attempts(10)
        .max_retries_for(FailureKind::Connect, 3)
        .max_retries_for(FailureKind::Status, 1)
        .max_retries_for(FailureKind::Throttled, 0);
    let refused = || Err(io(ErrorKind::ConnectionRefused));
    assert_eq!(made(layer.clone(), get(), refused).await, (4, GiveUpReason::KindUsedUp));
    assert_eq!(made(layer.clone(), get(), || Ok(status(503))).await, (2, GiveUpReason::KindUsedUp));
    assert_eq!(made(layer.clone(), get(), || Ok(status(429))).await, (1, GiveUpReason::KindUsedUp));
    let reset = || Err(io(ErrorKind::ConnectionReset));
    assert_eq!(made(layer.clone(), get(), reset).await, (10, GiveUpReason::AttemptsUsedUp));
    // Each failure kind has its own count.
    let inner: Inner = Inner::new(|n| match n {
        1 | 3 | 5 => Err(io(ErrorKind::ConnectionRefused)),
        2 => Ok(status(503)),
        4 => Err(io(ErrorKind::ConnectionReset)),
        _ => Ok(status(200)),
    });
    let response = send(&layer.layer(inner), get()).await.unwrap();
    assert_eq!((response.status().as_u16(), Attempts::of(&response).made), (200, 6));
}

/// The limit also applies to transparent retries.
#[tokio::test(start_paused = true)]
async fn max_retries_for_applies_to_transparent_retries() {
    for (most, made) in [(0, 1), (1, 2), (3, 4)] {
        let layer = quick().attempts(10).max_retries_for(FailureKind::Unseen, most);
        let layer = layer
            .classify(|_: Result<&(), &Oops>| Outcome::failure().because(Reason::RefusedStream));
        let handle = layer.handle();
        let service = layer.layer(service_fn(|(): ()| async { Err::<(), _>(Oops("unseen")) }));
        send(&service, ()).await.unwrap_err();
        assert_eq!(handle.snapshot().retries + 1, made, "at most {most}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_backoff_of_the_user_can_end_the_attempts() {
    let layer = quick().attempts(9).backoff_with(|| [ms(10), ms(70)].into_iter());
    for _ in 0..2 {
        let inner: Inner = Inner::new(|_| Ok(status(503)));
        let told = Attempts::of(&send(&layer.layer(inner), get()).await.unwrap());
        assert_eq!((told.made, told.waited, told.stop), (3, ms(80), GiveUpReason::AttemptsUsedUp));
    }
}

#[tokio::test(start_paused = true)]
async fn a_seed_makes_delays_reproducible() {
    let backoff = Backoff::exponential(ms(100)).seed(42);
    let expected: Duration = backoff.delays().take(2).sum();
    for _ in 0..3 {
        let inner: Inner = Inner::new(|_| Ok(status(503)));
        let response = send(&quick().backoff(backoff).layer(inner), get()).await.unwrap();
        assert_eq!(Attempts::of(&response).waited, expected);
    }
}
