//! The state machine of a circuit behind a lock, with lock-free paths for the most frequent operations.
//!
//! # Mechanism
//!
//! The [`Machine`] is a plain state machine behind a mutex. Before the mutex is released, [`Locked`] publishes a
//! summary of the machine: the [`PublishedState`] (state, generation and flags) and three times in the [`SyncMachine`].
//! The lock-free paths read only this summary:
//!
//! | operation | lock-free if |
//! |---|---|
//! | admit a call | the circuit is closed without a ramp, or forced closed |
//! | reject a call | the circuit is open and its open time has not passed, or it is forced open |
//! | end a call | its generation is not the current one, or its outcome cannot change the machine (see below) |
//!
//! Therefore threads do not contend for the mutex while the circuit is closed and its calls succeed, nor while it is
//! open. All other operations lock the machine. Time is an argument of each operation. Operations read the clock only
//! if they need it.
//!
//! # Generations
//!
//! Each transition of the machine, and each admission of a probe, increments the generation. A [`CircuitToken`]
//! contains the generation in which its call was admitted. The outcome of a call counts only if that generation is
//! still the current one, and the outcome of a probe only if the machine still has the probe. An isolation is not a
//! transition: calls that were admitted before it still count. The first generation of a machine is higher than each
//! generation that earlier circuits have published in the same word, so the calls of those circuits are late, too.
//!
//! # Outcomes that do not change the machine
//!
//! The flag *clean* of the word states that a success that is not slow changes nothing in the machine: no run of
//! failures has begun, a response has been recorded, no housekeeping is counted, and each window of calls is full of
//! successes. The time windows are not part of the machine. They consist of atomics, so such a success is recorded in
//! them without the lock (see [`TimeWindow`](super::machine::TimeWindow)).
//!
//! A lock-free operation takes effect when it loads the word. The machine may change immediately after. So a call may
//! be admitted while another thread opens the circuit, and a success may be recorded in a time window that another
//! thread has just cleared. The first is equal to an earlier admission. The second adds at most the calls that end at
//! that moment, and only successes.
//!
//! # Orderings
//!
//! - The word is stored last, with `Release` ([`PublishedState::publish`]), and loaded first, with `Acquire`
//!   ([`PublishedState::load`]). `until`, `slow_from` and `count_cancelled_after` are stored before it. A path that has
//!   loaded the word therefore reads the times that were published with this word, or later ones. If it has read
//!   *open*, it cannot read the `until` of an earlier state.
//! - A later `until` is harmless. It is 0 in all other states, which leads to the locked path, or it is the end of a
//!   later open time, before which a call is rejected anyway.
//! - Only the holder of the mutex stores the summary. Therefore the summaries are published in the order of the
//!   operations that they result from.
//! - [`SyncMachine::measures`] and [`SyncMachine::count_cancelled_after`] load a setting without the word, with
//!   `Relaxed`. An old value is harmless, because the call then counts as if it had ended before the change.
//!
//! # What a change must preserve
//!
//! - The machine is mutated only through [`Locked`], whose drop publishes the summary. [`SyncMachine::idle_for`] locks
//!   the mutex directly and only reads.
//! - An operation that a lock-free path skips must have no effect on the machine. A new rule or count that a success
//!   changes must make the machine unclean.
//! - No user code runs under the lock, except the closures of [`Trip::when`], whose panics are caught. Events and
//!   wakers follow after the release, by the [`Transition`] that each operation returns.
//! - The work under the lock is bounded: [`SyncMachine::lock_at`] makes many due changes in slices.
//!
//! The loom models try all interleavings of calls, probes and manual changes.

#[cfg(all(test, buttress_loom))]
mod loom_models;

use std::time::Duration;

use super::{
    machine::{At, Ended, Machine, Probes, Rng, TimeWindows},
    published::{FastState, PublishedState, StateBits},
    state::{CircuitSettings, CircuitState, CircuitToken, Rejection, Transition},
    trip::Trip,
};
use crate::{
    outcome::OutcomeKind,
    sync::modelled::{
        Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Nanos, nanos},
};

#[derive(Debug)]
pub(super) struct SyncMachine {
    /// The word that calls read without the lock.
    published: &'static PublishedState,
    /// The owner must be able to detect whether a call is in flight, so no call may be released by the word alone.
    counts_calls: bool,
    /// The time at which an open circuit becomes half-open. 0 in all other states.
    until: AtomicU64,
    /// The duration from which a call is slow, in nanoseconds. The maximum: no rule measures calls.
    slow_from: AtomicU64,
    /// The time after which a call that its caller ended counts as a failure, in nanoseconds. The maximum: never.
    count_cancelled_after: AtomicU64,
    machine: Mutex<Machine>,
    times: TimeWindows,
}

impl SyncMachine {
    pub(super) fn new(
        published: &'static PublishedState,
        trip: Trip,
        settings: CircuitSettings,
        counts_calls: bool,
    ) -> Self {
        // The calls of the circuit that had the word before have lower generations, so they are late.
        let (machine, times) = Machine::new(trip, settings, published.load().generation() + 1);
        let cell = Self {
            published,
            counts_calls,
            until: AtomicU64::new(0),
            slow_from: AtomicU64::new(u64::MAX),
            count_cancelled_after: AtomicU64::new(u64::MAX),
            machine: Mutex::new(machine),
            times,
        };
        drop(cell.lock());
        cell
    }

    #[inline]
    pub(super) fn published(&self) -> &'static PublishedState {
        self.published
    }

    // ===== Queries =====

    /// Returns the state, the time until it changes without any call, and the change that was due.
    pub(super) fn state(
        &self,
        now: impl FnOnce() -> Nanos,
        rng: Rng,
    ) -> (CircuitState, Option<Duration>, Option<Transition>) {
        let state = match self.published.load().state() {
            FastState::Closed | FastState::Ramp => CircuitState::Closed,
            FastState::ForcedOpen => CircuitState::ForcedOpen,
            FastState::ForcedClosed => CircuitState::ForcedClosed,
            FastState::Open | FastState::HalfOpen => {
                let now = now();
                let left = |at: Nanos| Duration::from_nanos(at.saturating_sub(now));
                let (mut machine, passed) = self.lock_at(self.at(now, rng));
                let change = passed.then(machine.pass_time(self.at(now, rng)));
                return (machine.state(), machine.next_by_time(now).map(left), change);
            }
        };
        (state, None, None)
    }

    /// Returns whether a rule measures the duration of calls.
    #[inline]
    pub(super) fn measures(&self) -> bool {
        self.slow_from.load(Ordering::Relaxed) != u64::MAX
    }

    /// Returns the time after which a call that its caller ended counts as a failure. `None`: never.
    pub(super) fn count_cancelled_after(&self) -> Option<Duration> {
        match self.count_cancelled_after.load(Ordering::Relaxed) {
            u64::MAX => None,
            nanos => Some(Duration::from_nanos(nanos)),
        }
    }

    /// Returns whether a call would be admitted now, and the change that was due.
    ///
    /// During a ramp without backpressure the result is `true`, although a random share of the calls is rejected.
    #[inline]
    pub(super) fn has_room(
        &self,
        now: impl FnOnce() -> Nanos,
        rng: Rng,
    ) -> (bool, Option<Transition>) {
        match self.published.load().state() {
            FastState::Closed | FastState::ForcedClosed => (true, None),
            FastState::ForcedOpen => (false, None),
            FastState::Open | FastState::HalfOpen | FastState::Ramp => {
                let now = now();
                // An open circuit rejects without the lock, so that many callers do not contend for it.
                if now < self.until.load(Ordering::Acquire) {
                    return (false, None);
                }
                let (mut machine, passed) = self.lock_at(self.at(now, rng));
                let change = passed.then(machine.pass_time(self.at(now, rng)));
                (machine.has_room(now), change)
            }
        }
    }

    /// Returns whether a probe that was admitted, and whose inner call has not begun, may still be made.
    pub(super) fn still_probes(&self, generation: u64) -> bool {
        self.lock().still_probes(generation)
    }

    // ===== Calls =====

    /// Returns whether the published state is open. The open time may have passed since.
    #[inline]
    pub(super) fn is_open(&self) -> bool {
        self.published.load().state() == FastState::Open
    }

    /// Returns whether a call that is admitted now may be a probe.
    #[inline]
    pub(super) fn may_probe(&self) -> bool {
        matches!(self.published.load().state(), FastState::Open | FastState::HalfOpen)
    }

    /// Returns for how long an open circuit still rejects calls. `None` if it does not, or if its open time has passed.
    /// Takes no lock.
    #[inline]
    pub(super) fn open_time_left(&self, now: impl FnOnce() -> Nanos) -> Option<Nanos> {
        if !self.is_open() {
            return None;
        }
        let left = self.until.load(Ordering::Acquire).saturating_sub(now());
        (left > 0).then_some(left)
    }

    /// Records a success that is not slow, if that changes nothing but the time windows. Returns `false` if the machine
    /// must record it.
    #[inline]
    pub(super) fn count_good(&self, generation: u64, now: impl FnMut() -> Nanos) -> bool {
        let bits = self.published.load();
        if !bits.is_clean() || bits.state() != FastState::Closed {
            return false;
        }
        if !self.times.is_empty() && bits.generation() == generation {
            self.record_good(now);
        }
        true
    }

    #[inline]
    pub(super) fn admit(
        &self,
        is_unsent: bool,
        now: impl FnOnce() -> Nanos,
        rng: Rng,
    ) -> (Result<CircuitToken, Rejection>, Option<Transition>) {
        let bits = self.published.load();
        match bits.state() {
            FastState::Closed | FastState::ForcedClosed => {
                (Ok(CircuitToken { generation: bits.generation(), is_probe: false }), None)
            }
            // An open circuit rejects without the lock, so that many callers do not contend for it.
            FastState::Open => {
                let now = now();
                match self.until.load(Ordering::Acquire).saturating_sub(now) {
                    0 => self.admit_locked(is_unsent, self.at(now, rng)),
                    left => (Err(Rejection::Open { left }), None),
                }
            }
            FastState::ForcedOpen => (Err(Rejection::Forced), None),
            FastState::HalfOpen | FastState::Ramp => {
                self.admit_locked(is_unsent, self.at(now(), rng))
            }
        }
    }

    fn admit_locked(
        &self,
        is_unsent: bool,
        at: At<'_>,
    ) -> (Result<CircuitToken, Rejection>, Option<Transition>) {
        let (mut machine, passed) = self.lock_at(at);
        let (admission, change) = machine.admit(is_unsent, at);
        (admission, passed.then(change))
    }

    pub(super) fn record_head(
        &self,
        token: CircuitToken,
        so_far: Ended,
        now: impl FnOnce() -> Nanos,
        rng: Rng,
    ) -> Option<Transition> {
        if !token.is_probe {
            return None;
        }
        let at = self.at(now(), rng);
        let (mut machine, passed) = self.lock_at(at);
        passed.then(machine.record_head(token, so_far, at))
    }

    #[inline]
    pub(super) fn release(
        &self,
        token: CircuitToken,
        ended: Ended,
        mut now: impl FnMut() -> Nanos,
        rng: Rng,
    ) -> Option<Transition> {
        let bits = self.published.load();
        match bits.state() {
            FastState::HalfOpen | FastState::ForcedOpen if token.is_probe => {}
            _ if token.is_probe || bits.generation() != token.generation => return None,
            FastState::ForcedClosed => return None,
            FastState::Closed | FastState::Ramp => {
                let slow = ended.took >= self.slow_from.load(Ordering::Relaxed);
                match ended.outcome.kind() {
                    // A throttled call has a response, and the machine has to record the first response.
                    OutcomeKind::Throttled if bits.is_clean() => return None,
                    // The machine counts consecutive outcomes of connection housekeeping.
                    OutcomeKind::Cancelled if !slow && !ended.outcome.is_housekeeping() => {
                        return None;
                    }
                    OutcomeKind::Success if !slow && bits.is_clean() => {
                        if !self.times.is_empty() {
                            self.record_good(now);
                        }
                        return None;
                    }
                    _ => {}
                }
            }
            // Beneath an isolation the machine still counts outcomes.
            FastState::Open | FastState::HalfOpen | FastState::ForcedOpen => {}
        }
        let at = self.at(now(), rng);
        let (mut machine, passed) = self.lock_at(at);
        passed.then(machine.release(token, ended, at))
    }

    #[inline]
    fn record_good(&self, mut now: impl FnMut() -> Nanos) {
        // The clock is read at most once for all windows, and not at all if none of them needs the time.
        let mut read = None;
        let mut now = || *read.get_or_insert_with(&mut now);
        for window in &self.times {
            while !window.record_good(&mut now) {
                let _locked = self.lock();
                window.advance(now());
            }
        }
    }

    // ===== Access to the machine =====

    /// Returns for how long the circuit has been idle, or `None` if it differs from a new circuit or if another thread
    /// has locked it. Changes nothing and never waits.
    pub(super) fn idle_for(&self, now: Nanos) -> Option<Nanos> {
        self.machine.try_lock()?.idle_for(now, &self.times)
    }

    /// Runs `act` on the machine and publishes the resulting state. `act` must not run user code.
    pub(super) fn with<T>(&self, act: impl FnOnce(&mut Machine, &TimeWindows) -> T) -> T {
        act(&mut self.lock(), &self.times)
    }

    /// [`with`](Self::with), after the changes that are due by time. The change that `act` returns follows them.
    pub(super) fn with_time<T>(
        &self,
        now: Nanos,
        rng: Rng,
        act: impl FnOnce(&mut Machine, At<'_>) -> (T, Option<Transition>),
    ) -> (T, Option<Transition>) {
        let at = self.at(now, rng);
        let (mut machine, passed) = self.lock_at(at);
        let (result, change) = act(&mut machine, at);
        (result, passed.then(change))
    }

    fn at(&self, now: Nanos, rng: Rng) -> At<'_> {
        At { now, rng, times: &self.times }
    }

    fn lock(&self) -> Locked<'_> {
        // The only user code under this lock is the closures of `Trip::when`, whose panics are caught.
        let machine = self.machine.lock();
        Locked { cell: self, machine, ended: None }
    }

    /// Locks the machine for an operation that begins with [`pass_time`](Machine::pass_time). If many changes are due,
    /// most of them are made before, in slices between which the lock is released.
    fn lock_at(&self, at: At<'_>) -> (Locked<'_>, Passed) {
        let mut passed = Passed(None);
        loop {
            let mut machine = self.lock();
            if !machine.is_far_behind(at.now) {
                return (machine, passed);
            }
            passed = Passed(passed.then(machine.pass_some_time(at)));
        }
    }
}

/// The change that time has made before an operation.
struct Passed(Option<Transition>);

impl Passed {
    /// Returns the last change, with the reason for which any of them opened the circuit.
    fn then(self, next: Option<Transition>) -> Option<Transition> {
        next.map(|next| next.after(self.0)).or(self.0)
    }
}

/// The locked machine. Publishes the summary of the machine before the lock is released.
struct Locked<'a> {
    cell: &'a SyncMachine,
    machine: MutexGuard<'a, Machine>,
    /// The probes of a phase that has ended. There may be many, so they are dropped after the guard: fields are dropped
    /// in the order of their declaration.
    ended: Option<Probes>,
}

impl std::ops::Deref for Locked<'_> {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.machine
    }
}

impl std::ops::DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Machine {
        &mut self.machine
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.ended = self.machine.take_ended();
        let (cell, machine) = (self.cell, &self.machine);
        let state = match machine.state() {
            CircuitState::Closed if machine.ramps() => FastState::Ramp,
            CircuitState::Closed => FastState::Closed,
            CircuitState::Open => FastState::Open,
            CircuitState::HalfOpen => FastState::HalfOpen,
            CircuitState::ForcedOpen => FastState::ForcedOpen,
            CircuitState::ForcedClosed => FastState::ForcedClosed,
        };
        let slow_from = machine.slow_from();
        let measured = slow_from.is_some();
        let plain = !measured && cell.times.is_empty() && !cell.counts_calls;
        cell.slow_from.store(slow_from.unwrap_or(u64::MAX), Ordering::Relaxed);
        let count_after = machine.settings.count_cancelled_after;
        let count_after_nanos = count_after.map_or(u64::MAX, nanos);
        cell.count_cancelled_after.store(count_after_nanos, Ordering::Relaxed);
        cell.until.store(machine.until(), Ordering::Release);
        let bits = StateBits::new(machine.generation(), state).clean(machine.is_clean());
        let bits = bits.measured(measured).plain(plain).attributes(count_after.is_some());
        cell.published.publish(bits);
    }
}
