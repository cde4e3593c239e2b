//! A gateway for untrusted clients: a server under its layers, whose handler passes deadlines on to a client under its
//! layers. All settings have their default where one exists, except the time limits for clients that stop sending or
//! reading.

use std::{net::SocketAddr, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::Request,
    http::{StatusCode, Uri, header},
    response::Response,
};
use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, ConfigError, ConnectLayer, Deadline,
    DeadlineLayer, Health, Lifecycle, RetryLayer, TimeoutLayer,
    breaker::{CircuitBreakerHandle, CircuitState, KeyedCircuitBreakerHandle},
    connect::{Client, ConnectHandle},
    lifecycle::Drained,
    limit::ConcurrencyLimitHandle,
};
use tokio::{net::TcpListener, task::JoinHandle};
use tower::{ServiceBuilder, ServiceExt};

use crate::{upstream::Upstream, verdict::Verdict};

pub const DEADLINE_HEADER: &str = "x-request-timeout-ms";
/// The gateway has a circuit for each value of this header.
pub const KEY_HEADER: &str = "x-tenant";
/// Maximum number of these circuits.
const MAX_KEYS: usize = 64;
/// Time limits for clients that send nothing, send slowly or do not read. The defaults are longer than the exchanges of
/// this program.
const STAGE_TIME: Duration = Duration::from_secs(2);
/// Number of permits of either limit.
const LIMIT: usize = 256;
const QUEUE: (usize, Duration) = (1024, Duration::from_secs(5));

pub struct Gateway {
    pub addr: SocketAddr,
    protocol: &'static str,
    server_limit: ConcurrencyLimitHandle,
    client_limit: ConcurrencyLimitHandle,
    breaker: CircuitBreakerHandle,
    tenants: KeyedCircuitBreakerHandle<String>,
    connections: ConnectHandle,
    lifecycle: Lifecycle,
    task: JoinHandle<Result<Drained, ConfigError>>,
    upstream: Upstream,
}

impl Gateway {
    /// Starts a gateway and its upstream, which it calls over HTTP/2 or HTTP/1.
    pub async fn start(is_http2: bool) -> Result<Self, BoxError> {
        let upstream = Upstream::start(is_http2).await?;
        let (breaker, connections) = (CircuitBreakerLayer::http(), ConnectLayer::new());
        let client_limit = ConcurrencyLimitLayer::new(LIMIT).queue(QUEUE.0, QUEUE.1);
        let server_limit =
            ConcurrencyLimitLayer::new(LIMIT).queue(QUEUE.0, QUEUE.1).max_unread(STAGE_TIME);
        let tenants = CircuitBreakerLayer::http().keyed(key as fn(&_) -> _).max_keys(MAX_KEYS);
        let tenants_handle = tenants.handle();
        let (breaker_handle, connections_handle) = (breaker.handle(), connections.handle());
        let (client_limit_handle, server_limit_handle) =
            (client_limit.handle(), server_limit.handle());

        let builder = Client::builder(connections);
        let builder = if is_http2 { builder.http2_only() } else { builder };
        let client = ServiceBuilder::new()
            .layer(RetryLayer::http())
            .layer(tenants)
            .layer(breaker)
            .layer(client_limit.checked()?)
            .layer(DeadlineLayer::new().header(DEADLINE_HEADER).propagate_only())
            .layer(TimeoutLayer::http())
            .service(builder.checked()?.build_http());
        let target = upstream.addr;
        let forward = async move |request: Request| {
            let request = to_upstream(request, target).ok_or(StatusCode::BAD_REQUEST)?;
            match client.oneshot(request).await {
                Ok(response) => Ok::<Response, _>(response.map(Body::new)),
                Err(_) => Err(StatusCode::BAD_GATEWAY),
            }
        };

        let health = Health::new();
        let lifecycle =
            Lifecycle::without_signals(&health)?.drain_delay(Duration::ZERO).drain_timeout(QUEUE.1);
        let stack = ServiceBuilder::new()
            .layer(DeadlineLayer::new().header(DEADLINE_HEADER).respond())
            .layer(server_limit.checked()?.respond())
            .layer(TimeoutLayer::server().body_grace(STAGE_TIME).checked()?.respond());
        let app = Router::new().fallback(forward).layer(stack);
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let addr = listener.local_addr()?;
        lifecycle.ready();
        let serving = lifecycle.clone();
        Ok(Self {
            addr,
            protocol: if is_http2 { "HTTP/2" } else { "HTTP/1" },
            server_limit: server_limit_handle,
            client_limit: client_limit_handle,
            breaker: breaker_handle,
            tenants: tenants_handle,
            connections: connections_handle,
            lifecycle,
            task: tokio::spawn(async move {
                let server = serving.server().head_timeout(STAGE_TIME).write_timeout(STAGE_TIME);
                server.serve(listener, app).await
            }),
            upstream,
        })
    }

    fn gauges(&self) -> [(&'static str, usize); 8] {
        let (server, client) = (self.server_limit.snapshot(), self.client_limit.snapshot());
        let connections = self.connections.snapshot();
        [
            ("permits of the server's limit held", server.in_flight as usize),
            ("callers in the queue of the server's limit", server.waiting as usize),
            ("permits of the client's limit held", client.in_flight as usize),
            ("callers in the queue of the client's limit", client.waiting as usize),
            ("probe slots held", self.breaker.snapshot().probes),
            ("connections in use", connections.in_use),
            ("connections being made", connections.connecting),
            ("callers that wait for a connection", connections.waiting),
        ]
    }

    pub fn is_quiet(&self) -> bool {
        self.lifecycle.in_flight() == 0 && self.gauges().iter().all(|(_, value)| *value == 0)
    }

    pub fn judge(&self, verdict: &mut Verdict) {
        let name = format!("{} gateway", self.protocol);
        for (what, value) in self.gauges() {
            verdict.zero(&format!("{name}: {what}"), value);
        }
        verdict.places(&format!("{name}'s server"), &self.server_limit, LIMIT);
        verdict.places(&format!("{name}'s client"), &self.client_limit, LIMIT);
        // The upstream is healthy all the time.
        let breaker = self.breaker.snapshot();
        let is_closed = breaker.state == CircuitState::Closed;
        verdict.that(is_closed, format!("{name}: circuit is {:?}", breaker.state));
        verdict.that(
            breaker.opened == 0,
            format!(
                "{name}: circuit opened {} times, last by {:?}, and rejected {} calls",
                breaker.opened, breaker.last_trip, breaker.rejected
            ),
        );
        let tenants = self.tenants.snapshot();
        verdict.that(
            tenants.circuits <= MAX_KEYS,
            format!("{name}: {} circuits for strange keys", tenants.circuits),
        );
        verdict.happened(&format!("{name}: circuits evicted for new keys"), tenants.evicted);
        verdict.happened(&format!("{name}: keys above the maximum size"), tenants.oversized);
        self.upstream.judge(self.protocol, verdict);
    }

    /// Drains the gateway. Returns the result of the drain, and the connections to the upstream. All of these must
    /// close soon.
    pub async fn end(self) -> Result<(Drained, ConnectHandle), BoxError> {
        self.lifecycle.drain();
        let drained = self.task.await??;
        self.upstream.end();
        Ok((drained, self.connections))
    }
}

/// The key of a request.
fn key<B>(request: &http::Request<B>) -> String {
    let value = request.headers().get(KEY_HEADER);
    value.and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
}

/// The request to the upstream: with the same method, path, body and deadline.
fn to_upstream(request: Request, upstream: SocketAddr) -> Option<Request> {
    let (head, body) = request.into_parts();
    let mut request = Request::new(body);
    *request.method_mut() = head.method;
    *request.uri_mut() = Uri::builder()
        .scheme("http")
        .authority(upstream.to_string())
        .path_and_query(head.uri.path_and_query()?.clone())
        .build()
        .ok()?;
    if let Some(content_type) = head.headers.get(header::CONTENT_TYPE) {
        request.headers_mut().insert(header::CONTENT_TYPE, content_type.clone());
    }
    if let Some(key) = head.headers.get(KEY_HEADER) {
        request.headers_mut().insert(KEY_HEADER, key.clone());
    }
    if let Some(deadline) = Deadline::of(&head.extensions) {
        request.extensions_mut().insert(deadline);
    }
    Some(request)
}
