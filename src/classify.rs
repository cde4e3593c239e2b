//! Protocols: how a layer classifies the result of a call, and at which point it releases the permit.
//!
//! # One call
//!
//! 1. `Protocol::begin` records what the classification needs of the request, before the inner service consumes it.
//! 2. `Protocol::wrap` converts the response of the inner service into the response of the layer. For HTTP the body
//!    becomes a [`TrackedBody`] that holds no permit yet.
//! 3. `Protocol::classify` classifies the response head or the error. It releases the permit, or moves it into the
//!    body, which releases it at its end (`Eos`).
//!
//! Steps 2 and 3 are separate because a response is large: the response is converted once, and then inspected and
//! changed in place.

use std::fmt;

use crate::{
    outcome::{Eos, HealthCall, Outcome, Reason, Rejected, SentMark, grpc, http as rule},
    permit::{Permit, ReleaseAt, StateRef, TrackedBody},
    sealed::Sealed,
    time::Deadline,
};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Body;

/// Classifies the results of calls, and states the response type of the layer.
///
/// [`Http`] is the default of every layer. For other request and response types there are [`Classify`] (a closure) and
/// [`PerResponse`] (no classification). `TowerHttp` uses a classifier of `tower_http::classify`.
///
/// The trait is sealed: it cannot be implemented outside of this crate.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot classify calls with the results `{Res}` and `{E}`",
    label = "this layer does not fit the wrapped service",
    note = "for HTTP, the wrapped service must accept `http::Request<_>` and return `http::Response<B>` where `B: http_body::Body`",
    note = "for other types, classify the results with `.classify(|result: Result<&Res, &E>| ..)`, where `Res` and `E` are exactly the response and error of the wrapped service",
    note = "without classification, `.per_response()` accepts any types",
    note = "an inner layer that returns boxed errors changes the error type to `BoxError`"
)]
pub trait Protocol<Req, Res, E>: Sealed + Clone + Send + Sync + 'static {
    /// The response of the layer.
    type Response;
    /// The part of the request that the classification needs, recorded when the call begins.
    type Call;

    /// Returns the deadline that the request carries.
    fn deadline(&self, request: &Req) -> Option<Deadline> {
        let _ = request;
        None
    }

    /// Returns the mark of the request's progress, if an outer layer has published one.
    fn sent_mark(&self, request: &Req) -> Option<SentMark> {
        let _ = request;
        None
    }

    /// Returns which health call the request is, if a health registry of this process serves `grpc.health.v1`.
    fn health_call(&self, request: &Req) -> Option<HealthCall> {
        let _ = request;
        None
    }

    /// Records what the classification needs of the request, just before the inner service is called. A protocol may
    /// call `permit` to lend the permit of the admission to the handler, through the extensions of the request.
    fn begin<G: StateRef>(
        &self,
        request: &mut Req,
        permit: impl FnOnce() -> Permit<G>,
    ) -> Self::Call;

    /// Returns the measuring permit, which measures the call if the protocol has lent the permit of the admission to
    /// the handler.
    #[inline]
    fn measuring_permit(call: &mut Self::Call) -> Option<&mut Permit> {
        let _ = call;
        None
    }

    /// Converts the response of the inner service into the response of the layer, before it is classified.
    fn wrap(response: Res) -> Self::Response;

    /// Classifies a response or an error. Releases the permit, or moves it into the response body.
    ///
    /// Response, error and permit are passed by reference: a value that is moved after it was inspected is copied.
    fn classify<G: StateRef>(
        call: Self::Call,
        result: Result<&mut Self::Response, &E>,
        permit: &mut Permit<G>,
    );
}

// ===== HTTP and gRPC =====

/// HTTP and gRPC: classifies by the response head, and tracks the response body to its end.
///
/// Breaker, adaptive limit, retry and hedge use this one classification, so they agree on every response. A call is
/// gRPC if its request is a `POST` with `content-type: application/grpc…`, or if its response has such a content type.
///
/// A call that is not gRPC:
///
/// | response | outcome | a retry repeats it |
/// |---|---|---|
/// | 1xx to 4xx, except those below | success | no |
/// | 408 | success | if that is safe |
/// | 409 | success | if the request is a retry with an `Idempotency-Key` |
/// | 421 | success | if that is safe; over a `connect::Client` yes, on another connection |
/// | 425 | success | yes, unless the request has `Early-Data: 1` |
/// | 429, 529 | throttled | if that is safe |
/// | 501, 505 | success | no |
/// | 502, 503, 504, 520 to 524 | failure | if that is safe |
/// | any other 5xx | failure | no |
/// | a body that fails | failure | no |
///
/// A response with `x-envoy-ratelimited` is not retried.
///
/// A gRPC call is classified by its gRPC status, whatever the HTTP status. The status is the first of:
///
/// 1. `grpc-status` in the response head.
/// 2. `grpc-status` in the trailers, if the content type of the response is gRPC and its body has not ended. gRPC-Web
///    carries its trailers in the body, which no layer parses: 200 without a status in the head is a success.
/// 3. The HTTP status, mapped by gRPC's `doc/http-grpc-status-mapping.md`: 400 is `INTERNAL`, 401 `UNAUTHENTICATED`,
///    403 `PERMISSION_DENIED`, 404 `UNIMPLEMENTED`; 429, 502, 503 and 504 are `UNAVAILABLE`; every other HTTP status is
///    `UNKNOWN`, also 200 with a content type that is not gRPC's.
///
/// | gRPC status | outcome | a retry repeats it |
/// |---|---|---|
/// | `OK`, `INVALID_ARGUMENT`, `NOT_FOUND`, `ALREADY_EXISTS`, `PERMISSION_DENIED`, `FAILED_PRECONDITION`, `ABORTED`, `OUT_OF_RANGE`, `UNIMPLEMENTED`, `UNAUTHENTICATED` | success | no |
/// | `UNKNOWN`, `DEADLINE_EXCEEDED`, `INTERNAL`, `DATA_LOSS` | failure | no |
/// | `UNAVAILABLE` | failure | if that is safe, or with [`RetryLayer::grpc`](crate::retry::RetryLayer::grpc) |
/// | `RESOURCE_EXHAUSTED` | throttled | with `grpc-retry-pushback-ms`, as `UNAVAILABLE` |
/// | `CANCELLED` | cancelled | no |
/// | `CANCELLED` with the message `Timeout expired`, by which a tonic server reports a timeout | as `DEADLINE_EXCEEDED` | no |
/// | mapped from 429 (`UNAVAILABLE`) | throttled | as `UNAVAILABLE` |
/// | mapped from 529 (`UNKNOWN`) | throttled | if that is safe |
/// | none at the end of a 200 gRPC response | failure ([`MissingStatus`](Reason::MissingStatus)) | no |
///
/// The gRPC statuses that are failures are those of linkerd. A retry and a hedge pass a 200 gRPC response on as soon as
/// its first message is there, or after 10 ms without one.
///
/// A response that an inner layer made because it [rejected](Rejected) the call is cancelled. It is a failure if that
/// layer timed out, unless the caller caused the timeout: by its deadline, by a stalled or slow request body, or by a
/// response that it did not read. A 2xx that is not gRPC is a success in any case.
#[derive(Clone, Copy, Debug, Default)]
pub struct Http;

/// The part of an HTTP request that is recorded when its call begins.
#[derive(Clone, Copy, Debug)]
pub struct HttpCall {
    is_grpc: bool,
}

impl HttpCall {
    #[inline]
    fn of<B>(request: &Request<B>) -> Self {
        Self { is_grpc: grpc::is_grpc_call(request.method(), request.headers()) }
    }

    #[inline]
    fn of_head<B>(self, response: &Response<B>) -> Eos {
        let (status, headers) = (response.status(), response.headers());
        rule::of_head(self.is_grpc, status, headers, response.extensions())
    }
}

impl Sealed for Http {}

impl<ReqB, B, E> Protocol<Request<ReqB>, Response<B>, E> for Http
where
    B: Body,
    E: 'static,
{
    type Response = Response<TrackedBody<B>>;
    type Call = HttpCall;

    #[inline]
    fn deadline(&self, request: &Request<ReqB>) -> Option<Deadline> {
        Deadline::of(request.extensions())
    }

    #[inline]
    fn sent_mark(&self, request: &Request<ReqB>) -> Option<SentMark> {
        request.extensions().get().cloned()
    }

    #[inline]
    fn health_call(&self, request: &Request<ReqB>) -> Option<HealthCall> {
        grpc::health_call(request)
    }

    #[inline]
    fn begin<G: StateRef>(
        &self,
        request: &mut Request<ReqB>,
        _: impl FnOnce() -> Permit<G>,
    ) -> HttpCall {
        HttpCall::of(request)
    }

    #[inline]
    fn wrap(response: Response<B>) -> Self::Response {
        response.map(TrackedBody::untracked)
    }

    #[inline]
    fn classify<G: StateRef>(
        call: HttpCall,
        result: Result<&mut Self::Response, &E>,
        permit: &mut Permit<G>,
    ) {
        match result {
            Ok(response) => follow(call.of_head(response), response, permit),
            Err(error) => permit.release_mut(rule::of_any_error(error)),
        }
    }
}

/// A second response type for [`Http`], which no service returns.
///
/// If `Http` had one response type only, the compiler would infer that the wrapped service returns it. It would then
/// report the future of the service as the error, and would not print the notes of [`Protocol`].
#[derive(Debug)]
pub enum Never {}

impl<ReqB, E> Protocol<Request<ReqB>, Never, E> for Http {
    type Response = Never;
    type Call = ();

    fn begin<G: StateRef>(&self, _: &mut Request<ReqB>, _: impl FnOnce() -> Permit<G>) {}

    fn wrap(response: Never) -> Never {
        response
    }

    fn classify<G: StateRef>((): (), _: Result<&mut Never, &E>, _: &mut Permit<G>) {}
}

/// [`Http`] with a closure that classifies the response head. The response body is tracked as with [`Http`].
#[derive(Clone)]
pub struct ClassifyHead<C>(pub(crate) C);

impl<C> Sealed for ClassifyHead<C> {}

impl<C, ReqB, B, E> Protocol<Request<ReqB>, Response<B>, E> for ClassifyHead<C>
where
    C: Fn(StatusCode, &HeaderMap) -> Outcome + Clone + Send + Sync + 'static,
    B: Body,
    E: 'static,
{
    type Response = Response<TrackedBody<B>>;
    type Call = (HttpCall, C);

    fn deadline(&self, request: &Request<ReqB>) -> Option<Deadline> {
        Deadline::of(request.extensions())
    }

    fn sent_mark(&self, request: &Request<ReqB>) -> Option<SentMark> {
        request.extensions().get().cloned()
    }

    #[inline]
    fn health_call(&self, request: &Request<ReqB>) -> Option<HealthCall> {
        grpc::health_call(request)
    }

    fn begin<G: StateRef>(
        &self,
        request: &mut Request<ReqB>,
        _: impl FnOnce() -> Permit<G>,
    ) -> (HttpCall, C) {
        (HttpCall::of(request), self.0.clone())
    }

    fn wrap(response: Response<B>) -> Self::Response {
        response.map(TrackedBody::untracked)
    }

    fn classify<G: StateRef>(
        (call, classify): (HttpCall, C),
        result: Result<&mut Self::Response, &E>,
        permit: &mut Permit<G>,
    ) {
        match result {
            Ok(response) => {
                let outcome = classify(response.status(), response.headers());
                let is_rejection = response.extensions().get::<Rejected>().is_some();
                let eos = match call.of_head(response) {
                    _ if !outcome.is_success() => Eos::Plain(outcome),
                    Eos::Plain(_) if !is_rejection => Eos::Plain(outcome),
                    // The trailers still decide. If they have no status, the closure replaces the mapped one.
                    Eos::Grpc(mapped) if mapped.reason() == Reason::GrpcStatus => {
                        Eos::Grpc(outcome)
                    }
                    eos => eos,
                };
                follow(eos, response, permit);
            }
            Err(error) => permit.release_mut(rule::of_any_error(error)),
        }
    }
}

/// Moves the permit into the body, or releases it here if the head decides.
#[inline]
fn follow<B: Body, G: StateRef>(
    mut eos: Eos,
    response: &mut Response<TrackedBody<B>>,
    permit: &mut Permit<G>,
) {
    let certain = matches!(&eos, Eos::Plain(outcome) if !outcome.is_success());
    let so_far = permit.record_head(eos.so_far(), certain);
    if certain {
        eos = Eos::Plain(so_far);
    }
    match permit.release_at() {
        ReleaseAt::Head => permit.release_mut(eos.begun()),
        ReleaseAt::Verdict if certain => permit.release_mut(so_far),
        ReleaseAt::Verdict | ReleaseAt::Body => {
            response.body_mut().track(permit.take().erase(), eos)
        }
    }
}

// ===== Any other types =====

/// Classifies by a closure over `Result<&Response, &Error>`, for services of any types.
#[derive(Clone)]
pub struct Classify<C>(pub(crate) C);

impl<C> Sealed for Classify<C> {}

impl<C, Req, Res, E> Protocol<Req, Res, E> for Classify<C>
where
    C: for<'a> Fn(Result<&'a Res, &'a E>) -> Outcome + Clone + Send + Sync + 'static,
{
    type Response = Res;
    type Call = C;

    #[inline]
    fn begin<G: StateRef>(&self, _: &mut Req, _: impl FnOnce() -> Permit<G>) -> C {
        self.0.clone()
    }

    #[inline]
    fn wrap(response: Res) -> Res {
        response
    }

    #[inline]
    fn classify<G: StateRef>(classify: C, result: Result<&mut Res, &E>, permit: &mut Permit<G>) {
        permit.release_mut(classify(result.map(|response| &*response)));
    }
}

/// Classifies no responses: a call ends with its response, which is a success. An error is classified by
/// [`Outcome::of_error`] if its type is known, and is a failure otherwise.
#[derive(Clone, Copy, Debug, Default)]
pub struct PerResponse;

impl Sealed for PerResponse {}

impl<Req, Res, E: 'static> Protocol<Req, Res, E> for PerResponse {
    type Response = Res;
    type Call = ();

    #[inline]
    fn begin<G: StateRef>(&self, _: &mut Req, _: impl FnOnce() -> Permit<G>) {}

    #[inline]
    fn wrap(response: Res) -> Res {
        response
    }

    #[inline]
    fn classify<G: StateRef>((): (), result: Result<&mut Res, &E>, permit: &mut Permit<G>) {
        permit.release_mut(match result {
            Ok(_) => Outcome::success(),
            Err(error) => rule::of_any_error(error),
        });
    }
}

// ===== tower_http::classify =====

/// Classifies by a classifier of `tower_http::classify`.
#[cfg(feature = "tower-http")]
#[derive(Clone)]
pub struct TowerHttp<M>(pub(crate) M);

#[cfg(feature = "tower-http")]
impl<M> Sealed for TowerHttp<M> {}

#[cfg(feature = "tower-http")]
impl<M, ReqB, B, E> Protocol<Request<ReqB>, Response<B>, E> for TowerHttp<M>
where
    M: tower_http::classify::MakeClassifier + Clone + Send + Sync + 'static,
    M::ClassifyEos: Send + Sync + 'static,
    B: Body,
    E: fmt::Display + 'static,
{
    type Response = Response<TrackedBody<B>>;
    type Call = M::Classifier;

    fn deadline(&self, request: &Request<ReqB>) -> Option<Deadline> {
        Deadline::of(request.extensions())
    }

    fn sent_mark(&self, request: &Request<ReqB>) -> Option<SentMark> {
        request.extensions().get().cloned()
    }

    #[inline]
    fn health_call(&self, request: &Request<ReqB>) -> Option<HealthCall> {
        grpc::health_call(request)
    }

    fn begin<G: StateRef>(
        &self,
        request: &mut Request<ReqB>,
        _: impl FnOnce() -> Permit<G>,
    ) -> M::Classifier {
        self.0.make_classifier(request)
    }

    fn wrap(response: Response<B>) -> Self::Response {
        response.map(TrackedBody::untracked)
    }

    fn classify<G: StateRef>(
        call: M::Classifier,
        result: Result<&mut Self::Response, &E>,
        permit: &mut Permit<G>,
    ) {
        use tower_http::classify::{ClassifiedResponse, ClassifyEos, ClassifyResponse};

        fn outcome<T>(result: Result<(), T>) -> Outcome {
            result.map_or(Outcome::failure(), |()| Outcome::success())
        }

        match result {
            Ok(response) => {
                let eos = match response.extensions().get::<Rejected>() {
                    Some(rejected) => Eos::Plain(rule::of_rejected(rejected)),
                    None => match call.classify_response(response) {
                        ClassifiedResponse::Ready(result) => Eos::Plain(outcome(result)),
                        ClassifiedResponse::RequiresEos(eos) => {
                            Eos::Custom(Box::new(move |trailers| {
                                outcome(eos.classify_eos(trailers))
                            }))
                        }
                    },
                };
                follow(eos, response, permit);
            }
            Err(error) => {
                // The classifier's result for an error does not distinguish a rejection by an inner layer from a
                // failure.
                let _ = call.classify_error(error);
                permit.release_mut(rule::of_any_error(error));
            }
        }
    }
}

macro_rules! opaque_debug {
    ($($name:ident<$p:ident>),*) => {$(
        impl<$p> fmt::Debug for $name<$p> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(stringify!($name))
            }
        }
    )*};
}
opaque_debug!(Classify<C>, ClassifyHead<C>);
#[cfg(feature = "tower-http")]
opaque_debug!(TowerHttp<M>);
