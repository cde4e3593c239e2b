//! The gate of a health probe layer: one word that calls read, and a lock around the state that only the prober and
//! handles use.
//!
//! # The word
//!
//! A call reads `word` once. The word contains the state of the gate and the flags [`ARMED`], [`HAS_PROBER`],
//! [`PASSIVE`], [`SHADOW`], [`BACKPRESSURE`] and [`IN_USE`]. The state is a copy of the one in [`Probing::threshold`],
//! which the lock `probing` protects. [`Gate::publish`] writes the copy while it holds this lock, so the word receives
//! the states in their order. The flags have other writers, so every write of the word is an atomic read-modify-write
//! that leaves the other bits unchanged. Writes are `AcqRel` and reads are `Acquire`: a thread that reads a state also
//! observes the writes that precede it.
//!
//! # User code
//!
//! Reporters, listeners, events and wakers can run user code, which may call a handle of this gate. [`Gate::publish`]
//! and [`Gate::record`] therefore copy these objects under the lock, release the lock, and call them after that. A
//! change must preserve this order: first the word, then the release of the lock, then the notifications. A waiter
//! registers before it reads the word, so it observes either the new state or the notification.
//!
//! Only the prober publishes, and [`Gate::stopped`] publishes before it arms the next prober. So the notifications of
//! two changes, which are made without a lock, do not overtake each other.
//!
//! # The start of the prober
//!
//! A layer is often built outside a runtime. [`Gate::arm`] then stores a [`Starter`], and the first call inside a
//! runtime runs it. The lock `prober` protects the [`ProberState`]; the flag [`ARMED`] shows calls, without the lock,
//! that a starter is stored. `ARMED` is set and cleared under the lock, so it always agrees with `ProberState::Armed`
//! there. Outside the lock the flag can be outdated: [`Gate::start_if_possible`] checks the state again under the lock.
//!
//! ```text
//!  Idle ──arm──▶ Armed ──start──▶ Starting ──spawned──▶ Running
//!                  ▲                  │                    │
//!                  └──────────────────┴───runtime ended────┘──timers missing──▶ Dead
//! ```
//!
//! A starter owns the service and the probe of the user, so it runs, and is dropped, outside the lock. A runtime that
//! shuts down drops the prober during the spawn, and this drop changes the state from `Starting` to `Armed` before the
//! spawning thread locks again. That thread therefore sets `Running` only if the state is still `Starting`.

mod policy;

use std::{
    fmt, mem,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{runtime::Handle, sync::Notify, task::AbortHandle};

use super::{
    entry::CheckState,
    fail_open::{FailOpen, Membership},
    probe::{FailedProbe, ProbeFailure},
    reporter::Reporter,
    schedule::{Schedule, checked_jitter, checked_thresholds},
    threshold::{ProbeState, Threshold},
};
use crate::{
    error::ConfigError,
    event::event,
    fault::{LayerName, NameCell},
    outcome::LayerKind,
    report::{ReportCell, StateChange},
    sync::{Mutex, MutexGuard},
    time::{Clock, Nanos, nanos},
    user_code::catch_panic,
};

/// The gate of a layer, with its prober.
pub(crate) struct Gate {
    /// The flags and the state. An admitted call reads only this word.
    word: AtomicU8,
    /// The time at which the next result is expected, for `retry_after`. Only advisory, so its accesses are relaxed.
    next_result: AtomicU64,
    rejected: AtomicU64,
    misconfigured: AtomicU64,
    shadowed: AtomicU64,
    /// With `PASSIVE`: the number of calls that succeeded since the previous probe.
    succeeded: AtomicU64,
    /// With `PASSIVE`: the number of calls that failed since the previous probe.
    failed: AtomicU64,
    fail_open: OnceLock<FailOpen>,
    probing: Mutex<Probing>,
    prober: Mutex<ProberState>,
    /// Notified of every change of the state, of shadow mode, and of the set of the gate.
    changed: Arc<Notify>,
    clock: Clock,
    label: NameCell,
    /// The registries that receive the changes of the state.
    reports: ReportCell,
}

/// The bits of the [`ProbeState`].
const STATE: u8 = 0b11;
/// A prober waits for a runtime on which it can start. The next call starts it.
const ARMED: u8 = 1 << 2;
/// The gate has a prober, started or armed. Never cleared.
const HAS_PROBER: u8 = 1 << 3;
/// The outcomes of calls are counted.
const PASSIVE: u8 = 1 << 4;
/// Calls are admitted while the gate is down.
const SHADOW: u8 = 1 << 5;
/// `poll_ready` is pending while the gate is down.
const BACKPRESSURE: u8 = 1 << 6;
/// The layer has built a service. Never cleared.
const IN_USE: u8 = 1 << 7;

/// The settings of the prober, and the results of its probes.
pub(super) struct Probing {
    schedule: Schedule,
    pub(super) threshold: Threshold,
    /// Whether a response by which the upstream declares itself unavailable takes it down at once.
    immediate_failure: bool,
    reporters: Vec<Reporter>,
    pub(super) probes: u64,
    pub(super) skipped: u64,
    /// The number of probes that passed.
    pub(super) passed: u64,
    /// The number of probes that failed, in the order of [`ProbeFailure::LABELS`].
    pub(super) failed: [u64; ProbeFailure::LABELS.len()],
    pub(super) last: Option<EndedProbe>,
    pub(super) last_error: Option<Box<str>>,
    listeners: Vec<ProbeListener>,
    membership: Option<Membership>,
    /// The time since which the gate is down.
    down_since: Option<Nanos>,
}

/// A function of the user that receives the result of each probe.
type ProbeListener = Arc<dyn Fn(Result<(), ProbeFailure>) + Send + Sync>;

/// The next action of a prober.
pub(super) enum Due {
    /// Send a probe with this timeout.
    Probe(Duration),
    /// Send no probe, and wait for this time.
    Wait(Duration),
}

/// The last probe that has ended.
#[derive(Clone, Copy)]
pub(super) struct EndedProbe {
    pub(super) result: Result<(), ProbeFailure>,
    pub(super) ended: Nanos,
    pub(super) took: Duration,
}

/// Spawns the prober.
pub(super) type Starter = Box<dyn FnOnce(&Handle) -> AbortHandle + Send>;

enum ProberState {
    /// The layer has not wrapped a service yet.
    Idle,
    /// The prober waits for a runtime.
    Armed(Starter),
    /// A thread spawns the prober at this moment, outside the lock.
    Starting,
    Running(AbortHandle),
    /// The prober has panicked, because its runtime has no timers. It is not started again.
    Dead,
}

impl Gate {
    pub(super) fn new() -> Self {
        Self {
            word: AtomicU8::new(0),
            next_result: AtomicU64::new(0),
            rejected: AtomicU64::new(0),
            misconfigured: AtomicU64::new(0),
            shadowed: AtomicU64::new(0),
            succeeded: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            fail_open: OnceLock::new(),
            probing: Mutex::new(Probing {
                schedule: Schedule::DEFAULT,
                threshold: Threshold::new(1, 3),
                immediate_failure: true,
                reporters: Vec::new(),
                probes: 0,
                skipped: 0,
                passed: 0,
                failed: [0; ProbeFailure::LABELS.len()],
                last: None,
                last_error: None,
                listeners: Vec::new(),
                membership: None,
                down_since: None,
            }),
            prober: Mutex::new(ProberState::Idle),
            changed: Arc::new(Notify::new()),
            clock: Clock::new(),
            label: NameCell::default(),
            reports: ReportCell::default(),
        }
    }

    /// Returns a gate with the settings of this one and with state of its own. It has no reporters: two gates must not
    /// report to the same check.
    pub(super) fn fork(&self) -> Self {
        let mut new = Self::new();
        new.label = self.label.fork();
        let flags = PASSIVE | SHADOW | BACKPRESSURE;
        new.set_flag(self.word.load(Ordering::Acquire) & flags, true);
        {
            let (probing, mut forked) = (self.probing.lock(), new.probing.lock());
            forked.schedule = probing.schedule.clone();
            forked.threshold = Threshold::new(probing.threshold.rise, probing.threshold.fall);
            forked.immediate_failure = probing.immediate_failure;
            forked.listeners = probing.listeners.clone();
        }
        if let Some(set) = self.fail_open.get() {
            new.set_fail_open(set);
        }
        new
    }

    /// Returns whether the layer has built a service with this gate.
    pub(super) fn is_in_use(&self) -> bool {
        self.word.load(Ordering::Acquire) & IN_USE != 0
    }

    pub(super) fn set_in_use(&self) {
        // A layer may be applied for each connection, so the usual case only reads.
        if !self.is_in_use() {
            self.set_flag(IN_USE, true);
            if let Some(set) = self.fail_open.get() {
                self.join(set);
            }
        }
    }

    // ===== Settings =====

    pub(super) fn set_name(&self, name: &str) {
        self.label.set(name);
    }

    pub(super) fn name(&self) -> &str {
        self.label.as_str()
    }

    fn label(&self) -> Option<Arc<LayerName>> {
        self.label.get().cloned()
    }

    /// Reads or changes the settings and results of the prober, under the lock. A changed setting applies to the next
    /// probe.
    pub(super) fn with<T>(&self, change: impl FnOnce(&mut Probing) -> T) -> T {
        change(&mut self.probing.lock())
    }

    pub(super) fn set_every(&self, delay: Duration) -> Result<(), ConfigError> {
        let delay = ConfigError::above_zero("every", delay)?;
        self.with(|probing| probing.schedule.every = delay);
        Ok(())
    }

    pub(super) fn set_every_while_down(&self, delay: Duration) -> Result<(), ConfigError> {
        let delay = ConfigError::above_zero("every_while_down", delay)?;
        self.with(|probing| probing.schedule.every_while_down = Some(delay));
        Ok(())
    }

    pub(super) fn set_jitter(&self, ratio: f64) -> Result<(), ConfigError> {
        let ratio = checked_jitter(ratio)?;
        self.with(|probing| probing.schedule.jitter = ratio);
        Ok(())
    }

    pub(super) fn set_timeout(&self, timeout: Duration) -> Result<(), ConfigError> {
        let timeout = ConfigError::above_zero("timeout", timeout)?;
        self.with(|probing| probing.schedule.timeout = timeout);
        Ok(())
    }

    pub(super) fn set_thresholds(&self, rise: u32, fall: u32) -> Result<(), ConfigError> {
        let (rise, fall) = checked_thresholds(rise, fall)?;
        self.with(|probing| (probing.threshold.rise, probing.threshold.fall) = (rise, fall));
        Ok(())
    }

    pub(super) fn set_immediate_failure(&self, on: bool) {
        self.with(|probing| probing.immediate_failure = on);
    }

    pub(super) fn set_passive(&self, on: bool) {
        self.set_flag(PASSIVE, on);
    }

    pub(super) fn set_backpressure(&self) {
        self.set_flag(BACKPRESSURE, true);
    }

    pub(super) fn set_shadow(&self, on: bool) {
        self.set_flag(SHADOW, on);
        self.changed.notify_waiters();
    }

    fn set_flag(&self, flag: u8, on: bool) {
        if on {
            self.word.fetch_or(flag, Ordering::AcqRel);
        } else {
            self.word.fetch_and(!flag, Ordering::AcqRel);
        }
    }

    pub(super) fn add_listener(
        &self,
        listener: impl Fn(Result<(), ProbeFailure>) + Send + Sync + 'static,
    ) {
        self.with(|probing| probing.listeners.push(Arc::new(listener)));
    }

    /// Adds a reporter, and sets its check to the current state. The name of the check becomes the name of the gate,
    /// unless the gate has one.
    pub(super) fn report_to(&self, reporter: Reporter) {
        self.label.set_default(reporter.name());
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

    /// Sets the set that the gate joins when it is used. The first set remains.
    pub(super) fn set_fail_open(&self, set: &FailOpen) {
        let _ = self.fail_open.set(set.clone());
    }

    /// Joins the set. A gate that is not used has no prober, and would count as a member that is up.
    fn join(&self, set: &FailOpen) {
        let changed = {
            let mut probing = self.probing.lock();
            if probing.membership.is_some() {
                return;
            }
            let mut membership = Membership::new(set, &self.changed);
            let changed = membership.set_down(probing.threshold.state() == ProbeState::Down);
            probing.membership = Some(membership);
            changed
        };
        if let Some(set) = changed {
            set.notify();
        }
    }

    // ===== Reads =====

    #[inline]
    pub(super) fn state(&self) -> ProbeState {
        state_of(self.word.load(Ordering::Acquire))
    }

    #[cfg(feature = "observe")]
    pub(super) fn reports(&self) -> &ReportCell {
        &self.reports
    }

    pub(super) fn now(&self) -> Nanos {
        self.clock.now()
    }

    pub(super) fn changed(&self) -> &Notify {
        &self.changed
    }

    /// Returns the number of calls that were rejected because a setting cannot work.
    #[cfg(feature = "observe")]
    pub(super) fn misconfigured(&self) -> u64 {
        self.misconfigured.load(Ordering::Relaxed)
    }

    pub(super) fn rejected(&self) -> u64 {
        self.rejected.load(Ordering::Relaxed)
    }

    pub(super) fn shadowed(&self) -> u64 {
        self.shadowed.load(Ordering::Relaxed)
    }

    // ===== The prober =====

    /// Returns the next action of the prober: a probe, or a wait if calls have proved health since the previous probe.
    pub(super) fn due(&self) -> Due {
        let (succeeded, failed) =
            (self.succeeded.swap(0, Ordering::AcqRel), self.failed.swap(0, Ordering::AcqRel));
        let proved = succeeded > 0 && failed == 0;
        if proved && self.state() == ProbeState::Up {
            return Due::Wait(self.skip());
        }
        Due::Probe(self.begin())
    }

    /// Records a skipped probe as one that passed. Returns the time until the next one.
    fn skip(&self) -> Duration {
        let mut probing = self.probing.lock();
        probing.skipped += 1;
        // The state is up, so a success does not change it.
        let _ = probing.threshold.record(true);
        for reporter in &probing.reporters {
            reporter.record(Ok(()), None);
        }
        let delay = probing.schedule.delay(probing.threshold.state(), false);
        self.expect_result_in(delay);
        delay
    }

    /// Records the start of a probe. Returns its timeout.
    fn begin(&self) -> Duration {
        let mut probing = self.probing.lock();
        probing.probes += 1;
        self.expect_result_in(probing.schedule.timeout);
        probing.schedule.timeout
    }

    /// Records the result of a probe, and notifies reporters, listeners and callers. Returns the time until the next
    /// probe.
    pub(super) fn record(&self, ended: Result<(), FailedProbe>, took: Duration) -> Duration {
        let result = ended.as_ref().map_err(|failed| failed.reason).copied();
        let mut probing = self.probing.lock();
        probing.last = Some(EndedProbe { result, ended: self.now(), took });
        match result {
            Ok(()) => probing.passed += 1,
            Err(reason) => probing.failed[reason.index()] += 1,
        }
        for reporter in &probing.reporters {
            reporter.record(ended.as_ref().map_err(FailedProbe::to_string).copied(), Some(took));
        }
        probing.last_error = ended.err().and_then(|failed| failed.error);
        let error = probing.last_error.clone();
        let change = match result {
            // A rejection by an inner layer of this crate contains no information about the upstream.
            Err(ProbeFailure::Rejected) => None,
            Err(reason) if probing.immediate_failure && reason.is_immediate() => {
                probing.threshold.fail_immediately()
            }
            result => probing.threshold.record(result.is_ok()),
        };
        let failing = probing.threshold.consecutive().1 > 0;
        let delay = probing.schedule.delay(probing.threshold.state(), failing);
        let listeners = probing.listeners.clone();
        self.expect_result_in(delay);
        let mut down_time = None;
        match change {
            Some(ProbeState::Down) => probing.down_since = Some(self.now()),
            Some(_) => {
                let since = probing.down_since.take();
                down_time = since.map(|since| self.now().saturating_sub(since));
            }
            None => {}
        }
        if let Some(to) = change {
            self.publish(probing);
            // A panic of the subscriber does not end the probes, and the listeners receive the result.
            let _ = catch_panic(|| {
                self.notify_of(to, result.err(), error.as_deref(), down_time);
            });
            self.reports.report(|| StateChange {
                event: if to == ProbeState::Down { "health probe down" } else { "health probe up" },
                reason: result.err().map(|failure| failure.as_str()),
                why: String::new(),
            });
        } else {
            drop(probing);
        }
        for listener in listeners {
            // A panic of a listener does not end the probes.
            let _ = catch_panic(|| listener(result));
        }
        delay
    }

    /// Emits the event of a change of the state. `down_time` is the time for which the gate was down. Must be called
    /// without a lock.
    fn notify_of(
        &self,
        to: ProbeState,
        failure: Option<ProbeFailure>,
        error: Option<&str>,
        down_time: Option<Nanos>,
    ) {
        let (layer, name) = (LayerKind::HealthProbe.as_str(), self.name());
        if to == ProbeState::Down {
            event!(
                health,
                WARN,
                layer,
                name,
                reason = failure.map(|reason| reason.as_str()),
                why = error,
                "health probe down",
            );
        } else {
            let down_ms = down_time.map(|time| time / 1_000_000);
            event!(health, INFO, layer, name, down_ms = down_ms, "health probe up");
        }
    }

    /// Sets the time at which the next result is expected.
    fn expect_result_in(&self, delay: Duration) {
        self.next_result.store(self.now().saturating_add(nanos(delay)), Ordering::Relaxed);
    }

    /// Writes the state to the word, releases the lock, and then notifies the set, the reporters and the callers.
    fn publish(&self, mut probing: MutexGuard<'_, Probing>) {
        let to = probing.threshold.state();
        let reporters = probing.reporters.clone();
        let _ = self.word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |word| {
            Some(word & !STATE | to as u8)
        });
        let membership = probing.membership.as_mut();
        let set = membership.and_then(|membership| membership.set_down(to == ProbeState::Down));
        drop(probing);
        if let Some(set) = set {
            set.notify();
        }
        for reporter in reporters {
            reporter.publish(CheckState::of(to));
        }
        self.changed.notify_waiters();
    }

    // ===== The start of the prober =====

    /// Stores a prober, unless the gate has one, and starts it if the current thread is inside a runtime.
    pub(super) fn arm(&self, prober: impl FnOnce() -> Starter) {
        if self.word.load(Ordering::Acquire) & HAS_PROBER == 0 {
            // Outside the lock, because it clones the service of the user.
            let starter = prober();
            let mut state = self.prober.lock();
            if matches!(*state, ProberState::Idle) {
                *state = ProberState::Armed(starter);
                self.set_flag(ARMED | HAS_PROBER, true);
            }
        }
        if self.word.load(Ordering::Acquire) & ARMED != 0 {
            self.start_if_possible();
        }
    }

    /// Starts an armed prober, if the current thread is inside a runtime.
    #[cold]
    fn start_if_possible(&self) {
        let Ok(runtime) = Handle::try_current() else { return };
        let starter = {
            let mut state = self.prober.lock();
            if !matches!(*state, ProberState::Armed(_)) {
                return;
            }
            self.set_flag(ARMED, false);
            match mem::replace(&mut *state, ProberState::Starting) {
                ProberState::Armed(starter) => starter,
                _ => return,
            }
        };
        // Outside the lock: a runtime that shuts down drops the prober at once, which locks and arms again.
        let running = starter(&runtime);
        let mut state = self.prober.lock();
        if matches!(*state, ProberState::Starting) {
            *state = ProberState::Running(running);
        }
    }

    /// Makes the state unknown, because the runtime of the prober has ended before the gate. With a starter, the next
    /// call starts the prober on its own runtime.
    pub(super) fn stopped(&self, starter: Option<Starter>) {
        let mut probing = self.probing.lock();
        probing.threshold.reset();
        self.publish(probing);
        // Armed after the state is published, so that this change cannot overwrite a result of the next prober.
        let mut state = self.prober.lock();
        let next = match starter {
            Some(starter) => {
                self.set_flag(ARMED, true);
                ProberState::Armed(starter)
            }
            None => ProberState::Dead,
        };
        let before = mem::replace(&mut *state, next);
        drop(state);
        // Dropped outside the lock: a starter owns the service and the probe of the user.
        drop(before);
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
        // The abort is outside the lock: it may drop the prober, which owns the service and the probe of the user.
        let running = match &*self.prober.lock() {
            ProberState::Running(prober) => Some(prober.clone()),
            _ => None,
        };
        if let Some(prober) = running {
            prober.abort();
        }
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate")
            .field("name", &self.name())
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}
