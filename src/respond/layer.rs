//! Converts rejections that a stack returns as errors into responses.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use pin_project_lite::pin_project;
use tower_layer::Layer;
use tower_service::Service;

use super::reject::{ResponseFormat, response};
use crate::{
    drain::Loan,
    outcome::{Rejected, RejectedKind, TimeoutPhase},
    permit::{FromBytes, TrackedBody},
};

/// Converts rejections that the wrapped service returns as errors into responses: the `.respond()` of a whole stack.
///
/// Put it outermost around the layers of a client. It converts the rejections of a
/// [`RetryLayer`](crate::retry::RetryLayer), which has no `.respond()`, of a client with a [bounded number of
/// connections](crate::connect), and of a service of your own that fails with [`Rejected::new`]. A gateway returns such
/// a response to its own caller.
///
/// A tonic client receives `UNAVAILABLE`, `RESOURCE_EXHAUSTED` or `DEADLINE_EXCEEDED` with the pushback. Without this
/// layer it receives the code without the pushback if the feature `tonic` is on, and otherwise `UNKNOWN`. With the
/// feature `tonic`, a call that the timer of a tonic channel ends is `DEADLINE_EXCEEDED` instead of tonic's
/// `CANCELLED`.
///
/// ```
/// use buttress::{CircuitBreakerLayer, RespondLayer, RetryLayer};
/// use tower::ServiceBuilder;
/// # fn client() -> impl tower::Service<http::Request<buttress::retry::ReplayBody<http_body_util::Empty<bytes::Bytes>>>,
/// #     Response = http::Response<http_body_util::Empty<bytes::Bytes>>, Error = std::io::Error, Future = impl Send> + Clone + Send + 'static {
/// #     tower::service_fn(|_| async { Ok(http::Response::default()) })
/// # }
///
/// let client = ServiceBuilder::new()
///     .layer(RespondLayer::new())
///     .layer(RetryLayer::http())
///     .layer(CircuitBreakerLayer::http())
///     .service(client());
/// # let _ = tower::ServiceExt::oneshot(client, http::Request::default());
/// ```
///
/// A gateway in front of such a stack, with axum:
///
/// ```
/// use axum::{Router, extract::{Request, State}, response::{IntoResponse, Response}, routing::any};
/// use buttress::{BoxError, CircuitBreakerLayer, RespondLayer, RetryLayer};
/// use http::StatusCode;
/// use hyper_util::{client::legacy::Client, rt::TokioExecutor};
/// use tower::{ServiceBuilder, ServiceExt, util::BoxCloneSyncService};
///
/// type Upstream = BoxCloneSyncService<Request, Response, BoxError>;
///
/// async fn pass_on(State(upstream): State<Upstream>, mut request: Request) -> Response {
///     let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
///     let Ok(uri) = format!("http://search:8080{path}").parse() else {
///         return StatusCode::BAD_REQUEST.into_response();
///     };
///     *request.uri_mut() = uri;
///     // A rejection is a response: 503 with `Retry-After`. An error is an error of the upstream.
///     let response = upstream.oneshot(request).await;
///     response.unwrap_or_else(|_| StatusCode::BAD_GATEWAY.into_response())
/// }
///
/// let upstream = ServiceBuilder::new()
///     .map_response(IntoResponse::into_response)
///     .layer(RespondLayer::new())
///     .layer(RetryLayer::http())
///     .layer(CircuitBreakerLayer::http().per_origin())
///     .service(Client::builder(TokioExecutor::new()).build_http());
/// let app: Router = Router::new()
///     .fallback(any(pass_on))
///     .with_state(BoxCloneSyncService::new(upstream));
/// # let _ = app;
/// ```
///
/// The response is that of [`Respond`](super::reject::Respond). Its extensions contain the [`Rejected`] and, if a retry
/// gave up, the [`Attempts`](crate::attempt::Attempts). The layer finds a rejection if the error is a [`Rejected`], a
/// [`BoxError`](crate::error::BoxError), a [`ClientError`](crate::client_error::ClientError) or the error of a known
/// client. All other errors and the error type are unchanged. Response bodies are unchanged, too: a timeout after the
/// head is an error of the body.
///
/// # Uploads
///
/// The body of a rejected request is [drained](super::reject::Respond#uploads) if it is axum's or tonic's, also if an
/// inner layer has dropped it. In a gateway this is the body that the gateway's own client still sends.
///
/// # Cost
///
/// One lookup in the request's headers, and two allocations if the request has an unfinished body of axum's or tonic's
/// type.
#[derive(Clone, Copy, Debug, Default)]
#[must_use = "a layer does nothing until it wraps a service"]
pub struct RespondLayer(());

impl RespondLayer {
    /// Returns the layer.
    pub const fn new() -> Self {
        Self(())
    }
}

impl<S> Layer<S> for RespondLayer {
    type Service = RespondService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        RespondService { inner }
    }
}

/// The service of a [`RespondLayer`].
#[derive(Clone, Copy)]
pub struct RespondService<S> {
    inner: S,
}

impl<S> RespondService<S> {
    /// Returns the service of a [`RespondLayer`] around `inner`.
    pub const fn new(inner: S) -> Self {
        Self { inner }
    }

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

impl<S, ReqB, B> Service<Request<ReqB>> for RespondService<S>
where
    S: Service<Request<ReqB>, Response = Response<B>>,
    S::Error: 'static,
    ReqB: 'static,
    B: Body,
    B::Data: From<Bytes>,
{
    type Response = Response<TrackedBody<B>>;
    type Error = S::Error;
    type Future = RespondFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<ReqB>) -> Self::Future {
        let format = ResponseFormat::of(request.method(), request.headers());
        let loan = Loan::of(&mut request);
        RespondFuture { future: self.inner.call(request), format, loan }
    }
}

pin_project! {
    /// The future of a [`RespondService`]'s call.
    pub struct RespondFuture<F> {
        #[pin]
        future: F,
        format: ResponseFormat,
        // The lent body of the request, drained if the call is rejected. `None` if there is nothing to drain.
        loan: Option<Loan>,
    }
}

impl<S> fmt::Debug for RespondService<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RespondService").finish_non_exhaustive()
    }
}

impl<F> fmt::Debug for RespondFuture<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RespondFuture").field("format", &self.format).finish_non_exhaustive()
    }
}

impl<F, B, E> Future for RespondFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    E: 'static,
    B: Body,
    B::Data: From<Bytes>,
{
    type Output = Result<Response<TrackedBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        Poll::Ready(match ready!(this.future.poll(cx)) {
            Ok(response) => Ok(response.map(TrackedBody::untracked)),
            Err(error) => match Rejected::find_in_any(&error).cloned() {
                None if this.format.is_grpc() && is_timer_of_client(&error) => {
                    Ok(deadline_exceeded(*this.format).map(TrackedBody::from_bytes))
                }
                None => Err(error),
                Some(mut rejected) => {
                    if this.loan.as_ref().is_some_and(Loan::drain) {
                        rejected = rejected.draining();
                    }
                    let mut response = response(*this.format, rejected);
                    insert_attempts(&error, &mut response);
                    Ok(response.map(TrackedBody::from_bytes))
                }
            },
        })
    }
}

/// Returns whether the timer of a tonic channel, which expires by `grpc-timeout` or `Endpoint::timeout`, ended the
/// call. tonic reports this as `CANCELLED`.
#[cfg(feature = "tonic")]
fn is_timer_of_client<E: 'static>(error: &E) -> bool {
    crate::outcome::known(error).is_some_and(crate::outcome::is_timeout_of_tonic)
}
#[cfg(not(feature = "tonic"))]
fn is_timer_of_client<E: 'static>(_: &E) -> bool {
    false
}

/// Returns the response for a call that the timer of the client ended. No layer rejected the call, so the response
/// carries no [`Rejected`].
#[cold]
fn deadline_exceeded(format: ResponseFormat) -> Response<Bytes> {
    let rejected = Rejected::new(RejectedKind::TimedOut(TimeoutPhase::Deadline));
    let mut response = response(format, rejected);
    response.extensions_mut().remove::<Rejected>();
    response
}

/// Stores the record of the attempts in the extensions of the response.
fn insert_attempts<E: 'static>(error: &E, response: &mut Response<Bytes>) {
    if let Some(attempts) = crate::outcome::known(error).and_then(crate::attempt::Attempts::find) {
        response.extensions_mut().insert(attempts);
    }
}
