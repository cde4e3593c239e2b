//! Shared helpers: a breaker over a scripted service, and calls at each stage.

use std::time::Duration;

pub use buttress::{
    CircuitBreaker, CircuitBreakerLayer, Trip,
    breaker::{CircuitBreakerHandle, CircuitState, OpenDuration, TripReason},
    outcome::RejectedKind,
};
use http::Request;
use tokio::time::advance;
use tokio_test::{assert_pending, assert_ready, task};
use tower::{Layer, ServiceExt, util::Oneshot};

pub use crate::support::{Oops, Piece, ScriptBody, Strict, Then, Watch};
use crate::support::{empty, read, refused_as, request};
pub use crate::support::{ms, secs};

pub type Call = task::Spawn<Oneshot<CircuitBreaker<Strict>, Request<()>>>;

pub const WAIT: Duration = Duration::from_secs(30);

/// Returns a layer that opens at the first failure, for [`WAIT`].
pub fn touchy() -> CircuitBreakerLayer {
    CircuitBreakerLayer::new(Trip::consecutive(1)).open_for(WAIT)
}

/// One circuit over a service that holds every call, unless it is scripted.
pub struct Rig {
    pub layer: CircuitBreakerLayer,
    pub service: CircuitBreaker<Strict>,
    pub watch: Watch,
    pub handle: CircuitBreakerHandle,
}

impl Rig {
    pub fn new(layer: CircuitBreakerLayer) -> Self {
        let (inner, watch) = Strict::holding();
        Self { service: layer.layer(inner), handle: layer.handle(), watch, layer }
    }

    /// Returns a circuit that has been tripped and is half-open after [`WAIT`].
    pub async fn half_open(layer: CircuitBreakerLayer) -> Self {
        let rig = Self::new(layer);
        while rig.state() == CircuitState::Closed {
            rig.fail().await;
        }
        advance(WAIT).await;
        assert_eq!(rig.state(), CircuitState::HalfOpen);
        rig
    }

    pub fn state(&self) -> CircuitState {
        self.handle.state()
    }

    // ===== Whole calls =====

    /// Makes a call with this scripted end, and reads the response to its end. Returns `false` if it was rejected.
    pub async fn call(&self, then: Then) -> bool {
        let before = self.watch.seen().calls;
        self.watch.script([then]);
        if let Ok(response) = self.service.clone().oneshot(request()).await {
            let _ = read(response.into_body()).await;
        }
        let went = self.watch.seen().calls > before;
        if !went {
            self.watch.unscript();
        }
        went
    }

    pub async fn ok(&self) {
        assert!(self.call(Then::Answer(empty())).await, "rejected");
    }

    pub async fn fail(&self) {
        assert!(self.call(Then::Fail(Oops("down"))).await, "rejected");
    }

    pub async fn refused(&self) -> RejectedKind {
        refused_as(self.service.clone().oneshot(request()).await)
    }

    /// Makes a call whose outcome arrives after `long`.
    pub async fn takes(&self, long: Duration, then: Result<(), Oops>) {
        let (mut call, number) = self.hold();
        advance(long).await;
        assert!(self.watch.end(number, then.map(|()| empty())));
        let _ = assert_ready!(call.poll());
    }

    // ===== Calls in flight =====

    /// A call in flight, and its number.
    pub fn hold(&self) -> (Call, usize) {
        let number = self.watch.seen().calls;
        let mut call = self.ask();
        assert_pending!(call.poll());
        assert_eq!(self.watch.seen().calls, number + 1, "the call did not reach the service");
        (call, number)
    }

    /// A call that has not been polled yet.
    pub fn ask(&self) -> Call {
        task::spawn(self.service.clone().oneshot(request()))
    }
}
