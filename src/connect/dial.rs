//! The part of the layer for connectors whose connections cannot be wrapped.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::atomic::Ordering,
    task::{Context, Poll},
};

use tower_layer::Layer;
use tower_service::Service;

use super::layer::{ConnectLayer, dial};
use crate::error::BoxError;

/// Limits the time of connects and counts them: for reqwest's `connector_layer`, whose connections cannot be wrapped.
///
/// It applies the connect timeout of a [`ConnectLayer`] and maintains `connecting`, `created`, `failed` and `timed_out`
/// of the snapshot. It does not bound connections, because reqwest does not reveal their end. Bound the calls with a
/// `ConcurrencyLimitLayer`, and idle connections with reqwest's `pool_idle_timeout` and `pool_max_idle_per_host`.
///
/// The connect timeout is not divided among the addresses of a host. If the first address does not respond, the timeout
/// ends the connect before the second one is tried. To reach the second one, set reqwest's
/// `ClientBuilder::connect_timeout`, which is divided, to this timeout or a shorter one.
#[must_use = "a layer does nothing until it wraps a connector"]
#[derive(Clone, Debug)]
pub struct UntrackedLayer {
    connections: ConnectLayer,
}

impl ConnectLayer {
    /// Returns the layer for connectors whose connections cannot be wrapped, such as reqwest's. It times and counts
    /// connects.
    ///
    /// The layer cannot divide the connect timeout among the addresses of a host, because it observes one connect and
    /// not its addresses. Set reqwest's `connect_timeout`, which is divided, to this timeout or a shorter one.
    pub fn untracked(self) -> UntrackedLayer {
        UntrackedLayer { connections: self }
    }
}

impl<S> Layer<S> for UntrackedLayer {
    type Service = Untracked<S>;

    fn layer(&self, inner: S) -> Untracked<S> {
        self.connections.shared.set_in_use();
        Untracked { inner, connections: self.connections.clone() }
    }
}

/// The service of an [`UntrackedLayer`].
#[derive(Clone)]
pub struct Untracked<S> {
    inner: S,
    connections: ConnectLayer,
}

impl<S> Untracked<S> {
    /// Returns the wrapped connector.
    #[must_use]
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Returns the wrapped connector.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.inner
    }

    /// Returns the wrapped connector.
    #[must_use]
    pub fn into_inner(self) -> S {
        self.inner
    }
}

/// Omits the wrapped connector: the `Debug` output of a connector for a proxy may contain credentials.
impl<S> fmt::Debug for Untracked<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Untracked").field("connections", &self.connections).finish_non_exhaustive()
    }
}

impl<S, Req> Service<Req> for Untracked<S>
where
    S: Service<Req>,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = UntrackedFuture<S::Response>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Req) -> Self::Future {
        let connect = self.inner.call(request);
        let layer = self.connections.clone();
        UntrackedFuture(Box::pin(async move {
            layer.sound()?;
            let connected = dial(&layer.shared, || connect).await?;
            layer.shared.counts.created.fetch_add(1, Ordering::Relaxed);
            Ok(connected)
        }))
    }
}

/// The future of an [`Untracked`].
#[must_use = "futures do nothing unless polled"]
pub struct UntrackedFuture<T>(Pin<Box<dyn Future<Output = Result<T, BoxError>> + Send>>);

impl<T> Future for UntrackedFuture<T> {
    type Output = Result<T, BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}

impl<T> fmt::Debug for UntrackedFuture<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UntrackedFuture").finish_non_exhaustive()
    }
}
