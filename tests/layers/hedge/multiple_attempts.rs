//! Several hedge attempts of one call, against a model.

use std::sync::{Arc, Mutex};

use buttress::{
    Attempts, BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, HedgeLayer, Outcome, Rejected,
    RetryBudget, RetryLayer,
    classify::Classify,
    hedge::{HedgeAttempt, Hedged},
    outcome::RejectedKind,
    retry::ReplayBody,
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{Empty, Full};
use proptest::prelude::*;
use tokio::time::{Instant, sleep};
use tower::{Layer, Service, ServiceBuilder, ServiceExt, service_fn};

use crate::support::ms;

// ===== Against a model =====

/// The duration of an attempt in milliseconds, and whether its response is good.
type Attempt = (u64, bool);

/// The result of a call: the number of the attempt (0 is the first one), the time of its response, whether it is good,
/// and the times at which hedge attempts were sent.
#[derive(Debug, PartialEq)]
struct CallResult {
    attempt: usize,
    at: u64,
    good: bool,
    sent_at: Vec<u64>,
}

/// Lists the events of a call in the order of their times.
fn model(attempts: &[Attempt], delay: u64, max_hedges: usize, budget: usize) -> CallResult {
    let mut in_flight = vec![(attempts[0].0, 0)];
    let (mut sent_at, mut next) = (Vec::new(), Some(delay));
    if max_hedges == 0 || budget == 0 {
        next = None;
    }
    loop {
        in_flight.sort_unstable();
        let (at, attempt) = in_flight[0];
        // A response precedes a hedge attempt that is due at the same time.
        if let Some(due) = next.filter(|due| *due < at) {
            sent_at.push(due);
            let number = sent_at.len();
            in_flight.push((due + attempts[number].0, number));
            next = (number < max_hedges.min(budget)).then_some(due + delay);
            continue;
        }
        let good = attempts[attempt].1;
        if good || in_flight.len() == 1 {
            return CallResult { attempt, at, good, sent_at };
        }
        in_flight.remove(0);
        next = None;
    }
}

#[derive(Clone, Debug)]
struct Request0(Arc<Mutex<Vec<u64>>>);

struct InFlight(Arc<Mutex<i32>>);

impl Drop for InFlight {
    fn drop(&mut self) {
        *self.0.lock().unwrap() -= 1;
    }
}

type Classifier = fn(Result<&(usize, bool), &()>) -> Outcome;

fn classified(layer: HedgeLayer) -> HedgeLayer<Classify<Classifier>> {
    fn classify(result: Result<&(usize, bool), &()>) -> Outcome {
        if result.is_ok_and(|response| response.1) {
            Outcome::success()
        } else {
            Outcome::failure()
        }
    }
    layer.classify(classify as Classifier)
}

async fn run(
    attempts: Vec<Attempt>,
    delay: u64,
    max_hedges: u32,
    budget: Option<RetryBudget>,
) -> CallResult {
    let layer = HedgeLayer::http(ms(delay)).max_hedges(max_hedges);
    let layer = match budget {
        Some(budget) => layer.budget(budget),
        None => layer.without_budget(),
    };
    let layer = classified(layer);
    let handle = layer.handle();
    let (in_flight, start) = (Arc::new(Mutex::new(0)), Instant::now());
    let counted = in_flight.clone();
    let upstream = service_fn(move |Request0(sent): Request0| {
        let number = {
            let mut sent = sent.lock().unwrap();
            sent.push(start.elapsed().as_millis() as u64);
            sent.len() - 1
        };
        *counted.lock().unwrap() += 1;
        let guard = InFlight(counted.clone());
        let (time, good) = attempts[number];
        async move {
            let _guard = guard;
            if time > 0 {
                sleep(ms(time)).await;
            }
            Ok::<_, ()>((number, good))
        }
    });
    let sent = Arc::new(Mutex::new(Vec::new()));
    let (attempt, good) = layer.layer(upstream).oneshot(Request0(sent.clone())).await.unwrap();
    let at = start.elapsed().as_millis() as u64;
    assert_eq!(*in_flight.lock().unwrap(), 0, "the other attempts are dropped");
    let sent_at = sent.lock().unwrap()[1..].to_vec();
    let snapshot = handle.snapshot();
    assert_eq!(snapshot.sent, sent_at.len() as u64);
    assert_eq!(snapshot.won, u64::from(attempt > 0));
    CallResult { attempt, at, good, sent_at }
}

fn paused<T>(future: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_time().start_paused(true).build().unwrap().block_on(future)
}

proptest! {
    #[test]
    fn several_hedge_attempts_match_the_model(
        attempts in prop::collection::vec((0u64..60, prop::bool::weighted(0.6)), 11),
        delay in 1u64..20,
        max_hedges in 1u32..=10,
    ) {
        let expected = model(&attempts, delay, max_hedges as usize, usize::MAX);
        prop_assert_eq!(paused(run(attempts, delay, max_hedges, None)), expected);
    }
}

#[test]
fn budget_bounds_the_hedges_of_a_call() {
    for allowed in 0..6 {
        let attempts = vec![(100, true); 11];
        let expected = model(&attempts, 10, 4, allowed as usize);
        let result = paused(async {
            // The call deposits a millionth of a hedge attempt.
            let budget = RetryBudget::with(1e-6, 10, 10);
            (allowed..10).for_each(|_| budget.withdraw().unwrap().spend());
            // While hedge attempts are due, the reserve gains less than one of them.
            run(attempts, 10, 4, Some(budget)).await
        });
        assert_eq!(result, expected, "{allowed}");
    }
}

// ===== HTTP, in a stack =====

/// Records the number of each hedge attempt and its `grpc-previous-rpc-attempts`.
type Numbers = Arc<Mutex<Vec<(u32, u32)>>>;

fn slow_upstream(
    numbers: &Numbers,
) -> impl Service<
    Request<ReplayBody<Full<Bytes>>>,
    Response = Response<Full<Bytes>>,
    Error = BoxError,
    Future: Send,
> + Clone
+ Send
+ use<> {
    let numbers = numbers.clone();
    service_fn(move |request: Request<ReplayBody<Full<Bytes>>>| {
        let number = request.extensions().get().map_or(0, |hedge: &HedgeAttempt| hedge.0);
        let previous = request.headers().get("grpc-previous-rpc-attempts");
        let previous = previous.map_or(0, |value| value.to_str().unwrap().parse().unwrap());
        numbers.lock().unwrap().push((number, previous));
        async move {
            // Reads the body as a transport does, so that it can be replayed.
            http_body_util::BodyExt::collect(request.into_body()).await.map_err(drop).unwrap();
            sleep(ms(1000 / u64::from(number + 1))).await;
            Ok(Response::builder().header("grpc-status", "0").body(Full::default())?)
        }
    })
}

#[tokio::test(start_paused = true)]
async fn each_hedge_attempt_carries_its_number_and_the_body() {
    for (content_type, previous) in [("application/grpc", [0, 1, 2, 3]), ("text/plain", [0; 4])] {
        let numbers = Numbers::default();
        let layer = HedgeLayer::http(ms(10)).max_hedges(3).assume_idempotent();
        let request = Request::post("/").header("content-type", content_type);
        let request = request.body(Full::from("ping")).unwrap();
        let start = Instant::now();
        let response = layer.layer(slow_upstream(&numbers)).oneshot(request).await.unwrap();
        let expected: Vec<_> = (0..).zip(previous).collect();
        assert_eq!(*numbers.lock().unwrap(), expected, "{content_type}");
        let hedged = Hedged::of(&response).unwrap();
        assert_eq!((hedged.won, hedged.sent, start.elapsed()), (true, 3, ms(280)));
    }
}

/// The limit rejects the third attempt, which ends the hedging. Each attempt passes the breaker.
#[tokio::test(start_paused = true)]
async fn hedge_attempts_respect_the_inner_limit() {
    let numbers = Numbers::default();
    let hedge = HedgeLayer::http(ms(10)).max_hedges(10);
    let (breaker, limit) = (CircuitBreakerLayer::http(), ConcurrencyLimitLayer::new(2));
    let (handle, limited) = (hedge.handle(), limit.handle());
    let service = ServiceBuilder::new()
        .layer(hedge)
        .layer(breaker.clone())
        .layer(limit)
        .service(slow_upstream(&numbers));
    let request = Request::new(Full::default());
    let response = service.oneshot(request).await.unwrap();
    assert_eq!(Hedged::of(&response).map(|hedged| (hedged.won, hedged.sent)), Some((true, 2)));
    assert_eq!((numbers.lock().unwrap().len(), handle.snapshot().sent), (2, 2));
    assert_eq!((limited.snapshot().in_flight, breaker.handle().snapshot().opened), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn retry_over_several_hedges_counts_one_attempt() {
    let numbers = Numbers::default();
    let upstream = slow_upstream(&numbers);
    let service = ServiceBuilder::new()
        .layer(RetryLayer::http())
        .map_request(|request: Request<ReplayBody<Empty<Bytes>>>| request.map(|_| Full::default()))
        .layer(HedgeLayer::http(ms(10)).max_hedges(2))
        .service(upstream);
    let response = service.oneshot(Request::new(Empty::<Bytes>::new())).await.unwrap();
    assert_eq!(Attempts::of(&response).made, 1);
    assert_eq!(numbers.lock().unwrap().len(), 3);
}

/// The first attempt fails, which opens the circuit. The hedge attempt waits for a permit, and the circuit rejects it.
#[tokio::test(start_paused = true)]
async fn rejected_hedge_attempt_does_not_hide_that_the_first_attempt_was_sent() {
    for responds in [false, true] {
        let upstream =
            service_fn(move |request: Request<ReplayBody<ReplayBody<Empty<Bytes>>>>| async move {
                let is_hedge = request.extensions().get::<HedgeAttempt>().is_some();
                sleep(ms(if is_hedge { 200 } else { 100 })).await;
                let rejected = Rejected::new(RejectedKind::Open);
                let unavailable = Response::builder().status(503).body(Empty::<Bytes>::new());
                match (is_hedge, responds) {
                    (false, _) => Ok(unavailable?),
                    (true, false) => Err::<_, BoxError>(rejected.into()),
                    (true, true) => {
                        let mut response = unavailable?;
                        response.extensions_mut().insert(rejected);
                        Ok(response)
                    }
                }
            });
        let hedge = HedgeLayer::http(ms(10)).without_budget();
        let service = RetryLayer::http().layer(hedge.layer(upstream));
        let result = service.oneshot(Request::new(Empty::new())).await;
        let attempts = match &result {
            Ok(response) => Attempts::of(response),
            Err(error) => Attempts::find(&**error).unwrap(),
        };
        assert_eq!((attempts.made, attempts.sent), (1, 1));
        if let Err(error) = result {
            assert_eq!(Rejected::find(&*error).map(Rejected::kind), Some(RejectedKind::Open));
            assert_eq!(error.to_string(), "gave up after 1 attempt (rejected): circuit is open");
        }
    }
}

#[test]
fn number_of_hedges_beyond_the_bounds_is_an_error() {
    for hedges in [0, 11, u32::MAX] {
        let error = HedgeLayer::http(ms(10)).max_hedges(hedges).checked().unwrap_err();
        assert_eq!((error.field, error.value), ("max_hedges", hedges.to_string()));
    }
    assert!(HedgeLayer::http(ms(10)).max_hedges(10).checked().is_ok());
}
