//! Deadlines and timeouts over real sockets.
#![cfg(feature = "timeout")]

#[path = "../net/mod.rs"]
mod net;
#[path = "../rpc/mod.rs"]
mod rpc;

mod body_rate;
mod deadline;
mod grpc_deadline;
mod reqwest_timeouts;
mod timeout;
mod unread;
