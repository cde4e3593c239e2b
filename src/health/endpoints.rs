use std::{
    convert::Infallible,
    fmt,
    future::{Future, Ready, ready},
    pin::Pin,
    task::{Context, Poll, ready as done},
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use super::{
    registry::Health,
    responder::{HealthRoute, Responder, is_get_or_head},
    response::{plain, without_body_for},
};
use crate::{
    admission::Reusable,
    drain::drain_request,
    permit::{FromBytes, TrackedBody},
};

impl Health {
    /// Returns a layer that serves `/livez`, `/readyz` and `/healthz` without a call of the wrapped service. It should
    /// be the outermost layer. See the [module](super).
    pub fn endpoints(&self) -> HealthEndpointsLayer {
        HealthEndpointsLayer { responder: Responder::new(self.clone()) }
    }

    /// Returns a service that serves `/livez`, `/readyz` and `/healthz`, and responds with 404 to other paths. For a
    /// separate port, or for routes.
    #[must_use]
    pub fn service(&self) -> HealthService {
        HealthService { responder: Responder::new(self.clone()) }
    }
}

// ===== In front of a server =====

/// Serves `GET` and `HEAD` of `/livez`, `/readyz` and `/healthz`. Other requests pass through.
///
/// Made by [`Health::endpoints`]. A request for an endpoint does not touch the wrapped service, so a server that is
/// saturated, or whose `poll_ready` hangs, still reports its health.
#[derive(Clone, Debug)]
#[must_use = "a layer does nothing until it wraps a service"]
pub struct HealthEndpointsLayer {
    responder: Responder,
}

impl HealthEndpointsLayer {
    /// Includes the reason of each failed check, and the time and the duration of its last run.
    ///
    /// By default the response contains `reason withheld` and no times. The text of an error can contain names of hosts
    /// and paths, also without [secrets](crate#secrets), and times reveal the network behind the process.
    pub fn with_reasons(mut self) -> Self {
        self.responder.with_reasons = true;
        self
    }
}

impl<S> Layer<S> for HealthEndpointsLayer {
    type Service = HealthEndpoints<S>;

    fn layer(&self, inner: S) -> HealthEndpoints<S> {
        HealthEndpoints { inner, responder: self.responder.clone(), ready: false }
    }
}

/// The service of a [`HealthEndpointsLayer`].
///
/// It is ready even if the wrapped service is not, because only the request determines whether the wrapped service is
/// needed. Other calls then wait for the wrapped service in their future.
pub struct HealthEndpoints<S> {
    inner: S,
    responder: Responder,
    /// `inner` was polled ready, and may hold a reservation.
    ready: bool,
}

impl<S> HealthEndpoints<S> {
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

impl<S: Clone> Clone for HealthEndpoints<S> {
    /// Resets readiness: a reservation belongs to the instance that made it.
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), responder: self.responder.clone(), ready: false }
    }
}

impl<S, ReqB, B> Service<Request<ReqB>> for HealthEndpoints<S>
where
    S: Service<Request<ReqB>, Response = Response<B>> + Reusable,
    ReqB: 'static,
    B: Body,
    B::Data: From<Bytes>,
{
    type Response = Response<TrackedBody<B>>;
    type Error = S::Error;
    type Future = HealthEndpointsFuture<S, Request<ReqB>, S::Future>;

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
        let state = match HealthRoute::of(request.uri().path()) {
            Some(route) if is_get_or_head(request.method()) => {
                if was_ready {
                    // The reservation of this instance is not needed. A fresh clone releases it.
                    self.inner = self.inner.clone();
                }
                let response =
                    self.responder.respond(route, request.uri().query(), request.headers());
                let response = without_body_for(request.method(), response);
                drain_request(request);
                EndpointState::Respond { response: Some(Box::new(response)) }
            }
            // The future is returned here, because it is large and each move copies it.
            _ if was_ready => {
                let state = EndpointState::Called { future: self.inner.call(request) };
                return HealthEndpointsFuture { state };
            }
            _ => EndpointState::Parked { parked: Some(Box::new((self.inner.clone(), request))) },
        };
        HealthEndpointsFuture { state }
    }
}

pin_project! {
    /// The future of a [`HealthEndpoints`]'s call.
    pub struct HealthEndpointsFuture<S, Req, F> {
        #[pin]
        state: EndpointState<S, Req, F>,
    }
}

pin_project! {
    #[project = StateProj]
    enum EndpointState<S, Req, F> {
        Called { #[pin] future: F },
        Parked { parked: Option<Box<(S, Req)>> },
        Respond { response: Option<Box<Response<Bytes>>> },
    }
}

impl<S, Req, B> Future for HealthEndpointsFuture<S, Req, S::Future>
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
                    return Poll::Ready(Ok(response.map(TrackedBody::from_bytes)));
                }
            };
            this.state.set(next);
        }
    }
}

impl<S> fmt::Debug for HealthEndpoints<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HealthEndpoints")
            .field("health", &self.responder.health)
            .finish_non_exhaustive()
    }
}

impl<S, Req, F> fmt::Debug for HealthEndpointsFuture<S, Req, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.state {
            EndpointState::Called { .. } => "HealthEndpointsFuture(called)",
            EndpointState::Parked { .. } => "HealthEndpointsFuture(parked)",
            EndpointState::Respond { .. } => "HealthEndpointsFuture(respond)",
        })
    }
}

// ===== On a separate port =====

/// Serves `/livez`, `/readyz` and `/healthz`. Responds with 404 to other paths, and with 405 to methods other than
/// `GET` and `HEAD`. Made by [`Health::service`].
#[derive(Clone, Debug)]
pub struct HealthService {
    responder: Responder,
}

impl HealthService {
    /// Includes the reason of each failed check, and the time and the duration of its last run, as
    /// [`HealthEndpointsLayer::with_reasons`] does. By default the response contains none of them.
    #[must_use]
    pub fn with_reasons(mut self) -> Self {
        self.responder.with_reasons = true;
        self
    }
}

impl<ReqB: 'static> Service<Request<ReqB>> for HealthService {
    type Response = Response<HealthBody>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<ReqB>) -> Self::Future {
        let response = match HealthRoute::of(request.uri().path()) {
            None => plain(StatusCode::NOT_FOUND, "not found\n"),
            Some(route) if is_get_or_head(request.method()) => {
                self.responder.respond(route, request.uri().query(), request.headers())
            }
            Some(_) => {
                let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n");
                response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
                response
            }
        };
        let response = without_body_for(request.method(), response).map(HealthBody);
        drain_request(request);
        ready(Ok(response))
    }
}

/// The body of a [`HealthService`]'s response. It consists of no frame or one frame.
#[derive(Debug)]
pub struct HealthBody(Bytes);

impl Body for HealthBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let data = std::mem::take(&mut self.0);
        Poll::Ready((!data.is_empty()).then(|| Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.len() as u64)
    }
}
