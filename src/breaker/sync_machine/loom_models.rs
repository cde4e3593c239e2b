//! Models that try all interleavings of calls, probes and manual changes.

use loom::{sync::Arc, thread};

use super::super::{circuit::Circuit, open_duration::OpenDuration};
use super::*;
use crate::{outcome::Outcome, permit::Slot};

fn cell(trip: Trip) -> Cell {
    let settings = CircuitSettings {
        open_for: OpenDuration::fixed(Duration::from_nanos(100)),
        probes: 1,
        needed: 1,
        lease: Duration::from_nanos(1000),
        ramp: Duration::ZERO,
        outside_probes: false,
        uses_backpressure: false,
        count_cancelled_after: None,
    };
    Cell::new(Slot::<Circuit>::allocate().word(), trip, settings, false)
}

fn ended(outcome: Outcome) -> Ended {
    Ended { outcome, took: 0 }
}

fn admit(cell: &Cell, now: Nanos) -> Option<Ticket> {
    cell.admit(false, || now, || 0.0).0.ok()
}

fn finish(cell: &Cell, ticket: Ticket, outcome: Outcome, now: Nanos) -> Option<Transition> {
    cell.finish(ticket, ended(outcome), || now, || 0.0)
}

/// Two calls fail at the same time, at a threshold of one. One of them trips the circuit, and the other is late.
#[test]
fn loom_trips_exactly_once() {
    loom::model(|| {
        let cell = Arc::new(cell(Trip::consecutive(1)));
        let tickets = [admit(&cell, 0).unwrap(), admit(&cell, 0).unwrap()];
        let threads = tickets.map(|ticket| {
            let cell = cell.clone();
            thread::spawn(move || finish(&cell, ticket, Outcome::failure(), 1).is_some())
        });
        let trips = threads.map(|thread| thread.join().unwrap());
        assert_eq!(trips.iter().filter(|tripped| **tripped).count(), 1);
        assert_eq!(cell.with(|machine, _| machine.opened()), 1);
        assert_eq!(cell.state(|| 1, || 0.0).0, CircuitState::Open);
    });
}

/// Two calls compete for one probe slot. Each probe is cancelled and releases the slot for the next call.
#[test]
fn loom_probe_permits_under_cancel() {
    loom::model(|| {
        let cell = Arc::new(cell(Trip::consecutive(1)));
        let first = admit(&cell, 0).unwrap();
        finish(&cell, first, Outcome::failure(), 0);
        let threads = [0, 1].map(|_| {
            let cell = cell.clone();
            thread::spawn(move || {
                let probe = admit(&cell, 100);
                let under_way = cell.with(|machine, _| machine.probes_under_way());
                assert!(under_way <= 1);
                if let Some(probe) = probe {
                    finish(&cell, probe, Outcome::cancelled(), 100);
                }
                probe.is_some()
            })
        });
        let went = threads.map(|thread| thread.join().unwrap());
        assert!(went.contains(&true));
        assert_eq!(cell.with(|machine, _| machine.probes_under_way()), 0);
        assert!(admit(&cell, 100).is_some(), "no slot was lost");
    });
}

/// A call from before the trip fails while the probe succeeds. Only the probe counts, in any order.
#[test]
fn loom_late_results_change_nothing() {
    loom::model(|| {
        let cell = Arc::new(cell(Trip::consecutive(1)));
        let straggler = admit(&cell, 0).unwrap();
        let first = admit(&cell, 0).unwrap();
        finish(&cell, first, Outcome::failure(), 0);
        let probe = admit(&cell, 100).unwrap();
        let late = {
            let cell = cell.clone();
            thread::spawn(move || finish(&cell, straggler, Outcome::failure(), 100))
        };
        let verdict = finish(&cell, probe, Outcome::success(), 100);
        assert_eq!(verdict.map(|change| change.to), Some(CircuitState::Closed));
        assert_eq!(late.join().unwrap(), None);
        assert_eq!(cell.state(|| 100, || 0.0).0, CircuitState::Closed);
    });
}

/// A probe succeeds at the end of its timeout, while another thread reads the state. The timeout ends once.
#[test]
fn loom_a_lease_ends_exactly_once() {
    loom::model(|| {
        let cell = Arc::new(cell(Trip::consecutive(1)));
        let first = admit(&cell, 0).unwrap();
        finish(&cell, first, Outcome::failure(), 0);
        let probe = admit(&cell, 100).unwrap();
        let looks = {
            let cell = cell.clone();
            thread::spawn(move || cell.state(|| 1100, || 0.0))
        };
        let ended = finish(&cell, probe, Outcome::success(), 1100);
        let (state, lasts, seen) = looks.join().unwrap();
        assert_eq!((state, lasts), (CircuitState::Open, Some(Duration::from_nanos(100))));
        assert!(ended.is_some() != seen.is_some(), "the change is returned once");
        assert_eq!(cell.with(|machine, _| machine.opened()), 2);
    });
}

/// A probe succeeds while another thread forces the circuit open. The forced state stays.
#[test]
fn loom_a_probe_does_not_undo_what_was_forced() {
    loom::model(|| {
        let cell = Arc::new(cell(Trip::consecutive(1)));
        let first = admit(&cell, 0).unwrap();
        finish(&cell, first, Outcome::failure(), 0);
        let probe = admit(&cell, 100).unwrap();
        let forces = {
            let cell = cell.clone();
            thread::spawn(move || {
                cell.with(|machine, times| machine.force(CircuitState::ForcedOpen, 100, times));
            })
        };
        finish(&cell, probe, Outcome::success(), 100);
        forces.join().unwrap();
        assert_eq!(cell.state(|| 100, || 0.0).0, CircuitState::ForcedOpen);
        assert!(admit(&cell, 100).is_none());
        assert_eq!(cell.with(|machine, _| machine.probes_under_way()), 0);
    });
}

/// Two isolations overlap, and a call arrives. It is admitted only without isolations, and counts at its end.
#[test]
fn loom_isolations_are_counted_and_leave_no_trace() {
    loom::model(|| {
        let cell = Arc::new(cell(Trip::consecutive(2)));
        let isolate = |cell: &Cell, more| cell.with(|machine, _| machine.isolate(more));
        isolate(&cell, true);
        let other = {
            let cell = cell.clone();
            thread::spawn(move || {
                isolate(&cell, true);
                assert!(admit(&cell, 0).is_none());
                isolate(&cell, false);
            })
        };
        isolate(&cell, false);
        let went = admit(&cell, 0);
        other.join().unwrap();
        let ticket = admit(&cell, 0).expect("no isolation is left");
        if let Some(went) = went {
            finish(&cell, went, Outcome::failure(), 0);
        }
        finish(&cell, ticket, Outcome::failure(), 0);
        let open = if went.is_some() { CircuitState::Open } else { CircuitState::Closed };
        assert_eq!(cell.state(|| 0, || 0.0).0, open);
    });
}

/// A success is recorded without the lock at the beginning of a new stretch, while another thread rotates the window.
/// No call is lost.
#[test]
fn loom_window_rotation_loses_nothing() {
    loom::model(|| {
        let rule = Trip::failure_ratio(0.5).within(Duration::from_nanos(100)).min_calls(100);
        let cell = Arc::new(cell(rule));
        let ticket = admit(&cell, 0).unwrap();
        let good = {
            let cell = cell.clone();
            thread::spawn(move || {
                finish(&cell, ticket, Outcome::success(), 15);
            })
        };
        finish(&cell, ticket, Outcome::failure(), 15);
        good.join().unwrap();
        let seen = cell.with(|machine, times| machine.seen(15, times));
        assert_eq!((seen.window_calls, seen.window_failures), (2, 1));
    });
}
