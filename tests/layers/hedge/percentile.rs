//! The delay of a hedge, derived from the latencies of calls.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress::{HedgeLayer, Outcome, classify::Classify};
use tokio::time::{Instant, advance, sleep};
use tower::{Layer, Service, ServiceExt, service_fn};

type Judge = fn(Result<&(), &()>) -> Outcome;

fn layer(share: f64) -> HedgeLayer<Classify<Judge>> {
    fn judge(result: Result<&(), &()>) -> Outcome {
        result.map_or(Outcome::failure(), |()| Outcome::success())
    }
    HedgeLayer::after_percentile(share).without_budget().classify(judge as Judge)
}

async fn takes<S: Service<u64, Error = ()> + Clone>(service: &S, ms: u64) -> Duration {
    let start = Instant::now();
    assert!(service.clone().oneshot(ms).await.is_ok());
    start.elapsed()
}

#[tokio::test(start_paused = true)]
async fn the_delay_is_the_percentile_of_recent_latencies() {
    let calls = Arc::new(AtomicU64::new(0));
    let count = calls.clone();
    let layer = layer(0.9);
    let handle = layer.handle();
    let service = layer.layer(service_fn(move |ms: u64| {
        count.fetch_add(1, SeqCst);
        async move {
            sleep(Duration::from_millis(ms)).await;
            Ok::<(), ()>(())
        }
    }));
    // Without enough samples no call is hedged, whatever its duration.
    for _ in 0..19 {
        takes(&service, 1000).await;
    }
    assert_eq!(handle.snapshot().sent, 0);
    // Samples expire after a minute.
    advance(Duration::from_secs(61)).await;
    for n in 0..200 {
        takes(&service, 10 + n % 10).await;
    }
    let before = handle.snapshot().sent;
    assert!(before <= 200 / 8, "{before} of 200 calls were hedged, not about one in ten");
    takes(&service, 500).await;
    assert_eq!(handle.snapshot().sent, before + 1, "a slow call is hedged");
    takes(&service, 12).await;
    assert_eq!(handle.snapshot().sent, before + 1);
    // When latencies rise, the delay follows, and typical calls are not hedged.
    for _ in 0..40 {
        advance(Duration::from_secs(2)).await;
        takes(&service, 100).await;
    }
    let then = handle.snapshot().sent;
    for _ in 0..40 {
        takes(&service, 95).await;
    }
    assert_eq!(handle.snapshot().sent, then, "a typical call is not hedged");
    assert_eq!(calls.load(SeqCst), 19 + 200 + 2 + 80 + then);
}

#[test]
fn an_invalid_share_is_a_typed_error() {
    for share in [0.0, 1.0, -0.5, f64::NAN, 95.0] {
        let error = HedgeLayer::after_percentile(share).checked().unwrap_err();
        assert_eq!(error.field, "after_percentile", "{share}");
    }
}
