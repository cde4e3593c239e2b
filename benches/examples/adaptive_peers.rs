//! The table of the example `adaptive_limit` of the crate itself, with other crates' limits in it, in the same rig.
//!
//! ```text
//! cargo run -p buttress-benches --example adaptive_peers
//! ```
//!
//! tower-resilience (0.13) has an AIMD and a Vegas, which are asked themselves; it has no Gradient2, and its
//! AIMD is never told of the clock, nor how many calls there are. little-loadshedder (0.2) reads the
//! system's clock, so that it cannot run in virtual time: what decides in it is written again here, without
//! its queue, in which calls wait before they count.

#[path = "../../tests/rig/mod.rs"]
mod rig;
#[path = "../../examples/adaptive_limit/table.rs"]
mod table;

use std::{error::Error, fmt, time::Duration};

use buttress::limit::adaptive::{Algorithm, Change, Knee, Reason, Sample};
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

/// As it is, told of each call that was answered.
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

    /// It cannot be set.
    fn set_limit(&mut self, _: u32) {}

    fn hear(&mut self, sample: &Sample) -> Option<Change> {
        let before = self.limit();
        if sample.dropped {
            self.0.record_failure();
        } else {
            self.0.record_success(sample.latency);
        }
        let limit = self.limit();
        (limit != before).then_some(Change { limit, reason: Reason::Other("its own") })
    }
}

impl<A> fmt::Debug for Peer<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Peer")
    }
}

// ===== little-loadshedder =====

/// Its `stop`, with the time told: one step up or down, by whether throughput and concurrency went the same way,
/// and down while calls take longer than the target on average.
#[derive(Debug)]
struct Shedder {
    concurrency: f64,
    latency: f64,
    before: (f64, f64),
    changed: Duration,
}

/// Of its README.
const EWMA: f64 = 0.01;
/// Three times what a call takes here.
const TARGET: f64 = 0.030;

impl Shedder {
    /// It begins with 1, always; here with what it is asked to, as the others.
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

    fn hear(&mut self, sample: &Sample) -> Option<Change> {
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
        let change = Change { limit: self.limit(), reason: Reason::Other("its own") };
        (self.concurrency != before).then_some(change)
    }
}
