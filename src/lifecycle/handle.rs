use std::{fmt, future::Future, io, panic::catch_unwind, sync::Arc, time::Duration};

use tokio::{runtime::Handle, time::sleep};

use super::{
    layer::LifecycleLayer,
    signals::Signals,
    state::{Drained, DriverGuard, LifecyclePhase, LifecycleState, LifecycleStep, drive},
    token::Drain,
};
use crate::{
    error::ConfigError, event::settings_changed, health::Health, outcome::LayerKind,
    permit::ShardedArc,
};

/// The lifecycle of a process: its [phase](LifecyclePhase), its readiness, and the drain that ends it without losing a
/// call.
///
/// Clones share one lifecycle and its settings. See the [module](super).
#[derive(Clone)]
pub struct Lifecycle(pub(super) ShardedArc<LifecycleState>);

impl Lifecycle {
    /// Creates a lifecycle in the phase [`Starting`](LifecyclePhase::Starting), and installs its signal handlers.
    ///
    /// From this call on, the first `SIGTERM` or `SIGINT` (on Windows Ctrl-C or the close of the console) begins the
    /// [drain](Self::drain), also while the process is still starting, and no longer terminates the process. Each
    /// further signal has the effect of [`skip_delay`](Self::skip_delay). A start that takes long should therefore also
    /// wait for [`stopping`](Self::stopping).
    ///
    /// Adds a critical check with the name `lifecycle` to `health`. The check passes while the process is ready.
    ///
    /// The lifecycle runs as a task on the current runtime, and changes to [`Stopped`](LifecyclePhase::Stopped) if that
    /// runtime ends.
    ///
    /// tokio never restores the default action of a signal. If the last handle, layer and token of this lifecycle are
    /// dropped before the process ends, these signals have no effect any more.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no Tokio runtime, if the runtime has no timers or no IO, if the signal handlers
    /// cannot be installed, or if the registry already has a check named `lifecycle`.
    pub fn new(health: &Health) -> Result<Self, ConfigError> {
        Self::build(health, || {
            // tokio panics if the runtime has no IO.
            let installed = catch_unwind(Signals::install);
            installed.unwrap_or_else(|_| Err(io::Error::other("the runtime has no IO"))).map(Some)
        })
    }

    /// Creates a lifecycle without signal handlers. The application calls [`drain`](Self::drain).
    ///
    /// Otherwise as [`new`](Self::new).
    ///
    /// # Errors
    ///
    /// Returns an error if there is no Tokio runtime, if the runtime has no timers, or if the registry already has a
    /// check named `lifecycle`.
    pub fn without_signals(health: &Health) -> Result<Self, ConfigError> {
        Self::build(health, || Ok(None))
    }

    fn build(
        health: &Health,
        signals: impl FnOnce() -> io::Result<Option<Signals>>,
    ) -> Result<Self, ConfigError> {
        let runtime = Handle::try_current().map_err(|error| {
            ConfigError::new("lifecycle", error, "build it inside a Tokio runtime")
        })?;
        // tokio panics if the runtime has no timers.
        if catch_unwind(|| drop(sleep(Duration::ZERO))).is_err() {
            let remedy = "enable the runtime's timers";
            return Err(ConfigError::new("lifecycle", "a runtime without timers", remedy));
        }
        let reporter = health.reporter("lifecycle")?;
        let signals = signals().map_err(|error| {
            let remedy = "use `without_signals`, and call `drain` yourself";
            ConfigError::new("lifecycle.signals", error, remedy)
        })?;
        let state = ShardedArc::new(LifecycleState::new(reporter));
        let (weak, phase) = (Arc::downgrade(state.state()), state.steps());
        let guard = DriverGuard(weak.clone());
        let driver = runtime.spawn(async move {
            let _guard = guard;
            let drive = drive(weak.clone(), phase);
            match signals {
                None => drive.await,
                Some(signals) => {
                    // One task for both, so that one abort handle ends both.
                    tokio::join!(drive, signals.apply_to(weak));
                }
            }
        });
        state.set_driver(driver.abort_handle());
        state.notify_of(LifecyclePhase::Starting);
        Ok(Self(state))
    }

    /// Sets the time in *draining*: 5 s by default.
    ///
    /// In this time the process is not ready and continues to serve calls. The delay should be as long as routers and
    /// load balancers need to stop routing calls to this process. Without a router it can be zero.
    ///
    /// [`set_drain_delay`](Self::set_drain_delay) changes it while the process runs.
    #[must_use]
    pub fn drain_delay(self, delay: Duration) -> Self {
        self.0.times(|times| times.delay = delay);
        self
    }

    /// Sets the time from the start of *stopping* in which calls that arrive are still served: 1 s by default.
    ///
    /// A server announces the end of its connections when *stopping* begins. Calls that clients send before they
    /// receive this announcement arrive in the grace. After the grace the [layer](Self::layer) rejects calls, and
    /// `serve` closes connections that have been idle for the grace, with a minimum of 100 ms. A grace that is not
    /// shorter than the drain timeout ([`drain_timeout`](Self::drain_timeout)) ends with it.
    ///
    /// [`set_grace`](Self::set_grace) changes it while the process runs.
    #[must_use]
    pub fn grace(self, grace: Duration) -> Self {
        self.0.times(|times| times.grace = grace);
        self
    }

    /// Sets the drain timeout, the maximum time in *stopping*: 20 s by default. Calls that are still in flight when it
    /// expires are cut.
    ///
    /// The sum of this time and the [`drain_delay`](Self::drain_delay) should be less than the time after which the
    /// process is killed: Kubernetes' `terminationGracePeriodSeconds`, 30 s by default. The [`grace`](Self::grace) is a
    /// part of this time.
    ///
    /// [`set_drain_timeout`](Self::set_drain_timeout) changes it while the process runs.
    #[must_use]
    pub fn drain_timeout(self, timeout: Duration) -> Self {
        self.0.times(|times| times.timeout = timeout);
        self
    }

    /// Sets the [time in *draining*](Self::drain_delay). Has no effect after *draining* has begun.
    pub fn set_drain_delay(&self, delay: Duration) {
        self.0.times(|times| times.delay = delay);
        self.report_setting("drain_delay");
    }

    /// Sets the [grace](Self::grace). Has no effect after *stopping* has begun.
    pub fn set_grace(&self, grace: Duration) {
        self.0.times(|times| times.grace = grace);
        self.report_setting("grace");
    }

    /// Sets the [drain timeout](Self::drain_timeout). Has no effect after the [grace](Self::grace).
    pub fn set_drain_timeout(&self, timeout: Duration) {
        self.0.times(|times| times.timeout = timeout);
        self.report_setting("drain_timeout");
    }

    /// Emits the event of a setting that has changed.
    fn report_setting(&self, key: &'static str) {
        settings_changed!(lifecycle, true, LayerKind::Lifecycle.as_str(), "", key);
    }

    // ===== Changes of the phase =====

    /// Changes the phase from [`Starting`](LifecyclePhase::Starting) to [`Ready`](LifecyclePhase::Ready). Has no effect
    /// after the drain has begun.
    pub fn ready(&self) {
        self.0.advance_to(LifecycleStep::Ready);
    }

    /// Begins the drain, as the first signal does. Has no effect after the drain has begun.
    ///
    /// Repeated calls are therefore harmless: Kubernetes may run a `preStop` hook twice, and sends `SIGTERM` after it.
    pub fn drain(&self) {
        self.0.drain();
    }

    /// Ends the current phase of the drain, as each signal after the first does: *draining* changes to *stopping*, and
    /// *stopping* to *stopped*. Has no effect before the drain.
    pub fn skip_delay(&self) {
        self.0.skip_delay();
    }

    // ===== State =====

    /// Returns the current phase.
    #[must_use]
    pub fn phase(&self) -> LifecyclePhase {
        self.0.phase()
    }

    /// Returns the number of calls in flight. The [layer](Self::layer) counts each call until its response body ends.
    /// Each [guard](Drain::guard) counts as one call.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.0.in_flight()
    }

    /// Returns the number of calls that arrived after the [grace](Self::grace), and were rejected.
    #[must_use]
    pub fn rejected(&self) -> u64 {
        self.0.rejected()
    }

    /// Waits until the phase differs from the phase at the first poll, and returns the new phase. Cancel safe.
    pub async fn changed(&self) -> LifecyclePhase {
        self.0.changed().await
    }

    // ===== Parts of a server =====

    /// Returns a layer that counts calls, and rejects them after the [grace](Self::grace): see [`LifecycleLayer`].
    pub fn layer(&self) -> LifecycleLayer {
        LifecycleLayer::new(self.0.clone())
    }

    /// Returns a token for work that is not a call, such as a background task: see [`Drain`].
    #[must_use]
    pub fn token(&self) -> Drain {
        Drain::new(self.0.lease())
    }

    /// Returns a future that resolves when *stopping* begins: the shutdown signal for a server that has a graceful
    /// shutdown of its own.
    pub fn stopping(&self) -> impl Future<Output = ()> + Send + use<> {
        self.token().stopping()
    }

    /// Runs a server that has a graceful shutdown of its own, and bounds the time of that shutdown.
    ///
    /// The server must use [`stopping`](Self::stopping) as its shutdown signal, and its service must be wrapped in the
    /// [layer](Self::layer). The drain then takes place in this order:
    ///
    /// 1. The process becomes unready.
    /// 2. After the [delay](Self::drain_delay) the server announces the end to its clients (GOAWAY) and closes idle
    ///    connections.
    /// 3. Calls that arrive in the [grace](Self::grace) are served. Later calls are rejected.
    /// 4. The future resolves when the server has ended and all [guards](Drain::guard) are dropped, or when the drain
    ///    timeout ([`drain_timeout`](Self::drain_timeout)) expires.
    ///
    /// At the drain timeout the server is dropped. tonic and axum leave the tasks of their connections running. These
    /// tasks are cut when the runtime ends, so return from `main`.
    ///
    /// # Errors
    ///
    /// Returns the error of the server.
    pub async fn run<T, E>(
        &self,
        server: impl Future<Output = Result<T, E>>,
    ) -> Result<Drained, E> {
        let ended = async {
            server.await?;
            if self.phase() == LifecyclePhase::Stopping {
                self.0.wait_until_empty().await;
            }
            Ok(0)
        };
        let cut_calls = tokio::select! {
            biased;
            ended = ended => ended?,
            () = self.0.reached(LifecycleStep::Stopped) => self.in_flight(),
        };
        let drained = Drained { cut_calls, cut_connections: 0, rejected: self.rejected() };
        self.0.notify_of_drained(&drained);
        Ok(drained)
    }
}

impl fmt::Debug for Lifecycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lifecycle").field(&*self.0).finish()
    }
}
