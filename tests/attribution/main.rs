//! Which side caused an outcome: a failure counts against the upstream only if the upstream caused it.
#![cfg(feature = "full")]

#[path = "../support/mod.rs"]
mod support;

mod deadlines;
mod fixtures;
mod half_open;
mod uploads;
mod waits;
