//! Real servers for the end-to-end tests. Each one runs as a process of its own, on a loopback port.

pub mod chromium;
pub mod directory;
pub mod nginx;
pub mod prometheus;

use std::{env, io::Write, thread, time::Duration};

/// Maximum time for a server to start, to reload or to stop.
pub const MAX_WAIT: Duration = Duration::from_secs(10);

/// Whether a missing server fails the tests that need it (`BUTTRESS_REQUIRE_REAL`).
pub fn are_required() -> bool {
    env::var_os("BUTTRESS_REQUIRE_REAL").is_some()
}

/// Prints that the current test is skipped.
///
/// # Panics
///
/// `BUTTRESS_REQUIRE_REAL` is set.
pub fn skip(missing: &str) {
    assert!(!are_required(), "BUTTRESS_REQUIRE_REAL is set, but {missing} is not installed");
    let thread = thread::current();
    let test = thread.name().unwrap_or_default();
    // Not `println!`: the test harness would capture it.
    let _ = writeln!(std::io::stderr(), "skipped {test}: {missing} is not installed");
}

/// Blocks this thread. While it is blocked, a client on a single-threaded runtime does not see that its connections
/// are closed.
#[expect(clippy::disallowed_methods, reason = "the tests need a thread that does not run")]
pub fn block_for(time: Duration) {
    thread::sleep(time);
}

/// Blocks this thread until the condition holds, for at most [`MAX_WAIT`].
pub fn block_until(mut holds: impl FnMut() -> bool) {
    let step = Duration::from_millis(5);
    for _ in 0..MAX_WAIT.as_millis() / step.as_millis() {
        if holds() {
            return;
        }
        block_for(step);
    }
    panic!("the condition did not hold within {MAX_WAIT:?}");
}
