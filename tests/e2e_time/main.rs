//! Deadlines and timeouts over real sockets.
#![cfg(feature = "timeout")]

#[path = "../net/mod.rs"]
mod net;

mod body_rate;
mod deadline;
mod timeout;
mod unread;
