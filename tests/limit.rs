//! The concurrency limit through its public API: first the list that holds for every layer.

mod support;

use std::time::Duration;

use buttress::{ConcurrencyLimit, ConcurrencyLimitLayer, limit::ConcurrencyLimitHandle};
use support::{
    Strict,
    contract::{Subject, contract_tests},
    request,
};
use tower::{Layer, Service, ServiceExt};

type Call = <ConcurrencyLimit<Strict> as Service<http::Request<()>>>::Future;

/// One at a time.
struct One {
    layer: ConcurrencyLimitLayer,
    handle: ConcurrencyLimitHandle,
    occupant: Option<Call>,
}

impl Subject for One {
    type Layer = ConcurrencyLimitLayer;
    type Service = ConcurrencyLimit<Strict>;

    async fn new() -> Self {
        let layer = ConcurrencyLimitLayer::new(1);
        Self { handle: layer.handle(), layer, occupant: None }
    }

    fn layer(&self) -> &ConcurrencyLimitLayer {
        &self.layer
    }

    fn taken(&self) -> usize {
        self.handle.in_flight() as usize - usize::from(self.occupant.is_some())
    }

    fn shut(&mut self) {
        let (inner, _) = Strict::holding();
        self.occupant = Some(self.layer.layer(inner).call(request()));
    }

    fn unshut(&mut self) {
        self.occupant = None;
    }
}

contract_tests!(One);
