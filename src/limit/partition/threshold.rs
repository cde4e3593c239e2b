//! The cutoff of priorities. The module does no I/O and takes the time as an argument; the lock of the limit protects
//! it.

use std::time::Duration;

use tokio::time::Instant;

use super::class::{PRIORITIES, Priority};

/// A priority below which calls are rejected. It moves once per window, so that the other calls just find permits.
///
/// The windows and the histogram are those of DAGOR (Zhou et al., SoCC 2018). Unlike there, the cutoff does not move in
/// steps: it is the priority at or above which as many calls arrived as the limit admitted.
pub(crate) struct Cutoff {
    /// The calls of this window by priority.
    arrived: Box<[u32; PRIORITIES]>,
    /// The number of calls of this window.
    total: u32,
    /// The number of admitted calls of this window.
    entered: u32,
    /// The number of calls of this window that were rejected because no permit was free, although the cutoff let them
    /// pass.
    crowded: u32,
    /// The cutoff; 0 is none.
    cut: u16,
    /// The share of additional calls to admit after a window in which nearly all calls at or above the cutoff found
    /// permits.
    more: f64,
    /// The start of the window.
    since: Option<Instant>,
}

const WINDOW: Duration = Duration::from_secs(1);
/// The number of calls with which a window ends early.
const ENOUGH: u32 = 2000;
/// The minimum number of calls in a window; with fewer there is no cutoff.
const FEW: u32 = 20;
/// The share of the calls at or above the cutoff that may find no permit without raising the cutoff.
const BY_CHANCE: f64 = 0.05;
/// The initial value of `more`.
const MORE: f64 = 0.02;

impl Cutoff {
    pub(crate) fn new() -> Self {
        Self {
            arrived: Box::new([0; PRIORITIES]),
            total: 0,
            entered: 0,
            crowded: 0,
            cut: 0,
            more: MORE,
            since: None,
        }
    }

    /// Records the arrival of a call. Returns whether its priority is at or above the cutoff.
    pub(crate) fn hear(&mut self, priority: Priority, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        if self.total >= ENOUGH || now.saturating_duration_since(since) >= WINDOW {
            self.turn();
            self.since = Some(now);
        }
        self.total += 1;
        self.arrived[usize::from(priority.number())] += 1;
        priority.number() >= self.cut
    }

    /// Records an admitted call.
    pub(crate) fn entered(&mut self) {
        self.entered += 1;
    }

    /// Records a call that was rejected because no permit was free, although the cutoff let it pass.
    pub(crate) fn crowded(&mut self) {
        self.crowded += 1;
    }

    /// Returns the cutoff, if there is one.
    pub(crate) fn below(&self) -> Option<Priority> {
        (self.cut > 0).then_some(Priority::numbered(self.cut))
    }

    /// Ends the window and computes the cutoff of the next one.
    fn turn(&mut self) {
        let entered = f64::from(self.entered);
        self.cut = if self.total < FEW {
            0
        } else if f64::from(self.crowded) > BY_CHANCE * (entered + f64::from(self.crowded)) {
            self.more = MORE;
            self.worth(entered)
        } else {
            let more = self.more;
            self.more = (more * 2.0).min(1.0);
            self.worth(entered * (1.0 + more) + 1.0).min(self.cut)
        };
        if self.cut == 0 {
            self.more = MORE;
        }
        self.arrived.fill(0);
        (self.total, self.entered, self.crowded) = (0, 0, 0);
    }

    /// Returns the highest priority at or above which this number of calls arrived in the window; 0 if fewer arrived.
    fn worth(&self, wanted: f64) -> u16 {
        let mut above = 0.0;
        for priority in (0..PRIORITIES).rev() {
            above += f64::from(self.arrived[priority]);
            if above > 0.0 && above >= wanted {
                return priority as u16;
            }
        }
        0
    }
}

impl std::fmt::Debug for Cutoff {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cutoff").field("cut", &self.cut).finish_non_exhaustive()
    }
}
