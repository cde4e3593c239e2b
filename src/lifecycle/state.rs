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

/// Where a process is between its start and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Not ready yet; calls that come all the same are answered.
    Starting,
    /// Ready.
    Ready,
    /// Not ready any more, and traffic goes on until all who route it know.
    Draining,
    /// New work is refused, connections are closed as they become idle, streams are told to end.
    Stopping,
    /// The longest time is over: what is still there is cut.
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

/// What a lifecycle's handles, layers and tokens share.
pub struct State {
    /// The phase as a number.
    now: AtomicU8,
    phase: watch::Sender<Phase>,
    door: Door,
    refused: AtomicU64,
    times: Mutex<Times>,
    reporter: Reporter,
    /// Wakes who waits for an inner service that it must not be called any more.
    shut: Arc<Notify>,
    driver: OnceLock<AbortHandle>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) delay: Duration,
    pub(super) longest: Duration,
}

impl State {
    pub(super) fn new(reporter: Reporter) -> Self {
        Self {
            now: AtomicU8::new(Phase::Starting as u8),
            phase: watch::Sender::new(Phase::Starting),
            door: Door::new(),
            refused: AtomicU64::new(0),
            times: Mutex::new(Times {
                delay: Duration::from_secs(5),
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

    pub(super) fn phase(&self) -> Phase {
        match self.now.load(SeqCst) {
            0 => Phase::Starting,
            1 => Phase::Ready,
            2 => Phase::Draining,
            3 => Phase::Stopping,
            _ => Phase::Stopped,
        }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.door.inside()
    }

    pub(super) fn refused(&self) -> u64 {
        self.refused.load(SeqCst)
    }

    /// Waits until it has come to `phase`, or is further.
    pub(super) async fn reached(&self, phase: Phase) {
        let mut seen = self.phase.subscribe();
        if seen.wait_for(|now| *now >= phase).await.is_err() {
            // The sender is in `self`.
            pending().await
        }
    }

    pub(super) async fn changed(&self) -> Phase {
        let mut seen = self.phase.subscribe();
        let before = *seen.borrow_and_update();
        let now = seen.wait_for(|now| *now != before).await.map(|now| *now);
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

    /// Never back.
    pub(super) fn go_to(&self, next: Phase) {
        let went = self.phase.send_if_modified(|now| {
            if next <= *now {
                return false;
            }
            *now = next;
            // First, so that whoever sees the phase changed and nothing in flight is right.
            if next >= Phase::Stopping {
                self.door.close();
            }
            self.now.store(next as u8, SeqCst);
            // Here, so that two threads that change the phase at once report in the same order. The watchers of the
            // registry are told below, because this closure runs under the lock of the channel and wakers are user code.
            match next {
                Phase::Starting => {}
                Phase::Ready => self.reporter.set(Ok(())),
                phase => self.reporter.set(Err(phase.as_str())),
            }
            true
        });
        if went {
            self.reporter.tell();
            if !self.is_open() {
                self.shut.notify_waiters();
                self.reporter.end();
            }
            event!(INFO, phase = next.as_str(), in_flight = self.in_flight(), "lifecycle");
        }
    }

    /// What needs no waiting is done when this returns.
    pub(super) fn drain(&self) {
        self.go_to(Phase::Draining);
        if self.times(|times| times.delay.is_zero()) {
            self.go_to(Phase::Stopping);
        }
    }

    pub(super) fn hurry(&self) {
        match self.phase() {
            Phase::Starting | Phase::Ready => {}
            Phase::Draining => self.go_to(Phase::Stopping),
            Phase::Stopping | Phase::Stopped => self.go_to(Phase::Stopped),
        }
    }

    pub(super) fn seen(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }

    fn is_open(&self) -> bool {
        self.door.is_open()
    }
}

/// From the drain on, goes from phase to phase in time, unless somebody is faster.
pub(super) async fn drive(state: Weak<State>, mut phase: watch::Receiver<Phase>) {
    // An error is the end of the state.
    if phase.wait_for(|now| *now >= Phase::Draining).await.is_err() {
        return;
    }
    loop {
        let Some(now) = state.upgrade() else { return };
        let Times { delay, longest } = now.times(|times| *times);
        let (time, next) = match now.phase() {
            Phase::Starting | Phase::Ready | Phase::Draining => (delay, Phase::Stopping),
            Phase::Stopping => (longest, Phase::Stopped),
            Phase::Stopped => return,
        };
        drop(now);
        tokio::select! {
            biased;
            ended = phase.wait_for(|now| *now >= next) => if ended.is_err() { return },
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
            state.go_to(Phase::Stopped);
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
        event!(DEBUG, "call refused: shutting down");
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
