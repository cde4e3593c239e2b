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
    timers::CallTimers,
    upload::{SendingBody, Upload, drains},
};
use crate::{
    classify::{Http, PerResponse},
    error::BoxError,
    outcome::grpc,
    sealed::Sealed,
    time::Deadline,
};

/// The request side of a protocol of the timeout layer: reads the settings of a request and watches its body.
///
/// Implemented by [`Http`], [`AsIs`] and [`PerResponse`]. This trait is sealed: it cannot be implemented outside of
/// this crate.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot forward a `{Req}`",
    note = "a timeout accepts `http::Request<_>`, and any other type with `.per_response()`"
)]
pub trait TimeRequest<Req>: Sealed + Clone + Send + Sync + 'static {
    /// The request type of the wrapped service.
    type Request;

    /// Returns the timeouts and the deadline in the extensions of the request.
    fn settings(request: &Req) -> (Option<Timeouts>, Option<Deadline>);

    /// Converts the request. Its body is not watched yet.
    fn convert(request: Req) -> Self::Request;

    /// Starts to watch the request body for this call. If `responds`, the body is drained when the call times out.
    fn watch(
        request: &mut Self::Request,
        timers: &mut CallTimers,
        rate: BodyRate,
        responds: bool,
    ) -> Option<Arc<Upload>>;
}

/// The response side of a protocol of the timeout layer: wraps a response and times its body.
///
/// Implemented by [`Http`], [`AsIs`] and [`PerResponse`]. This trait is sealed: it cannot be implemented outside of
/// this crate.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot time a `{Res}`",
    note = "a timeout accepts `http::Response<B>` where `B: http_body::Body`, and any other type with `.per_response()`"
)]
pub trait TimeResponse<Res>: Sealed {
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
    fn time(response: &mut Self::Response, timers: CallTimers, upload: &mut Option<Arc<Upload>>);
}

/// HTTP with an unchanged request type. The request body is watched only if it is axum's or tonic's (features `axum`,
/// `tonic`).
#[derive(Clone, Copy, Debug, Default)]
pub struct AsIs;

impl Sealed for AsIs {}

#[inline]
fn of(extensions: &Extensions) -> (Option<Timeouts>, Option<Deadline>) {
    (extensions.get().copied(), Deadline::of(extensions))
}

impl<B: Body<Error: Into<BoxError>> + 'static> TimeRequest<Request<B>> for Http {
    type Request = Request<SendingBody<B>>;

    #[inline]
    fn settings(request: &Request<B>) -> (Option<Timeouts>, Option<Deadline>) {
        of(request.extensions())
    }

    #[inline]
    fn convert(request: Request<B>) -> Self::Request {
        request.map(SendingBody::unwatched)
    }

    #[inline]
    fn watch(
        request: &mut Self::Request,
        timers: &mut CallTimers,
        rate: BodyRate,
        responds: bool,
    ) -> Option<Arc<Upload>> {
        if request.body().is_end_stream() {
            return None;
        }
        let upload = timers.upload(rate.of(request), drains(request, responds))?;
        request.body_mut().watch(upload.clone());
        Some(upload)
    }
}

impl<B: 'static> TimeRequest<Request<B>> for AsIs {
    type Request = Request<B>;

    #[inline]
    fn settings(request: &Request<B>) -> (Option<Timeouts>, Option<Deadline>) {
        of(request.extensions())
    }

    #[inline]
    fn convert(request: Request<B>) -> Request<B> {
        request
    }

    #[inline]
    fn watch(
        request: &mut Request<B>,
        timers: &mut CallTimers,
        rate: BodyRate,
        responds: bool,
    ) -> Option<Arc<Upload>> {
        timers.timeouts.default_request_stall_to_head();
        let rate = rate.of(request);
        known_bodies::watch(request, timers, rate, responds)
    }
}

impl<Req> TimeRequest<Req> for PerResponse {
    type Request = Req;

    #[inline]
    fn settings(_: &Req) -> (Option<Timeouts>, Option<Deadline>) {
        (None, None)
    }

    #[inline]
    fn convert(request: Req) -> Req {
        request
    }

    #[inline]
    fn watch(_: &mut Req, _: &mut CallTimers, _: BodyRate, _: bool) -> Option<Arc<Upload>> {
        None
    }
}

impl<B: Body<Error: Into<BoxError>>> TimeResponse<Response<B>> for Http {
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
    fn time(response: &mut Self::Response, timers: CallTimers, upload: &mut Option<Arc<Upload>>) {
        response.body_mut().time(timers, upload);
    }
}

impl<B: Body<Error: Into<BoxError>>> TimeResponse<Response<B>> for AsIs {
    type Response = Response<TimedBody<B>>;

    #[inline]
    fn wrap(response: Response<B>) -> Self::Response {
        Http::wrap(response)
    }

    #[inline]
    fn is_cancelled(response: &Self::Response) -> bool {
        <Http as TimeResponse<Response<B>>>::is_cancelled(response)
    }

    #[inline]
    fn time(response: &mut Self::Response, timers: CallTimers, upload: &mut Option<Arc<Upload>>) {
        Http::time(response, timers, upload);
    }
}

impl<Res> TimeResponse<Res> for PerResponse {
    type Response = Res;

    #[inline]
    fn wrap(response: Res) -> Res {
        response
    }

    fn time(_: &mut Res, _: CallTimers, _: &mut Option<Arc<Upload>>) {}
}
