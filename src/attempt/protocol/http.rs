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
    verdict::{BodyReplay, Classified, RetryAction, SafeRequests},
};
use super::{
    classify::{
        classify_begun, classify_failed_body, classify_grpc, classify_head, classify_missing,
        of_reason,
    },
    saved_request::SavedRequest,
    traits::{AttemptNumber, AttemptResponse, ClassifyAttempt, ReplayRequest, SaveRules},
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
    type Saved = SavedRequest<B>;

    #[inline]
    fn is_grpc(request: &Request<B>) -> bool {
        grpc::is_grpc_call(request.method(), request.headers())
    }

    // An unsafe request is saved too. It may be retried after `REFUSED_STREAM`, although its body has been sent.
    #[inline]
    fn save(request: &Request<B>, rules: SaveRules<'_>) -> Option<SavedRequest<B>> {
        rules.allow(request.method(), request.headers()).then(|| SavedRequest::of(request))
    }

    #[inline]
    fn first_attempt(
        mut request: Request<B>,
        saved: Option<&mut SavedRequest<B>>,
        rules: SaveRules<'_>,
    ) -> Self::Request {
        let mark = if rules.marks { publish(&mut request) } else { None };
        request.map(|body| {
            let body = match saved {
                Some(saved) => {
                    saved.marks = rules.marks;
                    let (body, handle) = ReplayBody::new(body, rules.max_replay_bytes);
                    saved.body = handle;
                    body
                }
                None => ReplayBody::once(body),
            };
            body.marked(mark)
        })
    }

    fn replay(saved: &SavedRequest<B>, attempt: AttemptNumber) -> Self::Request {
        after(attempt.seen, saved.marked(Attempt(attempt.number)))
    }

    fn head(saved: &SavedRequest<B>) -> Request<()> {
        saved.request(())
    }

    fn header<'a>(saved: &'a SavedRequest<B>, name: &str) -> Option<&'a [u8]> {
        saved.header(name)
    }

    fn deadline(saved: &SavedRequest<B>) -> Option<Deadline> {
        saved.deadline()
    }

    fn hedge_attempt(saved: &SavedRequest<B>, number: u32) -> Self::Request {
        let mut copy = saved.marked(HedgeAttempt(number));
        let first = copy.extensions().get().map_or(1, |Attempt(number)| *number);
        copy.extensions_mut().insert(Attempt(first.saturating_add(number)));
        // The request may be an attempt of an outer retry, with a number of its own.
        let before = copy.headers().get(PREVIOUS_ATTEMPTS);
        let before: u32 = before.and_then(|n| n.to_str().ok()?.parse().ok()).unwrap_or(0);
        after(before.saturating_add(number), copy)
    }

    fn is_safe(saved: &SavedRequest<B>, by: &SafeRequests) -> bool {
        saved.is_safe(by)
    }

    fn body_replay(saved: &SavedRequest<B>) -> BodyReplay {
        saved.body_replay()
    }

    fn take_over(saved: &SavedRequest<B>) -> bool {
        saved.body.take_over()
    }
}

// ===== The response =====

/// A response or an error, and its class if the head decides.
pub struct PendingResponse<B: Body> {
    result: Result<Response<PeekedBody<B>>, BoxError>,
    classified: Option<Classified>,
    drained: u64,
}

/// Omits the result: the `Debug` output of a response contains its headers.
impl<B: Body> fmt::Debug for PendingResponse<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PendingResponse")
            .field("classified", &self.classified)
            .finish_non_exhaustive()
    }
}

impl<B: Body> PendingResponse<B> {
    fn of_error(error: BoxError) -> Self {
        let outcome = Outcome::of_error(&*error);
        Self { result: Err(error), classified: Some((of_reason(outcome), outcome)), drained: 0 }
    }
}

impl<B, E> ClassifyAttempt<Response<B>, E> for Http
where
    B: Body + Unpin,
    E: Into<BoxError>,
{
    type Response = Response<PeekedBody<B>>;
    type Error = BoxError;
    type Pending = PendingResponse<B>;

    // The trailers of a failed gRPC call follow its head at once. The first message of a stream may come much later.
    const MAX_FIRST_FRAME_WAIT: Duration = Duration::from_millis(10);

    #[inline]
    fn classify(&self, is_grpc_call: bool, result: &Result<Response<B>, E>) -> Option<Classified> {
        let response = result.as_ref().ok()?;
        let (status, headers) = (response.status(), response.headers());
        classify_head(is_grpc_call, status, headers, response.extensions())
    }

    #[inline]
    fn return_first(result: Result<Response<B>, E>) -> Result<Self::Response, BoxError> {
        match result {
            Ok(response) => Ok(response.map(PeekedBody::new)),
            Err(error) => Err(Box::new(RetryError::new(Attempts::FIRST_ERROR, error.into()))),
        }
    }

    fn pending(
        result: Result<Response<B>, E>,
        classified: Option<Classified>,
    ) -> PendingResponse<B> {
        match result {
            Ok(response) => PendingResponse {
                result: Ok(response.map(PeekedBody::new)),
                classified,
                drained: 0,
            },
            Err(error) => PendingResponse::of_error(error.into()),
        }
    }

    fn poll_classify(pending: &mut PendingResponse<B>, cx: &mut Context<'_>) -> Poll<Classified> {
        let (Ok(response), None) = (&mut pending.result, pending.classified) else {
            return Poll::Ready(
                pending.classified.unwrap_or((RetryAction::Done, Outcome::success())),
            );
        };
        let missing = classify_missing(response.status(), response.headers());
        let classified = match ready!(response.body_mut().poll_peek(cx)) {
            Peek::Message => classify_begun(missing),
            Peek::Trailers(trailers) => {
                grpc::status(trailers).map_or(missing, |outcome| classify_grpc(trailers, outcome))
            }
            Peek::Error => classify_failed_body(missing),
            Peek::End => missing,
        };
        pending.classified = Some(classified);
        Poll::Ready(classified)
    }

    fn classify_unread(pending: &PendingResponse<B>) -> Classified {
        match &pending.result {
            Ok(response) => classify_begun(classify_missing(response.status(), response.headers())),
            Err(_) => (RetryAction::Done, Outcome::success()),
        }
    }

    fn is_error(pending: &PendingResponse<B>) -> bool {
        pending.result.is_err()
    }

    fn response(pending: &PendingResponse<B>) -> Option<AttemptResponse<'_>> {
        Some(match &pending.result {
            Ok(response) => {
                AttemptResponse::Head(response.status(), response.headers(), response.extensions())
            }
            Err(error) => AttemptResponse::Error(&**error),
        })
    }

    fn poll_discard(pending: &mut PendingResponse<B>, cap: u64, cx: &mut Context<'_>) -> Poll<()> {
        match &mut pending.result {
            Ok(response) => poll_drain(response.body_mut(), &mut pending.drained, cap, cx),
            Err(_) => Poll::Ready(()),
        }
    }

    fn return_recorded(
        pending: PendingResponse<B>,
        record: Option<Attempts>,
    ) -> Result<Self::Response, BoxError> {
        match pending.result {
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

    const ACCEPTS_ERRORS: bool = true;

    fn pending_error(error: BoxError) -> Option<(PendingResponse<B>, Classified)> {
        let pending = PendingResponse::of_error(error);
        pending.classified.map(|classified| (pending, classified))
    }

    fn readiness_error(error: E, record: Attempts) -> BoxError {
        Box::new(RetryError::new(record, error.into()))
    }

    fn return_hedged(
        pending: PendingResponse<B>,
        hedged: Option<Hedged>,
    ) -> Result<Self::Response, BoxError> {
        let mut response = pending.result?;
        if let Some(hedged) = hedged {
            response.extensions_mut().insert(hedged);
        }
        Ok(response)
    }

    fn mark_sent_before(
        result: Result<Self::Response, BoxError>,
    ) -> Result<Self::Response, BoxError> {
        let mut response = result.map_err(SentBefore)?;
        response.extensions_mut().insert(SentBefore(()));
        Ok(response)
    }

    fn inner_error(error: E) -> BoxError {
        error.into()
    }
}
