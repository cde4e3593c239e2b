//! The rules that open a circuit: windows, slow calls, closures.

use http::Response;
use tokio::time::advance;
use tokio_test::assert_ready_ok;

use super::fixtures::*;
use crate::support::{grpc, read};

fn rig(trip: Trip) -> Rig {
    Rig::new(CircuitBreakerLayer::new(trip).open_for(WAIT))
}

// ===== Windows =====

/// The window is an exact ring: a new call replaces the oldest one, whatever its age.
#[tokio::test(start_paused = true)]
async fn a_window_of_calls_contains_exactly_the_last_calls() {
    let rig = rig(Trip::failure_ratio(0.5).over(4).min_calls(4));
    rig.fail().await;
    for _ in 0..4 {
        rig.ok().await;
    }
    rig.fail().await;
    let seen = rig.handle.snapshot().seen;
    assert_eq!(
        (seen.window_calls, seen.window_failures),
        (4, 1),
        "the first call has left the window"
    );
    advance(secs(1_000_000)).await;
    assert_eq!(rig.handle.snapshot().seen.window_failures, 1, "the age of a call does not matter");
    rig.fail().await;
    assert_eq!(rig.state(), CircuitState::Open);
    let tripped = rig.handle.snapshot().last_trip;
    assert_eq!(tripped, Some(TripReason::FailureRatio { failures: 2, calls: 4 }));
}

#[tokio::test(start_paused = true)]
async fn a_window_of_calls_opens_after_any_number_of_successes() {
    let rig = rig(Trip::failure_ratio(0.5).over(10).min_calls(10));
    for _ in 0..1000 {
        rig.ok().await;
    }
    for _ in 0..4 {
        rig.fail().await;
    }
    assert_eq!(rig.state(), CircuitState::Closed);
    rig.fail().await;
    assert_eq!(rig.state(), CircuitState::Open);
}

/// A window has ten buckets, so it slides by a tenth of its length.
#[tokio::test(start_paused = true)]
async fn a_window_of_time_forgets_a_tenth_at_a_time() {
    let rig = rig(Trip::failure_ratio(1.0).within(secs(10)).min_calls(100));
    for _ in 0..10 {
        rig.fail().await;
        advance(secs(1)).await;
    }
    for left in (0..10).rev() {
        assert_eq!(rig.handle.snapshot().seen.window_failures, left);
        advance(secs(1)).await;
    }
}

/// With the coarse clock a success is recorded at the last reading of the clock. A failure reads the clock.
#[tokio::test(start_paused = true)]
async fn a_coarse_clock_drops_some_successes_early_and_no_failure() {
    let trip = Trip::failure_ratio(0.5).within(secs(10)).min_calls(3).coarse_clock();
    let rig = rig(trip);
    for _ in 0..16 {
        rig.ok().await;
        advance(secs(1)).await;
    }
    assert_eq!(
        rig.handle.snapshot().seen.window_calls,
        0,
        "fifteen calls were recorded at the time of the first one"
    );
    rig.ok().await;
    rig.fail().await;
    advance(secs(9)).await;
    assert_eq!(rig.handle.snapshot().seen.window_calls, 2);
    rig.fail().await;
    assert_eq!(rig.state(), CircuitState::Open);
}

/// Rules of the same kind report the same trip, so the index of the rule distinguishes them.
#[tokio::test(start_paused = true)]
async fn last_rule_is_the_index_of_the_rule_that_tripped() {
    let ratio = |over| Trip::failure_ratio(1.0).over(over).min_calls(over);
    let rig = rig(Trip::any([Trip::consecutive(9), ratio(5), Trip::any([ratio(3), ratio(4)])]));
    assert_eq!(rig.handle.snapshot().last_rule, None);
    for _ in 0..3 {
        rig.fail().await;
    }
    let seen = rig.handle.snapshot();
    assert_eq!(seen.last_trip, Some(TripReason::FailureRatio { failures: 3, calls: 3 }));
    assert_eq!(seen.last_rule, Some(2));
    advance(WAIT).await;
    rig.fail().await;
    let seen = rig.handle.snapshot();
    assert!(matches!(seen.last_trip, Some(TripReason::Probe { .. })));
    assert_eq!(seen.last_rule, None);
}

#[tokio::test(start_paused = true)]
async fn the_first_of_two_rules_that_trip_is_reported() {
    let ratio = || Trip::failure_ratio(1.0).over(3).min_calls(3);
    for (trip, ratio_first) in [
        (Trip::any([ratio(), Trip::consecutive(3)]), true),
        (Trip::any([Trip::consecutive(3), ratio()]), false),
    ] {
        let rig = rig(trip);
        for _ in 0..3 {
            assert_eq!(rig.state(), CircuitState::Closed);
            rig.fail().await;
        }
        let expected = match ratio_first {
            true => TripReason::FailureRatio { failures: 3, calls: 3 },
            false => TripReason::Consecutive { failures: 3 },
        };
        assert_eq!(rig.handle.snapshot().last_trip, Some(expected));
    }
}

// ===== Slow calls =====

fn slow() -> Trip {
    Trip::slow_ratio(0.5, secs(2)).over(4).min_calls(2)
}

#[tokio::test(start_paused = true)]
async fn slow_calls_open_the_circuit_whether_they_succeed_or_fail() {
    for then in [Ok(()), Err(Oops("down"))] {
        let rig = rig(slow());
        rig.takes(secs(2) - ms(1), then).await;
        rig.takes(secs(2) - ms(1), then).await;
        assert_eq!(
            (rig.state(), rig.handle.snapshot().seen.window_slow),
            (CircuitState::Closed, 0)
        );
        rig.takes(secs(2), then).await;
        assert_eq!(rig.state(), CircuitState::Closed, "1 of 3 calls was slow");
        rig.takes(secs(3), then).await;
        assert_eq!(rig.state(), CircuitState::Open);
        let tripped = rig.handle.snapshot().last_trip;
        assert_eq!(tripped, Some(TripReason::SlowRatio { slow: 2, calls: 4 }));
    }
}

/// A timeout outside of the breaker cancels the calls, and the circuit opens on a hung service all the same.
#[tokio::test(start_paused = true)]
async fn a_cancelled_call_that_had_been_slow_counts_as_slow() {
    let rig = rig(slow());
    for _ in 0..5 {
        let (call, _) = rig.hold();
        advance(secs(2) - ms(1)).await;
        drop(call);
    }
    assert_eq!(
        rig.handle.snapshot().seen.window_calls,
        0,
        "cancelled before the threshold of a slow call"
    );
    for _ in 0..2 {
        assert_eq!(rig.state(), CircuitState::Closed);
        let (call, _) = rig.hold();
        advance(secs(2)).await;
        drop(call);
    }
    assert_eq!(rig.state(), CircuitState::Open);
}

/// The duration of a call ends at its head, so that a long stream is not slow.
#[tokio::test(start_paused = true)]
async fn a_quick_head_over_a_long_body_is_not_slow() {
    let rig = rig(slow());
    for grpc_stream in [false, true, false, true] {
        let pieces = [Piece::data("a"), Piece::Stuck];
        let (mut call, number) = rig.hold();
        advance(ms(1)).await;
        let response = match grpc_stream {
            true => grpc(pieces),
            false => Response::new(ScriptBody::new(pieces)),
        };
        rig.watch.end(number, Ok(response));
        let stream = assert_ready_ok!(call.poll());
        advance(secs(60)).await;
        drop(stream);
    }
    let seen = rig.handle.snapshot().seen;
    assert_eq!(
        (seen.window_calls, seen.window_slow),
        (2, 0),
        "a gRPC call without a status is cancelled"
    );
    // A slow head with a short body is slow.
    for _ in 0..2 {
        let (mut call, number) = rig.hold();
        advance(secs(2)).await;
        rig.watch.end(number, Ok(Response::new(ScriptBody::new([Piece::data("a")]))));
        read(assert_ready_ok!(call.poll()).into_body()).await.unwrap();
    }
    assert_eq!(rig.state(), CircuitState::Open);
}

#[tokio::test(start_paused = true)]
async fn a_slow_probe_fails() {
    let trip = Trip::any([Trip::consecutive(1), slow()]);
    for cancelled in [false, true] {
        let rig = Rig::half_open(CircuitBreakerLayer::new(trip.clone()).open_for(WAIT)).await;
        if cancelled {
            let (probe, _) = rig.hold();
            advance(secs(2)).await;
            drop(probe);
        } else {
            rig.takes(secs(2), Ok(())).await;
        }
        assert_eq!(rig.state(), CircuitState::Open);
        assert_eq!(rig.handle.snapshot().last_trip, Some(TripReason::SlowProbe));
    }
}

// ===== Closures as rules =====

#[tokio::test(start_paused = true)]
async fn a_rule_closure_receives_the_counts_and_decides() {
    let rig = rig(Trip::any([
        Trip::when(|seen| seen.window_failures >= 3 && seen.consecutive_failures >= 2),
        Trip::failure_ratio(1.0).over(100).min_calls(100),
    ]));
    for _ in 0..2 {
        rig.fail().await;
    }
    rig.ok().await;
    rig.fail().await;
    assert_eq!(rig.state(), CircuitState::Closed, "3 failures, only the last one in a row");
    rig.fail().await;
    assert_eq!(rig.state(), CircuitState::Open);
    let seen = rig.handle.snapshot();
    assert_eq!(seen.last_trip, Some(TripReason::When { seen: seen.seen }));
    let told = seen.last_trip.unwrap().to_string();
    assert!(told.contains("2 failures in a row, and 4 failed"), "{told}");
}

#[test]
fn rules_that_cannot_work_are_typed_errors() {
    let slow = |slow| Trip::slow_ratio(0.5, slow);
    let ratio = Trip::failure_ratio;
    for (trip, field) in [
        (slow(secs(0)), "trip.slow_ratio.slow"),
        (Trip::slow_ratio(0.0, secs(1)), "trip.slow_ratio"),
        (ratio(0.5).over(0).min_calls(1), "trip.over"),
        (ratio(0.5).over(1_000_001), "trip.over"),
        (ratio(0.5).over(10), "trip.min_calls"),
        (ratio(0.5).within(ms(9)), "trip.within"),
    ] {
        let fault = CircuitBreakerLayer::new(trip.clone()).checked().unwrap_err();
        assert_eq!(fault.field, field, "{trip:?}");
    }
    assert!(ratio(0.5).over(1_000_000).check().is_ok());
    let waits = OpenDuration::backoff(secs(2), secs(60));
    for (wait, field) in [
        (waits.factor(0.5), "open_for.factor"),
        (waits.factor(f64::INFINITY), "open_for.factor"),
        (waits.jitter(1.5), "open_for.jitter"),
        (waits.jitter(f64::NAN), "open_for.jitter"),
        (OpenDuration::backoff(secs(2), secs(1)), "open_for.max"),
    ] {
        assert_eq!(touchy().open_for(wait).checked().unwrap_err().field, field, "{wait:?}");
    }
    for (needed, probes, field) in
        [(0, 3, "half_open_of.needed"), (4, 3, "half_open_of.needed"), (1, 0, "half_open")]
    {
        let fault = touchy().half_open_of(needed, probes).checked().unwrap_err();
        assert_eq!(fault.field, field);
    }
    let fault = touchy().half_open_queue(1, secs(0)).checked().unwrap_err();
    assert_eq!(fault.field, "half_open_queue.max_wait");
    assert_eq!(touchy().per_origin().max_keys(0).checked().unwrap_err().field, "max_keys");
    assert_eq!(touchy().backpressure().per_origin().checked().unwrap_err().field, "backpressure");
}
