//! The clients under test: the ready-made stack, and the one that the documentation builds by hand.

use buttress::{
    Attempts, BoxError, CircuitBreakerLayer, RetryLayer, breaker::CircuitBreakerHandle,
    config::ClientConfig,
};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tower::{Service, ServiceBuilder, ServiceExt};

pub type Body = Full<Bytes>;

/// A client for HTTP.
pub trait HttpClient:
    Service<
        Request<Body>,
        Response = Response<Self::ResponseBody>,
        Error: Into<BoxError>,
        Future: Send,
    > + Clone
    + Send
    + Sync
    + 'static
{
    type ResponseBody: http_body::Body<Data: Send, Error: Into<BoxError>> + Send;
}

impl<S, B> HttpClient for S
where
    S: Service<Request<Body>, Response = Response<B>, Error: Into<BoxError>, Future: Send>,
    S: Clone + Send + Sync + 'static,
    B: http_body::Body<Data: Send, Error: Into<BoxError>> + Send,
{
    type ResponseBody = B;
}

/// `buttress::client` with its defaults.
pub fn ready_made(is_http2: bool) -> (impl HttpClient, CircuitBreakerHandle) {
    let client = buttress::client::<Body>(&config(is_http2)).unwrap();
    let circuit = client.handle().breaker();
    (client, circuit)
}

pub fn config(is_http2: bool) -> ClientConfig {
    let mut config = ClientConfig::default();
    config.name = "peer".to_owned();
    config.connect.http2_only = is_http2;
    config
}

/// Retry and circuit breaker with their defaults around hyper-util's client.
pub fn hand_built(is_http2: bool) -> (impl HttpClient, CircuitBreakerHandle) {
    let breaker = CircuitBreakerLayer::http();
    let circuit = breaker.handle();
    let client = ServiceBuilder::new()
        .layer(RetryLayer::http())
        .layer(breaker)
        .service(Client::builder(TokioExecutor::new()).http2_only(is_http2).build_http());
    (client, circuit)
}

/// Sends a `GET` and reads the response to its end. Returns an error unless it is `200 ok`.
pub async fn get(client: impl HttpClient, uri: &str) -> Result<Attempts, BoxError> {
    let request = Request::get(uri).body(Body::default())?;
    let response = client.oneshot(request).await.map_err(Into::into)?;
    let attempts = Attempts::of(&response);
    let (head, body) = response.into_parts();
    let body = body.collect().await.map_err(Into::into)?.to_bytes();
    match head.status {
        StatusCode::OK if body == "ok" => Ok(attempts),
        status => Err(format!("status {status}, body {body:?}").into()),
    }
}
