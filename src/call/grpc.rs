//! What a gRPC status means, in the head or in the trailers.

use http::{HeaderMap, header};

use super::{Outcome, OutcomeKind, Reason, hint};

pub(crate) const STATUS: &str = "grpc-status";
pub(crate) const MESSAGE: &str = "grpc-message";

const CANCELLED: u16 = 1;
const UNKNOWN: u16 = 2;
pub(crate) const DEADLINE_EXCEEDED: u16 = 4;
pub(crate) const RESOURCE_EXHAUSTED: u16 = 8;
pub(crate) const UNIMPLEMENTED: u16 = 12;
const INTERNAL: u16 = 13;
pub(crate) const UNAVAILABLE: u16 = 14;
const DATA_LOSS: u16 = 15;

/// Whether a message of these headers is gRPC (or gRPC-Web).
#[inline]
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"))
}

/// Whether the trailers of this gRPC answer are in its body, where they are not looked for.
pub(crate) fn is_grpc_web(headers: &HeaderMap) -> bool {
    headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc-web"))
}

/// The outcome that a `grpc-status` in `headers` gives, if there is one.
pub(crate) fn status(headers: &HeaderMap) -> Option<Outcome> {
    let outcome = of_code(code(headers)?);
    match (outcome.kind(), hint::retry_after(headers)) {
        (OutcomeKind::Failure | OutcomeKind::Throttled, Some(after)) => {
            Some(outcome.with_retry_after(after))
        }
        _ => Some(outcome),
    }
}

/// The outcome of an answer that ends with these trailers.
pub(crate) fn end(trailers: Option<&HeaderMap>) -> Outcome {
    trailers.and_then(status).unwrap_or_else(|| Outcome::failure().because(Reason::MissingStatus))
}

/// The `grpc-status` in `headers`, if there is one. What is no number is `UNKNOWN`, as the protocol has it.
pub(crate) fn code(headers: &HeaderMap) -> Option<u16> {
    let text = headers.get(STATUS)?.to_str().ok();
    Some(text.and_then(|text| text.trim().parse().ok()).unwrap_or(UNKNOWN))
}

/// Codes that speak of the server are failures; those that speak of the request are answers.
fn of_code(code: u16) -> Outcome {
    let outcome = match code {
        CANCELLED => Outcome::cancelled(),
        UNKNOWN | DEADLINE_EXCEEDED | INTERNAL | UNAVAILABLE | DATA_LOSS => Outcome::failure(),
        RESOURCE_EXHAUSTED => Outcome::throttled(),
        _ => Outcome::success(),
    };
    outcome.because(Reason::GrpcStatus).with_code(code)
}
