//! The concurrency limit through its public API, in virtual time.
#![cfg(feature = "limit")]

mod limit_adaptive;
mod limit_cancel;
mod limit_handle;
mod limit_layer;
mod limit_learns;
mod limit_lives;
mod limit_model;
mod limit_recovery;
mod limit_sorted;
mod limit_unread;
mod limit_upgrades;
mod limit_vectors;
#[path = "../rig/mod.rs"]
mod rig;
#[path = "../support/mod.rs"]
mod support;
