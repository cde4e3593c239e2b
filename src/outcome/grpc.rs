//! gRPC: which calls are gRPC, and the outcome of a gRPC status in the head, in the trailers, or mapped from the HTTP
//! status.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use http::Request;
use http::{HeaderMap, Method, StatusCode, header};

use super::{
    outcome::{Outcome, OutcomeKind, Reason},
    rejected_kind::RejectedKind,
    retry_after,
};

pub(crate) const STATUS: &str = "grpc-status";
pub(crate) const MESSAGE: &str = "grpc-message";

pub(crate) const OK: u16 = 0;
pub(crate) const CANCELLED: u16 = 1;
pub(crate) const UNKNOWN: u16 = 2;
pub(crate) const DEADLINE_EXCEEDED: u16 = 4;
const PERMISSION_DENIED: u16 = 7;
pub(crate) const RESOURCE_EXHAUSTED: u16 = 8;
pub(crate) const UNIMPLEMENTED: u16 = 12;
const INTERNAL: u16 = 13;
pub(crate) const UNAVAILABLE: u16 = 14;
const DATA_LOSS: u16 = 15;
const UNAUTHENTICATED: u16 = 16;

/// Returns whether a request with this method and these headers is a gRPC call.
#[inline]
pub(crate) fn is_grpc_call(method: &Method, headers: &HeaderMap) -> bool {
    // The method is compared first, because that is cheaper than a header lookup.
    *method == Method::POST && is_grpc(headers)
}

// ===== Health calls =====

/// A call of `grpc.health.v1.Health`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HealthCall {
    /// Requests one status.
    Check,
    /// Requests a stream of statuses, which may stay open for as long as its connection.
    Watch,
}

/// Whether a health registry of this process serves `grpc.health.v1`.
static SERVES_HEALTH: AtomicBool = AtomicBool::new(false);

/// Records that a health registry of this process serves `grpc.health.v1`.
#[cfg(feature = "tonic")]
pub(crate) fn set_serves_health() {
    SERVES_HEALTH.store(true, Relaxed);
}

/// Returns which health call the request is. `None` if it is another call, or if no health registry of this process
/// serves `grpc.health.v1`: then nothing else of the request is read.
#[inline]
pub(crate) fn health_call<B>(request: &Request<B>) -> Option<HealthCall> {
    if !SERVES_HEALTH.load(Relaxed) {
        return None;
    }
    let call = match request.uri().path() {
        "/grpc.health.v1.Health/Check" => HealthCall::Check,
        "/grpc.health.v1.Health/Watch" => HealthCall::Watch,
        _ => return None,
    };
    is_grpc_call(request.method(), request.headers()).then_some(call)
}

/// Returns whether the content type is that of gRPC or gRPC-Web.
#[inline]
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    after_grpc(headers).is_some_and(|rest| ends_subtype(after_web(rest).unwrap_or(rest)))
}

/// Returns whether the content type is that of gRPC-Web, which carries the trailers in the body. The body is not
/// parsed.
pub(crate) fn is_grpc_web(headers: &HeaderMap) -> bool {
    after_grpc(headers).and_then(after_web).is_some_and(ends_subtype)
}

/// Returns the part of the content type after `application/grpc`. Content types ignore ASCII case (RFC 9110 §8.3.1).
#[inline]
fn after_grpc(headers: &HeaderMap) -> Option<&[u8]> {
    strip_prefix(headers.get(header::CONTENT_TYPE)?.as_bytes(), b"application/grpc")
}

/// Returns the part after `-web` or `-web-text`.
fn after_web(subtype: &[u8]) -> Option<&[u8]> {
    let rest = strip_prefix(subtype, b"-web")?;
    Some(strip_prefix(rest, b"-text").unwrap_or(rest))
}

/// Returns whether the name of the subtype ends here: a message format, a parameter or nothing follows.
fn ends_subtype(rest: &[u8]) -> bool {
    matches!(rest.first(), None | Some(b'+' | b';' | b' ' | b'\t'))
}

#[inline]
fn strip_prefix<'a>(text: &'a [u8], prefix: &[u8]) -> Option<&'a [u8]> {
    let (head, rest) = text.split_at_checked(prefix.len())?;
    head.eq_ignore_ascii_case(prefix).then_some(rest)
}

/// Returns the gRPC status code of a rejection of this kind.
pub(crate) const fn of_rejected(kind: RejectedKind) -> u16 {
    match kind {
        RejectedKind::Quota => RESOURCE_EXHAUSTED,
        RejectedKind::DeadlinePassed | RejectedKind::TimedOut(_) => DEADLINE_EXCEEDED,
        _ => UNAVAILABLE,
    }
}

/// Returns whether the head of a gRPC response has the status `CANCELLED`.
pub(crate) fn is_cancelled(headers: &HeaderMap) -> bool {
    code(headers) == Some(CANCELLED) && is_grpc(headers)
}

/// Returns the outcome of the `grpc-status` in `headers`, if there is one.
pub(crate) fn status(headers: &HeaderMap) -> Option<Outcome> {
    let code = match code(headers)? {
        CANCELLED if is_timeout_of_tonic(headers) => DEADLINE_EXCEEDED,
        code => code,
    };
    Some(with_hint(of_code(code), headers))
}

/// Returns whether the message is that of a timeout of a tonic server. tonic 0.14 reports a `grpc-timeout` and a
/// `Server::timeout` that have expired as `CANCELLED`.
fn is_timeout_of_tonic(headers: &HeaderMap) -> bool {
    headers.get(MESSAGE).is_some_and(|message| {
        matches!(message.as_bytes(), b"Timeout%20expired" | b"Timeout expired")
    })
}

/// The message of that status.
#[cfg(feature = "tonic")]
const TIMEOUT_OF_TONIC: &str = "Timeout expired";

/// Returns the outcome of a status that a service returned as its error.
#[cfg(feature = "tonic")]
pub(crate) fn of_status(status: &tonic::Status) -> Outcome {
    let code = match u16::try_from(i32::from(status.code())).unwrap_or(UNKNOWN) {
        CANCELLED if status.message() == TIMEOUT_OF_TONIC => DEADLINE_EXCEEDED,
        code => code,
    };
    with_hint(of_code(code), status.metadata().as_ref())
}

/// Adds the hint of the headers to a failure or a throttled outcome.
fn with_hint(outcome: Outcome, headers: &HeaderMap) -> Outcome {
    match outcome.kind() {
        OutcomeKind::Failure | OutcomeKind::Throttled => match retry_after::retry_after(headers) {
            Some(after) => outcome.with_retry_after(after),
            None => outcome,
        },
        OutcomeKind::Success | OutcomeKind::Cancelled => outcome,
    }
}

/// Returns the outcome of a response that may carry its `grpc-status` in the trailers, and does not.
pub(crate) fn missing_status(status: StatusCode, headers: &HeaderMap) -> Outcome {
    if status == StatusCode::OK {
        return Outcome::failure().because(Reason::MissingStatus);
    }
    of_http_status(status, headers)
}

/// Returns the outcome of a response without a `grpc-status`, by the table of gRPC's `doc/http-grpc-status-mapping.md`.
///
/// 429 and 529 are throttled, although the table has no code for that.
pub(crate) fn of_http_status(status: StatusCode, headers: &HeaderMap) -> Outcome {
    let code = match status.as_u16() {
        400 => INTERNAL,
        401 => UNAUTHENTICATED,
        403 => PERMISSION_DENIED,
        404 => UNIMPLEMENTED,
        429 | 502 | 503 | 504 => UNAVAILABLE,
        _ => UNKNOWN,
    };
    let outcome = match status.as_u16() {
        429 | 529 => Outcome::throttled().because(Reason::GrpcStatus).with_code(code),
        _ => of_code(code),
    };
    with_hint(outcome, headers)
}

/// Returns the `grpc-status` in `headers`, if there is one. A value other than a decimal number from 0 to 16 is
/// `UNKNOWN`, as the protocol requires and as tonic parses it.
pub(crate) fn code(headers: &HeaderMap) -> Option<u16> {
    let digit = |byte: u8| u16::from(byte - b'0');
    Some(match headers.get(STATUS)?.as_bytes() {
        [ones @ b'0'..=b'9'] => digit(*ones),
        [b'1', ones @ b'0'..=b'6'] => 10 + digit(*ones),
        _ => UNKNOWN,
    })
}

/// Returns the outcome of a status code. A code that describes the server is a failure. A code that describes the
/// request is a success.
fn of_code(code: u16) -> Outcome {
    let outcome = match code {
        CANCELLED => Outcome::cancelled(),
        UNKNOWN | DEADLINE_EXCEEDED | INTERNAL | UNAVAILABLE | DATA_LOSS => Outcome::failure(),
        RESOURCE_EXHAUSTED => Outcome::throttled(),
        _ => Outcome::success(),
    };
    outcome.because(Reason::GrpcStatus).with_code(code)
}
