use std::time::Duration;

use sketches_ddsketch::{Config, DDSketch};
use tokio::time::Instant;

/// How long calls took of late, as far as percentiles of it need: in the last one to two [`AGE`]s.
pub(crate) struct Recent {
    now: DDSketch,
    before: DDSketch,
    since: Instant,
}

/// A sketch takes its turn for so long.
const AGE: Duration = Duration::from_secs(30);

/// Within one in a hundred, of at most 2048 sizes.
fn sketch() -> DDSketch {
    DDSketch::new(Config::new(0.01, 2048, 1.0e-6))
}

impl Recent {
    pub(crate) fn new() -> Self {
        Self { now: sketch(), before: sketch(), since: Instant::now() }
    }

    /// A call has taken so long. True: another turn has begun.
    pub(crate) fn add(&mut self, time: Duration) -> bool {
        let turned = self.turn();
        self.now.add(time.as_secs_f64());
        turned
    }

    fn turn(&mut self) -> bool {
        let age = self.since.elapsed();
        if age < AGE {
            return false;
        }
        let full = std::mem::replace(&mut self.now, sketch());
        // What is older than two turns is forgotten.
        self.before = if age < AGE * 2 { full } else { sketch() };
        self.since = Instant::now();
        true
    }

    /// The time within which this share of them was, in seconds, and of how many; none of none.
    pub(crate) fn quantile(&self, share: f64) -> (usize, Option<f64>) {
        let mut both = self.before.clone();
        // Both are made alike: they can be merged, and a share within one has an answer.
        let merged = both.merge(&self.now).is_ok();
        let share = at_least(share, both.count());
        (both.count(), both.quantile(share).ok().flatten().filter(|_| merged))
    }
}

/// The sketch rounds the place in line down: of two calls, the faster one would be what 99 of 100 do not exceed.
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
        let mut recent = Recent::new();
        let is = |recent: &Recent, share: f64, ms: f64| {
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
