//! A client and its server, without layers and with layers.

use std::time::Duration;

use axum::{Router, routing::get};
use buttress::{
    BoxError, CircuitBreakerLayer, ConcurrencyLimitLayer, DeadlineLayer, Health, Lifecycle,
    RetryLayer, TimeoutLayer,
};
use bytes::Bytes;
use http::{Request, Response, Uri};
use http_body_util::Empty;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::{net::TcpListener, time::sleep};
use tower::{Service, ServiceBuilder};

use crate::CONNECTIONS;

pub const SERVER: &str = "health routes, lifecycle, deadline, concurrency limit, timeout";
pub const CLIENT: &str = "deadline, retry, circuit breaker, concurrency limit, timeout";

pub type Body = Empty<Bytes>;

/// The time that the waiting handler waits.
pub const WAIT: Duration = Duration::from_millis(10);

/// A client, and the URI that it calls.
pub struct Side<S> {
    pub client: S,
    pub uri: Uri,
}

/// The service type of both clients.
pub trait Calls:
    Service<Request<Body>, Response = Response<Self::Answer>, Error: Into<BoxError>, Future: Send>
    + Clone
    + Send
    + Sync
    + 'static
{
    type Answer: http_body::Body<Data: Send, Error: Into<BoxError>> + Send;
}

impl<S, B> Calls for S
where
    S: Service<Request<Body>, Response = Response<B>> + Clone + Send + Sync + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    B: http_body::Body<Data: Send, Error: Into<BoxError>> + Send,
{
    type Answer = B;
}

pub async fn plain(path: &str) -> Result<Side<impl Calls>, BoxError> {
    Ok(Side { client: http(), uri: serve(routes(), path).await? })
}

pub async fn layered(path: &str) -> Result<Side<impl Calls>, BoxError> {
    let health = Health::new();
    let lifecycle = Lifecycle::without_signals(&health)?;
    lifecycle.ready();
    let stack = ServiceBuilder::new()
        .layer(health.endpoints())
        .layer(lifecycle.layer())
        .layer(DeadlineLayer::new().default_of(Duration::from_secs(30)).propagate_only())
        .layer(ConcurrencyLimitLayer::new(512).queue(128, Duration::from_millis(200)).respond())
        .layer(TimeoutLayer::server().respond());
    let uri = serve(routes().layer(stack), path).await?;
    let client = ServiceBuilder::new()
        .layer(DeadlineLayer::new().default_of(Duration::from_secs(10)).propagate_only())
        .layer(RetryLayer::http())
        .layer(CircuitBreakerLayer::http())
        .layer(ConcurrencyLimitLayer::new(CONNECTIONS).queue(500, Duration::from_secs(5)))
        .layer(TimeoutLayer::http())
        .service(http());
    Ok(Side { client, uri })
}

fn routes() -> Router {
    let waits = async || {
        sleep(WAIT).await;
        "hello"
    };
    Router::new().route("/", get(async || "hello")).route("/waits", get(waits))
}

async fn serve(app: Router, path: &str) -> Result<Uri, BoxError> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let addr = listener.local_addr()?;
    tokio::spawn(async move { axum::serve(listener, app).await });
    Ok(format!("http://{addr}{path}").parse()?)
}

fn http<B>() -> Client<HttpConnector, B>
where
    B: http_body::Body<Data: Send> + Send,
{
    let mut tcp = HttpConnector::new();
    tcp.set_nodelay(true);
    Client::builder(TokioExecutor::new()).build(tcp)
}
