//! Attempts of a hedge that end by connection housekeeping.

use std::time::Duration;

use buttress::{HedgeLayer, Outcome, RetryBudget, classify::Classify, outcome::Reason};
use tokio::time::{Instant, sleep};
use tower::{Layer, Service, ServiceExt, service_fn};

/// The duration of an attempt in milliseconds, and its outcome.
type Attempt = (u64, Outcome);

type Classifier = fn(Result<&Attempt, &Attempt>) -> Outcome;

const DELAY: Duration = Duration::from_millis(10);

const ALL: [Reason; 5] = [
    Reason::NeverSent,
    Reason::RefusedStream,
    Reason::GoAway,
    Reason::StaleConnection,
    Reason::Reset,
];

fn classified(layer: HedgeLayer) -> HedgeLayer<Classify<Classifier>> {
    fn classify(result: Result<&Attempt, &Attempt>) -> Outcome {
        result.unwrap_or_else(|attempt| attempt).1
    }
    layer.classify(classify as Classifier)
}

/// A request holds the results of its first attempt and of its hedge attempt. The service distinguishes the two by
/// time.
fn service(
    layer: &HedgeLayer<Classify<Classifier>>,
) -> impl Service<[Attempt; 2], Response = Attempt, Error = Attempt> + Clone {
    let start = Instant::now();
    layer.layer(service_fn(move |[first, hedge]: [Attempt; 2]| async move {
        let attempt = if start.elapsed() < DELAY { first } else { hedge };
        sleep(Duration::from_millis(attempt.0)).await;
        if attempt.1.is_success() { Ok(attempt) } else { Err(attempt) }
    }))
}

#[tokio::test(start_paused = true)]
async fn the_other_attempt_decides() {
    let layer = || classified(HedgeLayer::http(DELAY).without_budget());
    for reason in ALL {
        let (good, bad) = (Outcome::success(), Outcome::cancelled().because(reason));
        for attempts in [
            // The first attempt ends by housekeeping while the hedge attempt is in flight.
            [(20, bad), (20, good)],
            // The hedge attempt ends by housekeeping while the first attempt is in flight.
            [(50, good), (20, bad)],
        ] {
            let result = service(&layer()).oneshot(attempts).await;
            assert!(result.is_ok_and(|attempt| attempt.1 == good), "{reason}");
        }
        // Without a hedge attempt in flight, the call ends by housekeeping.
        let result = service(&layer()).oneshot([(5, bad), (0, good)]).await;
        assert_eq!(result, Err((5, bad)), "hedging is not retrying");
    }
}

#[tokio::test(start_paused = true)]
async fn housekeeping_makes_no_deposit() {
    for reason in ALL {
        let budget = RetryBudget::aws();
        budget.withdraw().unwrap().spend();
        let layer = classified(HedgeLayer::http(DELAY).budget(budget.clone()));
        let before = budget.balance();
        let attempts = [(5, Outcome::cancelled().because(reason)), (0, Outcome::success())];
        service(&layer).oneshot(attempts).await.unwrap_err();
        assert_eq!(budget.balance(), before, "{reason}");
    }
}

#[tokio::test(start_paused = true)]
async fn housekeeping_is_not_a_latency_sample() {
    for reason in ALL {
        let layer = classified(HedgeLayer::after_percentile(0.9).without_budget());
        let handle = layer.handle();
        for outcome in [Outcome::cancelled().because(reason), Outcome::success()] {
            for _ in 0..40 {
                let _ = service(&layer).oneshot([(5, outcome); 2]).await;
            }
            let sent = handle.snapshot().sent;
            let _ = service(&layer).oneshot([(1000, Outcome::success()); 2]).await;
            // The layer records the latency of successful calls only, and sends no hedge attempt without samples.
            let hedged = handle.snapshot().sent > sent;
            assert_eq!(hedged, outcome.is_success(), "{reason} {outcome:?}");
        }
    }
}
