//! User code and settings that could damage a circuit: panics, extreme values, foreign snapshots, many threads.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
};

use buttress::{Outcome, Rejected};
use http::{Request, Response};
use tokio::time::advance;
use tokio_test::{assert_pending, assert_ready_eq, task};
use tower::{Layer, Service, ServiceExt, service_fn};

use super::fixtures::*;
use crate::support::{empty, request};

// ===== Panics =====

/// A rule that panics does not trip the circuit. Its panic neither fails the call nor aborts a caller that unwinds.
#[tokio::test(start_paused = true)]
async fn a_rule_that_panics_does_not_trip_or_fail_a_call() {
    let trip = Trip::any([Trip::when(|_| panic!("a rule")), Trip::consecutive(4)]);
    let rig = Rig::new(CircuitBreakerLayer::new(trip).open_for(WAIT));
    rig.fail().await;
    for then in [Then::PanicInCall, Then::PanicInPoll] {
        rig.watch.script([then]);
        let service = rig.service.clone();
        assert!(tokio::spawn(service.oneshot(request())).await.unwrap_err().is_panic());
    }
    assert_eq!(rig.handle.snapshot().seen.consecutive_failures, 3);
    rig.fail().await;
    let tripped = rig.handle.snapshot().last_trip;
    assert_eq!(tripped, Some(TripReason::Consecutive { failures: 4 }));
    advance(WAIT).await;
    rig.ok().await;
    assert_eq!(rig.state(), CircuitState::Closed);
}

/// A probe whose classifier panics has no outcome: it releases its slot.
#[tokio::test(start_paused = true)]
async fn a_classifier_that_panics_releases_its_slot() {
    let layer = touchy().classify(|result: Result<&u8, &Oops>| match result {
        Ok(0) => panic!("a classifier"),
        Ok(_) => Outcome::success(),
        Err(_) => Outcome::failure(),
    });
    let service = layer.layer(service_fn(|answer: u8| async move { Ok::<u8, Oops>(answer) }));
    let handle = layer.handle();
    handle.half_open();
    for _ in 0..3 {
        let call = tokio::spawn(service.clone().oneshot(0));
        assert!(call.await.unwrap_err().is_panic());
        assert_eq!((handle.state(), handle.snapshot().probes), (CircuitState::HalfOpen, 0));
    }
    assert_eq!(service.oneshot(1).await.unwrap(), 1);
    assert_eq!(handle.state(), CircuitState::Closed);
}

/// The classifier of a call panics in its `Clone`, when the inner service is ready or not. The call was never made, so
/// the panic is not a failure.
#[tokio::test(start_paused = true)]
async fn a_classifier_that_panics_in_its_clone_is_no_failure() {
    struct Touchy(Arc<AtomicBool>);
    impl Clone for Touchy {
        fn clone(&self) -> Self {
            assert!(!self.0.load(SeqCst), "a classifier");
            Self(self.0.clone())
        }
    }
    for ready in [true, false] {
        let is_active = Arc::new(AtomicBool::new(false));
        let touchy_one = Touchy(is_active.clone());
        let layer = touchy().classify(move |result: Result<&Response<ScriptBody>, &Oops>| {
            let _ = &touchy_one;
            result.map_or(Outcome::failure(), |_| Outcome::success())
        });
        let (inner, watch) = Strict::new();
        let (mut service, handle) = (layer.layer(inner), layer.handle());
        if ready {
            ServiceExt::<Request<()>>::ready(&mut service).await.unwrap();
        }
        let call = AssertUnwindSafe(|| {
            if ready {
                is_active.store(true, SeqCst);
                drop(service.call(request()));
                return;
            }
            watch.set_ready(false);
            let mut call = task::spawn(service.call(request()));
            assert_pending!(call.poll());
            watch.set_ready(true);
            is_active.store(true, SeqCst);
            drop(call.poll());
        });
        assert!(catch_unwind(call).is_err());
        is_active.store(false, SeqCst);
        let seen = handle.snapshot();
        assert_eq!((handle.state(), watch.seen().calls), (CircuitState::Closed, 0), "{seen:?}");
        // The reservation of the inner service is released as well.
        handle.force_open();
        assert!(service.call(request()).await.is_err());
        assert_eq!(watch.seen().reserved, 0, "ready: {ready}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_that_panics_does_not_affect_other_keys() {
    let layer = touchy().keyed(|request: &Request<()>| match request.uri().path() {
        "/panic" => panic!("a key"),
        path => path.to_owned(),
    });
    let (inner, watch) = Strict::new();
    let service = layer.layer(inner);
    let to = |path: &str| Request::get(path).body(()).unwrap();
    let call = tokio::spawn(service.clone().oneshot(to("/panic")));
    assert!(call.await.is_err_and(|error| error.is_panic()));
    assert_eq!(watch.seen().reserved, 0);
    assert!(service.oneshot(to("/good")).await.is_ok());
    assert_eq!(layer.handle().all().len(), 1);
}

// ===== Extremes =====

#[tokio::test(start_paused = true)]
async fn the_largest_settings_cause_no_panic() {
    use std::time::Duration;
    const MOST: Duration = Duration::MAX;
    let trip = Trip::any([
        Trip::consecutive(u32::MAX),
        Trip::failure_ratio(1.0).within(MOST).min_calls(u32::MAX),
        Trip::slow_ratio(f64::MIN_POSITIVE, MOST).within(MOST).min_calls(u32::MAX),
        Trip::failure_ratio(f64::MIN_POSITIVE).over(1_000_000).min_calls(2),
    ]);
    let wait = OpenDuration::backoff(MOST, MOST).factor(f64::MAX).jitter(1.0);
    let layer = CircuitBreakerLayer::new(trip)
        .open_for(wait.follow_retry_after(MOST).reset_after(MOST))
        .half_open(1000)
        .probe_timeout(MOST)
        .half_open_queue(u32::MAX, MOST)
        .ramp(MOST);
    let rig = Rig::new(layer.checked().unwrap());
    rig.ok().await;
    rig.fail().await;
    assert_eq!(rig.state(), CircuitState::Open, "the minimum ratio of two calls");
    assert_eq!(rig.refused().await, RejectedKind::Open);
    // After a hundred years.
    advance(secs(100 * 365 * 24 * 3600)).await;
    assert_eq!(rig.refused().await, RejectedKind::Open);
    rig.handle.half_open();
    let probes: Vec<_> = (0..1000).map(|_| rig.hold()).collect();
    let mut late = rig.ask();
    assert_pending!(late.poll(), "the call waits for the outcome of the probes");
    assert_eq!(rig.handle.snapshot().probes, 1000);
    drop(probes);
    assert!(late.is_woken());
    assert_pending!(late.poll());
    assert_eq!(rig.handle.snapshot().probes, 1);
    drop(late);
    for _ in 0..1000 {
        rig.ok().await;
    }
    assert_eq!(rig.state(), CircuitState::Closed);
}

/// An open circuit rejects at once, for any number of calls and whatever the time for which the service is not ready.
#[tokio::test(start_paused = true)]
async fn an_open_circuit_over_a_service_that_is_never_ready_rejects_at_once() {
    for layer in [touchy(), touchy().half_open_queue(10, secs(5))] {
        let rig = Rig::new(layer);
        rig.fail().await;
        rig.watch.set_ready(false);
        let polls = rig.watch.seen().polls;
        for _ in 0..5000 {
            let mut call = rig.ask();
            assert!(call.poll().is_ready());
        }
        assert_eq!((rig.watch.seen().polls, rig.handle.snapshot().rejected), (polls, 5000));
        // In half-open, the probe waits for the service. The change to another state ends the wait.
        advance(WAIT).await;
        let mut probe = rig.ask();
        assert_pending!(probe.poll());
        rig.handle.force_open();
        assert!(probe.is_woken());
        let refused = tokio_test::assert_ready!(probe.poll()).unwrap_err();
        assert_eq!(Rejected::find(&*refused).unwrap().kind(), RejectedKind::ForcedOpen);
    }
}

// ===== Foreign snapshots =====

/// A snapshot of any state under any rules is restored under any other rules, and the circuit works as usual.
#[tokio::test(start_paused = true)]
async fn a_snapshot_of_any_rules_can_be_restored_under_any_other_rules() {
    let trips = || {
        [
            Trip::consecutive(u32::MAX),
            Trip::consecutive(2),
            Trip::failure_ratio(0.5).over(3).min_calls(1),
            Trip::failure_ratio(0.5).over(1_000_000).min_calls(1_000_000),
            Trip::failure_ratio(1.0).within(secs(1)).min_calls(1000),
            Trip::any([
                Trip::slow_ratio(0.5, ms(1)).over(5).min_calls(5),
                Trip::failure_ratio(1.0).over(70).min_calls(70),
                Trip::when(|seen| seen.consecutive_failures > 80),
            ]),
        ]
    };
    let rig = |trip| Rig::new(CircuitBreakerLayer::new(trip).half_open(2).open_for(WAIT));
    for from in trips() {
        let from = rig(from);
        let steps: [&dyn Fn(&CircuitBreakerHandle); 5] = [
            &|_| {},
            &|handle| (0..40).for_each(|_| handle.record(Outcome::failure())),
            &CircuitBreakerHandle::half_open,
            &CircuitBreakerHandle::force_open,
            &CircuitBreakerHandle::force_closed,
        ];
        for step in steps {
            step(&from.handle);
            let taken = from.handle.snapshot();
            for to in trips() {
                let to = rig(to);
                let (probe, _) = to.hold();
                to.handle.restore(&taken);
                to.handle.restore(&to.handle.snapshot());
                assert_eq!(to.state(), taken.state);
                drop(probe);
                let seen = to.handle.snapshot().seen;
                assert!(seen.window_failures <= seen.window_calls, "{seen:?}");
                if let Some(wait) = to.handle.snapshot().open_for {
                    assert_eq!(to.refused().await, RejectedKind::Open);
                    advance(wait).await;
                }
                match to.state() {
                    CircuitState::HalfOpen => {
                        to.ok().await;
                        to.ok().await;
                    }
                    CircuitState::ForcedOpen | CircuitState::ForcedClosed => to.handle.reset(),
                    _ => to.ok().await,
                }
                assert_eq!(to.state(), CircuitState::Closed);
            }
        }
    }
}

// ===== Handles =====

#[tokio::test(start_paused = true)]
async fn guards_and_futures_can_outlive_layer_and_service() {
    let Rig { layer, service, watch, handle } = Rig::new(touchy());
    let isolation = handle.isolate();
    let mut changed = task::spawn(handle.changed());
    assert_pending!(changed.poll());
    drop((layer, service, watch, handle));
    drop(isolation);
    assert!(changed.is_woken());
    assert_ready_eq!(changed.poll(), CircuitState::Closed);
}

/// `changed` reports changes from its call on, not from the first poll on.
#[tokio::test(start_paused = true)]
async fn changed_reports_changes_since_its_call() {
    let rig = Rig::new(touchy());
    let mut changed = task::spawn(rig.handle.changed());
    rig.handle.force_open();
    assert_ready_eq!(changed.poll(), CircuitState::ForcedOpen);
}

// ===== Many threads =====

/// Four threads make calls that end in every way, while a fifth one uses every operation of the handle. The number of
/// probes never exceeds the maximum, no slot is lost, and the circuit still works afterwards.
#[test]
fn threads_lose_nothing() {
    const PROBES: usize = 3;
    let trip = Trip::any([
        Trip::consecutive(3),
        Trip::failure_ratio(0.5).over(20).min_calls(10),
        Trip::failure_ratio(0.6).within(ms(10)).min_calls(10),
    ]);
    let layer = CircuitBreakerLayer::new(trip)
        .half_open_of(2, PROBES as u16)
        .open_for(std::time::Duration::from_micros(50))
        .classify(|result: Result<&(), &Oops>| match result {
            Ok(()) => Outcome::success(),
            Err(_) => Outcome::failure(),
        });
    let under_way = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (layer, under_way) = (&layer, &under_way);
            scope.spawn(move || {
                let mut luck = dice(seed);
                let service = layer.layer(service_fn(|end: u64| async move {
                    match end {
                        0..4 => Ok(()),
                        4..7 => Err(Oops("down")),
                        7 => std::panic::resume_unwind(Box::new(())),
                        _ => std::future::pending().await,
                    }
                }));
                for _ in 0..5000 {
                    let mut call = task::spawn(service.clone().oneshot(luck() % 10));
                    under_way.fetch_add(1, SeqCst);
                    let _ = catch_unwind(AssertUnwindSafe(|| call.poll().is_ready()));
                    drop(call);
                    under_way.fetch_sub(1, SeqCst);
                }
            });
        }
        let handle = layer.handle();
        let mut luck = dice(9);
        for _ in 0..3000 {
            match luck() % 8 {
                0 => handle.half_open(),
                1 => handle.reset(),
                2 => drop(handle.isolate()),
                3 => handle.restore(&handle.snapshot()),
                4 => handle.set_open_for(ms(1)).unwrap(),
                _ => assert!(handle.snapshot().probes <= PROBES),
            }
        }
    });
    let handle = layer.handle();
    assert_eq!((under_way.into_inner(), handle.snapshot().probes), (0, 0));
    handle.half_open();
    handle.record(Outcome::success());
    handle.record(Outcome::success());
    assert_eq!((handle.state(), handle.snapshot().isolations), (CircuitState::Closed, 0));
}

/// Pseudo-random numbers, the same in every run.
fn dice(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state >> 16
    }
}

// ===== Names =====

/// A rejection and the event of a trip name the circuit without the userinfo of the URI.
#[tokio::test(start_paused = true)]
async fn circuits_of_keys_are_named() {
    let named = |layer: CircuitBreakerLayer| {
        let layer = layer.per_origin();
        let (inner, watch) = Strict::new();
        watch.script([Then::Fail(Oops("down"))]);
        let service = layer.layer(inner);
        async move {
            let to = || Request::get("http://me:secret@a:80/x").body(()).unwrap();
            assert!(service.clone().oneshot(to()).await.is_err());
            let refused = service.oneshot(to()).await.unwrap_err();
            Rejected::find(&*refused).unwrap().name().map(String::from)
        }
    };
    assert_eq!(named(touchy()).await.as_deref(), Some("http://a"));
    assert_eq!(named(touchy().name("search")).await.as_deref(), Some("search http://a"));

    let layer = touchy().name("search").keyed(|_: &Request<()>| 0);
    let (inner, watch) = Strict::new();
    watch.script([Then::Fail(Oops("down"))]);
    let service = layer.layer(inner);
    assert!(service.clone().oneshot(request()).await.is_err());
    let refused = service.oneshot(request()).await.unwrap_err();
    assert_eq!(Rejected::find(&*refused).unwrap().name(), Some("search"));
}

// ===== Probes =====

/// One slot, thousands of waiting callers, and each probe is cancelled: each time exactly one caller gets the slot.
#[tokio::test(start_paused = true)]
async fn a_released_slot_is_acquired_by_one_of_thousands_of_callers() {
    let rig = Rig::half_open(touchy().half_open_queue(2000, secs(60))).await;
    let (mut probe, first) = rig.hold();
    let mut waiting: Vec<_> = (0..2000).map(|_| rig.ask()).collect();
    waiting.iter_mut().for_each(|call| assert_pending!(call.poll()));
    for n in 1..=20 {
        drop(probe);
        assert_eq!(waiting.iter().filter(|call| call.is_woken()).count(), waiting.len());
        waiting.iter_mut().for_each(|call| assert_pending!(call.poll()));
        assert_eq!((rig.watch.seen().calls, rig.handle.snapshot().probes), (first + 1 + n, 1));
        probe = waiting.remove(0);
    }
    rig.watch.end(first + 20, Ok(empty()));
    assert!(probe.poll().is_ready());
    assert_eq!(rig.state(), CircuitState::Closed);
    assert!(waiting.iter().all(|call| call.is_woken()));
}
