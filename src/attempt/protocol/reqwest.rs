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
    verdict::{BodyReplay, RetryAction, SafeRequests},
};
use super::{
    AttemptResponse, ClassifyAttempt, Numbered, ReplayRequest, Rules,
    classify::{classify_begun, classify_head, classify_missing, of_reason},
    saved_request::{is_safe, keyed},
};
use crate::{
    error::BoxError,
    outcome::{Outcome, grpc},
};

/// The protocol for the types of reqwest: see [`RetryLayer::reqwest`](crate::retry::RetryLayer::reqwest).
// A type of its own, because with a second request type for `Http` the type of `ready()` would be ambiguous.
#[derive(Clone, Copy, Debug)]
pub struct Reqwest;

impl ReplayRequest<Request> for Reqwest {
    type Request = Request;
    type Kept = Request;

    fn is_grpc(request: &Request) -> bool {
        grpc::is_grpc_call(request.method(), request.headers())
    }

    fn keep(request: &Request, rules: Rules<'_>) -> Option<Request> {
        // `None` for a stream, which can be read only once. Any other body is shared, not copied.
        if rules.keeps(request.method(), request.headers()) { request.try_clone() } else { None }
    }

    fn first(request: Request, _: Option<&mut Request>, _: Rules<'_>) -> Request {
        request
    }

    fn again(kept: &Request, _: Numbered) -> Request {
        Self::hedge_attempt(kept, 1)
    }

    fn head(kept: &Request) -> Head<()> {
        let mut head = Head::new(());
        *head.method_mut() = kept.method().clone();
        *head.uri_mut() = kept.url().as_str().parse().unwrap_or_default();
        *head.headers_mut() = kept.headers().clone();
        head
    }

    fn header<'a>(kept: &'a Request, name: &str) -> Option<&'a [u8]> {
        kept.headers().get(name).map(|value| value.as_bytes())
    }

    fn hedge_attempt(kept: &Request, _: u32) -> Request {
        let Some(copy) = kept.try_clone() else { unreachable!("a stream is not saved") };
        copy
    }

    fn safe(kept: &Request, by: &SafeRequests) -> bool {
        is_safe(kept.method(), by, || keyed(kept.headers()))
    }

    fn repeatable(_: &Request) -> BodyReplay {
        BodyReplay::Yes
    }

    fn claim(_: &Request) -> bool {
        true
    }
}

/// A response of reqwest, and its class.
pub enum PendingReqwest {
    /// The result, not yet returned or discarded.
    Answer(Result<Response, BoxError>, (RetryAction, Outcome)),
    /// A discarded body, and the number of bytes drained from it.
    Discarded(Body, u64),
}

/// Omits the response: reqwest's own `Debug` shows its URL and headers.
impl fmt::Debug for PendingReqwest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Answer(..) => "PendingReqwest(answer)",
            Self::Discarded(..) => "PendingReqwest(discarded)",
        })
    }
}

impl PendingReqwest {
    fn result(self) -> Result<Response, BoxError> {
        match self {
            Self::Answer(result, _) => result,
            Self::Discarded(..) => unreachable!("a discarded response is not returned"),
        }
    }
}

fn weigh_error(error: &(dyn std::error::Error + 'static)) -> (RetryAction, Outcome) {
    let outcome = Outcome::of_error(error);
    (of_reason(outcome), outcome)
}

impl ClassifyAttempt<Response, Error> for Reqwest {
    type Response = Response;
    type Error = BoxError;
    type Held = PendingReqwest;

    const PATIENCE: Duration = Duration::ZERO;

    fn weigh(
        &self,
        is_grpc_call: bool,
        result: &Result<Response, Error>,
    ) -> Option<(RetryAction, Outcome)> {
        Some(match result {
            Ok(response) => {
                let (status, headers) = (response.status(), response.headers());
                let weight = classify_head(is_grpc_call, status, headers, response.extensions());
                // reqwest does not expose the trailers.
                weight.unwrap_or_else(|| classify_begun(classify_missing(status, headers)))
            }
            Err(error) => weigh_error(error),
        })
    }

    fn give(result: Result<Response, Error>) -> Result<Response, BoxError> {
        result
            .map_err(|error| Box::new(RetryError::new(Attempts::FIRST_ERROR, error.into())).into())
    }

    fn hold(
        result: Result<Response, Error>,
        weight: Option<(RetryAction, Outcome)>,
    ) -> PendingReqwest {
        // `weigh` always returns a class here, so this is never the default.
        let weight = weight.unwrap_or((RetryAction::Final, Outcome::success()));
        PendingReqwest::Answer(result.map_err(BoxError::from), weight)
    }

    fn poll_weigh(held: &mut PendingReqwest, _: &mut Context<'_>) -> Poll<(RetryAction, Outcome)> {
        Poll::Ready(match held {
            PendingReqwest::Answer(_, weight) => *weight,
            PendingReqwest::Discarded(..) => unreachable!("classified before it is discarded"),
        })
    }

    fn is_error(held: &PendingReqwest) -> bool {
        matches!(held, PendingReqwest::Answer(Err(_), _))
    }

    fn answer(held: &PendingReqwest) -> Option<AttemptResponse<'_>> {
        match held {
            PendingReqwest::Answer(Ok(response), _) => Some(AttemptResponse::Head(
                response.status(),
                response.headers(),
                response.extensions(),
            )),
            PendingReqwest::Answer(Err(error), _) => Some(AttemptResponse::Error(&**error)),
            PendingReqwest::Discarded(..) => None,
        }
    }

    fn poll_discard(held: &mut PendingReqwest, cap: u64, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match held {
                PendingReqwest::Discarded(body, drained) => {
                    return crate::drain::poll_drain(body, drained, cap, cx);
                }
                PendingReqwest::Answer(..) => {
                    let nothing = PendingReqwest::Discarded(Body::default(), 0);
                    // The body can only be taken by consuming the response.
                    if let Ok(response) = mem::replace(held, nothing).result() {
                        *held =
                            PendingReqwest::Discarded(HttpResponse::from(response).into_body(), 0);
                    }
                }
            }
        }
    }

    fn release(held: PendingReqwest, record: Option<Attempts>) -> Result<Response, BoxError> {
        match held.result() {
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

    const TAKES_ERRORS: bool = true;

    fn failed(error: BoxError) -> Option<(PendingReqwest, (RetryAction, Outcome))> {
        let weight = weigh_error(&*error);
        Some((PendingReqwest::Answer(Err(error), weight), weight))
    }

    fn broken(error: Error, record: Attempts) -> BoxError {
        Box::new(RetryError::new(record, error.into()))
    }

    fn pass(held: PendingReqwest, hedged: Option<Hedged>) -> Result<Response, BoxError> {
        let mut response = held.result()?;
        if let Some(hedged) = hedged {
            response.extensions_mut().insert(hedged);
        }
        Ok(response)
    }

    fn sent_before(result: Result<Response, BoxError>) -> Result<Response, BoxError> {
        let mut response = result.map_err(SentBefore)?;
        response.extensions_mut().insert(SentBefore(()));
        Ok(response)
    }

    fn error(error: Error) -> BoxError {
        error.into()
    }
}
