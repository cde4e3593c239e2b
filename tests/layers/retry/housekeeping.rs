//! Connection housekeeping: an immediate retry, without counting an attempt and without a withdrawal.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

use buttress::{
    Backoff, Outcome, RetryBudget, RetryLayer,
    outcome::Reason,
    retry::{FailureKind, RetryPreset},
};
use tokio::time::Instant;
use tower::{Layer, ServiceExt, service_fn};

use super::fixtures::*;

const ALL: [Reason; 5] = [
    Reason::NeverSent,
    Reason::RefusedStream,
    Reason::GoAway,
    Reason::StaleConnection,
    Reason::Reset,
];

fn housekeeping(reason: Reason) -> Outcome {
    Outcome::cancelled().because(reason)
}

/// Makes a call whose attempts end with these outcomes, and with the last one from then on. Returns whether the call
/// succeeded, and the number of attempts.
async fn call(layer: RetryLayer, outcomes: Vec<Outcome>) -> (bool, usize) {
    let made = Arc::new(AtomicUsize::new(0));
    let counter = made.clone();
    let layer =
        layer.classify(|result: Result<&Outcome, &Outcome>| *result.unwrap_or_else(|error| error));
    let service = layer.layer(service_fn(move |()| {
        let outcome = outcomes[counter.fetch_add(1, SeqCst).min(outcomes.len() - 1)];
        async move { if outcome.is_success() { Ok(outcome) } else { Err(outcome) } }
    }));
    (service.oneshot(()).await.is_ok(), made.load(SeqCst))
}

fn layer(budget: &RetryBudget) -> RetryLayer {
    let backoff = Backoff::constant(ms(100)).without_jitter();
    RetryLayer::http().backoff(backoff).budget(budget.clone())
}

#[tokio::test(start_paused = true)]
async fn five_transparent_retries_cost_no_time_no_attempt_and_no_budget() {
    for reason in ALL {
        let (budget, start) = (RetryBudget::with(0.1, 0, 1), Instant::now());
        let mut outcomes = vec![housekeeping(reason); 5];
        outcomes.push(Outcome::success());
        assert_eq!(call(layer(&budget).attempts(1), outcomes).await, (true, 6), "{reason}");
        assert_eq!((start.elapsed(), budget.balance(), budget.denied()), (ms(0), 0.1, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn housekeeping_beyond_five_retries_follows_the_ordinary_rules() {
    for reason in ALL {
        let (budget, start) = (purse(9), Instant::now());
        let outcomes = vec![housekeeping(reason)];
        assert_eq!(call(layer(&budget), outcomes).await, (false, 5 + 3), "{reason}");
        assert!((ms(200)..ms(203)).contains(&start.elapsed()), "{reason}: two delays");
        assert_eq!(budget.balance(), 7.0, "{reason}: two retries");
    }
}

#[tokio::test(start_paused = true)]
async fn the_maximum_of_five_transparent_retries_applies_to_the_whole_call() {
    let (stale, failed) = (housekeeping(Reason::StaleConnection), Outcome::failure());
    let mut outcomes = vec![stale, stale, stale, failed, stale, stale, failed];
    outcomes.push(Outcome::success());
    // The retries of the two failures make withdrawals, and the five others are transparent.
    assert_eq!(call(layer(&purse(9)), outcomes).await, (true, 8));
    let outcomes = vec![stale, stale, stale, failed, stale, stale, failed, stale];
    assert_eq!(call(layer(&purse(9)), outcomes).await, (false, 8));
}

/// The layer and its clones share one balance, which starts at 200 retries.
#[tokio::test(start_paused = true)]
async fn transparent_retries_without_responses_end_after_two_hundred() {
    let layer = layer(&purse(9)).attempts(1);
    let stale = housekeeping(Reason::StaleConnection);
    for _ in 0..40 {
        assert_eq!(call(layer.clone(), vec![stale]).await, (false, 6));
    }
    assert_eq!(call(layer.clone(), vec![stale]).await, (false, 1));
    // Attempts and backoff apply.
    let (handle, start) = (layer.handle(), Instant::now());
    handle.set_attempts(3).unwrap();
    assert_eq!(call(layer.clone(), vec![stale]).await, (false, 3));
    assert!((ms(200)..ms(203)).contains(&start.elapsed()), "two delays");
    // One response deposits five transparent retries.
    handle.set_attempts(1).unwrap();
    for response in [Outcome::success(), Outcome::failure().because(Reason::Status)] {
        assert_eq!(call(layer.clone(), vec![response]).await.1, 1);
        assert_eq!(call(layer.clone(), vec![stale]).await, (false, 6), "{response}");
        assert_eq!(call(layer.clone(), vec![stale]).await, (false, 1), "{response}");
    }
    // The response of a retry deposits them too.
    handle.set_attempts(2).unwrap();
    assert_eq!(call(layer.clone(), vec![stale, Outcome::success()]).await, (true, 2));
    handle.set_attempts(1).unwrap();
    assert_eq!(call(layer, vec![stale]).await, (false, 6));
}

#[tokio::test(start_paused = true)]
async fn the_balance_of_transparent_retries_has_a_maximum_of_two_hundred() {
    let layer = layer(&purse(9)).attempts(1);
    let stale = housekeeping(Reason::StaleConnection);
    for _ in 0..100 {
        call(layer.clone(), vec![Outcome::success()]).await;
    }
    for _ in 0..40 {
        assert_eq!(call(layer.clone(), vec![stale]).await, (false, 6));
    }
    assert_eq!(call(layer, vec![stale]).await, (false, 1));
}

#[tokio::test(start_paused = true)]
async fn a_transparent_retry_that_another_rule_declines_does_not_change_the_balance() {
    let layer = layer(&purse(9)).attempts(1);
    let stale = housekeeping(Reason::StaleConnection);
    layer.handle().set_max_retries_for(FailureKind::Read, 0).unwrap();
    for _ in 0..300 {
        assert_eq!(call(layer.clone(), vec![stale]).await, (false, 1));
    }
    layer.handle().set_max_retries_for(FailureKind::Read, None).unwrap();
    assert_eq!(call(layer, vec![stale]).await, (false, 6));
}

#[tokio::test(start_paused = true)]
async fn another_cancelled_outcome_is_not_retried() {
    for reason in [Reason::Dropped, Reason::Caller, Reason::Reported] {
        assert_eq!(call(layer(&purse(9)), vec![housekeeping(reason)]).await, (false, 1));
    }
}

/// The AWS budget deposits the cost of the last retry on success. A transparent retry does not change this cost.
#[tokio::test(start_paused = true)]
async fn a_transparent_retry_makes_neither_a_withdrawal_nor_a_deposit() {
    let stale = housekeeping(Reason::StaleConnection);
    let budget = RetryBudget::aws();
    let outcomes = vec![Outcome::failure(), stale, Outcome::success()];
    assert_eq!(call(layer(&budget), outcomes).await, (true, 3));
    assert_eq!(budget.balance(), 500.0);
    // The gRPC budget withdraws a token for each failure.
    let budget = RetryBudget::grpc(10, 0.1);
    let outcomes = vec![stale, stale, Outcome::failure(), Outcome::success()];
    assert_eq!(call(layer(&budget), outcomes).await, (true, 4));
    assert_eq!(budget.balance(), 9.1);
}

#[tokio::test(start_paused = true)]
async fn housekeeping_that_is_not_retried_withdraws_nothing_from_the_budget() {
    let budget = RetryBudget::grpc(10, 0.1);
    let layer = layer(&budget).max_retries_for(FailureKind::Read, 0);
    let outcomes = vec![housekeeping(Reason::StaleConnection)];
    assert_eq!(call(layer, outcomes).await, (false, 1));
    assert_eq!(budget.balance(), 10.0);
}

#[tokio::test(start_paused = true)]
async fn every_preset_except_grpc_makes_five_transparent_retries() {
    for (preset, transparent) in [
        (RetryPreset::Aws, 5),
        (RetryPreset::Envoy, 5),
        (RetryPreset::Finagle, 5),
        (RetryPreset::Grpc, 1),
    ] {
        let layer = RetryLayer::http().preset(preset).attempts(1);
        let outcomes = vec![housekeeping(Reason::StaleConnection)];
        assert_eq!(call(layer, outcomes).await, (false, 1 + transparent), "{preset:?}");
    }
}
