use std::fmt;

/// The reason for which no further attempt is made. The set is closed, so that it can be the label of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Stop {
    /// The response is not retryable.
    Answered,
    /// The error is not retryable.
    NotRetryable,
    /// The server forbids a retry: `grpc-retry-pushback-ms` is negative, unparsable or repeated.
    Pushback,
    /// A rate limit of a proxy rejected the attempt: the response has `x-envoy-ratelimited`.
    RateLimited,
    /// An inner layer rejected the attempt: an open circuit, a full limit.
    Rejected,
    /// It may have had an effect, and the method is not safe to repeat.
    Unsafe,
    /// The request body is still being sent.
    StillSending,
    /// The request body cannot be sent again: over the cap, or not to be copied.
    BodyGone,
    /// All attempts are used up.
    AttemptsUsedUp,
    /// All retries that this kind of failure may have are used up.
    KindUsedUp,
    /// The server asked for a longer wait than is allowed.
    WaitTooLong,
    /// The wait and an attempt of use do not fit before the deadline.
    DeadlineTooNear,
    /// The deadline passed: with an attempt under way, with the wrapped service not ready for one, or before the first.
    DeadlinePassed,
    /// The retry budget is used up.
    BudgetUsedUp,
    /// The wrapped service failed before it was called: its `poll_ready` did.
    NotReady,
    /// The layer's configuration is wrong: it never retries.
    Misconfigured,
}

impl Stop {
    /// The reason in `snake_case`, as events have it.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::NotRetryable => "not_retryable",
            Self::Pushback => "pushback",
            Self::RateLimited => "rate_limited",
            Self::Rejected => "rejected",
            Self::Unsafe => "unsafe",
            Self::StillSending => "still_sending",
            Self::BodyGone => "body_gone",
            Self::AttemptsUsedUp => "attempts_used_up",
            Self::KindUsedUp => "kind_used_up",
            Self::DeadlinePassed => "deadline_passed",
            Self::DeadlineTooNear => "deadline_too_near",
            Self::WaitTooLong => "wait_too_long",
            Self::BudgetUsedUp => "budget_used_up",
            Self::NotReady => "not_ready",
            Self::Misconfigured => "misconfigured",
        }
    }
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
