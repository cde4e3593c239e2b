use std::{fmt, time::Duration};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use hyper::body::Incoming;
use hyper_util::{rt::TokioTimer, server::conn::auto};
use tower_service::Service;

use super::{
    handle::Lifecycle, listener::Listener, socket::SocketOptions, stages::StageLimits,
    state::Drained, streams::StreamExecutor, tls::Tls,
};
use crate::error::{BoxError, ConfigError};

/// The server of a [`Lifecycle`], with settings. Made by [`Lifecycle::server`].
///
/// Every stage of a connection has a time limit, so that a client that is silent, slow or gone holds neither a
/// connection nor a permit.
///
/// | setting | default | limits |
/// |---|---|---|
/// | [`head_timeout`](Self::head_timeout) | 30 s | the sum of the first byte, the TLS handshake, the HTTP/2 preface and the first request head; the head of each later request |
/// | [`idle_timeout`](Self::idle_timeout) | 11 min | a connection without calls |
/// | [`write_timeout`](Self::write_timeout) | 60 s (on Linux 45 s, by `tcp_user_timeout`) | a connection, or an HTTP/2 stream, whose client does not read |
/// | [`http2_ping`](Self::http2_ping) | every 20 s, acknowledged within 20 s | an HTTP/2 connection whose client has vanished |
/// | [`tcp_user_timeout`](Self::tcp_user_timeout) | 45 s | a TCP connection whose client has vanished |
/// | [`max_concurrent_streams`](Self::max_concurrent_streams) | 200 | the streams of an HTTP/2 connection |
/// | [`configure`](Self::configure) | – | hyper's other settings |
///
/// A call has no time limit here: see [`TimeoutLayer`](crate::timeout::TimeoutLayer) and
/// [`DeadlineLayer`](crate::deadline::DeadlineLayer). The limits do not end a stream whose handler is silent, such as
/// server-sent events, or an upgraded connection whose client reads. The handler of an upgraded connection (a
/// WebSocket) has to limit its reads itself.
///
/// ```no_run
/// # async fn start(app: axum::Router) -> Result<(), Box<dyn std::error::Error>> {
/// use std::time::Duration;
/// use buttress::{Health, Lifecycle};
///
/// let lifecycle = Lifecycle::new(&Health::new())?;
/// let server = lifecycle
///     .server()
///     .head_timeout(Duration::from_secs(10))
///     .idle_timeout(Duration::from_secs(75))
///     .configure(|hyper| {
///         hyper.http1().max_headers(64);
///         hyper.http2().max_header_list_size(8 * 1024);
///     })
///     .checked()?;
/// let listener = tokio::net::TcpListener::bind("0.0.0.0:8080").await?;
/// lifecycle.ready();
/// server.serve(listener, app).await?;
/// # Ok(()) }
/// ```
#[must_use = "a server does nothing until it serves"]
pub struct Server {
    pub(super) lifecycle: Lifecycle,
    pub(super) limits: StageLimits,
    pub(super) socket: SocketOptions,
    pub(super) tls: Tls,
    ping: Option<(Duration, Duration)>,
    max_streams: u32,
    /// The application has set the write timeout.
    has_write_timeout: bool,
    configure: Vec<Configure>,
    fault: Option<ConfigError>,
}

type Builder = auto::Builder<StreamExecutor>;
type Configure = Box<dyn FnOnce(&mut Builder) + Send>;

/// The default idle timeout. It is longer than load balancers keep idle connections (Google's: 10 minutes), so that the
/// load balancer closes them. A close by the server could cross with a request of the load balancer.
const IDLE_TIMEOUT: Duration = Duration::from_secs(11 * 60);
/// Maximum of every duration setting. Longer durations are reduced to it, so that hyper's arithmetic cannot overflow.
const MAX_DURATION: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

impl Lifecycle {
    /// Returns a server of this lifecycle with the default settings, to change them. [`serve`](Self::serve) uses the
    /// defaults.
    pub fn server(&self) -> Server {
        Server {
            lifecycle: self.clone(),
            limits: StageLimits {
                head: Duration::from_secs(30),
                idle: IDLE_TIMEOUT,
                write: Some(Duration::from_secs(60)),
            },
            socket: SocketOptions {
                observes_writes: true,
                user_timeout: Some(Duration::from_secs(45)),
            },
            tls: Tls::default(),
            ping: Some((Duration::from_secs(20), Duration::from_secs(20))),
            max_streams: 200,
            has_write_timeout: false,
            configure: Vec::new(),
            fault: None,
        }
    }
}

impl Server {
    /// Sets the time limit of a request head: 30 s by default.
    ///
    /// For the first head the time starts at the accept, and includes the TLS handshake, the first byte and the preface
    /// of HTTP/2 with its SETTINGS. For a later head it starts at the first byte. Over HTTP/2 a head ends with its
    /// header block.
    pub fn head_timeout(mut self, timeout: Duration) -> Self {
        self.limits.head = self.above_zero("head_timeout", timeout);
        self
    }

    /// Sets the time after which a connection without calls is closed: 11 minutes by default. An HTTP/2 connection then
    /// receives a GOAWAY. Only the frames of requests (DATA, HEADERS, CONTINUATION) count as use.
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.limits.idle = self.above_zero("idle_timeout", timeout);
        self
    }

    /// Sets the maximum time for which the client reads nothing while a response waits for it: 60 s by default.
    ///
    /// When it is over, the connection is reset, and its calls release their permits. Over HTTP/2 the limit also holds
    /// for each stream: a stream whose client does not open its flow-control window is reset, and the connection
    /// continues. Once the kernel or h2 holds the last byte of a response, its permit has been released.
    ///
    /// On Linux the [`tcp_user_timeout`](Self::tcp_user_timeout), 45 s by default, also ends a connection whose client
    /// does not read. A longer write timeout requires a longer `tcp_user_timeout`.
    ///
    /// Any progress restarts the time. A stream has one more write timeout for each 256 KiB of a large frame of its
    /// body.
    pub fn write_timeout(mut self, timeout: Duration) -> Self {
        self.limits.write = Some(self.above_zero("write_timeout", timeout));
        self.has_write_timeout = true;
        self.socket.observes_writes = true;
        self
    }

    /// Turns the write timeout off: a client can stop reading for as long as its host acknowledges packets.
    ///
    /// The call of such a client holds its permit for this time. The server does not set `TCP_USER_TIMEOUT` then, and
    /// detects vanished clients by keepalive probes and PING.
    pub fn without_write_timeout(mut self) -> Self {
        self.limits.write = None;
        self.socket.observes_writes = false;
        self
    }

    /// Sets the interval of HTTP/2 PING frames on a connection that receives nothing, and the timeout of their
    /// acknowledgement: 20 s each by default. A vanished client is detected within the sum of both.
    pub fn http2_ping(mut self, interval: Duration, timeout: Duration) -> Self {
        let interval = self.above_zero("http2_ping.interval", interval);
        self.ping = Some((interval, self.above_zero("http2_ping.timeout", timeout)));
        self
    }

    /// Sends no HTTP/2 PING frames.
    pub fn without_http2_ping(mut self) -> Self {
        self.ping = None;
        self
    }

    /// Sets the maximum number of concurrent streams of an HTTP/2 connection: 200 by default, 1 or more.
    pub fn max_concurrent_streams(mut self, max: u32) -> Self {
        if max == 0 {
            self.fail(ConfigError::new("max_concurrent_streams", max, "use 1 or more"));
        }
        self.max_streams = max;
        self
    }

    /// Sets the time after which the kernel closes a connection whose data, or whose TCP keepalive probes, are not
    /// acknowledged: 45 s by default, 3 s or more.
    ///
    /// A client that has vanished from a silent connection is detected within 4/3 of this time.
    ///
    /// The probes start after a third of this time. On Linux they are repeated after a sixth of it, and
    /// `TCP_USER_TIMEOUT` (RFC 5482) is set. Other systems have only the probes, at an interval of their own. The
    /// setting has no effect on connections for which [`Listener::tcp`] is `None`.
    pub fn tcp_user_timeout(mut self, timeout: Duration) -> Self {
        if timeout < Duration::from_secs(3) {
            self.fail(ConfigError::new("tcp_user_timeout", timeout, "use 3 s or more"));
        }
        self.socket.user_timeout = Some(timeout.min(MAX_DURATION));
        self
    }

    /// Turns TCP keepalive probes and `TCP_USER_TIMEOUT` off. A client that vanishes while the handler of its HTTP/1
    /// call is silent is then not detected.
    pub fn without_tcp_user_timeout(mut self) -> Self {
        self.socket.user_timeout = None;
        self
    }

    /// Changes settings of hyper-util's builder that have no method here.
    ///
    /// The closure runs once, after the settings of this server have been applied, and can override them. Several
    /// closures run in the order of these calls.
    pub fn configure(
        mut self,
        configure: impl FnOnce(&mut auto::Builder<StreamExecutor>) + Send + 'static,
    ) -> Self {
        self.configure.push(Box::new(configure));
        self
    }

    /// Serves TLS with this configuration. Without ALPN protocols in it, the server offers `h2` and `http/1.1`.
    ///
    /// The handshake takes place in the task of its connection, within the [`head_timeout`](Self::head_timeout).
    #[cfg(feature = "rustls")]
    #[cfg_attr(docsrs, doc(cfg(feature = "rustls")))]
    pub fn tls(mut self, config: std::sync::Arc<tokio_rustls::rustls::ServerConfig>) -> Self {
        self.tls = Tls::new(config);
        self
    }

    fn above_zero(&mut self, field: &'static str, value: Duration) -> Duration {
        if let Err(fault) = ConfigError::above_zero(field, value) {
            self.fail(fault);
        }
        value.min(MAX_DURATION)
    }

    fn fail(&mut self, fault: ConfigError) {
        self.fault.get_or_insert(fault);
    }

    /// Returns the server if its settings are valid.
    ///
    /// # Errors
    ///
    /// Returns the first invalid setting.
    pub fn checked(mut self) -> Result<Self, ConfigError> {
        if let (true, Some(write), Some(user)) =
            (self.has_write_timeout, self.limits.write, self.socket.user_timeout)
        {
            if cfg!(any(target_os = "linux", target_os = "android")) && write > user {
                let remedy = format!(
                    "the tcp_user_timeout ({user:?}) ends the connection first: set it to {write:?} or more"
                );
                self.fail(ConfigError::new("write_timeout", write, remedy));
            }
        }
        match self.fault.take() {
            Some(fault) => Err(fault),
            None => Ok(self),
        }
    }

    /// Serves as [`Lifecycle::serve`] does, with the settings of this server.
    ///
    /// # Errors
    ///
    /// Returns the first invalid setting, before the first connection is accepted.
    pub async fn serve<L, S, B>(self, listener: L, service: S) -> Result<Drained, ConfigError>
    where
        L: Listener,
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<BoxError> + Send + 'static,
        B: Body<Data: From<Bytes> + Send, Error: Into<BoxError>> + Send + 'static,
    {
        self.serve_each(listener, move |_| service.clone()).await
    }

    /// Serves as [`Lifecycle::serve_each`] does, with the settings of this server.
    ///
    /// # Errors
    ///
    /// Returns the first invalid setting, before the first connection is accepted.
    pub async fn serve_each<L, F, S, B>(self, listener: L, make: F) -> Result<Drained, ConfigError>
    where
        L: Listener,
        F: FnMut(L::Addr) -> S,
        S: Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<BoxError> + Send + 'static,
        B: Body<Data: From<Bytes> + Send, Error: Into<BoxError>> + Send + 'static,
    {
        Ok(self.checked()?.run(listener, make).await)
    }

    /// Returns hyper-util's builder with all settings applied.
    pub(super) fn builder(&mut self) -> Builder {
        let mut builder = auto::Builder::new(StreamExecutor::new(self.limits.write));
        // The IO object limits the time of a head. hyper's header timer would also end idle connections.
        builder.http1().timer(TokioTimer::new()).header_read_timeout(None);
        let mut http2 = builder.http2();
        // WebSockets over HTTP/2 (RFC 8441), as under `axum::serve`.
        http2.timer(TokioTimer::new()).enable_connect_protocol();
        http2.max_concurrent_streams(self.max_streams);
        if let Some((interval, timeout)) = self.ping {
            http2.keep_alive_interval(interval).keep_alive_timeout(timeout);
        }
        for configure in self.configure.drain(..) {
            configure(&mut builder);
        }
        builder
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("head_timeout", &self.limits.head)
            .field("idle_timeout", &self.limits.idle)
            .field("write_timeout", &self.limits.write)
            .field("http2_ping", &self.ping)
            .field("max_concurrent_streams", &self.max_streams)
            .field("tcp_user_timeout", &self.socket.user_timeout)
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}
