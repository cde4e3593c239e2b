//! Rejections of requests whose body the server has not read yet, over sockets.
//!
//! A rejection must reach a client that is still sending its request, also if the client reads only after it has sent
//! all of it. The server therefore responds first and then drains the body within bounds.
//!
//! A test whose client is not installed prints a line and passes. With `BUTTRESS_REQUIRE_REAL` set it fails.
#![cfg(all(
    feature = "breaker",
    feature = "limit",
    feature = "timeout",
    feature = "serve",
    feature = "axum"
))]

mod bounds;
mod clients;
mod curl;
mod httpx;
#[path = "../net/mod.rs"]
mod net;
#[allow(dead_code, reason = "these tests start no nginx")]
#[path = "../peers/mod.rs"]
mod peers;
mod raw;
mod results;
mod servers;

use std::{io::Write, thread};

/// Size of an upload.
const UPLOAD: usize = 8 * 1024 * 1024;

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
