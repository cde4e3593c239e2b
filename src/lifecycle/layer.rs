use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{Extensions, HeaderMap, HeaderValue, Request, Response, Version, header};
use http_body::Body;
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use super::{
    state::{DrainPolicy, LifecyclePhase, LifecycleState},
    token::Drain,
};
use crate::{
    admission::{Admission, AdmissionFuture, Reusable},
    classify::{Http, HttpCall},
    outcome::Rejected,
    permit::{ShardedArc, ShardedRef, TrackedBody},
    respond::Respond,
};

/// Counts the calls in flight, and rejects calls after the [grace](super::handle::Lifecycle::grace) of a drain.
///
/// - A call is in flight until its response body ends.
/// - Every request carries a [`Drain`] token in its extensions.
/// - When the process is *stopping* and the grace is over, calls are rejected with 503 (gRPC `UNAVAILABLE`).
/// - From the start of the drain, responses over HTTP/1 carry `Connection: close`, with two exceptions: a response that
///   upgrades the connection, and a rejection whose request body is still [drained](crate::respond::Respond#uploads).
///   The connection of such a rejection ends when the body ends.
///
/// Made by [`Lifecycle::layer`](super::handle::Lifecycle::layer). `serve` adds it. It is the outermost layer, except
/// for the health endpoints: they wrap it, so that they respond until the process ends.
///
/// The token needs one allocation for each call, and two more if the request has no extensions yet.
#[derive(Clone)]
#[must_use = "a layer does nothing until it wraps a service"]
pub struct LifecycleLayer {
    state: ShardedArc<LifecycleState>,
}

impl LifecycleLayer {
    pub(super) fn new(state: ShardedArc<LifecycleState>) -> Self {
        Self { state }
    }
}

impl<S> Layer<S> for LifecycleLayer {
    type Service = LifecycleService<S>;

    fn layer(&self, inner: S) -> LifecycleService<S> {
        let policy = DrainPolicy(self.state.clone());
        LifecycleService { admission: Admission::new(inner, policy, Http, Respond, None) }
    }
}

/// The service of a [`LifecycleLayer`].
#[derive(Clone)]
pub struct LifecycleService<S> {
    admission: Admission<S, DrainPolicy, Http, Respond>,
}

impl<S> LifecycleService<S> {
    /// Returns a reference to the wrapped service.
    pub fn get_ref(&self) -> &S {
        self.admission.inner()
    }

    /// Returns a mutable reference to the wrapped service.
    pub fn get_mut(&mut self) -> &mut S {
        self.admission.inner_mut()
    }

    /// Returns the wrapped service.
    pub fn into_inner(self) -> S {
        self.admission.into_inner()
    }
}

impl<S, ReqB, B> Service<Request<ReqB>> for LifecycleService<S>
where
    S: Service<Request<ReqB>, Response = Response<B>, Error: 'static> + Reusable,
    ReqB: 'static,
    B: Body<Data: From<Bytes>>,
{
    type Response = Response<TrackedBody<B>>;
    type Error = S::Error;
    type Future = LifecycleFuture<S, ReqB, S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        Service::<Request<ReqB>>::poll_ready(&mut self.admission, cx)
    }

    #[inline]
    fn call(&mut self, mut request: Request<ReqB>) -> Self::Future {
        let DrainPolicy(state) = self.admission.policy();
        request.extensions_mut().insert(Drain::new(state.lease()));
        // `Connection` does not exist in HTTP/2.
        let closes = request.version() < Version::HTTP_2;
        let state = closes.then(|| state.lease());
        LifecycleFuture { future: self.admission.call(request), state }
    }
}

pin_project! {
    /// The future of a [`LifecycleService`]'s call.
    pub struct LifecycleFuture<S, ReqB, F> {
        #[pin]
        future: AdmissionFuture<S, Request<ReqB>, F, HttpCall, DrainPolicy, Http, Respond>,
        state: Option<ShardedRef<LifecycleState>>,
    }
}

impl<S, ReqB, B> Future for LifecycleFuture<S, ReqB, S::Future>
where
    S: Service<Request<ReqB>, Response = Response<B>, Error: 'static>,
    ReqB: 'static,
    B: Body<Data: From<Bytes>>,
{
    type Output = Result<Response<TrackedBody<B>>, S::Error>;

    #[inline]
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let mut result = this.future.poll(cx);
        if let (Poll::Ready(Ok(response)), Some(state)) = (&mut result, this.state) {
            if state.phase() >= LifecyclePhase::Draining && !is_draining(response.extensions()) {
                close(response.headers_mut());
            }
        }
        result
    }
}

/// Returns whether the response is a rejection whose request body is drained.
///
/// Such a connection stays open until the body has ended. After a response with `Connection: close`, hyper's graceful
/// shutdown would close it while the client still sends.
fn is_draining(extensions: &Extensions) -> bool {
    extensions.get::<Rejected>().is_some_and(Rejected::is_draining)
}

/// Adds the option `close` to the `Connection` header. The header of an upgrade is not changed, because clients
/// consider an upgrade with `close` as failed.
fn close(headers: &mut HeaderMap) {
    let values = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let mut options = values.flat_map(|value| value.split(',')).map(str::trim);
    let has =
        |option: &str| ["close", "upgrade"].iter().any(|known| option.eq_ignore_ascii_case(known));
    if !options.any(has) {
        headers.append(header::CONNECTION, HeaderValue::from_static("close"));
    }
}

impl fmt::Debug for LifecycleLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LifecycleLayer").field("state", &self.state).finish()
    }
}

impl<S> fmt::Debug for LifecycleService<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LifecycleService")
            .field("state", self.admission.policy())
            .finish_non_exhaustive()
    }
}

impl<S, ReqB, F> fmt::Debug for LifecycleFuture<S, ReqB, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LifecycleFuture")
    }
}
