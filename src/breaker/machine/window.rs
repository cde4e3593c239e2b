//! The windows in which ratio rules count calls: the last calls, or the last stretch of time.
//!
//! # Count windows
//!
//! A [`CountWindow`] is a ring with one bit per call. It is part of the machine, and the lock of the circuit protects
//! it.
//!
//! # Time windows
//!
//! A [`TimeWindow`] divides time into *stretches*, each a tenth of the window. A ring of [`BUCKETS`] counters holds the
//! last ten stretches: stretch `n` is counted in the bucket `n % BUCKETS`. The window slides by one stretch at a time.
//! `newest` is the number of the newest stretch that has a bucket. The cost and the size of a window do not depend on
//! the number of calls.
//!
//! A good call is counted without the lock: it loads `newest`, reads the clock, and adds 1 to the bucket of `newest`.
//! If the clock is already in a later stretch, the caller locks the circuit, calls [`TimeWindow::advance`] and tries
//! again. All other operations require the lock.
//!
//! ## Orderings
//!
//! - `advance` stores zeros in the buckets that it reuses, and then `newest` with `Release`. `record_good` loads
//!   `newest` with `Acquire`. Therefore a call that loads the new stretch adds to its bucket after the zero, and this
//!   `advance` cannot erase the addition of that call.
//! - The additions are `Relaxed` read-modify-write operations. None is lost, because each of them applies to the latest
//!   value of the bucket. The count of calls and the count of bad calls share one word, so a reader never sees one
//!   without the other.
//! - A thread that is suspended between the load of `newest` and the addition may add to a bucket that has been reused
//!   or cleared since. Its call is then counted in a later stretch, or after a state change. It is a good call, so it
//!   cannot open the circuit.
//!
//! ## Overflow
//!
//! The lower 32 bits of a bucket count calls, the upper 32 bits count bad calls. A carry would corrupt the upper half.
//! Good calls are no longer counted from [`SATURATION`], and calls under the lock from one and a half times that value.
//! The rest of the range is a margin for additions that run at the same time.
//!
//! ## What a change must preserve
//!
//! - Only the holder of the lock stores to a bucket or to `newest`. Only additions run without the lock.
//! - Only good calls are counted without the lock: a bad call may have to open the circuit.
//! - `newest` never decreases. If the clock goes back, calls are counted in the newest stretch.
//!
//! `loom_window_rotation_loses_nothing` in the models of `sync_machine` checks an addition against a rotation.

use std::{array, time::Duration};

use crate::{
    sync::modelled::atomic::{AtomicU64, Ordering},
    time::{Nanos, nanos},
};

/// The number of calls in a window, and the number of these that were bad: failed, or slow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) calls: u64,
    pub(crate) bad: u64,
}

// ===== The last calls =====

/// A ring of bits, one per call, set if the call was bad. Requires the lock of the circuit.
#[derive(Clone, Debug)]
pub(crate) struct CountWindow {
    bits: Box<[u64]>,
    length: u32,
    next: u32,
    tally: Tally,
}

impl CountWindow {
    pub(crate) fn new(length: u32) -> Self {
        let words = (length as usize).div_ceil(64);
        Self { bits: vec![0; words].into(), length, next: 0, tally: Tally::default() }
    }

    pub(crate) fn record(&mut self, bad: bool) {
        let (word, bit) = (self.next as usize / 64, 1 << (self.next % 64));
        if self.tally.calls == u64::from(self.length) {
            // The ring is full, so this call replaces the oldest.
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

    pub(crate) fn tally(&self) -> Tally {
        self.tally
    }

    /// Returns whether the window is full of good calls. A further good call does not change it.
    pub(crate) fn is_clean(&self) -> bool {
        self.tally.bad == 0 && self.tally.calls == u64::from(self.length)
    }

    pub(crate) fn clear(&mut self) {
        self.bits.fill(0);
        (self.next, self.tally) = (0, Tally::default());
    }

    /// Replaces the contents by a tally of another window. Keeps the share of bad calls if the tally has more calls
    /// than this window holds. The bad calls count as the newest.
    pub(crate) fn restore(&mut self, tally: Tally) {
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

/// The number of buckets of a time window.
const BUCKETS: u64 = 10;

const ONE_CALL: u64 = 1;
const ONE_BAD: u64 = 1 << 32;
/// The count of a bucket from which good calls are no longer counted: half of the maximum.
const SATURATION: u32 = u32::MAX / 2;

/// With a coarse clock, a good call reads the clock if these bits of the bucket's count are zero: one call in 16.
const COARSE: u32 = 15;

/// The calls of the last [`BUCKETS`] stretches of time. Good calls are counted without the lock; all other operations
/// require the lock of the circuit.
#[derive(Debug)]
pub(crate) struct TimeWindow {
    stretch: Nanos,
    /// The bits of a bucket's count that are zero if a good call must read the clock. 0: each good call reads it.
    skips: u32,
    /// The number of the newest stretch, counted from the beginning of the circuit's time.
    newest: AtomicU64,
    /// `bad << 32 | calls` of each stretch.
    buckets: [AtomicU64; BUCKETS as usize],
}

impl TimeWindow {
    pub(crate) fn new(length: Duration, coarse: bool) -> Self {
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

    /// Counts a good call without the lock. Returns `false` if a new stretch has begun: the caller must lock the
    /// circuit and [`advance`](Self::advance) the window first.
    #[inline]
    pub(crate) fn record_good(&self, now: impl FnOnce() -> Nanos) -> bool {
        let newest = self.newest.load(Ordering::Acquire);
        let bucket = self.bucket(newest);
        let calls = bucket.load(Ordering::Relaxed) as u32;
        if calls & self.skips == 0 && now() / self.stretch > newest {
            return false;
        }
        if calls < SATURATION {
            bucket.fetch_add(ONE_CALL, Ordering::Relaxed);
        }
        true
    }

    /// Counts a call. Requires the lock.
    pub(crate) fn record(&self, bad: bool, now: Nanos) {
        self.advance(now);
        let bucket = self.bucket(self.newest.load(Ordering::Relaxed));
        let one = if bad { ONE_CALL | ONE_BAD } else { ONE_CALL };
        if (bucket.load(Ordering::Relaxed) as u32) < u32::MAX - SATURATION / 2 {
            bucket.fetch_add(one, Ordering::Relaxed);
        }
    }

    /// Returns the calls in the window. Requires the lock.
    pub(crate) fn tally(&self, now: Nanos) -> Tally {
        self.advance(now);
        self.sum()
    }

    /// Removes all calls. Requires the lock.
    pub(crate) fn clear(&self) {
        for bucket in &self.buckets {
            bucket.store(0, Ordering::Relaxed);
        }
    }

    /// Replaces the contents by a tally of another window, in the newest stretch. Requires the lock.
    pub(crate) fn restore(&self, tally: Tally, now: Nanos) {
        self.clear();
        self.advance(now);
        let capped = |count: u64| count.min(u64::from(SATURATION));
        let bucket = self.bucket(self.newest.load(Ordering::Relaxed));
        bucket.store(capped(tally.bad) << 32 | capped(tally.calls), Ordering::Relaxed);
    }

    fn sum(&self) -> Tally {
        self.buckets.iter().fold(Tally::default(), |sum, bucket| {
            let bucket = bucket.load(Ordering::Relaxed);
            Tally { calls: sum.calls + u64::from(bucket as u32), bad: sum.bad + (bucket >> 32) }
        })
    }

    /// Removes the stretches that have left the window. Requires the lock. Does nothing if the clock has gone back.
    pub(crate) fn advance(&self, now: Nanos) {
        let newest = self.newest.load(Ordering::Relaxed);
        let stretch = now / self.stretch;
        if stretch <= newest {
            return;
        }
        for gone in newest + 1..=stretch.min(newest + BUCKETS) {
            self.bucket(gone).store(0, Ordering::Relaxed);
        }
        // After the zeros: from here on other threads add to the bucket.
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
        /// Compares the window with a list of all calls, cut at the same stretches.
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

        /// With a coarse clock, up to 15 good calls leave early. No call stays too long, and each bad call is exact.
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

        /// Compares the window with a list of the last calls.
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
