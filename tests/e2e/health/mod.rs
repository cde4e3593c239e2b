//! Health and drain over real sockets.

mod drain_http;
mod drain_tonic;
mod sockets;
