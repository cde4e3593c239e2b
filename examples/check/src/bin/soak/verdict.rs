//! The checks at the end.

use std::{
    fs, panic,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use buttress::limit::ConcurrencyLimitHandle;
use tokio::time::{Instant, sleep};

// ===== Panics =====

const PANIC: &str = "as was asked for";

/// Panics as a part of the test.
pub fn panics() -> ! {
    panic::panic_any(PANIC.to_owned())
}

/// Hides the panics of [`panics`], and counts all others.
pub fn expect_panics() -> Arc<AtomicUsize> {
    let surprises = Arc::new(AtomicUsize::new(0));
    let (counts, tell) = (surprises.clone(), panic::take_hook());
    panic::set_hook(Box::new(move |panicked| {
        let said = panicked.payload().downcast_ref::<String>();
        if said.is_none_or(|said| said != PANIC) {
            counts.fetch_add(1, SeqCst);
            tell(panicked);
        }
    }));
    surprises
}

// ===== Claims =====

#[derive(Default)]
pub struct Verdict {
    broken: Vec<String>,
    held: usize,
}

impl Verdict {
    pub fn that(&mut self, holds: bool, claim: String) {
        if holds {
            self.held += 1;
        } else {
            self.broken.push(claim);
        }
    }

    pub fn zero(&mut self, what: &str, value: usize) {
        self.that(value == 0, format!("{what}: {value}"));
    }

    /// Requires that something has happened at least once, so that the run has tested it.
    pub fn happened(&mut self, what: &str, times: u64) {
        self.that(times > 0, format!("{what}: never"));
    }

    /// Requires that all permits can be acquired, and no more: none was lost, and none was released twice.
    pub fn places(&mut self, whose: &str, limit: &ConcurrencyLimitHandle, all: usize) {
        let taken: Vec<_> = (0..2 * all).map_while(|_| limit.try_acquire().ok()).collect();
        self.that(taken.len() == all, format!("{whose}: {} permits of {all}", taken.len()));
    }

    pub fn tell(self) -> ExitCode {
        println!("{} claims hold", self.held);
        self.broken.iter().for_each(|claim| println!("NOT SO: {claim}"));
        if self.broken.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Waits until the condition holds, at most 10 s. The caller checks the result.
pub async fn back_to(holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() && start.elapsed() < Duration::from_secs(10) {
        sleep(Duration::from_millis(5)).await;
    }
}

// ===== Memory =====

/// The resident memory of the process in KiB over time. Empty if the system does not report it.
pub struct Memory(Vec<u64>);

impl Memory {
    /// Growth above this between the warm point and the end is reported as a leak. In a run of 4 minutes the resident
    /// memory varies between 48 and 53 MiB without a trend, since the number of unread responses varies.
    const MAX_GROWTH: u64 = 8 * 1024;

    /// Samples the memory. The warm-up is the first third of the time.
    pub async fn watch(time: Duration) -> Self {
        let (start, mut seen) = (Instant::now(), Vec::new());
        while start.elapsed() < time {
            sleep(Duration::from_millis(50)).await;
            if start.elapsed() >= time / 3 {
                seen.extend(resident());
            }
        }
        Self(seen)
    }

    pub fn judge(&self, verdict: &mut Verdict) {
        let tenth = self.0.len().div_ceil(10);
        let median = |part: &[u64]| {
            let mut part = part.to_vec();
            part.sort_unstable();
            part.get(part.len() / 2).copied()
        };
        let (warm, end) = self.0.split_at(self.0.len() - tenth);
        let Some((warm, end)) = median(&warm[..tenth.min(warm.len())]).zip(median(end)) else {
            println!("this system does not report the memory in use");
            return;
        };
        println!("memory: {warm} KiB after the warm-up, {end} KiB at the end");
        let flat = end <= warm + Self::MAX_GROWTH;
        verdict.that(flat, format!("memory grew by {} KiB", end.saturating_sub(warm)));
    }
}

fn resident() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
