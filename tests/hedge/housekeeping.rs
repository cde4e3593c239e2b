//! A copy that ends by connection housekeeping.

use std::time::Duration;

use buttress::{HedgeLayer, Outcome, RetryBudget, call::Classify, call::Reason};
use tokio::time::{Instant, sleep};
use tower::{Layer, Service, ServiceExt, service_fn};

/// How long a copy takes, and how it ends.
type Copy = (u64, Outcome);

type Judge = fn(Result<&Copy, &Copy>) -> Outcome;

const DELAY: Duration = Duration::from_millis(10);

const ALL: [Reason; 5] = [
    Reason::NeverSent,
    Reason::RefusedStream,
    Reason::GoAway,
    Reason::StaleConnection,
    Reason::Reset,
];

fn classified(layer: HedgeLayer) -> HedgeLayer<Classify<Judge>> {
    fn judge(result: Result<&Copy, &Copy>) -> Outcome {
        result.unwrap_or_else(|copy| copy).1
    }
    layer.classify(judge as Judge)
}

/// A request is what becomes of its first copy and of its hedge, which are told apart by when they are made.
fn service(
    layer: &HedgeLayer<Classify<Judge>>,
) -> impl Service<[Copy; 2], Response = Copy, Error = Copy> + Clone {
    let start = Instant::now();
    layer.layer(service_fn(move |[first, hedge]: [Copy; 2]| async move {
        let copy = if start.elapsed() < DELAY { first } else { hedge };
        sleep(Duration::from_millis(copy.0)).await;
        if copy.1.is_success() { Ok(copy) } else { Err(copy) }
    }))
}

#[tokio::test(start_paused = true)]
async fn the_other_copy_decides() {
    let layer = || classified(HedgeLayer::http(DELAY).without_budget());
    for reason in ALL {
        let (good, bad) = (Outcome::success(), Outcome::cancelled().because(reason));
        for copies in [
            // The first copy ends so while the hedge is under way.
            [(20, bad), (20, good)],
            // The hedge does, while the first copy is under way.
            [(50, good), (20, bad)],
        ] {
            let result = service(&layer()).oneshot(copies).await;
            assert!(result.is_ok_and(|copy| copy.1 == good), "{reason}");
        }
        // Alone, it is what the call ends with.
        let result = service(&layer()).oneshot([(5, bad), (0, good)]).await;
        assert_eq!(result, Err((5, bad)), "hedging is not retrying");
    }
}

#[tokio::test(start_paused = true)]
async fn it_makes_no_deposit() {
    for reason in ALL {
        let budget = RetryBudget::aws();
        budget.withdraw().unwrap().spend();
        let layer = classified(HedgeLayer::http(DELAY).budget(budget.clone()));
        let before = budget.balance();
        let copies = [(5, Outcome::cancelled().because(reason)), (0, Outcome::success())];
        service(&layer).oneshot(copies).await.unwrap_err();
        assert_eq!(budget.balance(), before, "{reason}");
    }
}

#[cfg(feature = "percentile")]
#[tokio::test(start_paused = true)]
async fn it_is_no_sample_of_the_latency() {
    for reason in ALL {
        let layer = classified(HedgeLayer::after_percentile(0.9).without_budget());
        let handle = layer.handle();
        for outcome in [Outcome::cancelled().because(reason), Outcome::success()] {
            for _ in 0..40 {
                let _ = service(&layer).oneshot([(5, outcome); 2]).await;
            }
            let sent = handle.snapshot().sent;
            let _ = service(&layer).oneshot([(1000, Outcome::success()); 2]).await;
            // Only good calls are known, and they make it possible to hedge.
            let hedged = handle.snapshot().sent > sent;
            assert_eq!(hedged, outcome.is_success(), "{reason} {outcome:?}");
        }
    }
}
