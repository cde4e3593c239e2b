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
    layer::report,
};
use crate::{error::ConfigError, fault::Fault, time::CallClock};

/// Sets one absolute deadline for every call and sends the time left to the next hop. Inner layers enforce the
/// deadline. Made by [`DeadlineLayer::propagate_only`](super::layer::DeadlineLayer::propagate_only).
#[must_use = "a layer does nothing until it wraps a service"]
#[derive(Clone)]
pub struct PropagateDeadlineLayer {
    pub(super) handle: DeadlineHandle,
    pub(super) codec: Option<Arc<dyn Codec>>,
    pub(super) fault: Fault,
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
        report(&self.fault);
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
