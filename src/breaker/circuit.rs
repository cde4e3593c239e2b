//! A circuit: the [`Cell`] with its clock, its name, its counters, and the notification of changes.
//!
//! # Mechanism
//!
//! [`Cell`] decides, with the time as an argument. [`Circuit`] reads the clock, calls the cell, and publishes the
//! [`Transition`] that the cell returns: it wakes the waiters of `changed` and emits events. Both run user code (wakers and
//! subscribers), so they run after all locks are released.
//!
//! A call follows one of these paths:
//!
//! 1. [`PublishedState::admit`] admits it with one load, if the circuit is closed and no rule measures calls.
//! 2. Otherwise [`Cell::refuses_for`] rejects it without a lock, if the circuit is open.
//! 3. Otherwise the machine decides under its lock.
//!
//! The call carries a [`Token`]. Its tag is the generation in which the call was admitted, with the bit [`PROBE`] for a
//! half-open probe. A call that is admitted only by shadow mode has the tag [`NO_GENERATION`], which is never the
//! current generation, so its outcome is not recorded.
//!
//! # Unsent probes
//!
//! The timeout of a probe starts when its request has been sent. The sent mark of the request reveals this, but it does
//! not notify the circuit. So the circuit keeps the marks of such probes in `unsent_probes`. It reads them before it
//! admits a call that may be a probe, ends a call through the machine, or reports its state.
//!
//! - Lock order: the lock of `unsent_probes` is held while the lock of the cell is taken, never the other way round.
//! - A mark is read and its report is recorded under one hold of `unsent_probes`. Otherwise an older reading of a mark
//!   could follow a newer one of another thread.
//! - `has_unsent_probes` allows operations to skip the lock. It is stored as `true` after an insertion, and as `false`
//!   only under the lock, when the map is empty. So an entry is overlooked only between its insertion and the store. A
//!   `true` that is out of date costs one lock, and is corrected under it.
//!
//! # Atomics
//!
//! The counters and settings are independent values and use `Relaxed`. `waiting` only bounds the number of waiters and
//! protects no data.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use super::{
    machine::{Ended, MAX_CHANGES, Machine, ProbeReport, TimeWindows},
    published::PublishedState,
    state::{At, CircuitSettings, CircuitState, Refusal, Ticket, Transition},
    sync_machine::Cell,
    trip::Trip,
};
use crate::{
    event::{RepeatedEvent, event},
    fault::LayerName,
    outcome::{LayerKind, Outcome, Rejected, RejectedKind, SentMark, UpstreamClock, WaitsFor},
    permit::{FreeSlots, Measures, OwnedSlot, Release, ReleaseAt, Slot, SlotOwner, Token},
    time::{Clock, Nanos, nanos},
};

/// The `retry_after` of a rejection by a half-open circuit. The end of its probes has no known time.
const PROBING: Nanos = 1_000_000_000;

/// The state of a circuit breaker, or of one key of a keyed circuit breaker.
pub struct Circuit {
    cell: Cell,
    slot: OwnedSlot<Self>,
    /// Notified of each change and of each probe slot that is taken or released.
    changed: Arc<Notify>,
    clock: Clock,
    label: OnceLock<Arc<LayerName>>,
    refused: AtomicU64,
    /// Shadow mode: admits all calls, and counts those that it would reject.
    shadow: AtomicBool,
    shadowed: AtomicU64,
    /// Backpressure: the service is not ready while the circuit would reject a call.
    uses_backpressure: AtomicBool,
    /// The maximum number of callers that wait for the verdict of the probes, and the maximum duration of the wait.
    most_waiting: AtomicU32,
    longest_wait: AtomicU64,
    waiting: AtomicU32,
    /// Marks of the probes whose requests were still to be sent when they were admitted, by generation.
    unsent_probes: Mutex<BTreeMap<u64, SentMark>>,
    /// Whether `unsent_probes` has entries. Read without the lock.
    has_unsent_probes: AtomicBool,
    /// The handle has changed a setting of this circuit, so the circuit is not like new and is never evicted.
    steered: AtomicBool,
    /// Limits of the events that each round of half-open probes repeats during an outage.
    half_opened: RepeatedEvent,
    reopened: RepeatedEvent,
}

/// The bit of a token's tag that marks a probe. The other bits are its generation.
const PROBE: u64 = 1 << 63;

/// The generation of calls whose outcomes are not recorded. No circuit reaches it: the word stores 57 bits.
const NO_GENERATION: u64 = PROBE - 1;

impl Circuit {
    /// Returns a circuit in a slot of its own, in which it is not registered.
    ///
    /// `of_many`: a map owns the circuit and evicts it when it is idle. Therefore each call holds a counted reference.
    pub(super) fn new(trip: Trip, settings: CircuitSettings, of_many: bool) -> Self {
        Self::in_slot(OwnedSlot::allocate(), trip, settings, of_many)
    }

    /// Returns a circuit that publishes its state in this slot.
    pub(super) fn in_slot(
        slot: OwnedSlot<Self>,
        trip: Trip,
        settings: CircuitSettings,
        of_many: bool,
    ) -> Self {
        Self {
            cell: Cell::new(slot.get().word(), trip, settings, of_many),
            slot,
            changed: Arc::new(Notify::new()),
            clock: Clock::new(),
            label: OnceLock::new(),
            refused: AtomicU64::new(0),
            shadow: AtomicBool::new(false),
            shadowed: AtomicU64::new(0),
            uses_backpressure: AtomicBool::new(false),
            most_waiting: AtomicU32::new(0),
            longest_wait: AtomicU64::new(0),
            waiting: AtomicU32::new(0),
            unsent_probes: Mutex::default(),
            has_unsent_probes: AtomicBool::new(false),
            steered: AtomicBool::new(false),
            half_opened: RepeatedEvent::new(),
            reopened: RepeatedEvent::new(),
        }
    }

    /// Returns a new circuit for the map of a keyed layer, with the rules and settings of this one.
    pub(super) fn like(&self) -> Self {
        let (trip, settings) = self.look(|machine, _, _| machine.shape());
        let new = Self::new(trip, settings, true);
        new.shadow.store(self.shadow.load(Ordering::Relaxed), Ordering::Relaxed);
        new.let_wait(
            self.most_waiting.load(Ordering::Relaxed),
            Duration::from_nanos(self.longest_wait.load(Ordering::Relaxed)),
        );
        new
    }

    // ===== Settings =====

    pub(super) fn name(&self, name: &str) {
        if !name.is_empty() {
            // The first name stays, because rejections in progress refer to it.
            let _ = self.label.set(Arc::new(LayerName { name: name.into(), fault: None }));
        }
    }

    pub(super) fn named(&self) -> &str {
        self.label.get().map_or("", |label| &*label.name)
    }

    /// Changes the settings. Wakes waiters, because the new settings may admit them.
    pub(super) fn configure(&self, change: impl FnOnce(&mut CircuitSettings)) {
        self.cell.with(|machine, _| change(&mut machine.settings));
        self.changed.notify_waiters();
    }

    #[inline]
    pub(super) fn is_shadow(&self) -> bool {
        self.shadow.load(Ordering::Relaxed)
    }

    pub(super) fn set_shadow(&self, on: bool) {
        self.shadow.store(on, Ordering::Relaxed);
        self.changed.notify_waiters();
    }

    pub(super) fn hold_back(&self) {
        self.uses_backpressure.store(true, Ordering::Relaxed);
        self.configure(|settings| settings.uses_backpressure = true);
    }

    pub(super) fn let_wait(&self, most: u32, longest: Duration) {
        self.longest_wait.store(nanos(longest), Ordering::Relaxed);
        self.most_waiting.store(most, Ordering::Relaxed);
    }

    pub(super) fn steered(&self) {
        self.steered.store(true, Ordering::Relaxed);
    }

    // ===== Queries =====

    /// Returns the slot of the circuit. The reference may outlive the circuit.
    pub(super) fn slot(&self) -> &'static Slot<Self> {
        self.slot.get()
    }

    pub(super) fn now(&self) -> Nanos {
        self.clock.now()
    }

    /// Converts an instant to the time of this circuit.
    pub(super) fn nanos_at(&self, now: Instant) -> Nanos {
        self.clock.at(now)
    }

    pub(super) fn changed(&self) -> &Arc<Notify> {
        &self.changed
    }

    pub(super) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    pub(super) fn shadowed(&self) -> u64 {
        self.shadowed.load(Ordering::Relaxed)
    }

    #[inline]
    pub(super) fn uses_backpressure(&self) -> bool {
        self.uses_backpressure.load(Ordering::Relaxed)
    }

    /// Returns the state, and the time until it changes without any call.
    pub(super) fn state(&self) -> (CircuitState, Option<Duration>) {
        self.update_unsent_probes();
        let (state, lasts, change) = self.cell.state(|| self.now(), fastrand::f64);
        self.tell(change);
        (state, lasts)
    }

    /// Returns the time until the circuit changes without any call: the end of the open time, of a probe's timeout, or
    /// of a step of a ramp with backpressure.
    pub(super) fn lasts(&self) -> Option<Duration> {
        self.look(|machine, _, now| {
            let at = machine.next_by_time(now)?;
            Some(Duration::from_nanos(at.saturating_sub(now)))
        })
    }

    /// Returns whether a call would be admitted now. In shadow mode, this is always the case.
    ///
    /// Without backpressure, an open circuit returns `false` and reads no clock, even if its open time has passed. The
    /// call reads the clock anyway. If it becomes a probe, it polls the inner service ready itself. A balancer must
    /// know the exact result before the call.
    #[inline]
    pub(super) fn has_room(&self) -> bool {
        if self.cell.is_open() && !self.uses_backpressure() {
            return self.is_shadow();
        }
        self.has_room_by_now()
    }

    #[inline(never)]
    fn has_room_by_now(&self) -> bool {
        self.update_unsent_probes();
        let (room, change) = self.cell.has_room(|| self.now(), fastrand::f64);
        self.tell(change);
        room || self.shadow.load(Ordering::Relaxed)
    }

    /// Returns whether a call that was admitted, and whose inner call has not begun, would be rejected by now.
    pub(super) fn is_late(&self, token: Token) -> bool {
        if is_probe(token) {
            return !self.cell.still_probes(token.tag & !PROBE);
        }
        is_late(self.cell.published(), token)
    }

    /// Returns for how long the circuit has been idle, or `None` if it is not like new. Emits no event and never waits,
    /// so that it can run under the lock of a map.
    pub(super) fn idle_for(&self, now: Instant) -> Option<Nanos> {
        if self.steered.load(Ordering::Relaxed) {
            return None;
        }
        self.cell.idle_for(self.clock.at(now))
    }

    // ===== Operations =====

    /// Records an outcome that does not come from a call of this layer, such as that of a health probe.
    pub(super) fn record(&self, outcome: Outcome) {
        let told = |machine: &mut Machine, at: At<'_>| ((), machine.told(outcome, at));
        let ((), change) = self.cell.with_time(self.now(), fastrand::f64, told);
        self.tell(change);
    }

    /// Runs an operation on the machine and publishes its change.
    pub(super) fn act(&self, act: impl FnOnce(&mut Machine, At<'_>) -> Option<Transition>) {
        let now = self.now();
        let change = self.cell.with(|machine, times| act(machine, at(now, times)));
        self.tell(change);
    }

    /// Reads the machine after the changes that are due by time.
    pub(super) fn look<T>(&self, look: impl FnOnce(&Machine, &TimeWindows, Nanos) -> T) -> T {
        self.update_unsent_probes();
        let now = self.now();
        let (seen, change) = self.cell.with_time(now, fastrand::f64, |machine, at| {
            let change = machine.pass_time(at);
            (look(machine, at.times, now), change)
        });
        self.tell(change);
        seen
    }

    /// Publishes a change. Must be called without a lock.
    #[inline]
    fn tell(&self, change: Option<Transition>) {
        if let Some(change) = change {
            self.tell_of(change);
        }
    }

    /// Wakes waiters and emits the events of a change.
    ///
    /// A change without effect on the reported state emits no event: forcing a state that the circuit already has, or a
    /// transition beneath an isolation. It wakes waiters nevertheless, because counts and probes start again.
    #[cold]
    fn tell_of(&self, change: Transition) {
        self.changed.notify_waiters();
        let name = self.named();
        let passed = change.probes.map(|probes| probes.passed);
        let failed = change.probes.map(|probes| probes.failed);
        let probes = change.probes.map(|probes| probes.total);
        match change.tripped {
            Some(why) if why.is_of_probes() => {
                if let Some(occurrences) = self.reopened.record() {
                    event!(
                        breaker,
                        WARN,
                        resilience.name = name,
                        reason = %why,
                        passed,
                        failed,
                        probes,
                        occurrences,
                        "circuit opened again"
                    );
                    let _ = occurrences;
                }
            }
            Some(why) => {
                event!(breaker, WARN, resilience.name = name, reason = %why, "circuit opened");
                let _ = why;
            }
            None => {}
        }
        match change.to {
            CircuitState::Open if change.tripped.is_some() => {}
            // A combined change can lead from half-open to half-open by way of a trip.
            CircuitState::HalfOpen if change.from != change.to || change.tripped.is_some() => {
                if let Some(occurrences) = self.half_opened.record() {
                    event!(
                        breaker,
                        INFO,
                        resilience.name = name,
                        state = CircuitState::HalfOpen.as_str(),
                        occurrences,
                        "circuit changed"
                    );
                    let _ = occurrences;
                }
            }
            _ if change.from == change.to => {}
            CircuitState::Closed => {
                event!(
                    breaker,
                    INFO,
                    resilience.name = name,
                    passed,
                    failed,
                    probes,
                    "circuit closed"
                );
            }
            to => {
                event!(
                    breaker,
                    INFO,
                    resilience.name = name,
                    state = to.as_str(),
                    "circuit changed"
                );
                let _ = to;
            }
        }
        let _ = (name, passed, failed, probes);
    }

    // ===== Waiting for a verdict =====

    /// Adds a waiter, and returns the maximum duration of its wait. `None` if there are too many waiters.
    pub(super) fn wait(&self) -> Option<Duration> {
        let most = self.most_waiting.load(Ordering::Relaxed);
        let one_more = |waiting| (waiting < most).then(|| waiting + 1);
        self.waiting.fetch_update(Ordering::AcqRel, Ordering::Relaxed, one_more).ok()?;
        Some(Duration::from_nanos(self.longest_wait.load(Ordering::Relaxed)))
    }

    pub(super) fn wait_no_more(&self) {
        self.waiting.fetch_sub(1, Ordering::AcqRel);
    }

    // ===== Calls =====

    #[inline]
    pub(super) fn enter(
        &self,
        sent_mark: impl FnOnce() -> Option<SentMark>,
    ) -> Result<Token, Refusal> {
        match self.cell.published().admit() {
            Some(token) => Ok(token),
            None => self.enter_slowly(sent_mark),
        }
    }

    #[inline(never)]
    fn enter_slowly(&self, sent_mark: impl FnOnce() -> Option<SentMark>) -> Result<Token, Refusal> {
        match self.cell.refuses_for(|| self.now()) {
            Some(left) if !self.is_shadow() => Err(Refusal::Open { left }),
            _ => self.enter_by_machine(sent_mark),
        }
    }

    #[inline(never)]
    fn enter_by_machine(
        &self,
        sent_mark: impl FnOnce() -> Option<SentMark>,
    ) -> Result<Token, Refusal> {
        let unsent = if self.cell.may_probe() { self.unsent_mark(sent_mark()) } else { None };
        let (answer, change) = self.cell.admit(unsent.is_some(), || self.now(), fastrand::f64);
        self.tell(change);
        let ticket = match answer {
            Ok(ticket) => ticket,
            Err(_) if self.is_shadow() => {
                self.shadowed.fetch_add(1, Ordering::Relaxed);
                Ticket { generation: NO_GENERATION, probe: false }
            }
            Err(refusal) => return Err(refusal),
        };
        if ticket.probe {
            if let Some(mark) = unsent {
                let before = lock(&self.unsent_probes).insert(ticket.generation, mark);
                drop(before);
                self.has_unsent_probes.store(true, Ordering::Release);
            }
            // This may have been the last slot. Callers that wait for the inner service may now have to be rejected.
            self.changed.notify_waiters();
        }
        let clock = if self.cell.measures() { UpstreamClock::start() } else { UpstreamClock::OFF };
        let tag = ticket.generation | if ticket.probe { PROBE } else { 0 };
        Ok(Token { tag, clock })
    }

    /// Returns the mark if the request is still to be sent, and starts its clock readings.
    fn unsent_mark(&self, mark: Option<SentMark>) -> Option<SentMark> {
        self.update_unsent_probes();
        let mark = mark.filter(|mark| !mark.is_sent())?;
        mark.measure();
        Some(mark)
    }

    /// Updates the machine with the progress of the probes' request bodies.
    #[inline]
    fn update_unsent_probes(&self) {
        if self.has_unsent_probes.load(Ordering::Acquire) {
            self.read_marks();
        }
    }

    #[cold]
    fn read_marks(&self) {
        let (mut changes, mut slot_changed) = (Vec::new(), false);
        let mut next = 0;
        loop {
            // A slice of the marks per lock hold. Each mark is read and reported under the lock, so that an older
            // reading of it never follows a newer one.
            let mut unsent = lock(&self.unsent_probes);
            let slice: Vec<(u64, SentMark)> = unsent
                .range(next..)
                .take(MAX_CHANGES)
                .map(|(probe, mark)| (*probe, mark.clone()))
                .collect();
            let Some((last, _)) = slice.last() else {
                self.has_unsent_probes.store(!unsent.is_empty(), Ordering::Release);
                break;
            };
            next = last.saturating_add(1);
            for (probe, mark) in slice {
                let progress = mark.progress();
                // A probe starts in the wait for the transport, so that wait needs no report.
                if progress.waits_for != WaitsFor::Transport {
                    let since =
                        progress.since.map_or_else(|| self.now(), |since| self.clock.at(since));
                    let what = progress.waits_for;
                    let report = ProbeReport { what, since, is_sent: progress.is_sent };
                    let (changed, change) = self.record_probe_report(probe, report);
                    slot_changed |= changed;
                    changes.extend(change);
                }
                if progress.is_sent || !self.cell.still_probes(probe) {
                    unsent.remove(&probe);
                }
            }
            self.has_unsent_probes.store(!unsent.is_empty(), Ordering::Release);
        }
        self.publish_probe_changes(slot_changed, changes);
    }

    fn record_probe_report(&self, probe: u64, report: ProbeReport) -> (bool, Option<Transition>) {
        self.cell.with_time(self.now(), fastrand::f64, |machine, at| {
            machine.record_probe_report(probe, report, at)
        })
    }

    fn publish_probe_changes(
        &self,
        slot_changed: bool,
        changes: impl IntoIterator<Item = Transition>,
    ) {
        for change in changes {
            self.tell_of(change);
        }
        if slot_changed {
            // Callers that wait for a slot reset their timers.
            self.changed.notify_waiters();
        }
    }

    /// Stops reading the mark of a probe whose response head has arrived.
    fn remove_sent_mark(&self, probe: u64) {
        if self.has_unsent_probes.load(Ordering::Acquire) {
            let mark = lock(&self.unsent_probes).remove(&probe);
            drop(mark);
        }
    }

    /// Returns whether the circuit reads a mark of this probe. The mark is more exact than the reports of inner layers.
    fn has_sent_mark(&self, probe: u64) -> bool {
        self.has_unsent_probes.load(Ordering::Acquire)
            && lock(&self.unsent_probes).contains_key(&probe)
    }

    pub(super) fn refuse(&self, refusal: Refusal) -> Rejected {
        let (kind, back_after) = match refusal {
            Refusal::Open { left } => (RejectedKind::Open, left),
            Refusal::Probing => (RejectedKind::Probing, PROBING),
            Refusal::Ramping { left } => (RejectedKind::Recovering, left.min(PROBING)),
            Refusal::Forced => return self.refuse_as(RejectedKind::ForcedOpen),
        };
        // Rounded up, because a caller that returns earlier is rejected again.
        self.refuse_as(kind).with_retry_after_ms(back_after.div_ceil(1_000_000))
    }

    /// Returns the rejection of a call whose deadline has passed.
    #[cold]
    pub(super) fn refuse_late(&self) -> Rejected {
        self.refuse_as(RejectedKind::DeadlinePassed)
    }

    #[inline]
    fn refuse_as(&self, kind: RejectedKind) -> Rejected {
        self.refused.fetch_add(1, Ordering::Relaxed);
        event!(
            breaker,
            DEBUG,
            resilience.name = self.named(),
            reason = kind.as_str(),
            "call rejected"
        );
        Rejected::by(LayerKind::CircuitBreaker, kind).labelled(self.label.get().cloned())
    }
}

/// Returns whether a call that was admitted, and whose inner call has not begun, would be rejected by now. Requires
/// that the call is not a probe.
pub(super) fn is_late(published: &PublishedState, token: Token) -> bool {
    token.tag != NO_GENERATION && !published.still_admits(token.tag)
}

#[inline]
pub(super) fn is_probe(token: Token) -> bool {
    token.tag & PROBE != 0
}

fn at(now: Nanos, times: &TimeWindows) -> At<'_> {
    At { now, roll: fastrand::f64, times }
}

fn ticket(token: Token) -> Ticket {
    Ticket { generation: token.tag & !PROBE, probe: is_probe(token) }
}

impl Release for Circuit {
    #[inline]
    fn record_head(&self, token: &mut Token, so_far: Outcome) {
        if self.cell.measures() || is_probe(*token) {
            self.head_measured(token, so_far);
        }
    }

    #[inline]
    fn release(&self, token: Token, outcome: Outcome) {
        let good = outcome.is_success() && !self.cell.measures();
        if !(good && self.cell.count_good(token.tag, || self.now())) {
            self.release_by_machine(token, outcome);
        }
    }

    #[inline]
    fn release_at(&self) -> ReleaseAt {
        ReleaseAt::Verdict
    }

    fn measures(&self) -> Measures {
        // Probes are always measured, because their timeout starts when the upstream has the request.
        if self.cell.published().attributes() || self.cell.measures() || self.cell.may_probe() {
            Measures::Head
        } else {
            Measures::Nothing
        }
    }

    fn count_cancelled_after(&self) -> Option<Duration> {
        self.cell.count_cancelled_after()
    }

    #[inline]
    fn follows_reader(&self, token: Token) -> bool {
        is_probe(token)
    }

    fn waits_for(&self, token: Token, what: WaitsFor) {
        let probe = ticket(token).generation;
        if is_probe(token) && !self.has_sent_mark(probe) {
            let report = ProbeReport { what, since: self.now(), is_sent: true };
            let (slot_changed, change) = self.record_probe_report(probe, report);
            self.publish_probe_changes(slot_changed, change);
        }
    }
}

impl Circuit {
    #[inline(never)]
    fn head_measured(&self, token: &mut Token, so_far: Outcome) {
        self.update_unsent_probes();
        self.remove_sent_mark(ticket(*token).generation);
        let now = Instant::now();
        token.clock.stop(now);
        let so_far = Ended { outcome: so_far, took: self.took(*token, || now) };
        self.tell(self.cell.head(ticket(*token), so_far, || self.clock.at(now), fastrand::f64));
    }

    #[inline(never)]
    fn release_by_machine(&self, token: Token, outcome: Outcome) {
        self.update_unsent_probes();
        // The clock is read at most once, and not at all if neither a rule nor the machine needs the time.
        let mut read = None;
        let mut now = || *read.get_or_insert_with(Instant::now);
        let took = self.took(token, &mut now);
        let ticket = ticket(token);
        let now = || self.clock.at(now());
        let change = self.cell.finish(ticket, Ended { outcome, took }, now, fastrand::f64);
        if ticket.probe && change.is_none() {
            // The probe may have released a slot.
            self.changed.notify_waiters();
        }
        self.tell(change);
    }

    /// Returns how long the upstream had the request before its response head, or 0 if no rule measures calls.
    fn took(&self, token: Token, now: impl FnOnce() -> Instant) -> Nanos {
        if token.clock.is_off() || !self.cell.measures() {
            return 0;
        }
        token.clock.elapsed(now()).map_or(0, nanos)
    }
}

// ===== The slot =====

impl SlotOwner for Circuit {
    type Word = PublishedState;

    fn free_slots() -> &'static FreeSlots<Self> {
        static FREE: FreeSlots<Circuit> = FreeSlots::new();
        &FREE
    }
}

/// The owner of the permits of calls that the word admits and releases: see [`published`](super::published).
impl Release for Slot<Circuit> {
    #[inline]
    fn release(&self, token: Token, outcome: Outcome) {
        if !(self.word().ignores_success() && outcome.is_success()) {
            release_by_circuit(self, token, outcome);
        }
    }

    #[inline]
    fn release_at(&self) -> ReleaseAt {
        ReleaseAt::Verdict
    }

    #[inline]
    fn measures(&self) -> Measures {
        if self.word().attributes() { Measures::Head } else { Measures::Nothing }
    }

    /// If another circuit owns the slot by now, the call is late and its outcome is not recorded.
    #[cold]
    fn count_cancelled_after(&self) -> Option<Duration> {
        self.owner_if(|_| true)?.count_cancelled_after()
    }
}

#[cold]
#[inline(never)]
fn release_by_circuit(slot: &Slot<Circuit>, token: Token, outcome: Outcome) {
    // An equal generation means that the registered circuit is the one that issued this token.
    if let Some(circuit) = slot.owner_if(|word| word.load().generation() == token.tag) {
        circuit.release(token, outcome);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Circuit {
    fn drop(&mut self) {
        // Before the drop of the slot, which returns it to the free list.
        self.cell.published().vacate();
    }
}

impl fmt::Debug for Circuit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Circuit")
            .field("name", &self.named())
            .field("state", &self.state().0)
            .finish_non_exhaustive()
    }
}
