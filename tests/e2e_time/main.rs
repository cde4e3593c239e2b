//! Deadlines and timeouts over real sockets.
#![cfg(feature = "timeout")]

#[path = "../net/mod.rs"]
mod net;

mod deadline;
mod timeout;
