//! The word that a circuit publishes for calls: it admits them without a lock, and ends those that change nothing.
//!
//! # Mechanism
//!
//! A [`Front`] has one atomic word with the state, the generation and four flags of its circuit (see [`Bits`]). The
//! circuit publishes the word each time it releases its lock (see [`cell`](super::sync_machine)). While the circuit is closed
//! and clean, a successful call of a plain circuit only loads this word, once when it begins and once when it ends. It
//! writes nothing, takes no lock and holds no reference count, so calls on different threads share no cache line that
//! anything writes.
//!
//! # Memory and reuse
//!
//! A call must be able to find its front even if the circuit is dropped first. So fronts are leaked, and calls hold
//! `&'static` references to them. The drop of a circuit puts its front on a free list ([`IDLE`]), and a later circuit
//! takes it from there. The number of fronts is therefore the maximum number of circuits that existed at once.
//!
//! A call that ends late may find a front that has another owner. The generation distinguishes them: each owner starts
//! at one generation above the last one in the word, so generations in a front never repeat. The token of the call
//! contains the generation in which the call was admitted.
//!
//! # Life of a front
//!
//! 1. [`Front::take`] returns an idle front. Only its new owner can reach it, besides late calls.
//! 2. The owner publishes a word with a higher generation.
//! 3. [`Front::lead_to`] registers the owner, as a [`Weak`]. The circuits of a keyed layer do not register: their calls
//!    hold counted references.
//! 4. The owner publishes a word after each locked operation. Calls begin and end.
//! 5. [`Front::leave`] removes the registration, publishes *forced closed* (a state in which nothing is counted) with
//!    the last generation, and puts the front on the free list.
//!
//! # The end of a call
//!
//! - A success while the word is [well](Front::is_well) ends without further work. This also holds if the word belongs
//!   to another circuit by now, because the call changes neither circuit.
//! - Each other outcome locks the registration and compares the generation of the word with that of the token. If they
//!   are equal, the registered circuit is the one that admitted the call, or there is none any more. The circuit
//!   compares the generation again before it records the outcome.
//!
//! Step 2 precedes step 3, and the comparison runs under the lock of the registration. A call that finds the
//! registration of another owner therefore also finds the generation of that owner or a later one, and its own is
//! lower. The comparison precedes the upgrade of the [`Weak`], so a late call never keeps another circuit alive.
//!
//! # Orderings
//!
//! - [`Front::show`] stores with `Release` and [`Front::read`] loads with `Acquire`: a call that has loaded a word also
//!   reads the times that were published with it (see [`cell`](super::sync_machine)).
//! - The lock of `circuit` orders the word of step 2 before a late call's load in [`Front::tell`].
//! - The lock of the free list orders the last word of the previous owner before the first load of the next one.
//!
//! # What a change must preserve
//!
//! - Generations in a front only increase. The next owner reads the last one from the word, so `leave` must keep it.
//! - An owner publishes before it registers, and removes its registration before the front becomes idle.
//! - Only calls whose owner can end them from the front hold a front instead of the circuit: see `Breaker::permit` in
//!   `policy`. Probes never do.
//! - Exactly one thread stores the word at a time: the holder of the circuit's lock, or the drop of the circuit.
//!
//! The loom models at the end of the file check late calls against the drop and the reuse of a front.

use std::{fmt, sync::Weak, time::Duration};

use crate::{
    outcome::Outcome,
    permit::{Idle, Measures, Release, ReleaseAt, Token},
    sync::modelled::{
        Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

/// The published state of a circuit. Aligned to a cache line, so that a circuit that changes often does not slow down
/// the calls of others.
#[repr(align(64))]
pub struct Front {
    bits: AtomicU64,
    /// The owner of the front. `None` while the front is idle or its owner has not registered yet.
    circuit: Mutex<Option<Weak<dyn Release>>>,
}

/// The value of the word: `generation << 7 | attributes << 6 | measured << 5 | plain << 4 | clean << 3 | state`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Bits(u64);

/// The state in the word.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    Closed = 0,
    Open = 1,
    HalfOpen = 2,
    ForcedOpen = 3,
    ForcedClosed = 4,
    /// Ramping up after closing; reported as `Closed`. The machine admits each call with a probability that grows to 1.
    Ramp = 5,
}

const STATE: u64 = 0b00_0111;
const CLEAN: u64 = 0b00_1000;
const PLAIN: u64 = 0b01_0000;
const MEASURED: u64 = 0b10_0000;
const ATTRIBUTES: u64 = 0b100_0000;
const GENERATION: u32 = 7;

impl Bits {
    pub(super) fn new(generation: u64, word: Word) -> Self {
        Self(generation << GENERATION | word as u64)
    }

    /// Sets whether a success that is not slow changes nothing but time windows.
    pub(super) fn clean(self, clean: bool) -> Self {
        if clean { Self(self.0 | CLEAN) } else { self }
    }

    /// Sets whether a rule measures the duration of calls.
    pub(super) fn measured(self, measured: bool) -> Self {
        if measured { Self(self.0 | MEASURED) } else { self }
    }

    /// Sets whether a success can end in the front while the circuit is clean: the circuit has no time windows and no
    /// rule that measures calls, and no map needs the number of its calls. Constant for a circuit.
    pub(super) fn plain(self, plain: bool) -> Self {
        if plain { Self(self.0 | PLAIN) } else { self }
    }

    /// Sets whether calls that their caller ended may count. If so, the wait for the upstream is measured.
    pub(super) fn attributes(self, attributes: bool) -> Self {
        if attributes { Self(self.0 | ATTRIBUTES) } else { self }
    }

    #[inline]
    pub(super) fn word(self) -> Word {
        match self.0 & STATE {
            0 => Word::Closed,
            1 => Word::Open,
            2 => Word::HalfOpen,
            3 => Word::ForcedOpen,
            4 => Word::ForcedClosed,
            _ => Word::Ramp,
        }
    }

    #[inline]
    pub(super) fn generation(self) -> u64 {
        self.0 >> GENERATION
    }

    #[inline]
    pub(super) fn is_clean(self) -> bool {
        self.0 & CLEAN != 0
    }
}

/// The fronts of circuits that were dropped. The loom models do not use them, because nothing outlives a model.
static IDLE: Idle<Front> = Idle::new();

impl Front {
    pub(super) fn take() -> &'static Self {
        let idle = if cfg!(buttress_loom) { None } else { IDLE.take() };
        idle.unwrap_or_else(|| {
            Box::leak(Box::new(Self { bits: AtomicU64::new(0), circuit: Mutex::new(None) }))
        })
    }

    /// Registers the owner. Requires that the owner has published its first word.
    pub(super) fn lead_to(&self, circuit: Weak<dyn Release>) {
        *self.lock() = Some(circuit);
    }

    /// Ends the ownership: the outcomes of calls in flight are no longer recorded.
    pub(super) fn leave(&'static self) {
        *self.lock() = None;
        self.show(Bits::new(self.read().generation(), Word::ForcedClosed));
        IDLE.keep(self);
    }

    fn lock(&self) -> MutexGuard<'_, Option<Weak<dyn Release>>> {
        self.circuit.lock()
    }

    #[inline]
    pub(super) fn read(&self) -> Bits {
        Bits(self.bits.load(Ordering::Acquire))
    }

    pub(super) fn show(&self, bits: Bits) {
        self.bits.store(bits.0, Ordering::Release);
    }

    // ===== Calls =====

    /// Returns whether the word alone admits a call.
    #[inline]
    pub(super) fn goes(&self) -> bool {
        matches!(self.read().word(), Word::Closed | Word::ForcedClosed)
    }

    /// Returns the token of a call that the word alone admits. `None` if the machine must decide, or if a rule measures
    /// calls.
    #[inline]
    pub(super) fn enter(&self) -> Option<Token> {
        let bits = self.read();
        let goes = bits.0 & (STATE | MEASURED) == Word::Closed as u64;
        goes.then_some(Token::unmeasured(bits.generation()))
    }

    /// Returns whether a success changes nothing, so that it can end here.
    #[inline]
    pub(super) fn is_well(&self) -> bool {
        const WELL: u64 = PLAIN | CLEAN | Word::Closed as u64;
        self.read().0 & (PLAIN | CLEAN | STATE) == WELL
    }

    /// Returns whether a call with this generation, whose inner call has not begun, is still admitted. Requires that
    /// the call is not a probe.
    pub(super) fn still_goes(&self, generation: u64) -> bool {
        let bits = self.read();
        bits.generation() == generation && bits.word() != Word::ForcedOpen
    }

    /// Returns whether the wait for the upstream is measured.
    #[inline]
    pub(super) fn does_attribute(&self) -> bool {
        self.read().0 & ATTRIBUTES != 0
    }

    #[cold]
    #[inline(never)]
    fn tell(&self, token: Token, outcome: Outcome) {
        let leads_to = self.lock();
        // Compared under the lock. A new owner publishes its generation before it registers, so an equal generation
        // means that the registered circuit is the one that issued this token.
        if self.read().generation() != token.tag {
            return;
        }
        let circuit = leads_to.as_ref().and_then(Weak::upgrade);
        drop(leads_to);
        if let Some(circuit) = circuit {
            circuit.finish(token, outcome);
        }
    }
}

impl Release for Front {
    #[inline]
    fn finish(&self, token: Token, outcome: Outcome) {
        if !(self.is_well() && outcome.is_success()) {
            self.tell(token, outcome);
        }
    }

    #[inline]
    fn hold(&self) -> ReleaseAt {
        ReleaseAt::Verdict
    }

    #[inline]
    fn measures(&self) -> Measures {
        if self.does_attribute() { Measures::Head } else { Measures::Nothing }
    }

    /// If another circuit owns the word by now, the call is late and its outcome is not recorded.
    #[cold]
    fn count_cancelled_after(&self) -> Option<Duration> {
        let circuit = self.lock().as_ref().and_then(Weak::upgrade);
        circuit?.count_cancelled_after()
    }
}

impl fmt::Debug for Front {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Front")
            .field("generation", &self.read().generation())
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use super::super::{
        circuit::Circuit,
        machine::CallStats,
        policy::{Breaker, Calls},
        state::{CircuitSettings, CircuitState},
        trip::Trip,
    };
    use std::sync::Arc;

    use super::*;
    use crate::permit::Anchor;

    fn circuit(front: &'static Front) -> Arc<Circuit> {
        let circuit =
            Arc::new(Circuit::behind(front, Trip::consecutive(1), CircuitSettings::DEFAULT, false));
        let state = Arc::downgrade(&circuit);
        front.lead_to(state);
        circuit
    }

    #[test]
    fn late_call_says_nothing_to_whoever_has_the_front_by_then() {
        for _ in 0..1000 {
            let front = Front::take();
            let first = circuit(front);
            let tokens = [Outcome::failure(), Outcome::success(), Outcome::cancelled()]
                .map(|late| (first.enter(|| None).expect("closed"), late));
            drop(first);
            for (token, late) in tokens {
                front.finish(token, late);
            }
            // Another test may have taken the front.
            if !IDLE.take_this(front) {
                continue;
            }
            let second = circuit(front);
            let own = second.enter(|| None).expect("closed");
            for (token, late) in tokens {
                assert_ne!(token.tag, own.tag);
                front.finish(token, late);
            }
            assert_eq!(second.state().0, CircuitState::Closed);
            let seen = second.look(|machine, times, now| machine.seen(now, times));
            assert_eq!(seen, CallStats::default());
            front.finish(own, Outcome::failure());
            assert_eq!(second.state().0, CircuitState::Open, "its own calls count");
            return;
        }
        panic!("another test took the front each time");
    }

    /// A call that changes the machine must not end in the front, because the front finds its circuit by a lock.
    #[test]
    fn call_that_changes_something_has_its_circuit_at_hand() {
        fn ends_in_front(breaker: &Breaker) -> bool {
            let permit = breaker.permit(breaker.enter(|| None).expect("closed"));
            matches!(permit.giver(), Some(Anchor::Lasting(_)))
        }
        let breaker =
            Breaker::new(Trip::failure_ratio(0.5).over(2).min_calls(1), CircuitSettings::DEFAULT);
        for well in [false, false, true, true] {
            assert_eq!(ends_in_front(&breaker), well);
            breaker.permit(breaker.enter(|| None).expect("closed")).finish(Outcome::success());
        }
        breaker
            .act(|machine, at| Some(machine.force(CircuitState::ForcedClosed, at.now, at.times)));
        assert!(!ends_in_front(&breaker));
    }

    #[test]
    fn call_that_ends_in_the_front_keeps_no_circuit_alive() {
        let front = Front::take();
        let first = circuit(front);
        let circuit = Arc::downgrade(&first);
        let token = first.enter(|| None).expect("closed");
        drop(first);
        assert!(circuit.upgrade().is_none());
        front.finish(token, Outcome::failure());
    }
}

#[cfg(all(test, buttress_loom))]
mod loom_models {
    use loom::thread;

    use super::super::{
        circuit::Circuit,
        state::{CircuitSettings, CircuitState},
        trip::Trip,
    };
    use super::*;

    fn circuit(front: &'static Front) -> Arc<Circuit> {
        let circuit =
            Arc::new(Circuit::behind(front, Trip::consecutive(1), CircuitSettings::DEFAULT, false));
        let state = Arc::downgrade(&circuit);
        front.lead_to(state);
        circuit
    }

    /// A call ends late, while its circuit is dropped and another circuit takes the front.
    fn late_call(meanwhile: fn(Arc<Circuit>)) {
        loom::model(move || {
            let front = Front::take();
            let first = circuit(front);
            let token = first.enter(|| None).expect("closed");
            let late = thread::spawn(move || front.finish(token, Outcome::failure()));
            drop(first);
            if IDLE.take_this(front) {
                meanwhile(circuit(front));
            }
            late.join().expect("no panic");
            assert!(IDLE.take_this(front) && !IDLE.take_this(front), "idle, and once");
        });
    }

    #[test]
    fn loom_a_late_call_says_nothing_to_another_circuit() {
        late_call(|second| {
            let own = second.enter(|| None).expect("closed");
            assert_eq!(second.state().0, CircuitState::Closed);
            second.front().finish(own, Outcome::failure());
            assert_eq!(second.state().0, CircuitState::Open);
        });
    }

    #[test]
    fn loom_a_late_call_keeps_no_other_circuit_alive() {
        late_call(|second| {
            let kept = Arc::downgrade(&second);
            // The late call accesses this lock and the word. Accesses here let the model switch threads at them. The
            // model does not see the reference counts of `Shared`.
            drop(second.front().lock());
            second.configure(|_| ());
            drop(second);
            assert!(kept.upgrade().is_none());
        });
    }

    /// A circuit is dropped while its only call ends. The call opens the circuit or is late. The front becomes idle
    /// once.
    #[test]
    fn loom_a_circuit_goes_with_the_last_who_has_it() {
        loom::model(|| {
            let front = Front::take();
            let circuit = circuit(front);
            let token = circuit.enter(|| None).expect("closed");
            let ends = thread::spawn(move || front.finish(token, Outcome::failure()));
            let handle = circuit.clone();
            drop(circuit);
            let seen = handle.state().0;
            drop(handle);
            ends.join().expect("no panic");
            assert!(matches!(seen, CircuitState::Closed | CircuitState::Open));
            assert!(front.read().word() == Word::ForcedClosed);
            assert!(IDLE.take_this(front) && !IDLE.take_this(front));
        });
    }
}
