use std::{
    fmt,
    future::poll_fn,
    task::{Context, Poll},
};

use http::{HeaderMap, Request, Response, Uri};
use http_body::Body;
use tower_layer::Layer;
use tower_service::Service;

use super::{
    client::{ClientHandle, ClientStack, ClientStackService},
    future::{ClientFuture, ClientResponse},
    handle::HealthCheck,
};
use crate::{
    attempt::ReplayBody,
    client_error::ClientError,
    config::{ClientConfig, ConfigErrors},
    connect::{self, ConnectLayer},
    drain::drain_response,
    error::{BoxError, ConfigError},
    health::HealthProbe,
    timeout::SendingBody,
};

#[cfg(not(feature = "rustls"))]
use crate::connect::TcpConnector as UpstreamConnector;
#[cfg(feature = "rustls")]
type UpstreamConnector = hyper_rustls::HttpsConnector<connect::TcpConnector>;

type Upstream<B> = connect::Client<UpstreamConnector, SendingBody<ReplayBody<ReplayBody<B>>>>;
type LayeredUpstream<B> = ClientStackService<HealthProbe<Upstream<B>>>;

/// The body type of health probes. An empty string is an empty body.
type ProbeBody = String;

/// Returns the recommended client with the settings of this configuration: a [`ClientStack`] around a
/// [`connect::Client`].
///
/// If `health_probe_uri` is set, the upstream is probed in the background over a separate connection, and calls are
/// rejected while it is down. The probes begin at once in a Tokio runtime, and otherwise with the first call.
///
/// The client is for `http` URIs, and with the feature `rustls` also for `https`. It is a Tower service, for layers
/// around it.
///
/// ```no_run
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// use buttress::config::ClientConfig;
/// use http_body_util::Empty;
///
/// let config = ClientConfig::from_env("search")?;
/// let client = buttress::client(&config)?;
/// let request = http::Request::get("http://localhost:8080/").body(Empty::<bytes::Bytes>::new())?;
/// let response = client.request(request).await?;
/// println!("{} {:?}", response.status(), client.handle().snapshot());
/// # Ok(()) }
/// ```
///
/// # Errors
///
/// Returns the errors of [`check`](ClientConfig::check). With `rustls`, fails if the certificates of the system cannot
/// be read.
pub fn client<B>(config: &ClientConfig) -> Result<StackClient<B>, ConfigErrors>
where
    B: Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    let one = |error: ConfigError| ConfigErrors(vec![error]);
    let mut stack = ClientStack::new(config)?;
    let mut connections = config.connect.layer().map_err(one)?;
    if !config.name.is_empty() {
        connections = connections.name(&config.name);
    }
    stack.connections = Some(connections.handle());
    let mut probe = config.health_probe.layer::<ProbeBody>().map_err(one)?;
    if !config.name.is_empty() {
        probe = probe.name(&config.name);
    }
    if config.health_probe.uri.is_some() {
        stack.probe = Some(probe.handle());
        // A probe has a separate connection, because calls that hang could occupy all others.
        let time = config.connect.timeout;
        let own = ConnectLayer::new().max_per_host(1).connect_timeout(time);
        drop(probe.layer(over::<ProbeBody>(config, own)?));
    }
    let inner = probe.gate(over(config, connections)?);
    Ok(StackClient { service: stack.layer(inner), handle: stack.handle() })
}

/// Returns a client over these connections.
fn over<B>(
    config: &ClientConfig,
    connections: ConnectLayer,
) -> Result<connect::Client<UpstreamConnector, B>, ConfigErrors>
where
    B: Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    let builder = config.connect.client(connections);
    #[cfg(feature = "rustls")]
    let client = builder.build_https().map_err(|error| {
        let remedy = "the system's certificates cannot be read: install them";
        ConfigErrors(vec![ConfigError::new("tls", error, remedy)])
    })?;
    #[cfg(not(feature = "rustls"))]
    let client = builder.build_http();
    Ok(client)
}

/// The recommended client, made by [`client`]. Clones share its connections and its state.
pub struct StackClient<B: Body> {
    service: LayeredUpstream<B>,
    handle: ClientHandle,
}

impl<B: Body> StackClient<B> {
    /// Returns the handle of the client, which reads its state and changes its settings.
    #[must_use]
    pub fn handle(&self) -> ClientHandle {
        self.handle.clone()
    }
}

impl<B> StackClient<B>
where
    B: Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    /// Sets a closure that writes `traceparent` or any other header to each attempt, as
    /// [`AttemptHeadersLayer`](crate::retry::AttemptHeadersLayer) does. By default there is no closure. The client
    /// keeps its connections and its state.
    #[must_use]
    pub fn attempt_headers(
        self,
        write: impl Fn(u32, &mut HeaderMap) + Send + Sync + 'static,
    ) -> Self {
        let Self { service, handle } = self;
        let stack = handle.stack.clone().attempt_headers(write);
        Self { service: stack.layer(service.get_ref().clone()), handle }
    }

    /// Sends a request through the whole stack.
    ///
    /// # Errors
    ///
    /// Fails with a [`ClientError`], whose [kind](ClientError::kind) states what failed.
    ///
    /// # Cancellation
    ///
    /// Dropping the future drops the attempt in flight. No further attempt is made.
    pub async fn request(
        &self,
        request: Request<B>,
    ) -> Result<<Self as Service<Request<B>>>::Response, ClientError> {
        let mut client = self.clone();
        poll_fn(|cx| client.poll_ready(cx)).await?;
        client.call(request).await
    }
}

impl<B> StackClient<B>
where
    B: Body + Default + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    /// Requests the `check_health_uri` of the configuration, or else its `health_probe_uri`, through the whole stack. A
    /// 2xx is healthy. If neither is set, returns the result of the state of the stack alone.
    pub async fn check_health(&self) -> HealthCheck {
        let config = self.handle.config();
        let uri = config.check_health.uri.or(config.health_probe.uri);
        let Some(uri) = uri.and_then(|uri| Uri::try_from(uri).ok()) else {
            return self.handle.check_health(async { Ok::<_, BoxError>(Response::new(())) }).await;
        };
        let mut request = Request::new(B::default());
        *request.uri_mut() = uri;
        let probe = async {
            let (head, body) = self.request(request).await?.into_parts();
            // The body is drained, so that the connection can be reused.
            drain_response(body).await;
            Ok::<_, ClientError>(Response::from_parts(head, ()))
        };
        self.handle.check_health(probe).await
    }
}

impl<B> Service<Request<B>> for StackClient<B>
where
    B: Body + Send + Unpin + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    type Response = ClientResponse<<LayeredUpstream<B> as Service<Request<B>>>::Response>;
    type Error = ClientError;
    type Future = ClientFuture<<LayeredUpstream<B> as Service<Request<B>>>::Future>;

    #[inline]
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ClientError>> {
        self.service.poll_ready(cx).map_err(ClientError::new)
    }

    #[inline]
    fn call(&mut self, request: Request<B>) -> Self::Future {
        ClientFuture::new(self.service.call(request))
    }
}

impl<B: Body> Clone for StackClient<B> {
    fn clone(&self) -> Self {
        Self { service: self.service.clone(), handle: self.handle.clone() }
    }
}

impl<B: Body> fmt::Debug for StackClient<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StackClient").field("handle", &self.handle).finish_non_exhaustive()
    }
}
