use http::Extensions;
use tokio::time::{Duration, Instant};

/// When the caller needs its answer: put into a request's extensions, for every layer further in.
///
/// Nothing is begun, waited for or tried again that would not end before it, and a retry ends an attempt that has no
/// response head by then. Any call that is under way is ended by a `TimeoutLayer` or a `DeadlineLayer` (feature
/// `timeout`), which also sets it and tells it the next hop. On tokio's clock.
///
/// ```
/// use std::time::Duration;
/// use buttress::Deadline;
///
/// let mut request = http::Request::new(());
/// request.extensions_mut().insert(Deadline::after(Duration::from_secs(2)));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Deadline(pub Instant);

impl Deadline {
    /// So long from now. One that no clock reaches is thirty years away.
    #[must_use]
    pub fn after(time: Duration) -> Self {
        Self::after_from(time, Instant::now())
    }

    pub(crate) fn after_from(time: Duration, now: Instant) -> Self {
        const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 3600);
        Self(now.checked_add(time).or_else(|| now.checked_add(FAR)).unwrap_or(now))
    }

    /// How long is left; zero when it is over.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// What a request carries.
    #[must_use]
    pub fn of(extensions: &Extensions) -> Option<Self> {
        extensions.get().copied()
    }
}

/// Whether an answer would come too late, however quick.
#[inline]
pub(crate) fn has_passed(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|deadline| deadline <= Instant::now())
}
