//! Failures that were measured with other libraries and do not occur here: the rows of the table in the README that
//! need no server.

use std::{
    future::{Ready, ready},
    sync::Arc,
    time::Duration,
};

use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Outcome, Trip, breaker::CircuitState,
    outcome::RejectedKind,
};
use futures_util::FutureExt;
use tokio::{
    sync::Barrier,
    task::JoinSet,
    time::{Instant, advance, timeout},
};
use tokio_test::{assert_pending, assert_ready_ok, task};
use tower::{Layer, Service, ServiceExt, load_shed::LoadShed, service_fn};
use tower_test::mock::Spawn;

use crate::support::{Oops, Strict, Then, empty, refused_as, request};

/// Much longer than any of these tests, so that a hang becomes a failure.
const HANGS: Duration = Duration::from_secs(60);

// ===== Half-open =====

#[tokio::test(flavor = "multi_thread", worker_threads = 8)]
async fn a_thousand_callers_in_half_open_are_no_more_than_its_probes() {
    const CALLERS: usize = 1000;
    for probes in [1, 2] {
        // The open time ends at once.
        let layer = CircuitBreakerLayer::new(Trip::consecutive(1))
            .open_for(Duration::from_nanos(1))
            .half_open(probes);
        let (inner, watch) = Strict::holding();
        let (service, handle) = (layer.layer(inner), layer.handle());
        watch.script([Then::Fail(Oops("trips it"))]);
        service.clone().oneshot(request()).await.unwrap_err();

        let start = Arc::new(Barrier::new(CALLERS));
        let mut callers = JoinSet::new();
        for _ in 0..CALLERS {
            let (service, start) = (service.clone(), start.clone());
            callers.spawn(async move {
                start.wait().await;
                service.oneshot(request()).await.map(drop)
            });
        }
        for _ in usize::from(probes)..CALLERS {
            let refused = timeout(HANGS, callers.join_next()).await.expect("hangs");
            refused_as(refused.unwrap().unwrap());
        }
        assert_eq!(watch.seen().calls, 1 + usize::from(probes));
        assert_eq!(watch.seen().peak, usize::from(probes));
        drop(callers);
        timeout(HANGS, async {
            while handle.snapshot().probes > 0 {
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("a cancelled probe kept its slot");
    }
}

#[tokio::test(start_paused = true)]
async fn probe_cancelled_by_its_caller_releases_its_slot() {
    let wait = Duration::from_secs(30);
    let layer = CircuitBreakerLayer::new(Trip::consecutive(1)).open_for(wait);
    let (inner, watch) = Strict::holding();
    let (service, handle) = (layer.layer(inner), layer.handle());
    watch.script([Then::Fail(Oops("trips it"))]);
    service.clone().oneshot(request()).await.unwrap_err();
    advance(wait).await;
    let probe = timeout(Duration::from_millis(500), service.clone().oneshot(request())).await;
    assert!(probe.is_err(), "the timeout of the caller has expired");
    watch.script([Then::Answer(empty())]);
    service.clone().oneshot(request()).await.expect("the next call is the probe");
    assert_eq!(handle.state(), CircuitState::Closed);
}

// ===== Windows =====

type Answer = Result<(), Oops>;

/// A service that responds with its request.
fn echo() -> impl Service<Answer, Response = (), Error = Oops, Future = Ready<Answer>> + Clone {
    service_fn(ready)
}

fn judge(result: Result<&(), &Oops>) -> Outcome {
    result.map_or(Outcome::failure(), |()| Outcome::success())
}

fn ask<S: Service<Answer, Error = BoxError>>(service: &mut S, answer: Answer) {
    let answered = async { service.ready().await?.call(answer).await.map(drop) };
    let _ = answered.now_or_never().expect("the service responds at once");
}

#[tokio::test(start_paused = true)]
async fn circuit_opens_as_soon_after_a_million_successes_as_after_none() {
    let window = Duration::from_secs(10);
    let ratio = Trip::failure_ratio(0.5).within(window).min_calls(10);
    for (trip, failures) in [(Trip::consecutive(5), 5), (ratio, 10)] {
        let layer = CircuitBreakerLayer::new(trip).classify(judge);
        let (mut service, handle) = (layer.layer(echo()), layer.handle());
        for _ in 0..1000 {
            for _ in 0..1000 {
                ask(&mut service, Ok(()));
            }
            advance(Duration::from_millis(10)).await;
        }
        // No call for the length of the window.
        advance(window).await;
        for _ in 0..failures {
            assert_eq!(handle.state(), CircuitState::Closed);
            ask(&mut service, Err(Oops("down")));
        }
        assert_eq!(handle.state(), CircuitState::Open);
    }
}

/// Compares the times within one run by their ratio. Other libraries reach a ratio of a hundred and more.
#[tokio::test]
async fn a_time_window_with_100_000_calls_in_it_is_as_cheap_as_an_empty_one() {
    let trip = || Trip::failure_ratio(1.0).within(Duration::from_secs(3600)).min_calls(1);
    let (empty, full) = (
        CircuitBreakerLayer::new(trip()).classify(judge),
        CircuitBreakerLayer::new(trip()).classify(judge),
    );
    let (mut empty_one, mut full_one) = (empty.layer(echo()), full.layer(echo()));
    for _ in 0..100_000 {
        ask(&mut full_one, Ok(()));
    }
    assert_eq!(full.handle().snapshot().seen.window_calls, 100_000);
    let mut quickest = [Duration::MAX; 2];
    for _ in 0..20 {
        empty.handle().reset();
        let began = Instant::now();
        (0..200).for_each(|_| ask(&mut empty_one, Ok(())));
        quickest[0] = quickest[0].min(began.elapsed());
        let began = Instant::now();
        (0..200).for_each(|_| ask(&mut full_one, Ok(())));
        quickest[1] = quickest[1].min(began.elapsed());
    }
    let ratio = quickest[1].as_secs_f64() / quickest[0].as_secs_f64();
    assert!(ratio < 5.0, "{ratio:.1} times the duration: {quickest:?}");
}

/// Calls in a window without failures, and in a window with one failure, in which each call takes the lock.
#[tokio::test]
async fn a_window_of_a_million_is_as_cheap_as_one_of_a_hundred() {
    const MANY: u32 = 1_000_000;
    let hour = Duration::from_secs(3600);
    let over = |calls| Trip::failure_ratio(1.0).over(calls).min_calls(calls);
    let within = || Trip::failure_ratio(1.0).within(hour).min_calls(u32::MAX);
    for (small, large) in [(over(100), over(MANY)), (within(), within())] {
        for failure in [false, true] {
            let layers = [small.clone(), large.clone()]
                .map(|trip| CircuitBreakerLayer::new(trip).classify(judge));
            for (layer, calls) in layers.iter().zip([100, MANY]) {
                let handle = layer.handle();
                (0..calls).for_each(|_| handle.record(Outcome::success()));
                assert_eq!(handle.snapshot().seen.window_calls, u64::from(calls));
                if failure {
                    handle.record(Outcome::failure());
                }
            }
            let mut services = layers.map(|layer| layer.layer(echo()));
            let mut quickest = [Duration::MAX; 2];
            // The services alternate. The calls are too few to push the failure out of the smaller window.
            for _ in 0..if failure { 9 } else { 40 } {
                for (service, quickest) in services.iter_mut().zip(&mut quickest) {
                    let began = Instant::now();
                    (0..if failure { 10 } else { 200 }).for_each(|_| ask(service, Ok(())));
                    *quickest = (*quickest).min(began.elapsed());
                }
            }
            let ratio = quickest[1].as_secs_f64() / quickest[0].as_secs_f64();
            assert!(
                ratio < 5.0,
                "{ratio:.1} times the duration: {small:?}, {failure}, {quickest:?}"
            );
        }
    }
}

// ===== An open circuit =====

/// More worker threads than cores, and no caller hangs.
#[tokio::test(flavor = "multi_thread", worker_threads = 16)]
async fn open_circuit_rejects_many_callers_on_few_cores_at_once() {
    let layer = CircuitBreakerLayer::http();
    let (inner, watch) = Strict::holding();
    let service = layer.layer(inner);
    layer.handle().force_open();
    let mut callers = JoinSet::new();
    for _ in 0..200 {
        let service = service.clone();
        callers.spawn(async move {
            for _ in 0..50 {
                let refused = service.clone().oneshot(request()).await;
                assert_eq!(refused_as(refused), RejectedKind::ForcedOpen);
            }
        });
    }
    timeout(HANGS, callers.join_all()).await.expect("a caller hangs");
    assert_eq!((watch.seen().polls, layer.handle().snapshot().rejected), (0, 10_000));
}

/// No wake-up is lost if the circuit opens at any moment while callers start to wait for a hung service.
#[tokio::test(flavor = "multi_thread", worker_threads = 16)]
async fn a_circuit_that_opens_wakes_all_callers_that_wait_for_a_hung_service() {
    for _ in 0..100 {
        let layer = CircuitBreakerLayer::http();
        let (inner, watch) = Strict::holding();
        watch.set_ready(false);
        let (service, handle) = (layer.layer(inner), layer.handle());
        let mut callers = JoinSet::new();
        for n in 0..16 {
            let (mut service, handle) = (service.clone(), handle.clone());
            callers.spawn(async move {
                if n == 8 {
                    handle.force_open();
                }
                let refused = if n % 2 == 0 {
                    service.oneshot(request()).await
                } else {
                    service.call(request()).await
                };
                assert_eq!(refused_as(refused), RejectedKind::ForcedOpen);
            });
        }
        timeout(HANGS, callers.join_all()).await.expect("a caller hangs");
        assert_eq!(watch.seen().calls, 0);
    }
}

// ===== A limit =====

/// An idle clone that was polled ready holds no permit and no queue entry, and is granted none.
#[tokio::test(start_paused = true)]
async fn idle_clone_never_keeps_a_released_permit() {
    for queue in [0, 8] {
        let layer = ConcurrencyLimitLayer::new(1).queue(queue, Duration::from_secs(5));
        let (inner, watch) = Strict::holding();
        let service = layer.layer(inner);
        let mut under_way = task::spawn(LoadShed::new(service.clone()).oneshot(request()));
        assert_pending!(under_way.poll());
        // Both clones are polled ready before and after the release of the permit, and neither is called.
        let mut idle = [Spawn::new(service.clone()), Spawn::new(service.clone())];
        for idle in &mut idle {
            assert_ready_ok!(idle.poll_ready::<http::Request<()>>());
        }
        watch.end(0, Ok(empty()));
        assert_ready_ok!(under_way.poll());
        for idle in &mut idle {
            assert_ready_ok!(idle.poll_ready::<http::Request<()>>());
        }
        assert_eq!((layer.handle().in_flight(), layer.handle().snapshot().waiting), (0, 0));
        watch.script([Then::Answer(empty())]);
        LoadShed::new(service).oneshot(request()).await.expect("nothing is in flight");
    }
}
