use std::{
    fmt,
    future::Future,
    io,
    pin::Pin,
    sync::atomic::Ordering,
    task::{Context, Poll},
    time::Duration,
};

use http::Uri;
use tokio::time::timeout;
use tower_layer::Layer;
use tower_service::Service;

use super::{
    core::{Connections, Counts},
    dial::DialLayer,
    handle::{ConnectHandle, checked},
    io::Io,
    life,
    streams::Lane,
};
use crate::{
    BoxError, ConfigError,
    call::{LayerKind, Origin, Rejected, Shared},
    error::Fault,
};

/// Bounds, times and counts the connections that a connector makes. Clones share them.
#[must_use = "a layer does nothing until it wraps a connector"]
#[derive(Clone, Debug)]
pub struct ConnectLayer {
    pub(super) all: Shared<Connections>,
    fault: Fault,
}

impl Default for ConnectLayer {
    fn default() -> Self {
        Self::new()
    }
}

impl ConnectLayer {
    /// No caps, 5 s to connect; connections live for 5 minutes at most, and 4 s unused, each up to a fifth less.
    pub fn new() -> Self {
        Self { all: Shared::new(Connections::new()), fault: Fault::default() }
    }

    /// At most so many connections to one host (scheme, name and port), 1 or more: open, or being opened.
    pub fn max_per_host(mut self, most: usize) -> Self {
        if let Some(most) = self.accept(checked("max_per_host", most)) {
            self.all.set_per_host(most);
        }
        self
    }

    /// At most so many connections in total, 1 or more. One that is idle goes if another host needs its place. Over
    /// HTTP/2 leave a place for each host: a connection that always serves some call makes room for nobody.
    pub fn max_total(mut self, most: usize) -> Self {
        if let Some(most) = self.accept(checked("max_total", most)) {
            self.all.set_total(most);
        }
        self
    }

    /// Where a cap is reached up to `length` wait for a connection or a stream, first come, first served, each for
    /// `longest_wait` (1 ms or more): 1024 and 5 s by default. Who finds no room, or waits for too long, is
    /// refused as [`Saturated`](crate::call::RejectedKind::Saturated).
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
    /// DNS lookup and TLS. A [`TcpConnector`](super::TcpConnector) divides it among the addresses of a host. Any other
    /// connector has to do this itself.
    pub fn connect_timeout(mut self, longest: impl Into<Option<Duration>>) -> Self {
        if let Some(longest) = self.accept(above_zero("connect_timeout", longest.into())) {
            let settings = &self.all.settings;
            settings.connect_timeout.store(life::limit(longest), Ordering::Relaxed);
        }
        self
    }

    /// How old a connection may become: 5 minutes by default, so that changes of DNS arrive. One in use ends its
    /// calls first; over HTTP/2 it takes new ones only where a cap leaves no room for another connection: leave room
    /// for one more than you need. For connections made later; kept by [`Client`](super::Client)s only.
    pub fn max_age(mut self, oldest: impl Into<Option<Duration>>) -> Self {
        if let Some(oldest) = self.accept(above_zero("max_age", oldest.into())) {
            self.all.settings.age.store(life::limit(oldest), Ordering::Relaxed);
        }
        self
    }

    /// How long a connection may be unused: 4 s by default, just under the 5 s after which Node.js, uvicorn and
    /// Apache close theirs without a word. Keep it under your server's keep-alive, or a request may meet a
    /// connection that is being closed. For connections made later; kept by [`Client`](super::Client)s only.
    pub fn max_idle(mut self, longest: impl Into<Option<Duration>>) -> Self {
        if let Some(longest) = self.accept(above_zero("max_idle", longest.into())) {
            self.all.settings.idle.store(life::limit(longest), Ordering::Relaxed);
        }
        self
    }

    /// Which part of its age and of its idle time a connection may lack, by chance, so that connections made at
    /// once do not end at once: 0.2 by default, 0 to 0.9.
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

    /// A name for refusals. The first one given stays.
    pub fn name(self, name: &str) -> Self {
        self.all.name(name);
        self
    }

    /// Looks at the connections, resizes the caps, and asks connections to go.
    #[must_use]
    pub fn handle(&self) -> ConnectHandle {
        ConnectHandle(self.all.clone())
    }

    /// Returns the layer for connectors whose connections cannot be wrapped, such as reqwest's. It times and counts
    /// connects.
    ///
    /// The layer cannot divide the connect timeout among the addresses of a host, because it observes one connect and
    /// not its addresses. Set reqwest's `connect_timeout`, which is divided, to at most this timeout.
    pub fn dials(self) -> DialLayer {
        DialLayer { connections: self }
    }

    /// The layer, if all its settings can work.
    ///
    /// # Errors
    ///
    /// The first setting that cannot.
    pub fn checked(self) -> Result<Self, ConfigError> {
        match self.fault.error() {
            Some(error) => Err(error.clone()),
            None => Ok(self),
        }
    }

    /// Remembers the first setting that cannot work.
    pub(super) fn accept<T>(&mut self, setting: Result<T, ConfigError>) -> Option<T> {
        setting.map_err(|error| self.fault.get_or_insert(error)).ok()
    }

    /// Refuses, if a setting cannot work.
    pub(super) fn sound(&self) -> Result<(), Rejected> {
        match self.fault.label() {
            Some(fault) => Err(Rejected::misconfigured(LayerKind::Connect, fault.clone())),
            None => Ok(()),
        }
    }

    /// `lane`: that of a client, which reports each use of a connection.
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

/// A connector whose connections are bounded, timed and counted: made by a [`ConnectLayer`].
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
        // The one that is ready goes along: the call may have to wait for its place.
        let other = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, other);
        let (layer, lane) = (self.layer.clone(), self.lane);
        ConnectFuture(Box::pin(async move {
            layer.sound()?;
            let all = &layer.all;
            let ticket = Connections::admit(all, Origin::of(&uri)).await?;
            let io = dial(all, || inner.call(uri)).await?;
            Ok(Io::new(io, all, ticket, lane))
        }))
    }
}

/// Runs a connector's own work, timed and counted.
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

struct Connecting<'a>(&'a Counts);

impl<'a> Connecting<'a> {
    fn begin(counts: &'a Counts) -> Self {
        counts.connecting.fetch_add(1, Ordering::Relaxed);
        Self(counts)
    }
}

impl Drop for Connecting<'_> {
    fn drop(&mut self) {
        self.0.connecting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a timed out connect fails with, in an `io::Error` of kind `TimedOut`.
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

/// The future of a [`Connector`]. Dropped at any point, it gives back its place.
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
