use std::time::Duration;

use tokio::time::Instant;

/// Nanoseconds since a state began: what pure state machines are told.
pub(crate) type Nanos = u64;

/// The clock of one layer's state: tokio's, so that tests can pause it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    began: Instant,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self { began: Instant::now() }
    }

    /// Never goes back, and never panics: before the beginning is the beginning.
    #[inline]
    pub(crate) fn now(&self) -> Nanos {
        nanos(Instant::now().saturating_duration_since(self.began))
    }
}

/// 584 years fit; what does not is for ever.
#[inline]
pub(crate) fn nanos(duration: Duration) -> Nanos {
    let seconds = duration.as_secs().saturating_mul(1_000_000_000);
    seconds.saturating_add(u64::from(duration.subsec_nanos()))
}
