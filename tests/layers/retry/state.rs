//! The state that all services of a layer share, and its configuration.

use std::time::Duration;

use buttress::{Attempts, Backoff, RetryBudget, RetryLayer, retry::GiveUpReason};
use tokio::time::Instant;
use tower::Layer;

use super::fixtures::*;

// ===== Shared state =====

#[tokio::test(start_paused = true)]
async fn state_shared_across_layer_calls() {
    let layer =
        RetryLayer::http().backoff(Backoff::constant(ms(1))).budget(RetryBudget::with(0.1, 0, 10));
    let handle = layer.handle();
    let mut attempts = 0;
    for n in 0..40 {
        // The layer is cloned and applied again for each call, as axum does.
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
async fn handle_changes_a_running_layer() {
    let layer = RetryLayer::http().without_budget();
    let handle = layer.handle();
    assert_eq!(handle.snapshot().budget_balance, None);
    // Before the first service a setter changes the shared state.
    let layer = layer.budget(purse(9));
    let inner: Inner = Inner::new(|_| Ok(status(503)));
    let service = layer.layer(inner);
    handle.set_attempts(5).unwrap();
    handle.set_backoff(Backoff::constant(ms(7)).without_jitter()).unwrap();
    let response = send(&service, get()).await.unwrap();
    let told = Attempts::of(&response);
    assert_eq!((told.made, told.waited), (5, ms(28)), "an existing service uses the new settings");
    let seen = handle.snapshot();
    assert_eq!((seen.retries, seen.budget_balance), (4, Some(5.0)));
    handle.set_assume_idempotent(true);
    handle.set_max_wait(Duration::ZERO);
    handle.set_max_replay_bytes(0);
    let start = Instant::now();
    let response = send(&service, post(ScriptBody::text("x"))).await.unwrap();
    assert_eq!(
        Attempts::of(&response).stop,
        GiveUpReason::BodyGone,
        "the request is idempotent, but its body exceeds the cap"
    );
    send(&service, post(ScriptBody::empty())).await.unwrap();
    assert_eq!(start.elapsed(), Duration::ZERO);
    let error = handle.set_attempts(0).unwrap_err();
    assert_eq!((error.field, &*error.value), ("attempts", "0"));
}

#[tokio::test(start_paused = true)]
async fn setter_of_a_layer_in_use_does_not_change_its_services() {
    let layer = RetryLayer::http().attempts(2).without_budget();
    let handle = layer.handle();
    let service = layer.layer(Inner::new(|_| Ok(status(503))) as Inner);
    let forked = layer.clone().attempts(4);
    send(&service, get()).await.unwrap();
    assert_eq!(handle.snapshot().retries, 1, "the service keeps its settings");
    send(&forked.layer(Inner::new(|_| Ok(status(503))) as Inner), get()).await.unwrap();
    assert_eq!((forked.handle().snapshot().retries, handle.snapshot().retries), (3, 1));
    // The handle of the layer changes only its own services.
    handle.set_attempts(3).unwrap();
    send(&forked.layer(Inner::new(|_| Ok(status(503))) as Inner), get()).await.unwrap();
    assert_eq!((forked.handle().snapshot().retries, handle.snapshot().retries), (6, 1));
}

// ===== Configuration =====

#[tokio::test(start_paused = true)]
async fn invalid_setting_is_a_typed_error() {
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
        // The ratio is so small that its deposits round to zero.
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
        assert_eq!(
            Attempts::find(&*error).unwrap().stop,
            GiveUpReason::Misconfigured,
            "{field} {value}"
        );
        assert_eq!(log.calls(), 1);
    }
    // The error states the first of several faults, and a later valid value does not hide it.
    let layer = RetryLayer::http().attempts(0).backoff(backoff.factor(0.0)).attempts(3);
    assert_eq!(layer.checked().unwrap_err().field, "attempts");
    let layer = RetryLayer::http().attempts(1).backoff(Backoff::constant(ms(0)));
    let _layer = layer.budget(RetryBudget::with(10.0, 0, 1)).checked().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_misconfigured_layer_still_passes_calls_through() {
    let inner: Inner = Inner::new(|n| Ok(status(if n == 1 { 503 } else { 200 })));
    let service = RetryLayer::http().attempts(0).layer(inner);
    let response = send(&service, put(ScriptBody::text("x"))).await.unwrap();
    assert_eq!(response.status(), 503);
    assert_eq!(Attempts::of(&response).stop, GiveUpReason::Misconfigured);
    let response = send(&service, get()).await.unwrap();
    assert!(response.extensions().is_empty());
}
