//! The concurrency limit through its public API, in virtual time.

mod adaptive;
mod cancel;
mod handle;
mod layer;
mod lifetime;
mod model;
mod priorities;
mod recovery;
mod samples;
mod unread;
mod upgrades;
mod vectors;
