use std::{fmt, sync::Arc};

use tower_layer::Layer;

use super::{
    handle::{Now, StackSnapshot},
    meter::{Meter, Metered},
};
use crate::{
    ConcurrencyLimitLayer, ConfigError, TimeoutLayer,
    call::{Http, Respond, Shared},
    config::{ConfigErrors, ServerConfig},
    deadline::{PropagateLayer, Propagated},
    limit::ConcurrencyLimit,
    timeout::{AsIs, Timeout},
};

/// The recommended layers of a server, in their order, around its routes: outermost first counters, deadline,
/// concurrency limit, timeouts. All of them answer with responses: the error type is left alone.
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
/// With the feature `axum` (tonic: `tonic-health`) the time of an answer begins when its request is here; else with
/// the call, and long uploads need a longer `timeout_head`.
///
/// # Slow clients
///
/// The call of a client that stops sending or reading releases its permit. A request body below `timeout_min_body_rate`
/// (240 bytes per second after `timeout_body_grace`, 5 s) is ended. A response that its client does not read for
/// `limit_max_unread` (60 s, or a quarter more) releases its permit, and fails if the client reads on; under
/// `axum::serve` its connection remains. Both are off if the configuration is loaded with `streaming = true`, unless
/// they are set. Event streams and WebSockets that the client reads stay open in any case. The stack watches only bodies
/// of axum (feature `axum`) and of tonic (feature `tonic-health`) for the minimum rate.
///
/// gRPC requests over HTTP/2 are exempt from the minimum rate, because their streams may be silent, and any client can
/// send their content type. A server without a gRPC service should set `timeout_min_body_rate_for_grpc`; any other can
/// bound every call with `deadline_default`.
///
/// Health endpoints (`Health::endpoints`) belong outside of it. gRPC health calls need no permit where a
/// [health registry](crate::Health) of the process serves them. One stack belongs to one layer and all its clones.
#[must_use = "a layer does nothing until it wraps a service"]
#[derive(Clone)]
pub struct ServerStack {
    meter: Shared<Meter>,
    deadline: PropagateLayer,
    limit: ConcurrencyLimitLayer<Http, Respond>,
    timeout: TimeoutLayer<AsIs, Respond>,
    now: Arc<Now<ServerConfig>>,
}

/// What a [`ServerStack`] makes of a service.
pub type ServerStackService<S> =
    Metered<Propagated<ConcurrencyLimit<Timeout<S, AsIs, Respond>, Http, Respond>>, Respond>;

/// The stack that this configuration says: a layer for an axum router, or any other HTTP service.
///
/// # Errors
///
/// What [`check`](ServerConfig::check) finds.
pub fn server(config: &ServerConfig) -> Result<ServerStack, ConfigErrors> {
    config.check()?;
    let one = |error: ConfigError| ConfigErrors(vec![error]);
    let (deadline, mut limit, mut timeout) = (
        config.deadline.layer().map_err(one)?,
        config.limit.layer().map_err(one)?,
        config.timeout.layer().map_err(one)?.for_server(),
    );
    if !config.name.is_empty() {
        limit = limit.name(&config.name);
        timeout = timeout.name(&config.name);
    }
    Ok(ServerStack {
        meter: Meter::new(),
        // The limit keeps it, and the timeouts.
        deadline: deadline.propagate_only(),
        limit: limit.respond(),
        timeout: timeout.respond(),
        now: Arc::new(Now::new(config.clone())),
    })
}

impl ServerStack {
    /// Looks at the stack and changes its settings.
    #[must_use]
    pub fn handle(&self) -> ServerHandle {
        ServerHandle { stack: self.clone() }
    }
}

impl<S: Clone> Layer<S> for ServerStack {
    type Service = ServerStackService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        let limited = self.limit.layer(self.timeout.layer(inner));
        Metered::new(self.deadline.layer(limited), &self.meter, Respond)
    }
}

impl fmt::Debug for ServerStack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerStack").field("limit", &self.limit).finish_non_exhaustive()
    }
}

/// Looks at a server stack.
#[derive(Clone, Debug)]
pub struct ServerHandle {
    stack: ServerStack,
}

impl ServerHandle {
    /// All there is to know at this moment.
    #[must_use]
    pub fn snapshot(&self) -> StackSnapshot {
        let stack = &self.stack;
        let timeouts = stack.timeout.handle().snapshot().timed_out();
        StackSnapshot::of(stack.meter.counted(), stack.limit.handle().snapshot(), timeouts)
    }

    /// The configuration as it is in force.
    #[must_use]
    pub fn config(&self) -> ServerConfig {
        self.stack.now.config()
    }

    /// Puts another configuration in force, for the calls that begin from now on, as far as the stack need not be
    /// built anew for it. Gives back the keys that it would have to be built anew for: those stay as they are.
    ///
    /// No lock is held while the layers change, so wakers and event subscribers may use this handle. If another thread
    /// is in an update, that thread applies this one after its own, possibly after this method has returned.
    ///
    /// # Errors
    ///
    /// What [`check`](ServerConfig::check) finds: then nothing is changed.
    pub fn update(&self, config: &ServerConfig) -> Result<Vec<&'static str>, ConfigErrors> {
        config.check()?;
        let next = |now: &ServerConfig| {
            let fixed = now.changes(config).into_iter().filter(|change| !change.live);
            let fixed: Vec<_> = fixed.map(|change| change.key).collect();
            let mut next = config.clone();
            next.keep(now, &fixed);
            (next, fixed)
        };
        self.stack.now.update(next, |config| self.apply(config))
    }

    /// Changes the layers as far as that is possible while they run.
    fn apply(&self, next: &ServerConfig) -> Result<(), ConfigErrors> {
        let one = |error: ConfigError| ConfigErrors(vec![error]);
        let stack = &self.stack;
        next.deadline.update(&stack.deadline.handle()).map_err(one)?;
        stack.timeout.handle().set(next.timeout.timeouts()).map_err(one)?;
        stack.limit.handle().set_limit(next.limit.most()).map_err(one)?;
        drop(next.limit.apply(stack.limit.clone()));
        Ok(())
    }
}
