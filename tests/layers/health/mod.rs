//! The modules `health` and `lifecycle` through their public API, on a paused clock.

mod checks;
mod contract;
mod endpoints;
mod grpc;
mod lifecycle;
mod probe;
mod probe_options;
mod random;
mod vectors;
