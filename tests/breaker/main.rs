//! The circuit breaker through its public API, under a paused clock.
#![cfg(all(feature = "breaker", feature = "limit"))]

#[path = "../support/mod.rs"]
mod support;

// One parent module, so that `cargo test breaker` selects all tests of this directory.
#[path = "."]
mod breaker {
    mod balancers;
    mod basics;
    mod by_hand;
    mod hazards;
    mod hostile;
    mod housekeeping;
    mod keys;
    mod kit;
    mod lives;
    mod many_keys;
    mod model;
    mod opening;
    mod schedules;
    mod vectors;
    mod waiting;
}
