//! Prints the table of the example `adaptive_limit` with the adaptive limits of other crates.
//!
//! ```text
//! cargo run -p buttress-benches --example adaptive_peers
//! ```
//!
//! tower-resilience (0.13) has an AIMD and a Vegas, which run here unchanged, and no Gradient2. The inputs of its AIMD
//! do not include the time or the number of calls in flight. little-loadshedder (0.2) reads the system clock, so it
//! cannot run in virtual time. This example contains a copy of its algorithm without its queue, in which calls wait
//! before it counts them.

#[path = "../../tests/layers/simulation.rs"]
mod rig;
#[path = "../../examples/offline/src/bin/adaptive_limit/table.rs"]
mod table;

use std::{error::Error, fmt, time::Duration};

use buttress::limit::adaptive::{Algorithm, ChangeReason, Knee, LimitChange, Sample};
use table::Kind;
use tower_resilience::adaptive::{self as tr, ConcurrencyAlgorithm};

const KINDS: [Kind; 5] = [
    ("knee (ours)", |from| Ok(Some(Box::new(Knee::new(from, 1..=1000)?)))),
    ("t-r aimd, 30 ms", |from| Ok(Some(Box::new(Peer(aimd(from, 30)))))),
    ("t-r aimd, default", |from| Ok(Some(Box::new(Peer(aimd(from, 100)))))),
    ("t-r vegas", |from| Ok(Some(Box::new(Peer(vegas(from)))))),
    ("little-loadshedder", |from| Ok(Some(Box::new(Shedder::new(from))))),
];

fn main() -> Result<(), Box<dyn Error>> {
    table::print(&KINDS)?;
    Ok(())
}

// ===== tower-resilience =====

/// An algorithm of tower-resilience, which records each call that has ended.
struct Peer<A>(A);

fn aimd(from: usize, ms: u64) -> tr::Aimd {
    let builder = tr::Aimd::builder().initial_limit(from).min_limit(1).max_limit(1000);
    builder.latency_threshold(Duration::from_millis(ms)).build().expect("bounds are in order")
}

fn vegas(from: usize) -> tr::Vegas {
    let builder = tr::Vegas::builder().initial_limit(from).min_limit(1).max_limit(1000);
    builder.build().expect("bounds are in order")
}

impl<A: ConcurrencyAlgorithm + 'static> Algorithm for Peer<A> {
    fn limit(&self) -> u32 {
        self.0.limit() as u32
    }

    /// Does nothing: these algorithms have no setter.
    fn set_limit(&mut self, _: u32) {}

    fn on_sample(&mut self, sample: &Sample) -> Option<LimitChange> {
        let before = self.limit();
        if sample.dropped {
            self.0.record_failure();
        } else {
            self.0.record_success(sample.latency);
        }
        let limit = self.limit();
        (limit != before).then_some(LimitChange { limit, reason: ChangeReason::Other("its own") })
    }
}

impl<A> fmt::Debug for Peer<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Peer")
    }
}

// ===== little-loadshedder =====

/// A copy of its `stop` with the time as an argument. The limit goes up by one if throughput and concurrency changed in
/// the same direction, and down by one otherwise or while the mean latency exceeds the target.
#[derive(Clone, Debug)]
struct Shedder {
    concurrency: f64,
    latency: f64,
    before: (f64, f64),
    changed: Duration,
}

/// The value in its README.
const EWMA: f64 = 0.01;
/// Three times the mean time of a call.
const TARGET: f64 = 0.030;

impl Shedder {
    /// Creates the algorithm with an initial limit, as for the others. little-loadshedder always begins with 1.
    fn new(from: usize) -> Self {
        let concurrency = from as f64;
        Self { concurrency, latency: TARGET, before: (0.0, 0.0), changed: Duration::ZERO }
    }
}

impl Algorithm for Shedder {
    fn limit(&self) -> u32 {
        self.concurrency as u32
    }

    fn set_limit(&mut self, limit: u32) {
        self.concurrency = limit.into();
    }

    fn on_sample(&mut self, sample: &Sample) -> Option<LimitChange> {
        let free = (self.concurrency - f64::from(sample.in_flight)).max(0.0);
        let is_full = free <= (self.concurrency / 10.0).floor().max(1.0);
        self.latency += EWMA * (sample.latency.as_secs_f64() - self.latency);
        let since = sample.now.saturating_sub(self.changed).as_secs_f64();
        if !is_full || since <= self.latency / EWMA / 10.0 {
            return None;
        }
        let at_once = self.concurrency - free;
        let rate = at_once / self.latency;
        let apart = (rate > self.before.0) ^ (at_once > self.before.1);
        let before = self.concurrency;
        self.concurrency += match apart || self.latency > TARGET {
            true if before > 1.0 => -1.0,
            true => 0.0,
            false => 1.0,
        };
        self.latency *= self.concurrency / before;
        self.before = (rate, at_once);
        self.changed = sample.now;
        let change = LimitChange { limit: self.limit(), reason: ChangeReason::Other("its own") };
        (self.concurrency != before).then_some(change)
    }
}
