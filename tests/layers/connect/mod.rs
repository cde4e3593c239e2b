//! The connection layer and its clients over pipes in memory: caps, queues, lifetimes and snapshots.

mod caps;
pub mod fixtures;
mod lifetime;
mod queue;
mod random;
mod settings;
mod streams;
