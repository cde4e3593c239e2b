//! The priority threshold. The module does no I/O and takes the time as an argument; the lock of the limit protects
//! it.

use std::time::Duration;

use tokio::time::Instant;

use super::class::{PRIORITIES, Priority};

/// A priority below which calls are rejected. It moves once per window, so that the other calls just find permits.
///
/// The windows and the histogram are those of DAGOR (Zhou et al., SoCC 2018). Unlike there, the threshold does not move
/// in steps: it is the priority at or above which as many calls arrived as the limit admitted.
pub(crate) struct PriorityThreshold {
    /// The calls of this window by priority.
    arrived: Box<[u32; PRIORITIES]>,
    /// The number of calls of this window.
    total: u32,
    /// The number of admitted calls of this window.
    admitted: u32,
    /// The number of calls of this window that were rejected because no permit was free, although the threshold let
    /// them pass.
    no_room: u32,
    /// The threshold; 0 is none.
    threshold: u16,
    /// The share of additional calls to admit after a window in which nearly all calls at or above the threshold found
    /// permits.
    growth: f64,
    /// The start of the window.
    since: Option<Instant>,
}

const WINDOW: Duration = Duration::from_secs(1);
/// The number of calls with which a window ends early.
const MAX_CALLS: u32 = 2000;
/// The minimum number of calls in a window; with fewer there is no threshold.
const MIN_CALLS: u32 = 20;
/// The share of the calls at or above the threshold that may find no permit without raising the threshold.
const MAX_NO_ROOM: f64 = 0.05;
/// The initial value of `growth`.
const MIN_GROWTH: f64 = 0.02;

impl PriorityThreshold {
    pub(crate) fn new() -> Self {
        Self {
            arrived: Box::new([0; PRIORITIES]),
            total: 0,
            admitted: 0,
            no_room: 0,
            threshold: 0,
            growth: MIN_GROWTH,
            since: None,
        }
    }

    /// Records the arrival of a call. Returns whether its priority is at or above the threshold.
    pub(crate) fn record_arrival(&mut self, priority: Priority, now: Instant) -> bool {
        let since = *self.since.get_or_insert(now);
        if self.total >= MAX_CALLS || now.saturating_duration_since(since) >= WINDOW {
            self.advance();
            self.since = Some(now);
        }
        self.total += 1;
        self.arrived[usize::from(priority.number())] += 1;
        priority.number() >= self.threshold
    }

    /// Records an admitted call.
    pub(crate) fn record_admission(&mut self) {
        self.admitted += 1;
    }

    /// Records a call that was rejected because no permit was free, although the threshold let it pass.
    pub(crate) fn record_no_room(&mut self) {
        self.no_room += 1;
    }

    /// Returns the threshold, if there is one.
    pub(crate) fn get(&self) -> Option<Priority> {
        (self.threshold > 0).then_some(Priority::numbered(self.threshold))
    }

    /// Ends the window and computes the threshold of the next one.
    fn advance(&mut self) {
        let admitted = f64::from(self.admitted);
        self.threshold = if self.total < MIN_CALLS {
            0
        } else if f64::from(self.no_room) > MAX_NO_ROOM * (admitted + f64::from(self.no_room)) {
            self.growth = MIN_GROWTH;
            self.priority_for(admitted)
        } else {
            let growth = self.growth;
            self.growth = (growth * 2.0).min(1.0);
            self.priority_for(admitted * (1.0 + growth) + 1.0).min(self.threshold)
        };
        if self.threshold == 0 {
            self.growth = MIN_GROWTH;
        }
        self.arrived.fill(0);
        (self.total, self.admitted, self.no_room) = (0, 0, 0);
    }

    /// Returns the highest priority at or above which this number of calls arrived in the window; 0 if fewer arrived.
    fn priority_for(&self, calls: f64) -> u16 {
        let mut above = 0.0;
        for priority in (0..PRIORITIES).rev() {
            above += f64::from(self.arrived[priority]);
            if above > 0.0 && above >= calls {
                return priority as u16;
            }
        }
        0
    }
}

impl std::fmt::Debug for PriorityThreshold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PriorityThreshold")
            .field("threshold", &self.threshold)
            .finish_non_exhaustive()
    }
}
