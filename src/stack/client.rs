use std::{
    fmt,
    future::Future,
    sync::Arc,
    task::{Context, Poll},
};

use http::{HeaderMap, Request, Response};
use tower_layer::Layer;
use tower_service::Service;

use super::{
    handle::{CurrentConfig, HealthCheck, StackSnapshot, notify_of_update},
    meter::{Meter, MeterLayer},
    service::{StackFuture, stack_service},
};
use crate::{
    attempt::{AttemptHeaders, AttemptHeadersLayer},
    breaker::{CircuitBreaker, CircuitBreakerLayer},
    config::{ClientConfig, ConfigErrors},
    deadline::{PropagateDeadline, PropagateDeadlineLayer},
    error::ConfigError,
    health::HealthProbeHandle,
    hedge::{Hedge, HedgeLayer},
    limit::{ConcurrencyLimit, ConcurrencyLimitLayer},
    respond::AsError,
    retry::{Retry, RetryLayer},
    timeout::{Timeout, TimeoutLayer},
};

/// The recommended layers of a client, for any HTTP client. Outermost first: counters, deadline, retry, hedge, circuit
/// breaker, concurrency limit, a second deadline layer that writes the time left for the next hop, timeouts.
///
/// `buttress::client` puts the stack around a client with its own connections, and `buttress::grpc` puts it around a
/// tonic channel. The clones of a stack share its state.
#[must_use = "a layer does nothing until it wraps a service"]
#[derive(Clone)]
pub struct ClientStack {
    pub(super) meter: Arc<MeterLayer>,
    pub(super) deadline: PropagateDeadlineLayer,
    pub(super) retry: RetryLayer,
    pub(super) hedge: HedgeLayer,
    pub(super) breaker: CircuitBreakerLayer,
    pub(super) limit: ConcurrencyLimitLayer,
    forward: PropagateDeadlineLayer,
    pub(super) timeout: TimeoutLayer,
    headers: AttemptHeadersLayer,
    pub(super) now: Arc<CurrentConfig<ClientConfig>>,
    /// Only set in the stack that [`client`](super::client) makes.
    #[cfg(feature = "connect")]
    pub(super) connections: Option<crate::connect::ConnectHandle>,
    /// Only set in the stack that [`client`](super::client) makes, and if `health_probe_uri` is set.
    pub(super) probe: Option<HealthProbeHandle>,
}

type ClientLayers<S> = Meter<
    PropagateDeadline<
        Retry<
            Hedge<CircuitBreaker<ConcurrencyLimit<PropagateDeadline<Timeout<AttemptHeaders<S>>>>>>,
        >,
    >,
>;

stack_service! {
    /// The service of a [`ClientStack`].
    ClientStackService of ClientLayers, inner |layers| {
        let timed = layers.get_ref().get_ref().get_ref().get_ref().get_ref().get_ref().get_ref();
        timed.get_ref().get_ref()
    }
}

impl ClientStack {
    /// Returns the stack of this configuration.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`check`](ClientConfig::check).
    pub fn new(config: &ClientConfig) -> Result<Self, ConfigErrors> {
        Self::over(config, RetryLayer::http())
    }

    /// Returns the stack of this configuration, with the rules of `retry`.
    pub(super) fn over(config: &ClientConfig, retry: RetryLayer) -> Result<Self, ConfigErrors> {
        config.check()?;
        let one = |error: ConfigError| ConfigErrors(vec![error]);
        let deadline = config.deadline.layer().map_err(one)?;
        let forward = config.deadline.forward().checked().map_err(one)?;
        let mut stack = Self {
            meter: MeterLayer::new(),
            // The retry and the timeout layer enforce the deadline.
            deadline: deadline.propagate_only(),
            retry: config.retry.layer_over(retry).map_err(one)?,
            hedge: config.hedge.layer().map_err(one)?,
            breaker: config.breaker.layer().map_err(one)?,
            limit: config.limit.layer().map_err(one)?,
            forward: forward.propagate_only(),
            timeout: config.timeout.layer().map_err(one)?,
            headers: AttemptHeadersLayer::default(),
            now: Arc::new(CurrentConfig::new(config.clone())),
            #[cfg(feature = "connect")]
            connections: None,
            probe: None,
        };
        if !config.name.is_empty() {
            stack.retry = stack.retry.name(&config.name);
            stack.hedge = stack.hedge.name(&config.name);
            stack.breaker = stack.breaker.name(&config.name);
            stack.limit = stack.limit.name(&config.name);
            stack.timeout = stack.timeout.name(&config.name);
        }
        Ok(stack)
    }

    /// Sets a closure that writes `traceparent` or any other header to each attempt, as
    /// [`AttemptHeadersLayer`] does. By default there is no closure.
    pub fn attempt_headers(
        mut self,
        write: impl Fn(u32, &mut HeaderMap) + Send + Sync + 'static,
    ) -> Self {
        self.headers = AttemptHeadersLayer::new(write);
        self
    }

    /// Returns the handle of the stack, which reads its state and changes its settings.
    #[must_use]
    pub fn handle(&self) -> ClientHandle {
        ClientHandle { stack: self.clone() }
    }
}

impl<S: Clone> Layer<S> for ClientStack {
    type Service = ClientStackService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        let attempt = self.forward.layer(self.timeout.layer(self.headers.layer(inner)));
        let guarded = self.breaker.layer(self.limit.layer(attempt));
        let retried = self.retry.layer(self.hedge.layer(guarded));
        let layers = Meter::new(self.deadline.layer(retried), &self.meter, AsError);
        ClientStackService { layers }
    }
}

impl fmt::Debug for ClientStack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.now.config().name;
        f.debug_struct("ClientStack").field("name", &name).finish_non_exhaustive()
    }
}

/// Reads the state of a client stack, and changes its settings while it is in use.
#[derive(Clone, Debug)]
pub struct ClientHandle {
    pub(super) stack: ClientStack,
}

impl ClientHandle {
    /// Returns a snapshot of the stack.
    #[must_use]
    pub fn snapshot(&self) -> StackSnapshot {
        let stack = &self.stack;
        let timeouts = stack.timeout.handle().snapshot().timed_out();
        let limit = stack.limit.handle().snapshot();
        let breaker = stack.breaker.handle().snapshot();
        StackSnapshot {
            connections: self.open_connections(),
            retries: stack.retry.handle().snapshot().retries,
            hedges: stack.hedge.handle().snapshot().sent,
            last_check: stack.now.last_check(),
            ..StackSnapshot::of(stack.meter.counts(), limit, timeouts)
                .with_breaker(&breaker)
                .with_probe(self.probe().map(|probe| probe.state()))
        }
    }

    #[cfg(feature = "connect")]
    fn open_connections(&self) -> usize {
        self.connections().map_or(0, |connections| connections.snapshot().open)
    }

    #[cfg(not(feature = "connect"))]
    fn open_connections(&self) -> usize {
        0
    }

    /// Returns the handle of the connections, which reads all their numbers, changes their settings and recycles them.
    /// `None` unless [`client`](super::client) made the stack.
    #[cfg(feature = "connect")]
    #[cfg_attr(docsrs, doc(cfg(feature = "connect")))]
    #[must_use]
    pub fn connections(&self) -> Option<crate::connect::ConnectHandle> {
        self.stack.connections.clone()
    }

    /// Returns the handle of the health probe. `None` unless `buttress::client` made the stack and `health_probe_uri`
    /// is set.
    #[must_use]
    pub fn probe(&self) -> Option<HealthProbeHandle> {
        self.stack.probe.clone()
    }

    /// Returns the handle of the circuit breaker, for example to hold the circuit open or to wait for its next change.
    #[must_use]
    pub fn breaker(&self) -> crate::breaker::CircuitBreakerHandle {
        self.stack.breaker.handle()
    }

    /// Returns the configuration in force.
    #[must_use]
    pub fn config(&self) -> ClientConfig {
        self.stack.now.config()
    }

    /// Applies another configuration to the calls that begin from now on. Returns the keys of the changed settings that
    /// need a new stack. Those settings keep their values.
    ///
    /// No lock is held while the layers change, so wakers and event subscribers may use this handle. If another thread
    /// is in an update, that thread applies this one after its own, possibly after this method has returned. If that
    /// thread fails, this configuration may not be applied, although this method returns `Ok`.
    ///
    /// # Errors
    ///
    /// Returns the errors of [`check`](ClientConfig::check), and then changes nothing.
    pub fn update(&self, config: &ClientConfig) -> Result<Vec<&'static str>, ConfigErrors> {
        config.check()?;
        let next = |now: &ClientConfig| {
            let mut next = config.clone();
            // The thresholds of a circuit's rules can change, but the rules themselves cannot.
            let fits = config.breaker.is_like(&now.breaker);
            let stays = |key: &str| {
                let of_rules = ["breaker_failures", "breaker_failure_ratio", "breaker_min_calls"];
                !fits && of_rules.contains(&key)
            };
            let fixed: Vec<_> = now
                .changes(config)
                .iter()
                .filter(|change| !change.live || stays(change.key))
                .map(|change| change.key)
                .collect();
            next.copy_from(now, &fixed);
            let keys = now.changes(&next);
            (next, (fixed, keys))
        };
        let (fixed, keys) = self.stack.now.update(next, |config| self.apply(config))?;
        notify_of_update(&self.stack.meter.reports, &config.name, &keys, &fixed);
        Ok(fixed)
    }

    /// Changes the layers as far as that is possible while they run.
    fn apply(&self, next: &ClientConfig) -> Result<(), ConfigErrors> {
        let stack = &self.stack;
        let one = |error: ConfigError| ConfigErrors(vec![error]);
        next.deadline.update(&stack.deadline.handle()).map_err(one)?;
        stack.timeout.handle().set(next.timeout.timeouts()).map_err(one)?;
        next.limit.update(&stack.limit.handle()).map_err(one)?;
        next.retry.apply(&stack.retry.handle()).map_err(one)?;
        next.breaker.update(&stack.breaker.handle()).map_err(one)?;
        #[cfg(feature = "connect")]
        if let Some(connections) = &stack.connections {
            next.connect.update(connections).map_err(one)?;
        }
        Ok(())
    }

    /// Checks the health of the service by a request of the application, sent through this stack or not. A 2xx is
    /// healthy. The [snapshot](Self::snapshot) also contains the result.
    ///
    /// # Cancellation
    ///
    /// Dropping the future drops the request. No result is recorded.
    pub async fn check_health<B, E>(
        &self,
        probe: impl Future<Output = Result<Response<B>, E>>,
    ) -> HealthCheck {
        self.stack.now.check(probe, || self.snapshot()).await
    }
}
