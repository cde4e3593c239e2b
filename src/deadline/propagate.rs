//! A deadline that is said, and left to others to keep.

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
    layer::report,
    times::{DeadlineHandle, Times},
};
use crate::{ConfigError, call::Moment, error::Fault};

/// Gives every call one absolute deadline and tells the next hop what is left of it, and leaves it to the layers
/// further in to keep it; made by [`DeadlineLayer::propagate_only`](super::DeadlineLayer::propagate_only).
#[must_use = "a layer does nothing until it wraps a service"]
#[derive(Clone)]
pub struct PropagateLayer {
    pub(super) handle: DeadlineHandle,
    pub(super) codec: Option<Arc<dyn Codec>>,
    pub(super) fault: Fault,
}

impl PropagateLayer {
    /// Changes the layer's times. It ends and refuses nothing, so that its snapshot is all zeroes.
    #[must_use]
    pub fn handle(&self) -> DeadlineHandle {
        self.handle.clone()
    }

    /// As [`DeadlineLayer::checked`](super::DeadlineLayer::checked).
    ///
    /// # Errors
    ///
    /// The [`ConfigError`] names the field, the value and the remedy.
    pub fn checked(mut self) -> Result<Self, ConfigError> {
        self.fault.take().map_or(Ok(self), Err)
    }
}

impl<S> Layer<S> for PropagateLayer {
    type Service = Propagated<S>;

    fn layer(&self, inner: S) -> Self::Service {
        report(&self.fault);
        Propagated { inner, times: self.handle.times.clone(), codec: self.codec.clone() }
    }
}

impl fmt::Debug for PropagateLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PropagateLayer")
            .field("times", &self.handle.times)
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}

/// The service of a [`PropagateLayer`]: its answers, errors and futures are those of what it wraps.
#[derive(Clone)]
pub struct Propagated<S> {
    inner: S,
    times: Arc<Times>,
    codec: Option<Arc<dyn Codec>>,
}

impl<S> Propagated<S> {
    /// The wrapped service.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }
}

impl<S> fmt::Debug for Propagated<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Propagated").field("times", &self.times).finish_non_exhaustive()
    }
}

impl<S, B> Service<Request<B>> for Propagated<S>
where
    S: Service<Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        Moment::anew();
        self.inner.poll_ready(cx)
    }

    #[inline]
    fn call(&mut self, mut request: Request<B>) -> S::Future {
        let _moment = Moment::begin();
        self.times.apply(self.codec.as_deref(), &mut request);
        self.inner.call(request)
    }
}
