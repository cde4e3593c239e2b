//! The hedge, through its public API and on a paused clock.
#![cfg(all(feature = "retry", feature = "limit"))]

/// So that `cargo test hedge` finds them all.
#[path = "."]
mod hedge {
    mod calls;
    mod cost;
    mod housekeeping;
    #[cfg(feature = "percentile")]
    mod percentile;
    mod several;
    mod tail;
}
