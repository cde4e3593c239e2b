use std::{
    fmt,
    future::{Ready, pending},
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicU8, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    task::AbortHandle,
    time::{Instant, sleep},
};

use super::in_flight::InFlightGate;
use crate::{
    admission::{Admit, Policy, Terms},
    event::{event, ms},
    health::Reporter,
    outcome::{LayerKind, Outcome, Rejected, RejectedKind},
    permit::{Permit, Release, ReleaseAt, ShardedArc, ShardedRef, Token},
    report::{ReportCell, StateChange},
    sealed::Sealed,
    sync::Mutex,
    user_code::catch_panic,
};

const LAYER: &str = LayerKind::Lifecycle.as_str();

/// How a drain ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Drained {
    /// Number of calls that were still in flight when the drain timeout expired, and were cut.
    pub cut_calls: usize,
    /// Number of connections of `serve` that were still open when the drain timeout expired, and were cut.
    pub cut_connections: usize,
    /// Number of calls that arrived after the grace, and were rejected.
    pub rejected: u64,
}

/// The phase of a process between its start and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum LifecyclePhase {
    /// Not ready yet. Calls are served.
    Starting,
    /// Ready.
    Ready,
    /// No longer ready. Calls are served for the [delay](super::handle::Lifecycle::drain_delay), in which routers stop
    /// routing calls to this process.
    Draining,
    /// New connections are not accepted, and the [tokens](super::token::Drain) of streams resolve. Calls that arrive
    /// are served for the [grace](super::handle::Lifecycle::grace), and rejected after it.
    Stopping,
    /// The drain timeout has expired. The remaining calls and connections are cut.
    Stopped,
}

impl LifecyclePhase {
    /// Returns the name of the phase: `starting`, `ready`, `draining`, `stopping` or `stopped`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
        }
    }
}

impl fmt::Display for LifecyclePhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The phases, with *stopping* divided into two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum LifecycleStep {
    Starting,
    Ready,
    Draining,
    /// *Stopping*, and calls are still admitted: they were on their way when the server announced the end.
    Stopping,
    /// *Stopping*, after the grace: calls are rejected.
    Rejecting,
    Stopped,
}

impl LifecycleStep {
    fn phase(self) -> LifecyclePhase {
        match self {
            Self::Starting => LifecyclePhase::Starting,
            Self::Ready => LifecyclePhase::Ready,
            Self::Draining => LifecyclePhase::Draining,
            Self::Stopping | Self::Rejecting => LifecyclePhase::Stopping,
            Self::Stopped => LifecyclePhase::Stopped,
        }
    }
}

/// The state that the handles, layers and tokens of a lifecycle share.
pub(crate) struct LifecycleState {
    /// The step as a number, for reads without a lock. Written under the lock of `step`.
    now: AtomicU8,
    /// The step, for the tasks that wait for a change. Steps only advance.
    step: watch::Sender<LifecycleStep>,
    gate: InFlightGate,
    rejected: AtomicU64,
    times: Mutex<DrainTimes>,
    reporter: Reporter,
    /// The registries that receive the changes of the phase.
    pub(super) reports: ReportCell,
    /// Wakes calls that wait for an inner service when calls begin to be rejected.
    closed_signal: Arc<Notify>,
    /// The task that runs [`drive`]. It ends with the state.
    driver: OnceLock<AbortHandle>,
    /// The time at which the drain began.
    drain_began: OnceLock<Instant>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct DrainTimes {
    pub(super) delay: Duration,
    pub(super) grace: Duration,
    pub(super) timeout: Duration,
}

impl LifecycleState {
    pub(super) fn new(reporter: Reporter) -> Self {
        Self {
            now: AtomicU8::new(LifecycleStep::Starting as u8),
            step: watch::Sender::new(LifecycleStep::Starting),
            gate: InFlightGate::new(),
            rejected: AtomicU64::new(0),
            times: Mutex::new(DrainTimes {
                delay: Duration::from_secs(5),
                grace: Duration::from_secs(1),
                timeout: Duration::from_secs(20),
            }),
            reporter,
            reports: ReportCell::default(),
            closed_signal: Arc::default(),
            driver: OnceLock::new(),
            drain_began: OnceLock::new(),
        }
    }

    pub(super) fn set_driver(&self, driver: AbortHandle) {
        let _ = self.driver.set(driver);
    }

    pub(super) fn times<T>(&self, with: impl FnOnce(&mut DrainTimes) -> T) -> T {
        with(&mut self.times.lock())
    }

    // ===== Reads =====

    fn step(&self) -> LifecycleStep {
        match self.now.load(SeqCst) {
            0 => LifecycleStep::Starting,
            1 => LifecycleStep::Ready,
            2 => LifecycleStep::Draining,
            3 => LifecycleStep::Stopping,
            4 => LifecycleStep::Rejecting,
            _ => LifecycleStep::Stopped,
        }
    }

    pub(super) fn phase(&self) -> LifecyclePhase {
        self.step().phase()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.gate.in_flight()
    }

    pub(super) fn rejected(&self) -> u64 {
        self.rejected.load(SeqCst)
    }

    /// Waits until the state is at `step` or a later one.
    pub(super) async fn reached(&self, step: LifecycleStep) {
        let mut steps = self.steps();
        if steps.wait_for(|now| *now >= step).await.is_err() {
            // The sender is in `self`.
            pending().await
        }
    }

    pub(super) async fn changed(&self) -> LifecyclePhase {
        let mut steps = self.steps();
        let before = steps.borrow_and_update().phase();
        let now = steps.wait_for(|now| now.phase() != before).await.map(|now| now.phase());
        match now {
            Ok(now) => now,
            Err(_) => pending().await,
        }
    }

    /// Waits until no call is in flight.
    ///
    /// Polls the count every 10 ms, so that the end of a call does not have to notify a waiter.
    pub(super) async fn wait_until_empty(&self) {
        while self.in_flight() > 0 {
            sleep(Duration::from_millis(10)).await;
        }
    }

    // ===== Changes =====

    /// Emits the event of a phase that begins. Must be called without a lock.
    pub(super) fn notify_of(&self, phase: LifecyclePhase) {
        let DrainTimes { delay, timeout, .. } = self.times(|times| *times);
        macro_rules! emit {
            ($message:literal, $left_ms:expr) => {
                event!(
                    lifecycle,
                    INFO,
                    LAYER,
                    "",
                    in_flight = self.in_flight(),
                    left_ms = $left_ms,
                    $message,
                )
            };
        }
        match phase {
            LifecyclePhase::Starting => emit!("starting", None::<u64>),
            LifecyclePhase::Ready => emit!("ready", None::<u64>),
            LifecyclePhase::Draining => emit!("draining", ms(delay)),
            LifecyclePhase::Stopping => emit!("stopping", ms(timeout)),
            LifecyclePhase::Stopped => emit!("stopped", None::<u64>),
        }
    }

    /// Emits the event of the end of `serve` or `run`. Must be called without a lock.
    pub(super) fn notify_of_drained(&self, drained: &Drained) {
        let took = self.drain_began.get().map(|began| began.elapsed());
        macro_rules! emit {
            ($level:ident) => {
                event!(
                    lifecycle,
                    $level,
                    LAYER,
                    "",
                    cut_calls = drained.cut_calls,
                    cut_connections = drained.cut_connections,
                    rejected = drained.rejected,
                    took_ms = took.map(ms),
                    "drained",
                )
            };
        }
        if drained.cut_calls > 0 || drained.cut_connections > 0 { emit!(WARN) } else { emit!(INFO) }
    }

    /// Advances to a step. Has no effect if the state is already at this step or at a later one.
    pub(super) fn advance_to(&self, next: LifecycleStep) {
        let mut is_new_phase = false;
        let has_advanced = self.step.send_if_modified(|now| {
            if next <= *now {
                return false;
            }
            is_new_phase = next.phase() != now.phase();
            *now = next;
            // The gate closes before the step changes: if no call is in flight after the change, no call will be.
            if next >= LifecycleStep::Rejecting {
                self.gate.close();
            }
            self.now.store(next as u8, SeqCst);
            // The report is made under the lock of the channel, so that the reports of two threads have the order of
            // their steps. The watchers of the registry are notified after the lock is released, because wakers are
            // user code.
            match next.phase() {
                LifecyclePhase::Starting => {}
                LifecyclePhase::Ready => self.reporter.set(Ok(())),
                phase if is_new_phase => self.reporter.set(Err(phase.as_str())),
                _ => {}
            }
            true
        });
        if !has_advanced {
            return;
        }
        if next >= LifecycleStep::Draining {
            let _ = self.drain_began.set(Instant::now());
        }
        self.reporter.notify();
        if next >= LifecycleStep::Rejecting {
            self.closed_signal.notify_waiters();
        }
        if is_new_phase {
            let phase = next.phase();
            if phase >= LifecyclePhase::Stopping {
                self.reporter.end();
            }
            // A panic of the subscriber does not end the drain.
            let _ = catch_panic(|| self.notify_of(phase));
            self.reports.report(|| StateChange {
                event: phase.as_str(),
                reason: None,
                why: format!("calls in flight: {}", self.in_flight()),
            });
        }
        // A step with a duration of zero is over before this function returns, without the driver task.
        match next {
            LifecycleStep::Draining if self.times(|times| times.delay.is_zero()) => {
                self.advance_to(LifecycleStep::Stopping);
            }
            LifecycleStep::Stopping if self.times(|times| times.grace.is_zero()) => {
                self.advance_to(LifecycleStep::Rejecting);
            }
            _ => {}
        }
    }

    pub(super) fn drain(&self) {
        self.advance_to(LifecycleStep::Draining);
    }

    pub(super) fn skip_delay(&self) {
        match self.phase() {
            LifecyclePhase::Starting | LifecyclePhase::Ready => {}
            LifecyclePhase::Draining => self.advance_to(LifecycleStep::Stopping),
            LifecyclePhase::Stopping | LifecyclePhase::Stopped => {
                self.advance_to(LifecycleStep::Stopped)
            }
        }
    }

    pub(super) fn steps(&self) -> watch::Receiver<LifecycleStep> {
        self.step.subscribe()
    }
}

/// Waits for the start of the drain, then advances to each further step when the time of the current step is over.
///
/// The step can advance earlier, for example by [`LifecycleState::skip_delay`]. Then the next step begins its time at
/// once. The future ends when the state is dropped.
pub(super) async fn drive(state: Weak<LifecycleState>, mut step: watch::Receiver<LifecycleStep>) {
    // `wait_for` fails when the state, which owns the sender, is dropped.
    if step.wait_for(|now| *now >= LifecycleStep::Draining).await.is_err() {
        return;
    }
    loop {
        let Some(now) = state.upgrade() else { return };
        let DrainTimes { delay, grace, timeout } = now.times(|times| *times);
        let (time, next) = match now.step() {
            LifecycleStep::Starting | LifecycleStep::Ready | LifecycleStep::Draining => {
                (delay, LifecycleStep::Stopping)
            }
            LifecycleStep::Stopping if grace < timeout => (grace, LifecycleStep::Rejecting),
            LifecycleStep::Stopping => (timeout, LifecycleStep::Stopped),
            LifecycleStep::Rejecting => (timeout.saturating_sub(grace), LifecycleStep::Stopped),
            LifecycleStep::Stopped => return,
        };
        drop(now);
        tokio::select! {
            biased;
            ended = step.wait_for(|now| *now >= next) => if ended.is_err() { return },
            () = sleep(time) => if let Some(now) = state.upgrade() { now.advance_to(next) },
        }
    }
}

/// A guard that the driver task owns. It detects the end of the task's runtime.
pub(super) struct DriverGuard(pub(super) Weak<LifecycleState>);

impl Drop for DriverGuard {
    /// Stops the lifecycle if the runtime has ended: if the state still exists and is not stopped, the runtime has
    /// dropped the task, and no signal or timer is handled any more.
    fn drop(&mut self) {
        let Some(state) = self.0.upgrade() else { return };
        if state.phase() < LifecyclePhase::Stopped {
            event!(lifecycle, WARN, LAYER, "", "runtime of the lifecycle has ended");
            state.advance_to(LifecycleStep::Stopped);
        }
    }
}

impl Drop for LifecycleState {
    fn drop(&mut self) {
        if let Some(driver) = self.driver.get() {
            driver.abort();
        }
    }
}

// ===== Calls =====

impl ShardedRef<LifecycleState> {
    /// Counts one more call in flight, in any phase.
    pub(super) fn acquire(&self) -> Permit<ShardedRef<LifecycleState>> {
        self.gate.acquire();
        Permit::new(self.clone(), Token::default())
    }
}

/// The policy of a [`LifecycleLayer`](super::layer::LifecycleLayer): admits calls until the grace is over.
#[derive(Clone, Debug)]
pub(super) struct DrainPolicy(pub(super) ShardedArc<LifecycleState>);

impl<Req> Policy<Req> for DrainPolicy {
    type StateRef = ShardedRef<LifecycleState>;
    type Pass = Permit<ShardedRef<LifecycleState>>;
    type Wait = Ready<Result<Permit<ShardedRef<LifecycleState>>, Rejected>>;

    const LAYER: LayerKind = LayerKind::Lifecycle;

    fn peek(&self) -> bool {
        self.0.gate.is_open()
    }

    fn admit(
        &self,
        _: &Req,
        _: impl Terms,
    ) -> Admit<Permit<ShardedRef<LifecycleState>>, Self::Wait> {
        let is_admitted = self.0.gate.acquire();
        let permit = Permit::new(self.0.lease(), Token::default());
        if is_admitted {
            return Admit::Pass(permit);
        }
        self.0.rejected.fetch_add(1, SeqCst);
        let rejected = Rejected::by(LayerKind::Lifecycle, RejectedKind::ShuttingDown);
        // Another instance can serve the call at once.
        Admit::Reject(rejected.with_retry_after(Duration::ZERO).reported())
    }

    fn permit(
        &self,
        permit: Permit<ShardedRef<LifecycleState>>,
    ) -> Permit<ShardedRef<LifecycleState>> {
        permit
    }

    fn closed_signal(
        &self,
        permit: Option<&Permit<ShardedRef<LifecycleState>>>,
    ) -> Option<Arc<Notify>> {
        // A call with a permit continues to wait for the inner service. Only a call without one is woken and rejected.
        permit.is_none().then(|| self.0.closed_signal.clone())
    }
}

impl Sealed for LifecycleState {}

impl Release for LifecycleState {
    fn release(&self, _: Token, _: Outcome) {
        self.gate.release();
    }

    fn release_at(&self) -> ReleaseAt {
        ReleaseAt::Body
    }
}

impl fmt::Debug for LifecycleState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LifecycleState")
            .field("phase", &self.phase())
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}
