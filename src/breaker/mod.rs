//! A circuit breaker: stops calling what keeps failing, and asks carefully when it is back.

mod core;
mod handle;
mod layer;
mod state;
mod trip;
mod window;

pub use self::{
    handle::{CircuitBreakerHandle, CircuitBreakerSnapshot},
    layer::{CircuitBreaker, CircuitBreakerLayer},
    state::State,
    trip::{Trip, Tripped},
};
pub use crate::admission::ResponseFuture;
