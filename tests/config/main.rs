//! Settings: where they come from, what does not go together, and what is told about them.
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
