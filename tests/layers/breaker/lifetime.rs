//! Circuits are dropped and created, and calls outlive their circuits.

use std::{future::poll_fn, mem, sync::mpsc, task::Poll, thread};

use buttress::{BoxError, breaker::CallStats};
use futures_util::{FutureExt, future::BoxFuture};
use tokio_test::{assert_pending, assert_ready, task};
use tower::{Layer, ServiceExt, service_fn};

use super::fixtures::*;
use crate::support::empty;

/// Calls in flight whose circuits have been dropped: circuits of each kind and in each state.
async fn gone() -> Vec<(Call, usize, Watch)> {
    let forced = Rig::new(touchy());
    forced.handle.force_closed();
    let unwell = Rig::new(CircuitBreakerLayer::new(Trip::consecutive(9)));
    unwell.fail().await;
    let shadow = Rig::new(touchy().shadow());
    let shadowed = Rig::new(touchy().shadow());
    shadowed.handle.force_open();
    let slow = Trip::slow_ratio(0.5, secs(9)).min_calls(1);
    let failed = Trip::failure_ratio(0.5).min_calls(1);
    let rigs = [
        Rig::new(touchy()),
        Rig::new(CircuitBreakerLayer::new(slow)),
        Rig::new(CircuitBreakerLayer::new(failed.clone())),
        Rig::new(CircuitBreakerLayer::new(failed.over(2))),
        Rig::half_open(touchy()).await,
        forced,
        unwell,
        shadow,
        shadowed,
    ];
    let calls = rigs.map(|rig| {
        let (call, number) = rig.hold();
        (call, number, rig.watch)
    });
    calls.into()
}

/// The ends of these calls do not change circuits that are created later. Those count their own calls.
#[tokio::test(start_paused = true)]
async fn circuit_is_not_changed_by_calls_of_a_dropped_circuit() {
    let mut dice = fastrand::Rng::with_seed(7);
    let mut under_way = Vec::new();
    for round in 0..200 {
        under_way.extend(gone().await);
        dice.shuffle(&mut under_way);
        let live: Vec<_> = (0..12)
            .map(|_| {
                let rig = Rig::new(touchy());
                let own = rig.hold();
                (rig, own)
            })
            .collect();
        for (mut call, number, watch) in under_way.split_off(dice.usize(..10)) {
            let ends = match dice.u8(..3) {
                0 => continue,
                1 => Ok(empty()),
                _ => Err(Oops("late")),
            };
            assert!(watch.end(number, ends));
            let _ = assert_ready!(call.poll());
        }
        for (rig, (mut own, number)) in live {
            let seen = rig.handle.snapshot();
            assert_eq!((seen.state, seen.opened), (CircuitState::Closed, 0), "round {round}");
            assert_eq!(seen.seen, CallStats::default(), "round {round}");
            assert!(rig.watch.end(number, Err(Oops("down"))));
            let _ = assert_ready!(own.poll());
            assert_eq!(rig.state(), CircuitState::Open, "round {round}");
        }
    }
}

/// The calls end in another thread while their circuit is dropped and the next one is created.
#[test]
fn circuit_dropped_while_its_call_ends_leaves_a_clean_slot() {
    type Late = BoxFuture<'static, Result<(), BoxError>>;

    /// A service whose calls are pending at the first poll and fail at the second one.
    async fn fails(_: ()) -> Result<(), BoxError> {
        let mut asked = false;
        poll_fn(|_| if mem::replace(&mut asked, true) { Poll::Ready(()) } else { Poll::Pending })
            .await;
        Err("late".into())
    }
    let rule = || CircuitBreakerLayer::new(Trip::consecutive(1)).per_response();
    let pairs: Vec<_> = (0..4)
        .map(|_| {
            thread::spawn(move || {
                let (to, ends) = mpsc::sync_channel::<task::Spawn<Late>>(0);
                let ender = thread::spawn(move || {
                    for mut call in ends {
                        assert!(assert_ready!(call.poll()).is_err());
                    }
                });
                for round in 0..20_000 {
                    let layer = rule();
                    let mut call = task::spawn(layer.layer(service_fn(fails)).oneshot(()).boxed());
                    assert_pending!(call.poll());
                    to.send(call).unwrap();
                    drop(layer);
                    let next = rule().handle();
                    assert_eq!(next.state(), CircuitState::Closed, "round {round}");
                    next.record(buttress::Outcome::success());
                    let seen = next.snapshot();
                    assert_eq!(
                        (seen.opened, seen.seen),
                        (0, CallStats::default()),
                        "round {round}"
                    );
                }
                drop(to);
                ender.join().unwrap();
            })
        })
        .collect();
    pairs.into_iter().for_each(|pair| pair.join().unwrap());
}
