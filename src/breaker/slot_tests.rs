//! Calls that are released by the slot of a circuit, also after another circuit has taken the slot.

use std::sync::Arc;

use super::{
    circuit::Circuit,
    state::{CircuitSettings, CircuitState},
    trip::Trip,
};
use crate::{
    outcome::Outcome,
    permit::{OwnedSlot, Release, Slot, SlotOwner},
};

fn circuit(slot: &'static Slot<Circuit>) -> Arc<Circuit> {
    let (trip, settings) = (Trip::consecutive(1), CircuitSettings::DEFAULT);
    let circuit = Arc::new(Circuit::in_slot(OwnedSlot::of(slot), trip, settings, None));
    slot.register(Arc::downgrade(&circuit));
    circuit
}

/// Takes a slot that this thread has recycled from the free list. Returns whether it was there.
fn take(slot: &'static Slot<Circuit>) -> bool {
    Circuit::free_slots().remove(slot)
}

#[cfg(not(buttress_loom))]
mod unit_tests {
    use super::super::{
        policy::{Breaker, CircuitRef},
        trip::CallStats,
    };
    use super::*;
    use crate::{
        admission::Policy,
        permit::{Permit, ShardOrSlot},
    };

    #[test]
    fn late_call_does_not_change_the_next_circuit_of_its_slot() {
        for _ in 0..1000 {
            let slot = Slot::allocate();
            let first = circuit(slot);
            let tokens = [Outcome::failure(), Outcome::success(), Outcome::cancelled()]
                .map(|late| (first.admit(|| None).expect("closed"), late));
            drop(first);
            for (token, late) in tokens {
                slot.release(token, late);
            }
            // Another test may have taken the slot.
            if !take(slot) {
                continue;
            }
            let second = circuit(slot);
            let own = second.admit(|| None).expect("closed");
            for (token, late) in tokens {
                assert_ne!(token.tag, own.tag);
                slot.release(token, late);
            }
            assert_eq!(second.state().0, CircuitState::Closed);
            let seen = second.read(|machine, times, now| machine.call_stats(now, times));
            assert_eq!(seen, CallStats::default());
            slot.release(own, Outcome::failure());
            assert_eq!(second.state().0, CircuitState::Open, "its own calls count");
            return;
        }
        panic!("another test took the slot each time");
    }

    /// The slot looks up its circuit under a lock, so a call that changes the machine must hold the circuit itself.
    #[test]
    fn call_holds_the_slot_only_while_a_success_changes_nothing() {
        fn permit(breaker: &Breaker) -> Permit<CircuitRef> {
            let token = Circuit::admit(breaker, || None).expect("closed");
            Policy::<()>::permit(breaker, token)
        }

        fn holds_slot(breaker: &Breaker) -> bool {
            matches!(permit(breaker).state(), Some(ShardOrSlot::Slot(_)))
        }
        let breaker =
            Breaker::new(Trip::failure_ratio(0.5).over(2).min_calls(1), CircuitSettings::DEFAULT);
        for is_clean in [false, false, true, true] {
            assert_eq!(holds_slot(&breaker), is_clean);
            permit(&breaker).release(Outcome::success());
        }
        breaker.change(|machine, at| {
            Some(machine.force(CircuitState::ForcedClosed, at.now, at.times))
        });
        assert!(!holds_slot(&breaker));
    }

    #[test]
    fn call_that_holds_the_slot_keeps_no_circuit_alive() {
        let slot = Slot::allocate();
        let first = circuit(slot);
        let circuit = Arc::downgrade(&first);
        let token = first.admit(|| None).expect("closed");
        drop(first);
        assert!(circuit.upgrade().is_none());
        slot.release(token, Outcome::failure());
    }
}

#[cfg(buttress_loom)]
mod loom_models {
    use loom::thread;

    use super::super::published::FastState;
    use super::*;

    /// A call ends late, while its circuit is dropped and another circuit takes the slot.
    fn late_call(meanwhile: fn(Arc<Circuit>)) {
        loom::model(move || {
            let slot = Slot::allocate();
            let first = circuit(slot);
            let token = first.admit(|| None).expect("closed");
            let late = thread::spawn(move || slot.release(token, Outcome::failure()));
            drop(first);
            if take(slot) {
                meanwhile(circuit(slot));
            }
            late.join().expect("no panic");
            assert!(take(slot) && !take(slot), "free, and once");
        });
    }

    #[test]
    fn loom_late_call_does_not_change_another_circuit() {
        late_call(|second| {
            let own = second.admit(|| None).expect("closed");
            assert_eq!(second.state().0, CircuitState::Closed);
            second.slot().release(own, Outcome::failure());
            assert_eq!(second.state().0, CircuitState::Open);
        });
    }

    #[test]
    fn loom_late_call_keeps_no_other_circuit_alive() {
        late_call(|second| {
            let weak = Arc::downgrade(&second);
            // The late call accesses the lock of the slot and the word. Accesses here let the model switch threads at
            // them. The model does not see the reference counts of `Arc`.
            drop(second.slot().owner_if(|_| false));
            second.configure(|_| ());
            drop(second);
            assert!(weak.upgrade().is_none());
        });
    }

    /// A circuit is dropped while its only call ends. The call opens the circuit or is late. The slot is recycled once.
    #[test]
    fn loom_slot_is_recycled_once_after_the_last_reference() {
        loom::model(|| {
            let slot = Slot::allocate();
            let circuit = circuit(slot);
            let token = circuit.admit(|| None).expect("closed");
            let ends = thread::spawn(move || slot.release(token, Outcome::failure()));
            let handle = circuit.clone();
            drop(circuit);
            let seen = handle.state().0;
            drop(handle);
            ends.join().expect("no panic");
            assert!(matches!(seen, CircuitState::Closed | CircuitState::Open));
            assert!(slot.word().load().state() == FastState::ForcedClosed);
            assert!(take(slot) && !take(slot));
        });
    }
}
