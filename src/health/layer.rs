use std::time::Duration;

use tower_layer::Layer;

use super::{
    gate::Gate,
    handle::HealthProbeHandle,
    probe::{AnyAnswer, Ask, Get, Judged, Probe, SendRequest},
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
    /// Sends `GET` to this path, with an empty body; any 2xx passes.
    ///
    /// `hyper-util`'s client wants to be told where to: give it a full URI, `http://search:8080/healthz`.
    /// Anything else than a path that begins with `/` or an `http` or `https` URI is a [`ConfigError`].
    ///
    /// The body type `B` is the one that the wrapped service takes. Where that takes any, as axum's
    /// `Router` does, say it: `HealthProbeLayer::get::<Body>("/healthz")`.
    pub fn get<B>(uri: &str) -> HealthProbeLayer<Get<B>> {
        let (probe, fault) = Get::new(uri);
        HealthProbeLayer {
            plan: Plan { policy: Shared::new(Gate::new()), protocol: Http, reject: AsError, fault },
            probe,
        }
    }

    /// Sends the HTTP request that this closure makes, anew for every probe; any 2xx passes.
    pub fn request<F, B>(make: F) -> HealthProbeLayer<SendRequest<F>>
    where
        F: Fn() -> http::Request<B> + Clone + Send + 'static,
    {
        HealthProbeLayer {
            plan: Plan {
                policy: Shared::new(Gate::new()),
                protocol: Http,
                reject: AsError,
                fault: None,
            },
            probe: SendRequest(make),
        }
    }

    /// Sends what this closure makes, anew for every probe: for services of any types. Every answer that
    /// is no error passes, unless [`judge`](HealthProbeLayer::judge) says more.
    pub fn new<F, Req>(make: F) -> HealthProbeLayer<Ask<F>, PerResponse>
    where
        F: Fn() -> Req + Clone + Send + 'static,
    {
        HealthProbeLayer {
            plan: Plan {
                policy: Shared::new(Gate::new()),
                protocol: PerResponse,
                reject: AsError,
                fault: None,
            },
            probe: Ask { make, judge: AnyAnswer },
        }
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

    /// How many probes in a row must pass before what is down is up again (1 by default), and how many
    /// must fail before it is down (3 by default), each 1 or more. The very first success is enough.
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
        HealthProbe { admission: self.plan.service(inner) }
    }
}
