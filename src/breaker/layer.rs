use std::{fmt::Write as _, hash::Hash, time::Duration};

use tower_layer::Layer;

use super::{
    handle::CircuitBreakerHandle,
    keyed::{KeyFns, KeyedCircuitBreakerLayer, PerOrigin, ShortName},
    open_duration::OpenDuration,
    policy::Breaker,
    state::CircuitSettings,
    trip::Trip,
};
use crate::{
    admission::{Plan, admission_layer},
    classify::Http,
    error::ConfigError,
    origin::Origin,
    respond::AsError,
};

admission_layer! {
    /// Rejects calls while the upstream keeps failing, and probes it before it admits calls again.
    ///
    /// All clones of a layer and all services that they make share one circuit. A setter after the layer has built a
    /// service returns a layer with a circuit of its own; use the [handle](Self::handle) to change a running layer. See
    /// the [module](super).
    layer CircuitBreakerLayer {}
    /// The service of a [`CircuitBreakerLayer`].
    service CircuitBreaker []
    future CircuitBreakerFuture
    policy Breaker
}

impl CircuitBreakerLayer {
    /// Returns a breaker for HTTP and gRPC: 5 failures in a row open it for 30 s, and one half-open probe decides.
    pub fn http() -> Self {
        Self::new(Trip::default())
    }

    /// Returns the breaker of [`http`](Self::http) for a gRPC client, the counterpart of
    /// [`RetryLayer::grpc`](crate::retry::RetryLayer::grpc).
    ///
    /// It needs no settings of its own: [`Http`] recognises a gRPC call by its request and classifies it by
    /// `grpc-status` in the head or in the trailers, or else by the status to which the HTTP status maps.
    /// `UNAVAILABLE`, `INTERNAL`, `UNKNOWN`, `DATA_LOSS` and `DEADLINE_EXCEEDED` are failures, `RESOURCE_EXHAUSTED` is
    /// throttled, and statuses that the caller causes, such as `NOT_FOUND`, are successes. A stream is counted when it
    /// ends. With [`respond`](Self::respond) a rejection is an `UNAVAILABLE` with pushback.
    pub fn grpc() -> Self {
        Self::http()
    }

    /// Returns a breaker that opens by this rule. HTTP and gRPC responses are classified. For services of other types
    /// set a classification with [`classify`](Self::classify).
    pub fn new(trip: Trip) -> Self {
        let checked = trip.check();
        let trip = if checked.is_ok() { trip } else { Trip::default() };
        let policy = Breaker::new(trip, CircuitSettings::DEFAULT);
        Self { plan: Plan { policy, protocol: Http, reject: AsError, fault: checked.err().into() } }
    }
}

impl<M, R> CircuitBreakerLayer<M, R> {
    /// Sets for how long an open circuit rejects calls before it admits probes. 30 s by default; must be above zero.
    ///
    /// Takes a [`Duration`], or an [`OpenDuration`] that grows with each trip or follows the hint of the upstream.
    ///
    /// At run time: [`set_open_for`](CircuitBreakerHandle::set_open_for).
    pub fn open_for(self, open_for: impl Into<OpenDuration>) -> Self {
        self.set(|handle| handle.set_open_for(open_for))
    }

    /// Sets the number of half-open probes, which is also the maximum at the same time. 1 by default; must be 1 to
    /// 1000.
    ///
    /// The circuit closes if all of them succeed, and opens again at the first failure.
    ///
    /// At run time: [`set_half_open_of`](CircuitBreakerHandle::set_half_open_of).
    pub fn half_open(self, probes: u16) -> Self {
        self.half_open_of(probes, probes)
    }

    /// Sets the number of half-open probes, and how many of them must succeed. `needed` must be 1 to `probes`.
    ///
    /// The circuit closes or opens as soon as the result is certain.
    ///
    /// At run time: [`set_half_open_of`](CircuitBreakerHandle::set_half_open_of).
    pub fn half_open_of(self, needed: u16, probes: u16) -> Self {
        self.set(|handle| handle.set_half_open_of(needed, probes))
    }

    /// Sets the timeout of a half-open probe. 30 s by default; must be above zero.
    ///
    /// At its end a probe with a good response head has passed, and one that still waits for the upstream has failed.
    /// So a response that streams for hours cannot keep a circuit half-open. The [module](super#half-open)
    /// states when the timeout starts, and what happens to a probe that waits for something else.
    ///
    /// At run time: [`set_probe_timeout`](CircuitBreakerHandle::set_probe_timeout).
    pub fn probe_timeout(self, timeout: Duration) -> Self {
        self.set(|handle| handle.set_probe_timeout(timeout))
    }

    /// Sets the time after which a call that its caller ended, by a hang-up or by its deadline, counts as a failure.
    /// The time starts when the upstream has the complete request, and only a call without a response head counts. 1 s
    /// by default; must be above zero. `None` never counts such a call.
    ///
    /// Before this time such a call is neutral, so that callers with short deadlines do not open the circuit. After it,
    /// a hung upstream opens the circuit although every caller ends its call first. Raise the time for upstreams that
    /// usually take longer: the preset `slow` has 10 s, `llm` 60 s.
    ///
    /// At run time: [`set_count_cancelled_after`](CircuitBreakerHandle::set_count_cancelled_after).
    pub fn count_cancelled_after(self, time: impl Into<Option<Duration>>) -> Self {
        self.set(|handle| handle.set_count_cancelled_after(time))
    }

    /// Lets callers wait for the verdict of the half-open probes, instead of rejecting them. By default no caller
    /// waits.
    ///
    /// `callers` is the maximum number of waiting callers, and `max_wait` the maximum duration of each wait (above
    /// zero). When the circuit closes, all of them are admitted at once, unless it [ramps](Self::ramp) up. A caller
    /// that leaves (its future is dropped) frees its position.
    ///
    /// At run time: [`set_half_open_queue`](CircuitBreakerHandle::set_half_open_queue).
    pub fn half_open_queue(self, callers: u32, max_wait: Duration) -> Self {
        self.set(|handle| handle.set_half_open_queue(callers, max_wait))
    }

    /// Admits no call as a half-open probe. The outcomes that are passed to the handle's
    /// [`record`](CircuitBreakerHandle::record), for example by a health probe, decide instead.
    ///
    /// At run time: [`set_external_probes`](CircuitBreakerHandle::set_external_probes).
    pub fn external_probes(self) -> Self {
        self.set(|handle| {
            handle.set_external_probes(true);
            Ok(())
        })
    }

    /// Sets the duration of a ramp after closing. Zero by default: all calls are admitted at once.
    ///
    /// A ramp admits a tenth of the calls at first, and a share that grows to all of them over this time. It protects
    /// an upstream that has just recovered. The other calls are rejected.
    ///
    /// At run time: [`set_ramp`](CircuitBreakerHandle::set_ramp).
    pub fn ramp(self, duration: Duration) -> Self {
        self.set(|handle| {
            handle.set_ramp(duration);
            Ok(())
        })
    }

    /// Makes the service not ready while the circuit would reject a call, so that a balancer (`tower::balance::p2c`)
    /// uses another endpoint.
    ///
    /// Use it only under a balancer: any other caller would wait until the circuit admits calls. On a
    /// [`ramp`](Self::ramp) the service is ready for a growing share of the time, in a hundred steps, and rejects no
    /// calls. Backpressure together with keys is a fault, because the circuit of a call is known only with its request.
    ///
    /// rustc rejects the type of such a balancer in `tokio::spawn` and in an axum handler ("implementation of `From` is
    /// not general enough"): [`BoxError`](crate::error::BoxError#tasks-and-handlers) states the remedies.
    pub fn backpressure(self) -> Self {
        self.set(|handle| {
            handle.0.set_backpressure();
            Ok(())
        })
    }

    /// Enables shadow mode: the layer rejects no calls, and counts those that it would reject. Use it to try out a
    /// configuration.
    ///
    /// At run time: [`set_shadow`](CircuitBreakerHandle::set_shadow).
    pub fn shadow(self) -> Self {
        self.set(|handle| {
            handle.set_shadow(true);
            Ok(())
        })
    }

    /// Returns a layer with a circuit for each key that this closure returns, with the rules and settings made so far.
    ///
    /// All circuits have the name of this layer. The circuit of this layer, which [`handle`](Self::handle) returns, is
    /// not one of them.
    pub fn keyed<F, Req, Id>(self, key: F) -> KeyedCircuitBreakerLayer<F, Id, M, R>
    where
        F: Fn(&Req) -> Id + Clone + Send + Sync + 'static,
        Id: Clone + Eq + Hash + Send + Sync + 'static,
    {
        let fns = KeyFns { to_stored: Id::clone, write_name: |_, _| Ok(()) };
        KeyedCircuitBreakerLayer::new(key, self.plan, fns)
    }

    /// Returns a layer with a circuit for each scheme, host and port of the requests' URIs.
    ///
    /// The name of a circuit is its origin, shortened to 256 bytes.
    pub fn per_origin(self) -> KeyedCircuitBreakerLayer<PerOrigin, Origin, M, R> {
        let write_name = |origin: &Origin, name: &mut ShortName| write!(name, "{origin}");
        let fns = KeyFns { to_stored: Origin::detached, write_name };
        KeyedCircuitBreakerLayer::new(PerOrigin, self.plan, fns)
    }

    /// Sets the name that rejections, events and snapshots contain. The first name stays, and a layer
    /// that gets a circuit of its own can get a name again. An empty name has no effect.
    pub fn name(mut self, name: &str) -> Self {
        self.fork_if_in_use();
        self.plan.policy.name(name);
        self
    }

    /// Changes a setting. A layer that has built a service gets a circuit of its own first.
    fn set(mut self, set: impl FnOnce(&CircuitBreakerHandle) -> Result<(), ConfigError>) -> Self {
        self.fork_if_in_use();
        let checked = set(&self.handle());
        self.plan.accept(checked);
        self
    }

    /// Gives a layer that has built a service a circuit of its own.
    fn fork_if_in_use(&mut self) {
        if self.plan.policy.is_in_use() {
            self.plan.policy = self.plan.policy.fork();
        }
    }

    /// Returns the handle of the circuit, which reads and controls it.
    #[must_use]
    pub fn handle(&self) -> CircuitBreakerHandle {
        CircuitBreakerHandle(self.plan.policy.circuit().clone())
    }
}

impl<S, M: Clone, R: Clone> Layer<S> for CircuitBreakerLayer<M, R> {
    type Service = CircuitBreaker<S, M, R>;

    fn layer(&self, inner: S) -> Self::Service {
        self.plan.policy.set_in_use();
        CircuitBreaker { admission: self.plan.service(inner) }
    }
}

impl Default for CircuitBreakerLayer {
    /// Returns the breaker of [`http`](CircuitBreakerLayer::http).
    fn default() -> Self {
        Self::http()
    }
}
