//! The gate of a health probe layer: one word that calls read, and a lock around the state that only the prober and
//! handles use.
//!
//! # The word
//!
//! A call reads `word` once. The word contains the state of the gate and three flags: [`ARMED`], [`TAKEN`] and
//! [`LISTENS`]. The state is a copy of the one in [`Probing::threshold`], which the lock `probing` protects.
//! [`Gate::publish`] writes the copy while it holds this lock, so the word receives the states in their order. The
//! flags have other writers, so every write of the word is an atomic read-modify-write that leaves the other bits
//! unchanged. Writes are `AcqRel` and reads are `Acquire`: a thread that reads a state also observes the writes that
//! precede it.
//!
//! # User code
//!
//! Reporters, listeners, events and wakers can run user code, which may call a handle of this gate. [`Gate::publish`]
//! and [`Gate::probe_ended`] therefore copy these objects under the lock, release the lock, and call them after that. A
//! change must preserve this order: first the word, then the release of the lock, then the notifications. A waiter
//! registers before it reads the word, so it observes either the new state or the notification.
//!
//! Only the prober publishes, and [`Gate::stopped`] publishes before it arms the next prober. So the notifications of
//! two changes, which are made without a lock, do not overtake each other.

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
    fail_open::{FailOpen, Member},
    probe::{Failed, ProbeFailure},
    reporter::Reporter,
    schedule::Schedule,
    threshold::{ProbeState, Threshold},
};
use crate::{
    event::event,
    fault::LayerName,
    time::{Clock, Nanos, nanos},
    user_code::catch_panic,
};

/// The gate of a layer, with its prober.
pub struct Gate {
    /// `listens << 4 | taken << 3 | armed << 2 | state`. An admitted call reads only this word.
    word: AtomicU8,
    /// The time at which the next result is expected, for `retry_after`. Only advisory, so its accesses are relaxed.
    next: AtomicU64,
    refused: AtomicU64,
    /// With `LISTENS`: the number of calls that succeeded since the previous probe.
    passed: AtomicU64,
    /// With `LISTENS`: the number of calls that failed since the previous probe.
    failed: AtomicU64,
    while_down: AtomicU8,
    guard: OnceLock<FailOpen>,
    probing: Mutex<Probing>,
    start: Mutex<Start>,
    /// Notified of every change of the state, of `while_down`, and of the set of the guard.
    changed: Arc<Notify>,
    clock: Clock,
    label: OnceLock<Arc<LayerName>>,
}

/// The bits of the [`ProbeState`].
const STATE: u8 = 0b0011;
/// A prober waits for a runtime on which it can start. The next call starts it.
const ARMED: u8 = 0b0100;
/// The gate has a prober, started or armed. Never cleared.
const TAKEN: u8 = 0b1000;
/// The gate is passive: the outcomes of calls are counted.
const LISTENS: u8 = 0b1_0000;

/// The settings of the prober, and the results of its probes.
pub(super) struct Probing {
    pub(super) schedule: Schedule,
    pub(super) threshold: Threshold,
    /// Whether a response by which the upstream declares itself unavailable takes it down at once.
    pub(super) immediate_failure: bool,
    pub(super) reporters: Vec<Reporter>,
    pub(super) probes: u64,
    pub(super) spared: u64,
    pub(super) last: Option<Last>,
    pub(super) last_error: Option<Box<str>>,
    pub(super) listeners: Vec<Listener>,
    pub(super) member: Option<Member>,
}

/// A function of the user that receives the result of each probe.
pub(super) type Listener = Arc<dyn Fn(Result<(), ProbeFailure>) + Send + Sync>;

/// The next action of a prober.
pub(super) enum Due {
    /// Send a probe with this timeout.
    Probe(Duration),
    /// Send no probe, and wait for this time.
    Wait(Duration),
}

/// The last probe that has ended.
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
            while_down: AtomicU8::new(WhileDown::Reject as u8),
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
        // The first name remains, because rejections already refer to it.
        let _ = self.label.set(Arc::new(LayerName { name: name.into(), fault: None }));
    }

    fn named(&self) -> &str {
        self.label.get().map_or("", |label| &*label.name)
    }

    /// Reads or changes the settings and results of the prober, under the lock. A changed setting applies to the next
    /// probe.
    pub(super) fn with<T>(&self, change: impl FnOnce(&mut Probing) -> T) -> T {
        change(&mut self.probing())
    }

    /// Adds a reporter, and sets its check to the current state.
    pub(super) fn report_to(&self, reporter: Reporter) {
        self.with(|probing| probing.reporters.push(reporter.clone()));
        loop {
            let state = self.state();
            reporter.publish(CheckState::of(state));
            // If the prober has changed the state in the meantime, its report can precede this one, which would
            // overwrite it. Then report again.
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

    /// Joins the set of a guard. The first guard remains.
    pub(super) fn join(&self, guard: &FailOpen) {
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

    // ===== Reads =====

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
        // No user code runs under this lock, so a poisoned lock is used as it is.
        self.probing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ===== The prober =====

    /// Returns the next action of the prober: a probe, or a wait if calls have proved health since the previous probe.
    pub(super) fn due(&self) -> Due {
        let (passed, failed) =
            (self.passed.swap(0, Ordering::AcqRel), self.failed.swap(0, Ordering::AcqRel));
        let proved = passed > 0 && failed == 0;
        if proved && self.state() == ProbeState::Up {
            return Due::Wait(self.spare());
        }
        Due::Probe(self.probe_begins())
    }

    /// Records a skipped probe as one that passed. Returns the time until the next one.
    fn spare(&self) -> Duration {
        let mut probing = self.probing();
        probing.spared += 1;
        // The state is up, so a success does not change it.
        let _ = probing.threshold.told(true);
        for reporter in &probing.reporters {
            reporter.looked(Ok(()), None);
        }
        let wait = probing.schedule.wait(probing.threshold.state(), false);
        self.expect_verdict_in(wait);
        wait
    }

    /// Records the start of a probe. Returns its timeout.
    fn probe_begins(&self) -> Duration {
        let mut probing = self.probing();
        probing.probes += 1;
        self.expect_verdict_in(probing.schedule.timeout);
        probing.schedule.timeout
    }

    /// Records the result of a probe, and notifies reporters, listeners and callers. Returns the time until the next
    /// probe.
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
            // A rejection by an inner layer of this crate contains no information about the upstream.
            Err(ProbeFailure::Rejected) => None,
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
                    health,
                    WARN,
                    resilience.name = name,
                    reason = why.as_str(),
                    error = _error.as_deref(),
                    "health probe: down"
                );
                let _ = why;
            } else {
                event!(health, INFO, resilience.name = name, "health probe: up");
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

    /// Sets the time at which the next result is expected.
    fn expect_verdict_in(&self, wait: Duration) {
        self.next.store(self.now().saturating_add(nanos(wait)), Ordering::Relaxed);
    }

    /// Writes the state to the word, releases the lock, and then notifies the set, the reporters and the callers.
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
    /// Aborts the prober, because no layer, service or handle is left.
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
