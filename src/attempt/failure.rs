//! The kinds of failures of an attempt.

use std::fmt;

use crate::outcome::{Outcome, OutcomeKind, Reason};

/// The kind of a failure, for limits and costs. The set is closed, so that it can be the label of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FailureKind {
    /// No connection could be made.
    Connect,
    /// The server did not process the request: it was never sent, its stream was refused, or the stream id is above the
    /// last of a `GOAWAY`.
    Unseen,
    /// The connection broke: it was reset or stale, or it failed within the response.
    Read,
    /// A timeout expired.
    Timeout,
    /// The HTTP or gRPC status is a failure.
    Status,
    /// The upstream is alive but requests fewer calls: 429, 529, `RESOURCE_EXHAUSTED`.
    Throttled,
    /// An inner layer of this crate rejected the attempt.
    Rejected,
    /// Any other failure: one that a classifier reports, or an unknown error.
    Other,
}

/// A value for each failure kind, indexed by the kind.
pub(crate) type PerKind<T> = [T; 8];

impl FailureKind {
    pub(crate) fn of(outcome: Outcome) -> Self {
        if outcome.kind() == OutcomeKind::Throttled {
            return Self::Throttled;
        }
        match outcome.reason() {
            Reason::ConnectRefused | Reason::ConnectTimeout | Reason::ConnectFailed => {
                Self::Connect
            }
            Reason::NeverSent | Reason::RefusedStream | Reason::GoAway => Self::Unseen,
            Reason::StaleConnection | Reason::Reset | Reason::Body => Self::Read,
            Reason::Timeout => Self::Timeout,
            Reason::Status | Reason::GrpcStatus => Self::Status,
            Reason::Rejected => Self::Rejected,
            _ => Self::Other,
        }
    }

    /// Returns whether the server may have processed a request with this kind of failure.
    pub(crate) fn may_be_seen(self) -> bool {
        !matches!(self, Self::Connect | Self::Unseen | Self::Rejected)
    }

    /// Returns the kind in `snake_case`, as in metrics.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Unseen => "unseen",
            Self::Read => "read",
            Self::Timeout => "timeout",
            Self::Status => "status",
            Self::Throttled => "throttled",
            Self::Rejected => "rejected",
            Self::Other => "other",
        }
    }
}

impl fmt::Display for FailureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
