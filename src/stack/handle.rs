use std::{
    future::Future,
    mem,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use http::Response;
use tokio::time::Instant;

use super::meter::Counted;
use crate::{
    breaker::{CircuitBreakerSnapshot, State},
    config::ConfigErrors,
    health::ProbeState,
    limit::ConcurrencyLimitSnapshot,
};

/// A stack at one moment. What it does not have is none, or 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StackSnapshot {
    /// How many calls were begun.
    pub total: u64,
    /// How many are under way, each to the end of its response body.
    pub in_flight: u64,
    /// How many were answered.
    pub successes: u64,
    /// How many failed, after all their attempts.
    pub failures: u64,
    /// The number of throttled calls: 429, 529, `RESOURCE_EXHAUSTED`.
    pub throttled: u64,
    /// How many their caller gave up.
    pub cancelled: u64,
    /// How many a layer refused: an open circuit, a limit, a deadline that had passed.
    pub refused: u64,
    /// How many attempts took too long, in whatever phase, and how many calls their deadline ended.
    pub timeouts: u64,
    /// The number of responses that released their permit because their client did not read them.
    pub unread: u64,
    /// How many attempts were made beside first ones.
    pub retries: u64,
    /// How many second copies of slow calls were sent.
    pub hedges: u64,
    /// How often the circuit opened.
    pub breaker_opened: u64,
    /// Where the circuit is.
    pub breaker: Option<State>,
    /// How many calls wait for their turn.
    pub waiting: u32,
    /// How long a call took to its response head, or to its end without one, on average since the beginning;
    /// refused ones apart.
    pub average: Option<Duration>,
    /// Within which time 99 of 100 calls had theirs, in the last minute or so.
    pub p99: Option<Duration>,
    /// How many connections are open.
    pub connections: usize,
    /// What the health probe says.
    pub probe: Option<ProbeState>,
    /// Whether a call would be made now: no circuit is open, no probe says that the service is down.
    pub healthy: bool,
    /// The last check of its health, if there was one.
    pub last_check: Option<HealthCheck>,
}

/// What a check of health found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HealthCheck {
    /// What it found.
    pub status: HealthStatus,
    /// How long it took.
    pub took: Duration,
    /// When it was over.
    pub at: SystemTime,
}

/// How well a service is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HealthStatus {
    /// It answers.
    Healthy,
    /// It answers; its circuit is not closed, or calls wait for their turn.
    Degraded,
    /// It does not answer, its probe says that it is down, or its circuit is open.
    Unhealthy,
}

impl StackSnapshot {
    pub(super) fn of(counted: Counted, limit: ConcurrencyLimitSnapshot, timeouts: u64) -> Self {
        let Counted { begun, successes, failures, throttled, cancelled, refused, .. } = counted;
        let ended = [successes, failures, throttled, cancelled, refused];
        let in_flight = ended.iter().fold(begun, |left, ended| left.saturating_sub(*ended));
        Self {
            total: begun,
            in_flight,
            successes,
            failures,
            throttled,
            cancelled,
            refused,
            timeouts,
            unread: limit.unread,
            retries: 0,
            hedges: 0,
            breaker_opened: 0,
            breaker: None,
            waiting: limit.waiting,
            average: counted.average,
            p99: counted.p99,
            connections: 0,
            probe: None,
            healthy: true,
            last_check: None,
        }
    }

    pub(super) fn with_breaker(mut self, breaker: &CircuitBreakerSnapshot) -> Self {
        self.breaker = Some(breaker.state);
        self.breaker_opened = breaker.opened;
        self.healthy = !matches!(breaker.state, State::Open | State::ForcedOpen);
        self
    }

    pub(super) fn with_probe(mut self, probe: Option<ProbeState>) -> Self {
        self.probe = probe;
        self.healthy &= probe != Some(ProbeState::Down);
        self
    }

    /// What a service is that answers, or does not.
    pub(super) fn status(&self, answers: bool) -> HealthStatus {
        match self.breaker {
            _ if !(answers && self.healthy) => HealthStatus::Unhealthy,
            Some(State::HalfOpen) => HealthStatus::Degraded,
            _ if self.waiting > 0 => HealthStatus::Degraded,
            _ => HealthStatus::Healthy,
        }
    }
}

// ===== What a stack was told, and found out =====

pub(super) struct Now<C> {
    config: Mutex<InForce<C>>,
    last_check: Mutex<Option<HealthCheck>>,
}

/// The configuration in force.
struct InForce<C> {
    config: C,
    /// The number of updates.
    version: u64,
    /// Whether a thread applies a configuration to the layers. That thread also applies configurations that arrive
    /// then.
    is_applying: bool,
}

/// Ends the application of a configuration when a waker or a subscriber panics. Otherwise `update` forgets it.
struct Applying<'a, C>(&'a Mutex<InForce<C>>);

impl<C> Drop for Applying<'_, C> {
    fn drop(&mut self) {
        lock(self.0).is_applying = false;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<C> Now<C> {
    pub(super) fn new(config: C) -> Self {
        let config = InForce { config, version: 0, is_applying: false };
        Self { config: Mutex::new(config), last_check: Mutex::new(None) }
    }

    pub(super) fn config(&self) -> C
    where
        C: Clone,
    {
        lock(&self.config).config.clone()
    }

    /// Puts the configuration that `next` makes in force, and returns what `next` returns beside it.
    ///
    /// `apply` changes the layers, which wakes callers and emits events, so no lock is held meanwhile. If another
    /// thread is applying a configuration, or this update comes from a waker or a subscriber within `apply`, the thread
    /// that applies that configuration applies this one afterwards. If `apply` fails, the earlier configuration stays
    /// in force.
    pub(super) fn update<T>(
        &self,
        next: impl FnOnce(&C) -> (C, T),
        apply: impl Fn(&C) -> Result<(), ConfigErrors>,
    ) -> Result<T, ConfigErrors>
    where
        C: Clone,
    {
        let (mut before, result) = {
            let mut now = lock(&self.config);
            let (next, result) = next(&now.config);
            now.version = now.version.wrapping_add(1);
            let before = mem::replace(&mut now.config, next);
            if now.is_applying {
                return Ok(result);
            }
            now.is_applying = true;
            (before, result)
        };
        let applying = Applying(&self.config);
        loop {
            let (config, version) = {
                let now = lock(&self.config);
                (now.config.clone(), now.version)
            };
            let applied = apply(&config);
            let mut now = lock(&self.config);
            let is_newest = now.version == version;
            match applied {
                Ok(()) if is_newest => {
                    now.is_applying = false;
                    mem::forget(applying);
                    return Ok(result);
                }
                Ok(()) => before = config,
                Err(errors) if is_newest => {
                    now.config = before;
                    now.is_applying = false;
                    mem::forget(applying);
                    return Err(errors);
                }
                Err(_) => {}
            }
        }
    }

    pub(super) fn last_check(&self) -> Option<HealthCheck> {
        *lock(&self.last_check)
    }

    /// Runs a probe and notes what it found.
    pub(super) async fn check<B, E>(
        &self,
        probe: impl Future<Output = Result<Response<B>, E>>,
        look: impl FnOnce() -> StackSnapshot,
    ) -> HealthCheck {
        let start = Instant::now();
        let answers = probe.await.is_ok_and(|response| response.status().is_success());
        let status = look().status(answers);
        let check = HealthCheck { status, took: start.elapsed(), at: SystemTime::now() };
        *lock(&self.last_check) = Some(check);
        check
    }
}
