use std::{future::Future, sync::Arc, time::Duration};

use http::StatusCode;
use tower_layer::Layer;

use super::{
    gate::{Gate, WhileDown},
    handle::HealthProbeHandle,
    over_grpc::Grpc,
    over_http::{Get, OverHttp, SendRequest},
    panic::PanicGuard,
    probe::{AnyAnswer, Ask, Judged, Probe, ProbeFailure, Run, StatusProbe},
    prober::Prober,
    registry::Health,
    reporter::Reporter,
    schedule::{checked_jitter, checked_thresholds},
};
use crate::{
    ConfigError,
    admission::{Plan, Reusable, admission_layer},
    call::{AsError, Http, PerResponse, Shared},
};

admission_layer! {
    /// Asks what it wraps, in the background, whether it is well, and refuses calls while it is not.
    ///
    /// One gate with one prober belongs to one layer and all its clones, however often the layer is
    /// applied: the service that it wraps first is the one that is probed. For two upstreams use two
    /// layers. See the [module](crate::health).
    layer HealthProbeLayer { probe: P }
    /// The service of a [`HealthProbeLayer`].
    service HealthProbe []
    policy Shared<Gate>
}

impl HealthProbeLayer<()> {
    /// Sends `GET` to this path, with an empty body; any 2xx passes, unless
    /// [`expect_status`](HealthProbeLayer::expect_status) says more.
    ///
    /// `hyper-util`'s client wants to be told where to: give it a full URI, `http://search:8080/healthz`.
    /// Anything else than a path that begins with `/` or an `http` or `https` URI is a [`ConfigError`].
    ///
    /// The body type `B` is the one that the wrapped service takes. Where that takes any, as axum's
    /// `Router` does, say it: `HealthProbeLayer::get::<Body>("/healthz")`.
    pub fn get<B>(uri: &str) -> HealthProbeLayer<Get<B>> {
        let (probe, fault) = Get::new(uri);
        HealthProbeLayer::with(probe, Http, fault)
    }

    /// Sends the HTTP request that this closure makes, anew for every probe; any 2xx passes, unless
    /// [`expect_status`](HealthProbeLayer::expect_status) says more.
    ///
    /// ```
    /// # type Body = http_body_util::Full<bytes::Bytes>;
    /// use buttress::HealthProbeLayer;
    /// use http::Request;
    ///
    /// let probe = HealthProbeLayer::request(|| {
    ///     let ask = Request::post("http://search:8080/ping").header("authorization", "Bearer …");
    ///     ask.body(Body::from("ping")).unwrap_or_default()
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

    /// Asks the gRPC health service, `grpc.health.v1.Health/Check`, whether `service` is serving; empty for the
    /// whole server. One that does not know this method is taken for healthy, as gRFC A17 has it.
    ///
    /// `origin` is `/` for tonic's `Channel`, which knows where to, and `http://search:50051` for `hyper-util`'s
    /// client, which has to speak HTTP/2. `body` makes the body that the wrapped service takes: `Full::new`, or, for
    /// tonic, `|bytes| tonic::body::Body::new(Full::new(bytes))`.
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

    /// Asks this closure, and not the wrapped service. For services that are not HTTP, go on with
    /// [`per_response`](HealthProbeLayer::per_response).
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
    pub fn check<F, Fut, E>(check: F) -> HealthProbeLayer<Run<F>>
    where
        F: Fn() -> Fut + Clone + Send + 'static,
        Fut: Future<Output = Result<(), E>> + Send,
        E: 'static,
    {
        HealthProbeLayer::with(Run(check), Http, None)
    }

    /// Sends what this closure makes, anew for every probe: for services of any types. Every answer that
    /// is no error passes, unless [`judge`](HealthProbeLayer::judge) says more.
    pub fn new<F, Req>(make: F) -> HealthProbeLayer<Ask<F>, PerResponse>
    where
        F: Fn() -> Req + Clone + Send + 'static,
    {
        HealthProbeLayer::with(Ask { make, judge: AnyAnswer }, PerResponse, None)
    }
}

impl<P, M> HealthProbeLayer<P, M> {
    fn with(probe: P, protocol: M, fault: Option<ConfigError>) -> Self {
        let policy = Shared::new(Gate::new());
        Self { plan: Plan { policy, protocol, reject: AsError, fault: fault.into() }, probe }
    }
}

impl<P: OverHttp, M, R> HealthProbeLayer<P, M, R> {
    /// Which statuses pass: 200 to 299 by default.
    pub fn expect_status(
        mut self,
        fits: impl Fn(StatusCode) -> bool + Send + Sync + 'static,
    ) -> Self {
        self.probe.expected().set_status(fits);
        self
    }

    /// What the body has to be like, beside the status. It is read to its end for that; one of more than 64 KiB has
    /// failed, and so has one that is not there in time.
    pub fn expect_body(mut self, fits: impl Fn(&[u8]) -> bool + Send + Sync + 'static) -> Self {
        self.probe.expected().set_body(fits);
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
    /// ([`exempt_paths`](crate::ConcurrencyLimitLayer::exempt_paths)).
    pub fn immediate_failure(self, on: bool) -> Self {
        self.plan.policy.with(|probing| probing.immediate_failure = on);
        self
    }
}

impl<F, M, R> HealthProbeLayer<Ask<F>, M, R> {
    /// Judges probes by a closure over exactly what the wrapped service gives: `true` passes.
    pub fn judge<J, Res, E>(self, judge: J) -> HealthProbeLayer<Ask<F, Judged<J>>, M, R>
    where
        J: for<'a> Fn(Result<&'a Res, &'a E>) -> bool + Clone + Send + 'static,
    {
        HealthProbeLayer {
            plan: self.plan,
            probe: Ask { make: self.probe.make, judge: Judged(judge) },
        }
    }
}

impl<P, M, R> HealthProbeLayer<P, M, R> {
    /// How long to wait from the end of one probe to the beginning of the next: 5 s by default, above
    /// zero. The first probe is sent at once.
    pub fn every(mut self, wait: Duration) -> Self {
        if let Some(wait) = self.plan.accept(ConfigError::above_zero("every", wait)) {
            self.plan.policy.with(|probing| probing.schedule.every = wait);
        }
        self
    }

    /// By how much of [`every`](Self::every) a wait may be longer, at random, so that many clients do
    /// not probe in step: 0.1 by default, from 0 to 1.
    pub fn jitter(mut self, ratio: f64) -> Self {
        if let Some(ratio) = self.plan.accept(checked_jitter(ratio)) {
            self.plan.policy.with(|probing| probing.schedule.jitter = ratio);
        }
        self
    }

    /// How long a probe may take, from readying the service to the response head: 1 s by default, above
    /// zero. One that takes longer has failed. What is left of the time goes to reading the body.
    pub fn timeout(mut self, longest: Duration) -> Self {
        if let Some(longest) = self.plan.accept(ConfigError::above_zero("timeout", longest)) {
            self.plan.policy.with(|probing| probing.schedule.timeout = longest);
        }
        self
    }

    /// Sets the number of successive probes that must pass before the upstream is up again (1 by default), and the
    /// number that must fail before it is down (3 by default), each 1 or more.
    ///
    /// The first success after the start takes the upstream up at once. A response with status 503 takes it down at
    /// once: see [`immediate_failure`](Self::immediate_failure).
    pub fn thresholds(mut self, rise: u32, fall: u32) -> Self {
        if let Some((rise, fall)) = self.plan.accept(checked_thresholds(rise, fall)) {
            self.plan.policy.with(|probing| {
                (probing.threshold.rise, probing.threshold.fall) = (rise, fall);
            });
        }
        self
    }

    /// Adds a check of this name to a registry: it passes while the probe says up, and is unknown until
    /// the first verdict. It goes when the last layer, service and handle of this gate are gone.
    ///
    /// The name, 1 to 64 of `A`–`Z`, `a`–`z`, `0`–`9`, `.`, `_` and `-`, is the layer's
    /// [`name`](Self::name) too, unless it has one. One that the registry has already is a
    /// [`ConfigError`].
    pub fn report_to(mut self, health: &Health, name: &str) -> Self {
        match self.plan.accept(health.reporter(name)) {
            Some(reporter) => self.report_by(reporter),
            None => self,
        }
    }

    /// [`report_to`](Self::report_to) for a check that has been added already: as
    /// `.report_by(health.reporter("search")?.degrading())`.
    pub fn report_by(self, reporter: Reporter) -> Self {
        self.plan.policy.name(reporter.name());
        self.plan.policy.report_to(reporter);
        self
    }

    /// Another [`every`](Self::every) from the first failed probe to the one that makes all well again: a
    /// short one finds out sooner, and spares nobody who is well. Above zero; the same by default.
    pub fn every_while_down(mut self, wait: Duration) -> Self {
        if let Some(wait) = self.plan.accept(ConfigError::above_zero("every_while_down", wait)) {
            self.plan.policy.with(|probing| probing.schedule.every_while_down = Some(wait));
        }
        self
    }

    /// Spares the probe while calls prove health: if since the last look some passed and none failed, that is as
    /// good as a probe that passed. By default each probe is sent.
    ///
    /// What is up stays so by calls alone; only a probe finds it down, and up again.
    pub fn passive(self) -> Self {
        self.plan.policy.listen();
        self
    }

    /// What becomes of calls while the gate is down: they are refused, by default.
    pub fn while_down(self, how: WhileDown) -> Self {
        self.plan.policy.set_while_down(how);
        self
    }

    /// Lets calls through, though this gate is down, when too much of the set that shares `guard` is. The first one
    /// given stays.
    pub fn panic_guard(self, guard: &PanicGuard) -> Self {
        self.plan.policy.join(guard);
        self
    }

    /// Tells how each probe ended, from the probing task: to drive something else by it.
    ///
    /// So a circuit breaker's half-open is tried by probes, and by no call of the users':
    ///
    /// ```
    /// use buttress::{
    ///     CircuitBreakerLayer, HealthProbeLayer, Outcome, breaker::State, health::ProbeFailure,
    /// };
    /// # type Body = http_body_util::Empty<bytes::Bytes>;
    ///
    /// let breaker = CircuitBreakerLayer::http().probes_from_outside();
    /// let circuit = breaker.handle();
    /// let probe = HealthProbeLayer::get::<Body>("http://search:8080/healthz").on_probe(move |result| {
    ///     let outcome = match result {
    ///         Ok(()) => Outcome::success(),
    ///         Err(ProbeFailure::Refused) => return,
    ///         Err(_) => Outcome::failure(),
    ///     };
    ///     // Closed, it goes by calls alone.
    ///     if circuit.state() == State::HalfOpen {
    ///         circuit.record(outcome);
    ///     }
    /// });
    /// # let _ = probe;
    /// ```
    pub fn on_probe(
        self,
        listener: impl Fn(Result<(), ProbeFailure>) + Send + Sync + 'static,
    ) -> Self {
        self.plan.policy.with(|probing| probing.listeners.push(Arc::new(listener)));
        self
    }

    /// A name for refusals and events. The first one given stays.
    pub fn name(self, name: &str) -> Self {
        self.plan.policy.name(name);
        self
    }

    /// Looks at the gate.
    #[must_use]
    pub fn handle(&self) -> HealthProbeHandle {
        HealthProbeHandle(self.plan.policy.clone())
    }
}

impl<P, M: Clone, R: Clone> HealthProbeLayer<P, M, R> {
    /// The gate around a service that is not the one that is probed.
    pub(crate) fn gate<S>(&self, inner: S) -> HealthProbe<S, M, R> {
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
                Prober { gate: gate.downgrade(), service: inner.clone(), probe: self.probe.clone() }
                    .starter()
            });
        }
        self.gate(inner)
    }
}
