//! The hedge layer, through its public API and on a paused clock.
#![cfg(all(feature = "retry", feature = "limit"))]

/// The path of each test begins with `hedge`, so that `cargo test hedge` selects all of them.
#[path = "."]
mod hedge {
    mod calls;
    mod cost;
    mod housekeeping;
    mod percentile;
    mod several;
    mod tail;
}
