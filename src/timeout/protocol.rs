//! Adapts the timeout layer to protocols: wraps request and response bodies, and reads the timeouts and the deadline of
//! a request.

use std::sync::Arc;

use http::{Extensions, Request, Response};
use http_body::Body;

use super::{
    body::TimedBody,
    body_rate::BodyRate,
    known_bodies,
    settings::Timeouts,
    timers::Watch,
    upload::{Sending, SendingBody},
};
use crate::{
    classify::{Http, PerResponse},
    drain::{self, Drains},
    error::BoxError,
    outcome::grpc,
    time::Deadline,
};

/// Converts a request for the wrapped service. Not to be implemented outside of this crate.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot forward a `{Req}`",
    note = "a timeout accepts `http::Request<_>`, and any other type with `.per_response()`"
)]
pub trait Begin<Req>: Clone + Send + Sync + 'static {
    /// The request type of the wrapped service.
    type Request;

    /// Returns the timeouts and the deadline in the extensions of the request.
    fn said(request: &Req) -> (Option<Timeouts>, Option<Deadline>);

    /// Converts the request. Its body is not watched yet.
    fn pass(request: Req) -> Self::Request;

    /// Starts to watch the request body for this call. If `responds`, the body is drained when the call times out.
    fn watch(
        request: &mut Self::Request,
        watch: &mut Watch,
        rate: BodyRate,
        responds: bool,
    ) -> Option<Arc<Sending>>;
}

/// Converts a response for the caller. Not to be implemented outside of this crate.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot time a `{Res}`",
    note = "a timeout accepts `http::Response<B>` where `B: http_body::Body`, and any other type with `.per_response()`"
)]
pub trait Follow<Res> {
    /// The response type for the caller.
    type Response;

    /// Converts the response. Its body is not timed yet.
    fn wrap(response: Res) -> Self::Response;

    /// Returns whether the head of the response is the gRPC status `CANCELLED`, with which tonic's servers report that
    /// a `grpc-timeout` has expired.
    fn is_cancelled(response: &Self::Response) -> bool {
        let _ = response;
        false
    }

    /// Starts to time the response body. Changes the response in place, because a move of a response copies it.
    fn time(response: &mut Self::Response, watch: Watch, request: &mut Option<Arc<Sending>>);
}

/// HTTP with an unchanged request type. The request body is watched only if it is axum's or tonic's (features `axum`,
/// `tonic-health`).
#[derive(Clone, Copy, Debug, Default)]
pub struct AsIs;

/// Returns when the body of a request is drained after a timeout.
#[inline]
pub(super) fn drains<B: 'static>(request: &Request<B>, responds: bool) -> Drains {
    if responds && drain::can_drain_pinned::<B>() { Drains::of(request) } else { Drains::Never }
}

#[inline]
fn of(extensions: &Extensions) -> (Option<Timeouts>, Option<Deadline>) {
    (extensions.get().copied(), Deadline::of(extensions))
}

impl<B: Body<Error: Into<BoxError>> + 'static> Begin<Request<B>> for Http {
    type Request = Request<SendingBody<B>>;

    #[inline]
    fn said(request: &Request<B>) -> (Option<Timeouts>, Option<Deadline>) {
        of(request.extensions())
    }

    #[inline]
    fn pass(request: Request<B>) -> Self::Request {
        request.map(SendingBody::unwatched)
    }

    #[inline]
    fn watch(
        request: &mut Self::Request,
        watch: &mut Watch,
        rate: BodyRate,
        responds: bool,
    ) -> Option<Arc<Sending>> {
        if request.body().is_end_stream() {
            return None;
        }
        let (rate, drains) = (rate.of(request), drains(request, responds));
        request.body_mut().watch(watch, rate, drains)
    }
}

impl<B: 'static> Begin<Request<B>> for AsIs {
    type Request = Request<B>;

    #[inline]
    fn said(request: &Request<B>) -> (Option<Timeouts>, Option<Deadline>) {
        of(request.extensions())
    }

    #[inline]
    fn pass(request: Request<B>) -> Request<B> {
        request
    }

    #[inline]
    fn watch(
        request: &mut Request<B>,
        watch: &mut Watch,
        rate: BodyRate,
        responds: bool,
    ) -> Option<Arc<Sending>> {
        watch.timeouts.or_head_for_taking();
        let rate = rate.of(request);
        known_bodies::watched(request, watch, rate, responds)
    }
}

impl<Req> Begin<Req> for PerResponse {
    type Request = Req;

    #[inline]
    fn said(_: &Req) -> (Option<Timeouts>, Option<Deadline>) {
        (None, None)
    }

    #[inline]
    fn pass(request: Req) -> Req {
        request
    }

    #[inline]
    fn watch(_: &mut Req, _: &mut Watch, _: BodyRate, _: bool) -> Option<Arc<Sending>> {
        None
    }
}

impl<B: Body<Error: Into<BoxError>>> Follow<Response<B>> for Http {
    type Response = Response<TimedBody<B>>;

    #[inline]
    fn wrap(response: Response<B>) -> Self::Response {
        response.map(TimedBody::untimed)
    }

    #[inline]
    fn is_cancelled(response: &Self::Response) -> bool {
        grpc::is_cancelled(response.headers())
    }

    #[inline]
    fn time(response: &mut Self::Response, watch: Watch, request: &mut Option<Arc<Sending>>) {
        response.body_mut().time(watch, request);
    }
}

impl<B: Body<Error: Into<BoxError>>> Follow<Response<B>> for AsIs {
    type Response = Response<TimedBody<B>>;

    #[inline]
    fn wrap(response: Response<B>) -> Self::Response {
        Http::wrap(response)
    }

    #[inline]
    fn is_cancelled(response: &Self::Response) -> bool {
        <Http as Follow<Response<B>>>::is_cancelled(response)
    }

    #[inline]
    fn time(response: &mut Self::Response, watch: Watch, request: &mut Option<Arc<Sending>>) {
        Http::time(response, watch, request);
    }
}

impl<Res> Follow<Res> for PerResponse {
    type Response = Res;

    #[inline]
    fn wrap(response: Res) -> Res {
        response
    }

    fn time(_: &mut Res, _: Watch, _: &mut Option<Arc<Sending>>) {}
}
