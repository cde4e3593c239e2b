//! Health over real sockets. Modules are named so that `cargo test health` finds them.

#[path = "../net/mod.rs"]
mod net;

mod health_drain_http;
mod health_drain_tonic;
mod health_limit;
#[cfg(unix)]
mod health_signals;
mod health_sockets;
