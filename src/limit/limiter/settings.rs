//! The settings of a limiter, and what its handle reads.

use std::ops::RangeInclusive;

use super::*;
use crate::limit::queue::QueueOrder;

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Limiter {
    // ===== Settings =====

    /// Sets the limit. A higher limit admits waiting calls at once; a lower one takes effect as calls end. Returns
    /// `None` if the algorithm of an adaptive limit panicked: then the limit keeps its value.
    pub(crate) fn set_limit(&self, limit: u32) -> Option<()> {
        let set = match &self.adaptive {
            None => {
                Some(LimitStep { from: self.store(limit), limit, reason: ChangeReason::ByHand })
            }
            Some(adaptive) => adaptive.set_limit(self.name(), limit, |limit| self.store(limit)),
        };
        self.grant_next();
        self.notify_of(set?);
        Some(())
    }

    /// Sets the bounds of an adaptive limit. Returns whether there are bounds, or `None` if the algorithm panicked:
    /// then the limit keeps its value.
    pub(crate) fn set_bounds(&self, bounds: RangeInclusive<u32>) -> Option<bool> {
        let Some(adaptive) = &self.adaptive else { return Some(false) };
        let set = adaptive.set_bounds(self.name(), bounds, |limit| self.store(limit));
        self.grant_next();
        let (has_any, step) = set?;
        if let Some(step) = step {
            self.notify_of(step);
        }
        Some(has_any)
    }

    pub(crate) fn adaptive(&self) -> Option<&Sampler> {
        self.adaptive.as_ref()
    }

    pub(crate) fn set_queue(&self, length: u32, max_wait: Duration) {
        self.max_wait_ms.store(millis(max_wait), Ordering::Relaxed);
        self.max_queue.store(length, Ordering::Relaxed);
    }

    pub(crate) fn set_order(&self, order: QueueOrder) {
        self.lock().set_order(order);
    }

    pub(crate) fn set_shadow(&self, on: bool) {
        self.shadow.store(on, Ordering::Relaxed);
    }

    pub(crate) fn set_exempts_health(&self, on: bool) {
        self.exempts_health.store(on, Ordering::Relaxed);
    }

    pub(crate) fn max_wait(&self) -> Duration {
        Duration::from_millis(self.max_wait_ms.load(Ordering::Relaxed))
    }

    pub(crate) fn set_retry_after(&self, after: Duration) {
        self.retry_after_ms.store(millis(after), Ordering::Relaxed);
    }

    pub(super) fn retry_after(&self) -> Duration {
        Duration::from_millis(self.retry_after_ms.load(Ordering::Relaxed))
    }

    pub(crate) fn set_release_at_head(&self, on: bool) {
        self.word().set_release_at_head(on);
    }

    pub(crate) fn set_max_unread(&self, max: Option<Duration>) {
        self.word().readers.set_max(max);
    }

    /// Sets the name in rejections and events. Only the first name takes effect, because it is read without a lock.
    pub(crate) fn set_name(&self, name: &str) {
        self.label.set(name);
    }

    // ===== Services of several clones of a layer =====

    /// Records that a layer has built a service with this limiter.
    pub(crate) fn set_in_use(&self) {
        if !self.is_in_use() {
            self.is_in_use.store(true, Ordering::Relaxed);
        }
    }

    pub(crate) fn is_in_use(&self) -> bool {
        self.is_in_use.load(Ordering::Relaxed)
    }

    /// Returns a limiter with the same settings and without calls. `None` if the algorithm of an adaptive limit
    /// panicked.
    pub(crate) fn fork(&self) -> Option<Self> {
        let adaptive = match &self.adaptive {
            Some(adaptive) => Some(adaptive.fork(self.name())?),
            None => None,
        };
        let mut fork = Self::new(self.limit(), adaptive);
        fork.label = self.label.fork();
        fork.set_queue(self.max_queue.load(Ordering::Relaxed), self.max_wait());
        fork.set_retry_after(self.retry_after());
        fork.set_shadow(self.is_shadow());
        fork.set_exempts_health(self.exempts_health.load(Ordering::Relaxed));
        fork.set_release_at_head(self.word().releases_at_head());
        fork.set_max_unread(self.word().readers.max());
        let mut queue = self.lock().fork();
        queue.wait_times = fork.wait_times.clone();
        *fork.lock() = queue;
        fork.is_partitioned.store(self.is_partitioned.load(Ordering::Relaxed), Ordering::Relaxed);
        Some(fork)
    }

    // ===== Snapshots =====

    pub(crate) fn in_flight(&self) -> u32 {
        self.word().observed().in_flight()
    }

    pub(crate) fn waiting(&self) -> u32 {
        self.word().observed().waiting()
    }

    /// Returns the number of calls admitted in shadow mode that would have been rejected.
    pub(crate) fn shadowed(&self) -> u64 {
        self.counters.shadowed.load(Ordering::Relaxed)
    }

    /// Returns the number of permits of unread responses that were released.
    pub(crate) fn unread(&self) -> u64 {
        self.counters.unread.load(Ordering::Relaxed)
    }

    /// Returns the time that this share of the recent waits did not exceed. `None` if no call waited.
    pub(crate) fn wait(&self, share: f64) -> Option<Duration> {
        self.lock().waits.percentile(share, Instant::now())
    }

    /// Returns the times that calls have waited in the queue, by result.
    #[cfg(feature = "observe")]
    pub(crate) fn wait_times(&self) -> &WaitTimes {
        &self.wait_times
    }

    /// Returns the name of the limit, or an empty one.
    pub(crate) fn name(&self) -> &str {
        self.label.as_str()
    }

    /// Returns the number of rejections of this kind.
    pub(crate) fn rejected(&self, kind: RejectedKind) -> u64 {
        self.counter(kind).load(Ordering::Relaxed)
    }
}
