//! HTTP and gRPC.

use std::{
    borrow::Cow,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Buf;
use http::{Extensions, HeaderMap, Method, Request, Response, StatusCode};
use http_body::Body;

use super::{
    super::{
        attempts::{Attempt, Attempts, RetryError},
        hedge::{HedgeCopy, Hedged},
        peek::{Peek, PeekedBody},
        policy::{Class, Repeatable, Safe, Stop},
        replay::{ReplayBody, Tape},
        rules::Answer,
    },
    Numbered, Repeat, Rules, Weigh,
};
use crate::{
    BoxError,
    call::{
        Http, Outcome, Reason, Rejected, grpc,
        hint::{self, Pushback},
        http as rule,
    },
};

// ===== The request =====

/// A request's head and the tape of its body.
#[derive(Debug)]
pub struct KeptRequest<B> {
    head: Request<()>,
    tape: Tape<B>,
}

impl<B> KeptRequest<B> {
    fn marked<T>(&self, mark: T) -> Request<ReplayBody<B>>
    where
        T: Clone + Send + Sync + 'static,
    {
        let mut request = self.head.clone().map(|()| self.tape.replay());
        request.extensions_mut().insert(mark);
        request
    }
}

const PREVIOUS_ATTEMPTS: &str = "grpc-previous-rpc-attempts";

/// RFC 9110 §9.2.2, or a key that makes the server tell repeats (the same on every attempt).
pub(super) fn is_safe(method: &Method, headers: &HeaderMap, by: &Safe) -> bool {
    let idempotent = match by {
        Safe::All => true,
        Safe::Methods(methods) => methods.contains(method),
        Safe::Idempotent => matches!(
            *method,
            Method::GET
                | Method::HEAD
                | Method::OPTIONS
                | Method::TRACE
                | Method::PUT
                | Method::DELETE
        ),
    };
    idempotent || headers.contains_key("idempotency-key")
}

impl<B: Body> Repeat<Request<B>> for Http {
    type Request = Request<ReplayBody<B>>;
    type Kept = KeptRequest<B>;

    fn split(&self, request: Request<B>, rules: Rules) -> (Self::Request, Option<KeptRequest<B>>) {
        let (parts, body) = request.into_parts();
        let kept = rules.only.as_ref().is_none_or(|by| is_safe(&parts.method, &parts.headers, by));
        if rules.never || !kept {
            return (Request::from_parts(parts, ReplayBody::once(body)), None);
        }
        // Also of an unsafe one: a refused stream's server did not look at it, but its body has gone out.
        let (body, tape) = ReplayBody::new(body, rules.body_cap);
        let head = Request::from_parts(parts.clone(), ());
        (Request::from_parts(parts, body), Some(KeptRequest { head, tape }))
    }

    fn again(kept: &KeptRequest<B>, attempt: Numbered) -> Self::Request {
        let mut request = kept.marked(Attempt(attempt.number));
        // gRFC A6: how many were tried before, of those that may have been seen.
        if attempt.seen > 0 && grpc::is_grpc(request.headers()) {
            request.headers_mut().insert(PREVIOUS_ATTEMPTS, attempt.seen.into());
        }
        request
    }

    fn head(kept: &KeptRequest<B>) -> Option<Cow<'_, Request<()>>> {
        Some(Cow::Borrowed(&kept.head))
    }

    fn copy(kept: &KeptRequest<B>) -> Self::Request {
        kept.marked(HedgeCopy)
    }

    fn safe(kept: &KeptRequest<B>, by: &Safe) -> bool {
        is_safe(kept.head.method(), kept.head.headers(), by)
    }

    fn repeatable(kept: &KeptRequest<B>) -> Repeatable {
        kept.tape.repeatable()
    }

    fn claim(kept: &KeptRequest<B>) -> bool {
        kept.tape.claim()
    }
}

// ===== The answer =====

/// So many frames of a discarded answer are read in one go, however fast they come.
const MOST_AT_ONCE: u32 = 64;

/// An answer, and what its head says.
#[derive(Debug)]
pub struct HeldResponse<B: Body> {
    result: Result<Response<PeekedBody<B>>, BoxError>,
    weight: Option<(Class, Outcome)>,
    drained: u64,
}

impl<B, E> Weigh<Response<B>, E> for Http
where
    B: Body + Unpin,
    E: Into<BoxError>,
{
    type Response = Response<PeekedBody<B>>;
    type Error = BoxError;
    type Held = HeldResponse<B>;

    // A failed gRPC call's trailers come on the heels of its head; a stream's first message may not.
    const PATIENCE: Duration = Duration::from_millis(10);

    fn hold(&self, result: Result<Response<B>, E>) -> HeldResponse<B> {
        let (result, weight) = match result {
            Ok(response) => {
                let weight = weigh_head(&response);
                (Ok(response.map(PeekedBody::new)), weight)
            }
            Err(error) => {
                let error = error.into();
                let outcome = rule::of_error(&*error);
                (Err(error), Some((of_reason(outcome), outcome)))
            }
        };
        HeldResponse { result, weight, drained: 0 }
    }

    fn poll_weigh(held: &mut HeldResponse<B>, cx: &mut Context<'_>) -> Poll<(Class, Outcome)> {
        let (Ok(response), None) = (&mut held.result, held.weight) else {
            return Poll::Ready(held.weight.unwrap_or((Class::Final, Outcome::success())));
        };
        let weight = match ready!(response.body_mut().poll_peek(cx)) {
            Peek::Message => (Class::Final, Outcome::success()),
            Peek::Trailers(trailers) => weigh_grpc(trailers, grpc::end(Some(trailers))),
            Peek::Error => (Class::Final, Outcome::failure().because(Reason::Body)),
            Peek::End => (Class::Final, grpc::end(None)),
        };
        held.weight = Some(weight);
        Poll::Ready(weight)
    }

    fn answer(held: &HeldResponse<B>) -> Option<Answer<'_>> {
        Some(match &held.result {
            Ok(response) => Answer::Head(response.status(), response.headers()),
            Err(error) => Answer::Error(&**error),
        })
    }

    fn poll_discard(held: &mut HeldResponse<B>, cap: u64, cx: &mut Context<'_>) -> Poll<()> {
        let Ok(response) = &mut held.result else { return Poll::Ready(()) };
        let body = response.body_mut();
        let mut at_once = 0;
        while !body.is_end_stream() && held.drained.saturating_add(body.size_hint().lower()) <= cap
        {
            match ready!(Pin::new(&mut *body).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    // A frame of nothing counts too, or a body of such frames would hold us.
                    let length = frame.data_ref().map_or(0, |data| data.remaining() as u64);
                    held.drained = held.drained.saturating_add(length.max(64));
                    at_once += 1;
                    if at_once == MOST_AT_ONCE {
                        // A look at the clock, and a turn for others, before it goes on.
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                }
                Some(Err(_)) | None => break,
            }
        }
        Poll::Ready(())
    }

    fn release(
        held: HeldResponse<B>,
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
                let record = record.unwrap_or(Attempts::FIRST);
                Err(Box::new(RetryError::new(record, error)))
            }
        }
    }

    fn timed_out(what: &'static str) -> Option<HeldResponse<B>> {
        let error = io::Error::new(io::ErrorKind::TimedOut, what);
        let outcome = Outcome::failure().because(Reason::Timeout);
        let weight = Some((of_reason(outcome), outcome));
        Some(HeldResponse { result: Err(error.into()), weight, drained: 0 })
    }

    fn broken(error: E, record: Attempts) -> BoxError {
        Box::new(RetryError::new(record, error.into()))
    }

    fn pass(held: HeldResponse<B>, hedged: Option<Hedged>) -> Result<Self::Response, BoxError> {
        let mut response = held.result?;
        if let Some(hedged) = hedged {
            response.extensions_mut().insert(hedged);
        }
        Ok(response)
    }

    fn error(error: E) -> BoxError {
        error.into()
    }
}

/// What a head is to a retry. None: its body has to begin first.
fn weigh_head<B>(response: &Response<B>) -> Option<(Class, Outcome)> {
    weigh_parts(response.status(), response.headers(), response.extensions())
}

pub(super) fn weigh_parts(
    status: StatusCode,
    headers: &HeaderMap,
    extensions: &Extensions,
) -> Option<(Class, Outcome)> {
    if status.is_success() && !grpc::is_grpc(headers) {
        return Some((Class::Final, Outcome::success()));
    }
    if let Some(refused) = extensions.get::<Rejected>() {
        return Some((Class::Refused(Stop::Rejected), rule::of_rejected(refused)));
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
fn weigh_grpc(headers: &HeaderMap, outcome: Outcome) -> (Class, Outcome) {
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
