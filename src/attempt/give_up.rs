//! The reasons for which a retry gives up.

use std::fmt;

/// The reason for which no further attempt is made. The set is closed, so that it can be the label of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GiveUpReason {
    /// The response is not retryable.
    Responded,
    /// The error is not retryable.
    NotRetryable,
    /// The server forbids a retry: `grpc-retry-pushback-ms` is negative, unparsable or repeated.
    Pushback,
    /// A rate limit of a proxy rejected the attempt: the response has `x-envoy-ratelimited`.
    RateLimited,
    /// An inner layer rejected the attempt: an open circuit, a full limit.
    Rejected,
    /// The request may have had an effect, and is not safe to repeat.
    Unsafe,
    /// The request body is still being sent.
    StillSending,
    /// The request body cannot be replayed: it exceeds the maximum, or it cannot be copied.
    BodyGone,
    /// All attempts are used up.
    AttemptsUsedUp,
    /// All retries for this kind of failure are used up.
    KindUsedUp,
    /// The server's hint is longer than the maximum delay.
    DelayTooLong,
    /// The delay and the minimum time of an attempt do not fit before the deadline.
    DeadlineTooNear,
    /// The deadline passed: during an attempt, while the wrapped service was not ready, or before the first attempt.
    DeadlinePassed,
    /// The retry budget is used up.
    BudgetUsedUp,
    /// The `poll_ready` of the wrapped service failed.
    NotReady,
    /// A setting of the layer cannot work. Such a layer never retries.
    Misconfigured,
}

impl GiveUpReason {
    /// All reasons, in the order of their declaration.
    pub(crate) const ALL: [Self; 16] = [
        Self::Responded,
        Self::NotRetryable,
        Self::Pushback,
        Self::RateLimited,
        Self::Rejected,
        Self::Unsafe,
        Self::StillSending,
        Self::BodyGone,
        Self::AttemptsUsedUp,
        Self::KindUsedUp,
        Self::DelayTooLong,
        Self::DeadlineTooNear,
        Self::DeadlinePassed,
        Self::BudgetUsedUp,
        Self::NotReady,
        Self::Misconfigured,
    ];

    /// Returns the reason in `snake_case`, as in events.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Responded => "responded",
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
            Self::DelayTooLong => "delay_too_long",
            Self::BudgetUsedUp => "budget_used_up",
            Self::NotReady => "not_ready",
            Self::Misconfigured => "misconfigured",
        }
    }
}

impl fmt::Display for GiveUpReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_reasons_are_in_the_order_of_their_declaration() {
        for (index, reason) in GiveUpReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, index, "{reason}");
        }
        // The last declared reason.
        assert_eq!(GiveUpReason::Misconfigured as usize, GiveUpReason::ALL.len() - 1);
    }
}
