//! Endpoints of the process itself: a layer that serves them in front of a service, and a service of their own.
//!
//! The layers and services of the health endpoints, of the metrics and of the live page are made of these types.

use std::{
    convert::Infallible,
    fmt,
    future::{Future, Ready, ready},
    pin::Pin,
    task::{Context, Poll, ready as done},
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header, request::Parts};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use crate::{
    admission::Reusable,
    drain::drain_request,
    permit::{DataStream, FromBytes, TrackedBody},
    sealed::Sealed,
};

/// The endpoints that an [`EndpointLayer`] or an [`EndpointService`] serves.
///
/// The trait is sealed: it cannot be implemented outside of this crate.
pub trait Serve: Sealed + Clone + Send + Sync + 'static {
    /// Returns whether the path is one of the endpoints.
    fn serves(&self, path: &str) -> bool;

    /// Returns whether the endpoints respond to requests of this method: by default to `GET` and `HEAD`.
    fn accepts(&self, method: &Method) -> bool {
        method == Method::GET || method == Method::HEAD
    }

    /// Returns the response to a request whose path is one of the endpoints, and whose method is accepted.
    fn respond(&self, request: &Parts) -> Response<EndpointBody>;
}

/// Returns a response with a text.
pub(crate) fn plain(status: StatusCode, body: impl Into<Bytes>) -> Response<EndpointBody> {
    typed("text/plain; charset=utf-8", status, body.into())
}

/// Returns a response with a body of this content type, which no cache stores.
pub(crate) fn typed(
    content: &'static str,
    status: StatusCode,
    body: Bytes,
) -> Response<EndpointBody> {
    let length = HeaderValue::from(body.len());
    let mut response = Response::new(EndpointBody::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content));
    headers.insert(header::CONTENT_LENGTH, length);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Responds to a request for one of the endpoints. A response to `HEAD` has the headers of `GET` and no body.
#[cold]
#[inline(never)]
fn respond<E: Serve, B: 'static>(endpoints: &E, request: Request<B>) -> Response<EndpointBody> {
    let (parts, body) = request.into_parts();
    let response = endpoints.respond(&parts);
    finish(response, Request::from_parts(parts, body))
}

/// Drains the request, and removes the body of a response to `HEAD`.
fn finish<B: 'static>(
    response: Response<EndpointBody>,
    request: Request<B>,
) -> Response<EndpointBody> {
    let is_head = request.method() == Method::HEAD;
    drain_request(request);
    if is_head { response.map(|_| EndpointBody::from(Bytes::new())) } else { response }
}

// ===== In front of a server =====

/// Serves endpoints in front of a service. Requests for other paths, and requests of a method that the endpoints do not
/// accept, pass through.
///
/// A request for an endpoint does not touch the wrapped service, so a server that is saturated, or whose `poll_ready`
/// hangs, still responds to it.
#[derive(Clone, Debug)]
#[must_use = "a layer does nothing until it wraps a service"]
pub struct EndpointLayer<E> {
    pub(crate) endpoints: E,
}

impl<S, E: Clone> Layer<S> for EndpointLayer<E> {
    type Service = Endpoint<S, E>;

    fn layer(&self, inner: S) -> Endpoint<S, E> {
        Endpoint { inner, endpoints: self.endpoints.clone(), ready: false }
    }
}

/// The service of an [`EndpointLayer`].
///
/// It is ready even if the wrapped service is not, because only the request determines whether the wrapped service is
/// needed. Other calls then wait for the wrapped service in their future.
pub struct Endpoint<S, E> {
    inner: S,
    endpoints: E,
    /// `inner` was polled ready, and may hold a reservation.
    ready: bool,
}

impl<S, E> Endpoint<S, E> {
    /// Returns the wrapped service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Returns the wrapped service.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// Returns the wrapped service.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S: Clone, E: Clone> Clone for Endpoint<S, E> {
    /// Resets readiness: a reservation belongs to the instance that made it.
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), endpoints: self.endpoints.clone(), ready: false }
    }
}

impl<S, E, ReqB, B> Service<Request<ReqB>> for Endpoint<S, E>
where
    E: Serve,
    S: Service<Request<ReqB>, Response = Response<B>> + Reusable,
    ReqB: 'static,
    B: Body,
    B::Data: From<Bytes>,
{
    type Response = Response<TrackedBody<B>>;
    type Error = S::Error;
    type Future = EndpointFuture<S, Request<ReqB>, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        if !self.ready {
            match self.inner.poll_ready(cx) {
                Poll::Ready(result) => {
                    result?;
                    self.ready = true;
                }
                // The inner service may have registered a waiter. A fresh clone replaces the instance, so that the
                // waiter does not stay registered without a call.
                Poll::Pending => self.inner = self.inner.clone(),
            }
        }
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<ReqB>) -> Self::Future {
        let was_ready = std::mem::take(&mut self.ready);
        let is_mine = self.endpoints.serves(request.uri().path());
        let state = match is_mine && self.endpoints.accepts(request.method()) {
            true => {
                if was_ready {
                    // The reservation of this instance is not needed. A fresh clone releases it.
                    self.inner = self.inner.clone();
                }
                let response = respond(&self.endpoints, request);
                EndpointState::Respond { response: Some(Box::new(response)) }
            }
            // The future is returned here, because it is large and each move copies it.
            _ if was_ready => {
                let state = EndpointState::Called { future: self.inner.call(request) };
                return EndpointFuture { state };
            }
            _ => EndpointState::Parked { parked: Some(Box::new((self.inner.clone(), request))) },
        };
        EndpointFuture { state }
    }
}

pin_project! {
    /// The future of an [`Endpoint`]'s call.
    pub struct EndpointFuture<S, Req, F> {
        #[pin]
        state: EndpointState<S, Req, F>,
    }
}

pin_project! {
    #[project = StateProj]
    enum EndpointState<S, Req, F> {
        Called { #[pin] future: F },
        Parked { parked: Option<Box<(S, Req)>> },
        Respond { response: Option<Box<Response<EndpointBody>>> },
    }
}

impl<S, Req, B> Future for EndpointFuture<S, Req, S::Future>
where
    S: Service<Req, Response = Response<B>>,
    B: Body,
    B::Data: From<Bytes>,
{
    type Output = Result<Response<TrackedBody<B>>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        loop {
            let next = match this.state.as_mut().project() {
                StateProj::Called { future } => {
                    return future.poll(cx).map_ok(|response| response.map(TrackedBody::untracked));
                }
                StateProj::Parked { parked } => {
                    if let Some((service, _)) = parked.as_deref_mut() {
                        done!(service.poll_ready(cx))?;
                    }
                    let Some((mut service, request)) = parked.take().map(|parked| *parked) else {
                        unreachable!("polled after completion")
                    };
                    EndpointState::Called { future: service.call(request) }
                }
                StateProj::Respond { response } => {
                    let Some(response) = response.take() else {
                        unreachable!("polled after completion")
                    };
                    return Poll::Ready(Ok(tracked(response)));
                }
            };
            this.state.set(next);
        }
    }
}

impl<S, E: fmt::Debug> fmt::Debug for Endpoint<S, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint").field("endpoints", &self.endpoints).finish_non_exhaustive()
    }
}

impl<S, Req, F> fmt::Debug for EndpointFuture<S, Req, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.state {
            EndpointState::Called { .. } => "EndpointFuture(called)",
            EndpointState::Parked { .. } => "EndpointFuture(parked)",
            EndpointState::Respond { .. } => "EndpointFuture(respond)",
        })
    }
}

/// Converts the response of an endpoint. The function is not inlined, so that its code is outside of the path of calls
/// to the wrapped service.
#[cold]
#[inline(never)]
#[expect(clippy::boxed_local, reason = "without the box, the caller would copy the response")]
fn tracked<B: Body<Data: From<Bytes>>>(
    response: Box<Response<EndpointBody>>,
) -> Response<TrackedBody<B>> {
    response.map(EndpointBody::into_tracked)
}

// ===== On a separate port =====

/// Serves endpoints. Responds with 404 to other paths, and with 405 to methods that the endpoints do not accept.
#[derive(Clone, Debug)]
pub struct EndpointService<E> {
    pub(crate) endpoints: E,
}

impl<E: Serve, ReqB: 'static> Service<Request<ReqB>> for EndpointService<E> {
    type Response = Response<EndpointBody>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<ReqB>) -> Self::Future {
        ready(Ok(if !self.endpoints.serves(request.uri().path()) {
            finish(plain(StatusCode::NOT_FOUND, "not found\n"), request)
        } else if self.endpoints.accepts(request.method()) {
            respond(&self.endpoints, request)
        } else {
            finish(not_allowed("GET, HEAD"), request)
        }))
    }
}

/// Returns the response to a method that an endpoint does not accept.
pub(crate) fn not_allowed(allowed: &'static str) -> Response<EndpointBody> {
    let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n");
    response.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allowed));
    response
}

/// The body of an endpoint's response: at most one frame, or a stream of events.
pub struct EndpointBody(EndpointData);

enum EndpointData {
    Bytes(Bytes),
    Stream(Option<Box<dyn DataStream>>),
}

impl EndpointBody {
    /// Returns a body that sends the data of a stream.
    #[cfg_attr(not(feature = "dashboard"), allow(dead_code))]
    pub(crate) fn stream(stream: Box<dyn DataStream>) -> Self {
        Self(EndpointData::Stream(Some(stream)))
    }

    /// Returns the data of a body that is no stream.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.0 {
            EndpointData::Bytes(data) => data,
            EndpointData::Stream(_) => &[],
        }
    }

    fn into_tracked<B: Body<Data: From<Bytes>>>(self) -> TrackedBody<B> {
        match self.0 {
            EndpointData::Bytes(data) => TrackedBody::from_bytes(data),
            EndpointData::Stream(Some(stream)) => TrackedBody::from_stream(stream),
            EndpointData::Stream(None) => TrackedBody::default(),
        }
    }
}

impl From<Bytes> for EndpointBody {
    fn from(data: Bytes) -> Self {
        Self(EndpointData::Bytes(data))
    }
}

impl Body for EndpointBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let data = match &mut self.0 {
            EndpointData::Bytes(data) => {
                let data = std::mem::take(data);
                (!data.is_empty()).then_some(data)
            }
            EndpointData::Stream(stream) => {
                let data = match stream {
                    Some(stream) => done!(stream.poll_data(cx)),
                    None => None,
                };
                if data.is_none() {
                    *stream = None;
                }
                data
            }
        };
        Poll::Ready(data.map(|data| Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            EndpointData::Bytes(data) => data.is_empty(),
            EndpointData::Stream(stream) => stream.is_none(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            EndpointData::Bytes(data) => SizeHint::with_exact(data.len() as u64),
            EndpointData::Stream(Some(_)) => SizeHint::default(),
            EndpointData::Stream(None) => SizeHint::with_exact(0),
        }
    }
}

impl fmt::Debug for EndpointBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            EndpointData::Bytes(data) => f.debug_tuple("EndpointBody").field(data).finish(),
            EndpointData::Stream(_) => f.write_str("EndpointBody(stream)"),
        }
    }
}
