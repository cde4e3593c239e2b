//! The circuit breaker, feature by feature, through its public API and under a paused clock.
#![cfg(feature = "breaker")]

#[path = "../support/mod.rs"]
mod support;

mod balancers;
mod by_hand;
mod hazards;
mod keys;
mod kit;
mod opening;
mod waiting;
