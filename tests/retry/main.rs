//! The retry layer through its public API, with a paused clock and no sockets.
#![cfg(all(
    feature = "retry",
    feature = "breaker",
    feature = "limit",
    feature = "timeout",
    feature = "hyper",
    feature = "tracing"
))]

/// The path of each test begins with `retry`, so that `cargo test retry` selects all of them.
#[path = "."]
mod retry {
    mod bodies;
    mod budget;
    mod contract;
    mod cost;
    mod deadline;
    mod discard;
    mod grpc;
    mod housekeeping;
    pub mod kit;
    mod load;
    mod order;
    mod say;
    pub mod script;
    mod state;
    mod time;
    mod types;
    mod unprocessed;
    mod vectors;
    mod waits;
    mod wire;
}

use retry::{kit, script};
