//! The machine behind a lock, and the [front](Front) that lets calls through a closed circuit do without it. Told
//! the time, like the machine; every interleaving of it is tried by its models.

use std::{
    sync::{PoisonError, TryLockError},
    time::Duration,
};

use super::{
    counts::{Ended, TimeWindows},
    front::{Bits, Front, Word},
    machine::Machine,
    probes::Probes,
    state::{At, Change, Refusal, Roll, Settings, State, Ticket},
    trip::Trip,
};
use crate::call::{
    Nanos, OutcomeKind, nanos,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

#[derive(Debug)]
pub(super) struct Cell {
    /// All that a call through a closed circuit reads.
    front: &'static Front,
    /// Its calls are counted, whatever its rules: whoever has it wants to know whether any is under way.
    counts_calls: bool,
    /// When an open circuit's wait is over.
    until: AtomicU64,
    /// From when on a call is slow; the maximum: nobody measures.
    slow_from: AtomicU64,
    /// The time after which a call that its caller ended counts as a failure, in nanoseconds. The maximum: never.
    count_cancelled_after: AtomicU64,
    machine: Mutex<Machine>,
    times: TimeWindows,
}

impl Cell {
    pub(super) fn new(
        front: &'static Front,
        trip: Trip,
        settings: Settings,
        counts_calls: bool,
    ) -> Self {
        // A generation of its own: what is still under way in the one that had the front before is late.
        let (machine, times) = Machine::new(trip, settings, front.read().generation() + 1);
        let cell = Self {
            front,
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

    pub(super) fn front(&self) -> &'static Front {
        self.front
    }

    // ===== Looking =====

    /// The state, and how long it lasts if nothing happens.
    pub(super) fn state(
        &self,
        now: impl FnOnce() -> Nanos,
        roll: Roll,
    ) -> (State, Option<Duration>, Option<Change>) {
        let state = match self.front.read().word() {
            Word::Closed | Word::Ramp => State::Closed,
            Word::ForcedOpen => State::ForcedOpen,
            Word::ForcedClosed => State::ForcedClosed,
            Word::Open | Word::HalfOpen => {
                let now = now();
                let left = |at: Nanos| Duration::from_nanos(at.saturating_sub(now));
                let (mut machine, passed) = self.lock_at(self.at(now, roll));
                let change = passed.then(machine.pass_time(self.at(now, roll)));
                return (machine.state(), machine.next_by_time(now).map(left), change);
            }
        };
        (state, None, None)
    }

    /// Whether somebody measures how long calls take.
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

    /// Whether a call would go now; the luck of a ramp that gives no turns apart.
    #[inline]
    pub(super) fn has_room(
        &self,
        now: impl FnOnce() -> Nanos,
        roll: Roll,
    ) -> (bool, Option<Change>) {
        match self.front.read().word() {
            Word::Closed | Word::ForcedClosed => (true, None),
            Word::ForcedOpen => (false, None),
            Word::Open | Word::HalfOpen | Word::Ramp => {
                let now = now();
                // An open circuit says no without the lock, however many ask.
                if now < self.until.load(Ordering::Acquire) {
                    return (false, None);
                }
                let (mut machine, passed) = self.lock_at(self.at(now, roll));
                let change = passed.then(machine.pass_time(self.at(now, roll)));
                (machine.has_room(now), change)
            }
        }
    }

    /// Whether a probe that was let through, and has not gone yet, still goes.
    pub(super) fn still_probes(&self, generation: u64) -> bool {
        self.lock().still_probes(generation)
    }

    // ===== A call =====

    /// Whether it was open when somebody looked at the machine last.
    #[inline]
    pub(super) fn is_open(&self) -> bool {
        self.front.read().word() == Word::Open
    }

    /// Returns whether a call that is admitted now may be a probe.
    #[inline]
    pub(super) fn may_probe(&self) -> bool {
        matches!(self.front.read().word(), Word::Open | Word::HalfOpen)
    }

    /// How long an open circuit still refuses: told without the lock, however many ask.
    #[inline]
    pub(super) fn refuses_for(&self, now: impl FnOnce() -> Nanos) -> Option<Nanos> {
        if !self.is_open() {
            return None;
        }
        let left = self.until.load(Ordering::Acquire).saturating_sub(now());
        (left > 0).then_some(left)
    }

    /// Counts a good call where that changes nothing but the time windows. False: the machine has to be
    /// asked.
    #[inline]
    pub(super) fn count_good(&self, generation: u64, now: impl FnMut() -> Nanos) -> bool {
        let bits = self.front.read();
        if !bits.is_clean() || bits.word() != Word::Closed {
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
        roll: Roll,
    ) -> (Result<Ticket, Refusal>, Option<Change>) {
        let bits = self.front.read();
        match bits.word() {
            Word::Closed | Word::ForcedClosed => {
                (Ok(Ticket { generation: bits.generation(), probe: false }), None)
            }
            // An open circuit refuses without the lock, however many ask.
            Word::Open => {
                let now = now();
                match self.until.load(Ordering::Acquire).saturating_sub(now) {
                    0 => self.admit_locked(is_unsent, self.at(now, roll)),
                    left => (Err(Refusal::Open { left }), None),
                }
            }
            Word::ForcedOpen => (Err(Refusal::Forced), None),
            Word::HalfOpen | Word::Ramp => self.admit_locked(is_unsent, self.at(now(), roll)),
        }
    }

    fn admit_locked(
        &self,
        is_unsent: bool,
        at: At<'_>,
    ) -> (Result<Ticket, Refusal>, Option<Change>) {
        let (mut machine, passed) = self.lock_at(at);
        let (answer, change) = machine.admit(is_unsent, at);
        (answer, passed.then(change))
    }

    pub(super) fn head(
        &self,
        ticket: Ticket,
        so_far: Ended,
        now: impl FnOnce() -> Nanos,
        roll: Roll,
    ) -> Option<Change> {
        if !ticket.probe {
            return None;
        }
        let at = self.at(now(), roll);
        let (mut machine, passed) = self.lock_at(at);
        passed.then(machine.head(ticket, so_far, at))
    }

    #[inline]
    pub(super) fn finish(
        &self,
        ticket: Ticket,
        ended: Ended,
        mut now: impl FnMut() -> Nanos,
        roll: Roll,
    ) -> Option<Change> {
        let bits = self.front.read();
        match bits.word() {
            Word::HalfOpen | Word::ForcedOpen if ticket.probe => {}
            _ if ticket.probe || bits.generation() != ticket.generation => return None,
            Word::ForcedClosed => return None,
            Word::Closed | Word::Ramp => {
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
            // Isolated, it counts on underneath.
            Word::Open | Word::HalfOpen | Word::ForcedOpen => {}
        }
        let at = self.at(now(), roll);
        let (mut machine, passed) = self.lock_at(at);
        passed.then(machine.finish(ticket, ended, at))
    }

    #[inline]
    fn record_good(&self, mut now: impl FnMut() -> Nanos) {
        // One reading serves all windows, and none is made where none of them asks.
        let mut read = None;
        let mut now = || *read.get_or_insert_with(&mut now);
        for window in &self.times {
            while !window.record_good(&mut now) {
                let _locked = self.lock();
                window.advance(now());
            }
        }
    }

    // ===== Anything else =====

    /// Returns for how long the circuit has been idle, or `None` if it differs from a new circuit or if another thread
    /// has locked it. Changes nothing and never waits.
    pub(super) fn idle_for(&self, now: Nanos) -> Option<Nanos> {
        let machine = match self.machine.try_lock() {
            Ok(machine) => machine,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        machine.idle_for(now, &self.times)
    }

    /// Runs `act` on the machine and publishes the resulting state. `act` must not run user code.
    pub(super) fn with<T>(&self, act: impl FnOnce(&mut Machine, &TimeWindows) -> T) -> T {
        act(&mut self.lock(), &self.times)
    }

    /// [`with`](Self::with), after the changes that are due by time. The change that `act` returns follows them.
    pub(super) fn with_time<T>(
        &self,
        now: Nanos,
        roll: Roll,
        act: impl FnOnce(&mut Machine, At<'_>) -> (T, Option<Change>),
    ) -> (T, Option<Change>) {
        let at = self.at(now, roll);
        let (mut machine, passed) = self.lock_at(at);
        let (result, change) = act(&mut machine, at);
        (result, passed.then(change))
    }

    fn at(&self, now: Nanos, roll: Roll) -> At<'_> {
        At { now, roll, times: &self.times }
    }

    fn lock(&self) -> Locked<'_> {
        // The only user code under this lock is the closures of `Trip::when`, whose panics are caught.
        let machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
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
struct Passed(Option<Change>);

impl Passed {
    /// Returns the last change, with the reason for which any of them opened the circuit.
    fn then(self, next: Option<Change>) -> Option<Change> {
        next.map(|next| next.after(self.0)).or(self.0)
    }
}

/// The machine, locked; whatever was done to it is published before the lock is let go.
struct Locked<'a> {
    cell: &'a Cell,
    machine: MutexGuard<'a, Machine>,
    /// Dropped after the guard, because there may be many.
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
        let word = match machine.state() {
            State::Closed if machine.ramps() => Word::Ramp,
            State::Closed => Word::Closed,
            State::Open => Word::Open,
            State::HalfOpen => Word::HalfOpen,
            State::ForcedOpen => Word::ForcedOpen,
            State::ForcedClosed => Word::ForcedClosed,
        };
        let slow_from = machine.slow_from();
        let measured = slow_from.is_some();
        let plain = !measured && cell.times.is_empty() && !cell.counts_calls;
        cell.slow_from.store(slow_from.unwrap_or(u64::MAX), Ordering::Relaxed);
        let count_after = machine.settings.count_cancelled_after;
        let count_after_nanos = count_after.map_or(u64::MAX, nanos);
        cell.count_cancelled_after.store(count_after_nanos, Ordering::Relaxed);
        cell.until.store(machine.until(), Ordering::Release);
        let bits = Bits::new(machine.generation(), word).clean(machine.is_clean());
        let bits = bits.measured(measured).plain(plain).attributes(count_after.is_some());
        cell.front.show(bits);
    }
}

#[cfg(all(test, buttress_loom))]
mod loom_models;
