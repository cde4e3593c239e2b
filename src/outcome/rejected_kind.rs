//! The reasons for rejections, and the phases of timeouts.

/// The reason for a rejection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RejectedKind {
    /// The circuit is open.
    Open,
    /// The circuit is half-open and all probe slots are in use.
    Probing,
    /// The circuit has closed recently and still admits only a growing share of the calls.
    Recovering,
    /// The circuit is held open by hand.
    ForcedOpen,
    /// The limit is reached, and the queue is full or there is none.
    Full,
    /// Calls of higher priority use the limit and its queue.
    Outranked,
    /// The call waited for a permit for the maximum time of the queue.
    WaitedTooLong,
    /// The deadline passed before the call began: HTTP 504, gRPC `DEADLINE_EXCEEDED`.
    DeadlinePassed,
    /// The maximum number of connections is in use, and none became free in time.
    Saturated,
    /// The call was in flight and this phase took too long: HTTP 504, or 503 from a server's timeout; gRPC
    /// `DEADLINE_EXCEEDED`.
    TimedOut(TimeoutPhase),
    /// The health probe has found the upstream to be down.
    Unhealthy,
    /// The caller has used up its quota: HTTP 429, gRPC `RESOURCE_EXHAUSTED`.
    Quota,
    /// The process is shutting down and accepts no new calls.
    ShuttingDown,
    /// A setting of the layer cannot work. The [`ConfigError`](crate::error::ConfigError) is the source of the error.
    Misconfigured,
}

impl RejectedKind {
    /// Returns the kind in `snake_case`, for the label of a metric. Problem documents contain it as `reason`, except
    /// that `misconfigured` and `circuit_forced_open` are `unavailable` there.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Open => "circuit_open",
            Self::Probing => "circuit_half_open",
            Self::Recovering => "circuit_recovering",
            Self::ForcedOpen => "circuit_forced_open",
            Self::Full => "limit_reached",
            Self::Outranked => "outranked",
            Self::WaitedTooLong => "queue_timeout",
            Self::DeadlinePassed => "deadline_passed",
            Self::Saturated => "connections_saturated",
            Self::TimedOut(TimeoutPhase::Head) => "timeout_head",
            Self::TimedOut(TimeoutPhase::FirstFrame) => "timeout_first_frame",
            Self::TimedOut(TimeoutPhase::Idle) => "timeout_response_idle",
            Self::TimedOut(TimeoutPhase::Sending) => "timeout_request_idle",
            Self::TimedOut(TimeoutPhase::Taking) => "timeout_request_stall",
            Self::TimedOut(TimeoutPhase::Total) => "timeout_total",
            Self::TimedOut(TimeoutPhase::ResponseTotal) => "timeout_response_total",
            Self::TimedOut(TimeoutPhase::Deadline) => "timeout_deadline",
            Self::TimedOut(TimeoutPhase::BodyRate) => "timeout_body_rate",
            Self::TimedOut(TimeoutPhase::Unread) => "timeout_unread",
            Self::Unhealthy => "unhealthy",
            Self::Quota => "quota_exceeded",
            Self::ShuttingDown => "shutting_down",
            Self::Misconfigured => "misconfigured",
        }
    }

    /// Returns the reason as untrusted clients may see it: without the internal state of the server.
    pub(crate) const fn public_reason(self) -> &'static str {
        match self {
            Self::Misconfigured | Self::ForcedOpen => "unavailable",
            kind => kind.as_str(),
        }
    }

    /// Returns the kind in words, for the text of an error.
    pub(crate) const fn phrase(self) -> &'static str {
        match self {
            Self::Open => "circuit is open",
            Self::Probing => "circuit is half-open and all probe slots are in use",
            Self::Recovering => "circuit is recovering",
            Self::ForcedOpen => "circuit is held open",
            Self::Full => "concurrency limit is reached",
            Self::Outranked => "calls of higher priority use the limit",
            Self::WaitedTooLong => "waited too long for a permit",
            Self::DeadlinePassed => "deadline passed before the call began",
            Self::Saturated => "no connection became free",
            Self::TimedOut(TimeoutPhase::Head) => "no response head in time",
            Self::TimedOut(TimeoutPhase::FirstFrame) => "no first frame of the body in time",
            Self::TimedOut(TimeoutPhase::Idle) => "no frame of the response body in time",
            Self::TimedOut(TimeoutPhase::Sending) => "no frame of the request body in time",
            Self::TimedOut(TimeoutPhase::Taking) => "request body was not read in time",
            Self::TimedOut(TimeoutPhase::Total) => "call took too long in total",
            Self::TimedOut(TimeoutPhase::ResponseTotal) => "response took too long in total",
            Self::TimedOut(TimeoutPhase::Deadline) => "deadline passed with the call in flight",
            Self::TimedOut(TimeoutPhase::BodyRate) => "request body is below the minimum rate",
            Self::TimedOut(TimeoutPhase::Unread) => "response was not read for too long",
            Self::Unhealthy => "upstream is unhealthy",
            Self::Quota => "quota is used up",
            Self::ShuttingDown => "shutting down",
            Self::Misconfigured => "layer is misconfigured",
        }
    }
}

/// The part of a call that took too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum TimeoutPhase {
    /// The response head, from when the request had been sent.
    Head,
    /// The first frame of the response body.
    FirstFrame,
    /// The next frame of the response body.
    Idle,
    /// The next frame of the request body, which its producer did not provide.
    Sending,
    /// The next frame of the request body, which the upstream did not read.
    Taking,
    /// The whole call, to the end of the response body.
    Total,
    /// The whole response, from when the request had been sent to the end of the response body.
    ResponseTotal,
    /// The [`Deadline`](crate::time::Deadline) of the request, with the call in flight.
    /// [`deadline_source`](super::Rejected::deadline_source) returns the side that set it.
    Deadline,
    /// The request body, which arrived more slowly than the minimum rate.
    BodyRate,
    /// The response body, which its reader did not read for the
    /// [`max_unread`](crate::limit::ConcurrencyLimitLayer::max_unread) of a limit.
    Unread,
}

impl TimeoutPhase {
    pub(crate) const ALL: [Self; 10] = [
        Self::Head,
        Self::FirstFrame,
        Self::Idle,
        Self::Sending,
        Self::Taking,
        Self::Total,
        Self::ResponseTotal,
        Self::Deadline,
        Self::BodyRate,
        Self::Unread,
    ];

    /// Returns the phase in `snake_case`, for the label of a metric.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Head => "head",
            Self::FirstFrame => "first_frame",
            Self::Idle => "idle",
            Self::Sending => "sending",
            Self::Taking => "taking",
            Self::Total => "total",
            Self::ResponseTotal => "response_total",
            Self::Deadline => "deadline",
            Self::BodyRate => "body_rate",
            Self::Unread => "unread",
        }
    }
}
