//! Retries that are safe, bounded and explained.
//!
//! ```
//! # fn client() -> impl Clone { () }
//! use buttress::RetryLayer;
//! use tower::ServiceBuilder;
//!
//! // 3 attempts, full jitter, 20 % budget, `Retry-After`, safe methods only.
//! let client = ServiceBuilder::new().layer(RetryLayer::http()).service(client());
//! ```
//!
//! With a budget that two clients share:
//!
//! ```
//! # fn main() -> Result<(), buttress::ConfigError> {
//! use std::time::Duration;
//! use buttress::{Backoff, RetryBudget, RetryLayer};
//!
//! let budget = RetryBudget::ratio(0.1);
//! let retry = RetryLayer::http()
//!     .attempts(4)
//!     .backoff(Backoff::exponential(Duration::from_millis(25)).max(Duration::from_secs(1)))
//!     .budget(budget.clone())
//!     .checked()?;
//! # let _ = retry; Ok(()) }
//! ```
//!
//! # How it decides
//!
//! The retry makes these checks after each attempt, in this order. The first check that fails is the
//! [`stop`](Attempts::stop) of [`Attempts`]:
//!
//! | check | if it fails |
//! |---|---|
//! | Neither the server nor an inner layer forbids a retry: no negative, unparsable or repeated `grpc-retry-pushback-ms`, no rejection by an inner layer, no `x-envoy-ratelimited`. | [`Pushback`](GiveUpReason::Pushback), [`Rejected`](GiveUpReason::Rejected), [`RateLimited`](GiveUpReason::RateLimited) |
//! | The status or the error is retryable: 408, 421, 425, 429, 502, 503, 504, 520 to 524, 529; 409 for a retry with an `Idempotency-Key`; for a gRPC call `UNAVAILABLE` in head or trailers or mapped from the HTTP status (`RESOURCE_EXHAUSTED` with pushback); a connection that failed. | [`Answered`](GiveUpReason::Responded), [`NotRetryable`](GiveUpReason::NotRetryable) for an error |
//! | It is safe: the method (RFC 9110 §9.2.2), an `Idempotency-Key`, proof that nothing was sent, or a status that declares it: 425, an [`unprocessed`](RetryLayer::unprocessed) one, with [`grpc`](RetryLayer::grpc) that of a gRPC call. | [`Unsafe`](GiveUpReason::Unsafe) |
//! | The body can be replayed. | [`StillSending`](GiveUpReason::StillSending), [`BodyGone`](GiveUpReason::BodyGone) |
//! | An attempt is left in total and [for this kind of failure](RetryLayer::max_retries_for). | [`AttemptsUsedUp`](GiveUpReason::AttemptsUsedUp), [`KindUsedUp`](GiveUpReason::KindUsedUp) |
//! | The delay that the server requests is within the maximum. | [`WaitTooLong`](GiveUpReason::DelayTooLong) |
//! | The delay and [10 ms](RetryLayer::min_attempt_time) for an attempt fit before the [`Deadline`](crate::time::Deadline). | [`DeadlineTooNear`](GiveUpReason::DeadlineTooNear) |
//! | The budget permits a retry. | [`BudgetUsedUp`](GiveUpReason::BudgetUsedUp) |
//!
//! A `poll_ready` that fails ends the call as [`NotReady`](GiveUpReason::NotReady).
//!
//! A server's hint is a lower bound of the delay, unless a [preset](RetryLayer::preset) defines it differently. Up to
//! [half of the hint](RetryLayer::hint_jitter) is added at random, so that clients with the same hint do not return at
//! the same time. A hint that fits the deadline is followed. The jitter, or a backoff that is longer than the hint,
//! then uses at most half of the time between the hint and the deadline. The attempt has the rest. The budget and an
//! open circuit still end the call: of many calls that fail at the same time, only a part is retried.
//!
//! These headers are hints, in this order: `grpc-retry-pushback-ms`, `retry-after-ms`, `x-ms-retry-after-ms`,
//! `x-amz-retry-after`, `Retry-After`, and if a quota is used up `RateLimit`, `RateLimit-Reset`,
//! `X-RateLimit-Reset-After` and `X-RateLimit-Reset`. Decimals are rounded up to the next millisecond. A hint of 300 s
//! or more ends the call. After a pushback of gRPC the backoff begins with its first delay again (gRFC A6).
//!
//! 425 is retried for any method, without a withdrawal from the budget. If the request has `Early-Data: 1`, it is not
//! retried, because only the client that sent the early data can repeat it (RFC 8470 §5.2).
//!
//! 421 is retried over another connection if a `connect::Client` sends the requests: for any method, without a
//! withdrawal (RFC 9110 §15.5.20). Other clients may use the same connection again. Over them, 421 is retried only if
//! the method is safe.
//!
//! # Connection housekeeping
//!
//! A call that ends by [connection housekeeping](crate::outcome::Outcome::is_housekeeping) is retried transparently: at
//! once, without counting an attempt, and without a deposit to or a withdrawal from the budget. A call makes at most 5
//! transparent retries in total. Beyond these, attempts, backoff and budget apply as to any other failure.
//!
//! A balance of the layer and its clones bounds transparent retries while the upstream does not respond. It starts at
//! its maximum of 200. Each transparent retry withdraws 1 and each response deposits 5. An error that an inner retry
//! layer has returned is not retried transparently, so that nested layers do not multiply these retries.
//!
//! | end of the attempt | retry |
//! |---|---|
//! | never sent, `REFUSED_STREAM`, above the last stream of a `GOAWAY` with any code | transparently, for any method: the server did not process the request |
//! | a reused connection broke before the response | transparently, if it is safe: the server may have seen the request |
//! | a new connection broke before the response, a stream was reset with another code | as a failure, if it is safe |
//! | no connection could be made | as a failure, for any method |
//!
//! Where a transport does not reveal whether a connection was reused (hyper-util's client, reqwest, tonic), it is
//! [assumed to be reused](crate::breaker#connection-housekeeping). The limits of
//! [`max_retries_for`](RetryLayer::max_retries_for) hold for transparent retries too.
//!
//! # Rules
//!
//! | rule | set by |
//! |---|---|
//! | failures that are retried | [`retry_on`](RetryLayer::retry_on), [`never_on`](RetryLayer::never_on): an HTTP status, the gRPC status of a gRPC call, a reason |
//! | statuses that are retried for any method | [`unprocessed`](RetryLayer::unprocessed) |
//! | retry after a rejection by an inner layer | [`wait_on_rejection`](RetryLayer::wait_on_rejection) |
//! | methods that are safe to repeat | [`methods`](RetryLayer::methods), [`assume_idempotent`](RetryLayer::assume_idempotent) |
//! | whether an attempt is retried, and whether that is safe | [`retry_if`](RetryLayer::retry_if): a closure over the request and the result |
//! | maximum number of retries for each kind of failure | [`max_retries_for`](RetryLayer::max_retries_for) |
//! | share of retries among the calls | [`budget`](RetryLayer::budget), with [costs](RetryBudget::cost) for each kind |
//! | delay | [`backoff`](RetryLayer::backoff), [`backoff_with`](RetryLayer::backoff_with) |
//! | delays, attempts and budget of AWS, Envoy, gRPC or Finagle | [`preset`](RetryLayer::preset) |
//!
//! All rules except the budget can change while the layer runs, by the setters of the [`RetryHandle`]. A setter of the
//! layer does not change the services that a clone of the layer has built.
//!
//! ```
//! # fn client() -> impl Clone { () }
//! # fn main() -> Result<(), buttress::ConfigError> {
//! use buttress::RetryLayer;
//! use tower::ServiceBuilder;
//!
//! let retry = RetryLayer::http().name("search");
//! let handle = retry.handle();
//! let client = ServiceBuilder::new().layer(retry).service(client());
//! // An hour later:
//! handle.set_attempts(2)?;
//! # let _ = client; Ok(()) }
//! ```
//!
//! # Deadlines
//!
//! If the extensions of a request contain a [`Deadline`](crate::time::Deadline), the request is not sent after it. It
//! is not retried if the delay and [10 ms](RetryLayer::min_attempt_time) for the attempt do not fit before the
//! deadline. A wait for the readiness of the service, and an attempt that has no response head, end at the deadline.
//! The error then contains a [`Rejected`](crate::outcome::Rejected). A `DeadlineLayer` outside of the retry that
//! responds converts it into a 504, or into `DEADLINE_EXCEEDED` for gRPC.
//!
//! [`attempt_timeout`](RetryLayer::attempt_timeout) bounds each attempt, up to its response head. The timer is created
//! only if the response head is not available at once.
//!
//! # gRPC
//!
//! The retry classifies a gRPC call as every other layer does, by the table of [`Http`](crate::classify::Http): by
//! `grpc-status` whatever the HTTP status is, and without it by the code that the HTTP status maps to. 503 `text/html`
//! from a proxy is `UNAVAILABLE`; 503 with `grpc-status: 5` is a regular response. The retry waits at most 10 ms for
//! the trailers of a response without messages. Each further attempt carries `grpc-previous-rpc-attempts`, the number
//! of previous attempts that the server may have seen.
//!
//! # In the stack
//!
//! Put the retry outermost, outside of the circuit breaker and the limit: each attempt is counted and limited, and a
//! call that waits for its next attempt holds no permit. A rejection by an inner layer, such as an open circuit or a
//! full limit, ends the call at once, and the error states that nothing was sent. With
//! [`wait_on_rejection`](RetryLayer::wait_on_rejection) the call waits for the time that the rejection states instead.
//!
//! The wrapped service receives `http::Request<ReplayBody<B>>`. A service with a single body type, such as a tonic
//! channel, needs `tower_http::map_request_body::MapRequestBodyLayer::new(tonic::body::Body::new)` (feature
//! `map-request-body` of tower-http) in between.
//!
//! # Bodies
//!
//! A request body is saved while it is sent, up to 64 KiB. A request with a larger body is sent and not retried. The
//! discarded response body is drained, up to 64 KiB and 50 ms, so that its connection can be reused. Nothing is retried
//! once the caller has a response head. Response bodies must be `Unpin`: those of hyper, axum, tonic and reqwest are.
//!
//! # Cancellation
//!
//! Dropping the call drops the attempt in flight. The withdrawal for a retry that has not been made is refunded.
//!
//! # Telemetry
//!
//! Each attempt has a span `attempt` at DEBUG, which ends when the response is classified. Its fields are
//! `resilience.name`, `layer`, `hedge` (`false` for the attempts of a retry), `outcome` and `reason`. The span of a
//! further attempt also has `http.request.resend_count`, as OpenTelemetry specifies, and `delay_ms`, the delay before
//! the attempt. The spans of the attempts of one call are siblings. The span of an attempt that its caller drops ends
//! as `cancelled`.
//!
//! [`AttemptHeadersLayer`] writes `traceparent` or any other header to each attempt. Its page shows two ways to
//! propagate a trace.
//!
//! Each decision about a retry is an event at DEBUG.
//!
//! # Cost
//!
//! A call that is not retried costs a copy of the request head: its headers take one allocation, or two if they are
//! long. A request body costs two more small allocations, and is shared, not copied. The wrapped service is cloned only
//! for a second attempt. The state of the retries is allocated only after a failed attempt.
//!
//! Compared with tower's `Retry`, its budget and a cloned request, there is no clock read and no additional
//! allocation. There are fewer atomic operations for a request without a body, and slightly more for one with a body,
//! and more instructions for HTTP requests. The benchmark of overhead in the repository compares both.
//!
//! # Defaults
//!
//! | setting | default |
//! |---|---|
//! | [`attempts`](RetryLayer::attempts) | 3, including the first |
//! | [`backoff`](RetryLayer::backoff) | 50 ms, doubled for each retry, at most 5 s, full jitter |
//! | [`budget`](RetryLayer::budget) | 20 % of the first attempts, and 1 retry per second |
//! | [`max_replay_bytes`](RetryLayer::max_replay_bytes) | 64 KiB |
//! | [`max_drain_bytes`](RetryLayer::max_drain_bytes) | 64 KiB, within 50 ms |
//! | [`max_wait`](RetryLayer::max_wait) | 30 s without a deadline, no maximum with one |
//! | [`hint_jitter`](RetryLayer::hint_jitter) | 50 % of the hint |
//! | [`wait_on_rejection`](RetryLayer::wait_on_rejection) | no |
//! | [`unprocessed`](RetryLayer::unprocessed) | none |
//! | [`attempt_timeout`](RetryLayer::attempt_timeout) | none |
//! | [`min_attempt_time`](RetryLayer::min_attempt_time) | 10 ms |

mod counters;
mod future;
mod handle;
mod layer;
#[cfg(feature = "observe")]
mod observe;
mod overrides;
mod policy;
mod preset;
mod retried;
mod service;
mod settings;
mod state;

pub use self::{
    future::RetryFuture,
    handle::{RetryHandle, RetrySnapshot},
    layer::{RetryLayer, Unclassified},
    overrides::{AttemptContext, Failure},
    preset::RetryPreset,
    service::Retry,
};
#[cfg(feature = "reqwest")]
#[cfg_attr(docsrs, doc(cfg(feature = "reqwest")))]
pub use crate::attempt::Reqwest;
pub use crate::attempt::{
    Attempt, AttemptHeaders, AttemptHeadersLayer, AttemptRecord, Attempts, Backoff,
    ClassifyAttempt, Delays, FailureKind, GiveUpReason, PeekedBody, Replay, ReplayBody,
    ReplayRequest, RetryBudget, RetryError, SavedCall, Withdrawal,
};

/// The types in the methods of [`ReplayRequest`] and [`ClassifyAttempt`], and their associated types.
///
/// The traits are sealed, so user code needs these types only to write a type in full.
pub mod protocol {
    #[cfg(feature = "reqwest")]
    #[cfg_attr(docsrs, doc(cfg(feature = "reqwest")))]
    pub use crate::attempt::PendingReqwest;
    pub use crate::attempt::{
        AttemptNumber, AttemptResponse, BodyReplay, Classified, PendingResponse, PendingResult,
        RetryAction, SafeRequests, SaveRules, SavedRequest,
    };
}
