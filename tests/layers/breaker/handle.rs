//! The operations of a handle, outcomes of health probes, and the ramp after closing.

use buttress::Outcome;
use tokio::time::advance;
use tokio_test::{assert_pending, assert_ready_eq, task};

use super::fixtures::*;
use crate::support::empty;

// ===== Isolation =====

#[tokio::test(start_paused = true)]
async fn calls_are_recorded_during_isolations() {
    let rig = Rig::new(touchy());
    let (mut call, number) = rig.hold();
    let one = rig.handle.isolate();
    let two = rig.handle.clone().isolate();
    assert_eq!((rig.state(), rig.handle.snapshot().isolations), (CircuitState::ForcedOpen, 2));
    drop(one);
    assert_eq!(rig.refused().await, RejectedKind::ForcedOpen);
    // A call that was in flight still counts.
    rig.watch.end(number, Err(Oops("down")));
    assert!(call.poll().is_ready());
    assert_eq!((rig.state(), rig.handle.snapshot().opened), (CircuitState::ForcedOpen, 1));
    advance(secs(10)).await;
    drop(two);
    assert_eq!(rig.handle.snapshot().open_for, Some(secs(20)));
    // Neither `force_closed` nor `reset` ends an isolation.
    let held = rig.handle.isolate();
    rig.handle.reset();
    rig.handle.force_closed();
    assert_eq!(rig.refused().await, RejectedKind::ForcedOpen);
    drop(held);
    assert_eq!(rig.state(), CircuitState::ForcedClosed);
}

#[tokio::test(start_paused = true)]
async fn changed_reports_isolations() {
    let rig = Rig::new(touchy());
    let mut changed = task::spawn(rig.handle.changed());
    assert_pending!(changed.poll());
    let isolation = rig.handle.isolate();
    assert!(changed.is_woken());
    assert_ready_eq!(changed.poll(), CircuitState::ForcedOpen);
    let mut changed = task::spawn(rig.handle.changed());
    assert_pending!(changed.poll());
    drop(isolation);
    assert_ready_eq!(changed.poll(), CircuitState::Closed);
}

// ===== Shadow mode =====

#[tokio::test(start_paused = true)]
async fn shadow_mode_rejects_no_call_and_counts_the_calls_that_it_would_reject() {
    let rig = Rig::new(touchy().shadow());
    rig.fail().await;
    assert_eq!(rig.state(), CircuitState::Open);
    for _ in 0..3 {
        rig.fail().await;
    }
    let seen = rig.handle.snapshot();
    assert_eq!((seen.opened, seen.shadowed, seen.rejected), (1, 3, 0));
    assert_eq!(seen.open_for, Some(WAIT), "calls that would have been rejected are not counted");
    // Half-open probes decide as usual. The calls beside them decide nothing.
    advance(WAIT).await;
    let (probe, _) = rig.hold();
    rig.fail().await;
    rig.ok().await;
    assert_eq!((rig.state(), rig.handle.snapshot().shadowed), (CircuitState::HalfOpen, 5));
    drop(probe);
    rig.ok().await;
    assert_eq!(rig.state(), CircuitState::Closed);

    rig.handle.force_open();
    rig.ok().await;
    rig.handle.set_shadow(false);
    assert_eq!(rig.refused().await, RejectedKind::ForcedOpen);
}

// ===== Changed settings =====

#[tokio::test(start_paused = true)]
async fn new_thresholds_do_not_reset_the_counts() {
    let trip = |failures, ratio, calls| {
        Trip::any([
            Trip::consecutive(failures),
            Trip::failure_ratio(ratio).over(10).min_calls(calls),
        ])
    };
    let rig = Rig::new(CircuitBreakerLayer::new(trip(100, 1.0, 10)).open_for(WAIT));
    for _ in 0..4 {
        rig.fail().await;
    }
    rig.handle.set_trip(&trip(5, 1.0, 10)).unwrap();
    let seen = rig.handle.snapshot();
    assert_eq!((seen.seen.consecutive_failures, seen.seen.window_failures), (4, 4));
    assert_eq!(seen.state, CircuitState::Closed, "rules are evaluated when the next call fails");
    rig.handle.set_open_for(secs(7)).unwrap();
    rig.fail().await;
    let seen = rig.handle.snapshot();
    assert_eq!((seen.state, seen.open_for), (CircuitState::Open, Some(secs(7))));
    // The setting applies from the next trip on. The current open time does not change.
    rig.handle.set_open_for(OpenDuration::backoff(secs(1), secs(2))).unwrap();
    assert_eq!(rig.handle.snapshot().open_for, Some(secs(7)));

    for other in [
        Trip::consecutive(5),
        Trip::any([Trip::failure_ratio(1.0).over(10).min_calls(1), Trip::consecutive(5)]),
        Trip::any([Trip::consecutive(5), Trip::failure_ratio(1.0).over(11).min_calls(1)]),
        Trip::any([Trip::consecutive(5), Trip::slow_ratio(1.0, secs(1)).over(10).min_calls(1)]),
    ] {
        assert_eq!(rig.handle.set_trip(&other).unwrap_err().field, "trip", "{other:?}");
    }
    assert_eq!(rig.handle.set_trip(&trip(0, 1.0, 10)).unwrap_err().field, "trip.consecutive");
    assert_eq!(rig.handle.set_open_for(secs(0)).unwrap_err().field, "open_for");
}

#[tokio::test(start_paused = true)]
async fn restored_circuit_continues_from_the_snapshot() {
    let from = Rig::new(touchy());
    from.fail().await;
    advance(secs(10)).await;
    let open = from.handle.snapshot();
    let to = Rig::new(touchy());
    to.handle.restore(&open);
    assert_eq!((to.state(), to.handle.snapshot().open_for), (CircuitState::Open, Some(secs(20))));
    let (_, mut straggler) = (to.handle.reset(), to.hold());
    to.handle.restore(&open);
    to.watch.end(straggler.1, Ok(empty()));
    assert!(straggler.0.poll().is_ready());
    assert_eq!(to.state(), CircuitState::Open, "the call of an earlier generation is ignored");
    advance(secs(20)).await;
    to.ok().await;
    assert_eq!(to.state(), CircuitState::Closed);

    let count = CircuitBreakerLayer::new(Trip::consecutive(3)).open_for(WAIT);
    let (from, to) = (Rig::new(count.clone()), Rig::new(count));
    for _ in 0..2 {
        from.fail().await;
    }
    to.handle.restore(&from.handle.snapshot());
    to.fail().await;
    assert_eq!(to.state(), CircuitState::Open);
}

// ===== Outcomes of health probes =====

#[tokio::test(start_paused = true)]
async fn only_recorded_outcomes_decide_with_external_probes() {
    let rig = Rig::half_open(touchy().half_open_of(2, 3).external_probes()).await;
    for _ in 0..3 {
        assert_eq!(rig.refused().await, RejectedKind::Probing);
    }
    rig.handle.record(Outcome::success());
    rig.handle.record(Outcome::cancelled());
    rig.handle.record(Outcome::throttled());
    assert_eq!(rig.state(), CircuitState::HalfOpen);
    rig.handle.record(Outcome::failure());
    assert_eq!(rig.state(), CircuitState::Open);
    // While the circuit is open, recorded outcomes are ignored.
    rig.handle.record(Outcome::success());
    rig.handle.record(Outcome::failure());
    assert_eq!((rig.state(), rig.handle.snapshot().opened), (CircuitState::Open, 2));
    advance(WAIT).await;
    for _ in 0..2 {
        rig.handle.record(Outcome::success());
    }
    assert_eq!(rig.state(), CircuitState::Closed);
    rig.handle.record(Outcome::failure());
    assert_eq!(
        rig.state(),
        CircuitState::Open,
        "a closed circuit counts the outcome like that of a call"
    );
}

/// In half-open no caller gets a probe slot, and a rejected call does not touch the inner service.
#[tokio::test(start_paused = true)]
async fn external_probes_do_not_call_the_service() {
    let rig = Rig::half_open(touchy().external_probes()).await;
    let before = rig.watch.seen();
    assert_eq!(rig.refused().await, RejectedKind::Probing);
    assert_eq!(rig.watch.seen(), before);
}

// ===== The ramp =====

/// Returns how many of `calls` calls are admitted.
async fn share(rig: &Rig, calls: usize) -> usize {
    let mut went = 0;
    for _ in 0..calls {
        went += usize::from(rig.call(Then::Answer(empty())).await);
    }
    went
}

#[tokio::test(start_paused = true)]
async fn the_admitted_share_grows_from_a_tenth_to_all() {
    let rig = Rig::half_open(touchy().ramp(secs(60))).await;
    rig.ok().await;
    assert_eq!(rig.state(), CircuitState::Closed);
    // At least five standard deviations on either side of 10, 55 and 91 %.
    for (least, most) in [(130, 280), (990, 1210), (1740, 1890)] {
        let went = share(&rig, 2000).await;
        assert!((least..most).contains(&went), "{went} of 2000");
        let forward = if least == 130 { 30 } else { 24 };
        advance(secs(forward)).await;
    }
    advance(secs(6)).await;
    assert_eq!(share(&rig, 2000).await, 2000, "the ramp has ended");
}

#[tokio::test(start_paused = true)]
async fn a_failure_on_the_ramp_opens_it_and_reset_skips_it() {
    let rig = Rig::half_open(touchy().ramp(secs(60))).await;
    rig.ok().await;
    let mut refused = 0;
    while !rig.call(Then::Fail(Oops("down"))).await {
        refused += 1;
        assert!(refused < 1000, "a tenth of the calls is admitted");
    }
    assert_eq!(rig.state(), CircuitState::Open);
    advance(WAIT).await;
    rig.ok().await;
    let kinds: Vec<_> = {
        let mut kinds = Vec::new();
        while kinds.len() < 3 {
            if !rig.call(Then::Answer(empty())).await {
                kinds.push(rig.handle.snapshot().state);
            }
        }
        kinds
    };
    assert_eq!(kinds, [CircuitState::Closed; 3], "ramping up is reported as closed");
    rig.handle.reset();
    assert_eq!(share(&rig, 100).await, 100);
}
