//! Health over real sockets. Modules are named so that `cargo test health` finds them.

mod health_sockets;
