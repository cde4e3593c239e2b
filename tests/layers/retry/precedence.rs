//! Which failures are retried, in the order of the checks.

use std::{io::ErrorKind, time::Duration};

use buttress::{
    Attempts, Backoff, BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Outcome, Rejected,
    RetryBudget, RetryLayer, Trip,
    outcome::{Reason, RejectedKind},
    retry::{Attempt, GiveUpReason},
};
use http::{Method, Response};
use http_body_util::BodyExt;
use tower::{Layer, ServiceBuilder, ServiceExt, service_fn};

use super::fixtures::*;

/// Returns a layer with five attempts, short delays, and this budget.
fn quick(budget: &RetryBudget) -> RetryLayer {
    RetryLayer::http().attempts(5).backoff(Backoff::constant(ms(1))).budget(budget.clone())
}

/// Returns the record of a call whose attempts all end with `answer`.
async fn outcome(
    layer: RetryLayer,
    request: http::Request<ScriptBody>,
    answer: impl Fn() -> Answer + Send + Sync + 'static,
) -> Attempts {
    let inner = Inner::new(move |_| answer());
    let log = inner.log.clone();
    let result = send(&layer.layer(inner), request).await;
    let told = told(&result);
    assert_eq!(told.made, log.calls());
    log.assert_strict();
    told
}

#[tokio::test(start_paused = true)]
async fn these_statuses_are_retried_and_no_others() {
    for code in 200..600 {
        let yes = matches!(code, 408 | 421 | 425 | 429 | 502..=504 | 520..=524 | 529);
        let told = outcome(quick(&purse(9)), get(), move || Ok(status(code))).await;
        let expected =
            if yes { (5, GiveUpReason::AttemptsUsedUp) } else { (1, GiveUpReason::Responded) };
        assert_eq!((told.made, told.stop), expected, "{code}");
    }
}

#[tokio::test(start_paused = true)]
async fn safe_methods_and_keyed_requests_are_retried() {
    let methods = ["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"];
    let others = ["POST", "PATCH", "CONNECT", "PROPFIND", "get"];
    for method in methods.into_iter().chain(others) {
        let request =
            || request(Method::from_bytes(method.as_bytes()).unwrap(), ScriptBody::empty());
        let told = outcome(quick(&purse(9)), request(), || Ok(status(503))).await;
        let safe = methods.contains(&method);
        assert_eq!(told.stop == GiveUpReason::AttemptsUsedUp, safe, "{method}");
        assert_eq!(told.stop == GiveUpReason::Unsafe, !safe, "{method}");

        let mut keyed = request();
        keyed.headers_mut().insert("idempotency-key", "\"k\"".parse().unwrap());
        assert_eq!(outcome(quick(&purse(9)), keyed, || Ok(status(503))).await.made, 5, "{method}");
        let layer = quick(&purse(9)).assume_idempotent();
        assert_eq!(outcome(layer, request(), || Ok(status(503))).await.made, 5, "{method}");
    }
}

/// Each attempt has the same key, headers and extensions, and its own number.
#[tokio::test(start_paused = true)]
async fn each_attempt_is_the_same_request_with_its_number() {
    let inner = Inner::with(|n, request: http::Request<_>| async move {
        assert_eq!(request.method(), Method::POST);
        assert_eq!(request.uri(), "/a?b=c");
        assert_eq!(request.version(), http::Version::HTTP_2);
        assert_eq!(request.headers()["idempotency-key"], "k");
        assert_eq!(request.headers().get_all("x-two").iter().count(), 2);
        assert_eq!(request.extensions().get(), Some(&"mine"));
        let number = request.extensions().get().map(|Attempt(number)| *number);
        assert_eq!(number, (n > 1).then_some(n));
        let _: &buttress::retry::ReplayBody<ScriptBody> = request.body();
        Ok(status(if n < 4 { 503 } else { 201 }))
    });
    let mut request = http::Request::post("/a?b=c")
        .version(http::Version::HTTP_2)
        .header("idempotency-key", "k")
        .header("x-two", "1")
        .header("x-two", "2")
        .body(ScriptBody::empty())
        .unwrap();
    request.extensions_mut().insert("mine");
    let response = send(&quick(&purse(9)).layer(inner), request).await.unwrap();
    assert_eq!(response.status(), 201);
    let told = Attempts::of(&response);
    assert_eq!((told.made, told.stop), (4, GiveUpReason::Responded));
    assert!(told.waited <= ms(3));
}

// ===== 1. The caller has seen a head =====

#[tokio::test(start_paused = true)]
async fn a_body_error_after_a_regular_head_is_returned() {
    let inner: Inner =
        Inner::new(|_| Ok(status(200).map(|_| ScriptBody::new([data("half"), Piece::Error]))));
    let log = inner.log.clone();
    let response = send(&quick(&purse(9)).layer(inner), get()).await.unwrap();
    let mut body = response.into_body();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "half");
    assert_eq!(body.frame().await.unwrap().unwrap_err(), Oops("body"));
    assert_eq!(log.calls(), 1);
}

// ===== 2. An explicit instruction not to retry =====

#[tokio::test(start_paused = true)]
async fn a_rejection_by_an_inner_layer_ends_the_call() {
    for kind in [RejectedKind::Open, RejectedKind::Full, RejectedKind::Unhealthy] {
        let rejected = move || Rejected::new(kind).with_retry_after(ms(1));
        let budget = purse(9);
        let told = outcome(quick(&budget), get(), move || Err(Box::new(rejected()))).await;
        assert_eq!((told.made, told.stop), (1, GiveUpReason::Rejected));
        // The rejection is in a chain of sources.
        let wrapped = move || Err(std::io::Error::other(rejected()).into());
        assert_eq!(outcome(quick(&budget), get(), wrapped).await.stop, GiveUpReason::Rejected);
        let answered = move || {
            let mut response = status(503);
            response.extensions_mut().insert(rejected());
            Ok(response)
        };
        assert_eq!(outcome(quick(&budget), get(), answered).await.stop, GiveUpReason::Rejected);
        // A rejection in gRPC form: its status in the head would be retried.
        let answered = move || {
            let mut response = with_headers(200, &[("grpc-status", "14")]);
            response.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
            response.extensions_mut().insert(rejected());
            Ok(response)
        };
        assert_eq!(outcome(quick(&budget), get(), answered).await.stop, GiveUpReason::Rejected);
        assert_eq!((budget.balance(), budget.denied()), (9.0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_circuit_that_opens_ends_the_loop_at_once() {
    for responds in [false, true] {
        let breaker = CircuitBreakerLayer::new(Trip::consecutive(2));
        let inner: Inner = Inner::new(|_| Ok(status(503)));
        let log = inner.log.clone();
        let stack = ServiceBuilder::new().layer(quick(&purse(9)));
        let start = tokio::time::Instant::now();
        let told = if responds {
            let service = stack.layer(breaker.respond()).service(inner);
            let result = send(&service, get()).await;
            assert_eq!(result.as_ref().unwrap().status(), 503);
            told(&result)
        } else {
            let service = stack.layer(breaker).service(inner);
            let result = send(&service, get()).await;
            let error = result.as_ref().err().unwrap();
            assert_eq!(Rejected::find(&**error).unwrap().kind(), RejectedKind::Open);
            told(&result)
        };
        assert_eq!((told.made, told.stop, log.calls()), (3, GiveUpReason::Rejected, 2));
        assert!(start.elapsed() <= ms(10), "the layer does not wait for the circuit");
    }
}

#[tokio::test(start_paused = true)]
async fn a_full_limit_ends_the_loop() {
    let inner = Inner::<ScriptBody>::with(|_, _| std::future::pending::<Answer>());
    let log = inner.log.clone();
    let service = ServiceBuilder::new()
        .layer(quick(&purse(9)))
        .layer(ConcurrencyLimitLayer::new(1))
        .service(inner);
    let first = tokio::spawn(service.clone().oneshot(get()));
    tokio::task::yield_now().await;
    let told = told(&send(&service, get()).await);
    assert_eq!((told.made, told.stop, log.calls()), (1, GiveUpReason::Rejected, 1));
    first.abort();
}

// ===== 3. Never received by a server =====

#[tokio::test(start_paused = true)]
async fn unsent_attempts_are_retried_without_withdrawal_and_bounded() {
    for reason in [Reason::NeverSent, Reason::RefusedStream, Reason::GoAway] {
        let budget = purse(9);
        let layer = quick(&budget)
            .classify(move |_: Result<&(), &Oops>| Outcome::failure().because(reason));
        let handle = layer.handle();
        let service = layer.layer(service_fn(|(): ()| async { Err::<(), _>(Oops("unseen")) }));
        send(&service, ()).await.unwrap_err();
        assert_eq!(
            handle.snapshot().retries,
            5 + 4,
            "five transparent retries, then four ordinary ones"
        );
        assert_eq!(budget.balance(), 5.0);
        // With an empty budget, only the transparent retries are made.
        let empty = RetryBudget::with(0.1, 0, 1);
        let layer =
            quick(&empty).classify(move |_: Result<&(), &Oops>| Outcome::failure().because(reason));
        let handle = layer.handle();
        let service = layer.layer(service_fn(|(): ()| async { Err::<(), _>(Oops("unseen")) }));
        send(&service, ()).await.unwrap_err();
        assert_eq!((handle.snapshot().retries, empty.denied()), (5, 1));
    }
}

/// A transparent retry does not count as an attempt, because no server has received the request.
#[tokio::test(start_paused = true)]
async fn a_single_attempt_has_transparent_retries() {
    let unseen = |_: Result<&(), &Oops>| Outcome::failure().because(Reason::RefusedStream);
    let layer = quick(&purse(9)).attempts(1).classify(unseen);
    let handle = layer.handle();
    let service = layer.layer(service_fn(|(): ()| async { Err::<(), _>(Oops("unseen")) }));
    send(&service, ()).await.unwrap_err();
    assert_eq!(handle.snapshot().retries, 5);
}

#[tokio::test(start_paused = true)]
async fn a_post_is_retried_when_no_connection_could_be_made() {
    for body in [ScriptBody::empty(), ScriptBody::text("x"), ScriptBody::text("x").without_hints()]
    {
        // The attempt fails before it touches the body.
        let inner = Inner::<ScriptBody>::with(|n, request| async move {
            if n < 5 {
                return Err(io(ErrorKind::ConnectionRefused));
            }
            assert!(read(request.into_body()).await.0.len() < 2);
            Ok(status(200))
        });
        let service = quick(&purse(9)).layer(inner);
        let response = send(&service, post(body)).await.unwrap();
        assert_eq!(Attempts::of(&response).made, 5);
    }
}

/// An established connection can also end with these errors while it carries a request. A server may have received the
/// `POST`.
#[tokio::test(start_paused = true)]
async fn an_io_error_of_an_established_connection_is_not_safe_for_post() {
    for kind in [
        ErrorKind::HostUnreachable,
        ErrorKind::NetworkUnreachable,
        ErrorKind::NetworkDown,
        ErrorKind::TimedOut,
        ErrorKind::ConnectionReset,
        ErrorKind::ConnectionAborted,
        ErrorKind::BrokenPipe,
        ErrorKind::UnexpectedEof,
    ] {
        let told =
            outcome(quick(&purse(9)), post(ScriptBody::empty()), move || Err(io(kind))).await;
        assert_eq!((told.made, told.stop), (1, GiveUpReason::Unsafe), "{kind:?}");
        let told = outcome(quick(&purse(9)), get(), move || Err(io(kind))).await;
        assert_eq!((told.made, told.stop), (5, GiveUpReason::AttemptsUsedUp), "{kind:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn error_that_is_not_of_the_connection_is_not_retryable() {
    for kind in [ErrorKind::InvalidData, ErrorKind::PermissionDenied, ErrorKind::Other] {
        let told = outcome(quick(&purse(9)), get(), move || Err(io(kind))).await;
        assert_eq!((told.made, told.stop), (1, GiveUpReason::NotRetryable), "{kind:?}");
    }
    let told = outcome(quick(&purse(9)), get(), || Err(Oops("x").into())).await;
    assert_eq!((told.made, told.stop), (1, GiveUpReason::NotRetryable));
}

/// An inner timeout layer ends the attempt. The request is repeated if this is safe.
#[tokio::test(start_paused = true)]
async fn an_attempt_that_timed_out_is_retried_if_safe() {
    let inner = Inner::<ScriptBody>::with(|n, _| async move {
        if n < 3 { std::future::pending().await } else { Ok(status(200)) }
    });
    let hurried = inner.clone();
    let service = quick(&purse(9)).layer(service_fn(move |request| {
        let hurried = hurried.clone();
        async move { tokio::time::timeout(Duration::from_secs(1), hurried.oneshot(request)).await? }
    }));
    let result = send(&service, post(ScriptBody::empty())).await;
    assert_eq!(told(&result).stop, GiveUpReason::Unsafe);
    assert_eq!(told(&send(&service, get()).await).made, 2);
    assert_eq!(inner.log.taken(), (0, 0));
}

// ===== 9. The budget, checked last =====

type Case = (GiveUpReason, RetryLayer, http::Request<ScriptBody>, fn() -> Answer);

#[tokio::test(start_paused = true)]
async fn the_budget_is_not_reduced_when_another_rule_prevents_the_retry() {
    fn busy() -> Answer {
        Ok(with_headers(503, &[("retry-after", "31")]))
    }
    let budget = purse(9);
    let layer = || quick(&budget);
    let long = || ScriptBody::new([data("0123456789")]).without_hints();
    let cases: [Case; 6] = [
        (GiveUpReason::NotRetryable, layer(), get(), || Err(Oops("x").into())),
        (GiveUpReason::Rejected, layer(), get(), || Err(Rejected::new(RejectedKind::Full).into())),
        (GiveUpReason::Unsafe, layer(), post(ScriptBody::empty()), busy),
        (GiveUpReason::BodyGone, layer().max_replay_bytes(9), put(long()), busy),
        (GiveUpReason::AttemptsUsedUp, layer().attempts(1), get(), busy),
        (GiveUpReason::DelayTooLong, layer(), get(), busy),
    ];
    for (stop, layer, request, answer) in cases {
        let handle = layer.handle();
        let told = outcome(layer, request, answer).await;
        assert_eq!((told.made, told.stop, told.waited), (1, stop, Duration::ZERO));
        let seen = handle.snapshot();
        assert_eq!((seen.retries, seen.budget_denied, seen.budget_balance), (0, 0, Some(9.0)));
        assert_eq!(seen.gave_up, u64::from(stop != GiveUpReason::NotRetryable), "{stop}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_result_states_attempts_delay_and_reason() {
    let layer = || RetryLayer::http().backoff(Backoff::constant(ms(20)).without_jitter());
    let told = outcome(layer().budget(purse(1)), get(), || Ok(status(503))).await;
    assert_eq!((told.made, told.waited, told.stop), (2, ms(20), GiveUpReason::BudgetUsedUp));
    let refused = || Err(io(ErrorKind::ConnectionRefused));
    let told = outcome(layer(), get(), refused).await;
    assert_eq!((told.made, told.waited, told.stop), (3, ms(40), GiveUpReason::AttemptsUsedUp));
    assert_eq!(GiveUpReason::AttemptsUsedUp.to_string(), "attempts_used_up");

    let inner: Inner = Inner::new(|_| Err(io(ErrorKind::ConnectionRefused)));
    let error: BoxError = send(&layer().layer(inner), get()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "gave up after 3 attempts, nothing was sent (attempts_used_up): connect_refused"
    );
    let source = error.source().unwrap().downcast_ref::<std::io::Error>().unwrap();
    assert_eq!(source.kind(), ErrorKind::ConnectionRefused);
    let said = async |error: fn() -> BoxError| {
        let inner: Inner = Inner::new(move |_| Err(error()));
        send(&layer().layer(inner), get()).await.unwrap_err().to_string()
    };
    let open = || Rejected::new(RejectedKind::Open).into();
    assert_eq!(
        said(open).await,
        "gave up after 1 attempt, nothing was sent (rejected): circuit is open"
    );
    let other = || Oops("own").into();
    assert_eq!(said(other).await, "gave up after 1 attempt (not retryable)");

    // The caller receives the last response with its head and its body.
    let inner: Inner = Inner::new(|n| {
        let answer = with_headers(503, &[("x-mine", "1")]);
        Ok(answer
            .map(|_| if n == 3 { ScriptBody::text("the last") } else { ScriptBody::text("other") }))
    });
    let response: Response<_> = send(&layer().layer(inner), get()).await.unwrap();
    assert_eq!((response.status().as_u16(), response.headers().len()), (503, 1));
    assert_eq!(Attempts::of(&response).made, 3);
    assert_eq!(read(response.into_body()).await.0, "the last");
}
