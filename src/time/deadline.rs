use std::{
    cmp, fmt,
    hash::{Hash, Hasher},
};

use http::Extensions;
use tokio::time::{Duration, Instant};

/// The instant by which a call has to be over, carried in a request's extensions for every inner layer.
///
/// No layer begins a call, waits, or makes a further attempt that could not end before it, and a retry ends an
/// attempt that has no response head by then. A `TimeoutLayer` or a `DeadlineLayer` (feature `timeout`) ends any call
/// in flight. The latter also sets the deadline and forwards it to the next hop. The instant is on tokio's clock.
///
/// A deadline that the application makes itself replaces the default of a `DeadlineLayer`, also if it is later. No
/// header extends it, and a header of the caller can only set an earlier one.
///
/// A deadline records its [`DeadlineSource`]. A call that ends by a deadline of the *caller* is cancelled, like a
/// hang-up. A call that ends by a deadline of the *operator* has timed out, which is a failure. A handler that passes
/// its deadline on to a client passes on the source, too.
///
/// ```
/// use std::time::Duration;
/// use buttress::{Deadline, DeadlineSource};
///
/// let deadline = Deadline::after(Duration::from_secs(2));
/// assert_eq!(deadline.source(), DeadlineSource::Operator);
///
/// let mut request = http::Request::new(());
/// request.extensions_mut().insert(deadline);
/// ```
///
/// Deadlines are ordered by their instants, the earliest first.
#[derive(Clone, Copy, Debug)]
pub struct Deadline {
    at: Instant,
    source: DeadlineSource,
    /// A layer set it by its default or its maximum. Such a deadline does not replace the default of another layer.
    is_by_layer: bool,
}

impl Deadline {
    const fn key(&self) -> (Instant, DeadlineSource) {
        (self.at, self.source)
    }
}

impl PartialEq for Deadline {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Deadline {}

impl PartialOrd for Deadline {
    fn partial_cmp(&self, other: &Self) -> Option<cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Deadline {
    fn cmp(&self, other: &Self) -> cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

impl Hash for Deadline {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

/// The side that set a [`Deadline`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum DeadlineSource {
    /// The caller, by an inbound header such as `grpc-timeout`. A call that ends by it is treated like a hang-up.
    Caller,
    /// The operator of this process: a layer's default or maximum, or the application itself. A call that ends by it
    /// has timed out, which is a failure.
    Operator,
}

impl DeadlineSource {
    /// Returns the source in `snake_case`: `caller` or `operator`.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Caller => "caller",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for DeadlineSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Deadline {
    /// Returns a deadline at this instant, set by the [operator](DeadlineSource::Operator).
    #[must_use]
    pub const fn new(at: Instant) -> Self {
        Self { at, source: DeadlineSource::Operator, is_by_layer: false }
    }

    /// Returns a deadline this long from now, set by the [operator](DeadlineSource::Operator). A time beyond the
    /// range of the clock gives a deadline in thirty years.
    #[must_use]
    pub fn after(time: Duration) -> Self {
        Self::after_from(time, Instant::now())
    }

    pub(crate) fn after_from(time: Duration, now: Instant) -> Self {
        const FAR_FUTURE: Duration = Duration::from_secs(30 * 365 * 24 * 3600);
        Self::new(now.checked_add(time).or_else(|| now.checked_add(FAR_FUTURE)).unwrap_or(now))
    }

    /// Returns the same deadline with another source: for an application that reads a caller's deadline itself.
    #[must_use]
    pub const fn with_source(self, source: DeadlineSource) -> Self {
        Self { source, ..self }
    }

    /// Returns the instant.
    #[must_use]
    pub const fn at(&self) -> Instant {
        self.at
    }

    /// Returns the source: the side that set the deadline.
    #[must_use]
    pub const fn source(&self) -> DeadlineSource {
        self.source
    }

    /// Returns the time until the deadline, or zero after it.
    #[must_use]
    pub fn left(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    /// Returns the same deadline, marked as set by a layer.
    pub(crate) const fn by_layer(self) -> Self {
        Self { is_by_layer: true, ..self }
    }

    /// Returns whether the application set the deadline itself.
    pub(crate) const fn is_of_application(&self) -> bool {
        matches!(self.source, DeadlineSource::Operator) && !self.is_by_layer
    }

    /// Returns the deadline in a request's extensions.
    #[must_use]
    pub fn of(extensions: &Extensions) -> Option<Self> {
        extensions.get().copied()
    }

    /// Returns the same deadline, earlier by `time`.
    pub(crate) fn earlier_by(self, time: Duration) -> Self {
        Self { at: self.at.checked_sub(time).unwrap_or(self.at), ..self }
    }

    /// Returns the instant if the caller set it.
    pub(crate) fn of_caller(self) -> Option<Instant> {
        (self.source == DeadlineSource::Caller).then_some(self.at)
    }
}

/// The maximum time before a deadline at which an error of the inner service counts as the expiry of the deadline.
///
/// A client may set its own timer by the time left, as a tonic channel does by `grpc-timeout`. This timer may expire
/// earlier than the deadline: by less than the unit of the header, which is at most 1 ms up to 27 hours. Timers of
/// tokio round up to the next millisecond, so they add nothing to it.
pub(crate) const TIMER_MARGIN: Duration = Duration::from_millis(1);

/// Returns whether a timer that another component has set to the deadline may have expired.
pub(crate) fn may_have_expired(deadline: Instant) -> bool {
    deadline.saturating_duration_since(Instant::now()) <= TIMER_MARGIN
}

/// Returns whether the deadline has passed, so that no response could be in time.
#[inline]
pub(crate) fn has_passed(deadline: Option<Instant>) -> bool {
    deadline.is_some_and(|deadline| deadline <= Instant::now())
}
