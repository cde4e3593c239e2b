//! Timeouts and deadlines through their public API, under a paused clock.
#![cfg(all(feature = "timeout", feature = "breaker", feature = "limit", feature = "retry"))]

#[path = "../support/mod.rs"]
mod support;

#[path = "../support/fuzz.rs"]
mod fuzz;

mod deadline;
mod kit;
mod timeout;
