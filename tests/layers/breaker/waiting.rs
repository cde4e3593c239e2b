//! The open time, the decision of the half-open probes, and the callers that wait for it.

use buttress::Deadline;
use tokio::time::advance;
use tokio_test::{assert_pending, assert_ready, assert_ready_ok, task};
use tower::Service;

use super::fixtures::*;
use crate::support::{empty, refused_as, request, status};

// ===== The open time =====

impl Rig {
    /// Returns the open time after each of the next trips, in milliseconds. Every probe fails.
    async fn waits(&self, trips: usize) -> Vec<u64> {
        let mut waits = Vec::new();
        for _ in 0..trips {
            self.fail().await;
            let wait = self.handle.snapshot().open_for.expect("open");
            waits.push(wait.as_millis() as u64);
            advance(wait).await;
        }
        waits
    }
}

#[tokio::test(start_paused = true)]
async fn a_fixed_open_time_is_the_same_each_time() {
    assert_eq!(Rig::new(touchy().open_for(secs(3))).waits(4).await, [3000; 4]);
}

#[tokio::test(start_paused = true)]
async fn open_time_doubles_up_to_its_maximum_and_restarts_after_a_quiet_time() {
    let wait = OpenDuration::backoff(secs(1), secs(5)).jitter(0.0).reset_after(secs(10));
    let rig = Rig::new(touchy().open_for(wait));
    assert_eq!(rig.waits(4).await, [1000, 2000, 4000, 5000]);
    rig.ok().await;
    advance(secs(10) - ms(1)).await;
    assert_eq!(rig.waits(1).await, [5000], "closed for less than reset_after");
    rig.ok().await;
    advance(secs(10)).await;
    assert_eq!(rig.waits(2).await, [1000, 2000]);
    rig.handle.reset();
    assert_eq!(rig.waits(1).await, [1000], "a reset forgets the trips at once");
    let rig = Rig::new(touchy().open_for(wait.factor(3.0)));
    assert_eq!(rig.waits(3).await, [1000, 3000, 5000]);
}

#[tokio::test(start_paused = true)]
async fn jitter_extends_the_open_time_by_up_to_its_share() {
    let rig = Rig::new(touchy().open_for(OpenDuration::fixed(secs(10)).jitter(0.5)));
    let waits = rig.waits(50).await;
    assert!(waits.iter().all(|wait| (10_000..15_000).contains(wait)), "{waits:?}");
    assert!(waits.iter().any(|wait| *wait != waits[0]), "{waits:?}");
}

#[tokio::test(start_paused = true)]
async fn open_time_follows_retry_after_up_to_a_maximum() {
    let wait = OpenDuration::fixed(secs(10)).follow_retry_after(secs(60));
    for (says, waits) in [("5", 10), ("42", 42), ("3600", 60), ("soon", 10)] {
        let rig = Rig::new(touchy().open_for(wait));
        let mut busy = status(503);
        busy.headers_mut().insert("retry-after", says.parse().unwrap());
        rig.call(Then::Answer(busy)).await;
        assert_eq!(rig.handle.snapshot().open_for, Some(secs(waits)), "{says}");
    }
    // A hint is ignored by default. With `follow_retry_after`, the hint of a throttled probe counts as well.
    let busy = || {
        let mut busy = status(429);
        busy.headers_mut().insert("retry-after", "42".parse().unwrap());
        Then::Answer(busy)
    };
    for (layer, waits) in [(touchy(), WAIT), (touchy().open_for(wait), secs(42))] {
        let rig = Rig::half_open(layer).await;
        rig.call(busy()).await;
        assert_eq!(rig.handle.snapshot().open_for, Some(waits));
    }
}

// ===== m of n =====

#[tokio::test(start_paused = true)]
async fn half_open_ends_as_soon_as_the_result_is_certain() {
    // Two of three probes must pass. Each row: the outcomes, the number of probes that make the result certain, the
    // result.
    for (answers, certain, state) in [
        ([true, true, false], 2, CircuitState::Closed),
        ([true, false, true], 3, CircuitState::Closed),
        ([false, true, true], 3, CircuitState::Closed),
        ([false, false, true], 2, CircuitState::Open),
        ([false, true, false], 3, CircuitState::Open),
    ] {
        let rig = Rig::half_open(touchy().half_open_of(2, 3)).await;
        let mut probes = [rig.hold(), rig.hold(), rig.hold()];
        assert_eq!(rig.refused().await, RejectedKind::Probing);
        for (n, ((probe, number), good)) in probes.iter_mut().zip(answers).enumerate() {
            let expected = if n < certain { CircuitState::HalfOpen } else { state };
            assert_eq!(rig.state(), expected, "{answers:?} after {n}");
            rig.watch.end(*number, if good { Ok(empty()) } else { Err(Oops("down")) });
            let _ = assert_ready!(probe.poll());
        }
        assert_eq!(rig.state(), state, "{answers:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn cancelled_probes_release_their_slots_and_failed_probes_do_not() {
    let rig = Rig::half_open(touchy().half_open_of(2, 3)).await;
    for _ in 0..10 {
        drop(rig.hold());
    }
    rig.fail().await;
    rig.ok().await;
    let (last, _) = rig.hold();
    assert_eq!(rig.refused().await, RejectedKind::Probing);
    drop(last);
    rig.ok().await;
    assert_eq!(rig.state(), CircuitState::Closed);
}

// ===== Callers that wait for the decision =====

fn patient(callers: u32) -> CircuitBreakerLayer {
    touchy().half_open_queue(callers, secs(5))
}

#[tokio::test(start_paused = true)]
async fn waiting_caller_is_admitted_on_close_and_rejected_on_open() {
    for good in [true, false] {
        let rig = Rig::half_open(patient(2)).await;
        let (mut probe, number) = rig.hold();
        let mut waiting = [rig.ask(), rig.ask()];
        for call in &mut waiting {
            assert_pending!(call.poll());
        }
        assert_eq!(
            rig.refused().await,
            RejectedKind::Probing,
            "the maximum of waiting callers is two"
        );
        rig.watch.end(number, if good { Ok(empty()) } else { Err(Oops("down")) });
        let _ = assert_ready!(probe.poll());
        for (n, call) in waiting.iter_mut().enumerate() {
            assert!(call.is_woken());
            if good {
                assert_pending!(call.poll());
                rig.watch.end(number + 1 + n, Ok(empty()));
                assert_ready_ok!(call.poll());
            } else {
                assert_eq!(refused_as(assert_ready!(call.poll())), RejectedKind::Open);
            }
        }
        assert_eq!(rig.watch.seen().without_ready, 0);
    }
}

#[tokio::test(start_paused = true)]
async fn waiting_caller_is_rejected_in_time_and_leaves_the_queue() {
    let rig = Rig::half_open(patient(1)).await;
    let (_probe, _) = rig.hold();
    let mut waits = rig.ask();
    assert_pending!(waits.poll());
    advance(secs(5)).await;
    assert!(waits.is_woken());
    assert_eq!(refused_as(assert_ready!(waits.poll())), RejectedKind::Probing);
    // A caller that is cancelled at any point releases its position as well.
    for polls in [0, 1, 2] {
        let mut waits = rig.ask();
        for _ in 0..polls {
            assert_pending!(waits.poll());
        }
        drop(waits);
    }
    let mut waits = rig.ask();
    assert_pending!(waits.poll(), "the position is free");
    assert_eq!(rig.refused().await, RejectedKind::Probing);
}

/// The caller of the probe hangs up: a waiting caller takes the probe slot and is not rejected.
#[tokio::test(start_paused = true)]
async fn waiting_caller_acquires_the_slot_of_a_cancelled_probe() {
    let rig = Rig::half_open(patient(2)).await;
    let (probe, number) = rig.hold();
    let (mut first, mut second) = (rig.ask(), rig.ask());
    assert_pending!(first.poll());
    assert_pending!(second.poll());
    drop(probe);
    assert!(first.is_woken() && second.is_woken());
    assert_pending!(first.poll());
    assert_pending!(second.poll());
    assert_eq!((rig.watch.seen().calls, rig.handle.snapshot().probes), (number + 2, 1));
    rig.watch.end(number + 1, Ok(empty()));
    assert_ready_ok!(first.poll());
    assert!(second.is_woken());
    assert_pending!(second.poll());
    rig.watch.end(number + 2, Ok(empty()));
    assert_ready_ok!(second.poll());
    assert_eq!(rig.state(), CircuitState::Closed);
}

/// The inner service is not ready before the deadline: the call is rejected, counted and named. Shadow mode does not
/// reject it.
#[tokio::test(start_paused = true)]
async fn caller_that_waits_for_the_inner_service_is_rejected_at_its_deadline() {
    for shadow in [false, true] {
        let rig = Rig::new(touchy().name("search"));
        rig.handle.set_shadow(shadow);
        rig.watch.set_ready(false);
        let mut due = request();
        due.extensions_mut().insert(Deadline::after(ms(300)));
        let mut call = task::spawn(rig.service.clone().call(due));
        for _ in 0..2 {
            assert_pending!(call.poll());
            advance(ms(200)).await;
        }
        if shadow {
            assert_pending!(call.poll());
        } else {
            let told = assert_ready!(call.poll()).unwrap_err();
            let told = buttress::Rejected::find(&*told).unwrap();
            assert_eq!((told.kind(), told.name()), (RejectedKind::DeadlinePassed, Some("search")));
        }
        assert_eq!(rig.handle.snapshot().rejected, u64::from(!shadow));
    }
}
