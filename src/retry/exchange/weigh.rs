//! How a retry classifies responses of HTTP and gRPC, based on the outcome by [`Http`](crate::call::Http).

use http::{Extensions, HeaderMap, StatusCode};

use super::super::{policy::Class, stop::Stop};
use crate::call::{
    Eos, Outcome, OutcomeKind, Reason, grpc,
    hint::{self, Pushback},
    http as rule,
};

/// Classifies a response head. `None` if the beginning of its body decides.
#[inline]
pub(super) fn classify_head(
    is_grpc_call: bool,
    status: StatusCode,
    headers: &HeaderMap,
    extensions: &Extensions,
) -> Option<(Class, Outcome)> {
    if rule::is_plain_success(is_grpc_call, status, headers) {
        return Some((Class::Final, Outcome::success()));
    }
    match rule::of_head(is_grpc_call, status, headers, extensions) {
        Eos::Plain(outcome) => Some(classify_outcome(status, headers, outcome)),
        _ => None,
    }
}

/// Classifies a gRPC response that has ended without a `grpc-status`.
pub(super) fn classify_missing(status: StatusCode, headers: &HeaderMap) -> (Class, Outcome) {
    classify_outcome(status, headers, grpc::missing_status(status, headers))
}

/// Classifies a gRPC response whose trailers the retry does not wait for. `missing` is its class without a
/// `grpc-status`. A stream with HTTP status 200 is passed to the caller. Trailers rarely follow any other HTTP status.
pub(super) fn classify_begun(missing: (Class, Outcome)) -> (Class, Outcome) {
    match Eos::Grpc(missing.1).begun() {
        mapped if mapped == missing.1 => missing,
        begun => (Class::Final, begun),
    }
}

/// Classifies a gRPC response whose body fails at once. `missing` is its class without a `grpc-status`.
pub(super) fn classify_failed_body(missing: (Class, Outcome)) -> (Class, Outcome) {
    match Eos::Grpc(missing.1).error() {
        mapped if mapped == missing.1 => missing,
        failed => (Class::Final, failed),
    }
}

fn classify_outcome(status: StatusCode, headers: &HeaderMap, outcome: Outcome) -> (Class, Outcome) {
    match outcome.reason() {
        Reason::GrpcStatus => weigh_grpc(headers, outcome),
        Reason::Status | Reason::Completed => classify_status(status, headers, outcome),
        _ => (of_reason(outcome), outcome),
    }
}

fn classify_status(status: StatusCode, headers: &HeaderMap, outcome: Outcome) -> (Class, Outcome) {
    match status.as_u16() {
        408 | 425 | 429 | 500..=599 if hint::pushback(headers) == Some(Pushback::Never) => {
            (Class::Refused(Stop::Pushback), outcome)
        }
        // Not the server's failure, but meant to be sent again (RFC 9110 §15.5.9, RFC 8470 §5.2).
        408 | 425 => {
            let outcome = Outcome::failure().because(Reason::Status).with_code(status.as_u16());
            let outcome = match hint::retry_after(headers) {
                Some(after) => outcome.with_retry_after(after),
                None => outcome,
            };
            (Class::Retryable, outcome)
        }
        429 | 502 | 503 | 504 | 529 => (Class::Retryable, outcome),
        _ => (Class::Final, outcome),
    }
}

/// gRFC A6: `UNAVAILABLE` is retried, `RESOURCE_EXHAUSTED` if the server sends a pushback. `UNKNOWN` is retried only if
/// it was mapped from HTTP 529.
pub(super) fn weigh_grpc(headers: &HeaderMap, outcome: Outcome) -> (Class, Outcome) {
    let pushback = hint::pushback(headers);
    let retryable = match outcome.code() {
        Some(grpc::UNAVAILABLE) => true,
        Some(grpc::RESOURCE_EXHAUSTED) => pushback.is_some(),
        Some(grpc::UNKNOWN) => outcome.kind() == OutcomeKind::Throttled,
        _ => false,
    };
    let class = match pushback {
        // Of what is no answer: it would be told even if the user wished to retry it.
        Some(Pushback::Never) if retryable || !outcome.is_success() => {
            Class::Refused(Stop::Pushback)
        }
        _ if !retryable => Class::Final,
        _ => Class::Retryable,
    };
    (class, outcome)
}

/// What an error is to a retry: those of the connection may be tried again.
pub(super) fn of_reason(outcome: Outcome) -> Class {
    match outcome.reason() {
        Reason::Rejected => Class::Refused(Stop::Rejected),
        Reason::CallerDeadline => Class::Refused(Stop::DeadlinePassed),
        Reason::ConnectRefused
        | Reason::ConnectTimeout
        | Reason::ConnectFailed
        | Reason::NeverSent
        | Reason::RefusedStream
        | Reason::GoAway
        | Reason::StaleConnection
        | Reason::Reset
        | Reason::Timeout => Class::Retryable,
        _ => Class::Final,
    }
}
