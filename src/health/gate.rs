//! The gate: one word that calls read, and behind a lock what only the prober touches.

use std::{
    fmt,
    future::Ready,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{runtime::Handle, sync::Notify, task::AbortHandle, time::Instant};

use super::{
    probe::ProbeFailure,
    registry::CheckState,
    reporter::Reporter,
    schedule::Schedule,
    threshold::{ProbeState, Threshold},
};
use crate::{
    admission::{Admit, Policy},
    call::{
        Clock, Finish, Hold, Label, LayerKind, Nanos, Outcome, Permit, Rejected, RejectedKind,
        Shared, Token, nanos,
    },
    event,
};

/// One gate, with its prober.
pub struct Gate {
    /// `started << 3 | armed << 2 | state`: all that a call that goes through reads.
    word: AtomicU8,
    /// When the next verdict may come.
    next: AtomicU64,
    refused: AtomicU64,
    probing: Mutex<Probing>,
    start: Mutex<Start>,
    /// Told of every change.
    changed: Arc<Notify>,
    clock: Clock,
    label: OnceLock<Arc<Label>>,
}

const STATE: u8 = 0b0011;
/// A prober waits for a runtime to start in.
const ARMED: u8 = 0b0100;
/// There is a prober, started or armed.
const TAKEN: u8 = 0b1000;

/// What the prober goes by, and what it saw.
pub(super) struct Probing {
    pub(super) schedule: Schedule,
    pub(super) threshold: Threshold,
    pub(super) reporters: Vec<Reporter>,
    pub(super) probes: u64,
    pub(super) last: Option<Last>,
}

/// The last probe that came to its end.
#[derive(Clone, Copy)]
pub(super) struct Last {
    pub(super) result: Result<(), ProbeFailure>,
    pub(super) ended: Nanos,
    pub(super) took: Duration,
}

/// Spawns the prober.
pub(super) type Starter = Box<dyn FnOnce(&Handle) -> AbortHandle + Send>;

enum Start {
    /// Nothing is wrapped yet.
    Idle,
    /// Waits for a runtime.
    Armed(Starter),
    /// Being spawned at this moment, outside of the lock.
    Starting,
    Running(AbortHandle),
    /// It panicked, which takes a runtime without timers.
    Dead,
}

impl Gate {
    pub(super) fn new() -> Self {
        Self {
            word: AtomicU8::new(0),
            next: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            probing: Mutex::new(Probing {
                schedule: Schedule::DEFAULT,
                threshold: Threshold::new(1, 3),
                reporters: Vec::new(),
                probes: 0,
                last: None,
            }),
            start: Mutex::new(Start::Idle),
            changed: Arc::new(Notify::new()),
            clock: Clock::new(),
            label: OnceLock::new(),
        }
    }

    pub(super) fn name(&self, name: &str) {
        // The first name stays: refusals under way point at it.
        let _ = self.label.set(Arc::new(Label { name: name.into(), fault: None }));
    }

    fn named(&self) -> &str {
        self.label.get().map_or("", |label| &*label.name)
    }

    /// Looks at what the prober goes by, or changes it: that is seen from the next probe on.
    pub(super) fn with<T>(&self, change: impl FnOnce(&mut Probing) -> T) -> T {
        change(&mut self.probing())
    }

    pub(super) fn report_to(&self, reporter: Reporter) {
        self.with(|probing| probing.reporters.push(reporter.clone()));
        loop {
            let state = self.state();
            reporter.publish(CheckState::of(state));
            // The prober may have changed it meanwhile, and have told so before this did.
            if self.state() == state {
                return;
            }
        }
    }

    // ===== Looking =====

    #[inline]
    pub(super) fn state(&self) -> ProbeState {
        state_of(self.word.load(Ordering::Acquire))
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

    fn probing(&self) -> MutexGuard<'_, Probing> {
        // Nothing of a user's runs under it; were it poisoned, it is still whole.
        self.probing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ===== Starting the prober, once =====

    fn start(&self) -> MutexGuard<'_, Start> {
        self.start.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a prober, unless there is one, and starts it if there is a runtime to start it in.
    pub(super) fn arm(&self, prober: impl FnOnce() -> Starter) {
        if self.word.load(Ordering::Acquire) & TAKEN == 0 {
            // A user's clone runs in it: outside of the lock.
            let starter = prober();
            let mut start = self.start();
            if matches!(*start, Start::Idle) {
                *start = Start::Armed(starter);
                self.word.fetch_or(ARMED | TAKEN, Ordering::AcqRel);
            }
        }
        if self.word.load(Ordering::Acquire) & ARMED != 0 {
            self.start_if_possible();
        }
    }

    #[cold]
    fn start_if_possible(&self) {
        let Ok(runtime) = Handle::try_current() else { return };
        let starter = {
            let mut start = self.start();
            if !matches!(*start, Start::Armed(_)) {
                return;
            }
            self.word.fetch_and(!ARMED, Ordering::AcqRel);
            match std::mem::replace(&mut *start, Start::Starting) {
                Start::Armed(starter) => starter,
                _ => return,
            }
        };
        // Outside of the lock: a runtime that shuts down drops the prober at once, which arms again.
        let running = starter(&runtime);
        let mut start = self.start();
        if matches!(*start, Start::Starting) {
            *start = Start::Running(running);
        }
    }

    /// The prober's runtime has ended before the gate: from here on nothing is known any more. With a
    /// starter, the next call starts it in its own runtime.
    pub(super) fn stopped(&self, starter: Option<Starter>) {
        let mut probing = self.probing();
        probing.threshold.reset();
        self.publish(probing);
        // Only now: the next prober's verdict must not be overwritten.
        let mut start = self.start();
        *start = match starter {
            Some(starter) => {
                self.word.fetch_or(ARMED, Ordering::AcqRel);
                Start::Armed(starter)
            }
            None => Start::Dead,
        };
    }

    // ===== What the prober tells =====

    /// A probe begins; how long it may take.
    pub(super) fn probe_begins(&self) -> Duration {
        let mut probing = self.probing();
        probing.probes += 1;
        self.expect_verdict_in(probing.schedule.timeout);
        probing.schedule.timeout
    }

    /// A probe has ended; how long to wait before the next.
    pub(super) fn probe_ended(&self, result: Result<(), ProbeFailure>, took: Duration) -> Duration {
        let mut probing = self.probing();
        probing.last = Some(Last { result, ended: self.now(), took });
        for reporter in &probing.reporters {
            reporter.looked(result.map_err(|why| why.to_string()), Some(took));
        }
        let change = match result {
            // A refusal by one of our own layers says nothing about what is probed.
            Err(ProbeFailure::Refused) => None,
            result => probing.threshold.told(result.is_ok()),
        };
        let failing = probing.threshold.in_a_row().1 > 0;
        let wait = probing.schedule.wait(probing.threshold.state(), failing);
        self.expect_verdict_in(wait);
        if let Some(to) = change {
            self.publish(probing);
            let name = self.named();
            if let (ProbeState::Down, Err(why)) = (to, result) {
                event!(WARN, resilience.name = name, reason = why.as_str(), "health probe: down");
                let _ = why;
            } else {
                event!(INFO, resilience.name = name, "health probe: up");
            }
            let _ = name;
        }
        wait
    }

    fn expect_verdict_in(&self, wait: Duration) {
        self.next.store(self.now().saturating_add(nanos(wait)), Ordering::Relaxed);
    }

    /// Publishes, lets go of the lock, and only then tells anybody.
    fn publish(&self, probing: MutexGuard<'_, Probing>) {
        let to = probing.threshold.state();
        let reporters = probing.reporters.clone();
        let _ = self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            Some(word & !STATE | to as u8)
        });
        drop(probing);
        for reporter in reporters {
            reporter.publish(CheckState::of(to));
        }
        self.changed.notify_waiters();
    }

    // ===== Calls =====

    #[inline]
    fn lets_through(&self) -> bool {
        let word = self.word.load(Ordering::Acquire);
        if word & ARMED != 0 {
            self.start_if_possible();
        }
        state_of(word) != ProbeState::Down
    }

    #[cold]
    fn refuse(&self) -> Rejected {
        self.refused.fetch_add(1, Ordering::Relaxed);
        event!(DEBUG, resilience.name = self.named(), "call refused: unhealthy");
        let left = self.next.load(Ordering::Relaxed).saturating_sub(self.now());
        Rejected::by(LayerKind::HealthProbe, RejectedKind::Unhealthy)
            .with_retry_after(Duration::from_nanos(left))
            .labelled(self.label.get().cloned())
    }
}

fn state_of(word: u8) -> ProbeState {
    match word & STATE {
        0 => ProbeState::Unknown,
        1 => ProbeState::Up,
        _ => ProbeState::Down,
    }
}

impl Drop for Gate {
    /// The prober dies with the last who could ask.
    fn drop(&mut self) {
        if let Start::Running(prober) = &*self.start() {
            prober.abort();
        }
    }
}

impl<Req> Policy<Req> for Shared<Gate> {
    type State = Gate;
    type Wait = Ready<Result<Permit<Gate>, Rejected>>;

    const LAYER: LayerKind = LayerKind::HealthProbe;

    #[inline]
    fn peek(&self) -> bool {
        self.lets_through()
    }

    #[inline]
    fn admit(
        &self,
        _: &Req,
        _: impl FnOnce() -> Option<Instant>,
    ) -> Admit<Permit<Gate>, Self::Wait> {
        if self.lets_through() {
            // Nobody wants to hear how it ends.
            Admit::Go(Permit::hollow())
        } else {
            Admit::No(self.refuse())
        }
    }

    fn shut(&self, _: Option<&Permit<Gate>>) -> Option<Arc<Notify>> {
        Some(self.changed.clone())
    }
}

impl Finish for Gate {
    /// What traffic says is not listened to: only probes decide.
    #[inline]
    fn finish(&self, _: Token, _: Outcome) {}

    #[inline]
    fn hold(&self) -> Hold {
        Hold::Head
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate")
            .field("name", &self.named())
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}
