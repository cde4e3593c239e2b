use std::fmt;

use super::{
    Deadline, Outcome, Rejected, SentMark, TrackedBody,
    body::Eos,
    giver::Giver,
    http::{self as rule, Head},
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

    /// The deadline that the request carries.
    fn deadline(&self, request: &Req) -> Option<Deadline> {
        let _ = request;
        None
    }

    /// The mark of the request's progress, if an outer layer has published one.
    fn sent_mark(&self, request: &Req) -> Option<SentMark> {
        let _ = request;
        None
    }

    /// A call is about to be made, with this permit.
    fn begin<G: Giver>(&self, request: &mut Req, permit: impl FnOnce() -> Permit<G>) -> Self::Call;

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

/// HTTP, and gRPC by content type: judged at the head and followed to the end of the body.
///
/// A 5xx other than 501 and 505 is a failure, 429 is throttled, an error is a failure and so is a body
/// that breaks off. An answer of `content-type: application/grpc…` is what its `grpc-status` says, in
/// the head or in the trailers: `UNKNOWN`, `DEADLINE_EXCEEDED`, `INTERNAL`, `UNAVAILABLE` and
/// `DATA_LOSS` are failures (as linkerd's), `RESOURCE_EXHAUSTED` is throttled. gRPC-Web writes its
/// trailers into the body: there only a status in the head is seen.
#[derive(Clone, Copy, Debug, Default)]
pub struct Http;

impl<ReqB, B, E> Judge<Request<ReqB>, Response<B>, E> for Http
where
    B: Body,
    E: 'static,
{
    type Response = Response<TrackedBody<B>>;
    type Call = ();

    #[inline]
    fn deadline(&self, request: &Request<ReqB>) -> Option<Deadline> {
        Deadline::of(request.extensions())
    }

    #[inline]
    fn sent_mark(&self, request: &Request<ReqB>) -> Option<SentMark> {
        request.extensions().get().cloned()
    }

    #[inline]
    fn begin<G: Giver>(&self, _: &mut Request<ReqB>, _: impl FnOnce() -> Permit<G>) {}

    #[inline]
    fn wrap(response: Response<B>) -> Self::Response {
        response.map(TrackedBody::untracked)
    }

    #[inline]
    fn judge<G: Giver>((): (), result: Result<&mut Self::Response, &E>, permit: &mut Permit<G>) {
        match result {
            Ok(response) => follow(rule::head(response), response, permit),
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

/// [`Http`] with a verdict on the head of the user's own; the body is followed all the same.
#[derive(Clone)]
pub struct ClassifyHead<C>(pub(crate) C);

impl<C, ReqB, B, E> Judge<Request<ReqB>, Response<B>, E> for ClassifyHead<C>
where
    C: Fn(StatusCode, &HeaderMap) -> Outcome + Clone + Send + Sync + 'static,
    B: Body,
    E: 'static,
{
    type Response = Response<TrackedBody<B>>;
    type Call = C;

    fn deadline(&self, request: &Request<ReqB>) -> Option<Deadline> {
        Deadline::of(request.extensions())
    }

    fn sent_mark(&self, request: &Request<ReqB>) -> Option<SentMark> {
        request.extensions().get().cloned()
    }

    fn begin<G: Giver>(&self, _: &mut Request<ReqB>, _: impl FnOnce() -> Permit<G>) -> C {
        self.0.clone()
    }

    fn wrap(response: Response<B>) -> Self::Response {
        response.map(TrackedBody::untracked)
    }

    fn judge<G: Giver>(
        classify: C,
        result: Result<&mut Self::Response, &E>,
        permit: &mut Permit<G>,
    ) {
        match result {
            Ok(response) => {
                let outcome = classify(response.status(), response.headers());
                let head = match rule::head(response) {
                    _ if !outcome.is_success() => Head::Certain(outcome),
                    // A stream's status is still to come, and its refusal further in stays one.
                    Head::Good(eos) => Head::Good(eos),
                    Head::Certain(_) if response.extensions().get::<Rejected>().is_none() => {
                        Head::Good(Eos::Plain(outcome))
                    }
                    certain => certain,
                };
                follow(head, response, permit);
            }
            Err(error) => permit.end(rule::of_any_error(error)),
        }
    }
}

/// Gives the permit to the body, or ends it here if the head is enough.
#[inline]
fn follow<B: Body, G: Giver>(
    head: Head,
    response: &mut Response<TrackedBody<B>>,
    permit: &mut Permit<G>,
) {
    let (so_far, eos) = match head {
        Head::Certain(outcome) => {
            let outcome = permit.head(outcome, true);
            (outcome, Eos::Plain(outcome))
        }
        Head::Good(eos) => (permit.head(eos.so_far(), false), eos),
    };
    let certain = matches!(eos, Eos::Plain(outcome) if !outcome.is_success());
    match permit.hold() {
        Hold::Head => permit.end(so_far),
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
                let head = if let Some(Head::Certain(refused)) =
                    response.extensions().get::<Rejected>().map(|_| rule::head(response))
                {
                    Head::Certain(refused)
                } else {
                    match call.classify_response(response) {
                        ClassifiedResponse::Ready(Ok(())) => {
                            Head::Good(Eos::Plain(Outcome::success()))
                        }
                        ClassifiedResponse::Ready(Err(_)) => Head::Certain(Outcome::failure()),
                        ClassifiedResponse::RequiresEos(eos) => {
                            Head::Good(Eos::Custom(Box::new(move |trailers| {
                                outcome(eos.classify_eos(trailers))
                            })))
                        }
                    }
                };
                follow(head, response, permit);
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
