//! The default stacks against real servers that close their connections as a matter of routine.
//!
//! Each server closes connections while calls are on their way: nginx and grpcio by GOAWAY, nginx and Node.js by the
//! end of the keep-alive time, axum by a graceful shutdown. None of this is a failure of the service, so no call may
//! be lost, and no circuit may open. A circuit must not open either when callers set deadlines that are too short.
//!
//! Caching proxies stand in front of a server that rejects calls. They must not store a rejection.
//!
//! A test whose server is not installed prints a line and passes. With `BUTTRESS_REQUIRE_REAL` set it fails.
#![cfg(all(feature = "stack", feature = "connect", feature = "serve"))]

mod caches;
mod deadlines;
mod grpc;
mod http2;
mod keep_alive;
#[path = "../net/mod.rs"]
mod net;
#[path = "../peers/mod.rs"]
mod peers;
mod report;
mod restarts;
#[path = "../rpc/mod.rs"]
mod rpc;
mod scripts;
mod stacks;
mod varnish;

use std::{io::Write, thread};

/// Number of calls of each test with a server that closes connections.
const CALLS: usize = 10_000;

/// Prints that the current test is skipped.
///
/// # Panics
///
/// `BUTTRESS_REQUIRE_REAL` is set.
fn skip(missing: &str) {
    assert!(!peers::are_required(), "BUTTRESS_REQUIRE_REAL is set, but {missing} is not installed");
    let thread = thread::current();
    let test = thread.name().unwrap_or_default();
    // Not `println!`: the test harness would capture it.
    let _ = writeln!(std::io::stderr(), "skipped {test}: {missing} is not installed");
}
