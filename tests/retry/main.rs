//! The retry layer through its public API, with a paused clock and no sockets.
#![cfg(all(
    feature = "retry",
    feature = "breaker",
    feature = "limit",
    feature = "hyper",
    feature = "tracing"
))]

mod bodies;
mod budget;
mod contract;
mod deadline;
mod discard;
mod grpc;
mod kit;
mod order;
mod say;
mod script;
mod state;
mod time;
mod types;
mod waits;
mod wire;
