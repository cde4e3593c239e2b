//! `poll_ready` is pending while the circuit is open: the view of a balancer and of a buffer.

use http::Request;
use tokio::time::advance;
use tokio_test::{assert_pending, assert_ready_ok, task};
use tower::{
    Layer, Service, ServiceExt, balance::p2c::Balance, buffer::Buffer, discover::ServiceList,
    load::Constant,
};
use tower_test::mock::Spawn;

use super::fixtures::*;
use crate::support::{Watch, empty, request};

#[tokio::test(start_paused = true)]
async fn service_is_not_ready_while_the_circuit_is_open_and_is_woken_at_half_open() {
    let rig = Rig::new(touchy().backpressure());
    rig.fail().await;
    let polls = rig.watch.seen().polls;
    let mut held_back = Spawn::new(rig.service.clone());
    assert_pending!(held_back.poll_ready::<Request<()>>());
    advance(WAIT - ms(1)).await;
    assert_pending!(held_back.poll_ready::<Request<()>>());
    assert_eq!(rig.watch.seen().polls, polls, "the inner service is not polled");
    advance(ms(1)).await;
    assert!(held_back.is_woken(), "woken by the timer");
    assert_ready_ok!(held_back.poll_ready::<Request<()>>());
}

#[tokio::test(start_paused = true)]
async fn waiting_caller_is_woken_by_reset_and_by_the_end_of_an_isolation() {
    let rig = Rig::new(touchy().backpressure());
    let mut held_back = Spawn::new(rig.service.clone());
    let isolation = rig.handle.isolate();
    assert_pending!(held_back.poll_ready::<Request<()>>());
    drop(isolation);
    assert!(held_back.is_woken());
    assert_ready_ok!(held_back.poll_ready::<Request<()>>());
    rig.handle.force_open();
    assert_pending!(held_back.poll_ready::<Request<()>>());
    rig.handle.reset();
    assert!(held_back.is_woken());
    assert_ready_ok!(held_back.poll_ready::<Request<()>>());
}

/// When all probe slots are in use, the next caller waits until a slot is released.
#[tokio::test(start_paused = true)]
async fn a_half_open_circuit_is_ready_for_its_probes_only() {
    let rig = Rig::half_open(touchy().backpressure()).await;
    let mut next = Spawn::new(rig.service.clone());
    assert_ready_ok!(next.poll_ready::<Request<()>>());
    let (probe, number) = rig.hold();
    assert_pending!(next.poll_ready::<Request<()>>());
    drop(probe);
    assert!(next.is_woken());
    assert_ready_ok!(next.poll_ready::<Request<()>>());
    let (mut probe, _) = rig.hold();
    assert_pending!(next.poll_ready::<Request<()>>());
    rig.watch.end(number + 1, Ok(empty()));
    assert!(probe.poll().is_ready());
    assert!(next.is_woken());
    assert_ready_ok!(next.poll_ready::<Request<()>>());
}

#[tokio::test(start_paused = true)]
async fn a_buffer_over_an_open_circuit_stays_usable() {
    let rig = Rig::new(touchy().backpressure());
    rig.fail().await;
    let buffer = Buffer::new(rig.service.clone(), 4);
    let mut call = task::spawn(buffer.clone().oneshot(request()));
    assert_pending!(call.poll());
    tokio::task::yield_now().await;
    rig.watch.script([Then::Answer(empty())]);
    advance(WAIT).await;
    for _ in 0..8 {
        tokio::task::yield_now().await;
    }
    assert!(call.is_woken());
    assert_ready_ok!(call.poll());
    assert_eq!(rig.state(), CircuitState::Closed);
}

/// Many calls in flight over p2c: once one of them has failed, later calls go to the other endpoint, and no call is
/// rejected.
#[tokio::test(start_paused = true)]
async fn a_balancer_selects_another_endpoint_and_returns_for_a_probe() {
    let endpoint = || {
        let (inner, watch) = Strict::holding();
        let layer = touchy().backpressure();
        (Constant::new(layer.layer(inner), 0u32), watch, layer.handle())
    };
    let (dead, dead_watch, dead_handle) = endpoint();
    let (good, good_watch, _) = endpoint();
    let mut balance = Balance::new(ServiceList::new::<Request<()>>([dead, good]));
    // The calls end later: when the first one fails, others are in flight to the dead endpoint.
    let (mut under_way, end) = (Vec::new(), |watch: &Watch, answer: fn() -> _| {
        (0..watch.seen().calls).filter(|n| watch.end(*n, answer())).count()
    });
    for _ in 0..40 {
        let mut call = task::spawn(balance.ready().await.expect("ready").call(request()));
        assert_pending!(call.poll());
        under_way.push(call);
    }
    let before = dead_watch.seen().calls;
    assert!((1..40).contains(&before), "{before} of 40 calls reached the dead endpoint");
    end(&dead_watch, || Err(Oops("dead")));
    end(&good_watch, || Ok(empty()));
    under_way.iter_mut().for_each(|call| assert!(call.poll().is_ready()));
    assert_eq!(dead_handle.state(), CircuitState::Open);
    for _ in 0..100 {
        // Yields, because no call in this loop waits, and tokio's coop budget would be used up.
        tokio::task::yield_now().await;
        let mut call = task::spawn(balance.ready().await.expect("ready").call(request()));
        assert_pending!(call.poll());
        end(&good_watch, || Ok(empty()));
        assert_ready_ok!(call.poll(), "no call is rejected");
    }
    assert_eq!(dead_watch.seen().calls, before, "no call reaches the dead endpoint");
    // The circuit is half-open: one probe is sent, and the next one only after the circuit has been open again.
    advance(WAIT).await;
    for _ in 0..100 {
        // Yields, because no call in this loop waits, and tokio's coop budget would be used up.
        tokio::task::yield_now().await;
        let mut call = task::spawn(balance.ready().await.expect("ready").call(request()));
        assert_pending!(call.poll());
        end(&good_watch, || Ok(empty()));
        end(&dead_watch, || Err(Oops("dead")));
        assert!(call.poll().is_ready());
    }
    assert_eq!(dead_watch.seen().calls, before + 1, "only the probe");
    assert_eq!(dead_handle.snapshot().rejected, 0);
}

// ===== Missed wake-ups and leaked reservations =====

/// The circuit opens after `poll_ready` has returned `Ready`: the next poll is pending, and the reservation of the
/// inner service is released.
#[tokio::test(start_paused = true)]
async fn a_second_poll_is_pending_after_the_circuit_has_opened() {
    let rig = Rig::new(touchy().backpressure());
    let mut ready = Spawn::new(rig.service.clone());
    assert_ready_ok!(ready.poll_ready::<Request<()>>());
    rig.fail().await;
    assert_pending!(ready.poll_ready::<Request<()>>());
    assert_eq!(rig.watch.seen().reserved, 0);
    advance(WAIT).await;
    assert!(ready.is_woken());
    assert_ready_ok!(ready.poll_ready::<Request<()>>());
}

#[tokio::test(start_paused = true)]
async fn waiting_caller_is_woken_at_the_probe_timeout_and_at_the_end_of_the_open_time() {
    let rig = Rig::half_open(touchy().backpressure().probe_timeout(secs(7))).await;
    let (_probe, _) = rig.hold();
    let mut held_back = Spawn::new(rig.service.clone());
    assert_pending!(held_back.poll_ready::<Request<()>>());
    advance(secs(7)).await;
    assert!(held_back.is_woken());
    assert_pending!(held_back.poll_ready::<Request<()>>());
    advance(WAIT).await;
    assert!(held_back.is_woken());
    assert_ready_ok!(held_back.poll_ready::<Request<()>>());
}

/// The waker was registered for the end of an open state of 30 s. The open state that follows a reset ends sooner.
#[tokio::test(start_paused = true)]
async fn waiting_caller_is_woken_at_the_end_of_a_shorter_open_time() {
    let rig = Rig::new(touchy().backpressure());
    rig.fail().await;
    let mut held_back = Spawn::new(rig.service.clone());
    assert_pending!(held_back.poll_ready::<Request<()>>());
    rig.handle.set_open_for(secs(1)).unwrap();
    rig.handle.reset();
    rig.fail().await;
    assert_pending!(held_back.poll_ready::<Request<()>>());
    advance(secs(1)).await;
    assert!(held_back.is_woken());
    assert_ready_ok!(held_back.poll_ready::<Request<()>>());
}

#[tokio::test(start_paused = true)]
async fn shadow_mode_wakes_waiting_callers() {
    let rig = Rig::new(touchy().backpressure());
    rig.fail().await;
    let mut held_back = Spawn::new(rig.service.clone());
    assert_pending!(held_back.poll_ready::<Request<()>>());
    rig.handle.set_shadow(true);
    assert!(held_back.is_woken());
    assert_ready_ok!(held_back.poll_ready::<Request<()>>());
}

// ===== The ramp =====

/// A rejection arrives at once, so a balancer would take an endpoint that rejects for the least loaded one. During the
/// ramp the layer therefore rejects no call: `poll_ready` is pending for a part of each second, and this part shrinks.
#[tokio::test(start_paused = true)]
async fn ready_share_of_the_time_grows_on_a_ramp_and_no_call_is_rejected() {
    let rig = Rig::half_open(touchy().ramp(secs(100)).backpressure()).await;
    rig.ok().await;
    let mut service = Spawn::new(rig.service.clone());
    let mut ready = Vec::new();
    for _ in 0..10 {
        let mut times = 0;
        for _ in 0..1000 {
            if service.poll_ready::<Request<()>>().is_ready() {
                times += 1;
                rig.watch.script([Then::Answer(empty())]);
                assert_ready_ok!(
                    task::spawn(service.call(request())).poll(),
                    "no call is rejected"
                );
            }
            advance(ms(10)).await;
        }
        ready.push(times);
    }
    // The number of ready polls of 1000. The ready share of a second is 10 % in the first one and 99.1 % in the last.
    assert!(ready.windows(2).all(|pair| pair[0] < pair[1]), "{ready:?}");
    assert!((120..170).contains(&ready[0]) && ready[9] > 900, "{ready:?}");
    let all: usize = ready.iter().sum();
    assert!((5300..5700).contains(&all), "{all}");
    assert_eq!(rig.handle.snapshot().rejected, 0);
}

#[tokio::test(start_paused = true)]
async fn waiting_caller_is_woken_in_the_next_second_of_a_ramp() {
    let rig = Rig::half_open(touchy().ramp(secs(100)).backpressure()).await;
    rig.ok().await;
    let mut held_back = Spawn::new(rig.service.clone());
    assert_ready_ok!(held_back.poll_ready::<Request<()>>());
    advance(ms(100)).await;
    assert_pending!(
        held_back.poll_ready::<Request<()>>(),
        "the ready tenth of the second has ended"
    );
    advance(ms(899)).await;
    assert!(!held_back.is_woken());
    advance(ms(1)).await;
    assert!(held_back.is_woken(), "woken by the timer");
    assert_ready_ok!(held_back.poll_ready::<Request<()>>());
    // The ready part of the second has ended before the call: `poll_ready` stays ready until the call.
    advance(ms(500)).await;
    rig.watch.script([Then::Answer(empty())]);
    assert_ready_ok!(task::spawn(held_back.call(request())).poll());
    assert_eq!(rig.handle.snapshot().rejected, 0);
}
