//! What a circuit shows to calls: one word that says whether they go, and at their end whether their outcome
//! changes anything. While it does not, a call touches nothing else, and writes nothing at all.
//!
//! The word outlives its circuit, in memory that is never given back, so that a call need not keep the circuit
//! alive to find it: another circuit may have the word by the time that a late call comes to its end, and tells it by its
//! generation, which is none of its own.

use std::{
    fmt,
    sync::{PoisonError, Weak},
    time::Duration,
};

use crate::call::{
    Finish, Hold, Idle, Measures, Outcome, Token,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

/// In a line of a cache of its own: others' trips are none of its business.
#[repr(align(64))]
pub struct Front {
    bits: AtomicU64,
    /// None: nobody has it.
    circuit: Mutex<Option<Weak<dyn Finish>>>,
}

/// `generation << 7 | attributes << 6 | measured << 5 | plain << 4 | clean << 3 | state`
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Bits(u64);

/// What the word says of the state.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    Closed = 0,
    Open = 1,
    HalfOpen = 2,
    ForcedOpen = 3,
    ForcedClosed = 4,
    /// Closed, and luck decides: not a state of its own to anybody else.
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

    /// A good call changes nothing but windows of time.
    pub(super) fn clean(self, clean: bool) -> Self {
        if clean { Self(self.0 | CLEAN) } else { self }
    }

    /// Somebody measures how long calls take.
    pub(super) fn measured(self, measured: bool) -> Self {
        if measured { Self(self.0 | MEASURED) } else { self }
    }

    /// There are no windows of time, nothing is measured, and nobody counts the calls under way: while it is clean, a good
    /// call can end here. So it is for the whole of a circuit's life.
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

/// Those whose circuits have gone. The models have no memory that outlives them.
static IDLE: Idle<Front> = Idle::new();

impl Front {
    pub(super) fn take() -> &'static Self {
        let idle = if cfg!(buttress_loom) { None } else { IDLE.take() };
        idle.unwrap_or_else(|| {
            Box::leak(Box::new(Self { bits: AtomicU64::new(0), circuit: Mutex::new(None) }))
        })
    }

    /// Whose it is from here on.
    pub(super) fn lead_to(&self, circuit: Weak<dyn Finish>) {
        *self.lock() = Some(circuit);
    }

    /// Its circuit has gone: what is still under way counts for nothing.
    pub(super) fn leave(&'static self) {
        *self.lock() = None;
        self.show(Bits::new(self.read().generation(), Word::ForcedClosed));
        IDLE.keep(self);
    }

    fn lock(&self) -> MutexGuard<'_, Option<Weak<dyn Finish>>> {
        self.circuit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    pub(super) fn read(&self) -> Bits {
        Bits(self.bits.load(Ordering::Acquire))
    }

    pub(super) fn show(&self, bits: Bits) {
        self.bits.store(bits.0, Ordering::Release);
    }

    // ===== A call =====

    /// Whether this alone lets a call go.
    #[inline]
    pub(super) fn goes(&self) -> bool {
        matches!(self.read().word(), Word::Closed | Word::ForcedClosed)
    }

    /// What a call goes with, where this alone lets it go, it counts, and nobody measures it.
    #[inline]
    pub(super) fn enter(&self) -> Option<Token> {
        let bits = self.read();
        let goes = bits.0 & (STATE | MEASURED) == Word::Closed as u64;
        goes.then_some(Token::unmeasured(bits.generation()))
    }

    /// Whether a good call changes nothing, and can end here.
    #[inline]
    pub(super) fn is_well(&self) -> bool {
        const WELL: u64 = PLAIN | CLEAN | Word::Closed as u64;
        self.read().0 & (PLAIN | CLEAN | STATE) == WELL
    }

    /// Whether what went with this generation, no probe, would still go.
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
        // Under the lock: a circuit shows its generation before it is led to, so that it is this call's own, or none.
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

impl Finish for Front {
    #[inline]
    fn finish(&self, token: Token, outcome: Outcome) {
        if !(self.is_well() && outcome.is_success()) {
            self.tell(token, outcome);
        }
    }

    #[inline]
    fn hold(&self) -> Hold {
        Hold::Verdict
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
    use super::*;
    use crate::{
        breaker::{
            core::Circuit,
            counts::Seen,
            policy::{Breaker, Calls},
            state::{Settings, State},
            trip::Trip,
        },
        call::{Anchor, Shared},
    };

    fn circuit(front: &'static Front) -> Shared<Circuit> {
        let circuit =
            Shared::new(Circuit::behind(front, Trip::consecutive(1), Settings::DEFAULT, false));
        front.lead_to(circuit.downgrade());
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
            // Unless another test has been faster.
            if !IDLE.take_this(front) {
                continue;
            }
            let second = circuit(front);
            let own = second.enter(|| None).expect("closed");
            for (token, late) in tokens {
                assert_ne!(token.tag, own.tag);
                front.finish(token, late);
            }
            assert_eq!(second.state().0, State::Closed);
            let seen = second.look(|machine, times, now| machine.seen(now, times));
            assert_eq!(seen, Seen::default());
            front.finish(own, Outcome::failure());
            assert_eq!(second.state().0, State::Open, "its own calls it hears");
            return;
        }
        panic!("always somebody else was faster");
    }

    /// To look it up from its front takes a lock.
    #[test]
    fn call_that_changes_something_has_its_circuit_at_hand() {
        fn ends_in_front(breaker: &Breaker) -> bool {
            let permit = breaker.permit(breaker.enter(|| None).expect("closed"));
            matches!(permit.giver(), Some(Anchor::Lasting(_)))
        }
        let breaker =
            Breaker::new(Trip::failure_ratio(0.5).over(2).min_calls(1), Settings::DEFAULT);
        for well in [false, false, true, true] {
            assert_eq!(ends_in_front(&breaker), well);
            breaker.permit(breaker.enter(|| None).expect("closed")).finish(Outcome::success());
        }
        breaker.act(|machine, at| Some(machine.force(State::ForcedClosed, at.now, at.times)));
        assert!(!ends_in_front(&breaker));
    }

    #[test]
    fn call_that_ends_in_the_front_keeps_no_circuit_alive() {
        let front = Front::take();
        let first = circuit(front);
        let circuit = first.downgrade();
        let token = first.enter(|| None).expect("closed");
        drop(first);
        assert!(circuit.upgrade().is_none());
        front.finish(token, Outcome::failure());
    }
}

#[cfg(all(test, buttress_loom))]
mod loom_models {
    use loom::thread;

    use super::*;
    use crate::{
        breaker::{
            core::Circuit,
            state::{Settings, State},
            trip::Trip,
        },
        call::Shared,
    };

    fn circuit(front: &'static Front) -> Shared<Circuit> {
        let circuit =
            Shared::new(Circuit::behind(front, Trip::consecutive(1), Settings::DEFAULT, false));
        front.lead_to(circuit.downgrade());
        circuit
    }

    /// A call ends late, while its circuit goes and another one has the front.
    fn late_call(meanwhile: fn(Shared<Circuit>)) {
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
            assert_eq!(second.state().0, State::Closed);
            second.front().finish(own, Outcome::failure());
            assert_eq!(second.state().0, State::Open);
        });
    }

    #[test]
    fn loom_a_late_call_keeps_no_other_circuit_alive() {
        late_call(|second| {
            let kept = second.downgrade();
            // What the late call meets, so that the model stops it at each: counts of references it knows nothing of.
            drop(second.front().lock());
            second.configure(|_| ());
            drop(second);
            assert!(kept.upgrade().is_none());
        });
    }

    /// A circuit goes while its only call ends: that opens it, or comes too late, and either way it goes once.
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
            assert!(matches!(seen, State::Closed | State::Open));
            assert!(front.read().word() == Word::ForcedClosed);
            assert!(IDLE.take_this(front) && !IDLE.take_this(front));
        });
    }
}
