//! What the rules look back on: the last so many calls, or the last stretch of time. Both exact.

use std::{array, time::Duration};

use crate::call::{
    Nanos, nanos,
    sync::atomic::{AtomicU64, Ordering},
};

/// How many calls, and how many of them were bad: failed, or slow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) calls: u64,
    pub(super) bad: u64,
}

// ===== The last so many calls =====

/// A ring of bits: one a call, set where it was bad. Kept under the circuit's lock.
#[derive(Clone, Debug)]
pub(super) struct CountWindow {
    bits: Box<[u64]>,
    length: u32,
    next: u32,
    tally: Tally,
}

impl CountWindow {
    pub(super) fn new(length: u32) -> Self {
        let words = (length as usize).div_ceil(64);
        Self { bits: vec![0; words].into(), length, next: 0, tally: Tally::default() }
    }

    pub(super) fn record(&mut self, bad: bool) {
        let (word, bit) = (self.next as usize / 64, 1 << (self.next % 64));
        if self.tally.calls == u64::from(self.length) {
            // The oldest leaves.
            self.tally.bad -= u64::from(self.bits[word] & bit != 0);
        } else {
            self.tally.calls += 1;
        }
        self.tally.bad += u64::from(bad);
        if bad {
            self.bits[word] |= bit;
        } else {
            self.bits[word] &= !bit;
        }
        self.next = if self.next + 1 == self.length { 0 } else { self.next + 1 };
    }

    pub(super) fn tally(&self) -> Tally {
        self.tally
    }

    /// Full of good calls: one more changes nothing, for they are all alike.
    pub(super) fn is_clean(&self) -> bool {
        self.tally.bad == 0 && self.tally.calls == u64::from(self.length)
    }

    pub(super) fn clear(&mut self) {
        self.bits.fill(0);
        (self.next, self.tally) = (0, Tally::default());
    }

    /// Takes up what was counted elsewhere: as many calls as it holds, as large a share of them bad, and
    /// those the newest.
    pub(super) fn restore(&mut self, tally: Tally) {
        self.clear();
        let calls = tally.calls.min(u64::from(self.length));
        let bad = match tally.calls {
            0 => 0,
            all => (u128::from(tally.bad) * u128::from(calls)).div_ceil(u128::from(all)) as u64,
        };
        (0..calls).for_each(|nth| self.record(nth >= calls.saturating_sub(bad)));
    }
}

// ===== The last stretch of time =====

/// How many buckets a time window is cut into: the oldest tenth leaves at once.
const BUCKETS: u64 = 10;

const ONE_CALL: u64 = 1;
const ONE_BAD: u64 = 1 << 32;
/// Half of what a bucket can count. Beyond, good calls are no longer counted in it.
const PLENTY: u32 = u32::MAX / 2;

/// Of so many good calls in a bucket, the first looks at the clock where that is coarse; less one.
const COARSE: u32 = 15;

/// Calls of the last `BUCKETS` stretches of time. A good call is one addition, without the lock, as long as
/// its stretch has begun; everything else happens under the circuit's lock. Its cost and size do not depend
/// on how many calls are in it.
#[derive(Debug)]
pub(super) struct TimeWindow {
    stretch: Nanos,
    /// The bits of a bucket's count that are zero where a good call has to look at the clock.
    skips: u32,
    /// The number of the newest stretch since the beginning of time.
    newest: AtomicU64,
    /// `bad << 32 | calls` of each stretch.
    buckets: [AtomicU64; BUCKETS as usize],
}

impl TimeWindow {
    pub(super) fn new(length: Duration, coarse: bool) -> Self {
        Self {
            stretch: (nanos(length) / BUCKETS).max(1),
            skips: if coarse { COARSE } else { 0 },
            newest: AtomicU64::new(0),
            buckets: array::from_fn(|_| AtomicU64::new(0)),
        }
    }

    fn bucket(&self, stretch: u64) -> &AtomicU64 {
        &self.buckets[(stretch % BUCKETS) as usize]
    }

    /// Counts a good call without the lock. False: a new stretch has begun, and somebody has to take the
    /// lock and [`advance`](Self::advance) first.
    #[inline]
    pub(super) fn record_good(&self, now: impl FnOnce() -> Nanos) -> bool {
        let newest = self.newest.load(Ordering::Acquire);
        let bucket = self.bucket(newest);
        let calls = bucket.load(Ordering::Relaxed) as u32;
        if calls & self.skips == 0 && now() / self.stretch > newest {
            return false;
        }
        if calls < PLENTY {
            bucket.fetch_add(ONE_CALL, Ordering::Relaxed);
        }
        true
    }

    /// Under the lock: counts a call.
    pub(super) fn record(&self, bad: bool, now: Nanos) {
        self.advance(now);
        let bucket = self.bucket(self.newest.load(Ordering::Relaxed));
        let one = if bad { ONE_CALL | ONE_BAD } else { ONE_CALL };
        if (bucket.load(Ordering::Relaxed) as u32) < u32::MAX - PLENTY / 2 {
            bucket.fetch_add(one, Ordering::Relaxed);
        }
    }

    /// Under the lock: what the window holds.
    pub(super) fn tally(&self, now: Nanos) -> Tally {
        self.advance(now);
        self.sum()
    }

    /// Under the lock.
    pub(super) fn clear(&self) {
        for bucket in &self.buckets {
            bucket.store(0, Ordering::Relaxed);
        }
    }

    /// Under the lock: puts what was counted elsewhere into the newest stretch.
    pub(super) fn restore(&self, tally: Tally, now: Nanos) {
        self.clear();
        self.advance(now);
        let capped = |count: u64| count.min(u64::from(PLENTY));
        let bucket = self.bucket(self.newest.load(Ordering::Relaxed));
        bucket.store(capped(tally.bad) << 32 | capped(tally.calls), Ordering::Relaxed);
    }

    fn sum(&self) -> Tally {
        self.buckets.iter().fold(Tally::default(), |sum, bucket| {
            let bucket = bucket.load(Ordering::Relaxed);
            Tally { calls: sum.calls + u64::from(bucket as u32), bad: sum.bad + (bucket >> 32) }
        })
    }

    /// Under the lock: forgets the stretches that have left the window. Time that goes back stands still.
    pub(super) fn advance(&self, now: Nanos) {
        let newest = self.newest.load(Ordering::Relaxed);
        let stretch = now / self.stretch;
        if stretch <= newest {
            return;
        }
        for gone in newest + 1..=stretch.min(newest + BUCKETS) {
            self.bucket(gone).store(0, Ordering::Relaxed);
        }
        // Only now may others count into it.
        self.newest.store(stretch, Ordering::Release);
    }
}

#[cfg(all(test, not(buttress_loom)))]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    fn of(list: &VecDeque<(u64, bool)>) -> Tally {
        let bad = list.iter().filter(|(_, bad)| *bad).count() as u64;
        Tally { calls: list.len() as u64, bad }
    }

    proptest! {
        /// Against the plain list of all calls, cut at the same stretches.
        #[test]
        fn time_holds_what_a_list_of_calls_holds(
            steps in prop::collection::vec((0u64..400, any::<bool>()), 1..300),
        ) {
            let window = TimeWindow::new(Duration::from_nanos(1000), false);
            let mut list = VecDeque::new();
            let mut now = 0;
            for (pause, bad) in steps {
                now += pause;
                list.push_back((now / 100, bad));
                list.retain(|(stretch, _)| stretch + BUCKETS > now / 100);
                if bad || !window.record_good(|| now) {
                    window.record(bad, now);
                }
                prop_assert_eq!(window.tally(now), of(&list));
            }
        }

        /// Where the clock is coarse, up to 15 good calls leave early; none stays too long, and no bad one
        /// goes astray.
        #[test]
        fn coarse_time_forgets_few_too_early_and_none_too_late(
            steps in prop::collection::vec((0u64..40, prop::bool::weighted(0.02)), 1..300),
        ) {
            let window = TimeWindow::new(Duration::from_nanos(1000), true);
            let mut list = VecDeque::new();
            let mut now = 0;
            let last = steps.len() - 1;
            for (nth, (pause, bad)) in steps.into_iter().enumerate() {
                now += pause;
                list.push_back((now / 100, bad));
                list.retain(|(stretch, _)| stretch + BUCKETS > now / 100);
                if bad || !window.record_good(|| now) {
                    window.record(bad, now);
                }
                if bad || nth == last {
                    let (coarse, exact) = (window.tally(now), of(&list));
                    prop_assert_eq!(coarse.bad, exact.bad);
                    prop_assert!(coarse.calls <= exact.calls && exact.calls <= coarse.calls + 15);
                }
            }
        }

        /// Against the plain list of the last so many.
        #[test]
        fn count_holds_what_a_list_of_calls_holds(
            length in 1u32..200,
            calls in prop::collection::vec(prop::bool::weighted(0.3), 1..500),
        ) {
            let mut window = CountWindow::new(length);
            let mut list = VecDeque::new();
            for bad in calls {
                list.push_back((0, bad));
                if list.len() > length as usize {
                    list.pop_front();
                }
                window.record(bad);
                prop_assert_eq!(window.tally(), of(&list));
                let clean = list.len() == length as usize && of(&list).bad == 0;
                prop_assert_eq!(window.is_clean(), clean);
            }
        }
    }

    #[test]
    fn a_clock_that_jumps_back_or_far_ahead_loses_nothing_and_panics_never() {
        let window = TimeWindow::new(Duration::from_nanos(1000), false);
        window.record(true, 5000);
        window.record(true, 10);
        assert_eq!(window.tally(10).calls, 2);
        assert!(window.record_good(|| 10), "counted in the newest stretch");
        assert_eq!(window.tally(u64::MAX).calls, 0);
        window.record(false, 0);
        assert_eq!(window.tally(0).calls, 1);
    }
}
