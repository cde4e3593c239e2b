use std::{fmt, future::Future, io, panic::catch_unwind, time::Duration};

use tokio::{runtime::Handle, time::sleep};

use super::{
    layer::LifecycleLayer,
    signals::Signals,
    state::{Driven, Phase, State, Step, drive},
    token::Drain,
};
use crate::{ConfigError, Health, call::Striped};

/// A process from its start to its end: what it says of itself, and how it leaves without losing a request.
///
/// Clones are the same lifecycle. See the [module](crate::lifecycle).
#[derive(Clone)]
pub struct Lifecycle(pub(super) Striped<State>);

/// How a drain ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Drained {
    /// Calls that were still in flight after the longest time, and were cut.
    pub cut_calls: usize,
    /// Connections of `serve` that were still open after the longest time, and were cut.
    pub cut_connections: usize,
    /// Calls that arrived after the grace, and were rejected.
    pub refused: u64,
}

impl Lifecycle {
    /// Starting, and armed: from here on `SIGTERM` and `SIGINT` (Ctrl-C, on Windows also a closed console) drain
    /// the process, also while it is still starting, and no longer end it by themselves: a start that takes long
    /// should ask for [`stopping`](Self::stopping), too. Each further signal is in a [hurry](Self::hurry).
    ///
    /// `health` gets a critical check of the name `lifecycle`, which passes while the process is ready.
    ///
    /// It lives in the runtime that it is made in, and has [stopped](Phase::Stopped) when that ends.
    ///
    /// tokio keeps hold of a signal that it was once told to listen to: should the last handle, layer and token of
    /// this lifecycle go before the process does, nothing listens any more.
    ///
    /// # Errors
    ///
    /// No Tokio runtime, or one without timers or without IO; signals that cannot be listened to; or a registry that
    /// has a check of this name.
    pub fn new(health: &Health) -> Result<Self, ConfigError> {
        Self::build(health, || {
            // That a runtime has no IO is told by a panic.
            let armed = catch_unwind(Signals::arm);
            armed.unwrap_or_else(|_| Err(io::Error::other("the runtime has no IO"))).map(Some)
        })
    }

    /// The same without signals: [`drain`](Self::drain) is called by whoever hears of the end.
    ///
    /// # Errors
    ///
    /// No Tokio runtime, or one without timers; or a registry that has a check named `lifecycle`.
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
        // This too is told by a panic.
        if catch_unwind(|| drop(sleep(Duration::ZERO))).is_err() {
            let remedy = "enable the runtime's timers";
            return Err(ConfigError::new("lifecycle", "a runtime without timers", remedy));
        }
        let reporter = health.reporter("lifecycle")?;
        let signals = signals().map_err(|error| {
            let remedy = "use `without_signals`, and call `drain` yourself";
            ConfigError::new("lifecycle.signals", error, remedy)
        })?;
        let state = Striped::new(State::new(reporter));
        let (weak, phase) = (state.state().downgrade(), state.seen());
        let driven = Driven(weak.clone());
        let driver = runtime.spawn(async move {
            let _driven = driven;
            let drive = drive(weak.clone(), phase);
            match signals {
                None => drive.await,
                Some(signals) => {
                    // Both are asked in one task: one thing to end.
                    tokio::join!(drive, signals.pass_on(weak));
                }
            }
        });
        state.driven_by(driver.abort_handle());
        Ok(Self(state))
    }

    /// Sets the time in *draining*: 5 s by default.
    ///
    /// In this time the process is not ready, and traffic goes on. It should be as long as routers and load balancers
    /// need to notice, and zero where there is none.
    #[must_use]
    pub fn delay(self, delay: Duration) -> Self {
        self.0.times(|times| times.delay = delay);
        self
    }

    /// Sets the time after the begin of *stopping* in which calls that arrive are still served: 1 s by default.
    ///
    /// A server announces the end of a connection when *stopping* begins; until the clients have noticed, their calls
    /// arrive. After the grace the [layer](Self::layer) rejects calls, and `serve` closes connections that have been
    /// idle for the grace, at least for 100 ms. A grace that is not shorter than [`longest`](Self::longest) ends with
    /// it.
    #[must_use]
    pub fn grace(self, grace: Duration) -> Self {
        self.0.times(|times| times.grace = grace);
        self
    }

    /// Sets the maximum time in *stopping*: 20 s by default. Calls that are still in flight then are cut.
    ///
    /// The sum of this time and the [`delay`](Self::delay) should be less than the time after which the process is
    /// killed: Kubernetes' `terminationGracePeriodSeconds`, 30 s by default. The [`grace`](Self::grace) is a part of
    /// this time.
    #[must_use]
    pub fn longest(self, longest: Duration) -> Self {
        self.0.times(|times| times.longest = longest);
        self
    }

    // ===== Going on =====

    /// The start is over. Without effect once the drain has begun.
    pub fn ready(&self) {
        self.0.go_to(Step::Ready);
    }

    /// Begins to drain, as a first signal does. Without effect once the drain has begun: what calls a `preStop` hook may
    /// call it twice, and sends a `SIGTERM` after it.
    pub fn drain(&self) {
        self.0.drain();
    }

    /// Ends the wait that is on, as each further signal does: first the delay, then the time for the rest. Without
    /// effect before the drain.
    pub fn hurry(&self) {
        self.0.hurry();
    }

    // ===== Looking =====

    /// Where the process is.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.0.phase()
    }

    /// Calls under way, each to the end of its body, as the [layer](Self::layer) counts them.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.0.in_flight()
    }

    /// Returns the number of calls that arrived after the [grace](Self::grace), and were rejected.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.0.refused()
    }

    /// Waits until the phase is another than now, and tells it. Dropping the future is harmless.
    pub async fn changed(&self) -> Phase {
        self.0.changed().await
    }

    // ===== The pieces =====

    /// Returns a layer that counts calls, and rejects them after the [grace](Self::grace): see [`LifecycleLayer`].
    pub fn layer(&self) -> LifecycleLayer {
        LifecycleLayer::new(self.0.clone())
    }

    /// A token that tells work other than calls when to end.
    #[must_use]
    pub fn token(&self) -> Drain {
        Drain::new(self.0.lease())
    }

    /// Returns a future that resolves when *stopping* begins: the signal for a server's own graceful shutdown.
    pub fn stopping(&self) -> impl Future<Output = ()> + Send + use<> {
        self.token().stopping()
    }

    /// Runs a server with a graceful shutdown of its own. The server receives [`stopping`](Self::stopping) as its
    /// signal, and the [layer](Self::layer) around its service.
    ///
    /// The order is: the process becomes unready; after the delay the server announces the end to its clients (GOAWAY)
    /// and closes idle connections; calls that arrive in the [grace](Self::grace) are served, later ones are rejected;
    /// the future resolves when the server has ended and the work of all [guards](Drain::guard) is done, after the
    /// [longest](Self::longest) time at the latest.
    ///
    /// Then the server is dropped. tonic and axum leave the tasks of their connections running; these are cut when the
    /// runtime ends, so return from `main`.
    ///
    /// # Errors
    ///
    /// The server's.
    pub async fn run<T, E>(
        &self,
        server: impl Future<Output = Result<T, E>>,
    ) -> Result<Drained, E> {
        let ended = async {
            server.await?;
            if self.phase() == Phase::Stopping {
                self.0.emptied().await;
            }
            Ok(0)
        };
        let cut_calls = tokio::select! {
            biased;
            ended = ended => ended?,
            () = self.0.reached(Phase::Stopped) => self.in_flight(),
        };
        Ok(Drained { cut_calls, cut_connections: 0, refused: self.refused() })
    }
}

impl fmt::Debug for Lifecycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lifecycle").field(&*self.0).finish()
    }
}
