//! One circuit: the cell with its clock, its name and those who are told of changes.

use std::{
    fmt,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::Notify;

use super::{
    cell::Cell,
    counts::{Ended, TimeWindows},
    front::Front,
    machine::Machine,
    state::{At, Change, Refusal, Settings, State, Ticket},
    trip::Trip,
};
use crate::{
    call::{
        Clock, Finish, Hold, Label, LayerKind, Nanos, Outcome, Rejected, RejectedKind, Token, nanos,
    },
    event,
};

/// When to come back while probes are under way: their verdict is near, but has no date.
const PROBING: Nanos = 1_000_000_000;

/// One circuit.
pub struct Circuit {
    cell: Cell,
    /// Told of every change, and of every slot that comes back.
    changed: Arc<Notify>,
    clock: Clock,
    label: OnceLock<Arc<Label>>,
    refused: AtomicU64,
    /// Refuses nobody, and counts whom it would have.
    shadow: AtomicBool,
    shadowed: AtomicU64,
    /// Is not ready while it is open.
    holds_back: AtomicBool,
    /// Who may wait for the verdict of the probes, and for how long.
    most_waiting: AtomicU32,
    longest_wait: AtomicU64,
    waiting: AtomicU32,
    /// Steered by hand since it was made: not to be taken for one like any other.
    steered: AtomicBool,
}

/// Set in a token's tag beside the generation of a probe.
const PROBE: u64 = 1 << 63;

/// The generation of calls that count for nothing.
const NO_GENERATION: u64 = PROBE - 1;

impl Circuit {
    /// One whose calls need not be counted, or one of many that come and go, whose are.
    pub(super) fn new(trip: Trip, settings: Settings, of_many: bool) -> Self {
        Self::behind(Front::take(), trip, settings, of_many)
    }

    /// The same, behind this front.
    pub(super) fn behind(
        front: &'static Front,
        trip: Trip,
        settings: Settings,
        of_many: bool,
    ) -> Self {
        Self {
            cell: Cell::new(front, trip, settings, of_many),
            changed: Arc::new(Notify::new()),
            clock: Clock::new(),
            label: OnceLock::new(),
            refused: AtomicU64::new(0),
            shadow: AtomicBool::new(false),
            shadowed: AtomicU64::new(0),
            holds_back: AtomicBool::new(false),
            most_waiting: AtomicU32::new(0),
            longest_wait: AtomicU64::new(0),
            waiting: AtomicU32::new(0),
            steered: AtomicBool::new(false),
        }
    }

    /// A new one of many, with the rules and settings of this one.
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
            // The first name stays: refusals under way point at it.
            let _ = self.label.set(Arc::new(Label { name: name.into(), fault: None }));
        }
    }

    pub(super) fn named(&self) -> &str {
        self.label.get().map_or("", |label| &*label.name)
    }

    /// Settings may let more go than before: who waits looks again.
    pub(super) fn configure(&self, change: impl FnOnce(&mut Settings)) {
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
        self.holds_back.store(true, Ordering::Relaxed);
        self.configure(|settings| settings.holds_back = true);
    }

    pub(super) fn let_wait(&self, most: u32, longest: Duration) {
        self.longest_wait.store(nanos(longest), Ordering::Relaxed);
        self.most_waiting.store(most, Ordering::Relaxed);
    }

    pub(super) fn steered(&self) {
        self.steered.store(true, Ordering::Relaxed);
    }

    // ===== Looking =====

    pub(super) fn front(&self) -> &'static Front {
        self.cell.front()
    }

    pub(super) fn now(&self) -> Nanos {
        self.clock.now()
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
    pub(super) fn holds_back(&self) -> bool {
        self.holds_back.load(Ordering::Relaxed)
    }

    /// The state, and how long it lasts if nothing happens.
    pub(super) fn state(&self) -> (State, Option<Duration>) {
        let (state, lasts, change) = self.cell.state(|| self.now(), fastrand::f64);
        self.tell(change);
        (state, lasts)
    }

    /// How long it lasts, if nothing happens, until time alone changes whether a call would go.
    pub(super) fn lasts(&self) -> Option<Duration> {
        self.look(|machine, _, now| {
            let at = machine.next_by_time(now)?;
            Some(Duration::from_nanos(at.saturating_sub(now)))
        })
    }

    /// Whether a call would go now.
    ///
    /// Whether an open circuit's wait is over is left to the call: it has to look at the clock anyhow, and
    /// one that turns out to be a probe readies the inner service itself. A balancer must know before.
    #[inline]
    pub(super) fn has_room(&self) -> bool {
        if self.cell.is_open() && !self.holds_back() {
            return self.is_shadow();
        }
        self.has_room_by_now()
    }

    #[inline(never)]
    fn has_room_by_now(&self) -> bool {
        let (room, change) = self.cell.has_room(|| self.now(), fastrand::f64);
        self.tell(change);
        room || self.shadow.load(Ordering::Relaxed)
    }

    /// Whether a call that was let through, and has not gone yet, would be refused by now.
    pub(super) fn is_late(&self, token: Token) -> bool {
        if is_probe(token) {
            return !self.cell.still_probes(token.tag & !PROBE);
        }
        is_late(self.front(), token)
    }

    /// Whether nothing would be lost with it.
    pub(super) fn is_fresh(&self) -> bool {
        !self.steered.load(Ordering::Relaxed)
            && self.look(|machine, times, now| machine.is_fresh(now, times))
    }

    // ===== Acting =====

    /// Does something to the machine; whoever waits for a change is told of it.
    pub(super) fn act(&self, act: impl FnOnce(&mut Machine, At<'_>) -> Option<Change>) {
        let now = self.now();
        let change = self.cell.with(|machine, times| act(machine, at(now, times)));
        self.tell(change);
    }

    /// Looks at the machine as time has made it.
    pub(super) fn look<T>(&self, look: impl FnOnce(&Machine, &TimeWindows, Nanos) -> T) -> T {
        let now = self.now();
        let (seen, change) = self.cell.with(|machine, times| {
            let change = machine.pass_time(at(now, times));
            (look(machine, times, now), change)
        });
        self.tell(change);
        seen
    }

    /// With no lock held.
    #[inline]
    fn tell(&self, change: Option<Change>) {
        if let Some(change) = change {
            self.tell_of(change);
        }
    }

    #[cold]
    fn tell_of(&self, change: Change) {
        self.changed.notify_waiters();
        let name = self.named();
        if let Some(why) = change.tripped {
            event!(WARN, resilience.name = name, reason = %why, "circuit opened");
            let _ = why;
        }
        match change.to {
            State::Open if change.tripped.is_some() => {}
            State::Closed => event!(INFO, resilience.name = name, "circuit closed"),
            to => {
                event!(INFO, resilience.name = name, state = to.as_str(), "circuit changed");
                let _ = to;
            }
        }
        let _ = name;
    }

    // ===== Who waits for a verdict =====

    /// A place among those who wait, and for how long, if there is one.
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
    pub(super) fn enter(&self) -> Result<Token, Refusal> {
        match self.front().enter() {
            Some(token) => Ok(token),
            None => self.enter_slowly(),
        }
    }

    #[inline(never)]
    fn enter_slowly(&self) -> Result<Token, Refusal> {
        match self.cell.refuses_for(|| self.now()) {
            Some(left) if !self.is_shadow() => Err(Refusal::Open { left }),
            _ => self.enter_by_machine(),
        }
    }

    #[inline(never)]
    fn enter_by_machine(&self) -> Result<Token, Refusal> {
        let (answer, change) = self.cell.admit(|| self.now(), fastrand::f64);
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
            // It may have been the last slot: nobody need wait for the inner service any more.
            self.changed.notify_waiters();
        }
        // One more than the time: 0 says that nobody measures.
        let started = if self.cell.measures() { self.now().saturating_add(1) } else { 0 };
        let tag = ticket.generation | if ticket.probe { PROBE } else { 0 };
        Ok(Token { tag, started })
    }

    pub(super) fn refuse(&self, refusal: Refusal) -> Rejected {
        let (kind, back_after) = match refusal {
            Refusal::Open { left } => (RejectedKind::Open, left),
            Refusal::Probing => (RejectedKind::Probing, PROBING),
            Refusal::Ramping { left } => (RejectedKind::Recovering, left.min(PROBING)),
            Refusal::Forced => return self.refuse_as(RejectedKind::ForcedOpen),
        };
        // Rounded up: who comes back earlier is refused again.
        self.refuse_as(kind).with_retry_after_ms(back_after.div_ceil(1_000_000))
    }

    /// A call whose deadline has passed: whatever the circuit says.
    #[cold]
    pub(super) fn refuse_late(&self) -> Rejected {
        self.refuse_as(RejectedKind::DeadlinePassed)
    }

    #[inline]
    fn refuse_as(&self, kind: RejectedKind) -> Rejected {
        self.refused.fetch_add(1, Ordering::Relaxed);
        event!(DEBUG, resilience.name = self.named(), reason = kind.as_str(), "call refused");
        Rejected::by(LayerKind::CircuitBreaker, kind).labelled(self.label.get().cloned())
    }
}

/// Whether a call that was let through, and has not gone yet, would be refused by now; no probe.
pub(super) fn is_late(front: &Front, token: Token) -> bool {
    token.tag != NO_GENERATION && !front.still_goes(token.tag)
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

/// How long the call took to its head, or has taken until now.
#[inline]
fn took(token: Token, now: impl FnOnce() -> Nanos) -> Nanos {
    match token.started {
        0 => 0,
        took if took & TOOK != 0 => took & !TOOK,
        started => now().saturating_sub(started - 1),
    }
}

/// Set in a token's time once it is how long the head took, and no more when the call began.
const TOOK: u64 = 1 << 63;

impl Finish for Circuit {
    #[inline]
    fn head(&self, token: &mut Token, so_far: Outcome) {
        if token.started == 0 && !is_probe(*token) {
            return;
        }
        if token.started != 0 {
            token.started = TOOK | took(*token, || self.now());
        }
        let so_far = Ended { outcome: so_far, took: token.started & !TOOK };
        let now = || self.now();
        self.tell(self.cell.head(ticket(*token), so_far, now, fastrand::f64));
    }

    #[inline]
    fn finish(&self, token: Token, outcome: Outcome) {
        let good = token.started == 0 && outcome.is_success();
        if !(good && self.cell.count_good(token.tag, || self.now())) {
            self.finish_slowly(token, outcome);
        }
    }

    #[inline]
    fn hold(&self) -> Hold {
        Hold::Verdict
    }
}

impl Circuit {
    #[inline(never)]
    fn finish_slowly(&self, token: Token, outcome: Outcome) {
        // One reading serves all who ask, and nobody asks about a clean run of failures.
        let mut read = None;
        let mut now = || *read.get_or_insert_with(|| self.now());
        let took = took(token, &mut now);
        let ticket = ticket(token);
        let change = self.cell.finish(ticket, Ended { outcome, took }, now, fastrand::f64);
        if ticket.probe && change.is_none() {
            // A slot may have come back.
            self.changed.notify_waiters();
        }
        self.tell(change);
    }
}

impl Drop for Circuit {
    fn drop(&mut self) {
        self.front().leave();
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
