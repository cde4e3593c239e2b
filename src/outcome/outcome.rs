use std::{fmt, time::Duration};

/// The outcome of a call: its kind, the reason, a status code and the server's hint when to retry.
///
/// It is `Copy` and has 8 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Outcome {
    hint_ms: u32,
    code: u16,
    kind: OutcomeKind,
    reason: Reason,
}

/// The kind of an [`Outcome`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OutcomeKind {
    /// The upstream responded.
    Success,
    /// The call failed because of the upstream or of the network.
    Failure,
    /// The upstream is alive but requests fewer calls: HTTP 429 and 529, gRPC `RESOURCE_EXHAUSTED`.
    Throttled,
    /// The call carries no information about the upstream: the caller ended it, a layer rejected it, or the connection
    /// ended by [housekeeping](Outcome::is_housekeeping).
    Cancelled,
}

/// The reason for an [`Outcome`]. The set is closed, so a reason can be the label of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// The response is complete.
    Completed,
    /// The HTTP status decided. [`Outcome::code`] returns it.
    Status,
    /// The gRPC status decided, which may be mapped from the HTTP status. [`Outcome::code`] returns it.
    GrpcStatus,
    /// The connection was refused. The request was not sent.
    ConnectRefused,
    /// No connection could be made in time. The request was not sent.
    ConnectTimeout,
    /// No connection could be made, for another reason. The request was not sent.
    ConnectFailed,
    /// The client returned the request before it sent a byte of it. This is a failure if the connection broke and is
    /// known to be new, and [housekeeping](Outcome::is_housekeeping) otherwise.
    NeverSent,
    /// HTTP/2 `REFUSED_STREAM`: the server did not process the request (RFC 9113 §8.7).
    RefusedStream,
    /// HTTP/2 `GOAWAY` with a last stream below the request's: the server did not process it (RFC 9113 §6.8).
    /// A failure if the `GOAWAY` carried an error code, [housekeeping](Outcome::is_housekeeping) otherwise.
    GoAway,
    /// A reused connection broke before the response. The server may have seen the request.
    StaleConnection,
    /// The connection, or the HTTP/2 stream, was reset before the response head.
    Reset,
    /// A timeout or an operator deadline expired.
    Timeout,
    /// Any other error of the service.
    Error,
    /// The response body failed before its end.
    Body,
    /// A gRPC response with HTTP status 200 ended without a gRPC status.
    MissingStatus,
    /// The caller dropped the call.
    Dropped,
    /// The request was at fault: its body failed, stalled or was too slow, its response was not read, or the request
    /// cannot be sent as it is.
    Caller,
    /// The caller's deadline passed with the call in flight.
    CallerDeadline,
    /// The caller ended the call, by a hang-up or by its deadline, after the upstream had had the complete request for
    /// `count_cancelled_after` without sending a response head.
    NoResponse,
    /// Another attempt of the same call won, and this one was dropped.
    Superseded,
    /// The call panicked.
    Panicked,
    /// An inner layer of this crate rejected the call, which did not reach the upstream.
    Rejected,
    /// A classifier of the application decided.
    Reported,
}

impl OutcomeKind {
    /// Returns the kind in `snake_case`, for the label of a metric.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Failure => "failure",
            Self::Throttled => "throttled",
            Self::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for OutcomeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Reason {
    /// All reasons, in the order of their declaration.
    pub(crate) const ALL: [Self; 23] = [
        Self::Completed,
        Self::Status,
        Self::GrpcStatus,
        Self::ConnectRefused,
        Self::ConnectTimeout,
        Self::ConnectFailed,
        Self::NeverSent,
        Self::RefusedStream,
        Self::GoAway,
        Self::StaleConnection,
        Self::Reset,
        Self::Timeout,
        Self::Error,
        Self::Body,
        Self::MissingStatus,
        Self::Dropped,
        Self::Caller,
        Self::CallerDeadline,
        Self::NoResponse,
        Self::Superseded,
        Self::Panicked,
        Self::Rejected,
        Self::Reported,
    ];

    /// Returns the reason in `snake_case`, for the label of a metric.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Status => "status",
            Self::GrpcStatus => "grpc_status",
            Self::ConnectRefused => "connect_refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::ConnectFailed => "connect_failed",
            Self::NeverSent => "never_sent",
            Self::RefusedStream => "refused_stream",
            Self::GoAway => "go_away",
            Self::StaleConnection => "stale_connection",
            Self::Reset => "reset",
            Self::Timeout => "timeout",
            Self::Error => "error",
            Self::Body => "body",
            Self::MissingStatus => "missing_status",
            Self::Dropped => "dropped",
            Self::Caller => "caller",
            Self::CallerDeadline => "caller_deadline",
            Self::NoResponse => "no_response",
            Self::Superseded => "superseded",
            Self::Panicked => "panicked",
            Self::Rejected => "rejected",
            Self::Reported => "reported",
        }
    }

    /// Returns whether the reason states more than that the call failed.
    pub(crate) const fn is_specific(self) -> bool {
        !matches!(self, Self::Error | Self::Reported)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// `hint_ms` of an outcome without a hint.
const NO_HINT: u32 = u32::MAX;

impl Outcome {
    const fn new(kind: OutcomeKind, reason: Reason) -> Self {
        Self { hint_ms: NO_HINT, code: 0, kind, reason }
    }

    /// Returns the outcome of a call that succeeded.
    #[must_use]
    pub const fn success() -> Self {
        Self::new(OutcomeKind::Success, Reason::Completed)
    }

    /// Returns the outcome of a call that failed because of the upstream.
    #[must_use]
    pub const fn failure() -> Self {
        Self::new(OutcomeKind::Failure, Reason::Reported)
    }

    /// Returns the outcome of a call whose response requests fewer calls.
    #[must_use]
    pub const fn throttled() -> Self {
        Self::new(OutcomeKind::Throttled, Reason::Reported)
    }

    /// Returns the outcome of a call that carries no information about the upstream.
    #[must_use]
    pub const fn cancelled() -> Self {
        Self::new(OutcomeKind::Cancelled, Reason::Dropped)
    }

    /// Returns the same outcome with this reason.
    #[must_use]
    pub const fn because(mut self, reason: Reason) -> Self {
        self.reason = reason;
        self
    }

    /// Returns the same outcome with a status code. The [`reason`](Self::reason) states whether it is an HTTP or a gRPC
    /// status; with any other reason the code is ignored.
    #[must_use]
    pub const fn with_code(mut self, code: u16) -> Self {
        self.code = code;
        self
    }

    /// Returns the same outcome with the server's hint when to retry, rounded down to whole milliseconds, at most 49
    /// days.
    #[must_use]
    pub fn with_retry_after(mut self, after: Duration) -> Self {
        self.hint_ms = u32::try_from(after.as_millis()).unwrap_or(NO_HINT).min(NO_HINT - 1);
        self
    }

    /// Returns the kind.
    #[must_use]
    pub const fn kind(&self) -> OutcomeKind {
        self.kind
    }

    /// Returns the reason.
    #[must_use]
    pub const fn reason(&self) -> Reason {
        self.reason
    }

    /// Returns the HTTP or gRPC status code, if the status decided.
    #[must_use]
    pub const fn code(&self) -> Option<u16> {
        match self.reason {
            Reason::Status | Reason::GrpcStatus => Some(self.code),
            _ => None,
        }
    }

    /// Returns the server's hint: the time from its response until the earliest retry.
    #[must_use]
    pub const fn retry_after(&self) -> Option<Duration> {
        match self.hint_ms {
            NO_HINT => None,
            ms => Some(Duration::from_millis(ms as u64)),
        }
    }

    /// Returns whether the outcome is a success.
    #[must_use]
    pub const fn is_success(&self) -> bool {
        matches!(self.kind, OutcomeKind::Success)
    }

    /// Returns whether the outcome is a failure.
    #[must_use]
    pub const fn is_failure(&self) -> bool {
        matches!(self.kind, OutcomeKind::Failure)
    }

    /// Returns whether the call ended by connection housekeeping: [`Cancelled`](OutcomeKind::Cancelled) because of
    /// [`NeverSent`](Reason::NeverSent), [`RefusedStream`](Reason::RefusedStream), [`GoAway`](Reason::GoAway),
    /// [`StaleConnection`](Reason::StaleConnection) or [`Reset`](Reason::Reset).
    ///
    /// Servers and proxies close connections as a matter of routine, and a request that is on its way at that
    /// moment is lost. This carries no information about the health of the upstream. Circuit breakers,
    /// adaptive limits and budgets ignore such an outcome, and a retry repeats the request at once.
    #[must_use]
    pub const fn is_housekeeping(&self) -> bool {
        matches!(self.kind, OutcomeKind::Cancelled)
            && (self.is_unprocessed()
                || matches!(self.reason, Reason::StaleConnection | Reason::Reset))
    }

    /// Returns whether the server cannot have processed the request, although the client had a connection for it.
    const fn is_unprocessed(&self) -> bool {
        matches!(self.reason, Reason::NeverSent | Reason::RefusedStream | Reason::GoAway)
    }

    /// Returns whether the outcome proves that the upstream sent a response.
    pub(crate) const fn has_response(&self) -> bool {
        matches!(self.kind, OutcomeKind::Success | OutcomeKind::Throttled)
            || matches!(
                self.reason,
                Reason::Completed
                    | Reason::Status
                    | Reason::GrpcStatus
                    | Reason::Body
                    | Reason::MissingStatus
            )
    }
}

/// Shows the outcome on one line: `failure: status 503, retry after 30s`.
impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind, self.reason)?;
        if let Some(code) = self.code() {
            write!(f, " {code}")?;
        }
        if let Some(after) = self.retry_after() {
            write!(f, ", retry after {after:?}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}({:?}", self.kind, self.reason)?;
        if let Some(code) = self.code() {
            write!(f, " {code}")?;
        }
        if let Some(after) = self.retry_after() {
            write!(f, ", retry after {after:?}")?;
        }
        f.write_str(")")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_why_and_until_when() {
        let busy = Outcome::throttled().because(Reason::Status).with_code(429);
        let busy = busy.with_retry_after(Duration::from_secs(30));
        assert_eq!(busy.to_string(), "throttled: status 429, retry after 30s");
        assert_eq!(Outcome::cancelled().to_string(), "cancelled: dropped");
    }

    #[test]
    fn housekeeping_is_cancelled_with_one_of_five_reasons() {
        for reason in [
            Reason::NeverSent,
            Reason::RefusedStream,
            Reason::GoAway,
            Reason::StaleConnection,
            Reason::Reset,
        ] {
            assert!(Outcome::cancelled().because(reason).is_housekeeping(), "{reason}");
            assert!(!Outcome::failure().because(reason).is_housekeeping(), "{reason}");
        }
        for reason in [Reason::Dropped, Reason::Caller, Reason::Rejected, Reason::ConnectRefused] {
            assert!(!Outcome::cancelled().because(reason).is_housekeeping(), "{reason}");
        }
    }

    #[test]
    fn is_eight_bytes() {
        assert_eq!(size_of::<Outcome>(), 8);
    }

    #[test]
    fn a_hint_beyond_its_range_is_kept_at_the_end_of_it() {
        let far = Outcome::throttled().with_retry_after(Duration::MAX);
        assert_eq!(far.retry_after(), Some(Duration::from_millis(u64::from(u32::MAX - 1))));
        assert_eq!(Outcome::success().retry_after(), None);
        let now = Outcome::throttled().with_retry_after(Duration::ZERO);
        assert_eq!(now.retry_after(), Some(Duration::ZERO));
    }
}
