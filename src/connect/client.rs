//! A client: hyper-util's `legacy` client over the connections of a layer.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use http::{Method, Request, Response, StatusCode, Uri, uri::Scheme};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{
        self,
        connect::{CaptureConnection, Connect, HttpConnector, capture_connection},
    },
    rt::TokioTimer,
};
use pin_project_lite::pin_project;
use tower_service::Service;

use super::{
    checkout::{Checkout, CheckoutRequest},
    conn::{Conn, ConnTag},
    executor::Executor,
    handle::ConnectHandle,
    hosts::{HostRef, HttpVersion},
    layer::{ConnectLayer, Connector},
    lifetime::NEVER,
    resolve::Resolver,
    state::ConnectState,
    streams::{Lane, MAX_LANES},
    tcp::TcpConnector,
};
use crate::sync::Mutex;
use crate::{
    error::{BoxError, ConfigError},
    origin::Origin,
    outcome::{ConnectionError, Eos, Outcome, Rejected, RetiredConnection, WaitsFor},
    permit::TrackedBody,
};

/// hyper-util's client over the bounded connections of a [`ConnectLayer`].
///
/// It is a `Service<Request<B>>` for the bottom of a stack. Clones share the connections. A connection is in use to the
/// end of the response body. It is closed for its age or idle time only when it serves no call.
///
/// # Errors
///
/// hyper-util's [`legacy::Error`], boxed. If the request was sent over a connection, it is the source of an error that
/// records whether this connection had delivered a response before:
/// [`Outcome::of_error`](crate::outcome::Outcome::of_error) then distinguishes a stale connection from a reset of a new
/// one. A [`Rejected`], directly or among the sources, if no connection became free.
///
/// # Cancellation
///
/// A call that is dropped while it waits or connects releases its permits. A call that is dropped later closes its
/// connection (HTTP/1) or resets its stream (HTTP/2).
pub struct Client<C, B> {
    lanes: Arc<Lanes<C, B>>,
    connections: ConnectHandle,
    /// The client uses HTTP/2 only, so that calls share connections.
    is_http2: bool,
}

type LaneClient<C, B> = Box<legacy::Client<Connector<C>, SpareBody<B>>>;

/// The clients of hyper-util, each with one HTTP/2 connection per host. The first one has all HTTP/1 connections.
struct Lanes<C, B> {
    client_id: u64,
    hyper: legacy::Builder,
    connector: Connector<C>,
    clients: [OnceLock<LaneClient<C, B>>; MAX_LANES],
}

impl<C, B> Lanes<C, B>
where
    Connector<C>: Connect + Clone,
    B: Body + Send + Unpin,
    B::Data: Send,
{
    fn get(&self, index: usize) -> &legacy::Client<Connector<C>, SpareBody<B>> {
        // Indexes are below `MAX_LANES`.
        let index = index % MAX_LANES;
        self.clients[index].get_or_init(|| {
            let lane = Lane { client_id: self.client_id, index };
            Box::new(self.hyper.build(self.connector.clone().in_lane(lane)))
        })
    }
}

impl Client<(), ()> {
    /// Returns a builder of a client that uses the connections of this layer.
    pub fn builder(connections: ConnectLayer) -> ClientBuilder {
        let mut hyper = legacy::Client::builder(Executor);
        hyper.timer(TokioTimer::new()).pool_timer(TokioTimer::new());
        let tcp = TcpKeepalive {
            after: Duration::from_secs(15),
            every: Duration::from_secs(15),
            times: 3,
        };
        ClientBuilder { connections, hyper, tcp: Some(tcp), is_http2: false }
    }
}

impl<C, B> Client<C, B> {
    /// Returns the handle of the connections.
    #[must_use]
    pub fn connections(&self) -> ConnectHandle {
        self.connections.clone()
    }
}

impl<C, B> Client<C, B>
where
    Connector<C>: Connect + Clone + Send + Sync + 'static,
    B: Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    /// Sends a request. Unlike `call`, it takes `&self`.
    pub fn request(&self, request: Request<B>) -> ClientResponseFuture {
        let shared = &self.connections.0;
        // TLS may negotiate HTTP/2.
        let is_https = request.uri().scheme() == Some(&Scheme::HTTPS);
        let version = if self.is_http2 {
            HttpVersion::Http2
        } else if is_https {
            HttpVersion::Unknown
        } else {
            HttpVersion::Http1
        };
        let caller = CheckoutRequest { client_id: self.lanes.client_id, version, may_add: true };
        let now = || Checkout::try_acquire(shared, Origin::of(request.uri()), caller);
        let may_share = version != HttpVersion::Http1;
        let checkout = (may_share || shared.has_cap()).then(now).transpose();
        let state = match checkout {
            Ok(checkout) => self.send(request, checkout, caller),
            Err(host_ref) => {
                ClientCallState::Waiting { sent: self.wait(request, host_ref, caller) }
            }
        };
        ClientResponseFuture { state, shared: shared.clone() }
    }

    fn wait(
        &self,
        request: Request<B>,
        host_ref: HostRef,
        caller: CheckoutRequest,
    ) -> CheckoutFuture {
        let client = self.clone();
        Box::pin(async move {
            let checkout = Checkout::acquire(host_ref, caller).await?;
            Ok(client.send(request, Some(checkout), caller))
        })
    }

    fn send(
        &self,
        request: Request<B>,
        checkout: Option<Checkout>,
        caller: CheckoutRequest,
    ) -> ClientCallState {
        let is_tunnel = request.method() == Method::CONNECT;
        let is_additional = checkout.as_ref().is_some_and(Checkout::is_additional);
        let (mut request, fallback) = if is_additional {
            let (request, fallback) = self.with_fallback(request, caller);
            (request, Some(fallback))
        } else {
            (request.map(SpareBody::new), None)
        };
        let connection = Some(capture_connection(&mut request));
        let lane = checkout.as_ref().and_then(Checkout::lane).map_or(0, |lane| lane.index);
        let response = self.lanes.get(lane).request(request);
        ClientCallState::Sent { response, connection, is_tunnel, checkout, fallback }
    }

    /// Saves a copy of the request that shares its body. If the additional connection fails, the call waits for a
    /// stream of another connection, because hyper-util's error does not return the request.
    fn with_fallback(
        &self,
        request: Request<B>,
        caller: CheckoutRequest,
    ) -> (Request<SpareBody<B>>, Fallback) {
        let (parts, body) = request.into_parts();
        let spare = Arc::new(Mutex::new(None));
        let body = SpareBody { body: Some(body), spare: Some(spare.clone()) };
        let (client, saved) = (self.clone(), parts.clone());
        let fallback = Box::new(move || {
            let body = spare.lock().take()?;
            let origin = Origin::of(&saved.uri);
            let host_ref = HostRef::register(&client.connections.0, origin, caller.client_id);
            let request = Request::from_parts(saved, body);
            Some(client.wait(request, host_ref, CheckoutRequest { may_add: false, ..caller }))
        });
        (Request::from_parts(parts, body), fallback)
    }
}

impl<C, B> Service<Request<B>> for Client<C, B>
where
    Connector<C>: Connect + Clone + Send + Sync + 'static,
    B: Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    type Response = Response<TrackedBody<Incoming>>;
    type Error = BoxError;
    type Future = ClientResponseFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> ClientResponseFuture {
        self.request(request)
    }
}

impl<C, B> Clone for Client<C, B> {
    fn clone(&self) -> Self {
        let (lanes, connections) = (self.lanes.clone(), self.connections.clone());
        Self { lanes, connections, is_http2: self.is_http2 }
    }
}

impl<C, B> fmt::Debug for Client<C, B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("connections", &self.connections).finish_non_exhaustive()
    }
}

// ===== The call =====

pin_project! {
    /// The future of a [`Client`]'s call.
    #[must_use = "futures do nothing unless polled"]
    pub struct ClientResponseFuture {
        #[pin]
        state: ClientCallState,
        shared: Arc<ConnectState>,
    }
}

/// Waits for the permission to ask for a connection, and then sends the request.
type CheckoutFuture = Pin<Box<dyn Future<Output = Result<ClientCallState, Rejected>> + Send>>;

/// Sends the request again after a failed connect, unless its body has been used.
type Fallback = Box<dyn FnOnce() -> Option<CheckoutFuture> + Send>;

pin_project! {
    #[project = ClientCallProj]
    enum ClientCallState {
        Waiting { sent: CheckoutFuture },
        Sent {
            #[pin]
            response: legacy::ResponseFuture,
            // Contains a clone of the `ConnTag` of the connection, which is in use from before the first byte is
            // written.
            connection: Option<CaptureConnection>,
            is_tunnel: bool,
            checkout: Option<Checkout>,
            fallback: Option<Fallback>,
        },
    }
}

impl Future for ClientResponseFuture {
    type Output = Result<Response<TrackedBody<Incoming>>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let (mut state, shared) = (this.state, &**this.shared);
        loop {
            if let ClientCallProj::Waiting { sent } = state.as_mut().project() {
                let Poll::Ready(sent) = sent.as_mut().poll(cx) else {
                    WaitsFor::Client.report();
                    return Poll::Pending;
                };
                state.set(sent?);
            }
            let ClientCallProj::Sent { response, connection, is_tunnel, checkout, fallback } =
                state.as_mut().project()
            else {
                unreachable!("the state is `Sent` after the wait")
            };
            let polled = response.poll(cx);
            if let Some(connection) = connection.as_ref().filter(|_| shared.any_closing()) {
                // Retire the connection as soon as it is known: it may return to the pool before the response head is
                // polled.
                retire(connection);
            }
            if let Some(checkout) = checkout {
                checkout.update(connection.as_ref());
            }
            let error = match ready!(polled) {
                Ok(response) => {
                    let response =
                        tracked(response, connection.take(), *is_tunnel, checkout.take());
                    return Poll::Ready(Ok(response));
                }
                Err(error) => error,
            };
            let is_unsent = error.is_connect() && Rejected::find(&error).is_none();
            match fallback.take().filter(|_| is_unsent).and_then(|fallback| fallback()) {
                // Drops the right to open a connection, so that another call may open one.
                Some(sent) => state.set(ClientCallState::Waiting { sent }),
                None => return Poll::Ready(Err(with_connection(error))),
            }
        }
    }
}

/// Returns the response with a body that ends the use of its connection.
fn tracked(
    mut response: Response<Incoming>,
    connection: Option<CaptureConnection>,
    is_tunnel: bool,
    checkout: Option<Checkout>,
) -> Response<TrackedBody<Incoming>> {
    let Some(tag) = response.extensions_mut().remove::<ConnTag>() else {
        return response.map(TrackedBody::untracked);
    };
    let status = response.status();
    if status == StatusCode::SWITCHING_PROTOCOLS || (is_tunnel && status.is_success()) {
        tag.conn.hand_over();
    }
    let held = checkout.map_or(0, |checkout| checkout.transfer_to(&tag.conn));
    let permit = tag.serve(held);
    if status == StatusCode::MISDIRECTED_REQUEST
        && connection.is_some_and(|own| retire_misdirected(&own))
    {
        response.extensions_mut().insert(RetiredConnection);
    }
    let good = Eos::Plain(Outcome::success());
    response.map(|body| TrackedBody::new(body, permit.erase(), good))
}

/// Records in the error whether the connection of the request was reused, if the request was sent over one.
fn with_connection(error: legacy::Error) -> BoxError {
    match error.connect_info().and_then(ConnTag::of_connected) {
        Some(tag) => ConnectionError::new(tag.conn.has_served(), error).into(),
        None => error.into(),
    }
}

/// Retires a connection whose time is over, unless calls still need it.
fn retire(connection: &CaptureConnection) {
    if let Some(tag) = ConnTag::of(connection).filter(|tag| tag.conn.must_retire()) {
        retire_conn(connection, &tag.conn);
    }
}

/// Lets a connection serve no call after this one, and closes it after its calls. Returns `false` if the
/// connection of the call is unknown.
fn retire_misdirected(connection: &CaptureConnection) -> bool {
    ConnTag::of(connection)
        .inspect(|tag| {
            retire_conn(connection, &tag.conn);
            tag.conn.request_close();
        })
        .is_some()
}

/// Lets a connection serve no call after this one.
fn retire_conn(connection: &CaptureConnection, conn: &Conn) {
    connection.connection_metadata().as_ref().inspect(|connected| connected.poison());
    conn.retire();
}

impl fmt::Debug for ClientResponseFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientResponseFuture").finish_non_exhaustive()
    }
}

// ===== The request body =====

/// A request body that returns to `spare` if it is dropped before it was polled.
struct SpareBody<B> {
    body: Option<B>,
    spare: Option<Arc<Mutex<Option<B>>>>,
}

impl<B> SpareBody<B> {
    fn new(body: B) -> Self {
        Self { body: Some(body), spare: None }
    }
}

impl<B> Drop for SpareBody<B> {
    fn drop(&mut self) {
        if let Some(spare) = self.spare.take() {
            // `spare` is empty, so no body is dropped under the lock.
            *spare.lock() = self.body.take();
        }
    }
}

impl<B: Body + Unpin> Body for SpareBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        self.spare = None;
        match &mut self.body {
            Some(body) => Pin::new(body).poll_frame(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

// ===== The builder =====

const HOUR: Duration = Duration::from_secs(3600);

/// Builds a [`Client`].
#[must_use = "a builder does nothing until it builds"]
#[derive(Clone, Debug)]
pub struct ClientBuilder {
    connections: ConnectLayer,
    hyper: legacy::Builder,
    tcp: Option<TcpKeepalive>,
    is_http2: bool,
}

#[derive(Clone, Copy, Debug)]
struct TcpKeepalive {
    after: Duration,
    every: Duration,
    times: u32,
}

impl ClientBuilder {
    /// Sets TCP keepalive: 15 s, 15 s and 3 by default.
    ///
    /// If a peer has been silent for `after`, the system sends a probe, and repeats it with the interval `every`. After
    /// `times` probes without a response it closes the connection. The durations are in whole seconds, 1 s or more,
    /// and `times` is 1 or more.
    ///
    /// Applies to the connectors of [`build_http`](Self::build_http), `build_https` and
    /// [`tcp_connector`](Self::tcp_connector).
    pub fn tcp_keepalive(mut self, after: Duration, every: Duration, times: u32) -> Self {
        let whole = |field, time: Duration| match time.as_secs() {
            0 => Err(ConfigError::new(field, time, "use 1s or more")),
            _ => Ok(time),
        };
        let times = match times {
            0 => Err(ConfigError::new("tcp_keepalive.times", times, "use 1 or more")),
            times => Ok(times),
        };
        let tcp = whole("tcp_keepalive.after", after)
            .and_then(|_| whole("tcp_keepalive.every", every))
            .and(times);
        if let Some(times) = self.connections.accept(tcp) {
            self.tcp = Some(TcpKeepalive { after, every, times });
        }
        self
    }

    /// Turns TCP keepalive off.
    pub fn no_tcp_keepalive(mut self) -> Self {
        self.tcp = None;
        self
    }

    /// Sets the interval of pings over HTTP/2 connections and the timeout of their acknowledgement. Off by default.
    ///
    /// A ping is also sent over idle connections. A connection without an acknowledgement within `timeout` is closed.
    /// gRPC servers close the connections of clients that ping more often than they allow: by default once in 5
    /// minutes.
    pub fn http2_keepalive(mut self, every: Duration, timeout: Duration) -> Self {
        let checked = ConfigError::above_zero("http2_keepalive.every", every)
            .and_then(|_| ConfigError::above_zero("http2_keepalive.timeout", timeout));
        if self.connections.accept(checked).is_some() {
            self.hyper
                .http2_keep_alive_interval(every)
                .http2_keep_alive_timeout(timeout)
                .http2_keep_alive_while_idle(true);
        }
        self
    }

    /// Uses HTTP/2 from the first byte on every connection, also without TLS. By default TLS negotiates the protocol,
    /// and connections without TLS use HTTP/1.
    pub fn http2_only(mut self) -> Self {
        self.hyper.http2_only(true);
        self.is_http2 = true;
        self
    }

    /// Calls `set` with hyper-util's builder, for its other settings. Its `pool_idle_timeout` is replaced by a value
    /// that follows from [`max_idle`](ConnectLayer::max_idle).
    pub fn hyper(mut self, set: impl FnOnce(&mut legacy::Builder)) -> Self {
        set(&mut self.hyper);
        self
    }

    /// Builds a client for `http` URIs, with a [`TcpConnector`].
    pub fn build_http<B>(self) -> Client<TcpConnector, B>
    where
        B: Body + Send,
        B::Data: Send,
    {
        let tcp = self.tcp_connector(self.resolver());
        self.build(tcp)
    }

    /// Builds a client for `http` and `https` URIs and for HTTP/1 and HTTP/2, with a [`TcpConnector`] and the root
    /// certificates of the system.
    ///
    /// # Errors
    ///
    /// Fails if the certificates of the system cannot be read.
    #[cfg(feature = "rustls")]
    #[cfg_attr(docsrs, doc(cfg(feature = "rustls")))]
    pub fn build_https<B>(
        self,
    ) -> std::io::Result<Client<hyper_rustls::HttpsConnector<TcpConnector>, B>>
    where
        B: Body + Send,
        B::Data: Send,
    {
        use rustls::crypto::{CryptoProvider, ring};

        // The provider that the process has installed, if there is one.
        let provider = CryptoProvider::get_default().cloned();
        let provider = provider.unwrap_or_else(|| ring::default_provider().into());
        let builder = hyper_rustls::HttpsConnectorBuilder::new()
            .with_provider_and_native_roots(provider)?
            .https_or_http()
            .enable_all_versions();
        let tcp = self.tcp_connector(self.resolver()).for_tls();
        Ok(self.build(builder.wrap_connector(tcp)))
    }

    /// Builds a client that opens connections with this connector.
    pub fn build<C, B>(mut self, connector: C) -> Client<C, B>
    where
        Connector<C>: Connect + Clone,
        C: Service<Uri> + Clone,
        B: Body + Send,
        B::Data: Send,
    {
        // Connections close themselves at `max_idle`, and the pool only has to remove the closed ones. A short
        // timeout of the pool would be wrong: the pool regards an HTTP/2 connection as idle while it serves a long
        // stream.
        let idle = match self.connections.shared.settings.max_idle.load(Ordering::Relaxed) {
            NEVER => HOUR,
            idle => Duration::from_nanos(idle).max(HOUR / 12),
        };
        self.hyper.pool_idle_timeout(idle);
        let (connections, is_http2) = (self.connections.handle(), self.is_http2);
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let lanes = Lanes {
            client_id: NEXT.fetch_add(1, Ordering::Relaxed),
            connector: self.connections.connector(connector, None),
            hyper: self.hyper,
            clients: [const { OnceLock::new() }; MAX_LANES],
        };
        Client { lanes: Arc::new(lanes), connections, is_http2 }
    }

    /// Returns a TCP connector with the settings of this builder, for a resolver of your own or TLS of your own.
    ///
    /// The connector divides the connect timeout among the addresses of a host. The resolver is a service from
    /// [`Name`](hyper_util::client::legacy::connect::dns::Name) to socket addresses. Call
    /// [`for_tls`](TcpConnector::for_tls) before you wrap a TLS connector around it.
    ///
    /// ```
    /// use buttress::connect::{Client, ConnectLayer};
    /// use hyper_util::client::legacy::connect::dns::Name;
    /// use std::{io, net::SocketAddr};
    /// use tower::service_fn;
    ///
    /// let addresses = |_: Name| async {
    ///     Ok::<_, io::Error>([[10, 0, 0, 1], [10, 0, 0, 2]].map(|ip| SocketAddr::from((ip, 0))).into_iter())
    /// };
    /// let builder = Client::builder(ConnectLayer::new());
    /// let connector = builder.tcp_connector(service_fn(addresses));
    /// let client = builder.build(connector);
    /// # let _ = client.request(http::Request::new(String::new()));
    /// ```
    pub fn tcp_connector<R>(&self, resolver: R) -> TcpConnector<R> {
        let mut tcp = HttpConnector::new_with_resolver(resolver);
        tcp.set_nodelay(true);
        tcp.set_keepalive(self.tcp.map(|tcp| tcp.after));
        tcp.set_keepalive_interval(self.tcp.map(|tcp| tcp.every));
        tcp.set_keepalive_retries(self.tcp.map(|tcp| tcp.times));
        self.connections.shared.set_in_use();
        TcpConnector::new(tcp, &self.connections.shared)
    }

    fn resolver(&self) -> Resolver {
        Resolver::new(self.connections.shared.lookups.clone())
    }

    /// Returns the builder if all settings of the layer and of the builder are valid.
    ///
    /// # Errors
    ///
    /// Fails for the first invalid setting. The [`ConfigError`] names the field, the value and the remedy.
    pub fn checked(self) -> Result<Self, ConfigError> {
        let Self { connections, hyper, tcp, is_http2 } = self;
        Ok(Self { connections: connections.checked()?, hyper, tcp, is_http2 })
    }
}
