//! The outcome of an HTTP response head or of an error: the rules of [`Http`](crate::classify::Http).

use std::{any::Any, error::Error, io};

use http::{Extensions, HeaderMap, StatusCode};

use super::{
    eos::Eos,
    grpc,
    outcome::{Outcome, Reason},
    rejected::Rejected,
    rejected_kind::{RejectedKind, TimeoutPhase},
    retry_after,
};
use crate::{
    error::{self, BoxError},
    time::DeadlineSource,
};

/// Returns whether a response head is a success by itself: 2xx, and the call is not gRPC.
#[inline]
pub(crate) fn is_plain_success(
    is_grpc_call: bool,
    status: StatusCode,
    headers: &HeaderMap,
) -> bool {
    status.is_success() && !is_grpc_call && !grpc::is_grpc(headers)
}

/// Classifies a response head. Every layer that classifies by [`Http`](crate::classify::Http) uses this function.
///
/// The head decides ([`Eos::Plain`]), unless the call is gRPC and the trailers may still carry its status
/// ([`Eos::Grpc`]).
#[inline]
pub(crate) fn of_head(
    is_grpc_call: bool,
    status: StatusCode,
    headers: &HeaderMap,
    extensions: &Extensions,
) -> Eos {
    if is_plain_success(is_grpc_call, status, headers) {
        return Eos::Plain(Outcome::success());
    }
    of_other_head(is_grpc_call, status, headers, extensions)
}

fn of_other_head(
    is_grpc_call: bool,
    status: StatusCode,
    headers: &HeaderMap,
    extensions: &Extensions,
) -> Eos {
    if let Some(rejected) = extensions.get::<Rejected>() {
        return Eos::Plain(of_rejected(rejected));
    }
    let is_grpc_response = grpc::is_grpc(headers);
    if !is_grpc_call && !is_grpc_response {
        return Eos::Plain(of_status(status, headers));
    }
    if let Some(outcome) = grpc::status(headers) {
        return Eos::Plain(outcome);
    }
    let is_web = grpc::is_grpc_web(headers);
    if is_grpc_response && !is_web {
        return Eos::Grpc(grpc::missing_status(status, headers));
    }
    if is_web && status == StatusCode::OK {
        return Eos::Plain(Outcome::success());
    }
    Eos::Plain(grpc::of_http_status(status, headers))
}

/// Returns the outcome of an HTTP status of a call that is not gRPC.
fn of_status(status: StatusCode, headers: &HeaderMap) -> Outcome {
    let outcome = match status.as_u16() {
        429 | 529 => Outcome::throttled(),
        501 | 505 => Outcome::success(),
        500..=599 => Outcome::failure(),
        _ => return Outcome::success(),
    }
    .because(Reason::Status)
    .with_code(status.as_u16());
    match retry_after::retry_after(headers) {
        Some(after) => outcome.with_retry_after(after),
        None => outcome,
    }
}

/// Returns the outcome of a call that an inner layer rejected: cancelled, with the time to retry. A call that an inner
/// layer timed out is a failure, unless its caller caused it.
pub(crate) fn of_rejected(rejected: &Rejected) -> Outcome {
    let outcome = match rejected.kind() {
        RejectedKind::TimedOut(
            TimeoutPhase::Sending | TimeoutPhase::BodyRate | TimeoutPhase::Unread,
        ) => Outcome::cancelled().because(Reason::Caller),
        RejectedKind::TimedOut(_) if rejected.deadline_source() == Some(DeadlineSource::Caller) => {
            Outcome::cancelled().because(Reason::CallerDeadline)
        }
        RejectedKind::TimedOut(_) => Outcome::failure().because(Reason::Timeout),
        _ => Outcome::cancelled().because(Reason::Rejected),
    };
    match rejected.retry_after() {
        Some(after) => outcome.with_retry_after(after),
        None => outcome,
    }
}

/// Returns the outcome of an error of any type. An error of an unknown type is a failure.
pub(crate) fn of_any_error<E: 'static>(error: &E) -> Outcome {
    known(error).map_or(Outcome::failure().because(Reason::Error), Outcome::of_error)
}

/// Returns the value as an error if its type is that of a known error.
pub(crate) fn known<E: 'static>(error: &E) -> Option<&(dyn Error + 'static)> {
    let any: &dyn Any = error;
    if let Some(boxed) = any.downcast_ref::<BoxError>() {
        return Some(&**boxed);
    }
    if let Some(rejected) = any.downcast_ref::<Rejected>() {
        return Some(rejected);
    }
    #[cfg(feature = "hyper")]
    if let Some(error) = any.downcast_ref::<hyper::Error>() {
        return Some(error);
    }
    #[cfg(feature = "hyper")]
    if let Some(error) = any.downcast_ref::<hyper_util::client::legacy::Error>() {
        return Some(error);
    }
    if let Some(error) = any.downcast_ref::<crate::client_error::ClientError>() {
        return Some(error);
    }
    #[cfg(feature = "reqwest")]
    if let Some(error) = any.downcast_ref::<reqwest::Error>() {
        return Some(error);
    }
    #[cfg(feature = "tonic")]
    if let Some(error) = any.downcast_ref::<tonic::transport::Error>() {
        return Some(error);
    }
    #[cfg(feature = "tonic")]
    if let Some(error) = any.downcast_ref::<tonic::Status>() {
        return Some(error);
    }
    any.downcast_ref::<io::Error>().map(|error| error as _)
}

impl Outcome {
    /// Classifies an error by the chain of its sources, for classifiers of your own.
    ///
    /// It distinguishes where the connection failed, a timeout, a rejection by an inner layer
    /// ([`OutcomeKind::Cancelled`](super::OutcomeKind::Cancelled)) and [connection
    /// housekeeping](Self::is_housekeeping).
    ///
    /// A connection that breaks before the response is housekeeping if it had delivered a response before, and
    /// a failure if it was new. [`connect::Client`](crate::connect::Client) records whether it was new.
    /// hyper-util's own client, reqwest and tonic do not reveal it: their errors are classified as housekeeping, and
    /// the [circuit breaker](crate::breaker#connection-housekeeping) limits how many stay neutral. A connection that
    /// breaks after the response head is a failure because of [`Body`](Reason::Body).
    ///
    /// With the feature `tonic`, a `tonic::Status` is classified by its code, unless one of its sources decides.
    #[must_use]
    pub fn of_error(error: &(dyn Error + 'static)) -> Self {
        // The innermost known cause decides, because a client's wrappers are less specific than the errors that they
        // wrap.
        let mut cause = Cause::failure(Reason::Error);
        let mut transport = Transport::default();
        for error in error::chain(error) {
            if let Some(rejected) = error.downcast_ref::<Rejected>() {
                return of_rejected(rejected);
            }
            transport.record(error);
            match cause_of(error, &transport) {
                // The client failed to connect. An inner error can only make the reason more specific.
                Some(found) if cause.reason() == Reason::ConnectFailed => match found.reason() {
                    Reason::ConnectRefused => cause = found,
                    Reason::Timeout | Reason::ConnectTimeout => {
                        cause = Cause::failure(Reason::ConnectTimeout);
                    }
                    _ => {}
                },
                // An error of the caller is neutral, whatever its inner errors are.
                Some(found) if found.reason() == Reason::Caller => {
                    return found.outcome(&transport);
                }
                // The server has processed the request, so no inner error can turn this into housekeeping.
                Some(found)
                    if cause.reason() == Reason::Body && found.reason() != Reason::Timeout => {}
                // hyper returned the request. The inner error describes the connection and not the request.
                Some(found) if found.reason() == Reason::NeverSent => {
                    return found.outcome(&transport);
                }
                Some(found) => cause = found,
                None => {}
            }
        }
        cause.outcome(&transport)
    }
}

impl Rejected {
    /// Finds a rejection in a value, if its type is that of a known error, and in its sources.
    pub(crate) fn find_in_any<E: 'static>(error: &E) -> Option<&Self> {
        known(error).and_then(Self::find)
    }
}

/// The classification of one error in a chain.
#[derive(Clone, Copy, Debug)]
enum Cause {
    Known(Outcome),
    /// The connection broke before a response. The outcome depends on whether the connection was reused.
    Broken,
    /// The connection broke before the client sent the request. This is a failure if the connection was new.
    BrokenBeforeSending,
}

impl Cause {
    const fn failure(reason: Reason) -> Self {
        Self::Known(Outcome::failure().because(reason))
    }

    /// A cause that carries no information about the upstream.
    #[cfg(feature = "hyper")]
    const fn neutral(reason: Reason) -> Self {
        Self::Known(Outcome::cancelled().because(reason))
    }

    fn reason(self) -> Reason {
        match self {
            Self::Known(outcome) => outcome.reason(),
            Self::Broken => Reason::Reset,
            Self::BrokenBeforeSending => Reason::NeverSent,
        }
    }

    fn outcome(self, transport: &Transport) -> Outcome {
        match (self, transport.is_reused) {
            (Self::Known(outcome), _) => outcome,
            (Self::Broken, Some(true)) => Outcome::cancelled().because(Reason::StaleConnection),
            (Self::Broken | Self::BrokenBeforeSending, Some(false)) => {
                Outcome::failure().because(self.reason())
            }
            (Self::Broken | Self::BrokenBeforeSending, _) => {
                Outcome::cancelled().because(self.reason())
            }
        }
    }
}

/// What the errors of a chain reveal about the transport, recorded from the outermost error inwards.
#[derive(Debug, Default)]
struct Transport {
    /// The chain contains a hyper error, so the errors that it wraps occurred on a connection of a client.
    is_hyper: bool,
    /// Whether the connection had delivered a response head before this request; `None` if unknown.
    is_reused: Option<bool>,
}

impl Transport {
    fn record(&mut self, error: &(dyn Error + 'static)) {
        if let Some(error) = error.downcast_ref::<super::connection::ConnectionError>() {
            self.is_reused = Some(error.is_reused());
        }
        // hyper-util attaches the connection to each error of a request that was sent over one. An error without
        // a connection comes from connecting, or from the HTTP/2 handshake of a new connection.
        #[cfg(feature = "hyper")]
        if let Some(error) = error.downcast_ref::<hyper_util::client::legacy::Error>() {
            if error.connect_info().is_none() {
                self.is_reused.get_or_insert(false);
            }
        }
        #[cfg(feature = "hyper")]
        if error.is::<hyper::Error>() {
            self.is_hyper = true;
        }
        let _ = error;
    }
}

/// Classifies one error of a chain. `None` if its type or its kind carries no information.
fn cause_of(error: &(dyn Error + 'static), transport: &Transport) -> Option<Cause> {
    if let Some(error) = error.downcast_ref::<io::Error>() {
        return of_io(error.kind(), transport);
    }
    if error.is::<tokio::time::error::Elapsed>() {
        return Some(Cause::failure(Reason::Timeout));
    }
    #[cfg(feature = "hyper")]
    if let Some(error) = error.downcast_ref::<hyper_util::client::legacy::Error>() {
        if is_unsendable(error) {
            return Some(Cause::neutral(Reason::Caller));
        }
        return error.is_connect().then_some(Cause::failure(Reason::ConnectFailed));
    }
    #[cfg(feature = "hyper")]
    if let Some(error) = error.downcast_ref::<hyper::Error>() {
        return of_hyper(error);
    }
    #[cfg(feature = "hyper")]
    if let Some(error) = error.downcast_ref::<h2::Error>() {
        return of_h2(error, transport);
    }
    #[cfg(feature = "reqwest")]
    if let Some(error) = error.downcast_ref::<reqwest::Error>() {
        if error.is_builder() {
            return Some(Cause::neutral(Reason::Caller));
        }
        if error.is_connect() {
            return Some(Cause::failure(Reason::ConnectFailed));
        }
        if error.is_timeout() {
            return Some(Cause::failure(Reason::Timeout));
        }
        return (error.is_body() || error.is_decode()).then_some(Cause::failure(Reason::Body));
    }
    #[cfg(feature = "tonic")]
    if error.is::<tonic::TimeoutExpired>() {
        return Some(Cause::failure(Reason::Timeout));
    }
    // If the status was made from an error, that error is its source.
    #[cfg(feature = "tonic")]
    if let Some(status) = error.downcast_ref::<tonic::Status>() {
        return Some(Cause::Known(grpc::of_status(status)));
    }
    None
}

/// Returns whether the request cannot be sent as it is: its URI is relative, or its method or version is not supported.
///
/// Only the text of the error reveals this: `client error (UserAbsoluteUriRequired)`. Such an error has no source.
#[cfg(feature = "hyper")]
fn is_unsendable(error: &hyper_util::client::legacy::Error) -> bool {
    error.source().is_none() && error.to_string().starts_with("client error (User")
}

/// Classifies an I/O error by its kind.
fn of_io(kind: io::ErrorKind, transport: &Transport) -> Option<Cause> {
    use io::ErrorKind as K;
    Some(match kind {
        K::ConnectionRefused => Cause::failure(Reason::ConnectRefused),
        K::AddrNotAvailable => Cause::failure(Reason::ConnectFailed),
        K::TimedOut => Cause::failure(Reason::Timeout),
        // The network failed; no peer closed the connection. Such a failure also breaks established connections,
        // with a request on them that the server may have seen. Only an outer error can prove that the client
        // was connecting.
        K::HostUnreachable | K::NetworkUnreachable | K::NetworkDown => {
            Cause::failure(Reason::Reset)
        }
        K::ConnectionReset | K::ConnectionAborted | K::BrokenPipe | K::UnexpectedEof => {
            // Without hyper in the chain, the error need not come from a connection of a client.
            if transport.is_hyper { Cause::Broken } else { Cause::failure(Reason::Reset) }
        }
        _ => return None,
    })
}

/// Classifies an error of hyper. An error that hyper reports for a request that it still had is `NeverSent`.
#[cfg(feature = "hyper")]
fn of_hyper(error: &hyper::Error) -> Option<Cause> {
    if is_dispatch_gone(error) {
        return Some(Cause::Broken);
    }
    if error.is_user() {
        return Some(Cause::neutral(Reason::Caller));
    }
    if is_response_body(error) {
        return Some(Cause::failure(Reason::Body));
    }
    if error.is_canceled() && error.source().is_some_and(|source| source.is::<hyper::Error>()) {
        return Some(Cause::BrokenBeforeSending);
    }
    if error.is_canceled() || error.is_closed() {
        return Some(Cause::neutral(Reason::NeverSent));
    }
    if error.is_incomplete_message() {
        return Some(Cause::Broken);
    }
    error.is_timeout().then_some(Cause::failure(Reason::Timeout))
}

/// Returns whether the task that drives the connection ended with the request still in it, as an HTTP/2 connection does
/// that receives a GOAWAY with an error code.
///
/// hyper classifies this as a user error and has no accessor for it. It is a user error only if the request body
/// panicked.
#[cfg(feature = "hyper")]
fn is_dispatch_gone(error: &hyper::Error) -> bool {
    let has_panicked = |source: &(dyn Error + 'static)| source.to_string() == "user code panicked";
    error.is_user()
        && error.to_string().starts_with("dispatch task is gone")
        && !error.source().is_some_and(has_panicked)
}

/// Returns whether the connection or the stream failed after the response head. hyper has no accessor for it.
#[cfg(feature = "hyper")]
fn is_response_body(error: &hyper::Error) -> bool {
    error.to_string() == "error reading a body from connection"
}

/// Classifies an error of h2 (RFC 9113 §6.8, §8.7).
#[cfg(feature = "hyper")]
fn of_h2(error: &h2::Error, transport: &Transport) -> Option<Cause> {
    if let Some(error) = error.get_io() {
        return of_io(error.kind(), transport);
    }
    // Reset by neither the server nor the library: hyper resets the stream if the request body fails.
    if error.is_reset() && !error.is_remote() && !error.is_library() {
        return Some(Cause::neutral(Reason::Caller));
    }
    if error.is_reset() && error.is_remote() && error.reason() == Some(h2::Reason::REFUSED_STREAM) {
        return Some(Cause::neutral(Reason::RefusedStream));
    }
    // h2 reports a GOAWAY of the server only for streams above the last stream id, whatever its code.
    if error.is_go_away() && error.is_remote() {
        return Some(match error.reason() {
            Some(h2::Reason::NO_ERROR) => Cause::neutral(Reason::GoAway),
            _ => Cause::failure(Reason::GoAway),
        });
    }
    (error.is_reset() || error.is_go_away()).then_some(Cause::failure(Reason::Reset))
}

#[cfg(test)]
mod tests {
    #[cfg(feature = "tonic")]
    use super::super::outcome::OutcomeKind;
    use super::*;
    use http::Response;

    fn head(is_grpc_call: bool, response: &Response<()>) -> Eos {
        of_head(is_grpc_call, response.status(), response.headers(), response.extensions())
    }

    fn outcome(response: &Response<()>) -> Option<Outcome> {
        match head(false, response) {
            Eos::Plain(outcome) => Some(outcome),
            _ => None,
        }
    }

    #[test]
    fn statuses() {
        for (status, kind) in [
            (200, "Success"),
            (404, "Success"),
            (408, "Success"),
            (429, "Throttled"),
            (500, "Failure"),
            (501, "Success"),
            (503, "Failure"),
            (505, "Success"),
            (529, "Throttled"),
        ] {
            let response = Response::builder().status(status).body(()).unwrap();
            let outcome = outcome(&response).unwrap();
            assert_eq!(format!("{:?}", outcome.kind()), kind, "{status}");
        }
    }

    #[test]
    fn grpc_status_in_the_head_or_later() {
        let ok = Response::builder().header("content-type", "application/grpc+proto");
        assert!(outcome(&ok.body(()).unwrap()).is_none(), "the trailers decide");
        let bad = Response::builder()
            .header("content-type", "application/grpc")
            .header("grpc-status", "14")
            .body(())
            .unwrap();
        assert_eq!(outcome(&bad).unwrap().code(), Some(14));
        assert!(outcome(&bad).unwrap().is_failure());
        let missing = grpc::missing_status(StatusCode::OK, &HeaderMap::new());
        assert_eq!(missing.reason(), Reason::MissingStatus);
    }

    #[test]
    fn the_request_decides_whether_a_response_without_a_grpc_content_type_is_grpc() {
        let html = Response::builder().header("content-type", "text/html").body(()).unwrap();
        assert!(matches!(head(false, &html), Eos::Plain(outcome) if outcome.is_success()));
        assert!(matches!(head(true, &html), Eos::Plain(outcome) if outcome.code() == Some(2)));
    }

    #[test]
    fn io_error_in_a_box_is_classified_by_its_kind() {
        let boxed: BoxError = Box::new(io::Error::from(io::ErrorKind::ConnectionRefused));
        assert_eq!(of_any_error(&boxed).reason(), Reason::ConnectRefused);
        assert_eq!(of_any_error(&"opaque").reason(), Reason::Error);
    }

    #[cfg(feature = "tonic")]
    #[test]
    fn a_status_of_tonic_is_classified_by_its_code_unless_its_source_decides() {
        use tonic::{Code, Status};

        let outcome = |code| of_any_error(&Status::new(code, ""));
        assert!(outcome(Code::NotFound).is_success());
        assert_eq!(outcome(Code::NotFound).code(), Some(5));
        assert!(outcome(Code::Unavailable).is_failure());
        assert_eq!(outcome(Code::ResourceExhausted).kind(), OutcomeKind::Throttled);
        assert_eq!(outcome(Code::Cancelled).kind(), OutcomeKind::Cancelled);
        // The timeout of a tonic server, as in the headers of a response.
        let timeout = of_any_error(&Status::cancelled("Timeout expired"));
        assert_eq!((timeout.is_failure(), timeout.code()), (true, Some(4)));
        let boxed: BoxError = Box::new(Status::not_found(""));
        assert!(of_any_error(&boxed).is_success());
        let no_connection = io::Error::from(io::ErrorKind::ConnectionRefused);
        let status = Status::from_error(Box::new(no_connection));
        assert_eq!(of_any_error(&status).reason(), Reason::ConnectRefused);
        let rejected = Status::from_error(Box::new(Rejected::new(RejectedKind::Open)));
        assert_eq!(of_any_error(&rejected).reason(), Reason::Rejected);
    }

    /// Only a connection of a client can be stale.
    #[test]
    fn an_io_error_without_a_client_is_a_failure() {
        for kind in [
            io::ErrorKind::ConnectionReset,
            io::ErrorKind::ConnectionAborted,
            io::ErrorKind::BrokenPipe,
            io::ErrorKind::UnexpectedEof,
            io::ErrorKind::HostUnreachable,
            io::ErrorKind::NetworkUnreachable,
            io::ErrorKind::NetworkDown,
        ] {
            let outcome = Outcome::of_error(&io::Error::from(kind));
            assert_eq!(outcome, Outcome::failure().because(Reason::Reset), "{kind:?}");
        }
    }

    #[test]
    fn a_reset_is_housekeeping_only_if_the_connection_may_be_reused() {
        let broken = |is_hyper, is_reused| {
            let transport = Transport { is_hyper, is_reused };
            let cause = of_io(io::ErrorKind::ConnectionReset, &transport).unwrap();
            cause.outcome(&transport)
        };
        let cancelled = Outcome::cancelled();
        assert_eq!(broken(true, Some(true)), cancelled.because(Reason::StaleConnection));
        assert_eq!(broken(true, Some(false)), Outcome::failure().because(Reason::Reset));
        assert_eq!(broken(true, None), cancelled.because(Reason::Reset));
        assert_eq!(broken(false, None), Outcome::failure().because(Reason::Reset));
        // The network failed; no peer closed the connection.
        let transport = Transport { is_hyper: true, is_reused: Some(true) };
        let down = of_io(io::ErrorKind::NetworkDown, &transport).unwrap();
        assert_eq!(down.outcome(&transport), Outcome::failure().because(Reason::Reset));
    }
}
