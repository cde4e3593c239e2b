//! The connection layer and its clients: caps, queues, lifetimes and snapshots.
#![cfg(feature = "connect")]

mod connect_addresses;
mod connect_caps;
mod connect_clients;
mod connect_life;
mod connect_line;
mod connect_random;
mod connect_settings;
mod connect_streams;
mod kit;
#[path = "../net/mod.rs"]
mod net;
#[path = "../rpc/mod.rs"]
mod rpc;
