//! The clients of the two sides: the same client without layers and with layers.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::http::{Request, Response};
use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, HealthProbeLayer, RetryLayer, Trip,
    breaker::CircuitBreakerHandle, health::HealthProbeHandle, limit::ConcurrencyLimitHandle,
    retry::RetryHandle,
};
use hyper::body::Incoming;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tower::{Service, ServiceBuilder};

use crate::{load::Body, script::Clock, tally::Tally};

/// The maximum number of requests that the protected client has in flight.
pub const LIMIT: usize = 12;

/// hyper-util's client, with a count of the requests.
pub fn bare_client<B>(
    clock: Clock,
    tally: Arc<Tally>,
) -> impl Service<
    Request<B>,
    Response = Response<Incoming>,
    Error = hyper_util::client::legacy::Error,
    Future: Send,
> + Clone
+ Send
+ Sync
+ 'static
where
    B: http_body::Body<Data: Send, Error: Into<BoxError>> + Send + Unpin + 'static,
{
    ServiceBuilder::new()
        .map_request(move |request: Request<B>| {
            tally.send(clock.phase(), request.uri().path() == "/healthz");
            request
        })
        .service(Client::builder(TokioExecutor::new()).build_http())
}

/// The handles of the layers of the protected client.
#[derive(Clone, Debug)]
pub struct Guards {
    pub retry: RetryHandle,
    pub breaker: CircuitBreakerHandle,
    pub limit: ConcurrencyLimitHandle,
    pub probe: HealthProbeHandle,
}

impl Guards {
    pub fn retries(&self) -> u64 {
        self.retry.snapshot().retries
    }

    /// Returns the number of calls that a layer rejected.
    pub fn refused(&self) -> u64 {
        let limit = self.limit.snapshot();
        self.breaker.snapshot().rejected
            + limit.rejected_full
            + limit.rejected_waited
            + self.probe.snapshot().rejected
    }
}

/// The same client with all layers.
pub fn protected_client(
    clock: Clock,
    upstream: SocketAddr,
    tally: Arc<Tally>,
) -> (
    impl Service<
        Request<Body>,
        Response = Response<
            impl http_body::Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
        >,
        Error = BoxError,
        Future: Send,
    > + Clone
    + Send
    + Sync
    + 'static,
    Guards,
) {
    let retry = RetryLayer::http();
    let breaker = CircuitBreakerLayer::new(Trip::any([
        Trip::consecutive(5),
        Trip::failure_ratio(0.5).within(Duration::from_secs(2)).min_calls(20),
    ]))
    .open_for(Duration::from_millis(500))
    .half_open(2);
    let limit = ConcurrencyLimitLayer::new(LIMIT).queue(24, Duration::from_millis(250));
    let probe = HealthProbeLayer::get(&format!("http://{upstream}/healthz"))
        .every(Duration::from_millis(250))
        .thresholds(2, 3);
    let guards = Guards {
        retry: retry.handle(),
        breaker: breaker.handle(),
        limit: limit.handle(),
        probe: probe.handle(),
    };
    let client = ServiceBuilder::new()
        .layer(retry)
        .layer(breaker)
        .layer(limit)
        .layer(probe)
        .service(bare_client(clock, tally));
    (client, guards)
}
