//! The retry budget: the number of retries for a number of calls.

use std::{
    sync::{
        Barrier,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

use buttress::{
    Attempts, Backoff, Rejected, RetryBudget, RetryLayer,
    outcome::RejectedKind,
    retry::{FailureKind, GiveUpReason, RetryPreset},
};
use proptest::prelude::*;
use tokio::time::{Instant, advance};
use tower::Layer;

use super::fixtures::*;

/// In other crates the ratios 0.6, 0.7 and 0.9 result in 100 %, and 0.4 results in 50 %.
#[tokio::test(start_paused = true)]
async fn budget_of_60_70_or_90_percent_permits_exactly_that_share() {
    for percent in [1, 10, 20, 33, 40, 60, 70, 90, 99, 100, 150, 1000] {
        let budget = RetryBudget::with(f64::from(percent) / 100.0, 0, 100);
        let mut granted = 0;
        for _ in 0..1000 {
            budget.deposit();
            while let Some(retry) = budget.withdraw() {
                retry.spend();
                granted += 1;
            }
        }
        assert_eq!(granted, percent * 10, "{percent} %");
    }
    // The same through the layer, when all attempts fail.
    for percent in [60, 70, 90] {
        let budget = RetryBudget::with(f64::from(percent) / 100.0, 0, 100);
        let layer = RetryLayer::http().backoff(Backoff::constant(ms(0))).budget(budget);
        let inner: Inner = Inner::new(|_| Ok(status(503)));
        let log = inner.log.clone();
        let service = layer.layer(inner);
        for _ in 0..1000 {
            send(&service, get()).await.unwrap();
        }
        assert_eq!(log.calls(), 1000 + percent * 10);
    }
}

/// When all attempts fail, the load is 1.2 times the number of calls, plus the reserve.
#[tokio::test(start_paused = true)]
async fn the_default_budget_amplifies_an_outage_by_a_fifth_or_less() {
    for gap in [0, 10] {
        let layer = RetryLayer::http().attempts(10).backoff(Backoff::constant(ms(0)));
        let inner: Inner = Inner::new(|_| Ok(status(503)));
        let (log, handle, service) = (inner.log.clone(), layer.handle(), layer.layer(inner));
        let start = Instant::now();
        for _ in 0..5000 {
            send(&service, get()).await.unwrap();
            advance(ms(gap)).await;
        }
        let reserve = 10 + u32::try_from(start.elapsed().as_secs()).unwrap();
        assert!(log.calls() <= 6000 + reserve, "{}", log.calls());
        assert!(log.calls() + 2 >= 6000 + reserve, "the budget is not used up: {}", log.calls());
        let seen = handle.snapshot();
        assert_eq!(seen.retries, u64::from(log.calls()) - 5000);
        assert_eq!(seen.gave_up, 5000);
    }
}

#[tokio::test(start_paused = true)]
async fn one_budget_for_two_layers() {
    let budget = RetryBudget::with(0.5, 0, 10);
    let layer = || RetryLayer::http().backoff(Backoff::constant(ms(0))).budget(budget.clone());
    let good: Inner = Inner::new(|_| Ok(status(200)));
    let bad: Inner = Inner::new(|_| Ok(status(503)));
    let (good_layer, bad_layer) = (layer(), layer());
    let denied = || [&good_layer, &bad_layer].map(|layer| layer.handle().snapshot().budget_denied);
    let (good, bad) = (good_layer.layer(good), bad_layer.layer(bad));
    for _ in 0..3 {
        send(&good, get()).await.unwrap();
    }
    let response = send(&bad, get()).await.unwrap();
    let told = Attempts::of(&response);
    assert_eq!(
        (told.made, told.stop),
        (3, GiveUpReason::AttemptsUsedUp),
        "the calls of the other layer made the deposits"
    );
    assert_eq!(Attempts::of(&send(&bad, get()).await.unwrap()).stop, GiveUpReason::BudgetUsedUp);
    assert_eq!((budget.denied(), budget.balance()), (1, 0.5));
    assert_eq!(denied(), [0, 1], "each layer counts its own denials");
}

#[tokio::test(start_paused = true)]
async fn the_budget_grows_per_second_up_to_its_cap() {
    let budget = RetryBudget::with(0.2, 2, 30);
    assert_eq!(budget.balance(), 20.0, "the initial balance is the reserve of ten seconds");
    advance(Duration::from_secs(4)).await;
    assert_eq!(budget.balance(), 28.0);
    advance(Duration::from_secs(3600)).await;
    assert_eq!(budget.balance(), 30.0);
    (0..30).for_each(|_| budget.withdraw().unwrap().spend());
    assert!(budget.withdraw().is_none());
    advance(ms(500)).await;
    budget.withdraw().unwrap().spend();
    assert!(budget.withdraw().is_none());
    assert_eq!(RetryBudget::with(0.2, 100, 3).balance(), 3.0, "the cap limits the initial balance");
    assert_eq!(RetryBudget::with(0.2, u32::MAX, u32::MAX).balance(), f64::from(u32::MAX));
}

/// Frequent withdrawals do not lose the fractions below a millionth of a retry.
#[tokio::test(start_paused = true)]
async fn frequent_withdrawals_do_not_lose_fractions_of_a_retry() {
    for (step, count) in [(999, 10_000), (1_500, 10_000), (1, 20_000)] {
        let budget = RetryBudget::with(0.2, 1, 100);
        (0..10).for_each(|_| budget.withdraw().unwrap().spend());
        for _ in 0..count {
            advance(Duration::from_nanos(step)).await;
            assert!(budget.withdraw().is_none());
        }
        let expected = (step * count) as f64 / 1e9;
        assert!((budget.balance() - expected).abs() < 2e-6, "{} {expected}", budget.balance());
    }
}

#[test]
fn many_threads_never_withdraw_more_than_the_balance() {
    for round in 0..20 {
        let budget = purse(500);
        let (start, granted) = (Barrier::new(8), AtomicU64::new(0));
        thread::scope(|scope| {
            for n in 0..8 {
                let (budget, start, granted) = (budget.clone(), &start, &granted);
                scope.spawn(move || {
                    start.wait();
                    for m in 0..400 {
                        let Some(retry) = budget.withdraw() else { continue };
                        // Some withdrawals are cancelled and do not count.
                        if (n + m + round) % 5 == 0 {
                            drop(retry);
                        } else {
                            retry.spend();
                            granted.fetch_add(1, SeqCst);
                        }
                    }
                });
            }
        });
        assert_eq!(granted.load(SeqCst) as f64 + budget.balance(), 500.0);
    }
    // The same with concurrent deposits.
    let budget = RetryBudget::with(0.3, 0, 1_000_000);
    let granted = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..5000 {
                    budget.deposit();
                    if let Some(retry) = budget.withdraw() {
                        retry.spend();
                        granted.fetch_add(1, SeqCst);
                    }
                }
            });
        }
    });
    let sum = granted.load(SeqCst) as f64 + budget.balance();
    assert!((sum - 12_000.0).abs() < 1e-6, "{sum}: no deposit is lost or counted twice");
}

// ===== Random schedules =====

#[derive(Clone, Copy, Debug)]
enum Step {
    Call,
    Retry,
    Cancelled,
    Time(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Call),
        4 => Just(Step::Retry),
        1 => Just(Step::Cancelled),
        1 => (0u64..3_000_000).prop_map(Step::Time),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() })]

    /// Compares the budget with a plain sum: it permits no more retries, and no fewer than the cap and the rounding
    /// allow.
    #[test]
    fn retries_never_exceed_the_deposits(
        ratio in 0.001f64..10.0,
        per_second in 0u32..50,
        cap in 1u32..200,
        steps in proptest::collection::vec(step(), 0..400),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let budget = RetryBudget::with(ratio, per_second, cap);
            let start = f64::from(per_second * 10).min(f64::from(cap));
            // The model of the budget, in floating point.
            let (mut plain, mut paid, mut granted) = (start, start, 0.0);
            let mut slack = 1e-6;
            for step in steps {
                let income = match step {
                    Step::Call => {
                        budget.deposit();
                        // A deposit is rounded by up to half a millionth.
                        slack += 1e-6;
                        ratio
                    }
                    Step::Time(micros) => {
                        advance(Duration::from_micros(micros)).await;
                        micros as f64 * 1e-6 * f64::from(per_second)
                    }
                    Step::Retry | Step::Cancelled => {
                        let spends = matches!(step, Step::Retry);
                        let withdrawn = budget.withdraw();
                        slack += 1e-6;
                        match withdrawn {
                            Some(retry) if spends => {
                                retry.spend();
                                granted += 1.0;
                                prop_assert!(plain >= 1.0 - slack, "granted from {plain}");
                                plain -= 1.0;
                            }
                            Some(retry) => drop(retry),
                            None => prop_assert!(plain < 1.0 + slack, "denied with {plain}"),
                        }
                        0.0
                    }
                };
                paid += income;
                plain = (plain + income).min(f64::from(cap));
                prop_assert!(granted <= paid + slack);
                // Reading the balance caps the reserve at the same instants as the model.
                prop_assert!((budget.balance() - plain).abs() <= slack);
            }
            Ok(())
        })?;
    }
}

// ===== Costs =====

#[test]
fn each_kind_of_failure_has_its_cost() {
    let budget = RetryBudget::with(1.0, 0, 10).cost(FailureKind::Timeout, 2.5);
    (0..10).for_each(|_| budget.deposit());
    budget.withdraw_for(FailureKind::Timeout).unwrap().spend();
    assert_eq!(budget.balance(), 7.5);
    // A refund has the cost of its withdrawal.
    drop(budget.withdraw_for(FailureKind::Timeout).unwrap());
    assert_eq!(budget.balance(), 7.5);
    budget.withdraw_for(FailureKind::Status).unwrap().spend();
    assert_eq!(budget.balance(), 6.5);
    // The balance is shared, the cost is not.
    let cheap = budget.clone().cost(FailureKind::Timeout, 0.5);
    cheap.withdraw_for(FailureKind::Timeout).unwrap().spend();
    assert_eq!(budget.balance(), 6.0);
    for cost in [0.0, -1.0, f64::NAN, 1001.0] {
        let error = RetryBudget::ratio(0.2).cost(FailureKind::Read, cost).check().unwrap_err();
        assert_eq!(error.field, "budget.cost", "{cost}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_preset_of_aws_withdraws_14_and_5_and_refunds_the_last_retry() {
    let budget = RetryBudget::aws();
    let layer = || RetryLayer::http().preset(RetryPreset::Aws).budget(budget.clone());
    let outage: Inner = Inner::new(|_| Ok(status(503)));
    send(&layer().layer(outage), get()).await.unwrap();
    assert_eq!(budget.balance(), 500.0 - 28.0, "without a success nothing is refunded");
    let throttled: Inner = Inner::new(|n| Ok(status(if n == 1 { 429 } else { 200 })));
    let backoff = Backoff::aws().without_jitter();
    let start = Instant::now();
    send(&layer().backoff(backoff).layer(throttled), get()).await.unwrap();
    assert_eq!(budget.balance(), 472.0);
    assert!(start.elapsed() >= ms(1000) && start.elapsed() <= ms(1002));
    let up_and_down: Inner =
        Inner::new(|n| Ok(status(if n < 3 { [503, 429][n as usize - 1] } else { 200 })));
    send(&layer().layer(up_and_down), get()).await.unwrap();
    assert_eq!(budget.balance(), 472.0 - 14.0, "a success refunds the cost of the last retry only");
    // A call without a retry and without a failure deposits 1.
    let fine: Inner = Inner::new(|_| Ok(status(200)));
    send(&layer().layer(fine.clone()), get()).await.unwrap();
    send(&layer().retry_if(|_| None).layer(fine), get()).await.unwrap();
    let missing: Inner = Inner::new(|_| Ok(status(404)));
    send(&layer().layer(missing), get()).await.unwrap();
    assert_eq!(budget.balance(), 461.0);
    let refused: Inner = Inner::new(|_| Ok(status(500)));
    send(&layer().layer(refused), get()).await.unwrap();
    assert_eq!(budget.balance(), 461.0);
}

#[test]
fn the_preset_of_grpc_uses_the_upper_half() {
    let budget = RetryBudget::grpc(10, 0.5);
    let spent = std::iter::from_fn(|| budget.withdraw().map(|retry| retry.spend())).count();
    assert_eq!(
        (spent, budget.balance()),
        (4, 5.0),
        "a retry requires more than half of the tokens"
    );
    assert!(budget.withdraw().is_none());
    assert_eq!(
        (budget.balance(), budget.denied()),
        (4.0, 2),
        "a failure without a retry is charged, too"
    );
    (0..9).for_each(|_| drop(budget.withdraw()));
    assert_eq!(budget.balance(), 0.0);
    (0..99).for_each(|_| budget.deposit());
    assert_eq!(budget.balance(), 10.0);
    for thousandths in 1..=1000 {
        let ratio = f64::from(thousandths) / 1000.0;
        let budget = RetryBudget::grpc(1, ratio);
        drop(budget.withdraw());
        budget.deposit();
        assert_eq!(budget.balance(), ratio);
    }
}

/// gRFC A6: the budget is charged for retryable failures and for a pushback that forbids a retry. It is not charged for
/// other responses and for requests that no server has received.
#[tokio::test(start_paused = true)]
async fn the_preset_of_grpc_withdraws_for_failures_and_not_for_retries() {
    let balance_after = async |answer: fn(u32) -> Answer, request| {
        let budget = RetryBudget::grpc(100, 0.5);
        let layer = RetryLayer::grpc().preset(RetryPreset::Grpc).budget(budget.clone());
        let _ = send(&layer.layer(Inner::new(answer)), request).await;
        budget.balance()
    };
    let fails = |_| Ok(status(503));
    assert_eq!(balance_after(fails, get()).await, 96.0, "the last failure is charged, too");
    assert_eq!(
        balance_after(fails, post(ScriptBody::empty())).await,
        99.0,
        "a failure is charged although a retry is unsafe"
    );
    let never = |_| Ok(with_headers(503, &[("grpc-retry-pushback-ms", "-1")]));
    assert_eq!(balance_after(never, get()).await, 99.0);
    assert_eq!(balance_after(|_| Ok(status(500)), get()).await, 100.0);
    let once = |n| Ok(status(if n == 1 { 503 } else { 200 }));
    assert_eq!(balance_after(once, get()).await, 99.5);
    let rejected = |_| Err(Rejected::new(RejectedKind::Full).into());
    assert_eq!(balance_after(rejected, get()).await, 100.0);
}

// ===== Through the layer =====

fn failure() -> impl Strategy<Value = u8> {
    0..7u8
}

fn fail(how: u8) -> Answer {
    use std::io::ErrorKind as K;
    match how {
        0 => Ok(status(503)),
        1 => Ok(status(429)),
        2 => Err(io(K::ConnectionRefused)),
        3 => Err(io(K::ConnectionReset)),
        4 => Err(io(K::TimedOut)),
        5 => Ok(with_headers(503, &[("retry-after", "1")])),
        _ => Ok(status(200)),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    /// With any failures and settings, there are at most `1 + ratio` attempts per request, plus the reserve.
    #[test]
    fn attempts_never_exceed_the_ratio_and_the_reserve(
        failures in prop::collection::vec(failure(), 1..200),
        requests in 1..100u32,
        percent in 1..=100u32,
        reserve in 1..20u32,
        attempts in 1..8u32,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let budget = RetryBudget::with(f64::from(percent) / 100.0, 0, reserve);
            (0..10_000).for_each(|_| budget.deposit());
            let layer = RetryLayer::http().attempts(attempts).budget(budget).retry_if(|_| None);
            let inner: Inner = Inner::new(move |n| fail(failures[n as usize % failures.len()]));
            let log = inner.log.clone();
            let service = layer.layer(inner);
            for _ in 0..requests {
                let _ = send(&service, get()).await;
            }
            let most = requests + requests * percent / 100 + reserve + 1;
            prop_assert!(log.calls() <= most, "{} of {most}", log.calls());
            Ok(())
        })?;
    }
}
