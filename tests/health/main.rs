//! The modules `health` and `lifecycle` through their public API, with a paused clock. The names of the modules begin
//! with `health`, so that `cargo test health` selects them.

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
