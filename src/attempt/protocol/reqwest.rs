//! Requests and responses of a bare `reqwest::Client`.

use std::{
    fmt, mem,
    task::{Context, Poll},
    time::Duration,
};

use ::http::{Request as Head, Response as HttpResponse};
use reqwest::{Body, Error, Request, Response};

use super::super::{
    hedged::{Hedged, SentBefore},
    record::{Attempts, RetryError},
    verdict::{BodyReplay, Classified, RetryAction, SafeRequests},
};
use super::{
    classify::{classify_begun, classify_head, classify_missing, of_reason},
    saved_request::{is_safe, keyed},
    traits::{AttemptNumber, AttemptResponse, ClassifyAttempt, ReplayRequest, SaveRules},
};
use crate::{
    error::BoxError,
    outcome::{Outcome, grpc},
    sealed::Sealed,
};

/// The protocol for the types of reqwest: see [`RetryLayer::reqwest`](crate::retry::RetryLayer::reqwest).
// A type of its own, because with a second request type for `Http` the type of `ready()` would be ambiguous.
#[derive(Clone, Copy, Debug)]
pub struct Reqwest;

impl Sealed for Reqwest {}

impl ReplayRequest<Request> for Reqwest {
    type Request = Request;
    type Saved = Request;

    fn is_grpc(request: &Request) -> bool {
        grpc::is_grpc_call(request.method(), request.headers())
    }

    fn save(request: &Request, rules: SaveRules<'_>) -> Option<Request> {
        // `None` for a stream, which can be read only once. Any other body is shared, not copied.
        if rules.allow(request.method(), request.headers()) { request.try_clone() } else { None }
    }

    fn first_attempt(request: Request, _: Option<&mut Request>, _: SaveRules<'_>) -> Request {
        request
    }

    fn replay(saved: &Request, _: AttemptNumber) -> Request {
        Self::hedge_attempt(saved, 1)
    }

    fn head(saved: &Request) -> Head<()> {
        let mut head = Head::new(());
        *head.method_mut() = saved.method().clone();
        *head.uri_mut() = saved.url().as_str().parse().unwrap_or_default();
        *head.headers_mut() = saved.headers().clone();
        head
    }

    fn header<'a>(saved: &'a Request, name: &str) -> Option<&'a [u8]> {
        saved.headers().get(name).map(|value| value.as_bytes())
    }

    fn hedge_attempt(saved: &Request, _: u32) -> Request {
        let Some(copy) = saved.try_clone() else { unreachable!("a stream is not saved") };
        copy
    }

    fn is_safe(saved: &Request, by: &SafeRequests) -> bool {
        is_safe(saved.method(), by, || keyed(saved.headers()))
    }

    fn body_replay(_: &Request) -> BodyReplay {
        BodyReplay::Yes
    }

    fn take_over(_: &Request) -> bool {
        true
    }
}

/// A response of reqwest, and its class.
pub enum PendingReqwest {
    /// The result, not yet returned or discarded.
    Result(Result<Response, BoxError>, Classified),
    /// A discarded body, and the number of bytes drained from it.
    Discarded(Body, u64),
}

/// Omits the response: reqwest's own `Debug` shows its URL and headers.
impl fmt::Debug for PendingReqwest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Result(..) => "PendingReqwest(result)",
            Self::Discarded(..) => "PendingReqwest(discarded)",
        })
    }
}

impl PendingReqwest {
    fn result(self) -> Result<Response, BoxError> {
        match self {
            Self::Result(result, _) => result,
            Self::Discarded(..) => unreachable!("a discarded response is not returned"),
        }
    }
}

fn classify_error(error: &(dyn std::error::Error + 'static)) -> Classified {
    let outcome = Outcome::of_error(error);
    (of_reason(outcome), outcome)
}

impl ClassifyAttempt<Response, Error> for Reqwest {
    type Response = Response;
    type Error = BoxError;
    type Pending = PendingReqwest;

    const MAX_FIRST_FRAME_WAIT: Duration = Duration::ZERO;

    fn classify(&self, is_grpc_call: bool, result: &Result<Response, Error>) -> Option<Classified> {
        Some(match result {
            Ok(response) => {
                let (status, headers) = (response.status(), response.headers());
                let classified =
                    classify_head(is_grpc_call, status, headers, response.extensions());
                // reqwest does not expose the trailers.
                classified.unwrap_or_else(|| classify_begun(classify_missing(status, headers)))
            }
            Err(error) => classify_error(error),
        })
    }

    fn return_first(result: Result<Response, Error>) -> Result<Response, BoxError> {
        result
            .map_err(|error| Box::new(RetryError::new(Attempts::FIRST_ERROR, error.into())).into())
    }

    fn pending(result: Result<Response, Error>, classified: Option<Classified>) -> PendingReqwest {
        // `classify` always returns a class here, so this is never the default.
        let classified = classified.unwrap_or((RetryAction::Done, Outcome::success()));
        PendingReqwest::Result(result.map_err(BoxError::from), classified)
    }

    fn poll_classify(pending: &mut PendingReqwest, _: &mut Context<'_>) -> Poll<Classified> {
        Poll::Ready(match pending {
            PendingReqwest::Result(_, classified) => *classified,
            PendingReqwest::Discarded(..) => unreachable!("classified before it is discarded"),
        })
    }

    fn is_error(pending: &PendingReqwest) -> bool {
        matches!(pending, PendingReqwest::Result(Err(_), _))
    }

    fn response(pending: &PendingReqwest) -> Option<AttemptResponse<'_>> {
        match pending {
            PendingReqwest::Result(Ok(response), _) => Some(AttemptResponse::Head(
                response.status(),
                response.headers(),
                response.extensions(),
            )),
            PendingReqwest::Result(Err(error), _) => Some(AttemptResponse::Error(&**error)),
            PendingReqwest::Discarded(..) => None,
        }
    }

    fn poll_discard(pending: &mut PendingReqwest, cap: u64, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match pending {
                PendingReqwest::Discarded(body, drained) => {
                    return crate::drain::poll_drain(body, drained, cap, cx);
                }
                PendingReqwest::Result(..) => {
                    let nothing = PendingReqwest::Discarded(Body::default(), 0);
                    // The body can only be taken by consuming the response.
                    if let Ok(response) = mem::replace(pending, nothing).result() {
                        *pending =
                            PendingReqwest::Discarded(HttpResponse::from(response).into_body(), 0);
                    }
                }
            }
        }
    }

    fn return_recorded(
        pending: PendingReqwest,
        record: Option<Attempts>,
    ) -> Result<Response, BoxError> {
        match pending.result() {
            Ok(mut response) => {
                if let Some(record) = record {
                    response.extensions_mut().insert(record);
                }
                Ok(response)
            }
            Err(error) => {
                Err(Box::new(RetryError::new(record.unwrap_or(Attempts::FIRST_ERROR), error)))
            }
        }
    }

    const ACCEPTS_ERRORS: bool = true;

    fn pending_error(error: BoxError) -> Option<(PendingReqwest, Classified)> {
        let classified = classify_error(&*error);
        Some((PendingReqwest::Result(Err(error), classified), classified))
    }

    fn readiness_error(error: Error, record: Attempts) -> BoxError {
        Box::new(RetryError::new(record, error.into()))
    }

    fn return_hedged(
        pending: PendingReqwest,
        hedged: Option<Hedged>,
    ) -> Result<Response, BoxError> {
        let mut response = pending.result()?;
        if let Some(hedged) = hedged {
            response.extensions_mut().insert(hedged);
        }
        Ok(response)
    }

    fn mark_sent_before(result: Result<Response, BoxError>) -> Result<Response, BoxError> {
        let mut response = result.map_err(SentBefore)?;
        response.extensions_mut().insert(SentBefore(()));
        Ok(response)
    }

    fn inner_error(error: Error) -> BoxError {
        error.into()
    }
}
