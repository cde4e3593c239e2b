//! The record of a retried call, for metrics.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use super::settings::RetrySettings;

/// The retries of one call. The drop records them: when the call has a result, or when its future is dropped.
pub(super) struct RetriedCall {
    settings: Arc<RetrySettings>,
    retries: u32,
    /// The time without an attempt in flight, without the current delay.
    delay: Duration,
    /// The start of the current delay.
    since: Option<Instant>,
}

impl RetriedCall {
    pub(super) fn new(settings: Arc<RetrySettings>) -> Self {
        Self { settings, retries: 0, delay: Duration::ZERO, since: None }
    }

    pub(super) fn begin_delay(&mut self, now: Instant) {
        self.since = Some(now);
    }

    /// Records that an attempt begins.
    pub(super) fn begin_attempt(&mut self) {
        self.end_delay();
        self.retries += 1;
    }

    fn end_delay(&mut self) {
        let delay = self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
        self.delay = self.delay.saturating_add(delay);
    }
}

impl Drop for RetriedCall {
    fn drop(&mut self) {
        if self.retries > 0 {
            self.end_delay();
            self.settings.counters.record_retried_call(self.retries, self.delay);
        }
    }
}
