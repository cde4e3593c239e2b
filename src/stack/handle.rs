use std::{
    fmt,
    future::Future,
    mem,
    time::{Duration, SystemTime},
};

use http::Response;
use tokio::time::Instant;

use super::meter::MeterCounts;
use crate::sync::Mutex;
use crate::{
    breaker::{CircuitBreakerSnapshot, CircuitState},
    config::{ConfigErrors, SettingChange},
    event::{as_one_update, event},
    health::ProbeState,
    limit::ConcurrencyLimitSnapshot,
    outcome::LayerKind,
    report::{ReportCell, StateChange},
};

/// A snapshot of a stack. Values of layers that the stack does not contain are `None` or 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StackSnapshot {
    /// The number of calls that have begun.
    pub total: u64,
    /// The number of calls in flight. A call ends with its response body.
    pub in_flight: u64,
    /// The number of calls that have succeeded.
    pub successes: u64,
    /// The number of calls that have failed, after all their attempts.
    pub failures: u64,
    /// The number of throttled calls: 429, 529, `RESOURCE_EXHAUSTED`.
    pub throttled: u64,
    /// The number of calls that their caller has cancelled.
    pub cancelled: u64,
    /// The number of calls that a layer has rejected: an open circuit, a limit, or a deadline that had passed.
    pub rejected: u64,
    /// The number of attempts that have timed out, in any phase, or that were ended by a deadline.
    pub timeouts: u64,
    /// The number of responses that released their permit because their client did not read them.
    pub unread: u64,
    /// The number of retries.
    pub retries: u64,
    /// The number of hedge attempts.
    pub hedges: u64,
    /// The number of times that the circuit has opened.
    pub breaker_opened: u64,
    /// The state of the circuit.
    pub breaker: Option<CircuitState>,
    /// The number of calls that wait for a permit.
    pub waiting: u32,
    /// The average latency of all calls so far, without rejected ones. A latency ends at the response head, or without
    /// one at the end of the call. `None` before the first latency.
    pub average: Option<Duration>,
    /// The 99th percentile of the latencies of the last 30 to 60 s.
    pub p99: Option<Duration>,
    /// The number of open connections.
    pub connections: usize,
    /// The state of the health probe.
    pub probe: Option<ProbeState>,
    /// Whether the circuit is not open and the health probe is not down. A full limit does not count.
    pub healthy: bool,
    /// The result of the last health check. `None` before the first one.
    pub last_check: Option<HealthCheck>,
}

/// The result of a health check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct HealthCheck {
    /// The health of the service.
    pub status: UpstreamHealth,
    /// The duration of the check.
    pub took: Duration,
    /// The end of the check.
    pub at: SystemTime,
}

/// The health of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum UpstreamHealth {
    /// The service responds with a 2xx.
    Healthy,
    /// The service responds with a 2xx, but its circuit is half-open, or calls wait for a permit.
    Degraded,
    /// The service does not respond with a 2xx, its health probe is down, or its circuit is open.
    Unhealthy,
}

impl UpstreamHealth {
    /// Returns the name of the value: `healthy`, `degraded`, `unhealthy`.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Degraded => "degraded",
            Self::Unhealthy => "unhealthy",
        }
    }
}

impl fmt::Display for UpstreamHealth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl StackSnapshot {
    pub(super) fn of(counts: MeterCounts, limit: ConcurrencyLimitSnapshot, timeouts: u64) -> Self {
        let MeterCounts { begun, successes, failures, throttled, cancelled, rejected, .. } = counts;
        let ended = [successes, failures, throttled, cancelled, rejected];
        let in_flight = ended.iter().fold(begun, |left, ended| left.saturating_sub(*ended));
        Self {
            total: begun,
            in_flight,
            successes,
            failures,
            throttled,
            cancelled,
            rejected,
            timeouts,
            unread: limit.unread,
            retries: 0,
            hedges: 0,
            breaker_opened: 0,
            breaker: None,
            waiting: limit.waiting,
            average: counts.average,
            p99: counts.p99,
            connections: 0,
            probe: None,
            healthy: true,
            last_check: None,
        }
    }

    pub(super) fn with_breaker(mut self, breaker: &CircuitBreakerSnapshot) -> Self {
        self.breaker = Some(breaker.state);
        self.breaker_opened = breaker.opened;
        self.healthy = !matches!(breaker.state, CircuitState::Open | CircuitState::ForcedOpen);
        self
    }

    pub(super) fn with_probe(mut self, probe: Option<ProbeState>) -> Self {
        self.probe = probe;
        self.healthy &= probe != Some(ProbeState::Down);
        self
    }

    /// Returns the health of a service. `has_passed` states whether the health check succeeded.
    pub(super) fn status(&self, has_passed: bool) -> UpstreamHealth {
        match self.breaker {
            _ if !(has_passed && self.healthy) => UpstreamHealth::Unhealthy,
            Some(CircuitState::HalfOpen) => UpstreamHealth::Degraded,
            _ if self.waiting > 0 => UpstreamHealth::Degraded,
            _ => UpstreamHealth::Healthy,
        }
    }
}

/// Emits the event of an update and reports the update. `fixed` are the keys of the settings that need a new stack.
pub(super) fn notify_of_update(
    reports: &ReportCell,
    name: &str,
    keys: &[SettingChange],
    fixed: &[&'static str],
) {
    if keys.is_empty() && fixed.is_empty() {
        return;
    }
    let layer = LayerKind::Stack.as_str();
    let keys: Vec<&str> = keys.iter().map(|change| change.key).collect();
    event!(
        config,
        INFO,
        layer,
        name,
        keys = keys.join(",").as_str(),
        needs_new_stack = (!fixed.is_empty()).then(|| fixed.join(",")).as_deref(),
        "settings changed",
    );
    reports.report(|| {
        let mut why = keys.join(", ");
        if !fixed.is_empty() {
            why.push_str(&format!(" (a new stack is needed for {})", fixed.join(", ")));
        }
        StateChange { event: "settings changed", reason: None, why }
    });
}

// ===== The shared state of a stack =====

/// The configuration in force and the last health check.
pub(super) struct CurrentConfig<C> {
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

/// Clears `is_applying` when a waker or a subscriber panics in `apply`. `update` forgets the guard when it ends without
/// a panic, because it then clears the flag itself, in the same lock as the check for a newer version.
struct Applying<'a, C>(&'a Mutex<InForce<C>>);

impl<C> Drop for Applying<'_, C> {
    fn drop(&mut self) {
        self.0.lock().is_applying = false;
    }
}

impl<C> CurrentConfig<C> {
    pub(super) fn new(config: C) -> Self {
        let config = InForce { config, version: 0, is_applying: false };
        Self { config: Mutex::new(config), last_check: Mutex::new(None) }
    }

    pub(super) fn config(&self) -> C
    where
        C: Clone,
    {
        self.config.lock().config.clone()
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
            let mut now = self.config.lock();
            let (next, result) = next(&now.config);
            now.version = now.version.wrapping_add(1);
            let before = mem::replace(&mut now.config, next);
            if now.is_applying {
                return Ok(result);
            }
            now.is_applying = true;
            (before, result)
        };
        // Applies the newest configuration until no further one has arrived meanwhile. `before` is the last
        // configuration that the layers have accepted.
        let applying = Applying(&self.config);
        loop {
            let (config, version) = {
                let now = self.config.lock();
                (now.config.clone(), now.version)
            };
            let applied = as_one_update(|| apply(&config));
            let mut now = self.config.lock();
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
        *self.last_check.lock()
    }

    /// Awaits a health check and records its result.
    pub(super) async fn check<B, E>(
        &self,
        probe: impl Future<Output = Result<Response<B>, E>>,
        snapshot: impl FnOnce() -> StackSnapshot,
    ) -> HealthCheck {
        let start = Instant::now();
        let has_passed = probe.await.is_ok_and(|response| response.status().is_success());
        let status = snapshot().status(has_passed);
        let check = HealthCheck { status, took: start.elapsed(), at: SystemTime::now() };
        *self.last_check.lock() = Some(check);
        check
    }
}
