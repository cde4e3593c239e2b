use std::{future::Future, sync::Arc, time::Duration};

use http::StatusCode;
use tower_layer::Layer;

use super::{
    fail_open::FailOpen,
    gate::Gate,
    handle::HealthProbeHandle,
    probe::{
        AnyResponse, CallProbe, ClassifiedProbe, FnProbe, Get, Grpc, HttpProbe, Probe,
        ProbeFailure, Prober, SendRequest, StatusProbe,
    },
    registry::Health,
    reporter::Reporter,
};
use crate::{
    admission::{Plan, Reusable, admission_layer},
    classify::{Http, PerResponse},
    error::ConfigError,
    respond::AsError,
};

admission_layer! {
    /// Probes the health of the wrapped service in the background, and rejects calls while the service is down.
    ///
    /// A layer and its clones share one gate and one prober, even if the layer is applied several times. The prober
    /// probes the service that the layer wraps first. Two upstreams need two layers. See the [module](super).
    ///
    /// A setter after the layer has built a service returns a layer with a gate of its own, which reports to no check
    /// of a registry until [`report_to`](Self::report_to). Use the [handle](Self::handle) to change a running layer.
    layer HealthProbeLayer { probe: P }
    /// The service of a [`HealthProbeLayer`].
    service HealthProbe []
    future HealthProbeFuture
    policy Arc<Gate>
}

impl HealthProbeLayer<()> {
    /// Returns a layer whose probes send `GET` to this URI with an empty body. A 2xx status passes, unless
    /// [`expect_status`](HealthProbeLayer::expect_status) sets another rule.
    ///
    /// The URI is a path that begins with `/`, or a full `http` or `https` URI. Other values are a [`ConfigError`].
    /// `hyper-util`'s client needs a full URI: `http://search:8080/healthz`.
    ///
    /// `B` is the type of the request body of the wrapped service. A service that accepts any body, such as axum's
    /// `Router`, needs it stated: `HealthProbeLayer::get::<Body>("/healthz")`.
    pub fn get<B>(uri: &str) -> HealthProbeLayer<Get<B>> {
        let (probe, fault) = Get::new(uri);
        HealthProbeLayer::with(probe, Http, fault)
    }

    /// Returns a layer whose probes send the HTTP request that this closure makes. The closure runs for every probe. A
    /// 2xx status passes, unless [`expect_status`](HealthProbeLayer::expect_status) sets another rule.
    ///
    /// ```
    /// # type Body = http_body_util::Full<bytes::Bytes>;
    /// use buttress::HealthProbeLayer;
    /// use http::Request;
    ///
    /// let probe = HealthProbeLayer::request(|| {
    ///     let ping = Request::post("http://search:8080/ping").header("authorization", "Bearer …");
    ///     ping.body(Body::from("ping")).unwrap_or_default()
    /// })
    /// .expect_status(|status| status.is_success() || status == 401)
    /// .expect_body(|body| body.starts_with(b"pong"));
    /// # let _ = probe;
    /// ```
    pub fn request<F, B>(make: F) -> HealthProbeLayer<SendRequest<F>>
    where
        F: Fn() -> http::Request<B> + Clone + Send + 'static,
    {
        HealthProbeLayer::with(SendRequest::new(make), Http, None)
    }

    /// Returns a layer whose probes call the gRPC health service: `grpc.health.v1.Health/Check` for `service`. An empty
    /// `service` stands for the whole server. An upstream that responds `UNIMPLEMENTED` is healthy (gRFC A17).
    ///
    /// `origin` is `/` for tonic's `Channel`, which has an address already, and `http://search:50051` for
    /// `hyper-util`'s client, which must use HTTP/2. `body` makes the request body of the wrapped service: `Full::new`,
    /// or for tonic `|bytes| tonic::body::Body::new(Full::new(bytes))`.
    ///
    /// ```
    /// use buttress::HealthProbeLayer;
    /// use http_body_util::Full;
    /// use tonic::body::Body;
    /// use tower::Layer;
    /// # tokio_test::block_on(async {
    ///
    /// let channel = tonic::transport::Channel::from_static("http://search:50051").connect_lazy();
    /// let probe = HealthProbeLayer::grpc("/", "search.Search", |bytes| Body::new(Full::new(bytes)));
    /// let channel = probe.layer(channel);
    /// # let _ = channel; });
    /// ```
    pub fn grpc<F, B>(origin: &str, service: &str, body: F) -> HealthProbeLayer<Grpc<F>>
    where
        F: Fn(bytes::Bytes) -> B + Clone + Send + 'static,
    {
        let (probe, fault) = Grpc::new(origin, service, body);
        HealthProbeLayer::with(probe, Http, fault)
    }

    /// Returns a layer whose probes run this closure and do not call the wrapped service. A service that is not HTTP
    /// also needs [`per_response`](HealthProbeLayer::per_response).
    ///
    /// ```
    /// use buttress::HealthProbeLayer;
    /// use tokio::net::TcpStream;
    ///
    /// let probe = HealthProbeLayer::check(|| async {
    ///     TcpStream::connect("search:5432").await.map(drop)
    /// })
    /// .per_response();
    /// # let _ = probe;
    /// ```
    pub fn check<F, Fut, E>(check: F) -> HealthProbeLayer<FnProbe<F>>
    where
        F: Fn() -> Fut + Clone + Send + 'static,
        Fut: Future<Output = Result<(), E>> + Send,
        E: 'static,
    {
        HealthProbeLayer::with(FnProbe(check), Http, None)
    }

    /// Returns a layer for services of any types. Its probes send the request that this closure makes for every probe.
    /// Every response passes and every error fails, unless [`classify_probe`](HealthProbeLayer::classify_probe) sets
    /// another rule.
    pub fn new<F, Req>(make: F) -> HealthProbeLayer<CallProbe<F>, PerResponse>
    where
        F: Fn() -> Req + Clone + Send + 'static,
    {
        HealthProbeLayer::with(CallProbe { make, classify: AnyResponse }, PerResponse, None)
    }
}

impl<P, M> HealthProbeLayer<P, M> {
    fn with(probe: P, protocol: M, fault: Option<ConfigError>) -> Self {
        let policy = Arc::new(Gate::new());
        Self { plan: Plan { policy, protocol, reject: AsError, fault: fault.into() }, probe }
    }
}

impl<P: HttpProbe, M, R> HealthProbeLayer<P, M, R> {
    /// Sets the HTTP statuses that pass: 200 to 299 by default.
    pub fn expect_status(
        mut self,
        passes: impl Fn(StatusCode) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.probe.expected().set_status(passes);
        self
    }

    /// Sets a rule for the response body, in addition to the status. By default the body does not matter.
    ///
    /// The closure receives the whole body. A probe fails if the body has more than 64 KiB, or does not end within the
    /// [`timeout`](Self::timeout).
    pub fn expect_body(mut self, passes: impl Fn(&[u8]) -> bool + Send + Sync + 'static) -> Self {
        self.probe.expected().set_body(passes);
        self
    }
}

impl<P: StatusProbe, M, R> HealthProbeLayer<P, M, R> {
    /// Sets whether a response with status 503, or gRPC's `NOT_SERVING`, takes the upstream down at once. On by
    /// default.
    ///
    /// By such a response the upstream declares itself unavailable, so further probes would only delay the result.
    /// Other failures, such as timeouts, connection errors and other statuses, count towards the
    /// [threshold](Self::thresholds). With `false`, all failures do. A status that
    /// [`expect_status`](Self::expect_status) accepts is a success. Envoy's health checks have the same rule.
    ///
    /// A server that is at its limit must not reject the probe with a 503: exempt the path of the probe from the limit
    /// ([`exempt_paths`](crate::limit::ConcurrencyLimitLayer::exempt_paths)).
    ///
    /// [`set_immediate_failure`](HealthProbeHandle::set_immediate_failure) changes it on a running layer.
    pub fn immediate_failure(self, on: bool) -> Self {
        self.with_gate(|gate| gate.set_immediate_failure(on))
    }
}

impl<F, M, R> HealthProbeLayer<CallProbe<F>, M, R> {
    /// Classifies the results of probes by a closure. It receives the response or the error of the wrapped service, and
    /// returns `true` if the probe passes.
    pub fn classify_probe<C, Res, E>(
        self,
        classify: C,
    ) -> HealthProbeLayer<CallProbe<F, ClassifiedProbe<C>>, M, R>
    where
        C: for<'a> Fn(Result<&'a Res, &'a E>) -> bool + Clone + Send + 'static,
    {
        HealthProbeLayer {
            plan: self.plan,
            probe: CallProbe { make: self.probe.make, classify: ClassifiedProbe(classify) },
        }
    }
}

impl<P, M, R> HealthProbeLayer<P, M, R> {
    /// Sets the delay from the end of one probe to the start of the next: 5 s by default, above zero. The first probe
    /// is sent at once.
    ///
    /// [`set_every`](HealthProbeHandle::set_every) changes it on a running layer.
    pub fn every(self, delay: Duration) -> Self {
        self.set(|gate| gate.set_every(delay))
    }

    /// Sets the maximum random extension of a delay, as a share of [`every`](Self::every): 0.1 by default, from 0 to 1.
    /// It prevents many clients from probing at the same time.
    ///
    /// [`set_jitter`](HealthProbeHandle::set_jitter) changes it on a running layer.
    pub fn jitter(self, ratio: f64) -> Self {
        self.set(|gate| gate.set_jitter(ratio))
    }

    /// Sets the timeout of a probe: 1 s by default, above zero.
    ///
    /// A probe fails if the service is not ready, or the response head does not arrive, within this time. The body is
    /// read in the rest of it.
    ///
    /// [`set_timeout`](HealthProbeHandle::set_timeout) changes it on a running layer.
    pub fn timeout(self, timeout: Duration) -> Self {
        self.set(|gate| gate.set_timeout(timeout))
    }

    /// Sets the number of successive probes that must pass before the upstream is up again (1 by default), and the
    /// number that must fail before it is down (3 by default), each 1 or more.
    ///
    /// The first success after the start takes the upstream up at once. A response with status 503 takes it down at
    /// once: see [`immediate_failure`](Self::immediate_failure).
    ///
    /// [`set_thresholds`](HealthProbeHandle::set_thresholds) changes them on a running layer.
    pub fn thresholds(self, rise: u32, fall: u32) -> Self {
        self.set(|gate| gate.set_thresholds(rise, fall))
    }

    /// Adds a check with this name to a registry. The check has the state of the gate: it passes while the gate is up.
    /// It is removed when the last layer, service and handle of this gate are dropped.
    ///
    /// The name consists of 1 to 64 of the characters `A`–`Z`, `a`–`z`, `0`–`9`, `.`, `_` and `-`. A name that the
    /// registry already has is a [`ConfigError`]. It also becomes the [`name`](Self::name) of the layer, unless the
    /// layer has one.
    pub fn report_to(mut self, health: &Health, name: &str) -> Self {
        match self.plan.accept(health.reporter(name)) {
            Some(reporter) => self.report_by(reporter),
            None => self,
        }
    }

    /// Reports the state of the gate by this reporter, as [`report_to`](Self::report_to) does by a new one. For example
    /// with a degrading check: `.report_by(health.reporter("search")?.degrading())`.
    pub fn report_by(self, reporter: Reporter) -> Self {
        self.with_gate(|gate| gate.report_to(reporter))
    }

    /// Sets another [`every`](Self::every) from the first failed probe until the gate is up and a probe has passed:
    /// equal to `every` by default, above zero.
    ///
    /// A short time detects an outage and its end sooner, without more probes of a healthy upstream.
    ///
    /// [`set_every_while_down`](HealthProbeHandle::set_every_while_down) changes it on a running layer.
    pub fn every_while_down(self, delay: Duration) -> Self {
        self.set(|gate| gate.set_every_while_down(delay))
    }

    /// Skips a probe if calls have proved health since the previous one: at least one succeeded and none failed. This
    /// counts as a probe that passed. By default every probe is sent.
    ///
    /// Only a gate that is up skips probes. Only probes take it down, and up again.
    ///
    /// [`set_passive`](HealthProbeHandle::set_passive) changes it on a running layer.
    pub fn passive(self) -> Self {
        self.with_gate(|gate| gate.set_passive(true))
    }

    /// Makes the service not ready while the gate is down, instead of rejecting calls. A load balancer then selects
    /// another endpoint. A call that is made nevertheless is rejected.
    pub fn backpressure(self) -> Self {
        self.with_gate(Gate::set_backpressure)
    }

    /// Enables shadow mode: the layer rejects no calls, and
    /// [`shadowed`](super::handle::HealthProbeSnapshot::shadowed) counts those that it would reject. The gate still
    /// affects its check in a registry.
    ///
    /// [`set_shadow`](HealthProbeHandle::set_shadow) changes it on a running layer.
    pub fn shadow(self) -> Self {
        self.with_gate(|gate| gate.set_shadow(true))
    }

    /// Adds the gate to a set when the layer builds a service: while too many gates of the set are down, this gate admits
    /// calls although it is down. A gate remains in its first set.
    pub fn fail_open(self, set: &FailOpen) -> Self {
        self.with_gate(|gate| gate.set_fail_open(set))
    }

    /// Adds a listener that receives the result of each probe. It runs in the task of the prober. Its panics are
    /// caught.
    ///
    /// For example, health probes replace the half-open probes of a circuit breaker, so that no call of a user is one:
    ///
    /// ```
    /// use buttress::{breaker::CircuitState, health::ProbeFailure, CircuitBreakerLayer, HealthProbeLayer, Outcome};
    /// # type Body = http_body_util::Empty<bytes::Bytes>;
    ///
    /// let breaker = CircuitBreakerLayer::http().external_probes();
    /// let circuit = breaker.handle();
    /// let probe = HealthProbeLayer::get::<Body>("http://search:8080/healthz").on_probe(move |result| {
    ///     let outcome = match result {
    ///         Ok(()) => Outcome::success(),
    ///         Err(ProbeFailure::Rejected) => return,
    ///         Err(_) => Outcome::failure(),
    ///     };
    ///     // A closed circuit is decided by calls only.
    ///     if circuit.state() == CircuitState::HalfOpen {
    ///         circuit.record(outcome);
    ///     }
    /// });
    /// # let _ = probe;
    /// ```
    pub fn on_probe(
        self,
        listener: impl Fn(Result<(), ProbeFailure>) + Send + Sync + 'static,
    ) -> Self {
        self.with_gate(|gate| gate.add_listener(listener))
    }

    /// Sets the name in rejections and events. The first name stays.
    pub fn name(self, name: &str) -> Self {
        self.with_gate(|gate| gate.set_name(name))
    }

    /// Applies a setter to the gate, or to a fork of it if the layer has built a service.
    fn set(mut self, set: impl FnOnce(&Gate) -> Result<(), ConfigError>) -> Self {
        if self.plan.policy.is_in_use() {
            self.plan.policy = Arc::new(self.plan.policy.fork());
        }
        let result = set(&self.plan.policy);
        self.plan.accept(result);
        self
    }

    /// [`set`](Self::set) for a setter without invalid values.
    fn with_gate(self, set: impl FnOnce(&Gate)) -> Self {
        self.set(|gate| {
            set(gate);
            Ok(())
        })
    }

    /// Returns a handle to the gate.
    #[must_use]
    pub fn handle(&self) -> HealthProbeHandle {
        HealthProbeHandle(self.plan.policy.clone())
    }
}

impl<P, M: Clone, R: Clone> HealthProbeLayer<P, M, R> {
    /// Wraps a service with this gate. The prober does not probe this service.
    pub(crate) fn gate<S>(&self, inner: S) -> HealthProbe<S, M, R> {
        self.plan.policy.set_in_use();
        HealthProbe { admission: self.plan.service(inner) }
    }
}

impl<S, P, M: Clone, R: Clone> Layer<S> for HealthProbeLayer<P, M, R>
where
    P: Probe<S>,
    S: Reusable + Send + 'static,
{
    type Service = HealthProbe<S, M, R>;

    fn layer(&self, inner: S) -> Self::Service {
        if self.plan.fault.is_none() {
            let gate = &self.plan.policy;
            gate.arm(|| {
                Prober {
                    gate: Arc::downgrade(gate),
                    service: inner.clone(),
                    probe: self.probe.clone(),
                }
                .starter()
            });
        }
        self.gate(inner)
    }
}
