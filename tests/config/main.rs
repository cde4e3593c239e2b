//! Settings: where they come from, what does not go together, and what is told about them.
#![cfg(feature = "config")]

mod config_check;
mod config_load;
mod config_random;
