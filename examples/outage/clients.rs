//! The two sides: the same client, bare and protected.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::http::{Request, Response};
use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Trip, breaker::CircuitBreakerHandle,
    limit::ConcurrencyLimitHandle,
};
use hyper::body::Incoming;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tower::{Service, ServiceBuilder};

use crate::{load::Body, script::Clock, tally::Tally};

/// How many requests the protected side has at the upstream at once.
pub const LIMIT: usize = 12;

/// hyper-util's client as it comes, and a count of what it is asked to send.
pub fn bare_client(
    clock: Clock,
    tally: Arc<Tally>,
) -> impl Service<
    Request<Body>,
    Response = Response<Incoming>,
    Error = hyper_util::client::legacy::Error,
    Future: Send,
> + Clone
+ Send
+ Sync
+ 'static {
    ServiceBuilder::new()
        .map_request(move |request| {
            tally.send(clock.phase());
            request
        })
        .service(Client::builder(TokioExecutor::new()).build_http())
}

/// What can be seen of the protected side from outside.
#[derive(Clone, Debug)]
pub struct Guards {
    pub breaker: CircuitBreakerHandle,
    pub limit: ConcurrencyLimitHandle,
}

impl Guards {
    pub fn retries(&self) -> u64 {
        0
    }

    /// Calls that any layer did not let through.
    pub fn refused(&self) -> u64 {
        let limit = self.limit.snapshot();
        self.breaker.snapshot().refused + limit.refused_full + limit.refused_waited
    }
}

/// The same client under the full stack.
pub fn protected_client(
    clock: Clock,
    _upstream: SocketAddr,
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
    let breaker = CircuitBreakerLayer::new(Trip::any([
        Trip::consecutive(5),
        Trip::failure_ratio(0.5).within(Duration::from_secs(2)).min_calls(20),
    ]))
    .open_for(Duration::from_millis(500))
    .half_open(2);
    let limit = ConcurrencyLimitLayer::new(LIMIT).queue(24, Duration::from_millis(250));
    let guards = Guards { breaker: breaker.handle(), limit: limit.handle() };
    let client =
        ServiceBuilder::new().layer(breaker).layer(limit).service(bare_client(clock, tally));
    (client, guards)
}
