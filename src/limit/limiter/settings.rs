//! The settings of a limiter, and what its handle reads.

use super::*;

impl Limiter {
    // ===== Settings =====

    /// Sets the limit. A higher limit admits waiting calls at once; a lower one takes effect as calls end. Returns
    /// `None` if the algorithm of an adaptive limit panicked: then the limit keeps its value.
    pub(crate) fn set_limit(&self, limit: u32) -> Option<()> {
        let set = match &self.adaptive {
            None => {
                self.store(limit);
                Some(())
            }
            Some(adaptive) => adaptive.set_limit(limit, |limit| self.store(limit)),
        };
        self.hand_over();
        set
    }

    /// Sets the bounds of an adaptive limit. Returns whether there are bounds, or `None` if the algorithm panicked:
    /// then the limit keeps its value.
    pub(crate) fn set_bounds(&self, bounds: RangeInclusive<u32>) -> Option<bool> {
        let Some(adaptive) = &self.adaptive else { return Some(false) };
        let has_any = adaptive.set_bounds(bounds, |limit| self.store(limit));
        self.hand_over();
        has_any
    }

    pub(crate) fn adaptive(&self) -> Option<&Teller> {
        self.adaptive.as_ref()
    }

    pub(crate) fn set_queue(&self, length: u32, longest_wait: Duration) {
        let ms = u64::try_from(longest_wait.as_millis()).unwrap_or(u64::MAX);
        self.longest_wait_ms.store(ms, Ordering::Relaxed);
        self.longest_queue.store(length, Ordering::Relaxed);
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

    pub(crate) fn longest_wait(&self) -> Duration {
        Duration::from_millis(self.longest_wait_ms.load(Ordering::Relaxed))
    }

    pub(crate) fn set_retry_after(&self, after: Duration) {
        let ms = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
        self.retry_after_ms.store(ms, Ordering::Relaxed);
    }

    pub(crate) fn release_at_head(&self) {
        self.to_the_head_only.store(true, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn releases_at_head(&self) -> bool {
        self.to_the_head_only.load(Ordering::Relaxed)
    }

    // ===== Snapshots =====

    pub(crate) fn in_flight(&self) -> u32 {
        in_flight(self.word.load(Ordering::Acquire))
    }

    pub(crate) fn waiting(&self) -> u32 {
        waiting(self.word.load(Ordering::Acquire))
    }

    /// Returns the number of calls admitted in shadow mode that would have been rejected.
    pub(crate) fn shadowed(&self) -> u64 {
        self.counts.shadowed.load(Ordering::Relaxed)
    }

    /// Returns the time that this share of the recent waits did not exceed. `None` if no call waited.
    pub(crate) fn wait(&self, share: f64) -> Option<Duration> {
        self.lock().waits.percentile(share, Instant::now())
    }

    /// Returns the number of rejections of this kind.
    pub(crate) fn refused(&self, kind: RejectedKind) -> u64 {
        self.counter(kind).load(Ordering::Relaxed)
    }
}
