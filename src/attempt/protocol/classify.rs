//! How a retry classifies responses of HTTP and gRPC, based on the outcome by [`Http`](crate::classify::Http).

use http::{Extensions, HeaderMap, StatusCode};

use super::super::{
    give_up::GiveUpReason,
    verdict::{Classified, RetryAction},
};
use super::{saved_request::IDEMPOTENCY_KEY, traits::AttemptResponse};
use crate::outcome::{
    Eos, Outcome, OutcomeKind, Pushback, Reason, RetiredConnection, grpc, http as rule, retry_after,
};

/// Classifies a response head. `None` if the beginning of its body decides.
#[inline]
pub(crate) fn classify_head(
    is_grpc_call: bool,
    status: StatusCode,
    headers: &HeaderMap,
    extensions: &Extensions,
) -> Option<Classified> {
    if rule::is_plain_success(is_grpc_call, status, headers) {
        return Some((RetryAction::Done, Outcome::success()));
    }
    match rule::of_head(is_grpc_call, status, headers, extensions) {
        Eos::Plain(outcome) => Some(classify_outcome(status, headers, outcome)),
        _ => None,
    }
}

/// Classifies a gRPC response that has ended without a `grpc-status`.
pub(crate) fn classify_missing(status: StatusCode, headers: &HeaderMap) -> Classified {
    classify_outcome(status, headers, grpc::missing_status(status, headers))
}

/// Classifies a gRPC response whose trailers the retry does not wait for. `missing` is its class without a
/// `grpc-status`. A stream with HTTP status 200 is passed to the caller. Trailers rarely follow any other HTTP status.
pub(crate) fn classify_begun(missing: Classified) -> Classified {
    match Eos::Grpc(missing.1).begun() {
        mapped if mapped == missing.1 => missing,
        begun => (RetryAction::Done, begun),
    }
}

/// Classifies a gRPC response whose body fails at once. `missing` is its class without a `grpc-status`.
pub(crate) fn classify_failed_body(missing: Classified) -> Classified {
    match Eos::Grpc(missing.1).error() {
        mapped if mapped == missing.1 => missing,
        failed => (RetryAction::Done, failed),
    }
}

fn classify_outcome(status: StatusCode, headers: &HeaderMap, outcome: Outcome) -> Classified {
    match outcome.reason() {
        Reason::GrpcStatus => classify_grpc(headers, outcome),
        Reason::Status | Reason::Completed => classify_status(status, headers, outcome),
        _ => (of_reason(outcome), outcome),
    }
}

fn classify_status(status: StatusCode, headers: &HeaderMap, outcome: Outcome) -> Classified {
    match status.as_u16() {
        408 | 421 | 425 | 429 | 500..=599
            if retry_after::pushback(headers) == Some(Pushback::Never) =>
        {
            (RetryAction::Forbidden(GiveUpReason::Pushback), outcome)
        }
        // Not a failure of the server. The client may repeat the request (RFC 9110 §15.5.9 and §15.5.20, RFC 8470
        // §5.2).
        408 | 421 | 425 => (RetryAction::Retry, failed_status(status, headers)),
        // Cloudflare's 520 to 524 state that the proxy has no valid response of the origin.
        429 | 502..=504 | 520..=524 | 529 => {
            (or_rate_limited(RetryAction::Retry, headers), outcome)
        }
        _ => (RetryAction::Done, outcome),
    }
}

/// Refines the class of a status by the headers of the request and by the connection.
///
/// Returns the class, and whether the server declares that it has not processed the request. If so, a retry is safe for
/// any method and makes no withdrawal.
pub(crate) fn classify_by_request<'a>(
    class: RetryAction,
    outcome: Outcome,
    response: AttemptResponse<'_>,
    is_first: bool,
    header: impl Fn(&str) -> Option<&'a [u8]>,
) -> (RetryAction, bool) {
    let AttemptResponse::Head(status, _, extensions) = response else { return (class, false) };
    let is_grpc = outcome.reason() == Reason::GrpcStatus;
    match (status, class) {
        // The server does not process early data. A proxy must forward 425 to a client that has sent its request as
        // early data, since only that client can repeat it (RFC 8470 §5.2).
        (StatusCode::TOO_EARLY, RetryAction::Retry) => match header("early-data") {
            Some(b"1") => (RetryAction::Done, false),
            _ => (class, true),
        },
        // Another connection may lead to the right server (RFC 9110 §15.5.20).
        (StatusCode::MISDIRECTED_REQUEST, RetryAction::Retry) => {
            (class, is_connection_retired(extensions))
        }
        // An earlier attempt with the same key is still being processed
        // (draft-ietf-httpapi-idempotency-key-header §2.6).
        (StatusCode::CONFLICT, RetryAction::Done)
            if !is_grpc && !is_first && header(IDEMPOTENCY_KEY).is_some() =>
        {
            (RetryAction::Retry, false)
        }
        _ => (class, false),
    }
}

/// Returns whether the next attempt uses another connection than this response.
fn is_connection_retired(extensions: &Extensions) -> bool {
    extensions.get::<RetiredConnection>().is_some()
}

/// Returns the failure that the retry records for a status that is a success for the other layers.
pub(crate) fn failed_status(status: StatusCode, headers: &HeaderMap) -> Outcome {
    let outcome = Outcome::failure().because(Reason::Status).with_code(status.as_u16());
    match retry_after::retry_after(headers) {
        Some(after) => outcome.with_retry_after(after),
        None => outcome,
    }
}

/// Envoy sets this header on the response to a call that its rate limit has rejected, and does not retry such a
/// response by default (`RetryStateImpl::wouldRetryFromHeaders`).
const ENVOY_RATE_LIMITED: &str = "x-envoy-ratelimited";

/// Returns `class`, unless a rate limit of Envoy rejected the call.
fn or_rate_limited(class: RetryAction, headers: &HeaderMap) -> RetryAction {
    if headers.contains_key(ENVOY_RATE_LIMITED) {
        RetryAction::Forbidden(GiveUpReason::RateLimited)
    } else {
        class
    }
}

/// Classifies a gRPC status (gRFC A6): `UNAVAILABLE` is retryable, and `RESOURCE_EXHAUSTED` if the server sends a
/// pushback. `UNKNOWN` is retryable only if it was mapped from HTTP 529.
pub(crate) fn classify_grpc(headers: &HeaderMap, outcome: Outcome) -> Classified {
    let pushback = retry_after::pushback(headers);
    let retryable = match outcome.code() {
        Some(grpc::UNAVAILABLE) => true,
        Some(grpc::RESOURCE_EXHAUSTED) => pushback.is_some(),
        Some(grpc::UNKNOWN) => outcome.kind() == OutcomeKind::Throttled,
        _ => false,
    };
    let class = match pushback {
        // Also for a status that is never retried, so that the retry budget makes a withdrawal for it (grpc-go
        // `shouldRetry`).
        Some(Pushback::Never) if outcome.code() != Some(grpc::OK) => {
            RetryAction::Forbidden(GiveUpReason::Pushback)
        }
        _ if !retryable => RetryAction::Done,
        _ => or_rate_limited(RetryAction::Retry, headers),
    };
    (class, outcome)
}

/// Classifies an error: failures of the connection and timeouts are retryable.
pub(crate) fn of_reason(outcome: Outcome) -> RetryAction {
    match outcome.reason() {
        Reason::Rejected => RetryAction::Forbidden(GiveUpReason::Rejected),
        Reason::CallerDeadline => RetryAction::Forbidden(GiveUpReason::DeadlinePassed),
        Reason::ConnectRefused
        | Reason::ConnectTimeout
        | Reason::ConnectFailed
        | Reason::NeverSent
        | Reason::RefusedStream
        | Reason::GoAway
        | Reason::StaleConnection
        | Reason::Reset
        | Reason::Timeout => RetryAction::Retry,
        _ => RetryAction::Done,
    }
}
