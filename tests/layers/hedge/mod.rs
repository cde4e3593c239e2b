//! The hedge layer through its public API, on a paused clock.

mod calls;
mod housekeeping;
mod latency_distribution;
mod multiple_attempts;
mod percentile;
mod tail_latency;
