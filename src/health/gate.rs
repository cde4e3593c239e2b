//! The gate: one word that calls read, and behind a lock what only the prober touches.

mod calls;
mod start;

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::Notify;

pub use self::calls::WhileDown;
use self::start::Start;
pub(super) use self::start::Starter;
use super::{
    entry::CheckState,
    panic::{Member, PanicGuard},
    probe::{Failed, ProbeFailure},
    reporter::Reporter,
    schedule::Schedule,
    threshold::{ProbeState, Threshold},
};
use crate::{
    call::{Clock, Label, Nanos, catch_panic, nanos},
    event,
};

/// One gate, with its prober.
pub struct Gate {
    /// `listens << 4 | started << 3 | armed << 2 | state`: all that a call that goes through reads.
    word: AtomicU8,
    /// When the next verdict may come.
    next: AtomicU64,
    refused: AtomicU64,
    /// What calls met since the last look, where that counts: those that passed, and those that failed.
    passed: AtomicU64,
    failed: AtomicU64,
    while_down: AtomicU8,
    guard: OnceLock<PanicGuard>,
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
/// What calls meet counts.
const LISTENS: u8 = 0b1_0000;

/// What the prober goes by, and what it saw.
pub(super) struct Probing {
    pub(super) schedule: Schedule,
    pub(super) threshold: Threshold,
    /// A response by which the upstream declares itself unavailable takes it down at once.
    pub(super) immediate_failure: bool,
    pub(super) reporters: Vec<Reporter>,
    pub(super) probes: u64,
    pub(super) spared: u64,
    pub(super) last: Option<Last>,
    pub(super) last_error: Option<Box<str>>,
    pub(super) listeners: Vec<Listener>,
    pub(super) member: Option<Member>,
}

/// Wants to hear how each probe ended.
pub(super) type Listener = Arc<dyn Fn(Result<(), ProbeFailure>) + Send + Sync>;

/// What a prober has to do.
pub(super) enum Due {
    Probe(Duration),
    Wait(Duration),
}

/// The last probe that came to its end.
#[derive(Clone, Copy)]
pub(super) struct Last {
    pub(super) result: Result<(), ProbeFailure>,
    pub(super) ended: Nanos,
    pub(super) took: Duration,
}

impl Gate {
    pub(super) fn new() -> Self {
        Self {
            word: AtomicU8::new(0),
            next: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            passed: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            while_down: AtomicU8::new(WhileDown::Refuse as u8),
            guard: OnceLock::new(),
            probing: Mutex::new(Probing {
                schedule: Schedule::DEFAULT,
                threshold: Threshold::new(1, 3),
                immediate_failure: true,
                reporters: Vec::new(),
                probes: 0,
                spared: 0,
                last: None,
                last_error: None,
                listeners: Vec::new(),
                member: None,
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

    pub(super) fn listen(&self) {
        self.word.fetch_or(LISTENS, Ordering::AcqRel);
    }

    pub(super) fn set_while_down(&self, how: WhileDown) {
        self.while_down.store(how as u8, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// The first guard stays.
    pub(super) fn join(&self, guard: &PanicGuard) {
        let changed = {
            let mut probing = self.probing();
            if probing.member.is_some() {
                return;
            }
            let mut member = Member::of(guard, &self.changed);
            let changed = member.is_now(probing.threshold.state() == ProbeState::Down);
            let _ = self.guard.set(member.guard().clone());
            probing.member = Some(member);
            changed
        };
        if let Some(guard) = changed {
            guard.tell();
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

    // ===== What the prober tells =====

    /// What is due now: a probe, and how long it may take; or a wait, because calls have proved health.
    pub(super) fn due(&self) -> Due {
        let (passed, failed) =
            (self.passed.swap(0, Ordering::AcqRel), self.failed.swap(0, Ordering::AcqRel));
        let proved = passed > 0 && failed == 0;
        if proved && self.state() == ProbeState::Up {
            return Due::Wait(self.spare());
        }
        Due::Probe(self.probe_begins())
    }

    /// A look at calls is as good as a probe, and does not have to be paid for.
    fn spare(&self) -> Duration {
        let mut probing = self.probing();
        probing.spared += 1;
        // It is up already: nothing can change.
        let _ = probing.threshold.told(true);
        for reporter in &probing.reporters {
            reporter.looked(Ok(()), None);
        }
        let wait = probing.schedule.wait(probing.threshold.state(), false);
        self.expect_verdict_in(wait);
        wait
    }

    fn probe_begins(&self) -> Duration {
        let mut probing = self.probing();
        probing.probes += 1;
        self.expect_verdict_in(probing.schedule.timeout);
        probing.schedule.timeout
    }

    /// A probe has ended; how long to wait before the next.
    pub(super) fn probe_ended(&self, ended: Result<(), Failed>, took: Duration) -> Duration {
        let result = ended.as_ref().map_err(|failed| failed.why).copied();
        let mut probing = self.probing();
        probing.last = Some(Last { result, ended: self.now(), took });
        for reporter in &probing.reporters {
            reporter.looked(ended.as_ref().map_err(Failed::to_string).copied(), Some(took));
        }
        probing.last_error = ended.err().and_then(|failed| failed.error);
        let _error = probing.last_error.clone();
        let change = match result {
            // A refusal by one of our own layers says nothing about what is probed.
            Err(ProbeFailure::Refused) => None,
            Err(why) if probing.immediate_failure && why.is_immediate() => {
                probing.threshold.fail_at_once()
            }
            result => probing.threshold.told(result.is_ok()),
        };
        let failing = probing.threshold.in_a_row().1 > 0;
        let wait = probing.schedule.wait(probing.threshold.state(), failing);
        let listeners = probing.listeners.clone();
        self.expect_verdict_in(wait);
        if let Some(to) = change {
            self.publish(probing);
            let name = self.named();
            if let (ProbeState::Down, Err(why)) = (to, result) {
                event!(
                    WARN,
                    resilience.name = name,
                    reason = why.as_str(),
                    error = _error.as_deref(),
                    "health probe: down"
                );
                let _ = why;
            } else {
                event!(INFO, resilience.name = name, "health probe: up");
            }
            let _ = name;
        } else {
            drop(probing);
        }
        for listener in listeners {
            // A panic of a listener does not end the probes.
            let _ = catch_panic(|| listener(result));
        }
        wait
    }

    fn expect_verdict_in(&self, wait: Duration) {
        self.next.store(self.now().saturating_add(nanos(wait)), Ordering::Relaxed);
    }

    /// Publishes, lets go of the lock, and only then tells anybody.
    fn publish(&self, mut probing: MutexGuard<'_, Probing>) {
        let to = probing.threshold.state();
        let reporters = probing.reporters.clone();
        let _ = self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            Some(word & !STATE | to as u8)
        });
        let member = probing.member.as_mut();
        let guard = member.and_then(|member| member.is_now(to == ProbeState::Down));
        drop(probing);
        if let Some(guard) = guard {
            guard.tell();
        }
        for reporter in reporters {
            reporter.publish(CheckState::of(to));
        }
        self.changed.notify_waiters();
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
        self.stop();
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
