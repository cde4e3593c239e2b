//! The concurrency limit, feature by feature, through its public API and under a paused clock.
#![cfg(feature = "limit")]

mod limit_handle;
mod limit_recovery;
mod limit_sorted;
mod limit_upgrades;
#[path = "../support/mod.rs"]
mod support;
