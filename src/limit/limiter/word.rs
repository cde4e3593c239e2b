//! The word of a limit's slot. The layout, the invariants and the orderings are those of the [module](super).

use super::super::reader_slots::ReaderSlots;
use crate::sync::modelled::atomic::{AtomicBool, AtomicU64, Ordering};

/// The part of a limit that a call reaches without the limiter: see the [module](super).
#[derive(Debug, Default)]
pub(crate) struct LimitWord {
    counts: AtomicU64,
    /// Whether a permit is released at the response head.
    releases_at_head: AtomicBool,
    pub(in crate::limit) readers: ReaderSlots,
}

/// A value of the counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counts(u64);

const ONE_IN_FLIGHT: u64 = 1;
const ONE_WAITING: u64 = 1 << 32;
/// Set when the limiter has been dropped. It is the highest bit of the waiting count, which is zero by then, so that a
/// release detects a waiting call and an abandoned limit by one comparison.
const ABANDONED: u64 = 1 << 63;

/// The work that a release leaves to its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AfterRelease {
    /// A call waits: pass the permit on.
    GrantNext,
    /// It was the last call of an abandoned limit: recycle the slot.
    Recycle,
    Nothing,
}

impl Counts {
    pub(crate) fn in_flight(self) -> u32 {
        self.0 as u32
    }

    pub(crate) fn waiting(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// Returns whether a call may be admitted without the queue.
    pub(crate) fn has_room(self, limit: u32) -> bool {
        self.waiting() == 0 && self.in_flight() < limit
    }

    pub(crate) fn with_call(self) -> Self {
        Self(self.0 + ONE_IN_FLIGHT)
    }

    pub(crate) fn with_waiting(self) -> Self {
        Self(self.0 + ONE_WAITING)
    }

    /// Returns the counts after a waiting call has been admitted.
    pub(crate) fn with_grant(self) -> Self {
        Self(self.0 - ONE_WAITING + ONE_IN_FLIGHT)
    }
}

impl LimitWord {
    /// Initialises the word for a new limit. The reader slots stay as they are.
    pub(super) fn reset(&self) {
        self.counts.store(0, Ordering::Relaxed);
        self.set_release_at_head(false);
        self.readers.set_max(None);
        self.readers.forget_sweeper();
    }

    pub(crate) fn set_release_at_head(&self, on: bool) {
        self.releases_at_head.store(on, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn releases_at_head(&self) -> bool {
        self.releases_at_head.load(Ordering::Relaxed)
    }

    /// Returns the current counts for a decision by [`change`](Self::change), which detects an outdated value.
    #[inline]
    pub(crate) fn counts(&self) -> Counts {
        Counts(self.counts.load(Ordering::Relaxed))
    }

    /// Returns the current counts, after the writes of the calls that have ended.
    pub(crate) fn observed(&self) -> Counts {
        Counts(self.counts.load(Ordering::Acquire))
    }

    /// Acquires a permit if one is free and no call waits. Returns the number of calls in flight, this one included.
    #[inline]
    pub(super) fn try_acquire(&self, limit: impl Fn() -> u32) -> Option<u32> {
        let mut counts = self.counts();
        // A compare-exchange instead of an addition that is undone on failure, although the latter is faster under
        // contention: other calls would observe more calls in flight than there are, and be rejected.
        while counts.has_room(limit()) {
            let next = counts.with_call();
            match self.counts.compare_exchange_weak(
                counts.0,
                next.0,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(next.in_flight()),
                Err(current) => counts = Counts(current),
            }
        }
        None
    }

    /// Changes the counts, if they still are `from`. Called under the lock of the queue.
    pub(super) fn change(&self, from: Counts, to: Counts) -> Result<(), Counts> {
        let changed =
            self.counts.compare_exchange_weak(from.0, to.0, Ordering::AcqRel, Ordering::Acquire);
        changed.map(|_| ()).map_err(Counts)
    }

    /// Removes a waiting call. Called under the lock of the queue.
    pub(super) fn remove_waiting(&self) {
        self.counts.fetch_sub(ONE_WAITING, Ordering::AcqRel);
    }

    /// Releases a permit.
    #[inline]
    pub(super) fn release(&self) -> AfterRelease {
        let before = self.counts.fetch_sub(ONE_IN_FLIGHT, Ordering::AcqRel);
        if before < ONE_WAITING {
            AfterRelease::Nothing
        } else if before & ABANDONED == 0 {
            AfterRelease::GrantNext
        } else if Counts(before).in_flight() == 1 {
            AfterRelease::Recycle
        } else {
            AfterRelease::Nothing
        }
    }

    /// Marks the limit as abandoned. Returns whether no call is in flight; otherwise the release of the last call
    /// returns [`AfterRelease::Recycle`].
    pub(super) fn abandon(&self) -> bool {
        Counts(self.counts.fetch_or(ABANDONED, Ordering::AcqRel)).in_flight() == 0
    }
}
