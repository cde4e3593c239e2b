//! The default stacks against real servers that close their connections as a matter of routine.
//!
//! Each server closes connections while calls are on their way: nginx and grpcio by GOAWAY, nginx and Node.js by the
//! end of the keep-alive time, axum by a graceful shutdown. None of this is a failure of the service, so no call may
//! be lost, and no circuit may open. A circuit must not open either when callers set deadlines that are too short.
//!
//! Caching proxies stand in front of a server that rejects calls. They must not store a rejection.
//!
//! A test whose server is not installed prints a line and passes. With `BUTTRESS_REQUIRE_REAL` set it fails.

mod caches;
mod deadlines;
mod grpc;
mod http2;
mod keep_alive;
mod report;
mod restarts;
mod scripts;
mod stacks;
mod varnish;

/// Number of calls of each test with a server that closes connections.
const CALLS: usize = 10_000;
