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
        (both.count(), both.quantile(share).ok().flatten().filter(|_| merged))
    }
}
