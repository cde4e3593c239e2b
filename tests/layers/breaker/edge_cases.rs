//! Cases in which a circuit could get stuck or report a wrong state, with one test for each.

use buttress::breaker::Origin;
use http::{Request, Response};
use tokio::time::advance;
use tokio_test::{assert_pending, assert_ready, assert_ready_eq, assert_ready_ok, task};
use tower::{Layer, Service, ServiceExt};

use super::fixtures::*;
use crate::support::{empty, refused_as, request};

// ===== Isolation =====

#[tokio::test(start_paused = true)]
async fn isolation_wakes_callers_that_wait_for_a_hung_service() {
    let rig = Rig::new(touchy());
    rig.watch.set_ready(false);
    let mut early = task::spawn(rig.service.clone().call(request()));
    assert_pending!(early.poll());
    let _isolation = rig.handle.isolate();
    assert!(early.is_woken());
    assert_eq!(refused_as(assert_ready!(early.poll())), RejectedKind::ForcedOpen);
}

#[tokio::test(start_paused = true)]
async fn an_isolation_is_not_restored_but_a_forced_state_is() {
    let from = Rig::new(touchy());
    let isolation = from.handle.isolate();
    let taken = from.handle.snapshot();
    assert_eq!(taken.state, CircuitState::ForcedOpen);
    let to = Rig::new(touchy());
    to.handle.restore(&taken);
    assert_eq!(to.state(), CircuitState::Closed);
    // A forced state is restored, whether the circuit is isolated or not.
    from.handle.force_open();
    drop(isolation);
    to.handle.restore(&from.handle.snapshot());
    assert_eq!(to.state(), CircuitState::ForcedOpen);
}

// ===== Changes by time alone =====

/// A probe hangs and no further call is made: the probe times out, and the open time after it ends as well.
#[tokio::test(start_paused = true)]
async fn a_probe_times_out_without_traffic() {
    let rig = Rig::half_open(touchy().probe_timeout(secs(7))).await;
    let (_probe, _) = rig.hold();
    let mut changed = task::spawn(rig.handle.changed());
    assert_pending!(changed.poll());
    advance(secs(7) - ms(1)).await;
    assert_eq!(rig.state(), CircuitState::HalfOpen);
    assert_pending!(changed.poll());
    advance(ms(1)).await;
    assert!(changed.is_woken());
    assert_ready_eq!(changed.poll(), CircuitState::Open);
    let seen = rig.handle.snapshot();
    assert_eq!((seen.state, seen.open_for, seen.opened), (CircuitState::Open, Some(WAIT), 2));
    assert_eq!(seen.last_trip, Some(TripReason::ProbeTimeout));
}

/// A probe timeout that is observed late takes effect at the time at which it expired.
#[tokio::test(start_paused = true)]
async fn the_open_time_begins_at_the_probe_timeout() {
    let rig = Rig::half_open(touchy().probe_timeout(secs(7))).await;
    let (_probe, _) = rig.hold();
    advance(secs(17)).await;
    assert_eq!(rig.handle.snapshot().open_for, Some(secs(20)));
    let rig = Rig::half_open(touchy().probe_timeout(secs(7))).await;
    let (_probe, _) = rig.hold();
    advance(secs(7) + WAIT).await;
    assert_eq!((rig.state(), rig.handle.snapshot().opened), (CircuitState::HalfOpen, 2));
    rig.ok().await;
    assert_eq!(rig.state(), CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_ends_after_its_timeout_is_ignored() {
    let rig = Rig::half_open(touchy().probe_timeout(secs(7))).await;
    let (mut probe, number) = rig.hold();
    advance(secs(8)).await;
    rig.watch.end(number, Ok(empty()));
    assert_ready_ok!(probe.poll());
    assert_eq!(rig.state(), CircuitState::Open);
}

/// One hung probe of three is one failure, and one success is enough to close the circuit.
#[tokio::test(start_paused = true)]
async fn a_probe_timeout_is_one_failed_probe() {
    let rig = Rig::half_open(touchy().half_open_of(1, 3).probe_timeout(secs(7))).await;
    let (_probe, _) = rig.hold();
    advance(secs(7)).await;
    assert_eq!(rig.state(), CircuitState::HalfOpen);
    rig.ok().await;
    assert_eq!(rig.state(), CircuitState::Closed);
}

/// A hung probe responds after so many other probes that a 16-bit probe number has wrapped around. The response
/// must not end another probe.
#[tokio::test(start_paused = true)]
async fn a_late_probe_does_not_end_another_probe_when_numbers_wrap() {
    let rig = Rig::half_open(touchy().half_open_of(1, 2).probe_timeout(secs(7))).await;
    let (mut late, number) = rig.hold();
    advance(secs(7)).await;
    for _ in 1..u16::MAX {
        assert!(rig.ask().poll().is_pending());
    }
    let (_probe, _) = rig.hold();
    rig.watch.end(number, Err(Oops("down")));
    assert!(assert_ready!(late.poll()).is_err());
    assert_eq!((rig.state(), rig.handle.snapshot().probes), (CircuitState::HalfOpen, 1));
}

/// Of two probes that wait for their inner service, one times out. The other one keeps its slot.
#[tokio::test(start_paused = true)]
async fn a_probe_that_times_out_releases_only_its_own_slot() {
    let rig = Rig::half_open(touchy().half_open_of(1, 3).probe_timeout(secs(7))).await;
    rig.watch.set_ready(false);
    let mut first = task::spawn(rig.service.clone().call(request()));
    assert_pending!(first.poll());
    advance(secs(4)).await;
    let mut second = task::spawn(rig.service.clone().call(request()));
    assert_pending!(second.poll());
    assert_pending!(first.poll());
    assert_eq!(rig.handle.snapshot().probes, 2);
    advance(secs(3)).await;
    assert_eq!(rig.handle.snapshot().probes, 1);
    rig.watch.script([Then::Answer(empty())]);
    rig.watch.set_ready(true);
    assert_ready_ok!(second.poll());
    assert_eq!(rig.state(), CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_slow_head_fails_the_probe_at_its_timeout() {
    let trip = Trip::any([Trip::consecutive(1), Trip::slow_ratio(0.5, secs(1))]);
    let layer = CircuitBreakerLayer::new(trip).open_for(WAIT).probe_timeout(secs(7));
    let rig = Rig::half_open(layer).await;
    let (mut probe, number) = rig.hold();
    advance(secs(2)).await;
    rig.watch.end(number, Ok(Response::new(ScriptBody::new([Piece::Stuck]))));
    let _stream = assert_ready_ok!(probe.poll());
    advance(secs(5)).await;
    assert_eq!(rig.state(), CircuitState::Open);
}

/// The clock of a circuit starts at 0, so a call may start at 0.
#[tokio::test(start_paused = true)]
async fn a_call_at_the_first_instant_is_measured() {
    let trip = Trip::slow_ratio(1.0, secs(1)).over(1).min_calls(1);
    let rig = Rig::new(CircuitBreakerLayer::new(trip));
    rig.takes(secs(1), Ok(())).await;
    assert_eq!(rig.state(), CircuitState::Open);
}

// ===== Changed settings =====

/// Three of five probes have failed. A change to two probes decides at once, because more than two have ended.
#[tokio::test(start_paused = true)]
async fn a_lower_number_of_probes_than_have_ended_decides_at_once() {
    let rig = Rig::half_open(touchy().half_open_of(1, 5)).await;
    for _ in 0..3 {
        rig.fail().await;
    }
    rig.handle.set_half_open_of(2, 2).unwrap();
    assert_eq!(rig.refused().await, RejectedKind::Open);
    advance(WAIT).await;
    for _ in 0..2 {
        rig.ok().await;
    }
    assert_eq!(rig.state(), CircuitState::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_call_is_slow_only_for_rules_whose_time_it_exceeded() {
    let trip = Trip::any([
        Trip::slow_ratio(1.0, secs(1)).over(10).min_calls(10),
        Trip::slow_ratio(1.0, secs(5)).over(2).min_calls(2),
    ]);
    let rig = Rig::new(CircuitBreakerLayer::new(trip));
    rig.takes(secs(5), Ok(())).await;
    let (given_up, _) = rig.hold();
    advance(secs(2)).await;
    drop(given_up);
    rig.takes(secs(5), Ok(())).await;
    let tripped = rig.handle.snapshot().last_trip;
    assert_eq!(tripped, Some(TripReason::SlowRatio { slow: 2, calls: 2 }));
}

// ===== Snapshots =====

/// Each window restores its own counts, although the windows differ in length.
#[tokio::test(start_paused = true)]
async fn each_window_restores_its_own_counts() {
    let layer = || {
        let trip = Trip::any([
            Trip::failure_ratio(0.9).over(4),
            Trip::slow_ratio(0.9, secs(1)).within(secs(1000)),
        ]);
        CircuitBreakerLayer::new(trip.min_calls(4))
    };
    let from = Rig::new(layer());
    for _ in 0..20 {
        from.ok().await;
    }
    for _ in 0..3 {
        from.fail().await;
    }
    let to = Rig::new(layer());
    to.handle.restore(&from.handle.snapshot());
    assert_eq!(to.handle.snapshot().seen, from.handle.snapshot().seen);
    to.fail().await;
    let tripped = to.handle.snapshot().last_trip;
    assert_eq!(tripped, Some(TripReason::FailureRatio { failures: 4, calls: 4 }));
}

#[tokio::test(start_paused = true)]
async fn a_restored_circuit_continues_its_backoff() {
    let layer = || touchy().open_for(OpenDuration::backoff(secs(1), secs(60)).jitter(0.0));
    let from = Rig::new(layer());
    from.fail().await;
    advance(secs(1)).await;
    from.fail().await;
    let to = Rig::new(layer());
    to.handle.restore(&from.handle.snapshot());
    assert_eq!(to.handle.snapshot().open_for, Some(secs(2)));
    advance(secs(2)).await;
    to.fail().await;
    assert_eq!(to.handle.snapshot().open_for, Some(secs(4)));
}

// ===== Keys =====

type Keyed = buttress::breaker::KeyedCircuitBreaker<Strict, buttress::breaker::PerOrigin, Origin>;

fn to(host: &str) -> Request<()> {
    Request::get(format!("http://{host}/")).body(()).unwrap()
}

async fn ask(service: &Keyed, watch: &Watch, host: &str, then: Then) -> bool {
    let before = watch.seen().calls;
    watch.script([then]);
    let _ = service.clone().oneshot(to(host)).await;
    watch.unscript();
    watch.seen().calls > before
}

#[tokio::test(start_paused = true)]
async fn a_circuit_of_a_key_has_all_settings_of_the_layer() {
    let layer = touchy().shadow().per_origin();
    let (inner, watch) = Strict::holding();
    let service = layer.layer(inner);
    ask(&service, &watch, "a", Then::Fail(Oops("down"))).await;
    assert!(ask(&service, &watch, "a", Then::Answer(empty())).await, "shadow mode never rejects");

    let layer = touchy().half_open_queue(1, secs(5)).per_origin();
    let (inner, watch) = Strict::holding();
    let service = layer.layer(inner);
    ask(&service, &watch, "a", Then::Fail(Oops("down"))).await;
    advance(WAIT).await;
    let mut probe = task::spawn(service.clone().oneshot(to("a")));
    assert_pending!(probe.poll());
    let mut waits = task::spawn(service.clone().oneshot(to("a")));
    assert_pending!(waits.poll());
    watch.script([Then::Answer(empty())]);
    assert!(watch.end(1, Ok(empty())));
    assert_ready_ok!(probe.poll());
    assert_ready_ok!(waits.poll());
}

/// A closed circuit without counts is not like new while it remembers its trips or ramps up.
#[tokio::test(start_paused = true)]
async fn a_circuit_that_counts_its_trips_is_not_evicted() {
    for layer in [
        touchy().open_for(OpenDuration::backoff(WAIT, secs(600)).reset_after(secs(60))),
        touchy().ramp(secs(60)),
    ] {
        let layer = layer.per_origin().max_keys(1);
        let (inner, watch) = Strict::holding();
        let (service, handle) = (layer.layer(inner), layer.handle());
        ask(&service, &watch, "a", Then::Fail(Oops("down"))).await;
        advance(WAIT + secs(5)).await;
        ask(&service, &watch, "a", Then::Answer(empty())).await;
        let keys = |handle: &buttress::breaker::KeyedCircuitBreakerHandle<Origin>| {
            handle.all().iter().map(|(key, _)| key.to_string()).collect::<Vec<_>>()
        };
        ask(&service, &watch, "b", Then::Answer(empty())).await;
        assert_eq!(keys(&handle), ["http://a"]);
        advance(secs(61)).await;
        ask(&service, &watch, "b", Then::Answer(empty())).await;
        assert_eq!(keys(&handle), ["http://b"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_circuit_with_settings_of_its_own_is_not_evicted() {
    let layer = touchy().per_origin().max_keys(1);
    let (inner, watch) = Strict::holding();
    let (service, handle) = (layer.layer(inner), layer.handle());
    ask(&service, &watch, "a", Then::Answer(empty())).await;
    let key = handle.all().remove(0).0;
    handle.get(&key).unwrap().set_trip(&Trip::consecutive(9)).unwrap();
    ask(&service, &watch, "b", Then::Answer(empty())).await;
    assert!(handle.get(&key).is_some());
}

/// The circuit of the key opens while the caller waits for a hung service, so the caller is woken and rejected.
#[tokio::test(start_paused = true)]
async fn caller_that_waits_for_a_hung_service_is_woken_by_the_circuit_of_its_key() {
    let layer = touchy().per_origin();
    let (inner, watch) = Strict::holding();
    let service = layer.layer(inner);
    let mut under_way = task::spawn(service.clone().oneshot(to("a")));
    assert_pending!(under_way.poll());
    watch.set_ready(false);
    let mut early = task::spawn(service.clone().call(to("a")));
    assert_pending!(early.poll());
    watch.end(0, Err(Oops("down")));
    assert!(assert_ready!(under_way.poll()).is_err());
    assert!(early.is_woken());
    assert_eq!(refused_as(assert_ready!(early.poll())), RejectedKind::Open);
}

// ===== Callers that wait for the decision =====

#[tokio::test(start_paused = true)]
async fn caller_that_waits_for_a_probe_is_rejected_at_the_probe_timeout() {
    let layer = touchy().half_open_queue(1, secs(60)).probe_timeout(secs(7));
    let rig = Rig::half_open(layer).await;
    let (_probe, _) = rig.hold();
    let mut waits = rig.ask();
    assert_pending!(waits.poll());
    advance(secs(7)).await;
    assert!(waits.is_woken());
    assert_eq!(refused_as(assert_ready!(waits.poll())), RejectedKind::Open);
}
