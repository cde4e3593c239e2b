use std::{
    fmt,
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    sync::atomic::Ordering,
    task::{Context, Poll},
    time::Duration,
};

use http::Uri;
use tokio::time::{Instant, timeout};
use tower_layer::Layer;
use tower_service::Service;

use super::{
    handle::ConnectHandle,
    io::Io,
    state::{ConnectCounts, ConnectState},
    streams::Lane,
};
use crate::{
    error::{BoxError, ConfigError},
    fault::Fault,
    origin::Origin,
    outcome::{LayerKind, Rejected},
};

/// Bounds the connections that a connector opens, limits their times and counts them.
///
/// Clones share the connections and the settings. Before the layer has wrapped a connector, a setter takes effect on
/// all clones. A setter after that returns a layer with connections and settings of its own; use the
/// [handle](Self::handle) to change a running layer. After an invalid setting, every connect fails as
/// [`Misconfigured`](crate::outcome::RejectedKind::Misconfigured); [`checked`](Self::checked) returns the error.
#[must_use = "a layer does nothing until it wraps a connector"]
#[derive(Clone, Debug)]
pub struct ConnectLayer {
    pub(super) shared: Arc<ConnectState>,
    fault: Fault,
}

impl Default for ConnectLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl ConnectLayer {
    /// Creates a layer with the [default settings](super#defaults): no caps, a connect timeout of 5 s, a maximum age of
    /// 5 minutes and a maximum idle time of 4 s, each of these two up to 20 % shorter by jitter.
    pub fn new() -> Self {
        Self { shared: Arc::new(ConnectState::new()), fault: Fault::default() }
    }

    /// Sets the maximum number of connections to one host (scheme, name and port), 1 or more. No limit by default.
    ///
    /// Connections that are being opened are included.
    ///
    /// [`ConnectHandle::set_max_per_host`] changes it while the layer is in use.
    pub fn max_per_host(self, max: usize) -> Self {
        self.with(|handle| handle.set_max_per_host(max))
    }

    /// Sets the maximum number of connections to all hosts, 1 or more. No limit by default.
    ///
    /// Connections that are being opened are included. At the maximum, an idle connection is closed if a call to
    /// another host waits. Over HTTP/2 set the number of hosts or more: a connection that always serves a call is
    /// never idle and is not closed for another host.
    ///
    /// [`ConnectHandle::set_max_total`] changes it while the layer is in use.
    pub fn max_total(self, max: usize) -> Self {
        self.with(|handle| handle.set_max_total(max))
    }

    /// Sets the maximum number of callers in the queue and the maximum wait of each: 1024 and 5 s by default.
    ///
    /// A caller waits for a connection or for an HTTP/2 stream, first come, first served. It is rejected as
    /// [`Saturated`](crate::outcome::RejectedKind::Saturated) if the queue is full or its wait is over. A length of 0
    /// rejects callers without a wait. Otherwise `max_wait` has to be 1 ms or more.
    ///
    /// [`ConnectHandle::set_queue`] changes it while the layer is in use.
    pub fn queue(self, length: usize, max_wait: Duration) -> Self {
        self.with(|handle| handle.set_queue(length, max_wait))
    }

    /// Sets the timeout of a connect, or `None`. 5 s by default.
    ///
    /// It begins when the connect has a permit, and includes everything that the wrapped connector does, such as the
    /// DNS lookup and TLS. A [`TcpConnector`](super::tcp::TcpConnector) divides it among the addresses of a host. Any
    /// other connector has to do this itself.
    ///
    /// It also limits the wait of calls while [another call connects](super#streams-of-http2) to the same host. Without
    /// it these calls wait until that connect ends.
    ///
    /// [`ConnectHandle::set_connect_timeout`] changes it while the layer is in use.
    pub fn connect_timeout(self, timeout: impl Into<Option<Duration>>) -> Self {
        self.with(|handle| handle.set_connect_timeout(timeout))
    }

    /// Sets the maximum age of a connection, or `None`. 5 minutes by default, so that changes of DNS take effect.
    ///
    /// A connection in use is closed after its calls. Over HTTP/2 it takes new calls only while a cap permits no
    /// other connection. Set each cap to one more than the number of connections that you need.
    ///
    /// Only a [`Client`](super::client::Client) enforces it. [`ConnectHandle::set_max_age`] changes it while the layer
    /// is in use.
    pub fn max_age(self, max: impl Into<Option<Duration>>) -> Self {
        self.with(|handle| handle.set_max_age(max))
    }

    /// Sets the maximum idle time of a connection, or `None`. 4 s by default.
    ///
    /// Node.js, uvicorn and Apache close unused connections after 5 s. Set a shorter time than the keep-alive timeout
    /// of the server. Otherwise a request may be sent over a connection that the server is closing.
    ///
    /// Only a [`Client`](super::client::Client) enforces it. [`ConnectHandle::set_max_idle`] changes it while the layer
    /// is in use.
    pub fn max_idle(self, max: impl Into<Option<Duration>>) -> Self {
        self.with(|handle| handle.set_max_idle(max))
    }

    /// Sets the maximum share by which the maximum age and idle time of a connection are shortened at random: 0 to 0.9,
    /// 0.2 by default.
    ///
    /// Connections that were opened at the same time are then closed at different times.
    ///
    /// [`ConnectHandle::set_jitter`] changes it while the layer is in use.
    pub fn jitter(self, share: f64) -> Self {
        self.with(|handle| handle.set_jitter(share))
    }

    /// Sets the name of this layer in rejections. Only the first call has an effect.
    pub fn name(self, name: &str) -> Self {
        if self.shared.has_name() {
            return self;
        }
        self.with(|handle| {
            handle.0.set_name(name);
            Ok(())
        })
    }

    /// Changes a setting: of the shared state before its first use, and later of a copy that only this layer has.
    fn with(mut self, set: impl FnOnce(&ConnectHandle) -> Result<(), ConfigError>) -> Self {
        if self.shared.is_in_use() {
            self.shared = Arc::new(self.shared.fork());
        }
        let set = set(&self.handle());
        self.accept(set);
        self
    }

    /// Returns a handle that reads the state of the connections, changes the settings and recycles the connections.
    #[must_use]
    pub fn handle(&self) -> ConnectHandle {
        ConnectHandle(self.shared.clone())
    }

    /// Returns the layer if all its settings are valid.
    ///
    /// # Errors
    ///
    /// Fails for the first invalid setting. The [`ConfigError`] names the field, the value and the remedy.
    pub fn checked(self) -> Result<Self, ConfigError> {
        match self.fault.error() {
            Some(error) => Err(error.clone()),
            None => Ok(self),
        }
    }

    /// Returns the value of a valid setting. Records the error of the first invalid one.
    pub(super) fn accept<T>(&mut self, setting: Result<T, ConfigError>) -> Option<T> {
        self.fault.accept(setting)
    }

    /// Returns a rejection if a setting is invalid.
    pub(super) fn sound(&self) -> Result<(), Rejected> {
        match self.fault.label() {
            Some(fault) => {
                self.shared.counts.misconfigured.fetch_add(1, Ordering::Relaxed);
                let name = self.shared.name();
                Err(Rejected::misconfigured(LayerKind::Connect, name, fault.clone()))
            }
            None => Ok(()),
        }
    }

    /// Wraps a connector. `lane` is the lane of a [`Client`](super::client::Client), which reports each use of a
    /// connection.
    pub(super) fn connector<C>(&self, inner: C, lane: Option<Lane>) -> Connector<C> {
        self.shared.set_in_use();
        Connector { inner, layer: self.clone(), lane }
    }
}

impl<C> Layer<C> for ConnectLayer {
    type Service = Connector<C>;

    fn layer(&self, inner: C) -> Connector<C> {
        self.connector(inner, None)
    }
}

/// The service of a [`ConnectLayer`]: a connector whose connections are bounded and counted.
///
/// # Errors
///
/// The error of the wrapped connector. An [`io::Error`] of the kind `TimedOut` after the connect timeout. A
/// [`Rejected`] if no connection became free or a setting is invalid.
#[derive(Clone)]
pub struct Connector<C> {
    inner: C,
    layer: ConnectLayer,
    lane: Option<Lane>,
}

impl<C> Connector<C> {
    /// Returns the wrapped connector.
    #[must_use]
    pub fn get_ref(&self) -> &C {
        &self.inner
    }

    /// Returns the wrapped connector.
    pub fn get_mut(&mut self) -> &mut C {
        &mut self.inner
    }

    /// Returns the wrapped connector.
    #[must_use]
    pub fn into_inner(self) -> C {
        self.inner
    }

    /// Returns the connector of another lane.
    pub(super) fn in_lane(self, lane: Lane) -> Self {
        Self { lane: Some(lane), ..self }
    }
}

/// Omits the wrapped connector: the `Debug` output of a connector for a proxy may contain credentials.
impl<C> fmt::Debug for Connector<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector").field("layer", &self.layer).finish_non_exhaustive()
    }
}

impl<C> Service<Uri> for Connector<C>
where
    C: Service<Uri> + Clone + Send + 'static,
    C::Response: Send,
    C::Error: Into<BoxError>,
    C::Future: Send,
{
    type Response = Io<C::Response>;
    type Error = BoxError;
    type Future = ConnectFuture<C::Response>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        // The future owns the instance that was polled ready, because the connect may wait for a permit before its
        // call.
        let other = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, other);
        let (layer, lane) = (self.layer.clone(), self.lane);
        ConnectFuture(Box::pin(async move {
            layer.sound()?;
            let shared = &layer.shared;
            let permits = ConnectState::admit(shared, Origin::of(&uri), lane).await?;
            let io = dial(shared, || inner.call(uri)).await?;
            Ok(Io::new(io, shared, permits, lane))
        }))
    }
}

/// The reasons for which a connect fails.
pub(super) const CONNECT_ERROR: &str = "error";
pub(super) const CONNECT_TIMEOUT: &str = "timeout";

/// Runs the connect of the wrapped connector within the connect timeout, and counts it.
pub(super) async fn dial<F, T, E>(
    shared: &ConnectState,
    connect: impl FnOnce() -> F,
) -> Result<T, BoxError>
where
    F: Future<Output = Result<T, E>>,
    E: Into<BoxError>,
{
    let counts = &shared.counts;
    let _connecting = Connecting::begin(counts);
    let max = shared.connect_timeout().unwrap_or(Duration::MAX);
    let began = Instant::now();
    let (counter, reason, error) = match timeout(max, connect()).await {
        Ok(Ok(io)) => {
            shared.notify_of_opened(began.elapsed());
            return Ok(io);
        }
        Ok(Err(error)) => (&counts.failed, CONNECT_ERROR, error.into()),
        Err(_) => {
            let error = io::Error::new(io::ErrorKind::TimedOut, ConnectTimedOut { timeout: max });
            (&counts.timed_out, CONNECT_TIMEOUT, error.into())
        }
    };
    counter.fetch_add(1, Ordering::Relaxed);
    shared.notify_of_failed(reason, began.elapsed());
    Err(error)
}

struct Connecting<'a>(&'a ConnectCounts);

impl<'a> Connecting<'a> {
    fn begin(counts: &'a ConnectCounts) -> Self {
        counts.connecting.fetch_add(1, Ordering::Relaxed);
        Self(counts)
    }
}

impl Drop for Connecting<'_> {
    fn drop(&mut self) {
        self.0.connecting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The inner error of the `io::Error` of kind `TimedOut` with which a connect fails after the connect timeout.
#[derive(Debug)]
struct ConnectTimedOut {
    timeout: Duration,
}

impl fmt::Display for ConnectTimedOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not connected within {:?}", self.timeout)
    }
}

impl std::error::Error for ConnectTimedOut {}

/// The future of a [`Connector`]. Dropping it releases its permits or its position in the queue.
#[must_use = "futures do nothing unless polled"]
pub struct ConnectFuture<T>(Pin<Box<dyn Future<Output = Result<Io<T>, BoxError>> + Send>>);

impl<T> Future for ConnectFuture<T> {
    type Output = Result<Io<T>, BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}

impl<T> fmt::Debug for ConnectFuture<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectFuture").finish_non_exhaustive()
    }
}
