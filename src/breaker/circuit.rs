//! A circuit: the [`SyncMachine`] with its clock, its name, its counters, and the notification of changes.
//!
//! # Mechanism
//!
//! [`SyncMachine`] decides, with the time as an argument. [`Circuit`] reads the clock, calls the machine, and publishes
//! the [`Transition`] that it returns: it wakes the waiters of `changed` and emits events. Both run user code (wakers
//! and subscribers), so they run after all locks are released.
//!
//! A call follows one of these paths:
//!
//! 1. [`PublishedState::admit`] admits it with one load, if the circuit is closed and no rule measures calls.
//! 2. Otherwise [`SyncMachine::open_time_left`] rejects it without a lock, if the circuit is open.
//! 3. Otherwise the machine decides under its lock.
//!
//! The call carries a [`Token`], whose tag is a [`CircuitToken`]: the generation in which the call was admitted, and
//! whether it is a half-open probe.
//!
//! # Unsent probes
//!
//! The timeout of a probe starts when its request has been sent. The sent mark of the request reveals this, but it does
//! not notify the circuit. So the circuit keeps the marks of such probes in `unsent_probes`. It reads them before it
//! admits a call that may be a probe, ends a call through the machine, or reports its state.
//!
//! - Lock order: the lock of `unsent_probes` is held while the lock of the machine is taken, never the other way round.
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
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use super::{
    events::CircuitEvents,
    machine::{At, Ended, MAX_CHANGES, Machine, ProbeReport, TimeWindows},
    published::PublishedState,
    state::{CircuitSettings, CircuitState, CircuitToken, Rejection, Transition},
    sync_machine::SyncMachine,
    trip::Trip,
};
use crate::{
    fault::NameCell,
    outcome::{
        LayerKind, Outcome, Rejected, RejectedKind, SentMark, UpstreamClock, WaitsFor,
        report_rejection,
    },
    permit::{FreeSlots, Measures, OwnedSlot, Release, ReleaseAt, Slot, SlotOwner, Token},
    report::{ReportCell, StateChange},
    sealed::Sealed,
    sync::Mutex,
    time::{Clock, Nanos, nanos},
    user_code::catch_panic,
};

/// The `retry_after` of a rejection by a half-open circuit. The end of its probes has no known time.
const PROBING_RETRY_AFTER: Nanos = 1_000_000_000;

/// The kinds of rejections by a circuit.
pub(super) const REJECTIONS: [RejectedKind; 6] = [
    RejectedKind::Open,
    RejectedKind::Probing,
    RejectedKind::Recovering,
    RejectedKind::ForcedOpen,
    RejectedKind::DeadlinePassed,
    RejectedKind::Misconfigured,
];

/// The state of a circuit breaker, or of one key of a keyed circuit breaker.
pub(crate) struct Circuit {
    machine: SyncMachine,
    slot: OwnedSlot<Self>,
    /// Notified of each change and of each probe slot that is taken or released.
    changed: Arc<Notify>,
    clock: Clock,
    label: NameCell,
    /// The registries that receive the changes.
    reports: ReportCell,
    /// The number of rejected calls, in the order of [`REJECTIONS`].
    rejected: [AtomicU64; REJECTIONS.len()],
    /// Shadow mode: admits all calls, and counts those that it would reject.
    shadow: AtomicBool,
    shadowed: AtomicU64,
    /// Backpressure: the service is not ready while the circuit would reject a call.
    backpressure: AtomicBool,
    /// The maximum number of callers that wait for the verdict of the probes, and the maximum duration of the wait.
    max_waiting: AtomicU32,
    max_wait: AtomicU64,
    waiting: AtomicU32,
    /// Marks of the probes whose requests were still to be sent when they were admitted, by generation.
    unsent_probes: Mutex<BTreeMap<u64, SentMark>>,
    /// Whether `unsent_probes` has entries. Read without the lock.
    has_unsent_probes: AtomicBool,
    /// The handle has changed a setting of this circuit, so the circuit is not like new and is never evicted.
    is_configured: AtomicBool,
    /// A service has been built with the circuit, so a setter of its layer must not change it.
    is_in_use: AtomicBool,
    /// The events of the changes. The circuits of a keyed layer share them.
    events: Arc<CircuitEvents>,
}

impl Circuit {
    /// Returns a circuit in a slot of its own, in which it is not registered.
    ///
    /// `keyed` are the events of the keyed layer that the circuit belongs to, or `None` for a circuit without a key.
    /// The map of a keyed layer owns its circuits and evicts idle ones, so each call holds a counted reference.
    pub(super) fn new(
        trip: Trip,
        settings: CircuitSettings,
        keyed: Option<&Arc<CircuitEvents>>,
    ) -> Self {
        Self::in_slot(OwnedSlot::allocate(), trip, settings, keyed)
    }

    /// Returns a circuit that publishes its state in this slot.
    pub(super) fn in_slot(
        slot: OwnedSlot<Self>,
        trip: Trip,
        settings: CircuitSettings,
        keyed: Option<&Arc<CircuitEvents>>,
    ) -> Self {
        Self {
            machine: SyncMachine::new(slot.get().word(), trip, settings, keyed.is_some()),
            slot,
            changed: Arc::new(Notify::new()),
            clock: Clock::new(),
            label: NameCell::default(),
            reports: ReportCell::default(),
            rejected: Default::default(),
            shadow: AtomicBool::new(false),
            shadowed: AtomicU64::new(0),
            backpressure: AtomicBool::new(false),
            max_waiting: AtomicU32::new(0),
            max_wait: AtomicU64::new(0),
            waiting: AtomicU32::new(0),
            unsent_probes: Mutex::default(),
            has_unsent_probes: AtomicBool::new(false),
            is_configured: AtomicBool::new(false),
            is_in_use: AtomicBool::new(false),
            events: keyed.map_or_else(|| Arc::new(CircuitEvents::of_one()), Arc::clone),
        }
    }

    /// Returns a new circuit with the rules, the settings and the name of this one. It can get another name.
    pub(super) fn fork(&self) -> Self {
        let mut new = self.like(None);
        new.label = self.label.fork();
        new
    }

    /// Returns a new circuit with the rules and settings of this one, and without its name.
    pub(super) fn like(&self, keyed: Option<&Arc<CircuitEvents>>) -> Self {
        let (trip, settings) = self.read(|machine, _, _| machine.shape());
        let new = Self::new(trip, settings, keyed);
        new.shadow.store(self.is_shadow(), Ordering::Relaxed);
        new.backpressure.store(self.has_backpressure(), Ordering::Relaxed);
        new.set_half_open_queue(
            self.max_waiting.load(Ordering::Relaxed),
            Duration::from_nanos(self.max_wait.load(Ordering::Relaxed)),
        );
        new
    }

    // ===== Settings =====

    pub(super) fn name(&self, name: &str) {
        self.label.set(name);
    }

    pub(super) fn named(&self) -> &str {
        self.label.as_str()
    }

    /// Changes the settings. Wakes waiters, because the new settings may admit them.
    pub(super) fn configure(&self, change: impl FnOnce(&mut CircuitSettings)) {
        self.machine.with(|machine, _| change(&mut machine.settings));
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

    pub(super) fn set_backpressure(&self) {
        self.backpressure.store(true, Ordering::Relaxed);
        self.configure(|settings| settings.backpressure = true);
    }

    pub(super) fn set_half_open_queue(&self, max_waiting: u32, max_wait: Duration) {
        self.max_wait.store(nanos(max_wait), Ordering::Relaxed);
        self.max_waiting.store(max_waiting, Ordering::Relaxed);
    }

    pub(super) fn is_in_use(&self) -> bool {
        self.is_in_use.load(Ordering::Relaxed)
    }

    pub(super) fn set_in_use(&self) {
        self.is_in_use.store(true, Ordering::Relaxed);
    }

    pub(super) fn set_configured(&self) {
        self.is_configured.store(true, Ordering::Relaxed);
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

    /// Returns the number of rejected calls, in the order of [`REJECTIONS`].
    pub(super) fn rejected(&self) -> [u64; REJECTIONS.len()] {
        self.rejected.each_ref().map(|count| count.load(Ordering::Relaxed))
    }

    pub(super) fn waiting(&self) -> (u32, u32) {
        (self.waiting.load(Ordering::Relaxed), self.max_waiting.load(Ordering::Relaxed))
    }

    pub(super) fn shadowed(&self) -> u64 {
        self.shadowed.load(Ordering::Relaxed)
    }

    #[inline]
    pub(super) fn has_backpressure(&self) -> bool {
        self.backpressure.load(Ordering::Relaxed)
    }

    /// Returns the state, and the time until it changes without any call.
    pub(super) fn state(&self) -> (CircuitState, Option<Duration>) {
        self.update_unsent_probes();
        let (state, lasts, change) = self.machine.state(|| self.now(), fastrand::f64);
        self.notify(change);
        (state, lasts)
    }

    /// Returns the time until the circuit changes without any call: the end of the open time, of a probe's timeout, or
    /// of a step of a ramp with backpressure.
    pub(super) fn time_to_change(&self) -> Option<Duration> {
        self.read(|machine, _, now| {
            let at = machine.next_by_time(now)?;
            Some(Duration::from_nanos(at.saturating_sub(now)))
        })
    }

    /// Returns whether a call would be admitted now. In shadow mode, this is always the case.
    ///
    /// Without backpressure, an open circuit returns `false` and reads no clock, even if its open time has passed. The
    /// call reads the clock anyway. If it becomes a probe, it polls the inner service ready itself. A balancer needs
    /// the exact result before the call.
    #[inline]
    pub(super) fn has_room(&self) -> bool {
        if self.machine.is_open() && !self.has_backpressure() {
            return self.is_shadow();
        }
        self.has_room_by_now()
    }

    #[inline(never)]
    fn has_room_by_now(&self) -> bool {
        self.update_unsent_probes();
        let (room, change) = self.machine.has_room(|| self.now(), fastrand::f64);
        self.notify(change);
        room || self.shadow.load(Ordering::Relaxed)
    }

    /// Returns whether a call that was admitted, and whose inner call has not begun, would be rejected by now.
    pub(super) fn is_late(&self, token: Token) -> bool {
        let admitted = unpack(token);
        if admitted.is_probe {
            return !self.machine.still_probes(admitted.generation);
        }
        is_late(self.machine.published(), token)
    }

    /// Returns for how long the circuit has been idle, or `None` if it is not like new. Emits no event and never waits,
    /// so that it can run under the lock of a map.
    pub(super) fn idle_for(&self, now: Instant) -> Option<Nanos> {
        if self.is_configured.load(Ordering::Relaxed) {
            return None;
        }
        self.machine.idle_for(self.clock.at(now))
    }

    // ===== Operations =====

    /// Records an outcome that does not come from a call of this layer, such as that of a health probe.
    pub(super) fn record(&self, outcome: Outcome) {
        let record = |machine: &mut Machine, at: At<'_>| ((), machine.record_external(outcome, at));
        let ((), change) = self.machine.with_time(self.now(), fastrand::f64, record);
        self.notify(change);
    }

    /// Runs an operation on the machine and publishes its change.
    pub(super) fn change(&self, act: impl FnOnce(&mut Machine, At<'_>) -> Option<Transition>) {
        let now = self.now();
        let change = self.machine.with(|machine, times| act(machine, at(now, times)));
        self.notify(change);
    }

    /// Reads the machine after the changes that are due by time.
    pub(super) fn read<T>(&self, read: impl FnOnce(&Machine, &TimeWindows, Nanos) -> T) -> T {
        self.update_unsent_probes();
        let now = self.now();
        let (seen, change) = self.machine.with_time(now, fastrand::f64, |machine, at| {
            let change = machine.pass_time(at);
            (read(machine, at.times, now), change)
        });
        self.notify(change);
        seen
    }

    /// Publishes a change. Must be called without a lock.
    #[inline]
    fn notify(&self, change: Option<Transition>) {
        if let Some(change) = change {
            self.notify_of(change);
        }
    }

    /// Wakes waiters, emits the events of a change and reports it. A change without effect on the reported state wakes
    /// waiters, too, because counts and probes start again.
    #[cold]
    fn notify_of(&self, change: Transition) {
        self.changed.notify_waiters();
        // A panic of the subscriber must not withhold the change from the registries. This may run in a destructor.
        let _ = catch_panic(|| self.events.emit(self.named(), &change));
        self.report(change);
    }

    /// Reports a change of the reported state to the registries, in the words of the events of [`CircuitEvents::emit`].
    fn report(&self, change: Transition) {
        let Transition { from, to, tripped, by, .. } = change;
        let before = if tripped.is_some() { CircuitState::Open } else { from };
        if let Some(why) = tripped {
            self.reports.report(|| StateChange {
                event: "circuit opened",
                reason: Some(why.as_str()),
                why: why.to_string(),
            });
        }
        let event = match (by, to) {
            (Some(_), _) if from != to => "circuit forced",
            (None, CircuitState::HalfOpen) if before != to => "circuit half-open",
            (None, CircuitState::Closed) if before != to => "circuit closed",
            _ => return,
        };
        self.reports.report(|| StateChange {
            event,
            reason: None,
            why: match by {
                Some(_) => format!("{}, {} before", to.as_str(), before.as_str()),
                None => format!("{} before", before.as_str()),
            },
        });
    }

    #[cfg(feature = "observe")]
    pub(super) fn reports(&self) -> &ReportCell {
        &self.reports
    }

    // ===== Waiting for a verdict =====

    /// Adds a waiter, and returns the maximum duration of its wait. `None` if there are too many waiters.
    pub(super) fn join_queue(&self) -> Option<Duration> {
        let max = self.max_waiting.load(Ordering::Relaxed);
        let one_more = |waiting| (waiting < max).then(|| waiting + 1);
        self.waiting.fetch_update(Ordering::AcqRel, Ordering::Relaxed, one_more).ok()?;
        Some(Duration::from_nanos(self.max_wait.load(Ordering::Relaxed)))
    }

    pub(super) fn leave_queue(&self) {
        self.waiting.fetch_sub(1, Ordering::AcqRel);
    }

    // ===== Calls =====

    #[inline]
    pub(super) fn admit(
        &self,
        sent_mark: impl FnOnce() -> Option<SentMark>,
    ) -> Result<Token, Rejection> {
        match self.machine.published().admit() {
            Some(token) => Ok(token),
            None => self.admit_unless_open(sent_mark),
        }
    }

    #[inline(never)]
    fn admit_unless_open(
        &self,
        sent_mark: impl FnOnce() -> Option<SentMark>,
    ) -> Result<Token, Rejection> {
        match self.machine.open_time_left(|| self.now()) {
            Some(left) if !self.is_shadow() => Err(Rejection::Open { left }),
            _ => self.admit_by_machine(sent_mark),
        }
    }

    #[inline(never)]
    fn admit_by_machine(
        &self,
        sent_mark: impl FnOnce() -> Option<SentMark>,
    ) -> Result<Token, Rejection> {
        let unsent = if self.machine.may_probe() { self.unsent_mark(sent_mark()) } else { None };
        let (admission, change) =
            self.machine.admit(unsent.is_some(), || self.now(), fastrand::f64);
        self.notify(change);
        let admitted = match admission {
            Ok(admitted) => admitted,
            Err(rejection) if self.is_shadow() => {
                self.shadowed.fetch_add(1, Ordering::Relaxed);
                let (kind, retry_after_ms) = describe(rejection);
                let retry_after = retry_after_ms.map(Duration::from_millis);
                let layer = LayerKind::CircuitBreaker;
                report_rejection(layer, self.named(), kind, retry_after, true);
                CircuitToken::UNCOUNTED
            }
            Err(rejection) => return Err(rejection),
        };
        if admitted.is_probe {
            if let Some(mark) = unsent {
                let before = self.unsent_probes.lock().insert(admitted.generation, mark);
                drop(before);
                self.has_unsent_probes.store(true, Ordering::Release);
            }
            // This may have been the last slot. Callers that wait for the inner service may now have to be rejected.
            self.changed.notify_waiters();
        }
        let clock =
            if self.machine.measures() { UpstreamClock::start() } else { UpstreamClock::OFF };
        Ok(Token { tag: admitted.pack(), clock })
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
            let mut unsent = self.unsent_probes.lock();
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
                if progress.is_sent || !self.machine.still_probes(probe) {
                    unsent.remove(&probe);
                }
            }
            self.has_unsent_probes.store(!unsent.is_empty(), Ordering::Release);
        }
        self.publish_probe_changes(slot_changed, changes);
    }

    fn record_probe_report(&self, probe: u64, report: ProbeReport) -> (bool, Option<Transition>) {
        self.machine.with_time(self.now(), fastrand::f64, |machine, at| {
            machine.record_probe_report(probe, report, at)
        })
    }

    fn publish_probe_changes(
        &self,
        slot_changed: bool,
        changes: impl IntoIterator<Item = Transition>,
    ) {
        for change in changes {
            self.notify_of(change);
        }
        if slot_changed {
            // Callers that wait for a slot reset their timers.
            self.changed.notify_waiters();
        }
    }

    /// Stops reading the mark of a probe whose response head has arrived.
    fn remove_sent_mark(&self, probe: u64) {
        if self.has_unsent_probes.load(Ordering::Acquire) {
            let mark = self.unsent_probes.lock().remove(&probe);
            drop(mark);
        }
    }

    /// Returns whether the circuit reads a mark of this probe. The mark is more exact than the reports of inner layers.
    fn has_sent_mark(&self, probe: u64) -> bool {
        self.has_unsent_probes.load(Ordering::Acquire)
            && self.unsent_probes.lock().contains_key(&probe)
    }

    pub(super) fn reject(&self, rejection: Rejection) -> Rejected {
        let (kind, retry_after_ms) = describe(rejection);
        self.reject_as(kind, retry_after_ms)
    }

    /// Returns the rejection of a call whose deadline has passed.
    #[cold]
    pub(super) fn reject_late(&self) -> Rejected {
        self.reject_as(RejectedKind::DeadlinePassed, None)
    }

    /// Counts a call that is rejected because a setting cannot work.
    #[cold]
    pub(super) fn count_misconfigured(&self) {
        self.rejected[REJECTIONS.len() - 1].fetch_add(1, Ordering::Relaxed);
    }

    #[inline]
    fn reject_as(&self, kind: RejectedKind, retry_after_ms: Option<u64>) -> Rejected {
        let nth = REJECTIONS.iter().position(|known| *known == kind).unwrap_or(0);
        self.rejected[nth].fetch_add(1, Ordering::Relaxed);
        let rejected = Rejected::by(LayerKind::CircuitBreaker, kind);
        let rejected = rejected.labelled(self.label.get().cloned());
        match retry_after_ms {
            Some(ms) => rejected.with_retry_after_ms(ms),
            None => rejected,
        }
        .reported()
    }
}

/// Returns the kind of a rejection, and the time in milliseconds after which a retry may succeed.
fn describe(rejection: Rejection) -> (RejectedKind, Option<u64>) {
    let (kind, back_after) = match rejection {
        Rejection::Open { left } => (RejectedKind::Open, left),
        Rejection::Probing => (RejectedKind::Probing, PROBING_RETRY_AFTER),
        Rejection::Ramping { left } => (RejectedKind::Recovering, left.min(PROBING_RETRY_AFTER)),
        Rejection::Forced => return (RejectedKind::ForcedOpen, None),
    };
    // Rounded up, because a caller that returns earlier is rejected again.
    (kind, Some(back_after.div_ceil(1_000_000)))
}

/// Returns whether a call that was admitted, and whose inner call has not begun, would be rejected by now. Requires
/// that the call is not a probe.
pub(super) fn is_late(published: &PublishedState, token: Token) -> bool {
    token.tag != CircuitToken::UNCOUNTED.pack() && !published.still_admits(token.tag)
}

#[inline]
pub(super) fn is_probe(token: Token) -> bool {
    unpack(token).is_probe
}

fn at(now: Nanos, times: &TimeWindows) -> At<'_> {
    At { now, rng: fastrand::f64, times }
}

#[inline]
fn unpack(token: Token) -> CircuitToken {
    CircuitToken::unpack(token.tag)
}

impl Sealed for Circuit {}

impl Release for Circuit {
    #[inline]
    fn record_head(&self, token: &mut Token, so_far: Outcome) {
        if self.machine.measures() || is_probe(*token) {
            self.head_measured(token, so_far);
        }
    }

    #[inline]
    fn release(&self, token: Token, outcome: Outcome) {
        let good = outcome.is_success() && !self.machine.measures();
        if !(good && self.machine.count_good(token.tag, || self.now())) {
            self.release_by_machine(token, outcome);
        }
    }

    #[inline]
    fn release_at(&self) -> ReleaseAt {
        ReleaseAt::Verdict
    }

    fn measures(&self) -> Measures {
        // Probes are always measured, because their timeout starts when the upstream has the request.
        if self.machine.published().attributes()
            || self.machine.measures()
            || self.machine.may_probe()
        {
            Measures::Head
        } else {
            Measures::Nothing
        }
    }

    fn count_cancelled_after(&self) -> Option<Duration> {
        self.machine.count_cancelled_after()
    }

    #[inline]
    fn follows_reader(&self, token: Token) -> bool {
        is_probe(token)
    }

    fn waits_for(&self, token: Token, what: WaitsFor) {
        let CircuitToken { generation: probe, is_probe } = unpack(token);
        if is_probe && !self.has_sent_mark(probe) {
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
        self.remove_sent_mark(unpack(*token).generation);
        let now = Instant::now();
        token.clock.stop(now);
        let so_far = Ended { outcome: so_far, took: self.took(*token, || now) };
        self.notify(self.machine.record_head(
            unpack(*token),
            so_far,
            || self.clock.at(now),
            fastrand::f64,
        ));
    }

    #[inline(never)]
    fn release_by_machine(&self, token: Token, outcome: Outcome) {
        self.update_unsent_probes();
        // The clock is read at most once, and not at all if neither a rule nor the machine needs the time.
        let mut read = None;
        let mut now = || *read.get_or_insert_with(Instant::now);
        let took = self.took(token, &mut now);
        let admitted = unpack(token);
        let now = || self.clock.at(now());
        let change = self.machine.release(admitted, Ended { outcome, took }, now, fastrand::f64);
        if admitted.is_probe && change.is_none() {
            // The probe may have released a slot.
            self.changed.notify_waiters();
        }
        self.notify(change);
    }

    /// Returns how long the upstream had the request before its response head, or 0 if no rule measures calls.
    fn took(&self, token: Token, now: impl FnOnce() -> Instant) -> Nanos {
        if token.clock.is_off() || !self.machine.measures() {
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

impl Drop for Circuit {
    fn drop(&mut self) {
        // Before the drop of the slot, which returns it to the free list.
        self.machine.published().vacate();
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
