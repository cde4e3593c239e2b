//! The connection layer and its clients over sockets.

mod addresses;
mod clients;
mod streams;
