//! The circuit breaker through its public API: first the list that holds for every layer.

mod support;

use buttress::{
    CircuitBreaker, CircuitBreakerLayer, Trip,
    breaker::{CircuitBreakerHandle, State},
};
use std::time::Duration;
use support::{
    Oops, Strict, Then,
    contract::{Subject, contract_tests},
    request,
};
use tokio::time::advance;
use tower::{Layer, ServiceExt};

const WAIT: Duration = Duration::from_secs(30);

/// Half-open with one probe.
struct HalfOpen {
    layer: CircuitBreakerLayer,
    handle: CircuitBreakerHandle,
}

impl Subject for HalfOpen {
    type Layer = CircuitBreakerLayer;
    type Service = CircuitBreaker<Strict>;

    async fn new() -> Self {
        let layer = CircuitBreakerLayer::new(Trip::consecutive(1)).open_for(WAIT);
        let (inner, _) = Strict::answering(|| Then::Fail(Oops("trips it")));
        layer.layer(inner).oneshot(request()).await.unwrap_err();
        advance(WAIT).await;
        let handle = layer.handle();
        assert_eq!(handle.state(), State::HalfOpen);
        Self { layer, handle }
    }

    fn layer(&self) -> &CircuitBreakerLayer {
        &self.layer
    }

    fn taken(&self) -> usize {
        self.handle.snapshot().probes
    }

    fn shut(&mut self) {
        self.handle.force_open();
    }

    fn unshut(&mut self) {
        self.handle.reset();
    }
}

contract_tests!(HalfOpen);
