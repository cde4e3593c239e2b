//! A server that drains, over real sockets: which connections it closes and when, and that no call is lost.

mod backlog;
mod connections;
mod frames;
mod http2;
mod phases;
mod server;
mod upgrades;
