//! Models that try all interleavings of calls, probes and manual changes.

use loom::{sync::Arc, thread};

use super::super::{circuit::Circuit, open_duration::OpenDuration};
use super::*;
use crate::{outcome::Outcome, permit::Slot};

fn machine(trip: Trip) -> SyncMachine {
    let settings = CircuitSettings {
        open_for: OpenDuration::fixed(Duration::from_nanos(100)),
        probes: 1,
        needed: 1,
        probe_timeout: Duration::from_nanos(1000),
        ramp: Duration::ZERO,
        external_probes: false,
        backpressure: false,
        count_cancelled_after: None,
    };
    SyncMachine::new(Slot::<Circuit>::allocate().word(), trip, settings, false)
}

fn ended(outcome: Outcome) -> Ended {
    Ended { outcome, took: 0 }
}

fn admit(machine: &SyncMachine, now: Nanos) -> Option<CircuitToken> {
    machine.admit(false, || now, || 0.0).0.ok()
}

fn release(
    machine: &SyncMachine,
    token: CircuitToken,
    outcome: Outcome,
    now: Nanos,
) -> Option<Transition> {
    machine.release(token, ended(outcome), || now, || 0.0)
}

/// Two calls fail at the same time, at a threshold of one. One of them trips the circuit, and the other is late.
#[test]
fn loom_trips_exactly_once() {
    loom::model(|| {
        let machine = Arc::new(machine(Trip::consecutive(1)));
        let tokens = [admit(&machine, 0).unwrap(), admit(&machine, 0).unwrap()];
        let threads = tokens.map(|token| {
            let machine = machine.clone();
            thread::spawn(move || release(&machine, token, Outcome::failure(), 1).is_some())
        });
        let trips = threads.map(|thread| thread.join().unwrap());
        assert_eq!(trips.iter().filter(|tripped| **tripped).count(), 1);
        assert_eq!(machine.with(|machine, _| machine.opened()), 1);
        assert_eq!(machine.state(|| 1, || 0.0).0, CircuitState::Open);
    });
}

/// Two calls compete for one probe slot. Each probe is cancelled and releases the slot for the next call.
#[test]
fn loom_probe_permits_under_cancel() {
    loom::model(|| {
        let machine = Arc::new(machine(Trip::consecutive(1)));
        let first = admit(&machine, 0).unwrap();
        release(&machine, first, Outcome::failure(), 0);
        let threads = [0, 1].map(|_| {
            let machine = machine.clone();
            thread::spawn(move || {
                let probe = admit(&machine, 100);
                let under_way = machine.with(|machine, _| machine.probes_in_flight());
                assert!(under_way <= 1);
                if let Some(probe) = probe {
                    release(&machine, probe, Outcome::cancelled(), 100);
                }
                probe.is_some()
            })
        });
        let went = threads.map(|thread| thread.join().unwrap());
        assert!(went.contains(&true));
        assert_eq!(machine.with(|machine, _| machine.probes_in_flight()), 0);
        assert!(admit(&machine, 100).is_some(), "no slot was lost");
    });
}

/// A call from before the trip fails while the probe succeeds. Only the probe counts, in any order.
#[test]
fn loom_late_results_change_nothing() {
    loom::model(|| {
        let machine = Arc::new(machine(Trip::consecutive(1)));
        let straggler = admit(&machine, 0).unwrap();
        let first = admit(&machine, 0).unwrap();
        release(&machine, first, Outcome::failure(), 0);
        let probe = admit(&machine, 100).unwrap();
        let late = {
            let machine = machine.clone();
            thread::spawn(move || release(&machine, straggler, Outcome::failure(), 100))
        };
        let verdict = release(&machine, probe, Outcome::success(), 100);
        assert_eq!(verdict.map(|change| change.to), Some(CircuitState::Closed));
        assert_eq!(late.join().unwrap(), None);
        assert_eq!(machine.state(|| 100, || 0.0).0, CircuitState::Closed);
    });
}

/// A probe succeeds at the end of its timeout, while another thread reads the state. The timeout ends once.
#[test]
fn loom_a_lease_ends_exactly_once() {
    loom::model(|| {
        let machine = Arc::new(machine(Trip::consecutive(1)));
        let first = admit(&machine, 0).unwrap();
        release(&machine, first, Outcome::failure(), 0);
        let probe = admit(&machine, 100).unwrap();
        let looks = {
            let machine = machine.clone();
            thread::spawn(move || machine.state(|| 1100, || 0.0))
        };
        let ended = release(&machine, probe, Outcome::success(), 1100);
        let (state, lasts, seen) = looks.join().unwrap();
        assert_eq!((state, lasts), (CircuitState::Open, Some(Duration::from_nanos(100))));
        assert!(ended.is_some() != seen.is_some(), "the change is returned once");
        assert_eq!(machine.with(|machine, _| machine.opened()), 2);
    });
}

/// A probe succeeds while another thread forces the circuit open. The forced state stays.
#[test]
fn loom_a_probe_does_not_undo_what_was_forced() {
    loom::model(|| {
        let machine = Arc::new(machine(Trip::consecutive(1)));
        let first = admit(&machine, 0).unwrap();
        release(&machine, first, Outcome::failure(), 0);
        let probe = admit(&machine, 100).unwrap();
        let forces = {
            let machine = machine.clone();
            thread::spawn(move || {
                machine.with(|machine, times| machine.force(CircuitState::ForcedOpen, 100, times));
            })
        };
        release(&machine, probe, Outcome::success(), 100);
        forces.join().unwrap();
        assert_eq!(machine.state(|| 100, || 0.0).0, CircuitState::ForcedOpen);
        assert!(admit(&machine, 100).is_none());
        assert_eq!(machine.with(|machine, _| machine.probes_in_flight()), 0);
    });
}

/// Two isolations overlap, and a call arrives. It is admitted only without isolations, and counts at its end.
#[test]
fn loom_isolations_are_counted_and_leave_no_trace() {
    loom::model(|| {
        let machine = Arc::new(machine(Trip::consecutive(2)));
        let isolate =
            |machine: &SyncMachine, more| machine.with(|machine, _| machine.isolate(more, 0));
        isolate(&machine, true);
        let other = {
            let machine = machine.clone();
            thread::spawn(move || {
                isolate(&machine, true);
                assert!(admit(&machine, 0).is_none());
                isolate(&machine, false);
            })
        };
        isolate(&machine, false);
        let went = admit(&machine, 0);
        other.join().unwrap();
        let token = admit(&machine, 0).expect("no isolation is left");
        if let Some(went) = went {
            release(&machine, went, Outcome::failure(), 0);
        }
        release(&machine, token, Outcome::failure(), 0);
        let open = if went.is_some() { CircuitState::Open } else { CircuitState::Closed };
        assert_eq!(machine.state(|| 0, || 0.0).0, open);
    });
}

/// A success is recorded without the lock at the beginning of a new stretch, while another thread rotates the window.
/// No call is lost.
#[test]
fn loom_window_rotation_loses_nothing() {
    loom::model(|| {
        let rule = Trip::failure_ratio(0.5).within(Duration::from_nanos(100)).min_calls(100);
        let machine = Arc::new(machine(rule));
        let token = admit(&machine, 0).unwrap();
        let good = {
            let machine = machine.clone();
            thread::spawn(move || {
                release(&machine, token, Outcome::success(), 15);
            })
        };
        release(&machine, token, Outcome::failure(), 15);
        good.join().unwrap();
        let seen = machine.with(|machine, times| machine.call_stats(15, times));
        assert_eq!((seen.window_calls, seen.window_failures), (2, 1));
    });
}
