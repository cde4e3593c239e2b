//! The effect of a hedge on a heavy tail, and its cost.

use std::{
    cell::{Cell, RefCell},
    convert::Infallible,
    time::Duration,
};

use buttress::{HedgeLayer, retry::ReplayBody};
use bytes::Bytes;
use futures_util::future::join_all;
use http::{Request, Response};
use http_body_util::Empty;
use tokio::time::{Instant, sleep};
use tower::{Layer, ServiceExt, service_fn};

use super::latency_distribution::latency;

const FAN_OUT: u64 = 100;
const QUERIES: usize = 3000;

/// Returns the 99.9th percentile of the time of queries with [`FAN_OUT`] calls each, and the attempts per call.
async fn slowest(hedge_after: Duration) -> (Duration, f64) {
    let (random, calls) = (RefCell::new(fastrand::Rng::with_seed(2)), Cell::new(0));
    let upstream = service_fn(|_: Request<ReplayBody<Empty<Bytes>>>| async {
        calls.set(calls.get() + 1u64);
        // Never 0, whose latency is infinite.
        let random = 1.0 - random.borrow_mut().f64();
        sleep(Duration::from_secs_f64(latency(random) / 1000.0)).await;
        Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
    });
    let service = HedgeLayer::http(hedge_after).layer(upstream);
    let mut took = Vec::with_capacity(QUERIES);
    for _ in 0..QUERIES {
        let start = Instant::now();
        let call = |_| service.clone().oneshot(Request::new(Empty::new()));
        let answers = join_all((0..FAN_OUT).map(call)).await;
        assert!(answers.iter().all(Result::is_ok));
        took.push(start.elapsed());
    }
    took.sort();
    let asked = FAN_OUT * QUERIES as u64;
    (took[QUERIES - QUERIES / 1000], calls.get() as f64 / asked as f64)
}

#[tokio::test(start_paused = true)]
async fn hedge_makes_the_slowest_of_a_thousand_ten_times_faster_for_3_percent_more() {
    let (without, one) = slowest(Duration::MAX).await;
    let (with, load) = slowest(Duration::from_millis(10)).await;
    println!(
        "p99.9 of {FAN_OUT} calls: {without:?} without, {with:?} with a hedge, {load:.4} times the load"
    );
    assert!((one - 1.0).abs() < f64::EPSILON, "an infinite delay hedges no call");
    assert!(without >= 10 * with, "{without:?} without, {with:?} with");
    assert!(load > 1.0 && load <= 1.03, "{load} times the load");
}
