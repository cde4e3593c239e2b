use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use http::Request;
use tower_layer::Layer;
use tower_service::Service;

use super::{
    handle::{CurrentConfig, StackSnapshot, notify_of_update},
    meter::{Meter, MeterLayer},
    service::{StackFuture, stack_service},
};
use crate::{
    classify::Http,
    config::{ConfigErrors, ServerConfig},
    deadline::{PropagateDeadline, PropagateDeadlineLayer},
    error::ConfigError,
    limit::{ConcurrencyLimit, ConcurrencyLimitLayer},
    respond::Respond,
    timeout::{AsIs, Timeout, TimeoutLayer},
};

/// The recommended layers of a server, for its routes. Outermost first: counters, deadline, concurrency limit,
/// timeouts. All of them reject calls with responses, so the error type of the routes stays the same.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use axum::{Router, routing::get};
/// use buttress::config::ServerConfig;
///
/// let stack = buttress::server(&ServerConfig::from_env("search")?)?;
/// let handle = stack.handle();
/// let app: Router = Router::new().route("/", get(|| async { "hello" })).layer(stack);
/// println!("{:?}", handle.snapshot());
/// # Ok(()) }
/// ```
///
/// With the feature `axum` (for tonic `tonic`), the timeout of the response head begins when the request has
/// been received. Without it, the timeout begins with the call, and long uploads need a longer `timeout_head`.
///
/// # Slow clients
///
/// The call of a client that stops sending or reading releases its permit. A request body below `timeout_min_body_rate`
/// (240 bytes per second after `timeout_body_grace`, 5 s) is ended. A response that its client does not read for
/// `limit_max_unread` (60 s, or a quarter more) releases its permit. If the client reads on, the response fails; under
/// `axum::serve` its connection remains. Both limits are off if the configuration is loaded with `streaming = true`,
/// unless they are set. Event streams and WebSockets that the client reads stay open in any case. The minimum rate
/// applies only to bodies of axum (feature `axum`) and of tonic (feature `tonic`).
///
/// gRPC requests over HTTP/2 are exempt from the minimum rate, because their streams may pause, and any client can
/// send their content type. A server without a gRPC service should set `timeout_min_body_rate_for_grpc`; any other can
/// bound every call with `deadline_default`.
///
/// Put health endpoints (`Health::endpoints`) outside of the stack. gRPC health calls need no permit if a
/// [health registry](crate::health::Health) of the process serves them. The clones of a stack share its state.
#[must_use = "a layer does nothing until it wraps a service"]
#[derive(Clone)]
pub struct ServerStack {
    pub(super) meter: Arc<MeterLayer>,
    pub(super) deadline: PropagateDeadlineLayer,
    pub(super) limit: ConcurrencyLimitLayer<Http, Respond>,
    pub(super) timeout: TimeoutLayer<AsIs, Respond>,
    pub(super) now: Arc<CurrentConfig<ServerConfig>>,
}

type ServerLayers<S> = Meter<
    PropagateDeadline<ConcurrencyLimit<Timeout<S, AsIs, Respond>, Http, Respond>>,
    Http,
    Respond,
>;

stack_service! {
    /// The service of a [`ServerStack`].
    ServerStackService of ServerLayers, inner |layers| layers.get_ref().get_ref().get_ref().get_ref()
}

/// Returns the stack of this configuration, a layer for an axum router or any other HTTP service.
///
/// # Errors
///
/// Returns the errors of [`check`](ServerConfig::check).
pub fn server(config: &ServerConfig) -> Result<ServerStack, ConfigErrors> {
    config.check()?;
    let one = |error: ConfigError| ConfigErrors(vec![error]);
    let (deadline, mut limit, mut timeout) = (
        config.deadline.layer().map_err(one)?,
        config.limit.layer().map_err(one)?,
        TimeoutLayer::server(),
    );
    timeout.handle().set(config.timeout.timeouts()).map_err(one)?;
    if !config.name.is_empty() {
        limit = limit.name(&config.name);
        timeout = timeout.name(&config.name);
    }
    Ok(ServerStack {
        meter: MeterLayer::new(),
        // The limit and the timeout layer enforce the deadline.
        deadline: deadline.propagate_only(),
        limit: limit.respond(),
        timeout: timeout.respond(),
        now: Arc::new(CurrentConfig::new(config.clone())),
    })
}

impl ServerStack {
    /// Returns the handle of the stack, which reads its state and changes its settings.
    #[must_use]
    pub fn handle(&self) -> ServerHandle {
        ServerHandle { stack: self.clone() }
    }
}

impl<S: Clone> Layer<S> for ServerStack {
    type Service = ServerStackService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        let limited = self.limit.layer(self.timeout.layer(inner));
        let layers = Meter::new(self.deadline.layer(limited), &self.meter, Respond);
        ServerStackService { layers }
    }
}

impl fmt::Debug for ServerStack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerStack").field("limit", &self.limit).finish_non_exhaustive()
    }
}

/// Reads the state of a server stack, and changes its settings while it is in use.
#[derive(Clone, Debug)]
pub struct ServerHandle {
    pub(super) stack: ServerStack,
}

impl ServerHandle {
    /// Returns a snapshot of the stack.
    #[must_use]
    pub fn snapshot(&self) -> StackSnapshot {
        let stack = &self.stack;
        let timeouts = stack.timeout.handle().snapshot().timed_out();
        StackSnapshot::of(stack.meter.counts(), stack.limit.handle().snapshot(), timeouts)
    }

    /// Returns the configuration in force.
    #[must_use]
    pub fn config(&self) -> ServerConfig {
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
    /// Returns the errors of [`check`](ServerConfig::check), and then changes nothing.
    pub fn update(&self, config: &ServerConfig) -> Result<Vec<&'static str>, ConfigErrors> {
        config.check()?;
        let next = |now: &ServerConfig| {
            let fixed = now.changes(config).into_iter().filter(|change| !change.live);
            let fixed: Vec<_> = fixed.map(|change| change.key).collect();
            let mut next = config.clone();
            next.copy_from(now, &fixed);
            let keys = now.changes(&next);
            (next, (fixed, keys))
        };
        let (fixed, keys) = self.stack.now.update(next, |config| self.apply(config))?;
        notify_of_update(&self.stack.meter.reports, &config.name, &keys, &fixed);
        Ok(fixed)
    }

    /// Changes the layers as far as that is possible while they run.
    fn apply(&self, next: &ServerConfig) -> Result<(), ConfigErrors> {
        let one = |error: ConfigError| ConfigErrors(vec![error]);
        let stack = &self.stack;
        next.deadline.update(&stack.deadline.handle()).map_err(one)?;
        stack.timeout.handle().set(next.timeout.timeouts()).map_err(one)?;
        next.limit.update(&stack.limit.handle()).map_err(one)
    }
}
