//! Statuses with which a server declares that it has not processed the request, and statuses of proxies.

use buttress::{
    Backoff, RetryLayer,
    outcome::Reason,
    retry::{FailureKind, GiveUpReason},
};
use http::{HeaderName, Method, Request, StatusCode};
use tower::Layer;

use super::fixtures::{Inner, ScriptBody, ms, purse, send, told, with_headers};

fn request(method: Method, headers: &[(&'static str, &'static str)]) -> Request<ScriptBody> {
    let mut request = Request::new(ScriptBody::text("question"));
    *request.method_mut() = method;
    for (name, value) in headers {
        request.headers_mut().append(HeaderName::from_static(name), value.parse().unwrap());
    }
    request
}

/// The number of attempts, the reason for the stop, and the balance of a budget of 9 afterwards.
async fn retried(
    layer: RetryLayer,
    request: Request<ScriptBody>,
    code: u16,
    headers: &'static [(&'static str, &'static str)],
) -> (u32, GiveUpReason, f64) {
    let budget = purse(9);
    let service =
        layer.budget(budget.clone()).layer(Inner::new(move |_| Ok(with_headers(code, headers))));
    let told = told(&send(&service, request).await);
    (told.made, told.stop, budget.balance())
}

fn layer() -> RetryLayer {
    RetryLayer::http().attempts(3).backoff(Backoff::constant(ms(1))).budget(purse(9))
}

#[tokio::test(start_paused = true)]
async fn unprocessed_statuses_are_retried_for_any_method() {
    let statuses = [StatusCode::TOO_MANY_REQUESTS, StatusCode::from_u16(529).unwrap()];
    for code in [429, 529] {
        let post = || request(Method::POST, &[]);
        let listed = retried(layer().unprocessed(statuses), post(), code, &[]).await;
        assert_eq!(
            listed,
            (3, GiveUpReason::AttemptsUsedUp, 7.0),
            "{code}: each retry makes a withdrawal"
        );
        let unlisted = retried(layer(), post(), code, &[]).await;
        assert_eq!(unlisted, (1, GiveUpReason::Unsafe, 9.0), "{code}");
        // The other rules stay as they are.
        let other = retried(layer().unprocessed(statuses), post(), 503, &[]).await;
        assert_eq!(other, (1, GiveUpReason::Unsafe, 9.0));
    }
    // A status that is otherwise a regular response.
    let locked = layer().unprocessed([StatusCode::LOCKED]);
    let retried = retried(locked, request(Method::POST, &[]), 423, &[]).await;
    assert_eq!((retried.0, retried.1), (3, GiveUpReason::AttemptsUsedUp));
}

#[tokio::test(start_paused = true)]
async fn user_rules_take_precedence_over_unprocessed_statuses() {
    let locked = || layer().unprocessed([StatusCode::LOCKED]);
    let post = || request(Method::POST, &[]);
    let never = locked().retry_if(|seen| (seen.attempt() > 1).then_some(false));
    assert_eq!(retried(never, post(), 423, &[]).await.0, 2);
    let error = locked().never_on(StatusCode::LOCKED).checked().unwrap_err();
    let text = "`unprocessed` is 423: list the status in either unprocessed or never_on";
    assert_eq!(error.to_string(), text);
    let error = layer().unprocessed([StatusCode::OK]).checked().unwrap_err();
    assert_eq!(error.to_string(), "`unprocessed` is 200: use statuses of 400 or more");
}

#[tokio::test(start_paused = true)]
async fn listed_status_is_unprocessed_although_a_rule_retries_it() {
    let limited = || layer().unprocessed([StatusCode::TOO_MANY_REQUESTS]);
    let post = || request(Method::POST, &[]);
    for layer in
        [limited().retry_on(StatusCode::TOO_MANY_REQUESTS), limited().retry_on(Reason::Status)]
    {
        assert_eq!(retried(layer, post(), 429, &[]).await, (3, GiveUpReason::AttemptsUsedUp, 7.0));
    }
    let other = limited().retry_on(Reason::Status);
    assert_eq!(retried(other, post(), 503, &[]).await, (1, GiveUpReason::Unsafe, 9.0));
}

#[tokio::test(start_paused = true)]
async fn too_early_is_retried_for_any_method_unless_the_client_sent_early_data() {
    let plain = retried(layer(), request(Method::POST, &[]), 425, &[]).await;
    assert_eq!(plain, (3, GiveUpReason::AttemptsUsedUp, 9.0), "no withdrawal");
    let early = request(Method::GET, &[("early-data", "1")]);
    assert_eq!(retried(layer(), early, 425, &[]).await, (1, GiveUpReason::Responded, 9.0));
}

#[tokio::test(start_paused = true)]
async fn misdirected_request_is_retried_if_the_method_is_safe() {
    let get = retried(layer(), request(Method::GET, &[]), 421, &[]).await;
    assert_eq!((get.0, get.1), (3, GiveUpReason::AttemptsUsedUp));
    let post = retried(layer(), request(Method::POST, &[]), 421, &[]).await;
    assert_eq!((post.0, post.1), (1, GiveUpReason::Unsafe));
}

#[tokio::test(start_paused = true)]
async fn conflict_is_retried_only_for_a_retry_with_an_idempotency_key() {
    let answers = |n| Ok(with_headers(if n == 1 { 503 } else { 409 }, &[]));
    for (key, made) in [(true, 3), (false, 2)] {
        let headers: &[_] = if key { &[("idempotency-key", "1")] } else { &[] };
        let result = send(&layer().layer(Inner::new(answers)), request(Method::PUT, headers)).await;
        assert_eq!(told(&result).made, made);
    }
    let first = request(Method::PUT, &[("idempotency-key", "1")]);
    assert_eq!(retried(layer(), first, 409, &[]).await.0, 1, "not after the first attempt");
}

#[tokio::test(start_paused = true)]
async fn response_of_a_proxys_rate_limit_is_not_retried() {
    const LIMITED: &[(&str, &str)] = &[("x-envoy-ratelimited", "true")];
    const GRPC: &[(&str, &str)] = &[
        ("x-envoy-ratelimited", "true"),
        ("content-type", "application/grpc"),
        ("grpc-status", "14"),
    ];
    for (code, headers) in [(503, LIMITED), (429, LIMITED), (200, GRPC)] {
        let get = request(Method::GET, &[]);
        let found = retried(layer(), get, code, headers).await;
        assert_eq!(found, (1, GiveUpReason::RateLimited, 9.0), "{code}");
    }
    // This corresponds to Envoy's retry policy `envoy-ratelimited`.
    let listed = layer().retry_on(StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(retried(listed, request(Method::GET, &[]), 503, LIMITED).await.0, 3);
}

/// grpc-go: `shouldRetry` throttles for every pushback that forbids a retry, and only `OK` makes a deposit.
#[tokio::test(start_paused = true)]
async fn grpc_budget_follows_the_status_and_the_pushback() {
    use buttress::retry::RetryBudget;

    let balance = async |pairs: &'static [(&'static str, &'static str)]| {
        let budget = RetryBudget::grpc(10, 0.5);
        // 5 tokens above the half; take out one, so that a deposit is visible.
        drop(budget.withdraw());
        let before = budget.balance();
        let layer = RetryLayer::grpc().attempts(1).budget(budget.clone());
        let call = request(Method::POST, &[("content-type", "application/grpc")]);
        let service = layer.layer(Inner::new(move |_| {
            let mut response = with_headers(200, pairs);
            response.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
            Ok(response)
        }));
        let told = told(&send(&service, call).await);
        (told.stop, budget.balance() - before)
    };
    assert_eq!(balance(&[("grpc-status", "0")]).await, (GiveUpReason::Responded, 0.5));
    assert_eq!(balance(&[("grpc-status", "3")]).await, (GiveUpReason::Responded, 0.0));
    assert_eq!(balance(&[("grpc-status", "14")]).await, (GiveUpReason::AttemptsUsedUp, -1.0));
    for code in ["3", "13", "14"] {
        let pairs: &'static [_] =
            Box::leak(Box::new([("grpc-status", code), ("grpc-retry-pushback-ms", "-1")]));
        assert_eq!(balance(pairs).await, (GiveUpReason::Pushback, -1.0), "{code}");
    }
    let twice: &'static [_] = &[
        ("grpc-status", "14"),
        ("grpc-retry-pushback-ms", "10"),
        ("grpc-retry-pushback-ms", "20"),
    ];
    assert_eq!(balance(twice).await, (GiveUpReason::Pushback, -1.0));
}

/// With this budget each failure makes a withdrawal, retried or not.
#[tokio::test(start_paused = true)]
async fn grpc_budget_makes_no_withdrawal_for_unprocessed_and_rejected_attempts() {
    use buttress::{Rejected, outcome::RejectedKind, retry::RetryBudget};

    let (early, rejected) = (RetryBudget::grpc(20, 0.5), RetryBudget::grpc(20, 0.5));
    let layer = || layer().wait_on_rejection(true);
    let service = layer().budget(early.clone()).layer(Inner::new(|_| Ok(with_headers(425, &[]))));
    let told = told(&send(&service, request(Method::POST, &[])).await);
    assert_eq!((told.made, told.stop, early.balance()), (3, GiveUpReason::AttemptsUsedUp, 20.0));
    let full = || Rejected::new(RejectedKind::Full).with_retry_after(ms(5));
    let service = layer().budget(rejected.clone()).layer(Inner::new(move |_| Err(full().into())));
    let told = super::fixtures::told(&send(&service, request(Method::POST, &[])).await);
    assert_eq!((told.made, told.stop, rejected.balance()), (3, GiveUpReason::AttemptsUsedUp, 20.0));
}

#[tokio::test(start_paused = true)]
async fn user_rules_decide_about_rejections() {
    use buttress::{Rejected, outcome::RejectedKind};

    let made = async |layer: RetryLayer| {
        let full = || Rejected::new(RejectedKind::Full).with_retry_after(ms(5));
        let service = layer.layer(Inner::new(move |_| Err(full().into())));
        let told = told(&send(&service, request(Method::POST, &[])).await);
        (told.made, told.stop)
    };
    let default = layer();
    assert_eq!(made(default.clone()).await, (1, GiveUpReason::Rejected));
    assert_eq!(made(layer().retry_on(Reason::Rejected)).await, (3, GiveUpReason::AttemptsUsedUp));
    assert_eq!(made(layer().retry_if(|_| Some(true))).await, (3, GiveUpReason::AttemptsUsedUp));
    let waits = || layer().wait_on_rejection(true);
    assert_eq!(made(waits()).await, (3, GiveUpReason::AttemptsUsedUp));
    assert_eq!(made(waits().retry_if(|_| Some(false))).await, (1, GiveUpReason::Rejected));
    let error = waits().never_on(Reason::Rejected).checked().unwrap_err();
    assert_eq!(error.field, "wait_on_rejection");
    let error = layer().max_retries_for(FailureKind::Rejected, 1).checked().unwrap_err();
    assert_eq!(error.field, "max_retries_for(FailureKind::Rejected)");
    assert!(waits().max_retries_for(FailureKind::Rejected, 1).checked().is_ok());
    let error = waits().max_retries_for(FailureKind::Rejected, 0).checked().unwrap_err();
    assert_eq!(error.field, "wait_on_rejection");
}
