//! Requests and responses of HTTP and gRPC.

use std::{
    fmt,
    task::{Context, Poll, ready},
    time::Duration,
};

use http::{Request, Response};
use http_body::Body;

use super::super::{
    hedged::{HedgeAttempt, Hedged, SentBefore},
    peeked_body::{Peek, PeekedBody},
    record::{Attempt, Attempts, RetryError},
    replay::ReplayBody,
    verdict::{BodyReplay, RetryAction, SafeRequests},
};
use super::{
    AttemptResponse, ClassifyAttempt, Numbered, ReplayRequest, Rules,
    classify::{
        classify_begun, classify_failed_body, classify_head, classify_missing, of_reason,
        weigh_grpc,
    },
    saved_request::SavedRequest,
};
use crate::{
    classify::Http,
    drain::poll_drain,
    error::BoxError,
    outcome::{Outcome, SentMark, grpc},
    time::Deadline,
};

// ===== The request =====

const PREVIOUS_ATTEMPTS: &str = "grpc-previous-rpc-attempts";

/// Adds the number of previous attempts that the server may have seen to a gRPC request (gRFC A6).
fn after<B>(attempts: u32, mut request: Request<B>) -> Request<B> {
    if attempts > 0 && grpc::is_grpc_call(request.method(), request.headers()) {
        request.headers_mut().insert(PREVIOUS_ATTEMPTS, attempts.into());
    }
    request
}

/// Publishes a mark of the request's progress, unless it has no body or an outer layer has published one.
#[inline]
fn publish<B: Body>(request: &mut Request<B>) -> Option<SentMark> {
    if request.body().is_end_stream() || request.extensions().get::<SentMark>().is_some() {
        return None;
    }
    let mark = SentMark::new();
    request.extensions_mut().insert(mark.clone());
    Some(mark)
}

impl<B: Body> ReplayRequest<Request<B>> for Http {
    type Request = Request<ReplayBody<B>>;
    type Kept = SavedRequest<B>;

    #[inline]
    fn is_grpc(request: &Request<B>) -> bool {
        grpc::is_grpc_call(request.method(), request.headers())
    }

    // An unsafe request is saved too. It may be retried after `REFUSED_STREAM`, although its body has been sent.
    #[inline]
    fn keep(request: &Request<B>, rules: Rules<'_>) -> Option<SavedRequest<B>> {
        rules.keeps(request.method(), request.headers()).then(|| SavedRequest::of(request))
    }

    #[inline]
    fn first(
        mut request: Request<B>,
        kept: Option<&mut SavedRequest<B>>,
        rules: Rules<'_>,
    ) -> Self::Request {
        let mark = if rules.marks { publish(&mut request) } else { None };
        request.map(|body| {
            let body = match kept {
                Some(kept) => {
                    kept.marks = rules.marks;
                    let (body, tape) = ReplayBody::new(body, rules.body_cap);
                    kept.tape = tape;
                    body
                }
                None => ReplayBody::once(body),
            };
            body.marked(mark)
        })
    }

    fn again(kept: &SavedRequest<B>, attempt: Numbered) -> Self::Request {
        after(attempt.seen, kept.marked(Attempt(attempt.number)))
    }

    fn head(kept: &SavedRequest<B>) -> Request<()> {
        kept.request(())
    }

    fn header<'a>(kept: &'a SavedRequest<B>, name: &str) -> Option<&'a [u8]> {
        kept.header(name)
    }

    fn deadline(kept: &SavedRequest<B>) -> Option<Deadline> {
        kept.deadline()
    }

    fn hedge_attempt(kept: &SavedRequest<B>, number: u32) -> Self::Request {
        let copy = kept.marked(HedgeAttempt(number));
        // The request may be an attempt of an outer retry, with a number of its own.
        let before = copy.headers().get(PREVIOUS_ATTEMPTS);
        let before: u32 = before.and_then(|n| n.to_str().ok()?.parse().ok()).unwrap_or(0);
        after(before.saturating_add(number), copy)
    }

    fn safe(kept: &SavedRequest<B>, by: &SafeRequests) -> bool {
        kept.safe(by)
    }

    fn repeatable(kept: &SavedRequest<B>) -> BodyReplay {
        kept.repeatable()
    }

    fn claim(kept: &SavedRequest<B>) -> bool {
        kept.tape.claim()
    }
}

// ===== The response =====

/// A response or an error, and its class if the head decides.
pub struct PendingResponse<B: Body> {
    result: Result<Response<PeekedBody<B>>, BoxError>,
    weight: Option<(RetryAction, Outcome)>,
    drained: u64,
}

/// Omits the result: the `Debug` output of a response contains its headers.
impl<B: Body> fmt::Debug for PendingResponse<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PendingResponse").field("weight", &self.weight).finish_non_exhaustive()
    }
}

impl<B: Body> PendingResponse<B> {
    fn error(error: BoxError) -> Self {
        let outcome = Outcome::of_error(&*error);
        Self { result: Err(error), weight: Some((of_reason(outcome), outcome)), drained: 0 }
    }
}

impl<B, E> ClassifyAttempt<Response<B>, E> for Http
where
    B: Body + Unpin,
    E: Into<BoxError>,
{
    type Response = Response<PeekedBody<B>>;
    type Error = BoxError;
    type Held = PendingResponse<B>;

    // The trailers of a failed gRPC call follow its head at once. The first message of a stream may come much later.
    const PATIENCE: Duration = Duration::from_millis(10);

    #[inline]
    fn weigh(
        &self,
        is_grpc_call: bool,
        result: &Result<Response<B>, E>,
    ) -> Option<(RetryAction, Outcome)> {
        let response = result.as_ref().ok()?;
        let (status, headers) = (response.status(), response.headers());
        classify_head(is_grpc_call, status, headers, response.extensions())
    }

    #[inline]
    fn give(result: Result<Response<B>, E>) -> Result<Self::Response, BoxError> {
        match result {
            Ok(response) => Ok(response.map(PeekedBody::new)),
            Err(error) => Err(Box::new(RetryError::new(Attempts::FIRST_ERROR, error.into()))),
        }
    }

    fn hold(
        result: Result<Response<B>, E>,
        weight: Option<(RetryAction, Outcome)>,
    ) -> PendingResponse<B> {
        match result {
            Ok(response) => {
                PendingResponse { result: Ok(response.map(PeekedBody::new)), weight, drained: 0 }
            }
            Err(error) => PendingResponse::error(error.into()),
        }
    }

    fn poll_weigh(
        held: &mut PendingResponse<B>,
        cx: &mut Context<'_>,
    ) -> Poll<(RetryAction, Outcome)> {
        let (Ok(response), None) = (&mut held.result, held.weight) else {
            return Poll::Ready(held.weight.unwrap_or((RetryAction::Final, Outcome::success())));
        };
        let missing = classify_missing(response.status(), response.headers());
        let weight = match ready!(response.body_mut().poll_peek(cx)) {
            Peek::Message => classify_begun(missing),
            Peek::Trailers(trailers) => {
                grpc::status(trailers).map_or(missing, |outcome| weigh_grpc(trailers, outcome))
            }
            Peek::Error => classify_failed_body(missing),
            Peek::End => missing,
        };
        held.weight = Some(weight);
        Poll::Ready(weight)
    }

    fn undecided(held: &PendingResponse<B>) -> (RetryAction, Outcome) {
        match &held.result {
            Ok(response) => classify_begun(classify_missing(response.status(), response.headers())),
            Err(_) => (RetryAction::Final, Outcome::success()),
        }
    }

    fn is_error(held: &PendingResponse<B>) -> bool {
        held.result.is_err()
    }

    fn answer(held: &PendingResponse<B>) -> Option<AttemptResponse<'_>> {
        Some(match &held.result {
            Ok(response) => {
                AttemptResponse::Head(response.status(), response.headers(), response.extensions())
            }
            Err(error) => AttemptResponse::Error(&**error),
        })
    }

    fn poll_discard(held: &mut PendingResponse<B>, cap: u64, cx: &mut Context<'_>) -> Poll<()> {
        match &mut held.result {
            Ok(response) => poll_drain(response.body_mut(), &mut held.drained, cap, cx),
            Err(_) => Poll::Ready(()),
        }
    }

    fn release(
        held: PendingResponse<B>,
        record: Option<Attempts>,
    ) -> Result<Self::Response, BoxError> {
        match held.result {
            Ok(mut response) => {
                if let Some(record) = record {
                    response.extensions_mut().insert(record);
                }
                Ok(response)
            }
            Err(error) => {
                let record = record.unwrap_or(Attempts::FIRST_ERROR);
                Err(Box::new(RetryError::new(record, error)))
            }
        }
    }

    const TAKES_ERRORS: bool = true;

    fn failed(error: BoxError) -> Option<(PendingResponse<B>, (RetryAction, Outcome))> {
        let held = PendingResponse::error(error);
        held.weight.map(|weight| (held, weight))
    }

    fn broken(error: E, record: Attempts) -> BoxError {
        Box::new(RetryError::new(record, error.into()))
    }

    fn pass(held: PendingResponse<B>, hedged: Option<Hedged>) -> Result<Self::Response, BoxError> {
        let mut response = held.result?;
        if let Some(hedged) = hedged {
            response.extensions_mut().insert(hedged);
        }
        Ok(response)
    }

    fn sent_before(result: Result<Self::Response, BoxError>) -> Result<Self::Response, BoxError> {
        let mut response = result.map_err(SentBefore)?;
        response.extensions_mut().insert(SentBefore(()));
        Ok(response)
    }

    fn error(error: E) -> BoxError {
        error.into()
    }
}
