//! How long calls take, as far as a percentile of it needs.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use sketches_ddsketch::{Config, DDSketch};
use tokio::time::Instant;

use super::super::core::lock;

/// The percentile of the latency of late: of the last one to two [`AGE`]s.
pub(super) struct Live {
    quantile: f64,
    /// In microseconds, of the last time it was computed; 0: not enough is known.
    delay_us: AtomicU64,
    state: Mutex<State>,
}

struct State {
    now: DDSketch,
    before: DDSketch,
    since: Instant,
    /// Until it is computed again.
    due: u32,
}

/// A sketch takes its turn for so long.
const AGE: Duration = Duration::from_secs(30);
/// Fewer say nothing about the slow one in a hundred, nor in twenty.
const LEAST: usize = 20;
/// So many calls share one computation.
const EVERY: u32 = 16;
/// No hedge comes sooner (Finagle's least delay for a backup request).
const SHORTEST: Duration = Duration::from_millis(1);

/// Within one in a hundred, of at most 2048 sizes.
fn sketch() -> DDSketch {
    DDSketch::new(Config::new(0.01, 2048, 1.0e-6))
}

impl Live {
    pub(super) fn new(quantile: f64) -> Self {
        let state = State { now: sketch(), before: sketch(), since: Instant::now(), due: 0 };
        Self { quantile, delay_us: AtomicU64::new(0), state: Mutex::new(state) }
    }

    /// None: too little is known.
    pub(super) fn delay(&self) -> Option<Duration> {
        match self.delay_us.load(Ordering::Relaxed) {
            0 => None,
            us => Some(Duration::from_micros(us).max(SHORTEST)),
        }
    }

    /// A call has taken so long, or at least so long.
    pub(super) fn took(&self, time: Duration) {
        let mut state = lock(&self.state);
        let age = state.since.elapsed();
        if age >= AGE {
            let full = std::mem::replace(&mut state.now, sketch());
            // What is older than two turns is forgotten.
            state.before = if age < AGE * 2 { full } else { sketch() };
            state.since = Instant::now();
            state.due = 0;
        }
        state.now.add(time.as_secs_f64());
        if state.due > 0 {
            state.due -= 1;
            return;
        }
        let mut both = state.before.clone();
        // Both are made alike: they can be merged, and a share within one has an answer.
        let merged = both.merge(&state.now).is_ok() && both.count() >= LEAST;
        let delay = if merged { both.quantile(self.quantile).ok().flatten() } else { None };
        if merged {
            state.due = EVERY;
        }
        let us = delay.map_or(0, |delay| ((delay * 1e6) as u64).max(1));
        self.delay_us.store(us, Ordering::Relaxed);
    }
}
