//! A server that drains, over real sockets: which connections it closes and when, and that no call is lost.
#![cfg(feature = "serve")]

mod backlog;
mod connections;
mod frames;
mod http2;
#[path = "../net/mod.rs"]
mod net;
#[path = "../peers/mod.rs"]
#[allow(dead_code)] // Only for the setting that requires peers.
mod peers;
mod phases;
mod restarts;
#[path = "../rpc/mod.rs"]
mod rpc;
mod server;
mod upgrades;
