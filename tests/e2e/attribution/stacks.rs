//! Each layer alone, a stack by hand, and both ready-made stacks.

use std::time::Duration;

use axum::{Router, body::Body, extract::State, middleware::from_fn, routing::any};
use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, Deadline, DeadlineLayer, DeadlineSource,
    HealthProbeLayer, HedgeLayer, RetryLayer, TimeoutLayer, Trip,
    breaker::CircuitBreakerHandle,
    config::{ClientConfig, ServerConfig},
    connect::{Client, ConnectLayer, TcpConnector},
    health::{HealthProbeHandle, ProbeState},
    limit::{ConcurrencyLimitHandle, adaptive::Aimd},
    stack::{ClientHandle, ClientStack, ServerHandle},
};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use http::{Request, Response, StatusCode, Uri};
use http_body_util::BodyExt;
use tower::{Layer, Service, ServiceBuilder, ServiceExt, util::BoxCloneSyncService};
use tower_http::map_request_body::MapRequestBodyLayer;

use super::causes::{Cause, SLOW};
use crate::support::{
    net::{self, until},
    scripted_peer::{self, End, Second},
};

pub const DEADLINE_HEADER: &str = "x-request-timeout-ms";

/// The header in which the caller of a server sends the deadline for the extensions of its request.
const EXTENSION_HEADER: &str = "x-extension-ms";

/// The header in which the caller of a server names the upstream for the server to call.
const UPSTREAM_HEADER: &str = "x-upstream";

/// Shorter than the time after which callers hang up.
const HEDGE_DELAY: Duration = Duration::from_millis(300);

/// The version of HTTP to the upstream.
#[derive(Clone, Copy, Debug)]
pub enum Wire {
    Http1,
    Http2,
}

impl Wire {
    pub fn of(cause: Cause) -> Self {
        if cause.is_http2() { Self::Http2 } else { Self::Http1 }
    }

    fn client<B>(self) -> Client<TcpConnector, B>
    where
        B: http_body::Body<Data: Send, Error: Into<BoxError>> + Send + Unpin + 'static,
    {
        let builder = Client::builder(ConnectLayer::new());
        match self {
            Self::Http1 => builder.build_http(),
            Self::Http2 => builder.http2_only().build_http(),
        }
    }
}

pub type Call = BoxCloneSyncService<Request<Body>, Response<Body>, BoxError>;

/// A service under test, with the handles of its layers.
pub struct Stack {
    service: Call,
    pub circuits: Vec<CircuitBreakerHandle>,
    limits: Vec<ConcurrencyLimitHandle>,
    probe: Option<HealthProbeHandle>,
    clients: Vec<ClientHandle>,
    servers: Vec<ServerHandle>,
    /// The stack retries connection housekeeping.
    pub retries: bool,
}

impl Stack {
    fn of<S, B>(service: S) -> Self
    where
        S: Service<Request<Body>, Response = Response<B>> + Clone + Send + Sync + 'static,
        S::Future: Send,
        S::Error: Into<BoxError>,
        B: http_body::Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        let service = service
            .map_response(|response: Response<B>| response.map(Body::new))
            .map_err(Into::<BoxError>::into);
        Self {
            service: BoxCloneSyncService::new(service),
            circuits: Vec::new(),
            limits: Vec::new(),
            probe: None,
            clients: Vec::new(),
            servers: Vec::new(),
            retries: false,
        }
    }

    /// Wraps the service in a deadline layer, which drops calls in flight.
    fn under_deadline<S, B>(service: S) -> Self
    where
        S: Service<Request<Body>, Response = Response<B>> + Clone + Send + Sync + 'static,
        S::Future: Send,
        S::Error: Into<BoxError>,
        B: http_body::Body<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        Self::of(DeadlineLayer::new().header(DEADLINE_HEADER).layer(service))
    }

    fn circuit(mut self, layer: &CircuitBreakerLayer) -> Self {
        self.circuits.push(layer.handle());
        self
    }

    fn limit(mut self, layer: &ConcurrencyLimitLayer) -> Self {
        self.limits.push(layer.handle());
        self
    }

    fn retries(mut self) -> Self {
        self.retries = true;
        self
    }

    fn client(self, client: ClientHandle) -> Self {
        let mut this = self.retries();
        this.circuits.push(client.breaker());
        this.clients.push(client);
        this
    }

    pub async fn call(&self, request: Request<Body>) -> Result<Response<Body>, BoxError> {
        self.service.clone().oneshot(request).await
    }

    /// Returns the current value of each limit.
    pub fn limits(&self) -> Vec<u32> {
        self.limits.iter().map(|limit| limit.snapshot().limit).collect()
    }

    /// Waits until no permit and no probe slot is held.
    pub async fn settle(&self) {
        until(|| {
            self.limits.iter().all(|limit| limit.in_flight() == 0)
                && self.circuits.iter().all(|circuit| circuit.snapshot().probes == 0)
                && self.clients.iter().all(|client| client.snapshot().in_flight == 0)
                && self.servers.iter().all(|server| server.snapshot().in_flight == 0)
        })
        .await;
    }

    pub fn assert_probe_is_not_down(&self, case: &str) {
        let Some(probe) = &self.probe else { return };
        let snapshot = probe.snapshot();
        assert_ne!(snapshot.state, ProbeState::Down, "{case}: {snapshot:?}");
    }
}

pub type Build = fn(Wire) -> BoxFuture<'static, Stack>;

pub const STACKS: [(&str, Build); 11] = [
    ("circuit breaker", |wire| Box::pin(async move { circuit_breaker(wire) })),
    ("slow rule over a timeout", |wire| Box::pin(async move { slow_rule(wire) })),
    ("adaptive limit", |wire| Box::pin(async move { adaptive_limit(wire) })),
    ("limit over a timeout", |wire| Box::pin(async move { limit_over_timeout(wire) })),
    ("retry", |wire| Box::pin(async move { retry(wire) })),
    ("hedge", |wire| Box::pin(async move { hedge(wire) })),
    ("health probe", |wire| Box::pin(health_probe(wire))),
    ("by hand", |wire| Box::pin(async move { by_hand(wire) })),
    ("ready-made layer", |wire| Box::pin(async move { ready_made_layer(wire) })),
    ("ready-made client", |wire| Box::pin(async move { ready_made_client(wire) })),
    ("ready-made server", |wire| Box::pin(ready_made_server(wire))),
];

/// A breaker that opens at the first failure.
fn opens_at_first_failure() -> CircuitBreakerLayer {
    CircuitBreakerLayer::new(Trip::consecutive(1))
}

/// A breaker that opens at the first failure and at the first slow call.
fn opens_at_first_failure_or_slow_call() -> CircuitBreakerLayer {
    let slow = Trip::slow_ratio(0.1, SLOW).over(1).min_calls(1);
    CircuitBreakerLayer::new(Trip::any([Trip::consecutive(1), slow]))
}

/// A limit that decreases with every drop and every slow call.
fn aimd() -> ConcurrencyLimitLayer {
    let aimd = Aimd::new(50, 1..=100).unwrap().timeout(SLOW).unwrap();
    ConcurrencyLimitLayer::adaptive(aimd)
}

fn circuit_breaker(wire: Wire) -> Stack {
    let breaker = opens_at_first_failure();
    Stack::under_deadline(breaker.layer(wire.client())).circuit(&breaker)
}

fn slow_rule(wire: Wire) -> Stack {
    let breaker = opens_at_first_failure_or_slow_call();
    let service = ServiceBuilder::new()
        .layer(breaker.clone())
        .layer(TimeoutLayer::http())
        .layer(MapRequestBodyLayer::new(Body::new))
        .service(wire.client());
    Stack::of(DeadlineLayer::new().header(DEADLINE_HEADER).propagate_only().layer(service))
        .circuit(&breaker)
}

/// No layer reveals when an upload has been sent, so the limit has a longer timeout.
fn adaptive_limit(wire: Wire) -> Stack {
    let aimd = Aimd::new(50, 1..=100).unwrap().timeout(4 * SLOW).unwrap();
    let limit = ConcurrencyLimitLayer::adaptive(aimd).until_body_end();
    Stack::under_deadline(limit.layer(wire.client())).limit(&limit)
}

fn limit_over_timeout(wire: Wire) -> Stack {
    let limit = aimd().until_body_end();
    let service = ServiceBuilder::new()
        .layer(limit.clone())
        .layer(TimeoutLayer::http())
        .layer(MapRequestBodyLayer::new(Body::new))
        .service(wire.client());
    Stack::under_deadline(service).limit(&limit)
}

/// The retry repeats calls that the circuit inside of it must not count.
fn retry(wire: Wire) -> Stack {
    let breaker = opens_at_first_failure_or_slow_call();
    let service = ServiceBuilder::new()
        .layer(DeadlineLayer::new().header(DEADLINE_HEADER).propagate_only())
        .layer(RetryLayer::http())
        .layer(breaker.clone())
        .layer(MapRequestBodyLayer::new(Body::new))
        .service(wire.client());
    Stack::of(service).circuit(&breaker).retries()
}

/// Two attempts of each call are in flight when it ends early.
fn hedge(wire: Wire) -> Stack {
    let breaker = opens_at_first_failure_or_slow_call();
    let service = ServiceBuilder::new()
        .layer(HedgeLayer::http(HEDGE_DELAY).without_budget())
        .layer(breaker.clone())
        .layer(MapRequestBodyLayer::new(Body::new))
        .service(wire.client());
    Stack::under_deadline(service).circuit(&breaker)
}

/// The connections of the layer's own health probes end by the same housekeeping.
async fn health_probe(wire: Wire) -> Stack {
    let probed = match wire {
        Wire::Http1 => scripted_peer::responds_once(End::Fin).await,
        Wire::Http2 => scripted_peer::http2(Second::GoAway(0)).await,
    };
    let layer = HealthProbeLayer::get::<Body>(&format!("http://{}/", probed.addr))
        .every(Duration::from_millis(20))
        .jitter(0.0)
        .thresholds(1, 1);
    let mut stack = Stack::under_deadline(layer.layer(wire.client()));
    stack.probe = Some(layer.handle());
    let probes = layer.handle();
    until(|| probes.snapshot().probes >= 4).await;
    stack
}

fn by_hand(wire: Wire) -> Stack {
    let (breaker, limit) = (opens_at_first_failure_or_slow_call(), aimd());
    let service = ServiceBuilder::new()
        .layer(DeadlineLayer::new().header(DEADLINE_HEADER).propagate_only())
        .layer(RetryLayer::http())
        .layer(HedgeLayer::http(HEDGE_DELAY))
        .layer(breaker.clone())
        .layer(limit.clone())
        .layer(TimeoutLayer::http())
        .layer(MapRequestBodyLayer::new(Body::new))
        .service(wire.client());
    Stack::of(service).circuit(&breaker).limit(&limit).retries()
}

// ===== Ready-made =====

fn config(wire: Wire) -> ClientConfig {
    let mut config = ClientConfig::default();
    config.deadline.header = Some(DEADLINE_HEADER.to_owned());
    config.connect.http2_only = matches!(wire, Wire::Http2);
    config
}

fn ready_made_layer(wire: Wire) -> Stack {
    let stack = ClientStack::new(&config(wire)).unwrap();
    let inner = MapRequestBodyLayer::new(Body::new).layer(wire.client());
    Stack::of(stack.layer(inner)).client(stack.handle())
}

fn ready_made_client(wire: Wire) -> Stack {
    let client = buttress::client(&config(wire)).unwrap();
    let handle = client.handle();
    Stack::of(client).client(handle)
}

/// A server of the default stack that passes each call on, by a client of the default stack.
async fn ready_made_server(wire: Wire) -> Stack {
    let client = buttress::client(&config(wire)).unwrap();
    let mut server = ServerConfig::default();
    server.deadline.header = Some(DEADLINE_HEADER.to_owned());
    let server = buttress::server(&server).unwrap();
    let handles = (client.handle(), server.handle());
    let router = Router::new()
        .fallback(any(pass_on))
        .with_state(client)
        .layer(server)
        .layer(from_fn(deadline_extension));
    let addr = net::serve(router).await;
    let visitor: net::HyperClient<Body> = net::client();
    let service = tower::service_fn(move |request| {
        let visitor = visitor.clone();
        async move { visitor.request(to_server(request, addr)).await }
    });
    let mut stack = Stack::of(service).client(handles.0);
    stack.servers.push(handles.1);
    stack
}

/// Converts a call to an upstream into the request that a visitor sends to the server.
fn to_server(mut request: Request<Body>, server: std::net::SocketAddr) -> Request<Body> {
    let upstream = request.uri().authority().unwrap().to_string();
    let uri = format!("http://{server}{}", request.uri().path());
    *request.uri_mut() = uri.parse().unwrap();
    request.headers_mut().insert(UPSTREAM_HEADER, upstream.parse().unwrap());
    if let Some(deadline) = request.extensions().get::<Deadline>() {
        let left = deadline.left().as_millis().to_string();
        request.headers_mut().insert(EXTENSION_HEADER, left.parse().unwrap());
    }
    request
}

async fn deadline_extension(
    mut request: Request<Body>,
    next: axum::middleware::Next,
) -> Response<Body> {
    if let Some(left) = request.headers().get(EXTENSION_HEADER) {
        let left = Duration::from_millis(left.to_str().unwrap().parse().unwrap());
        let deadline = Deadline::after(left).with_source(DeadlineSource::Caller);
        request.extensions_mut().insert(deadline);
    }
    next.run(request).await
}

async fn pass_on(
    State(client): State<buttress::stack::StackClient<Body>>,
    request: Request<Body>,
) -> Result<Response<Body>, StatusCode> {
    let (head, body) = request.into_parts();
    let upstream = head.headers[UPSTREAM_HEADER].to_str().unwrap();
    let uri: Uri = format!("http://{upstream}{}", head.uri.path()).parse().unwrap();
    let mut request = Request::builder().method(head.method).uri(uri);
    if let Some(content_type) = head.headers.get("content-type") {
        request = request.header("content-type", content_type);
    }
    if let Some(deadline) = head.extensions.get::<Deadline>() {
        request = request.extension(*deadline);
    }
    match client.request(request.body(body).unwrap()).await {
        Ok(response) => Ok(response.map(|body| Body::new(body.map_err(Into::<BoxError>::into)))),
        Err(_) => Err(StatusCode::GATEWAY_TIMEOUT),
    }
}
