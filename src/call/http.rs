//! The outcome of an HTTP response head or of an error: the rules of [`Http`](super::Http).

use std::{any::Any, error::Error, io};

use http::{Extensions, HeaderMap, StatusCode};

use super::{Outcome, Phase, Reason, Rejected, RejectedKind, body::Eos, grpc, hint};
use crate::{BoxError, error};

/// Whether a response head is a success by itself: 2xx, and the call is not gRPC.
#[inline]
pub(crate) fn is_plain_success(
    is_grpc_call: bool,
    status: StatusCode,
    headers: &HeaderMap,
) -> bool {
    status.is_success() && !is_grpc_call && !grpc::is_grpc(headers)
}

/// Classifies a response head: every layer that follows [`Http`](super::Http) uses this function.
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

/// The outcome of an HTTP status, where the call is not gRPC.
fn of_status(status: StatusCode, headers: &HeaderMap) -> Outcome {
    let outcome = match status.as_u16() {
        429 | 529 => Outcome::throttled(),
        501 | 505 => Outcome::success(),
        500..=599 => Outcome::failure(),
        _ => return Outcome::success(),
    }
    .because(Reason::Status)
    .with_code(status.as_u16());
    match hint::retry_after(headers) {
        Some(after) => outcome.with_retry_after(after),
        None => outcome,
    }
}

/// The outcome of a call that a layer further in refused: neutral, with its hint. One that it ended, because
/// what was called was too slow, is a failure.
pub(crate) fn of_rejected(refused: &Rejected) -> Outcome {
    let outcome = match refused.kind() {
        RejectedKind::TimedOut(Phase::Sending) => Outcome::cancelled().because(Reason::Caller),
        RejectedKind::TimedOut(_) => Outcome::failure().because(Reason::Timeout),
        _ => Outcome::cancelled().because(Reason::Rejected),
    };
    match refused.retry_after() {
        Some(after) => outcome.with_retry_after(after),
        None => outcome,
    }
}

/// The outcome of an error of a type that is not known here.
pub(crate) fn of_any_error<E: 'static>(error: &E) -> Outcome {
    known(error).map_or(Outcome::failure().because(Reason::Error), of_error)
}

/// The error in a value of which it is not known whether it is one.
pub(crate) fn known<E: 'static>(error: &E) -> Option<&(dyn Error + 'static)> {
    let any: &dyn Any = error;
    if let Some(boxed) = any.downcast_ref::<BoxError>() {
        return Some(&**boxed);
    }
    if let Some(refused) = any.downcast_ref::<Rejected>() {
        return Some(refused);
    }
    #[cfg(feature = "hyper")]
    if let Some(error) = any.downcast_ref::<hyper::Error>() {
        return Some(error);
    }
    #[cfg(feature = "hyper-util")]
    if let Some(error) = any.downcast_ref::<hyper_util::client::legacy::Error>() {
        return Some(error);
    }
    #[cfg(feature = "reqwest")]
    if let Some(error) = any.downcast_ref::<reqwest::Error>() {
        return Some(error);
    }
    any.downcast_ref::<io::Error>().map(|error| error as _)
}

/// The outcome of an error, told from the chain of its sources.
///
/// The innermost cause that is known wins: a client's own wrappers say less than what they wrap.
pub(crate) fn of_error(error: &(dyn Error + 'static)) -> Outcome {
    let mut reason = Reason::Error;
    let mut next = Some(error);
    for _ in 0..16 {
        let Some(error) = next else { break };
        if let Some(refused) = error.downcast_ref::<Rejected>() {
            return of_rejected(refused);
        }
        match reason_of(error) {
            // Known to have happened while connecting: nothing further in can say more than how.
            Some(found) if reason == Reason::ConnectFailed => match found {
                Reason::ConnectRefused => reason = found,
                Reason::Timeout | Reason::ConnectTimeout => reason = Reason::ConnectTimeout,
                _ => {}
            },
            // Neutral, whatever it was that broke the request off.
            Some(Reason::Caller) => return Outcome::cancelled().because(Reason::Caller),
            Some(found) => reason = found,
            None => {}
        }
        next = error::next(error);
    }
    Outcome::failure().because(reason)
}

fn reason_of(error: &(dyn Error + 'static)) -> Option<Reason> {
    if let Some(error) = error.downcast_ref::<io::Error>() {
        return of_io(error.kind());
    }
    if error.is::<tokio::time::error::Elapsed>() {
        return Some(Reason::Timeout);
    }
    #[cfg(feature = "hyper-util")]
    if let Some(error) = error.downcast_ref::<hyper_util::client::legacy::Error>() {
        return error.is_connect().then_some(Reason::ConnectFailed);
    }
    #[cfg(feature = "hyper")]
    if let Some(error) = error.downcast_ref::<hyper::Error>() {
        return of_hyper(error);
    }
    #[cfg(feature = "hyper")]
    if let Some(error) = error.downcast_ref::<h2::Error>() {
        return of_h2(error);
    }
    #[cfg(feature = "reqwest")]
    if let Some(error) = error.downcast_ref::<reqwest::Error>() {
        if error.is_builder() {
            return Some(Reason::Caller);
        }
        if error.is_connect() {
            return Some(Reason::ConnectFailed);
        }
        return error.is_timeout().then_some(Reason::Timeout);
    }
    None
}

fn of_io(kind: io::ErrorKind) -> Option<Reason> {
    use io::ErrorKind as K;
    Some(match kind {
        K::ConnectionRefused => Reason::ConnectRefused,
        K::AddrNotAvailable => Reason::ConnectFailed,
        K::TimedOut => Reason::Timeout,
        // A network that goes away is also what an established connection dies of, with a request on it
        // that may have been seen: that a connection was being made has to be known from elsewhere.
        K::HostUnreachable
        | K::NetworkUnreachable
        | K::NetworkDown
        | K::ConnectionReset
        | K::ConnectionAborted
        | K::BrokenPipe
        | K::UnexpectedEof => Reason::Reset,
        _ => return None,
    })
}

#[cfg(feature = "hyper")]
fn of_hyper(error: &hyper::Error) -> Option<Reason> {
    if error.is_user() {
        return Some(Reason::Caller);
    }
    if error.is_canceled() || error.is_closed() {
        return Some(Reason::NeverSent);
    }
    if error.is_incomplete_message() {
        return Some(Reason::StaleConnection);
    }
    error.is_timeout().then_some(Reason::Timeout)
}

#[cfg(feature = "hyper")]
fn of_h2(error: &h2::Error) -> Option<Reason> {
    // Reset by neither the server nor the library: hyper's way to say that the request body broke off.
    if error.is_reset() && !error.is_remote() && !error.is_library() {
        return Some(Reason::Caller);
    }
    if error.is_reset() && error.is_remote() && error.reason() == Some(h2::Reason::REFUSED_STREAM) {
        return Some(Reason::RefusedStream);
    }
    // Whatever made the server go away: h2 tells it only of streams above the last one.
    if error.is_go_away() && error.is_remote() {
        return Some(Reason::GoAway);
    }
    (error.is_reset() || error.is_go_away()).then_some(Reason::Reset)
}

#[cfg(test)]
mod tests {
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
    fn an_io_error_under_a_box_is_told_by_its_kind() {
        let boxed: BoxError = Box::new(io::Error::from(io::ErrorKind::ConnectionRefused));
        assert_eq!(of_any_error(&boxed).reason(), Reason::ConnectRefused);
        assert_eq!(of_any_error(&"opaque").reason(), Reason::Error);
    }
}
