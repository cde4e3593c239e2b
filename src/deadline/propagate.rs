//! The deadline layer that does not enforce the deadline.

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use http::Request;
use tower_layer::Layer;
use tower_service::Service;

use super::{
    codec::Codec,
    handle::{DeadlineHandle, DeadlineTimes},
    layer::DeadlineLayer,
};
use crate::{error::ConfigError, fault::Fault, outcome::LayerKind, time::CallClock};

/// Sets one absolute deadline for every call and sends the time left to the next hop. Inner layers enforce the
/// deadline. Made by [`DeadlineLayer::propagate_only`](super::layer::DeadlineLayer::propagate_only).
#[must_use = "a layer does nothing until it wraps a service"]
#[derive(Clone)]
pub struct PropagateDeadlineLayer {
    handle: DeadlineHandle,
    codec: Option<Arc<dyn Codec>>,
    fault: Fault,
}

impl<R> DeadlineLayer<R> {
    /// Returns a layer that only sets the deadline and writes the headers. Inner layers enforce the deadline. The
    /// returned layer has no timer, rejects no call, does not wrap bodies, and accepts services with any response.
    ///
    /// An inner [`TimeoutLayer`](crate::timeout::TimeoutLayer) enforces the deadline up to the end of the response
    /// body. An inner [`RetryLayer`](crate::retry::RetryLayer) enforces it up to the response head, over all attempts
    /// and delays. A limit and a circuit breaker reject calls whose deadline has passed, unless they are in shadow
    /// mode. Without a timeout or a retry layer, a call in flight is not ended at the deadline.
    ///
    /// ```
    /// use std::time::Duration;
    /// use buttress::{DeadlineLayer, RetryLayer, TimeoutLayer};
    /// use tower::ServiceBuilder;
    ///
    /// # fn client() -> impl Clone { () }
    /// let client = ServiceBuilder::new()
    ///     .layer(DeadlineLayer::new().default_of(Duration::from_secs(2)).propagate_only())
    ///     .layer(RetryLayer::http())
    ///     .layer(TimeoutLayer::http())
    ///     .service(client());
    /// # let _ = client;
    /// ```
    pub fn propagate_only(self) -> PropagateDeadlineLayer {
        PropagateDeadlineLayer { handle: self.handle(), codec: self.codec, fault: self.fault }
    }
}

impl PropagateDeadlineLayer {
    /// Returns the handle of the layer, which changes its times. The layer rejects and ends no calls, so all counts of
    /// its snapshot are zero.
    #[must_use]
    pub fn handle(&self) -> DeadlineHandle {
        self.handle.clone()
    }

    /// Returns the layer, or the error of its first invalid setting, as
    /// [`DeadlineLayer::checked`](super::layer::DeadlineLayer::checked) does.
    ///
    /// # Errors
    ///
    /// The [`ConfigError`] names the field, the value and the remedy.
    pub fn checked(mut self) -> Result<Self, ConfigError> {
        self.fault.take().map_or(Ok(self), Err)
    }
}

impl<S> Layer<S> for PropagateDeadlineLayer {
    type Service = PropagateDeadline<S>;

    fn layer(&self, inner: S) -> Self::Service {
        self.handle.times.set_used();
        // No rejection reports an invalid setting, because the layer lets calls through.
        let layer = LayerKind::Deadline.as_str();
        self.fault.report(layer, "", "the setting is ignored");
        PropagateDeadline { inner, times: self.handle.times.clone(), codec: self.codec.clone() }
    }
}

impl fmt::Debug for PropagateDeadlineLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PropagateDeadlineLayer")
            .field("times", &self.handle.times)
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}

/// The service of a [`PropagateDeadlineLayer`]. Its response, error and future types are those of the wrapped service.
#[derive(Clone)]
pub struct PropagateDeadline<S> {
    inner: S,
    times: Arc<DeadlineTimes>,
    codec: Option<Arc<dyn Codec>>,
}

impl<S> PropagateDeadline<S> {
    /// Returns a reference to the wrapped service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Returns a mutable reference to the wrapped service.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// Returns the wrapped service.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl<S> fmt::Debug for PropagateDeadline<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PropagateDeadline").field("times", &self.times).finish_non_exhaustive()
    }
}

impl<S, B> Service<Request<B>> for PropagateDeadline<S>
where
    S: Service<Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        CallClock::invalidate();
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, mut request: Request<B>) -> S::Future {
        let _clock = CallClock::begin();
        self.times.apply(self.codec.as_deref(), &mut request);
        self.inner.call(request)
    }
}
