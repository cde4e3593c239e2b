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
use tokio::time::timeout;
use tower_layer::Layer;
use tower_service::Service;

use super::{
    connections::{ConnectCounts, Connections},
    dial::UntrackedLayer,
    handle::{ConnectHandle, checked},
    io::Io,
    lifetime,
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
/// Clones share the connections and the settings. A setter takes effect on all of them at once, where its
/// documentation does not state otherwise. After an invalid setting, every connect fails as
/// [`Misconfigured`](crate::outcome::RejectedKind::Misconfigured); [`checked`](Self::checked) returns the error.
#[must_use = "a layer does nothing until it wraps a connector"]
#[derive(Clone, Debug)]
pub struct ConnectLayer {
    pub(super) all: Arc<Connections>,
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
        Self { all: Arc::new(Connections::new()), fault: Fault::default() }
    }

    /// Sets the maximum number of connections to one host (scheme, name and port), 1 or more. No limit by default.
    ///
    /// Connections that are being opened are included.
    pub fn max_per_host(mut self, most: usize) -> Self {
        if let Some(most) = self.accept(checked("max_per_host", most)) {
            self.all.set_per_host(most);
        }
        self
    }

    /// Sets the maximum number of connections to all hosts, 1 or more. No limit by default.
    ///
    /// Connections that are being opened are included. At the maximum, an idle connection is closed if a call to
    /// another host waits. Over HTTP/2 set at least the number of hosts: a connection that always serves a call is
    /// never idle and is not closed for another host.
    pub fn max_total(mut self, most: usize) -> Self {
        if let Some(most) = self.accept(checked("max_total", most)) {
            self.all.set_total(most);
        }
        self
    }

    /// Sets the maximum number of callers in the queue and the maximum wait of each: 1024 and 5 s by default.
    ///
    /// A caller waits for a connection or for an HTTP/2 stream, first come, first served. It is rejected as
    /// [`Saturated`](crate::outcome::RejectedKind::Saturated) if the queue is full or its wait is over. A length of 0
    /// rejects callers without a wait. Otherwise `longest_wait` has to be 1 ms or more. The settings apply to callers
    /// that queue later.
    pub fn queue(mut self, length: usize, longest_wait: Duration) -> Self {
        let checked = if length > 0 && longest_wait < Duration::from_millis(1) {
            let remedy = "use 1ms or more, or a length of 0";
            Err(ConfigError::new("queue.longest_wait", longest_wait, remedy))
        } else {
            Ok(longest_wait)
        };
        if let Some(longest_wait) = self.accept(checked) {
            self.all.set_queue(length, longest_wait);
        }
        self
    }

    /// Sets the timeout of a connect, or `None`. 5 s by default.
    ///
    /// It begins when the connect has a permit, and includes everything that the wrapped connector does, such as the
    /// DNS lookup and TLS. A [`TcpConnector`](super::tcp::TcpConnector) divides it among the addresses of a host. Any other
    /// connector has to do this itself.
    ///
    /// It also limits the wait of calls while [another call connects](super#streams-of-http2) to the same host. Without
    /// it these calls wait until that connect ends.
    pub fn connect_timeout(mut self, longest: impl Into<Option<Duration>>) -> Self {
        if let Some(longest) = self.accept(above_zero("connect_timeout", longest.into())) {
            let settings = &self.all.settings;
            settings.connect_timeout.store(lifetime::limit(longest), Ordering::Relaxed);
        }
        self
    }

    /// Sets the maximum age of a connection, or `None`. 5 minutes by default, so that changes of DNS take effect.
    ///
    /// A connection in use is closed after its calls. Over HTTP/2 it takes new calls only while a cap leaves no room
    /// for another connection. Set each cap to one more than the number of connections that you need.
    ///
    /// Applies to connections that are opened later. Only a [`Client`](super::client::Client) enforces it.
    pub fn max_age(mut self, oldest: impl Into<Option<Duration>>) -> Self {
        if let Some(oldest) = self.accept(above_zero("max_age", oldest.into())) {
            self.all.settings.age.store(lifetime::limit(oldest), Ordering::Relaxed);
        }
        self
    }

    /// Sets the maximum idle time of a connection, or `None`. 4 s by default.
    ///
    /// Node.js, uvicorn and Apache close unused connections after 5 s. Set a shorter time than the keep-alive timeout
    /// of the server. Otherwise a request may be sent over a connection that the server is closing.
    ///
    /// Applies to connections that are opened later. Only a [`Client`](super::client::Client) enforces it.
    pub fn max_idle(mut self, longest: impl Into<Option<Duration>>) -> Self {
        if let Some(longest) = self.accept(above_zero("max_idle", longest.into())) {
            self.all.settings.idle.store(lifetime::limit(longest), Ordering::Relaxed);
        }
        self
    }

    /// Sets the maximum share by which the maximum age and idle time of a connection are shortened at random: 0 to 0.9,
    /// 0.2 by default.
    ///
    /// Connections that were opened at the same time are then closed at different times. Applies to connections that
    /// are opened later.
    pub fn jitter(mut self, part: f64) -> Self {
        let checked = match part {
            part if (0.0..=0.9).contains(&part) => Ok((part * 1000.0) as u32),
            part => Err(ConfigError::new("jitter", part, "use 0 to 0.9")),
        };
        if let Some(thousandths) = self.accept(checked) {
            self.all.settings.jitter.store(thousandths, Ordering::Relaxed);
        }
        self
    }

    /// Sets the name of this layer in rejections. Only the first call has an effect.
    pub fn name(self, name: &str) -> Self {
        self.all.name(name);
        self
    }

    /// Returns a handle that reads the state of the connections, changes the caps and renews the connections.
    #[must_use]
    pub fn handle(&self) -> ConnectHandle {
        ConnectHandle(self.all.clone())
    }

    /// Returns the layer for connectors whose connections cannot be wrapped, such as reqwest's. It times and counts
    /// connects.
    ///
    /// The layer cannot divide the connect timeout among the addresses of a host, because it observes one connect and
    /// not its addresses. Set reqwest's `connect_timeout`, which is divided, to this timeout or a shorter one.
    pub fn untracked(self) -> UntrackedLayer {
        UntrackedLayer { connections: self }
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
        setting.map_err(|error| self.fault.get_or_insert(error)).ok()
    }

    /// Returns a rejection if a setting is invalid.
    pub(super) fn sound(&self) -> Result<(), Rejected> {
        match self.fault.label() {
            Some(fault) => Err(Rejected::misconfigured(LayerKind::Connect, fault.clone())),
            None => Ok(()),
        }
    }

    /// Wraps a connector. `lane` is the lane of a [`Client`](super::client::Client), which reports each use of a connection.
    pub(super) fn connector<C>(&self, inner: C, lane: Option<Lane>) -> Connector<C> {
        Connector { inner, layer: self.clone(), lane }
    }
}

pub(super) fn above_zero(
    field: &'static str,
    time: Option<Duration>,
) -> Result<Option<Duration>, ConfigError> {
    time.map(|time| ConfigError::above_zero(field, time)).transpose()
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
            let all = &layer.all;
            let ticket = Connections::admit(all, Origin::of(&uri), lane).await?;
            let io = dial(all, || inner.call(uri)).await?;
            Ok(Io::new(io, all, ticket, lane))
        }))
    }
}

/// Runs the connect of the wrapped connector within the connect timeout, and counts it.
pub(super) async fn dial<F, T, E>(
    all: &Connections,
    connect: impl FnOnce() -> F,
) -> Result<T, BoxError>
where
    F: Future<Output = Result<T, E>>,
    E: Into<BoxError>,
{
    let counts = &all.counts;
    let _connecting = Connecting::begin(counts);
    let longest = all.connect_timeout().unwrap_or(Duration::MAX);
    let (counter, error) = match timeout(longest, connect()).await {
        Ok(Ok(io)) => return Ok(io),
        Ok(Err(error)) => (&counts.failed, error.into()),
        Err(_) => {
            let error = io::Error::new(io::ErrorKind::TimedOut, ConnectTimedOut { longest });
            (&counts.timed_out, error.into())
        }
    };
    counter.fetch_add(1, Ordering::Relaxed);
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
    longest: Duration,
}

impl fmt::Display for ConnectTimedOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not connected within {:?}", self.longest)
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
