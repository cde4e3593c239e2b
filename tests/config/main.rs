//! Configurations: their sources, conflicts between settings, errors and explanations.
#![cfg(feature = "config")]

#[path = "../support/fuzz.rs"]
mod fuzz;

mod config_check;
mod config_load;
#[cfg(feature = "stack")]
mod config_random;
#[cfg(feature = "stack")]
mod config_stacks;
#[cfg(all(feature = "stack", feature = "connect"))]
mod config_streams;
