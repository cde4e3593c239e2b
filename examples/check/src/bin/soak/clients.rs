//! A client with all layers, and the handles of the layers.

use std::{net::SocketAddr, time::Duration};

use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, ConnectLayer, DeadlineLayer, Health,
    HealthProbeLayer, HedgeLayer, RetryLayer, TimeoutLayer, Timeouts, Trip,
    breaker::{CircuitBreakerHandle, CircuitState},
    connect::{Client, ConnectHandle},
    deadline::DeadlineHandle,
    health::{HealthProbeHandle, ProbeState},
    limit::ConcurrencyLimitHandle,
    retry::{Backoff, RetryHandle},
    timeout::TimeoutHandle,
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use tower::{Service, ServiceBuilder};

use crate::verdict::Verdict;

/// The initial limit of calls in flight.
pub const LIMIT: usize = 16;
/// The initial maximum number of connections, which is less than the limit of calls.
pub const CAP: usize = 12;
const QUEUE: (usize, Duration) = (32, Duration::from_millis(50));

pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// The service type of a client.
pub trait Calls:
    Service<Request<Body>, Response = Response<Self::Answer>, Error = BoxError, Future: Send>
    + Clone
    + Send
    + Sync
    + 'static
{
    type Answer: http_body::Body<Data: Send, Error: Into<BoxError>> + Send;
}

impl<S, B> Calls for S
where
    S: Service<Request<Body>, Response = Response<B>, Error = BoxError>,
    S: Clone + Send + Sync + 'static,
    S::Future: Send,
    B: http_body::Body<Data: Send, Error: Into<BoxError>> + Send,
{
    type Answer = B;
}

#[derive(Clone)]
pub struct Guards {
    pub retry: RetryHandle,
    pub breaker: CircuitBreakerHandle,
    pub limit: ConcurrencyLimitHandle,
    pub probe: HealthProbeHandle,
    pub deadline: DeadlineHandle,
    pub timeout: TimeoutHandle,
    pub connections: ConnectHandle,
}

pub fn client(addr: SocketAddr, http2: bool) -> Result<(impl Calls, Guards), BoxError> {
    let ms = Duration::from_millis;
    let deadline = DeadlineLayer::new().default_of(ms(400));
    let retry = RetryLayer::http().backoff(Backoff::exponential(ms(2)).max(ms(20)));
    let hedge = HedgeLayer::http(ms(20));
    let breaker = CircuitBreakerLayer::new(Trip::failure_ratio(0.6).within(ms(500)).min_calls(20))
        .open_for(ms(50))
        .half_open(2);
    let limit = ConcurrencyLimitLayer::new(LIMIT).queue(QUEUE.0, QUEUE.1);
    let probe = HealthProbeLayer::get(&format!("http://{addr}/livez"))
        .every(ms(50))
        .timeout(ms(500))
        .thresholds(1, 5)
        .report_to(&Health::new(), "upstream");
    let timeout = TimeoutLayer::new(timeouts());
    let connections = ConnectLayer::new()
        .max_per_host(CAP)
        .max_total(2 * CAP)
        .queue(LIMIT, ms(80))
        .connect_timeout(ms(500))
        .max_age(ms(150))
        .max_idle(ms(50));
    let guards = Guards {
        retry: retry.handle(),
        breaker: breaker.handle(),
        limit: limit.handle(),
        probe: probe.handle(),
        deadline: deadline.handle(),
        timeout: timeout.handle(),
        connections: connections.handle(),
    };
    let builder = Client::builder(connections);
    let builder = if http2 { builder.http2_only() } else { builder };
    let client = ServiceBuilder::new()
        .layer(deadline.checked()?)
        .layer(retry.checked()?)
        .layer(hedge.checked()?)
        .layer(breaker.checked()?)
        .layer(limit.checked()?)
        .layer(probe.checked()?)
        .layer(timeout.checked()?)
        .map_err(BoxError::from)
        .service(builder.checked()?.build_http());
    Ok((client, guards))
}

pub fn timeouts() -> Timeouts {
    let longest = Duration::from_millis(100);
    Timeouts::new().head(longest).first_frame(longest).response_idle(longest).request_idle(longest)
}

impl Guards {
    /// Restores the initial settings.
    pub fn restore(&self) -> Result<(), BoxError> {
        self.limit.set_limit(LIMIT)?;
        self.limit.set_queue(QUEUE.0, QUEUE.1)?;
        self.connections.set_max_per_host(CAP)?;
        self.connections.set_max_total(2 * CAP)?;
        self.timeout.set(timeouts())?;
        self.deadline.set_default(Duration::from_millis(400))?;
        self.breaker.set_shadow(false);
        self.breaker.reset();
        Ok(())
    }

    /// Restores the initial settings, with longer times that also a busy machine meets.
    pub fn calm_down(&self) -> Result<(), BoxError> {
        self.restore()?;
        self.deadline.set_default(Duration::from_secs(10))?;
        Ok(self.timeout.set(Timeouts::new().head(Duration::from_secs(5)))?)
    }

    pub fn is_well(&self) -> bool {
        self.breaker.state() == CircuitState::Closed && self.probe.state() == ProbeState::Up
    }

    fn gauges(&self) -> [(&'static str, usize); 8] {
        let (limit, breaker) = (self.limit.snapshot(), self.breaker.snapshot());
        let connections = self.connections.snapshot();
        [
            ("permits of the limit held", limit.in_flight as usize),
            ("exempt calls in flight", limit.exempt_in_flight as usize),
            ("callers in the queue of the limit", limit.waiting as usize),
            ("probe slots held", breaker.probes),
            ("breaker isolations", breaker.isolations as usize),
            ("connections in use", connections.in_use),
            ("connections being made", connections.connecting),
            ("callers that wait for a connection", connections.waiting),
        ]
    }

    pub fn are_quiet(&self) -> bool {
        self.gauges().iter().all(|(_, value)| *value == 0)
    }

    pub fn judge(&self, protocol: &str, verdict: &mut Verdict) {
        for (what, value) in self.gauges() {
            verdict.zero(&format!("{protocol} client: {what}"), value);
        }
        verdict.places(&format!("{protocol} client"), &self.limit, LIMIT);
        let (breaker, connections) = (self.breaker.snapshot(), self.connections.snapshot());
        let happened = [
            ("retries", self.retry.snapshot().retries),
            ("openings of the breaker", breaker.opened),
            ("calls that the breaker rejected", breaker.rejected),
            ("timeouts", self.timeout.snapshot().timed_out()),
            ("probes", self.probe.snapshot().probes),
            ("connections made", connections.created),
            ("connections reused", connections.reused),
            ("connections closed for their age", connections.closed_for_age),
        ];
        for (what, times) in happened {
            verdict.happened(&format!("{protocol} client: {what}"), times);
        }
    }
}
