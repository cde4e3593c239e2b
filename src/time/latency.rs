//! Percentiles of the recent latency.
//!
//! Two sketches hold the latencies of the current and of the previous interval of 30 s. A percentile is computed over
//! both, so it covers the last 30 to 60 s.

use std::time::Duration;

use sketches_ddsketch::{Config, DDSketch};
use tokio::time::Instant;

/// The latencies of the last one to two intervals of [`AGE`], as sketches.
pub(crate) struct RecentLatency {
    /// The current interval.
    now: DDSketch,
    /// The previous interval.
    before: DDSketch,
    /// The start of the current interval.
    since: Instant,
}

/// The duration of an interval.
const AGE: Duration = Duration::from_secs(30);

/// Returns an empty sketch with a relative error of 1 % and at most 2048 buckets.
fn sketch() -> DDSketch {
    DDSketch::new(Config::new(0.01, 2048, 1.0e-6))
}

impl RecentLatency {
    pub(crate) fn new() -> Self {
        Self { now: sketch(), before: sketch(), since: Instant::now() }
    }

    /// Adds the latency of a call. Returns whether a new interval has begun.
    pub(crate) fn add(&mut self, time: Duration) -> bool {
        let turned = self.turn();
        self.now.add(time.as_secs_f64());
        turned
    }

    /// Begins a new interval if the current one is over.
    fn turn(&mut self) -> bool {
        let age = self.since.elapsed();
        if age < AGE {
            return false;
        }
        let full = std::mem::replace(&mut self.now, sketch());
        // Without a call for a whole interval, the previous interval is empty.
        self.before = if age < AGE * 2 { full } else { sketch() };
        self.since = Instant::now();
        true
    }

    /// Returns the number of calls, and the latency in seconds that this share of them did not exceed. `None` without
    /// calls.
    pub(crate) fn quantile(&self, share: f64) -> (usize, Option<f64>) {
        let mut both = self.before.clone();
        // The sketches have the same configuration, so the merge succeeds. A share from 0 to 1 has a quantile.
        let merged = both.merge(&self.now).is_ok();
        let share = at_least(share, both.count());
        (both.count(), both.quantile(share).ok().flatten().filter(|_| merged))
    }
}

/// Returns the quantile to request from the sketch, so that at least this share of the calls does not exceed it.
///
/// The sketch rounds the rank down. For two calls its 99th percentile would be the faster of them.
fn at_least(share: f64, of: usize) -> f64 {
    let nth = (share * of as f64).ceil().max(1.0) - 1.0;
    let last = of.saturating_sub(1).max(1) as f64;
    ((nth + 0.5) / last).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_percentile_is_what_so_many_did_not_exceed_however_few_they_are() {
        let mut recent = RecentLatency::new();
        let is = |recent: &RecentLatency, share: f64, ms: f64| {
            let told = recent.quantile(share).1.unwrap() * 1000.0;
            assert!((told - ms).abs() <= ms / 100.0, "{share}: {told} and not {ms}");
        };
        recent.add(Duration::from_millis(100));
        recent.add(Duration::from_millis(200));
        for (share, ms) in [(0.0, 100.0), (0.5, 100.0), (0.51, 200.0), (0.99, 200.0), (1.0, 200.0)]
        {
            is(&recent, share, ms);
        }
        for time in 3..=100 {
            recent.add(Duration::from_millis(100 * time));
        }
        for nth in [1, 50, 95, 99, 100].map(f64::from) {
            is(&recent, nth / 100.0, nth * 100.0);
        }
    }
}
