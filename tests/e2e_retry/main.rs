//! Retry over breaker over limit, over hyper-util, reqwest and tonic, against real servers.
#![cfg(all(feature = "breaker", feature = "limit", feature = "retry"))]

#[path = "../net/mod.rs"]
mod net;
/// Named so that `cargo test retry` runs all tests.
#[path = "upstream.rs"]
mod retry;
#[path = "../rpc/mod.rs"]
mod rpc;
