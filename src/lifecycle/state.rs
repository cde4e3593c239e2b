use std::{
    fmt,
    future::{Ready, pending},
    sync::{
        Arc, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicU8, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    task::AbortHandle,
    time::sleep,
};

use super::door::Door;
use crate::{
    admission::{Admit, Policy, Terms},
    call::{
        Finish, Hold, LayerKind, Lease, Outcome, Permit, Rejected, RejectedKind, Striped, Token,
    },
    event,
    health::Reporter,
};

/// The phase of a process between its start and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Not ready yet. Calls are served.
    Starting,
    /// Ready.
    Ready,
    /// No longer ready. Calls are served until the routers have noticed.
    Draining,
    /// New connections are not accepted, and streams are told to end. Calls that arrive are served for the
    /// [grace](super::Lifecycle::grace), and rejected after it.
    Stopping,
    /// The drain timeout has expired. Calls and connections that are left are cut.
    Stopped,
}

impl Phase {
    /// `starting`, `ready`, `draining`, `stopping` or `stopped`.
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

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The phases, with *stopping* divided into two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum Step {
    Starting,
    Ready,
    Draining,
    /// *Stopping*, and calls are still admitted: they were on their way when the server announced the end.
    Stopping,
    /// *Stopping*, after the grace: calls are rejected.
    Rejecting,
    Stopped,
}

impl Step {
    fn phase(self) -> Phase {
        match self {
            Self::Starting => Phase::Starting,
            Self::Ready => Phase::Ready,
            Self::Draining => Phase::Draining,
            Self::Stopping | Self::Rejecting => Phase::Stopping,
            Self::Stopped => Phase::Stopped,
        }
    }
}

/// What a lifecycle's handles, layers and tokens share.
pub struct State {
    /// The step as a number.
    now: AtomicU8,
    step: watch::Sender<Step>,
    door: Door,
    refused: AtomicU64,
    times: Mutex<Times>,
    reporter: Reporter,
    /// Wakes calls that wait for an inner service when calls begin to be rejected.
    shut: Arc<Notify>,
    driver: OnceLock<AbortHandle>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) delay: Duration,
    pub(super) grace: Duration,
    pub(super) longest: Duration,
}

impl State {
    pub(super) fn new(reporter: Reporter) -> Self {
        Self {
            now: AtomicU8::new(Step::Starting as u8),
            step: watch::Sender::new(Step::Starting),
            door: Door::new(),
            refused: AtomicU64::new(0),
            times: Mutex::new(Times {
                delay: Duration::from_secs(5),
                grace: Duration::from_secs(1),
                longest: Duration::from_secs(20),
            }),
            reporter,
            shut: Arc::default(),
            driver: OnceLock::new(),
        }
    }

    pub(super) fn driven_by(&self, driver: AbortHandle) {
        let _ = self.driver.set(driver);
    }

    pub(super) fn times<T>(&self, with: impl FnOnce(&mut Times) -> T) -> T {
        with(&mut self.times.lock().unwrap_or_else(PoisonError::into_inner))
    }

    // ===== Looking =====

    fn step(&self) -> Step {
        match self.now.load(SeqCst) {
            0 => Step::Starting,
            1 => Step::Ready,
            2 => Step::Draining,
            3 => Step::Stopping,
            4 => Step::Rejecting,
            _ => Step::Stopped,
        }
    }

    pub(super) fn phase(&self) -> Phase {
        self.step().phase()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.door.inside()
    }

    pub(super) fn refused(&self) -> u64 {
        self.refused.load(SeqCst)
    }

    /// Waits until the phase is `phase` or a later one.
    pub(super) async fn reached(&self, phase: Phase) {
        let mut seen = self.step.subscribe();
        if seen.wait_for(|now| now.phase() >= phase).await.is_err() {
            // The sender is in `self`.
            pending().await
        }
    }

    /// Waits until the grace is over.
    #[cfg(feature = "serve")]
    pub(super) async fn grace_over(&self) {
        let mut seen = self.step.subscribe();
        if seen.wait_for(|now| *now >= Step::Rejecting).await.is_err() {
            // The sender is in `self`.
            pending().await
        }
    }

    pub(super) async fn changed(&self) -> Phase {
        let mut seen = self.step.subscribe();
        let before = seen.borrow_and_update().phase();
        let now = seen.wait_for(|now| now.phase() != before).await.map(|now| now.phase());
        match now {
            Ok(now) => now,
            Err(_) => pending().await,
        }
    }

    /// Waits until nothing is under way. It looks time and again: a call's end need not tell.
    pub(super) async fn emptied(&self) {
        while self.in_flight() > 0 {
            sleep(Duration::from_millis(10)).await;
        }
    }

    // ===== Going on =====

    /// Advances to a step. Without effect if the step has been reached.
    pub(super) fn go_to(&self, next: Step) {
        let mut is_new_phase = false;
        let went = self.step.send_if_modified(|now| {
            if next <= *now {
                return false;
            }
            is_new_phase = next.phase() != now.phase();
            *now = next;
            // Closed before the step changes: if no call is in flight after the change, none will be.
            if next >= Step::Rejecting {
                self.door.close();
            }
            self.now.store(next as u8, SeqCst);
            // Under the lock of the channel, so that two threads that change the step report in the same order. The
            // watchers of the registry are notified below, because wakers are user code.
            match next.phase() {
                Phase::Starting => {}
                Phase::Ready => self.reporter.set(Ok(())),
                phase if is_new_phase => self.reporter.set(Err(phase.as_str())),
                _ => {}
            }
            true
        });
        if !went {
            return;
        }
        self.reporter.tell();
        if next >= Step::Rejecting {
            self.shut.notify_waiters();
        }
        if is_new_phase {
            let phase = next.phase();
            if phase >= Phase::Stopping {
                self.reporter.end();
            }
            event!(INFO, phase = phase.as_str(), in_flight = self.in_flight(), "lifecycle");
        }
        // Steps that take no time are over when this returns.
        match next {
            Step::Draining if self.times(|times| times.delay.is_zero()) => {
                self.go_to(Step::Stopping);
            }
            Step::Stopping if self.times(|times| times.grace.is_zero()) => {
                self.go_to(Step::Rejecting);
            }
            _ => {}
        }
    }

    pub(super) fn drain(&self) {
        self.go_to(Step::Draining);
    }

    pub(super) fn hurry(&self) {
        match self.phase() {
            Phase::Starting | Phase::Ready => {}
            Phase::Draining => self.go_to(Step::Stopping),
            Phase::Stopping | Phase::Stopped => self.go_to(Step::Stopped),
        }
    }

    pub(super) fn seen(&self) -> watch::Receiver<Step> {
        self.step.subscribe()
    }

    fn is_open(&self) -> bool {
        self.door.is_open()
    }
}

/// From the beginning of the drain, goes to each further step when its time has come, unless it has been reached
/// already.
pub(super) async fn drive(state: Weak<State>, mut step: watch::Receiver<Step>) {
    // An error is the end of the state.
    if step.wait_for(|now| *now >= Step::Draining).await.is_err() {
        return;
    }
    loop {
        let Some(now) = state.upgrade() else { return };
        let Times { delay, grace, longest } = now.times(|times| *times);
        let (time, next) = match now.step() {
            Step::Starting | Step::Ready | Step::Draining => (delay, Step::Stopping),
            Step::Stopping if grace < longest => (grace, Step::Rejecting),
            Step::Stopping => (longest, Step::Stopped),
            Step::Rejecting => (longest.saturating_sub(grace), Step::Stopped),
            Step::Stopped => return,
        };
        drop(now);
        tokio::select! {
            biased;
            ended = step.wait_for(|now| *now >= next) => if ended.is_err() { return },
            () = sleep(time) => if let Some(now) = state.upgrade() { now.go_to(next) },
        }
    }
}

/// Goes with what drives the state.
pub(super) struct Driven(pub(super) Weak<State>);

impl Drop for Driven {
    /// With the state still there, and not at its end, this is the end of the runtime: no signal is heard any more.
    fn drop(&mut self) {
        let Some(state) = self.0.upgrade() else { return };
        if state.phase() < Phase::Stopped {
            event!(WARN, "lifecycle: the runtime that it was made in has ended");
            state.go_to(Step::Stopped);
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        if let Some(driver) = self.driver.get() {
            driver.abort();
        }
    }
}

// ===== Calls =====

impl Lease<State> {
    /// One more under way, whatever the phase.
    pub(super) fn enter(&self) -> Permit<Lease<State>> {
        self.door.enter();
        Permit::new(self.clone(), Token::default())
    }
}

/// What a layer asks whether calls go.
#[derive(Clone, Debug)]
pub struct Entrance(pub(super) Striped<State>);

impl<Req> Policy<Req> for Entrance {
    type Giver = Lease<State>;
    type Pass = Permit<Lease<State>>;
    type Wait = Ready<Result<Permit<Lease<State>>, Rejected>>;

    const LAYER: LayerKind = LayerKind::Lifecycle;

    fn peek(&self) -> bool {
        self.0.is_open()
    }

    fn admit(&self, _: &Req, _: impl Terms) -> Admit<Permit<Lease<State>>, Self::Wait> {
        let in_time = self.0.door.enter();
        let permit = Permit::new(self.0.lease(), Token::default());
        if in_time {
            return Admit::Go(permit);
        }
        self.0.refused.fetch_add(1, SeqCst);
        event!(DEBUG, "call rejected: shutting down");
        let rejected = Rejected::by(LayerKind::Lifecycle, RejectedKind::ShuttingDown);
        // Another instance can take it at once.
        Admit::No(rejected.with_retry_after(Duration::ZERO))
    }

    fn permit(&self, permit: Permit<Lease<State>>) -> Permit<Lease<State>> {
        permit
    }

    fn shut(&self, permit: Option<&Permit<Lease<State>>>) -> Option<Arc<Notify>> {
        // What was accepted goes on, though it may have to wait.
        permit.is_none().then(|| self.0.shut.clone())
    }
}

impl Finish for State {
    fn finish(&self, _: Token, _: Outcome) {
        self.door.leave();
    }

    fn hold(&self) -> Hold {
        Hold::Body
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State")
            .field("phase", &self.phase())
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}
