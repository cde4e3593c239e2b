//! How long calls take, as far as a percentile of it needs.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::super::core::lock;
use crate::call::Recent;

/// A percentile of the latency of late.
pub(super) struct Live {
    quantile: f64,
    /// In microseconds, of the last time it was computed; 0: not enough is known.
    delay_us: AtomicU64,
    state: Mutex<State>,
}

struct State {
    recent: Recent,
    /// Until it is computed again.
    due: u32,
}

/// Fewer say nothing about the slow one in a hundred, nor in twenty.
const LEAST: usize = 20;
/// So many calls share one computation.
const EVERY: u32 = 16;
/// No hedge comes sooner (Finagle's least delay for a backup request).
const SHORTEST: Duration = Duration::from_millis(1);

impl Live {
    pub(super) fn new(quantile: f64) -> Self {
        let state = State { recent: Recent::new(), due: 0 };
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
        if !state.recent.add(time) && state.due > 0 {
            state.due -= 1;
            return;
        }
        let (count, delay) = state.recent.quantile(self.quantile);
        let delay = delay.filter(|_| count >= LEAST);
        state.due = if delay.is_some() { EVERY } else { 0 };
        let us = delay.map_or(0, |delay| ((delay * 1e6) as u64).max(1));
        self.delay_us.store(us, Ordering::Relaxed);
    }
}
