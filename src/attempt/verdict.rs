//! The types of the decision about an attempt: which requests may be sent again, and which results are retried.

use std::sync::Arc;

use http::Method;

use super::give_up::GiveUpReason;
use crate::outcome::Outcome;

/// The requests that may be repeated although they may have had an effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SafeRequests {
    /// By the method (RFC 9110 §9.2.2) or an `Idempotency-Key`.
    Idempotent,
    /// By one of these methods or an `Idempotency-Key`.
    Methods(Arc<[Method]>),
    /// All requests, as the user declares.
    All,
}

/// The meaning of an attempt's result for a retry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryAction {
    /// The result is not retryable and is returned.
    Done,
    /// The result is retryable.
    Retry,
    /// The upstream or an inner layer forbids a retry.
    Forbidden(GiveUpReason),
}

/// The class of a result, and its outcome.
pub type Classified = (RetryAction, Outcome);

/// Whether a request body can be replayed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyReplay {
    /// The body can be replayed.
    Yes,
    /// The previous attempt still reads the body, or has not dropped it yet.
    Streaming,
    /// The body exceeds the cap, cannot be copied, or has failed.
    No,
}
