//! How requests are sent again, and how answers are weighed: HTTP and gRPC, or any `Clone` type.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Buf;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::Body;

use super::{
    attempts::{Attempt, Attempts, RetryError},
    hedge::{HedgeCopy, Hedged},
    peek::{Peek, PeekedBody},
    policy::{Class, Repeatable, Stop},
    replay::{ReplayBody, Tape},
};
use crate::{
    BoxError,
    call::{
        Classify, Http, Outcome, OutcomeKind, Reason, Rejected, grpc,
        hint::{self, Pushback},
        http as rule,
    },
};

/// What of the layer's settings a request is split by.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    pub(super) body_cap: u64,
    pub(super) assume_idempotent: bool,
    /// What is not safe to repeat is not repeated, unseen or not: nothing of it needs to be kept.
    pub(super) safe_only: bool,
    /// Nothing needs to be kept.
    pub(super) never: bool,
}

/// Requests that can be sent again.
///
/// `http::Request` of any body is, and with [`classify`](super::RetryLayer::classify) anything that is
/// `Clone`. Not to be implemented outside of this crate yet.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot send `{Req}` again",
    note = "a retry or a hedge takes `http::Request<B>`, or, with `.classify(|result: Result<&Res, &E>| ..)`, any request that is `Clone`"
)]
pub trait Repeat<Req>: Clone + Send + Sync + 'static {
    /// What the wrapped service gets.
    type Request;
    /// What is kept to send it again.
    type Kept;

    /// The first attempt, and what is kept for the next.
    fn split(&self, request: Req, rules: Rules) -> (Self::Request, Option<Self::Kept>);

    /// The attempt of this number.
    fn again(kept: &Self::Kept, number: u32) -> Self::Request;

    /// A copy beside the attempt that is under way.
    fn copy(kept: &Self::Kept) -> Self::Request;

    /// Whether it may be repeated although it may have had an effect.
    fn safe(kept: &Self::Kept) -> bool;

    /// Whether its body can be sent again by now.
    fn repeatable(kept: &Self::Kept) -> Repeatable;

    /// Keeps its body for the next attempt alone. False if it cannot be sent again after all.
    fn claim(kept: &Self::Kept) -> bool;
}

/// Answers that can be weighed, given out and discarded.
#[diagnostic::on_unimplemented(
    message = "a retry or a hedge cannot weigh answers of `{Res}` or `{E}`",
    note = "HTTP bodies must be `Unpin` (box one that is not with `http_body_util::BodyExt::boxed_unsync`), and errors `Into<BoxError>`",
    note = "for other types say what failed with `.classify(|result: Result<&Res, &E>| ..)`, `Res` and `E` being exactly the response and error of the wrapped service"
)]
pub trait Weigh<Res, E> {
    /// What the caller gets.
    type Response;
    /// What the caller gets when there is no answer.
    type Error;
    /// An answer that may still be given out or discarded.
    type Held: Unpin;

    /// How long an answer's beginning may be waited for.
    const PATIENCE: Duration;

    /// Takes an answer.
    fn hold(&self, result: Result<Res, E>) -> Self::Held;

    /// What it is. Pending while its beginning is not here.
    fn poll_weigh(held: &mut Self::Held, cx: &mut Context<'_>) -> Poll<(Class, Outcome)>;

    /// Reads it away, so that its connection can be used again. Ready when that is done, or when it is
    /// longer than `cap` bytes.
    fn poll_discard(held: &mut Self::Held, cap: u64, cx: &mut Context<'_>) -> Poll<()>;

    /// Gives it out, with the record if there is something to record.
    fn release(held: Self::Held, record: Option<Attempts>) -> Result<Self::Response, Self::Error>;

    /// The wrapped service broke.
    fn broken(error: E, record: Attempts) -> Self::Error;

    /// Gives it out as it is, told only that there was a hedge.
    fn pass(held: Self::Held, hedged: Option<Hedged>) -> Result<Self::Response, Self::Error>;

    /// The wrapped service's error as it is.
    fn error(error: E) -> Self::Error;
}

// ===== HTTP and gRPC: the request =====

/// A request's head and the tape of its body.
#[derive(Debug)]
pub struct KeptRequest<B> {
    head: Request<()>,
    tape: Tape<B>,
    safe: bool,
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

/// RFC 9110 §9.2.2, or a key that makes the server tell repeats (the same on every attempt).
fn is_safe(method: &Method, headers: &HeaderMap) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE
    ) || headers.contains_key("idempotency-key")
}

impl<B: Body> Repeat<Request<B>> for Http {
    type Request = Request<ReplayBody<B>>;
    type Kept = KeptRequest<B>;

    fn split(&self, request: Request<B>, rules: Rules) -> (Self::Request, Option<KeptRequest<B>>) {
        let (parts, body) = request.into_parts();
        let safe = rules.assume_idempotent || is_safe(&parts.method, &parts.headers);
        if rules.never || (rules.safe_only && !safe) {
            return (Request::from_parts(parts, ReplayBody::once(body)), None);
        }
        // Also of an unsafe one: a refused stream's server did not look at it, but its body has gone out.
        let (body, tape) = ReplayBody::new(body, rules.body_cap);
        let head = Request::from_parts(parts.clone(), ());
        (Request::from_parts(parts, body), Some(KeptRequest { head, tape, safe }))
    }

    fn again(kept: &KeptRequest<B>, number: u32) -> Self::Request {
        kept.marked(Attempt(number))
    }

    fn copy(kept: &KeptRequest<B>) -> Self::Request {
        kept.marked(HedgeCopy)
    }

    fn safe(kept: &KeptRequest<B>) -> bool {
        kept.safe
    }

    fn repeatable(kept: &KeptRequest<B>) -> Repeatable {
        kept.tape.repeatable()
    }

    fn claim(kept: &KeptRequest<B>) -> bool {
        kept.tape.claim()
    }
}

// ===== HTTP and gRPC: the answer =====

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
    let (status, headers) = (response.status(), response.headers());
    if status.is_success() && !grpc::is_grpc(headers) {
        return Some((Class::Final, Outcome::success()));
    }
    if let Some(refused) = response.extensions().get::<Rejected>() {
        return Some((Class::Refused(Stop::Rejected), rule::of_rejected(refused)));
    }
    if grpc::is_grpc(headers) && status == StatusCode::OK {
        return grpc::status(headers).map(|outcome| weigh_grpc(headers, outcome));
    }
    let outcome = rule::of_status(status, headers);
    match status.as_u16() {
        // A proxy's status on a gRPC answer does not unsay the server's no.
        408 | 425 | 429 | 502 | 503 | 504 if hint::pushback(headers) == Some(Pushback::Never) => {
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
        _ if !retryable => Class::Final,
        Some(Pushback::Never) => Class::Refused(Stop::Pushback),
        _ => Class::Retryable,
    };
    (class, outcome)
}

/// What an error is to a retry: those of the connection may be tried again.
fn of_reason(outcome: Outcome) -> Class {
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

// ===== Anything that is `Clone` =====

impl<C, Req> Repeat<Req> for Classify<C>
where
    C: Clone + Send + Sync + 'static,
    Req: Clone,
{
    type Request = Req;
    type Kept = Req;

    fn split(&self, request: Req, rules: Rules) -> (Req, Option<Req>) {
        let kept = (!rules.never).then(|| request.clone());
        (request, kept)
    }

    fn again(kept: &Req, _: u32) -> Req {
        kept.clone()
    }

    fn copy(kept: &Req) -> Req {
        kept.clone()
    }

    fn safe(_: &Req) -> bool {
        true
    }

    fn repeatable(_: &Req) -> Repeatable {
        Repeatable::Yes
    }

    fn claim(_: &Req) -> bool {
        true
    }
}

/// An answer of any type, weighed.
#[derive(Debug)]
pub struct HeldResult<Res, E> {
    result: Result<Res, E>,
    weight: (Class, Outcome),
}

// It is never pinned into.
impl<Res, E> Unpin for HeldResult<Res, E> {}

impl<C, Res, E> Weigh<Res, E> for Classify<C>
where
    C: for<'a> Fn(Result<&'a Res, &'a E>) -> Outcome,
    E: 'static,
{
    type Response = Res;
    type Error = E;
    type Held = HeldResult<Res, E>;

    const PATIENCE: Duration = Duration::ZERO;

    fn hold(&self, result: Result<Res, E>) -> HeldResult<Res, E> {
        let refused = result.as_ref().err().and_then(Rejected::find_in_any);
        let weight = match refused {
            Some(refused) => (Class::Refused(Stop::Rejected), rule::of_rejected(refused)),
            None => {
                let outcome = (self.0)(result.as_ref());
                let class = match outcome.kind() {
                    OutcomeKind::Failure | OutcomeKind::Throttled => Class::Retryable,
                    OutcomeKind::Success | OutcomeKind::Cancelled => Class::Final,
                };
                (class, outcome)
            }
        };
        HeldResult { result, weight }
    }

    fn poll_weigh(held: &mut HeldResult<Res, E>, _: &mut Context<'_>) -> Poll<(Class, Outcome)> {
        Poll::Ready(held.weight)
    }

    fn poll_discard(_: &mut HeldResult<Res, E>, _: u64, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    fn release(held: HeldResult<Res, E>, _: Option<Attempts>) -> Result<Res, E> {
        held.result
    }

    fn broken(error: E, _: Attempts) -> E {
        error
    }

    fn pass(held: HeldResult<Res, E>, _: Option<Hedged>) -> Result<Res, E> {
        held.result
    }

    fn error(error: E) -> E {
        error
    }
}
