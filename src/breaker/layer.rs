use std::{fmt::Write as _, hash::Hash, time::Duration};

use tower_layer::Layer;

use super::{
    handle::CircuitBreakerHandle,
    keyed::{KeyFns, KeyedCircuitBreakerLayer, PerOrigin, ShortName},
    policy::Breaker,
    state::Settings,
    trip::Trip,
    wait::OpenFor,
};
use crate::{
    ConfigError,
    admission::{Plan, admission_layer},
    call::{AsError, Http, Origin},
};

/// So many probes are no probes any more.
const MOST_PROBES_AND_ONE: u16 = 1001;

admission_layer! {
    /// Stops calling what keeps failing, and asks carefully when it is back.
    ///
    /// One circuit belongs to one layer and all its clones, however often the layer is applied. See the
    /// [module](crate::breaker).
    layer CircuitBreakerLayer {}
    /// The service of a [`CircuitBreakerLayer`].
    service CircuitBreaker []
    policy Breaker
}

impl CircuitBreakerLayer {
    /// Five failures in a row, open for 30 s, one probe; HTTP and gRPC.
    pub fn http() -> Self {
        Self::new(Trip::default())
    }

    /// Returns the breaker of [`http`](Self::http) for a gRPC client, the counterpart of
    /// [`RetryLayer::grpc`](crate::RetryLayer::grpc).
    ///
    /// It needs no settings of its own: [`Http`] recognises a gRPC call by its request and classifies it by
    /// `grpc-status` in the head or in the trailers, or else by the status to which the HTTP status maps.
    /// `UNAVAILABLE`, `INTERNAL`, `UNKNOWN`, `DATA_LOSS` and `DEADLINE_EXCEEDED` are failures, `RESOURCE_EXHAUSTED` is
    /// throttled, and statuses that the caller causes, such as `NOT_FOUND`, are successes. A stream is counted when it
    /// ends. With [`respond`](Self::respond) a rejection is an `UNAVAILABLE` with pushback.
    pub fn grpc() -> Self {
        Self::http()
    }

    /// Opens by this rule. HTTP and gRPC are recognised; for other types say what failed with
    /// [`classify`](Self::classify).
    pub fn new(trip: Trip) -> Self {
        let checked = trip.check();
        let trip = if checked.is_ok() { trip } else { Trip::default() };
        let policy = Breaker::new(trip, Settings::DEFAULT);
        Self { plan: Plan { policy, protocol: Http, reject: AsError, fault: checked.err().into() } }
    }
}

impl<M, R> CircuitBreakerLayer<M, R> {
    /// How long an open circuit refuses before it lets probes through: 30 s by default, above zero. A
    /// [`Duration`], or an [`OpenFor`] that grows with each trip or follows the server's hint.
    pub fn open_for(mut self, wait: impl Into<OpenFor>) -> Self {
        let wait = wait.into();
        if self.plan.accept(wait.check()).is_some() {
            self.plan.policy.configure(|settings| settings.open_for = wait);
        }
        self
    }

    /// How many probes go through a half-open circuit, at most at once and all in all: 1 by default, up
    /// to 1000. All must succeed to close it; the first that fails opens it again.
    pub fn half_open(self, probes: u16) -> Self {
        self.half_open_of(probes, probes)
    }

    /// The same with a verdict of `needed` successes of `probes`: it closes or opens as soon as that is
    /// certain either way.
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

    /// The longest that a probe may take: 30 s by default, above zero. One that has seen a good head by
    /// then counts as passed, any other as failed: a stream for hours cannot keep a circuit half-open.
    pub fn probe_lease(mut self, longest: Duration) -> Self {
        if let Some(longest) = self.plan.accept(ConfigError::above_zero("probe_lease", longest)) {
            self.plan.policy.configure(|settings| settings.lease = longest);
        }
        self
    }

    /// Sets the time after which a call that its caller ended, by a hang-up or by its deadline, counts as a failure.
    /// The time starts when the upstream has the complete request, and only a call without a response head counts. 1 s
    /// by default; must be above zero. `None` never counts such a call.
    ///
    /// Before this time such a call is neutral, so that callers with short deadlines do not open the circuit. After
    /// it, a hung upstream opens the circuit although every caller ends its call first. Raise the time for upstreams
    /// that usually take longer: the preset `slow` has 10 s, `llm` 60 s.
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

    /// Lets up to `callers` wait for the verdict of the probes, each for `longest` (above zero), instead
    /// of refusing them. By default nobody waits. Once it is closed, all of them go at once, if it does not
    /// [ramp](Self::ramp) up.
    pub fn wait_for_verdict(mut self, callers: u32, longest: Duration) -> Self {
        let checked = ConfigError::above_zero("wait_for_verdict.longest", longest);
        if let Some(longest) = self.plan.accept(checked) {
            self.plan.policy.let_wait(callers, longest);
        }
        self
    }

    /// No call of the users' is a probe: outcomes given to the handle's
    /// [`record`](CircuitBreakerHandle::record), a health probe's say, decide a half-open circuit.
    pub fn probes_from_outside(self) -> Self {
        self.plan.policy.configure(|settings| settings.outside_probes = true);
        self
    }

    /// Once closed again, lets a tenth of the calls through at first and more and more of them over this
    /// time, so that what is back is not thrown down again. Zero, the default: all at once.
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
    /// not general enough"): [`BoxError`](crate::BoxError#tasks-and-handlers) states the remedies.
    pub fn backpressure(self) -> Self {
        self.plan.policy.hold_back();
        self
    }

    /// Refuses nobody, and counts whom it would have refused: to try a configuration out.
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

    /// A name for refusals, events and snapshots. The first one given stays.
    pub fn name(self, name: &str) -> Self {
        self.plan.policy.name(name);
        self
    }

    /// Looks at the circuit and steers it.
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
