//! What an answer of HTTP's or gRPC's is to a retry.

use http::{Extensions, HeaderMap, StatusCode};

use super::super::{policy::Class, stop::Stop};
use crate::call::{
    Outcome, Reason, Rejected, grpc,
    hint::{self, Pushback},
    http as rule,
};

/// What a head is to a retry. None: its body has to begin first.
#[inline]
pub(super) fn weigh_parts(
    status: StatusCode,
    headers: &HeaderMap,
    extensions: &Extensions,
) -> Option<(Class, Outcome)> {
    if status.is_success() && !grpc::is_grpc(headers) {
        return Some((Class::Final, Outcome::success()));
    }
    weigh_rest(status, headers, extensions)
}

fn weigh_rest(
    status: StatusCode,
    headers: &HeaderMap,
    extensions: &Extensions,
) -> Option<(Class, Outcome)> {
    if let Some(refused) = extensions.get::<Rejected>() {
        let outcome = rule::of_rejected(refused);
        return Some((of_reason(outcome), outcome));
    }
    if grpc::is_grpc(headers) && status == StatusCode::OK {
        return match grpc::status(headers) {
            Some(outcome) => Some(weigh_grpc(headers, outcome)),
            // Its trailers are in its body, where nobody looks for them.
            None if grpc::is_grpc_web(headers) => Some((Class::Final, Outcome::success())),
            None => None,
        };
    }
    let outcome = rule::of_status(status, headers);
    match status.as_u16() {
        // A proxy's status on a gRPC answer does not unsay the server's no.
        408 | 425 | 429 | 500..=599 if hint::pushback(headers) == Some(Pushback::Never) => {
            Some((Class::Refused(Stop::Pushback), outcome))
        }
        // Not a server's failure, but meant to be sent again (RFC 9110 §15.5.9, RFC 8470 §5.2).
        408 | 425 => {
            let outcome = Outcome::failure().because(Reason::Status).with_code(status.as_u16());
            let outcome = match hint::retry_after(headers) {
                Some(after) => outcome.with_retry_after(after),
                None => outcome,
            };
            Some((Class::Retryable, outcome))
        }
        429 | 502 | 503 | 504 => Some((Class::Retryable, outcome)),
        _ => Some((Class::Final, outcome)),
    }
}

/// gRFC A6: `UNAVAILABLE`, and `RESOURCE_EXHAUSTED` where the server says when.
pub(super) fn weigh_grpc(headers: &HeaderMap, outcome: Outcome) -> (Class, Outcome) {
    let pushback = hint::pushback(headers);
    let retryable = match outcome.code() {
        Some(grpc::UNAVAILABLE) => true,
        Some(grpc::RESOURCE_EXHAUSTED) => pushback.is_some(),
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
