use std::fmt;

#[cfg(feature = "limit")]
use super::grpc::HealthCall;
use super::{
    Deadline, Outcome, Reason, Rejected, SentMark, TrackedBody,
    body::Eos,
    giver::Giver,
    grpc, http as rule,
    permit::{Hold, Permit},
};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Body;

/// How a layer learns what became of a call, and what its caller gets back.
///
/// [`Http`] is every layer's default. For other request and response types there are [`Classify`]
/// (a closure) and [`PerResponse`] (nothing is judged); `tower_http::classify` is taken as it is by
/// `TowerHttp`. Not to be implemented outside of this crate yet.
pub trait Protocol<Req, Res, E>: Judge<Req, Res, E> {}

impl<P, Req, Res, E> Protocol<Req, Res, E> for P where P: Judge<Req, Res, E> {}

/// The working half of [`Protocol`], out of reach so that it may still change.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot judge calls that give `{Res}` or `{E}`",
    label = "this layer does not fit what it wraps",
    note = "for HTTP, the wrapped service must take `http::Request<_>` and answer with `http::Response<B>` where `B: http_body::Body`",
    note = "for any other types, say what failed with `.classify(|result: Result<&Res, &E>| ..)`, `Res` and `E` being exactly the response and error of the wrapped service",
    note = "where nothing has to be judged, `.per_response()` takes any types",
    note = "a layer below that fails with boxed errors makes the error type `BoxError`"
)]
pub trait Judge<Req, Res, E>: Clone + Send + Sync + 'static {
    /// What the caller gets.
    type Response;
    /// What is remembered of the request while it is under way.
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
    #[cfg(feature = "limit")]
    fn health_call(&self, request: &Req) -> Option<HealthCall> {
        let _ = request;
        None
    }

    /// A call is about to be made, with this permit.
    fn begin<G: Giver>(&self, request: &mut Req, permit: impl FnOnce() -> Permit<G>) -> Self::Call;

    /// Returns the call permit, which measures the call if the protocol has lent the permit of the admission to the
    /// handler.
    #[inline]
    fn call_permit(call: &mut Self::Call) -> Option<&mut Permit> {
        let _ = call;
        None
    }

    /// The inner service has answered: what the caller gets of it, before anybody has looked at it.
    fn wrap(response: Res) -> Self::Response;

    /// Judges an answer, or an error. Both lie where they are looked at, and so does the permit, which is ended or
    /// taken along: what is moved after a look at it is copied, each time.
    fn judge<G: Giver>(
        call: Self::Call,
        result: Result<&mut Self::Response, &E>,
        permit: &mut Permit<G>,
    );
}

// ===== HTTP and gRPC =====

/// HTTP and gRPC: classified by the response head, and followed to the end of the body.
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
/// | `UNAVAILABLE` | failure | if that is safe, or with [`RetryLayer::grpc`](crate::RetryLayer::grpc) |
/// | `RESOURCE_EXHAUSTED` | throttled | with `grpc-retry-pushback-ms`, as `UNAVAILABLE` |
/// | `CANCELLED` | cancelled | no |
/// | `CANCELLED` with the message `Timeout expired`, by which a tonic server reports a timeout | as `DEADLINE_EXCEEDED` | no |
/// | mapped from 429 (`UNAVAILABLE`) | throttled | as `UNAVAILABLE` |
/// | mapped from 529 (`UNKNOWN`) | throttled | if that is safe |
/// | none at the end of a 200 gRPC response | failure ([`MissingStatus`](Reason::MissingStatus)) | no |
///
/// The failures are those that linkerd counts. A retry and a hedge pass a 200 gRPC response on as soon as its first
/// message is there, or after 10 ms without one.
///
/// A response that an inner layer made because it [rejected](Rejected) the call is cancelled, or a failure if that
/// layer timed out other than by a caller deadline or a stalled request body. A 2xx that is not gRPC is a success in
/// any case.
#[derive(Clone, Copy, Debug, Default)]
pub struct Http;

/// What is recorded of an HTTP request when its call begins.
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

impl<ReqB, B, E> Judge<Request<ReqB>, Response<B>, E> for Http
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

    #[cfg(feature = "limit")]
    #[inline]
    fn health_call(&self, request: &Request<ReqB>) -> Option<HealthCall> {
        grpc::health_call(request)
    }

    #[inline]
    fn begin<G: Giver>(
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
    fn judge<G: Giver>(
        call: HttpCall,
        result: Result<&mut Self::Response, &E>,
        permit: &mut Permit<G>,
    ) {
        match result {
            Ok(response) => follow(call.of_head(response), response, permit),
            Err(error) => permit.end(rule::of_any_error(error)),
        }
    }
}

/// A second response type for [`Http`], which nothing answers with.
///
/// With one only, the compiler would take for granted that the wrapped service answers with it, and
/// blame the service's future instead of printing the notes of [`Protocol`].
#[derive(Debug)]
pub enum Never {}

impl<ReqB, E> Judge<Request<ReqB>, Never, E> for Http {
    type Response = Never;
    type Call = ();

    fn begin<G: Giver>(&self, _: &mut Request<ReqB>, _: impl FnOnce() -> Permit<G>) {}

    fn wrap(response: Never) -> Never {
        response
    }

    fn judge<G: Giver>((): (), _: Result<&mut Never, &E>, _: &mut Permit<G>) {}
}

/// [`Http`] with a closure that classifies the response head. The body is followed as with [`Http`].
#[derive(Clone)]
pub struct ClassifyHead<C>(pub(crate) C);

impl<C, ReqB, B, E> Judge<Request<ReqB>, Response<B>, E> for ClassifyHead<C>
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

    #[cfg(feature = "limit")]
    #[inline]
    fn health_call(&self, request: &Request<ReqB>) -> Option<HealthCall> {
        grpc::health_call(request)
    }

    fn begin<G: Giver>(
        &self,
        request: &mut Request<ReqB>,
        _: impl FnOnce() -> Permit<G>,
    ) -> (HttpCall, C) {
        (HttpCall::of(request), self.0.clone())
    }

    fn wrap(response: Response<B>) -> Self::Response {
        response.map(TrackedBody::untracked)
    }

    fn judge<G: Giver>(
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
            Err(error) => permit.end(rule::of_any_error(error)),
        }
    }
}

/// Moves the permit into the body, or ends it here if the head decides.
#[inline]
fn follow<B: Body, G: Giver>(
    mut eos: Eos,
    response: &mut Response<TrackedBody<B>>,
    permit: &mut Permit<G>,
) {
    let certain = matches!(&eos, Eos::Plain(outcome) if !outcome.is_success());
    let so_far = permit.head(eos.so_far(), certain);
    if certain {
        eos = Eos::Plain(so_far);
    }
    match permit.hold() {
        Hold::Head => permit.end(eos.begun()),
        Hold::Verdict if certain => permit.end(so_far),
        Hold::Verdict | Hold::Body => response.body_mut().track(permit.take().erase(), eos),
    }
}

// ===== Anything else =====

/// A closure over `Result<&Response, &Error>`: for services of any types.
#[derive(Clone)]
pub struct Classify<C>(pub(crate) C);

impl<C, Req, Res, E> Judge<Req, Res, E> for Classify<C>
where
    C: for<'a> Fn(Result<&'a Res, &'a E>) -> Outcome + Clone + Send + Sync + 'static,
{
    type Response = Res;
    type Call = C;

    #[inline]
    fn begin<G: Giver>(&self, _: &mut Req, _: impl FnOnce() -> Permit<G>) -> C {
        self.0.clone()
    }

    #[inline]
    fn wrap(response: Res) -> Res {
        response
    }

    #[inline]
    fn judge<G: Giver>(classify: C, result: Result<&mut Res, &E>, permit: &mut Permit<G>) {
        permit.end(classify(result.map(|response| &*response)));
    }
}

/// Nothing is judged: a call is over with its response, and an error is a failure.
#[derive(Clone, Copy, Debug, Default)]
pub struct PerResponse;

impl<Req, Res, E: 'static> Judge<Req, Res, E> for PerResponse {
    type Response = Res;
    type Call = ();

    #[inline]
    fn begin<G: Giver>(&self, _: &mut Req, _: impl FnOnce() -> Permit<G>) {}

    #[inline]
    fn wrap(response: Res) -> Res {
        response
    }

    #[inline]
    fn judge<G: Giver>((): (), result: Result<&mut Res, &E>, permit: &mut Permit<G>) {
        permit.end(match result {
            Ok(_) => Outcome::success(),
            Err(error) => rule::of_any_error(error),
        });
    }
}

// ===== tower_http::classify =====

/// Any classifier of `tower_http::classify`, as it is.
#[cfg(feature = "tower-http")]
#[derive(Clone)]
pub struct TowerHttp<M>(pub(crate) M);

#[cfg(feature = "tower-http")]
impl<M, ReqB, B, E> Judge<Request<ReqB>, Response<B>, E> for TowerHttp<M>
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

    #[cfg(feature = "limit")]
    #[inline]
    fn health_call(&self, request: &Request<ReqB>) -> Option<HealthCall> {
        grpc::health_call(request)
    }

    fn begin<G: Giver>(
        &self,
        request: &mut Request<ReqB>,
        _: impl FnOnce() -> Permit<G>,
    ) -> M::Classifier {
        self.0.make_classifier(request)
    }

    fn wrap(response: Response<B>) -> Self::Response {
        response.map(TrackedBody::untracked)
    }

    fn judge<G: Giver>(
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
                // Its own words on errors cannot tell a refusal of ours from a failure.
                let _ = call.classify_error(error);
                permit.end(rule::of_any_error(error));
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
