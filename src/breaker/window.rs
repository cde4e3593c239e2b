use std::time::Duration;

use crate::call::{Nanos, nanos};

/// How many buckets a time window is cut into: the oldest tenth leaves at once.
const BUCKETS: usize = 10;

/// Calls and failures of the last `BUCKETS` stretches of time, exactly.
///
/// Its cost and size do not depend on how many calls are in it.
#[derive(Clone, Debug)]
pub(super) struct TimeWindow {
    stretch: Nanos,
    /// The number of the newest stretch since the beginning of time.
    newest: u64,
    buckets: [Tally; BUCKETS],
    sum: Tally,
}

/// How many calls, and how many of them failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) calls: u64,
    pub(super) failures: u64,
}

impl TimeWindow {
    pub(super) fn new(length: Duration) -> Self {
        Self {
            stretch: (nanos(length) / BUCKETS as u64).max(1),
            newest: 0,
            buckets: [Tally::default(); BUCKETS],
            sum: Tally::default(),
        }
    }

    /// Counts a call and tells what the window holds with it.
    pub(super) fn record(&mut self, failed: bool, now: Nanos) -> Tally {
        self.advance(now);
        for tally in [&mut self.buckets[self.newest as usize % BUCKETS], &mut self.sum] {
            tally.calls += 1;
            tally.failures += u64::from(failed);
        }
        self.sum
    }

    /// What the window holds.
    pub(super) fn tally(&mut self, now: Nanos) -> Tally {
        self.advance(now);
        self.sum
    }

    pub(super) fn clear(&mut self) {
        self.buckets = Default::default();
        self.sum = Tally::default();
    }

    /// Forgets the stretches that have left the window. Time that goes back stands still.
    fn advance(&mut self, now: Nanos) {
        let stretch = now / self.stretch;
        if stretch <= self.newest {
            return;
        }
        if stretch - self.newest >= BUCKETS as u64 {
            self.clear();
        } else {
            for gone in self.newest + 1..=stretch {
                let bucket = std::mem::take(&mut self.buckets[gone as usize % BUCKETS]);
                self.sum.calls -= bucket.calls;
                self.sum.failures -= bucket.failures;
            }
        }
        self.newest = stretch;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against the plain list of all calls, cut at the same stretches.
        #[test]
        fn holds_what_a_list_of_calls_holds(
            steps in prop::collection::vec((0u64..400, any::<bool>()), 1..300),
        ) {
            let mut window = TimeWindow::new(Duration::from_nanos(1000));
            let mut list = VecDeque::new();
            let mut now = 0;
            for (pause, failed) in steps {
                now += pause;
                list.push_back((now / 100, failed));
                list.retain(|(stretch, _)| stretch + BUCKETS as u64 > now / 100);
                let model = Tally {
                    calls: list.len() as u64,
                    failures: list.iter().filter(|(_, failed)| *failed).count() as u64,
                };
                prop_assert_eq!(window.record(failed, now), model);
            }
        }
    }

    #[test]
    fn a_clock_that_jumps_back_or_far_ahead_loses_nothing_and_panics_never() {
        let mut window = TimeWindow::new(Duration::from_nanos(1000));
        window.record(true, 5000);
        assert_eq!(window.record(true, 10).calls, 2);
        assert_eq!(window.tally(u64::MAX).calls, 0);
        assert_eq!(window.record(false, 0).calls, 1);
    }
}
