//! The effects of many clients with a retry layer: herds, amplification, and the share of calls that succeed.

use std::{
    cell::{Cell, RefCell},
    convert::Infallible,
    fmt::Debug,
    time::Duration,
};

use buttress::{
    RetryLayer,
    retry::{Backoff, ReplayBody, RetryBudget},
};
use bytes::Bytes;
use futures_util::future::join_all;
use http::{Request, Response};
use http_body_util::Empty;
use tokio::time::{Instant, sleep};
use tower::{Layer, Service, ServiceExt, service_fn};

type Body = Empty<Bytes>;

fn answer(status: u16) -> Response<Body> {
    Response::builder().status(status).body(Empty::new()).unwrap()
}

/// Returns the status of the final response.
async fn get<S, B>(service: &S) -> u16
where
    S: Service<Request<Body>, Response = Response<B>, Error: Debug> + Clone,
{
    service.clone().oneshot(Request::new(Empty::new())).await.unwrap().status().as_u16()
}

// ===== Herds =====

/// Sends the hint to all clients at the same time. Returns the maximum number of clients that return within 100 ms.
async fn peak(clients: usize, hint: u64, jitter: f64) -> usize {
    fastrand::seed(7);
    let (arrivals, start) = (RefCell::new(Vec::new()), Instant::now());
    let client = async |_| {
        let told = Cell::new(false);
        let upstream = service_fn(|_: Request<ReplayBody<Body>>| async {
            if told.replace(true) {
                arrivals.borrow_mut().push(start.elapsed());
                return Ok::<_, Infallible>(answer(200));
            }
            let mut response = answer(503);
            response.headers_mut().insert("retry-after", hint.into());
            Ok(response)
        });
        // Each client has a layer of its own.
        assert_eq!(get(&RetryLayer::http().hint_jitter(jitter).layer(upstream)).await, 200);
    };
    join_all((0..clients).map(client)).await;
    let mut arrivals = arrivals.into_inner();
    arrivals.sort();
    assert_eq!(arrivals.len(), clients);
    assert!(arrivals[0] >= Duration::from_secs(hint), "a client returns before the hint");
    let within = |at: Duration| arrivals.partition_point(|other| *other < at);
    let window = Duration::from_millis(100);
    arrivals.iter().map(|&at| within(at + window) - within(at)).max().unwrap()
}

/// The share of the clients that returns within 100 ms is at most 100 ms divided by the jitter, plus noise.
#[tokio::test(start_paused = true)]
async fn clients_with_the_same_hint_return_spread_over_the_jitter() {
    const CLIENTS: usize = 10_000;
    for (jitter, hint) in [(0.5, 1), (0.5, 10), (0.5, 30), (5.0, 1), (5.0, 2), (5.0, 10)] {
        let share = peak(CLIENTS, hint, jitter).await as f64 / CLIENTS as f64;
        println!("hint {hint} s, jitter {jitter}: {:.2} % within 100 ms", 100.0 * share);
        let expected = 0.1 / (hint as f64 * jitter);
        assert!(share <= expected * 1.2 + 0.004, "hint {hint} s, jitter {jitter}: {share}");
    }
}

// ===== Amplification =====

struct Load {
    calls: u32,
    attempts: u32,
    succeeded: u32,
    seconds: f64,
}

/// Makes 10,000 calls, 1000 per second, to an upstream in which this share of the attempts fails.
async fn load(failing: f64, layer: RetryLayer) -> Load {
    const CALLS: u32 = 10_000;
    fastrand::seed(7);
    let attempts = Cell::new(0);
    let upstream = service_fn(|_: Request<ReplayBody<Body>>| async {
        attempts.set(attempts.get() + 1);
        Ok::<_, Infallible>(answer(if fastrand::f64() < failing { 503 } else { 200 }))
    });
    let service = layer.layer(upstream);
    let (start, succeeded) = (Instant::now(), Cell::new(0));
    let call = async |n| {
        sleep(Duration::from_millis(n)).await;
        let status = get(&service).await;
        succeeded.set(succeeded.get() + u32::from(status == 200));
    };
    join_all((0..u64::from(CALLS)).map(call)).await;
    let seconds = start.elapsed().as_secs_f64();
    Load { calls: CALLS, attempts: attempts.get(), succeeded: succeeded.get(), seconds }
}

#[tokio::test(start_paused = true)]
async fn retry_adds_a_tenth_or_less_to_an_outage_with_a_budget_of_a_tenth() {
    let Load { calls, attempts, succeeded, .. } =
        load(1.0, RetryLayer::http().budget(RetryBudget::with(0.1, 0, 100))).await;
    println!("all failing: {:.4} attempts a call", f64::from(attempts) / f64::from(calls));
    assert!(attempts * 10 <= calls * 11, "{attempts} attempts for {calls} calls");
    // The budget bounds the attempts, and it is used up.
    assert!(attempts * 100 >= calls * 109, "{attempts} attempts for {calls} calls");
    assert_eq!(succeeded, 0);
}

#[tokio::test(start_paused = true)]
async fn retry_adds_no_more_than_its_budget_and_its_reserve() {
    for (ratio, failing) in [(0.1, 1.0), (0.1, 0.6), (0.1, 0.2), (0.2, 1.0), (0.2, 0.5)] {
        let Load { calls, attempts, seconds, .. } =
            load(failing, RetryLayer::http().budget(RetryBudget::ratio(ratio))).await;
        // The initial balance of 10, and one per second.
        let most = f64::from(calls) * (1.0 + ratio) + 10.0 + seconds;
        assert!(f64::from(attempts) <= most, "{failing}: {attempts} attempts, at most {most}");
        let unbounded = load(failing, RetryLayer::http().without_budget()).await.attempts;
        assert!(unbounded >= attempts, "{failing}: {unbounded} without a budget");
    }
}

#[tokio::test(start_paused = true)]
async fn retry_makes_98_of_100_calls_succeed_when_10_of_100_attempts_fail() {
    for (name, layer) in [
        ("20 %, as it comes", RetryLayer::http()),
        ("10 %, no reserve", RetryLayer::http().budget(RetryBudget::with(0.1, 0, 100))),
    ] {
        let Load { calls, attempts, succeeded, .. } = load(0.1, layer).await;
        let (success, load) =
            (f64::from(succeeded) / f64::from(calls), f64::from(attempts) / f64::from(calls));
        println!("10 % failing, budget of {name}: {success:.4} succeed, {load:.4} attempts a call");
        assert!(success >= 0.98, "{name}: {success}");
        assert!(load <= 1.12, "{name}: {load}");
    }
    let without = load(0.1, RetryLayer::http().attempts(1)).await;
    assert!(without.succeeded * 100 < without.calls * 92, "fewer calls succeed without retries");
}

/// The random delays spread the retries of calls that failed at the same time.
#[tokio::test(start_paused = true)]
async fn retry_spreads_calls_that_failed_together() {
    fastrand::seed(7);
    let (start, arrivals) = (Instant::now(), RefCell::new(Vec::new()));
    let client = async |_| {
        let upstream = service_fn(|_: Request<ReplayBody<Body>>| async {
            arrivals.borrow_mut().push(start.elapsed().as_millis());
            Ok::<_, Infallible>(answer(503))
        });
        let layer = RetryLayer::http()
            .attempts(2)
            .backoff(Backoff::exponential(Duration::from_secs(1)).max(Duration::from_secs(1)));
        get(&layer.layer(upstream)).await;
    };
    join_all((0..10_000).map(client)).await;
    let arrivals = arrivals.into_inner();
    let again = |from| arrivals[10_000..].iter().filter(|at| **at / 100 == from).count();
    for tenth in 0..10 {
        let n = again(tenth);
        assert!((850..1150).contains(&n), "{n} in the tenth of a second number {tenth}");
    }
}
