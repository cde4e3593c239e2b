//! The word that a circuit publishes: calls are admitted by it without a lock, and those that change nothing are
//! released by it.
//!
//! # Mechanism
//!
//! [`PublishedState`] is one atomic word with the state, the generation and four flags of its circuit (see
//! [`StateBits`]). The circuit publishes the word each time it releases its lock (see
//! [`sync_machine`](super::sync_machine)). While the circuit is closed and clean, a successful call of a plain circuit
//! only loads this word, once when it begins and once when it ends. It writes nothing, takes no lock and holds no
//! reference count, so calls on different threads share no cache line that anything writes.
//!
//! The word is in a [slot](crate::permit::Slot), so a call can load it after its circuit has been dropped. By then the
//! slot may belong to another circuit. The generation distinguishes them: each circuit starts at one generation above
//! the last one in the word, so generations in a word never repeat. The token of a call contains the generation in
//! which it was admitted.
//!
//! # Release of a call by its slot
//!
//! - A success while the word [ignores successes](PublishedState::ignores_success) is released without further work.
//!   This also holds if the word belongs to another circuit by now, because the call changes neither circuit.
//! - Each other outcome looks up the circuit and compares the generation of the word with that of the token, under the
//!   lock of the slot. If they are equal, the registered circuit is the one that admitted the call, or there is none
//!   any more. The circuit compares the generation again before it records the outcome.
//!
//! # Orderings
//!
//! [`PublishedState::publish`] stores with `Release` and [`PublishedState::load`] loads with `Acquire`: a call that has
//! loaded a word also reads the times that were published with it (see [`sync_machine`](super::sync_machine)). The
//! locks of the slot order the words of different circuits.
//!
//! # What a change must preserve
//!
//! - Generations in a word only increase. The next circuit reads the last one from the word, so
//!   [`PublishedState::vacate`] must keep it.
//! - Only calls whose circuit can release them from the slot hold the slot instead of the circuit: see
//!   `Breaker::permit` in `policy`. Probes never do.
//! - One thread stores the word at a time: the holder of the circuit's lock, or the drop of the circuit.

use std::fmt;

use crate::{
    permit::Token,
    sync::modelled::atomic::{AtomicU64, Ordering},
};

/// The published state of a circuit.
#[derive(Default)]
pub(crate) struct PublishedState(AtomicU64);

/// The value of the word: `generation << 7 | attributes << 6 | measured << 5 | plain << 4 | clean << 3 | state`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct StateBits(u64);

/// The state in the word.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum FastState {
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

impl StateBits {
    pub(super) fn new(generation: u64, state: FastState) -> Self {
        Self(generation << GENERATION | state as u64)
    }

    /// Sets whether a success that is not slow changes nothing but time windows.
    pub(super) fn clean(self, clean: bool) -> Self {
        if clean { Self(self.0 | CLEAN) } else { self }
    }

    /// Sets whether a rule measures the duration of calls.
    pub(super) fn measured(self, measured: bool) -> Self {
        if measured { Self(self.0 | MEASURED) } else { self }
    }

    /// Sets whether the release of a success needs no machine while the circuit is clean: the circuit has no time
    /// windows and no rule that measures calls, and no map needs the number of its calls. Constant for a circuit.
    pub(super) fn plain(self, plain: bool) -> Self {
        if plain { Self(self.0 | PLAIN) } else { self }
    }

    /// Sets whether calls that their caller ended may count. If so, the wait for the upstream is measured.
    pub(super) fn attributes(self, attributes: bool) -> Self {
        if attributes { Self(self.0 | ATTRIBUTES) } else { self }
    }

    #[inline]
    pub(super) fn state(self) -> FastState {
        match self.0 & STATE {
            0 => FastState::Closed,
            1 => FastState::Open,
            2 => FastState::HalfOpen,
            3 => FastState::ForcedOpen,
            4 => FastState::ForcedClosed,
            _ => FastState::Ramp,
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

impl PublishedState {
    #[inline]
    pub(super) fn load(&self) -> StateBits {
        StateBits(self.0.load(Ordering::Acquire))
    }

    pub(super) fn publish(&self, bits: StateBits) {
        self.0.store(bits.0, Ordering::Release);
    }

    /// Publishes *forced closed*, in which nothing is counted, with the last generation. Called when the circuit is
    /// dropped.
    pub(super) fn vacate(&self) {
        self.publish(StateBits::new(self.load().generation(), FastState::ForcedClosed));
    }

    /// Returns whether the word alone admits a call.
    #[inline]
    pub(super) fn admits(&self) -> bool {
        matches!(self.load().state(), FastState::Closed | FastState::ForcedClosed)
    }

    /// Returns the token of a call that the word alone admits. `None` if the machine must decide, or if a rule measures
    /// calls.
    #[inline]
    pub(super) fn admit(&self) -> Option<Token> {
        let bits = self.load();
        let admits = bits.0 & (STATE | MEASURED) == FastState::Closed as u64;
        admits.then_some(Token::unmeasured(bits.generation()))
    }

    /// Returns whether a success changes nothing, so that its release needs no circuit.
    #[inline]
    pub(super) fn ignores_success(&self) -> bool {
        const IGNORES: u64 = PLAIN | CLEAN | FastState::Closed as u64;
        self.load().0 & (PLAIN | CLEAN | STATE) == IGNORES
    }

    /// Returns whether a call with this generation, whose inner call has not begun, is still admitted. Requires that
    /// the call is not a probe.
    pub(super) fn still_admits(&self, generation: u64) -> bool {
        let bits = self.load();
        bits.generation() == generation && bits.state() != FastState::ForcedOpen
    }

    /// Returns whether the wait for the upstream is measured.
    #[inline]
    pub(super) fn attributes(&self) -> bool {
        self.load().0 & ATTRIBUTES != 0
    }
}

impl fmt::Debug for PublishedState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PublishedState")
            .field("generation", &self.load().generation())
            .finish_non_exhaustive()
    }
}
