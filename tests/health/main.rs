//! The health room through its public API, with a paused clock. Modules are named so that `cargo test health`
//! finds them.

#[path = "../support/mod.rs"]
mod support;

mod health_checks;
mod health_contract;
mod health_endpoints;
mod health_grpc;
mod health_lifecycle;
mod health_probe;
mod health_probe_options;
mod health_random;
mod health_vectors;
