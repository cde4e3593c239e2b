//! The machine behind a lock, and the word that lets a closed circuit do without it.

use std::{
    fmt,
    future::Ready,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::Notify;

use super::{
    state::{Change, Machine, Refusal, Settings, State, Ticket},
    trip::Trip,
};
use crate::{
    admission::{Admit, Policy},
    call::{
        Clock, Finish, Hold, Label, LayerKind, Nanos, Outcome, OutcomeKind, Permit, Rejected,
        RejectedKind, Shared, Token,
    },
    event,
};

/// When to come back while probes are under way: their verdict is near, but has no date.
const PROBING: Duration = Duration::from_secs(1);

/// One circuit.
pub struct Circuit {
    /// `generation << 4 | clean << 3 | state`: all that a call through a closed circuit reads.
    word: AtomicU64,
    /// When an open circuit's wait is over.
    until: AtomicU64,
    refused: AtomicU64,
    machine: Mutex<Machine>,
    /// Told of every change.
    changed: Arc<Notify>,
    clock: Clock,
    label: OnceLock<Arc<Label>>,
}

const CLEAN: u64 = 0b1000;
const STATE: u64 = 0b0111;

impl Circuit {
    pub(super) fn new(trip: &Trip, settings: Settings) -> Self {
        let circuit = Self {
            word: AtomicU64::new(0),
            until: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            machine: Mutex::new(Machine::new(trip, settings)),
            changed: Arc::new(Notify::new()),
            clock: Clock::new(),
            label: OnceLock::new(),
        };
        circuit.publish(&circuit.lock());
        circuit
    }

    pub(super) fn name(&self, name: &str) {
        // The first name stays: refusals under way point at it.
        let _ = self.label.set(Arc::new(Label { name: name.into(), fault: None }));
    }

    pub(super) fn configure(&self, change: impl FnOnce(&mut Settings)) {
        let mut machine = self.lock();
        change(&mut machine.settings);
        self.publish(&machine);
    }

    pub(super) fn now(&self) -> Nanos {
        self.clock.now()
    }

    pub(super) fn changed(&self) -> &Notify {
        &self.changed
    }

    pub(super) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// The state, and how long it lasts if nothing happens.
    pub(super) fn state(&self) -> (State, Option<Duration>) {
        match state_of(self.word.load(Ordering::Acquire)) {
            State::Open => {
                let now = self.now();
                match self.until.load(Ordering::Relaxed).checked_sub(now) {
                    None | Some(0) => (State::HalfOpen, None),
                    Some(left) => (State::Open, Some(Duration::from_nanos(left))),
                }
            }
            state => (state, None),
        }
    }

    pub(super) fn force(&self, to: State) {
        let mut machine = self.lock();
        let change = machine.force(to);
        self.after(machine, Some(change));
    }

    pub(super) fn with_machine<T>(&self, look: impl FnOnce(&mut Machine) -> T) -> T {
        look(&mut self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Machine> {
        // Nothing of a user's runs under it; were it poisoned, the machine is still whole.
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn publish(&self, machine: &Machine) {
        let (state, until) = machine.entered();
        self.until.store(until, Ordering::Relaxed);
        let clean = if machine.is_clean() { CLEAN } else { 0 };
        self.word.store(machine.generation() << 4 | clean | state as u64, Ordering::Release);
    }

    /// Publishes, lets go of the lock, and only then tells anybody.
    fn after(&self, machine: MutexGuard<'_, Machine>, change: Option<Change>) {
        self.publish(&machine);
        drop(machine);
        let Some(change) = change else { return };
        self.changed.notify_waiters();
        let name = self.label.get().map_or("", |label| &*label.name);
        match (change.to, change.tripped) {
            (State::Open, Some(why)) => {
                event!(WARN, resilience.name = name, reason = %why, "circuit opened");
            }
            (State::Closed, _) => event!(INFO, resilience.name = name, "circuit closed"),
            (to, _) => event!(INFO, resilience.name = name, state = to.as_str(), "circuit changed"),
        }
        let _ = name;
    }

    fn refuse(&self, refusal: Refusal) -> Rejected {
        self.refused.fetch_add(1, Ordering::Relaxed);
        let by = |kind| Rejected::by(LayerKind::CircuitBreaker, kind);
        match refusal {
            Refusal::Open { left } => by(RejectedKind::Open).with_retry_after(left),
            Refusal::Probing => by(RejectedKind::Probing).with_retry_after(PROBING),
            Refusal::Forced => by(RejectedKind::ForcedOpen),
        }
        .labelled(self.label.get().cloned())
    }
}

fn state_of(word: u64) -> State {
    match word & STATE {
        0 => State::Closed,
        1 => State::Open,
        2 => State::HalfOpen,
        3 => State::ForcedOpen,
        _ => State::ForcedClosed,
    }
}

fn token(ticket: Ticket) -> Token {
    Token { tag: ticket.generation << 16 | u64::from(ticket.probe), started: 0 }
}

fn ticket(token: Token) -> Ticket {
    Ticket { generation: token.tag >> 16, probe: token.tag as u16 }
}

impl<Req> Policy<Req> for Shared<Circuit> {
    type State = Circuit;
    type Wait = Ready<Result<Permit<Circuit>, Rejected>>;

    const LAYER: LayerKind = LayerKind::CircuitBreaker;

    #[inline]
    fn peek(&self) -> bool {
        match state_of(self.word.load(Ordering::Acquire)) {
            State::Closed | State::ForcedClosed => true,
            State::Open => self.now() >= self.until.load(Ordering::Relaxed),
            State::ForcedOpen => false,
            State::HalfOpen => self.has_probe_left(),
        }
    }

    #[inline]
    fn admit(&self, _: &Req) -> Admit<Permit<Circuit>, Self::Wait> {
        let word = self.word.load(Ordering::Acquire);
        match state_of(word) {
            State::Closed | State::ForcedClosed => {
                let now = Ticket { generation: word >> 4, probe: 0 };
                Admit::Go(self.permit(token(now)))
            }
            _ => self.admit_slowly(),
        }
    }

    fn is_stale(&self, permit: &Permit<Circuit>) -> bool {
        permit.token().tag >> 16 != self.word.load(Ordering::Acquire) >> 4
    }

    fn shut(&self) -> Option<&Arc<Notify>> {
        Some(&self.changed)
    }
}

impl Circuit {
    fn has_probe_left(&self) -> bool {
        let now = self.now();
        let mut machine = self.lock();
        let change = machine.end_leases(now);
        let goes = machine.lets_through(now);
        self.after(machine, change);
        goes
    }
}

impl Shared<Circuit> {
    fn admit_slowly(&self) -> Admit<Permit<Circuit>, Ready<Result<Permit<Circuit>, Rejected>>> {
        let now = self.now();
        let mut machine = self.lock();
        let (answer, change) = machine.admit(now);
        let was_last = answer.is_ok() && !machine.lets_through(now);
        self.after(machine, change);
        if was_last {
            // From here on others are refused: nobody need wait for the inner service.
            self.changed.notify_waiters();
        }
        match answer {
            Ok(ticket) => Admit::Go(self.permit(token(ticket))),
            Err(refusal) => {
                event!(DEBUG, reason = ?refusal, "call refused");
                Admit::No(self.refuse(refusal))
            }
        }
    }
}

impl Finish for Circuit {
    #[inline]
    fn finish(&self, token: Token, outcome: Outcome) {
        let word = self.word.load(Ordering::Acquire);
        let unchanged = match (state_of(word), outcome.kind()) {
            (State::Closed, OutcomeKind::Success) => word & CLEAN != 0,
            (State::Closed, OutcomeKind::Throttled | OutcomeKind::Cancelled) => true,
            _ => false,
        };
        if unchanged || token.tag >> 16 != word >> 4 {
            return;
        }
        let now = self.now();
        let mut machine = self.lock();
        let change = machine.finish(ticket(token), outcome, now);
        self.after(machine, change);
    }

    #[inline]
    fn head(&self, token: Token, so_far: Outcome) {
        if token.tag as u16 != 0 {
            self.lock().head(ticket(token), so_far);
        }
    }

    #[inline]
    fn hold(&self) -> Hold {
        Hold::Verdict
    }
}

impl fmt::Debug for Circuit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Circuit")
            .field("name", &self.label.get().map_or("", |label| &*label.name))
            .field("state", &self.state().0)
            .finish_non_exhaustive()
    }
}
