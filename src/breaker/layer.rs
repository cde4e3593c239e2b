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

/// The lower bound of the numbers of half-open probes that are too large: the maximum is 1000.
const MOST_PROBES_AND_ONE: u16 = 1001;

admission_layer! {
    /// Rejects calls while the upstream keeps failing, and probes it before it admits calls again.
    ///
    /// All clones of a layer and all services that they make share one circuit. See the [module](super).
    layer CircuitBreakerLayer {}
    /// The service of a [`CircuitBreakerLayer`].
    service CircuitBreaker []
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
    pub fn open_for(mut self, wait: impl Into<OpenDuration>) -> Self {
        let wait = wait.into();
        if self.plan.accept(wait.check()).is_some() {
            self.plan.policy.configure(|settings| settings.open_for = wait);
        }
        self
    }

    /// Sets the number of half-open probes, which is also the maximum at the same time. 1 by default; must be 1 to
    /// 1000.
    ///
    /// The circuit closes if all of them succeed, and opens again at the first failure.
    pub fn half_open(self, probes: u16) -> Self {
        self.half_open_of(probes, probes)
    }

    /// Sets the number of half-open probes, and how many of them must succeed. `needed` must be 1 to `probes`.
    ///
    /// The circuit closes or opens as soon as the result is certain.
    pub fn half_open_of(mut self, needed: u16, probes: u16) -> Self {
        let checked = match (needed, probes) {
            (_, 0 | MOST_PROBES_AND_ONE..) => {
                Err(ConfigError::new("half_open", probes, "use 1 to 1000 probes"))
            }
            (1.., _) if needed <= probes => Ok(()),
            _ => {
                let remedy = format!("use 1 to {probes} successes of {probes} probes");
                Err(ConfigError::new("half_open_of.needed", needed, remedy))
            }
        };
        if self.plan.accept(checked).is_some() {
            self.plan.policy.configure(|settings| {
                (settings.needed, settings.probes) = (needed, probes);
            });
        }
        self
    }

    /// Sets the timeout of a half-open probe. 30 s by default; must be above zero.
    ///
    /// At its end a probe with a good response head has passed, and one that still waits for the upstream has failed.
    /// So a response that streams for hours cannot keep a circuit half-open. The [module](super#half-open)
    /// states when the timeout starts, and what happens to a probe that waits for something else.
    pub fn probe_timeout(mut self, longest: Duration) -> Self {
        if let Some(longest) = self.plan.accept(ConfigError::above_zero("probe_timeout", longest)) {
            self.plan.policy.configure(|settings| settings.lease = longest);
        }
        self
    }

    /// Sets the time after which a call that its caller ended, by a hang-up or by its deadline, counts as a failure.
    /// The time starts when the upstream has the complete request, and only a call without a response head counts. 1 s
    /// by default; must be above zero. `None` never counts such a call.
    ///
    /// Before this time such a call is neutral, so that callers with short deadlines do not open the circuit. After it,
    /// a hung upstream opens the circuit although every caller ends its call first. Raise the time for upstreams that
    /// usually take longer: the preset `slow` has 10 s, `llm` 60 s.
    pub fn count_cancelled_after(mut self, time: impl Into<Option<Duration>>) -> Self {
        let checked = time
            .into()
            .map(|time| ConfigError::above_zero("count_cancelled_after", time))
            .transpose();
        if let Some(time) = self.plan.accept(checked) {
            self.plan.policy.configure(|settings| settings.count_cancelled_after = time);
        }
        self
    }

    /// Lets callers wait for the verdict of the half-open probes, instead of rejecting them. By default no caller
    /// waits.
    ///
    /// `callers` is the maximum number of waiting callers, and `longest` the maximum duration of each wait (above
    /// zero). When the circuit closes, all of them are admitted at once, unless it [ramps](Self::ramp) up. A caller
    /// that leaves (its future is dropped) frees its position.
    pub fn half_open_queue(mut self, callers: u32, longest: Duration) -> Self {
        let checked = ConfigError::above_zero("wait_for_verdict.longest", longest);
        if let Some(longest) = self.plan.accept(checked) {
            self.plan.policy.let_wait(callers, longest);
        }
        self
    }

    /// Admits no call as a half-open probe. The outcomes that are passed to the handle's
    /// [`record`](CircuitBreakerHandle::record), for example by a health probe, decide instead.
    pub fn external_probes(self) -> Self {
        self.plan.policy.configure(|settings| settings.outside_probes = true);
        self
    }

    /// Sets the duration of a ramp after closing. Zero by default: all calls are admitted at once.
    ///
    /// A ramp admits a tenth of the calls at first, and a share that grows to all of them over this time. It protects
    /// an upstream that has just recovered. The other calls are rejected.
    pub fn ramp(self, over: Duration) -> Self {
        self.plan.policy.configure(|settings| settings.ramp = over);
        self
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
        self.plan.policy.hold_back();
        self
    }

    /// Enables shadow mode: the layer rejects no calls, and counts those that it would reject. Use it to try out a
    /// configuration.
    pub fn shadow(self) -> Self {
        self.plan.policy.set_shadow(true);
        self
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

    /// Sets the name that rejections, events and snapshots contain. The first name stays. An empty name has no effect.
    pub fn name(self, name: &str) -> Self {
        self.plan.policy.name(name);
        self
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
        CircuitBreaker { admission: self.plan.service(inner) }
    }
}
